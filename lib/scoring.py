"""Scores of many pictures: one scorer in memory at a time, shared by processes, kept by chunk, never computed twice."""

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from tqdm import tqdm

from lib import models, report
from lib.rows import folder_name
from lib.run import Ledger, UserError, open_image, write_table
from lib.settings import Settings

CHUNK = 128                                                    # pictures between two files
WORLD = ["alignment", "aesthetics", "utility"]                 # the embedded world's stand-ins for the learned scores


def names_of(s: Settings) -> list[str]:
    """The score columns."""
    return WORLD if s.scores == "world" else s.scores.split(",")


def version_of(s: Settings, score: str) -> str:
    """All that can move a score, in one line."""
    from lib import scorers
    if score == "world":
        code = [scorers.sha256(Path(__file__).with_name(name))[:12] for name in ("oracle.py", "world.py")]
        return f"world: the embedded world's oracle, oracle.py@{code[0]} world.py@{code[1]}"
    return scorers.version(score, weights_of(s).get(score, ""), models.dtype_of(s))


def weights_of(s: Settings) -> dict[str, str]:
    return dict(part.split("=", 1) for part in s.score_weights.split(",") if "=" in part)


def load(s: Settings, score: str):
    """score(prompts, images) -> {column: list of float}."""
    if score == "world":
        return score_world
    from lib import scorers
    scorer = scorers.load_scorer(score, weights_of(s).get(score, ""), str(models.device_of(s)), models.dtype_of(s))
    return lambda prompts, images: {score: scorer(prompts, images)}


def score_world(prompts: list[str], images: list) -> dict[str, list[float]]:
    from lib import oracle, world
    strange = [f"{p!r} is no caption of it" for p in prompts if world.parse(p) is None]
    strange += [f"a picture has {i.width} x {i.height} pixels" for i in images if i.size != (world.SIZE, world.SIZE)]
    if strange:
        raise UserError(f"--scores world: the embedded world knows its own captions and pictures of {world.SIZE} x "
                        f"{world.SIZE} only, and {strange[0]}; for others give --preset sd15, or other --scores")
    return {k: v.tolist() for k, v in oracle.score(prompts, report.as_tensor(images)).items()}


def score_rows(s: Settings, rows: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Every row's pictures (prompt, image) with all score columns, and the versions of the scorers.

    Chunks are fixed by a row's table, and processes take turns. A finished chunk is a file in
    eval/scores/<row>/<score>-<stamp>/; a finished row's chunks are joined into one file, by the main process.
    """
    state, run, versions = PartialState(), Path(s.run), []
    results = {name: jobs.copy() for name, jobs in rows.items()}
    for score in ["world"] if s.scores == "world" else names_of(s):
        versions.append(version_of(s, score))
        scorer = None
        for name, jobs in rows.items():
            folder = run / "eval/scores" / Path(jobs.image.iloc[0]).parent.name
            kept = folder / f"{folder_name(score, versions[-1])}.parquet"
            whole = pd.read_parquet(kept) if kept.exists() else None
            if whole is None or list(whole.image) != list(jobs.image):
                parts = [(kept.with_suffix("") / f"{i:06d}.parquet", jobs.iloc[i:i + CHUNK])
                         for i in range(0, len(jobs), CHUNK)]
                mine = [p for p in parts[state.process_index::state.num_processes]
                        if not p[0].exists() or list(pd.read_parquet(p[0]).image) != list(p[1].image)]
                with ThreadPoolExecutor(4) as readers:
                    for path, part in tqdm(mine, desc=f"{score} of {name}", unit="chunk",
                                           disable=not state.is_local_main_process):
                        scorer = scorer or load(s, score)
                        one = lambda i, image: open_image(run / image, Path("eval/scores.parquet"), i)
                        images = list(readers.map(one, part.index, part.image))
                        write_table(pd.DataFrame({"image": part.image} | scorer(part.prompt.tolist(), images)), path)
                state.wait_for_everyone()
                whole = pd.concat([pd.read_parquet(path) for path, _ in parts], ignore_index=True)
                state.wait_for_everyone()
                if state.is_main_process:
                    write_table(whole, kept)
                    shutil.rmtree(kept.with_suffix(""))
            for column in whole.columns.drop("image"):
                results[name][column] = whole[column].to_numpy()
        if scorer:
            del scorer
            gc.collect()
    return results, versions


def paint_rows(s: Settings, rows: dict[str, int | str], jobs: dict[str, pd.DataFrame], ledger: Ledger) -> None:
    """Draw the pictures that rows still lack, one model in memory at a time."""
    from lib.rows import load_row
    from lib.sampler import paint
    for name, where in rows.items():
        if not str(where).startswith("images:") and not all((Path(s.run) / i).exists() for i in jobs[name].image):
            paint(s, -1, jobs[name], ledger, f"eval {name}", keep_latents=False, unet=load_row(s, where))

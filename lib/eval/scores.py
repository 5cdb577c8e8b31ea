"""Scores of many pictures: one scorer in memory at a time, shared by processes, never made twice.

Stage 05 has a table of pictures for each row: `paint_rows` draws those that are not there yet, and
`score_rows` adds a column for each score. What a score is stands in lib/eval/scorers.py (the
learned ones) and lib/world/people.py (the embedded world's); what a row is, in lib/eval/rows.py.

A row's pictures are scored by chunks. A finished chunk is a file in
eval/scores/<row>/<scorer>-<hash>/, and a finished row the file <scorer>-<hash>.parquet beside that
folder. This hash is of the scorer's version, and <row> has one of what made the pictures, so that a
score is never taken for another's.
"""

import gc
import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lib import models
from lib.eval.rows import IMAGES, folder_name, load_row
from lib.models import BASE
from lib.run import (Ledger, UserError, bar, is_main, is_whole, my_share, open_made, wait,
                     write_table)
from lib.sampler import paint
from lib.settings import ROOT, Settings, labelled_elsewhere

# Pictures between two files.
CHUNK = 128

# The embedded world's stand-ins for the learned scores; one scorer gives all three. The first is
# what its people like.
WORLD = ["utility", "alignment", "aesthetics"]
WORLD_CODE = ("people.py", "scenes.py", "captions.py")

# score(prompts, images) -> {column: list of floats}
Score = Callable[[list[str], list], dict[str, list[float]]]


# ---- which scores, by what ----

def names_of(s: Settings) -> list[str]:
    """The score columns of this evaluation: first the one that the run was trained for.

    That is the reward from outside, where there was one. Else it is what people like: in the
    embedded world the utility, elsewhere the first score of the setting. Where somebody else has
    labelled the world's pictures, the utility of its own people is no measure, and is left out:
    the first is the alignment, and what they like a duel tells (lib/taste/).
    """
    if s.scores == "none":
        return []
    if s.scores == "world" and labelled_elsewhere(s):
        return WORLD[1:]
    names = WORLD if s.scores == "world" else s.scores.split(",")

    main = s.reward
    if s.reward.startswith("world"):
        main = "aesthetics" if s.reward == "world-aesthetics" else "utility"
    return sorted(names, key=lambda name: name != main)


def scorers_of(s: Settings) -> list[str]:
    """The scorers that give these columns: "world", or one for each learned score."""
    if s.scores == "world":
        return ["world"]
    return names_of(s)


def with_scores_at_hand(s: Settings, prompts: list[str]) -> Settings:
    """The settings without the scores that cannot be had here, each told in one line.

    A finished run must not lack its page because weights could not be downloaded.
    """
    at_hand = []
    for scorer in scorers_of(s):
        try:
            look_for(s, scorer, prompts)
        except UserError as error:
            if is_main():
                print(f"score {scorer} is left out: {error}")
        else:
            at_hand.append(scorer)
    return replace(s, scores=",".join(at_hand) or "none")


def look_for(s: Settings, scorer: str, prompts: list[str]) -> None:
    """Find, or download, all that a scorer needs for these prompts; else a UserError says what."""
    if scorer == "world":
        refuse_foreign_prompts(prompts)
    else:
        from lib.eval.scorers import locate
        locate(scorer, weights_of(s, scorer))


def version_of(s: Settings, scorer: str) -> str:
    """Tell all that can move a score, in one line."""
    if scorer == "world":
        words = []
        for name in WORLD_CODE:
            code = (ROOT / "lib" / "world" / name).read_bytes()
            words.append(f"{name}@{hashlib.sha256(code).hexdigest()[:12]}")
        return "world: the embedded world's oracle, " + " ".join(words)

    from lib.eval import scorers
    return scorers.version(scorer, weights_of(s, scorer), models.dtype_of(s))


def weights_of(s: Settings, scorer: str) -> str:
    """What the setting score_weights (name=path, with commas) says for a scorer, or ""."""
    weights = {}
    for part in s.score_weights.split(","):
        name, _, path = part.partition("=")
        weights[name] = path
    return weights.get(scorer, "")


def load_score(s: Settings, scorer: str) -> Score:
    """Load a scorer: score(prompts, images) -> {column: floats}, image i under prompt i."""
    if scorer == "world":
        return score_world

    from lib.eval.scorers import load_scorer
    learned = load_scorer(
        scorer, weights_of(s, scorer), str(models.device_of(s)), models.dtype_of(s))

    def score(prompts: list[str], images: list) -> dict[str, list[float]]:
        return {scorer: learned(prompts, images)}

    return score


def score_world(prompts: list[str], images: list) -> dict[str, list[float]]:
    """Score PIL images by the embedded world's oracle: WORLD, and the parts of the aesthetics.

    A prompt that is no caption of the world, or a picture of another size, is a UserError.
    """
    from lib.sheets import as_tensor
    from lib.world import captions, people

    refuse_foreign_prompts(prompts)
    for image in images:
        if image.size != (captions.SIZE, captions.SIZE):
            raise foreign_to_world(f"a picture has {image.width} x {image.height} pixels")

    pictures = as_tensor([image.convert("RGB") for image in images])
    columns = people.score(prompts, pictures)
    return {name: values.tolist() for name, values in columns.items()}


def refuse_foreign_prompts(prompts: list[str]) -> None:
    """UserError if a prompt is no caption of the embedded world."""
    from lib.world.captions import parse

    for prompt in prompts:
        if parse(prompt) is None:
            raise foreign_to_world(f"{prompt!r} is no caption of it")


def foreign_to_world(fault: str) -> UserError:
    from lib.world.captions import SIZE

    return UserError(f"--scores world: the embedded world knows its own captions and pictures of "
                     f"{SIZE} x {SIZE} only, and {fault}; for others give --preset sd15, or other "
                     f"--scores")


# ---- pictures, and their scores ----

def paint_rows(s: Settings, rows: dict[str, int | str], jobs: dict[str, pd.DataFrame],
               ledger: Ledger) -> None:
    """Draw the pictures that rows still lack, one model in memory at a time.

    `rows` has what lib/eval/rows.py says by the rows' names, and `jobs` the pictures (prompt, seed,
    image) of each. A row of pictures that exist already is not drawn.
    """
    for name, where in rows.items():
        # Nothing is loaded for a row whose pictures are all there.
        if isinstance(where, str) and where.startswith(IMAGES):
            continue
        if all(is_whole(Path(s.run) / image) for image in jobs[name].image):
            continue

        # No name holds the model, so that it is gone before the next one is loaded.
        paint(s, BASE, jobs[name], ledger, f"eval {name}", keep_latents=False,
              unet=load_row(s, where))


def score_rows(s: Settings,
               rows: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Score every row's pictures (prompt, image) -> (the rows with all score columns, versions).

    A version is a line of text; there is one for each scorer. All processes get all the scores.
    """
    results = {name: jobs.copy() for name, jobs in rows.items()}
    versions = []
    for scorer in scorers_of(s):
        version = version_of(s, scorer)
        versions.append(version)
        for name, table in score_by(s, scorer, version, rows).items():
            for column in table.columns.drop("image"):
                if column in names_of(s) or column not in WORLD:
                    results[name][column] = table[column].to_numpy()
    return results, versions


def score_by(s: Settings, scorer: str, version: str,
             rows: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Score every row's pictures by one scorer -> by row, (image, the scorer's columns)."""
    score = None
    tables = {}
    for name, jobs in rows.items():
        # A row that has its scores already is only read.
        images = Path(jobs.image.iloc[0]).parent.name
        file = Path(s.run) / "eval/scores" / images / f"{folder_name(scorer, version)}.parquet"
        tables[name] = scores_in(file, jobs)
        if tables[name] is not None:
            # Chunks that are still there are of a process that was killed as it joined them.
            if is_main():
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            continue

        # Chunks are fixed by the row's table, so that processes agree on whose turn each is.
        chunks = {}
        for i in range(0, len(jobs), CHUNK):
            chunks[file.with_suffix("") / f"{i:06d}.parquet"] = jobs.iloc[i:i + CHUNK]
        mine = my_share(list(chunks))
        missing = [path for path in mine if scores_in(path, chunks[path]) is None]

        # The scorer is loaded when it is needed first, and serves all the rows.
        if missing and score is None:
            score = load_score(s, scorer)
        for path in bar(missing, f"{scorer} of {name}", "chunk"):
            write_table(score_chunk(s, score, chunks[path]), path)
        tables[name] = join_chunks(list(chunks), file)

    # The next scorer wants its memory.
    if score is not None:
        del score
        gc.collect()
    return tables


def scores_in(file: Path, jobs: pd.DataFrame) -> pd.DataFrame | None:
    """The table that a file holds, or None if it is not whole or not of these very pictures."""
    if not is_whole(file):
        return None
    try:
        table = pd.read_parquet(file)
        table[table.columns.drop("image")].astype(float)
    # What is damaged in any way is scored again.
    except Exception:
        return None
    if list(table["image"]) != list(jobs.image):
        return None
    return table


def score_chunk(s: Settings, score: Score, jobs: pd.DataFrame) -> pd.DataFrame:
    """Score some pictures of a row -> (image, the scorer's columns)."""
    # A scorer gets the picture as its authors' code opens it: in the mode of its file.
    def open_one(image: str):
        return open_made(Path(s.run) / image, mode="")

    # Threads help: decoding a picture holds no interpreter lock.
    with ThreadPoolExecutor(4) as readers:
        pictures = list(readers.map(open_one, jobs.image))
    columns = score(jobs.prompt.tolist(), pictures)
    return pd.DataFrame({"image": jobs.image} | columns)


def join_chunks(chunks: list[Path], file: Path) -> pd.DataFrame:
    """Read a row's chunks as one table, which the main process then writes in their place."""
    # Wait until all chunks are there, and again until every process has read them.
    wait()
    table = pd.concat([pd.read_parquet(path) for path in chunks], ignore_index=True)
    wait()

    if is_main():
        write_table(table, file)
        shutil.rmtree(file.with_suffix(""))
    return table

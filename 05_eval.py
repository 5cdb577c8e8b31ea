"""Stage 05: every model's scores on prompts nobody trained on, the table, the curves, and a page to look at.

reads   prompts.parquet (split eval), the base model, iterK/unet/ of all rounds, other models given with --row
writes  eval/images/, eval/scores.parquet (one row per image), eval/table.md, eval/table.csv, eval/curves.png,
        eval/samples.png, eval/index.html

All models get the same prompts and the same noise per prompt, so differences are paired: the intervals are 95%
bootstrap intervals over prompts of the mean and of the mean difference. They say nothing of how another run seed
would have trained; for that, several runs (README, "Is it luck?").

    python 05_eval.py --run runs/tiny
    python 05_eval.py --run runs/tiny --row "seed only=runs/tiny-seed-only/iter3/unet"
"""

import json
import re
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from lib import models, oracle, page, report, scorers, world
from lib.run import Ledger, UserError, open_image, read_prompts, read_table, run_stage, seed_of, write_table, write_text
from lib.sampler import paint
from lib.settings import Settings, load

WORLD_SCORES = ["alignment", "aesthetics", "utility"]      # the world's stand-ins for the four learned scores
ROW = {"--row": {"action": "append", "default": [], "metavar": "NAME=UNET",
                 "help": "another model in the table: a UNet folder, say of another run"}}


def rows_of(s: Settings, given: list[str]) -> dict[str, int | Path]:
    """What the table compares: name -> number of the run's model (-1 is the base), or a UNet folder."""
    rows: dict[str, int | Path] = {"base": -1}
    rows |= {f"Iter{k}": k for k in range(s.iters + 1) if models.unet_folder(s, k).exists()}
    for text in given:
        name, _, where = text.partition("=")
        if not where or not (Path(where) / "config.json").exists():
            raise UserError(f"--row {text}: give NAME=FOLDER, a UNet folder with a config.json")
        if name in rows:
            raise UserError(f"--row {text}: the table has a row {name!r} already; give another name")
        rows[name] = Path(where)
    return rows


def score_names(s: Settings) -> list[str]:
    return WORLD_SCORES if s.scores == "world" else s.scores.split(",")


def eval_jobs(s: Settings, name: str, where: int | Path, prompts: pd.DataFrame) -> pd.DataFrame:
    """One row per image. The noise depends on prompt and number only: the same for all models, runs and run seeds.

    The folder of a model from outside bears a hash of its path, so that no other one is taken for it later.
    """
    folder = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    folder += f"-{seed_of(str(where.resolve())) % 16 ** 8:08x}" if isinstance(where, Path) else ""
    benchmark = Path(s.eval_prompts).stem
    style = lambda prompt: world.STYLES[world.parse(prompt)[2]] if world.parse(prompt) else ""
    jobs = [{"model": name, "benchmark": benchmark, "style": style(p.prompt), "prompt_id": p.prompt_id,
             "prompt": p.prompt, "seed": seed_of("eval", p.prompt, n),
             "image": f"eval/images/{folder}/{p.prompt_id:06d}_{n}.png"}
            for p in prompts.itertuples() for n in range(s.eval_seeds)]
    return pd.DataFrame(jobs)


def score_row(s: Settings, name: str, where: int | Path, prompts: pd.DataFrame, ledger: Ledger) -> pd.DataFrame:
    """The images and scores of one model; drawn and scored once, then kept."""
    jobs = eval_jobs(s, name, where, prompts)
    kept = Path(s.run) / "eval" / "scores" / (Path(jobs.image[0]).parent.name + ".parquet")
    if kept.exists():
        return read_table(kept, (*report.KEYS, *score_names(s)), "05_eval.py")
    unet = None
    if isinstance(where, Path):
        unet = UNet2DConditionModel.from_pretrained(where, dtype=models.dtype_of(s)).to(models.device_of(s)).eval()
    paint(s, where if unet is None else -1, jobs, ledger, f"eval {name}", keep_latents=False, unet=unet)
    if s.scores == "world":
        scores = oracle.score(jobs.prompt.tolist(), report.read_pictures(s.run, jobs.image))
        jobs = jobs.assign(**{k: v.numpy() for k, v in scores.items()})
    else:
        weights = dict(part.split("=", 1) for part in s.score_weights.split(",") if "=" in part)
        for score in score_names(s):                       # one scorer in memory at a time
            scorer = scorers.load_scorer(score, weights.get(score, ""), str(models.device_of(s)), models.dtype_of(s))
            parts = []
            for start in tqdm(range(0, len(jobs), 64), desc=f"{score} of {name}", unit="batch"):
                part = jobs.iloc[start:start + 64]
                parts += scorer(part.prompt.tolist(), [open_image(Path(s.run) / i, kept, start) for i in part.image])
            jobs[score] = parts
    if PartialState().is_main_process:
        write_table(jobs, kept)
    return jobs


def facts_of(s: Settings, rows: dict[str, int | Path]) -> dict[str, dict]:
    """Human pairs behind each of the run's models, and the minutes it took to make them."""
    cost = report.cost(s.run)
    spent = lambda k: cost[(cost.stage != "05_eval") & (cost.iter.fillna(0) <= k)].seconds.sum() / 60
    return {name: {"human pairs": "" if isinstance(k, Path) else str(s.seed_pairs if k >= 0 else 0),
                   "minutes": "" if isinstance(k, Path) or k < 0 else f"{spent(k):.1f}"} for name, k in rows.items()}


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ROW)
    run, folder, rows = Path(s.run), Path(s.run) / "eval", rows_of(s, own.row)
    prompts = read_prompts(run, "eval")
    with Ledger(run, "05_eval", None, str(models.device_of(s))) as ledger:
        scores = pd.concat([score_row(s, name, k, prompts, ledger) for name, k in rows.items()], ignore_index=True)
    if not PartialState().is_main_process:
        return
    write_table(scores, folder / "scores.parquet")
    summary = report.summarise(scores, score_names(s), "base", "Iter0")
    table = report.readable(summary, score_names(s), facts_of(s, rows))
    with_settings = json.loads((run / "config.json").read_text())
    notes = [f"{len(prompts)} prompts x {s.eval_seeds} images; {s.sampler}, {s.sample_steps} steps, guidance "
             f"{s.cfg_scale}",
             "intervals: 95%, bootstrap over prompts; gains paired by prompt and noise",
             " ".join(f"{k} {v}" for k, v in with_settings["versions"].items() if v),
             f"code {with_settings['commit']}, {with_settings['hardware']}"]
    write_text(report.markdown(table) + "\n" + "\n".join(f"- {n}" for n in notes) + "\n", folder / "table.md")
    write_text(summary.to_csv(index=False, float_format="%.6g"), folder / "table.csv")
    judges = [json.loads(p.read_text()) for p in sorted(run.glob("iter*/judge.json"))]
    report.curves(summary, score_names(s), [n for n, k in rows.items() if isinstance(k, int)],
                  [j for j in judges if j["pairs"]], folder / "curves.png")
    report.sample_sheet(run, scores, folder / "samples.png")
    sheets = [("each score over the rounds", "eval/curves.png"), ("the same prompts and noise", "eval/samples.png"),
              ("seed pairs", "seed/preview.png")]
    sheets += [(f"round {p.parent.name[4:]}: the model's own best and worst", str(p.relative_to(run)))
               for p in sorted(run.glob("iter*/preview.png"))]
    page.write_page(run, table, scores, f"SAIL: {run.name}", notes, [(c, p) for c, p in sheets if (run / p).exists()])
    print(report.markdown(table.drop(columns="benchmark")))
    columns = ["stage", "iter", "seconds", "images", "unet_forwards", "optimizer_steps"]
    print(report.cost(run)[columns].round(1).to_string(index=False))
    print(f"05 eval: {folder}/table.md, curves.png, samples.png; open {folder}/index.html")


if __name__ == "__main__":
    run_stage(main)

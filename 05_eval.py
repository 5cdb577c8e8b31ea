"""Stage 05: every model on prompts that nobody trained on: the table, the curves, and a page.

reads   prompts.parquet (split eval), benchmarks.parquet, the base model, iterK/unet/ of all rounds,
        rows given by hand
writes  eval/images/, eval/scores/          pictures, and the scores of each row of the table
        eval/scores.parquet                 one row per picture; a prompt of two styles has two
        eval/table.md, eval/table.csv       means, gains and win rates with intervals
        eval/curves.png, eval/samples.png
        eval/walk.md, eval/walk/            how this run went, step by step
        eval/index.html                     the page, which has all of it

All models get the same prompts and the same noise for each prompt, so differences are paired: the
intervals are 95 % bootstrap intervals over prompts, of the mean and of the mean difference. They
say nothing of how another run seed would have trained; for that, several runs (./run_sail.sh
study).

    python 05_eval.py --run runs/tiny                                  the run's own models
    python 05_eval.py --run runs/tiny --only base,Iter0,Iter3          some of them
    python 05_eval.py --run runs/tiny --row "other=runs/other/iter3/unet"           and others
    python 05_eval.py --preset sd15 --run runs/mine --row mine=me/my-model          without a run
    python 05_eval.py --preset sd15 --run runs/scores --images my/pictures          without a model

lib/eval/rows.py says what a row may be.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lib import models, sheets, tracking
from lib.data import prompts
from lib.eval import curves, page, paper, rows, scores, table, walk
from lib.models import BASE
from lib.rivals.controls import parse_control
from lib.run import (Ledger, UserError, differing_code, is_main, keep_code, read_prompts,
                     read_table, run_stage, seed_of, wait, write_table, write_text)
from lib.settings import Settings, environment, load

ARGUMENTS = {
    "--row": {"action": "append", "default": [], "metavar": "NAME=WHERE",
              "help": "another row: a model, an adapter, a control or existing pictures "
                      "(lib/eval/rows.py says how)"},
    "--only": {"default": "", "metavar": "NAMES",
               "help": "of the run's own models, base included, draw and score these alone, "
                       "say base,Iter0,Iter3"},
    "--rivals": {"action": "store_true", "default": False,
                 "help": "the public checkpoints of the paper's other rows"},
    "--scores-only": {"action": "store_true", "default": False,
                      "help": "write eval/scores.parquet, and no table, figure or page"},
    "--images": {"default": "", "metavar": "PATH",
                 "help": "score these pictures alone: a table with prompt and image, or a folder"}}


# ---- read: which rows, which prompts ----

def models_of_run(s: Settings) -> dict[str, int]:
    """The models that the run has, by name."""
    numbers = {"base": BASE}
    for k in range(s.iters + 1):
        if models.unet_folder(s, k).exists():
            numbers[f"Iter{k}"] = k
    return numbers


def rows_of_table(s: Settings, stage: argparse.Namespace) -> dict[str, int | str]:
    """What the table compares, by name: a model of the run, or where another row lies."""
    if stage.images:
        if stage.row or stage.only or stage.rivals:
            raise UserError("--images scores pictures alone, beside no model; for a comparison "
                            "give --row NAME=images:PATH")
        return {"images": rows.IMAGES + stage.images}

    # The run's own models, or those that --only names.
    of_run = models_of_run(s)
    wanted = list(of_run)
    if stage.only:
        wanted = [name.strip() for name in stage.only.split(",")]
    for name in wanted:
        if name not in of_run:
            raise UserError(f"--only {stage.only}: {name!r} is no model of this run, which has "
                            f"{', '.join(of_run)}; give other models as --row NAME=WHERE")

    compared = {name: k for name, k in of_run.items() if name in wanted}

    # Others, each under a name of its own.
    for text in stage.row:
        name, _, where = text.partition("=")
        if not name or not where:
            raise UserError(f"--row {text}: give NAME=WHERE, say mine=path/to/unet")
        if name in compared or name in of_run:
            raise UserError(f"--row {text}: the name {name!r} is taken already; give another")
        compared[name] = os.path.expanduser(where)

    # A row that cannot work is refused before any is drawn.
    for where in compared.values():
        if isinstance(where, str):
            rows.check(s, where)
    if stage.rivals:
        compared = add_rivals(s, compared)
    return compared


def add_rivals(s: Settings, compared: dict[str, int | str]) -> dict[str, int | str]:
    """A public checkpoint that is gone must not cost a finished run: it is left out, and said."""
    compared = dict(compared)
    for name, where in rows.RIVALS.get(s.preset, {}).items():
        try:
            rows.check(s, where)
        except UserError as error:
            print(f"row {name} is left out: {error}")
        else:
            compared.setdefault(name, where)
    return compared


def prompts_of_evaluation(s: Settings) -> pd.DataFrame:
    """(benchmark, style, prompt_id, prompt): a prompt in two styles stands there twice."""
    run = Path(s.run)
    if not (run / "prompts.parquet").exists() and is_main():
        prompts.write_eval(s)
    wait()

    # Older runs and hand-made ones may not say in which benchmark a prompt stands.
    columns = ["benchmark", "style", "prompt_id", "prompt"]
    of_eval = read_prompts(run, "eval")
    if not (run / "benchmarks.parquet").exists():
        return of_eval.assign(benchmark=Path(s.eval_prompts).stem, style="")[columns]
    places = read_table(run / "benchmarks.parquet", columns[:3], "01_seed.py")
    return places.merge(of_eval[["prompt_id", "prompt"]], on="prompt_id")


def jobs_of_row(
    s: Settings,
    name: str,
    where: int | str,
    of_eval: pd.DataFrame | None,
) -> pd.DataFrame:
    """One line per picture of a row: what to draw, from which random seed, and where it goes.

    The seed depends on prompt and number alone: the same for all models, runs and run seeds. The
    folder bears a hash of all that a row's pictures depend on, so none is ever taken for another's.
    """
    if isinstance(where, str) and where.startswith(rows.IMAGES):
        return rows.image_jobs(Path(s.run), name, where.removeprefix(rows.IMAGES), of_eval)

    made_by = [
        rows.identity(s, where),
        rows.identity(s, BASE),
        s.sampler,
        s.sample_steps,
        s.cfg_scale,
        s.resolution,
        s.vae,
        str(models.dtype_of(s)),
    ]
    folder = f"eval/images/{rows.folder_name(name, json.dumps(made_by))}"
    jobs = []
    for row in of_eval.drop_duplicates("prompt_id").itertuples():
        for n in range(s.eval_seeds):
            jobs.append({
                "prompt_id": row.prompt_id,
                "prompt": row.prompt,
                "seed": seed_of("eval", row.prompt, n),
                "image": f"{folder}/{row.prompt_id:06d}_{n}.png",
            })
    return pd.DataFrame(jobs)


# ---- compute: the table of all pictures, and what is known of each row ----

def collect(
    results: dict[str, pd.DataFrame],
    of_eval: pd.DataFrame | None,
    title: str,
) -> pd.DataFrame:
    """scores.parquet: the pictures of every row, in every benchmark and style of their prompt."""
    parts = []
    for name, pictures in results.items():
        if of_eval is None:
            part = pictures.assign(model=name, benchmark=title)
        else:
            pictures = pictures.drop(columns="style", errors="ignore")
            part = of_eval.drop(columns="prompt").merge(pictures, on="prompt_id")
            part = part.assign(model=name)
        parts.append(part)

    # The columns that say which picture it is come first, then the scores.
    whole = pd.concat(parts, ignore_index=True)
    columns = [column for column in whole.columns if column not in table.KEYS]
    return whole[table.KEYS + columns]


def facts_of_rows(s: Settings, compared: dict[str, int | str]) -> dict[str, dict[str, str]]:
    """Human pairs behind each row, and for the run's own models the minutes of making them."""
    cost = table.cost(s.run)
    facts = {}
    for name, where in compared.items():
        k = model_behind(where)
        if k == BASE:
            facts[name] = {"human pairs": "0", "minutes": ""}
        elif k is not None:
            # What it took to make model k: human pairs, Iter0 and the rounds up to k.
            making = cost[(cost.stage != "05_eval") & (cost.iter.fillna(0) <= k)]
            minutes = making.seconds.sum() / 60
            facts[name] = {"human pairs": human_pairs(s, k), "minutes": f"{minutes:.1f}"}
        elif rows.RIVALS.get(s.preset, {}).get(name) == where:
            facts[name] = {"human pairs": str(rows.FULL_DATA)}
    return facts


def model_behind(where: int | str) -> int | None:
    """The run's model that a row is, or goes on from without training."""
    if isinstance(where, int):
        return where
    control = parse_control(where)
    if control:
        return control.k
    return None


def human_pairs(s: Settings, k: int) -> str:
    """A model to start from (--start) had human pairs of its own, how many we do not know."""
    if not s.start:
        return str(s.seed_pairs)
    if k == 0:
        return "the start's"
    return f"{s.seed_pairs} + the start's"


def notes_on_code(s: Settings, compared: dict[str, int | str]) -> list[str]:
    """Whether another run in the table was made by other stage scripts than this one."""
    notes = []
    for name, where in compared.items():
        if isinstance(where, str) and Path(where).exists():
            other = Path(where).resolve().parent.parent                   # of <run>/iterK/unet
            scripts = differing_code(Path(s.run), other)
            if scripts:
                notes.append(f"row {name}: made by other stages than this run's: "
                             f"{', '.join(scripts)} (compare the two code/ folders)")
    return notes


# ---- write ----

def tables_of(
    s: Settings,
    summary: pd.DataFrame,
    facts: dict[str, dict[str, str]],
) -> list[tuple[str, pd.DataFrame]]:
    """(title, table): the paper's table beside ours, where it has one, and last our own."""
    tables = []
    pairs = {name: fact["human pairs"] for name, fact in facts.items()}
    beside_paper = paper.table(s.preset, summary, pairs)
    if len(beside_paper):
        title = ("As the paper's table 1: mean [95% interval] (the paper's number, ours less it)")
        departures = paper.departures(s)
        if departures:
            title += f". Not as in the paper: {departures}"
        tables.append((title, beside_paper))

    readable = table.readable(summary, scores.names_of(s), facts)
    tables.append(("Means, gains and win rates", readable))
    return tables


def write_tables(
    s: Settings,
    tables: list[tuple[str, pd.DataFrame]],
    summary: pd.DataFrame,
    facts: dict[str, dict[str, str]],
    notes: list[str],
    versions: list[str],
) -> str:
    """table.md for people, which is also returned, and table.csv for programs."""
    folder = Path(s.run) / "eval"
    parts = [f"{table.plain(title)}\n\n{table.markdown(each)}" for title, each in tables]
    text = "\n".join(parts)
    lines = "".join(f"- {table.plain(note)}\n" for note in notes)
    write_text(f"{text}\n{lines}", folder / "table.md")

    csv = table.for_programs(summary, facts, paper.numbers(s.preset), versions)
    write_text(csv.to_csv(index=False, float_format="%.6g"), folder / "table.csv")
    return text


def judges_of(run: Path) -> list[dict]:
    """judge.json of all rounds, in their order."""
    judges = []
    for path in run.glob("iter*/judge.json"):
        judge = json.loads(path.read_text())
        judges.append(judge | {"round": int(path.parent.name.removeprefix("iter"))})
    return sorted(judges, key=lambda judge: judge["round"])


def draw_figures(
    s: Settings,
    compared: dict[str, int | str],
    summary: pd.DataFrame,
    pictures: pd.DataFrame,
    judges: list[dict],
) -> list[tuple[str, str]]:
    """curves.png and samples.png; returns (caption, path) of these and of the stages' previews."""
    run, folder = Path(s.run), Path(s.run) / "eval"
    steps = [name for name, where in compared.items() if isinstance(where, int)]
    measured = [judge for judge in judges if judge["pairs"]]
    curves.curves(summary, scores.names_of(s), steps, measured, folder / "curves.png")
    sheets.sample_sheet(run, pictures, folder / "samples.png")

    figures = [("each score over the rounds", "eval/curves.png"),
               ("the same prompts and noise", "eval/samples.png"),
               ("seed pairs", "seed/preview.png")]
    for judge in judges:
        k = judge["round"]
        figures.append((f"round {k}: the model's own best and worst", f"iter{k}/preview.png"))
    return [(caption, path) for caption, path in figures if (run / path).exists()]


def write_results(
    s: Settings,
    compared: dict[str, int | str],
    pictures: pd.DataFrame,
    versions: list[str],
) -> None:
    """table.md, table.csv, the curves, the sheet of samples, the walk, and the page."""
    run, folder = Path(s.run), Path(s.run) / "eval"
    summary = table.summarise(pictures, scores.names_of(s), "base", "Iter0")
    facts = facts_of_rows(s, compared)
    tables = tables_of(s, summary, facts)
    _, own_table = tables[-1]

    elsewhere = {name: where for name, where in compared.items() if isinstance(where, str)}
    made_with = replace(s, dtype=str(models.dtype_of(s)))
    notes = table.notes(made_with, environment(), pictures, versions, elsewhere)
    notes += notes_on_code(s, compared)
    text = write_tables(s, tables, summary, facts, notes, versions)

    figures = draw_figures(s, compared, summary, pictures, judges_of(run))
    story = walk.tell(s, pictures, own_table)
    if story:
        write_text(walk.as_markdown(story), folder / "walk.md")
    page.write_page(run, tables, pictures, f"SAIL: {run.name}", notes, figures, story)
    tracking.log_evaluation(s, summary, folder / "samples.png")

    cost = table.cost(run).drop(columns=["peak_memory_bytes", "device"])
    print("", text, cost.round(1).to_string(index=False), sep="\n")
    print(f"05 eval: {folder}/table.md, curves.png, samples.png, walk.md; open {folder}/index.html")


def main(argv: list[str]) -> None:
    # With --preset a folder may be made here, to compare models alone.
    is_new = any(argument.startswith("--preset") for argument in argv)
    s, stage = load(argv, __doc__, ARGUMENTS, create=is_new)
    compared = rows_of_table(s, stage)

    with Ledger(s.run, "05_eval", None, str(models.device_of(s))) as ledger:
        # read
        of_eval = None
        if not stage.images:
            of_eval = prompts_of_evaluation(s)
        jobs = {}
        for name, where in compared.items():
            jobs[name] = jobs_of_row(s, name, where, of_eval)

        # compute: pictures and scores that are there already are kept
        scores.paint_rows(s, compared, jobs, ledger)
        results, versions = scores.score_rows(s, jobs)

    # write
    if is_main():
        keep_code(s.run, __file__)
        pictures = collect(results, of_eval, Path(stage.images).stem)
        write_table(pictures, Path(s.run) / "eval" / "scores.parquet")
        if not stage.scores_only:
            write_results(s, compared, pictures, versions)


if __name__ == "__main__":
    run_stage(main)

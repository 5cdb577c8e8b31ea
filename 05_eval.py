"""Stage 05: every model on prompts that nobody trained on: the table, the curves, and a page.

reads   prompts.parquet (split eval), benchmarks.parquet, the base model, iterK/unet/ of all rounds,
        rows given by hand, now or before, eval/votes.parquet where somebody has judged blind
writes  eval/rows.json                      the rows given by hand, which stay in the table
        eval/images/, eval/scores/          pictures, and the scores of each row of the table
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
    python 05_eval.py --run runs/tiny --drop other                                  without it again
    python 05_eval.py --run runs/tiny --scores none                                 pictures alone
    python 05_eval.py --preset sd15 --run runs/mine --row mine=me/my-model          without a run
    python 05_eval.py --preset sd15 --run runs/scores --images my/pictures          without a model

lib/eval/rows.py says what a row may be.
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lib import models, sheets, tracking
from lib.data import prompts
from lib.data.folders import is_own
from lib.eval import curves, page, paper, remembered, rows, scores, table, walk, words
from lib.judge import read_judge, verdict
from lib.models import BASE
from lib.rivals.controls import parse_control
from lib.run import (Ledger, UserError, begin, differing_code, is_main, read_prompts, run_stage,
                     seed_of, wait, write_table, write_text)
from lib.settings import Settings, environment, labelled_elsewhere, load
from lib.taste import tally

ARGUMENTS = {
    "--row": {"action": "append", "default": [], "metavar": "NAME=WHERE",
              "help": "another row: a model, an adapter, a control or existing pictures "
                      "(lib/eval/rows.py says how); it stays in the table"},
    "--drop": {"action": "append", "default": [], "metavar": "NAME",
               "help": "take a row that was given before out of the table"},
    "--only": {"default": "", "metavar": "NAMES",
               "help": "of the run's own models, base included, draw and score these alone, "
                       "say base,Iter0,Iter3"},
    "--rivals": {"action": "store_true", "default": False,
                 "help": "the public checkpoints of the paper's other rows"},
    "--scores-only": {"action": "store_true", "default": False,
                      "help": "write eval/scores.parquet, and no table, figure or page"},
    "--images": {"default": "", "metavar": "PATH",
                 "help": "score these pictures alone: a table with prompt and image, or a folder"}}

LONGEST_NAME = 60                             # characters of a row's name


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
        if stage.row or stage.only or stage.rivals or stage.drop:
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

    # Others: those given now, and those that the table has had.
    given = rows_given(s, stage.row, of_run)
    if stage.rivals:
        given = add_rivals(s, given)
    if not stage.scores_only:
        given = remembered.recall(s, given, stage.drop, of_run)
    return compared | given


def rows_given(s: Settings, texts: list[str], of_run: dict[str, int]) -> dict[str, str]:
    """The rows of --row NAME=WHERE, each under a name of its own.

    A row that cannot work is refused before any is drawn.
    """
    given = {}
    for text in texts:
        name, _, where = text.partition("=")
        if not name.strip() or not where:
            raise UserError(f"--row {text}: give NAME=WHERE, say mine=path/to/unet")
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UserError(f"--row {name[:20]!r}...: a row's name has at most {LONGEST_NAME} "
                            f"characters, all of them printable; give another")
        if name in given or name in of_run:
            raise UserError(f"--row {text}: the name {name!r} is taken already; give another")
        given[name] = os.path.expanduser(where)

    for where in given.values():
        rows.check(s, where)
    return given


def add_rivals(s: Settings, compared: dict[str, str]) -> dict[str, str]:
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
    if is_main():
        prompts.write_eval(s)
    wait()

    # Older runs and hand-made ones may not say in which benchmark a prompt stands.
    columns = ["benchmark", "style", "prompt_id", "prompt"]
    of_eval = read_prompts(run, "eval")
    if not (run / "benchmarks.parquet").exists():
        return of_eval.assign(benchmark=Path(s.eval_prompts).stem, style="")[columns]
    return prompts.read_benchmarks(run, of_eval)


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


def check_folder(s: Settings) -> None:
    """UserError if something else is where this stage keeps its results."""
    folder = Path(s.run) / "eval"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, where this stage keeps a folder; move it away")


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
            is_making = ~cost.stage.isin(["05_eval", "crossfit"])
            making = cost[is_making & (cost.iter.fillna(0) <= k)]
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


def notes_on_people(s: Settings, judges: list[dict]) -> list[str]:
    """How far the first judge agrees with people, and whose taste the scores do not know."""
    notes = []
    if judges:
        notes.append(f"self-judge of round 1: {verdict(judges[0])[1]}")
    if labelled_elsewhere(s) and s.scores == "world":
        notes.append("alignment and aesthetics are measured by the embedded world's oracle, which "
                     "knows nothing of the taste of whoever labelled; a duel asks them")
    return notes


# ---- write ----

def tables_of(
    s: Settings,
    pictures: pd.DataFrame,
    summary: pd.DataFrame,
    facts: dict[str, dict[str, str]],
) -> list[tuple[str, pd.DataFrame]]:
    """(title, table): the paper's table beside ours, where it has one, and last our own."""
    if summary.empty:
        return [("No score was computed", table.without_scores(pictures, facts))]

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
    votes: pd.DataFrame,
    notes: list[str],
    versions: list[str],
) -> None:
    """table.md for people, and table.csv for programs, in which `votes` come last."""
    folder = Path(s.run) / "eval"
    parts = [f"{table.plain(title)}\n\n{table.markdown(each)}" for title, each in tables]
    text = "\n".join(parts)
    lines = "".join(f"- {table.plain(note)}\n" for note in notes)
    write_text(f"{text}\n{lines}", folder / "table.md")

    csv = tables[-1][1]
    if not summary.empty:
        csv = table.for_programs(summary, facts, paper.numbers(s.preset), versions)
    if len(votes):
        csv = pd.concat([csv, votes], ignore_index=True)
    write_text(table.as_csv(csv), folder / "table.csv")


def judges_of(s: Settings) -> list[dict]:
    """judge.json of all rounds that have a readable one, in their order."""
    judges = []
    for k in range(1, s.iters + 1):
        path = Path(s.run) / f"iter{k}" / "judge.json"
        judge = read_judge(path)
        if judge:
            judges.append({"model": k - 1} | judge | {"round": k})
        elif path.exists():
            print(f"{path} cannot be read and is left out; delete {path.parent}/pairs.parquet, and "
                  f"03_rank.py --iter {k} makes both again")
    return judges


def draw_figures(
    s: Settings,
    compared: dict[str, int | str],
    summary: pd.DataFrame,
    pictures: pd.DataFrame,
    judges: list[dict],
) -> list[tuple[str, str]]:
    """samples.png and curves.png; returns (caption, path) of these and of the stages' previews."""
    run, folder = Path(s.run), Path(s.run) / "eval"
    sheets.sample_sheet(run, pictures, folder / "samples.png")

    # Without scores the only curves are those of the training, which the walk has drawn.
    steps = [name for name, where in compared.items() if isinstance(where, int)]
    measured = [judge for judge in judges if judge["pairs"]]
    if summary.empty:
        (folder / "curves.png").unlink(missing_ok=True)
    else:
        curves.curves(summary, scores.names_of(s), steps, measured, folder / "curves.png")

    figures = [("the same prompts and noise", "eval/samples.png"),
               ("each score over the rounds", "eval/curves.png"),
               ("human pairs", "seed/preview.png")]
    for k in range(1, s.iters + 1):
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
    votes = tally.read_votes(run)
    names = tally.in_order(votes, list(compared))
    compared_blind, strengths = tally.compare(votes, names), tally.strengths(votes, names)
    tables = tally.readable(compared_blind, strengths) + tables_of(s, pictures, summary, facts)
    _, own_table = tables[-1]

    elsewhere = {name: where for name, where in compared.items() if isinstance(where, str)}
    made_with = replace(s, dtype=str(models.dtype_of(s)))
    begun_at = json.loads((run / "config.json").read_text()).get("commit")
    notes = table.notes(made_with, environment(), begun_at, pictures, versions, elsewhere)
    notes += notes_on_code(s, compared)
    judges = judges_of(s)
    notes += notes_on_people(s, judges)
    write_tables(s, tables, summary, facts, tally.for_programs(compared_blind, strengths), notes,
                 versions)

    figures = draw_figures(s, compared, summary, pictures, judges)
    sentences = what_was_learned(s, compared, pictures, summary, facts, judges, compared_blind)
    story = walk.tell(s, pictures, own_table)
    if story:
        write_text(walk.as_markdown(story), folder / "walk.md")
    names = scores.names_of(s)
    page.write_page(run, tables, table.with_first(names, pictures), f"SAIL: {run.name}", notes,
                    figures, story, sentences, words.meanings(names),
                    training=words.training_of(s) if story else "")
    tracking.log_evaluation(s, summary, folder / "samples.png")

    # For the screen: the main columns, what it took, and what to make of it.
    if not summary.empty:
        print("", table.for_terminal(summary, scores.names_of(s), facts), sep="\n")
    cost = table.cost(run).drop(columns=["peak_memory_bytes", "device"])
    print("", cost.round(1).to_string(index=False), "", sep="\n")
    made = ["table.md", "samples.png", "curves.png", "walk.md"]
    made = [name for name in made if (folder / name).exists()]
    print(f"05 eval: {words.near(folder)}: {', '.join(made)}")
    for sentence in sentences:
        print(sentence)
    further = f"; try {next_command(s, compared, compared_blind)}" if story else ""
    print(f"next: open {words.near(folder / 'index.html')}{further}")


def last_model(compared: dict[str, int | str]) -> str:
    """The last of the run's own models in the table, "" if there is none."""
    models_of_run = [name for name, where in compared.items() if isinstance(where, int)]
    return models_of_run[-1] if models_of_run else ""


def next_command(s: Settings, compared: dict[str, int | str], compared_blind: pd.DataFrame) -> str:
    """What to try next: who has labelled pairs wants to see first whether they like the result."""
    if s.pairs == "world" or not is_own(s.pairs) or len(compared_blind):
        return words.next_command(s)
    return f"./run_sail.sh duel --run {words.near(s.run)} base {last_model(compared)}"


def what_was_learned(
    s: Settings,
    compared: dict[str, int | str],
    pictures: pd.DataFrame,
    summary: pd.DataFrame,
    facts: dict[str, dict[str, str]],
    judges: list[dict],
    compared_blind: pd.DataFrame,
) -> list[str]:
    """Sentences on the run's last model: votes, its gain over the base, losses, and its judge."""
    last = last_model(compared)
    if not last:
        return []
    sentences = [tally.sentence(compared_blind, last)]
    if summary.empty:
        return [sentence for sentence in sentences if sentence]

    # The embedded world's oracle tells skills too (light, cleanness, ...): parts of the aesthetics.
    skills = pictures.columns.drop([*table.KEYS, *scores.names_of(s)])
    of_skills = table.summarise(pictures, list(skills), "base", "Iter0")
    measured = pd.concat([summary, of_skills])
    if labelled_elsewhere(s):
        sentences.append(words.changed(measured[measured.score != "alignment"], last))
        measured = measured[measured.score == "alignment"]
    else:
        labels = facts[last]["human pairs"]
        sentences += words.learned(summary, scores.names_of(s)[0], last, labels)
    sentences.append(words.lost(measured, last))

    # Every round rests on the first judge, Iter0.
    if judges:
        _, sentence = verdict(judges[0])
        sentences.append(sentence[0].upper() + sentence[1:])
    return [sentence for sentence in sentences if sentence]


def main(argv: list[str]) -> None:
    # With --preset a folder may be made here, to compare models alone.
    is_new = any(argument.startswith("--preset") for argument in argv)
    s, stage = load(argv, __doc__, ARGUMENTS, create=is_new)
    check_folder(s)
    if is_main():
        begin(s.run, __file__)
    compared = rows_of_table(s, stage)

    with Ledger(s.run, "05_eval", None, str(models.device_of(s))) as ledger:
        # read
        of_eval = None
        if not stage.images:
            of_eval = prompts_of_evaluation(s)
        jobs = {}
        for name, where in compared.items():
            jobs[name] = jobs_of_row(s, name, where, of_eval)
        prompts_painted = [] if of_eval is None else of_eval.prompt.tolist()
        s = scores.with_scores_at_hand(s, prompts_painted)

        # compute: pictures and scores that are there already are kept
        scores.paint_rows(s, compared, jobs, ledger)
        results, versions = scores.score_rows(s, jobs)

    # write
    if is_main():
        pictures = collect(results, of_eval, Path(stage.images).stem)
        write_table(pictures, Path(s.run) / "eval" / "scores.parquet")
        if not stage.scores_only:
            write_results(s, compared, pictures, versions)


if __name__ == "__main__":
    run_stage(main)

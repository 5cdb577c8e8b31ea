"""Two runs compared: what differs in settings and code, what in the results, and their pictures.

    ./run_sail.sh compare runs/a runs/b
    ./run_sail.sh compare runs/a runs/b --out compare.html

Compared are the last models of both runs, as stage 05 has scored them, prompt by prompt on the
prompts that both have painted: the second run over the first. The page is written beside the first
run's, unless --out names another place.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from lib.eval import page, scores, table, words
from lib.run import UserError, differing_code, read_table, run_stage
from lib.settings import FIELDS, Parser, Settings, read_config

# What the study has found of run seeds, on the embedded world (lib/study/README.md).
ONE_SEED = ("These are one run seed each: the intervals are over prompts alone, and another run "
            "seed moves results by more (in lib/study the gain of the same SAIL went from .29 to "
            ".61 of utility); ./run_sail.sh study compares over several")


# ---- read ----

class Run:
    """A finished run: its name, settings and commit, and the pictures of its last model."""

    def __init__(self, folder: str, name: str):
        self.folder = Path(folder)
        self.name = name
        config = self.folder / "config.json"
        if not config.exists():
            raise UserError(f"{folder}: is no run, it has no config.json; give two run folders")
        content = read_config(config)
        self.settings = Settings(**content["settings"])
        self.commit = content.get("commit")

        made_by = f"05_eval.py --run {words.near(folder)}"
        pictures = read_table(self.folder / "eval" / "scores.parquet", table.KEYS, made_by)
        own = [f"Iter{k}" for k in range(self.settings.iters + 1)]
        evaluated = [name for name in own if name in set(pictures["model"])]
        if not evaluated:
            raise UserError(f"{folder}/eval/scores.parquet: has no model that this run has "
                            f"trained; run {made_by} again, without --only")
        self.model = evaluated[-1]
        self.pictures = pictures[pictures["model"] == self.model]


# ---- compute ----

def different_settings(first: Run, second: Run) -> pd.DataFrame:
    """The settings that differ, but for those that say how to compute and not what."""
    ours, theirs = asdict(first.settings), asdict(second.settings)
    rows = []
    for name, field in FIELDS.items():
        evaluates = name == "scores" or not field.metadata["free"]
        if evaluates and ours[name] != theirs[name]:
            rows.append({"setting": name, first.name: ours[name], second.name: theirs[name]})
    return pd.DataFrame(rows, columns=["setting", first.name, second.name])


def notes_on_code(first: Run, second: Run) -> list[str]:
    """What is known of the code that made the two runs."""
    notes = [f"code of {run.name}: {run.commit}" for run in (first, second)]
    scripts = differing_code(first.folder, second.folder)
    if scripts:
        notes.append(f"stages that differ (in the two code/ folders): {', '.join(scripts)}")
    return notes


def side_by_side(first: Run, second: Run, root: Path) -> pd.DataFrame:
    """The pictures of both runs on their common prompts, as scores.parquet has them.

    `model` is the run's name, and an image's path is relative to `root`, which holds both runs.
    """
    # Prompts are matched by their text: their numbers depend on a run's other prompts.
    place = ["benchmark", "style", "prompt"]
    common = set(first.pictures[place].itertuples(index=False, name=None))
    common &= set(second.pictures[place].itertuples(index=False, name=None))
    if not common:
        raise UserError(f"{first.name} and {second.name}: no evaluation prompt in common; evaluate "
                        f"both on the same --eval-prompts")
    number_of = dict(zip(first.pictures.prompt, first.pictures.prompt_id))

    parts = []
    for run in (first, second):
        shared = [key in common for key in run.pictures[place].itertuples(index=False, name=None)]
        part = run.pictures[shared].copy()
        inside = Path(os.path.relpath(run.folder.resolve(), root))
        part["image"] = [str(inside / image) for image in part.image]
        part["prompt_id"] = part.prompt.map(number_of)
        parts.append(part.assign(model=run.name))
    return pd.concat(parts, join="inner", ignore_index=True)


def common_scores(first: Run, pictures: pd.DataFrame) -> list[str]:
    """The scores that both runs have, in the first one's order; then what else was measured."""
    measured = pictures.columns.drop(table.KEYS)
    names = [name for name in scores.names_of(first.settings) if name in measured]
    return names or list(measured)


# ---- write ----

def compare(first: Run, second: Run, target: Path) -> None:
    """Print the comparison, and write its page."""
    root = Path(os.path.commonpath([first.folder.resolve(), second.folder.resolve()]))
    pictures = side_by_side(first, second, root)
    names = common_scores(first, pictures)
    summary = table.summarise(pictures, names, first.name, "")

    # The first run stands where the table otherwise has the base.
    settings = different_settings(first, second)
    facts = {run.name: {"last model": run.model} for run in (first, second)}
    results = table.without_scores(pictures, facts)
    if names:
        results = table.readable(summary, names, facts)
        results.columns = [name.replace("over base", f"over {first.name}") for name in results]

    notes = notes_on_code(first, second)
    sentences = [*differences(summary, names, first, second), ONE_SEED]
    shown = ([("Settings that differ", settings)] if len(settings) else [])
    shown.append((f"The last models on {pictures.prompt.nunique()} common prompts", results))
    pictures = table.with_first(names, pictures)
    page.write_page(root, shown, pictures, f"{second.name} beside {first.name}", notes, [],
                    sentences=sentences, meanings=words.meanings(names), target=target)

    print(settings.to_string(index=False) if len(settings) else "no setting differs")
    for line in [*notes, "", *sentences, f"next: open {words.near(target)}"]:
        print(line)


def differences(summary: pd.DataFrame, names: list[str], first: Run, second: Run) -> list[str]:
    """The second run over the first, a sentence for each benchmark and score."""
    sentences = []
    for name in names:
        for row in words.rows_with_gain(summary, second.name, name):
            sentences.append(
                f"{second.name} ({second.model}) over {first.name} ({first.model}), {name} on "
                f"{row['prompts']:.0f} prompts of {row['benchmark']}: {row['gain']:+.3f} "
                f"[{row['gain_low']:+.3f}, {row['gain_high']:+.3f}], wins {row['win_rate']:.0%}")
    return sentences


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a run that stage 05 has scored")
    parser.add_argument("--out", default="", metavar="FILE", help="the page")
    given = parser.parse_args(argv)

    # Folders of one name, in different places, are told apart by the whole path.
    folders = [Path(run) for run in given.runs]
    if folders[0].resolve() == folders[1].resolve():
        raise UserError(f"compare {given.runs[0]} {given.runs[1]}: is one run; give two")
    names = [folder.resolve().name for folder in folders]
    if names[0] == names[1]:
        names = given.runs
    first, second = map(Run, given.runs, names)

    target = Path(given.out or first.folder / "eval" / "compare.html")
    if target.is_dir():
        target = target / "compare.html"
    compare(first, second, target)


if __name__ == "__main__":
    run_stage(main)

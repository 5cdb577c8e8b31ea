"""Before a run goes on: what its changed code means for it, and what it takes from another run.

The driver starts this first. Results stand as they were made; where the code that made them has
changed since, a line says so, and what to do.

    python -m lib.again --run RUN                       is the code that made it still the same?
    python -m lib.again --run RUN --redo-from iter1     remove what was made from there on
    python -m lib.again --run RUN --from OTHER          take from another run what is the same

An edit of a stage is tried in a minute so: the run `--from` has the other run's settings, but for
those that are given, its human pairs and its Iter0, and of round 1 what neither the settings nor
the code have changed.
"""

import shutil
from pathlib import Path

import pandas as pd

from lib.code import changed_since, fingerprint
from lib.lend import (COMMON_FILES, HUMAN_PAIRS, ITER0, Step, equal_steps, files_at, ledger_rows,
                      lend)
from lib.lock import is_in
from lib.run import read_table, run_stage, write_table, write_text
from lib.settings import RUN_ARGUMENTS, Settings, load, parse, planned

STAGES = ("01_seed.py", "02_generate.py", "03_rank.py", "04_train_dpo.py")

# What the stages write in iterK/, and what belongs to the seed.
OF_A_ROUND = ("candidates.parquet", "images", "latents", "draws.parquet", "holdout_draws.parquet",
              "rewards.parquet", "judge.json", "pairs.parquet", "preview.png", "checkpoint.pt",
              "train_log.parquet", "lora", "unet")
OF_THE_SEED = ("seed", "prompts.parquet", "benchmarks.parquet")
JUDGE = "judge"                                 # the folds' own models (lib/crossfit.py)
RIVALS = "rivals"                               # trained on the run's human pairs (lib/rivals/spo.py)


# ---- --redo-from ----

def remove_from(run: Path, first: str) -> list[str]:
    """Remove what a run has made from `first` ("seed", "iter0", "iter1", ...) on; returns names.

    Only what this project writes is removed, and nothing that a link leads to.
    """
    least = -1 if first == "seed" else int(first.removeprefix("iter"))
    rounds = []
    for folder in run.glob("iter*"):
        number = folder.name.removeprefix("iter")
        if number.isdecimal() and int(number) >= least:
            rounds.append(folder)

    # The last round goes first, and of a round the model: what is left is a run that goes on.
    rounds.sort(key=lambda folder: -int(folder.name.removeprefix("iter")))
    going = []
    for folder in rounds:
        going += [folder / name for name in reversed(OF_A_ROUND)]
        for kind in ("images", "scores"):
            model = folder.name.replace("iter", "Iter")
            going += run.glob(f"eval/{kind}/{model}-*")
    if least <= 0:
        going.append(run / JUDGE)
    if least < 0:
        going += [run / name for name in (*OF_THE_SEED, RIVALS)]

    for path in going:
        remove(path, run)
    for folder in rounds:
        if not any(folder.iterdir()):
            folder.rmdir()

    names = [folder.name for folder in reversed(rounds)]
    if least < 0:
        names.insert(0, "seed")
    return names


def redo(run: Path, first: str) -> None:
    """Remove what is to be made again, once: a repeated command goes on with what it has made."""
    # The driver removes the mark at the end. Code that was edited since is another command.
    mark = run / ".redo"
    command = " ".join([first, *map(fingerprint, STAGES)])
    if mark.exists() and mark.read_text() == command:
        return
    print(f"made again: {', '.join(remove_from(run, first)) or 'nothing was there'}")
    write_text(command, mark)


def remove(path: Path, run: Path) -> None:
    """Remove a file, or a folder with what is in it, of a run."""
    if path.is_symlink():
        path.unlink()
    elif path.exists() and is_in(path, run):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---- --from ----

def steps_to_take(source: Path, s: Settings, ledger: pd.DataFrame) -> list[Step]:
    """The steps that a run takes from another.

    Human pairs and Iter0 are taken also where the code has changed since: whoever edits a stage
    starts from them. The candidates and the ranking of round 1 are not.
    """
    theirs = planned([f"--run={source}"], "")
    changed = changed_since(ledger)
    steps = []
    for step in equal_steps(source, s, theirs):
        if step not in (HUMAN_PAIRS, ITER0) and f"{step.stage}.py" in changed:
            break
        steps.append(step)
    return steps


def take(source: Path, s: Settings) -> list[Step]:
    """Take the common steps of the run `source`, and the rows of its ledger on them."""
    run = Path(s.run)
    ledger = read_table(source / "ledger.parquet", ("stage", "iter"), "./run_sail.sh")
    steps = steps_to_take(source, s, ledger)
    if not steps:
        return []

    patterns = list(COMMON_FILES)
    for step in steps:
        patterns += step.files

    # The ledger first: files that are there are not taken again.
    rows, own = ledger_rows(ledger, steps), run / "ledger.parquet"
    if own.exists():
        rows = pd.concat([rows, pd.read_parquet(own)], ignore_index=True).drop_duplicates()
    write_table(rows, own)
    lend(files_at(source, patterns), source, run)
    return steps


# ---- the code of results ----

def note_on_code(run: Path) -> str:
    """A line on the stages whose code is not what it was when they made this run; "" if none."""
    ledger = run / "ledger.parquet"
    if not ledger.exists():
        return ""
    try:
        changed = changed_since(pd.read_parquet(ledger))
    except (OSError, ValueError):
        return ""

    # What is there, from the seed on; a stage may have worked on several rounds.
    made = set()
    for names in changed.values():
        made.update(name for name in names if name == "seed" or (run / name).exists())
    if not made:
        return ""
    made = sorted(made, key=lambda name: ("iter" in name, len(name), name))
    return (f"note: {', '.join(sorted(changed))} (or what they import) changed since they made "
            f"{', '.join(made)} of this run, which stand as they are; --redo-from {made[0]} makes "
            f"them again, --run NEW --from {run} tries the change beside them")


def main(argv: list[str]) -> None:
    # The run has its settings by now; with --from those of the other run would come again.
    given, own = parse(argv, __doc__, RUN_ARGUMENTS)
    s, _ = load([f"--run={given['run']}"], __doc__)
    run = Path(s.run)
    first, source = own.redo_from, getattr(own, "from")
    if first:
        redo(run, first)
    if source and not (run / "prompts.parquet").exists():
        steps = take(Path(source), s)
        taken = ", ".join(step.title for step in steps) or "nothing: the settings differ"
        print(f"from {source}: {taken}")
    note = note_on_code(run)
    if note:
        print(note)


if __name__ == "__main__":
    run_stage(main)

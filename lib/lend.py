"""What two runs have in common, which the second need not make again.

A run that goes on from another (`--from`), and the arms of the study, take the human pairs, Iter0,
the first candidates and their ranking from a run that has made them with the same settings. Files
are shared by hard links, or copied to another file system.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.files import atomic
from lib.settings import Settings, needs_prompts


@dataclass(frozen=True)
class Step:
    """A step of a run: the settings that decide what it makes, and the files it leaves.

    Two runs make the same of a step, bit for bit, if they agree in its settings and in those of
    all steps before it. `stage` and `round` are what the ledger calls it, `title` what people do;
    paths are patterns within the run folder.
    """

    title: str
    stage: str
    round: int | None
    settings: tuple[str, ...]
    files: tuple[str, ...]


ITER0 = Step(
    title="Iter0",
    stage="04_train_dpo", round=0,
    settings=("beta", "lr", "loss", "iter0_steps", "start", "batch", "lora_rank", "flip",
              "optimizer", "warmup", "weight_decay", "max_grad_norm", "prompt_dropout"),
    files=("iter0/unet", "iter0/lora*", "iter0/train_log.parquet", "eval/*/Iter0-*"),
)
CANDIDATES = Step(
    title="the candidates of round 1",
    stage="02_generate", round=1,
    settings=("candidates", "candidate_sampler", "candidate_steps"),
    files=("iter1/candidates.parquet", "iter1/images", "iter1/latents"),
)

# The anchor is no setting of this: that of round 1 is always the base.
RANKING = Step(
    title="their ranking",
    stage="03_rank", round=1,
    settings=("reward", "draws", "rank_t_min", "rank_t_max", "reward_weights", "select"),
    files=("iter1/pairs.parquet", "iter1/rewards.parquet", "iter1/*draws.parquet",
           "iter1/judge.json", "iter1/preview.png"),
)

# What only the training of a round, or the evaluation, looks at.
LATER = ("alpha", "iter_steps", "anchor", "eval_seeds", "preset")


def settings_before(steps: Iterable[Step]) -> tuple[str, ...]:
    """The settings that decide what human pairs and prompts a run has: all but those of later."""
    later = set(LATER)
    for step in steps:
        later.update(step.settings)

    names = []
    for field in dataclasses.fields(Settings):
        if not field.metadata["free"] and field.name not in later:
            names.append(field.name)
    return tuple(names)


HUMAN_PAIRS = Step(
    title="human pairs and prompts",
    stage="01_seed", round=None,
    settings=settings_before((ITER0, CANDIDATES, RANKING)),
    files=("seed", "prompts.parquet", "benchmarks.parquet"),
)

# What two runs have in common that number their prompts alike: a picture has its prompt's number.
COMMON_FILES = ("embeds", "eval/*/base-*")
NUMBERING = ("pairs", "prompts", "iters", "iter_prompts", "eval_prompts", "eval_count")


# ---- which steps ----

def agreeing_steps(mine: Settings, theirs: Settings) -> list[Step]:
    """The first steps in which the settings of two runs agree."""
    if has_rounds(mine) and not has_rounds(theirs):
        return []

    steps = [HUMAN_PAIRS, ITER0]
    if mine.alpha > 0:
        steps += [CANDIDATES, RANKING]

    agreeing = []
    for step in steps:
        if not agree(mine, theirs, step.settings):
            break
        agreeing.append(step)
    return agreeing


def has_rounds(s: Settings) -> bool:
    """Whether stage 01 sets prompts aside for rounds; with the embedded world's pairs, always."""
    return s.pairs == "world" or needs_prompts(s)


def number_alike(mine: Settings, theirs: Settings) -> bool:
    """Whether a prompt of the evaluation has the same number in two runs."""
    return agree(mine, theirs, NUMBERING) and has_rounds(mine) == has_rounds(theirs)


def equal_steps(source: Path, mine: Settings, theirs: Settings) -> list[Step]:
    """The first steps in which two runs are equal and which `source` still has all files of."""
    equal = []
    for step in agreeing_steps(mine, theirs):
        if not has_all(source, step.files):
            break
        equal.append(step)
    return equal


def agree(mine: Settings, theirs: Settings, names: Iterable[str]) -> bool:
    """Whether two runs have the same values of some settings."""
    return all(getattr(mine, name) == getattr(theirs, name) for name in names)


def has_all(run: Path, patterns: Iterable[str]) -> bool:
    """Whether a run has something for each of the patterns; what not every run makes may lack."""
    may_lack = ("eval", "iter0/lora", "iter1/images")
    needed = [pattern for pattern in patterns if not pattern.startswith(may_lack)]
    return all(any(run.glob(pattern)) for pattern in needed)


# ---- their files ----

def files_at(run: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that patterns name, or that lie in the folders they name."""
    files = []
    for pattern in patterns:
        for path in run.glob(pattern):
            files += [file for file in (path, *path.rglob("*")) if file.is_file()]
    return files


def lend(files: list[Path], source: Path, target: Path) -> None:
    """Give the run `target` these files of the run `source`, as far as it has none of the name."""
    # A table says that its stage is done, so tables come last.
    files = sorted(files, key=is_table)
    for file in files:
        copy = target / file.relative_to(source)
        if copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:                         # another file system
            with atomic(copy) as temporary:
                shutil.copy2(file, temporary)


def is_table(file: Path) -> bool:
    """Whether a file is a table of a stage."""
    return file.suffix == ".parquet"


def ledger_rows(ledger: pd.DataFrame, steps: Iterable[Step]) -> pd.DataFrame:
    """The rows of a ledger that tell what these steps have cost."""
    wanted = []
    for step in steps:
        of_round = ledger.iter.isna() if step.round is None else ledger.iter == step.round
        wanted.append((ledger.stage == step.stage) & of_round.fillna(False).astype(bool))
    return ledger[pd.concat(wanted, axis=1).any(axis=1)]

"""How the arms' beta and learning rate were chosen: `./run_sail.sh study --tune`.

Every arm of TUNE_ARMS is run with every setting of GRID, and every rival of RIVAL_GRID with its
own, each setting in a folder of its own, and judged on development prompts. Writes tune.csv; what
it found stands in questions.TUNED, of rivals in their files.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from lib.run import write_text
from lib.study.questions import (ALIGNMENT_LOSS, ARMS, CONTROL_GRID, GRID, RIVAL_GRID, TUNE_ARMS,
                                 TUNE_PROMPTS, TUNE_SEED)
from lib.study.results import SCORES, collect
from lib.study.runner import Job, run_all

CONTROLLED = "seed only"        # the arm whose Iter0 the controls are made from


def tune(out: Path, workers: int, more: list[str]) -> None:
    """Run the grids, write and print the gains over the base, and mark the best of each arm."""
    rows = []
    for folder, setting, jobs in trials(out, more):
        rows += try_setting(folder, setting, jobs, workers, out / "tune" / "0")

    table = pd.DataFrame(rows)
    table["best"] = table.index.isin(best_rows(table))
    write_text(table.to_csv(index=False), out / "tune.csv")
    print("gains over base on development prompts")
    print(table.sort_values(["arm", "setting"]).to_string(index=False))


def trials(out: Path, more: list[str]) -> Iterator[tuple[Path, str, list[Job]]]:
    """Each setting of the grids, with the folder that its runs lie in, and these runs."""
    for number, setting in enumerate(GRID):
        yield out / "tune" / str(number), setting, jobs_of(setting, more)

    for arm, settings in RIVAL_GRID.items():
        for number, setting in enumerate(settings):
            job = Job(arm, TUNE_SEED, (*TUNE_PROMPTS.split(), *more), rival=tuple(setting.split()))
            yield out / "tune" / f"{arm}-{number}", setting, [job]


def try_setting(folder: Path, setting: str, jobs: list[Job], workers: int,
                first: Path) -> list[dict]:
    """Run the arms with one setting; a row for each arm and control that came to an end."""
    # The first setting's runs have the human pairs and the base's evaluation already.
    failed = run_all(folder, jobs, workers, lenders=[first])
    ended = [job for job in jobs if (job.arm, job.seed) not in failed]
    if not ended:
        return []
    scores, _ = collect(folder, ended)

    rows = []
    for job in ended:
        means = scores[scores.arm == job.arm].groupby("model")[SCORES].mean()
        gains = (means - means.loc["base"]).round(4)
        for model, name in models_of(job.arm).items():
            rows.append({"arm": name, "model": model, "setting": setting,
                         **gains.loc[model].to_dict()})
    return rows


def all_jobs(out: Path, more: list[str]) -> list[tuple[Path, Job]]:
    """Every run of the grids, and the folder that its run folder lies in."""
    runs = []
    for folder, _, jobs in trials(out, more):
        runs += [(folder, job) for job in jobs]
    return runs


def jobs_of(setting: str, more: list[str]) -> list[Job]:
    """A run of each arm with one setting."""
    settings = (*setting.split(), *TUNE_PROMPTS.split(), *more)
    jobs = []
    for arm in TUNE_ARMS:
        controls = ()
        if arm == CONTROLLED:
            controls = tuple(row for kind in CONTROL_GRID.values() for row in kind)
        jobs.append(Job(arm, TUNE_SEED, settings, controls))
    return jobs


def models_of(arm: str) -> dict[str, str]:
    """The models of an arm that are tuned, and what each is called: its last, and its controls."""
    answer = ARMS[arm].rival or f"Iter{ARMS[arm].rounds}"
    models = {answer: arm}
    if arm == CONTROLLED:
        for kind, controls in CONTROL_GRID.items():
            for row in controls:
                model, _, _ = row.partition("=")
                models[model] = kind
    return models


def best_rows(table: pd.DataFrame) -> list[int]:
    """The rows of the best setting of each arm, and of the best control of each kind.

    The best is the highest utility among those that lose no more than ALIGNMENT_LOSS of alignment.
    Controls are those of the Iter0 that their arm is best with.
    """
    fair = table[table.alignment >= -ALIGNMENT_LOSS]
    arms = fair[fair.arm.isin([*TUNE_ARMS, *RIVAL_GRID])].groupby("arm").utility.idxmax()
    if CONTROLLED not in arms:
        return list(arms)

    setting = table.setting[arms[CONTROLLED]]
    controls = fair[fair.arm.isin(list(CONTROL_GRID)) & (fair.setting == setting)]
    return [*arms, *controls.groupby("arm").utility.idxmax()]

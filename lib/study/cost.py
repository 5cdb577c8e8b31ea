"""What the study will cost, before anything is run: `./run_sail.sh study --plan`.

Counted from the arms' settings alone, in seconds, without a folder. A run is charged for what no
run before it has made: runs of one run seed share human pairs, Iter0 and first candidates
(lib/study/runner.py), and finished runs are not made again.
"""

import os
from pathlib import Path

import pandas as pd
import torch

from lib.lend import ITER0, agreeing_steps
from lib.models import device_of, dtype_of
from lib.plan.architecture import architecture_of, count_flops
from lib.plan.counts import COUNTS, count_evaluation, counts
from lib.plan.probe import matmul_rate
from lib.plan.report import arithmetic_of
from lib.rivals.spo import budget_of
from lib.settings import Settings
from lib.study.questions import ARMS, ROUNDS
from lib.study.runner import Job, is_done, models_of, planned_settings, same_arm, turn_of

# The share of a large matrix product's speed at which the counted arithmetic gets done. With it the
# plan of 40 runs of one run seed was the 43 minutes that they took on 2 cores, with all that is not
# counted: files, scores, figures, the stages' start.
SHARE = 0.3

# A rival's backward passes, as a share of the arithmetic of its forwards: of SPO's 85,000, 13,000
# are trained on, and a backward pass is two forwards.
BACKWARDS = {"spo": 0.31}

COUNTED = ["images", "unet_forwards", "optimizer_steps"]


def print_plan(runs: list[tuple[Path, Job]]) -> None:
    """Print a row for each arm: its runs, those still to be made, and what they take.

    `runs` has each run with the folder that its run folder lies in.
    """
    table = cost_of(runs)
    s = planned_settings(*runs[0])
    table["minutes"] = table.tflop * 1e12 / study_rate(s) / 60

    # One row an arm, in the order in which they are run, and one for all.
    arms = table.groupby("arm", sort=False).sum(numeric_only=True)
    arms.loc["in all"] = arms.sum()
    print(readable(arms).to_string())
    print(f"minutes: about, with all of this machine's processors, at {SHARE:.0%} of the speed "
          f"that a matrix product has here now")


def tell_cost(runs: list[tuple[Path, Job]]) -> None:
    """One line, before the runs are made."""
    table = cost_of(runs)
    minutes = table.tflop.sum() * 1e12 / study_rate(planned_settings(*runs[0])) / 60
    print(f"study: {table.runs_left.sum()} of {len(runs)} runs to be made, about {minutes:,.0f} "
          f"minutes (--plan: arm by arm)")


def study_rate(s: Settings) -> float:
    """FLOP per second of all workers together, from a moment's measurement."""
    device = device_of(s)
    rate = SHARE * matmul_rate(device, dtype_of(s))

    # The workers share all processors, however many threads this process has.
    if device.type == "cpu":
        rate *= max(1, (os.cpu_count() or 1) / torch.get_num_threads())
    return rate


def readable(arms: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: whole numbers with commas."""
    shown = arms.rename(columns={"unet_forwards": "UNet forwards", "optimizer_steps": "steps",
                                 "runs_left": "to be made"})
    shown = shown.drop(columns=["seed", "tflop"])
    return shown.map("{:,.0f}".format).rename_axis(None)


def cost_of(runs: list[tuple[Path, Job]]) -> pd.DataFrame:
    """A row for each run, in the order of running: arm, seed, runs, runs_left, COUNTED, tflop."""
    flops = {}
    made = []                                   # (job, settings) of the runs before
    rows = []
    for out, job in sorted(runs, key=turn_of_run):
        s = planned_settings(out, job)
        if not flops:
            architecture = architecture_of(s)
            for what in ("unet", "encode", "decode"):
                flops[what] = count_flops(architecture, what, s.resolution)

        row = {"arm": job.arm, "seed": job.seed, "runs": 1, "runs_left": 0}
        row |= dict.fromkeys([*COUNTED, "tflop"], 0)
        if not is_done(out, job):
            lenders = [before for before in made if before[0].seed == job.seed]
            left = stages_left(s, job, lenders)
            row["runs_left"] = 1
            row |= left[COUNTED].sum().to_dict()
            for stage in left.to_dict("records"):
                backwards = BACKWARDS.get(stage["stage"], 0.)
                row["tflop"] += (1 + backwards) * arithmetic_of(s, flops.get, stage) / 1e12
        made.append((job, s))
        rows.append(row)
    return pd.DataFrame(rows)


def turn_of_run(run: tuple[Path, Job]) -> int:
    """When a run is made."""
    _, job = run
    return turn_of(job.arm)


def stages_left(s: Settings, job: Job, lenders: list[tuple[Job, Settings]]) -> pd.DataFrame:
    """The rows of counts(s) that a run of the study goes through, less what lenders have made."""
    made, painted = made_by(s, lenders)

    # The arm's own rounds.
    rows = []
    for row in counts(s).to_dict("records"):
        k = None if pd.isna(row["iter"]) else row["iter"]
        within = row["stage"] != "05_eval" and (k or 0) <= ARMS[job.arm].rounds
        if within and (row["stage"], k) not in made:
            rows.append(row)

    # A rival stops when it has taken what the rounds take.
    rival = ARMS[job.arm].rival
    if rival:
        rows.append({"stage": rival, "unet_forwards": budget_of(s, ROUNDS)})
        rows.append(count_evaluation(s, 1))

    # The arm's own models, and its further rows.
    models = [model for model in models_of(job) if model not in painted]
    rows.append(count_evaluation(s, len(models) + len(job.rows)))
    return pd.DataFrame(rows, columns=["stage", *COUNTS]).fillna(0)


def made_by(s: Settings, lenders: list[tuple[Job, Settings]]) -> tuple[set, set]:
    """What a run with these settings need not make: (stage, round)s, and models to paint with."""
    made, painted = set(), set()
    for lender, theirs in lenders:
        steps = agreeing_steps(s, theirs)
        made |= {(step.stage, step.round) for step in steps}

        # The evaluation's pictures of the base are every run's, a trained model's go with it.
        models = models_of(lender)
        painted.add("base")
        if ITER0 in steps:
            painted.add("Iter0")
        if same_arm(s, theirs):
            painted |= set(models)
            for k in range(1, ARMS[lender.arm].rounds + 1):
                made |= {("02_generate", k), ("03_rank", k), ("04_train_dpo", k)}
    return made, painted

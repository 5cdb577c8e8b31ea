"""What the runs say, as tables: every prompt's scores, and what is told of every run and model.

The numbers come from the runs' own evaluations. A gain is always against another model of the same
run seed on the same prompts and noise, so what run seeds have in common cancels.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.plan.counts import counts
from lib.run import read_parquet, read_table
from lib.study.questions import ARMS
from lib.study.runner import Job, arguments_of, folder_of, settings_of_run

SCORES = ["alignment", "aesthetics", "utility"]

# ---- from run folders to two tables ----

def collect(out: Path, jobs: Iterable[Job]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores by prompt, and what is told of every run, of finished runs.

    scores has a row per prompt and model: arm, seed, model, prompt_id, alignment, aesthetics,
    utility. runs has a row per model: arm, seed, model; what made the run (facts_of_run); what each
    round cost (facts_of_rounds); and the scores' means over prompts, where it was evaluated.
    """
    scores, runs = [], []
    for job in jobs:
        # An evaluation may have several pictures of a prompt.
        folder = folder_of(out, job.arm, job.seed)
        columns = ("model", "prompt_id", *SCORES)
        table = read_table(folder / "eval" / "scores.parquet", columns, "05_eval.py")
        by_prompt = table.groupby(["model", "prompt_id"], sort=False)[SCORES].mean().reset_index()
        scores.append(by_prompt.assign(arm=job.arm, seed=job.seed))

        # A round's model need not be evaluated, and a control has no round.
        means = by_prompt.groupby("model", sort=False)[SCORES].mean().reset_index()
        table = means.merge(pd.DataFrame(facts_of_rounds(folder, job)), "outer", "model")
        runs.append(pd.DataFrame([facts_of_run(out, job)]).merge(table, "cross"))
    return pd.concat(scores, ignore_index=True), pd.concat(runs, ignore_index=True)


def facts_of_run(out: Path, job: Job) -> dict:
    """What made a run: its settings in full or by what an axis may show, and on what."""
    folder = folder_of(out, job.arm, job.seed)
    s = settings_of_run(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        "arm": job.arm,
        "seed": job.seed,
        "settings": " ".join(arguments_of(job)),
        "pairs": s.seed_pairs,
        "alpha": s.alpha,
        "label_noise": s.label_noise,
        "commit": config["commit"],
        "cpu": config["hardware"]["cpu"],
    }


def facts_of_rounds(folder: Path, job: Job) -> list[dict]:
    """A row for each round of a run, and for its rival.

    They have accuracy and diversity of the model as a judge of its candidates; forwards, the UNet
    forwards up to that model, evaluation left out, which the arm alone would take; and by what its
    weights are known.
    """
    cost = counts(settings_of_run(folder))
    cost = cost[cost.stage != "05_eval"]
    round_of = cost.iter.fillna(0)

    rows = []
    for k in range(ARMS[job.arm].rounds + 1):
        # The judge of round k + 1 is model k.
        judge = {}
        path = folder / f"iter{k + 1}" / "judge.json"
        if path.exists():
            judge = json.loads(path.read_text())
        rows.append({
            "model": f"Iter{k}",
            "forwards": int(cost[round_of <= k].unet_forwards.sum()),
            "accuracy": judge.get("accuracy"),
            "diversity": judge.get("diversity"),
            "weights": mark_of(folder / f"iter{k}" / "unet"),
        })

    # A rival's own cost comes to that of the human pairs.
    rival = ARMS[job.arm].rival
    if rival:
        place = folder / "rivals" / rival
        judge = json.loads((place / "judge.json").read_text())
        log = read_parquet(place / "train_log.parquet", "rival " + rival)
        of_pairs = cost[cost.stage == "01_seed"].unet_forwards.sum()
        rows.append({
            "model": rival,
            "forwards": int(of_pairs + judge["unet_forwards"] + log.unet_forwards.sum()),
            "accuracy": judge.get("accuracy"),
            "weights": mark_of(place / "unet"),
        })
    return rows


def mark_of(unet: Path) -> str:
    """By what a model's weights are known: the first digits of the SHA-256 of their file."""
    [file] = unet.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """A line of a question's table: a model of an arm, under a name."""

    name: str
    arm: str
    model: str


def is_round(model: str) -> bool:
    """Whether a model is a step of its run: the base, Iter0, Iter1, ..."""
    return model == "base" or (model.startswith("Iter") and model[4:].isdigit())


@dataclass(frozen=True)
class Results:
    """What a question's arms came to, each over the run seeds that it has."""

    scores: pd.DataFrame        # both as collect() has them
    runs: pd.DataFrame
    arms: list[str]

    def values(self, arm: str, model: str, score: str) -> pd.DataFrame:
        """A score of one model of an arm: a row per run seed, a column per prompt."""
        part = self.scores[(self.scores.arm == arm) & (self.scores.model == model)]
        return part.pivot(index="seed", columns="prompt_id", values=score)

    def gains(self, row: Row, other: Row, score: str) -> pd.DataFrame:
        """What a row gains over another, on the run seeds that both have: (seeds, prompts)."""
        mine = self.values(row.arm, row.model, score)
        theirs = self.values(other.arm, other.model, score)
        both = mine.index.intersection(theirs.index)
        return mine.loc[both] - theirs.loc[both]

    def gains_over_base(self, arm: str, model: str, score: str) -> np.ndarray:
        """What a model gains over the base of its runs: (seeds, prompts)."""
        row, base = (Row(name, arm, name) for name in (model, "base"))
        return self.gains(row, base, score).to_numpy()

    def models(self, arm: str) -> list[str]:
        """The models of an arm that were evaluated, in the order of its evaluation."""
        return list(dict.fromkeys(self.scores[self.scores.arm == arm].model))

    def runs_of(self, arm: str) -> pd.DataFrame:
        """What is told of an arm, of all rounds and run seeds."""
        return self.runs[self.runs.arm == arm]

    @property
    def seeds(self) -> int:
        """The run seeds of the first arm, which the others are compared with."""
        return self.runs_of(self.arms[0]).seed.nunique()


def results_of(scores: pd.DataFrame, runs: pd.DataFrame, arms: list[str], seeds: range) -> Results:
    """The results of some arms and run seeds, of what collect() found."""
    scores = scores[scores.arm.isin(arms) & scores.seed.isin(seeds)]
    runs = runs[runs.arm.isin(arms) & runs.seed.isin(seeds)]
    return Results(scores, runs, arms)

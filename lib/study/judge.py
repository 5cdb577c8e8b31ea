"""What does the self-judge know, and at which timesteps? From what stage 03 wrote of its draws.

Two things are measured for several ways to use a reward's draws. How often does the judge prefer
what people preferred, on held-out pairs? And how far apart in true utility are the best and the
worst candidate that it picks? The second looks at the oracle, as an evaluation may. The runs are
finished ones of the arm SAIL, one a run seed; nothing is asked of a model again. Other judges,
whose arms have the same human pairs, Iter0 and first candidates, stand beside it, and the
preference model of SPO, which has met the same held-out pairs at the same draws.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from lib.eval.table import markdown
from lib.plan.stages import load_stage
from lib.rivals.balanced import balance
from lib.rivals.preference import SHARE
from lib.rivals.root_error import root_reward
from lib.rivals.self_confidence import NOISES
from lib.run import CANDIDATE_COLUMNS, DRAW_COLUMNS, read_table, write_text
from lib.sheets import read_pictures
from lib.study.answers import number
from lib.study.figures import new_figure, save_figure
from lib.study.means import interval
from lib.study.questions import ARMS
from lib.study.runner import settings_of_run
from lib.world import people

# Ways to use the draws of a reward.
ALL, LOW, HIGH, BALANCED = "all (the paper's)", "t below 500", "t above 500", "balanced"
ROOT, ROOT_HIGH = "root errors", "root errors, t above 500"

# No taste at all: the base's error alone, which says how hard a picture is to denoise.
ANCHOR_HIGH = "the anchor's root error alone, t above 500"
CHOICES = (ALL, LOW, HIGH, BALANCED, ROOT, ROOT_HIGH, ANCHOR_HIGH)

# Timesteps, of which there are 1000, in tenths.
TENTHS = range(0, 1000, 100)


# ---- reading ----

@dataclass(frozen=True)
class Round:
    """The judge of a round at work; its draws are stage 03's Draws."""

    held_out: tuple             # on held-out pairs, the preferred picture first
    candidates: tuple           # on the round's candidates, (P, N)
    utility: torch.Tensor       # (P, N), what the oracle sees in the candidates


def read_round(run: Path, k: int) -> Round:
    """Round k of a run that has kept its candidates' pictures."""
    folder = run / f"iter{k}"
    table = read_table(folder / "rewards.parquet", CANDIDATE_COLUMNS, "03_rank.py")
    pictures = read_pictures(run, table.image)
    utility = people.score(table.prompt.tolist(), pictures)["utility"]

    N = table.candidate.nunique()
    return Round(*read_judged(folder, N), utility.reshape(-1, N))


def read_judged(folder: Path, N: int) -> tuple:
    """A round's draws on held-out pairs, and on its candidates, N of each prompt."""
    held_out = read_draws(folder / "holdout_draws.parquet", 2)
    return held_out, read_draws(folder / "draws.parquet", N)


def read_draws(path: Path, N: int) -> tuple:
    """A table of draws as the Draws that stage 03 wrote, of comparisons of N pictures."""
    table = read_table(path, DRAW_COLUMNS, "03_rank.py")
    columns = {}
    for name in ("t", "error", "anchor_error", "reward"):
        values = torch.tensor(table[name].to_numpy())
        columns[name] = values.reshape(-1, N, table.draw.nunique())

    # The pictures of a comparison share their timesteps.
    columns["t"] = columns["t"][:, 0]
    return load_stage("03").Draws(**columns)


# ---- measuring ----

def weights_of(choice: str, draws) -> torch.Tensor:
    """The weight of each draw in the mean over draws: (P, D)."""
    if choice == LOW:
        return in_range(draws, 0, 500)
    if choice in (HIGH, ROOT_HIGH, ANCHOR_HIGH):
        return in_range(draws, 500, 1000)
    if choice == BALANCED:
        return balance(draws.anchor_error).squeeze(1)
    return torch.ones(draws.t.shape)


def in_range(draws, low: int, high: int) -> torch.Tensor:
    """Weight 1 for the draws with low <= t < high, 0 for all others: (P, D)."""
    return ((draws.t >= low) & (draws.t < high)).float()


def mean_rewards(draws, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean rewards (M, N) of the M comparisons that have a draw of weight; and which (P,) have."""
    has_draws = weights.sum(1) > 0
    weights = weights[has_draws][:, None]                                       # (M, 1, D)
    return (draws.reward[has_draws] * weights).sum(2) / weights.sum(2), has_draws


def agreement(held_out, weights: torch.Tensor) -> float:
    """How often the judge prefers what people preferred; nan where no pair has a draw."""
    rewards, _ = mean_rewards(held_out, weights)
    if len(rewards) == 0:
        return math.nan
    accuracy, _, _ = load_stage("03").agreement(rewards)
    return accuracy


def gap(candidates, weights: torch.Tensor, utility: torch.Tensor) -> float:
    """True utility of the best candidate less that of the worst, as the judge ranks them."""
    rewards, has_draws = mean_rewards(candidates, weights)
    utility = utility[has_draws]
    best, worst = load_stage("03").best_and_worst(rewards)
    prompts = torch.arange(len(utility))
    return (utility[prompts, best] - utility[prompts, worst]).mean().item()


def by_root(draws):
    """The same draws, rewarded by the roots of the errors; beta is but a factor."""
    return draws._replace(reward=root_reward(draws.error, draws.anchor_error, 1.))


def by_anchor(draws):
    """The same draws, rewarded by the root of the anchor's error alone."""
    return draws._replace(reward=draws.anchor_error.sqrt())


def forwards_of(name: str, draws, weights: torch.Tensor) -> float:
    """UNet forwards that the draws with a weight take, in the mean over pictures."""
    forwards = 2                                # model and anchor
    if name == ANCHOR_HIGH:
        forwards = 1
    elif draws.anchor_error.isnan().all():
        forwards = NOISES                       # self-confidence: no anchor, many noises a draw
    return forwards * (weights > 0).float().sum(1).mean().item()


def measure_judge(name: str, held_out, candidates, utility: torch.Tensor) -> dict:
    """One judge of one run: `forwards` of a candidate, `accuracy` and `gap`.

    It is a choice of draws, or the name of another judge, which has all of its own.
    """
    if name in (ROOT, ROOT_HIGH):
        held_out, candidates = by_root(held_out), by_root(candidates)
    elif name == ANCHOR_HIGH:
        held_out, candidates = by_anchor(held_out), by_anchor(candidates)

    weights = weights_of(name, candidates)
    return {
        "draws": name,
        "forwards": forwards_of(name, candidates, weights),
        "accuracy": agreement(held_out, weights_of(name, held_out)),
        "gap": gap(candidates, weights, utility),
    }


def measure(judged: Round, others: dict[str, Path] | None = None) -> pd.DataFrame:
    """One run: a line for each choice of draws and other judge; and the gap there is in truth.

    `others` are the runs of other judges, by name: they have the same pictures.
    """
    lines = []
    for choice in CHOICES:
        lines.append(measure_judge(choice, judged.held_out, judged.candidates, judged.utility))
    for name, run in (others or {}).items():
        if ARMS[name].rival:
            # It has no candidates, and half a UNet for its eye.
            facts = json.loads(file_of_rival(name, run, "judge.json").read_text())
            lines.append({"draws": name, "forwards": SHARE * settings_of_run(run).draws,
                          "accuracy": facts["accuracy"]})
        else:
            draws = read_judged(run / "iter1", judged.utility.shape[1])
            lines.append(measure_judge(name, *draws, judged.utility))

    truth = judged.utility.amax(1) - judged.utility.amin(1)
    lines.append({"draws": "best and worst in truth", "gap": truth.mean().item()})
    return pd.DataFrame(lines)


def file_of_rival(arm: str, run: Path, name: str) -> Path:
    """A file of the preference model of a rival that was trained in a run."""
    return run / "rivals" / ARMS[arm].rival / name


def measure_tenths(held_out) -> pd.DataFrame:
    """One run, by tenth of t: agreement by the draws in it, and the spread of what one draw says.

    What a draw says is the error that the model saves against the anchor.
    """
    saved = held_out.anchor_error - held_out.error                              # (P, 2, D)
    lines = []
    for low in TENTHS:
        weights = in_range(held_out, low, low + 100)
        chosen = weights.bool()[:, None].expand_as(saved)
        spread = pd.Series(saved[chosen].numpy()).std()
        lines.append({"t": low + 50, "accuracy": agreement(held_out, weights), "spread": spread})
    return pd.DataFrame(lines)


def tenths_of_rival(arm: str, run: Path) -> pd.DataFrame:
    """The agreement by tenth of t of a rival's preference model, each draw a judgement."""
    table = pd.read_parquet(file_of_rival(arm, run, "judge.parquet"))
    return pd.DataFrame({"t": 100 * table.tenth + 50, "accuracy": table.spo})


# ---- the answer ----

def answer(out: Path, title: str, runs: dict[int, Path],
           others: dict[str, dict[int, Path]] | None = None) -> None:
    """Write judge.md, judge.csv and judge.png of round 1's judge, over runs; print the table.

    `runs` are by their run seeds, and so are those of other judges, by their names.
    """
    choices, tenths, of_rivals = [], [], []
    for seed, run in runs.items():
        judged = read_round(run, 1)
        folders = {name: theirs[seed] for name, theirs in (others or {}).items() if seed in theirs}
        choices.append(measure(judged, folders).assign(run=run.name))
        tenths.append(measure_tenths(judged.held_out).assign(run=run.name))
        for name, folder in folders.items():
            if ARMS[name].rival:
                of_rivals.append(tenths_of_rival(name, folder).assign(run=run.name))
    choices, tenths = pd.concat(choices), pd.concat(tenths)

    text = f"{title}; {len(runs)} run seeds\n\n{readable(choices)}"
    write_text(text, out / "judge.md")
    write_text(choices.to_csv(index=False, float_format="%.5g"), out / "judge.csv")
    print(text)
    save_figure(draw(tenths, of_rivals), out / "judge.png")


def readable(table: pd.DataFrame) -> str:
    """The table as people read it, in Markdown: intervals over run seeds."""
    accuracy = table.pivot(index="draws", columns="run", values="accuracy")
    gaps = table.pivot(index="draws", columns="run", values="gap")
    forwards = table.groupby("draws").forwards.mean()
    rows = []
    for choice in table.draws.unique():
        over = accuracy.loc[choice] - accuracy.loc[ALL]
        seeds = {}
        if table.draws.value_counts().nunique() > 1:
            seeds = {"run seeds": (table.draws == choice).sum()}
        rows.append({"judge": choice, **seeds,
                     "forwards a candidate": number(forwards[choice], "{:.0f}"),
                     "agrees with people": cell(accuracy.loc[choice]),
                     "over the paper's": cell(over),
                     "utility, best over worst": cell(gaps.loc[choice])})
    return markdown(pd.DataFrame(rows))


def cell(by_run: pd.Series) -> str:
    """Mean and interval over the run seeds that have the number; empty where none has."""
    by_run = by_run.dropna()
    if by_run.empty:
        return ""

    # One run seed says nothing of others.
    if len(by_run) == 1:
        return f"{by_run.iloc[0]:.3f}"
    mean, low, high = interval(by_run.to_numpy()[:, None])
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(tenths: pd.DataFrame, of_rivals: list[pd.DataFrame]):
    """Where in t the judge knows something, and where it is loud."""
    figure, (left, right) = new_figure(2, (9, 3.4))
    draw_runs(left, tenths, "accuracy", "C0", "the model itself")
    if of_rivals:
        draw_runs(left, pd.concat(of_rivals), "accuracy", "C1", "SPO's preference model")
        left.legend(fontsize=7)
    left.axhline(0.5, color="gray", lw=0.8)
    left.set(xlabel="timestep (a pair's draws in each tenth)", ylabel="agrees with people")

    draw_runs(right, tenths, "spread", "C3")
    right.set(xlabel="timestep", ylabel="spread of the error saved by one draw", yscale="log")
    return figure


def draw_runs(axis, tenths: pd.DataFrame, column: str, color: str, label: str = "") -> None:
    """A thin line for each run seed, and their mean."""
    by_run = tenths.pivot(index="t", columns="run", values=column)
    axis.plot(by_run.index, by_run.to_numpy(), color=color, lw=0.6, alpha=0.6)
    axis.plot(by_run.index, by_run.mean(axis=1), "o-", color=color, label=label)
    axis.grid(alpha=0.3)

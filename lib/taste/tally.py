"""Votes beside the scores: what stage 05 puts into table.md, table.csv and the page.

reads   eval/votes.parquet, which a duel writes (lib/taste/duel.py)

A comparison is of two rows of the table by one labeller, or by all of them together.
"""

import itertools
from pathlib import Path

import pandas as pd

from lib.eval.table import SUMMARY_KEYS, Cell
from lib.run import UserError, read_table
from lib.taste import votes
from lib.taste.answers import VOTE_COLUMNS

ALL = "all"                                 # the name under which all labellers stand together
BENCHMARK = "votes"                         # what table.csv calls the benchmark
TITLE = ("Judged blind: the share of prompts on which the first model is preferred to the second, "
         "ties half [95% interval over prompts]")
TITLE_STRENGTHS = ("Judged blind, all comparisons together: Bradley-Terry strengths in logits, the "
                   "first model being 0 [95% interval over prompts]")


def read_votes(run: Path) -> pd.DataFrame:
    """The votes of a run's duels; none where nobody has judged, or the file is damaged."""
    path = Path(run) / "eval" / "votes.parquet"
    if not path.exists():
        return pd.DataFrame(columns=VOTE_COLUMNS)
    try:
        return read_table(path, VOTE_COLUMNS, f"./run_sail.sh duel --run {run}")
    except UserError as error:
        print(f"the votes are left out: {error}")
        return pd.DataFrame(columns=VOTE_COLUMNS)


def in_order(cast: pd.DataFrame, rows: list[str]) -> list[str]:
    """The models that were judged: those of the table's `rows` in their order, then others."""
    judged = dict.fromkeys([*cast.left, *cast.right])
    return [name for name in rows if name in judged] + [name for name in judged if name not in rows]


def by_labeller(cast: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(labeller, their votes), and all together where there are several labellers."""
    parts = list(cast.groupby("labeller", sort=True))
    if len(parts) > 1:
        parts.append((ALL, cast))
    return parts


def compare(cast: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """labeller, model, over, rate, low, high, ties, votes, prompts: each two models by each."""
    rows = []
    for labeller, part in by_labeller(cast):
        for first, second in itertools.combinations(names, 2):
            rate = votes.win_rate(part, second, first)
            if rate is not None:
                rows.append((labeller, second, first, rate.value, rate.low, rate.high, rate.ties,
                             rate.votes, rate.prompts))
    columns = ["labeller", "model", "over", "rate", "low", "high", "ties", "votes", "prompts"]
    return pd.DataFrame(rows, columns=columns)


def strengths(cast: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """labeller, model, strength, low, high; nothing for fewer than three models."""
    parts = [pd.DataFrame(columns=["labeller", "model", "strength", "low", "high"])]
    for labeller, part in by_labeller(cast):
        judged = [name for name in names if name in {*part.left, *part.right}]
        if len(judged) > 2:
            table = votes.strengths(part, judged)
            table.insert(0, "labeller", labeller)
            parts.append(table)
    return pd.concat(parts[1:] or parts, ignore_index=True)


# ---- for people ----

def readable(compared: pd.DataFrame, strong: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, table) for table.md and the page: the comparisons, and the strengths if any."""
    tables = []
    if len(compared):
        table = pd.DataFrame({
            "model": compared.model,
            "compared with": compared.over,
            "by": compared.labeller,
            "preferred": [share_cell(row) for row in compared.itertuples()],
            "ties": [f"{ties:.0%}" for ties in compared.ties],
            "votes": compared.votes.map(str),
            "prompts": compared.prompts.map(str),
        })
        tables.append((TITLE, table))
    if len(strong):
        table = pd.DataFrame({
            "model": strong.model,
            "by": strong.labeller,
            "strength": [f"{row.strength:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
                         for row in strong.itertuples()],
        })
        tables.append((TITLE_STRENGTHS, table))
    return tables


def share_cell(row) -> Cell:
    """A win rate that knows whether its interval, as printed, lies on one side of a half."""
    sign = (round(row.low, 3) > .5) - (round(row.high, 3) < .5)
    return Cell(f"{row.rate:.1%} [{row.low:.1%}, {row.high:.1%}]", sign)


def sentence(compared: pd.DataFrame, model: str, over: str = "base") -> str:
    """How often a model was preferred, in a sentence; "" where nobody has judged it."""
    rows = compared[(compared.model == model) & (compared.over == over)]
    if rows.empty:
        return ""

    # All labellers together come last.
    row = rows.iloc[-1]
    return (f"{model} was preferred to {over} on {row.rate:.0%} [{row.low:.0%}, {row.high:.0%}] of "
            f"{row.prompts} prompts, judged blind by {row.labeller}")


# ---- for programs ----

def for_programs(compared: pd.DataFrame, strong: pd.DataFrame) -> pd.DataFrame:
    """Rows of table.csv: a win rate or strength where the scores have their mean."""
    rows = []
    for row in compared.itertuples():
        score = f"preferred to {row.over} by {row.labeller}"
        rows.append((row.model, BENCHMARK, "", score, row.prompts, row.rate, row.low, row.high))
    for row in strong.itertuples():
        score = f"strength by {row.labeller}"
        rows.append((row.model, BENCHMARK, "", score, None, row.strength, row.low, row.high))
    return pd.DataFrame(rows, columns=[*SUMMARY_KEYS, "prompts", "mean", "low", "high"])

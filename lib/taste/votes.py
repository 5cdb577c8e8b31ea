"""What votes tell: win rates, strengths, side bias, and how far people agree. Pure functions.

They take the table of votes of answers.py: `pair_id, prompt, labeller, turn, left, right, winner`,
where left and right name what was shown there, and winner one of them, or "" for a tie. A tie
counts half for either side. Intervals are 95%; those of win rates and strengths resample prompts,
not votes, since two votes on one prompt know less than votes on two.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.intervals import bootstrap, resamples, wilson

# A tie that is added between each two models: a model that has lost no vote keeps a finite
# strength.
EXTRA_TIE = .5
ROUNDS = 200                                # of the iteration for the strengths


class Share(NamedTuple):
    """A proportion of n, with its interval; NaN where n is 0."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "not known yet"
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def share(successes: float, n: int) -> Share:
    """A proportion with its score interval; successes may have halves."""
    if n == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    low, high = wilson(successes, n)
    return Share(successes / n, low, high, n)


# ---- the labeller ----

def side_bias(votes: pd.DataFrame) -> Share:
    """How often the left picture won, of the votes that are no ties; .5 is no bias."""
    decided = votes[votes.winner != ""]
    return share(int((decided.winner == decided.left).sum()), len(decided))


def agreement(one: pd.Series, other: pd.Series) -> Share:
    """How far two series of winners, indexed by pair, agree on the pairs that both have.

    The same winner is 1, the other one 0, a tie against a winner a half. Two ties make no label,
    and are left out.
    """
    both = pd.DataFrame({"one": one, "other": other}).dropna()
    both = both[(both.one != "") | (both.other != "")]
    same = (both.one == both.other).sum()
    halves = ((both.one == "") | (both.other == "")).sum()
    return share(same + halves / 2, len(both))


def winners(votes: pd.DataFrame, turn: int) -> pd.Series:
    return votes[votes.turn == turn].set_index("pair_id").winner


def self_agreement(votes: pd.DataFrame) -> Share:
    """How far labellers agree with themselves on the pairs that they were shown twice.

    No judge can be expected to agree with them more.
    """
    first, second = [], []
    for labeller, own in votes.groupby("labeller"):
        # Each labeller's pairs are pairs of their own.
        first.append(winners(own, 1).rename(lambda pair: (labeller, pair)))
        second.append(winners(own, 2).rename(lambda pair: (labeller, pair)))
    if not first:
        return share(0, 0)
    return agreement(pd.concat(first), pd.concat(second))


def between_labellers(votes: pd.DataFrame) -> dict[tuple[str, str], Share]:
    """How far each two labellers agree, by their first answers."""
    shares = {}
    for one, other in itertools.combinations(sorted(votes.labeller.unique()), 2):
        of_one = winners(votes[votes.labeller == one], 1)
        of_other = winners(votes[votes.labeller == other], 1)
        shares[one, other] = agreement(of_one, of_other)
    return shares


# ---- the models ----

class WinRate(NamedTuple):
    """How often one model's pictures are preferred to another's."""

    value: float
    low: float
    high: float
    ties: float                             # their share
    votes: int
    prompts: int
    more: int                               # prompts beside these that would halve the interval


def win_rate(votes: pd.DataFrame, first: str, second: str) -> WinRate | None:
    """The win rate of `first` over `second`; None if nobody has compared them.

    It is a mean over prompts, of the mean of each prompt's votes.
    """
    compared = between(votes, first, second)
    if compared.empty:
        return None

    points = points_of(compared, first)
    of_prompts = points.groupby(compared.prompt).mean().to_numpy()
    value = of_prompts.mean()
    low, high = bootstrap(of_prompts)

    # Where all prompts say the same the bootstrap knows no doubt: a share's interval does.
    if np.all(of_prompts == of_prompts[0]):
        low, high = wilson(of_prompts.sum(), len(of_prompts))

    # A half as wide interval takes four times the prompts.
    return WinRate(float(value), float(low), float(high), float((compared.winner == "").mean()),
                   len(compared), len(of_prompts), 3 * len(of_prompts))


def between(votes: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """The votes that compare these two."""
    forth = (votes.left == first) & (votes.right == second)
    back = (votes.left == second) & (votes.right == first)
    return votes[forth | back]


def points_of(compared: pd.DataFrame, name: str) -> pd.Series:
    """What a model gets of each vote: 1, 0, or a half of a tie."""
    points = (compared.winner == name).astype(float)
    return points.mask(compared.winner == "", .5)


def strengths(votes: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Bradley-Terry strengths of three models or more: model, strength, low, high.

    P(i over j) = sigmoid(strength_i - strength_j), a tie being half a win for each. The first
    model's strength is 0.
    """
    # wins[p, i, j]: how often i won over j on prompt p.
    prompts = votes.prompt.unique().tolist()
    wins = np.zeros((len(prompts), len(names), len(names)))
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    for vote in votes.itertuples():
        if vote.left in names and vote.right in names:
            left, right = names.index(vote.left), names.index(vote.right)
            points = {vote.left: 1., vote.right: 0.}.get(vote.winner, .5)
            wins[row_of[vote.prompt], left, right] += points
            wins[row_of[vote.prompt], right, left] += 1 - points

    # Every resample of the prompts is one more matrix of wins.
    of_all = bradley_terry(wins.sum(0))
    resampled = np.tensordot(resamples(len(prompts)) * len(prompts), wins, 1)
    of_resamples = bradley_terry(resampled)
    low, high = np.percentile(of_resamples, (2.5, 97.5), axis=0)
    return pd.DataFrame({"model": names, "strength": of_all, "low": low, "high": high})


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths (..., M) from wins (..., M, M), wins[i, j] of i over j: Hunter (2004), eq. 3.

    The likelihood is that of the votes and of EXTRA_TIE wins more in each direction.
    """
    others = ~np.eye(wins.shape[-1], dtype=bool)
    wins = (wins + EXTRA_TIE) * others
    games = wins + np.swapaxes(wins, -1, -2)
    won = wins.sum(-1)

    strength = np.ones(won.shape)
    for _ in range(ROUNDS):
        together = strength[..., :, None] + strength[..., None, :]
        strength = won / (games / together).sum(-1)
        strength /= strength[..., :1]
    return np.log(strength)

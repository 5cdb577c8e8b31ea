"""Means over run seeds and prompts, their 95% intervals, and what several looks at once are worth.

Run seeds and prompts are few and many draws of two populations. The variance of a mean over both is
that of the seeds' means over their number, plus that of the prompts' means over theirs, and its
quantile is Student's over the seeds. So two short lists say all of a score: its mean by run seed,
and by prompt. They are what is kept of a study (published.py).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# The 97.5% quantile of Student's t, by degrees of freedom; from 10 on it is taken as 2.
T975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Means(NamedTuple):
    """A score's means, over prompts for each run seed and over run seeds for each prompt."""

    by_seed: np.ndarray             # (seeds,)
    by_prompt: np.ndarray           # (prompts,)

    def over(self, other: "Means") -> "Means":
        """What this gains over another, seed by seed and prompt by prompt."""
        return Means(self.by_seed - other.by_seed, self.by_prompt - other.by_prompt)

    @property
    def mean(self) -> float:
        """The mean over run seeds and prompts."""
        return self.by_seed.mean()


def means_of(values: np.ndarray) -> Means:
    """The means of (seeds, prompts)."""
    return Means(values.mean(1), values.mean(0))


def standard_error(means: Means) -> float:
    """Of the mean. Of a single seed, or of one prompt only, the other part alone is known."""
    variance = 0.0
    for part in means:
        if len(part) > 1:
            variance += part.var(ddof=1) / len(part)
    return math.sqrt(variance)


def interval(means: Means) -> tuple[float, float, float]:
    """Mean, and low and high end of its 95% interval."""
    seeds = len(means.by_seed)
    quantile = 1.96
    if seeds > 1:
        quantile = T975.get(seeds - 1, 2.0)

    half = quantile * standard_error(means)
    return means.mean, means.mean - half, means.mean + half


def p_value(means: Means) -> float:
    """Of the mean against zero, two-sided, by Student's t over the run seeds (two or more)."""
    import mpmath

    freedom = len(means.by_seed) - 1
    t = means.mean / standard_error(means)

    # Both tails of Student's t are a regularised incomplete beta function.
    x = freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True))


def holm(p_values: Iterable[float]) -> list[float]:
    """The p-values of several looks, corrected so that one below .05 is luck in 1 study of 20.

    Holm (1979): the least of m counts m-fold, the next (m - 1)-fold, and none less than one before.
    """
    p_values = np.array(list(p_values))
    corrected = np.empty(len(p_values))
    highest = 0.0
    for rank, place in enumerate(np.argsort(p_values)):
        highest = max(highest, (len(p_values) - rank) * p_values[place])
        corrected[place] = min(1.0, highest)
    return corrected.tolist()

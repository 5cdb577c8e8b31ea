"""Means over run seeds and prompts, their 95% intervals, and what several looks at once are worth.

Run seeds and prompts are few and many draws of two populations: the variance of a mean over both is
that of the seeds' means over their number, plus that of the prompts' means over theirs, and its
quantile is Student's over the seeds. Values are (seeds, prompts); of a single seed, or of numbers
without prompts (seeds, 1), only the other part is known.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values (seeds, prompts)."""
    seeds, prompts = values.shape
    variance = 0.0
    if prompts > 1:
        variance += values.mean(0).var(ddof=1) / prompts
    if seeds > 1:
        variance += values.mean(1).var(ddof=1) / seeds
    return math.sqrt(variance)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, and low and high end of its 95% interval, of values (seeds, prompts)."""
    quantile = 1.96
    if len(values) > 1:
        quantile = student_quantile(len(values) - 1)

    half = quantile * standard_error(values)
    return values.mean(), values.mean() - half, values.mean() + half


def p_value(values: np.ndarray) -> float:
    """Of the mean against zero, two-sided, by Student's t over the run seeds (two or more)."""
    return tails(values.mean() / standard_error(values), len(values) - 1)


def tails(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's t: a regularised incomplete beta function."""
    import mpmath                               # torch brings it along

    x = freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True))


@functools.cache
def student_quantile(freedom: int) -> float:
    """The t that 95% of Student's distribution lie within, by halving."""
    low, high = 1.9, 13.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        if tails(middle, freedom) > 0.05:
            low = middle
        else:
            high = middle
    return high


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

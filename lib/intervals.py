"""Confidence intervals, all of them 95%: of a share, and of the mean of scores over prompts.

The resamples of the bootstrap are the same for everything that is compared, so the interval of a
difference is that of a paired comparison. An interval over prompts says nothing of how another run
seed would have trained; for that, several runs.
"""

import functools
import math

import numpy as np

RESAMPLES = 4000


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% score interval (low, high) of a proportion, successes of n (Wilson 1927)."""
    p = successes / n
    scale = 1 + z * z / n

    middle = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return middle - half, middle + half


def pairs_to_tell(p: float, z: float = 1.96, z_power: float = .84) -> int:
    """How many pairs tell a judge of accuracy p from a coin, at 95% and with a power of 80%.

    p is not a half.
    """
    spread = z * .5 + z_power * math.sqrt(p * (1 - p))
    return math.ceil((spread / (p - .5)) ** 2)


@functools.lru_cache(maxsize=1)
def resamples(n: int) -> np.ndarray:
    """How often each of n prompts stands in each resample, divided by n: (RESAMPLES, n).

    A row times the scores of the prompts is the mean of that resample. The random numbers depend on
    n alone.
    """
    rng = np.random.default_rng(0)
    return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95% percentile interval of the mean over the rows of values (prompts, ...).

    Returns (low, high), each of the shape of one row. All columns share their resamples.
    """
    means = np.tensordot(resamples(len(values)), values, 1)
    return np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)

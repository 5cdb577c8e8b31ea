"""What a judge's accuracy on held-out human pairs says: whether its rounds are worth their cost.

Every round after Iter0 learns from pairs that a judge has made. On few held-out pairs its accuracy
is too uncertain to tell it from a coin, and how many more would tell can be computed.
"""

import json
import math
from pathlib import Path

from lib.intervals import pairs_to_tell

# Where lib/crossfit.py has all human pairs judged, each by a model that does not know it.
CROSSFIT = "judge/crossfit.parquet"

# An accuracy this near to a coin's takes thousands of pairs to tell from it. What is asked instead
# is how many would show a judge that is right as often as this.
NEAR = .05
USEFUL = .6


def verdict(judge: dict) -> tuple[str, str]:
    """A word and a sentence on judge.json's `accuracy, low, high, pairs`.

    The word is "agrees" or "against" where the 95% interval lies on one side of a half, "unclear"
    where it holds a half, and "unmeasured" without held-out pairs.
    """
    pairs = judge["pairs"]
    if not pairs:
        return "unmeasured", "no held-out pairs: nobody knows whether the judge agrees with people"

    which = "held-out pairs"
    if judge.get("crossfit"):
        which = "human pairs, each unknown to its judge"
    measured = (f"right on {judge['accuracy']:.0%} [{judge['low']:.0%}, {judge['high']:.0%}] of "
                f"{pairs} {which}{ceiling(judge)}")
    if judge["low"] > .5:
        return "agrees", f"the judge agrees with people: {measured}"
    if judge["high"] < .5:
        return "against", f"the judge is against people: {measured}; stop at Iter0"
    advice = what_would_tell(judge["accuracy"], pairs)
    return "unclear", f"cannot tell yet whether the judge agrees with people: {measured}; {advice}"


def ceiling(judge: dict) -> str:
    """How far people agree with themselves: no judge can be expected to agree with them more."""
    if "agree_with_themselves" not in judge:
        return ""
    told = f" (people agree with themselves in {judge['agree_with_themselves']:.0%}"
    if "agree_pairs" in judge:
        told += (f" [{judge['agree_low']:.0%}, {judge['agree_high']:.0%}] of "
                 f"{judge['agree_pairs']:.0f} pairs shown twice")
    return f"{told})"


def agreement_of_people(run: Path) -> dict:
    """What judge.json says of how far people agree with themselves; {} where nobody knows.

    It comes from seed/people.json: of labels from a page with its interval, in the embedded world
    as an expectation.
    """
    try:
        people = json.loads((Path(run) / "seed" / "people.json").read_text(encoding="utf-8"))
        numbers = {"agree_with_themselves": float(people["agree_with_themselves"])}
        for name in ("low", "high", "pairs"):
            if name in people:
                numbers[f"agree_{name}"] = float(people[name])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    if all(map(math.isfinite, numbers.values())):
        return numbers
    return {}


def what_would_tell(accuracy: float, pairs: int) -> str:
    """What to do about an accuracy that so many pairs do not tell from a half."""
    if abs(accuracy - .5) < NEAR:
        accuracy = USEFUL

    # A judge that is right on 60% would have shown by now.
    more = pairs_to_tell(accuracy) - pairs
    if more <= 0:
        return f"one that is right on {USEFUL:.0%} would have shown, so stop at Iter0"

    # It is an estimate, and is told in tens.
    more = 10 * math.ceil(more / 10)
    return (f"label about {more} more pairs, which would tell if it is right on {accuracy:.0%} "
            f"(4 times in 5), or stop at Iter0")


def read_judge(path: Path) -> dict:
    """A round's judge.json; {} where there is none, or none that stage 03 has written.

    Without held-out pairs it has `pairs` 0 and no accuracy.
    """
    try:
        judge = json.loads(Path(path).read_text(encoding="utf-8"))
        numbers = [judge["pairs"], judge["diversity"], judge["margin"]]
        if judge["pairs"]:
            numbers += [judge["accuracy"], judge["low"], judge["high"]]
        if all(math.isfinite(number) for number in numbers):
            return judge
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return {}

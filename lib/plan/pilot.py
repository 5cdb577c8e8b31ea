"""A pilot: a tenth of a run's hours that tell whether the rest is worth spending.

It is a run of its own, smaller in its prompts only: Iter0 on all human pairs, one round, and the
same evaluation on fewer prompts.
"""

from collections.abc import Callable
from dataclasses import replace

from lib.eval import paper
from lib.settings import Settings, flag, round_prompts

# A pilot takes at most this share of the run's hours; runs of fewer hours than LONG need none.
SHARE = 0.1
LONG = 5.0

# What may be smaller: prompts of the one round, prompts of each benchmark, human pairs. The first
# that is small enough is taken.
SIZES = [(2000, 250, 1), (1000, 250, 1), (1000, 100, 1), (500, 100, 1), (500, 100, 4),
         (250, 100, 4), (100, 50, 10), (50, 50, 20)]

WATCH = [
    "the pictures (seed/preview.png, iter1/preview.png, eval/index.html): no noise, no gray",
    "Iter0 over base: its interval is above 0 on the first score; else look at --lr and the pairs",
    "self-judge (iter1/judge.json): its lowest value is above .5; else rounds teach it nothing",
    "training (iter1/train_log.parquet): the winner gain does not fall without end, which is a "
    "learning rate too high",
    "Iter1 over Iter0: its interval is not below 0",
    "the ledger's seconds beside this plan's hours: multiply the rest by their ratio",
]


def pilot_of(s: Settings, hours_of_run: Callable[[Settings], float]) -> Settings | None:
    """The settings of a run's pilot; None for a short run, and for one without a round."""
    whole = hours_of_run(s)
    if whole < LONG or s.iters == 0:
        return None

    for prompts, benchmark, divisor in SIZES:
        small = replace(
            s,
            run=f"{s.run}-pilot",
            iters=1,
            iter_prompts=str(min(prompts, round_prompts(s, 1))),
            eval_count=min(benchmark, s.eval_count or benchmark),
            seed_pairs=max(s.batch, s.seed_pairs // divisor),
        )
        if hours_of_run(small) <= SHARE * whole:
            return small
    return None


def command_of(pilot: Settings, s: Settings, argv: list[str]) -> list[str]:
    """The words of the command line of a pilot: the run's own, and the settings that are other."""
    others = {}
    for name in ("run", "iters", "iter_prompts", "eval_count", "seed_pairs"):
        if getattr(pilot, name) != getattr(s, name):
            others[flag(name)] = str(getattr(pilot, name))

    # What is given anew, and what belongs to the plan, is left out.
    words = ["./run_sail.sh"]
    dropped = {"--gpu", *others}
    is_value = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if not is_value and word != "--plan" and name not in dropped:
            words.append(word)
        is_value = not is_value and name in dropped and not equals
    for name, value in others.items():
        words += [name, value]
    return words


def targets(preset: str) -> list[str]:
    """The paper's numbers for a preset, a line for each row; none for the embedded world."""
    if preset not in paper.TABLE:
        return []

    # The scores of Pick-a-Pic's validation prompts: one number each.
    titles = [title for title, benchmark, _, _ in paper.COLUMNS if benchmark == "pickapic"]
    lines = ["the paper's numbers, on Pick-a-Pic's validation prompts: " + ", ".join(titles)]
    for model, values in paper.TABLE[preset].items():
        if model != "base" and not model.startswith("Iter"):
            continue
        numbers = [f"{value:g}" for column, value in zip(paper.COLUMNS, values)
                   if column[1] == "pickapic"]
        lines.append(f"  {model:5} {' '.join(numbers)}")
    return lines

"""One's own pairs are few: what a preset's numbers, the paper's 50,000 pairs and 50,000 prompts, become then.

Only numbers that stand as the preset has them change, and stage 01 says so; those given by hand hold, or are refused.
"""

from collections.abc import Iterable
from pathlib import Path

from lib import pairs
from lib.run import UserError
from lib.settings import PRESETS, Settings, round_prompts

HELD_OUT = 5                # one in so many pairs measures the self-judge
STEPS = 100                 # of Iter0 and of a round, where one pass would be fewer; our choice, as long as tiny's Iter0


def fit(s: Settings, evaluation: Iterable[str]) -> dict:
    """Settings that --pairs FILE and --prompts FILE change because they have fewer rows than the preset asks for.
    `evaluation`: its prompts, which neither may use."""
    path, preset, new, evaluation = Path(s.pairs), Settings(**PRESETS[s.preset]), {}, list(evaluation)
    untouched = lambda *names: all(getattr(s, name) == getattr(preset, name) for name in names)
    if not path.is_file():
        return new
    if untouched("seed_pairs", "holdout_pairs") and rows_of(path) < s.seed_pairs + s.holdout_pairs:
        usable = [pairs.fold(pair["prompt"]) for pair in pairs.read_pairs(s.pairs, s.seed, None, evaluation)]
        seed = len(usable) - len(usable) // HELD_OUT
        of_seed = set(usable[:seed])                          # a held-out pair has a prompt that the seed has not
        new |= {"seed_pairs": seed, "holdout_pairs": sum(prompt not in of_seed for prompt in usable[seed:])}
        if s.prompts == "pairs":
            raise UserError(f"--prompts pairs: {s.pairs} has no prompts but those of its {len(usable)} pairs; give "
                            f"--prompts a file with others, one a line")
    counts = [round_prompts(s, k + 1) for k in range(s.iters)]
    if untouched("iter_prompts") and Path(s.prompts).is_file():
        taken = [*evaluation, *pairs.pair_prompts(s.pairs, s.seed, (), rows_of(path))]
        each = len(list(pairs.distinct(pairs.read_prompts(s.prompts), taken))) // max(1, s.iters)
        if 0 < each < max(counts, default=0):
            new["iter_prompts"], counts = str(each), [each] * s.iters
    seed = new.get("seed_pairs", s.seed_pairs)
    if untouched("iter0_steps") and s.iter0_steps == 0 and seed < STEPS * s.batch:
        new["iter0_steps"] = STEPS
    if untouched("iter_steps") and s.iter_steps == 0 and \
            (min(counts, default=0) / s.alpha if s.alpha else seed) < STEPS * s.batch:
        new["iter_steps"] = STEPS
    return new


def rows_of(path: Path) -> int:
    if path.suffix == ".parquet":
        with pairs.parquet(path, str(path)) as table:
            return table.metadata.num_rows
    return len(pairs.text_rows(path))


def told(s: Settings, new: dict) -> str:
    """The changes as the flags that would make them."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in new.items())
    return f"fewer pairs or prompts than preset {s.preset} asks for: this run has {flags}"

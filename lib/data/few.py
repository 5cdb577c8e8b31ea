"""Few human pairs: what becomes of a preset's numbers when --pairs or --prompts is a small file.

The presets of the paper's models ask for 50,000 pairs and as many prompts. With a small file, the
numbers that still stand as the preset has them shrink to what is there, and stage 01 says so.
Numbers that the user gave by hand hold, and stage 01 refuses them if the file is too small.

A training on few pairs goes through them more than once, but no more often than our findings
support (lib/study/README.md): on 128 pairs the embedded world's Iter0 has 19 passes and a round 6,
and gains for three rounds; 75 passes over 32 pairs ran away in 4 of 6 runs, and further rounds,
which are further passes, cost alignment.
"""

import dataclasses
import os
from collections.abc import Iterable

from lib.data.folders import count_pairs, is_own
from lib.data.pairs import stream_pairs
from lib.data.prompts import distinct, fold, pair_prompts, read_prompt_file
from lib.run import UserError
from lib.settings import PRESETS, Settings, needs_prompts, round_prompts
from lib.world.captions import world_captions

HELD_OUT = 5                # one in so many pairs measures the self-judge

# Optimizer steps of Iter0 and of a round where one pass would be fewer: our choice, as many as
# Iter0 has in preset tiny. The passes below may allow fewer.
STEPS = 100

# Most passes over the human pairs in Iter0, and over human or self-made pairs in a round: those of
# preset tiny, in whole numbers. Of as many steps WARMUP belong to the warm-up there.
PASSES = 19
PASSES_OF_ROUND = 6
WARMUP = .1

# Below so many human pairs, for which preset tiny's own learning rate was tuned, none is higher than
# this. It was chosen on development captions (lib/taste/README.md): with one twice as high the
# third round of 50 pairs falls behind the first, and alignment goes.
FEW = 128
HIGHEST_LR = 1e-5


def fit_to_few_pairs(s: Settings, evaluation: Iterable[str]) -> dict:
    """The settings that change because the files of pairs and prompts are small, {} if none do.

    `evaluation` holds the evaluation's prompts, which neither human pairs nor rounds may use.
    """
    if s.pairs == "world" or not is_own(s.pairs):
        return {}

    evaluation = list(evaluation)
    changes = fewer_pairs(s, evaluation)
    changes |= fewer_prompts(s, dataclasses.replace(s, **changes), evaluation)
    changes |= steps_of_passes(s, dataclasses.replace(s, **changes))
    changes |= shorter_warmup(s, changes)
    changes |= gentler_steps(s, dataclasses.replace(s, **changes))
    return changes


def as_in_preset(s: Settings, *names: str) -> bool:
    """Whether all these settings stand as the run's preset has them."""
    preset = Settings(**PRESETS[s.preset])
    return all(getattr(s, name) == getattr(preset, name) for name in names)


def fewer_pairs(s: Settings, evaluation: list[str]) -> dict:
    """Human pairs to train on and to hold out, if the file has fewer than the preset asks for."""
    asked = s.seed_pairs + s.holdout_pairs
    if not as_in_preset(s, "seed_pairs", "holdout_pairs") or count_pairs(s.pairs) >= asked:
        return {}

    # Only reading the rows tells how many are pairs, on prompts that the evaluation leaves free.
    prompts = []
    for pair in stream_pairs(s.pairs, s.seed, avoid=evaluation):
        prompts.append(fold(pair["prompt"]))
    if s.prompts == "pairs" and needs_prompts(s):
        raise UserError(
            f"--prompts pairs: {s.pairs} has no prompts but those of its {len(prompts)} pairs; "
            f"give --prompts a file with others, one a line"
        )

    if len(prompts) < HELD_OUT:
        raise UserError(
            f"{s.pairs}: {len(prompts)} pairs are too few to hold one out, so nothing would tell "
            f"how well the model judges; label at least {HELD_OUT}, or give --seed-pairs "
            f"{len(prompts)} --holdout-pairs 0 to go without"
        )

    # A held-out pair has a prompt that no pair of the training has.
    seed_pairs = len(prompts) - len(prompts) // HELD_OUT
    trained_on = set(prompts[:seed_pairs])
    held_out = [prompt for prompt in prompts[seed_pairs:] if prompt not in trained_on]
    return {"seed_pairs": seed_pairs, "holdout_pairs": len(held_out)}


def fewer_prompts(s: Settings, small: Settings, evaluation: list[str]) -> dict:
    """New prompts in a round, if the file has fewer than the preset's rounds ask for.

    Nor are there more than a round of `small`, which has the number of human pairs, trains on.
    """
    if not needs_prompts(s) or not as_in_preset(s, "iter_prompts"):
        return {}
    if s.prompts == "world":
        pool = world_captions()["rest"]
    elif os.path.isfile(s.prompts):
        pool = read_prompt_file(s.prompts)
    else:
        return {}

    # A round may use no prompt of the evaluation, nor of any human pair.
    of_pairs = pair_prompts(s.pairs, s.seed, (), count_pairs(s.pairs))
    taken = evaluation + of_pairs
    left = list(distinct(pool, taken))
    of_a_round = len(left) // s.iters
    if as_in_preset(s, "iter_steps") and s.alpha < 1:
        places = PASSES_OF_ROUND * small.seed_pairs / (1 - s.alpha)
        of_a_round = min(of_a_round, max(1, int(places * s.alpha)))
    if 0 < of_a_round < max(prompts_of_rounds(s)):
        return {"iter_prompts": str(of_a_round)}
    return {}


def steps_of_passes(s: Settings, small: Settings) -> dict:
    """Optimizer steps of Iter0 and of a round, where the preset's are too few or too many.

    `s` says what the user gave by hand, `small` how many pairs and prompts there are.
    """
    wanted = {}
    if as_in_preset(s, "iter0_steps"):
        human = small.seed_pairs
        wanted["iter0_steps"] = fitting_steps(s.iter0_steps, human, PASSES * human, s.batch)
    if as_in_preset(s, "iter_steps") and s.iters > 0:
        wanted["iter_steps"] = fitting_steps(s.iter_steps, *mix_of_round(small), s.batch)
    return {name: steps for name, steps in wanted.items() if steps != getattr(s, name)}


def fitting_steps(steps: int, one_pass: float, most: float, batch: int) -> int:
    """The preset's steps, 0 for one pass, or those that fit the pairs better.

    One pass over few pairs is too short: STEPS are wanted at least. But a training takes `most`
    pairs, one after another, unless a single batch has more.
    """
    wanted = steps * batch
    if steps == 0:
        wanted = max(one_pass, STEPS * batch)
        if wanted == one_pass <= most:
            return 0
    return max(1, int(min(wanted, most) / batch))


def mix_of_round(s: Settings) -> tuple[float, float]:
    """Pairs of one pass over a round's mix, and the most that PASSES_OF_ROUND allow.

    A round has one self-made pair a prompt, and these are the share alpha of its mix. Neither they
    nor the human pairs come more often.
    """
    if s.alpha == 0:
        return s.seed_pairs, PASSES_OF_ROUND * s.seed_pairs

    mix = min(prompts_of_rounds(s)) / s.alpha
    most = PASSES_OF_ROUND * mix
    if s.alpha < 1:
        most = min(most, PASSES_OF_ROUND * s.seed_pairs / (1 - s.alpha))
    return mix, most


def shorter_warmup(s: Settings, changes: dict) -> dict:
    """Steps of the warm-up, of which a training as short as Iter0's has become could be all."""
    if "iter0_steps" not in changes or not as_in_preset(s, "warmup"):
        return {}
    warmup = int(WARMUP * changes["iter0_steps"])
    return {"warmup": warmup} if warmup < s.warmup else {}


def gentler_steps(s: Settings, small: Settings) -> dict:
    """The learning rate, where the preset's is too high for few pairs."""
    is_high = s.lr > HIGHEST_LR and as_in_preset(s, "lr")
    return {"lr": HIGHEST_LR} if is_high and small.seed_pairs < FEW else {}


def prompts_of_rounds(s: Settings) -> list[int]:
    """New prompts in each round."""
    return [round_prompts(s, k) for k in range(1, s.iters + 1)]


def as_flags(s: Settings, changes: dict) -> str:
    """The changes in one line, as the flags that would make them, and what training they mean."""
    flags = []
    for name, value in changes.items():
        flags.append(f"--{name.replace('_', '-')} {value}")

    small = dataclasses.replace(s, **changes)
    passes = []
    if "iter0_steps" in changes:
        count = small.iter0_steps * s.batch / small.seed_pairs
        passes.append(f"{count:.0f} in Iter0")
    if "iter_steps" in changes and s.alpha < 1:
        count = small.iter_steps * s.batch * (1 - s.alpha) / small.seed_pairs
        passes.append(f"{count:.0f} in a round")
    told = ""
    if passes:
        told = (
            f"; passes over the {small.seed_pairs} human pairs: {', '.join(passes)} (our findings "
            f"support {PASSES} and {PASSES_OF_ROUND})"
        )
    return (
        f"fewer pairs or prompts than preset {s.preset} asks for: this run has {' '.join(flags)}"
        f"{told}"
    )

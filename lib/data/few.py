"""Few human pairs: what becomes of a preset's numbers when --pairs or --prompts is a small file.

The presets of the paper's models ask for 50,000 pairs and as many prompts. With a small file, the
numbers that still stand as the preset has them shrink to what is there, and stage 01 says so.
Numbers that the user gave by hand hold, and stage 01 refuses them if the file is too small.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from lib.data.pairs import stream_pairs
from lib.data.prompts import distinct, fold, pair_prompts, read_prompt_file
from lib.data.tables import count_rows
from lib.run import UserError
from lib.settings import PRESETS, Settings, round_prompts

HELD_OUT = 5                # one in so many pairs measures the self-judge

# Optimizer steps of Iter0 and of a round where one pass would be fewer: our choice, as many as
# Iter0 has in preset tiny.
STEPS = 100


def fit_to_few_pairs(s: Settings, evaluation: Iterable[str]) -> dict:
    """The settings that change because the files of pairs and prompts are small, {} if none do.

    `evaluation` holds the evaluation's prompts, which neither human pairs nor rounds may use.
    """
    if not Path(s.pairs).is_file():
        return {}

    evaluation = list(evaluation)
    changes = fewer_pairs(s, evaluation)
    changes |= fewer_prompts(s, evaluation)
    changes |= longer_training(s, dataclasses.replace(s, **changes))
    return changes


def as_in_preset(s: Settings, *names: str) -> bool:
    """Whether all these settings stand as the run's preset has them."""
    preset = Settings(**PRESETS[s.preset])
    return all(getattr(s, name) == getattr(preset, name) for name in names)


def fewer_pairs(s: Settings, evaluation: list[str]) -> dict:
    """Human pairs to train on and to hold out, if the file has fewer than the preset asks for."""
    asked = s.seed_pairs + s.holdout_pairs
    if not as_in_preset(s, "seed_pairs", "holdout_pairs") or count_rows(Path(s.pairs)) >= asked:
        return {}

    # Only reading the rows tells how many are pairs, on prompts that the evaluation leaves free.
    prompts = []
    for pair in stream_pairs(s.pairs, s.seed, avoid=evaluation):
        prompts.append(fold(pair["prompt"]))
    if s.prompts == "pairs":
        raise UserError(
            f"--prompts pairs: {s.pairs} has no prompts but those of its {len(prompts)} pairs; "
            f"give --prompts a file with others, one a line"
        )

    # A held-out pair has a prompt that no pair of the training has.
    seed_pairs = len(prompts) - len(prompts) // HELD_OUT
    trained_on = set(prompts[:seed_pairs])
    held_out = [prompt for prompt in prompts[seed_pairs:] if prompt not in trained_on]
    return {"seed_pairs": seed_pairs, "holdout_pairs": len(held_out)}


def fewer_prompts(s: Settings, evaluation: list[str]) -> dict:
    """New prompts in a round, if the file has fewer than the preset's rounds ask for."""
    if not as_in_preset(s, "iter_prompts") or not Path(s.prompts).is_file():
        return {}

    # A round may use no prompt of the evaluation, nor of any human pair.
    of_pairs = pair_prompts(s.pairs, s.seed, (), count_rows(Path(s.pairs)))
    taken = evaluation + of_pairs
    left = list(distinct(read_prompt_file(s.prompts), taken))
    of_a_round = len(left) // max(1, s.iters)
    if 0 < of_a_round < max(prompts_of_rounds(s), default=0):
        return {"iter_prompts": str(of_a_round)}
    return {}


def longer_training(s: Settings, small: Settings) -> dict:
    """Optimizer steps of Iter0 and of a round, where one pass over the data would be too short.

    `s` says what the user gave by hand, `small` how many pairs and prompts there are.
    """
    changes = {}
    enough = STEPS * s.batch
    if one_pass(s, "iter0_steps") and small.seed_pairs < enough:
        changes["iter0_steps"] = STEPS

    # A round has one self-made pair a prompt, and these are the share alpha of its mix.
    mix = small.seed_pairs
    if s.alpha > 0:
        mix = min(prompts_of_rounds(small), default=0) / s.alpha
    if one_pass(s, "iter_steps") and mix < enough:
        changes["iter_steps"] = STEPS
    return changes


def one_pass(s: Settings, name: str) -> bool:
    """Whether a number of steps is the preset's and means one pass over the data."""
    return as_in_preset(s, name) and getattr(s, name) == 0


def prompts_of_rounds(s: Settings) -> list[int]:
    """New prompts in each round."""
    return [round_prompts(s, k) for k in range(1, s.iters + 1)]


def as_flags(s: Settings, changes: dict) -> str:
    """The changes in one line, as the flags that would make them."""
    flags = []
    for name, value in changes.items():
        flags.append(f"--{name.replace('_', '-')} {value}")
    return (
        f"fewer pairs or prompts than preset {s.preset} asks for: this run has {' '.join(flags)}"
    )

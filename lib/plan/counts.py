"""What the ledger of a run will say, from its settings alone.

The counts of images, UNet forwards and optimizer steps are exact: tests/test_plan.py holds them
against a real run's ledger. Pictures that the VAE encodes and decodes are counted too, which the
ledger does not do. How long all this takes is lib/plan/probe.py's question.
"""

import pandas as pd

from lib import crossfit
from lib.data import prompts
from lib.plan.stages import load_stage
from lib.ranking import SHOWN
from lib.rivals.self_confidence import PROBES
from lib.settings import Settings, of_candidates, round_prompts

COUNTS = ["images", "unet_forwards", "optimizer_steps", "encodes", "decodes"]


def counts(s: Settings) -> pd.DataFrame:
    """A table with a row per stage and round: `stage`, `iter`, and the numbers of COUNTS.

    `iter` is missing for stages 01 and 05, which have no round.
    """
    rows = [count_seed(s)]
    if not s.start:
        rows.append(count_training(s, 0, 0, s.seed_pairs))

    # Where Iter0 is given, it is round 1 that first trains on the human pairs.
    new_human = s.seed_pairs if s.start else 0
    for k in range(1, s.iters + 1):
        self_pairs = 0
        if s.alpha > 0:
            self_pairs = round_prompts(s, k)
            rows.append(count_candidates(s, k))
            if k == 1 and crossfit.is_needed(s):
                rows.append(count_crossfit(s))
            rows.append(count_ranking(s, k))
        rows.append(count_training(s, k, self_pairs, new_human))
        new_human = 0

    # The base, Iter0 and the model of every round paint the same prompts.
    rows.append(count_evaluation(s, s.iters + 2))

    table = pd.DataFrame(rows, columns=["stage", "iter", *COUNTS])
    table[COUNTS] = table[COUNTS].fillna(0).astype("int64")
    return table.astype({"iter": "Int64"})


# ---- stage by stage ----

def count_seed(s: Settings) -> dict:
    """Stage 01: the embedded world paints its human pairs, all others are encoded."""
    images = 2 * (s.seed_pairs + s.holdout_pairs)
    if s.pairs == "world":
        return {"stage": "01_seed", **count_painting(s, images)}
    return {"stage": "01_seed", "images": images, "encodes": images}


def count_candidates(s: Settings, k: int) -> dict:
    """Stage 02 of round K."""
    images = round_prompts(s, k) * s.candidates
    row = {"stage": "02_generate", "iter": k, **count_painting(of_candidates(s), images)}

    # Where only pictures of pairs are kept, none is decoded yet.
    if s.keep == "pairs":
        row["decodes"] = 0
    return row


def kept_pictures(s: Settings, k: int) -> int:
    """The pictures that round K leaves: all candidates', or those that stage 03 makes."""
    prompts = round_prompts(s, k)
    if s.keep == "all":
        return prompts * s.candidates
    shown = min(prompts, SHOWN)
    return shown * s.candidates + (prompts - shown) * 2


def count_ranking(s: Settings, k: int) -> dict:
    """Stage 03 of round K: model and anchor see every draw of every picture."""
    row = {"stage": "03_rank", "iter": k, "decodes": decodes_of_ranking(s, k)}
    if s.reward == "self-confidence":
        pictures = round_prompts(s, k) * s.candidates + 2 * s.holdout_pairs
        return row | {"unet_forwards": pictures * PROBES}
    if s.reward != "implicit":
        return row

    candidates = round_prompts(s, k) * s.candidates * s.draws
    held_out = 2 * s.holdout_pairs * s.draws

    # On the held-out pairs an anchor's errors stay what they were a round ago.
    rank = load_stage("03")
    models = 2
    if k > 1 and rank.anchor_of(s, k) == rank.anchor_of(s, k - 1):
        models = 1
    row["unet_forwards"] = 2 * candidates + models * held_out
    return row


def decodes_of_ranking(s: Settings, k: int) -> int:
    """Pictures that stage 03 of round K makes of their latents; a score looks at all of them."""
    if s.keep == "all":
        return 0
    looked_at = 0
    if s.reward not in ("implicit", "self-confidence"):
        looked_at = round_prompts(s, k) * s.candidates
    return looked_at + kept_pictures(s, k)


def count_training(s: Settings, k: int, self_pairs: int, new_human: int) -> dict:
    """Stage 04 of round K, with its self-made pairs, and human ones that no earlier training saw.

    Where pairs are mirrored, the mirror images of the new ones are still to be encoded.
    """
    training = load_stage("04")
    steps = training.steps_of(s, k, s.seed_pairs, self_pairs)
    row = {"stage": "04_train_dpo", "iter": k, "optimizer_steps": steps}
    row["unet_forwards"] = forwards_of_training(s, steps) + forwards_of_training(s, LAST_LOOK)
    if s.flip:
        row["encodes"] = 2 * (self_pairs + new_human)
    if s.flip and s.keep == "pairs":
        row["decodes"] = 2 * self_pairs
    return row


# After its last step a training looks at that step's batch once more, without a gradient.
LAST_LOOK = 1


def forwards_of_training(s: Settings, steps: int) -> int:
    """UNet forwards of so many optimizer steps."""
    return steps * s.batch * load_stage("04").forwards_per_pair(s)


def count_crossfit(s: Settings) -> dict:
    """Few held-out pairs, before stage 03 of round 1: each fold of the human pairs is judged by an
    Iter0 that is trained on the others.

    So counted where no two pairs have the same prompt. Those that have are in one fold, which may
    move a training by a few steps.
    """
    pairs = s.seed_pairs + s.holdout_pairs
    folds = min(crossfit.FOLDS, pairs)
    steps = 0
    for fold in range(folds):
        others = pairs - len(range(fold, pairs, crossfit.FOLDS))
        as_iter0 = crossfit.as_long_as_iter0(s, others)
        steps += load_stage("04").steps_of(as_iter0, 0, others, 0)

    # Model and base see every draw of both pictures of a pair.
    row = {"stage": "crossfit", "iter": 0, "optimizer_steps": steps}
    trained = forwards_of_training(s, steps) + forwards_of_training(s, folds * LAST_LOOK)
    row["unet_forwards"] = trained + 2 * 2 * pairs * s.draws
    if s.flip:
        row["encodes"] = 2 * s.holdout_pairs
    return row


def count_evaluation(s: Settings, models: int) -> dict:
    """Stage 05: so many models paint the same prompts."""
    images = models * eval_prompts(s) * s.eval_seeds
    return {"stage": "05_eval", **count_painting(s, images)}


# ---- what stages have in common ----

def count_painting(s: Settings, images: int) -> dict:
    """Pictures from noise; guidance asks the UNet twice a step, with the prompt and without."""
    forwards_a_step = 1
    if s.cfg_scale > 1:
        forwards_a_step = 2
    forwards = images * s.sample_steps * forwards_a_step
    return {"images": images, "unet_forwards": forwards, "decodes": images}


def eval_prompts(s: Settings) -> int:
    """The evaluation prompts of all benchmarks together.

    A benchmark that would have to be fetched counts as many prompts as it was published with.
    """
    total = 0
    for name in s.eval_prompts.split(","):
        name = name.strip()
        if name in prompts.PUBLISHED:
            published = prompts.PUBLISHED[name]
            total += min(s.eval_count or published, published)
        elif name:
            table = prompts.evaluation_prompts(name, s.eval_count, s.pairs, say_nothing)
            total += table.prompt.nunique()
    return total


def say_nothing(message: str) -> None:
    """Reading a benchmark's prompts says how many there are; a plan's table has no room for it."""

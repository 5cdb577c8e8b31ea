"""Does the judge agree with people, where so few pairs are held out that these cannot tell?

All human pairs are asked: those of the training and the held-out ones are parted into five folds,
and for each fold an Iter0 is trained on the others, as stage 04 trains it, and judges this one, as
stage 03 judges the held-out pairs. So every pair is judged by a model that knows neither it nor its
prompt. These models are thrown away; the run itself still trains on no held-out pair.

The driver starts this before stage 03 of round 1, which takes the accuracy from here.

reads   seed/pairs.parquet, seed/holdout.parquet, their latents, the base
writes  judge/foldF/checkpoint.pt             while it trains
        judge/foldF/holdout_draws.parquet     as stage 03's: every draw of both pictures of a pair
        judge/crossfit.parquet                all of these

    python lib/crossfit.py --run runs/mine
"""

import sys
from dataclasses import replace
from pathlib import Path

# Started by its path, as the stages are: the modules are found from the project's folder.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import pandas as pd

from lib import models
from lib.data.prompts import fold as folded
from lib.finite import refuse_unfinite_rewards
from lib.judge import CROSSFIT
from lib.models import BASE
from lib.plan.stages import load_stage
from lib.run import (Ledger, begin, is_main, is_whole, process_state, read_pairs, run_stage,
                     seed_of, wait, write_table)
from lib.settings import Settings, load, micro_batch_of
from lib.training import encode_missing

FOLDS = 5

# So many held-out pairs tell by themselves: a judge that is right on 65%, say, from a coin.
ENOUGH = 100


def is_needed(s: Settings) -> bool:
    """Whether the run has a self-judge, and too few held-out pairs of its own to measure it."""
    has_judge = s.iters > 0 and s.alpha > 0 and s.reward == "implicit" and not s.start
    return has_judge and s.pairs != "world" and 0 < s.holdout_pairs < ENOUGH


def folds_of(s: Settings, pairs: pd.DataFrame) -> pd.Series:
    """The fold of each pair, 1 to FOLDS: pairs of one prompt are in the same."""
    prompts = pairs.prompt.map(folded)
    shuffled = sorted(set(prompts), key=lambda prompt: seed_of(s.seed, "fold", prompt))
    number = {prompt: i % FOLDS + 1 for i, prompt in enumerate(shuffled)}
    return prompts.map(number)


def as_long_as_iter0(s: Settings, count: int) -> Settings:
    """Settings for a training on `count` pairs with as many passes over them as Iter0 has."""
    if s.iter0_steps == 0:
        return s
    return replace(s, iter0_steps=max(1, round(s.iter0_steps * count / s.seed_pairs)))


def judge_fold(s: Settings, others: pd.DataFrame, fold: pd.DataFrame, folder: Path,
               ledger: Ledger) -> None:
    """Train on the other pairs, and write every draw of the fold's to holdout_draws.parquet."""
    training, rank = load_stage("04"), load_stage("03")
    s = replace(as_long_as_iter0(s, len(others)), track="off", compile="off",
                micro_batch=micro_batch_of(s, process_state().num_processes))
    checkpoint = folder / "checkpoint.pt"
    policy, _ = training.train(s, 0, others, len(others), ledger, checkpoint)

    # As stage 03 has them: frozen, and in the precision of ranking.
    policy = policy.requires_grad_(False).eval().to(models.dtype_of(s))
    unets = [policy, models.load_unet(s, BASE)]
    comparisons = rank.comparisons_of_pairs(s, fold)
    t, errors = rank.measure_errors(s, unets, comparisons, ledger, f"{folder.name} judged")
    error, anchor_error = errors
    draws = rank.rewards_of(s, t, error, anchor_error)

    if is_main():
        refuse_unfinite_rewards(s, 1, comparisons, draws.reward)
        rank.write_holdout_draws(folder, comparisons, draws)
        checkpoint.unlink(missing_ok=True)
    wait()


def main(argv: list[str]) -> None:
    s, _ = load(argv, __doc__)
    folder = Path(s.run) / "judge"
    if not is_needed(s) or is_whole(Path(s.run) / CROSSFIT):
        return
    if is_main():
        begin(s.run, __file__)

    # read
    tables = {}
    for name in ("seed/pairs.parquet", "seed/holdout.parquet"):
        tables[name] = read_pairs(s.run, name, "01_seed.py")
    encode_missing(s, tables)
    pairs = pd.concat(tables.values(), ignore_index=True)
    numbers = folds_of(s, pairs)
    if numbers.nunique() < 2:
        return
    if is_main():
        print(f"crossfit: {s.holdout_pairs} held-out pairs tell little of the judge, so "
              f"{numbers.nunique()} more models like Iter0, at its cost each, judge all "
              f"{len(pairs)} human pairs")

    # compute; what a stopped call has finished stays
    tables = []
    for number in sorted(numbers.unique()):
        of_fold = folder / f"fold{number}"
        table = of_fold / "holdout_draws.parquet"
        if not is_whole(table):
            with Ledger(s.run, "crossfit", 0, str(models.device_of(s))) as ledger:
                inside, others = pairs[numbers == number], pairs[numbers != number]
                judge_fold(s, others.reset_index(drop=True), inside.reset_index(drop=True),
                           of_fold, ledger)
        tables.append(table)

    # write
    if is_main():
        write_table(pd.concat(map(pd.read_parquet, tables), ignore_index=True),
                    Path(s.run) / CROSSFIT)


if __name__ == "__main__":
    run_stage(main)

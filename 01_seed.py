"""Stage 01: the human pairs everything starts from, and the prompts of all later rounds and of the evaluation.

reads   the evaluation's prompts (`--eval-prompts`: the embedded world's, benchmarks by name, files), the pair source
        (`--pairs`: the embedded world, Pick-a-Pic v2, or one's own pairs), the rounds' prompts (`--prompts`)
writes  config.json, seed/pairs.parquet, seed/holdout.parquet (pair_id, prompt, win, lose, source), seed/images/,
        seed/latents/, seed/preview.png, benchmarks.parquet (benchmark, style, prompt_id), prompts.parquet (prompt_id,
        prompt, split)

SAIL's promise is that few human labels are enough (the paper: 50K of Pick-a-Pic's 0.8M pairs). The held-out pairs
are labelled by people too, are never trained on, and measure how well the model judges (stage 03). A benchmark is
fixed, so its prompts are set aside first: no human pair and no round has one of them, nor a round one of the pairs'.

In the embedded world this stage plays the people: the base model draws two pictures for a caption, and an annotator
with hidden taste picks one, with Bradley-Terry noise, P(a > b) = sigmoid((u_a - u_b) / label_noise).

    python 01_seed.py --run runs/tiny
    python 01_seed.py --run runs/mine --pairs mine/pairs.csv --prompts mine/prompts.txt --eval-prompts mine/eval.txt
"""

from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from tqdm import tqdm

from lib import benchmarks, models, oracle, own, report
from lib import pairs as outside
from lib.run import Ledger, UserError, generator, open_image, run_stage, save_image, seed_of, write_table
from lib.sampler import paint
from lib.settings import Settings, amend, load, round_prompts

WRITING = 64                                   # images that may wait to be decoded and written


def round_counts(s: Settings) -> dict[str, int]:
    return {f"iter{k}": round_prompts(s, k) for k in range(1, s.iters + 1)}


def world_splits(s: Settings) -> tuple[dict[str, list[str]], list[str]]:
    """The prompts of each round, and the captions left for human pairs."""
    rest, counts = benchmarks.permuted(benchmarks.world_captions()["rest"], "world pools", s.seed), round_counts(s)
    if sum(counts.values()) + 2 > len(rest):
        raise UserError(f"--iters {s.iters} --iter-prompts {s.iter_prompts}: the embedded world has {len(rest) - 2} "
                        f"prompts for the rounds; ask for fewer")
    left = iter(rest)
    return {split: [next(left) for _ in range(count)] for split, count in counts.items()}, list(left)


def world_pairs(s: Settings, captions: list[str], ledger: Ledger) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Seed and held-out pairs on different captions, and a word on the labels."""
    run, count = Path(s.run), s.seed_pairs + s.holdout_pairs
    held = captions[:min(s.holdout_pairs, len(captions) // 2)]
    free = captions[len(held):]
    prompts = [free[i % len(free)] for i in range(s.seed_pairs)] + \
              [held[i % len(held)] for i in range(s.holdout_pairs)]
    jobs = pd.DataFrame([{"prompt": prompt, "seed": seed_of(s.seed, "seed pair", i, side),
                          "image": f"seed/images/{i:05d}_{side}.png"}
                         for i, prompt in enumerate(prompts) for side in "ab"])
    paint(s, -1, jobs, ledger, "seed images", keep_latents=True)
    utility = oracle.score(jobs.prompt.tolist(), report.read_pictures(run, jobs.image))["utility"].reshape(count, 2)
    first = oracle.first_wins(utility[:, 0], utility[:, 1], s.label_noise, generator(s.seed, "annotator"))
    against = (first != (utility[:, 0] > utility[:, 1])).float().mean().item()
    images = jobs.image.to_numpy().reshape(count, 2)
    pairs = pd.DataFrame({"pair_id": [f"human-{i:05d}" for i in range(count)], "prompt": prompts,
                          "win": np.where(first, images[:, 0], images[:, 1]),
                          "lose": np.where(first, images[:, 1], images[:, 0]), "source": "human"})
    return pairs[:s.seed_pairs], pairs[s.seed_pairs:], f"{against:.0%} of the labels go against the annotators' own utility"


def choose_pairs(s: Settings, evaluation: set[str], skipped: Counter) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first seed_pairs and holdout_pairs of the source's shuffled stream, written as square images by threads;
    held-out pairs are those whose prompt the seed does not have. Counts what was skipped, by reason."""
    run, rows, held, taken, writing = Path(s.run), [], [], set(), deque()
    write = lambda image, path: path.exists() or save_image(outside.decode(image, s.resolution), path)
    total = s.seed_pairs + s.holdout_pairs
    with ThreadPoolExecutor() as pool, tqdm(total=total, desc="human pairs", unit="pair") as bar:
        for pair in outside.read_pairs(s.pairs, s.seed, skipped, evaluation):
            seeding, prompt = len(rows) < s.seed_pairs, outside.fold(pair["prompt"])
            if not seeding and prompt in taken:
                skipped["held-out prompt in the seed"] += 1
                continue
            taken |= {prompt} if seeding else set()
            name = f"seed/images/{pair['pair_id']}"
            row = {"pair_id": pair["pair_id"], "prompt": pair["prompt"], "win": f"{name}_w.jpg", "lose": f"{name}_l.jpg",
                   "source": "human"}
            (rows if seeding else held).append(row)
            writing += [pool.submit(write, pair[side], run / row[side]) for side in ("win", "lose")]
            while len(writing) > WRITING:
                writing.popleft().result()
            bar.update()
            if len(rows) + len(held) == total:         # before the stream opens another shard
                break
        while writing:
            writing.popleft().result()
    if len(rows) < s.seed_pairs or len(held) < s.holdout_pairs:
        raise UserError(f"{s.pairs}: has {len(rows)} pairs for the seed and {len(held)} on other prompts to hold out; "
                        f"--seed-pairs {s.seed_pairs} and --holdout-pairs {s.holdout_pairs} ask more; give smaller "
                        f"numbers or more pairs")
    return pd.DataFrame(rows), pd.DataFrame(held, columns=list(rows[0]))


def outside_pairs(s: Settings, evaluation: set[str]) -> tuple[dict[str, list[str]], str]:
    """Write the tables and images of seed and held-out pairs; the prompts of each round, and a word on the labels.
    Prompts that cannot suffice are refused before the first image is fetched."""
    skipped, counts = Counter(), round_counts(s)
    pool = None if s.prompts == "pairs" else outside.read_prompts(s.prompts)
    if pool is not None:
        benchmarks.split_prompts(pool, evaluation, counts, s.seed)
    seed, holdout = choose_pairs(s, evaluation, skipped)
    taken = evaluation | {*seed.prompt, *holdout.prompt}
    if pool is None:
        pool = outside.pair_prompts(s.pairs, s.seed, taken, sum(counts.values()))
    splits = benchmarks.split_prompts(pool, taken, counts, s.seed)
    write_table(seed, Path(s.run) / "seed" / "pairs.parquet")
    write_table(holdout, Path(s.run) / "seed" / "holdout.parquet")
    return splits, "skipped: " + (", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none")


def main(argv: list[str]) -> None:
    s, _ = load(argv, __doc__, create=True)
    run, state = Path(s.run), PartialState()
    tables = [run / "seed" / "pairs.parquet", run / "seed" / "holdout.parquet"]
    if (run / "prompts.parquet").exists():
        if not tables[0].exists():
            raise UserError(f"{run}: was made to compare models and has no seed; give the run another folder with --run")
        return state.print(f"01 seed: {run}/seed is there, nothing to do")
    if state.is_main_process:                  # a bad benchmark is refused before anything is fetched or painted
        evaluation = benchmarks.load(s.eval_prompts, s.eval_count, s.pairs)
        if few := own.fit(s, evaluation.prompt):
            print(own.told(s, few))
            s = amend(s, few)
    if s.pairs == "world":
        splits, captions = world_splits(s)
    with Ledger(run, "01_seed", None, str(models.device_of(s))) as ledger:
        if s.pairs == "world":
            seed, holdout, labels = world_pairs(s, captions, ledger)
        else:
            if state.is_main_process:
                splits, labels = outside_pairs(s, set(evaluation.prompt))
            state.wait_for_everyone()
            seed, holdout = map(pd.read_parquet, tables)
            images = [(run / image, table, row) for table, pairs in zip(tables, (seed, holdout))
                      for row, sides in enumerate(zip(pairs.win, pairs.lose)) for image in sides]
            models.ensure_latents([image for image, *_ in images], s, lambda i: open_image(*images[i]))
            ledger.images += len(images) if state.is_main_process else 0
        if state.is_main_process:
            prompts = [prompt for pool in splits.values() for prompt in pool] + list(dict.fromkeys(evaluation.prompt))
            models.PromptEncoder(s).prepare([*seed.prompt, *prompts])
            write_table(seed, tables[0])
            write_table(holdout, tables[1])
            report.pair_sheet(run, seed.head(24), run / "seed" / "preview.png", ("preferred", "other"))
            benchmarks.write_prompts(run, splits, evaluation)
            print(f"01 seed: {len(seed)} human pairs, {len(holdout)} held out; {labels}; {len(prompts)} prompts for the "
                  f"rounds and the evaluation; see {run}/seed/preview.png")


if __name__ == "__main__":
    run_stage(main)

"""Stage 01: the human pairs everything starts from, and the prompts of all later rounds.

reads   the pair source (`--pairs`): the embedded world, Pick-a-Pic v2, or one's own pairs
writes  config.json, seed/pairs.parquet, seed/holdout.parquet (pair_id, prompt, win, lose, source),
        seed/images/, seed/latents/, prompts.parquet (prompt_id, prompt, split), seed/preview.png

SAIL's promise is that few human labels are enough (the paper: 50K of Pick-a-Pic's 0.8M pairs). The held-out pairs
are labelled by people too, are never trained on, and measure how well the model judges (stage 03). The prompts of
the rounds and of the evaluation appear nowhere in the seed, nor twice.

In the embedded world this stage plays the people: the base model draws two pictures for a caption, and an annotator
with hidden taste picks one, with Bradley-Terry noise, P(a > b) = sigmoid((u_a - u_b) / label_noise).

    python 01_seed.py --run runs/tiny
    python 01_seed.py --run runs/mine --pairs mine/pairs.csv --prompts mine/prompts.txt --eval-prompts mine/eval.txt
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from lib import models, oracle, report, world
from lib import pairs as outside
from lib.run import Ledger, UserError, generator, open_image, run_stage, save_image, seed_of, write_table
from lib.sampler import paint
from lib.settings import Settings, load, round_prompts

EVAL_PER_STYLE, DEV_PER_STYLE = 60, 40         # the world's captions set aside, the same for every run seed


def shuffled(items: list, *key) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=generator(*key))]


def world_splits(s: Settings) -> tuple[dict[str, list[str]], list[str]]:
    """The prompts of each split, and the captions left for human pairs. Styles take turns within a split."""
    by_style = {style: [] for style in world.STYLES}
    for text in shuffled(world.CAPTIONS, "world splits"):
        by_style[world.STYLES[world.parse(text)[2]]].append(text)
    turns = [text for row in zip(*by_style.values()) for text in row]
    ends = np.cumsum([0, 4 * EVAL_PER_STYLE, 4 * DEV_PER_STYLE])
    evaluation, development, rest = turns[:ends[1]], turns[ends[1]:ends[2]], turns[ends[2]:]
    chosen = {"world": evaluation, "dev": development}.get(s.eval_prompts)
    if chosen is None:
        raise UserError(f"--eval-prompts {s.eval_prompts}: the embedded world has world and dev")
    rest = shuffled(rest, "world pools", s.seed)
    counts = {f"iter{k}": round_prompts(s, k) for k in range(1, s.iters + 1)}
    if s.eval_count > len(chosen) or sum(counts.values()) + 2 > len(rest):
        raise UserError(f"the embedded world has {len(chosen)} evaluation prompts and {len(rest) - 2} for the rounds; "
                        f"--eval-count {s.eval_count} and --iters {s.iters} x --iter-prompts {s.iter_prompts} ask more")
    left = iter(rest)
    splits = {split: [next(left) for _ in range(count)] for split, count in counts.items()}
    return splits | {"eval": chosen[:s.eval_count]}, list(left)


def world_pairs(s: Settings, captions: list[str], ledger: Ledger) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """Seed and held-out pairs on different captions, and the share of labels that go against the utility."""
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
    return pairs[:s.seed_pairs], pairs[s.seed_pairs:], against


def outside_pairs(s: Settings, ledger: Ledger) -> tuple[pd.DataFrame, pd.DataFrame, Counter]:
    """The first seed_pairs and holdout_pairs of the source's shuffled stream, as square images and latents; held-out
    pairs are those whose prompt the seed does not have. Also what was skipped, by reason."""
    run, skipped, rows, held, taken = Path(s.run), Counter(), [], [], set()
    bar = tqdm(total=s.seed_pairs + s.holdout_pairs, desc="human pairs", unit="pair")
    for pair in outside.read_pairs(s.pairs, s.seed, skipped):
        if len(rows) == s.seed_pairs and (len(held) == s.holdout_pairs or pair["prompt"] in taken):
            if len(held) == s.holdout_pairs:
                break
            skipped["held-out prompt in the seed"] += 1
            continue
        row = {"pair_id": pair["pair_id"], "prompt": pair["prompt"], "win": f"seed/images/{pair['pair_id']}_w.jpg",
               "lose": f"seed/images/{pair['pair_id']}_l.jpg", "source": "human"}
        for side in ("win", "lose"):
            if not (run / row[side]).exists():
                save_image(outside.decode(pair[side], s.resolution), run / row[side])
        (rows if len(rows) < s.seed_pairs else held).append(row)
        taken |= {row["prompt"]} if row is rows[-1] else set()
        bar.update()
    bar.close()
    if len(rows) < s.seed_pairs or len(held) < s.holdout_pairs:
        raise UserError(f"{s.pairs}: has {len(rows)} pairs for the seed and {len(held)} on other prompts to hold out; "
                        f"--seed-pairs {s.seed_pairs} and --holdout-pairs {s.holdout_pairs} ask more")
    files = [run / row[side] for row in rows + held for side in ("win", "lose")]
    models.ensure_latents(files, s, lambda i: open_image(files[i], s.pairs, i // 2))
    ledger.images += len(files)
    return pd.DataFrame(rows), pd.DataFrame(held, columns=list(rows[0])), skipped


def outside_splits(s: Settings, taken: set[str]) -> dict[str, list[str]]:
    """Disjoint prompts for the rounds and the evaluation, none of them among those of the human pairs."""
    counts = {f"iter{k}": round_prompts(s, k) for k in range(1, s.iters + 1)}
    evaluation = list(outside.distinct(outside.read_prompts(s.eval_prompts), taken))[:s.eval_count]
    if not evaluation:
        raise UserError(f"{s.eval_prompts}: all its prompts are among those of the human pairs; give others")
    taken = taken | set(evaluation)
    pool = outside.pair_prompts(s.pairs, s.seed, taken, sum(counts.values())) if s.prompts == "pairs" else \
        outside.read_prompts(s.prompts)
    return outside.split_prompts(pool, taken, counts, s.seed) | {"eval": evaluation}


def main(argv: list[str]) -> None:
    s, _ = load(argv, __doc__, create=True)
    run, state = Path(s.run), PartialState()
    if (run / "prompts.parquet").exists():
        return print(f"01 seed: {run}/seed is there, nothing to do")
    with Ledger(run, "01_seed", None, str(models.device_of(s))) as ledger:
        if s.pairs == "world":
            splits, captions = world_splits(s)
            seed, holdout, against = world_pairs(s, captions, ledger)
            labels = f"{against:.0%} of the labels go against the annotators' own utility"
        else:
            seed, holdout, skipped = outside_pairs(s, ledger)
            splits = outside_splits(s, {*seed.prompt, *holdout.prompt})
            labels = "skipped: " + (", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "none")
        prompts = pd.DataFrame([(p, split) for split, pool in splits.items() for p in pool], columns=["prompt", "split"])
        prompts.insert(0, "prompt_id", range(len(prompts)))
        if state.is_main_process:
            models.PromptEncoder(s).prepare([*seed.prompt, *prompts.prompt])
            write_table(seed, run / "seed" / "pairs.parquet")
            write_table(holdout, run / "seed" / "holdout.parquet")
            report.pair_sheet(run, seed.head(24), run / "seed" / "preview.png", ("preferred", "other"))
            write_table(prompts, run / "prompts.parquet")
    print(f"01 seed: {len(seed)} human pairs, {len(holdout)} held out; {labels}; {len(prompts)} prompts for the rounds "
          f"and the evaluation; see {run}/seed/preview.png")


if __name__ == "__main__":
    run_stage(main)

"""Stage 01: the human pairs that everything starts from, and the prompts of all that follows.

reads   the evaluation's prompts (--eval-prompts: the embedded world's, benchmarks by name, files),
        the source of pairs (--pairs: the embedded world, Pick-a-Pic v2, or one's own pairs),
        the prompts of the rounds (--prompts)
writes  config.json
        seed/pairs.parquet, seed/holdout.parquet   pair_id, prompt, win, lose, source
        seed/images/, seed/latents/, seed/preview.png
        seed/people.json                           how far people agree, where that is known
        benchmarks.parquet                         benchmark, style, prompt_id
        prompts.parquet                            prompt_id, prompt, split (iter1, ..., eval)

SAIL's promise is that few human labels are enough (the paper: 50K of Pick-a-Pic's 0.8M pairs). The
held-out pairs are labelled by people too. They are never trained on, and measure how well the model
judges (stage 03). A benchmark is fixed, so its prompts are set aside first: no human pair and no
round uses them. A round uses no prompt of a human pair. A table that was lost is made again.

In the embedded world this stage plays the people. The base model draws two pictures for a caption,
and an annotator with hidden taste u picks one, with Bradley-Terry noise:

    P(a > b) = sigmoid((u_a - u_b) / label_noise)

    python 01_seed.py --run runs/tiny
    python 01_seed.py --run runs/mine --pairs mine/pairs.csv --prompts mine/prompts.txt \\
                      --eval-prompts mine/eval.txt
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pandas as pd

from lib import kinds, models
from lib.data import few, prompts
from lib.data.folders import agreement_beside
from lib.data.pairs import stream_pairs
from lib.data.pictures import is_kept_as_it_came, write_square
from lib.run import (Ledger, UserError, bar, begin, generator, inside, is_main, is_whole,
                     open_image, read_parquet, run_stage, seed_of, shown, wait, write_json,
                     write_table)
from lib.sampler import paint
from lib.settings import (PRESETS, Settings, amend, in_world, load, needs_prompts, read_config,
                          round_prompts)
from lib.sheets import pair_sheet, read_pictures
from lib.start import check_start
from lib.world import captions, people

# The tables of this stage. The last one marks it as done.
TABLES = ("seed/pairs.parquet", "seed/holdout.parquet", "benchmarks.parquet", "prompts.parquet")

WRITING = 64                    # pictures that may wait in memory to be decoded and written


def prompt_counts(s: Settings) -> dict[str, int]:
    """How many new prompts each round needs, by the name of its split."""
    return {f"iter{k}": round_prompts(s, k) for k in range(1, s.iters + 1)}


# ---- the embedded world: its people are played here ----

def split_world(s: Settings) -> tuple[dict[str, list[str]], list[str]]:
    """The captions of each round, and those left for human pairs."""
    rest = captions.permuted(captions.world_captions()["rest"], "world pools", s.seed)
    counts = prompt_counts(s)

    # One caption at least is left for human pairs, and one for held-out ones.
    if sum(counts.values()) + 2 > len(rest):
        raise UserError(f"--iters {s.iters} --iter-prompts {s.iter_prompts}: the embedded world "
                        f"has {len(rest) - 2} prompts for the rounds; ask for fewer")

    # Each round takes its prompts off the top; what is left goes to people.
    splits = {}
    for split, count in counts.items():
        splits[split] = rest[:count]
        rest = rest[count:]
    return splits, rest


def world_pairs(
    s: Settings,
    free: list[str],
    ledger: Ledger,
) -> tuple[pd.DataFrame, pd.DataFrame, dict, list[str]]:
    """Human pairs, held-out pairs on other captions, how far the people agree, and a note on each
    human pair for the preview."""
    # Captions are few: where there are more pairs than captions, they come again in turn.
    held_out = free[:min(s.holdout_pairs, len(free) // 2)]
    trained_on = free[len(held_out):]
    prompts_of_pairs = list(islice(cycle(trained_on), s.seed_pairs))
    prompts_of_pairs += islice(cycle(held_out), s.holdout_pairs)

    # The base draws two pictures, a and b, for each caption.
    jobs = []
    for i, prompt in enumerate(prompts_of_pairs):
        for side in "ab":
            jobs.append({
                "prompt": prompt,
                "seed": seed_of(s.seed, "seed pair", i, side),
                "image": f"seed/images/{i:05d}_{side}.png",
            })
    jobs = pd.DataFrame(jobs)
    paint(s, models.BASE, jobs, ledger, "seed images", keep_latents=True)

    # An annotator looks at both and prefers one.
    pictures = read_pictures(Path(s.run), jobs.image)
    utility = people.score(jobs.prompt.tolist(), pictures)["utility"]
    u_a, u_b = utility.reshape(-1, 2).T
    a_wins = people.first_wins(u_a, u_b, s.label_noise, generator(s.seed, "annotator"))

    image_a, image_b = jobs.image.to_numpy().reshape(-1, 2).T
    pairs = pd.DataFrame({
        "pair_id": [f"human-{i:05d}" for i in range(len(prompts_of_pairs))],
        "prompt": prompts_of_pairs,
        "win": np.where(a_wins, image_a, image_b),
        "lose": np.where(a_wins, image_b, image_a),
        "source": "human",
    })

    # People err: how often, and what that leaves for a judge to agree on.
    against = a_wins != (u_a > u_b)
    again, perfect_judge = people.self_agreement(u_a, u_b, s.label_noise)
    agreement = {
        "labels_against_their_own_utility": against.float().mean().item(),
        "agree_with_themselves": again,
        "agree_with_a_perfect_judge": perfect_judge,
    }
    notes = notes_on_labels(np.where(a_wins, u_a, u_b), np.where(a_wins, u_b, u_a))
    return pairs[:s.seed_pairs], pairs[s.seed_pairs:], agreement, notes[:s.seed_pairs]


def notes_on_labels(win: np.ndarray, lose: np.ndarray) -> list[str]:
    """The annotators' own utility of the pictures of each pair (B,), for the preview."""
    notes = []
    for u_win, u_lose in zip(win, lose):
        note = f"utility {u_win:.2f} : {u_lose:.2f}"
        if u_win < u_lose:
            note += ", against it"
        notes.append(note)
    return notes


# ---- pairs from outside ----

def take_pairs(
    s: Settings,
    evaluation: set[str],
    skipped: Counter,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The first pairs of the source's shuffled stream: to train on, then to hold out.

    A held-out pair has a prompt that no pair of the training has. `skipped` counts, by reason, the
    rows that gave no pair.
    """
    run = Path(s.run)
    wanted = s.seed_pairs + s.holdout_pairs
    training, held_out, trained_on = [], [], set()

    writing = deque()
    progress = bar(None, "human pairs", "pair", total=wanted)
    with ThreadPoolExecutor() as pool, progress:
        for pair in stream_pairs(s.pairs, s.seed, skipped, evaluation):
            refuse_foreign(s, pair["prompt"])
            prompt = prompts.fold(pair["prompt"])
            row = row_of_pair(s, pair)
            if len(training) < s.seed_pairs:
                training.append(row)
                trained_on.add(prompt)
            elif prompt not in trained_on:
                held_out.append(row)
            else:
                skipped["held-out prompt in the seed"] += 1
                continue

            # Without loss: what a JPEG does to a picture, candidates never meet.
            for side in ("win", "lose"):
                path = run / row[side]
                if not is_whole(path):
                    writing.append(pool.submit(write_square, pair[side], path, s.resolution))

            # Few pictures wait in memory, and an error of a writing thread is raised here.
            while len(writing) > WRITING:
                writing.popleft().result()
            progress.update()

            # Stop before the stream opens another shard.
            if len(training) + len(held_out) == wanted:
                break
        for future in writing:
            future.result()

    if len(training) < s.seed_pairs or len(held_out) < s.holdout_pairs:
        raise UserError(f"{s.pairs}: has {len(training)} pairs for the seed and {len(held_out)} on "
                        f"other prompts to hold out; --seed-pairs {s.seed_pairs} and "
                        f"--holdout-pairs {s.holdout_pairs} ask more; give smaller numbers or more "
                        f"pairs")
    return pd.DataFrame(training), pd.DataFrame(held_out, columns=list(training[0]))


def refuse_foreign(s: Settings, prompt: str) -> None:
    """UserError if the run is in the embedded world and the prompt of a pair is not."""
    if in_world(s) and captions.parse(prompt) is None:
        raise UserError(f"{s.pairs}: {shown(prompt)} is no caption of the embedded world, whose "
                        f"prompts this run has; give --prompts and --eval-prompts of your own, too")


def row_of_pair(s: Settings, pair: dict) -> dict:
    name = f"seed/images/{pair['pair_id']}"
    return {
        "pair_id": pair["pair_id"],
        "prompt": pair["prompt"],
        "win": f"{name}_w{ending_of_picture(s, pair['win'])}",
        "lose": f"{name}_l{ending_of_picture(s, pair['lose'])}",
        "source": "human",
    }


def ending_of_picture(s: Settings, encoded: bytes | Path) -> str:
    """How a human picture is kept: by its name's ending, always without loss."""
    if s.keep == "all":
        return ".png"
    if is_kept_as_it_came(encoded, s.resolution):
        return ".jpg"
    return ".webp"


def outside_pairs(
    s: Settings,
    evaluation: set[str],
    lacking: list[Path],
) -> tuple[dict[str, list[str]], str]:
    """Write the tables and pictures of the human pairs; return the prompts of each round.

    With them comes a word on what was skipped. Prompts that cannot suffice are refused before the
    first picture is fetched.
    """
    # A file of prompts is read and counted first, unless no round draws candidates.
    skipped = Counter()
    counts = {}
    if needs_prompts(s):
        counts = prompt_counts(s)
    pool = None
    if not counts:
        pool = []
    elif s.prompts == "world":
        pool = captions.world_captions()["rest"]
    elif s.prompts != "pairs":
        pool = prompts.read_prompt_file(s.prompts)
    if pool:
        prompts.split_prompts(pool, evaluation, counts, s.seed, f"--prompts {s.prompts}")

    human, holdout = take_pairs(s, evaluation, skipped)

    # The rounds' prompts are none of the evaluation's and none of the human pairs'.
    taken = evaluation | set(human.prompt) | set(holdout.prompt)
    if pool is None:
        pool = prompts.pair_prompts(s.pairs, s.seed, taken, sum(counts.values()))
    splits = prompts.split_prompts(pool, taken, counts, s.seed, f"--prompts {s.prompts}")

    write_lacking(s, (human, holdout), lacking)
    reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
    return splits, f"skipped: {reasons or 'none'}"


def encode_pairs(s: Settings, ledger: Ledger) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the latents of all their pictures; return the two tables."""
    # Every picture, and the row that names it: an error will say so.
    run = Path(s.run)
    tables, pictures = [], []
    for path in (run / "seed" / "pairs.parquet", run / "seed" / "holdout.parquet"):
        table = read_parquet(path, "01_seed.py")
        tables.append(table)
        for row, pair in enumerate(table.itertuples(), start=1):
            for image in (pair.win, pair.lose):
                pictures.append((inside(run, image, path, row), path, row))

    images = [image for image, _, _ in pictures]
    models.ensure_latents(images, s, lambda i: open_image(*pictures[i]))
    if is_main():
        ledger.images += len(images)
    return tuple(tables)


# ---- the stage ----

def lacking_tables(s: Settings) -> list[Path]:
    """The tables that the stage has to write: of a finished stage those that were lost since.

    UserError: the folder was made to compare models.
    """
    run = Path(s.run)
    paths = [run / name for name in TABLES]
    lost = [path for path in paths if not is_whole(path)]

    finished = is_whole(paths[-1]) or (run / "iter0").exists()
    if not finished:
        return paths
    if not (run / "seed").exists() and not (run / "iter0").exists():
        raise UserError(f"{run}: was made to compare models and has no seed; give the run another "
                        f"folder with --run")
    return lost


def write_lacking(s: Settings, tables: Iterable[pd.DataFrame], lacking: list[Path]) -> None:
    """Write those of the tables (as TABLES names them) that are lacking.

    UserError: the source has changed: a table that is there has rows that it no longer gives.
    """
    for name, table in zip(TABLES, tables):
        path = Path(s.run) / name
        if path in lacking:
            write_table(table, path)
            continue

        # Its user may have dropped rows, or replaced a picture.
        columns = [column for column in table.columns if column not in ("win", "lose")]
        saved = read_parquet(path, "01_seed.py")[columns].astype(str)
        rows = set(saved.itertuples(index=False, name=None))
        if not rows <= set(table[columns].astype(str).itertuples(index=False, name=None)):
            raise UserError(f"{path}: --pairs, --prompts or --eval-prompts give other rows than "
                            f"these, so {lacking[0]} cannot be made again; restore their files "
                            f"as they were, or start another --run")


def shrink_to_data(s: Settings, evaluation: pd.DataFrame) -> Settings:
    """The settings, in which a preset's large numbers shrink to what a small file of pairs has."""
    # Made again from the start, the numbers are fitted again: the file may have grown.
    fitted = read_config(Path(s.run) / "config.json").get("fitted", ())
    s = replace(s, **{name: PRESETS[s.preset][name] for name in fitted})
    changes = few.fit_to_few_pairs(s, evaluation.prompt)
    if changes:
        print(few.as_flags(s, changes))
    if changes or fitted:
        s = amend(s, changes)
    return s


def main(argv: list[str]) -> None:
    s, _ = load(argv, __doc__, create=True, before_start=check_start)
    run = Path(s.run)
    lacking = lacking_tables(s)
    wait()
    if not lacking:
        if is_main():
            print(f"01 seed: {run}/seed is there, nothing to do")
        return

    kinds.check_model(s)

    # A bad benchmark is refused before anything is fetched or painted. The numbers that change with
    # few pairs matter to the main process alone: it chooses the pairs.
    if is_main():
        begin(run, __file__)
        evaluation = prompts.evaluation_prompts(s.eval_prompts, s.eval_count, s.pairs)
        if len(lacking) == len(TABLES):
            s = shrink_to_data(s, evaluation)
        else:
            print(f"01 seed: {lacking[0]} is lost or damaged, and is made again")

    with Ledger(run, "01_seed", None, str(models.device_of(s))) as ledger:
        if s.pairs == "world":
            splits, free = split_world(s)
            human, holdout, agreement, notes = world_pairs(s, free, ledger)
            remark = (f"{agreement['labels_against_their_own_utility']:.0%} of the labels go "
                      f"against the annotators' own utility")
            if is_main():
                write_json(agreement, run / "seed" / "people.json")
        else:
            if is_main():
                models.try_weights(s)
                splits, remark = outside_pairs(s, set(evaluation.prompt), lacking)
                agreement = agreement_beside(s.pairs)
                if agreement:
                    write_json(agreement, run / "seed" / "people.json")
            wait()
            human, holdout = encode_pairs(s, ledger)
            notes = []

        if is_main():
            write_results(s, human, holdout, notes, splits, evaluation, lacking, remark)


def write_results(
    s: Settings,
    human: pd.DataFrame,
    holdout: pd.DataFrame,
    notes: list[str],
    splits: dict[str, list[str]],
    evaluation: pd.DataFrame,
    lacking: list[Path],
    remark: str,
) -> None:
    # The prompts of training, of the rounds and of the evaluation are encoded here, once.
    new_prompts = []
    for pool in splits.values():
        new_prompts += pool
    new_prompts += dict.fromkeys(evaluation.prompt)
    models.PromptEncoder(s).prepare([*human.prompt, *new_prompts])

    preview = Path(s.run) / "seed" / "preview.png"
    pair_sheet(s.run, human.head(24), preview, ("preferred", "other"), notes[:24])
    benchmarks, table = prompts.prompt_tables(splits, evaluation)
    write_lacking(s, (human, holdout, benchmarks, table), lacking)

    print(f"01 seed: {len(human)} human pairs, {len(holdout)} held out; {remark}; "
          f"{len(new_prompts)} prompts for the rounds and the evaluation; see {preview}")


if __name__ == "__main__":
    run_stage(main)

"""Stage 03: the model ranks its own candidates by its implicit reward; the extremes make a pair.

reads   iterK/candidates.parquet, iterK/latents/, the model of round K-1 and the anchor,
        seed/holdout.parquet, seed/latents/,
        iter(K-1)/holdout_draws.parquet, where the anchor's errors have been measured already
writes  iterK/draws.parquet     prompt_id, candidate, draw, t, error, anchor_error, reward
        iterK/rewards.parquet   candidates + reward, reward_se
        iterK/pairs.parquet     pair_id, prompt, win, lose, source, margin, prompt_id
        iterK/holdout_draws.parquet   pair_id, side, draw, t, error, anchor_error, reward
        iterK/judge.json, iterK/preview.png
        iterK/images/           with --keep pairs: those of pairs, and of the first prompts

The implicit reward (the paper's equations 6 to 9) is what Diffusion-DPO trains, read backwards: the
denoising error that the current model theta saves against the anchor (the paper's ref),

    r(y, x_0) = -(beta / 2) E_{t, eps} [ e_theta(x_0) - e_anchor(x_0) ]                 (8)
    e(x_0) = mean over C, h, w of (eps - eps_hat(x_t, y, t))^2
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    p(x_a > x_b | y) = sigmoid(r_a - r_b)                                               (9)

with the mean over D draws of (t, eps), which all candidates of a prompt share. The error is a mean,
as in the loss, so that beta means the same in both.

A prompt whose candidates cannot be told apart gives no pair. judge.json asks whether this
self-judge agrees with people: its accuracy on held-out human pairs, and the verdict on it.

    python 03_rank.py --run runs/tiny --iter 1
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from lib import models, tracking
from lib.diffusion import denoising_error, repeat
from lib.finite import refuse_unfinite_rewards
from lib.intervals import wilson
from lib.judge import agreement_of_people, verdict
from lib.models import BASE
from lib.ranking import (SHOWN, crossfit_rewards, judge_name, known_anchor_errors, latents_differ,
                         read_candidates, refuse_no_pairs)
from lib.rivals import self_confidence
from lib.rivals.balanced import balance
from lib.rivals.random_pair import random_pair
from lib.rivals.root_error import root_reward
from lib.run import (PAIR_COLUMNS, Ledger, bar, begin, gathered, generator, is_main, is_whole,
                     my_share, open_image, read_pairs, read_table, run_stage, wait, write_json,
                     write_table)
from lib.sampler import keep_pictures
from lib.settings import ITER, Settings, load
from lib.sheets import pair_sheet


# ---- the method: pure functions of tensors ----

def implicit_reward(error: torch.Tensor, anchor_error: torch.Tensor, beta: float) -> torch.Tensor:
    """Equation 8 before its mean: errors (..., D) of model and anchor -> rewards (..., D)."""
    return -beta / 2 * (error - anchor_error)


def best_and_worst(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N) mean rewards -> indices (P,) of the winner and of the loser of each prompt."""
    return rewards.argmax(1), rewards.argmin(1)


@torch.no_grad()
def errors_of_prompts(
    unets: list,
    schedule,
    latents: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    condition: dict,
    at_once: int | None = None,
) -> torch.Tensor:
    """e(x_0) of every picture at every draw, by each of M models: (M, P, N, D).

    latents (P, N, C, h, w) are N pictures of each of P prompts, t (P, D) and
    noise (P, D, C, h, w) the prompts' draws. P is more than 1 only to fill a batch, and a forward
    takes `at_once` noised latents only where memory is scarce (None: all of them).
    """
    P, N, *shape = latents.shape
    D = t.shape[1]

    # Every candidate of a prompt meets the same D draws: what a draw adds to all of them alike
    # cancels in the comparison.
    x_0 = latents[:, :, None].expand(P, N, D, *shape)
    noise = noise[:, None].expand(P, N, D, *shape)
    t = t[:, None].expand(P, N, D)

    # One long batch: prompt by prompt, candidate by candidate, draw by draw.
    x_0 = x_0.flatten(0, 2)                                                     # (P*N*D, C, h, w)
    noise = noise.flatten(0, 2)
    t = t.flatten()
    condition = repeat(condition, N * D)

    at_once = at_once or len(x_0)
    errors = []
    for unet in unets:
        for start in range(0, len(x_0), at_once):
            part = slice(start, start + at_once)
            asked = {name: rows[part] for name, rows in condition.items()}
            error = denoising_error(unet, schedule, x_0[part], t[part], noise[part], asked)
            errors.append(error)
    return torch.cat(errors).reshape(len(unets), P, N, D)


def agreement(rewards: torch.Tensor) -> tuple[float, float, float]:
    """How often the judge prefers what a person preferred, and the 95% Wilson interval of that.

    rewards (pairs, 2) has the preferred picture first; a tie counts a half.
    """
    win, lose = rewards.T
    right = (win > lose).float()
    undecided = (win == lose).float()
    right = right + .5 * undecided
    low, high = wilson(right.sum().item(), len(right))
    return right.mean().item(), low, high


# ---- what is compared, and by which draws ----

class Comparison(NamedTuple):
    """Pictures of one prompt that are compared; `key` is what the random numbers come from."""
    key: tuple
    prompt: str
    images: list[Path]


class Draws(NamedTuple):
    """What the rewards of P comparisons of N pictures are made of."""
    t: torch.Tensor                 # (P, D)
    error: torch.Tensor             # (P, N, D), the current model's
    anchor_error: torch.Tensor      # (P, N, D)
    reward: torch.Tensor            # (P, N, D)


def reward_draws(
    s: Settings,
    key: tuple,
    shape: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (D,) and noise (D, C, h, w), shared by all pictures compared under one key."""
    rng = generator(s.seed, "reward", *key)
    t = torch.randint(s.rank_t_min, s.rank_t_max, (s.draws,), generator=rng)
    noise = torch.randn((s.draws, *shape), generator=rng)
    return t, noise


def anchor_of(s: Settings, k: int) -> int:
    """The anchor of round k. The paper calls it the initial anchor.

    In round 1 Iter0 is the current model itself, and would give every picture a reward of zero:
    there the anchor is the base in any case.
    """
    if s.anchor == "iter0" and k > 1:
        return 0
    return BASE


def measure_errors(
    s: Settings,
    unets: list,
    comparisons: list[Comparison],
    ledger: Ledger,
    title: str,
    draw: Callable = reward_draws,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draws' timesteps (P, D) and the models' errors (M, P, N, D) of P comparisons.

    `draw` gives the draws of a comparison, as reward_draws does.
    """
    schedule = models.load_schedule(s)
    encoder = models.PromptEncoder(s)
    if is_main():
        encoder.prepare([comparison.prompt for comparison in comparisons])
    wait()

    # Whole comparisons fill a batch of up to rank_batch noised latents (of a larger one a forward
    # takes a part); processes take turns.
    per_batch = max(1, s.rank_batch // (len(comparisons[0].images) * s.draws))
    batches = [comparisons[i:i + per_batch] for i in range(0, len(comparisons), per_batch)]
    measured = []
    for number, batch in bar(my_share(list(enumerate(batches))), title, "batch"):
        t, errors = errors_of_batch(s, unets, schedule, encoder, batch, draw)
        measured.append((number, t, errors))
        ledger.unet_forwards += errors.numel()

    # The errors are read from the device once, at the end: no batch waits for it.
    parts = []
    for number, t, errors in measured:
        parts.append((number, t.numpy(), errors.cpu().numpy()))

    # The processes' parts come together in the order of the batches.
    parts = sorted(gathered(parts), key=lambda part: part[0])
    t = np.concatenate([t for _, t, _ in parts])
    errors = np.concatenate([errors for _, _, errors in parts], axis=1)
    return torch.from_numpy(t), torch.from_numpy(errors)


def errors_of_batch(
    s: Settings,
    unets: list,
    schedule,
    encoder: models.PromptEncoder,
    batch: list[Comparison],
    draw: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's timesteps (P, D), on the CPU, and errors (M, P, N, D), on the device."""
    latents, timesteps, noises = [], [], []
    for comparison in batch:
        x_0, _ = models.stack_latents(comparison.images)                        # (N, C, h, w)
        t, noise = draw(s, comparison.key, x_0.shape[1:])
        latents.append(x_0)
        timesteps.append(t)
        noises.append(noise)

    device = models.device_of(s)
    t = torch.stack(timesteps)
    errors = errors_of_prompts(
        unets,
        schedule,
        torch.stack(latents).to(device),
        t.to(device),
        torch.stack(noises).to(device),
        encoder([comparison.prompt for comparison in batch]),
        s.rank_batch,
    )
    return t, errors


def rewards_of(
    s: Settings,
    t: torch.Tensor,
    error: torch.Tensor,
    anchor_error: torch.Tensor,
) -> Draws:
    """Equation 8, draw by draw."""
    reward = implicit_reward(error, anchor_error, s.beta)

    # Balanced draws, and root errors, ablations: lib/rivals/balanced.py, root_error.py.
    if s.reward_weights == "balanced":
        reward = balance(anchor_error) * reward
    if s.reward_weights == "root":
        reward = root_reward(error, anchor_error, s.beta)
    return Draws(t, error, anchor_error, reward)


# ---- the self-judge at work ----

def rank_by_itself(
    s: Settings,
    k: int,
    comparisons: list[Comparison],
    holdout: list[Comparison],
    ledger: Ledger,
) -> tuple[Draws, Draws | None]:
    """Model k-1 judges its own candidates, and the held-out human pairs."""
    model = models.load_unet(s, k - 1)
    anchor = models.load_unet(s, anchor_of(s, k))

    # Its own candidates: these rewards make the pairs.
    title = f"iter{k} rewards"
    t, errors = measure_errors(s, [model, anchor], comparisons, ledger, title)
    error, anchor_error = errors
    draws = rewards_of(s, t, error, anchor_error)
    if not holdout:
        return draws, None

    # Held-out human pairs: these rewards tell whether it agrees with people.
    title = f"iter{k} held-out pairs"
    t, errors = measure_errors(s, [model], holdout, ledger, title)
    error = errors[0]

    # Neither the anchor nor a pair's draws change from round to round: what the last round measured
    # of the anchor holds.
    anchor_error = None
    if anchor_of(s, k - 1) == anchor_of(s, k):
        pair_ids = [comparison.key[1] for comparison in holdout]
        anchor_error = known_anchor_errors(s.run, k - 1, pair_ids, t)
    if anchor_error is None:
        _, errors = measure_errors(s, [anchor], holdout, ledger, f"{title}, anchor")
        anchor_error = errors[0]
    return draws, rewards_of(s, t, error, anchor_error)


def choose_pairs(s: Settings, k: int, candidates: pd.DataFrame, draws: Draws) -> pd.DataFrame:
    """One pair for each prompt: its best and its worst candidate by the mean over the draws.

    A prompt gives none where the two have the same reward, or are the same picture.
    """
    rewards = draws.reward.mean(2)                                              # (P, N)
    win, lose = best_and_worst(rewards)

    # A random pair, an ablation: lib/rivals/random_pair.py.
    if s.select == "random":
        win, lose = random_pair(rewards, generator(s.seed, "random pair", k))

    # The margin r_w - r_l, a mean over the draws that the two share.
    P, N = rewards.shape
    prompt = torch.arange(P)
    margin = (draws.reward[prompt, win] - draws.reward[prompt, lose]).mean(1)

    images = candidates.image.to_numpy().reshape(P, N)
    first = candidates.iloc[::N]                       # one row for each prompt
    source = "self"
    if s.reward != "implicit":
        source = s.reward
    pairs = pd.DataFrame({
        "pair_id": [f"self-{k}-{prompt_id:06d}" for prompt_id in first.prompt_id],
        "prompt": first.prompt.to_numpy(),
        "win": images[prompt, win],
        "lose": images[prompt, lose],
        "source": source,
        "margin": margin.numpy(),
        "prompt_id": first.prompt_id.to_numpy(),
    })

    # A winner that is its own loser teaches nothing.
    differ = np.array([latents_differ(s.run, pair.win, pair.lose) for pair in pairs.itertuples()])
    return pairs[(pairs.margin > 0) & differ].reset_index(drop=True)


def diversity(comparisons: list[Comparison]) -> float:
    """How much a prompt's candidates differ: the standard deviation of their latents."""
    spread = []
    for comparison in comparisons:
        latents, _ = models.stack_latents(comparison.images)
        spread.append(latents.var(0, unbiased=True).mean())
    return torch.stack(spread).mean().sqrt().item()


def pictures_to_keep(candidates: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """The pictures that people may look at: the pairs', and all of the first pairs' prompts.

    The story of the run shows the candidates of its first pair (lib/eval/walk.py).
    """
    shown = candidates.prompt_id.isin(pairs.prompt_id[:SHOWN])
    return [*candidates.image[shown], *pairs.win, *pairs.lose]


# ---- the doors of other judges: lib/rivals ----

def rank_from_outside(
    s: Settings,
    comparisons: list[Comparison],
    holdout: list[Comparison],
) -> tuple[Draws, Draws | None]:
    """A reward from outside: online DPO, by a score of stage 05."""
    from lib.rivals import online_dpo
    rewards, holdout_draws = online_dpo.rank(s, comparisons, holdout)
    if not holdout:
        return outside_draws(rewards), None
    return outside_draws(rewards), outside_draws(holdout_draws)


def rank_by_confidence(
    s: Settings,
    k: int,
    comparisons: list[Comparison],
    holdout: list[Comparison],
    ledger: Ledger,
) -> tuple[Draws, Draws | None]:
    """A self-judge that asks no anchor: SOLACE's, lib/rivals/self_confidence.py."""
    model = models.load_unet(s, k - 1)

    def judge(asked: list[Comparison], title: str) -> Draws:
        t, errors = measure_errors(s, [model], asked, ledger, title, self_confidence.probes)
        return Draws(*self_confidence.draws_of(s, t, errors[0]))

    draws = judge(comparisons, f"iter{k} confidence")
    if not holdout:
        return draws, None
    return draws, judge(holdout, f"iter{k} held-out pairs")


def outside_draws(reward: torch.Tensor) -> Draws:
    """A reward (P, N, 1) from outside is one "draw" without a timestep and without errors."""
    P = len(reward)
    no_t = torch.full((P, 1), float("nan"))
    no_error = torch.full_like(reward, float("nan"))
    return Draws(no_t, no_error, no_error, reward)


# ---- the stage: read, compute, write ----

def candidate_comparisons(s: Settings, k: int, candidates: pd.DataFrame) -> list[Comparison]:
    comparisons = []
    for prompt_id, part in candidates.groupby("prompt_id", sort=False):
        images = [Path(s.run) / image for image in part.image]
        comparisons.append(Comparison((k, int(prompt_id)), part.prompt.iloc[0], images))
    return comparisons


def holdout_comparisons(s: Settings) -> list[Comparison]:
    """The held-out human pairs, the preferred picture first."""
    if s.holdout_pairs == 0:
        return []
    pairs = read_pairs(s.run, "seed/holdout.parquet", "01_seed.py")
    comparisons = comparisons_of_pairs(s, pairs)

    # Latents that got lost are made again.
    images = [image for comparison in comparisons for image in comparison.images]

    def open_picture(i):
        return open_image(images[i], Path(s.run) / "seed" / "holdout.parquet", i // 2 + 1)

    models.ensure_latents(images, s, open_picture)
    return comparisons


def comparisons_of_pairs(s: Settings, pairs: pd.DataFrame) -> list[Comparison]:
    """Human pairs to be judged, the preferred picture first."""
    comparisons = []
    for pair in pairs.itertuples():
        images = [Path(s.run) / pair.win, Path(s.run) / pair.lose]
        comparisons.append(Comparison(("holdout", pair.pair_id), pair.prompt, images))
    return comparisons


def draws_table(draws: Draws, labels: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row per picture and draw; `labels` are columns with one value per picture, (P*N,)."""
    P, N, D = draws.reward.shape
    columns = {}
    for name, values in labels.items():
        columns[name] = np.repeat(np.asarray(values), D)
    columns["draw"] = np.tile(np.arange(D), P * N)
    columns["t"] = draws.t[:, None].expand(P, N, D).flatten().numpy()
    columns["error"] = draws.error.flatten().numpy()
    columns["anchor_error"] = draws.anchor_error.flatten().numpy()
    columns["reward"] = draws.reward.flatten().numpy()
    return pd.DataFrame(columns)


def write_rewards(folder: Path, candidates: pd.DataFrame, draws: Draws) -> None:
    """draws.parquet and rewards.parquet: mean and standard error over a candidate's draws."""
    labels = {"prompt_id": candidates.prompt_id, "candidate": candidates.candidate}
    write_table(draws_table(draws, labels), folder / "draws.parquet")

    reward = draws.reward.mean(2)
    reward_se = torch.full_like(reward, float("nan"))
    D = draws.reward.shape[2]
    if D > 1:
        reward_se = draws.reward.std(2) / D ** .5
    table = candidates.assign(
        reward=reward.flatten().numpy(),
        reward_se=reward_se.flatten().numpy(),
    )
    write_table(table, folder / "rewards.parquet")


def write_holdout_draws(folder: Path, holdout: list[Comparison], holdout_draws: Draws) -> None:
    """holdout_draws.parquet: every draw of both pictures of each held-out pair."""
    pair_ids = [comparison.key[1] for comparison in holdout]
    labels = {"pair_id": np.repeat(pair_ids, 2), "side": np.tile(["win", "lose"], len(holdout))}
    write_table(draws_table(holdout_draws, labels), folder / "holdout_draws.parquet")


def describe_judge(
    s: Settings,
    k: int,
    pairs: pd.DataFrame,
    comparisons: list[Comparison],
    holdout_draws: Draws | None,
) -> dict:
    """judge.json: how often the judge agrees with people, and what it judged with."""
    judge = {"accuracy": None, "pairs": 0}
    if holdout_draws is not None:
        accuracy, low, high = agreement(holdout_draws.reward.mean(2))
        judge = {"accuracy": accuracy, "low": low, "high": high, "pairs": len(holdout_draws.reward)}

    # Where few pairs are held out, all human pairs have been judged by models like Iter0.
    rewards = None
    if k == 1:
        rewards = crossfit_rewards(s.run)
    if rewards is not None:
        accuracy, low, high = agreement(rewards)
        judge |= {"accuracy": accuracy, "low": low, "high": high, "pairs": len(rewards),
                  "crossfit": True}
    judge |= agreement_of_people(s.run)
    judge["verdict"], _ = verdict(judge)

    # Only the implicit reward asks an anchor, at so many draws.
    anchor, draws = None, None
    if s.reward == "implicit":
        anchor = "base" if anchor_of(s, k) == BASE else "Iter0"
        draws = s.draws
    return judge | {
        "model": k - 1,
        "reward": s.reward,
        "anchor": anchor,
        "draws": draws,
        "beta": s.beta,
        "select": s.select,
        "diversity": diversity(comparisons),
        "margin": float(pairs.margin.mean()),
        "self_pairs": len(pairs),
        "prompts_without_pair": len(comparisons) - len(pairs),
    }


def summary_line(s: Settings, k: int, judge: dict, folder: Path) -> str:
    without = ""
    if judge["prompts_without_pair"]:
        without = (f" ({judge['prompts_without_pair']} prompts gave none: their candidates could "
                   f"not be told apart)")
    _, sentence = verdict(judge)
    return (f"03 rank, iter {k}: {judge['self_pairs']} {s.select} pairs ranked by "
            f"{judge_name(s, k)}{without}; {sentence}; see {folder}/preview.png")


def main(argv: list[str]) -> None:
    s, stage = load(argv, __doc__, ITER)
    k = stage.iter
    folder = Path(s.run) / f"iter{k}"
    if is_whole(folder / "pairs.parquet"):
        # Pictures of pairs that were lost since are decoded again.
        pairs = read_table(folder / "pairs.parquet", PAIR_COLUMNS, f"03_rank.py --iter {k}")
        keep_pictures(s, [*pairs.win, *pairs.lose])
        print(f"03 rank: {folder}/pairs.parquet is there, nothing to do")
        return

    # read
    if is_main():
        begin(s.run, __file__)
    candidates = read_candidates(s, k)
    comparisons = candidate_comparisons(s, k, candidates)
    holdout = holdout_comparisons(s)

    with Ledger(s.run, "03_rank", k, str(models.device_of(s))) as ledger:
        # compute
        if s.reward == "implicit":
            draws, holdout_draws = rank_by_itself(s, k, comparisons, holdout, ledger)
        elif s.reward == "self-confidence":
            draws, holdout_draws = rank_by_confidence(s, k, comparisons, holdout, ledger)
        else:
            draws, holdout_draws = rank_from_outside(s, comparisons, holdout)
        refuse_unfinite_rewards(s, k, comparisons, draws.reward)
        if holdout:
            refuse_unfinite_rewards(s, k, holdout, holdout_draws.reward)
        pairs = choose_pairs(s, k, candidates, draws)
        refuse_no_pairs(s, k, pairs)
        keep_pictures(s, pictures_to_keep(candidates, pairs))

        # write
        if is_main():
            judge = describe_judge(s, k, pairs, comparisons, holdout_draws)
            write_results(s, k, candidates, draws, holdout, holdout_draws, pairs, judge)


def write_results(
    s: Settings,
    k: int,
    candidates: pd.DataFrame,
    draws: Draws,
    holdout: list[Comparison],
    holdout_draws: Draws | None,
    pairs: pd.DataFrame,
    judge: dict,
) -> None:
    """pairs.parquet comes last: it marks the stage as done."""
    folder = Path(s.run) / f"iter{k}"
    write_rewards(folder, candidates, draws)
    if holdout_draws is not None:
        write_holdout_draws(folder, holdout, holdout_draws)
    write_json(judge, folder / "judge.json")

    # On the preview, above each pair: what the two rewards were.
    reward = dict(zip(candidates.image, draws.reward.mean(2).flatten().tolist()))
    shown = pairs.head(SHOWN)
    notes = [f"reward {reward[pair.win]:.2f} : {reward[pair.lose]:.2f}, margin {pair.margin:.2f}"
             for pair in shown.itertuples()]
    pair_sheet(s.run, shown, folder / "preview.png", ("winner", "loser"), notes)
    tracking.log_judge(s, k, judge, folder / "preview.png")
    write_table(pairs, folder / "pairs.parquet")
    print(summary_line(s, k, judge, folder))


if __name__ == "__main__":
    run_stage(main)

"""Stage 03: the model ranks its own candidates by its implicit reward; best and worst become a pair.

reads   iterK/candidates.parquet, iterK/latents/, seed/holdout.parquet, the model of round K-1 and the anchor
writes  iterK/rewards.parquet (candidates + reward, reward_se), iterK/pairs.parquet (pair_id, prompt, win, lose, source,
        margin), iterK/judge.json, iterK/preview.png

The implicit reward (equations 6-9 of the paper) is what Diffusion-DPO trains, read backwards: the denoising error
that the current model theta saves against the anchor ref,

    r(y, x_0) = -(beta / 2) E_{t, eps} [ ||eps - eps_theta(x_t, y, t)||^2 - ||eps - eps_ref(x_t, y, t)||^2 ]
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,       p(x_a > x_b | y) = sigmoid(r_a - r_b)

with the mean over `draws` (t, eps) that all candidates of a prompt share: what a draw adds to all of them alike
cancels in the comparison. The norm is a mean over C, h, w as in the loss, so beta means the same in both.

judge.json asks whether this self-judge agrees with people: its accuracy on held-out human pairs. Online DPO, a rival
row, is the same loop with `--reward` from outside: one of stage 05's scores ranks instead of the model.

    python 03_rank.py --run runs/tiny --iter 1
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from lib import models, report
from lib.run import (Ledger, UserError, generator, inside, latent_path, read_pairs, read_table, run_stage, write_json,
                     write_table)
from lib.settings import ITER, Settings, load


def implicit_reward(error: torch.Tensor, ref_error: torch.Tensor, beta: float) -> torch.Tensor:
    """Equation 8 before its expectation: (..., draws) denoising errors of model and anchor -> reward of each draw."""
    return -beta / 2 * (error - ref_error)


def balance(ref_error: torch.Tensor) -> torch.Tensor:
    """Weights (1, draws) of mean 1 for (n, draws) anchor errors: the inverse of a draw's error. Not in the paper: the
    spread of a draw's reward grows with its error, so that in the plain mean some timesteps speak louder."""
    weights = 1 / ref_error.mean(0, keepdim=True)
    return weights / weights.mean()


def best_and_worst(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N) mean rewards -> indices (P,) of the winner and of the loser of each prompt."""
    return rewards.argmax(1), rewards.argmin(1)


def random_pair(rewards: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The ablation: two of the N candidates at random, still ordered by their reward."""
    two = torch.stack([torch.randperm(rewards.shape[1], generator=rng)[:2] for _ in rewards])     # (P, 2)
    order = rewards.gather(1, two).argsort(1, descending=True)
    return tuple(two.gather(1, order).T)


def reward_draws(s: Settings, key: tuple, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (draws,) and noise (draws, C, h, w), shared by all pictures compared under one key."""
    rng = generator(s.seed, "reward", *key)
    if s.timesteps == "stratified":                                       # one in each of `draws` equal parts
        parts = (torch.arange(s.draws) + torch.rand(s.draws, generator=rng)) / s.draws
        t = s.rank_t_min + (parts * (s.rank_t_max - s.rank_t_min)).long()
    else:
        t = torch.randint(s.rank_t_min, s.rank_t_max, (s.draws,), generator=rng)
    return t, torch.randn((s.draws, *shape), generator=rng)


@torch.no_grad()
def errors_of(s: Settings, unets: list, groups: list[dict], ledger: Ledger, title: str) -> dict[str, torch.Tensor]:
    """Denoising errors {group key: (len(unets), n, draws)} of groups {key: tuple, prompt, images: n paths}.

    Whole groups fill a batch of up to rank_batch noised latents, on which every model is asked.
    """
    state, scheduler, encoder = PartialState(), models.load_schedule(s), models.PromptEncoder(s)
    if state.is_main_process:
        encoder.prepare([g["prompt"] for g in groups])
    state.wait_for_everyone()
    device = models.device_of(s)
    per_batch = max(1, s.rank_batch // (max(len(g["images"]) for g in groups) * s.draws))
    batches = [groups[i:i + per_batch] for i in range(0, len(groups), per_batch)]
    found = []
    for batch in tqdm(batches[state.process_index::state.num_processes], desc=title, unit="batch",
                      disable=not state.is_local_main_process):
        latents, _ = models.stack_latents([image for g in batch for image in g["images"]])       # (n_total, C, h, w)
        sizes = [len(g["images"]) for g in batch]
        draws = [reward_draws(s, g["key"], latents.shape[1:]) for g in batch]
        x0 = latents.to(device).repeat_interleave(s.draws, 0)                                    # image-major, draw-minor
        t = torch.cat([d[0].repeat(n) for d, n in zip(draws, sizes)]).to(device)
        noise = torch.cat([d[1].to(device).repeat(n, 1, 1, 1) for d, n in zip(draws, sizes)])
        x_t = scheduler.add_noise(x0, noise, t)
        forwards = torch.tensor(sizes, device=device) * s.draws
        condition = {name: v.repeat_interleave(forwards, 0, output_size=len(x0))
                     for name, v in encoder([g["prompt"] for g in batch]).items()}
        errors = torch.stack([models.denoising_error(u, scheduler, x_t, x0, noise, t, condition) for u in unets])
        found += zip(batch, errors.reshape(len(unets), -1, s.draws).split(sizes, 1))
        ledger.unet_forwards += len(unets) * len(x_t)
    found = [(json.dumps(g["key"]), e.cpu().numpy()) for g, e in found]      # read once: no batch waits for the device
    return {key: torch.from_numpy(e) for key, e in gather_object(found)}


def anchor_of(s: Settings, k: int) -> int:
    """The anchor's model number: -1 for the base, 0 for Iter0, which in round 1 is the current model itself and would
    give every picture a reward of zero: there the base stays."""
    return 0 if s.anchor == "iter0" and k > 1 else -1


def judge_itself(s: Settings, k: int, groups: list[dict], ledger: Ledger) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rewards of every draw (P, N, draws) by model K-1, and those of the held-out pairs (pairs, 2)."""
    unet, anchor = models.load_unet(s, k - 1), models.load_unet(s, anchor_of(s, k))
    errors = errors_of(s, [unet, anchor], groups, ledger, f"iter{k} rewards")
    weight = balance if s.reward_weights == "balanced" else torch.ones_like
    reward = lambda error, ref: weight(ref) * implicit_reward(error, ref, s.beta)
    rewards = torch.stack([reward(*errors[json.dumps(g["key"])]) for g in groups])
    held = holdout_groups(s)
    if not held:
        return rewards, None
    kept = Path(s.run) / "seed" / f"holdout_errors_{anchor_of(s, k)}.json"   # an anchor's errors never change: asked once
    ref = {key: torch.tensor(e) for key, e in json.loads(kept.read_text()).items()} if kept.exists() else {}
    errors = errors_of(s, [unet] if ref else [anchor, unet], held, ledger, f"iter{k} held-out pairs")
    if not ref:
        ref = {key: e[0] for key, e in errors.items()}
        if PartialState().is_main_process:
            write_json({key: e.tolist() for key, e in ref.items()}, kept)
    return rewards, torch.stack([reward(errors[key][-1], ref[key]).mean(-1)
                                 for key in (json.dumps(g["key"]) for g in held)])


def judge_from_outside(s: Settings, groups: list[dict]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Online DPO: scores (P, N, 1) by a reward from outside, and those of the held-out pairs (pairs, 2)."""
    from lib import external
    every = groups + holdout_groups(s)
    scores = external.score(s, [g["prompt"] for g in every for _ in g["images"]], [i for g in every for i in g["images"]])
    mine, held = scores.split([sum(len(g["images"]) for g in part) for part in (groups, every[len(groups):])])
    return mine.reshape(len(groups), -1, 1), held.reshape(-1, 2) if len(held) else None


def holdout_groups(s: Settings) -> list[dict]:
    """The held-out human pairs as groups of two, the preferred picture first."""
    if s.holdout_pairs == 0:
        return []
    run = Path(s.run)
    return [{"key": ("holdout", p.pair_id), "prompt": p.prompt, "images": [run / p.win, run / p.lose]}
            for p in read_pairs(run, "seed/holdout.parquet", "01_seed.py").itertuples()]


def agreement(rewards: torch.Tensor | None) -> dict:
    """How often the judge prefers what a person preferred, (pairs, 2) rewards, with its 95% Wilson interval."""
    if rewards is None:
        return {"accuracy": None, "pairs": 0}
    right = (rewards[:, 0] > rewards[:, 1]).float() + .5 * (rewards[:, 0] == rewards[:, 1]).float()
    low, high = report.wilson(right.sum().item(), len(right))
    return {"accuracy": right.mean().item(), "low": low, "high": high, "pairs": len(right)}


def make_pairs(s: Settings, k: int, groups: list[dict], images: np.ndarray, draws: torch.Tensor) -> pd.DataFrame:
    """One pair per prompt from images (P, N) and rewards of every draw (P, N, draws); those of a small margin dropped."""
    rewards, every = draws.mean(2), torch.arange(len(groups))
    win, lose = best_and_worst(rewards) if s.select == "best-worst" else \
        random_pair(rewards, generator(s.seed, "random pair", k))
    margins = draws[every, win] - draws[every, lose]                                        # (P, draws), paired draws
    error = margins.std(1) / margins.shape[1] ** .5 if s.min_margin else 0
    pairs = pd.DataFrame({"pair_id": [f"self-{k}-{g['key'][1]:06d}" for g in groups],
                          "prompt": [g["prompt"] for g in groups], "win": images[every, win],
                          "lose": images[every, lose], "source": "self" if s.reward == "implicit" else s.reward,
                          "margin": margins.mean(1).numpy()})
    return pairs[(margins.mean(1) >= s.min_margin * error).numpy()].reset_index(drop=True)


def diversity(run: Path, candidates: pd.DataFrame) -> float:
    """How much a prompt's candidates differ: rms distance of their latents from the prompt's mean latent."""
    spread = [models.stack_latents([run / i for i in group.image])[0].var(0, unbiased=True).mean()
              for _, group in candidates.groupby("prompt_id", sort=False)]
    return torch.stack(spread).mean().sqrt().item()


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ITER)
    k, run, folder = own.iter, Path(s.run), Path(s.run) / f"iter{own.iter}"
    if (folder / "pairs.parquet").exists():
        return print(f"03 rank: {folder}/pairs.parquet is there, nothing to do")
    path = folder / "candidates.parquet"
    candidates = read_table(path, ("prompt_id", "prompt", "candidate", "image"), f"02_generate.py --iter {k}")
    for row, image in enumerate(candidates.image):
        if not latent_path(inside(run, image, path, row)).exists():
            raise UserError(f"{path}, row {row}: no latent beside {image}; delete {path} and run 02_generate.py again")
    by_prompt = candidates.groupby("prompt_id", sort=False)
    if by_prompt.size().nunique() > 1 or by_prompt.size().iloc[0] < 2:
        raise UserError(f"{path}: every prompt needs the same number of candidates, 2 or more; delete it and run "
                        f"02_generate.py again")
    groups = [{"key": (k, int(pid)), "prompt": g.prompt.iloc[0], "images": [run / i for i in g.image]}
              for pid, g in by_prompt]
    images = np.array([list(g.image) for _, g in by_prompt])                                # (P, N)
    with Ledger(run, "03_rank", k, str(models.device_of(s))) as ledger:
        draws, held = judge_itself(s, k, groups, ledger) if s.reward == "implicit" else judge_from_outside(s, groups)
        if not draws.isfinite().all():
            raise UserError(f"{path}: a reward is not finite; model {k - 1} has diverged, lower --lr and train it again")
        pairs = make_pairs(s, k, groups, images, draws)
        if pairs.empty:
            raise UserError(f"{path}: no pair has a margin of {s.min_margin} standard errors; lower --min-margin")
        judge = agreement(held) | {
            "model": k - 1, "reward": s.reward, "anchor": "Iter0" if anchor_of(s, k) == 0 else "base", "draws": s.draws,
            "beta": s.beta, "select": s.select, "diversity": diversity(run, candidates),
            "margin": float(pairs.margin.mean()), "self_pairs": len(pairs)}
        if PartialState().is_main_process:
            spread = draws.std(2) if draws.shape[2] > 1 else torch.full(draws.shape[:2], float("nan"))
            scored = pd.concat([g for _, g in by_prompt], ignore_index=True).assign(
                reward=draws.mean(2).flatten().numpy(), reward_se=(spread / draws.shape[2] ** .5).flatten().numpy())
            write_table(scored, folder / "rewards.parquet")
            write_json(judge, folder / "judge.json")
            report.pair_sheet(run, pairs.head(24), folder / "preview.png", ("winner", "loser"))
            write_table(pairs, folder / "pairs.parquet")
    judge_name = f"model {k - 1}" if s.reward == "implicit" else s.reward
    agrees = f"agrees with people on {judge['accuracy']:.0%} of {judge['pairs']}" if judge["pairs"] else "has seen no"
    PartialState().print(f"03 rank, iter {k}: {len(pairs)} {s.select} pairs ranked by {judge_name}, which {agrees} "
                         f"held-out pairs; see {folder}/preview.png")


if __name__ == "__main__":
    run_stage(main)

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

judge.json asks whether this self-judge agrees with people: its accuracy on held-out human pairs.

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
    return (torch.randint(s.rank_t_min, s.rank_t_max, (s.draws,), generator=rng),
            torch.randn((s.draws, *shape), generator=rng))


@torch.no_grad()
def errors_of(s: Settings, unets: list, groups: list[dict], ledger: Ledger, title: str) -> dict[str, torch.Tensor]:
    """Denoising errors {group key: (len(unets), n, draws)} of groups {key: tuple, prompt, images: n paths}.

    Whole groups fill a batch of up to rank_batch noised latents, on which every model is asked.
    """
    state, scheduler, encoder = PartialState(), models.load_scheduler(s), models.PromptEncoder(s)
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
        x0 = latents.repeat_interleave(s.draws, 0).to(device)                                    # image-major, draw-minor
        t = torch.cat([d[0].repeat(n) for d, n in zip(draws, sizes)]).to(device)
        noise = torch.cat([d[1].repeat(n, 1, 1, 1) for d, n in zip(draws, sizes)]).to(device)
        x_t = scheduler.add_noise(x0, noise, t)
        condition = encoder([g["prompt"] for g, n in zip(batch, sizes) for _ in range(n * s.draws)])
        errors = torch.stack([models.denoising_error(u, scheduler, x_t, x0, noise, t, condition) for u in unets])
        errors = errors.reshape(len(unets), -1, s.draws).cpu().split(sizes, 1)
        found += [(json.dumps(g["key"]), e.numpy()) for g, e in zip(batch, errors)]
        ledger.unet_forwards += len(unets) * len(x_t)
    return {key: torch.from_numpy(e) for key, e in gather_object(found)}


def anchor_of(s: Settings, k: int) -> int:
    """The anchor's model number: -1 for the base, 0 for Iter0."""
    if s.anchor == "iter0" and k == 1:
        raise UserError("--anchor iter0: in round 1 the current model is Iter0 itself and every reward would be zero; "
                        "use --anchor base")
    return {"base": -1, "iter0": 0}[s.anchor]


def judge_holdout(s: Settings, unet, anchor, k: int, ledger: Ledger) -> dict:
    """How often the self-judge prefers what a person preferred, with its 95% Wilson interval."""
    run = Path(s.run)
    if s.holdout_pairs == 0:
        return {"accuracy": None, "pairs": 0}
    pairs = read_pairs(run, "seed/holdout.parquet", "01_seed.py")
    groups = [{"key": ("holdout", p.pair_id), "prompt": p.prompt, "images": [run / p.win, run / p.lose]}
              for p in pairs.itertuples()]
    kept = run / "seed" / f"holdout_errors_{s.anchor}.json"     # the anchor's errors never change: asked once
    ref = {key: torch.tensor(e) for key, e in json.loads(kept.read_text()).items()} if kept.exists() else {}
    todo = [anchor, unet] if not ref else [unet]
    errors = errors_of(s, todo, groups, ledger, f"iter{k} held-out pairs")
    if not ref:
        ref = {key: e[0] for key, e in errors.items()}
        if PartialState().is_main_process:
            write_json({key: e.tolist() for key, e in ref.items()}, kept)
    rewards = torch.stack([implicit_reward(errors[key][-1], ref[key], s.beta).mean(-1)
                           for key in (json.dumps(g["key"]) for g in groups)])                   # (pairs, 2)
    right = (rewards[:, 0] > rewards[:, 1]).float() + .5 * (rewards[:, 0] == rewards[:, 1]).float()
    low, high = report.wilson(right.sum().item(), len(right))
    return {"accuracy": right.mean().item(), "low": low, "high": high, "pairs": len(right)}


def diversity(run: Path, candidates: pd.DataFrame, count: int) -> float:
    """How much a prompt's candidates differ: rms distance of their latents from the prompt's mean latent."""
    spread = [models.stack_latents([run / i for i in group.image])[0].var(0, unbiased=True).mean()
              for _, group in candidates.groupby("prompt_id", sort=False)]
    return torch.stack(spread).mean().sqrt().item()


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ITER)
    k, run, folder = own.iter, Path(s.run), Path(s.run) / f"iter{own.iter}"
    if (folder / "pairs.parquet").exists():
        return print(f"03 rank: {folder}/pairs.parquet is there, nothing to do")
    anchor_k = anchor_of(s, k)
    path = folder / "candidates.parquet"
    candidates = read_table(path, ("prompt_id", "prompt", "candidate", "image"), f"02_generate.py --iter {k}")
    for row, image in enumerate(candidates.image):
        if not latent_path(inside(run, image, path, row)).exists():
            raise UserError(f"{path}, row {row}: no latent beside {image}; delete {path} and run 02_generate.py again")
    by_prompt = candidates.groupby("prompt_id", sort=False)
    if by_prompt.size().nunique() > 1 or by_prompt.size().iloc[0] < 2:
        raise UserError(f"{path}: every prompt needs the same number of candidates, 2 or more; delete it and run "
                        f"02_generate.py again")
    with Ledger(run, "03_rank", k, str(models.device_of(s))) as ledger:
        unet, anchor = models.load_unet(s, k - 1), models.load_unet(s, anchor_k)
        groups = [{"key": (k, int(pid)), "prompt": g.prompt.iloc[0], "images": [run / i for i in g.image]}
                  for pid, g in by_prompt]
        errors = errors_of(s, [unet, anchor], groups, ledger, f"iter{k} rewards")
        draws = torch.stack([implicit_reward(*errors[json.dumps(g["key"])], s.beta) for g in groups])   # (P, N, draws)
        judge = judge_holdout(s, unet, anchor, k, ledger)
        if not draws.isfinite().all():
            raise UserError(f"{path}: a reward is not finite; model {k - 1} has diverged, lower --lr and train it again")
        rewards = draws.mean(2)
        win, lose = best_and_worst(rewards) if s.select == "best-worst" else \
            random_pair(rewards, generator(s.seed, "random pair", k))
        images = np.array([list(g.image) for _, g in by_prompt])                                # (P, N)
        every = torch.arange(len(groups))
        pairs = pd.DataFrame({"pair_id": [f"self-{k}-{g['key'][1]:06d}" for g in groups],
                              "prompt": [g["prompt"] for g in groups], "win": images[every, win],
                              "lose": images[every, lose], "source": "self",
                              "margin": (rewards[every, win] - rewards[every, lose]).numpy()})
        judge |= {"model": k - 1, "anchor": s.anchor, "draws": s.draws, "beta": s.beta, "select": s.select,
                  "diversity": diversity(run, candidates, s.candidates), "margin": float(pairs.margin.mean())}
        if PartialState().is_main_process:
            spread = draws.std(2) if s.draws > 1 else torch.full_like(rewards, float("nan"))
            scored = pd.concat([g for _, g in by_prompt], ignore_index=True).assign(
                reward=rewards.flatten().numpy(), reward_se=(spread / np.sqrt(s.draws)).flatten().numpy())
            write_table(scored, folder / "rewards.parquet")
            write_json(judge, folder / "judge.json")
            report.pair_sheet(run, pairs.head(24), folder / "preview.png", ("winner", "loser"))
            write_table(pairs, folder / "pairs.parquet")
    print(f"03 rank, iter {k}: {len(pairs)} {s.select} pairs ranked by model {k - 1}, which agrees with people on "
          f"{judge['accuracy'] or float('nan'):.0%} of {judge['pairs']} held-out pairs; see {folder}/preview.png")


if __name__ == "__main__":
    run_stage(main)

"""The step-aware preference model of SPO: which of two noisy pictures will people prefer?

A judge for every step of the sampler, learned from the human pairs. SPO fine-tunes a CLIP that is
told the timestep. Here the base's own UNet is the eye: it has seen noisy latents of every timestep
and hears prompt and timestep already (so do Zhang et al. 2025, arXiv 2502.01051). Its down and mid
blocks are pooled to features f of x_t, and one linear layer on them is what is learned,

    score(x_t, t, y) = w . f(x_t, t, y),     L = -log sigmoid(score(x_t^w) - score(x_t^l))

with the same t and noise for the two pictures of a pair (Bradley-Terry). A hidden layer, and the
blocks on the way up, were tried on the embedded world and judge held-out pairs no better.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lib import models
from lib.diffusion import predict
from lib.intervals import wilson
from lib.plan.stages import load_stage
from lib.run import Ledger, UserError, bar, generator, read_table, seed_of
from lib.settings import Settings

# A pair is looked at under so many (timestep, noise) draws; less often where pairs are many.
MOST_DRAWS = 32
LOOKS = 4096

# What the way down and the middle cost of a whole UNet: it is a third in SD1.5 and on the embedded
# world, and is counted as half.
SHARE = 1 / 2

# The training pairs are parted so, to tell when to stop: after so many steps without a gain.
PARTS = 5
PATIENCE = 30
MOST_STEPS = 1000
LR = 1e-3
WEIGHT_DECAY = 1e-2


class StepJudge:
    """Scores of noisy latents by pooled features of the base's UNet, with weights (F,)."""

    def __init__(self, unet: torch.nn.Module, weights: torch.Tensor | None = None):
        self.unet = unet
        self.weights = weights
        self.pooled = {}

        # The way up is not needed: without it the middle is what the UNet answers.
        unet.up_blocks = torch.nn.ModuleList()
        unet.conv_norm_out = None
        unet.conv_out = torch.nn.Identity()

        # Each block leaves its pooled output here whenever the UNet is asked.
        for number, block in enumerate([*unet.down_blocks, unet.mid_block]):
            block.register_forward_hook(self.keeper(number))

    def keeper(self, number: int):
        """A hook that keeps mean and spread over the picture of a block's channels."""
        def keep(block, inputs, output) -> None:
            # A down block also hands on what the up blocks are to skip to.
            if isinstance(output, tuple):
                output = output[0]
            output = output.float()
            spread = output.std((2, 3), correction=0)
            self.pooled[number] = torch.cat([output.mean((2, 3)), spread], 1)
        return keep

    @torch.no_grad()
    def features(self, x_t: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
        """Pooled outputs of all blocks side by side: (B, F) in float32.

        x_t is (B, C, h, w), t (B,) or one for all.
        """
        predict(self.unet, x_t, t, condition)
        return torch.cat(list(self.pooled.values()), 1)

    def score(self, x_t: torch.Tensor, t: torch.Tensor, condition: dict) -> torch.Tensor:
        """How much people would like what comes of x_t: (B,), higher is better."""
        return self.features(x_t, t, condition) @ self.weights.to(x_t.device)


# ---- learning ----

def learn_judge(s: Settings, judge: StepJudge, pairs: pd.DataFrame, ledger: Ledger) -> dict:
    """Learn the judge's weights from human pairs; returns facts of how it went."""
    count = max(1, min(MOST_DRAWS, LOOKS // len(pairs)))
    draws = training_draws(s, pairs, count)
    _, gaps = feature_gaps(s, judge, pairs, draws, ledger, "spo: human pairs")   # (pairs, D, F)

    # Pairs of one prompt are in the same part.
    prompts = sorted(set(pairs.prompt), key=lambda prompt: seed_of(s.seed, "spo part", prompt))
    if len(prompts) < 2:
        raise UserError(f"{s.run}/seed/pairs.parquet: has one prompt, and the preference model "
                        f"needs two, of which one is kept aside; give more pairs")
    part_of = {prompt: number % PARTS for number, prompt in enumerate(prompts)}
    parts = torch.tensor([part_of[prompt] for prompt in pairs.prompt])

    # Every feature in units of its usual difference within a pair.
    scale = gaps.square().mean((0, 1)).sqrt().clamp_min(1e-6)
    gaps = gaps / scale

    # Each part in turn says when to stop training on the others; the judge is the mean of all.
    fits = []
    for part in parts.unique():
        fits.append(fit(gaps[parts != part], gaps[parts == part]))
    weights = torch.stack([weights for weights, _ in fits]).mean(0)
    facts = pd.DataFrame([facts for _, facts in fits]).mean().to_dict()
    judge.weights = weights / scale
    return facts | {"human_pairs": len(pairs), "draws": count}


def fit(gaps: torch.Tensor, aside: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Logistic regression on differences of features, winner less loser: (pairs, D, F) each.

    Returns the weights (F,) that were best on the pairs kept aside, and how it went.
    """
    weights = torch.zeros(gaps.shape[2], requires_grad=True)
    optimizer = torch.optim.AdamW([weights], lr=LR, weight_decay=WEIGHT_DECAY)
    best = weights.detach().clone()
    facts = {"steps": 0, "loss": math.log(2), "loss_aside": math.log(2)}
    for step in range(1, MOST_STEPS + 1):
        loss = -F.logsigmoid(gaps @ weights).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        with torch.no_grad():
            loss_aside = -F.logsigmoid(aside @ weights).mean().item()
        if loss_aside < facts["loss_aside"]:
            best = weights.detach().clone()
            facts = {"steps": step, "loss": loss.item(), "loss_aside": loss_aside}
        if step - facts["steps"] >= PATIENCE:
            break
    return best, facts


def training_draws(s: Settings, pairs: pd.DataFrame, count: int) -> Iterable[tuple]:
    """For each pair timesteps (D,) and noise (D, C, h, w), which its two pictures share."""
    shape = models.latent_shape(s)
    for pair_id in pairs.pair_id:
        rng = generator(s.seed, "spo pair", pair_id)
        t = torch.randint(1000, (count,), generator=rng)
        yield t, torch.randn((count, *shape), generator=rng)


def feature_gaps(
    s: Settings,
    judge: StepJudge,
    pairs: pd.DataFrame,
    draws: Iterable[tuple],
    ledger: Ledger,
    title: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (pairs, D), and features of winners less those of losers (pairs, D, F)."""
    schedule = models.load_schedule(s)
    encoder = models.PromptEncoder(s).prepare(pairs.prompt.tolist())
    device = models.device_of(s)

    timesteps, gaps = [], []
    draws = zip(pairs.itertuples(), draws)
    for pair, (t, noise) in bar(draws, title, "pair", total=len(pairs)):
        images = [Path(s.run) / pair.win, Path(s.run) / pair.lose]
        x_0, _ = models.stack_latents(images)

        # Winner and loser meet the same timesteps and the same noise: (2 D, C, h, w).
        x_0 = x_0.repeat_interleave(len(t), 0)
        x_t = schedule.add_noise(x_0, noise.repeat(2, 1, 1, 1), t.repeat(2)).to(device)
        condition = encoder([pair.prompt] * len(x_t))
        win, lose = judge.features(x_t, t.repeat(2).to(device), condition).cpu().chunk(2)

        timesteps.append(t)
        gaps.append(win - lose)
        ledger.unet_forwards += round(len(x_t) * SHARE)
    return torch.stack(timesteps), torch.stack(gaps)


# ---- does it agree with people? ----

def judge_held_out(s: Settings, judge: StepJudge, pairs: pd.DataFrame,
                   ledger: Ledger) -> tuple[dict, pd.DataFrame]:
    """Accuracy on held-out human pairs, and by tenth of t beside the self-judge's of the run.

    Both judges meet the same draws, those of stage 03, and each draw of a pair is one judgement.
    """
    rank = load_stage("03")
    shape = models.latent_shape(s)
    draws = []
    for comparison in rank.comparisons_of_pairs(s, pairs):
        draws.append(rank.reward_draws(s, comparison.key, shape))
    t, gaps = feature_gaps(s, judge, pairs, draws, ledger, "spo: held-out pairs")
    margin = gaps @ judge.weights                                               # (pairs, D)

    # A pair is judged by the mean over its draws, as in stage 03.
    right = (margin.mean(1) > 0).float()
    low, high = wilson(right.sum().item(), len(right))
    facts = {"accuracy": right.mean().item(), "low": low, "high": high, "pairs": len(right)}

    judgements = pd.DataFrame({"t": t.flatten(), "right": (margin > 0).flatten().numpy()})
    table = by_tenth(judgements).rename(columns={"accuracy": "spo"})
    of_itself = self_judgements(s)
    if of_itself is not None:
        table = table.merge(by_tenth(of_itself)[["tenth", "accuracy"]], on="tenth", how="left")
        table = table.rename(columns={"accuracy": "self_judge"})
    return facts, table


def by_tenth(judgements: pd.DataFrame) -> pd.DataFrame:
    """How often judgements (t, right) are right in every tenth of the timesteps."""
    tenth = judgements.t.astype(int) // 100
    groups = judgements.right.astype(float).groupby(tenth.rename("tenth"))
    return groups.agg(judgements="size", accuracy="mean").reset_index()


def self_judgements(s: Settings) -> pd.DataFrame | None:
    """The judgements of round 1's self-judge, which knows the human pairs alone; None if none."""
    path = Path(s.run) / "iter1" / "holdout_draws.parquet"
    if not path.exists() or s.reward != "implicit":
        return None
    table = read_table(path, ("pair_id", "side", "draw", "t", "reward"), "03_rank.py --iter 1")
    rewards = table.pivot(index=["pair_id", "draw", "t"], columns="side", values="reward")
    rewards = rewards.reset_index()
    return pd.DataFrame({"t": rewards.t, "right": rewards.win > rewards.lose})

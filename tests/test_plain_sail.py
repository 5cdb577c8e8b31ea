"""SAIL on one page is the oracle: the stages, in batches, say what its plain loops say."""

import pandas as pd
import plain_sail
import pytest
import torch
from conftest import ROOT, nudge, settings_of
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from lib import models
from lib.run import load_latent


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/world/base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_of(run, image: str) -> torch.Tensor:
    return load_latent(run / image)["mean"]


@torch.no_grad()
def test_stage_03_gives_the_rewards_of_the_plain_loop(mini, rank, pipe):
    s = settings_of(mini)
    theta = UNet2DConditionModel.from_pretrained(mini / "iter0/unet")
    rewards = pd.read_parquet(mini / "iter1/rewards.parquet")
    for row in rewards.iloc[[0, 3, 7]].itertuples():
        x_0 = latent_of(mini, row.image)
        t, noise = rank.reward_draws(s, (1, int(row.prompt_id)), x_0.shape)
        y = plain_sail.embed(pipe, row.prompt)
        plain = plain_sail.reward(theta, pipe.unet, pipe.scheduler, x_0, y, list(zip(t, noise)),
                                  s.beta)
        assert row.reward == pytest.approx(float(plain), rel=1e-3, abs=2e-3)


@torch.no_grad()
def test_stage_04_gives_the_losses_of_the_plain_loop(mini, train, pipe):
    s = settings_of(mini)
    pairs = pd.read_parquet(mini / "iter1/pairs.parquet")[:2]        # candidates: latents as drawn
    policy = models.load_unet(s, 0, trained=True)
    ref = models.load_unet(s, 0)
    nudge(policy)
    shape = latent_of(mini, pairs.win[0]).shape
    randoms = {name: rows[:2] for name, rows in train.step_randoms(s, 1, 0, shape).items()}
    encoder = models.PromptEncoder(s)
    errors = train.pair_errors(s, policy, ref, models.load_schedule(s), pairs, randoms, encoder)
    losses, _ = train.dpo_loss(*errors, s.beta)

    for i, pair in enumerate(pairs.itertuples()):
        x_w, x_l = latent_of(mini, pair.win), latent_of(mini, pair.lose)
        y = plain_sail.embed(pipe, pair.prompt)
        plain = plain_sail.dpo_loss(policy, ref, pipe.scheduler, x_w, x_l, y, randoms["t"][i],
                                    randoms["noise"][i], s.beta)
        assert losses[i].item() == pytest.approx(plain.item(), rel=1e-3, abs=2e-3)


def test_the_page_runs_by_itself(monkeypatch, capsys):
    small = {"N": 2, "DRAWS": 1, "HUMAN_PAIRS": 2, "NEW_PROMPTS": 1, "BATCH": 2, "STEPS": 1}
    for name, value in small.items():
        monkeypatch.setattr(plain_sail, name, value)
    monkeypatch.setattr(plain_sail, "utility", lambda pipe, unet, prompts: 0.)
    plain_sail.main()
    printed = capsys.readouterr().out
    assert "step 0: loss 0.693" in printed
    assert "Iter1: mean utility" in printed


def test_it_is_one_page():
    """A page that grows is no page."""
    assert len((ROOT / "tests/plain_sail.py").read_text().splitlines()) <= 160

"""Stage 03: the implicit reward, the pairs made of it, and the self-judge, against plain loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, call, configure, judge_of, refused, settings_of, tiny_unet
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lib.run import generator, latent_path
from lib.settings import Settings
from lib.sheets import read_pictures
from lib.world import people


LATENT = (12, 8, 8)                         # the shape of a latent of the embedded world


def rank_again(run, k: int) -> None:
    """Run stage 03 once more on a round that it is through with."""
    (run / f"iter{k}/pairs.parquet").unlink()
    assert call("03", run, "--iter", str(k)) is None


def table_of(run, k: int, name: str) -> pd.DataFrame:
    """A table of a round: candidates, draws, rewards, pairs or holdout_draws."""
    return pd.read_parquet(run / f"iter{k}/{name}.parquet")


def by_candidate(draws: pd.DataFrame):
    """The rewards of each candidate's draws, candidates in their order."""
    return draws.groupby(["prompt_id", "candidate"], sort=False).reward


def latent_of(image) -> torch.Tensor:
    """A picture's latent; of a VAE posterior, the mean."""
    return load_file(latent_path(image))["mean"]


# ---- the method ----

def test_the_reward_equals_a_plain_computation(rank, rng):
    error = torch.rand(3, 8, 10, generator=rng)
    anchor_error = torch.rand(3, 8, 10, generator=rng)
    reward = rank.implicit_reward(error, anchor_error, 5000.).mean(-1)

    total = 0.
    for d in range(10):
        total += -5000 / 2 * (float(error[1, 4, d]) - float(anchor_error[1, 4, d]))
    assert float(reward[1, 4]) == pytest.approx(total / 10, rel=1e-5)


def test_a_smaller_error_than_the_anchors_is_a_reward(rank):
    assert rank.implicit_reward(torch.tensor(.1), torch.tensor(.2), 5000.) > 0


def test_best_and_worst_have_the_extreme_rewards(rank, rng):
    rewards = torch.randn(20, 8, generator=rng)
    win, lose = rank.best_and_worst(rewards)
    for of_prompt, best, worst in zip(rewards, win, lose):
        assert of_prompt[best] == max(of_prompt)
        assert of_prompt[worst] == min(of_prompt)


def test_errors_of_prompts_equal_a_plain_loop(rank, rng):
    """Every candidate meets its own prompt's draws, one at a time and in float64."""
    P, N, D = 2, 3, 4
    unets = [tiny_unet(0), tiny_unet(1)]
    schedule = DDPMScheduler()
    latents = torch.randn(P, N, 4, 8, 8, generator=rng)
    t = torch.randint(1000, (P, D), generator=rng)
    noise = torch.randn(P, D, 4, 8, 8, generator=rng)
    embeds = torch.randn(P, 5, 8, generator=rng)
    errors = rank.errors_of_prompts(unets, schedule, latents, t, noise, {"embeds": embeds})
    assert errors.shape == (2, P, N, D)

    for m, p, n, d in np.ndindex(2, P, N, D):
        abar = float(schedule.alphas_cumprod[t[p, d]])
        x_0, eps = latents[p, n].double(), noise[p, d].double()
        x_t = abar ** .5 * x_0 + (1 - abar) ** .5 * eps
        with torch.no_grad():
            output = unets[m](x_t[None].float(), t[p, d], embeds[p:p + 1]).sample[0]
        expected = (output.double() - eps).square().mean().item()
        assert errors[m, p, n, d].item() == pytest.approx(expected, rel=1e-4)


def test_agreement_counts_a_tie_as_a_half(rank):
    rewards = torch.tensor([[2., 1.], [1., 2.], [3., 3.], [5., 4.]])
    accuracy, low, high = rank.agreement(rewards)
    assert accuracy == (1 + 0 + .5 + 1) / 4
    assert 0 < low < accuracy < high < 1


# ---- the draws ----

def test_draws_depend_on_run_seed_and_key_alone(rank):
    t, noise = rank.reward_draws(Settings(), (1, 7), (4, 8, 8))
    again, same_noise = rank.reward_draws(Settings(), (1, 7), (4, 8, 8))
    assert torch.equal(t, again)
    assert torch.equal(noise, same_noise)
    for s, key in ((Settings(), (1, 8)), (Settings(), (2, 7)), (Settings(seed=1), (1, 7))):
        _, other = rank.reward_draws(s, key, (4, 8, 8))
        assert not torch.equal(noise, other)


def test_timesteps_of_the_draws_fill_their_range(rank):
    s = Settings(draws=500, rank_t_min=200, rank_t_max=210)
    t, _ = rank.reward_draws(s, (1, 0), (1, 1, 1))
    assert t.unique().tolist() == list(range(200, 210))


# ---- what a run's rewards are made of ----

@pytest.fixture(scope="module")
def base_pipeline() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(ROOT / "lib/world/base", dtype=torch.float32)


@torch.no_grad()
def plain_error(pipe, unet, image, prompt: str, t: int, noise: torch.Tensor) -> float:
    """e(x_0) of one picture of a run at one draw: noised, predicted and averaged by hand."""
    tokens = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    embeds = pipe.text_encoder(tokens).last_hidden_state
    x_0 = latent_of(image)
    abar = float(pipe.scheduler.alphas_cumprod[t])
    x_t = abar ** .5 * x_0 + (1 - abar) ** .5 * noise
    output = unet(x_t[None], t, embeds).sample[0]
    return (output.double() - noise.double()).square().mean().item()


@pytest.mark.parametrize("row", [0, 7])
def test_rewards_of_a_run_equal_a_plain_loop(mini, rank, base_pipeline, row):
    """A candidate of round 1, draw by draw, without any of the stage's batching."""
    s = settings_of(mini)
    iter0 = UNet2DConditionModel.from_pretrained(mini / "iter0/unet")
    candidate = table_of(mini, 1, "rewards").iloc[row]
    image, prompt = mini / candidate.image, candidate.prompt

    total = 0.
    for t, noise in zip(*rank.reward_draws(s, (1, int(candidate.prompt_id)), LATENT)):
        error = plain_error(base_pipeline, iter0, image, prompt, int(t), noise)
        anchor_error = plain_error(base_pipeline, base_pipeline.unet, image, prompt, int(t), noise)
        total += -s.beta / 2 * (error - anchor_error)
    assert candidate.reward == pytest.approx(total / s.draws, rel=1e-3, abs=2e-3)


@pytest.mark.parametrize("k", [1, 2])
def test_every_draw_has_its_reward_by_equation_8(mini, k):
    draws = table_of(mini, k, "draws")
    beta = settings_of(mini).beta
    expected = -beta / 2 * (draws.error - draws.anchor_error)
    np.testing.assert_allclose(draws.reward, expected, rtol=1e-5, atol=1e-6)
    assert draws.reward.abs().max() > 0


def test_candidates_of_a_prompt_share_its_draws(mini):
    draws = table_of(mini, 1, "draws")
    assert draws.groupby(["prompt_id", "draw"]).t.nunique().eq(1).all()
    assert draws.t.nunique() > 3
    assert draws.t.between(0, 999).all()


@pytest.mark.parametrize("k", [1, 2])
def test_a_reward_is_the_mean_over_its_draws(mini, k):
    rewards = table_of(mini, k, "rewards")
    reward = by_candidate(table_of(mini, k, "draws"))
    assert list(reward.mean().index) == list(zip(rewards.prompt_id, rewards.candidate))
    np.testing.assert_allclose(rewards.reward, reward.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rewards.reward_se, reward.sem(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_pairs_are_the_best_and_the_worst_of_each_prompt(mini, k):
    rewards, pairs = table_of(mini, k, "rewards"), table_of(mini, k, "pairs")
    assert len(pairs) == 3
    for pair in pairs.itertuples():
        candidates = rewards[rewards.prompt_id == pair.prompt_id]
        assert pair.win == candidates.image[candidates.reward.idxmax()]
        assert pair.lose == candidates.image[candidates.reward.idxmin()]
        assert pair.prompt == candidates.prompt.iloc[0]
        assert pair.source == "self"


@pytest.mark.parametrize("k", [1, 2])
def test_a_margin_is_the_difference_of_the_two_rewards(mini, k):
    reward = table_of(mini, k, "rewards").set_index("image").reward
    for pair in table_of(mini, k, "pairs").itertuples():
        assert pair.margin == pytest.approx(reward[pair.win] - reward[pair.lose], rel=1e-4)


def test_with_one_draw_a_reward_has_no_standard_error(mini_copy):
    configure(mini_copy, draws=1)
    rank_again(mini_copy, 1)
    rewards = table_of(mini_copy, 1, "rewards")
    assert len(table_of(mini_copy, 1, "draws")) == len(rewards)
    assert rewards.reward_se.isna().all()


def test_a_reward_that_is_not_finite_is_refused(mini_copy):
    image = mini_copy / table_of(mini_copy, 1, "candidates").image[5]
    save_file({"mean": latent_of(image) * float("nan")}, latent_path(image))
    (mini_copy / "iter1/pairs.parquet").unlink()
    refused(call("03", mini_copy, "--iter", "1"), "candidates.parquet", "not finite", "--lr")
    assert not (mini_copy / "iter1/pairs.parquet").exists()


# ---- the self-judge on held-out human pairs ----

@pytest.mark.parametrize("k", [1, 2])
def test_the_judges_accuracy_follows_from_the_held_out_draws(mini, k):
    draws = table_of(mini, k, "holdout_draws")
    reward = draws.groupby(["pair_id", "side"]).reward.mean().unstack()
    right = (reward.win > reward.lose) + .5 * (reward.win == reward.lose)
    judge = judge_of(mini, k)
    assert judge["pairs"] == len(reward) == 6
    assert judge["accuracy"] == pytest.approx(right.mean())
    assert judge["low"] < judge["accuracy"] < judge["high"]


def test_held_out_draws_are_of_the_held_out_pairs(mini):
    draws = table_of(mini, 1, "holdout_draws")
    pairs = pd.read_parquet(mini / "seed/holdout.parquet")
    assert list(draws.pair_id.unique()) == list(pairs.pair_id)
    assert list(draws.side) == (["win"] * 3 + ["lose"] * 3) * len(pairs)
    assert list(draws.draw) == [0, 1, 2] * 2 * len(pairs)
    assert draws.groupby(["pair_id", "draw"]).t.nunique().eq(1).all()


@pytest.mark.parametrize("side", ["win", "lose"])
def test_errors_on_a_held_out_pair_equal_a_plain_loop(mini, rank, base_pipeline, side):
    """Of a human picture, whose latent is a VAE posterior, the mean is judged."""
    pair = pd.read_parquet(mini / "seed/holdout.parquet").iloc[0]
    draws = table_of(mini, 1, "holdout_draws")
    draws = draws[(draws.pair_id == pair.pair_id) & (draws.side == side)]
    times, noises = rank.reward_draws(settings_of(mini), ("holdout", pair.pair_id), LATENT)
    assert list(draws.t) == times.tolist()
    for error, t, noise in zip(draws.anchor_error, draws.t, noises):
        expected = plain_error(base_pipeline, base_pipeline.unet, mini / pair[side], pair.prompt,
                               t, noise)
        assert error == pytest.approx(expected, rel=1e-4)


def test_draws_of_the_held_out_pairs_are_the_same_in_every_round(mini):
    same = ["pair_id", "side", "draw", "t", "anchor_error"]
    one, two = table_of(mini, 1, "holdout_draws"), table_of(mini, 2, "holdout_draws")
    pd.testing.assert_frame_equal(one[same], two[same])
    assert not one.error.equals(two.error)


def test_the_anchors_errors_of_the_last_round_are_those_measured_anew(mini, mini_copy):
    (mini_copy / "iter1/holdout_draws.parquet").unlink()
    rank_again(mini_copy, 2)
    known = table_of(mini, 2, "holdout_draws")
    anew = table_of(mini_copy, 2, "holdout_draws")
    pd.testing.assert_frame_equal(known, anew, check_exact=True)
    assert judge_of(mini, 2) == judge_of(mini_copy, 2)


def test_the_anchor_is_not_asked_again_about_the_held_out_pairs(mini):
    ledger = pd.read_parquet(mini / "ledger.parquet")
    forwards = ledger[ledger.stage == "03_rank"].set_index("iter").unet_forwards
    candidates, held_out = 3 * 4 * 3, 6 * 2 * 3                 # pictures times draws
    assert forwards[1] == 2 * candidates + 2 * held_out
    assert forwards[2] == 2 * candidates + held_out


def test_held_out_pairs_that_have_changed_are_measured_anew(mini_copy):
    """A user who drops a row, as the message on a lost picture says, can go on."""
    path = mini_copy / "seed/holdout.parquet"
    pd.read_parquet(path).drop(index=2).to_parquet(path, index=False)
    old = table_of(mini_copy, 2, "holdout_draws")
    rank_again(mini_copy, 2)
    new = table_of(mini_copy, 2, "holdout_draws")
    rest = old[old.pair_id != old.pair_id.unique()[2]].reset_index(drop=True)
    assert list(new.pair_id) == list(rest.pair_id)
    np.testing.assert_allclose(new.anchor_error, rest.anchor_error, rtol=1e-5)
    assert judge_of(mini_copy, 2)["pairs"] == 5


def test_without_held_out_pairs_there_is_no_accuracy(mini_copy):
    configure(mini_copy, holdout_pairs=0)
    for name in ("seed/holdout.parquet", "iter1/holdout_draws.parquet"):
        (mini_copy / name).unlink()
    rank_again(mini_copy, 1)
    judge = judge_of(mini_copy, 1)
    assert judge["accuracy"] is None
    assert judge["pairs"] == 0
    assert not (mini_copy / "iter1/holdout_draws.parquet").exists()


def test_diversity_is_the_distance_of_candidates_from_their_mean(mini):
    squares = []
    for _, part in table_of(mini, 1, "candidates").groupby("prompt_id"):
        latents = [latent_of(mini / image) for image in part.image]
        squares.append(np.var(np.stack(latents), axis=0, ddof=1).mean())
    assert judge_of(mini, 1)["diversity"] == pytest.approx(np.mean(squares) ** .5, rel=1e-5)


def test_the_judge_says_what_it_judged_with(mini):
    facts = {"model": 0, "reward": "implicit", "anchor": "base", "draws": 3, "beta": 2000.,
             "select": "best-worst", "self_pairs": 3}
    assert facts.items() <= judge_of(mini, 1).items()
    assert judge_of(mini, 2)["model"] == 1


# ---- the anchor, and the rivals' doors ----

@pytest.mark.parametrize("k, anchor", [(1, "base"), (2, "Iter0")])
def test_anchor_iter0_holds_from_round_2_on(mini, mini_copy, k, anchor):
    """In round 1 Iter0 is the model itself, and would give every picture zero."""
    configure(mini_copy, anchor="iter0")
    rank_again(mini_copy, k)
    old = table_of(mini, k, "rewards").reward
    new = table_of(mini_copy, k, "rewards").reward
    assert judge_of(mini_copy, k)["anchor"] == anchor
    assert np.allclose(old, new) == (anchor == "base")
    assert new.abs().max() > 0


def test_another_anchors_errors_on_held_out_pairs_are_measured_anew(mini_copy):
    """Round 1 has those of the base; from round 2 on the anchor is Iter0."""
    configure(mini_copy, anchor="iter0")
    rank_again(mini_copy, 2)
    last = table_of(mini_copy, 1, "holdout_draws")
    of_iter0 = table_of(mini_copy, 2, "holdout_draws").anchor_error
    np.testing.assert_allclose(of_iter0, last.error, rtol=1e-5)
    assert not np.allclose(of_iter0, last.anchor_error, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_a_random_pair_is_chosen_by_the_runs_seed(mini_copy, rank, k):
    s = configure(mini_copy, select="random")
    rank_again(mini_copy, k)
    rewards, pairs = table_of(mini_copy, k, "rewards"), table_of(mini_copy, k, "pairs")
    reward = torch.tensor(rewards.reward.to_numpy()).reshape(3, 4)
    images = rewards.image.to_numpy().reshape(3, 4)
    win, lose = rank.random_pair(reward, generator(s.seed, "random pair", k))
    prompts = np.arange(3)
    assert list(pairs.win) == list(images[prompts, win])
    assert list(pairs.lose) == list(images[prompts, lose])
    assert (pairs.margin > 0).all()
    assert judge_of(mini_copy, k)["select"] == "random"


def test_balanced_draws_are_weighted_by_the_anchors_error(mini, mini_copy):
    configure(mini_copy, reward_weights="balanced")
    rank_again(mini_copy, 1)
    plain, balanced = table_of(mini, 1, "draws"), table_of(mini_copy, 1, "draws")

    # A draw's weight is the inverse of its mean anchor error, of mean 1 over the prompt's draws.
    weight = 1 / plain.groupby(["prompt_id", "draw"]).anchor_error.transform("mean")
    weight = weight / weight.groupby(plain.prompt_id).transform("mean")
    np.testing.assert_allclose(balanced.reward, plain.reward * weight, rtol=1e-4, atol=1e-5)
    rewards = table_of(mini_copy, 1, "rewards").reward
    np.testing.assert_allclose(rewards, by_candidate(balanced).mean(), rtol=1e-4, atol=1e-5)


# ---- online DPO: the world's aesthetics rank, and are the judge ----

@pytest.fixture
def online(mini_copy):
    configure(mini_copy, reward="world-aesthetics")
    rank_again(mini_copy, 1)
    return mini_copy


def aesthetics(run, prompts, images) -> np.ndarray:
    return people.score(list(prompts), read_pictures(run, images))["aesthetics"].numpy()


def test_online_dpo_ranks_by_a_score_from_outside(online):
    rewards = table_of(online, 1, "rewards")
    expected = aesthetics(online, rewards.prompt, rewards.image)
    np.testing.assert_allclose(rewards.reward, expected, atol=1e-6)


def test_online_dpo_takes_best_and_worst(online):
    rewards, pairs = table_of(online, 1, "rewards"), table_of(online, 1, "pairs")
    by_prompt = rewards.groupby("prompt_id").reward
    assert set(pairs.win) == set(rewards.image[by_prompt.idxmax()])
    assert set(pairs.lose) == set(rewards.image[by_prompt.idxmin()])
    assert set(pairs.source) == {"world-aesthetics"}


def test_online_dpo_has_one_draw_without_errors(online):
    draws = table_of(online, 1, "draws")
    assert list(draws.reward) == list(table_of(online, 1, "rewards").reward)
    assert draws[["t", "error", "anchor_error"]].isna().all(axis=None)


def test_online_dpo_is_measured_on_the_held_out_pairs(online):
    pairs = pd.read_parquet(online / "seed/holdout.parquet")
    win = aesthetics(online, pairs.prompt, pairs.win)
    lose = aesthetics(online, pairs.prompt, pairs.lose)
    judge = judge_of(online, 1)
    assert judge["reward"] == "world-aesthetics"
    assert judge["accuracy"] == pytest.approx((win > lose).mean())

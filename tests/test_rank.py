"""Stage 03: the implicit reward, the pairs made of it, and the self-judge, against plain loops."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, call, configure, judge_of, refused, settings_of, stage, tiny_unet
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lib import crossfit
from lib.intervals import pairs_to_tell, wilson
from lib.judge import CROSSFIT, read_judge, verdict
from lib.models import PromptEncoder
from lib.plan.counts import count_crossfit
from lib.plan.stages import load_stage
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


@pytest.mark.parametrize("at_once", [1, 5, 24])
def test_a_forward_takes_no_more_than_the_batch_of_ranking(rank, rng, monkeypatch, at_once):
    """Two prompts of three pictures and four draws: 24 noised latents."""
    sizes = []
    denoising_error = rank.denoising_error

    def note(unet, schedule, x_0, *others):
        sizes.append(len(x_0))
        return denoising_error(unet, schedule, x_0, *others)

    given = (DDPMScheduler(), torch.randn(2, 3, 4, 8, 8, generator=rng),
             torch.randint(1000, (2, 4), generator=rng), torch.randn(2, 4, 4, 8, 8, generator=rng),
             {"embeds": torch.randn(2, 5, 8, generator=rng)})
    unets = [tiny_unet(0), tiny_unet(1)]
    whole = rank.errors_of_prompts(unets, *given)
    monkeypatch.setattr(rank, "denoising_error", note)
    parts = rank.errors_of_prompts(unets, *given, at_once)
    assert sum(sizes) == 2 * 24
    assert max(sizes) == at_once
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


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


def test_the_batch_of_ranking_holds_below_one_prompt(mini, mini_copy, monkeypatch):
    """A prompt has 4 candidates and 3 draws, a held-out pair 2 pictures and 3 draws."""
    sizes = []
    module = stage("03")
    denoising_error = module.denoising_error

    def note(unet, schedule, x_0, *others):
        sizes.append(len(x_0))
        return denoising_error(unet, schedule, x_0, *others)

    module.denoising_error = note
    (mini_copy / "iter1/pairs.parquet").unlink()
    module.main(["--run", str(mini_copy), "--iter", "1", "--rank-batch", "5"])
    assert max(sizes) == 5
    old, new = table_of(mini, 1, "rewards").reward, table_of(mini_copy, 1, "rewards").reward
    np.testing.assert_allclose(old, new, rtol=1e-3, atol=2e-3)


# ---- prompts without a pair ----

def test_candidates_that_are_one_picture_give_no_pair(mini, mini_copy, capsys):
    """Their errors differ by rounding, if at all."""
    candidates = table_of(mini_copy, 1, "candidates")
    first, *others = [mini_copy / image for image in candidates.image[:4]]
    for image in others:
        shutil.copy(latent_path(first), latent_path(image))
    rank_again(mini_copy, 1)

    pairs = table_of(mini_copy, 1, "pairs")
    expected = table_of(mini, 1, "pairs")[1:].reset_index(drop=True)
    pd.testing.assert_frame_equal(pairs.drop(columns="margin"), expected.drop(columns="margin"))
    judge = judge_of(mini_copy, 1)
    assert (judge["self_pairs"], judge["prompts_without_pair"]) == (2, 1)
    assert "1 prompts gave none" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["best-worst", "random"])
def test_equal_rewards_give_no_pair(mini, rank, select):
    s = Settings(run=str(mini), select=select)
    reward = torch.ones(3, 4, 1)
    reward[1, :, 0] = torch.arange(4)
    draws = rank.outside_draws(reward)
    pairs = rank.choose_pairs(s, 1, table_of(mini, 1, "candidates"), draws)
    assert list(pairs.prompt_id) == [table_of(mini, 1, "pairs").prompt_id[1]]
    assert pairs.margin[0] > 0


def test_a_judge_that_is_its_anchor_gives_no_pairs_at_all(mini_copy):
    shutil.rmtree(mini_copy / "iter0/unet")
    shutil.copytree(ROOT / "lib/world/base/unet", mini_copy / "iter0/unet")
    (mini_copy / "iter1/pairs.parquet").unlink()
    refused(call("03", mini_copy, "--iter", "1"), "candidates.parquet", "model 0", "higher --lr")
    assert not (mini_copy / "iter1/pairs.parquet").exists()


# ---- what is not as it should be: named, or made again ----

def spoil(path) -> None:
    """Let a file of tensors hold one number that is none."""
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, path)


def no_number(run):
    """Each file that can make a reward not finite, and the words of its error."""
    candidate = table_of(run, 1, "candidates").iloc[5]
    held_out = pd.read_parquet(run / "seed/holdout.parquet").iloc[1]
    return [
        (latent_path(run / candidate.image), "latent"),
        (latent_path(run / held_out.lose), "latent"),
        (PromptEncoder(settings_of(run)).path(candidate.prompt), "embedding"),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_makes_a_reward_not_finite_is_named_and_made_again(mini_copy, which):
    path, word = no_number(mini_copy)[which]
    spoil(path)
    (mini_copy / "iter1/pairs.parquet").unlink()
    message = call("03", mini_copy, "--iter", "1")
    refused(message, str(path), word, "not finite", "delete")
    assert "--lr" not in message
    assert not (mini_copy / "iter1/pairs.parquet").exists()

    # The remedy.
    path.unlink()
    if "02_generate" in message:
        refused(call("03", mini_copy, "--iter", "1"), "candidates.parquet, row", "02_generate.py")
        assert call("02", mini_copy, "--iter", "1") is None
    assert call("03", mini_copy, "--iter", "1") is None
    assert (mini_copy / "iter1/pairs.parquet").exists()


def text_ids(table):
    table["prompt_id"] = [f"p{number}" for number in table.prompt_id]


def a_null_prompt(table):
    table["prompt"] = [None, *table.prompt[1:]]


def a_number_for_a_picture(table):
    table["image"] = range(len(table))


def a_candidate_without_number(table):
    table["candidate"] = [1.5] * len(table)


@pytest.mark.parametrize("change, words", [
    (text_ids, ("row 1", "prompt_id 'p", "whole number")),
    (a_null_prompt, ("row 1", "prompt")),
    (a_number_for_a_picture, ("row 1", "image 0")),
    (a_candidate_without_number, ("row 1", "candidate 1.5")),
])
def test_candidates_of_other_kinds_are_refused_and_made_again(mini, mini_copy, change, words):
    path = mini_copy / "iter1/candidates.parquet"
    table = pd.read_parquet(path)
    change(table)
    table.to_parquet(path, index=False)
    (mini_copy / "iter1/pairs.parquet").unlink()
    refused(call("03", mini_copy, "--iter", "1"), str(path), *words, "delete", "02_generate.py")

    path.unlink()
    assert call("02", mini_copy, "--iter", "1") is None
    assert call("03", mini_copy, "--iter", "1") is None
    pd.testing.assert_frame_equal(table_of(mini, 1, "pairs"), table_of(mini_copy, 1, "pairs"))


def test_held_out_pairs_of_other_kinds_are_refused(mini_copy):
    path = mini_copy / "seed/holdout.parquet"
    table = pd.read_parquet(path)
    (mini_copy / "iter1/pairs.parquet").unlink()
    for column, value in (("pair_id", 7), ("prompt", None), ("win", 3.), ("lose", b"x")):
        table.assign(**{column: [value] * len(table)}).to_parquet(path, index=False)
        refused(call("03", mini_copy, "--iter", "1"), str(path), "row 1", column, "correct it")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_damaged_latent_of_a_held_out_pair_is_made_again(mini_copy, content):
    pair = pd.read_parquet(mini_copy / "seed/holdout.parquet").iloc[1]
    latent_path(mini_copy / pair.win).write_bytes(content)
    rank_again(mini_copy, 1)
    assert judge_of(mini_copy, 1)["pairs"] == 6


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


def of_other_pairs(path):
    table = pd.read_parquet(path)
    table.assign(pair_id="other-" + table.pair_id).to_parquet(path, index=False)


def shuffled(path):
    pd.read_parquet(path).sample(frac=1, random_state=0).to_parquet(path, index=False)


def of_other_draws(path):
    table = pd.read_parquet(path)
    table[table.draw < 2].to_parquet(path, index=False)


def without_numbers(path):
    table = pd.read_parquet(path)
    table.assign(anchor_error=["x", *table.anchor_error[1:].astype(str)]).to_parquet(path)


def with_nothing(path):
    table = pd.read_parquet(path)
    table.loc[3, "anchor_error"] = float("nan")
    table.to_parquet(path, index=False)


def without_columns(path):
    pd.read_parquet(path)[["pair_id"]].to_parquet(path, index=False)


@pytest.mark.parametrize("damage", [
    of_other_pairs, shuffled, of_other_draws, without_numbers, with_nothing, without_columns,
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1 garbage PAR1")])
def test_known_errors_that_do_not_hold_are_measured_anew(mini, mini_copy, damage):
    damage(mini_copy / "iter1/holdout_draws.parquet")
    rank_again(mini_copy, 2)
    pd.testing.assert_frame_equal(table_of(mini, 2, "holdout_draws"),
                                  table_of(mini_copy, 2, "holdout_draws"), check_exact=True)


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


# ---- what the accuracy allows to say ----

@pytest.mark.parametrize("right, pairs, word, words", [
    (0, 0, "unmeasured", ("no held-out pairs",)),
    (120, 200, "agrees", ("agrees with people", "60%", "200")),
    (61, 200, "against", ("against people", "stop at Iter0")),
    (7, 12, "unclear", ("about 270 more pairs", "right on 58%", "or stop at Iter0")),
    (6, 12, "unclear", ("about 190 more pairs", "right on 60%", "or stop at Iter0")),
    (3, 3, "unclear", ("about 10 more pairs",)),
    (210, 400, "unclear", ("would have shown", "stop at Iter0")),
])
def test_the_judge_gives_a_verdict(right, pairs, word, words):
    judge = {"accuracy": None, "pairs": 0}
    if pairs:
        low, high = wilson(right, pairs)
        judge = {"accuracy": right / pairs, "low": low, "high": high, "pairs": pairs}
    told, sentence = verdict(judge)
    assert told == word
    refused(sentence, *words)


@pytest.mark.parametrize("p", [.58, .6, .7, .3])
def test_so_many_pairs_tell_a_judge_from_a_coin_4_times_in_5(p):
    """The interval excludes a half on about 80% of so many pairs, by the binomial itself."""
    n = pairs_to_tell(p)
    chances = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.double))
    power = 0.
    for right in range(n + 1):
        low, high = wilson(right, n)
        if low > .5 or high < .5:
            power += chances.log_prob(torch.tensor(right)).exp().item()
    assert power == pytest.approx(.8, abs=.035)


@pytest.fixture
def few_pairs(mini_copy):
    """A run of somebody's own pairs before round 1: 8 to train on and 6 held out."""
    configure(mini_copy, pairs="own.csv", prompts="own.txt", eval_prompts="list.txt",
              scores="none", iter0_steps=1)
    (mini_copy / "iter1/pairs.parquet").unlink()
    return mini_copy


def judged_pairs(run) -> pd.DataFrame:
    return pd.read_parquet(run / CROSSFIT)


def test_few_held_out_pairs_are_helped_by_all_the_others(few_pairs, monkeypatch, capsys):
    """Every human pair is judged once, by a model that has not seen its prompt; and a stopped call
    goes on."""
    training = load_stage("04")
    train, trained_on = training.train, []

    def note(s, k, pairs, *others):
        if len(trained_on) == 2 and not (few_pairs / "stopped").exists():
            (few_pairs / "stopped").touch()
            raise KeyboardInterrupt
        trained_on.append(pairs)
        return train(s, k, pairs, *others)

    monkeypatch.setattr(training, "train", note)
    argv = ["--run", str(few_pairs)]
    with pytest.raises(KeyboardInterrupt):
        crossfit.main(argv)
    crossfit.main(argv)
    assert "6 held-out pairs tell little" in capsys.readouterr().out

    human = pd.concat([pd.read_parquet(few_pairs / f"seed/{name}.parquet")
                       for name in ("pairs", "holdout")])
    draws = judged_pairs(few_pairs)
    assert sorted(draws.pair_id.unique()) == sorted(human.pair_id)
    assert len(draws) == 14 * 2 * 3
    assert draws.error.ne(draws.anchor_error).any()
    assert len(trained_on) == crossfit.FOLDS

    # It took what the plan counts.
    ledger = pd.read_parquet(few_pairs / "ledger.parquet").set_index("stage")
    planned = count_crossfit(settings_of(few_pairs))
    for name in ("optimizer_steps", "unet_forwards"):
        assert ledger.loc["crossfit", name].sum() == planned[name] > 0

    for number, others in enumerate(trained_on, start=1):
        table = pd.read_parquet(few_pairs / f"judge/fold{number}/holdout_draws.parquet")
        fold = human[human.pair_id.isin(table.pair_id)]
        assert len(fold) + len(others) == 14
        assert not set(fold.prompt) & set(others.prompt)

    # It is the accuracy of round 1's judge, and a third call has nothing to do.
    crossfit.main(argv)
    assert len(trained_on) == crossfit.FOLDS
    assert call("03", few_pairs, "--iter", "1") is None
    reward = draws.groupby(["pair_id", "side"]).reward.mean().unstack()
    judge = judge_of(few_pairs, 1)
    assert judge["pairs"] == 14
    assert judge["accuracy"] == pytest.approx((reward.win > reward.lose).mean())
    assert "14 human pairs, each unknown to its judge" in capsys.readouterr().out


def test_models_like_iter0_have_as_many_passes():
    s = Settings(seed_pairs=8, iter0_steps=38)
    assert crossfit.as_long_as_iter0(s, 11).iter0_steps == 52           # 38 * 11 / 8
    assert crossfit.as_long_as_iter0(replace(s, iter0_steps=0), 11).iter0_steps == 0


@pytest.mark.parametrize("changes", [
    {"holdout_pairs": 100}, {"holdout_pairs": 0}, {"alpha": 0.}, {"iters": 0},
    {"pairs": "world"}, {"reward": "pickscore"}, {"start": "a/model"}])
def test_where_it_would_not_help_no_further_models_are_trained(changes):
    own = {"pairs": "own.csv", "holdout_pairs": 99}
    assert crossfit.is_needed(Settings(**own))
    assert not crossfit.is_needed(Settings(**(own | changes)))


def test_a_round_tells_its_verdict(mini, mini_copy, capsys):
    rank_again(mini_copy, 1)
    judge = judge_of(mini, 1)
    word, sentence = verdict(judge)
    assert judge["verdict"] == word
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"null", b"[]", b"{}", b"[" * 100_000, b'{"pairs": "many"}',
    b'{"pairs": 6, "diversity": 1.0, "margin": 1.0, "accuracy": null}',
    b'{"pairs": 0, "diversity": NaN, "margin": 1.0}'])
def test_a_judge_that_stage_03_has_not_written_is_none(mini, tmp_path, content):
    path = tmp_path / "judge.json"
    assert read_judge(path) == {}
    path.write_bytes(content)
    assert read_judge(path) == {}
    path.write_text(json.dumps(judge_of(mini, 1)))
    assert read_judge(path) == judge_of(mini, 1)


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

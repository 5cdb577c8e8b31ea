"""The other self-judges, against plain loops and as stage 03 ranks by them; cheaper candidates.

They are SOLACE's self-confidence, and roots of the errors in place of the errors.
"""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call, configure, judge_of
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from safetensors.torch import load_file

from lib.models import PromptEncoder
from lib.plan.counts import count_candidates, count_evaluation, count_ranking, count_seed
from lib.rivals import self_confidence
from lib.rivals.root_error import root_reward
from lib.rivals.self_confidence import confidence, share_of_noise
from lib.run import generator, latent_path
from lib.settings import Settings, of_candidates
from lib.sheets import read_pictures
from lib.study import judge
from lib.world import people

# ---- the method ----

def plain_confidence(errors: np.ndarray, sigma: list[float]) -> list[float]:
    """The mean over timesteps, picture by picture, for errors [picture][timestep][noise]."""
    total = [0.] * len(errors)
    for step, share in enumerate(sigma):
        scores = []
        for of_picture in errors:
            mse = sum(of_picture[step]) / len(of_picture[step])
            scores.append(-math.log(mse + 1e-6))
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        for picture, score in enumerate(scores):
            z = (score - mean) / math.sqrt(variance)
            total[picture] += share * (1 - share) * z
    return [part / len(sigma) for part in total]


def test_confidence_equals_a_plain_loop(rng):
    errors = torch.rand(2, 8, 5, 8, generator=rng).double()
    sigma = torch.tensor([.6, .5, .4, .3, .2]).double()
    rewards = confidence(errors, sigma)
    assert rewards.shape == (2, 8, 5)
    for prompt in range(2):
        expected = plain_confidence(errors[prompt].tolist(), sigma.tolist())
        np.testing.assert_allclose(rewards[prompt].mean(1), expected, rtol=1e-9)


def test_pictures_that_are_alike_have_no_confidence_in_either():
    rewards = confidence(torch.full((2, 5, 8), .1), torch.full((5,), .5))
    assert (rewards == 0).all()


def test_the_unit_of_a_timesteps_errors_does_not_matter(rng):
    """So a model may predict the velocity, whose error is the noise's over abar."""
    errors = torch.rand(8, 5, 8, generator=rng).double()
    sigma = torch.full((5,), .5)
    abar = torch.tensor([.2, .4, .6, .8, .9])[:, None]
    torch.testing.assert_close(confidence(errors / abar, sigma), confidence(errors, sigma),
                               rtol=1e-4, atol=1e-5)


def test_the_share_of_noise_is_a_flow_models_time(rng):
    """Divided by the sum of its weights, x_t of a VP schedule is (1 - t) x_0 + t eps."""
    abar = torch.tensor([.05, .3, .9])
    x_0, eps = torch.randn(2, 3, generator=rng)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    time = share_of_noise(abar)
    flow = (1 - time) * x_0 + time * eps
    torch.testing.assert_close(flow, x_t / (abar.sqrt() + (1 - abar).sqrt()))


# ---- root errors ----

def test_the_reward_by_root_errors_equals_a_plain_computation(rng):
    error, anchor_error = torch.rand(2, 3, 8, 10, generator=rng).double()
    rewards = root_reward(error, anchor_error, 5000.)
    assert rewards.shape == (3, 8, 10)

    roots = [math.sqrt(value) for value in anchor_error[1].flatten().tolist()]
    saved = math.sqrt(float(anchor_error[1, 4, 7])) - math.sqrt(float(error[1, 4, 7]))
    expected = 5000 * sum(roots) / len(roots) * saved
    assert float(rewards[1, 4, 7]) == pytest.approx(expected, rel=1e-9)


def test_near_the_anchor_root_errors_are_equation_8_by_another_weight(rank, rng):
    anchor_error = torch.rand(8, 3, generator=rng).double() + .1
    error = anchor_error * (1 + 1e-4 * torch.randn(8, 3, generator=rng).double())
    weight = anchor_error.sqrt().mean() / anchor_error.sqrt()
    expected = weight * rank.implicit_reward(error, anchor_error, 5000.)
    torch.testing.assert_close(root_reward(error, anchor_error, 5000.), expected, rtol=1e-3,
                               atol=1e-6)


def test_a_round_is_ranked_by_root_errors(mini, tmp_path):
    run = shutil.copytree(mini, tmp_path / "run")
    (run / "iter1/pairs.parquet").unlink()
    s = configure(run, reward_weights="root")
    assert call("03", run, "--iter", "1") is None
    draws, of_paper = table_of(run, "draws"), table_of(mini, "draws")
    np.testing.assert_allclose(draws.error, of_paper.error, rtol=1e-5)

    for _, of_prompt in draws.groupby("prompt_id"):
        root = np.sqrt(of_prompt.anchor_error)
        expected = s.beta * root.mean() * (root - np.sqrt(of_prompt.error))
        np.testing.assert_allclose(of_prompt.reward, expected, rtol=1e-3, atol=1e-3)


# ---- self-confidence in a run ----

@pytest.fixture(scope="module")
def confident(mini, tmp_path_factory):
    """A miniature run whose first round has been ranked by self-confidence; and its settings."""
    run = shutil.copytree(mini, tmp_path_factory.mktemp("runs") / "confident")
    (run / "iter1/pairs.parquet").unlink()
    s = configure(run, reward="self-confidence")
    assert call("03", run, "--iter", "1") is None
    return run, s


def table_of(run, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / f"iter1/{name}.parquet")


def plain_errors(run, s, image, prompt: str, key: tuple) -> list[list[float]]:
    """A picture's errors [timestep][noise] by Iter0, forward by forward."""
    unet = UNet2DConditionModel.from_pretrained(run / "iter0/unet")
    embeds = PromptEncoder(s)([prompt])["embeds"]
    abar = DDIMScheduler.from_pretrained(s.model, subfolder="scheduler").alphas_cumprod
    x_0 = load_file(latent_path(image))["mean"]

    # Ten steps of DDIM, counted from 1; the later half but the last.
    noises = torch.randn((5, 4, *x_0.shape), generator=generator(s.seed, "confidence", *key))
    errors = []
    for step, t in enumerate((501, 401, 301, 201, 101)):
        of_step = []
        for sign in (1, -1):
            for noise in sign * noises[step]:
                x_t = abar[t] ** .5 * x_0 + (1 - abar[t]) ** .5 * noise
                with torch.no_grad():
                    output = unet(x_t[None], t, embeds).sample[0]
                of_step.append((output - noise).square().mean().item())
        errors.append(of_step)
    return errors


def test_a_prompt_is_ranked_as_a_plain_loop_ranks_it(confident):
    run, s = confident
    rewards = table_of(run, "rewards")
    rewards = rewards[rewards.prompt_id == rewards.prompt_id.iloc[-1]]
    errors = []
    for candidate in rewards.itertuples():
        key = (1, int(candidate.prompt_id))
        errors.append(plain_errors(run, s, run / candidate.image, candidate.prompt, key))

    abar = DDIMScheduler.from_pretrained(s.model, subfolder="scheduler").alphas_cumprod
    sigma = []
    for t in (501, 401, 301, 201, 101):
        noise, signal = float(1 - abar[t]) ** .5, float(abar[t]) ** .5
        sigma.append(noise / (noise + signal))
    np.testing.assert_allclose(rewards.reward, plain_confidence(errors, sigma), atol=1e-3)


def test_its_tables_are_those_of_the_papers_reward_without_an_anchor(mini, confident):
    run, _ = confident
    for name in ("draws", "holdout_draws"):
        draws, of_paper = table_of(run, name), table_of(mini, name)
        assert list(draws.columns) == list(of_paper.columns)
        assert draws.anchor_error.isna().all()
        assert draws.error.gt(0).all()
        assert sorted(set(draws.t)) == [101, 201, 301, 401, 501]

    pairs, rewards = table_of(run, "pairs"), table_of(run, "rewards")
    by_prompt = rewards.groupby("prompt_id").reward
    assert set(pairs.win) == set(rewards.image[by_prompt.idxmax()])
    assert set(pairs.lose) == set(rewards.image[by_prompt.idxmin()])
    assert set(pairs.source) == {"self-confidence"}


def test_it_is_measured_on_the_held_out_pairs(confident):
    run, _ = confident
    draws = table_of(run, "holdout_draws")
    reward = draws.groupby(["pair_id", "side"]).reward.mean().unstack()
    right = (reward.win > reward.lose).mean()
    assert judge_of(run, 1)["accuracy"] == pytest.approx(right)
    assert judge_of(run, 1)["reward"] == "self-confidence"


def test_the_plan_counts_its_forwards(confident):
    run, s = confident
    ledger = pd.read_parquet(run / "ledger.parquet")
    last = ledger[(ledger.stage == "03_rank") & (ledger.iter == 1)].iloc[-1]
    assert last.unet_forwards == count_ranking(s, 1)["unet_forwards"]
    assert last.unet_forwards == (3 * 4 + 2 * 6) * self_confidence.PROBES


def test_the_question_judge_has_it_beside_the_papers_reward(mini, confident):
    run, s = confident
    table = judge.measure(judge.read_round(mini, 1), {"self-confidence": run})
    table = table.set_index("draws")
    assert table.accuracy["self-confidence"] == pytest.approx(judge_of(run, 1)["accuracy"])
    assert table.forwards["self-confidence"] == self_confidence.PROBES
    assert table.forwards[judge.ALL] == 2 * s.draws

    # Its best and worst of each prompt are its pairs.
    pairs = table_of(run, "pairs")
    utility = {side: people.score(list(pairs.prompt), read_pictures(run, pairs[side]))["utility"]
               for side in ("win", "lose")}
    apart = (utility["win"] - utility["lose"]).mean().item()
    assert table.gap["self-confidence"] == pytest.approx(apart, abs=1e-6)


# ---- cheaper candidates ----

@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")   # diffusers' own
def test_cheaper_candidates_are_those_of_the_pipeline_with_that_sampler(mini, tmp_path):
    run = shutil.copytree(mini, tmp_path / "run")
    for name in ("candidates.parquet", "images", "latents"):
        path = run / "iter1" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    s = configure(run, candidate_sampler="dpmsolver", candidate_steps=2)
    assert call("02", run, "--iter", "1") is None
    row = table_of(run, "candidates").iloc[5]

    unet = UNet2DConditionModel.from_pretrained(run / "iter0/unet")
    pipe = StableDiffusionPipeline.from_pretrained(s.model, unet=unet, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(int(row.seed)))
    drawn = pipe(row.prompt, latents=noise, num_inference_steps=2, guidance_scale=s.cfg_scale,
                 output_type="latent").images[0]
    kept = load_file(latent_path(run / row.image))["mean"]
    torch.testing.assert_close(kept, drawn, rtol=1e-3, atol=1e-3)

    # Twice a step, and the plan knows.
    ledger = pd.read_parquet(run / "ledger.parquet")
    last = ledger[(ledger.stage == "02_generate") & (ledger.iter == 1)].iloc[-1]
    assert last.unet_forwards == 12 * 2 * 2
    assert last.unet_forwards == count_candidates(s, 1)["unet_forwards"]


def test_human_pairs_and_evaluation_are_not_cheaper():
    s = Settings(candidate_sampler="dpmsolver", candidate_steps=3)
    assert (of_candidates(s).sampler, of_candidates(s).sample_steps) == ("dpmsolver", 3)
    assert of_candidates(Settings()) == Settings()
    assert count_seed(s) == count_seed(Settings())
    assert count_evaluation(s, 2) == count_evaluation(Settings(), 2)

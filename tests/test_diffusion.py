"""The textbook page: denoising errors and sampling, against plain computations of their own."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_batch, tiny_unet
from diffusers import (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       EulerDiscreteScheduler)

from lib import models
from lib.diffusion import denoising_error, join, predict, repeat, sample
from lib.settings import Settings

# The noise schedule of Stable Diffusion.
SCHEDULE = {"beta_start": .00085, "beta_end": .012, "beta_schedule": "scaled_linear"}


def abar_of_sd() -> torch.Tensor:
    """The signal's variance that is left at each of 1,000 timesteps, in float64."""
    betas = torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


# ---- denoising errors ----

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_denoising_error_is_the_mean_square_to_the_target(rng, prediction):
    unet = tiny_unet()
    schedule = DDPMScheduler(**SCHEDULE, prediction_type=prediction)
    x_0, noise, t, condition = random_batch(rng, 4)
    with torch.no_grad():
        errors = denoising_error(unet, schedule, x_0, t, noise, condition)

    # Picture by picture, in float64.
    abar = abar_of_sd()
    for i in range(4):
        signal, spread = abar[t[i]].sqrt(), (1 - abar[t[i]]).sqrt()
        latent, eps = x_0[i].double(), noise[i].double()
        x_t = signal * latent + spread * eps
        target = eps
        if prediction == "v_prediction":
            target = signal * eps - spread * latent
        with torch.no_grad():
            output = unet(x_t[None].float(), t[i], condition["embeds"][i:i + 1]).sample[0]
        expected = float(((target - output.double()) ** 2).sum()) / (4 * 8 * 8)
        assert errors[i].item() == pytest.approx(expected, rel=1e-4)


def test_denoising_errors_are_float32_whatever_the_model_is_in(rng):
    x_0, noise, t, condition = random_batch(rng, 2)
    unet = tiny_unet().to(torch.bfloat16)
    errors = denoising_error(unet, DDPMScheduler(**SCHEDULE), x_0, t, noise, condition)
    assert errors.dtype == torch.float32


def test_identical_models_have_reward_zero(rank, rng):
    x_0, noise, t, condition = random_batch(rng, 8)
    schedule = DDPMScheduler(**SCHEDULE)
    with torch.no_grad():
        error = denoising_error(tiny_unet(), schedule, x_0, t, noise, condition)
        anchor_error = denoising_error(tiny_unet(), schedule, x_0, t, noise, condition)
    assert (rank.implicit_reward(error, anchor_error, 5000.) == 0).all()


def test_other_models_have_another_error(rng):
    x_0, noise, t, condition = random_batch(rng, 8)
    schedule = DDPMScheduler(**SCHEDULE)
    with torch.no_grad():
        error = denoising_error(tiny_unet(0), schedule, x_0, t, noise, condition)
        other = denoising_error(tiny_unet(1), schedule, x_0, t, noise, condition)
    assert (error != other).all()


# ---- conditions ----

def test_sdxl_is_told_the_size_of_an_uncropped_picture(rng):
    """Height and width, the corner of the crop, height and width: of 64 pixels for 8 latents."""
    class Unet:
        def parameters(self):
            yield torch.zeros(1)

        def __call__(self, x_t, t, embeds, added_cond_kwargs):
            self.told = added_cond_kwargs
            return SimpleNamespace(sample=x_t)

    unet = Unet()
    x_t, _, t, condition = random_batch(rng, 2)
    pooled = torch.randn(2, 6, generator=rng)
    predict(unet, x_t, t, condition | {"pooled": pooled})
    assert unet.told["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert torch.equal(unet.told["text_embeds"], pooled)


def test_repeat_keeps_the_copies_of_a_row_together():
    condition = {"embeds": torch.tensor([[1, 2], [3, 4]]), "pooled": torch.tensor([5, 6])}
    repeated = repeat(condition, 2)
    assert repeated["embeds"].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert repeated["pooled"].tolist() == [5, 5, 6, 6]


def test_join_puts_conditions_one_after_the_other():
    joined = join({"embeds": torch.tensor([1, 2])}, {"embeds": torch.tensor([3])})
    assert joined["embeds"].tolist() == [1, 2, 3]


# ---- sampling ----

def ddim() -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULE, clip_sample=False)


@pytest.fixture
def empty(rng) -> dict[str, torch.Tensor]:
    """The condition of no prompt."""
    return {"embeds": torch.randn(1, 5, 8, generator=rng)}


@pytest.mark.parametrize("cfg_scale", [0., .5, 1., 3.])
def test_samples_are_those_of_a_plain_ddim_loop(rng, empty, cfg_scale):
    """DDIM (Song et al. 2021, equation 12, without noise) from t = 750, 500, 250 and 0."""
    unet = tiny_unet()
    _, noise, _, condition = random_batch(rng, 2)
    drawn = sample(unet, ddim(), noise, condition, empty, 4, cfg_scale, [])

    abar = abar_of_sd()
    for i in range(2):
        x_t = noise[i:i + 1].double()
        for t in (750, 500, 250, 0):
            with torch.no_grad():
                with_prompt = unet(x_t.float(), t, condition["embeds"][i:i + 1]).sample.double()
                without = unet(x_t.float(), t, empty["embeds"]).sample.double()
            eps = without + max(1., cfg_scale) * (with_prompt - without)     # 1 or less is off
            x_0 = (x_t - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            abar_next = abar[t - 250] if t else torch.ones(())
            x_t = abar_next.sqrt() * x_0 + (1 - abar_next).sqrt() * eps
        assert torch.allclose(drawn[i].double(), x_t[0], atol=1e-4 * x_t.abs().max())


@pytest.mark.parametrize("cfg_scale, pictures", [(0., 2), (.5, 2), (1., 2), (3., 4)])
def test_only_guidance_shows_the_model_every_latent_twice(rng, empty, cfg_scale, pictures):
    sizes = []
    unet = tiny_unet()
    unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    _, noise, _, condition = random_batch(rng, 2)
    sample(unet, ddim(), noise, condition, empty, 3, cfg_scale, [])
    assert sizes == [pictures] * 3


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")   # diffusers' own
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_sample_does_not_depend_on_the_others_in_its_batch(rng, empty, scheduler):
    """Neither on their noise nor, where a step adds noise, on their generators."""
    unet = tiny_unet()
    _, noise, _, condition = random_batch(rng, 3)

    def draw(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        part = {"embeds": condition["embeds"][rows]}
        steps = scheduler(**SCHEDULE)
        return sample(unet, steps, noise[rows], part, empty, 3, 2., generators)

    together, alone = draw([0, 1, 2]), draw([2])
    assert torch.allclose(together[2], alone[0], atol=1e-4)
    assert not torch.allclose(together[1], together[2], atol=1e-2)


@pytest.mark.parametrize("name", models.SAMPLERS)
def test_no_sampler_clips_latents(tmp_path, name):
    """A model saved with a sampler that has no such option leaves it to the default: to clip."""
    saved = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    saved.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    config = models.load_sampler(Settings(model=str(tmp_path), sampler=name)).config
    assert not config.get("clip_sample")
    assert config.prediction_type == "v_prediction"

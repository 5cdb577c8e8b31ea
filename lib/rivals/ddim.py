"""The steps of DDIM with eta 1 as what SPO needs of them: Gaussians that can be drawn from and asked.

A step leads from x_t to x_{t-1}, which is drawn from N(mean, sigma^2) (Song et al. 2021, equations
12 and 16); with eta 1 its noise is that of DDPM.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from lib import models
from lib.diffusion import join, predict, repeat
from lib.settings import Settings

# SPO's sampler has so many steps (the run's, if these are fewer), and walks the first fifth of them
# without a fork.
MOST_STEPS = 20
UNFORKED = 1 / 5


# ---- pure functions of tensors ----

def ddim_step(
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    abar: torch.Tensor,
    abar_prev: torch.Tensor,
    prediction_type: str = "epsilon",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Gaussian of a step from x_t.

    Prediction and x_t are (B, C, h, w), abar and abar_prev (B,) -> mean (B, C, h, w), sigma (B,).
    """
    abar, abar_prev = abar[:, None, None, None], abar_prev[:, None, None, None]
    if prediction_type == "v_prediction":
        prediction = abar.sqrt() * prediction + (1 - abar).sqrt() * x_t

    x_0 = (x_t - (1 - abar).sqrt() * prediction) / abar.sqrt()
    variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    mean = abar_prev.sqrt() * x_0 + (1 - abar_prev - variance).sqrt() * prediction
    return mean, variance.sqrt().flatten()


def step_log_prob(x_prev: torch.Tensor, mean: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """log p(x_{t-1} | x_t), its mean over C, h, w: (B, C, h, w), (B, C, h, w), (B,) -> (B,)."""
    sigma = sigma[:, None, None, None]
    log_prob = -.5 * ((x_prev - mean) / sigma).square() - sigma.log() - .5 * math.log(2 * math.pi)
    return log_prob.mean((1, 2, 3))


# ---- the sampler's steps ----

class Steps(NamedTuple):
    """The steps of the sampler, from noise to picture: each tensor is (S,)."""
    t: torch.Tensor
    t_prev: torch.Tensor            # where a step leads; 0 after the last
    abar: torch.Tensor
    abar_prev: torch.Tensor
    kind: str                       # the prediction's

    def forks(self, number: int) -> bool:
        """Whether a step draws candidates; one without noise has but one."""
        unforked = round(len(self.t) * UNFORKED)
        has_noise = bool(self.abar_prev[number] < 1)
        return number >= unforked and has_noise


def steps_of(s: Settings) -> Steps:
    """The steps of DDIM on the base's noise schedule."""
    sampler = models.load_sampler(replace(s, sampler="ddim"))
    sampler.set_timesteps(min(MOST_STEPS, s.sample_steps))
    t = sampler.timesteps
    abar = sampler.alphas_cumprod[t]

    # diffusers' own last step ends at this share of signal.
    last = sampler.final_alpha_cumprod.reshape(1)
    return Steps(
        t=t,
        t_prev=torch.cat([t[1:], torch.zeros_like(t[:1])]),
        abar=abar,
        abar_prev=torch.cat([abar[1:], last]),
        kind=sampler.config.prediction_type,
    )


def step_gaussian(
    s: Settings,
    unet,
    steps: Steps,
    numbers: torch.Tensor,
    x_t: torch.Tensor,
    condition: dict,
    empty: dict,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, C, h, w) and sigma (B,) of the steps `numbers` (B,) from x_t, with guidance inside.

    `empty` is the condition (1, ...) of no prompt.
    """
    device = x_t.device
    t = steps.t[numbers].to(device)
    if s.cfg_scale > 1:
        both = join(repeat(empty, len(x_t)), condition)
        output = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        without, with_prompt = output.chunk(2)
        prediction = without + s.cfg_scale * (with_prompt - without)
    else:
        prediction = predict(unet, x_t, t, condition)

    abar = steps.abar[numbers].to(device)
    abar_prev = steps.abar_prev[numbers].to(device)
    return ddim_step(prediction, x_t, abar, abar_prev, steps.kind)


def forwards_of_step(s: Settings, pictures: int) -> int:
    """UNet forwards of one step for so many pictures: guidance asks twice."""
    if s.cfg_scale > 1:
        return 2 * pictures
    return pictures

"""SOLACE's self-confidence, a rival self-judge (--reward self-confidence; not in the paper).

Kim and Cho (CVPR 2026, arXiv 2603.00918) reward a model for pictures of its own that it is
confident of: noised again, it tells their noise well. No anchor is asked, and no label has taught
it what people like.

    s_t = -log( mean over K of ||eps_hat(x_t, y, t) - eps||^2 + 1e-6 )
    C   = mean over t of sigma (1 - sigma) z(s_t)

K = 8 noises come as mirrored pairs (eps, -eps), without guidance; t are the later half of the
sampler's steps, its less noisy ones; z is the z-score, timestep by timestep, over the pictures that
are compared. So far scripts/train_sd3_self.py of wookiekim/flow_grpo_self, for a flow model, whose
t is its noise's share: x_t = (1 - t) x_0 + t eps. What had to be chosen here:

- sigma of a timestep is that share, sqrt(1 - abar) / (sqrt(abar) + sqrt(1 - abar)), since
  sqrt(abar) x_0 + sqrt(1 - abar) eps divided by its two weights' sum is a flow's x_t.
- the steps are those of their training, 10 whatever the preset samples with, of which they take
  the numbers 4 to 8, counted from 0: 40 forwards a picture, where the paper's reward takes 20.
- the pictures compared are a prompt's candidates, or the two of a held-out pair. Theirs are one
  device's batch, 9 pictures of several prompts, and their sums over it are divided by the number of
  timesteps; the paper's text says z-score, and so does this file.
"""

import functools

import torch

from lib import models
from lib.run import generator
from lib.settings import Settings

STEPS = 10                      # of the sampler
PROBED = slice(4, 9)            # its later half, but for the last step, whose picture is clean
NOISES = 8                      # at each of these
PROBES = 5 * NOISES             # forwards a picture


def confidence(errors: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The rewards (..., N, T) of N pictures that are compared, timestep by timestep.

    errors (..., N, T, K) are the mean squared errors of the noise at T timesteps with K noises
    each, sigma (T,) the noise's share there. A picture's reward is the mean over T.
    """
    score = -(errors.mean(-1) + 1e-6).log()                                     # (..., N, T)

    # So that no timestep drowns the others.
    mean = score.mean(-2, keepdim=True)
    spread = score.std(-2, keepdim=True, correction=0).clamp_min(1e-6)
    return sigma * (1 - sigma) * (score - mean) / spread


def share_of_noise(abar: torch.Tensor) -> torch.Tensor:
    """What a flow model calls its time, from the share abar of the signal's variance."""
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    return noise / (signal + noise)


@functools.cache
def probed_timesteps(s: Settings) -> torch.Tensor:
    """The timesteps (T,) at which the model is asked."""
    sampler = models.load_sampler(s)
    sampler.set_timesteps(STEPS)
    return sampler.timesteps[PROBED].long()


def probes(
    s: Settings,
    key: tuple,
    shape: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (T*K,) and noise (T*K, C, h, w), shared by all pictures compared under one key."""
    t = probed_timesteps(s)
    rng = generator(s.seed, "confidence", *key)
    noise = torch.randn((len(t), NOISES // 2, *shape), generator=rng)

    # Every noise is asked with its mirror image.
    noise = torch.cat([noise, -noise], dim=1)                                # (T, K, C, h, w)
    return t.repeat_interleave(NOISES), noise.flatten(0, 1)


def draws_of(s: Settings, t: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Stage 03's Draws from timesteps (P, T*K) and errors (P, N, T*K) at these probes.

    A timestep is one draw, whose error is the mean over its eight noises: t (P, T), error, a
    missing anchor_error and reward, all (P, N, T).
    """
    t = t[:, ::NOISES]                                                          # (P, T)
    errors = errors.unflatten(2, (-1, NOISES))                                  # (P, N, T, K)

    # All comparisons have the same timesteps. Where the model predicts the velocity its error is
    # the noise's over abar, a factor that the z-score takes away again.
    abar = models.load_schedule(s).alphas_cumprod[t[0]]
    reward = confidence(errors, share_of_noise(abar))
    return t, errors.mean(3), torch.full_like(reward, float("nan")), reward

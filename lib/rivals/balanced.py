"""Balanced draws, an ablation of stage 03 (--reward-weights balanced; not in the paper).

The spread of one draw's reward grows with its denoising error, twentyfold from high to low t: in
the plain mean of equation 8 the low timesteps drown the others, and it is at high t that the
self-judge knows most. Here each draw is measured against the anchor's own error at that draw, so
that all of them speak equally loud.
"""

import torch


def balance(anchor_error: torch.Tensor) -> torch.Tensor:
    """Weights (..., 1, D), of mean 1 over the D draws, for anchor errors (..., N, D).

    A draw's weight is the inverse of its error, which is the mean over the N candidates.
    """
    weights = 1 / anchor_error.mean(-2, keepdim=True)

    # Of mean 1, so that the rewards keep their scale.
    return weights / weights.mean(-1, keepdim=True)

"""MaPO, a rival row of the table (--loss mapo): preference alignment without a reference model.

Hong et al. 2024. With e the policy's denoising error, the same t and noise for both pictures of a
pair,

    phi(e) = s e / (exp(s e) - 1),    which falls from 1 at e = 0
    L = e(x_w) - beta log sigmoid(T (phi(e(x_w)) - phi(e(x_l))))

so the winner is also learned as in ordinary fine-tuning. beta, s and T are those that its authors
train with.
"""

import torch
import torch.nn.functional as F

BETA = .1
S = .5
T = 1000.


def mapo_loss(win: torch.Tensor, lose: torch.Tensor, ref_win: torch.Tensor, ref_lose: torch.Tensor,
              beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors (B,) of the policy -> loss (B,), margin (B,).

    It takes what stage 04's dpo_loss takes, and has no use for the reference's errors nor for that
    beta.
    """
    margin = T * (phi(win) - phi(lose))
    preference = BETA * F.logsigmoid(margin)
    return win - preference, margin


def phi(error: torch.Tensor) -> torch.Tensor:
    """s e / (exp(s e) - 1) of errors (B,), also where e is 0."""
    return scaled(error) / torch.expm1(scaled(error))


def scaled(error: torch.Tensor) -> torch.Tensor:
    """s e, kept off zero: there the ratio has a limit, but floating point has none."""
    return (S * error).clamp_min(1e-12)

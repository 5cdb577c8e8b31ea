"""Root errors, a self-judge that hears more of the draws (--reward-weights root; not in the paper).

Equation 8 takes the difference of the two models' mean squared errors, and a squared error is
spread the more the larger it is: a few loud draws, and pictures that are hard to denoise, drown the
rest. Between roots of the errors the spread is more even, picture by picture and draw by draw,
where balanced.py weighs a draw for all pictures alike.

    r = beta s [ sqrt(e_anchor) - sqrt(e_theta) ]

It is meant for high noise, --rank-t-min 500: below, it ranks a prompt's candidates as wrongly as
the difference does. Its gain over the difference there, in choosing, is in part not the model's
taste: pictures that the anchor itself finds hard gain by the root, and in the embedded world people
like these (the anchor's error alone orders a prompt's candidates two thirds as well). Models that
are trained by it come no further than by the plain difference above t = 500 (lib/study).
"""

import torch


def root_reward(error: torch.Tensor, anchor_error: torch.Tensor, beta: float) -> torch.Tensor:
    """Rewards (..., N, D) from the errors (..., N, D) of model and anchor, for N candidates.

    s is their anchor's mean root error, so that the rewards keep their scale: where two errors
    hardly differ a reward is that of equation 8 times s over the anchor's root error.
    """
    anchor_root = anchor_error.sqrt()
    s = anchor_root.mean((-2, -1), keepdim=True)                                # (..., 1, 1)
    return beta * s * (anchor_root - error.sqrt())

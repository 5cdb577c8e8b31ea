"""Two free controls for the table: a trained model's update, gone further without training.

    extrapolate:Iter0:2      weights      base + 2 (Iter0 - base)
    guide:Iter0:1.5          prediction   Iter0 + 1.5 (Iter0 - base)

A round of SAIL should gain more than Iter0 gains by such a step alone. Stage 05 takes these texts
in `--row NAME=WHERE`; lib/eval/rows.py comes here for them. Nothing here draws or scores pictures.
"""

import re
from types import SimpleNamespace
from typing import NamedTuple

import torch

from lib import models
from lib.models import BASE
from lib.run import UserError
from lib.settings import Settings

FORM = re.compile(r"(extrapolate|guide):Iter(\d+):(-?\d+\.?\d*|\.\d+)")


class Control(NamedTuple):
    """A control as its text names it."""
    kind: str                    # "extrapolate" or "guide"
    k: int                       # the model of the run whose update goes further
    amount: float                # gamma of the weights, or w of the predictions


def parse_control(where: str) -> Control | None:
    """Read `extrapolate:IterK:GAMMA` or `guide:IterK:W`; any other text gives None.

    A text that begins as a control and does not go on as one raises a UserError.
    """
    if not where.startswith(("extrapolate:", "guide:")):
        return None

    match = FORM.fullmatch(where)
    if not match:
        raise UserError(f"--row {where}: give extrapolate:IterK:GAMMA or guide:IterK:W, "
                        f"say extrapolate:Iter0:2")
    return Control(match[1], int(match[2]), float(match[3]))


def load_control(s: Settings, control: Control) -> torch.nn.Module:
    """Load what paints a control's pictures: a UNet, or two that answer as one."""
    if control.kind == "extrapolate":
        return extrapolated(s, control.k, control.amount)

    unet = models.load_unet(s, control.k)
    base = models.load_unet(s, BASE)
    return Guided(unet, base, control.amount)


def extrapolated(s: Settings, k: int, gamma: float) -> torch.nn.Module:
    """Load the UNet with weights base + gamma (model K - base), frozen, in dtype_of(s).

    The sum is taken in float32; gamma 0 gives the base and 1 gives model K, to the bit.
    """
    base = models.load_unet(s, BASE, trained=True)
    model = models.load_unet(s, k, trained=True)

    # weight <- weight + gamma (further - weight), in place
    with torch.no_grad():
        for weight, further in zip(base.parameters(), model.parameters()):
            weight.lerp_(further, gamma)

    return models.to_device(s, base.requires_grad_(False).eval().to(models.dtype_of(s)))


class Guided(torch.nn.Module):
    """A UNet that predicts eps_theta + w (eps_theta - eps_base).

    It does so with the prompt and without it alike, so classifier-free guidance acts on top. It is
    called as a diffusers UNet is, and answers with `.sample` (B, C, h, w).
    """

    def __init__(self, unet: torch.nn.Module, base: torch.nn.Module, weight: float):
        super().__init__()
        self.unet = unet
        self.base = base
        self.weight = weight
        self.config = unet.config

    def forward(self, *inputs, **options) -> SimpleNamespace:
        # Both see the same x_t, t and prompt.
        eps_theta = self.unet(*inputs, **options).sample
        eps_base = self.base(*inputs, **options).sample
        return SimpleNamespace(sample=eps_theta + self.weight * (eps_theta - eps_base))

"""SAIL*, a row of the table (--start): the rounds begin from a model that is given, not from Iter0.

The paper starts from the full DiffusionDPO model; any UNet of the base's architecture will do.
"""

from dataclasses import replace

from lib.eval.rows import load_unet_at
from lib.settings import Settings


def load_start(s: Settings):
    """The given UNet in float32, on the device."""
    # It is to be trained, and trained weights are in float32 always.
    in_float32 = replace(s, dtype="float32")
    return load_unet_at(in_float32, s.start)

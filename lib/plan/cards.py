"""Cards that a plan can be made for without having one: `--plan --gpu a100`.

No card is asked. The hours follow from a card's arithmetic and bandwidth, as its vendor
states them, and from the share of it that was reached on an H100; `--plan` on the card itself
measures them.
"""

from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from lib import models
from lib.plan.architecture import Architecture, count_flops, pair_arithmetic, without_weights
from lib.settings import PRESETS, Settings


@dataclass(frozen=True)
class Card:
    """What a vendor states of a card."""

    name: str
    tflops: float               # dense 16-bit tensor arithmetic, summed in float32
    memory_gb: float            # 1e9 bytes, as `in_gb` prints them
    gb_per_second: float        # to and from its memory
    dtype: str = "bfloat16"     # the 16-bit numbers that it is fast on


# Datasheets state many of these "with sparsity": that is twice what stands here. Consumer cards are
# also stated with sums in float16, twice as fast: PyTorch sums in float32.
CARDS = {
    # NVIDIA B200 datasheet (HGX, per GPU).
    "b200": Card("NVIDIA B200", 2250, 180, 7700),
    # NVIDIA H200 and H100 datasheets, SXM; the PCIe card has 756 TFLOP/s and 2,000 GB/s.
    "h200": Card("NVIDIA H200", 989, 141, 4800),
    "h100": Card("NVIDIA H100 SXM", 989, 80, 3350),
    # NVIDIA A100 datasheet, SXM.
    "a100": Card("NVIDIA A100 80GB", 312, 80, 2039),
    "a100-40": Card("NVIDIA A100 40GB", 312, 40, 1555),
    # NVIDIA L40S and A10 datasheets.
    "l40s": Card("NVIDIA L40S", 362, 48, 864),
    "a10": Card("NVIDIA A10", 125, 24, 600),
    # NVIDIA RTX A6000: the GA102 whitepaper; datasheet.
    "a6000": Card("NVIDIA RTX A6000", 154.8, 48, 768),
    # NVIDIA's architecture whitepapers: RTX Blackwell, Ada, GA102.
    "5090": Card("NVIDIA RTX 5090", 209.5, 32, 1792),
    "4090": Card("NVIDIA RTX 4090", 165.2, 24, 1008),
    "3090": Card("NVIDIA RTX 3090", 71, 24, 936),
    # NVIDIA V100 (SXM2, 32 GB) and T4 datasheets: no bfloat16.
    "v100": Card("NVIDIA V100 32GB", 125, 32, 900, "float16"),
    "t4": Card("NVIDIA T4", 65, 16, 320, "float16"),
    # AMD Instinct MI300X and MI250X datasheets; of the latter one of its two dies, as PyTorch
    # sees it.
    "mi300x": Card("AMD Instinct MI300X", 1307, 192, 5300),
    "mi250x": Card("AMD Instinct MI250X, one die", 191.5, 64, 1638),
}

# The card that stands in where there is none.
DEFAULT = "h100"

# How much of a card's stated arithmetic is done (model FLOP utilisation): rate x FLOP / 989e12 on
# an H100 at the presets' batches, in bfloat16 (tests/bench/RESULTS.md). `eager` and `compiled` are
# a frozen UNet's forward, `pair` is training (SD1.5 contiguous and without the optimizer's step,
# SDXL with it and in channels_last). Where a setting of MEASURED is another, or the card, it is
# ASSUMED.
SHARES = {
    "sd15": {"encode": .16, "decode": .10, "eager": .27, "compiled": .39, "pair": .18},
    "sdxl": {"encode": .13, "decode": .11, "eager": .39, "compiled": .46, "pair": .22},
}
MEASURED = ("model", "resolution", "lora_rank", "grad_checkpoint", "micro_batch", "rank_batch",
            "sample_batch")

# float32 on tensor cores (TF32) has half of the 16-bit speed; before Ampere there is none, and
# plain float32 has an eighth.
FLOAT32 = {"bfloat16": 1 / 2, "float16": 1 / 8}

# An optimizer's step with clipping is bound by the card's memory: bytes moved for each trained
# weight, which are the H100's seconds times its 3.35 TB/s. By arithmetic AdamW moves 40; Adafactor,
# which is not fused, goes over the gradient again and again.
BYTES_OF_STEP = {"adamw": 69, "adafactor": 620}


class Estimate:
    """What Probe measures, without the card: the same attributes, from the vendor's numbers."""

    def __init__(self, s: Settings, architecture: Architecture, card: Card):
        self.s = s
        self.architecture = architecture
        self.card = card
        self.where = card.name
        self.device = torch.device("cuda")
        self.dtype = models.dtype_of(s)
        self.capacity = card.memory_gb * 1e9
        self.peak: dict[str, int] = {}
        self.counted: dict[str, float] = {}

        unet = without_weights(UNet2DConditionModel, architecture.unet)
        self.parameters = sum(parameter.numel() for parameter in unet.parameters())

        # Seconds of a picture's VAE calls and forwards, and of a pair, by arithmetic and shares.
        speed = card.tflops * 1e12
        if self.dtype == torch.float32:
            speed *= FLOAT32[card.dtype]
        shares = SHARES.get(s.preset, SHARES["sd15"])
        way = "eager" if s.compile == "off" else "compiled"
        forward = self.flops("unet") / speed / shares[way]
        self.seconds = {
            "encode": self.flops("encode") / speed / shares["encode"],
            "decode": self.flops("decode") / speed / shares["decode"],
            "sample": forward,
            "rank": forward,
            "pair": self.flops("unet") * pair_arithmetic(s) / speed / shares["pair"],
            "step": 0.,
        }

        # The optimizer's step is bound by the memory; an adapter is too small to count.
        if not s.lora_rank:
            moved = BYTES_OF_STEP[s.optimizer] * self.parameters
            self.seconds["step"] = moved / (card.gb_per_second * 1e9)

        origin = "ASSUMED, not measured"
        preset = PRESETS[s.preset]
        as_preset = s.preset in SHARES and all(getattr(s, name) == preset[name]
                                               for name in MEASURED)
        if card == CARDS["h100"] and as_preset and self.dtype == torch.bfloat16:
            origin = "as measured on an H100"
        self.notes = [
            f"{origin}: of the {card.tflops:g} TFLOP/s (dense, {card.dtype}) that its vendor "
            f"states, {shares[way]:.0%} in sampling and ranking, {shares['pair']:.0%} in training",
            "--plan on the card itself measures them; another card: --gpu " + ", ".join(CARDS),
        ]
        if card.dtype == "float16":
            self.notes.append("this card has no bfloat16: the run wants --dtype float16")

    def flops(self, what: str) -> float:
        """FLOP of a picture's "unet" forward, "encode" or "decode" at the run's resolution."""
        if what not in self.counted:
            self.counted[what] = count_flops(self.architecture, what, self.s.resolution)
        return self.counted[what]

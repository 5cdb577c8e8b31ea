"""What could be saved without changing a result: counted for the real models, and timed here.

    python -m tests.bench.bench_savings [--rounds 7] [--threads 1]

A prompt's keys and values and a step's time embedding are computed again and again from the same
numbers, and so is what the two halves of a guided step have in common before they meet the prompt.
Noise is made on the CPU, prompts are read from the disk, and scoring waits for sampling. Each is a
share of its step: by counted arithmetic for SD1.5 and SDXL as they are, and by time on this CPU for
SD1.5's layout at a quarter of its widths and 128 px and for the embedded world's own UNet.

The first three are made by layers around the model's own (`Kept`, `Once`, `Halves`). Sampling as
it is and sampling with them take turns, and given is the ratio of the fastest rounds, the lowest
and highest ratio of a round, whether the bits are the same, and how much of the time as it is
passes in the layers concerned.
Time is this process's on the processor, so that a busy machine disturbs it less. Nothing here is
used by a run.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from lib import diffusion, models, sampler
from lib.files import save_tensors
from lib.plan.architecture import (CLIP_TOKENS, SD15_UNET, SD_VAE, SDXL_UNET, Architecture,
                                   count_flops, random_inputs, without_weights)
from lib.plan.cards import CARDS, SHARES
from lib.settings import PRESETS, Settings
from tests.bench.bench_paths import SMALLER, describe, make_unet

ARCHITECTURES = {
    "sd15": Architecture(SD15_UNET, SD_VAE, CLIP_TOKENS, ""),
    "sdxl": Architecture(SDXL_UNET, SD_VAE, CLIP_TOKENS, ""),
}

# The image encoders of the four scores: PickScore's and HPSv2's, ImageReward's, aesthetics'.
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
         "num_attention_heads": 16, "patch_size": 14}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16}
ENCODERS = (VIT_H, VIT_H, VIT_L | {"patch_size": 16}, VIT_L | {"patch_size": 14})

# Pictures in a batch here, and what is timed of small things.
BATCH = {"sd15": 2, "world": 64}
REPEATS = 200


# ---- by arithmetic ----

def flops_by_module(architecture: Architecture, resolution: int) -> dict[str, float]:
    """FLOP of one picture's forward, by the module's name in the UNet; "" is the whole."""
    unet = without_weights(UNet2DConditionModel, architecture.unet)
    side = resolution // architecture.factor
    given = random_inputs(unet, architecture.tokens, side, 1, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion.predict(unet, *given)

    flops = {}
    for name, operations in counter.get_flop_counts().items():
        flops[name.removeprefix(type(unet).__name__).lstrip(".")] = sum(operations.values())
    return flops


def keys_and_values(unet) -> list[str]:
    """The layers that make a prompt's keys and values."""
    return names_ending(unet, ("attn2.to_k", "attn2.to_v"))


def time_embeddings(unet) -> list[str]:
    """The layers that make a step's time embedding, and what each block takes of it."""
    return names_ending(unet, ("time_embedding", "time_emb_proj"))


def names_ending(unet, endings: tuple[str, ...]) -> list[str]:
    """The layers whose names end so."""
    return [name for name, _ in unet.named_modules() if name.endswith(endings)]


def in_common(unet) -> list[str]:
    """The layers that a forward passes before it meets the prompt, in turn."""
    names = ["conv_in"]
    for i, block in enumerate(unet.down_blocks):
        there = f"down_blocks.{i}"
        if hasattr(block, "attentions"):
            first = f"{there}.attentions.0"
            names += [f"{there}.resnets.0", f"{first}.norm", f"{first}.proj_in"]
            return [*names, f"{first}.transformer_blocks.0.attn1"]
        names += [f"{there}.resnets.{n}" for n in range(len(block.resnets))]
        names.append(f"{there}.downsamplers.0")
    return names


def shares(preset: str) -> dict[str, float]:
    """Shares of a guided step, and of a picture or pair, of the real model."""
    s = Settings(**PRESETS[preset])
    architecture = ARCHITECTURES[preset]
    flops = flops_by_module(architecture, s.resolution)
    whole = flops[""]
    steps = s.sample_steps
    unet = without_weights(UNet2DConditionModel, architecture.unet)

    # Of the first step nothing is saved; of a guided step's two halves one.
    part = {name: share_of(flops, saving.find(unet)) for name, saving in SAVINGS.items()}
    picture = 2 * steps * whole + count_flops(architecture, "decode", s.resolution)
    return {
        "keys": part["keys"] * (steps - 1) / steps,
        "time": part["time"],
        "halves": part["halves"] / 2,
        "scores": sum(score_flops(encoder) for encoder in ENCODERS) / picture,
        "step": 2 * whole,
    }


def share_of(flops: dict[str, float], names: list[str]) -> float:
    """The share of these layers in a forward. (A norm's arithmetic is not counted.)"""
    return sum(flops.get(name, 0) for name in names) / flops[""]


def score_flops(config: dict) -> float:
    """FLOP of a score's image encoder on one picture of 224 x 224."""
    with torch.device("meta"):
        encoder = CLIPVisionModel(CLIPVisionConfig(**config, image_size=224))
        pixels = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    return counter.get_total_flops()


# ---- the savings, as modules in the place of others ----

class Kept(torch.nn.Module):
    """A layer that gives its last result again while it is given the very same tensor."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer
        self.given = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x is not self.given:
            self.given = x
            self.result = self.layer(x)
        return self.result


class Once(torch.nn.Module):
    """A layer all rows of whose input are the same: it is computed for the first, and repeated."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, *rest) -> torch.Tensor:
        return self.layer(x[:1], *rest).expand(len(x), -1)


class Halves(torch.nn.Module):
    """A layer the two halves of whose input are the same: it is computed for one, and repeated."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, *rest, **options) -> torch.Tensor:
        half = len(x) // 2
        y = self.layer(x[:half], *[rows[:half] for rows in rest], **options)
        return torch.cat([y, y])


class Saving(NamedTuple):
    """What is saved in words, which layers of a UNet it concerns, and what takes their place."""

    what: str
    find: Callable
    by: type


SAVINGS = {
    "keys": Saving("a prompt's keys and values once a picture", keys_and_values, Kept),
    "time": Saving("the time embedding once a batch", time_embeddings, Once),
    "halves": Saving("what a guided step's halves have in common once", in_common, Halves),
}


@contextlib.contextmanager
def replaced(unet: torch.nn.Module, saving: Saving) -> Iterator[None]:
    """Within it, the layers that a saving concerns stand inside its own."""
    layers = {name: unet.get_submodule(name) for name in saving.find(unet)}
    for name, layer in layers.items():
        unet.set_submodule(name, saving.by(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            unet.set_submodule(name, layer)


# ---- on this machine ----

@dataclass
class Small:
    """A UNet that this machine can run, with what `diffusion.sample` takes."""

    unet: torch.nn.Module
    scheduler: object
    tokens: int
    side: int
    batch: int
    steps: int

    def sample(self) -> torch.Tensor:
        """Guided sampling of a batch, from the same noise each time."""
        torch.manual_seed(0)
        noise, _, condition = random_inputs(self.unet, self.tokens, self.side, self.batch, "cpu")
        _, _, empty = random_inputs(self.unet, self.tokens, self.side, 1, "cpu")
        generators = [torch.Generator().manual_seed(i) for i in range(self.batch)]
        return diffusion.sample(self.unet, self.scheduler, noise, condition, empty, self.steps, 7.5,
                                generators)


def small_sd15() -> Small:
    """SD1.5's layout at a quarter of its widths, 128 px."""
    torch.manual_seed(0)
    unet = make_unet("sd15", SMALLER).eval()
    scheduler = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                              clip_sample=False)
    return Small(unet, scheduler, CLIP_TOKENS, 16, BATCH["sd15"], 5)


def embedded_world() -> Small:
    """The embedded world's own UNet, as a run of it samples, in a batch as large as its own."""
    s = Settings()
    unet = models.load_unet(s, models.BASE)
    tokens = 12
    return Small(unet, models.load_sampler(s), tokens, unet.config.sample_size, BATCH["world"],
                 s.sample_steps)


def seconds_of(work: Callable) -> float:
    """Seconds of a call that this process was on the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(small: Small, saving: Saving, rounds: int) -> str:
    """Sampling as it is over sampling with a saving, and whether the bits are the same."""
    as_it_is = small.sample()
    with replaced(small.unet, saving):
        same = torch.equal(as_it_is, small.sample())

    times, saved = [], []
    for _ in range(rounds):
        times.append(seconds_of(small.sample))
        with replaced(small.unet, saving):
            saved.append(seconds_of(small.sample))
    each = [one / other for one, other in zip(times, saved)]
    bits = "the same bits" if same else "other bits"
    return f"ratio {min(times) / min(saved):.3f} ({min(each):.3f} to {max(each):.3f}), {bits}"


@torch.no_grad()
def time_within(small: Small, names: list[str], rounds: int) -> float:
    """The share of sampling's seconds that it is inside these modules, in the median."""
    starts, inside = {}, []

    def begin(module, *_):
        starts[module] = time.process_time()

    def end(module, *_):
        inside.append(time.process_time() - starts[module])

    handles = []
    for name in names:
        module = small.unet.get_submodule(name)
        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))

    shares = []
    for _ in range(rounds):
        inside.clear()
        whole = seconds_of(small.sample)
        shares.append(sum(inside) / whole)
    for handle in handles:
        handle.remove()
    return statistics.median(shares)


def milliseconds(work: Callable) -> float:
    """Of a short call, in the median."""
    return statistics.median(seconds_of(work) for _ in range(REPEATS)) * 1e3


def noise_and_prompts(preset: str, step_flops: float) -> str:
    """What a picture's noise and a prompt's embedding take here, beside a step on a card."""
    side = PRESETS[preset]["resolution"] // 8
    noise = milliseconds(lambda: sampler.start_noise([0], (4, side, side), "cpu"))
    config = ARCHITECTURES[preset].unet
    embeds = torch.randn(CLIP_TOKENS, config["cross_attention_dim"], dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        s = Settings(**PRESETS[preset] | {"run": folder})
        encoder = models.PromptEncoder(s)
        encoder.folder.mkdir()
        save_tensors({"embeds": embeds}, encoder.path("a prompt"))
        reading = milliseconds(lambda: encoder.read_file("a prompt"))

    # The card's speed is the plan's.
    card, share = CARDS["h100"], SHARES[preset]["compiled"]
    step = step_flops / (card.tflops * 1e12 * share) * 1e3
    return (f"noise of a picture {noise:.2f} ms, a prompt's embedding read {reading:.2f} ms; a "
            f"picture's guided step {step:.1f} ms on {card.name} at {share:.0%} of its arithmetic")


def report(where: str, small: Small, rounds: int) -> None:
    """Print what each saving is worth on a small UNet."""
    architecture = Architecture(dict(small.unet.config), SD_VAE, small.tokens, "")
    flops = flops_by_module(architecture, small.side * architecture.factor)
    for name, saving in SAVINGS.items():
        names = saving.find(small.unet)
        inside = time_within(small, names, rounds)
        ratio = compare(small, saving, rounds)
        print(f"{name:7} {where}: {saving.what}: its layers are {share_of(flops, names):.2%} of "
              f"the arithmetic and {inside:.2%} of the time; {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(describe(Settings(device="cpu"), 1), flush=True)

    counted = {preset: shares(preset) for preset in ARCHITECTURES}
    for name in ("keys", "time", "halves", "scores"):
        sd15, sdxl = counted["sd15"][name], counted["sdxl"][name]
        print(f"{name:7} by arithmetic SD1.5 {sd15:.3%}, SDXL {sdxl:.3%}", flush=True)

    report("SD1.5's layout", small_sd15(), options.rounds)
    report("embedded world", embedded_world(), options.rounds)
    for preset, numbers in counted.items():
        print(f"{preset:7} {noise_and_prompts(preset, numbers['step'])}", flush=True)


if __name__ == "__main__":
    main()

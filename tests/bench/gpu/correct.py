"""Whether the card computes what the CPU computes, on the embedded world's own model.

The reference is the CPU in float32. In float32 the card sums in another order, and nothing else
differs, since tf32 is off here: distances are some 1e-6 of the value. bfloat16 keeps 8 bits,
and how far that leads is not known beforehand: the CPU's own bfloat16 says it, and the card's may
be up to three times as far off, since it rounds in other places.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lib import diffusion, models, sampler
from lib.models import BASE
from lib.plan.stages import load_stage
from lib.run import generator
from lib.settings import PRESETS, Settings
from tests.bench.gpu.results import Results
from tests.bench.gpu.scale import Scale

# Distances in float32, as shares of the value: sums of thousands of terms, a hundred layers deep. A
# reward is a difference of two errors that are a hundred times as large.
FLOAT32 = 1e-4
GRADIENT = 1e-3
REWARD = 5e-3
BFLOAT16 = 3.

PROMPTS = ["a red ring on a plain blue background", "a small green star",
           "a large yellow square on a dotted background", ""]
N, D = 8, 6                     # candidates of a prompt, draws

# What is compared, in this order, and what float32 may differ by.
QUANTITIES = {
    "denoising error": FLOAT32,
    "gradient of the error": GRADIENT,
    "implicit reward": REWARD,
    "sampled latent": GRADIENT,
    "picture": GRADIENT,
}


def exact_float32() -> None:
    """No tf32: a product of float32 numbers is one."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def world_settings(scale: Scale, name: str, **changes) -> Settings:
    return Settings(**PRESETS["tiny"] | {"run": str(scale.fresh(name))} | changes)


# ---- numbers ----

def compare_numbers(scale: Scale, results: Results) -> None:
    """The step a-numbers."""
    exact_float32()
    s = world_settings(scale, "numbers", device="cpu", dtype="float32")
    models.PromptEncoder(s).prepare(PROMPTS)
    reference = quantities_of(s)
    half = quantities_of(replace(s, dtype="bfloat16"))
    card = quantities_of(replace(s, device=scale.device))
    card_half = quantities_of(replace(s, device=scale.device, dtype="bfloat16"))

    for name, limit in QUANTITIES.items():
        results.check(f"{name}, float32", distance(card[name], reference[name]), limit,
                      "sums in another order")
        of_cpu = distance(half[name], reference[name])
        results.check(f"{name}, bfloat16", distance(card_half[name], reference[name]),
                      BFLOAT16 * of_cpu, f"{BFLOAT16:g} times the CPU's own bfloat16")
    reward = "implicit reward"
    tell_order(results, "float32", reference[reward], card[reward], must=True)
    tell_order(results, "bfloat16", reference[reward], card_half[reward])
    tell_order(results, "the CPU's bfloat16", reference[reward], half[reward])

    # What a user has who takes --dtype float32 on a card: tf32, as lib/models.py sets it.
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with_tf32 = quantities_of(replace(s, device=scale.device))
    for name in QUANTITIES:
        results.add(f"{name}, float32 with tf32", distance(with_tf32[name], reference[name]))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """|one - other| / |other|."""
    return ((one - other).norm() / other.norm()).item()


def quantities_of(s: Settings) -> dict[str, torch.Tensor]:
    """QUANTITIES by the device and in the precision of the settings.

    A reward is that of a candidate less the mean of its prompt's, since only differences count.
    """
    schedule = models.load_schedule(s)
    rng = generator("gpu bench")
    shape = models.latent_shape(s)
    x_0 = torch.randn((len(PROMPTS), N, *shape), generator=rng)
    t = torch.randint(1000, (len(PROMPTS), D), generator=rng)
    noise = torch.randn((len(PROMPTS), D, *shape), generator=rng)
    x_0, t, noise = (tensor.to(s.device) for tensor in (x_0, t, noise))
    condition = models.PromptEncoder(s)(PROMPTS)

    base = models.load_unet(s, BASE)
    found = {}
    error, found["denoising error"] = load_stage("03").errors_of_prompts(
        [nudged_base(s), base], schedule, x_0, t, noise, condition)
    rewards = load_stage("03").implicit_reward(error, found["denoising error"], s.beta).mean(2)
    found["implicit reward"] = rewards - rewards.mean(1, keepdim=True)
    found["gradient of the error"] = gradient_of_error(s, schedule, x_0[:, 0], t[:, 0],
                                                       noise[:, 0], condition)
    found["sampled latent"] = sampled(s, base, condition)
    found["picture"] = models.decode(models.load_vae(s), found["sampled latent"])
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()}


def gradient_of_error(s: Settings, *given) -> torch.Tensor:
    """As stage 04 trains: weights in float32, and autocast."""
    policy = models.load_unet(s, BASE, trained=True)
    dtype = models.dtype_of(s)
    with torch.autocast(s.device, dtype, enabled=dtype != torch.float32):
        error = diffusion.denoising_error(policy, *given)
    error.mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def nudged_base(s: Settings) -> torch.nn.Module:
    """The base with its weights moved a little, by the same numbers everywhere."""
    on_cpu = replace(s, device="cpu", dtype="float32")
    unet = models.load_unet(on_cpu, BASE)
    rng = generator("gpu bench", "nudge")
    for parameter in unet.parameters():
        size = .02 * parameter.std(correction=0)
        parameter += size * torch.randn(parameter.shape, generator=rng)
    return models.to_device(s, unet.to(models.dtype_of(s)))


def sampled(s: Settings, unet, condition: dict) -> torch.Tensor:
    """One picture of each prompt, as latents."""
    noise, generators = sampler.start_noise(list(range(len(PROMPTS))), models.latent_shape(s),
                                            s.device)
    empty = models.PromptEncoder(s).unconditional()
    return diffusion.sample(unet, models.load_sampler(s), noise, condition, empty, s.sample_steps,
                            s.cfg_scale, generators)


def tell_order(results: Results, title: str, expected: torch.Tensor, found: torch.Tensor,
               must: bool = False) -> None:
    """Whether rewards (P, N) order the candidates alike, and the same two make each pair."""
    best_and_worst = load_stage("03").best_and_worst
    differ = 0
    for one, two in zip(best_and_worst(expected), best_and_worst(found)):
        differ += (one != two).sum().item()
    share = differ / (2 * len(expected))
    name = f"winners and losers that differ, {title}"
    if must:
        results.check(name, share, 0, "nothing but the order of sums")
    else:
        results.add(name, share, "", f"a share of {2 * len(expected)}")

    # Spearman's correlation within each prompt.
    ranks = [rewards.argsort(1).argsort(1).numpy() for rewards in (expected, found)]
    correlations = [np.corrcoef(one, two)[0, 1] for one, two in zip(*ranks)]
    results.add(f"rank correlation of candidates, {title}", np.mean(correlations))


# ---- scores ----

def compare_scores(scale: Scale, results: Results) -> None:
    """The step a-scores: the four, with small towers of random weights."""
    from tests.official import waves
    exact_float32()

    # CUDA starts here: tests/conftest.py hides the card from a process that starts it later.
    torch.zeros(1, device=scale.device)
    prompts = ["a red star", "a star", "a red red star"] * 2
    images = [waves(width, 100) for width in range(90, 90 + 20 * len(prompts), 20)]
    folder = scale.fresh("scores")
    makers = {"hpsv2": small_hpsv2, "imagereward": small_imagereward,
              "pickscore": small_pickscore, "aesthetics": small_aesthetics}
    for name, make in makers.items():
        # One that cannot be had, since a package is missing, leaves the others alone.
        try:
            weights = folder / name
            weights.mkdir()
            with make(weights):
                compare_score(scale, results, name, str(weights), prompts, images)
        except (ImportError, OSError, RuntimeError) as error:
            results.fail(f"score {name}", error)


def compare_score(scale: Scale, results: Results, name: str, weights: str, prompts: list[str],
                  images: list) -> None:
    from lib.eval.scorers import load_scorer

    def scores(device: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(load_scorer(name, weights, device, dtype)(prompts, images))

    reference = scores("cpu", torch.float32)
    full = distance(scores(scale.device, torch.float32), reference)
    half = distance(scores(scale.device, torch.bfloat16), reference)
    of_cpu = distance(scores("cpu", torch.bfloat16), reference)
    results.check(f"score {name}, float32", full, FLOAT32, "sums in another order")
    results.check(f"score {name}, bfloat16", half, BFLOAT16 * of_cpu,
                  f"{BFLOAT16:g} times the CPU's own bfloat16")


@contextlib.contextmanager
def small_hpsv2(folder: Path):
    """Within it the score has the size of the weights in the folder; so with the other three."""
    from tests.official import import_hpsv2, random_hpsv2, sized_hpsv2
    import_hpsv2()
    with sized_hpsv2():
        random_hpsv2(folder / "HPS_v2_compressed.pt")
        yield


@contextlib.contextmanager
def small_imagereward(folder: Path):
    from tests.official import random_imagereward, sized_imagereward
    with sized_imagereward():
        random_imagereward(folder)
        yield


@contextlib.contextmanager
def small_pickscore(folder: Path):
    from tests.conftest import random_clip
    random_clip(folder, "gelu", 64)
    yield


@contextlib.contextmanager
def small_aesthetics(folder: Path):
    """A CLIP, and a head of the published one's shape."""
    from lib.eval.scorers import FILES
    from tests.conftest import random_clip
    random_clip(folder, "quick_gelu", 768)
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {}
    for i, size in sizes.items():
        layer = torch.nn.Linear(*size)
        head |= {f"layers.{i}.weight": layer.weight.detach(),
                 f"layers.{i}.bias": layer.bias.detach()}
    torch.save(head, folder / next(iter(FILES["aesthetics"])))
    yield

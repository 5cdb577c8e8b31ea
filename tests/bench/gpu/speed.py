"""How fast the card trains, ranks, samples, encodes and decodes, and what would make it faster.

The models have their real size and random weights, on which speed does not depend. A measurement is
the median of a few calls within a budget of seconds, after one unmeasured; beside it stand the peak
of the card's memory and the counted arithmetic over that of a large matrix product. Too little
memory is a result: the line then says so.
"""

import contextlib
import functools
import gc
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from lib import diffusion, models
from lib.models import BASE
from lib.plan.architecture import (architecture_of, count_flops, pair_arithmetic,
                                   random_inputs)
from lib.plan.probe import matmul_rate
from tests.bench.bench_paths import Bench, Peak, Ranking, Sampling, Training, alternate
from tests.bench.gpu.results import Results
from tests.bench.gpu.scale import Scale, middle_seconds

# Sampler steps of a measurement: fewer than a run has, to save time.
STEPS = {"sd15": 10, "sdxl": 4}
RANKED_PROMPTS = {"sd15": 4, "sdxl": 1}
ROUNDS = 3


def bench_of(scale: Scale, preset: str, name: str, **changes) -> Bench:
    """The preset on the card, with a run folder of its own."""
    s = scale.settings(preset, scale.fresh(name), **changes)
    rounds = ROUNDS
    if scale.rehearse:
        rounds = 1
    ceiling = ceiling_of(models.device_of(s), models.dtype_of(s))
    return Bench(s, architecture_of(s), rounds, ceiling)


@functools.cache
def ceiling_of(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product, measured once in a step."""
    return matmul_rate(device, dtype)


@functools.cache
def flops_of(scale: Scale, preset: str, what: str) -> float:
    """FLOP of a picture's "unet" forward, "encode" or "decode"; counting takes a second or two."""
    s = scale.settings(preset, scale.out)
    return count_flops(architecture_of(s), what, s.resolution)


def steps_of(scale: Scale, preset: str) -> int:
    """A sampler's steps."""
    if scale.rehearse:
        return 2
    return STEPS[preset]


@contextlib.contextmanager
def attempt(results: Results, name: str):
    """What fails within it is told, and the rest goes on."""
    try:
        yield
    except torch.OutOfMemoryError:
        results.add(name, None, "", "out of memory")
    except Exception as error:  # a compiler raises every kind
        results.fail(name, error)
    free()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tell_rate(results: Results, bench: Bench, name: str, unit: str, count: int, flop: float,
              work: Callable, budget: float, more: float = 0.) -> None:
    """Time a call that makes `count` of something in `flop` operations; `more` are its seconds of
    what is done once in many calls."""
    with attempt(results, name):
        with Peak() as peak:
            seconds, first = middle_seconds(work, bench.device, budget)
        seconds += more
        share = flop / seconds / bench.ceiling
        results.add(name, count / seconds, f"{unit}/s",
                    f"peak {peak.bytes / 1e9:.2f} GB, {share:.0%} of a matrix product, first call "
                    f"{first:.1f} s")


# ---- c-sd15, c-sdxl: as the stages do it ----

def measure(scale: Scale, results: Results, preset: str) -> None:
    """Training first: it is what most defaults hang on."""
    bench = bench_of(scale, preset, "first")
    results.add("matrix product", bench.ceiling / 1e12, "TFLOP/s")
    for part in (measure_training, measure_ranking, measure_forwards, measure_sampling,
                 measure_vae):
        with attempt(results, part.__name__):
            part(scale, results, preset)


def measure_training(scale: Scale, results: Results, preset: str) -> None:
    """A micro-batch of stage 04, and its part of the optimizer's step."""
    sizes = scale.batches(preset, "micro_batch")
    bench = bench_of(scale, preset, "training", micro_batch=max(sizes))
    sides = Training(bench)
    take_pairs(sides, min(sizes))
    sides.ours()
    once, _ = middle_seconds(sides.optimize, bench.device, 0.)
    results.add(f"optimizer's step, {bench.s.optimizer}, with clipping", once, "s")

    of_pair = pair_arithmetic(bench.s) * flops_of(scale, preset, "unet")
    for size in sizes:
        take_pairs(sides, size)
        tell_rate(results, bench, f"training, micro-batch {size}", "pairs", size, size * of_pair,
                  sides.ours, scale.budget, more=once * size / bench.s.batch)


def take_pairs(sides: Training, size: int) -> None:
    """Let it train on so many pairs at once."""
    sides.s = replace(sides.s, micro_batch=size)
    sides.pairs = sides.all_pairs.iloc[:size]


def measure_ranking(scale: Scale, results: Results, preset: str) -> None:
    """Model and anchor on all draws of some prompts' candidates, as stage 03 has them."""
    bench = bench_of(scale, preset, "ranking")
    sides = Ranking(bench)
    sides.comparisons = sides.comparisons[:RANKED_PROMPTS[preset]]
    count = len(sides.comparisons) * bench.s.candidates
    flop = 2 * count * bench.s.draws * flops_of(scale, preset, "unet")
    for size in scale.batches(preset, "rank_batch"):
        sides.s = replace(bench.s, rank_batch=size)
        tell_rate(results, bench, f"ranking, {bench.s.draws} draws, batch {size}", "candidates",
                  count, flop, sides.ours, scale.budget)


def measure_forwards(scale: Scale, results: Results, preset: str) -> None:
    """The frozen UNet alone, on the batch that a guided sampler has: twice its pictures."""
    bench = bench_of(scale, preset, "forwards")
    unet = models.load_unet(bench.s, BASE)
    for size in scale.batches(preset, "sample_batch"):
        tell_forward(scale, results, bench, f"forward, batch {2 * size}", unet, 2 * size)


@torch.no_grad()
def tell_forward(scale: Scale, results: Results, bench: Bench, name: str, unet, size: int) -> None:
    side = bench.s.resolution // bench.architecture.factor
    given = random_inputs(unet, bench.architecture.tokens, side, size, bench.device)
    work = functools.partial(diffusion.predict, unet, *given)
    flop = size * flops_of(scale, bench.s.preset, "unet")
    tell_rate(results, bench, name, "latents", size, flop, work, scale.budget)


def measure_sampling(scale: Scale, results: Results, preset: str) -> None:
    tell_sampling(scale, results, preset, scale.batches(preset, "sample_batch"), "sampling")


def tell_sampling(scale: Scale, results: Results, preset: str, batches: list[int], name: str,
                  **changes) -> None:
    """Prompts in, picture files out, as stage 02 does it."""
    steps = steps_of(scale, preset)
    bench = bench_of(scale, preset, "sampling", sample_steps=steps, **changes)
    sides = Sampling(bench)
    count = len(sides.prompts) * bench.s.candidates
    flop = 2 * steps * flops_of(scale, preset, "unet") + flops_of(scale, preset, "decode")
    for size in batches:
        sides.s = replace(bench.s, sample_batch=size)
        tell_rate(results, bench, f"{name}, {steps} steps, batch {size}", "images", count,
                  count * flop, sides.ours, scale.budget)


def as_it_is(model, options: dict) -> None:
    """As the stages have it."""


def measure_vae(scale: Scale, results: Results, preset: str, title: str = "as it is",
                change: Callable = as_it_is) -> None:
    """As many pictures as stages 01 and 02 hand over at once; lib/models.py divides them."""
    bench = bench_of(scale, preset, "vae")
    vae = models.load_vae(bench.s)
    change(vae, {})
    size = models.ENCODE_BATCH
    if scale.rehearse:
        size = 2
    pictures = torch.rand(size, 3, bench.s.resolution, bench.s.resolution)
    latents = torch.randn(size, *models.latent_shape(bench.s), device=bench.device)
    for what, work in (("encode", functools.partial(models.encode, vae, pictures)),
                       ("decode", functools.partial(models.decode, vae, latents))):
        tell_rate(results, bench, f"VAE {what}, {size} at once: {title}", "images", size,
                  size * flops_of(scale, preset, what), work, scale.budget)


# ---- c-*-forward, c-*-options: what would make it faster ----

def contiguous(unet, options: dict) -> None:
    unet.to(memory_format=torch.contiguous_format)


def channels_last(unet, options: dict) -> None:
    unet.to(memory_format=torch.channels_last)


def compile_blocks(unet, options: dict) -> None:
    contiguous(unet, options)
    unet.compile_repeated_blocks(**options)


def compile_whole(unet, options: dict) -> None:
    contiguous(unet, options)
    unet.compile(**options)


EAGER = {"contiguous": contiguous, "channels_last": channels_last}
BLOCKS = {"torch.compile of the blocks": compile_blocks}
WHOLE = {"torch.compile of the whole": compile_whole}


def measure_ways(scale: Scale, results: Results, preset: str) -> None:
    """Each way alone in sampling's forward, then in the VAE; and sampling with --compile on."""
    for title, change in (EAGER | WHOLE | BLOCKS).items():
        with attempt(results, f"forward: {title}"):
            forward_in_a_way(scale, results, preset, title, change)
    for title, change in EAGER.items():
        with attempt(results, f"VAE: {title}"):
            measure_vae(scale, results, preset, title, change)
    with attempt(results, "sampling, compiled"):
        measure_compiled_sampling(scale, results, preset)


def measure_options(scale: Scale, results: Results, preset: str) -> None:
    """The optimizers, and each way alone in a training step."""
    with attempt(results, "optimizers"):
        measure_optimizers(scale, results, preset)
    for title, change in (EAGER | BLOCKS).items():
        with attempt(results, f"training: {title}"):
            training_in_a_way(scale, results, preset, title, change)


def forward_in_a_way(scale: Scale, results: Results, preset: str, title: str,
                     change: Callable) -> None:
    torch.compiler.reset()
    bench = bench_of(scale, preset, "way")
    unet = models.load_unet(bench.s, BASE)
    change(unet, scale.compile_options)
    size = 2 * scale.batches(preset, "sample_batch")[0]
    tell_forward(scale, results, bench, f"forward: {title}", unet, size)


def measure_compiled_sampling(scale: Scale, results: Results, preset: str) -> None:
    """At the preset's batch; the first call compiles. A rehearsal has nothing to compile."""
    if scale.rehearse:
        return
    torch.compiler.reset()
    size = scale.batches(preset, "sample_batch")[0]
    tell_sampling(scale, results, preset, [size], "sampling, compiled", compile="on")


def training_in_a_way(scale: Scale, results: Results, preset: str, title: str,
                      change: Callable) -> None:
    """The optimizer's step is not in it."""
    torch.compiler.reset()
    size = scale.batches(preset, "micro_batch")[0]
    bench = bench_of(scale, preset, "way", micro_batch=size)
    sides = Training(bench)
    for unet in (sides.policy, sides.ref):
        change(unet, scale.compile_options)
    flop = size * pair_arithmetic(bench.s) * flops_of(scale, preset, "unet")
    tell_rate(results, bench, f"training: {title}", "pairs", size, flop, sides.ours, scale.budget)


def measure_optimizers(scale: Scale, results: Results, preset: str) -> None:
    """A step alone, without clipping: AdamW fused and not, and Adafactor."""
    bench = bench_of(scale, preset, "optimizers", micro_batch=1)
    sides = Training(bench)
    sides.ours()
    del sides.optimizer
    adafactor = replace(bench.s, optimizer="adafactor")
    makers = {
        "AdamW, fused": functools.partial(torch.optim.AdamW, lr=1e-8, fused=True),
        "AdamW, not fused": functools.partial(torch.optim.AdamW, lr=1e-8, fused=False),
        "Adafactor": functools.partial(sides.stage.make_optimizer, adafactor),
    }
    for title, make in makers.items():
        with attempt(results, f"optimizer: {title}"):
            optimizer = make(sides.parameters)
            with Peak() as peak:
                seconds, _ = middle_seconds(optimizer.step, bench.device, scale.budget / 4)
            results.add(f"optimizer: {title}", seconds, "s", f"peak {peak.bytes / 1e9:.2f} GB")
        optimizer = None


# ---- c-sd15-plain, c-sdxl-plain: beside the usual way ----

def measure_plain(scale: Scale, results: Results, preset: str) -> None:
    """Diffusion-DPO's step as its authors run it, and the pipeline, in turns with ours."""
    size = scale.batches(preset, "micro_batch")[0]
    with attempt(results, "training beside the plain step"):
        bench = bench_of(scale, preset, "plain-training", micro_batch=size)
        sides = Training(bench)
        sides.load_plain()
        times = alternate(sides.ours, sides.plain, bench)
        tell_ratio(results, "training", "pairs/s", size, times)
        sides = None
    free()
    with attempt(results, "sampling beside the pipeline"):
        steps = steps_of(scale, preset)
        bench = bench_of(scale, preset, "plain-sampling", sample_steps=steps,
                         sample_batch=scale.batches(preset, "sample_batch")[0])
        sides = Sampling(bench)
        times = alternate(sides.ours, sides.plain, bench)
        tell_ratio(results, f"sampling, {steps} steps", "images/s",
                   len(sides.prompts) * bench.s.candidates, times)


def tell_ratio(results: Results, title: str, unit: str, count: int,
               times: tuple[list[float], list[float]]) -> None:
    """Both rates, medians of rounds in which the two took turns, and their ratio."""
    ours, plain = (statistics.median(seconds) for seconds in times)
    ratios = [theirs / mine for mine, theirs in zip(*times)]
    results.add(f"{title}: ours", count / ours, unit)
    results.add(f"{title}: plain", count / plain, unit)
    results.add(f"{title}: ours over plain", plain / ours, "",
                f"rounds {min(ratios):.2f} to {max(ratios):.2f}; without the optimizer")

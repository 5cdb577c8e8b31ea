"""Training, sampling and ranking as the stages do them, beside the plain way.

    python -m tests.bench.bench_paths training          # SD1.5 of smaller widths at 128 px: a CPU
    python -m tests.bench.bench_paths training --full   # SD1.5 as it is at 512 px, bf16 on CUDA
    python -m tests.bench.bench_paths sampling          # or ranking
                [--preset sdxl] [--full] [--rounds 5] [--threads 1]

training   stage 04's step (latents and prompt embeddings from disk) beside Diffusion-DPO's as its
           authors and diffusers' script run it: VAE-encode both pictures and encode the prompt in
           every step. Same UNets, optimizer, batch and precision; the plain step finds its pictures
           in memory as tensors, so no JPEG is decoded.
sampling   lib.sampler.paint beside the diffusers pipeline called prompt by prompt for 8 pictures,
           its PNGs saved too.
ranking    stage 03's measure_errors beside a loop over candidates and draws, one forward each of
           model and anchor.

Weights are random (speed does not depend on them). Each side does one round unmeasured, then they
take turns; given are medians, the ratio of the medians, and the lowest and highest ratio of a
round. The last column is the counted arithmetic per second beside that of a large matrix product on
the same device.
"""

import argparse
import functools
import gc
import itertools
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import psutil
import torch
from diffusers import (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                          CLIPTokenizer)

from lib import diffusion, models, sampler
from lib.models import BASE
from lib.plan.architecture import (CLIP_TOKENS, SD15_UNET, SD_VAE, SDXL_UNET, Architecture,
                                   count_flops, pair_arithmetic, random_inputs)
from lib.plan.probe import matmul_rate, seconds_of
from lib.plan.stages import load_stage
from lib.run import Ledger, generator, open_image, save_latent
from lib.settings import PRESETS, ROOT, Settings, cpu_name

# The text encoders: CLIP ViT-L, and for SDXL ViT-bigG as well.
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT_2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

# On a CPU every width is divided by this, never the depth.
SMALLER = 4

# The real models' UNet forward over VAE encode, by arithmetic.
REAL = {"sd15": .803 / 1.117, "sdxl": 6.76 / 4.88}
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPT = "a lighthouse at dusk, oil painting, number {}"


@dataclass(frozen=True)
class Bench:
    """What the three comparisons have in common."""

    s: Settings
    architecture: Architecture
    rounds: int
    ceiling: float                  # FLOP per second of a large matrix product

    @property
    def run(self) -> Path:
        return Path(self.s.run)

    @property
    def device(self) -> torch.device:
        return models.device_of(self.s)

    def flops(self, what: str) -> float:
        """FLOP of a picture's "unet" forward, "encode" or "decode"."""
        return count_flops(self.architecture, what, self.s.resolution)


# ---- models and settings ----

def make_pipeline(folder: Path, preset: str, divide: int, device: str = "cpu",
                  dtype: torch.dtype = torch.float32, shallow: bool = False) -> Architecture:
    """Save the preset's classes and layout with random weights, its widths divided by `divide`.

    The weights are drawn on the device and saved in the dtype. A shallow pipeline has few layers:
    nothing can be measured with it.
    """
    torch.manual_seed(0)
    with torch.device(device):
        unet = make_unet(preset, divide, shallow).to(dtype)
        vae = make_vae(preset, divide).to(dtype)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "lib/world/base/tokenizer",
                                              model_max_length=CLIP_TOKENS)
    schedule = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear",
                             clip_sample=False, steps_offset=1)

    parts = {"vae": vae, "tokenizer": tokenizer, "unet": unet, "scheduler": schedule}
    with torch.device(device):
        first = text_config(TEXT, divide, tokenizer, shallow)
        parts["text_encoder"] = CLIPTextModel(first).to(dtype)
    if preset == "sdxl":
        second = text_config(TEXT_2, divide, tokenizer, shallow)
        with torch.device(device):
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second).to(dtype)
        parts["tokenizer_2"] = tokenizer
    else:
        parts |= {"safety_checker": None, "feature_extractor": None,
                  "requires_safety_checker": False}
    PIPELINES[preset](**parts).save_pretrained(folder)
    return Architecture(dict(unet.config), dict(vae.config), CLIP_TOKENS, "")


def narrow(widths: tuple[int, ...], divide: int) -> tuple[int, ...]:
    """Widths, or numbers of heads, divided; none becomes zero."""
    return tuple(max(1, width // divide) for width in widths)


def make_unet(preset: str, divide: int, shallow: bool = False) -> UNet2DConditionModel:
    """The number of heads is divided too, so that a head is about as wide as it is.

    In diffusers' config of this class `attention_head_dim` is the number of heads.
    """
    if preset == "sdxl":
        config = SDXL_UNET | {
            "block_out_channels": narrow((320, 640, 1280), divide),
            "attention_head_dim": narrow((5, 10, 20), divide),
            "cross_attention_dim": 2048 // divide,
            "projection_class_embeddings_input_dim": 6 * 256 + 1280 // divide,
        }
    else:
        config = SD15_UNET | {
            "block_out_channels": narrow((320, 640, 1280, 1280), divide),
            "attention_head_dim": 8 // divide,
            "cross_attention_dim": 768 // divide,
        }
    if shallow:
        config |= shallow_layout(config)
    return UNet2DConditionModel(**config, norm_num_groups=32 // divide)


def shallow_layout(config: dict) -> dict:
    """One block on the way down and one on the way up, of one layer each."""
    layout = {
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "block_out_channels": config["block_out_channels"][:1],
    }
    if isinstance(config["attention_head_dim"], tuple):
        layout["attention_head_dim"] = config["attention_head_dim"][:1]
    return layout


def make_vae(preset: str, divide: int) -> AutoencoderKL:
    scaling = .18215
    if preset == "sdxl":
        scaling = .13025
    widths = {"block_out_channels": narrow(SD_VAE["block_out_channels"], divide)}
    return AutoencoderKL(**SD_VAE | widths, norm_num_groups=32 // divide, scaling_factor=scaling)


def text_config(sizes: dict, divide: int, tokenizer: CLIPTokenizer,
                shallow: bool = False) -> CLIPTextConfig:
    """A text encoder of these sizes, all of them divided but the number of layers."""
    divided = {}
    for name, size in sizes.items():
        divided[name] = size // divide
    divided["num_hidden_layers"] = 2 if shallow else sizes["num_hidden_layers"]
    return CLIPTextConfig(
        **divided, vocab_size=len(tokenizer), max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)


def settings_of(folder: Path, preset: str, full: bool, compile: str) -> Settings:
    """The preset's settings for the made-up pipeline; small ones unless it is of full size."""
    values = PRESETS[preset] | {
        "model": str(folder / "model"),
        "vae": "",                              # the made-up pipeline's own
        "run": str(folder / "run"),
        "flip": 0.,
        "compile": compile,
    }
    if not full:
        values |= {"resolution": 128, "sample_steps": 5, "sample_batch": 16, "draws": 5,
                   "rank_batch": 40}
    return Settings(**values)


# ---- measuring ----

class Peak:
    """Highest memory within a `with`, in bytes.

    On CUDA it is what was allocated, else the process's resident memory, looked at every 5 ms.
    """

    def __enter__(self):
        gc.collect()
        self.bytes = 0
        self.done = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.done.wait(.005):
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()


def alternate(ours: Callable, plain: Callable, bench: Bench) -> tuple[list[float], list[float]]:
    """Seconds of each round of both sides, in turn, after one round of each unmeasured."""
    ours()
    plain()
    our_times, plain_times = [], []
    for _ in range(bench.rounds):
        our_times.append(seconds_of(ours, bench.device))
        plain_times.append(seconds_of(plain, bench.device))
    return our_times, plain_times


def best_of(count: int, work: Callable, device: torch.device) -> float:
    """Seconds of the fastest of some calls."""
    return min(seconds_of(work, device) for _ in range(count))


def tell(title: str, unit: str, count: int, flop: tuple[float, float],
         times: tuple[list[float], list[float]], ceiling: float) -> None:
    """Print one line per side, ours and the plain one, and their ratio."""
    for side, seconds, work in zip(("ours", "plain"), times, flop):
        middle = statistics.median(seconds)
        slowest, fastest = count / max(seconds), count / min(seconds)
        print(f"{title:9} {side:6} {count / middle:8.3f} {unit}/s "
              f"(rounds {slowest:.3f} to {fastest:.3f}), {work / middle / 1e12:.3g} TFLOP/s, "
              f"{work / middle / ceiling:.0%} of a matrix product's {ceiling / 1e12:.3g}",
              flush=True)

    our_times, plain_times = times
    ratio = statistics.median(plain_times) / statistics.median(our_times)
    ratios = [plain / ours for ours, plain in zip(our_times, plain_times)]
    print(f"{title:9} ratio  {ratio:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}), "
          f"by arithmetic alone {flop[1] / flop[0]:.2f}", flush=True)


# ---- training ----

class Training:
    """A micro-batch of stage 04, ours and the plain way; `optimize` is what both do once a step."""

    def __init__(self, bench: Bench):
        s = bench.s
        self.s, self.device = s, bench.device
        self.stage = load_stage("04")
        self.all_pairs = make_pairs(bench.run, s.micro_batch)
        self.pairs = self.all_pairs
        files = [bench.run / name for name in (*self.pairs.win, *self.pairs.lose)]
        make_pictures(files, s.resolution)

        def open_one(i):
            return open_image(files[i], bench.run, i + 1)

        # Ours finds latents and prompt embeddings on the disk.
        models.ensure_latents(files, s, open_one)
        self.shape = models.stack_latents(files[:1])[0].shape[1:]
        self.encoder = models.PromptEncoder(s)
        self.encoder.prepare(self.pairs.prompt.tolist())

        self.schedule = models.load_schedule(s)
        self.policy, self.ref = self.stage.load_policy_and_reference(s, 0)
        self.parameters = list(self.policy.parameters())
        self.optimizer = self.stage.make_optimizer(s, self.parameters)
        self.files = files

    def load_plain(self) -> None:
        """What the plain way has in memory beside: VAE, text encoders, and pictures in -1..1."""
        self.vae = models.load_vae(self.s)
        pipeline = PIPELINES[self.s.preset]
        self.pipe = pipeline.from_pretrained(self.s.model, unet=None, vae=None,
                                             dtype=models.dtype_of(self.s)).to(self.device)
        pixels = [np.array(open_image(file, self.s.run, 1)) for file in self.files]
        self.pictures = torch.from_numpy(np.stack(pixels)).movedim(-1, 1) / 127.5 - 1

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.s.max_grad_norm)
        self.optimizer.step()

    def ours(self) -> None:
        """A micro-batch of stage 04's `backward`."""
        micro = replace(self.s, batch=self.s.micro_batch)
        randoms = self.stage.step_randoms(micro, 0, 0, self.shape)
        errors = self.stage.pair_errors(self.s, self.policy, self.ref, self.schedule, self.pairs,
                                        randoms, self.encoder)
        loss, _ = self.stage.dpo_loss(*errors, self.s.beta)
        (loss.sum() / self.s.batch).backward()

    def plain(self) -> None:
        """The same in DiffusionDPO's train.py and diffusers' train_diffusion_dpo.py."""
        B = self.s.micro_batch
        dtype = models.dtype_of(self.s)
        with torch.no_grad():
            posterior = self.encode().latent_dist
            latents = posterior.sample() * self.vae.config.scaling_factor
            condition = self.encode_prompts()

        noise = torch.randn_like(latents[:B]).repeat(2, 1, 1, 1)
        t = torch.randint(1000, (B,), device=self.device).repeat(2)
        x_t = self.schedule.add_noise(latents, noise, t)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            prediction = diffusion.predict(self.policy, x_t, t, condition)
            error = (prediction - noise.float()).square().mean((1, 2, 3))
            with torch.no_grad():
                prediction = diffusion.predict(self.ref, x_t, t, condition)
                ref_error = (prediction - noise.float()).square().mean((1, 2, 3))

        win, lose = (error - ref_error).chunk(2)
        loss = -torch.nn.functional.logsigmoid(-self.s.beta / 2 * (win - lose))
        (loss.sum() / self.s.batch).backward()

    def encode(self):
        """The VAE's output on winners and losers."""
        return self.vae.encode(self.pictures.to(self.device, models.dtype_of(self.s)))

    def encode_prompts(self) -> dict[str, torch.Tensor]:
        """The pipeline's own encoding, twice: for winners and losers."""
        embeds, _, *pooled = self.pipe.encode_prompt(
            self.pairs.prompt.tolist(), device=self.device, num_images_per_prompt=1,
            do_classifier_free_guidance=False)
        condition = {"embeds": embeds.repeat(2, 1, 1)}
        if pooled:
            condition["pooled"] = pooled[0].repeat(2, 1)
        return condition


def make_pairs(run: Path, count: int) -> pd.DataFrame:
    """A table of made-up pairs."""
    rows = []
    for i in range(count):
        rows.append({"prompt": PROMPT.format(i), "win": f"seed/images/{i}_w.jpg",
                     "lose": f"seed/images/{i}_l.jpg"})
    return pd.DataFrame(rows)


def make_pictures(files: list[Path], resolution: int) -> None:
    """Smooth noise, as JPEG."""
    files[0].parent.mkdir(parents=True)
    for i, file in enumerate(files):
        rng = np.random.default_rng(i)
        noise = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        noise.resize((resolution, resolution), Image.Resampling.BICUBIC).save(file)


def bench_training(bench: Bench) -> None:
    s, device, B = bench.s, bench.device, bench.s.micro_batch
    sides = Training(bench)

    # The optimizer's states first, then the peak of each side.
    sides.ours()
    sides.optimize()
    with Peak() as our_peak:
        sides.ours()
    sides.load_plain()
    with Peak() as plain_peak:
        sides.plain()

    # The made-up UNet and VAE may not be to each other as the real ones are: both are timed alone.
    side = s.resolution // bench.architecture.factor
    given = random_inputs(sides.policy, bench.architecture.tokens, side, 2 * B, device)
    with torch.no_grad():
        forward = best_of(4, functools.partial(diffusion.predict, sides.ref, *given), device)
        encoding = best_of(4, sides.encode, device)

    our_times, plain_times = alternate(sides.ours, sides.plain, bench)
    once = best_of(3, sides.optimize, device)
    unet, encode = bench.flops("unet"), bench.flops("encode")
    print(f"training  {B} pairs at once, {s.batch} a step; {once:.2f} s of each step for clipping "
          f"and the optimizer; UNet forward over VAE encode: arithmetic {unet / encode:.2f}, time "
          f"{forward / encoding:.2f} (the real model's arithmetic: {REAL[s.preset]:.2f})")

    # A micro-batch's part of what happens once a step.
    our_times = [seconds + once * B / s.batch for seconds in our_times]
    plain_times = [seconds + once * B / s.batch for seconds in plain_times]
    flop = B * pair_arithmetic(s) * unet
    tell("training", "pairs", B, (flop, flop + 2 * B * encode), (our_times, plain_times),
         bench.ceiling)

    ours = statistics.median(our_times)
    extra = statistics.median(plain_times) - ours
    real = 1 + extra / ours * forward / encoding / REAL[s.preset]
    print(f"training  ratio  {real:.2f} were UNet and VAE in time as the real ones are in "
          f"arithmetic; peak memory: ours {our_peak.bytes / 1e9:.2f} GB, "
          f"plain {plain_peak.bytes / 1e9:.2f} GB")


# ---- sampling ----

class Sampling:
    """Pictures of some prompts, N each: by lib.sampler and by the diffusers pipeline."""

    def __init__(self, bench: Bench):
        s = bench.s
        self.s, self.run, self.device = s, bench.run, bench.device
        prompts = 2
        if s.resolution > 128:
            prompts = max(2, 2 * s.sample_batch // s.candidates)
        self.prompts = [PROMPT.format(i) for i in range(prompts)]
        self.side = s.resolution // bench.architecture.factor
        self.turn = itertools.count()

        self.unet = models.load_unet(s, BASE)
        self.ledger = Ledger(self.run, "bench", None, str(self.device))
        self.pipe = PIPELINES[s.preset].from_pretrained(
            s.model, unet=self.unet, scheduler=models.load_sampler(s), dtype=models.dtype_of(s))
        self.pipe.to(self.device).set_progress_bar_config(disable=True)

    def seeds_of(self, i: int) -> list[int]:
        """The seeds of prompt i's pictures, which are also their names."""
        N = self.s.candidates
        return list(range(N * i, N * i + N))

    def ours(self) -> Path:
        """Paint into a new folder, which is returned."""
        folder = f"ours/images/{next(self.turn)}"
        jobs = []
        for i, prompt in enumerate(self.prompts):
            for seed in self.seeds_of(i):
                jobs.append({"prompt": prompt, "seed": seed, "image": f"{folder}/{seed}.png"})
        sampler.paint(self.s, BASE, pd.DataFrame(jobs), self.ledger, "ours", keep_latents=False,
                      unet=self.unet)
        return self.run / folder

    def plain(self) -> None:
        """Prompt by prompt, from the same noise."""
        s = self.s
        folder = self.run / "plain"
        folder.mkdir(parents=True, exist_ok=True)
        for i, prompt in enumerate(self.prompts):
            seeds = self.seeds_of(i)
            shape = (4, self.side, self.side)
            noise, generators = sampler.start_noise(seeds, shape, self.device)
            pictures = self.pipe(
                prompt, num_images_per_prompt=s.candidates, num_inference_steps=s.sample_steps,
                guidance_scale=s.cfg_scale, latents=noise.to(models.dtype_of(s)),
                generator=generators).images
            for seed, picture in zip(seeds, pictures):
                picture.save(folder / f"{seed}.png")


def read_folder(folder: Path, count: int) -> np.ndarray:
    """Pictures 0.png, 1.png, ... as whole numbers."""
    pictures = [np.asarray(Image.open(folder / f"{i}.png"), dtype=int) for i in range(count)]
    return np.stack(pictures)


def bench_sampling(bench: Bench) -> None:
    s = bench.s
    sides = Sampling(bench)
    times = alternate(sides.ours, sides.plain, bench)

    count = len(sides.prompts) * s.candidates
    ours, plain = read_folder(sides.ours(), count), read_folder(sides.run / "plain", count)
    apart = np.abs(ours - plain)
    print(f"sampling  {count} pictures of {len(sides.prompts)} prompts, {s.sampler}, "
          f"{s.sample_steps} steps, guidance {s.cfg_scale}, batches of {s.sample_batch} and "
          f"{s.candidates}; pictures differ by {apart.max()} of 255 at most, {apart.mean():.2g} on "
          f"average (spread of the pictures {ours.std():.0f})")

    flop = count * (2 * s.sample_steps * bench.flops("unet") + bench.flops("decode"))
    tell("sampling", "images", count, (flop, flop), times, bench.ceiling)


# ---- ranking ----

class Ranking:
    """Errors of model and anchor on some prompts' candidates: by stage 03 and one at a time."""

    def __init__(self, bench: Bench):
        s = bench.s
        self.s, self.device = s, bench.device
        self.stage = load_stage("03")
        self.unets = [models.load_unet(s, BASE), models.load_unet(s, BASE)]
        self.schedule = models.load_schedule(s)
        self.ledger = Ledger(bench.run, "bench", 1, str(self.device))

        prompts = 2
        if s.resolution > 128:
            prompts = 4
        self.comparisons = []
        for i in range(prompts):
            images = [bench.run / f"iter1/images/{i}_{n}.png" for n in range(s.candidates)]
            self.comparisons.append(self.stage.Comparison((1, i), PROMPT.format(i), images))
        make_latents(self.comparisons, s.resolution // bench.architecture.factor)

        self.encoder = models.PromptEncoder(s)
        self.encoder.prepare([comparison.prompt for comparison in self.comparisons])

    def ours(self) -> torch.Tensor:
        """Errors (2, P, N, D)."""
        _, errors = self.stage.measure_errors(self.s, self.unets, self.comparisons, self.ledger,
                                              "ours")
        return errors

    @torch.no_grad()
    def plain(self) -> torch.Tensor:
        """The same, one forward for each number."""
        s = self.s
        errors = torch.empty(2, len(self.comparisons), s.candidates, s.draws)
        for p, comparison in enumerate(self.comparisons):
            condition = self.encoder([comparison.prompt])
            for n, image in enumerate(comparison.images):
                x_0 = models.stack_latents([image])[0].to(self.device)
                timesteps, noises = self.stage.reward_draws(s, comparison.key, x_0.shape[1:])
                for d in range(s.draws):
                    t, noise = timesteps[d:d + 1].to(self.device), noises[d:d + 1].to(self.device)
                    for u, unet in enumerate(self.unets):
                        error = diffusion.denoising_error(unet, self.schedule, x_0, t, noise,
                                                          condition)
                        errors[u, p, n, d] = error.item()
        return errors


def make_latents(comparisons: list, side: int) -> None:
    """Random latents of all candidates."""
    rng = generator("bench")
    for comparison in comparisons:
        for image in comparison.images:
            latent = torch.randn((4, side, side), generator=rng)
            save_latent({"mean": latent}, image)


def bench_ranking(bench: Bench) -> None:
    s = bench.s
    sides = Ranking(bench)
    times = alternate(sides.ours, sides.plain, bench)

    count = len(sides.comparisons) * s.candidates
    apart = (sides.ours() / sides.plain() - 1).abs().max()
    print(f"ranking   {count} candidates of {len(sides.comparisons)} prompts, {s.draws} draws, "
          f"model and anchor; errors agree to {apart:.1e}")

    flop = 2 * count * s.draws * bench.flops("unet")
    tell("ranking", "candidates", count, (flop, flop), times, bench.ceiling)


# ---- the command ----

BENCHES = {"training": bench_training, "sampling": bench_sampling, "ranking": bench_ranking}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(BENCHES))
    parser.add_argument("--preset", choices=tuple(PIPELINES), default="sd15")
    parser.add_argument("--full", action="store_true",
                        help="the model's own sizes, for a CUDA device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0,
                        help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--compile", choices=("off", "on"), default="off",
                        help="of ours in sampling and ranking")
    return parser


def describe(s: Settings, divide: int) -> str:
    """Where and with what the numbers are made, in one line."""
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if models.device_of(s).type == "cuda":
        machine = torch.cuda.get_device_name()
    dtype = str(models.dtype_of(s)).removeprefix("torch.")
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "transformers"))
    return (f"{date.today()}, {machine}, {dtype}; {packages}; {s.preset}, widths / {divide}, "
            f"{s.resolution} px")


def main() -> None:
    options = build_parser().parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    divide = SMALLER
    if options.full:
        divide = 1

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        architecture = make_pipeline(folder / "model", options.preset, divide)
        s = settings_of(folder, options.preset, options.full, options.compile)
        print(describe(s, divide), flush=True)
        ceiling = matmul_rate(models.device_of(s), models.dtype_of(s))
        BENCHES[options.what](Bench(s, architecture, options.rounds, ceiling))


if __name__ == "__main__":
    main()

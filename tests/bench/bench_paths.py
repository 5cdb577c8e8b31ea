"""Training, sampling and ranking as the stages do them, beside the plain way; ratios from one run, sides in turn.

    python -m tests.bench.bench_paths training             # SD1.5 of smaller widths at 128 px: a laptop's CPU
    python -m tests.bench.bench_paths training --full      # SD1.5 as it is at 512 px, bf16 on a CUDA device
    python -m tests.bench.bench_paths sampling | ranking   [--preset sdxl] [--full] [--rounds 5] [--threads 1]

training   stage 04's step (latents and prompt embeddings from disk) beside Diffusion-DPO's as its authors and diffusers'
           script run it: VAE-encode both pictures and encode the prompt in every step. Same UNets, optimizer, batch and
           precision; the plain step finds its pictures in memory as tensors, so no JPEG is decoded.
sampling   lib.sampler.paint beside the diffusers pipeline called prompt by prompt for 8 pictures, its PNGs saved too.
ranking    stage 03's errors_of beside a loop over candidates and draws, one forward each of model and anchor.

Weights are random (speed does not depend on them). Each side does one round unmeasured, then they alternate; given are
medians, the ratio of the medians, and the lowest and highest ratio of a round. The last column is the counted arithmetic
per second beside that of a large matrix product on the same device.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import threading
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import psutil
import torch
from diffusers import (AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline,
                       UNet2DConditionModel)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib import models, probe, sampler
from lib.run import Ledger, generator, open_image, save_latent
from lib.settings import PRESETS, ROOT, Settings, cpu_name

TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}   # CLIP ViT-L
TEXT_2 = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,   # ViT-bigG
          "projection_dim": 1280}
SMALLER, LAYERS = 4, ("num_hidden_layers",)      # on a CPU every width is divided by this, never the depth
REAL = {"sd15": .803 / 1.117, "sdxl": 6.76 / 4.88}                       # the real models' UNet forward over VAE encode
PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
PROMPT = "a lighthouse at dusk, oil painting, number {}"


# ---- models and settings ----

def make_pipeline(folder: Path, preset: str, divide: int) -> probe.Shape:
    """The preset's classes and layout with random weights, saved for the stages to load; every width divided by `divide`,
    and the number of heads too, so that a head is about as wide as it is."""
    torch.manual_seed(0)
    xl, narrow = preset == "sdxl", lambda *widths: tuple(max(1, width // divide) for width in widths)
    sizes = {"block_out_channels": narrow(320, 640, 1280, 1280), "attention_head_dim": 8 // divide,  # the number of heads
             "cross_attention_dim": 768 // divide}
    if xl:
        sizes = {"block_out_channels": narrow(320, 640, 1280), "attention_head_dim": narrow(5, 10, 20),
                 "cross_attention_dim": 2048 // divide, "projection_class_embeddings_input_dim": 6 * 256 + 1280 // divide}
    unet = UNet2DConditionModel(**(probe.SDXL_UNET if xl else probe.SD15_UNET) | sizes | {"norm_num_groups": 32 // divide})
    vae = AutoencoderKL(**probe.SD_VAE | {"block_out_channels": narrow(*probe.SD_VAE["block_out_channels"])},
                        norm_num_groups=32 // divide, scaling_factor=.13025 if xl else .18215)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "lib/tiny/tokenizer", model_max_length=77)
    config = lambda sizes: CLIPTextConfig(
        **{k: v if k in LAYERS else v // divide for k, v in sizes.items()}, vocab_size=len(tokenizer),
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    schedule = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                             steps_offset=1)
    parts = {"vae": vae, "text_encoder": CLIPTextModel(config(TEXT)), "tokenizer": tokenizer, "unet": unet,
             "scheduler": schedule}
    parts |= {"text_encoder_2": CLIPTextModelWithProjection(config(TEXT_2)), "tokenizer_2": tokenizer} if xl else \
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    PIPELINES[preset](**parts).save_pretrained(folder)
    return probe.Shape(dict(unet.config), dict(vae.config), 77, "")


def settings_of(folder: Path, preset: str, full: bool) -> Settings:
    small = {"resolution": 128, "sample_steps": 5, "sample_batch": 16, "draws": 5, "rank_batch": 40}
    vae = {} if preset == "sd15" else {"vae": ""}               # the made-up pipeline's own
    own = {"model": str(folder / "model"), "run": str(folder / "run"), "flip": 0.} | vae | ({} if full else small)
    return Settings(**PRESETS[preset] | own)


# ---- measuring ----

class Peak:
    """Highest memory within a `with`: allocated on CUDA, else the process's resident memory, looked at every 5 ms."""

    def __enter__(self):
        gc.collect()
        self.bytes, self.done = 0, threading.Event()
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


def alternate(ours, plain, rounds: int, device) -> tuple[list[float], list[float]]:
    """Seconds of each round of both sides, in turn, after one round of each unmeasured."""
    ours(), plain()
    times = [(probe.seconds_of(ours, device), probe.seconds_of(plain, device)) for _ in range(rounds)]
    return [t[0] for t in times], [t[1] for t in times]


def tell(title: str, unit: str, count: int, flop: tuple[float, float], times: tuple[list, list], ceiling: float) -> None:
    """One line per side, and their ratio."""
    for name, seconds, work in zip(("ours", "plain"), times, flop):
        middle = statistics.median(seconds)
        print(f"{title:9} {name:6} {count / middle:8.3f} {unit}/s (rounds {count / max(seconds):.3f} to "
              f"{count / min(seconds):.3f}), {work / middle / 1e12:.3g} TFLOP/s, "
              f"{work / middle / ceiling:.0%} of a matrix product's {ceiling / 1e12:.3g}", flush=True)
    ratios = [b / a for a, b in zip(*times)]
    print(f"{title:9} ratio  {statistics.median(times[1]) / statistics.median(times[0]):.2f} (rounds {min(ratios):.2f} to "
          f"{max(ratios):.2f}), by arithmetic alone {flop[1] / flop[0]:.2f}", flush=True)


# ---- training ----

def training(s: Settings, shape: probe.Shape, rounds: int, ceiling: float) -> None:
    stage, run, device, dtype = probe.stage("04"), Path(s.run), models.device_of(s), models.dtype_of(s)
    pairs = pd.DataFrame([{"prompt": PROMPT.format(i), "win": f"seed/images/{i}_w.jpg", "lose": f"seed/images/{i}_l.jpg"}
                          for i in range(s.micro_batch)])
    files = [run / name for name in (*pairs.win, *pairs.lose)]
    (run / "seed/images").mkdir(parents=True)
    for i, file in enumerate(files):
        noise = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((s.resolution, s.resolution), Image.Resampling.BICUBIC).save(file)
    models.ensure_latents(files, s, lambda i: open_image(files[i], run, i))
    encoder, scheduler = models.PromptEncoder(s).prepare(pairs.prompt.tolist()), models.load_schedule(s)
    policy, ref = stage.load_policy(s, 0)
    parameters = list(policy.parameters())
    optimizer = stage.make_optimizer(s, parameters)
    values, b = models.stack_latents(files[:1])[0].shape[1:], s.micro_batch

    def step():
        """What both do once in s.batch pairs."""
        torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
        optimizer.step()

    def ours():
        """A micro-batch in 04_train_dpo.train."""
        draws = stage.step_draws(replace(s, batch=b), 0, 0, values)
        errors = stage.pair_errors(s, policy, ref, scheduler, pairs, draws, encoder)
        (stage.dpo_loss(*errors, s.beta)[0].sum() / s.batch).backward()

    def plain():
        """The same in SalesforceAIResearch/DiffusionDPO's train.py and diffusers' train_diffusion_dpo.py."""
        with torch.no_grad():
            latents = vae.encode(pictures.to(device, dtype)).latent_dist.sample() * vae.config.scaling_factor
            embeds, _, *pooled = pipe.encode_prompt(pairs.prompt.tolist(), device=device, num_images_per_prompt=1,
                                                    do_classifier_free_guidance=False)
            condition = {"embeds": embeds.repeat(2, 1, 1)} | ({"pooled": pooled[0].repeat(2, 1)} if pooled else {})
        noise = torch.randn_like(latents[:b]).repeat(2, 1, 1, 1)
        t = torch.randint(1000, (b,), device=device).repeat(2)
        x_t = scheduler.add_noise(latents, noise, t)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            error = (models.predict(policy, x_t, t, condition) - noise.float()).square().mean((1, 2, 3))
            with torch.no_grad():
                ref_error = (models.predict(ref, x_t, t, condition) - noise.float()).square().mean((1, 2, 3))
        win, lose = (error - ref_error).chunk(2)
        (-torch.nn.functional.logsigmoid(-s.beta / 2 * (win - lose)).sum() / s.batch).backward()

    ours()
    step()                                                      # the optimizer's states, then the peak of each
    with Peak() as mine:
        ours()
    vae = models.load_vae(s)
    pipe = PIPELINES[s.preset].from_pretrained(s.model, unet=None, vae=None, dtype=dtype).to(device)
    pictures = torch.stack([torch.from_numpy(np.array(open_image(f, run, 0))) for f in files]).movedim(-1, 1) / 127.5 - 1
    with Peak() as theirs:
        plain()
    unet, encode = probe.flops(shape, "unet", s.resolution), probe.flops(shape, "encode", s.resolution)
    given = probe.inputs(policy, shape.tokens, s.resolution // 8, 2 * b, device)
    with torch.no_grad():
        forward, encoding = [min(probe.seconds_of(work, device) for _ in range(4)) for work in (
            lambda: models.predict(ref, *given), lambda: vae.encode(pictures.to(device, dtype)))]
    times = alternate(ours, plain, rounds, device)
    once = min(probe.seconds_of(step, device) for _ in range(3))
    print(f"training  {b} pairs at once, {s.batch} a step; {once:.2f} s of each step for clipping and the optimizer; UNet "
          f"forward over VAE encode: arithmetic {unet / encode:.2f}, time {forward / encoding:.2f} (the real model's "
          f"arithmetic: {REAL[s.preset]:.2f})")
    times = [[t + once * b / s.batch for t in side] for side in times]
    flop = b * probe.forwards_per_pair(s) * unet
    tell("training", "pairs", b, (flop, flop + 2 * b * encode), times, ceiling)
    a, extra = statistics.median(times[0]), statistics.median(times[1]) - statistics.median(times[0])
    real = 1 + extra / a * forward / encoding / REAL[s.preset]
    print(f"training  ratio  {real:.2f} were UNet and VAE in time as the real ones are in arithmetic; peak memory: ours "
          f"{mine.bytes / 1e9:.2f} GB, plain {theirs.bytes / 1e9:.2f} GB")


# ---- sampling ----

def sampling(s: Settings, shape: probe.Shape, rounds: int, ceiling: float) -> None:
    run, device, n = Path(s.run), models.device_of(s), s.candidates
    prompts = [PROMPT.format(i) for i in range(max(2, 2 * s.sample_batch // n if s.resolution > 128 else 2))]
    unet, scheduler, ledger = models.load_unet(s, -1), models.load_sampler(s), Ledger(run, "bench", None, str(device))
    pipe = PIPELINES[s.preset].from_pretrained(s.model, unet=unet, scheduler=scheduler, dtype=models.dtype_of(s))
    pipe.to(device).set_progress_bar_config(disable=True)
    seeds = {p: range(n * i, n * i + n) for i, p in enumerate(prompts)}
    side, turn = s.resolution // 8, iter(range(1000))

    def ours():
        folder = f"ours/images/{next(turn)}"
        jobs = pd.DataFrame([{"prompt": p, "seed": seed, "image": f"{folder}/{seed}.png"}
                             for p in prompts for seed in seeds[p]])
        sampler.paint(s, -1, jobs, ledger, "ours", keep_latents=False, unet=unet)
        return run / folder

    def plain():
        (run / "plain").mkdir(parents=True, exist_ok=True)
        for p in prompts:
            noise, generators = sampler.start_noise(list(seeds[p]), (4, side, side), device)
            pictures = pipe(p, num_images_per_prompt=n, num_inference_steps=s.sample_steps, guidance_scale=s.cfg_scale,
                            latents=noise.to(models.dtype_of(s)), generator=generators).images
            for seed, picture in zip(seeds[p], pictures):
                picture.save(run / "plain" / f"{seed}.png")

    times, count = alternate(ours, plain, rounds, device), len(prompts) * n
    folder = ours()
    read = lambda where: np.stack([np.asarray(Image.open(where / f"{i}.png"), dtype=int) for i in range(count)])
    mine, theirs = read(folder), read(run / "plain")
    print(f"sampling  {count} pictures of {len(prompts)} prompts, {s.sampler}, {s.sample_steps} steps, guidance "
          f"{s.cfg_scale}, batches of {s.sample_batch} and {n}; pictures differ by {np.abs(mine - theirs).max()} of 255 at "
          f"most, {np.abs(mine - theirs).mean():.2g} on average (spread of the pictures {mine.std():.0f})")
    unet, decode = probe.flops(shape, "unet", s.resolution), probe.flops(shape, "decode", s.resolution)
    work = count * (2 * s.sample_steps * unet + decode)
    tell("sampling", "images", count, (work, work), times, ceiling)


# ---- ranking ----

def ranking(s: Settings, shape: probe.Shape, rounds: int, ceiling: float) -> None:
    stage, run, device, n = probe.stage("03"), Path(s.run), models.device_of(s), s.candidates
    unets, scheduler = [models.load_unet(s, -1), models.load_unet(s, -1)], models.load_schedule(s)
    groups = [{"key": (1, i), "prompt": PROMPT.format(i), "images": [run / f"iter1/images/{i}_{c}.png" for c in range(n)]}
              for i in range(4 if s.resolution > 128 else 2)]
    rng = generator("bench")
    for g in groups:
        for image in g["images"]:
            save_latent({"mean": torch.randn((4, s.resolution // 8, s.resolution // 8), generator=rng)}, image)
    encoder = models.PromptEncoder(s).prepare([g["prompt"] for g in groups])
    ledger, found = Ledger(run, "bench", 1, str(device)), {}

    def ours():
        errors = stage.errors_of(s, unets, groups, ledger, "ours")
        found["ours"] = torch.stack(list(errors.values()), 1)                                    # (2, P, N, draws)

    @torch.no_grad()
    def plain():
        errors = torch.empty(2, len(groups), n, s.draws)
        for p, g in enumerate(groups):
            condition = encoder([g["prompt"]])
            for c, image in enumerate(g["images"]):
                x0 = models.stack_latents([image])[0].to(device)
                for d, (t, noise) in enumerate(zip(*stage.reward_draws(s, g["key"], x0.shape[1:]))):
                    t, noise = t[None].to(device), noise[None].to(device)
                    x_t = scheduler.add_noise(x0, noise, t)
                    for u, unet in enumerate(unets):
                        error = models.denoising_error(unet, scheduler, x_t, x0, noise, t, condition)
                        errors[u, p, c, d] = error.item()
        found["plain"] = errors

    times, count = alternate(ours, plain, rounds, device), len(groups) * n
    apart = (found["ours"] / found["plain"] - 1).abs().max()
    print(f"ranking   {count} candidates of {len(groups)} prompts, {s.draws} draws, model and anchor; errors agree to "
          f"{apart:.1e}")
    work = 2 * count * s.draws * probe.flops(shape, "unet", s.resolution)
    tell("ranking", "candidates", count, (work, work), times, ceiling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("training", "sampling", "ranking"))
    parser.add_argument("--preset", choices=tuple(PIPELINES), default="sd15")
    parser.add_argument("--full", action="store_true", help="the model's own sizes, for a CUDA device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's default")
    parser.add_argument("--compile", choices=("off", "on"), default="off", help="of ours in sampling and ranking")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        divide = 1 if args.full else SMALLER
        shape = make_pipeline(Path(folder) / "model", args.preset, divide)
        s = replace(settings_of(Path(folder), args.preset, args.full), compile=args.compile)
        device = models.device_of(s)
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
        print(f"{date.today()}, {name}, {str(models.dtype_of(s))[6:]}; "
              + ", ".join(f"{p} {version(p)}" for p in ("torch", "diffusers", "transformers"))
              + f"; {args.preset}, widths / {divide}, {s.resolution} px", flush=True)
        {"training": training, "sampling": sampling, "ranking": ranking}[args.what](
            s, shape, args.rounds, probe.matmul_rate(device, models.dtype_of(s)))


if __name__ == "__main__":
    main()

"""The parts of a latent diffusion model (SD1.x or SDXL): load, encode prompts once, predict noise, decode, sample."""

import functools
import gc
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from lib.run import UserError, atomic, latent_path, load_latent, save_latent
from lib.settings import ROOT, Settings

for logging in (diffusers_logging, transformers_logging):      # our own bars tell how far a stage is
    logging.disable_progress_bar()
    logging.set_verbosity_error()

VAE_PIXELS = 2 ** 21                                           # per VAE call: 8 pictures of 512 x 512; bounds its memory
SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmsolver": DPMSolverMultistepScheduler}

torch.backends.cuda.matmul.fp32_precision = "tf32"             # for what bf16 leaves in float32; errors and losses are sums


# ---- loading ----

def device_of(s: Settings) -> torch.device:
    if s.device != "auto":
        return torch.device(s.device)
    from accelerate import PartialState
    return PartialState().device


def dtype_of(s: Settings) -> torch.dtype:
    """Of frozen weights and of autocast; trained weights, errors and losses are float32 always."""
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    return torch.bfloat16 if device_of(s).type == "cuda" else torch.float32


def local_or_hub(name: str) -> str:
    """A folder (as given, or relative to the project), or a hub id of the form owner/name."""
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.split("/")[0] in ("lib", "runs"):
        raise UserError(f"model folder {name} does not exist; give a diffusers folder or a hub id like owner/name")
    return name


def _load(loader, name: str, **options):
    try:
        return loader(local_or_hub(name), **options)
    except (OSError, ValueError) as error:
        where = f"{name}/{options['subfolder']}" if options.get("subfolder") else name
        raise UserError(f"cannot load {where}: {str(error).splitlines()[0]}; check the folder or hub id") from None


@functools.cache
def pipeline_config(model: str) -> dict:
    """model_index.json: the pipeline's parts and options."""
    from diffusers import DiffusionPipeline
    return _load(DiffusionPipeline.load_config, model)


def is_sdxl(model: str) -> bool:
    """Whether the pipeline has a second text encoder."""
    return "text_encoder_2" in pipeline_config(model)


def unet_folder(s: Settings, k: int) -> Path | None:
    """Where model K of a run lies; None for k = -1, the base."""
    return None if k < 0 else Path(s.run) / f"iter{k}" / "unet"


def load_unet(s: Settings, k: int, trained: bool = False) -> UNet2DConditionModel:
    """The UNet of the base (k = -1) or of model K of the run: frozen in dtype_of(s), or trained in float32."""
    folder = unet_folder(s, k)
    dtype = torch.float32 if trained else dtype_of(s)
    if folder is None:
        unet = _load(UNet2DConditionModel.from_pretrained, s.model, subfolder="unet", dtype=dtype)
    elif not folder.exists():
        raise UserError(f"{folder} does not exist: run 04_train_dpo.py --run {s.run} --iter {k} first")
    else:
        unet = _load(UNet2DConditionModel.from_pretrained, str(folder), dtype=dtype)
    unet.requires_grad_(trained).train(trained)
    if s.compile == "on" and not trained:
        unet.compile()
    layout = torch.channels_last if device_of(s).type == "cuda" else torch.contiguous_format
    return unet.to(device_of(s), memory_format=layout)


def unet_config(s: Settings) -> dict:
    """The configuration of the base's UNet."""
    return _load(UNet2DConditionModel.load_config, s.model, subfolder="unet")


def load_sampler(s: Settings):
    """The sampler of the setting's kind, on the noise schedule that the model was trained on. Latents are not pictures
    in -1..1, and clipping them is the default of a sampler whose kind the model's own config does not share."""
    options = {} if s.sampler == "dpmsolver" else {"clip_sample": False}
    return _load(SAMPLERS[s.sampler].from_pretrained, s.model, subfolder="scheduler", **options)


def load_schedule(s: Settings) -> DDPMScheduler:
    """The noise schedule that the model was trained on, for add_noise and get_velocity at any timestep."""
    return _load(DDPMScheduler.from_pretrained, s.model, subfolder="scheduler")


def load_vae(s: Settings) -> AutoencoderKL:
    where = {} if s.vae else {"subfolder": "vae"}
    vae = _load(AutoencoderKL.from_pretrained, s.vae or s.model, dtype=dtype_of(s), **where)
    return vae.requires_grad_(False).eval().to(device_of(s))


# ---- pictures <-> latents ----

@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Posterior mean and std (B, C, h, w), in the UNet's scaled units, of pictures (B, 3, H, W) in 0..1."""
    parts = [vae.encode((p * 2 - 1).to(vae.device, vae.dtype)).latent_dist
             for p in pictures.split(max(1, VAE_PIXELS // pictures[0, 0].numel()))]
    return {"mean": torch.cat([p.mean for p in parts]) * vae.config.scaling_factor,
            "std": torch.cat([p.std for p in parts]) * vae.config.scaling_factor}


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in 0..1, float32 on the CPU, of scaled latents (B, C, h, w)."""
    pixels = latents[0, 0].numel() * 4 ** (len(vae.config.block_out_channels) - 1)
    parts = [vae.decode(part.to(vae.dtype)).sample
             for part in (latents / vae.config.scaling_factor).split(max(1, VAE_PIXELS // pixels))]
    return (torch.cat(parts).float() / 2 + .5).clamp(0, 1).cpu()


def ensure_latents(images: list[Path], s: Settings, open_one, mirrored: bool = False, batch: int = 16) -> None:
    """Encode the images (or their mirror images) that have no latent file yet; `open_one(i)` returns PIL image i.

    Batches are fixed by the list, and one with any latent missing is encoded whole: the same bits after a resume.
    Processes take turns by batch. Threads open the next batch while the VAE is at work.
    """
    from accelerate import PartialState
    from torchvision.transforms.functional import pil_to_tensor
    state, rows = PartialState(), {}
    for i, image in enumerate(images):
        rows.setdefault(image, i)                             # an image named twice is encoded once
    images = list(rows)
    lacks = lambda i: not latent_path(images[i], mirrored).exists()
    groups = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    groups = [g for g in groups[state.process_index::state.num_processes] if any(map(lacks, g))]
    if groups:
        vae = load_vae(s)
        with ThreadPoolExecutor(8) as readers:
            ask = lambda g: [readers.submit(open_one, rows[images[i]]) for i in g]
            coming = ask(groups[0])
            for n, group in enumerate(tqdm(groups, desc="latents", unit="batch", disable=not state.is_local_main_process)):
                pictures = torch.stack([pil_to_tensor(picture.result()) for picture in coming]).float() / 255
                coming = ask(groups[n + 1]) if n + 1 < len(groups) else []
                posterior = encode(vae, pictures.flip(-1) if mirrored else pictures)
                for j, i in enumerate(group):
                    if lacks(i):
                        save_latent({k: v[j].cpu() for k, v in posterior.items()}, images[i], mirrored)
    state.wait_for_everyone()


def stack_latents(images: list[Path], mirrored: list[bool] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and stds (B, C, h, w) in float32 of images' latent files; the std of a sampler's own latent is 0."""
    parts = [load_latent(*one) for one in zip(images, mirrored or [False] * len(images))]
    mean = torch.stack([p["mean"] for p in parts]).float()
    std = torch.stack([p["std"] if "std" in p else torch.zeros_like(p["mean"]) for p in parts]).float()
    return mean, std


# ---- prompts ----

class PromptEncoder:
    """Prompt embeddings, made once per run and kept in <run>/embeds; the text encoders load only if one is missing."""

    def __init__(self, s: Settings):
        self.s, self.folder = s, Path(s.run) / "embeds"
        self.read = functools.lru_cache(maxsize=20_000 if s.resolution < 256 else 512)(self._read)

    def _path(self, prompt: str) -> Path:
        return self.folder / (hashlib.sha256(prompt.encode()).hexdigest()[:24] + ".safetensors")

    def _read(self, prompt: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file
        return load_file(self._path(prompt))

    def prepare(self, prompts: list[str], batch: int = 64) -> "PromptEncoder":
        """Encode what is missing of these prompts (the empty one is always there), in batches fixed by the list."""
        from safetensors.torch import save_file
        prompts = ["", *dict.fromkeys(p for p in prompts if p)]
        groups = [prompts[i:i + batch] for i in range(0, len(prompts), batch)]
        groups = [g for g in groups if not all(self._path(p).exists() for p in g)]
        if not groups:
            return self
        encoders = self._load_encoders()
        for group in groups:                                  # whole groups: the same batch, so the same bits
            for prompt, tensors in zip(group, self._encode(encoders, group)):
                if not self._path(prompt).exists():
                    with atomic(self._path(prompt)) as temporary:
                        save_file(tensors, temporary)
        del encoders
        gc.collect()
        return self

    def _load_encoders(self) -> list[tuple]:
        parts = [("tokenizer", "text_encoder", CLIPTextModel)]
        if is_sdxl(self.s.model):
            parts.append(("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
        return [(_load(AutoTokenizer.from_pretrained, self.s.model, subfolder=tokenizer),
                 _load(kind.from_pretrained, self.s.model, subfolder=encoder, dtype=dtype_of(self.s)
                       ).to(device_of(self.s)).eval()) for tokenizer, encoder, kind in parts]

    @torch.no_grad()
    def _encode(self, encoders: list[tuple], prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        """SD1.x uses the last hidden state; SDXL the last but one of both encoders, and the second's projection."""
        states, pooled = [], None
        for tokenizer, encoder in encoders:
            tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt",
                               max_length=encoder.config.max_position_embeddings).input_ids.to(encoder.device)
            out = encoder(tokens, output_hidden_states=len(encoders) > 1)
            states.append(out.hidden_states[-2] if len(encoders) > 1 else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", None)
        rows = {"embeds": torch.cat(states, -1).cpu()} | ({"pooled": pooled.cpu()} if pooled is not None else {})
        return [{k: v[i].contiguous() for k, v in rows.items()} for i in range(len(prompts))]

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Conditioning of a batch on the device: embeds (B, T, D), and for SDXL pooled (B, P)."""
        rows = [self.read(p) for p in prompts]
        return {k: torch.stack([r[k] for r in rows]).to(device_of(self.s), non_blocking=True) for k in rows[0]}

    def unconditional(self) -> dict[str, torch.Tensor]:
        """What guidance leads away from, (1, ...): the empty prompt, or the zeros that SDXL's pipeline has for it."""
        empty, config = self([""]), pipeline_config(self.s.model)
        zeros = is_sdxl(self.s.model) and config.get("force_zeros_for_empty_prompt", True)
        return {k: torch.zeros_like(v) for k, v in empty.items()} if zeros else empty


def repeat(condition: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """Each row `times` times in a row."""
    return {k: v.repeat_interleave(times, 0) for k, v in condition.items()}


def join(*conditions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([c[k] for c in conditions]) for k in conditions[0]}


# ---- noise ----

def predict(unet, noisy: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    """The UNet's output (B, C, h, w) in float32 for noisy latents (B, C, h, w), timesteps (B,) or a scalar."""
    dtype = next(unet.parameters()).dtype
    added = None
    if "pooled" in condition:                                 # SDXL: original size, crop corner, target size
        pixels = noisy.shape[-1] * 8
        time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=noisy.device, dtype=dtype)
        added = {"text_embeds": condition["pooled"].to(dtype), "time_ids": time_ids.repeat(len(noisy), 1)}
    return unet(noisy.to(dtype), timesteps, condition["embeds"].to(dtype), added_cond_kwargs=added).sample.float()


def denoising_error(unet, scheduler, noisy: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor,
                    timesteps: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
    """e(x) = mean over C, h, w of (target - prediction)^2, (B,) in float32.

    The target is the noise, or the velocity where the scheduler's prediction_type says so.
    """
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v else noise
    return (predict(unet, noisy, timesteps, condition) - target).square().mean((1, 2, 3))


@torch.no_grad()
def sample(unet, scheduler, noise: torch.Tensor, condition: dict[str, torch.Tensor], empty: dict[str, torch.Tensor],
           steps: int, cfg_scale: float, generators: list[torch.Generator], tick=lambda: None) -> torch.Tensor:
    """Latents (B, C, h, w) drawn from noise (B, C, h, w) of unit variance; `generators` feed a stochastic sampler.

    Each image uses its own noise and generator only, so a picture does not depend on its batch.
    """
    scheduler.set_timesteps(steps)                            # on the CPU: a step then never waits for the device
    guided = cfg_scale != 1
    condition = join(repeat(empty, len(noise)), condition) if guided else condition
    latents = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, t)
        prediction = predict(unet, inputs, t, condition)
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + cfg_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, t, latents, generator=generators).prev_sample
        tick()
    return latents

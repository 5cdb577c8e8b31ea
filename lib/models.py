"""The parts of a latent diffusion model, SD1.x or SDXL, as a run needs them.

A picture's latent and a prompt's embedding never change, so each is made once and kept in the run
folder: the VAE and the text encoders are at rest while the UNet is ranked and trained
(`ensure_latents`, `PromptEncoder`). What is computed with the parts is in lib/diffusion.py.

The models of a run have numbers: BASE, 0 (Iter0), 1, 2, ...
"""

import functools
import gc
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       UNet2DConditionModel)
from diffusers.utils import logging as diffusers_logging

from lib.run import (UserError, atomic, bar, latent_path, load_latent, my_share, save_latent,
                     wait)
from lib.settings import ROOT, Settings

BASE = -1

# What the setting `sampler` calls them.
SAMPLERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}

VAE_PIXELS = 2 ** 21             # per call of the VAE, 8 pictures of 512 x 512: bounds its memory
ENCODE_BATCH = 16                # pictures that `ensure_latents` encodes together
PROMPT_BATCH = 64                # prompts that are encoded together

# Our own bars tell how far a stage is.
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()

# What bf16 leaves in float32 may use the tensor cores; errors and losses are sums, which stay in
# float32.
torch.backends.cuda.matmul.fp32_precision = "tf32"


# ---- where and in what precision ----

def device_of(s: Settings) -> torch.device:
    """The device of this process."""
    if s.device != "auto":
        return torch.device(s.device)

    # Of several processes each has a card of its own.
    from accelerate import PartialState
    return PartialState().device


def dtype_of(s: Settings) -> torch.dtype:
    """The precision of frozen weights and of autocast.

    Trained weights, errors and losses are float32 always.
    """
    if s.dtype != "auto":
        return getattr(torch, s.dtype)
    if device_of(s).type == "cuda":
        return torch.bfloat16
    return torch.float32


# ---- loading ----

def local_or_hub(name: str) -> str:
    """A folder (as given, or relative to the project), or a hub id of the form owner/name.

    UserError: the name is that of a folder which does not exist.
    """
    for folder in (Path(name), ROOT / name):
        if folder.is_dir():
            return str(folder)

    # The hub is not asked for what can only be a folder: it would try again and again.
    looks_local = name.startswith((".", "/", "~")) or name.split("/")[0] in ("lib", "runs")
    if looks_local or name.count("/") != 1:
        raise UserError(
            f"model folder {name} does not exist; "
            f"give a diffusers folder or a hub id like owner/name"
        )
    return name


def load_part(loader, name: str, **options):
    """Call a `from_pretrained`-like loader, and say in one line what could not be loaded."""
    try:
        return loader(local_or_hub(name), **options)
    except (OSError, ValueError) as error:
        where = name
        if options.get("subfolder"):
            where = f"{name}/{options['subfolder']}"

        # The further lines of such a message are diffusers' advice.
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load {where}: {reason}; check the folder or hub id") from None


@functools.cache
def pipeline_config(model: str) -> dict:
    """model_index.json: the pipeline's parts and options."""
    from diffusers import DiffusionPipeline
    return load_part(DiffusionPipeline.load_config, model)


def is_sdxl(model: str) -> bool:
    """Whether the pipeline has a second text encoder."""
    return "text_encoder_2" in pipeline_config(model)


def unet_folder(s: Settings, k: int) -> Path | None:
    """Where model k of the run lies; None for the base, which lies elsewhere."""
    if k == BASE:
        return None
    return Path(s.run) / f"iter{k}" / "unet"


def load_unet(s: Settings, k: int, trained: bool = False) -> UNet2DConditionModel:
    """The UNet of the base or of model k of the run, on the device.

    It is frozen in dtype_of(s), or, if `trained`, to be trained, in float32. UserError: model k
    does not exist yet.
    """
    dtype = dtype_of(s)
    if trained:
        dtype = torch.float32

    loader = UNet2DConditionModel.from_pretrained
    folder = unet_folder(s, k)
    if folder is None:
        unet = load_part(loader, s.model, subfolder="unet", dtype=dtype)
    elif folder.exists():
        unet = load_part(loader, str(folder), dtype=dtype)
    else:
        raise UserError(
            f"{folder} does not exist: run 04_train_dpo.py --run {s.run} --iter {k} first"
        )

    unet.requires_grad_(trained).train(trained)

    # --compile is for frozen UNets only.
    if s.compile == "on" and not trained:
        unet.compile()
    return to_device(s, unet)


def to_device(s: Settings, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet on the device, in the memory format that is fast there."""
    device = device_of(s)

    # On CUDA convolutions are faster on channels-last weights.
    if device.type == "cuda":
        return unet.to(device, memory_format=torch.channels_last)
    return unet.to(device, memory_format=torch.contiguous_format)


def unet_config(s: Settings) -> dict:
    """The configuration of the base's UNet."""
    return load_part(UNet2DConditionModel.load_config, s.model, subfolder="unet")


def load_sampler(s: Settings):
    """The sampler of the settings, on the noise schedule that the model was trained on."""
    # Latents are not pictures in -1..1. Clipping them is the default of a sampler whose kind the
    # model's own config does not share, so it is switched off by name. dpmsolver has no clipping.
    options = {"clip_sample": False}
    if s.sampler == "dpmsolver":
        options = {}

    loader = SAMPLERS[s.sampler].from_pretrained
    return load_part(loader, s.model, subfolder="scheduler", **options)


def load_schedule(s: Settings) -> DDPMScheduler:
    """The noise schedule that the model was trained on, for noising at any timestep."""
    return load_part(DDPMScheduler.from_pretrained, s.model, subfolder="scheduler")


def load_vae(s: Settings) -> AutoencoderKL:
    """The VAE of the settings, or the model's own: frozen, in dtype_of(s), on the device."""
    loader = AutoencoderKL.from_pretrained
    if s.vae:
        vae = load_part(loader, s.vae, dtype=dtype_of(s))
    else:
        vae = load_part(loader, s.model, subfolder="vae", dtype=dtype_of(s))
    return vae.requires_grad_(False).eval().to(device_of(s))


# ---- pictures <-> latents ----

@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """The VAE's posterior of pictures (B, 3, H, W) in 0..1: `mean` and `std`, each (B, C, h, w).

    Both are in the UNet's units, which are the VAE's times its scaling factor.
    """
    at_once = max(1, VAE_PIXELS // pictures[0, 0].numel())
    means = []
    stds = []
    for part in pictures.split(at_once):
        # The VAE was trained on pictures in -1..1.
        part = (part * 2 - 1).to(vae.device, vae.dtype)
        posterior = vae.encode(part).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)

    scale = vae.config.scaling_factor
    return {"mean": torch.cat(means) * scale, "std": torch.cat(stds) * scale}


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in 0..1, float32 on the CPU, of scaled latents (B, C, h, w)."""
    pixels = latents[0, 0].numel() * vae_factor(vae) ** 2
    at_once = max(1, VAE_PIXELS // pixels)

    # Back from the UNet's units to the VAE's.
    latents = latents / vae.config.scaling_factor
    parts = []
    for part in latents.split(at_once):
        parts.append(vae.decode(part.to(vae.dtype)).sample)

    # From -1..1, which the VAE may overshoot a little, to 0..1.
    pictures = torch.cat(parts).float()
    return (pictures / 2 + .5).clamp(0, 1).cpu()


def vae_factor(vae: AutoencoderKL) -> int:
    """Pixels per side of a picture for one of its latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def ensure_latents(images: list[Path], s: Settings, open_picture, mirrored: bool = False) -> None:
    """Encode the pictures (or their mirror images) that have no latent file yet.

    `open_picture(i)` returns PIL image i of the list. Batches are fixed by the list, and one with
    any latent missing is encoded whole: the same bits after a resume.
    """
    # A picture that is named twice is encoded once.
    number = {}
    for i, image in enumerate(images):
        number.setdefault(image, i)
    images = list(number)

    # Of this process's turn, the batches that lack a latent.
    starts = range(0, len(images), ENCODE_BATCH)
    batches = []
    for start in my_share(starts):
        batch = images[start:start + ENCODE_BATCH]
        if lacking_latents(batch, mirrored):
            batches.append(batch)

    def open_by_path(image: Path):
        return open_picture(number[image])

    if batches:
        encode_batches(batches, s, open_by_path, mirrored)
    wait()


def lacking_latents(images: list[Path], mirrored: bool) -> list[Path]:
    """The pictures that have no latent file."""
    return [image for image in images if not latent_path(image, mirrored).exists()]


def encode_batches(batches: list[list[Path]], s: Settings, open_picture, mirrored: bool) -> None:
    """Write the latent files of whole batches.

    Threads open the pictures of the next batch while the VAE is at work on one.
    """
    vae = load_vae(s)
    with ThreadPoolExecutor(8) as readers:
        coming = [readers.submit(open_picture, image) for image in batches[0]]
        for n, batch in enumerate(bar(batches, "latents", "batch")):
            pictures = as_batch([future.result() for future in coming])

            # The next batch is read while this one is encoded.
            if n + 1 < len(batches):
                coming = [readers.submit(open_picture, image) for image in batches[n + 1]]

            if mirrored:
                pictures = pictures.flip(-1)
            posterior = encode(vae, pictures)
            keep_posterior(posterior, batch, mirrored)


def as_batch(pictures: list) -> torch.Tensor:
    """PIL images of one size as a tensor (B, 3, H, W) in 0..1."""
    from torchvision.transforms.functional import pil_to_tensor
    tensors = [pil_to_tensor(picture) for picture in pictures]
    return torch.stack(tensors).float() / 255


def keep_posterior(posterior: dict[str, torch.Tensor], images: list[Path], mirrored: bool) -> None:
    """Write the latent files that are lacking; row i of the posterior is that of picture i."""
    # The batch was encoded whole, but a file that exists stays as it is.
    lacking = lacking_latents(images, mirrored)
    for i, image in enumerate(images):
        if image not in lacking:
            continue
        latent = {name: rows[i].cpu() for name, rows in posterior.items()}
        save_latent(latent, image, mirrored)


def stack_latents(images: list[Path],
                  mirrored: list[bool] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and stds (B, C, h, w), in float32, of pictures' latent files.

    `mirrored` says of each picture whether its mirror image is meant. A sampler's own latent has
    std 0.
    """
    if mirrored is None:
        mirrored = [False] * len(images)

    means = []
    stds = []
    for image, flipped in zip(images, mirrored):
        latent = load_latent(image, flipped)
        mean = latent["mean"]
        means.append(mean)

        # What the sampler drew is the latent itself, and no distribution.
        stds.append(latent.get("std", torch.zeros_like(mean)))
    return torch.stack(means).float(), torch.stack(stds).float()


# ---- prompts ----

class PromptEncoder:
    """Prompt embeddings, made once per run and kept in <run>/embeds.

    The text encoders load only if one is missing.
    """

    def __init__(self, s: Settings):
        self.s = s
        self.folder = Path(s.run) / "embeds"

        # As many stay in memory as take some hundred MB.
        size = 512
        if s.resolution < 256:
            size = 20_000
        self.read = functools.lru_cache(maxsize=size)(self.read_file)

    def path(self, prompt: str) -> Path:
        """The file of a prompt's embedding."""
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"

    def read_file(self, prompt: str) -> dict[str, torch.Tensor]:
        """A prompt's embedding as `encode` made it."""
        from safetensors.torch import load_file
        return load_file(self.path(prompt))

    def prepare(self, prompts: list[str]) -> "PromptEncoder":
        """Encode what is missing of these prompts, in batches fixed by the list.

        The empty prompt is always there.
        """
        prompts = ["", *dict.fromkeys(prompt for prompt in prompts if prompt)]

        # Whole batches, also where only one prompt is missing: the same batch gives the same bits.
        batches = []
        for start in range(0, len(prompts), PROMPT_BATCH):
            batch = prompts[start:start + PROMPT_BATCH]
            if not all(self.path(prompt).exists() for prompt in batch):
                batches.append(batch)
        if not batches:
            return self

        encoders = self.load_encoders()
        for batch in batches:
            self.keep(batch, self.encode(encoders, batch))

        # SDXL's second encoder alone takes more than a gigabyte.
        del encoders
        gc.collect()
        return self

    def keep(self, prompts: list[str], conditions: list[dict[str, torch.Tensor]]) -> None:
        """Write the embeddings that have no file yet."""
        from safetensors.torch import save_file
        # A file that exists stays as it is: what a run has used does not change.
        for prompt, condition in zip(prompts, conditions):
            path = self.path(prompt)
            if path.exists():
                continue
            with atomic(path) as temporary:
                save_file(condition, temporary)

    def load_encoders(self) -> list[tuple]:
        """(tokenizer, text encoder), of SDXL two."""
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
        from transformers.utils import logging as transformers_logging
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

        model = self.s.model
        parts = [("tokenizer", "text_encoder", CLIPTextModel)]
        if is_sdxl(model):
            parts.append(("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))

        device = device_of(self.s)
        dtype = dtype_of(self.s)
        encoders = []
        for tokenizer_folder, encoder_folder, kind in parts:
            tokenizer = load_part(AutoTokenizer.from_pretrained, model,
                                  subfolder=tokenizer_folder)
            encoder = load_part(kind.from_pretrained, model,
                                subfolder=encoder_folder, dtype=dtype)
            encoders.append((tokenizer, encoder.to(device).eval()))
        return encoders

    @torch.no_grad()
    def encode(self, encoders: list[tuple], prompts: list[str]) -> list[dict[str, torch.Tensor]]:
        """One condition per prompt: embeds (T, D), and for SDXL pooled (P,).

        SD1.x uses the encoder's last hidden state; SDXL the last but one of both encoders, side by
        side, and the second one's projection as well.
        """
        both = len(encoders) > 1
        states = []
        for tokenizer, encoder in encoders:
            # Every prompt is filled up, or cut, to the encoder's length.
            tokens = tokenizer(
                prompts,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
                max_length=encoder.config.max_position_embeddings,
            ).input_ids
            output = encoder(tokens.to(encoder.device), output_hidden_states=both)

            # As each model's own pipeline takes it.
            if both:
                states.append(output.hidden_states[-2])
            else:
                states.append(output.last_hidden_state)

        batch = {"embeds": torch.cat(states, -1).cpu()}
        if both:
            batch["pooled"] = output.text_embeds.cpu()

        # Each prompt has a file of its own.
        conditions = []
        for i in range(len(prompts)):
            condition = {}
            for name, rows in batch.items():
                condition[name] = rows[i].contiguous()
            conditions.append(condition)
        return conditions

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The condition of a batch, on the device: embeds (B, T, D), and for SDXL pooled (B, P)."""
        device = device_of(self.s)
        conditions = [self.read(prompt) for prompt in prompts]
        batch = {}
        for name in conditions[0]:
            rows = torch.stack([condition[name] for condition in conditions])
            batch[name] = rows.to(device, non_blocking=True)
        return batch

    def unconditional(self) -> dict[str, torch.Tensor]:
        """The condition (1, ...) that guidance leads away from.

        It is the empty prompt, or the zeros that SDXL's pipeline has for it.
        """
        empty = self([""])
        model = self.s.model
        zeros = pipeline_config(model).get("force_zeros_for_empty_prompt", True)
        if is_sdxl(model) and zeros:
            return {name: torch.zeros_like(rows) for name, rows in empty.items()}
        return empty

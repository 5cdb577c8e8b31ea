"""The parts of a latent diffusion model, SD1.x or SDXL, as a run needs them.

A picture's latent and a prompt's embedding never change, so each is made once and kept in the run
folder: the VAE and the text encoders are at rest while the UNet is ranked and trained
(`ensure_latents`, `PromptEncoder`). What is computed with the parts is in lib/diffusion.py.

The models of a run have numbers: BASE, 0 (Iter0), 1, 2, ...
"""

import functools
import gc
import hashlib
import inspect
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       UNet2DConditionModel)
from diffusers.utils import logging as diffusers_logging

from lib import hub, packs
from lib.hub import local_or_hub
from lib.program import one_line
from lib.run import (UserError, bar, is_from_latent, is_main, is_whole_model, latent_path,
                     load_latent, my_share, save_latent, save_latents, save_tensors, wait)
from lib.settings import Settings

BASE = -1

# Before the names of weights that were saved from a compiled model.
COMPILED = "_orig_mod."

# What the setting `sampler` calls them.
SAMPLERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
}

VAE_PIXELS = 2 ** 21             # per call of the VAE, 8 pictures of 512 x 512: bounds its memory
WORLD_PIXELS = 32 ** 2           # of a picture of the embedded world
ENCODE_BATCH = 16                # pictures that `ensure_latents` encodes together
PROMPT_BATCH = 64                # prompts that are encoded together

# A word of CLIP's tokenizer is made of bytes: each is one itself, and another at a word's end.
BYTES_OF_CLIP = 512

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

def load_part(loader, name: str, remedy: str = "", **options):
    """Call a `from_pretrained`-like loader, and say in one line what could not be loaded."""
    try:
        return loader(local_or_hub(name), **options)
    except (UserError, MemoryError):
        raise
    # Damaged and foreign files raise nearly every kind of error.
    except Exception as error:
        where = f"{name}/{options.get('subfolder', '')}".rstrip("/")
        reason = f"{hub.first_line(error)}; {remedy}" if remedy else hub.why(error, name)
        raise UserError(f"cannot load {where}: {reason}") from None


def load_weights(kind, name: str, folder: str = "", stem: str = "diffusion_pytorch_model",
                 remedy: str = "download it again", **options):
    """A part of a model (a UNet, VAE or text encoder), in evaluation mode, on the CPU.

    UserError: there are no weights, some are missing, or some are not finite.
    """
    source = local_or_hub(name)
    inside = f"{folder}/" if folder else ""
    files, found = hub.weight_files(source, inside, stem)
    if folder:
        found = found | {"subfolder": folder}

    # A checkpoint of one's own training may have the names that torch.compile gives.
    paths = [hub.file_at(source, file) for file in files]
    compiled = any(key.startswith(COMPILED) for key in hub.keys_of(paths[0]))
    if compiled and kind in (UNet2DConditionModel, AutoencoderKL):
        loader = functools.partial(load_compiled, kind, paths)
    else:
        loader = functools.partial(kind.from_pretrained, use_safetensors=True,
                                   output_loading_info=True)
    part, info = load_part(loader, name, remedy, **found, **options)

    refuse_unsound(part, info["missing_keys"], f"{name}/{folder}".rstrip("/"), remedy)
    return part.eval()


def load_compiled(kind, files: list[Path], name: str, dtype: torch.dtype, subfolder: str = "",
                  **_) -> tuple:
    """A part whose weights have torch.compile's names, and what is missing of them."""
    from safetensors.torch import load_file

    state = {}
    for file in files:
        for key, weight in load_file(file).items():
            state[key.removeprefix(COMPILED)] = weight

    part = kind.from_config(kind.load_config(name, subfolder=subfolder))
    missing = part.load_state_dict(state, strict=False).missing_keys
    return part.to(dtype), {"missing_keys": missing}


def refuse_unsound(part: torch.nn.Module, missing: Iterable[str], where: str, remedy: str) -> None:
    """UserError unless a part has all its weights, and all of them finite."""
    missing = sorted(missing)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: its weights lack {missing[0]}{more}; {remedy}")

    for name, weight in part.named_parameters():
        # A sum is not finite unless all are, and takes no memory; it may itself overflow.
        finite = weight.sum(dtype=torch.float32).isfinite()
        if not finite and not weight.isfinite().all():
            raise UserError(f"{where}: its weights are not finite ({name}); {remedy}")


# ---- configurations ----

@functools.cache
def pipeline_config(model: str) -> dict:
    """model_index.json: the pipeline's parts and options."""
    from diffusers import DiffusionPipeline
    return read_config(DiffusionPipeline, model)


def is_sdxl(model: str) -> bool:
    """Whether the pipeline has a second text encoder."""
    return "text_encoder_2" in pipeline_config(model)


def read_config(kind, name: str, folder: str = "") -> dict:
    """The configuration file of a part, as it is."""
    options = {"subfolder": folder} if folder else {}
    config = load_part(kind.load_config, name, **options)
    if not isinstance(config, dict) or not config:
        raise UserError(f"{name}/{folder}: its configuration is empty, or no JSON object; download "
                        f"it again")
    return config


def config_of(kind, name: str, folder: str = "") -> dict:
    """The configuration of a part, with its class's own values where its file is silent."""
    defaults = {}
    for parameter in inspect.signature(kind.__init__).parameters.values():
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    return defaults | read_config(kind, name, folder)


def unet_config(s: Settings) -> dict:
    """The configuration of the base's UNet."""
    return config_of(UNet2DConditionModel, s.model, "unet")


def vae_config(s: Settings) -> dict:
    """The configuration of the VAE of the settings, or else of the model's own."""
    return config_of(AutoencoderKL, *vae_place(s))


def vae_place(s: Settings) -> tuple[str, str]:
    """The folder or hub model that the VAE comes from, and its place in there."""
    if s.vae:
        return s.vae, ""
    return s.model, "vae"


def resolution_step(s: Settings) -> int:
    """What the sides of a picture must be multiples of, in pixels.

    The VAE makes one latent of so many pixels a side, and the UNet halves these again.
    """
    pixels = pixels_per_latent(vae_config(s))
    halvings = len(unet_config(s)["down_block_types"]) - 1
    return pixels * 2 ** halvings


# ---- parts ----

def unet_folder(s: Settings, k: int) -> Path | None:
    """Where model k of the run lies; None for the base, which lies elsewhere."""
    if k == BASE:
        return None
    return Path(s.run) / f"iter{k}" / "unet"


def load_unet(s: Settings, k: int, trained: bool = False) -> UNet2DConditionModel:
    """The UNet of the base or of model k of the run, on the device.

    It is frozen in dtype_of(s), or, if `trained`, to be trained, in float32. UserError: model k
    does not exist yet, or is damaged.
    """
    dtype = dtype_of(s)
    if trained:
        dtype = torch.float32

    folder = unet_folder(s, k)
    if folder is None:
        unet = load_weights(UNet2DConditionModel, s.model, "unet", dtype=dtype)
    elif folder.exists():
        remedy = f"delete {folder} and run 04_train_dpo.py --run {s.run} --iter {k}"
        if not is_whole_model(folder):
            raise UserError(f"{folder}: a file of the model is missing or damaged; {remedy}")
        unet = load_weights(UNet2DConditionModel, str(folder), remedy=remedy, dtype=dtype)
    else:
        raise UserError(
            f"{folder} does not exist: run 04_train_dpo.py --run {s.run} --iter {k} first"
        )

    unet.requires_grad_(trained).train(trained)
    if trained:
        return unet.to(device_of(s))
    return to_device(s, unet)


def to_device(s: Settings, unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The frozen UNet on the device, compiled where the settings want that."""
    # Not channels_last: on an H100 it is a tenth slower where nothing is compiled, and the same for
    # SDXL's compiled forward (tests/bench).
    if is_compiled(s):
        unet.compile()
    return unet.to(device_of(s))


def is_compiled(s: Settings) -> bool:
    """Whether frozen UNets are compiled; `auto` is on a card, where that works."""
    if s.compile == "auto":
        return device_of(s).type == "cuda" and can_compile(device_of(s))
    return s.compile == "on"


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Try torch.compile on a sum, and say once what comes of it: it wants a C compiler, for one."""
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
    # A missing compiler, or one that fails, raises every kind of error.
    except Exception as error:
        if is_main():
            print(f"torch.compile does not work here ({one_line(str(error))}): slower without it",
                  file=sys.stderr)
        return False
    if is_main():
        print("compiling the UNet: its first batch takes a minute or two, and so may a batch of "
              "another size; --compile off does without", file=sys.stderr)
    return True


def load_sampler(s: Settings):
    """The sampler of the settings, on the noise schedule that the model was trained on."""
    # Latents are not pictures in -1..1. Clipping them is the default of a sampler whose kind the
    # model's own config does not share, so it is switched off by name. dpmsolver has no clipping.
    options = {"clip_sample": False}
    if s.sampler == "dpmsolver":
        options = {}

    # SD1.x's pipeline counts its timesteps from 1, whatever the file says.
    if not is_sdxl(s.model):
        options["steps_offset"] = 1

    loader = SAMPLERS[s.sampler].from_pretrained
    return load_part(loader, s.model, subfolder="scheduler", **options)


def load_schedule(s: Settings) -> DDPMScheduler:
    """The noise schedule that the model was trained on, for noising at any timestep."""
    return load_part(DDPMScheduler.from_pretrained, s.model, subfolder="scheduler")


def load_vae(s: Settings) -> AutoencoderKL:
    """The VAE of the settings, or the model's own: frozen, in dtype_of(s), on the device."""
    # Some, SDXL's among them, overflow in half precision, and say so.
    dtype = dtype_of(s)
    if dtype == torch.float16 and vae_config(s)["force_upcast"]:
        dtype = torch.float32

    vae = load_weights(AutoencoderKL, *vae_place(s), dtype=dtype)
    return vae.requires_grad_(False).to(device_of(s))


def try_weights(s: Settings) -> None:
    """Load every part of the model once, on the CPU, and let it go.

    UserError: weights are missing or not finite. So it is told before pairs are fetched for hours.
    """
    dtype = str(dtype_of(s)).removeprefix("torch.")
    on_cpu = replace(s, device="cpu", dtype=dtype, compile="off")
    load_unet(on_cpu, BASE)
    load_vae(on_cpu)
    PromptEncoder(on_cpu).load_encoders()
    gc.collect()


# ---- pictures <-> latents ----

@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """The VAE's posterior of pictures (B, 3, H, W) in 0..1: `mean` and `std`, each (B, C, h, w).

    Both are in the UNet's units (`latent_units`). UserError: they are not finite.
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

    mean, std = torch.cat(means), torch.cat(stds)
    shift, scale = latent_units(vae)
    refuse_not_finite(mean + std, f"latents by the VAE {name_of(vae)}", vae.dtype)
    return {"mean": (mean - shift) * scale, "std": std * scale}


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in 0..1, float32 on the CPU, of latents (B, C, h, w) in the UNet's
    units. UserError: they are not finite."""
    pixels = latents[0, 0].numel() * pixels_per_latent(vae.config) ** 2
    at_once = decoded_at_once(pixels)

    # Back from the UNet's units to the VAE's.
    shift, scale = latent_units(vae)
    latents = latents / scale + shift
    parts = []
    for part in latents.split(at_once):
        part = part.to(vae.dtype).contiguous()
        parts.append(vae.decode(part).sample)

    # From -1..1, which the VAE may overshoot a little, to 0..1.
    pictures = torch.cat(parts).float().cpu()
    refuse_not_finite(pictures, f"pictures by the VAE {name_of(vae)}", vae.dtype)
    return (pictures / 2 + .5).clamp(0, 1)


def decoded_at_once(pixels: int) -> int:
    """How many pictures of so many pixels each the VAE decodes in one call.

    Alone in its call a picture has the same bits today and when it is decoded again beside others.
    The embedded world's small pictures, which are all kept, go together: that is much faster.
    """
    if pixels <= WORLD_PIXELS:
        return VAE_PIXELS // pixels
    return 1


def decode_kept(vae: AutoencoderKL, images: list[Path]) -> list:
    """PIL images of pictures that are made from their latents (run.is_from_latent).

    They have the pixels that a PNG of the sampler's own picture would have.
    """
    from torchvision.transforms.functional import to_pil_image
    latents, _ = stack_latents(images)
    return [to_pil_image(picture) for picture in decode(vae, latents.to(vae.device))]


def latent_units(vae: AutoencoderKL) -> tuple:
    """(shift, scale): a latent in the UNet's units is (the VAE's - shift) * scale.

    Most VAEs have one scale; some give mean and spread of each channel of their latents.
    """
    config = vae.config
    if config.latents_mean is None or config.latents_std is None:
        return 0., config.scaling_factor
    mean = torch.tensor(config.latents_mean, device=vae.device).view(1, -1, 1, 1)
    spread = torch.tensor(config.latents_std, device=vae.device).view(1, -1, 1, 1)
    return mean, config.scaling_factor / spread


def refuse_not_finite(values: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """UserError if any value is not a number, or infinite: nothing of that kind is written."""
    if values.isfinite().all():
        return
    precision = str(dtype).removeprefix("torch.")
    remedy = "another model or VAE"
    if dtype != torch.float32:
        remedy = f"--dtype float32, or with {remedy}"
    raise UserError(f"{what} are not finite in {precision}; start a run in another folder (--run) "
                    f"with {remedy}")


def name_of(vae: AutoencoderKL) -> str:
    """The folder or hub id that a VAE was loaded from."""
    return vae.config.get("_name_or_path", "")


def latent_shape(s: Settings) -> tuple[int, int, int]:
    """The shape (C, h, w) of the latents of this run's pictures."""
    vae = vae_config(s)
    side = s.resolution // pixels_per_latent(vae)
    return vae["latent_channels"], side, side


def pixels_per_latent(vae: dict) -> int:
    """How many pixels a side of a picture has for one of its latent, by a VAE's configuration."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def ensure_latents(images: list[Path], s: Settings, open_picture, mirrored: bool = False) -> None:
    """Encode the pictures (or their mirror images) that have no latent file yet.

    `open_picture(i)` returns PIL image i of the list. Batches are fixed by the list, and one with
    any latent missing or damaged is encoded whole: the same bits after a resume.
    """
    keep_inside(s, [latent_path(image) for image in images])

    # A picture that is named twice is encoded once.
    number = {}
    for i, image in enumerate(images):
        number.setdefault(image, i)
    images = list(number)

    # Of this process's turn, the batches that lack a latent.
    starts = range(0, len(images), ENCODE_BATCH)
    shape = latent_shape(s)
    batches = []
    lacking = []
    for start in my_share(starts):
        batch = images[start:start + ENCODE_BATCH]
        here = lacking_latents(batch, mirrored, shape)
        if here:
            batches.append(batch)
            lacking += here
    if not mirrored:
        refuse_lost_candidates(lacking)
    tell_damaged([latent_path(image, mirrored) for image in lacking])

    def open_by_path(image: Path):
        return open_picture(number[image])

    if batches:
        encode_batches(batches, s, open_by_path, mirrored)
    wait()


def refuse_lost_candidates(lacking: list[Path]) -> None:
    """UserError if one of the pictures without a latent is to be made from that very latent."""
    for image in lacking:
        if is_from_latent(image):
            k = image.parent.parent.name.removeprefix("iter")
            raise UserError(f"{latent_path(image)}: is missing or damaged, and the picture was not "
                            f"kept; run 02_generate.py --iter {k} again, which draws it again")


def lacking_latents(images: list[Path], mirrored: bool, shape: tuple[int, ...]) -> list[Path]:
    """The pictures that have no latent file, or none that is whole and has this shape."""
    return [image for image in images if not has_latent(image, mirrored, shape)]


def has_latent(image: Path, mirrored: bool, shape: tuple[int, ...]) -> bool:
    """Whether a picture has a whole latent, with a mean of this shape (C, h, w)."""
    shapes = packs.shapes(latent_path(image, mirrored))
    return shapes is not None and shapes.get("mean") == shape


def tell_damaged(files: list[Path]) -> None:
    """Say in one line that files which exist, and are damaged, are made again."""
    damaged = [file for file in files if file.exists()]
    if damaged:
        print(f"{damaged[0]}: damaged, and made again (so are {len(damaged) - 1} more)")


def keep_inside(s: Settings, files: Iterable[Path]) -> None:
    """UserError if one of the files, which are to be written, lies outside the run folder."""
    run = Path(s.run).resolve()
    for folder in sorted({file.parent for file in files}):
        # Resolved, since a link may lead anywhere.
        if not folder.resolve().is_relative_to(run):
            raise UserError(f"{folder}: lies outside the run folder {s.run}, and nothing is "
                            f"written there; name pictures as FOLDER/images/NAME within the run, "
                            f"and put a folder in the place of a link")


def encode_batches(batches: list[list[Path]], s: Settings, open_picture, mirrored: bool) -> None:
    """Write the latent files of whole batches.

    Threads open the pictures of the next batch while the VAE is at work on one.
    """
    vae = load_vae(s)
    with ThreadPoolExecutor(8) as readers:
        def begin_to_open(batch: list[Path]) -> dict:
            files = [image for image in batch if not is_from_latent(image)]
            return {image: readers.submit(open_picture, image) for image in files}

        coming = begin_to_open(batches[0])
        for n, batch in enumerate(bar(batches, "latents", "batch")):
            opened = {image: future.result() for image, future in coming.items()}

            # The next batch is read while this one is encoded.
            if n + 1 < len(batches):
                coming = begin_to_open(batches[n + 1])

            # Candidates whose pictures were not kept.
            rest = [image for image in batch if image not in opened]
            if rest:
                opened |= zip(rest, decode_kept(vae, rest))
            pictures = as_batch([opened[image] for image in batch])

            if mirrored:
                pictures = pictures.flip(-1)
            posterior = encode(vae, pictures)
            keep_posterior(s, posterior, batch, mirrored)


def as_batch(pictures: list) -> torch.Tensor:
    """PIL images of one size as a tensor (B, 3, H, W) in 0..1."""
    from torchvision.transforms.functional import pil_to_tensor
    tensors = [pil_to_tensor(picture) for picture in pictures]
    return torch.stack(tensors).float() / 255


def keep_posterior(s: Settings, posterior: dict[str, torch.Tensor], images: list[Path],
                   mirrored: bool) -> None:
    """Write the latents that are lacking; row i of the posterior is that of picture i."""
    # The batch was encoded whole, but a file that exists stays as it is.
    lacking = lacking_latents(images, mirrored, posterior["mean"].shape[1:])
    latents = []
    for i, image in enumerate(images):
        if image in lacking:
            latents.append({name: rows[i].cpu() for name, rows in posterior.items()})

    # Few large files, or one for each.
    if s.keep == "pairs":
        save_latents(latents, lacking, mirrored)
    else:
        for image, latent in zip(lacking, latents):
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
        return packs.load(self.path(prompt))

    def prepare(self, prompts: list[str]) -> "PromptEncoder":
        """Encode what is missing of these prompts, in batches fixed by the list.

        The empty prompt is always there.
        """
        prompts = ["", *dict.fromkeys(prompt for prompt in prompts if prompt)]

        # Whole batches, also where only one prompt is missing: the same batch gives the same bits.
        batches = []
        for start in range(0, len(prompts), PROMPT_BATCH):
            batch = prompts[start:start + PROMPT_BATCH]
            if not all(packs.is_there(self.path(prompt)) for prompt in batch):
                batches.append(batch)
        if not batches:
            return self

        keep_inside(self.s, [self.path("")])
        lacking = [self.path(prompt) for batch in batches for prompt in batch]
        tell_damaged([path for path in lacking if not packs.is_there(path)])

        encoders = self.load_encoders()
        for batch in batches:
            self.keep(batch, self.encode(encoders, batch))

        # SDXL's second encoder alone takes more than a gigabyte.
        del encoders
        gc.collect()
        return self

    def keep(self, prompts: list[str], conditions: list[dict[str, torch.Tensor]]) -> None:
        """Write the embeddings that have no file yet."""
        # A file that is whole stays as it is: what a run has used does not change.
        lacking = {}
        for prompt, condition in zip(prompts, conditions):
            path = self.path(prompt)
            if not packs.is_there(path):
                lacking[path] = condition

        # Few large files, or one for each.
        if self.s.keep == "pairs":
            packs.save_pack(lacking)
        else:
            for path, condition in lacking.items():
                save_tensors(condition, path)

    def load_encoders(self) -> list[tuple]:
        """(tokenizer, text encoder), of SDXL two."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
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
            # The class is named here, and no code of the model's runs: it is data.
            tokenizer = load_part(CLIPTokenizer.from_pretrained, model,
                                  subfolder=tokenizer_folder, trust_remote_code=False)
            encoder = load_weights(kind, model, encoder_folder, "model", dtype=dtype,
                                   key_mapping={"^" + COMPILED: ""}, trust_remote_code=False)
            # Of a folder that is not there transformers makes a tokenizer without words.
            if not BYTES_OF_CLIP <= len(tokenizer) <= encoder.config.vocab_size:
                raise UserError(f"{model}: its {tokenizer_folder} has {len(tokenizer)} words, its "
                                f"{encoder_folder} {encoder.config.vocab_size}, and CLIP no fewer "
                                f"than {BYTES_OF_CLIP}; download it again")
            encoders.append((tokenizer, encoder.to(device)))
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
                max_length=min(tokenizer.model_max_length,
                               encoder.config.max_position_embeddings),
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

        for rows in batch.values():
            refuse_not_finite(rows, f"prompts by the text encoders of {self.s.model}", rows.dtype)

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

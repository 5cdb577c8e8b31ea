"""Which UNet and VAE a run uses: their configs, without their weights, and their arithmetic.

Both are read from the model's config files, a few kB; those of the presets' own models are known.
Where the files cannot be had the preset's own architecture stands in. The tests make small random
pipelines of the known ones.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lib import diffusion, models
from lib.run import UserError
from lib.settings import PRESETS, Settings, has_reference

# ---- the known architectures ----

# What the config.json files of SD1.5 and SDXL say; all else is the default of diffusers' classes.
SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_TOKENS = 77

# Numbers in the text encoders: CLIP ViT-L/14's, and SDXL's OpenCLIP ViT-bigG/14 beside it.
SD15_TEXT = 123_060_480
SDXL_TEXT = SD15_TEXT + 694_659_840

# The models whose architecture needs no look: those of the presets.
KNOWN = {
    PRESETS["sd15"]["model"]: ("SD1.5", SD15_UNET, SD15_TEXT),
    PRESETS["sdxl"]["model"]: ("SDXL", SDXL_UNET, SDXL_TEXT),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The configs of a model's parts; `source` says in words where they come from."""

    unet: dict
    vae: dict
    tokens: int
    source: str
    text_weights: int = 0       # numbers in the text encoders

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for each one of its latent's."""
        return models.pixels_per_latent(self.vae)


def architecture_of(s: Settings, ask_hub: bool = True) -> Architecture:
    """The architecture of a run's model.

    The presets' own models are known. Another one's config files are read where they are within
    reach, also on the hub if `ask_hub`; else that of the preset's own model stands in.
    """
    if s.model in KNOWN and not is_at_hand(s.model):
        return known(s.model, f"the known architecture of {KNOWN[s.model][0]}")
    try:
        if not is_at_hand(s.model):
            check_hub(s.model, ask_hub)
        return read_architecture(s)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]

    model = PRESETS[s.preset]["model"]
    if model not in KNOWN:
        raise UserError(f"cannot read the config files of {s.model}: {reason}; give --model a "
                        f"folder that has them, or --preset sd15 or sdxl for a model like those")
    name = KNOWN[model][0]
    return known(model, f"the known architecture of {name} ({s.model} is not within reach)")


def known(model: str, source: str) -> Architecture:
    """The architecture of a preset's model."""
    _, unet, text_weights = KNOWN[model]
    return Architecture(unet, SD_VAE, CLIP_TOKENS, source, text_weights)


def read_architecture(s: Settings) -> Architecture:
    """From the model's config files, in its folder, in the hub's cache or on the hub."""
    folder = models.local_or_hub(s.model)
    unet = UNet2DConditionModel.load_config(folder, subfolder="unet")
    text = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    text_weights = count_text_weights(CLIPTextModel, text)
    if unet.get("addition_embed_type") == "text_time":
        second = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
        text_weights += count_text_weights(CLIPTextModelWithProjection, second)

    if is_at_hand(s.vae):
        vae = AutoencoderKL.load_config(models.local_or_hub(s.vae))
    else:
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
    source = f"{s.model}'s config files"
    return Architecture(unet, vae, text.max_position_embeddings, source, text_weights)


def count_text_weights(kind: type, config: CLIPTextConfig) -> int:
    """Numbers in a text encoder."""
    with torch.device("meta"):
        encoder = kind(config)
    return sum(parameter.numel() for parameter in encoder.parameters())


def is_at_hand(name: str) -> bool:
    """Whether a model is a folder or in the hub's cache; "" is not."""
    if not name:
        return False
    if Path(models.local_or_hub(name)).is_dir():
        return True
    files = ("unet/config.json", "config.json")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def check_hub(name: str, ask_hub: bool) -> None:
    """Raise OSError if a model is not on the hub, or the hub is not to be asked.

    Loading a file of such a model would try again for half a minute before it says so.
    """
    if not ask_hub:
        raise OSError("the hub was not asked")
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # each network library raises its own kinds
        reason = " ".join(str(error).split())
        raise OSError(f"{type(error).__name__}: {reason}") from None


# ---- arithmetic ----

def without_weights(kind: type, config: dict) -> torch.nn.Module:
    """A model on the meta device: all its shapes, none of its numbers."""
    with torch.device("meta"):
        return kind.from_config(config)


def random_inputs(unet: torch.nn.Module, tokens: int, side: int, batch: int, device) -> tuple:
    """Noised latents (batch, C, side, side), timesteps (batch,) and a condition.

    They are what diffusion.predict takes after the UNet.
    """
    config = unet.config
    x_t = torch.randn(batch, config.in_channels, side, side, device=device)
    t = torch.full((batch,), 500, device=device)
    embeds = torch.randn(batch, tokens, config.cross_attention_dim, device=device)
    condition = {"embeds": embeds}

    # SDXL's pooled prompt: what its added embedding takes, less the six numbers of sizes and crop.
    if config.addition_embed_type == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        width = config.projection_class_embeddings_input_dim - sizes
        condition["pooled"] = torch.randn(batch, width, device=device)
    return x_t, t, condition


def count_flops(architecture: Architecture, what: str, resolution: int) -> float:
    """FLOP of one picture's "unet" forward, or of its "encode" or "decode" by the VAE."""
    side = resolution // architecture.factor
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if what == "unet":
            unet = without_weights(UNet2DConditionModel, architecture.unet)
            given = random_inputs(unet, architecture.tokens, side, 1, "meta")
            diffusion.predict(unet, *given)
        else:
            vae = without_weights(AutoencoderKL, architecture.vae)
            if what == "encode":
                vae.encode(torch.randn(1, 3, resolution, resolution, device="meta"))
            else:
                channels = vae.config.latent_channels
                vae.decode(torch.randn(1, channels, side, side, device="meta"))
    return counter.get_total_flops()


def pair_arithmetic(s: Settings) -> int:
    """A training pair's arithmetic in UNet forwards of one picture.

    The policy sees two pictures, and so does the reference if the loss has one. A backward costs
    two forwards, or one where the weights are frozen (LoRA). Activations that are computed again
    cost a forward more.
    """
    forwards = 2
    if has_reference(s):
        forwards += 2

    backward = 2
    if s.lora_rank:
        backward = 1
    forwards += 2 * backward

    if s.grad_checkpoint == "on":
        forwards += 2
    return forwards

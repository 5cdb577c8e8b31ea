"""Which UNet and VAE a run uses: their configs, without their weights, and their arithmetic.

Both are read from the model's config files, a few kB. Where these cannot be had the preset's own
architecture, which is known, stands in. The tests make small random pipelines of the known ones.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig

from lib import diffusion, models
from lib.run import UserError
from lib.settings import Settings, has_reference

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


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The configs of a model's parts; `source` says in words where they come from."""

    unet: dict
    vae: dict
    tokens: int
    source: str

    @property
    def factor(self) -> int:
        """Pixels of a picture's side for each one of its latent's."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def architecture_of(s: Settings) -> Architecture:
    """The architecture of a run's model."""
    try:
        check_reach(s.model)
        return read_architecture(s)
    except (OSError, ValueError) as error:
        if s.preset == "tiny":
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot read the config files of {s.model}: {reason}") from None

    unet, name = SD15_UNET, "SD1.5"
    if s.preset == "sdxl":
        unet, name = SDXL_UNET, "SDXL"
    source = f"the known architecture of {name} ({s.model} is not within reach)"
    return Architecture(unet, SD_VAE, CLIP_TOKENS, source)


def read_architecture(s: Settings) -> Architecture:
    """From the model's config files, in its folder, in the hub's cache or on the hub."""
    folder = models.local_or_hub(s.model)
    unet = UNet2DConditionModel.load_config(folder, subfolder="unet")
    text = CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")
    if s.vae:
        vae = AutoencoderKL.load_config(models.local_or_hub(s.vae))
    else:
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
    return Architecture(unet, vae, text.max_position_embeddings, f"{s.model}'s config files")


def check_reach(name: str) -> None:
    """Raise OSError if a model is neither a folder, nor in the hub's cache, nor on the hub.

    Loading a file of such a model would try again for half a minute before it says so.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(models.local_or_hub(name)).is_dir():
        return
    if isinstance(try_to_load_from_cache(name, "unet/config.json"), str):
        return

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

"""Which models are understood: SD1.x and SDXL, computed as their own pipelines do, and no others.

A pipeline of another kind has the same files, runs, and gives noise. It is known by its
configurations, before anything is spent on it.
"""

import math

from diffusers import DDPMScheduler

from lib import hub, models
from lib.run import UserError
from lib.settings import Settings, of_candidates

# The parts of SD1.x and SDXL. Another class in their place computes something else.
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}

# What a UNet may be told beside noisy latents, t and a prompt. Nobody here would tell it.
UNTOLD = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")

# How their files of weights begin.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}

PREDICTIONS = ("epsilon", "v_prediction")
TIMESTEPS = 1000


def check_model(s: Settings) -> None:
    """UserError unless the model is of a kind that this code computes as its own pipeline does.

    Its configurations and the names of its files are read, and no weights.
    """
    try:
        for check in (check_parts, check_unet, check_vae, check_schedule, check_resolution):
            check(s)
    except UserError:
        raise
    # Values of a wrong type raise nearly every kind of error.
    except Exception as error:
        raise UserError(f"{s.model}: its configurations hold a value that no model has "
                        f"({hub.first_line(error)}); download it again") from None


def foreign(name: str, fault: str) -> UserError:
    """The error for a model of another kind."""
    return UserError(f"{name}: {fault}; give a model of SD1.x's or SDXL's kind (--model, or for a "
                     f"row --row)")


def check_parts(s: Settings) -> None:
    """UserError unless the pipeline has the parts of SD1.x or SDXL, with their weights."""
    pipeline = models.pipeline_config(s.model)
    for part, kinds in PARTS.items():
        if part.endswith("_2") and not models.is_sdxl(s.model):
            continue
        if part == "vae" and s.vae:
            continue

        # The file says ["diffusers", "AutoencoderKL"], for instance.
        have = (pipeline.get(part) or [None, None])[1]
        if have not in kinds:
            raise foreign(s.model, f"its {part} is {have}, not {kinds[0]}")
        if part in STEMS:
            hub.weight_files(hub.local_or_hub(s.model), f"{part}/", STEMS[part])


def check_unet(s: Settings) -> None:
    """UserError unless the base's UNet takes latents, t and a prompt (SDXL's: and its sizes)."""
    unet = models.unet_config(s)
    for key in UNTOLD:
        if unet[key] is not None:
            raise foreign(s.model, f"its UNet has {key} {unet[key]}, which SD1.x and SDXL have not")

    added = "text_time" if models.is_sdxl(s.model) else None
    if unet["addition_embed_type"] != added:
        raise foreign(s.model, f"its UNet has addition_embed_type {unet['addition_embed_type']}, "
                               f"not {added}")

    if unet["cross_attention_dim"] != text_width(s):
        raise foreign(s.model, f"its UNet has cross_attention_dim {unet['cross_attention_dim']}, "
                               f"and its prompts' embeddings {text_width(s)}")

    channels = (unet["in_channels"], unet["out_channels"])
    latent = models.vae_config(s)["latent_channels"]
    if channels != (latent, latent):
        raise foreign(s.model, f"its UNet takes {channels[0]} channels and gives {channels[1]}, "
                               f"where a latent has {latent} (inpainting models take more)")


def text_width(s: Settings) -> int:
    """The width of a prompt's embedding: that of the text encoders' states, side by side."""
    from transformers import CLIPTextConfig

    width = 0
    for part in models.pipeline_config(s.model):
        if part.startswith("text_encoder"):
            loader = CLIPTextConfig.from_pretrained
            width += models.load_part(loader, s.model, subfolder=part).hidden_size
    return width


def check_vae(s: Settings) -> None:
    """UserError unless the VAE's latents are scaled as the model's own pipeline scales them."""
    name, folder = models.vae_place(s)
    vae = models.vae_config(s)
    if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise foreign(name, f"its VAE is {vae['_class_name']}, not AutoencoderKL")
    if vae["shift_factor"]:
        raise foreign(name, f"its VAE has shift_factor {vae['shift_factor']}")
    if not 0 < vae["scaling_factor"] < math.inf:
        raise foreign(name, f"its VAE has scaling_factor {vae['scaling_factor']}")
    for key in ("latents_mean", "latents_std"):
        if vae[key] is not None and len(vae[key]) != vae["latent_channels"]:
            raise foreign(name, f"its VAE has {len(vae[key])} {key} for {vae['latent_channels']} "
                                f"channels")
    if vae["latents_mean"] is not None and not models.is_sdxl(s.model):
        raise foreign(name, "its VAE has latents_mean, which SD1.x's pipeline does not apply")
    inside = f"{folder}/" if folder else ""
    hub.weight_files(hub.local_or_hub(name), inside, "diffusion_pytorch_model")

    # SDXL's UNet is told a picture's size, and we tell 8 pixels for each latent.
    pixels = models.pixels_per_latent(vae)
    if models.is_sdxl(s.model) and pixels != 8:
        raise foreign(name, f"its VAE has {pixels} pixels a latent, not 8")


def check_schedule(s: Settings) -> None:
    """UserError unless the model was trained to predict noise or velocity on DDPM's schedule."""
    config = models.read_config(DDPMScheduler, s.model, "scheduler")
    refuse_schedule(s.model, config)

    schedule = models.load_schedule(s)
    if not all(0 < beta <= 1 for beta in schedule.betas.tolist()):
        raise foreign(s.model, "its scheduler has betas that do not lie between 0 and 1")

    # Without any signal left the noise does not tell the picture: a step would divide by zero.
    alphas = schedule.alphas_cumprod
    if prediction_of(config) == "epsilon" and alphas[-1] <= 0:
        raise foreign(s.model, "its scheduler has zero terminal SNR (rescale_betas_zero_snr) with "
                               "prediction_type epsilon")
    for used in (s, of_candidates(s)):
        models.load_sampler(used).set_timesteps(used.sample_steps)


def prediction_of(config: dict) -> str:
    """What a scheduler's configuration says that the UNet predicts."""
    return config.get("prediction_type", "epsilon")


def refuse_schedule(name: str, config: dict) -> None:
    """UserError if a scheduler's configuration is of another kind than DDPM's."""
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise foreign(name, f"its scheduler is {config.get('_class_name')}, of another noise "
                            f"schedule than DDPM's")
    if prediction_of(config) not in PREDICTIONS:
        raise foreign(name, f"its scheduler has prediction_type {prediction_of(config)}, not "
                            f"{' or '.join(PREDICTIONS)}")

    steps = config.get("num_train_timesteps", TIMESTEPS)
    if steps != TIMESTEPS:
        raise foreign(name, f"its scheduler has {steps} timesteps, not {TIMESTEPS}")


def check_resolution(s: Settings) -> None:
    """UserError unless VAE and UNet divide the pictures without a rest."""
    step = models.resolution_step(s)
    if s.resolution % step or s.resolution < step:
        nearest = max(1, round(s.resolution / step)) * step
        raise UserError(f"--resolution {s.resolution}: {s.model} draws multiples of {step} pixels; "
                        f"give --resolution {nearest}")

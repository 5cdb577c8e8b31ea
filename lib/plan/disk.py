"""How much disk a run takes, how much of it is still to come, and what it downloads.

A `row` is a dict of lib/plan/counts.py's table.
"""

import os
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache

from lib import models, packs
from lib.plan.architecture import Architecture, architecture_of, is_at_hand, without_weights
from lib.plan.counts import counts, eval_prompts, kept_pictures
from lib.plan.memory import count_weights
from lib.settings import Settings, round_prompts

# Bytes per pixel of a picture as run.save_image writes it: photographs take .7 to 1.7 as PNG, .5 to
# 1.2 as WebP and .2 to .4 as JPEG, grainy ones up to 2.3, 2.1 and .7 (tests/bench/bench_files.py).
PNG = 2.0
WEBP = 1.3
JPEG = .45

# Bytes of a safetensors file's header.
HEADER = 150

# Pick-a-Pic's training shards: 330 GB for 0.8 million pairs without ties (lib/data/README.md).
BYTES_OF_PAIR = 330e9 / 0.8e6

# The published weights of the scores, as their hubs list them, in bytes, and a file of each. Those
# of HPSv2 are in 16 bits; LAION's aesthetics are CLIP's, beside 4 MB of its own.
SCORE_WEIGHTS = {
    "pickscore": (3.94e9, "yuvalkirstain/PickScore_v1", "model.safetensors"),
    "hpsv2": (1.97e9, "xswu/HPSv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": (1.97e9, "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "imagereward": (1.79e9, "THUDM/ImageReward", "ImageReward.pt"),
    "aesthetics": (1.71e9, "openai/clip-vit-large-patch14", "model.safetensors"),
}


# ---- what a stage leaves behind ----

def disk_of(s: Settings, architecture: Architecture, parameters: int, row: dict) -> int:
    """Bytes that a stage leaves behind."""
    return int(sum(parts_of_stage(s, architecture, parameters, row).values()))


def parts_of_stage(s: Settings, architecture: Architecture, parameters: int,
                   row: dict) -> dict[str, float]:
    """What a stage leaves behind, in bytes: pictures, latents, prompt embeddings, models."""
    stage = row["stage"]
    parts = pictures_of_stage(s, row)

    # Of an encoded picture the mean and the std of its posterior are kept.
    side = s.resolution // architecture.factor
    values = architecture.vae["latent_channels"] * side ** 2
    itemsize = models.dtype_of(s).itemsize
    parts["latents"] = row["encodes"] * (2 * itemsize * values + HEADER)

    # Of a painted one the sampler's own latent, in float32; the evaluation keeps none.
    is_painted = stage == "02_generate" or (stage == "01_seed" and s.pairs == "world")
    if is_painted:
        parts["latents"] += row["images"] * (4 * values + HEADER)

    if stage == "01_seed":
        parts["embeddings"] = count_prompts(s) * itemsize * values_of_prompt(architecture)
    if stage == "04_train_dpo":
        parts["models"] = 4 * parameters

    # An Iter0 that was given is copied into the run.
    if stage == "04_train_dpo" and s.start and row["iter"] == 1:
        parts["models"] *= 2
    return parts


def pictures_of_stage(s: Settings, row: dict) -> dict[str, float]:
    """Bytes of the pictures that a stage leaves behind, and whose they are."""
    stage, pixels = row["stage"], s.resolution ** 2
    if stage == "01_seed":
        of_pixel = WEBP if s.keep == "pairs" and s.pairs != "world" else PNG
        return {"pictures of human pairs": row["images"] * pixels * of_pixel}
    if stage == "05_eval":
        return {"pictures of the evaluation": row["images"] * pixels * PNG}

    # Those of pairs alone are made when a round has chosen them.
    if stage == "02_generate" and s.keep == "all":
        return {"pictures of candidates": row["images"] * pixels * PNG}
    if stage == "03_rank" and s.keep == "pairs":
        return {"pictures of candidates": kept_pictures(s, row["iter"]) * pixels * JPEG}
    return {}


def parts_of_run(s: Settings, architecture: Architecture, parameters: int) -> dict[str, float]:
    """What a whole run takes, part by part, in bytes; checkpoints while a model trains."""
    parts = {}
    for row in counts(s).to_dict("records"):
        for name, size in parts_of_stage(s, architecture, parameters, row).items():
            parts[name] = parts.get(name, 0) + size
    return parts | {"checkpoints": checkpoint_bytes(s, parameters)}


def count_prompts(s: Settings) -> int:
    """The prompts of a run, held-out pairs' included, whose embeddings are kept."""
    total = s.seed_pairs + s.holdout_pairs + eval_prompts(s)
    for k in range(1, s.iters + 1):
        total += round_prompts(s, k)
    return total


def values_of_prompt(architecture: Architecture) -> int:
    """Numbers in a prompt's embedding, with SDXL's pooled one."""
    unet = architecture.unet
    pooled = unet.get("projection_class_embeddings_input_dim") or 0
    if pooled:
        pooled -= 6 * unet["addition_time_embed_dim"]           # SDXL's sizes, which are not kept
    return architecture.tokens * unet["cross_attention_dim"] + pooled


def checkpoint_bytes(s: Settings, parameters: int) -> int:
    """Disk that checkpoints take while a model trains: two, as one goes when the next is whole."""
    # A checkpoint holds the trained weights, in float32, and the states of AdamW.
    bytes_of_weight = 12
    if s.lora_rank:
        bytes_of_weight = 0
    elif s.optimizer == "adafactor":
        bytes_of_weight = 4
    return 2 * bytes_of_weight * parameters


# ---- what is still to come ----

def bytes_needed(s: Settings) -> int:
    """Disk in bytes that a run still needs, with the checkpoints of one training.

    It takes a second or two: config files only, no hub, no probe. Pictures that are there count as
    done, and so do stages that have ended.
    """
    architecture = architecture_of(s, ask_hub=False)
    parameters = parameters_of(architecture)
    needed, trains = 0, False
    for row in counts(s).to_dict("records"):
        left = disk_of(s, architecture, parameters, row) * (1 - share_done(s, row))
        needed += int(left)
        trains = trains or (row["stage"] == "04_train_dpo" and left > 0)
    if trains:
        needed += checkpoint_bytes(s, parameters)
    return needed


def parameters_of(architecture: Architecture) -> int:
    """The parameters of a UNet."""
    return count_weights(without_weights(UNet2DConditionModel, architecture.unet))


def share_done(s: Settings, row: dict) -> float:
    """How much of a stage's files is there, from 0 to 1."""
    run = Path(s.run)
    k = row["iter"]
    last, folder = {
        "01_seed": ("prompts.parquet", "seed/images"),
        "02_generate": (f"iter{k}/candidates.parquet", f"iter{k}/latents"),
        "crossfit": ("iter1/pairs.parquet", ""),
        "03_rank": (f"iter{k}/pairs.parquet", ""),
        "04_train_dpo": (f"iter{k}/unet", ""),
        "05_eval": ("", "eval/images"),
    }[row["stage"]]

    if last and (run / last).exists():
        return 1.
    if not folder or not row["images"]:
        return 0.
    return min(1., count_files(run / folder) / row["images"])


def count_files(folder: Path) -> int:
    """The pictures, or the latents, in a folder and in the folders in it."""
    count = 0
    for inner, _, files in os.walk(folder):
        for name in files:
            if not name.endswith((".png", ".jpg", ".webp", ".safetensors")):
                continue
            if Path(inner).name == packs.FOLDER:
                count += packs.count_in(name)
            else:
                count += 1
    return count


def free_disk(s: Settings) -> tuple[int, Path]:
    """Free bytes where the run lies or will lie, and the folder that was asked."""
    folder = Path(s.run).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free, folder


# ---- downloads ----

def downloads(s: Settings, architecture: Architecture, parameters: int) -> dict[str, int]:
    """Bytes of what is fetched before and while a run works, where it is not at hand already.

    Models come in float32; of a pair source on the hub as many shards as its pairs take.
    """
    vae = 4 * count_weights(without_weights(AutoencoderKL, architecture.vae))
    parts = {}
    if not has_weights(s.model):
        parts["model"] = 4 * (parameters + architecture.text_weights) + vae
    if s.vae and not has_weights(s.vae):
        parts["VAE"] = vae
    if s.pairs != "world" and not Path(s.pairs).exists():
        parts["pairs"] = int(BYTES_OF_PAIR * (s.seed_pairs + s.holdout_pairs))

    given = [part.partition("=")[0] for part in s.score_weights.split(",")]
    for name in {*s.scores.split(","), s.reward} & SCORE_WEIGHTS.keys():
        size, repository, file = SCORE_WEIGHTS[name]
        if name not in given and not isinstance(try_to_load_from_cache(repository, file), str):
            parts["scores"] = parts.get("scores", 0) + int(size)
    return parts


def has_weights(name: str) -> bool:
    """Whether a model's weights are here: it is a folder, or the hub's cache has them."""
    if not is_at_hand(name):
        return False
    if Path(models.local_or_hub(name)).is_dir():
        return True
    stem = "diffusion_pytorch_model.safetensors"
    cached = [try_to_load_from_cache(name, f"{folder}{stem}") for folder in ("unet/", "")]
    return any(isinstance(path, str) for path in cached)

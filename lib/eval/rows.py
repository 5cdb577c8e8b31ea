"""The rows of the table: any model, named by where it lies, and pictures that exist already.

    3                              model 3 of the run (BASE is the base model)
    FOLDER, FILE or owner/name     a diffusers pipeline (its unet/), a UNet, a checkpoint of one
                                   file (its UNet), or a low-rank adapter of the base's UNet
    owner/name/FILE.safetensors    one of the files of a hub model
    extrapolate:Iter0:2            weights base + 2 (Iter0 - base), as lib/rivals/controls.py tells
    guide:Iter0:1.5                prediction Iter0 + 1.5 (Iter0 - base), likewise
    images:PATH                    pictures that exist: a CSV, JSONL or Parquet table with prompt
                                   and image, or a folder that holds one, or a folder of pictures
                                   with a .txt caption beside each

The first is an int, the others are texts. A row is a UNet: text encoders, VAE and sampler are the
base's, and a pipeline of another noise schedule or latent space is refused. A model that changed
its text encoder too is scored as it is when given as the base of a folder of its own, `--model
owner/name`. Drawing and scoring the rows is lib/eval/scores.py.
"""

import hashlib
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from lib import hub, kinds, models
from lib.data.pairs import file_within, table_picture
from lib.data.pictures import Encoded, read_picture
from lib.data.tables import (cell_text, is_hidden, need_columns, parquet_rows, read_text, suffix_of,
                             text_rows)
from lib.models import BASE
from lib.rivals.controls import load_control, parse_control
from lib.run import PICTURE_FORMATS, UserError, atomic, is_whole, seed_of
from lib.settings import Settings

# How the text of a row of pictures begins.
IMAGES = "images:"

# The public checkpoints of the paper's other rows. SAIL's authors released none.
RIVALS = {
    "sd15": {
        "DiffusionDPO": "mhdang/dpo-sd1.5-text2image-v1",
        "DiffusionSPO": "SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep",
    },
    "sdxl": {
        "DiffusionDPO": "mhdang/dpo-sdxl-text2image-v1",
        "MaPO": "mapo-t2i/mapo-beta",
        # This one is not in the paper's table.
        "DiffusionSPO": "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep",
    },
}
# The human pairs behind each of them (table 1 of the paper).
FULL_DATA = 800_000


# ---- any row ----

def load_row(s: Settings, where: int | str) -> torch.nn.Module:
    """Load what paints a row's pictures: a frozen UNet on the device, called as diffusers' is."""
    kinds.check_model(s)
    if isinstance(where, int):
        return models.load_unet(s, where)

    control = parse_control(where)
    if control:
        return load_control(s, control)

    # A model from elsewhere is compiled as the run's own models are.
    return models.to_device(s, load_unet_at(s, where))


def check(s: Settings, where: str) -> None:
    """Raise a UserError at once for a row that could only fail when others are drawn already."""
    if where.startswith(IMAGES):
        read_images(where.removeprefix(IMAGES))
        return

    control = parse_control(where)
    if control:
        folder = models.unet_folder(s, control.k)
        if not folder.exists():
            raise UserError(f"--row {where}: {folder} does not exist; train it first "
                            f"(04_train_dpo.py --iter {control.k})")
        return

    found = look_into(s, where)
    if found.kind == "adapter":
        read_adapter(s, where, found.place)


def identity(s: Settings, where: int | str) -> str:
    """Tell a row's model from another under the same name.

    The text has its files' names, sizes and times, or else its hub id and commit.
    """
    if isinstance(where, int):
        where = str(models.unet_folder(s, where) or models.local_or_hub(s.model))
    elif parse_control(where):
        # A control is made of two models: it is another one when either of them is.
        return f"{where} {identity(s, parse_control(where).k)} {identity(s, BASE)}"

    path = Path(where)
    stamps = []
    for file in sorted([path, *hub.two_levels(path)]):
        if file.is_file():
            stamps.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
    if stamps:
        return " ".join(stamps)

    return f"{where}@{hub.hub_commit(where)}"


def folder_name(name: str, stamp: str) -> str:
    """Name the folder of a row's pictures or scores: its name, and a hash of what made them."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    return f"{plain}-{seed_of(stamp) % 16 ** 8:08x}"


# ---- models from elsewhere: folders, files and the hub ----

# The names under which diffusers and peft save an adapter.
ADAPTER = "pytorch_lora_weights.safetensors"
PEFT_ADAPTER = "adapter_model.safetensors"

# How the names of a UNet's weights begin in a checkpoint of one file, and in diffusers' own.
CHECKPOINT = ("model.diffusion_model.", "conv_in.")

# What a UNet must have in common with the base's.
ARCHITECTURE = ("_class_name", "in_channels", "out_channels", "cross_attention_dim",
                "addition_embed_type", *kinds.UNTOLD)

# What a latent's scale is made of.
LATENT_SPACE = ("scaling_factor", "latents_mean", "latents_std", "shift_factor")


class Found(NamedTuple):
    """What a row's text leads to."""
    kind: str                    # "unet", "checkpoint" or "adapter"
    place: str                   # the UNet's folder in it, "unet" or "", or else the file's name


def load_unet_at(s: Settings, where: str) -> UNet2DConditionModel:
    """Load the UNet that a folder, a file or a hub id holds; an adapter is added to the base's.

    It is frozen, on the device, in dtype_of(s).
    """
    found = look_into(s, where)
    if found.kind == "adapter":
        unet = load_with_adapter(s, where, found.place)
    elif found.kind == "checkpoint":
        unet = load_checkpoint(s, where, found.place)
    else:
        unet = models.load_weights(UNet2DConditionModel, where, found.place,
                                   dtype=models.dtype_of(s))
    return unet.requires_grad_(False).eval().to(models.device_of(s))


def look_into(s: Settings, where: str) -> Found:
    """Find out what `where` holds, by the names of its files and by its configurations.

    UserError: nothing that can be a row, or a UNet that the base's other parts do not fit.
    """
    source, file = hub.split_file(where)
    if file:
        return look_into_file(where, source, file)

    # A pipeline has its UNet in unet/, a UNet by itself has no such folder.
    names = hub.names_at(source)
    for folder in ("unet", ""):
        prefix = f"{folder}/" if folder else ""
        if f"{prefix}config.json" in names:
            check_unet(s, where, folder)
            check_pipeline(s, where, names)
            hub.weight_files(where, prefix, "diffusion_pytorch_model")
            return Found("unet", folder)

    # No UNet, so a file: of the usual names for an adapter, or the only weights there are.
    files = [n for n in names if "/" not in n and n.endswith((".safetensors", *hub.PICKLED))]
    for usual in (ADAPTER, PEFT_ADAPTER):
        if usual in files:
            return look_into_file(where, source, usual)
    if len(files) == 1:
        return look_into_file(where, source, files[0])
    raise UserError(f"{where}: holds no unet/config.json, no config.json and no single "
                    f".safetensors adapter; give a diffusers pipeline, a UNet or an adapter (its "
                    f"file, where there are several)")


def look_into_file(where: str, source: str, file: str) -> Found:
    """Tell a checkpoint from an adapter by the names of its weights."""
    if not file.endswith(".safetensors"):
        raise UserError(f"{where}: {file} is no .safetensors file, and no other is opened; have it "
                        f"saved as one")
    if any(key.startswith(CHECKPOINT) for key in hub.keys_of(hub.file_at(source, file))):
        return Found("checkpoint", file)
    return Found("adapter", file)


def check_unet(s: Settings, where: str, folder: str) -> None:
    """UserError if a UNet is of another architecture than the base's."""
    # What cannot take the base's latents and prompts would fail only when it is drawn from.
    theirs = models.config_of(UNet2DConditionModel, where, folder)
    base = {"_class_name": "UNet2DConditionModel"} | models.unet_config(s)
    for key in ARCHITECTURE:
        if theirs.get(key) != base[key]:
            raise UserError(f"{where}: its UNet's config.json has {key} {theirs.get(key)}, that of "
                            f"{s.model} {base[key]}; give a model of the same architecture")


def check_pipeline(s: Settings, where: str, names: list[str]) -> None:
    """UserError if a pipeline's UNet wants another noise schedule or VAE than the base's."""
    remedy = "give it as --model of a run in a folder of its own"
    if "scheduler/scheduler_config.json" in names:
        theirs = models.read_config(DDPMScheduler, where, "scheduler")
        kinds.refuse_schedule(where, theirs)

        # The sampler goes through the base's schedule, and takes the UNet's answer as the base's.
        ours = models.load_schedule(s)
        prediction = kinds.prediction_of(theirs)
        if prediction != ours.config.prediction_type:
            raise UserError(f"{where}: its scheduler has prediction_type {prediction}, that of "
                            f"{s.model} {ours.config.prediction_type}; {remedy}")
        schedule = models.load_part(DDPMScheduler.from_pretrained, where, subfolder="scheduler")
        alphas = schedule.alphas_cumprod
        if not torch.allclose(alphas, ours.alphas_cumprod, atol=1e-4):
            raise UserError(f"{where}: its scheduler has other betas than that of {s.model}; "
                            f"{remedy}")

    if "vae/config.json" in names:
        vae = models.config_of(AutoencoderKL, where, "vae")
        base = models.vae_config(s)
        for key in LATENT_SPACE:
            if vae[key] != base[key]:
                raise UserError(f"{where}: its VAE has {key} {vae[key]}, the base's {base[key]}; "
                                f"{remedy}")


def load_checkpoint(s: Settings, where: str, file: str) -> UNet2DConditionModel:
    """Load the UNet of a checkpoint of one file, which has no configuration: it is the base's."""
    source, _ = hub.split_file(where)
    path = str(hub.file_at(source, file))
    try:
        unet = UNet2DConditionModel.from_single_file(
            path, config=models.local_or_hub(s.model), subfolder="unet", dtype=models.dtype_of(s))
    # Weights of another model, and missing ones, raise nearly every kind of error.
    except Exception as error:
        raise UserError(f"{where}: {file} does not fit the UNet of {s.model}, or lacks weights of "
                        f"it ({hub.first_line(error)}); give a whole checkpoint of this "
                        f"kind") from None

    models.refuse_unsound(unet, [], where, "give another checkpoint")
    return unet


def load_with_adapter(s: Settings, where: str, file: str) -> UNet2DConditionModel:
    """Load the base's UNet and add an adapter to its weights, in float32."""
    state, options = read_adapter(s, where, file)
    unet = models.load_unet(s, BASE, trained=True)
    remedy = "give an adapter of this model"

    try:
        unet.load_lora_adapter(state, prefix="unet", **options)
    except Exception as error:
        raise UserError(f"{where}: {file} does not fit the UNet of {s.model} "
                        f"({hub.first_line(error)}); {remedy}") from None

    # diffusers leaves out what has no place, and only warns.
    placed = [name for name, _ in unet.named_parameters() if "lora_" in name]
    if len(placed) != len(state):
        raise UserError(f"{where}: {file} has {len(state)} weights, and in the UNet of {s.model} "
                        f"they find {len(placed)} places; {remedy}, and a whole one")

    # The adapter goes into the weights; its own layers are then in the way.
    try:
        unet.fuse_lora()
    # A bias has no place in a layer without one.
    except Exception as error:
        raise UserError(f"{where}: {file} cannot be merged into the UNet of {s.model} "
                        f"({hub.first_line(error)}); give one that can") from None
    unet.unload_lora()
    models.refuse_unsound(unet, [], where, "give another adapter")
    return unet.to(models.dtype_of(s))


def read_adapter(s: Settings, where: str, file: str) -> tuple[dict, dict]:
    """Read an adapter in any format that diffusers or peft writes -> (state, options).

    The state's names begin with "unet."; the options tell load_lora_adapter the adapter's scales:
    kohya's alphas, or the configuration that diffusers and peft keep beside the weights.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    source, _ = hub.split_file(where)
    path = hub.file_at(source, file)
    if any("dora_scale" in key for key in hub.keys_of(path)):
        raise UserError(f"{where}: {file} is a DoRA (dora_scale), whose scales diffusers drops; "
                        f"merge it into a UNet, and give that")

    pipeline = StableDiffusionPipeline
    if models.is_sdxl(s.model):
        pipeline = StableDiffusionXLPipeline
    config = SimpleNamespace(**models.unet_config(s))
    try:
        state, alphas, metadata = pipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, use_safetensors=True, unet_config=config,
            return_lora_metadata=True)
        state, metadata = under_unet(state, metadata or peft_config(source, file))
    # Each format's reader raises its own kinds of errors.
    except Exception as error:
        raise UserError(f"{where}: {file} is no adapter that diffusers reads "
                        f"({hub.first_line(error)})") from None

    check_adapter(s, where, file, state)
    if len(set((alphas or {}).values())) > 1:
        raise UserError(f"{where}: the layers of {file} have alphas of their own, which diffusers "
                        f"drops; merge it into a UNet with the program that made it, and give that")
    return state, {"network_alphas": alphas, "metadata": metadata}


def under_unet(state: dict, metadata: dict | None) -> tuple[dict, dict | None]:
    """The weights and configuration of an adapter, all under names that begin with "unet."."""
    if any(key.startswith(("unet.", "text_encoder")) for key in state):
        return state, metadata

    # peft's files, and those of a UNet by itself, name the UNet's layers alone.
    state = {"unet." + key.removeprefix("base_model.model."): w for key, w in state.items()}
    if metadata:
        metadata = {f"unet.{key}": value for key, value in metadata.items()}
    return state, metadata


def peft_config(source: str, file: str) -> dict | None:
    """The configuration beside peft's own file."""
    if file != PEFT_ADAPTER:
        return None
    from peft import LoraConfig
    return LoraConfig.from_pretrained(hub.file_at(source, "adapter_config.json").parent).to_dict()


def check_adapter(s: Settings, where: str, file: str, state: dict) -> None:
    """UserError unless an adapter has weights of a UNet, and no others."""
    others = [key for key in state if not key.startswith("unet.")]
    if len(others) == len(state) or not all("lora" in key for key in state):
        raise UserError(f"{where}: {file} has no weights for a UNet, or others than an adapter's; "
                        f"give a low-rank adapter of the UNet of {s.model}")
    if others:
        raise UserError(f"{where}: {file} changes more than the UNet ({others[0]}); merge it "
                        f"into a pipeline, and give that as --model of a folder of its own")


# ---- pictures that exist ----

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = (".csv", ".jsonl", ".json", ".parquet")


class Picture(NamedTuple):
    """A picture from outside, and the prompt that it is of."""
    prompt: str
    style: str                   # "" where there is none
    image: Encoded               # the file, or its bytes
    place: str                   # file and row, for messages


def image_jobs(run: Path, name: str, where: str, prompts: pd.DataFrame | None) -> pd.DataFrame:
    """Copy pictures that exist into the run -> jobs (prompt_id, prompt, style, seed, image).

    With `prompts` (prompt_id, prompt), the pictures of these alone; without, all of them. The seed
    numbers the pictures of a prompt.
    """
    # Alone, prompts are numbered as they come; beside models they have the evaluation's numbers.
    pictures = read_images(where)
    if prompts is None:
        distinct = dict.fromkeys(picture.prompt for picture in pictures)
        prompt_ids = {prompt: i for i, prompt in enumerate(distinct)}
    else:
        prompt_ids = dict(zip(prompts.prompt, prompts.prompt_id))
        pictures = [picture for picture in pictures if picture.prompt in prompt_ids]
        if not pictures:
            raise UserError(f"--row {name}=images:{where}: none of its prompts is one of the "
                            f"evaluation's; to score the pictures alone, give --images {where}")

    # The folder's name has a hash of files and prompts, so that other pictures get another folder.
    stamps = [(picture.prompt, stamp_of(picture.image)) for picture in pictures]
    folder = Path("eval/images") / folder_name(name, str(stamps))

    jobs = []
    counts = dict.fromkeys(prompt_ids, 0)
    for picture in pictures:
        prompt_id = prompt_ids[picture.prompt]
        seed = counts[picture.prompt]
        counts[picture.prompt] += 1
        image = folder / f"{prompt_id:06d}_{seed}{ending_of(picture)}"
        if not is_whole(run / image):
            copy_picture(picture, run / image)
        jobs.append({"prompt_id": prompt_id, "prompt": picture.prompt, "style": picture.style,
                     "seed": seed, "image": str(image)})
    return pd.DataFrame(jobs)


def stamp_of(image: Encoded) -> tuple:
    """Tell a picture from another."""
    if isinstance(image, bytes):
        return (hashlib.sha256(image).hexdigest(),)
    return image.name, image.stat().st_size, image.stat().st_mtime_ns


def ending_of(picture: Picture) -> str:
    """How the name of a picture's copy ends: as its content is, whatever it was called."""
    from PIL import Image
    file = picture.image
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as opened:
            return {"JPEG": ".jpg"}.get(opened.format, f".{opened.format.lower()}")
    except Exception as error:
        raise unreadable(picture, error) from None


def copy_picture(picture: Picture, path: Path) -> None:
    """Copy a picture, as it is, after it was read to its end: a broken one is told by its row."""
    try:
        read_picture(picture.image)
    except OSError as error:
        raise unreadable(picture, error) from None

    content = picture.image
    if isinstance(content, Path):
        content = content.read_bytes()
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def unreadable(picture: Picture, error: Exception) -> UserError:
    name = picture.image.name if isinstance(picture.image, Path) else "in it"
    return UserError(f"{picture.place}: cannot read the image {name} ({hub.first_line(error)}); "
                     f"replace it or drop the row")


def read_images(where: str) -> list[Picture]:
    """Read a table of pictures or a folder of them. There is at least one, and every file exists.

    UserError: a picture without a prompt, or outside the folder that the user names.
    """
    path = Path(os.path.expanduser(where))
    if os.path.isdir(path):
        path = table_in(path) or path

    if os.path.isfile(path):
        pictures = read_table_of_images(path)
    elif os.path.isdir(path):
        pictures = read_folder_of_images(path)
    else:
        raise UserError(f"images:{where}: no such file or folder")

    if not pictures:
        raise UserError(f"{path}: holds no picture; give a table with prompt and image, or a "
                        f"folder of {', '.join(PICTURES)}")
    for picture in pictures:
        if not picture.prompt:
            raise UserError(f"{picture.place}: no prompt; write one there or drop the row")
    return pictures


def table_in(folder: Path) -> Path | None:
    """Find the table of a folder of pictures; metadata.csv is the hub's name for it."""
    for name in ("metadata", "images"):
        for path in sorted(folder.glob(f"{name}.*")):
            if suffix_of(path) in TABLES:
                return path
    return None


def read_table_of_images(path: Path) -> list[Picture]:
    """Read a table with prompt, image and perhaps style, or with the hub's names of them."""
    if suffix_of(path) == ".parquet":
        rows = parquet_rows(path, str(path), lambda have: [*image_columns(have, str(path))])
    else:
        rows = text_rows(path)

    pictures = []
    for place, record in rows:
        columns = image_columns(record, place)
        cells = {meant: record[column] for column, meant in columns.items()}
        prompt = cell_text(cells["prompt"], place, "prompt")
        style = cell_text(cells.get("style"), place, "style")
        image = table_picture(cells["image"], path.parent, place)
        pictures.append(Picture(prompt, style, image, place))
    return pictures


def image_columns(have, where: str) -> dict[str, str]:
    """The columns of a table of pictures that are read -> what they are here."""
    names = {"prompt": "prompt", "image": "image", "style": "style"}
    if "image" not in have:
        names |= {"file_name": "image", "caption": "prompt"}
    columns = {column: names[column] for column in have if column in names}
    need_columns(("prompt", "image"), columns.values(), where)
    return columns


def read_folder_of_images(folder: Path) -> list[Picture]:
    """Read a folder, at any depth, in which every picture has its caption in a .txt beside it."""
    pictures = []
    for image in sorted(folder.rglob("*")):
        name = image.relative_to(folder)
        if suffix_of(image) not in PICTURES or is_hidden(name):
            continue
        caption = name.with_suffix(".txt")
        if not (folder / caption).is_file():
            raise UserError(f"{image}: no caption {caption.name} beside it, nor a table "
                            f"metadata.csv in {folder}; add one")

        # A link in the folder does not lead out of it.
        caption = file_within(folder, str(caption), str(image))
        image = file_within(folder, str(name), str(image))
        pictures.append(Picture(read_text(caption).strip(), "", image, str(image)))
    return pictures

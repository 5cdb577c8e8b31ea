"""The rows of the table: any model, named by where it lies, and pictures that exist already.

    3                              model 3 of the run (BASE is the base model)
    FOLDER, FILE or owner/name     a diffusers pipeline (its unet/), a UNet, or a low-rank adapter
                                   of the base's UNet
    owner/name/FILE.safetensors    one of several adapters of a hub model
    extrapolate:Iter0:2            weights base + 2 (Iter0 - base), as lib/rivals/controls.py tells
    guide:Iter0:1.5                prediction Iter0 + 1.5 (Iter0 - base), likewise
    images:PATH                    pictures that exist: a CSV, JSONL or Parquet table with prompt
                                   and image, or a folder that holds one, or a folder of pictures
                                   with a .txt caption beside each

The first is an int, the others are texts. A row is a UNet: text encoders, VAE and sampler are the
base's. A model that changed its text encoder too is scored as it is when given as the base of a
folder of its own, `--model owner/name`. Drawing and scoring the rows is lib/eval/scores.py.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from lib import models
from lib.data.tables import text_rows
from lib.models import BASE
from lib.rivals.controls import load_control, parse_control
from lib.run import UserError, atomic, inside, open_image, seed_of
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
    if isinstance(where, int):
        return models.load_unet(s, where)

    control = parse_control(where)
    if control:
        return load_control(s, control)

    # A model from elsewhere is laid out and compiled as the run's own models are.
    unet = models.to_device(s, load_unet_at(s, where))
    if s.compile == "on":
        unet.compile()
    return unet


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

    adapter, _ = look_into(s, where)
    if adapter:
        read_adapter(s, where, adapter)


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
    for file in sorted([path, *two_levels(path)]):
        if file.is_file():
            stamps.append(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}")
    if stamps:
        return " ".join(stamps)

    return f"{where}@{hub_commit(where)}"


def folder_name(name: str, stamp: str) -> str:
    """Name the folder of a row's pictures or scores: its name, and a hash of what made them."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
    return f"{plain}-{seed_of(stamp) % 16 ** 8:08x}"


# ---- models from elsewhere: folders, files and the hub ----

# The name under which diffusers saves an adapter.
ADAPTER = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(HUB_ID.pattern + r"/[\w.-]+\.safetensors")

# What a UNet must have in common with the base's.
ARCHITECTURE = ("_class_name", "in_channels", "cross_attention_dim", "addition_embed_type")


def load_unet_at(s: Settings, where: str) -> UNet2DConditionModel:
    """Load the UNet that a folder, a file or a hub id holds; an adapter is added to the base's.

    It is frozen, on the device, in dtype_of(s).
    """
    adapter, options = look_into(s, where)
    if adapter:
        unet = load_with_adapter(s, where, adapter)
    else:
        unet = load_whole_unet(s, where, options)
    return unet.requires_grad_(False).eval().to(models.device_of(s))


def look_into(s: Settings, where: str) -> tuple[str, dict[str, str]]:
    """Find out what `where` holds, by the names of its files -> (adapter, options).

    An adapter is the name of its file. If it is "", there is a whole UNet of the base's
    architecture, and diffusers needs the options beside `where` to load it: a subfolder, perhaps a
    variant.
    """
    source, file = split_file(where)
    if file:
        names = [file]
    else:
        names = names_at(source)

    # A pipeline has its UNet in unet/, a UNet by itself has no such folder.
    for folder in ("unet/", ""):
        if f"{folder}config.json" in names:
            return "", unet_options(s, where, folder, names)

    # No UNet, so an adapter: of diffusers' own name for one, or the only weights there are.
    adapters = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    if ADAPTER in adapters:
        return ADAPTER, {}
    if len(adapters) == 1:
        return adapters[0], {}
    raise UserError(f"{where}: holds no unet/config.json, no config.json and no single "
                    f".safetensors adapter; give a diffusers pipeline, a UNet or an adapter (its "
                    f"file, where there are several)")


def unet_options(s: Settings, where: str, folder: str, names: list[str]) -> dict[str, str]:
    """Choose the options with which diffusers loads the UNet in `folder` ("unet/" or "").

    A UNet of another architecture than the base's is refused.
    """
    options = {}
    if folder:
        options["subfolder"] = "unet"

    # Some are published in half precision only, under names that diffusers must be told of.
    weights = [n for n in names if n.startswith(f"{folder}diffusion_pytorch_model.")]
    if weights and all(".fp16." in n for n in weights):
        options["variant"] = "fp16"

    try:
        config = UNet2DConditionModel.load_config(where, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its {folder}config.json is not readable "
                        f"({first_line(error)}); restore it") from None

    # What cannot take the base's latents and prompts would fail only when it is drawn from.
    base = {"_class_name": "UNet2DConditionModel"} | models.unet_config(s)
    for key in ARCHITECTURE:
        if config.get(key) != base.get(key):
            raise UserError(f"{where}: its {folder}config.json has {key} {config.get(key)}, that "
                            f"of {s.model} {base.get(key)}; give a model of the same architecture")
    return options


def load_whole_unet(s: Settings, where: str, options: dict[str, str]) -> UNet2DConditionModel:
    try:
        return UNet2DConditionModel.from_pretrained(where, dtype=models.dtype_of(s), **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: diffusers cannot load its UNet ({first_line(error)}); download "
                        f"it again") from None


def load_with_adapter(s: Settings, where: str, adapter: str) -> UNet2DConditionModel:
    """Load the base's UNet and add an adapter to its weights, in float32."""
    state, alphas = read_adapter(s, where, adapter)
    unet = models.load_unet(s, BASE, trained=True)

    try:
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {adapter} does not fit the UNet of {s.model} "
                        f"({first_line(error)}); give an adapter of this model") from None

    # The adapter goes into the weights; its own layers are then in the way.
    unet.fuse_lora()
    unet.unload_lora()
    return unet.to(models.dtype_of(s))


def read_adapter(s: Settings, where: str, adapter: str) -> tuple[dict, dict | None]:
    """Read an adapter in any format that diffusers reads -> (state, alphas).

    The weights come under diffusers' names; the alphas are the scales, where the file has some.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if models.is_sdxl(s.model):
        pipeline = StableDiffusionXLPipeline
    else:
        pipeline = StableDiffusionPipeline
    config = SimpleNamespace(**models.unet_config(s))
    source, _ = split_file(where)

    try:
        state, alphas, *_ = pipeline.lora_state_dict(
            source, weight_name=adapter, use_safetensors=True, unet_config=config)
    # Each format's reader raises its own kinds of errors.
    except Exception as error:
        raise UserError(f"{where}: {adapter} is no adapter that diffusers reads "
                        f"({first_line(error)})") from None

    # A row changes the UNet and nothing else.
    others = [key for key in state if not key.startswith("unet.")]
    if len(others) == len(state):
        raise UserError(f"{where}: {adapter} has no weights for a UNet; give an adapter of the "
                        f"UNet of {s.model}")
    if others:
        raise UserError(f"{where}: {adapter} changes more than the UNet ({others[0]}); merge it "
                        f"into a pipeline, and give that as --model of a folder of its own")
    return state, alphas


def split_file(where: str) -> tuple[str, str]:
    """Split `where` into a folder or hub id, and the file in it that it names, or ""."""
    folder, _, file = where.rpartition("/")
    if Path(where).is_file():
        return folder or ".", file
    if HUB_FILE.fullmatch(where) and not Path(folder).exists():
        return folder, file
    return where, ""


def names_at(where: str) -> list[str]:
    """List the files of a local folder, two levels deep, or of a hub model."""
    path = Path(where)
    if path.is_dir():
        return [p.relative_to(path).as_posix() for p in two_levels(path)]
    if not HUB_ID.fullmatch(where) or path.parent.is_dir():
        raise UserError(f"{where}: no such file or folder, nor a hub id (owner/name)")

    from huggingface_hub import list_repo_files
    try:
        return list_repo_files(where)
    # Each network library raises its own kinds of errors.
    except Exception as error:
        names = list(in_cache(where))
        if names:
            return names
        raise UserError(f"{where}: no such file or folder, and the hub did not give it "
                        f"({type(error).__name__}); give a local copy") from None


def two_levels(folder: Path) -> list[Path]:
    """List what lies in a folder and in its folders; nothing where there is no such folder."""
    return [*folder.glob("*"), *folder.glob("*/*")]


def in_cache(hub_id: str) -> dict[str, str]:
    """Find the files that tell what a hub model is in this machine's cache -> {name: path}."""
    from huggingface_hub import try_to_load_from_cache

    paths = {}
    for name in ("unet/config.json", "config.json", ADAPTER, "model_index.json"):
        # The answer is a path, None, or a mark that the file is known not to exist.
        path = try_to_load_from_cache(hub_id, name)
        if isinstance(path, str):
            paths[name] = path
    return paths


def hub_commit(where: str) -> str:
    """Ask the hub for a model's commit; offline it is the cache's, which is what will be loaded."""
    from huggingface_hub import model_info

    hub_id, _ = split_file(where)
    try:
        return model_info(hub_id).sha
    # Each network library raises its own kinds of errors.
    except Exception:
        files = in_cache(hub_id)
        if not files:
            return ""

        # The cache has them as snapshots/COMMIT/NAME.
        name, path = next(iter(files.items()))
        return Path(path).parts[-name.count("/") - 2]


def first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# ---- pictures that exist ----

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TABLES = (".csv", ".jsonl", ".json", ".parquet")


def image_jobs(run: Path, name: str, where: str, prompts: pd.DataFrame | None) -> pd.DataFrame:
    """Copy pictures that exist into the run -> jobs (prompt_id, prompt, style, seed, image).

    With `prompts` (prompt_id, prompt), the pictures of these alone; without, all of them. The seed
    numbers the pictures of a prompt.
    """
    # Alone, prompts are numbered as they come; beside models they have the evaluation's numbers.
    table = read_images(where)
    if prompts is None:
        distinct = dict.fromkeys(table.prompt)
        prompt_ids = {prompt: i for i, prompt in enumerate(distinct)}
    else:
        prompt_ids = dict(zip(prompts.prompt, prompts.prompt_id))
        table = table[table.prompt.isin(prompt_ids.keys())]
        if table.empty:
            raise UserError(f"--row {name}=images:{where}: none of its prompts is one of the "
                            f"evaluation's; to score the pictures alone, give --images {where}")

    # The folder's name has a hash of files and prompts, so that other pictures get another folder.
    stats = []
    for prompt, path in zip(table.prompt, table.image):
        stats.append((prompt, path.name, path.stat().st_size, path.stat().st_mtime_ns))
    folder = Path("eval/images") / folder_name(name, str(stats))

    jobs = []
    seeds = table.groupby("prompt").cumcount()
    for seed, row in zip(seeds, table.itertuples()):
        prompt_id = prompt_ids[row.prompt]
        image = folder / f"{prompt_id:06d}_{seed}{row.image.suffix.lower()}"
        if not (run / image).exists():
            # Opened before it is copied: a broken picture is told by its own name and row.
            open_image(row.image, Path(where), row.Index + 1)
            with atomic(run / image) as temporary:
                shutil.copyfile(row.image, temporary)
        jobs.append({"prompt_id": prompt_id, "prompt": row.prompt, "style": row.style, "seed": seed,
                     "image": str(image)})
    return pd.DataFrame(jobs)


def read_images(where: str) -> pd.DataFrame:
    """Read a table of pictures or a folder of them -> (prompt, style, image: absolute path).

    A style is "" where there is none. Every image is a file that exists, and there is at least one.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        path = table_in(path) or path

    if path.is_file():
        table = read_table_of_images(path)
    elif path.is_dir():
        table = read_folder_of_images(path)
    else:
        raise UserError(f"images:{where}: no such file or folder")

    for row, image in enumerate(table.image, 1):
        if not image.is_file():
            raise UserError(f"{path}, row {row}: no file {image.name}; restore it or drop the row")
    if table.empty:
        raise UserError(f"{path}: holds no picture")
    return table


def table_in(folder: Path) -> Path | None:
    """Find the table of a folder of pictures; metadata.csv is the hub's name for it."""
    for name in ("metadata", "images"):
        for path in sorted(folder.glob(f"{name}.*")):
            if path.suffix in TABLES:
                return path
    return None


def read_table_of_images(path: Path) -> pd.DataFrame:
    """Read a table with prompt, image and perhaps style, or with the hub's names of them."""
    if path.suffix == ".parquet":
        table = pd.read_parquet(path).reset_index(drop=True)
    else:
        table = pd.DataFrame([record for _, record in text_rows(path)])
    if "image" not in table:
        table = table.rename(columns={"file_name": "image", "caption": "prompt"})

    for column in ("prompt", "image"):
        if column not in table.columns:
            raise UserError(f"{path}: no column {column!r}; it has {', '.join(table.columns)}; "
                            f"needed: prompt, image")

    files = []
    for row, image in enumerate(table.image, 1):
        files.append(inside(path.parent, image, path, row))
    styles = ""
    if "style" in table:
        styles = table["style"].fillna("").astype(str)
    prompts = table.prompt.astype(str).str.strip()
    return pd.DataFrame({"prompt": prompts, "image": files, "style": styles})


def read_folder_of_images(folder: Path) -> pd.DataFrame:
    """Read a folder, at any depth, in which every picture has its caption in a .txt beside it."""
    rows = []
    for image in sorted(folder.rglob("*")):
        if image.suffix.lower() not in PICTURES:
            continue
        caption = image.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"{image}: no caption {caption.name} beside it, nor a table "
                            f"metadata.csv in {folder}; add one")
        rows.append((caption.read_text(encoding="utf-8").strip(), "", image))
    return pd.DataFrame(rows, columns=["prompt", "style", "image"])

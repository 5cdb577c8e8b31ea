"""The rows of the table: any model, named by where it lies, and pictures that exist already.

    3                              model 3 of the run (-1 is the base)
    FOLDER, FILE or owner/name     a diffusers pipeline (its unet/), a UNet, or a low-rank adapter of the base's UNet
    owner/name/FILE.safetensors    one of several adapters of a hub model
    extrapolate:Iter0:2            weights base + 2 (Iter0 - base): the update of a model of this run, gone further
    guide:Iter0:1.5                prediction Iter0 + 1.5 (Iter0 - base): the same direction, at sampling
    images:PATH                    pictures that exist: a CSV, JSONL or Parquet table with prompt and image, or a folder
                                   that holds one, or a folder of pictures with a .txt caption beside each

A row is a UNet: text encoders, VAE and sampler are the base's. A model that changed its text encoder too is scored as
it is when given as the base of a folder of its own, `--model owner/name`.
"""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from lib import models, pairs
from lib.run import UserError, atomic, inside, open_image, seed_of
from lib.settings import Settings

ADAPTER = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(HUB_ID.pattern + r"/[\w.-]+\.safetensors")
# The public checkpoints of the paper's other rows. SAIL's authors released none.
RIVALS = {"sd15": {"DiffusionDPO": "mhdang/dpo-sd1.5-text2image-v1",
                   "DiffusionSPO": "SPO-Diffusion-Models/SPO-SD-v1-5_4k-p_10ep"},
          "sdxl": {"DiffusionDPO": "mhdang/dpo-sdxl-text2image-v1", "MaPO": "mapo-t2i/mapo-beta",
                   "DiffusionSPO": "SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep"}}      # this one is not in the paper's table
FULL_DATA = 800_000                                           # human pairs behind each of them (table 1 of the paper)


# ---- models ----

def load_unet(s: Settings, where: str) -> UNet2DConditionModel:
    """The UNet that a folder, a file or a hub id holds, frozen, in dtype_of(s) on the device; an adapter is fused."""
    options = find(s, where)
    if "weight_name" in options:
        unet = with_adapter(s, where, options["weight_name"])
    else:
        try:
            unet = UNet2DConditionModel.from_pretrained(where, dtype=models.dtype_of(s), **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{where}: diffusers cannot load its UNet ({first_line(error)}); download it again") from None
    return unet.requires_grad_(False).eval().to(models.device_of(s))


def find(s: Settings, where: str) -> dict[str, str]:
    """What diffusers needs beside `where` to load its UNet, which is of the base's architecture: a subfolder, perhaps a
    variant, or nothing. Or the weight_name of an adapter."""
    source, file = split(where)
    names = [file] if file else names_of(source)
    folder = next((folder for folder in ("unet/", "") if f"{folder}config.json" in names), None)
    if folder is None:
        adapters = [n for n in names if n.endswith(".safetensors") and "/" not in n]
        if ADAPTER not in adapters and len(adapters) != 1:
            raise UserError(f"{where}: holds no unet/config.json, no config.json and no single .safetensors adapter; give "
                            f"a diffusers pipeline, a UNet or an adapter (its file, where there are several)")
        return {"weight_name": ADAPTER if ADAPTER in adapters else adapters[0]}
    options = {"subfolder": "unet"} if folder else {}
    weights = [n for n in names if n.startswith(f"{folder}diffusion_pytorch_model.")]
    if weights and all(".fp16." in n for n in weights):
        options["variant"] = "fp16"
    try:
        config = UNet2DConditionModel.load_config(where, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its {folder}config.json is not readable ({first_line(error)}); restore it") from None
    base = {"_class_name": "UNet2DConditionModel"} | models.unet_config(s)
    for key in ("_class_name", "in_channels", "cross_attention_dim", "addition_embed_type"):
        if config.get(key) != base.get(key):
            raise UserError(f"{where}: its {folder}config.json has {key} {config.get(key)}, that of {s.model} "
                            f"{base.get(key)}; give a model of the same architecture")
    return options


def split(where: str) -> tuple[str, str]:
    """A folder or hub id, and the name of the file in it that `where` is, or nothing."""
    folder, _, file = where.rpartition("/")
    if Path(where).is_file():
        return folder or ".", file
    return (folder, file) if HUB_FILE.fullmatch(where) and not Path(folder).exists() else (where, "")


def names_of(where: str) -> list[str]:
    """The files of a local folder (two levels) or of a hub model."""
    path = Path(where)
    if path.is_dir():
        return [p.relative_to(path).as_posix() for p in (*path.glob("*"), *path.glob("*/*"))]
    if not HUB_ID.fullmatch(where) or path.parent.is_dir():
        raise UserError(f"{where}: no such file or folder, nor a hub id (owner/name)")
    from huggingface_hub import list_repo_files
    try:
        return list_repo_files(where)
    except Exception as error:                                # each network library raises its own kinds
        if known := list(cached(where)):
            return known
        raise UserError(f"{where}: no such file or folder, and the hub did not give it ({type(error).__name__}); give a "
                        f"local copy") from None


def cached(where: str) -> dict[str, str]:
    """Of the files that tell what a hub model is, those in this machine's cache, with their paths."""
    from huggingface_hub import try_to_load_from_cache
    paths = {n: try_to_load_from_cache(where, n) for n in ("unet/config.json", "config.json", ADAPTER, "model_index.json")}
    return {n: path for n, path in paths.items() if isinstance(path, str)}


def adapter_state(s: Settings, where: str, name: str) -> tuple[dict, dict | None]:
    """The weights of an adapter, in any format that diffusers reads, under diffusers' names, and the scales it has."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline if models.is_sdxl(s.model) else StableDiffusionPipeline
    try:
        state, alphas = pipeline.lora_state_dict(split(where)[0], weight_name=name, use_safetensors=True,
                                                 unet_config=SimpleNamespace(**models.unet_config(s)))[:2]
    except Exception as error:                                # each format's reader raises its own kinds
        raise UserError(f"{where}: {name} is no adapter that diffusers reads ({first_line(error)})") from None
    if not any(key.startswith("unet.") for key in state):
        raise UserError(f"{where}: {name} has no weights for a UNet; give an adapter of the UNet of {s.model}")
    if other := next((key for key in state if not key.startswith("unet.")), None):
        raise UserError(f"{where}: {name} changes more than the UNet ({other}); merge it into a pipeline, and give that as "
                        f"--model of a folder of its own")
    return state, alphas


def with_adapter(s: Settings, where: str, name: str) -> UNet2DConditionModel:
    """The base's UNet with an adapter added to its weights in float32."""
    (state, alphas), unet = adapter_state(s, where, name), models.load_unet(s, -1, trained=True)
    try:
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: {name} does not fit the UNet of {s.model} ({first_line(error)}); give an adapter of "
                        f"this model") from None
    unet.fuse_lora()
    unet.unload_lora()
    return unet.to(models.dtype_of(s))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def extrapolated(s: Settings, k: int, gamma: float) -> UNet2DConditionModel:
    """base + gamma (model K - base), weight by weight."""
    base, model = models.load_unet(s, -1, trained=True), models.load_unet(s, k, trained=True)
    with torch.no_grad():
        for p, q in zip(base.parameters(), model.parameters()):
            p.lerp_(q, gamma)
    return base.requires_grad_(False).eval().to(models.dtype_of(s))


class Guided(torch.nn.Module):
    """A UNet that predicts eps_theta + w (eps_theta - eps_base), with and without the prompt alike."""

    def __init__(self, unet: UNet2DConditionModel, base: UNet2DConditionModel, weight: float):
        super().__init__()
        self.unet, self.base, self.weight, self.config = unet, base, weight, unet.config

    def forward(self, *inputs, **options):
        mine, theirs = (u(*inputs, **options).sample for u in (self.unet, self.base))
        return SimpleNamespace(sample=mine + self.weight * (mine - theirs))


def load_row(s: Settings, where: int | str):
    """What paints a row's pictures."""
    if isinstance(where, int):
        return models.load_unet(s, where)
    if control := parse_control(where):
        kind, k, amount = control
        if kind == "extrapolate":
            return extrapolated(s, k, amount)
        return Guided(models.load_unet(s, k), models.load_unet(s, -1), amount)
    unet = load_unet(s, where)
    if models.device_of(s).type == "cuda":
        unet = unet.to(memory_format=torch.channels_last)     # as the run's own models, here and in the next line
    if s.compile == "on":
        unet.compile()
    return unet


def check(s: Settings, where: str) -> None:
    """Refuse at once a row that could only fail when others are drawn already."""
    if where.startswith("images:"):
        read_images(where.removeprefix("images:"))
    elif control := parse_control(where):
        folder = models.unet_folder(s, control[1])
        if not folder.exists():
            raise UserError(f"--row {where}: {folder} does not exist; train it first (04_train_dpo.py --iter {control[1]})")
    elif name := find(s, where).get("weight_name"):
        adapter_state(s, where, name)


def parse_control(where: str) -> tuple[str, int, float] | None:
    """(extrapolate or guide, model number, gamma or w), or None."""
    if not where.startswith(("extrapolate:", "guide:")):
        return None
    match = re.fullmatch(r"(extrapolate|guide):Iter(\d+):(-?\d+\.?\d*|\.\d+)", where)
    if not match:
        raise UserError(f"--row {where}: give extrapolate:IterK:GAMMA or guide:IterK:W, say extrapolate:Iter0:2")
    return match[1], int(match[2]), float(match[3])


def identity(s: Settings, where: int | str) -> str:
    """What tells a row's model from another under the same name: its files' sizes and times, or its hub id and commit."""
    if isinstance(where, str) and (control := parse_control(where)):
        return f"{where} {identity(s, control[1])} {identity(s, -1)}"
    if isinstance(where, int):
        where = str(models.unet_folder(s, where) or models.local_or_hub(s.model))
    path = Path(where)
    files = [path] if path.is_file() else sorted(p for p in (*path.glob("*"), *path.glob("*/*")) if p.is_file())
    if files:
        return " ".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    from huggingface_hub import model_info
    repo = split(where)[0]
    try:
        return f"{where}@{model_info(repo).sha}"
    except Exception:                                         # offline, the cache's commit is the one that will be loaded
        return f"{where}@{next((Path(p).parts[-n.count('/') - 2] for n, p in cached(repo).items()), '')}"


# ---- pictures that exist ----

def read_images(where: str) -> pd.DataFrame:
    """(prompt, style, image: absolute path) of a table of pictures or a folder of them."""
    path = Path(where).expanduser()
    if path.is_dir():
        tables = [p for name in ("metadata", "images") for p in sorted(path.glob(f"{name}.*"))
                  if p.suffix in (".csv", ".jsonl", ".json", ".parquet")]
        if tables:
            path = tables[0]
    if path.is_file():
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.DataFrame([record for _, record in pairs.text_rows(path)])
        table = table.rename(columns={"file_name": "image", "caption": "prompt"} if "image" not in table else {})
        for column in ("prompt", "image"):
            if column not in table.columns:
                raise UserError(f"{path}: no column {column!r}; it has {', '.join(table.columns)}; needed: prompt, image")
        files = [inside(path.parent, image, path, row) for row, image in enumerate(table.image)]
        table = pd.DataFrame({"prompt": table.prompt.astype(str).str.strip(), "image": files,
                              "style": table["style"].fillna("").astype(str) if "style" in table else ""})
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
        bare = next((p for p in files if not p.with_suffix(".txt").is_file()), None)
        if bare:
            raise UserError(f"{bare}: no caption {bare.stem}.txt beside it, nor a table metadata.csv in {path}; add one")
        table = pd.DataFrame([(p.with_suffix(".txt").read_text(encoding="utf-8").strip(), "", p) for p in files],
                             columns=["prompt", "style", "image"])
    else:
        raise UserError(f"images:{where}: no such file or folder")
    missing = [(row, p) for row, p in enumerate(table.image) if not p.is_file()]
    if missing or table.empty:
        raise UserError(f"{path}, row {missing[0][0]}: no file {missing[0][1].name}; restore it or drop the row" if missing
                        else f"{path}: holds no picture")
    return table


def image_jobs(run: Path, name: str, where: str, prompts: pd.DataFrame | None) -> pd.DataFrame:
    """Jobs (prompt_id, prompt, seed, image) of pictures that exist, copied into the run: those of the given prompts
    (prompt_id, prompt), or all of them."""
    table = read_images(where)
    if prompts is not None:
        number = dict(zip(prompts.prompt, prompts.prompt_id))
        table = table[table.prompt.isin(number.keys())]
        if table.empty:
            raise UserError(f"--row {name}=images:{where}: none of its prompts is one of the evaluation's; to score the "
                            f"pictures alone, give --images {where}")
    else:
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(table.prompt))}
    stats = [(prompt, p.name, p.stat().st_size, p.stat().st_mtime_ns) for prompt, p in zip(table.prompt, table.image)]
    folder = Path("eval/images") / folder_name(name, str(stats))
    jobs = []
    for n, row in zip(table.groupby("prompt").cumcount(), table.itertuples()):
        image = folder / f"{number[row.prompt]:06d}_{n}{row.image.suffix.lower()}"
        if not (run / image).exists():
            open_image(row.image, Path(where), row.Index)     # a broken one is told by its own name and row
            with atomic(run / image) as temporary:
                shutil.copyfile(row.image, temporary)
        jobs.append({"prompt_id": number[row.prompt], "prompt": row.prompt, "style": row.style, "seed": n,
                     "image": str(image)})
    return pd.DataFrame(jobs)


def folder_name(name: str, stamp: str) -> str:
    """The folder of a row's pictures and scores: its name, and a hash of what made them."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{seed_of(stamp) % 16 ** 8:08x}"

"""Where models lie: in a folder, in a file, on the hub. What is there, and why something is not.

Nothing is loaded here. A name is a folder (as given, or relative to the project), a file in one, a
hub id `owner/name`, or a hub file `owner/name/FILE.safetensors`.
"""

import errno
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lib.run import UserError
from lib.settings import ROOT

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(HUB_ID.pattern + r"/[\w.-]+\.safetensors")

# A file of weights after its stem: whole or one of several, in full or in half precision.
PLAIN = re.compile(r"(-\d+-of-\d+)?\.safetensors")
HALF = re.compile(r"\.fp16(-\d+-of-\d+)?\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# How a checkpoint of one file becomes a folder: a message prints it, and a test runs it.
CONVERT = ("python -c \"from diffusers import {kind} as P; "
           "P.from_single_file('{file}').save_pretrained('FOLDER')\"")

# How pickled weights become safe ones, likewise.
SAFE = ("python -c \"from diffusers import {kind} as M; "
        "M.from_pretrained('{where}').save_pretrained('FOLDER')\"")


# ---- names ----

def local_or_hub(name: str) -> str:
    """A folder (as given, or relative to the project), or a hub id of the form owner/name.

    UserError: the name is that of a folder which does not exist, or of a file.
    """
    for folder in (Path(name), ROOT / name):
        if os.path.isdir(folder):
            return str(folder)
    if os.path.isfile(name) or HUB_FILE.fullmatch(name):
        raise UserError(f"{name}: is one file, and a model is a folder with its configurations; "
                        f"convert it: {convert(name)}; then give that FOLDER")

    # The hub is not asked for what can only be a folder: it would try again and again.
    looks_local = name.startswith((".", "/", "~")) or name.split("/")[0] in ("lib", "runs")
    if looks_local or not HUB_ID.fullmatch(name):
        raise UserError(
            f"model folder {name} does not exist; "
            f"give a diffusers folder or a hub id like owner/name"
        )
    return name


def convert(file: str) -> str:
    """The command that makes a folder of a checkpoint of one file, here or on the hub."""
    keys = []
    if not os.path.isfile(file):
        owner, name, file = file.split("/")
        file = f"https://huggingface.co/{owner}/{name}/blob/main/{file}"
    elif file.endswith(".safetensors"):
        keys = keys_of(file)

    # What it is, its names tell; of a file on the hub SD1.x is a guess.
    kind = "StableDiffusionPipeline"
    if any(key.startswith("conditioner.") for key in keys):
        kind = "StableDiffusionXLPipeline"
    elif any(key.startswith("decoder.") for key in keys):
        kind = "AutoencoderKL"
    return CONVERT.format(kind=kind, file=file)


def split_file(where: str) -> tuple[str, str]:
    """Split `where` into a folder or hub id, and the file in it that it names, or ""."""
    folder, _, file = where.rpartition("/")
    if os.path.isfile(where):
        return folder or ".", file
    if HUB_FILE.fullmatch(where) and not os.path.exists(folder):
        return folder, file
    return where, ""


# ---- what is there ----

def names_at(where: str) -> list[str]:
    """List the files of a local folder, two levels deep, or of a hub model."""
    path = Path(where)
    if os.path.isdir(path):
        return [p.relative_to(path).as_posix() for p in two_levels(path)]
    if not HUB_ID.fullmatch(where):
        raise UserError(f"{where}: no such file or folder, nor a hub id (owner/name)")
    return hub_names(where)


@functools.cache
def hub_names(hub_id: str) -> list[str]:
    """List the files of a hub model, or of what this machine's cache has of it."""
    from huggingface_hub import list_repo_files
    try:
        return list_repo_files(hub_id)
    # Each network library raises its own kinds of errors.
    except Exception as error:
        folder = cached_folder(hub_id)
        if folder:
            return names_at(str(folder))
        # Where the folder above it is here, a path was meant, perhaps.
        here = ""
        if os.path.isdir(os.path.dirname(hub_id)):
            here = "no such file or folder, and as a hub id: "
        raise UserError(f"{hub_id}: {here}{why(error, hub_id)}") from None


def two_levels(folder: Path) -> list[Path]:
    """List what lies in a folder and in its folders; nothing where there is no such folder."""
    return [*folder.glob("*"), *folder.glob("*/*")]


def cached_folder(hub_id: str) -> Path | None:
    """Where this machine's cache has a hub model, perhaps in part; its name is the commit."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (OSError, ValueError):
        return None


@functools.cache
def hub_commit(where: str) -> str:
    """Ask the hub for a model's commit; offline it is the cache's, which is what will be loaded."""
    from huggingface_hub import model_info

    hub_id, _ = split_file(where)
    try:
        return model_info(hub_id).sha
    # Each network library raises its own kinds of errors.
    except Exception:
        folder = cached_folder(hub_id)
        return folder.name if folder else ""


def file_at(source: str, name: str) -> Path:
    """The path of a file of a folder or hub model; it is fetched if need be."""
    if Path(source).is_dir():
        return Path(source) / name

    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(source, name))
    except Exception as error:
        raise UserError(f"{source}/{name}: {why(error, source)}") from None


def keys_of(file: Path | str) -> list[str]:
    """The names of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: is no whole safetensors file ({first_line(error)}); "
                        f"download it again") from None


def weight_files(where: str, folder: str, stem: str) -> tuple[list[str], dict[str, str]]:
    """The files of a part's weights, and the options with which its loader finds them.

    `folder` is the part's ("unet/", or "" for a UNet by itself) and `stem` how its files begin.
    Some models are published in half precision only, under names that must be told.
    """
    names = names_at(where)
    endings = {n: n.removeprefix(folder + stem) for n in names if n.startswith(folder + stem)}
    for pattern, options in ((PLAIN, {}), (HALF, {"variant": "fp16"})):
        files = [name for name, ending in endings.items() if pattern.fullmatch(ending)]
        if files:
            return sorted(files), options

    if any(name.endswith(PICKLED) for name in endings):
        kind = "DiffusionPipeline" if folder else "AutoModel"
        raise UserError(f"{where}: {folder} has pickled weights only, which are not opened; make a "
                        f"folder of safetensors: {SAFE.format(kind=kind, where=where)}; then give "
                        f"that FOLDER")
    raise UserError(f"{where}: {folder or 'it'} has no {stem}.safetensors; download it again")


# ---- why not ----

def first_line(error: Exception) -> str:
    """The first line of an error; the further ones are a library's advice."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# By the kinds of errors that huggingface_hub and its network library raise, the first that fits.
REASONS = {
    "GatedRepoError": "its owner asks for consent; give it on https://huggingface.co/{name} and "
                      "log in with hf auth login",
    "RepositoryNotFoundError": "the hub has no such model, or it is private; correct the id, or "
                               "log in with hf auth login",
}
OUT_OF_REACH = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError",
                "TransportError")


def why(error: Exception, name: str) -> str:
    """Say in one line why something of the model `name` could not be had, and what to do."""
    # Of the libraries' errors, the one that began it says whether the network or the name is wrong.
    began = list(causes(error))
    kinds = {kind.__name__ for cause in began for kind in type(cause).mro()}
    for kind, words in REASONS.items():
        if kind in kinds:
            return words.format(name=name)
    if kinds.intersection(OUT_OF_REACH):
        return ("the hub is out of reach and this machine's cache lacks it; connect (and unset "
                "HF_HUB_OFFLINE), or give a local copy")

    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in began):
        return "no space is left on the disk of the hub's cache; free some, or set HF_HOME"
    return f"{first_line(error)}; check the folder or hub id"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised after."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""Files that are whole or not there, also after a kill or a power cut.

A file is written under a temporary name, brought to the disk, and renamed. A rename is on the disk
only when its folder is: `settle` sees to that for all files so far, and every table is preceded by
it, since a table says that what it names is there. Only the standard library is in here.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

# The mark of a temporary file: no other program names its files so.
TEMPORARY = re.compile(r"\..+\.\d+\.sail\.tmp", re.DOTALL)

# Folders in which this process has renamed a file since they were last brought to the disk.
_unsettled = set()


@contextlib.contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path`, which is renamed to `path` on success."""
    path = Path(path)
    make_folder(path.parent)

    # Two processes that write the same file do not disturb each other.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.sail.tmp")

    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        _unsettled.add(path.parent)
    finally:
        # Where the writing failed, nothing stays behind.
        if temporary.is_file():
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, as far as they are missing."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _unsettled.add(folder.parent)


def place_folder(temporary: Path, folder: Path) -> None:
    """Give a folder that is complete its name, in the place of what bears it now."""
    # The folder must not be on the disk before its files and all that was written before it.
    for path in temporary.rglob("*"):
        flush(path)
    flush(temporary)
    settle()

    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    _unsettled.update([folder.parent, folder.parent.parent])
    settle()


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """Yield a temporary folder beside `folder`, which takes its place when it is complete."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        place_folder(temporary, folder)
    finally:
        # On a full disk what has been written takes the room that is lacking.
        shutil.rmtree(temporary, ignore_errors=True)


def settle() -> None:
    """Return when the disk has every file that this process has renamed so far."""
    while _unsettled:
        with contextlib.suppress(FileNotFoundError):           # a folder that is gone again
            flush(_unsettled.pop())


def flush(path: Path) -> None:
    """Return when the disk has what a file, or a folder's list of names, contains."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do that for a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path) -> None:
    """Write a text file, in UTF-8."""
    settle()
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    settle()


def write_json(value: dict, path: Path) -> None:
    """Write a value as JSON for people, one entry a line."""
    write_text(json.dumps(value, indent=1) + "\n", path)


def save_tensors(tensors: dict, path: Path) -> None:
    """Write a small dictionary of tensors as a safetensors file."""
    from safetensors.torch import save

    # The file format knows contiguous tensors only. Its own `save_file` would go by way of a
    # temporary file of another name.
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(contiguous))


# ---- is it whole? ----

def is_whole(path: Path) -> bool:
    """Whether a file is there and complete, as far as its format's own marks tell.

    Looked at are a safetensors file's header and length, the end of a PNG, the length that a WebP
    tells, and both ends of a Parquet file; of any other format only that it is not empty.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = file.seek(0, os.SEEK_END)
            if path.suffix == ".safetensors":
                return is_whole_safetensors(file, int.from_bytes(start, "little"), size)
            file.seek(max(0, size - 12))
            end = file.read()
    except OSError:
        return False

    if path.suffix == ".png":
        return start == b"\x89PNG\r\n\x1a\n" and end == b"\0\0\0\0IEND\xaeB`\x82"
    if path.suffix == ".webp":
        return start.startswith(b"RIFF") and int.from_bytes(start[4:], "little") + 8 == size
    if path.suffix == ".parquet":
        return start.startswith(b"PAR1") and end.endswith(b"PAR1") and size > 12
    return size > 0


def is_whole_safetensors(file, header_length: int, size: int) -> bool:
    """Whether an open safetensors file is as long as its header says."""
    if not 0 < header_length <= size - 8:
        return False
    file.seek(8)
    try:
        header = json.loads(file.read(header_length))
        ends = [entry["data_offsets"][1] for name, entry in header.items()
                if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return False
    return size == 8 + header_length + max(ends, default=0)


def is_whole_model(folder: Path) -> bool:
    """Whether a diffusers folder of a UNet has its configuration and whole weights."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    weights = list(folder.glob("*.safetensors"))
    return isinstance(config, dict) and bool(weights) and all(map(is_whole, weights))

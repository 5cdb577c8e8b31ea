"""Small files of tensors, many in one: a run of SD1.5 has a million latents and embeddings.

What a stage makes in one batch goes into one file of safetensors, a pack, in a folder below the one
where each would have a file of its own. A file of its own is as good, and comes first. Nothing here
knows what the tensors are: a pack stands for the files whose names it has.

    latents/000012_00.safetensors            a file of its own, with the tensors `mean` and `std`
    latents/packs/000012_00.32.safetensors   32 files, with tensors `000012_00.safetensors/mean`...
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from lib.files import is_whole, save_tensors

FOLDER = "packs"
ENDING = ".safetensors"
MOST_OPEN = 16_000              # packs that stay mapped; Linux allows a process 65,530


class Pack(NamedTuple):
    """A pack as it was when it was looked at: one that was written since differs in a number."""
    path: Path
    inode: int
    changed: int
    size: int


class Folder:
    """What is known of a folder of packs, and which of them stands for which file."""

    def __init__(self):
        self.seen = set()                       # names of packs that have been read
        self.place = {}                         # file name: (pack, names of its tensors)
        self.changed = None                     # the folder's own time when it was looked at


_folders = {}


def save_pack(files: dict[Path, dict]) -> None:
    """Write tensors {file: {name: tensor}}: for each folder one pack, whole or not at all."""
    by_folder = {}
    for path, content in files.items():
        by_folder.setdefault(path.parent, {})[path] = content

    for folder, content in by_folder.items():
        tensors = {}
        for path, values in content.items():
            for name, tensor in values.items():
                tensors[f"{path.name}/{name}"] = tensor

        # The same files make the same name: what is made again takes its own place.
        first = next(iter(content))
        pack = folder / FOLDER / f"{first.stem}.{len(content)}{ENDING}"
        save_tensors(tensors, pack)
        known_of(pack.parent).seen.discard(pack.name)


def count_in(name: str) -> int:
    """How many files a pack of this name stands for."""
    return int(name.removesuffix(ENDING).rpartition(".")[2])


def load(path: Path) -> dict:
    """The tensors of a file, from its own or from a pack. FileNotFoundError: it is in neither."""
    from safetensors.torch import load_file

    place = place_of(path)
    if place is None:
        return load_file(path)
    pack, names = place
    handle = opened(pack)

    # Copied: a file that is mapped into memory may go.
    return {name: handle.get_tensor(f"{path.name}/{name}").clone() for name in names}


def shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a file's tensors by their names; None where it is not there whole."""
    place = place_of(path)
    if place is not None:
        pack, names = place
        handle, prefix = opened(pack), f"{path.name}/"
    elif is_whole(path):
        handle, prefix = safe_open(path, framework="pt"), ""
        names = handle.keys()
    else:
        return None
    return {name: tuple(handle.get_slice(prefix + name).get_shape()) for name in names}


def file_of(path: Path) -> Path:
    """The file on the disk that has a file's tensors: a pack, or its own."""
    place = place_of(path)
    if place is None:
        return path
    return place[0].path


def is_there(path: Path) -> bool:
    """Whether a file is there whole, as its own or in a pack."""
    return place_of(path) is not None or is_whole(path)


def place_of(path: Path) -> tuple[Pack, tuple[str, ...]] | None:
    """The pack that stands for a file, and the names of its tensors; None if none does.

    A file of its own that is whole comes first.
    """
    packs = path.parent / FOLDER
    folder = known_of(packs)
    place = folder.place.get(path.name)

    # A pack that is gone or was replaced: all that is known of the folder is old.
    if place is not None and stamp(place[0].path) != place[0]:
        _folders.pop(packs, None)
        folder = known_of(packs)
        place = None
    if place is None:
        look(packs, folder)
        place = folder.place.get(path.name)
    if place is not None and path.exists() and is_whole(path):
        return None
    return place


def known_of(folder: Path) -> Folder:
    """What is known of a folder so far."""
    return _folders.setdefault(folder, Folder())


def look(path: Path, folder: Folder) -> None:
    """Read the packs that are new in their folder, if it has changed since it was looked at."""
    try:
        changed = os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return
    if changed == folder.changed:
        return
    packs = {name for name in os.listdir(path) if name.endswith(ENDING)}
    for name in sorted(packs - folder.seen):
        add(path / name, folder)
        folder.seen.add(name)

    # Last, so that another thread does not take a part for the whole.
    folder.changed = changed


def add(path: Path, folder: Folder) -> None:
    """Enter the files of a pack that is whole."""
    pack = stamp(path)
    if pack is None or not is_whole(path):
        print(f"{path}: damaged, and made again")
        return
    names = {}
    for key in opened(pack).keys():
        file, _, name = key.rpartition("/")
        names.setdefault(file, []).append(name)

    # Of two packs with one file the later by name counts, in whatever order they were read.
    for file, tensors in names.items():
        before = folder.place.get(file)
        if before is None or before[0].path <= path:
            folder.place[file] = (pack, tuple(tensors))


def look_again() -> None:
    """Forget what is known: other processes may have written."""
    _folders.clear()


def stamp(path: Path) -> Pack | None:
    """A pack as it is now; None if it is not there."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return Pack(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=MOST_OPEN)
def opened(pack: Pack):
    """The pack, mapped into memory once."""
    return safe_open(pack.path, framework="pt")

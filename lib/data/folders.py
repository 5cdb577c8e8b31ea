"""Folders that are given as --pairs and hold a user's own pairs: a table, or winners and losers.

A labelling folder (lib/taste/) has its pairs in pairs.csv, one of invoke-training in
metadata.jsonl. Trainers such as kohya's and SimpleTuner's keep two folders instead: w/ with the
preferred pictures and l/ with the others under the same names, and the caption in a text of that
name beside one of them.
"""

import json
import math
import os
from pathlib import Path

from lib.data.tables import count_rows, is_hidden, read_text, suffix_of, text_rows
from lib.run import UserError

TABLES = ("pairs.csv", "metadata.jsonl")
ANSWERS = "answers.jsonl"                   # a labelling folder has it as soon as one is given
WIN, LOSE = "w", "l"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
CAPTIONS = (".txt", ".caption")


def table_of(source: str) -> str:
    """What a source of pairs is read from: for a folder with a table that table, else itself.

    UserError: it is a labelling folder without a label.
    """
    if not os.path.isdir(source):
        return source
    for name in TABLES:
        if (Path(source) / name).is_file():
            return str(Path(source) / name)
    if (Path(source) / "shown.parquet").exists() or (Path(source) / ANSWERS).exists():
        raise UserError(f"{source}: has no labels yet; give some with ./run_sail.sh label --run "
                        f"{source}")
    return source


def is_two_folders(source: str) -> bool:
    """Whether a source of pairs is a folder of winners beside one of losers."""
    return all((Path(source) / name).is_dir() for name in (WIN, LOSE))


def is_own(source: str) -> bool:
    """Whether a source is a file or folder of a user's own, and no shards or hub dataset."""
    return os.path.isfile(table_of(source)) or (os.path.isdir(source) and is_two_folders(source))


def own_rows(source: str) -> list[tuple[str, dict]]:
    """(where, record) of the rows of a text table, or of the pictures of two folders."""
    if os.path.isdir(source):
        return two_folder_rows(Path(source))
    return text_rows(Path(source))


def count_pairs(source: str) -> int:
    """Rows of a user's own pairs, of which some may be none."""
    table = table_of(source)
    if os.path.isdir(table):
        return len(two_folder_rows(Path(table)))
    return count_rows(Path(table))


def two_folder_rows(folder: Path) -> list[tuple[str, dict]]:
    """(where, record) for each picture of w/, with the one of its name in l/ and their caption.

    UserError: a picture has no counterpart or no caption.
    """
    winners, losers = pictures_in(folder / WIN), pictures_in(folder / LOSE)
    for name in sorted(winners.keys() ^ losers.keys()):
        path, other = (winners.get(name), LOSE) if name in winners else (losers[name], WIN)
        raise UserError(f"{path}: no picture of that name in {folder / other}; add it, or remove "
                        f"this one")

    rows = []
    for name, winner in sorted(winners.items()):
        record = {
            "prompt": caption_of(folder, winner, losers[name]),
            "win": str(winner.relative_to(folder)),
            "lose": str(losers[name].relative_to(folder)),
        }
        rows.append((str(winner), record))
    return rows


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures of a folder at any depth, by their names without the ending.

    UserError: two have the same.
    """
    pictures = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if suffix_of(path) not in PICTURES or is_hidden(name):
            continue
        key = name.with_suffix("").as_posix()
        if key in pictures:
            raise UserError(f"{path}: {pictures[key].name} beside it has the same name; remove one "
                            f"of them")
        pictures[key] = path
    return pictures


def caption_of(folder: Path, *pictures: Path) -> str:
    """The text beside one of these pictures; the first that has one tells it."""
    for picture in pictures:
        for ending in CAPTIONS:
            caption = picture.with_suffix(ending)
            if not caption.is_file():
                continue

            # As for a picture, a link in the folder does not lead out of it.
            if not caption.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{caption}: leaves {folder} through a link; copy the text there")
            return read_text(caption).strip()
    first = pictures[0]
    raise UserError(f"{first}: no caption {first.stem}.txt beside it; write one")


def agreement_beside(source: str) -> dict:
    """How far those who labelled agree with themselves, as the labelling folder tells it.

    It is {"agree_with_themselves", "low", "high", "pairs"}, or {} where nobody was asked twice.
    """
    path = Path(table_of(source)).with_name("agreement.json")
    try:
        of_self = json.loads(path.read_text(encoding="utf-8"))["agrees_with_self"]
        numbers = [float(of_self[name]) for name in ("value", "low", "high", "pairs")]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    if not all(map(math.isfinite, numbers)):
        return {}
    return dict(zip(("agree_with_themselves", "low", "high", "pairs"), numbers))

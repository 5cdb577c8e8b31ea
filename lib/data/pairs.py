"""Human pairs from outside, in an order that depends on the run's seed: what makes a row a pair.

A source (`--pairs`) is the user's own table or folder (folders.py), or Parquet shards on this
machine or on the hub; LAYOUTS says by which columns a pair is known. Pairs stream: shards are
opened one by one (shards.py), and a reader that has enough simply stops. In the user's table a
broken row is an error that names it; among those of Pick-a-Pic and of the hub it is skipped and
counted.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lib.data.folders import is_two_folders, own_rows, table_of
from lib.data.pictures import Encoded, digest
from lib.data.prompts import fold
from lib.data.shards import ROWS_HELD, find_shards, shuffled_batches
from lib.data.tables import cell_text, need_columns, open_parquet, shuffled, suffix_of
from lib.run import UserError, shown

# The columns by which a pair is known: the project's own, those of open-image-preferences and of
# most trainers, invoke-training's, and Pick-a-Pic's.
WIN_LOSE = ("prompt", "win", "lose")
CHOSEN = ("prompt", "chosen", "rejected")
PREFER = ("prompt", "image_0", "image_1", "prefer_0", "prefer_1")
PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
LAYOUTS = (WIN_LOSE, CHOSEN, PREFER, PICKAPIC)

# Labels of two pictures: Pick-a-Pic's numbers; invoke-training's truth values equal some of them.
FIRST_IS_BETTER = (1, 0)
SECOND_IS_BETTER = (0, 1)
TIE = (.5, .5)

# A CSV has them as texts.
AS_TEXT = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, ".5": .5, "0.5": .5, "true": 1, "false": 0,
           "": None}


class Row(NamedTuple):
    """A row of a source, before its pictures are looked at."""

    where: str                              # file and row, for messages
    prompt: str = ""
    win: Encoded | None = None              # the preferred picture
    lose: Encoded | None = None
    no_pair: str = ""                       # why the row holds none: a tie, no label
    strict: bool = False                    # a broken picture is an error, not a row to skip


# ---- the stream of pairs ----

def stream_pairs(
    source: str,
    seed: int,
    skipped: Counter | None = None,
    avoid: Iterable[str] = (),
) -> Iterator[dict]:
    """Pairs `{"pair_id", "prompt", "win", "lose"}` of a source, in the seed's order.

    `win` and `lose` are encoded pictures that `pictures.decode` takes, read to their end once;
    `pair_id` is a hash of the prompt and both pictures. `avoid` holds the prompts of the
    evaluation. `skipped` counts the rows that gave no pair, by reason: tie, no label, empty prompt,
    prompt of the evaluation, unreadable image, same image twice, repeated pair.

    UserError: an unreadable image, a bad path or a missing column in the user's own table, a hub
    out of reach, and a source without any pair.
    """
    if skipped is None:
        skipped = Counter()
    evaluation = {fold(prompt) for prompt in avoid}
    seen = set()

    # Threads read the pictures of a batch; which of two equal rows is the repeat, their order says.
    with ThreadPoolExecutor() as threads:
        for batch in source_rows(source, seed):
            results = threads.map(examine, batch, repeat(evaluation))
            for row, (reason, pair_id) in zip(batch, results):
                if not reason and pair_id in seen:
                    reason = "repeated pair"
                if reason:
                    skipped[reason] += 1
                    continue

                seen.add(pair_id)
                yield {"pair_id": pair_id, "prompt": row.prompt, "win": row.win, "lose": row.lose}

    if not seen:
        counts = [f"{reason} {count}" for reason, count in skipped.items()]
        reasons = ", ".join(counts) or "it has no rows"
        raise UserError(f"{source}: no usable pair ({reasons}); give --pairs another source")


def examine(row: Row, evaluation: set[str]) -> tuple[str, str]:
    """Why a row gives no pair, or ""; and the pair's id. Reads both pictures to their end.

    `evaluation` holds the evaluation's prompts as `fold` makes them.
    """
    if row.no_pair:
        return row.no_pair, ""
    if not row.prompt:
        return "empty prompt", ""
    if fold(row.prompt) in evaluation:
        return "prompt of the evaluation", ""

    try:
        win = digest(row.win)
        lose = digest(row.lose)
    except OSError as error:
        if row.strict:
            raise UserError(
                f"{row.where}: cannot read an image ({error}); replace it or drop the row"
            ) from None
        return "unreadable image", ""

    if win == lose:
        return "same image twice", ""
    return "", id_of_pair(row.prompt, win, lose)


def id_of_pair(prompt: str, win: str, lose: str) -> str:
    """A pair's id, 16 hexadecimal digits, from its prompt and the digests of its pictures."""
    key = json.dumps([prompt, win, lose])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


# ---- the rows of a source ----

def source_rows(source: str, seed: int) -> Iterator[list[Row]]:
    """Batches of rows in the seed's order: a user's own, or those of shard after shard."""
    source = table_of(source)
    path = Path(source)
    is_text = os.path.isfile(source) and suffix_of(path) != ".parquet"
    if is_text or (os.path.isdir(source) and is_two_folders(source)):
        folder = path.parent if is_text else path
        yield from own_table_rows(source, folder, seed)
        return

    shards = find_shards(source)
    for name in shuffled(shards.names, seed):
        yield from shard_rows(shards.fetch(name), name, seed, on_hub=shards.folder is None)


def own_table_rows(source: str, folder: Path, seed: int) -> Iterator[list[Row]]:
    """Batches of a user's own rows; all their paths are checked before the first batch."""
    rows = []
    for where, record in own_rows(source):
        layout = pair_columns(record, where, LAYOUTS[:-1])
        rows.append(row_of(layout, where, record, folder))

    # Rows are drawn by their number alone: a table that is moved or renamed keeps its order.
    order = shuffled(range(len(rows)), seed)
    for start in range(0, len(rows), ROWS_HELD):
        yield [rows[i] for i in order[start:start + ROWS_HELD]]


def shard_rows(file: Path, name: str, seed: int, on_hub: bool) -> Iterator[list[Row]]:
    """Batches of a Parquet file's rows; those on the hub nobody here can mend."""
    with open_parquet(file, str(file)) as table:
        layout = pair_columns(table.schema_arrow.names, str(file))
        columns = layout
        if "has_label" in table.schema_arrow.names:
            columns += ("has_label",)

        # Bytes are in the table itself; files could only lie beside the user's own.
        folder = None if on_hub or layout == PICKAPIC else file.parent
        for batch in shuffled_batches(table, name, seed, columns):
            yield [row_of(layout, f"{file}, row {number}", record, folder)
                   for number, record in batch]


def pair_columns(
    have: Iterable[str],
    where: str,
    layouts: tuple[tuple[str, ...], ...] = LAYOUTS,
) -> tuple[str, ...]:
    """The layout of a table or row; UserError with the first column that is missing.

    Where no layout is complete, the one that most of the names belong to is meant.
    """
    names = set(have)
    for layout in layouts:
        if names.issuperset(layout):
            return layout

    # A prompt alone tells none of them from another.
    nearest = max(layouts, key=lambda layout: len(names.intersection(layout)))
    need_columns(nearest, have, where)


# ---- what a row says ----

def row_of(layout: tuple[str, ...], where: str, record: dict, folder: Path | None) -> Row:
    """What a row of a layout says, its preferred picture first; a tie is no pair, nor no label.

    The user's own row lies in `folder`, and is to be mended where it is broken; among others (None)
    it is skipped. UserError: a cell is of another kind than its column's.
    """
    prompt, first, second, *labels = layout
    if labels:
        given = tuple(label_of(record[column], where, column) for column in labels)
        if given not in (FIRST_IS_BETTER, SECOND_IS_BETTER, TIE):
            return Row(where, no_pair="no label")
        if record.get("has_label") is False:
            return Row(where, no_pair="no label")
        if given == TIE:
            return Row(where, no_pair="tie")
        if given == SECOND_IS_BETTER:
            first, second = second, first

    text = cell_text(record[prompt], where, prompt)
    if folder is None:
        win, lose = (picture_bytes(record[column], where, column) for column in (first, second))
    else:
        win, lose = (table_picture(record[column], folder, where) for column in (first, second))
    return Row(where, text, win, lose, strict=folder is not None)


def label_of(label, where: str, column: str) -> int | float | None:
    """A label of one of two pictures; None where a row has none."""
    if isinstance(label, str):
        label = AS_TEXT.get(label.strip().lower(), label)
    if not isinstance(label, int | float | None):
        raise UserError(
            f"{where}: {column} is {shown(label)} and no number; "
            f"write 1 for the preferred picture, 0 for the other, .5 twice for a tie"
        )
    return label


def table_picture(cell, folder: Path, where: str) -> Encoded:
    """The picture of a table's cell: its bytes, or the path of a file within `folder`."""
    # The datasets library writes an image as {"bytes", "path"}.
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or not cell.strip():
        raise UserError(
            f"{where}: no image but {shown(cell)}; "
            f"give its path (or, in Parquet, its bytes) or drop the row"
        )
    return file_within(folder, cell, where)


def file_within(folder: Path, name: str, where: str) -> Path:
    """The file of a table's folder that a row names; UserError where that is no such file.

    A table names nothing outside its folder, by no way: absolute, upward, or through a link.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(
            f"{where}: {shown(name)} leaves the table's folder; "
            f"name images relative to {folder}, and in it"
        )

    # What is no file's name at all (too long, or half a character) is no file either.
    try:
        target = path.resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):
        is_file = False
    if not is_file:
        raise UserError(
            f"{where}: no file {shown(name)} in {folder}; correct the path or drop the row"
        )
    if not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{where}: {shown(name)} leaves the table's folder through a link; move the table to "
            f"where the pictures are ({target.parent}) and name them from there, or copy them here"
        )
    return path


def picture_bytes(cell, where: str, column: str) -> bytes | None:
    """The bytes of a picture, which may be wrapped as the datasets library does; None for none."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes | None):
        raise UserError(
            f"{where}: {column} is {shown(cell)} and no picture's bytes; "
            f"write them there, or name files in a table with columns prompt, win, lose"
        )
    return cell

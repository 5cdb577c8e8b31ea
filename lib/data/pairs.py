"""Human pairs from outside, in an order that depends on the run's seed: what makes a row a pair.

A source (`--pairs`) is the user's own table, with columns prompt, win and lose, or Pick-a-Pic's
shards, with their labels; a table may lie on the hub and shards on this machine. Pairs stream:
shards are opened one by one (shards.py), and a reader that has enough simply stops. In the user's
table a broken row is an error that names it; among Pick-a-Pic's 0.8 million it is skipped and
counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from lib.data.pictures import Encoded, digest
from lib.data.prompts import fold
from lib.data.shards import ROWS_HELD, find_shards, shuffled_batches
from lib.data.tables import need_columns, open_parquet, shuffled, text_rows
from lib.run import UserError

SOURCE_COLUMNS = ("prompt", "win", "lose")
PICKAPIC_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")

FIRST_IS_BETTER = (1, 0)                    # Pick-a-Pic's (label_0, label_1)
SECOND_IS_BETTER = (0, 1)
TIE = (.5, .5)


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
    """Batches of rows in the seed's order: a text table's, or those of shard after shard."""
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        yield from text_table_rows(path, seed)
        return

    shards = find_shards(source)
    for name in shuffled(shards.names, seed):
        yield from shard_rows(shards.fetch(name), name, seed)


def text_table_rows(path: Path, seed: int) -> Iterator[list[Row]]:
    """Batches of a text table's rows; all its paths are checked before the first batch."""
    rows = [table_row(where, record, path.parent) for where, record in text_rows(path)]

    # Rows are drawn by their number alone: a table that is moved or renamed keeps its order.
    order = shuffled(range(len(rows)), seed)
    for start in range(0, len(rows), ROWS_HELD):
        yield [rows[i] for i in order[start:start + ROWS_HELD]]


def shard_rows(file: Path, name: str, seed: int) -> Iterator[list[Row]]:
    """Batches of a Parquet file's rows, be it Pick-a-Pic's or a table of the user's."""
    for records in shard_records(file, name, seed):
        batch = []
        for where, record in records:
            if "win" in record:
                batch.append(table_row(where, record, file.parent))
            else:
                batch.append(pickapic_row(where, record))
        yield batch


def shard_records(file: Path, name: str, seed: int) -> Iterator[list[tuple[str, dict]]]:
    """Batches of (where, record) of a Parquet file, with the columns of a pair alone."""
    with open_parquet(file, str(file)) as table:
        columns = pair_columns(table.schema_arrow.names, str(file))
        for batch in shuffled_batches(table, name, seed, columns):
            yield [(f"{file}, row {number}", record) for number, record in batch]


def pair_columns(have: list[str], where: str) -> tuple[str, ...]:
    """The columns to read of a Parquet file; UserError if one is missing.

    The file is Pick-a-Pic's if it has that data set's names and not all of a pair table's.
    """
    columns = SOURCE_COLUMNS
    if not set(SOURCE_COLUMNS) <= set(have) and ("caption" in have or "jpg_0" in have):
        columns = PICKAPIC_COLUMNS
    need_columns(columns, have, where)

    if "has_label" in have:
        columns += ("has_label",)
    return columns


# ---- what a row says ----

def table_row(where: str, record: dict, folder: Path) -> Row:
    """A row of the user's own table, which lies in `folder`; UserError if it is not a pair's."""
    need_columns(SOURCE_COLUMNS, record, where)
    prompt = str(record["prompt"] or "").strip()
    win = table_picture(record["win"], folder, where)
    lose = table_picture(record["lose"], folder, where)
    return Row(where, prompt, win, lose, strict=True)


def table_picture(cell, folder: Path, where: str) -> Encoded:
    """The picture of a table's cell: its bytes, or the path of a file within `folder`."""
    # The datasets library writes an image as {"bytes", "path"}.
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if not isinstance(cell, str) or not cell.strip():
        raise UserError(
            f"{where}: no image but {cell!r}; "
            f"give its path (or, in Parquet, its bytes) or drop the row"
        )

    # A table names nothing outside its folder, by no way: absolute, upward, or through a link.
    path = folder / cell
    outside = Path(cell).is_absolute() or ".." in Path(cell).parts
    if outside or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{where}: {cell!r} leaves the table's folder; "
            f"name images relative to {folder}, and in it"
        )
    if not path.is_file():
        raise UserError(f"{where}: no file {cell!r} in {folder}; correct the path or drop the row")
    return path


def pickapic_row(where: str, record: dict) -> Row:
    """A row of Pick-a-Pic, its preferred picture first; a tie or a missing label is no pair."""
    # Any labels but these three do not say which picture is preferred.
    labels = (record["label_0"], record["label_1"])
    labelled = labels in (FIRST_IS_BETTER, SECOND_IS_BETTER, TIE)
    if not labelled or record.get("has_label") is False:
        return Row(where, no_pair="no label")
    if labels == TIE:
        return Row(where, no_pair="tie")

    win = pickapic_picture(record["jpg_0"])
    lose = pickapic_picture(record["jpg_1"])
    if labels == SECOND_IS_BETTER:
        win, lose = lose, win
    return Row(where, (record["caption"] or "").strip(), win, lose)


def pickapic_picture(cell) -> Encoded | None:
    """The bytes of a picture; some copies of Pick-a-Pic wrap them as the datasets library does."""
    return cell.get("bytes") if isinstance(cell, dict) else cell

"""Tables from outside as records: CSV, TSV, JSON, JSON lines, plain text, and Parquet's columns.

A record is a dict of a row's cells; beside it goes `where`, the file and the row, for messages.
Rows count from 1; a header and blank lines are not counted. What the cells mean is not decided
here, but for the two columns of prompts, which go by several names.
"""

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lib.run import UserError


def shuffled(items: Iterable, *key) -> list:
    """Items (JSON values) in a random order that depends on the key and on their set alone.

    How a file system or the hub happens to list them plays no part.
    """
    def place(item) -> bytes:
        return hashlib.sha256(json.dumps([*key, item]).encode()).digest()

    return sorted(items, key=place)


def need_columns(columns: tuple[str, ...], have: Iterable[str], where: str) -> None:
    """UserError that names the first of `columns` that a table or row lacks."""
    for column in columns:
        if column not in have:
            raise UserError(
                f"{where}: no column {column!r}; it has {', '.join(have)}; "
                f"needed: {', '.join(columns)}"
            )


# ---- text tables ----

def text_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, record) of every row of a text table; UserError if it cannot be read.

    The format goes by the file's name: .csv and .tsv with a header, .json, .jsonl, and any other
    name for a text of one prompt a line. A row that is a text only is a prompt.
    """
    try:
        records = text_records(path)
    except (OSError, csv.Error, ValueError) as error:
        kind = path.suffix[1:] or "text"
        raise UserError(f"{path}: not readable as UTF-8 {kind} ({error}); correct it") from None

    rows = []
    for number, record in enumerate(records, 1):
        where = f"{path}, row {number}"
        if isinstance(record, str):
            record = {"prompt": record}

        # The csv module keeps the cells that have no column under None.
        if not isinstance(record, dict) or None in record:
            raise UserError(
                f"{where}: does not fit the columns; "
                f"put double quotes round a CSV's prompt with commas"
            )
        rows.append((where, record))
    return rows


def text_records(path: Path) -> list:
    """What the rows of a text file hold, unchecked: dicts or texts."""
    # Some editors begin a UTF-8 file with a byte order mark; "utf-8-sig" reads over it.
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix == ".tsv":
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    if path.suffix == ".json":
        return json_records(json.loads(text))

    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        # All lines are parsed as one list: an error then names the line.
        return json.loads("[" + ",\n".join(lines) + "]")
    return lines


def json_records(value) -> list:
    """The rows of a JSON file: a list, or an object of `style: [prompts]`."""
    if isinstance(value, list):
        return value

    of_styles = isinstance(value, dict) and len(value) > 0
    if not of_styles or not all(isinstance(prompts, list) for prompts in value.values()):
        raise ValueError("it holds no list")

    records = []
    for style, prompts in value.items():
        for prompt in prompts:
            records.append({"style": style, "prompt": prompt})
    return records


# ---- Parquet ----

@contextlib.contextmanager
def open_parquet(file: Path | BinaryIO, where: str) -> Iterator:
    """A pyarrow ParquetFile, whose errors within the `with` become a UserError.

    It is opened so that reading takes a buffer for each column and not a whole row group.
    """
    import pyarrow
    import pyarrow.parquet

    # Left to itself, pyarrow would read a shard's whole row group ahead.
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{where}: not a readable Parquet file ({error}); fetch or write it again"
        ) from None


def count_rows(path: Path) -> int:
    """Rows of a table; of a Parquet file only the footer is read."""
    if path.suffix != ".parquet":
        return len(text_rows(path))
    with open_parquet(path, str(path)) as table:
        return table.metadata.num_rows


# ---- the columns of prompts ----

def prompt_rows(file: Path | BinaryIO, where: str) -> list[tuple[str, str]]:
    """(style or "", prompt) of every row of a table, stripped; an empty prompt too.

    `file` is a table of any format, or an open Parquet file, which `where` then names.
    """
    if isinstance(file, Path) and file.suffix != ".parquet":
        rows = text_rows(file)
    else:
        rows = parquet_prompt_rows(file, where)

    prompts = []
    for where, record in rows:
        prompt_column, style_column = prompt_columns(record, where)
        style = ""
        if style_column is not None:
            style = cell_text(record[style_column])
        prompts.append((style, cell_text(record[prompt_column])))
    return prompts


def parquet_prompt_rows(file: Path | BinaryIO, where: str) -> list[tuple[str, dict]]:
    """(where, record) of a Parquet file's rows, with the columns of prompts and styles alone."""
    rows = []
    with open_parquet(file, where) as table:
        prompt_column, style_column = prompt_columns(table.schema_arrow.names, where)
        columns = [prompt_column]
        if style_column is not None:
            columns.append(style_column)

        # Beside these columns lie the pictures: nearly all of a shard's bytes.
        for batch in table.iter_batches(columns=columns):
            for record in batch.to_pylist():
                rows.append((where, record))
    return rows


def prompt_columns(have: Iterable[str], where: str) -> tuple[str, str | None]:
    """The columns of prompts and of styles (None: there is none), in any case of letters."""
    by_name = {column.lower(): column for column in have}
    prompt_column = by_name.get("prompt", by_name.get("caption"))
    style_column = by_name.get("style", by_name.get("category"))
    if prompt_column is None:
        need_columns(("prompt",), have, where)
    return prompt_column, style_column


def cell_text(cell) -> str:
    """A cell as stripped text; "" where it is empty."""
    return str(cell or "").strip()

"""Tables from outside as records: CSV, TSV, JSON, JSON lines, plain text, and Parquet's columns.

A record is a dict of a row's cells; beside it goes `where`, the file and the row, for messages.
Rows count from 1; a header and blank lines are not counted. What the cells mean is not decided
here, but for the two columns of prompts, which go by several names.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lib.run import UserError, shown


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
                f"{where}: no column {column!r}; it has {', '.join(have)[:200]}; "
                f"needed: {', '.join(columns)}"
            )


def suffix_of(path: Path) -> str:
    """A file name's ending, in lower case: PAIRS.CSV is a CSV file too."""
    return Path(path).suffix.lower()


def is_hidden(name: Path) -> bool:
    """Whether a path, relative to a folder that was named, leads through a name with a dot.

    macOS puts a ._x.parquet beside x.parquet on foreign disks.
    """
    return any(part.startswith(".") for part in name.parts)


def brief(error: Exception) -> str:
    """What a library says of an error, in one line of bounded length."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}"


# ---- text tables ----

def text_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, record) of every row of a text table; UserError if it cannot be read.

    The format goes by the file's name: .csv and .tsv with a header, .json, .jsonl, and any other
    name for a text of one prompt a line. A row that is a text only is a prompt.
    """
    # Some editors begin a UTF-8 file with a byte order mark; "utf-8-sig" reads over it.
    text = read_text(path)
    try:
        records = text_records(path, text)
    except (ValueError, RecursionError) as error:
        kind = suffix_of(path)[1:] or "text"
        raise UserError(f"{path}: not readable as {kind} ({error}); correct it") from None

    rows = []
    for number, record in enumerate(records, 1):
        where = f"{path}, row {number}"
        if isinstance(record, str):
            record = {"prompt": record}

        if not isinstance(record, dict):
            raise UserError(f"{where}: is {shown(record)}, neither a prompt nor an object with "
                            f"columns; correct it or drop the row")

        # The csv module keeps the cells that have no column under None.
        if None in record:
            raise UserError(
                f"{where}: does not fit the columns; "
                f"put double quotes round a CSV's prompt with commas"
            )
        rows.append((where, record))
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; UserError if there is none or, with its line, another encoding."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        kind, files = "WINDOWS-1252", "older Western files"
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            kind, files = "UTF-16", "this one"
        raise UserError(
            f"{path}, line {line}: not readable as UTF-8; save it in that encoding "
            f"(iconv -f {kind} -t UTF-8 converts {files})"
        ) from None


def read_bytes(path: Path) -> bytes:
    """The content of a file; UserError if there is none. Nothing but a plain file is opened."""
    try:
        if not path.is_file():
            raise OSError("No such file")
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: not readable ({why}); correct the name") from None


def text_records(path: Path, text: str) -> list:
    """What the rows of a text file hold, unchecked: dicts or texts."""
    kind = suffix_of(path)
    if kind == ".csv":
        return csv_records(text, ",")
    if kind == ".tsv":
        return csv_records(text, "\t")
    if kind == ".json":
        return json_records(json.loads(text))

    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if kind != ".jsonl":
        return lines

    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"row {number}: {error}") from None
    return records


def csv_records(text: str, delimiter: str) -> list[dict]:
    """The rows of a table with a header; ValueError, which names the row, if one is none."""
    # A quote that is not closed would swallow the rows after it: strict refuses it. Lists with
    # tabs, as PartiPrompts', have quotes at will.
    strict = delimiter == ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    records = []
    try:
        for record in reader:
            if not strict and any("\n" in cell for cell in record.values() if type(cell) is str):
                raise csv.Error("a double quote that is not closed")
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"row {len(records) + 1}: {error}") from None
    return records


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

    # Errors of a file on the hub are told where the hub is asked.
    kinds = (pyarrow.ArrowException, UnicodeDecodeError)
    try:
        if isinstance(file, Path):
            kinds += (OSError,)
            # A name that no file has would be taken for an address, say of S3.
            if not file.is_file():
                raise FileNotFoundError("No such file")

        # Left to itself, pyarrow would read a shard's whole row group ahead.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except kinds as error:
        raise UserError(
            f"{where}: not a readable Parquet file ({brief(error)}); fetch or write it again"
        ) from None


def parquet_rows(
    file: Path | BinaryIO, where: str, choose: Callable[[list[str]], list[str]]
) -> list[tuple[str, dict]]:
    """(where, record) of every row of a Parquet file.

    Of the names of its columns `choose` says which to read; the others stay unread.
    """
    rows = []
    with open_parquet(file, where) as table:
        columns = choose(table.schema_arrow.names)
        for batch in table.iter_batches(columns=columns):
            for record in batch.to_pylist():
                rows.append((f"{where}, row {len(rows) + 1}", record))
    return rows


def count_rows(path: Path) -> int:
    """Rows of a table; of a Parquet file only the footer is read."""
    if suffix_of(path) != ".parquet":
        return len(text_rows(path))
    with open_parquet(path, str(path)) as table:
        return table.metadata.num_rows


# ---- the columns of prompts ----

def prompt_rows(file: Path | BinaryIO, where: str) -> list[tuple[str, str]]:
    """(style or "", prompt) of every row of a table, stripped; an empty prompt too.

    `file` is a table of any format, or an open Parquet file, which `where` then names.
    """
    if isinstance(file, Path) and suffix_of(file) != ".parquet":
        rows = text_rows(file)
    else:
        # Beside these columns lie the pictures: nearly all of a shard's bytes.
        def choose(have):
            return [column for column in prompt_columns(have, where) if column]
        rows = parquet_rows(file, where, choose)

    prompts = []
    for place, record in rows:
        prompt_column, style_column = prompt_columns(record, place)
        style = record.get(style_column)

        # Styles may be numbered.
        if isinstance(style, int):
            style = str(style)
        prompt = cell_text(record[prompt_column], place, prompt_column)
        prompts.append((cell_text(style, place, style_column), prompt))
    return prompts


def prompt_columns(have: Iterable[str], where: str) -> tuple[str, str | None]:
    """The columns of prompts and of styles (None: there is none), in any case of letters."""
    by_name = {column.lower(): column for column in have}
    prompt_column = by_name.get("prompt", by_name.get("caption"))
    style_column = by_name.get("style", by_name.get("category"))
    if prompt_column is None:
        need_columns(("prompt",), have, where)
    return prompt_column, style_column


def cell_text(cell, where: str, column: str) -> str:
    """A cell as stripped text, "" where it is empty; UserError if it holds anything but text."""
    # Pandas has a NaN where a text is missing.
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if not isinstance(cell, str):
        raise UserError(
            f"{where}: {column} is {shown(cell)} and no text; write one there or drop the row"
        )

    # JSON can hold half a character, which no file or text encoder takes.
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {column} {shown(cell)} has half a character; correct it or drop the row"
        ) from None
    return cell.strip()

"""Human pairs and prompts from outside: Pick-a-Pic shards, a hub dataset, or one's own files.

Pairs stream: of a Parquet file a batch of rows is in memory, and a shard is opened, or fetched from the hub, only
when those before it did not suffice. Every order follows from the run seed and from names, never from how a file
system or the hub happens to list them. Rows count from 1; a CSV's header and blank lines are left out.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from lib.run import UserError

OWN = ("prompt", "win", "lose")
PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")      # and has_label, where there is one
BATCH = 64                                                          # rows held at once: some 20 MB of Pick-a-Pic
OTHER_SPLIT = re.compile(r"(^|/)(test|val|validation)([-_./]|$)")   # shards that must not become training data
GONE = ("Pick-a-Pic's own ids, yuvalkirstain/pickapic_v1 and _v2, have been gone from the hub since April 2025. "
        "Give --pairs a local folder of its Parquet shards, or a copy that others keep (neither is checked): "
        "liuhuohuo2/pick-a-pic-v2, or pickapic-anonymous/pickapic_v1 for v1")


def shuffled(items: Iterable, *key) -> list:
    """Items (JSON values) in a random order that depends on the key and on the set of items alone."""
    return sorted(items, key=lambda item: hashlib.sha256(json.dumps([*key, item]).encode()).digest())


def load(image: bytes | Path, draft: bool = False) -> Image.Image:
    """An upright RGB picture on white; OSError unless complete. A draft reads a JPEG to its end, at 1/8 of its size."""
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as picture:
            if draft:
                picture.draft("RGB", (1, 1))
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):                     # Pillow would clip 16-bit grey, not scale it
                picture = picture.point(lambda value: value * (1 / 256)).convert("L")
            if picture.has_transparency_data:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
            return picture.convert("RGB")
    except Exception as error:                                      # Pillow's decoders raise nearly every kind
        raise OSError(f"{type(error).__name__}: {error}") from None


def decode(image: bytes | Path, resolution: int) -> Image.Image:
    """An RGB square of `resolution` pixels: short side resized bilinearly, cropped at the centre; OSError as `load`."""
    picture, box = load(image), []                                  # the box to keep; rounded as torchvision does
    for full in picture.size:
        side = int(resolution * full / min(picture.size))
        start = round((side - resolution) / 2)
        box.append((start * full / side, min((start + resolution) * full / side, full)))
    (left, right), (top, bottom) = box
    return picture.resize((resolution, resolution), Image.Resampling.BILINEAR, box=(left, top, right, bottom))


def need(columns: tuple[str, ...], have: Iterable[str], where: str) -> None:
    if missing := [column for column in columns if column not in have]:
        raise UserError(f"{where}: no column {missing[0]!r}; it has {', '.join(have)}; needed: {', '.join(columns)}")


def text_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, record) of CSV or TSV with a header, a JSON list or style: [prompts], JSON lines, or a text of prompts."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = [line.strip() for line in text.split("\n") if line.strip()]
        if path.suffix in (".csv", ".tsv"):
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        elif path.suffix in (".json", ".jsonl"):                    # as one list: an error then names the line
            rows = json.loads(text if path.suffix == ".json" else "[" + ",\n".join(rows) + "]")
            if isinstance(rows, dict) and rows and all(isinstance(prompts, list) for prompts in rows.values()):
                rows = [{"style": style, "prompt": prompt} for style, prompts in rows.items() for prompt in prompts]
            if not isinstance(rows, list):
                raise ValueError("it holds no list")
        rows = [(f"{path}, row {n}", {"prompt": row} if isinstance(row, str) else row) for n, row in enumerate(rows, 1)]
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(f"{path}: not readable as UTF-8 {path.suffix[1:] or 'text'} ({error}); correct it") from None
    for where, row in rows:
        if not isinstance(row, dict) or None in row:                # csv keeps surplus cells under None
            raise UserError(f"{where}: does not fit the columns; put double quotes round a CSV's prompt with commas")
    return rows


@contextlib.contextmanager
def parquet(file, where: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, opened so that reading takes a buffer per column and not a row group."""
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where}: not a readable Parquet file ({error}); fetch or write it again") from None


def parquet_rows(file: Path, name: str, seed: int) -> Iterator[list[tuple[str, dict]]]:
    """Batches of (where, record): row groups shuffled, then the rows within each batch; other columns stay unread."""
    with parquet(file, str(file)) as table:
        have = set(table.schema_arrow.names)
        columns = PICKAPIC if {"caption", "jpg_0"} & have and not set(OWN) <= have else OWN
        need(columns, table.schema_arrow.names, str(file))
        columns += ("has_label",) if "has_label" in have else ()
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        for group in shuffled(range(len(sizes)), seed, name):
            first = sum(sizes[:group]) + 1
            for batch in table.iter_batches(BATCH, row_groups=[group], columns=columns):
                rows = shuffled(range(first, first + batch.num_rows), seed, name)
                yield [(f"{file}, row {row}", batch.slice(row - first, 1).to_pylist()[0]) for row in rows]
                first += batch.num_rows


def prompt_rows(file, where: str) -> list[tuple[str, str]]:
    """(style or "", prompt) of each row of a table: columns prompt, or caption, and style, or category, in any case."""
    def columns(have: Iterable[str], where: str) -> list[str]:
        named = {column.lower(): column for column in have}
        need(() if {"prompt", "caption"} & set(named) else ("prompt",), have, where)
        return [next(named[n] for n in names if n in named)
                for names in (("prompt", "caption"), ("style", "category")) if set(names) & set(named)]
    if isinstance(file, Path) and file.suffix != ".parquet":
        rows = text_rows(file)
    else:
        with parquet(file, where) as table:
            batches = table.iter_batches(columns=columns(table.schema_arrow.names, where))
            rows = [(where, row) for batch in batches for row in batch.to_pylist()]
    cells = [[str(row[column] or "").strip() for column in columns(row, where)] for where, row in rows]
    return [(style[0] if style else "", prompt) for prompt, *style in cells]


@contextlib.contextmanager
def hub(source: str):
    """What can go wrong between here and the hub, told with a way round it."""
    from huggingface_hub.errors import RepositoryNotFoundError
    try:
        yield
    except UserError:
        raise
    except Exception as error:                                      # each network library raises its own kinds
        why = f"the hub did not give it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if type(error) is RepositoryNotFoundError:                  # its subclass means that terms are to be accepted
            why = "no local file or folder, and the hub has no such dataset (404)"
        raise UserError(f"{source}: {why}. {GONE}") from None


def shards(source: str, every: bool = False) -> tuple[list[str], Callable, Callable]:
    """Names of a source's Parquet files, unless `every` without test and validation splits, and two ways to open one.

    `fetch` gives the whole file (from the hub: downloaded into its cache), `peek` one to read a column of (from the
    hub: only that column's bytes). Both stay at the commit that was listed.
    """
    path = Path(source)
    if path.is_file():
        return [path.name], lambda name: path, lambda name: path
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*.parquet")]
        fetch = peek = lambda name: path / name
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix not in (".csv", ".jsonl", ".parquet"):
        from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
        with hub(source):
            info = HfApi().dataset_info(source)
        files = [file.rfilename for file in info.siblings if file.rfilename.endswith(".parquet")]
        fetch = hub(source)(lambda name: Path(hf_hub_download(source, name, repo_type="dataset", revision=info.sha)))
        peek = lambda name: HfFileSystem().open(f"datasets/{source}@{info.sha}/{name}", block_size=1 << 18)
    else:
        raise UserError(f"{source}: no such file or folder, nor a hub dataset id (owner/name); correct --pairs")
    names = [name for name in files if every or not OTHER_SPLIT.search(name)]
    if not names:
        raise UserError(f"{source}: no Parquet file in it{' but of test and validation splits' if files else ''}; "
                        f"give --pairs training shards or one file of your own")
    return names, fetch, peek


def own_image(value, folder: Path, where: str) -> bytes | Path:
    """Image bytes, or the file that a table names: relative to the table's folder, and within it."""
    if isinstance(value, dict):                                     # as the datasets library writes images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no image but {value!r}; give its path (or, in Parquet, its bytes) or drop the row")
    path, given = folder / value, Path(value)
    if given.is_absolute() or ".." in given.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where}: {value!r} leaves the table's folder; name images relative to {folder}, and in it")
    if not path.is_file():
        raise UserError(f"{where}: no file {value!r} in {folder}; correct the path or drop the row")
    return path


def own_pair(record: dict, folder: Path, where: str) -> dict:
    need(OWN, record, where)
    return {"prompt": str(record["prompt"] or "").strip(), "win": own_image(record["win"], folder, where),
            "lose": own_image(record["lose"], folder, where)}


def ranked(record: dict) -> dict | str:
    """A Pick-a-Pic row's prompt, winner and loser, or why it has none."""
    label = record["label_0"], record["label_1"]
    if record.get("has_label") is False or label not in {(1, 0), (0, 1), (.5, .5)}:
        return "no label"
    if label == (.5, .5):
        return "tie"
    images = [image.get("bytes") if isinstance(image, dict) else image for image in (record["jpg_0"], record["jpg_1"])]
    win, lose = images if label == (1, 0) else images[::-1]
    return {"prompt": (record["caption"] or "").strip(), "win": win, "lose": lose}


def source_rows(source: str, seed: int) -> Iterator[list[tuple[str, bool, dict | str]]]:
    """Batches of (where, own, pair or why there is none) in the seed's order; a text file's paths are checked first."""
    path = Path(source)
    if path.is_file() and path.suffix != ".parquet":
        rows = [(where, True, own_pair(record, path.parent, where)) for where, record in text_rows(path)]
        order = shuffled(range(len(rows)), seed)
        yield from ([rows[i] for i in order[start:start + BATCH]] for start in range(0, len(rows), BATCH))
        return
    names, fetch, _ = shards(source)
    for name in shuffled(names, seed):
        file = fetch(name)
        for batch in parquet_rows(file, name, seed):
            yield [(where, True, own_pair(record, file.parent, where)) if "win" in record else
                   (where, False, ranked(record)) for where, record in batch]


def read_pairs(source: str, seed: int, skipped: Counter | None = None, avoid: Iterable[str] = ()) -> Iterator[dict]:
    """Pairs `{"pair_id", "prompt", "win", "lose"}` of a Parquet folder, a hub dataset or one's own file, in seed order.

    `win` and `lose` are image bytes or paths, read to their end once (by threads), for `decode`; `pair_id` is a hash of
    prompt and images. `avoid`: the evaluation's prompts. `skipped` counts rows that gave no pair, by reason: tie, no
    label, empty prompt, prompt of the evaluation, same image twice, repeated pair, and unreadable image; the last is a
    UserError in one's own table, as are a missing column, a bad path, a silent hub, and a source without any pair.
    """
    skipped, seen, evaluation = Counter() if skipped is None else skipped, set(), {fold(prompt) for prompt in avoid}

    def judge(where: str, own: bool, pair: dict | str) -> tuple[str, str]:
        """Why a row gives no pair, or nothing; the pair's id."""
        if isinstance(pair, str) or not pair["prompt"] or fold(pair["prompt"]) in evaluation:
            return pair if isinstance(pair, str) else "prompt of the evaluation" if pair["prompt"] else "empty prompt", ""
        try:
            win, lose = digest(pair["win"]), digest(pair["lose"])
        except OSError as error:
            if own:
                raise UserError(f"{where}: cannot read an image ({error}); replace it or drop the row") from None
            return "unreadable image", ""
        pair_id = hashlib.sha256(json.dumps([pair["prompt"], win, lose]).encode()).hexdigest()[:16]
        return "same image twice" if win == lose else "", pair_id

    with ThreadPoolExecutor() as pool:
        for batch in source_rows(source, seed):
            for (_, _, pair), (reason, pair_id) in zip(batch, pool.map(judge, *zip(*batch))):
                if reason := reason or ("repeated pair" if pair_id in seen else ""):
                    skipped[reason] += 1
                    continue
                seen.add(pair_id)
                yield {"pair_id": pair_id, **pair}
    if not seen:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items()) or "it has no rows"
        raise UserError(f"{source}: no usable pair ({reasons}); give --pairs another source")


def digest(image: bytes | Path) -> str:
    """A hash of an image's bytes; OSError unless it is complete."""
    load(image, draft=True)
    return hashlib.sha256(image.read_bytes() if isinstance(image, Path) else image).hexdigest()


def fold(prompt: str) -> str:
    """What two prompts are compared by: NFC, case folded, each run of white space one blank."""
    return " ".join(unicodedata.normalize("NFC", prompt.casefold()).split())


def distinct(prompts: Iterable[str], taken: Iterable[str]) -> Iterator[str]:
    """First occurrences, compared by `fold`; empty ones are dropped."""
    seen = {fold(prompt) for prompt in taken} | {""}
    for prompt in prompts:
        if (new := fold(prompt)) not in seen:
            seen.add(new)
            yield prompt.strip()


def read_prompts(path: str | Path) -> list[str]:
    """Distinct prompts in order: a UTF-8 text of one a line, or `prompt` or `caption` of CSV, JSON(L) or Parquet."""
    prompts = dict.fromkeys(prompt for _, prompt in prompt_rows(Path(path), str(path)) if prompt)
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give a text file with one prompt a line")
    return list(prompts)


def pair_prompts(source: str, seed: int, taken: Iterable[str], count: int) -> list[str]:
    """Up to `count` distinct prompts of a pair source, none of those taken; reads no image, and no shard in vain."""
    names, _, peek = shards(source)
    read = hub(source)(lambda name: prompt_rows(peek(name), f"{source}, {name}"))
    prompts = (prompt for name in shuffled(names, seed) for _, prompt in read(name))
    return list(itertools.islice(distinct(prompts, taken), count))

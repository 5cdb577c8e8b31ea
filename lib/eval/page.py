"""The page of an evaluation: the tables, every prompt's pictures, the curves, how the run went.

It is one HTML file without network or framework. Its looks and its script are page.html, beside
this file; here they are filled with what comes from the run. All of that is untrusted text: HTML is
escaped here, the gallery travels as JSON that cannot end its script tag, the script writes it
through textContent, and a content security policy lets no other script run and no address but the
page's own be loaded. Nothing is computed or drawn here.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pandas as pd

from lib.eval.table import KEYS, Cell
from lib.run import inside, write_text

TEMPLATE = Path(__file__).with_suffix(".html")
MANY_NOTES = 6                              # more notes than this start folded
LONG_TEXT = 40                              # characters; a longer cell of the story's tables wraps

# How messages name what a path stands in.
SCORES = Path("eval/scores.parquet")
SHEETS = Path("the page's sheets")
STORY = Path("the page's story")

# A cell that begins so is a number, perhaps with a sign, in brackets, or of several parts.
NUMBER = re.compile(r"\s*\(?[+\-−]?\.?\d")

# A number with its interval and perhaps more, which a cell shows below the number.
WITH_INTERVAL = re.compile(r"(\S+) (\[.*)")
GAIN_CLASS = {1: "up", 0: "", -1: "down"}


def write_page(run: Path, tables: list[tuple[str, pd.DataFrame]], scores: pd.DataFrame,
               title: str, notes: list[str], sheets: list[tuple[str, str]],
               story: Sequence[tuple] = (), sentences: Sequence[str] = (),
               meanings: Mapping[str, str] = {}, training: str = "",
               target: Path | None = None) -> Path:
    """Write `run`/eval/index.html, or the file `target` inside `run`, and return its path.

    tables  (title, results), shown as they come: one line per row, strings and numbers unchanged;
            a table.Cell is coloured by its sign
    scores  one row per image: KEYS, then one column per score (higher is better; NaN is no score).
            Models stand in order of first occurrence, and gains are over the first
    notes   lines of plain text: settings, versions
    sheets  (caption, image): curves, samples, previews
    story   how the run went, a list of blocks; without any the page has no such section:
                ("heading", text)
                ("text", text)                              a paragraph
                ("equation", lines)                         as they stand, in fixed width
                ("picture", image, caption)                 a figure, on a white card
                ("pictures", [(image, caption), ...])       small pictures, side by side
                ("table", table)                            a DataFrame, shown as results are
    sentences   what was found, above the tables
    meanings    what the names in the tables mean: on hover, and in a list below the tables
    training    the settings of the run's training, below the title

    An image is a path relative to `run`; one that leaves the run folder is a UserError.
    """
    target = Path(target or Path(run) / "eval" / "index.html")

    # What stands at each marker <!--name--> of the template.
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "policy": _policy(template),
        "title": _text(title),
        "training": _text(training),
        "sentences": _sentences(sentences),
        "tables": _tables(tables, meanings),
        "meanings": _glossary(tables, meanings),
        "sheets": _sheets(Place(run, target), sheets),
        "story": _story(Place(run, target), story),
        "untold": "" if story else "hidden",
        "notes": _notes(notes),
        "folded": "" if len(notes) > MANY_NOTES else "open",
        "data": _json(gallery(Place(run, target), scores)),
    }

    # No part can hold the marker of another: "<" is escaped in all that comes from the run.
    page = template
    for name, part in parts.items():
        page = page.replace(f"<!--{name}-->", part)

    write_text(page, target)
    return target


class Place(NamedTuple):
    """Where a page's pictures lie, in the folder `run`, and where the page itself lies."""
    run: Path
    page: Path


def _policy(template: str) -> str:
    """The hash by which the content security policy knows the page's own script."""
    script = re.search("<script>(.*?)</script>", template, re.DOTALL).group(1)
    digest = hashlib.sha256(script.encode()).digest()
    return "sha256-" + base64.b64encode(digest).decode()


# ---- the gallery: what the page's script shows ----

def gallery(place: Place, scores: pd.DataFrame) -> dict:
    """What the page's script needs: names, and rows [benchmark, style, prompt_id, prompt, cells].

    Benchmark and style are indices into the lists of names; cells holds for each model [address,
    seed, score ...] or None. A prompt with several pictures per model has several rows: pictures of
    the same seed share a row, and a picture whose seed no other has (or without a seed) takes the
    first free place of its prompt.
    """
    models = _names(scores["model"])
    benchmarks = _names(scores["benchmark"])
    styles = _names(scores["style"])

    names = scores.columns.drop(KEYS)
    values = scores[names].to_numpy(dtype=float, na_value=math.nan).tolist()
    pictures = scores[KEYS].itertuples(index=False)

    rows = []
    rows_of_prompt = {}
    for number, (picture, numbers) in enumerate(zip(pictures, values), start=1):
        benchmark = benchmarks.index(_name(picture.benchmark))
        style = styles.index(_name(picture.style))
        model = models.index(_name(picture.model))
        prompt_id, prompt = _name(picture.prompt_id), _name(picture.prompt)
        seed = _name(picture.seed)

        # A new row, if no row of this prompt has a place for the picture.
        rows_here = rows_of_prompt.setdefault((benchmark, prompt_id, prompt), [])
        row = _row_with_place(rows_here, model, seed)
        if row is None:
            row = [benchmark, style, prompt_id, prompt, [None] * len(models)]
            rows.append(row)
            rows_here.append(row)

        address = _address(place, picture.image, SCORES, number)
        row[-1][model] = [address, seed] + [_rounded(value) for value in numbers]

    return {"models": models, "scores": list(map(str, names)), "benchmarks": benchmarks,
            "styles": styles, "rows": rows}


def _row_with_place(rows: list[list], model: int, seed: str) -> list | None:
    """The row of a prompt that takes a model's picture: one with its seed, else the first free."""
    free = [row for row in rows if row[-1][model] is None]
    for row in free:
        for cell in row[-1]:
            if cell is not None and cell[1] == seed:
                return row

    if free:
        return free[0]
    return None


def _names(column: pd.Series) -> list[str]:
    """The different values of a column, in order of first occurrence."""
    return [_name(value) for value in column.unique()]


def _name(value) -> str:
    """Any key as a string; a missing one is empty, and a whole number carries no point."""
    if pd.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _rounded(value: float) -> float | None:
    """A score to six figures; None where there is none, since JSON has no NaN."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


# ---- tables ----

def _tables(tables: list[tuple[str, pd.DataFrame]], meanings: Mapping[str, str]) -> str:
    """The results, each table below its title."""
    blocks = []
    for title, table in tables:
        blocks.append(f'<p class="soft">{_text(title)}</p>{_table(table, meanings)}')
    return "\n".join(blocks)


def _sentences(sentences: Sequence[str]) -> str:
    """Paragraphs of one sentence."""
    return "\n".join(f"<p>{_text(sentence)}.</p>" for sentence in sentences)


def _glossary(tables: list[tuple[str, pd.DataFrame]], meanings: Mapping[str, str]) -> str:
    """The meanings of those names that the tables have, as a list of terms."""
    used = {"[a, b]"}
    for _, table in tables:
        for name in table.columns:
            used.update(str(name).split(": "))
        if "model" in table:
            used.update(map(str, table["model"]))
    terms = [name for name in meanings if name in used]
    return "\n".join(f"<dt>{_text(name)}</dt><dd>{_text(meanings[name])}</dd>" for name in terms)


def _hint(name: str, meanings: Mapping[str, str]) -> str:
    """The attribute that explains a name on hover; "score: gain" is explained part by part."""
    parts = [meanings[part] for part in name.split(": ") if part in meanings]
    return f' title="{_text("; ".join(parts))}"' if parts else ""


def _table(table: pd.DataFrame, meanings: Mapping[str, str] = {}) -> str:
    """A table in a box of its own that scrolls sideways."""
    # A column is of one kind, and so are its cells.
    kinds = []
    head = ""
    for name in table.columns:
        kind = "number" if _holds_numbers(table[name]) else ""
        kinds.append(kind)
        head += f"<th{_classes(kind)}{_hint(str(name), meanings)}>{_text(name)}</th>"

    lines = []
    for row in table.itertuples(index=False, name=None):
        cells = [_cell(value, kind, meanings) for value, kind in zip(row, kinds)]
        lines.append("<tr>" + "".join(cells) + "</tr>")

    body = "\n".join(lines)
    return (f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>")


def _holds_numbers(column: pd.Series) -> bool:
    """Whether a column is of numbers, which stand right: whether most of its cells begin as such.

    Texts may begin so too: "1girl" is the most frequent word of some people's prompts.
    """
    filled = 0
    numbers = 0
    for text in map(_shown, column):
        if text:
            filled += 1
        if NUMBER.match(text):
            numbers += 1
    return numbers > 0 and numbers >= filled / 2


def _cell(value, kind: str, meanings: Mapping[str, str]) -> str:
    """A cell of a table; clear gains and losses have a colour, and intervals their own line."""
    text = _shown(value)
    classes = [kind]
    if isinstance(value, Cell):
        classes.append(GAIN_CLASS[value.sign])
    if not kind and len(text) > LONG_TEXT:
        classes.append("long")

    content = _text(text)
    parts = WITH_INTERVAL.fullmatch(text) if kind else None
    if parts:
        content = f"{_text(parts[1])} <small>{_text(parts[2])}</small>"
    return f"<td{_classes(*classes)}{_hint(text, meanings)}>{content}</td>"


def _classes(*names: str) -> str:
    """The class attribute for these names, of which some may be empty."""
    given = " ".join(name for name in names if name)
    return f' class="{given}"' if given else ""


def _shown(value) -> str:
    """A value as a table shows it: missing ones as nothing, numbers to six figures."""
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


# ---- notes, figures, and how the run went ----

def _notes(notes: list[str]) -> str:
    """The notes as items of a list."""
    items = [f"<li>{_text(note)}</li>" for note in notes]
    return "\n".join(items)


def _sheets(place: Place, sheets: list[tuple[str, str]]) -> str:
    """The curves and the sheets of pictures, each with its caption."""
    figures = []
    for row, (caption, image) in enumerate(sheets, start=1):
        figures.append(_figure(_address(place, image, SHEETS, row), caption))
    return "\n".join(figures)


def _story(place: Place, story: Sequence[tuple]) -> str:
    """How the run went: the blocks one below the other."""
    blocks = []
    for row, (kind, *content) in enumerate(story, start=1):
        blocks.append(_block(place, row, kind, *content))
    return "\n".join(blocks)


def _block(place: Place, row: int, kind: str, content, caption: str = "") -> str:
    """A block of the story, the `row`-th; `write_page` says which kinds there are."""
    if kind == "heading":
        return f"<h3>{_text(content)}</h3>"
    if kind == "text":
        return f"<p>{_text(content)}</p>"
    if kind == "equation":
        return f"<pre>{_text(content)}</pre>"
    if kind == "table":
        return _table(content)
    if kind == "picture":
        return _figure(_address(place, content, STORY, row), caption)

    if kind == "pictures":
        figures = []
        for image, caption in content:
            figures.append(_figure(_address(place, image, STORY, row), caption, lazy=True))
        return '<div class="strip">' + "\n".join(figures) + "</div>"

    raise ValueError(f"block {row} of the story has the unknown kind {kind!r}")


def _figure(address: str, caption: str, lazy: bool = False) -> str:
    """A picture that opens at full size, and its caption.

    A lazy picture is loaded when it comes near: only where its box has a size without it, or else
    the page would jump.
    """
    address, caption = _text(address), _text(caption)
    loading = ' loading="lazy"' if lazy else ""
    figure = (f'<a href="{address}" target="_blank" rel="noopener">'
              f'<img src="{address}"{loading} alt="{caption}"></a>')
    if caption:
        figure += f"<figcaption>{caption}</figcaption>"
    return f"<figure>{figure}</figure>"


# ---- text that is safe in the page ----

def _address(place: Place, image: str, table: Path, row: int) -> str:
    """The URL, relative to the page, of an image path relative to the run folder.

    The image stands in row `row` (from 1) of `table`, which the message of an error names.
    """
    folder = place.page.parent.resolve()
    relative = os.path.relpath(inside(place.run, image, table, row), folder)
    return quote(Path(relative).as_posix())


def _text(value) -> str:
    """HTML text of any value, also of strings that UTF-8 cannot hold."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _json(value) -> str:
    """JSON that is safe within a script tag: ASCII, without <, > and &."""
    # Within a string JSON may write a character by its number, and outside it has none of these.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

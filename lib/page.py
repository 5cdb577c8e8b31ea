"""The page of an evaluation: the table, the curves, and every prompt with the models' pictures side by side.

One HTML file without network or framework. Its looks and its script are lib/page.html; this module fills in what
comes from the run. Everything that comes from the run is untrusted text: HTML is escaped here, the gallery travels
as JSON that cannot end its script tag, the script writes it through textContent, and a content security policy
lets no other script run and no address but the page's own be loaded.
"""

import base64
import hashlib
import html
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from lib.run import inside, write_text

KEYS = ("model", "benchmark", "style", "prompt_id", "prompt", "seed", "image")
SCORES = Path("eval/scores.parquet")                          # named in messages
OPEN_NOTES = 6                                                # a longer list of notes starts folded


def write_page(run: Path, tables: list[tuple[str, pd.DataFrame]], scores: pd.DataFrame, title: str, notes: list[str],
               sheets: list[tuple[str, str]]) -> Path:
    """Write `run`/eval/index.html and return its path.

    tables  (title, results), shown as they come: one line per row, strings and numbers unchanged
    scores  one row per image: KEYS, then one column per score (higher is better; NaN is "no score"). Models
            stand in order of first occurrence, and gains are over the first. `image` is relative to `run`
    notes   lines of plain text: settings, versions
    sheets  (caption, image path relative to `run`): curves, samples, previews
    A path that leaves the run folder is a UserError.
    """
    target = Path(run) / "eval" / "index.html"
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL).group(1)
    parts = {
        "policy": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": _text(title),
        "tables": "\n".join(f'<p class="soft">{_text(title)}</p><div class="scroll" tabindex="0"><table>{_table(table)}'
                            f'</table></div>' for title, table in tables),
        "sheets": "\n".join(_sheet(run, i, *sheet) for i, sheet in enumerate(sheets)),
        "folded": "" if len(notes) > OPEN_NOTES else "open",
        "notes": "\n".join(f"<li>{_text(note)}</li>" for note in notes),
        "data": _json(gallery(run, scores)),
    }
    for name, part in parts.items():                          # no part can hold a marker: "<" is escaped in all
        template = template.replace(f"<!--{name}-->", part)
    write_text(template, target)
    return target


def gallery(run: Path, scores: pd.DataFrame) -> dict:
    """What the page's script needs: names, and rows [benchmark, style, prompt_id, prompt, cells].

    Benchmark and style are indices into the lists of names; cells holds for each model [address, seed, score ...]
    or None. A prompt with several pictures per model has several rows: pictures of one seed share a row, and a
    picture whose seed the others lack (none of its own, say) takes the first free place of its prompt.
    """
    names = [c for c in scores.columns if c not in KEYS]
    models, benchmarks, styles = ([_plain(v) for v in scores[k].unique()] for k in ("model", "benchmark", "style"))
    index = [{v: i for i, v in enumerate(list_)} for list_ in (models, benchmarks, styles)]
    values = scores[names].to_numpy(dtype=float, na_value=math.nan).tolist()
    rows, places = [], {}
    for number, (key, value) in enumerate(zip(zip(*(scores[k] for k in KEYS)), values)):
        model, benchmark, style, prompt_id, prompt, seed, image = (_plain(v) for v in key)
        m, b, s = (i[v] for i, v in zip(index, (model, benchmark, style)))
        free = [r for r in places.setdefault((b, prompt_id, prompt), []) if r[4][m] is None]
        row = next((r for r in free if any(c and c[1] == seed for c in r[4])), free[0] if free else None)
        if row is None:
            row = [b, s, prompt_id, prompt, [None] * len(models)]
            rows.append(row)
            places[b, prompt_id, prompt].append(row)
        row[4][m] = [_address(run, image, SCORES, number), seed] + [
            float(f"{v:.6g}") if math.isfinite(v) else None for v in value]
    return {"models": models, "scores": [str(n) for n in names], "benchmarks": benchmarks, "styles": styles,
            "rows": rows}


def _address(run: Path, image: str, table: Path, row: int) -> str:
    """The URL, relative to the page, of an image path relative to the run folder."""
    here = (Path(run) / "eval").resolve()
    return quote(Path(os.path.relpath(inside(run, image, table, row), here)).as_posix())


def _plain(value) -> str:
    """Any key as a string; missing ones are empty, and whole numbers carry no point."""
    if pd.isna(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _text(value) -> str:
    """HTML text of any value, also of strings that UTF-8 cannot hold."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _json(value) -> str:
    """JSON that is safe within a script tag: ASCII, without <, > and &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(table: pd.DataFrame) -> str:
    def column(name) -> list[str]:
        """The header and the cells of a column; numbers stand right, and gains are coloured by their sign, unless their
        interval holds zero."""
        cells = ["" if pd.isna(v) else f"{v:.6g}" if isinstance(v, float) else str(v) for v in table[name]]
        side = "number" if any(re.match(r"[+\-−]?\.?\d", c) for c in cells) else ""
        gains = side and re.search("gain|over Iter0", str(name), re.IGNORECASE)
        sign = lambda cell: {"+": " up", "-": " down", "−": " down"}.get(cell[:1], "") if gains and len(cell) > 1 and \
            not re.search(r"\[[-−].*, \+|[\[ ][-+−]0\.0+[,\]]", cell) else ""
        return [f'<th class="{side}">{_text(name)}</th>'] + [f'<td class="{side}{sign(c)}">{_text(c)}</td>' for c in cells]

    head, *body = ["<tr>" + "".join(cells) + "</tr>" for cells in zip(*map(column, table.columns))] or [""]
    return f"<thead>{head}</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"


def _sheet(run: Path, number: int, caption: str, image: str) -> str:
    address = _text(_address(run, image, Path("the page's sheets"), number))
    return (f'<figure><a href="{address}" target="_blank" rel="noopener"><img src="{address}" loading="lazy" '
            f'alt="{_text(caption)}"></a><figcaption>{_text(caption)}</figcaption></figure>')

"""Sheets of pictures to look at, and pictures of a run as tensors.

Stage 01 shows the human pairs on a sheet, stage 03 the pairs of a round, and stage 05 the same
prompts drawn by every model. A sheet is a PNG with column titles; its rows have lines of text above
the pictures that they tell of.
"""

import bisect
import math
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from lib.run import atomic, open_made

FONT_SIZE = 12
GAP = 4                                          # pixels between pictures
LINE = 18                                        # pixels that a line of text takes
SIDE = 96                                        # of a picture on the sheet, unless said otherwise
LARGE_SIDE = 192                                 # where the pictures have more to show
MOST_SMALL = 128                                 # pictures up to this width have not
MOST_CHARACTERS = 200                            # of a text: no sheet has room for more


# ---- pictures as tensors ----

def read_pictures(run: Path, images):
    """Read image files named relative to the run folder: (B, 3, H, W), float32 in 0..1."""
    return as_tensor([open_made(Path(run) / image) for image in images])


def as_tensor(pictures: list[Image.Image]):
    """RGB pictures of one size as (B, 3, H, W), float32 in 0..1."""
    import torch

    pixels = np.stack([np.asarray(picture) for picture in pictures])       # (B, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


# ---- sheets ----

def sheet(
    rows: list[list[Image.Image]],
    columns: list[str],
    labels: list[list[list[str]]],
    path: Path,
    side: int = SIDE,
) -> None:
    """Write a grid of pictures to `path`, each drawn `side` pixels wide and high.

    `columns` are the titles over the columns. `labels` has for each row its lines of text, as many
    in all rows; a line's texts share the row's width equally. A text that does not fit is cut.
    """
    font = ImageFont.load_default(FONT_SIZE)
    step = side + GAP
    top_of_pictures = LINE * len(labels[0])
    width = max(map(len, rows)) * step + GAP
    height = LINE + len(rows) * (top_of_pictures + step)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    _write_line(draw, columns, 2, step, "black", font)

    # Below the titles each row has its lines of text, then its pictures.
    for i, row in enumerate(rows):
        top = LINE + i * (top_of_pictures + step)
        for n, texts in enumerate(labels[i]):
            share = len(row) // len(texts) * step
            _write_line(draw, texts, top + n * LINE, share, "dimgray", font)

        for j, picture in enumerate(row):
            place = (GAP + j * step, top + top_of_pictures - 2)
            canvas.paste(_resized(picture, side), place)

    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _write_line(draw: ImageDraw.ImageDraw, texts: list[str], top: int, step: int, colour: str,
                font) -> None:
    """Write texts beside each other, one every `step` pixels."""
    for i, text in enumerate(texts):
        fitting = _fitting(text, step - 2 * GAP, draw, font)
        draw.text((GAP + i * step, top), fitting, colour, font)


def _fitting(text: str, room: int, draw: ImageDraw.ImageDraw, font) -> str:
    """One line of text, cut where there is no more room (in pixels)."""
    text = " ".join(str(text)[:MOST_CHARACTERS].split())
    if draw.textlength(text, font) <= room:
        return text

    # The longest beginning that fits: the first one beyond is found by halving.
    def is_too_long(length: int) -> bool:
        return draw.textlength(text[:length] + "...", font) > room

    beyond = bisect.bisect_left(range(len(text)), True, lo=1, key=is_too_long)
    return text[:beyond - 1] + "..."


def _resized(picture: Image.Image, side: int) -> Image.Image:
    """The picture as a square of `side` pixels."""
    # Small pictures keep their pixels; large ones are reduced smoothly.
    resampling = Image.Resampling.LANCZOS
    if picture.width < side:
        resampling = Image.Resampling.NEAREST
    return picture.resize((side, side), resampling)


def pair_sheet(
    run: Path,
    pairs: pd.DataFrame,
    path: Path,
    titles: tuple[str, str],
    notes: list[str] = (),
    across: int = 4,
) -> None:
    """Write a sheet of pairs (columns prompt, win, lose), `across` pairs a row.

    The winner stands beside the loser; `titles` stand over them. Above each pair are its prompt
    and, where there are `notes`, what the note on it says.
    """
    rows = []
    labels = []
    for start in range(0, len(pairs), across):
        part = pairs[start:start + across]
        row = []
        for pair in part.itertuples():
            row += [open_made(Path(run) / pair.win), open_made(Path(run) / pair.lose)]
        rows.append(row)

        lines = [[prompt.replace(" background", "") for prompt in part.prompt]]
        if len(notes):
            lines.append(notes[start:start + across])
        labels.append(lines)

    columns = list(titles) * min(across, len(pairs))
    sheet(rows, columns, labels, path, _side_of(rows))


def _side_of(rows: list[list[Image.Image]]) -> int:
    """The side of the pictures on a sheet: large ones are shown larger, as there is more to see."""
    widest = max(picture.width for row in rows for picture in row)
    return SIDE if widest <= MOST_SMALL else LARGE_SIDE


def sample_sheet(run: Path, scores: pd.DataFrame, path: Path, count: int = 8) -> None:
    """Write a sheet of `count` prompts (rows) as each model has drawn them (columns).

    `scores` is scores.parquet. The prompts are the first of each style that all models have drawn;
    where there is none, the first model stands alone.
    """
    # One picture of each prompt, and only of prompts that all models have drawn.
    models = list(scores["model"].unique())
    first = scores.drop_duplicates(["prompt_id", "model"])
    by_all = first.groupby("prompt_id")["model"].transform("size") == len(models)
    if by_all.any():
        first = first[by_all]
    else:
        models = models[:1]
        first = first[first["model"] == models[0]]

    at = first.set_index(["prompt_id", "model"])
    rows = []
    labels = []
    for prompt_id in _first_of_each_style(first, count):
        row = []
        for model in models:
            row.append(open_made(Path(run) / at.loc[(prompt_id, model), "image"]))
        rows.append(row)
        labels.append([[at.loc[(prompt_id, models[0]), "prompt"]]])
    sheet(rows, models, labels, path, _side_of(rows))


def _first_of_each_style(table: pd.DataFrame, count: int) -> list:
    """The prompt_ids of the first prompts of each style, as equally many as `count` allows."""
    styles = table["style"].nunique(dropna=False)
    by_style = table.drop_duplicates("prompt_id").groupby("style", sort=False, dropna=False)

    chosen = by_style.head(math.ceil(count / styles))
    return chosen.prompt_id[:count].tolist()

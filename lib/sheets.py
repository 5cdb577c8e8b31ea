"""Sheets of pictures to look at, and pictures of a run as tensors.

Stage 01 shows the human pairs on a sheet, stage 03 the pairs of a round, and stage 05 the same
prompts drawn by every model. A sheet is a PNG with column titles and a line of text above each row.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from lib.run import atomic, open_image

FONT_SIZE = 12
GAP = 4                                          # pixels between pictures
LINE = 18                                        # pixels that a line of text takes
SIDE = 96                                        # of a picture on the sheet, unless said otherwise
LARGE_SIDE = 192                                 # where the pictures have more to show
MOST_SMALL = 128                                 # pictures up to this width have not


# ---- pictures as tensors ----

def read_pictures(run: Path, images):
    """Read image files named relative to the run folder: (B, 3, H, W), float32 in 0..1."""
    run = Path(run)
    pictures = []
    for row, image in enumerate(images, start=1):
        pictures.append(open_image(run / image, run, row))
    return as_tensor(pictures)


def as_tensor(pictures: list[Image.Image]):
    """RGB pictures of one size as (B, 3, H, W), float32 in 0..1."""
    import torch

    pixels = np.stack([np.asarray(picture) for picture in pictures])       # (B, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


# ---- sheets ----

def sheet(rows: list[list[Image.Image]], columns: list[str], labels: list[str], path: Path,
          side: int = SIDE) -> None:
    """Write a grid of pictures to `path`, each drawn `side` pixels wide and high.

    `columns` are the titles over the columns, `labels` the lines of text above the rows. Text that
    does not fit is cut.
    """
    font = ImageFont.load_default(FONT_SIZE)
    width = max(map(len, rows)) * (side + GAP) + GAP
    height = LINE + len(rows) * (side + LINE + GAP)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)

    for j, title in enumerate(columns):
        left = GAP + j * (side + GAP)
        draw.text((left, 2), _fitting(title, side, draw, font), "black", font)

    # Below the titles each row has its line of text, then its pictures.
    for i, row in enumerate(rows):
        top = LINE + i * (side + LINE + GAP)
        label = _fitting(labels[i], width - 2 * GAP, draw, font)
        draw.text((GAP, top), label, "dimgray", font)

        for j, picture in enumerate(row):
            place = (GAP + j * (side + GAP), top + LINE - 2)
            canvas.paste(_resized(picture, side), place)

    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def _fitting(text: str, room: int, draw: ImageDraw.ImageDraw, font) -> str:
    """One line of text, cut where there is no more room (in pixels)."""
    text = " ".join(str(text).split())
    while draw.textlength(text, font) > room and len(text) > 4:
        text = text[:-4] + "..."
    return text


def _resized(picture: Image.Image, side: int) -> Image.Image:
    """The picture as a square of `side` pixels."""
    # Small pictures keep their pixels; large ones are reduced smoothly.
    resampling = Image.Resampling.LANCZOS
    if picture.width < side:
        resampling = Image.Resampling.NEAREST
    return picture.resize((side, side), resampling)


def pair_sheet(run: Path, pairs: pd.DataFrame, path: Path, titles: tuple[str, str],
               across: int = 4) -> None:
    """Write a sheet of pairs (columns prompt, win, lose), `across` pairs a row.

    The winner stands beside the loser; `titles` stand over them.
    """
    rows = []
    labels = []
    for start in range(0, len(pairs), across):
        row = []
        prompts = []
        part = pairs[start:start + across]
        for number, pair in enumerate(part.itertuples(), start + 1):
            row.append(open_image(Path(run) / pair.win, path, number))
            row.append(open_image(Path(run) / pair.lose, path, number))
            prompts.append(pair.prompt.replace(" background", ""))
        rows.append(row)
        labels.append("  |  ".join(prompts))

    columns = list(titles) * min(across, len(pairs))
    sheet(rows, columns, labels, path)


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
    for number, prompt_id in enumerate(_first_of_each_style(first, count), start=1):
        row = []
        for model in models:
            row.append(open_image(Path(run) / at.loc[(prompt_id, model), "image"], path, number))
        rows.append(row)
        labels.append(at.loc[(prompt_id, models[0]), "prompt"])

    # Large pictures are shown larger: there is more to see.
    widest = max(picture.width for row in rows for picture in row)
    side = SIDE if widest <= MOST_SMALL else LARGE_SIDE
    sheet(rows, models, labels, path, side)


def _first_of_each_style(table: pd.DataFrame, count: int) -> list:
    """The prompt_ids of the first prompts of each style, as equally many as `count` allows."""
    styles = table["style"].nunique(dropna=False)
    by_style = table.drop_duplicates("prompt_id").groupby("style", sort=False, dropna=False)

    chosen = by_style.head(math.ceil(count / styles))
    return chosen.prompt_id[:count].tolist()

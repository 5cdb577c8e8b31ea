"""Sheets of pictures: each text above what it tells of, cut where it ends, and fast."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont

from lib import sheets

FONT = ImageFont.load_default(sheets.FONT_SIZE)
DRAW = ImageDraw.Draw(Image.new("RGB", (1, 1)))


def pairs_of(folder: Path, prompts: list[str], side: int = 32) -> pd.DataFrame:
    """Pairs of grey pictures."""
    Image.new("RGB", (side, side), (100, 100, 100)).save(folder / "x.png")
    return pd.DataFrame({"prompt": prompts, "win": "x.png", "lose": "x.png"})


def ink(path: Path, left: int, top: int, width: int) -> bool:
    """Whether a line of text stands in this place of a sheet."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return bool((pixels[top:top + sheets.LINE - 4, left:left + width] < 200).any())


@pytest.mark.parametrize("with_notes", [False, True])
def test_each_caption_and_note_stands_above_its_own_pair(tmp_path, with_notes):
    """Six pairs, of which the second of the first row and the last of the second have texts."""
    texts = ["", "a star", "", "", "", "a ring"]
    notes = []
    if with_notes:
        notes = ["", "", "margin 1.5", "", "", ""]
    path = tmp_path / "sheet.png"
    sheets.pair_sheet(tmp_path, pairs_of(tmp_path, texts), path, ("winner", "loser"), notes)

    lines = 2 if with_notes else 1
    step = sheets.SIDE + sheets.GAP
    row = sheets.LINE * lines + step
    assert Image.open(path).size == (8 * step + sheets.GAP, sheets.LINE + 2 * row)
    for i in range(6):
        left, top = i % 4 * 2 * step, sheets.LINE + i // 4 * row
        assert ink(path, left, top, 2 * step) == (i in (1, 5)), i
        if with_notes:
            assert ink(path, left, top + sheets.LINE, 2 * step) == (i == 2), i


def test_large_pictures_are_shown_larger(tmp_path):
    path = tmp_path / "sheet.png"
    sheets.pair_sheet(tmp_path, pairs_of(tmp_path, ["a"], side=200), path, ("winner", "loser"))
    assert Image.open(path).width == 2 * (sheets.LARGE_SIDE + sheets.GAP) + sheets.GAP


@pytest.mark.parametrize("text", [
    "", "a star", "one two  three\nfour " * 9, "W" * 300, "猫" * 300,
    "\0\u202e<b>\x7f\U0001f408" * 9,
])
@pytest.mark.parametrize("room", [1, 40, 188])
def test_a_text_is_cut_where_no_more_of_it_fits(text, room):
    fitting = sheets._fitting(text, room, DRAW, FONT)
    whole = " ".join(text.split())
    if DRAW.textlength(whole, FONT) <= room:
        assert fitting == whole
        return

    # One character more would not fit; of no text there is always room for the dots.
    kept = fitting.removesuffix("...")
    assert whole.startswith(kept)
    assert DRAW.textlength(fitting, FONT) <= room or not kept
    assert DRAW.textlength(whole[:len(kept) + 1] + "...", FONT) > room


@pytest.mark.parametrize("length", [400, 10_000, 1_000_000])
def test_long_prompts_cost_no_time(tmp_path, length):
    pairs = pairs_of(tmp_path, ["word " * (length // 5)] * 24)
    before = time.process_time()
    sheets.pair_sheet(tmp_path, pairs, tmp_path / "sheet.png", ("winner", "loser"))
    assert time.process_time() - before < 2

"""The captions of the embedded world: what they say, and which of them are set aside.

A caption names four attributes of a picture: colour, shape, style and background. There are 1,728
captions; 240 are kept for the evaluation and 160 for tuning, the same ones for every run seed.
What a caption looks like is drawn in scenes.py. Importing this file loads neither torch nor
diffusers.
"""

import itertools

from lib.run import generator

SIZE = 32                                       # pixels per side of a picture
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white")
SHAPES = ("circle", "triangle", "star", "heart", "ring", "cross")
STYLES = ("plain", "striped", "dotted", "checked")
ATTRIBUTES = ("colour", "shape", "style", "background")     # what a caption names, in this order

EVAL_PER_STYLE = 60                             # captions of each style kept for the evaluation
DEV_PER_STYLE = 40                              # and for tuning


# ---- captions and what they mean ----

def caption(colour: str, shape: str, style: str, background: str) -> str:
    """The caption that names these four attributes."""
    return f"a {colour} {shape} on a {style} {background} background"


def _meanings() -> dict[str, tuple[int, int, int, int]]:
    """Every caption with the indices of its four attributes."""
    meanings = {}
    for colour, shape, style, background in itertools.product(COLOURS, SHAPES, STYLES, COLOURS):
        # A shape in the colour of its background could not be seen.
        if colour == background:
            continue

        text = caption(colour, shape, style, background)
        meanings[text] = (
            COLOURS.index(colour),
            SHAPES.index(shape),
            STYLES.index(style),
            COLOURS.index(background),
        )
    return meanings


_MEANINGS = _meanings()
CAPTIONS = list(_MEANINGS)                      # all 1,728 of them, in a fixed order


def parse(text: str) -> tuple[int, int, int, int] | None:
    """Indices (colour, shape, style, background) of a caption, or None for any other text."""
    return _MEANINGS.get(text)


def style_of(text: str) -> str:
    """The style that a caption names; it stands where a benchmark of prompts has its styles."""
    _, _, style, _ = parse(text)
    return STYLES[style]


# ---- which captions serve what ----

def permuted(items: list, *key) -> list:
    """Items in a random order that depends on the key and on their order, and on nothing else."""
    import torch

    order = torch.randperm(len(items), generator=generator(*key))
    return [items[i] for i in order]


def world_captions() -> dict[str, list[str]]:
    """All captions in three parts: `world` (evaluation), `dev` (tuning) and `rest`.

    The parts have no caption in common and are the same for every run seed.
    """
    # The key holds no run seed.
    by_style = {style: [] for style in STYLES}
    for text in permuted(CAPTIONS, "world splits"):
        by_style[style_of(text)].append(text)

    # The styles take turns, so that the first captions of a part name each style equally often.
    turns = []
    for one_of_each in zip(*by_style.values()):
        turns.extend(one_of_each)

    # In the order of the turns, so that every style gives each part an equal number.
    eval_count = len(STYLES) * EVAL_PER_STYLE
    dev_count = len(STYLES) * DEV_PER_STYLE
    return {
        "world": turns[:eval_count],
        "dev": turns[eval_count:eval_count + dev_count],
        "rest": turns[eval_count + dev_count:],
    }

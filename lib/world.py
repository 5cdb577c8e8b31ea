"""The embedded world: captions and pictures small enough for a laptop.

A scene is one coloured shape on a coloured background in one of four styles. The caption names four
attributes (colour, shape, style, background); five more that no caption names (size, position, edge softness,
saturation, light) vary freely, and people turn out to care about them (lib/oracle.py). Light, a spotlight on
the background, is rare: one picture in ten has it strong.

    python -m lib.world            writes world.png, a sheet of scenes with their captions
"""

import itertools
import math

import torch
import torch.nn.functional as F

SIZE = 32                                                     # pixels per side
SHAPES = ("circle", "triangle", "star", "heart", "ring", "cross")
STYLES = ("plain", "striped", "dotted", "checked")
COLOURS = {"red": (.86, .14, .14), "orange": (.96, .55, .10), "yellow": (.95, .86, .15), "green": (.18, .64, .22),
           "teal": (.10, .72, .70), "blue": (.14, .28, .86), "purple": (.50, .18, .72), "pink": (.96, .50, .74),
           "white": (.96, .96, .96)}
PALETTE = torch.tensor(list(COLOURS.values()))                # (9, 3), RGB in 0..1
LUMA = torch.tensor([.299, .587, .114])                       # ITU-R BT.601
RANGES = {"size": (.30, .70), "x": (-.30, .30), "y": (-.30, .30), "softness": (1., 3.5), "saturation": (.45, 1.),
          "light": (0., 1.)}                                  # half-widths of the picture; softness in pixels
PATTERN_DEPTH = .35                                           # how much darker a pattern's dark parts are


def caption(colour: str, shape: str, style: str, background: str) -> str:
    return f"a {colour} {shape} on a {style} {background} background"


def parse(text: str) -> tuple[int, int, int, int] | None:
    """Indices (colour, shape, style, background) of a caption of this world, or None for any other text."""
    return _INDEX.get(text)


_names = list(COLOURS)
_INDEX = {caption(_names[c], SHAPES[s], STYLES[k], _names[b]): (c, s, k, b)
          for c, s, k, b in itertools.product(range(9), range(6), range(4), range(9)) if c != b}
CAPTIONS = list(_INDEX)                                       # all 1,728 of them


def _outline(shape: str) -> torch.Tensor:
    """Vertices (V, 2) of a shape within the unit disc, y downward."""
    turn = lambda n: torch.arange(n) * 2 * math.pi / n
    if shape in ("circle", "ring"):
        return torch.stack([turn(64).cos(), turn(64).sin()], 1)
    if shape == "triangle":
        return torch.stack([turn(3).sin(), -turn(3).cos()], 1)
    if shape == "star":
        radius = torch.tensor([1., .45]).repeat(5)[:, None]
        return radius * torch.stack([turn(10).sin(), -turn(10).cos()], 1)
    if shape == "heart":
        t = turn(64)
        y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
        return torch.stack([16 * t.sin() ** 3, -y - 2], 1) / 17
    a, b = .32, .95
    return torch.tensor([(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a),
                         (-b, -a), (-a, -a)])


def _signed_distance(shape: str, resolution: int = 192, extent: float = 5.) -> torch.Tensor:
    """(resolution, resolution) distances to the outline of the unit shape over [-extent, extent]^2; inside < 0."""
    axis = torch.linspace(-extent, extent, resolution)
    p = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 1, 2)
    a = _outline(shape)
    edge = a.roll(-1, 0) - a
    along = (((p - a) * edge).sum(-1) / (edge * edge).sum(-1)).clamp(0, 1)
    distance = (p - a - along[..., None] * edge).norm(dim=-1).amin(1)
    rise = (a[:, 1] > p[..., 1]) != (a.roll(-1, 0)[:, 1] > p[..., 1])          # even-odd rule
    crossing = a[:, 0] + (p[..., 1] - a[:, 1]) * edge[:, 0] / torch.where(edge[:, 1] == 0, 1e-9, edge[:, 1])
    inside = ((rise & (p[..., 0] < crossing)).sum(1) % 2).bool()
    signed = torch.where(inside, -distance, distance).reshape(resolution, resolution)
    return torch.maximum(signed, -(signed + .5)) if shape == "ring" else signed


_EXTENT = 5.
_DISTANCES = torch.stack([_signed_distance(s, extent=_EXTENT) for s in SHAPES])[:, None]    # (6, 1, R, R)
_AXIS = (torch.arange(SIZE) + .5) / SIZE * 2 - 1
_GRID = torch.stack(torch.meshgrid(_AXIS, _AXIS, indexing="xy"), -1)                        # (32, 32, 2)


def _patterns() -> torch.Tensor:
    """(4, 32, 32) darkness in 0..1 of each style, anti-aliased."""
    px = (_GRID + 1) * SIZE / 2
    soft = lambda wave: (.5 + 2 * wave).clamp(0, 1)
    wave = lambda v, period: (2 * math.pi * v / period).sin()
    stripes = soft(wave(px[..., 0] + px[..., 1], 10))
    dots = (3.2 - ((px % 8) - 4).norm(dim=-1)).clamp(0, 1)
    checks = soft(wave(px[..., 0], 16) * wave(px[..., 1], 16) * 2)
    return torch.stack([torch.zeros(SIZE, SIZE), stripes, dots, checks])


PATTERNS = _patterns()
FALLOFF = .75 * (_GRID.square().sum(-1) / 1.2).clamp(max=1)   # (32, 32) how much a full spotlight darkens


def masks(shape: torch.Tensor, size: torch.Tensor, x: torch.Tensor, y: torch.Tensor,
          softness: torch.Tensor) -> torch.Tensor:
    """Coverage (B, 32, 32) in 0..1 of shapes (B,) with radius `size` at (x, y), edges `softness` pixels wide."""
    centre = torch.stack([x, y], -1)[:, None, None]
    local = (_GRID - centre) / size[:, None, None, None]
    out = torch.empty(len(shape), SIZE, SIZE)
    for s in shape.unique():
        rows = (shape == s).nonzero()[:, 0]
        grid = local[rows].reshape(1, -1, SIZE, 2) / _EXTENT
        distance = F.grid_sample(_DISTANCES[s][None], grid, align_corners=True, padding_mode="border")
        out[rows] = distance.reshape(-1, SIZE, SIZE)
    return (.5 - out * size[:, None, None] * (SIZE / 2) / softness[:, None, None]).clamp(0, 1)


def sample_scenes(captions: list[str], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Scenes of these captions with nuisances drawn at random: uniform, but light is the cube of a uniform."""
    named = torch.tensor([parse(c) for c in captions])
    scene = dict(zip(("colour", "shape", "style", "background"), named.T))
    for name, (low, high) in RANGES.items():
        u = torch.rand(len(captions), generator=generator)
        scene[name] = low + (high - low) * (u ** 3 if name == "light" else u)
    return scene


def tint(colour: torch.Tensor, saturation: torch.Tensor) -> torch.Tensor:
    """RGB (..., 3) of palette indices at a saturation in 0..1 (0 is the grey of the same luma)."""
    rgb = PALETTE[colour]
    grey = (rgb @ LUMA)[..., None]
    return grey + (rgb - grey) * saturation[..., None]


def render(scene: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pictures (B, 3, 32, 32) in 0..1."""
    mask = masks(scene["shape"], scene["size"], scene["x"], scene["y"], scene["softness"])[:, None]
    colour, background = (tint(scene[k], scene["saturation"])[..., None, None] for k in ("colour", "background"))
    shade = (1 - PATTERN_DEPTH * PATTERNS[scene["style"]]) * (1 - scene["light"][:, None, None] * FALLOFF)
    return (mask * colour + (1 - mask) * background * shade[:, None]).clamp(0, 1)


def to_pil(pictures: torch.Tensor):
    """PIL images of pictures (B, 3, H, W) in 0..1."""
    from PIL import Image
    return [Image.fromarray(p) for p in (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()]


if __name__ == "__main__":
    import matplotlib.pyplot as plt
    g = torch.Generator().manual_seed(0)
    texts = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (32,), generator=g)]
    figure, axes = plt.subplots(4, 8, figsize=(16, 9))
    for axis, picture, text in zip(axes.flat, render(sample_scenes(texts, g)), texts):
        axis.imshow(picture.permute(1, 2, 0))
        axis.set_title(text.replace(" background", "").replace(" on ", "\non "), fontsize=8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig("world.png", dpi=70)

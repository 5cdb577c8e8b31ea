"""The pictures of the embedded world: from a caption to a scene, from a scene to 32 x 32 pixels.

A scene is one coloured shape on a coloured background in one of four styles, as the caption says.
Five attributes that no caption names vary freely: size, position, edge softness, saturation and
light, a spotlight on the background that is strong in one picture of ten only. People turn out to
care about them (people.py).

    python -m lib.world.scenes      writes world.png, a sheet of scenes with their captions
"""

import functools
import math

import torch
import torch.nn.functional as F

from lib.world.captions import ATTRIBUTES, CAPTIONS, COLOURS, SHAPES, SIZE, parse

RGB = {
    "red": (.86, .14, .14),
    "orange": (.96, .55, .10),
    "yellow": (.95, .86, .15),
    "green": (.18, .64, .22),
    "teal": (.10, .72, .70),
    "blue": (.14, .28, .86),
    "purple": (.50, .18, .72),
    "pink": (.96, .50, .74),
    "white": (.96, .96, .96),
}
LUMA = (.299, .587, .114)                       # weights of R, G, B in luma (ITU-R BT.601)

# What no caption names. Lengths are in half-widths of the picture, the softness in pixels.
RANGES = {
    "size": (.30, .70),
    "x": (-.30, .30),
    "y": (-.30, .30),
    "softness": (1., 3.5),
    "saturation": (.45, 1.),
    "light": (0., 1.),
}
PATTERN_DEPTH = .35                             # how much darker a pattern's dark parts are

# The tables of distances reach from -5 to 5 radii and have 192 points a side.
EXTENT = 5.
RESOLUTION = 192


# ---- tables, each made when it is first used ----

@functools.cache
def palette() -> torch.Tensor:
    """(9, 3) the colours in RGB, 0..1, in the order of COLOURS."""
    return torch.tensor([RGB[name] for name in COLOURS])


@functools.cache
def pixel_grid() -> torch.Tensor:
    """(32, 32, 2) the centre (x, y) of each pixel, in half-widths of the picture, y downward."""
    axis = (torch.arange(SIZE) + .5) / SIZE * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


@functools.cache
def patterns() -> torch.Tensor:
    """(4, 32, 32) the darkness of each style in 0..1, anti-aliased, in the order of STYLES."""
    pixels = (pixel_grid() + 1) * SIZE / 2
    x, y = pixels.unbind(-1)
    plain = torch.zeros(SIZE, SIZE)

    # Diagonal stripes 10 pixels apart along x and y.
    stripes = _soft(_wave(x + y, 10))

    # A disc of radius 3 in the middle of each 8 x 8 pixels.
    from_middle = ((pixels % 8) - 4).norm(dim=-1)
    dots = (3.2 - from_middle).clamp(0, 1)

    # Fields of 8 x 8 pixels: two waves across each other.
    checks = _soft(_wave(x, 16) * _wave(y, 16) * 2)
    return torch.stack([plain, stripes, dots, checks])


def _wave(position: torch.Tensor, period: float) -> torch.Tensor:
    return (2 * math.pi * position / period).sin()


def _soft(wave: torch.Tensor) -> torch.Tensor:
    """Dark and bright halves of a wave, with an edge about a pixel wide between them."""
    return (.5 + 2 * wave).clamp(0, 1)


@functools.cache
def falloff() -> torch.Tensor:
    """(32, 32) how much a full spotlight darkens the background, from the centre outward."""
    return .75 * (pixel_grid().square().sum(-1) / 1.2).clamp(max=1)


@functools.cache
def distances() -> torch.Tensor:
    """(6, 1, R, R) signed distances to each shape of radius 1, in the order of SHAPES."""
    return torch.stack([_signed_distance(shape) for shape in SHAPES])[:, None]


# ---- shapes ----

def _outline(shape: str) -> torch.Tensor:
    """Vertices (V, 2) of a shape within the unit disc, y downward."""
    if shape in ("circle", "ring"):
        angle = _angles(64)
        return torch.stack([angle.cos(), angle.sin()], 1)

    if shape == "triangle":
        angle = _angles(3)
        return torch.stack([angle.sin(), -angle.cos()], 1)

    # Ten corners, on two circles in turn.
    if shape == "star":
        angle = _angles(10)
        radius = torch.tensor([1., .45]).repeat(5)[:, None]
        return radius * torch.stack([angle.sin(), -angle.cos()], 1)

    # The usual heart curve, moved up by 2 and made smaller by 17.
    if shape == "heart":
        t = _angles(64)
        x = 16 * t.sin() ** 3
        y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
        return torch.stack([x, -y - 2], 1) / 17

    # A cross, whose arms are 2a wide and reach out to b.
    a, b = .32, .95
    return torch.tensor([
        (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
        (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
    ])


def _angles(count: int) -> torch.Tensor:
    return torch.arange(count) * 2 * math.pi / count


def _signed_distance(shape: str) -> torch.Tensor:
    """(R, R) distances to the outline of the unit shape over [-EXTENT, EXTENT]^2; inside < 0."""
    # Every point (R*R, 1, 2) against every edge (V, 2) of the outline.
    axis = torch.linspace(-EXTENT, EXTENT, RESOLUTION)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 1, 2)
    start = _outline(shape)
    end = start.roll(-1, 0)
    edge = end - start

    # The nearest point of an edge lies the fraction `along` of the way from its start to its end.
    along = ((points - start) * edge).sum(-1) / (edge * edge).sum(-1)
    nearest = along.clamp(0, 1)[..., None] * edge
    distance = (points - start - nearest).norm(dim=-1).amin(1)

    # Even-odd rule: a ray from an inner point to the right crosses an odd number of edges.
    x, y = points.unbind(-1)
    start_x, start_y = start.T
    run, rise = edge.T
    straddles = (start_y > y) != (end[:, 1] > y)
    crossing = start_x + (y - start_y) * run / torch.where(rise == 0, 1e-9, rise)
    inside = ((straddles & (x < crossing)).sum(1) % 2).bool()
    signed = torch.where(inside, -distance, distance).reshape(RESOLUTION, RESOLUTION)

    # A ring is a disc without a smaller disc of half its radius.
    if shape == "ring":
        return torch.maximum(signed, -(signed + .5))
    return signed


def masks(
    shape: torch.Tensor,
    size: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    softness: torch.Tensor,
) -> torch.Tensor:
    """Coverage (B, 32, 32) in 0..1 of shapes (B,).

    Their radius is `size` and their centre (x, y), in half-widths of the picture; their edges are
    `softness` pixels wide. All are tensors (B,).
    """
    # The pixels as the shape sees them: from its centre, in units of its radius.
    centre = torch.stack([x, y], -1)[:, None, None]
    local = (pixel_grid() - centre) / size[:, None, None, None]

    # Their distances to the outline, shape by shape, since each shape has its own table.
    distance = torch.empty(len(shape), SIZE, SIZE)
    for index in shape.unique():
        rows = (shape == index).nonzero()[:, 0]
        grid = local[rows].reshape(1, -1, SIZE, 2) / EXTENT
        table = distances()[index][None]
        looked_up = F.grid_sample(table, grid, align_corners=True, padding_mode="border")
        distance[rows] = looked_up.reshape(-1, SIZE, SIZE)

    # Half covered on the outline; from there the coverage changes over `softness` pixels.
    pixels = distance * size[:, None, None] * (SIZE / 2)
    return (.5 - pixels / softness[:, None, None]).clamp(0, 1)


# ---- scenes and pictures ----

def sample_scenes(texts: list[str], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Scenes of captions: each attribute's name with its values (B,).

    What a caption does not name is drawn uniformly from its range, but the light is the cube of a
    uniform number, so that strong light is rare.
    """
    named = torch.tensor([parse(text) for text in texts])
    scene = dict(zip(ATTRIBUTES, named.T))

    for name, (low, high) in RANGES.items():
        uniform = torch.rand(len(texts), generator=generator)
        if name == "light":
            uniform = uniform ** 3
        scene[name] = low + (high - low) * uniform
    return scene


def tint(colour: torch.Tensor, saturation: torch.Tensor) -> torch.Tensor:
    """RGB (..., 3) of palette indices (...) at a saturation (...) in 0..1.

    Saturation 0 is the grey of the same luma.
    """
    rgb = palette()[colour]
    grey = (rgb @ torch.tensor(LUMA))[..., None]
    return grey + (rgb - grey) * saturation[..., None]


def render(scene: dict[str, torch.Tensor]) -> torch.Tensor:
    """Pictures (B, 3, 32, 32) in 0..1 of scenes."""
    # Object and background have one saturation.
    mask = masks(scene["shape"], scene["size"], scene["x"], scene["y"], scene["softness"])[:, None]
    colour = tint(scene["colour"], scene["saturation"])[..., None, None]
    background = tint(scene["background"], scene["saturation"])[..., None, None]

    # Pattern and light darken the background only, one on top of the other.
    pattern = 1 - PATTERN_DEPTH * patterns()[scene["style"]]
    light = 1 - scene["light"][:, None, None] * falloff()
    shade = (pattern * light)[:, None]

    # The object lies over the background; where an edge is soft, both show.
    return (mask * colour + (1 - mask) * background * shade).clamp(0, 1)


def to_pil(pictures: torch.Tensor) -> list:
    """PIL images of pictures (B, 3, H, W) in 0..1."""
    from PIL import Image

    arrays = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(array) for array in arrays]


def main() -> None:
    """Draw 32 scenes with their captions into world.png."""
    import matplotlib.pyplot as plt

    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(CAPTIONS), (32,), generator=rng)
    texts = [CAPTIONS[i] for i in chosen]
    pictures = render(sample_scenes(texts, rng))

    figure, axes = plt.subplots(4, 8, figsize=(16, 9))
    for axis, picture, text in zip(axes.flat, pictures, texts):
        title = text.replace(" background", "").replace(" on ", "\non ")
        axis.imshow(picture.permute(1, 2, 0))
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig("world.png", dpi=70)


if __name__ == "__main__":
    main()

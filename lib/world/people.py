"""What people see and like in the embedded world: the oracle and the annotators.

The oracle reads a picture by analysis-by-synthesis. For every shape, size, position and pattern it
asks how well a picture of that kind, in the best colours, explains the pixels (a linear least-
squares problem), and refines the best. From the reading follow

    alignment   the part of the caption's four attributes that the picture shows, 0 to 1
    aesthetics  .30 light + .20 saturation + .20 size + .10 centring + .20 cleanness, each 0 to 1
    utility     alignment + 2 * aesthetics, 0 to 3: what the annotators prefer

Only stage 01's annotator, stage 05, the studies and the rival "online DPO" may look in here;
nothing that ranks or trains for SAIL does (tests/test_world.py follows the imports).

    python -m lib.world.people      prints how far to trust the world and its base model
"""

import functools
import itertools

import torch

from lib.world import scenes
from lib.world.captions import ATTRIBUTES, CAPTIONS, COLOURS, SHAPES, SIZE, STYLES, parse

TASTE = {"light": .30, "saturation": .20, "size": .20, "centring": .10, "cleanness": .20}
FAR_FROM_CENTRE = .42                           # from here on, in half-widths, centring is 0
DIRTY = .12                                     # from this rms error on, cleanness is 0

PIXELS = SIZE ** 2

# The oracle's search: the step between the sizes on the coarse grid, and how many shapes go on to
# be refined.
POSE_STEP = .1
SHAPES_TO_REFINE = 4

# The refinements: how far to step in size, x and y, and the edge softnesses to try there.
REFINEMENTS = (
    (.05, (2.,)),
    (.03, (1., 2., 3.2)),
)


# ---- hypotheses: kinds of pictures that could explain the pixels ----

def _columns(mask: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """(..., 5, 1024) from mask and pattern (..., 1024): the parts that add up to a picture.

    They are the object, the background, the background under the pattern, the background under
    the spotlight's falloff, and under both. A picture is the sum of each part times a colour.
    """
    ground = 1 - mask
    falloff = scenes.falloff().flatten()
    parts = [mask, ground, ground * pattern, ground * falloff, ground * pattern * falloff]
    return torch.stack(parts, -2)


@functools.cache
def _coarse_hypotheses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The T hypotheses of the coarse search: every shape, pose and pattern on a grid.

    Returns shape (T,), pattern (T,), pose (T, 3) = size, x, y, and basis (T, 4, 1024): orthonormal
    rows that span the pictures of a hypothesis (the fifth part is left to the refinement).
    """
    # Poses all over the range that scenes are drawn with, at a middling softness of 2 pixels.
    sizes = torch.arange(.30, .71, POSE_STEP).tolist()
    places = torch.arange(-.30, .31, POSE_STEP * 1.5).tolist()
    grid = list(itertools.product(range(len(SHAPES)), sizes, places, places))
    shape, size, x, y = torch.tensor(grid).T
    shape = shape.long()
    pose = torch.stack([size, x, y], 1)
    mask = scenes.masks(shape, size, x, y, torch.full((len(pose),), 2.)).flatten(1)

    # Plain, style 0, needs no hypothesis of its own: it is any other at depth 0.
    patterned = range(1, len(STYLES))
    columns, pattern = [], []
    for index in patterned:
        darkness = scenes.patterns()[index].flatten().expand_as(mask)
        columns.append(_columns(mask, darkness)[:, :4])
        pattern.append(torch.full_like(shape, index))

    # What is the same for every picture is made once: the projection is then one product.
    basis = torch.linalg.qr(torch.cat(columns).mT).Q.mT.contiguous()
    times = len(patterned)
    return shape.repeat(times), torch.cat(pattern), pose.repeat(times, 1), basis


def _neighbours(
    shape: torch.Tensor,
    pose: torch.Tensor,
    step: float,
    softnesses: tuple[float, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hypotheses around shapes (B, S) at poses (B, S, 3), each moved by a step in any direction.

    Returns shape (B, C), pose (B, C, 3) and softness (B, C) with C = S * 27 * len(softnesses).
    """
    offsets = torch.tensor(list(itertools.product((-step, 0., step), repeat=3)))
    near = pose[:, :, None] + offsets                                               # (B, S, 27, 3)

    # A little beyond the range that scenes are drawn with, since a model may draw what it likes.
    size = near[..., :1].clamp(.2, .8)
    place = near[..., 1:].clamp(-.5, .5)
    near = torch.cat([size, place], -1)

    # Each with each softness.
    full = (*near.shape[:3], len(softnesses))
    shape = shape[:, :, None, None].expand(full).flatten(1)
    near = near[:, :, :, None].expand(*full, 3).flatten(1, 3)
    softness = torch.tensor(softnesses).expand(full).flatten(1)
    return shape, near, softness


# ---- the oracle reads a picture ----

def _search(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The coarse search over pictures (B, 1024, 3).

    Returns the pattern (B,), the likeliest shapes (B, 4) and the best pose of each (B, 4, 3).
    """
    shapes, patterns, poses, basis = _coarse_hypotheses()

    # On an orthonormal basis the energy of a projection tells how much a hypothesis explains.
    energy = (basis.flatten(0, 1) @ pixels.permute(1, 0, 2).flatten(1)).square()    # (T*4, B*3)
    energy = energy.reshape(len(shapes), 4, len(pixels), 3).sum((1, 3)).T           # (B, T)

    # The pattern of the best hypothesis stays; from here on only hypotheses with it count.
    pattern = patterns[energy.argmax(1)]
    energy = torch.where(patterns == pattern[:, None], energy, -1.)

    # Of each shape the best pose; of these the four that explain most.
    energies, hypotheses = [], []
    for index in range(len(SHAPES)):
        of_shape = torch.where(shapes == index, energy, -1.)
        energies.append(of_shape.max(1).values)
        hypotheses.append(of_shape.argmax(1))
    likely = torch.stack(energies, 1).topk(SHAPES_TO_REFINE).indices
    best = torch.stack(hypotheses, 1).gather(1, likely)                             # (B, 4)
    return pattern, shapes[best], poses[best]


def _explain(
    mask: torch.Tensor,
    pattern: torch.Tensor,
    pixels: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of pictures (B, 1024, 3) on C hypotheses each, mask (B, C, 1024).

    Returns the squared error (B, C) and the best colours of the five parts (B, C, 5, 3).
    """
    # The normal equations, with a trace of damping for parts that are nearly alike.
    columns = _columns(mask, pattern[:, None].expand_as(mask))
    gram = columns @ columns.transpose(-1, -2) + 1e-3 * torch.eye(5)
    target = columns @ pixels[:, None]
    colours = torch.linalg.solve(gram, target)

    # |pixels - columns colours|^2 at the solution, without making the picture.
    error = pixels.square().sum((1, 2))[:, None] - (colours * target).sum((-1, -2))
    return error, colours


def _name_colours(
    object_colour: torch.Tensor,
    ground: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Palette indices (B,) of object and background colours (B, 3), and their saturation (B,).

    Both have the same saturation: the one of 17 levels at which both are nearest to the palette.
    """
    # Every colour of the palette at every level: (9, 17, 3).
    levels = torch.linspace(.2, 1, 17)
    grid = (len(COLOURS), len(levels))
    tints = scenes.tint(torch.arange(len(COLOURS))[:, None].expand(grid), levels.expand(grid))

    object_gap = (tints - object_colour[:, None, None]).square().sum(-1)            # (B, 9, 17)
    ground_gap = (tints - ground[:, None, None]).square().sum(-1)
    level = (object_gap.amin(1) + ground_gap.amin(1)).argmin(1)

    # At that level, the nearest colours.
    rows = torch.arange(len(level))
    colour = object_gap[rows, :, level].argmin(1)
    background = ground_gap[rows, :, level].argmin(1)
    return colour, background, levels[level]


def _read_batch(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Readings of pictures (B, 1024, 3)."""
    rows = torch.arange(len(pixels))
    pattern, shape, pose = _search(pixels)
    pattern_map = scenes.patterns()[pattern].flatten(1)

    # Four hypotheses a picture go in; each refinement hands on the best alone, shape (B, 1).
    for step, softnesses in REFINEMENTS:
        shape, pose, softness = _neighbours(shape, pose, step, softnesses)
        size, x, y = pose.flatten(0, 1).T
        mask = scenes.masks(shape.flatten(), size, x, y, softness.flatten())
        error, colours = _explain(mask.reshape(len(rows), -1, PIXELS), pattern_map, pixels)
        best = error.argmin(1)
        shape = shape[rows, best][:, None]
        pose = pose[rows, best][:, None]
        softness = softness[rows, best][:, None]

    # The background's colour under pattern and light, against the bare one, tells their depths.
    object_colour, ground, dark, dim = colours[rows, best][:, :4].unbind(1)         # (B, 3) each
    brightness = ground.square().sum(1) + 1e-3
    depth = -(dark * ground).sum(1) / brightness
    light = -(dim * ground).sum(1) / brightness
    colour, background, saturation = _name_colours(object_colour, ground)

    return {
        "colour": colour,
        "background": background,
        "shape": shape[:, 0],
        "style": torch.where(depth > scenes.PATTERN_DEPTH / 2, pattern, 0),
        "size": pose[:, 0, 0],
        "x": pose[:, 0, 1],
        "y": pose[:, 0, 2],
        "softness": softness[:, 0],
        "saturation": saturation,
        "light": light,
        "error": (error[rows, best].clamp(min=0) / pixels[0].numel()).sqrt(),
    }


def read(pictures: torch.Tensor, batch: int = 32) -> dict[str, torch.Tensor]:
    """What pictures (B, 3, 32, 32) in 0..1 show.

    Returns the indices (B,) of the four attributes, the values (B,) of what no caption names, and
    the rms `error` (B,) of the best explanation.
    """
    pixels = pictures.float().flatten(2).transpose(1, 2)
    readings = [_read_batch(part) for part in pixels.split(batch)]

    joined = {}
    for name in readings[0]:
        joined[name] = torch.cat([reading[name] for reading in readings])
    return joined


# ---- what people like ----

def score(prompts: list[str], pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """alignment, aesthetics and utility (B,) of pictures (B, 3, 32, 32), and the aesthetics' parts.

    A prompt that is no caption of this world has no alignment: a ValueError names it.
    """
    for prompt in prompts:
        if parse(prompt) is None:
            raise ValueError(f"not a caption of the embedded world: {prompt!r}")

    seen = read(pictures)
    named = torch.tensor([parse(prompt) for prompt in prompts])

    # Alignment: for each of the four attributes, whether it is as the caption says.
    hits = []
    for index, attribute in enumerate(ATTRIBUTES):
        hits.append(seen[attribute] == named[:, index])
    alignment = torch.stack(hits, 1).float().mean(1)

    # Aesthetics: what no caption names, each part from 0 to 1.
    off_centre = (seen["x"].square() + seen["y"].square()).sqrt()
    parts = {
        "light": _place_in_range(seen, "light"),
        "saturation": _place_in_range(seen, "saturation"),
        "size": _place_in_range(seen, "size"),
        "centring": (1 - off_centre / FAR_FROM_CENTRE).clamp(0, 1),
        "cleanness": (1 - seen["error"] / DIRTY).clamp(0, 1),
    }
    aesthetics = sum(weight * parts[name] for name, weight in TASTE.items())

    utility = alignment + 2 * aesthetics
    return {"alignment": alignment, "aesthetics": aesthetics, "utility": utility, **parts}


def _place_in_range(seen: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where a value lies between the least (0) and the greatest (1) that scenes are drawn with."""
    low, high = scenes.RANGES[name]
    return ((seen[name] - low) / (high - low)).clamp(0, 1)


# ---- the annotators ----

def first_wins(
    utility_first: torch.Tensor,
    utility_second: torch.Tensor,
    noise: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Bradley-Terry labels (B,): True where a person prefers the first picture of a pair."""
    chance = _chance_of_first(utility_first, utility_second, noise)
    return torch.rand(chance.shape, generator=generator) < chance


def self_agreement(
    utility_first: torch.Tensor,
    utility_second: torch.Tensor,
    noise: float,
) -> tuple[float, float]:
    """How reliable the labels of these pairs are: what their noise leaves to agree on.

    Takes the utilities (B,) of both pictures and the label noise. With p the Bradley-Terry chance
    that the first picture wins, returns two means over the pairs: how often a person who sees a
    pair twice gives the same label, p^2 + (1 - p)^2, and how often a judge who knows the true
    utility agrees with the labels, max(p, 1 - p), which no judge can exceed. Both are 1 without
    noise.
    """
    chance = _chance_of_first(utility_first, utility_second, noise)
    same_twice = chance.square() + (1 - chance).square()
    best_judge = torch.maximum(chance, 1 - chance)
    return same_twice.mean().item(), best_judge.mean().item()


def _chance_of_first(
    utility_first: torch.Tensor,
    utility_second: torch.Tensor,
    noise: float,
) -> torch.Tensor:
    """Bradley-Terry: P(first wins) = sigmoid((u1 - u2) / noise); without noise the better wins."""
    if noise > 0:
        return torch.sigmoid((utility_first - utility_second) / noise)
    return (utility_first > utility_second).float()


# ---- how far to trust the world, its autoencoder and its base model ----

def _print_scores(title: str, texts: list[str], pictures: torch.Tensor) -> None:
    scores = score(texts, pictures).items()
    print(f"{title:22}" + "  ".join(f"{name} {values.mean():.3f}" for name, values in scores))


def main() -> None:
    """Print what the oracle says of true renders, of the autoencoder and of the base model."""
    from diffusers import StableDiffusionPipeline

    from lib.settings import ROOT

    rng = torch.Generator().manual_seed(2026)
    chosen = torch.randint(len(CAPTIONS), (256,), generator=rng)
    texts = [CAPTIONS[i] for i in chosen]
    scene = scenes.sample_scenes(texts, rng)
    drawn = scenes.render(scene)

    seen = read(drawn)
    right = {}
    for name in ATTRIBUTES:
        right[name] = round((seen[name] == scene[name]).float().mean().item(), 3)
    print("true renders, attributes read right:", right)

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/world/base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = pipe.vae.encode(drawn * 2 - 1).latent_dist.mean
        rebuilt = (pipe.vae.decode(latents).sample / 2 + .5).clamp(0, 1)
    print(f"autoencoder: {-10 * (rebuilt - drawn).square().mean().log10():.1f} dB")
    _print_scores("true renders", texts, drawn)
    _print_scores("  through it", texts, rebuilt)

    for guidance in (1., 1.5, 2., 3., 4.):
        noises = [torch.Generator().manual_seed(i) for i in range(len(texts))]
        pictures = pipe(
            texts,
            num_inference_steps=10,
            guidance_scale=guidance,
            output_type="pt",
            generator=noises,
        ).images
        _print_scores(f"base, guidance {guidance:g}", texts, pictures)


if __name__ == "__main__":
    main()

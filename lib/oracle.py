"""What people see and like in the embedded world. Only stage 01's annotator, stage 05 and the online-DPO baseline
may look in here; nothing that trains or ranks for SAIL does (tests/test_world.py checks the imports).

The oracle reads a picture by analysis-by-synthesis: for every shape, size, position and pattern it asks how well
a picture of that kind, with the best colours, explains the pixels (a linear least-squares problem), and refines the
best. From the reading follow

    alignment   share of the caption's four attributes that the picture shows, 0..1
    aesthetics  .30 light + .20 saturation + .20 size + .10 centring + .20 cleanness, each 0..1
    utility     alignment + 2 * aesthetics, 0..3: what the annotators prefer
"""

import functools
import itertools

import torch

from lib import world

TASTE = {"light": .30, "saturation": .20, "size": .20, "centring": .10, "cleanness": .20}
PIXELS = world.SIZE ** 2
_STEP = .1                                                    # spacing of the coarse poses, in half-widths


@functools.cache
def _coarse() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poses: shape (T,), pattern (T,), size-x-y (T, 3), and orthonormal columns (T, 4, 1024) that span the pictures."""
    sizes = torch.arange(.30, .71, _STEP)
    places = torch.arange(-.30, .31, _STEP * 1.5)
    grid = torch.tensor(list(itertools.product(range(6), sizes.tolist(), places.tolist(), places.tolist())))
    shape, pose = grid[:, 0].long(), grid[:, 1:]
    mask = world.masks(shape, *pose.T, torch.full((len(pose),), 2.)).flatten(1)
    columns, patterns = [], []
    for pattern in (1, 2, 3):
        columns.append(_columns(mask, world.PATTERNS[pattern].flatten().expand_as(mask))[:, :4])
        patterns.append(torch.full_like(shape, pattern))
    basis = torch.linalg.qr(torch.cat(columns).transpose(1, 2)).Q.transpose(1, 2).contiguous()
    return shape.repeat(3), torch.cat(patterns), pose.repeat(3, 1), basis


def _columns(mask: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """(..., 5, 1024): object, background, background x pattern, x falloff, x both."""
    ground, falloff = 1 - mask, world.FALLOFF.flatten()
    return torch.stack([mask, ground, ground * pattern, ground * falloff, ground * pattern * falloff], -2)


def _explain(mask: torch.Tensor, pattern: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of pixels (B, 1024, 3) on C hypotheses, mask (B, C, 1024): error (B, C), colours (B, C, 5, 3)."""
    columns = _columns(mask, pattern[:, None].expand_as(mask))
    gram = columns @ columns.transpose(-1, -2) + 1e-3 * torch.eye(5)
    target = columns @ pixels[:, None]
    colours = torch.linalg.solve(gram, target)
    return pixels.square().sum((1, 2))[:, None] - (colours * target).sum((-1, -2)), colours


def _refine(shape: torch.Tensor, pose: torch.Tensor, step: float, softness: tuple[float, ...]) -> tuple:
    """Neighbours of poses (B, S, 3) in size, x and y: shape (B, S*27*W), pose (B, S*27*W, 3), softness (B, S*27*W)."""
    offsets = torch.tensor(list(itertools.product((-step, 0., step), repeat=3)))
    b, s = shape.shape
    near = (pose[:, :, None] + offsets)[:, :, :, None].expand(b, s, 27, len(softness), 3)
    near = torch.cat([near[..., :1].clamp(.2, .8), near[..., 1:].clamp(-.5, .5)], -1)
    soft = torch.tensor(softness).expand(b, s, 27, len(softness))
    return shape[:, :, None, None].expand(soft.shape).flatten(1), near.reshape(b, -1, 3), soft.reshape(b, -1)


def _fit(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Readings of pictures (B, 1024, 3)."""
    b, every = len(pixels), torch.arange(len(pixels))
    shapes, patterns, poses, basis = _coarse()
    energy = (basis.flatten(0, 1) @ pixels.permute(1, 0, 2).flatten(1)).square()          # (T*4, B*3)
    energy = energy.reshape(len(shapes), 4, b, 3).sum((1, 3)).T                            # (B, T)
    pattern = patterns[energy.argmax(1)]
    pattern_map = world.PATTERNS[pattern].flatten(1)
    energy = torch.where(patterns == pattern[:, None], energy, -1.)
    per_shape = torch.stack([torch.where(shapes == s, energy, -1.).max(1).values for s in range(6)], 1)
    likely = per_shape.topk(4).indices                                                     # (B, 4) shapes to refine
    best = torch.stack([torch.where(shapes == s[:, None], energy, -1.).argmax(1) for s in likely.T], 1)
    shape, pose = shapes[best], poses[best]
    for step, softness in ((.05, (2.,)), (.03, (1., 2., 3.2))):
        shape, pose, soft = _refine(shape, pose, step, softness)
        mask = world.masks(shape.flatten(), *pose.flatten(0, 1).T, soft.flatten()).reshape(b, -1, PIXELS)
        error, colours = _explain(mask, pattern_map, pixels)
        best = error.argmin(1)
        shape, pose, soft = (v[every, best][:, None] for v in (shape, pose, soft))
    object_colour, ground, dark, dim = colours[every, best][:, :4].unbind(1)               # (B, 3) each
    brightness = ground.square().sum(1) + 1e-3
    depth = -(dark * ground).sum(1) / brightness
    levels = torch.linspace(.2, 1, 17)
    tints = world.tint(torch.arange(9)[:, None].expand(9, 17), levels.expand(9, 17))       # (9, 17, 3)
    far = [(tints - c[:, None, None]).square().sum(-1) for c in (object_colour, ground)]   # (B, 9, 17)
    level = (far[0].amin(1) + far[1].amin(1)).argmin(1)
    return {"colour": far[0][every, :, level].argmin(1), "background": far[1][every, :, level].argmin(1),
            "shape": shape[:, 0], "style": torch.where(depth > world.PATTERN_DEPTH / 2, pattern, 0),
            "size": pose[:, 0, 0], "x": pose[:, 0, 1], "y": pose[:, 0, 2], "softness": soft[:, 0],
            "saturation": levels[level], "light": -(dim * ground).sum(1) / brightness,
            "error": (error[every, best].clamp(min=0) / pixels[0].numel()).sqrt()}


def read(pictures: torch.Tensor, batch: int = 32) -> dict[str, torch.Tensor]:
    """What pictures (B, 3, 32, 32) in 0..1 show: attribute indices, nuisances, and the rms `error` of the fit."""
    pixels = pictures.float().flatten(2).transpose(1, 2)
    parts = [_fit(p) for p in pixels.split(batch)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def score(prompts: list[str], pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """alignment, aesthetics and utility (B,) of pictures (B, 3, 32, 32), and the parts of the aesthetics.

    A prompt that is no caption of this world has no alignment: a ValueError names it.
    """
    unknown = [p for p in prompts if world.parse(p) is None]
    if unknown:
        raise ValueError(f"not a caption of the embedded world: {unknown[0]!r}")
    seen = read(pictures)
    named = torch.tensor([world.parse(p) for p in prompts])
    hits = torch.stack([seen[k] == named[:, i] for i, k in enumerate(("colour", "shape", "style", "background"))], 1)
    share = lambda k: ((seen[k] - world.RANGES[k][0]) / (world.RANGES[k][1] - world.RANGES[k][0])).clamp(0, 1)
    parts = {"light": share("light"), "saturation": share("saturation"), "size": share("size"),
             "centring": (1 - (seen["x"].square() + seen["y"].square()).sqrt() / .42).clamp(0, 1),
             "cleanness": (1 - seen["error"] / .12).clamp(0, 1)}
    aesthetics = sum(weight * parts[k] for k, weight in TASTE.items())
    alignment = hits.float().mean(1)
    return {"alignment": alignment, "aesthetics": aesthetics, "utility": alignment + 2 * aesthetics, **parts}


def first_wins(utility_first: torch.Tensor, utility_second: torch.Tensor, noise: float,
               generator: torch.Generator) -> torch.Tensor:
    """Bradley-Terry labels (B,) of people who see utility / noise: P(first) = sigmoid((u1 - u2) / noise)."""
    chance = torch.sigmoid((utility_first - utility_second) / noise) if noise > 0 else \
        (utility_first > utility_second).float()
    return torch.rand(chance.shape, generator=generator) < chance


if __name__ == "__main__":           # python -m lib.oracle: how far to trust the world, its autoencoder, its base model
    from diffusers import StableDiffusionPipeline

    from lib.settings import ROOT
    rng = torch.Generator().manual_seed(2026)
    texts = [world.CAPTIONS[i] for i in torch.randint(len(world.CAPTIONS), (256,), generator=rng)]
    scene = world.sample_scenes(texts, rng)
    drawn = world.render(scene)
    seen = read(drawn)
    right = lambda k: round((seen[k] == scene[k]).float().mean().item(), 3)
    print("true renders, attributes read right:", {k: right(k) for k in ("colour", "shape", "style", "background")})
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib" / "tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        rebuilt = (pipe.vae.decode(pipe.vae.encode(drawn * 2 - 1).latent_dist.mean).sample / 2 + .5).clamp(0, 1)
    print(f"autoencoder: {-10 * (rebuilt - drawn).square().mean().log10():.1f} dB")
    line = lambda pictures: "  ".join(f"{k} {v.mean():.3f}" for k, v in score(texts, pictures).items())
    print(f"{'true renders':22}{line(drawn)}\n{'  through it':22}{line(rebuilt)}")
    for guidance in (1., 1.5, 2., 3., 4.):
        pictures = pipe(texts, num_inference_steps=10, guidance_scale=guidance, output_type="pt",
                        generator=[torch.Generator().manual_seed(i) for i in range(len(texts))]).images
        print(f"{f'base, guidance {guidance:g}':22}{line(pictures)}")

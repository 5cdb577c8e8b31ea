"""Latents one to a file, or many in a file; pictures as PNG, WebP and JPEG: seconds and bytes.

    python -m tests.bench.bench_files [--count 2000] [--folder /tmp]

Latents are SD1.5's at 512 pixels (4 x 64 x 64, float32). They are written as the stages write them,
brought to the disk and renamed; then asked for (is it whole, and of this shape?), and read in a
random order. On a disk of the network each opening of a file waits: those seconds are counted by
arithmetic, at 2 ms an opening. Pictures come from the files that are given (--pictures), and from a
generator: noise whose spectrum falls like that of photographs.
"""

import argparse
import io
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lib import packs
from lib.models import has_latent
from lib.run import WRITTEN_AS, load_latent, save_latent

SHAPE = (4, 64, 64)
SIDE = 512
DELAY = .002                                    # seconds that an opening waits, by assumption
OPENINGS = {"written": 1, "asked for": 2, "read": 1}


def seconds_of(call, items: list) -> float:
    """Seconds that `call` takes over the items, by thousand."""
    start = time.perf_counter()
    for item in items:
        call(item)
    return (time.perf_counter() - start) * 1000 / len(items)


def measure_single(folder: Path, count: int) -> dict[str, float]:
    """A latent to a file, as lib/run.py has them: seconds for 1,000."""
    images = [folder / "images" / f"{i:06d}.jpg" for i in range(count)]
    latent = torch.randn(SHAPE)
    seconds = {"written": seconds_of(lambda image: save_latent({"mean": latent}, image), images)}
    seconds["asked for"] = seconds_of(lambda image: has_latent(image, False, SHAPE), images)
    random.Random(0).shuffle(images)
    seconds["read"] = seconds_of(load_latent, images)
    return seconds


def measure_packed(folder: Path, count: int, size: int) -> dict[str, float]:
    """`size` latents to a file, as lib/packs.py has them: seconds for 1,000."""
    paths = [folder / f"{i:06d}.safetensors" for i in range(count)]
    parts = [paths[start:start + size] for start in range(0, count, size)]
    latents = torch.randn(size, *SHAPE)

    def write(part: list[Path]) -> None:
        packs.save_pack({path: {"mean": latents[i]} for i, path in enumerate(part)})

    seconds = {"written": seconds_of(write, parts) / size}
    packs.look_again()
    packs.opened.cache_clear()
    seconds["asked for"] = seconds_of(packs.shapes, paths)
    random.Random(0).shuffle(paths)
    seconds["read"] = seconds_of(packs.load, paths)
    return seconds


def noise(falloff: float, seed: int) -> Image.Image:
    """Coloured noise, whose amplitude falls with this power of the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.fftfreq(SIDE)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((4, SIDE, SIDE))) / radius ** falloff
    planes = np.fft.ifft2(spectrum).real
    planes = planes / planes.std((1, 2), keepdims=True)

    # Three colours that have most of their light in common.
    pixels = 128 + 55 * (.85 * planes[:1] + .35 * planes[1:])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def measure_picture(picture: Image.Image) -> list[str]:
    """Bytes a pixel, and milliseconds to write and to read it, in each format of a run."""
    lines = []
    for ending, options in WRITTEN_AS.items():
        buffer = io.BytesIO()
        write = seconds_of(lambda _: (buffer.seek(0), picture.save(buffer, **options)), range(5))
        content = buffer.getvalue()
        read = seconds_of(lambda _: Image.open(io.BytesIO(content)).convert("RGB"), range(5))
        size = len(content) / (picture.width * picture.height)
        lines.append(f"{ending[1:]} {size:.2f} bytes a pixel, {write:.0f} and {read:.0f} ms")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--pictures", nargs="*", default=[])
    own = parser.parse_args()

    for size in (1, 32, 1000):
        with tempfile.TemporaryDirectory(dir=own.folder) as folder:
            if size == 1:
                seconds = measure_single(Path(folder), own.count)
            else:
                seconds = measure_packed(Path(folder), own.count, size)
        told = []
        for name, here in seconds.items():
            # A pack is opened once; its latents are read from the file that is open.
            waiting = 1000 * DELAY * OPENINGS[name] / size
            if size > 1 and name == "read":
                waiting = 0
            told.append(f"{name} {here:.2f} s (with {DELAY * 1000:.0f} ms an opening "
                        f"{here + waiting:.2f} s)")
        print(f"1,000 latents, {size} to a file: {', '.join(told)}")

    pictures = {"noise 1.2": noise(1.2, 1), "noise 1.5": noise(1.5, 2)}
    for name in own.pictures:
        pictures[Path(name).name] = Image.open(name).convert("RGB")
    for name, picture in pictures.items():
        print(f"{name}, {picture.width} x {picture.height}: {'; '.join(measure_picture(picture))}")


if __name__ == "__main__":
    main()

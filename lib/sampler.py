"""Prompts and random seeds in, picture files (and their latents) out, for stages 01, 02 and 05.

The textbook's sampler is lib/diffusion.py. Here it works through a table of pictures, in batches
that do not depend on what a stopped run has drawn already.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch

from lib import models
from lib.diffusion import sample
from lib.run import (Ledger, bar, is_from_latent, is_main, is_whole, latent_path, my_share,
                     save_image, save_latent, save_latents, wait)
from lib.settings import Settings

DECODE_BATCH = 16                # pictures that `keep_pictures` has in memory at once


def start_noise(seeds: list[int], shape: tuple[int, ...],
                device) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Unit noise (B, *shape), drawn on the CPU, and the generators it came from, one per picture.

    A sampler that adds noise at its steps goes on with the same generators.
    """
    generators = []
    noise = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        generators.append(generator)
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(noise).to(device), generators


def paint(s: Settings, k: int, jobs: pd.DataFrame, ledger: Ledger, title: str,
          keep_latents: bool, unet=None) -> None:
    """Draw the pictures that `jobs` (prompt, seed, image: path in the run folder) still lacks.

    They are drawn by model k of the run, or by `unet` where it is given. Batches are fixed by the
    table's order, and one with any picture missing or damaged is drawn again whole: a resumed run
    makes the same bits. Of pictures that are their latents (run.is_from_latent) only these are
    made.
    """
    pictures = [Path(s.run) / image for image in jobs.image]
    models.keep_inside(s, pictures)
    if keep_latents:
        models.keep_inside(s, [latent_path(picture) for picture in pictures])

    starts = range(0, len(jobs), s.sample_batch)
    batches = [jobs.iloc[start:start + s.sample_batch] for start in starts]

    # Of this process's turn, the batches that lack a picture.
    shape = models.latent_shape(s) if keep_latents else None
    to_draw = []
    for batch in my_share(batches):
        undrawn = lacking(s, batch, shape)
        models.tell_damaged(undrawn)
        if undrawn:
            to_draw.append(batch)

    # One process encodes the prompts; then all of them read the files.
    encoder = models.PromptEncoder(s)
    if is_main():
        encoder.prepare(jobs.prompt.tolist())
    wait()

    if to_draw:
        if unet is None:
            unet = models.load_unet(s, k)
        paint_batches(s, unet, encoder, to_draw, ledger, title, keep_latents)
    wait()


def lacking(s: Settings, jobs: pd.DataFrame, shape: tuple[int, ...] | None) -> list[Path]:
    """The pictures of `jobs` that are not there whole; also their latents, if these have a shape.

    Of a picture that is its latent only that is asked for.
    """
    pictures = [Path(s.run) / image for image in jobs.image]
    files = []
    for picture in pictures:
        if not is_from_latent(picture) and not is_whole(picture):
            files.append(picture)
    if shape:
        without = models.lacking_latents(pictures, False, shape)
        files += [latent_path(picture) for picture in without]
    return files


def paint_batches(s: Settings, unet, encoder: models.PromptEncoder, batches: list[pd.DataFrame],
                  ledger: Ledger, title: str, keep_latents: bool) -> None:
    """Sample, decode, write; threads write the files of a batch while the next one is sampled."""
    run = Path(s.run)
    device = models.device_of(s)
    scheduler = models.load_sampler(s)
    empty = encoder.unconditional()
    shape = models.latent_shape(s)

    # The pictures of one table are all kept, or all are their latents.
    vae = None
    if not is_from_latent(run / batches[0].image.iloc[0]):
        vae = models.load_vae(s)

    # What a picture costs: guidance doubles the UNet's forwards.
    forwards = s.sample_steps
    if s.cfg_scale > 1:
        forwards *= 2

    count = sum(len(batch) for batch in batches)
    progress = bar(None, title, "image", total=count)
    writing = []                                # by threads, of the batch before
    with ThreadPoolExecutor(4) as writers, progress:
        for batch in batches:
            noise, generators = start_noise(batch.seed.tolist(), shape, device)
            condition = encoder(batch.prompt.tolist())
            latents = sample(unet, scheduler, noise, condition, empty,
                             s.sample_steps, s.cfg_scale, generators)
            models.refuse_not_finite(
                latents, f"{title}: latents drawn at --cfg-scale {s.cfg_scale}", models.dtype_of(s))
            pictures = None
            if vae is not None:
                pictures = models.decode(vae, latents)

            # An error of a writing thread is raised here, one batch later.
            for future in writing:
                future.result()

            # Pictures that only the evaluation looks at need no latent.
            kept = None
            if keep_latents:
                kept = latents.cpu()
            paths = [run / image for image in batch.image]
            writing = write_batch(writers, paths, pictures, kept)

            # What has been drawn, for the ledger and for the bar.
            ledger.images += len(batch)
            ledger.unet_forwards += len(batch) * forwards
            progress.update(len(batch))

        # The last batch's files.
        for future in writing:
            future.result()


def write_batch(writers: ThreadPoolExecutor, paths: list[Path], pictures: torch.Tensor | None,
                latents: torch.Tensor | None) -> list[Future]:
    """Let threads write a batch's pictures and latents; of pictures that are their latents
    (`pictures` is None) these alone, in one file."""
    if pictures is None:
        rows = [{"mean": latent} for latent in latents]
        return [writers.submit(save_latents, rows, paths)]

    writing = []
    for i, path in enumerate(paths):
        latent = None
        if latents is not None:
            latent = latents[i]
        writing.append(writers.submit(write_picture, pictures[i], latent, path))
    return writing


def write_picture(picture: torch.Tensor, latent: torch.Tensor | None, path: Path) -> None:
    """Write a picture (3, H, W) in 0..1, and its latent (C, h, w) where it is to be kept.

    The picture is written last: a picture that exists has its latent too.
    """
    from torchvision.transforms.functional import to_pil_image
    if latent is not None:
        save_latent({"mean": latent}, path)
    save_image(to_pil_image(picture), path)


def keep_pictures(s: Settings, images: Iterable[str]) -> None:
    """Decode and write those of the pictures (paths in the run folder) that are their latents and
    have no file yet. The processes take turns."""
    lacking = []
    for image in dict.fromkeys(images):
        path = Path(s.run) / image
        if is_from_latent(path) and not is_whole(path):
            lacking.append(path)
    models.keep_inside(s, lacking)
    without_latent = models.lacking_latents(lacking, False, models.latent_shape(s))
    models.refuse_lost_candidates(without_latent)

    # No process writes before all of them have looked.
    wait()
    starts = my_share(range(0, len(lacking), DECODE_BATCH))
    if starts:
        vae = models.load_vae(s)
        with ThreadPoolExecutor(4) as writers:
            for start in bar(starts, "pictures of pairs", "batch"):
                batch = lacking[start:start + DECODE_BATCH]
                pictures = models.decode_kept(vae, batch)
                list(writers.map(save_image, pictures, batch))
    wait()

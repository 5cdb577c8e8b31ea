"""Prompts and seeds in, picture files (and their latents) out: what stages 01, 02 and 05 share."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from lib import models
from lib.run import Ledger, save_image, save_latent
from lib.settings import Settings


def start_noise(seeds: list[int], shape: tuple[int, ...], device) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Unit noise (B, *shape) drawn on the CPU, one generator per image, which a stochastic sampler goes on to use."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device), generators


def paint(s: Settings, k: int, jobs: pd.DataFrame, ledger: Ledger, title: str, keep_latents: bool,
          unet=None) -> None:
    """Draw the images that `jobs` (prompt, seed, image: path in the run folder) still lacks, from model K or `unet`.

    Batches are fixed by the table's order, and a batch with any image missing is drawn again whole, so a resumed
    run makes the same bits. Several processes take turns by batch. Decoded files are written by threads while the
    next batch is sampled.
    """
    run, state = Path(s.run), PartialState()
    batches = [jobs.iloc[i:i + s.sample_batch] for i in range(0, len(jobs), s.sample_batch)]
    batches = batches[state.process_index::state.num_processes]
    batches = [b for b in batches if not all((run / image).exists() for image in b.image)]
    encoder = models.PromptEncoder(s)
    if state.is_main_process:
        encoder.prepare(jobs.prompt.tolist())
    state.wait_for_everyone()
    if not batches:                                           # another process may have some: meet it at the end
        return state.wait_for_everyone()
    unet = models.load_unet(s, k) if unet is None else unet
    scheduler, vae = models.load_sampler(s), models.load_vae(s)
    side = s.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    device, shape = models.device_of(s), (unet.config.in_channels, side, side)
    empty = encoder.unconditional()
    with ThreadPoolExecutor(4) as writers, tqdm(total=sum(map(len, batches)), desc=title, unit="image",
                                                disable=not state.is_local_main_process) as bar:
        pending = []
        for batch in batches:
            noise, generators = start_noise(batch.seed.tolist(), shape, device)
            latents = models.sample(unet, scheduler, noise, encoder(batch.prompt.tolist()), empty, s.sample_steps,
                                    s.cfg_scale, generators)
            pictures, latents = models.decode(vae, latents), latents.cpu()
            for future in pending:
                future.result()
            pending = [writers.submit(_write, picture, latent if keep_latents else None, run / image)
                       for picture, latent, image in zip(pictures, latents, batch.image)]
            ledger.images += len(batch)
            ledger.unet_forwards += len(batch) * s.sample_steps * (2 if s.cfg_scale != 1 else 1)
            bar.update(len(batch))
        for future in pending:
            future.result()
    state.wait_for_everyone()


def _write(picture: torch.Tensor, latent: torch.Tensor | None, path: Path) -> None:
    """The picture last: a file that exists has its latent too."""
    from torchvision.transforms.functional import to_pil_image
    if latent is not None:
        save_latent({"mean": latent}, path)
    save_image(to_pil_image(picture), path)

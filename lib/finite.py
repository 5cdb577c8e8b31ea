"""Which file is at fault where a stage's numbers are not finite.

Looked for only when a reward or a loss has come out as infinite or as no number. The weights of a
model are finite: `load_unet` refuses others.
"""

from pathlib import Path

import pandas as pd
import torch

from lib import packs
from lib.models import PromptEncoder
from lib.run import UserError, latent_path, shown
from lib.settings import Settings

AGAIN = "delete it and give the same command again, which makes it anew"


def refuse_unfinite_rewards(s: Settings, k: int, comparisons: list, rewards: torch.Tensor) -> None:
    """UserError if a reward of round k is not finite; it names the file at fault.

    `rewards` (P, N, D) are of P comparisons, which are stage 03's.
    """
    finite = rewards.isfinite().all((1, 2))                                     # (P,)
    if finite.all():
        return
    comparison = comparisons[finite.int().argmin()]
    folder, prompt = comparison.images[0].parent, shown(comparison.prompt)
    if s.reward not in ("implicit", "self-confidence"):
        raise UserError(f"{folder}: {s.reward} gives a picture of prompt {prompt} a reward that is "
                        f"not finite; choose another --reward, in another --run")

    # A candidate's latent is made by stage 02, a human pair's by this stage itself.
    remedy = AGAIN
    if comparison.key[0] == k:
        remedy = f"delete it and run 02_generate.py --iter {k} again, which makes it anew"
    latents = [latent_path(image) for image in comparison.images]
    refuse_unfinite_files(s, latents, [comparison.prompt], remedy)
    raise UserError(f"{folder}: a reward of prompt {prompt} is not finite, though latents and "
                    f"weights are; use --dtype float32, in another --run")


def refuse_unfinite_batch(s: Settings, pairs: pd.DataFrame, flips: list[bool]) -> None:
    """UserError naming the file of a batch of pairs that is not finite, if one is at fault.

    `flips` says which pairs were mirrored.
    """
    latents = []
    for pair, flipped in zip(pairs.itertuples(), flips):
        for image in (pair.win, pair.lose):
            latents.append(latent_path(Path(s.run) / image, flipped))

    # Some of the prompts may have been dropped.
    refuse_unfinite_files(s, latents, ["", *pairs.prompt])


def refuse_unfinite_files(s: Settings, latents: list[Path], prompts: list[str],
                          remedy: str = AGAIN) -> None:
    """UserError naming the first of these latent files, or of these prompts' embeddings, that holds
    numbers which are not finite; `remedy` is that of a latent."""
    for path in dict.fromkeys(latents):
        if not is_finite(path):
            raise UserError(f"{packs.file_of(path)}: a latent that is not finite; {remedy}")

    encoder = PromptEncoder(s)
    for prompt in dict.fromkeys(prompts):
        path = encoder.path(prompt)
        if not is_finite(path):
            raise UserError(f"{packs.file_of(path)}: the embedding of the prompt {shown(prompt)} "
                            f"is not finite; {AGAIN}")


def is_finite(path: Path) -> bool:
    """Whether all numbers of a safetensors file are finite."""
    return all(tensor.isfinite().all() for tensor in packs.load(path).values())

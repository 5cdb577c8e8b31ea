"""Which file is at fault where a stage's numbers are not finite.

Looked for only when an error, a reward or a loss has come out as infinite or as no number. The
weights of a model are finite: `load_unet` refuses others.
"""

from pathlib import Path

from safetensors.torch import load_file

from lib.models import PromptEncoder
from lib.run import UserError, shown
from lib.settings import Settings

AGAIN = "delete it and give the same command again, which makes it anew"


def refuse_unfinite_data(s: Settings, latents: list[Path], prompts: list[str],
                         remedy: str = AGAIN) -> None:
    """UserError naming the first of these latent files, or of these prompts' embeddings, that holds
    numbers which are not finite; `remedy` is that of a latent."""
    for path in dict.fromkeys(latents):
        if not is_finite(path):
            raise UserError(f"{path}: a latent that is not finite; {remedy}")

    encoder = PromptEncoder(s)
    for prompt in dict.fromkeys(prompts):
        path = encoder.path(prompt)
        if not is_finite(path):
            raise UserError(f"{path}: the embedding of the prompt {shown(prompt)} is not finite; "
                            f"{AGAIN}")


def is_finite(path: Path) -> bool:
    """Whether all numbers of a safetensors file are finite."""
    return all(tensor.isfinite().all() for tensor in load_file(path).values())

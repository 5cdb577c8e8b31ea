"""Online DPO: the rival whose candidates are ranked by a reward from outside, not by the model.

This is the only way in which a score of stage 05 can rank candidates. Nothing of SAIL itself comes
in here: stage 03 imports this file only when --reward names something else than `implicit`.
"""

from pathlib import Path

import torch

from lib import models
from lib.eval.scores import load_score
from lib.run import bar, gathered, is_from_latent, my_share, open_made
from lib.settings import Settings

BATCH = 64                                               # pictures in memory at once

# What --reward calls the columns of the embedded world's score.
WORLD_COLUMNS = {"world": "utility", "world-aesthetics": "aesthetics"}


def rank(s: Settings, candidates: list, holdout: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (P, N, 1) of the candidates and (pairs, 2, 1) of the held-out human pairs.

    Both are lists of stage 03's comparisons: a prompt and its images.
    """
    # All pictures in one list, each beside its prompt.
    prompts = []
    images = []
    for comparison in candidates + holdout:
        prompts += [comparison.prompt] * len(comparison.images)
        images += comparison.images
    scores = score(s, prompts, images)

    # And back into comparisons. A score takes the place of the one draw of a reward.
    count = sum(len(comparison.images) for comparison in candidates)
    of_candidates = scores[:count].reshape(len(candidates), -1, 1)
    of_holdout = scores[count:].reshape(-1, 2, 1)
    return of_candidates, of_holdout


def score(s: Settings, prompts: list[str], images: list[Path]) -> torch.Tensor:
    """Score n images under their prompts -> (n,) in float32, higher is better.

    The setting `reward` says by what: the embedded world's utility (`world`) or its aesthetics
    (`world-aesthetics`), or one of the learned scores of lib/eval/scorers.py. Processes take turns
    by batch, and all of them get all the scores.
    """
    # A scorer gives a dictionary of columns, and one of them is the reward.
    if s.reward in WORLD_COLUMNS:
        scorer = load_score(s, "world")
        column = WORLD_COLUMNS[s.reward]
    else:
        scorer = load_score(s, s.reward)
        column = s.reward

    # Candidates whose pictures were not kept are decoded.
    vae = None
    if any(is_from_latent(image) for image in images):
        vae = models.load_vae(s)

    starts = my_share(range(0, len(images), BATCH))
    batches = []
    for start in bar(starts, f"{s.reward} ranks", "batch"):
        end = start + BATCH
        pictures = pictures_of(vae, images[start:end])
        columns = scorer(prompts[start:end], pictures)
        batches.append((start, columns[column]))

    # Back into the order of the images: batches are sorted by where they start.
    scores = []
    for _, values in sorted(gathered(batches)):
        scores.extend(values)
    return torch.tensor(scores)


def pictures_of(vae, images: list[Path]) -> list:
    """PIL images of a batch, in its order: read from their files, or decoded from their latents."""
    decoded = [image for image in images if is_from_latent(image)]
    pictures = {}
    if decoded:
        pictures = dict(zip(decoded, models.decode_kept(vae, decoded)))
    for image in images:
        if image not in pictures:
            pictures[image] = open_made(image)
    return [pictures[image] for image in images]

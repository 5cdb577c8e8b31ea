"""A reward from outside, for the rival row "online DPO": the only way in which a score of stage 05 can rank candidates.

Nothing of SAIL itself comes in here: stage 03 imports this room only when --reward names something else than `implicit`.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from lib import models, report
from lib.run import UserError, open_image
from lib.settings import Settings

BATCH = 64


def score(s: Settings, prompts: list[str], images: list[Path]) -> torch.Tensor:
    """(n,) scores of images under their prompts: the embedded world's utility (`world`) or aesthetics
    (`world-aesthetics`), or one of lib.scorers."""
    starts = tqdm(range(0, len(images), BATCH), desc=f"{s.reward} ranks", unit="batch")
    if s.reward.startswith("world"):
        from lib import oracle
        name = {"world": "utility", "world-aesthetics": "aesthetics"}[s.reward]
        parts = [oracle.score(prompts[i:i + BATCH], report.read_pictures("", images[i:i + BATCH]))[name] for i in starts]
        return torch.cat(parts)
    from lib import scorers
    weights = dict(part.split("=", 1) for part in s.score_weights.split(",") if "=" in part)
    scorer = scorers.load_scorer(s.reward, weights.get(s.reward, ""), str(models.device_of(s)), models.dtype_of(s))
    return torch.tensor([value for i in starts for value in scorer(
        prompts[i:i + BATCH], [open_image(image, s.run, i) for image in images[i:i + BATCH]])])

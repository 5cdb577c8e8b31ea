"""A reward from outside, for the rival row "online DPO": the only way in which a score of stage 05 can rank candidates.

Nothing of SAIL itself comes in here: stage 03 imports this room only when --reward names something else than `implicit`.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from lib import models, report
from lib.run import open_image
from lib.settings import Settings

BATCH = 64


def score(s: Settings, prompts: list[str], images: list[Path]) -> torch.Tensor:
    """(n,) scores of images under their prompts: the embedded world's utility (`world`) or aesthetics
    (`world-aesthetics`), or one of lib.scorers."""
    state = PartialState()
    if s.reward.startswith("world"):
        from lib import oracle
        name = {"world": "utility", "world-aesthetics": "aesthetics"}[s.reward]
        scorer = lambda part: oracle.score(prompts[part], report.read_pictures("", images[part]))[name].tolist()
    else:
        from lib import scorers
        weights = dict(part.split("=", 1) for part in s.score_weights.split(",") if "=" in part)
        score = scorers.load_scorer(s.reward, weights.get(s.reward, ""), str(models.device_of(s)), models.dtype_of(s))
        scorer = lambda part: score(prompts[part], [open_image(image, s.run, image.name) for image in images[part]])
    starts = range(0, len(images), BATCH)[state.process_index::state.num_processes]           # processes take turns
    found = [(i, scorer(slice(i, i + BATCH))) for i in tqdm(starts, desc=f"{s.reward} ranks", unit="batch",
                                                            disable=not state.is_local_main_process)]
    return torch.tensor([value for _, part in sorted(gather_object(found)) for value in part])

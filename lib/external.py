"""A reward from outside, for the rival row "online DPO": the only way in which a score of stage 05 can rank candidates.

Nothing of SAIL itself comes in here: stage 03 imports this room only when --reward names something else than `implicit`.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from lib.run import open_image
from lib.scoring import load
from lib.settings import Settings

BATCH = 64
WORLD = {"world": "utility", "world-aesthetics": "aesthetics"}          # --reward: a score of the embedded world


def score(s: Settings, prompts: list[str], images: list[Path]) -> torch.Tensor:
    """(n,) scores of images under their prompts: the embedded world's utility (`world`) or aesthetics
    (`world-aesthetics`), or one of lib.scorers."""
    state, scorer = PartialState(), load(s, "world" if s.reward in WORLD else s.reward)
    starts = range(0, len(images), BATCH)[state.process_index::state.num_processes]           # processes take turns
    found = []
    for i in tqdm(starts, desc=f"{s.reward} ranks", unit="batch", disable=not state.is_local_main_process):
        pictures = [open_image(image, s.run, image.name) for image in images[i:i + BATCH]]
        found.append((i, scorer(prompts[i:i + BATCH], pictures)[WORLD.get(s.reward, s.reward)]))
    return torch.tensor([value for _, part in sorted(gather_object(found)) for value in part])

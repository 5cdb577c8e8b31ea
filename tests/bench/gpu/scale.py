"""How large everything is: the real models on a card, or small ones in a rehearsal on a CPU."""

import functools
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.plan.probe import seconds_of
from lib.settings import PRESETS, Settings
from tests.bench.bench_paths import make_pipeline


# A rehearsal's models have these parts of the widths, and few layers.
REHEARSAL_DIVIDE = 8


@dataclass(frozen=True)
class Scale:
    """What all steps are told."""

    rehearse: bool
    out: Path
    card: str

    @property
    def device(self) -> str:
        """The device that is compared with the CPU, and measured."""
        if self.rehearse:
            return "cpu"
        return "cuda"

    @property
    def budget(self) -> float:
        """Seconds in which a measurement begins a further repeat."""
        if self.rehearse:
            return 0.
        return 4.

    @property
    def compile_options(self) -> dict:
        """A rehearsal traces the model, and generates no code."""
        if self.rehearse:
            return {"backend": "eager"}
        return {}

    def resolution(self, preset: str) -> int:
        if self.rehearse:
            return 64
        return PRESETS[preset]["resolution"]

    def batches(self, preset: str, setting: str) -> list[int]:
        """The preset's own batch first, then half and twice as much."""
        own = PRESETS[preset][setting]
        if self.rehearse:
            return [2]
        return [own, own // 2, own * 2]

    def settings(self, preset: str, run: Path, **changes) -> Settings:
        """The preset's settings with the model of `model_of`, for short measurements."""
        values = PRESETS[preset] | {
            "model": str(model_of(self, preset)),
            "vae": "",
            "run": str(run),
            "resolution": self.resolution(preset),
            "device": self.device,
            "compile": "off",
            "flip": 0.,
        }
        if self.rehearse:
            values |= {"candidates": 2, "draws": 2}
        return Settings(**values | changes)

    def fresh(self, name: str) -> Path:
        """A folder that is empty."""
        folder = self.out / "work" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


@functools.cache
def model_of(scale: Scale, preset: str) -> Path:
    """A pipeline of random weights of the preset's architecture, written once."""
    folder = scale.out / "models" / preset
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        if scale.rehearse:
            make_pipeline(unfinished, preset, REHEARSAL_DIVIDE, shallow=True)
        else:
            make_pipeline(unfinished, preset, 1, scale.device, torch.bfloat16)
        unfinished.rename(folder)
    return folder


def middle_seconds(work, device: torch.device, budget: float) -> tuple[float, float]:
    """Seconds of a call, the median of as many as the budget has, and of the first call.

    The first one is not in the median: it compiles, chooses kernels and fills caches.
    """
    first = seconds_of(work, device)
    taken = [seconds_of(work, device)]
    while sum(taken) < budget:
        taken.append(seconds_of(work, device))
    return statistics.median(taken), first

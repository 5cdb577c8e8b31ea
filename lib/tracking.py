"""Live curves of a run (--track tensorboard or wandb), through accelerate's trackers.

They are off by default.

    train/   stage 04's log, one point per optimizer step, counted on through the rounds
    judge/   stage 03's self-judge, one point per round, and the sheet of its pairs
    eval/    stage 05's means, one point per model (0 is Iter0), and the sheet of samples

TensorBoard's files lie in <run>/tracking. A run that goes on continues its curves. Nothing here is
needed for a result, and neither package is installed with the project.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from lib.run import PICTURE_FORMATS, is_main, seed_of
from lib.settings import Settings

# What stands on the x axis of each group of curves.
AXES = {"train": "optimizer step", "judge": "round", "eval": "round"}


def start(s: Settings, group: str, first: int):
    """A tracker for a group of curves whose points from `first` on are about to come.

    It is None where nothing is tracked: --track is off, or another process does it.
    """
    if s.track == "off" or not is_main():
        return None

    from accelerate.tracking import TensorBoardTracker, WandBTracker
    folder = Path(s.run) / "tracking"
    if s.track == "tensorboard":
        # A stopped stage draws some points again: those that stand from `first` on are discarded.
        tracker = TensorBoardTracker(group, folder, purge_step=first)
    else:
        # One wandb run for all stages, which every stage takes up again. The run's folder names it.
        folder.mkdir(parents=True, exist_ok=True)
        place = str(Path(s.run).resolve())
        identity = f"{seed_of(place):016x}"
        tracker = WandBTracker("sail", id=identity, resume="allow", name=Path(s.run).name,
                               dir=folder)

    tracker.start()

    # wandb takes its own count of calls for the x axis, unless it is told.
    if s.track == "wandb":
        tracker.tracker.define_metric(f"{group}/*", step_metric=AXES[group])
    return tracker


def log(tracker, group: str, values: dict[str, float], x: int, sheet: Path | None = None) -> None:
    """One point at `x` of each curve, and perhaps a sheet of pictures."""
    if tracker is None:
        return

    # A curve has numbers only: no text, no missing value, and not the x axis itself.
    points = {}
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and np.isfinite(value)
        if is_number and name != "step":
            points[f"{group}/{name}"] = value

    # TensorBoard has steps of its own; wandb's must not go back, so that x is one more value there.
    step = x
    if tracker.name == "wandb":
        points[AXES[group]] = x
        step = None
    tracker.log(points, step=step)

    # A preview that was not made is not missed.
    if sheet is not None and sheet.exists():
        log_sheet(tracker, f"{group}/{sheet.stem}", sheet, step)


def log_sheet(tracker, name: str, sheet: Path, step: int | None) -> None:
    """A sheet of pictures at a step."""
    from PIL import Image
    with Image.open(sheet, formats=PICTURE_FORMATS) as picture:
        pixels = np.asarray(picture.convert("RGB"))

    # TensorBoard wants a batch (1, H, W, 3), wandb a list.
    if tracker.name == "tensorboard":
        tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({name: [pixels]}, step=step)


def finish(tracker) -> None:
    """Write what is still in memory, and close the tracker."""
    if tracker is not None:
        tracker.finish()


# ---- what the stages say ----

def steps_before(s: Settings, k: int) -> int:
    """Optimizer steps of Iter0 and of the rounds before k, as their logs have them."""
    steps = 0
    for earlier in range(k):
        log = Path(s.run) / f"iter{earlier}" / "train_log.parquet"
        if log.exists():
            steps += len(pd.read_parquet(log, columns=["step"]))
    return steps


def log_judge(s: Settings, k: int, judge: dict, sheet: Path) -> None:
    """Stage 03: the self-judge of round k."""
    tracker = start(s, "judge", k)
    log(tracker, "judge", judge, k, sheet)
    finish(tracker)


def log_evaluation(s: Settings, summary: pd.DataFrame, sheet: Path) -> None:
    """Stage 05: the mean of every score, model by model of the run; the base has no round."""
    tracker = start(s, "eval", 0)
    whole = summary[summary["style"] == ""]
    for k in range(s.iters + 1):
        means = {}
        for row in whole[whole["model"] == f"Iter{k}"].to_dict("records"):
            means[f"{row['benchmark']} {row['score']}"] = row["mean"]
        if means:
            log(tracker, "eval", means, k)

    # The sheet shows all models and stands at the last one.
    log(tracker, "eval", {}, s.iters, sheet)
    finish(tracker)

"""A small run of sd15 or sdxl through all five stages, beside what `--plan` says that it costs.

The model has the real architecture, and random weights; pairs and prompts are made on the spot.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from lib import settings
from lib.plan import probe, report
from tests.bench.bench_paths import make_pictures
from tests.bench.gpu.apart import new_process
from tests.bench.gpu.results import Results
from tests.bench.gpu.scale import Scale, model_of
from tests.bench.gpu.trained import stage

# Settings of the run; 100 held-out pairs are as many as need no further judges (lib/crossfit.py).
FULL = {
    "sd15": {"seed_pairs": 128, "holdout_pairs": 100, "iter_prompts": 64, "draws": 5,
             "sample_steps": 15, "batch": 32, "iter0_steps": 4, "iter_steps": 4},
    "sdxl": {"seed_pairs": 32, "holdout_pairs": 100, "iter_prompts": 16, "draws": 2,
             "candidates": 4, "sample_steps": 5, "batch": 16, "iter0_steps": 2, "iter_steps": 2},
}
REHEARSAL = {"seed_pairs": 4, "holdout_pairs": 2, "iter_prompts": 2, "candidates": 2, "draws": 2,
             "sample_steps": 2, "batch": 2, "iter0_steps": 1, "iter_steps": 1}


def run_miniature(scale: Scale, results: Results, preset: str) -> None:
    """The steps d-sd15 and d-sdxl."""
    folder = scale.fresh("miniature")
    values = FULL[preset]
    if scale.rehearse:
        values = REHEARSAL
    make_own(folder, values, scale.resolution(preset))
    in_process(scale, model_of, (scale, preset))

    run = folder / "run"
    stage(scale, "01", run, *arguments_of(scale, preset, folder, values))
    in_process(scale, make_plan, (scale, run))
    stage(scale, "04", run, "--iter", "0")
    stage(scale, "02", run, "--iter", "1")
    stage(scale, "03", run, "--iter", "1")
    stage(scale, "04", run, "--iter", "1")
    stage(scale, "05", run)
    tell_costs(results, run)
    tell_health(results, run)


def in_process(scale: Scale, function, arguments: tuple) -> None:
    """What takes the card's memory does so in a process that ends."""
    process = new_process(scale.rehearse, function, arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")


def arguments_of(scale: Scale, preset: str, folder: Path, values: dict) -> list[str]:
    """Stage 01's command line."""
    own = folder / "own"
    given = {
        "preset": preset,
        "model": scale.out / "models" / preset,
        "vae": "",
        "resolution": scale.resolution(preset),
        "pairs": own / "pairs.csv",
        "prompts": own / "prompts.txt",
        "eval_prompts": own / "eval.txt",
        "iters": 1,
        "scores": "none",
        "device": scale.device,
        "compile": "off",
    }
    return [f"{settings.flag(name)}={value}" for name, value in (given | values).items()]


def make_own(folder: Path, values: dict, resolution: int) -> None:
    """Pairs of made-up pictures, and prompts."""
    own = folder / "own"
    own.mkdir()
    count = values["seed_pairs"] + values["holdout_pairs"]
    lines = ["prompt,win,lose"]
    lines += [f"a thing number {i},p/{i}w.jpg,p/{i}l.jpg" for i in range(count)]
    (own / "pairs.csv").write_text("\n".join(lines) + "\n")
    names = [f"{i}{side}.jpg" for i in range(count) for side in "wl"]
    make_pictures([own / "p" / name for name in names], resolution)

    prompts = [f"a new thing number {i}\n" for i in range(values["iter_prompts"])]
    (own / "prompts.txt").write_text("".join(prompts))
    (own / "eval.txt").write_text("".join(f"another thing number {i}\n" for i in range(4)))


def make_plan(scale: Scale, run: Path) -> None:
    """What --plan says of the run, beside it."""
    if scale.rehearse:
        probe.REPEATS = 1
    s, _ = settings.load([f"--run={run}"], "")
    table, _, _ = report.plan(s, 1)
    table.to_parquet(run.with_name("plan.parquet"))


def tell_costs(results: Results, run: Path) -> None:
    """Seconds and peak memory of each stage and round, beside the plan's."""
    plan = pd.read_parquet(run.with_name("plan.parquet"))
    ledger = pd.read_parquet(run / "ledger.parquet")
    for row in ledger.itertuples():
        planned = plan[(plan.stage == row.stage) & (plan.iter.fillna(-1) == row_iter(row))]
        planned = planned.iloc[0]
        name = row.stage
        if not pd.isna(row.iter):
            name = f"{row.stage}, iter {row.iter}"

        results.add(f"{name}: seconds", row.seconds, "s",
                    f"plan: {3600 * planned.hours:.3g}, without loading and files; "
                    f"{row.unet_forwards} forwards")
        results.add(f"{name}: peak memory", row.peak_memory_bytes / 1e9, "GB",
                    f"plan: {planned.device_bytes / 1e9:.3g}")


def row_iter(row) -> int:
    """The round; stages 01 and 05 have none."""
    if pd.isna(row.iter):
        return -1
    return row.iter


def tell_health(results: Results, run: Path) -> None:
    """That what came out is a run: numbers that are finite, pictures that are pictures."""
    for k in (0, 1):
        log = pd.read_parquet(run / f"iter{k}/train_log.parquet")
        results.check(f"Iter{k}: first loss less log 2", abs(log.loss[0] - np.log(2)), 1e-3,
                      "the policy is its reference")
    rewards = pd.read_parquet(run / "iter1/rewards.parquet").reward
    results.check("rewards that are not finite", int((~np.isfinite(rewards)).sum()), 0, "none")
    candidates = pd.read_parquet(run / "iter1/candidates.parquet")
    spread = [np.asarray(Image.open(run / image)).std() for image in candidates.image[:4]]
    results.check("pictures of one colour", sum(size == 0 for size in spread), 0, "none")

"""What each stage of a finished run took, beside its floor: the UNet arithmetic alone, at the best
batch measured here.

    python -m tests.bench.bench_stages runs/tiny

A training step counts 4 forwards of its batch (policy and reference, winners and losers) and the
policy's backward as 2 more of its 2. Nothing else is in the floor: no text encoder, VAE, oracle,
files, nor the start of a Python process.
"""

import functools
import sys
from pathlib import Path

import pandas as pd
import torch

from lib import diffusion, models, settings
from lib.eval.table import cost
from lib.plan.architecture import architecture_of, random_inputs
from lib.plan.probe import seconds_of

BATCHES = (32, 64, 128, 256, 512)
REPEATS = 3


@torch.no_grad()
def best_forward(s: settings.Settings) -> tuple[float, int]:
    """Seconds of a latent's forward at the best of BATCHES, and which that is."""
    unet, device = models.load_unet(s, models.BASE), models.device_of(s)
    architecture = architecture_of(s)
    side = s.resolution // architecture.factor

    times = []
    for batch in BATCHES:
        given = random_inputs(unet, architecture.tokens, side, batch, device)
        forward = functools.partial(diffusion.predict, unet, *given)
        forward()                                           # a first call is not measured
        seconds = min(seconds_of(forward, device) for _ in range(REPEATS))
        times.append((seconds / batch, batch))
    return min(times)


def stages_beside_floor(run: Path, seconds_of_forward: float) -> pd.DataFrame:
    """The run's ledger with each stage's floor and its share of the seconds, and a row for all."""
    table = cost(run)

    # Of the 4 forwards of a pair 2 have a backward, which costs 4 more.
    times = table.stage.map({"04_train_dpo": 2}).fillna(1)
    table["floor"] = table.unet_forwards * times * seconds_of_forward

    total = table[["seconds", "unet_forwards", "floor"]].sum().to_dict()
    table = pd.concat([table, pd.DataFrame([{"stage": "all", **total}])])
    table["share"] = table.floor / table.seconds
    return table[["stage", "iter", "seconds", "unet_forwards", "floor", "share"]]


def main(run: Path) -> None:
    s, _ = settings.load(["--run", str(run)], "")
    seconds, batch = best_forward(s)
    print(f"{settings.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{seconds * 1e3:.2f} ms per UNet forward at batch {batch}")
    print(stages_beside_floor(run, seconds).round(2).to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))

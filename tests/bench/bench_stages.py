"""What each stage of a finished run took, beside its floor: the UNet arithmetic alone, at the best batch measured here.

    python -m tests.bench.bench_stages runs/tiny

A training step counts 4 forwards of its batch (policy and reference, winners and losers) and the policy's backward as
2 more of its 2. Nothing else is in the floor: no text encoder, VAE, oracle, files, nor the start of a Python process.
"""

import sys
import time
from pathlib import Path

import pandas as pd
import torch

from lib import models, report, settings


def forward_seconds(unet, channels: int, tokens: tuple[int, int], batch: int, repeats: int = 3) -> float:
    """Best time of one image's forward within a batch."""
    latents, embeds = torch.randn(batch, channels, 8, 8), torch.randn(batch, *tokens)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            models.predict(unet, latents, torch.full((batch,), 500), {"embeds": embeds})
            times.append(time.perf_counter() - started)
    return min(times[1:]) / batch


def main(run: Path) -> None:
    s, _ = settings.load(["--run", str(run)], "")
    unet = models.load_unet(s, -1)
    best = min((forward_seconds(unet, unet.config.in_channels, (12, 64), batch), batch)
               for batch in (32, 64, 128, 256, 512))
    cost = report.cost(run)
    training = cost.stage == "04_train_dpo"
    forwards = cost.unet_forwards * training.map({True: 2, False: 1})          # 4 forwards + a backward worth 4
    cost["floor"] = forwards * best[0]
    cost["share"] = cost.floor / cost.seconds
    print(f"{settings.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
          f"{best[0] * 1e3:.2f} ms per UNet forward at batch {best[1]}")
    columns = ["stage", "iter", "seconds", "unet_forwards", "floor", "share"]
    whole = cost[["seconds", "unet_forwards", "floor"]].sum().to_dict()
    whole |= {"stage": "all", "share": whole["floor"] / whole["seconds"]}
    print(pd.concat([cost[columns], pd.DataFrame([whole])]).round(2).to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))

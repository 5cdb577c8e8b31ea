"""Draw the pictures of a labelling folder, while the first of them are being labelled.

reads   config.json, shown.parquet, the model
writes  images/<pair_id>_a.png, images/<pair_id>_b.png, and their latents in latents/

lib/taste/label.py starts it, and it ends with the program that started it. A picture's noise
depends on run seed, pair and side alone.

    python -m lib.taste.draw --run runs/taste
"""

import lib.program  # noqa: F401, I001  first: a signal is answered from here on
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd

from lib import models
from lib.lock import hold, remove_temporary_files
from lib.models import BASE
from lib.run import Ledger, UserError, read_table, run_stage, seed_of
from lib.sampler import paint
from lib.settings import Settings, load
from lib.taste.showings import PAIR_COLUMNS

# Pairs drawn at first, so that a person has something to look at; a batch takes as long as it is
# large.
AT_FIRST = (1, 3, 8)


def end_with_parent() -> None:
    """End this process when standard input is closed, which the parent holds open until it ends."""
    def wait():
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def wait_for_turn(run: Path) -> None:
    """Lock the folder; while another labeller's drawing has it, that one draws for both."""
    told = False
    while True:
        try:
            hold(run, __file__)
            break
        except UserError as error:
            if not told:
                print(f"drawing waits: {error}", flush=True)
            told = True
            time.sleep(1)
    for folder in ("images", "latents"):
        if (run / folder).is_dir():
            remove_temporary_files(run / folder)


def drawing_jobs(s: Settings, pairs: pd.DataFrame) -> pd.DataFrame:
    """What is still to be drawn: prompt, seed and image of each picture that is not there."""
    jobs = []
    for pair in pairs.itertuples():
        for side, image in (("a", pair.a), ("b", pair.b)):
            if not (Path(s.run) / image).exists():
                jobs.append({
                    "prompt": pair.prompt,
                    "seed": seed_of(s.seed, "taste", pair.pair_id, side),
                    "image": image,
                })
    return pd.DataFrame(jobs, columns=["prompt", "seed", "image"])


def main(argv: list[str]) -> None:
    s, _ = load(argv, __doc__)
    wait_for_turn(Path(s.run))
    columns = (*PAIR_COLUMNS, "source")
    pairs = read_table(Path(s.run) / "shown.parquet", columns, "./run_sail.sh label")
    pairs = pairs[pairs.source == "drawn"]                          # not a person's own
    jobs = drawing_jobs(s, pairs)
    if jobs.empty:
        return

    with Ledger(s.run, "label", None, str(models.device_of(s))) as ledger:
        unet = models.load_unet(s, BASE)
        start = 0
        for count in (*AT_FIRST, len(pairs)):
            batch = jobs.iloc[start:start + 2 * count]
            start += 2 * count
            if len(batch):
                paint(s, BASE, batch, ledger, "pictures to label", keep_latents=True, unet=unet)


if __name__ == "__main__":
    if not sys.stdin.isatty():
        end_with_parent()
    run_stage(main)

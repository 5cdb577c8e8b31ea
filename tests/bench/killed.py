"""A run that is killed, and killed again, ends as one that was left alone.

It takes half a minute, and is no part of the suite: .ci/run starts it.

    tests/run.sh tests/bench/killed.py
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
from conftest import ENV, finish, same_tensors, weights_of
from test_run import TABLES, command


def same_results(one: Path, two: Path) -> None:
    """All tables, but for the times in them, and all models are the same to the bit."""
    for name in TABLES:
        if name == "ledger.parquet":
            continue
        tables = []
        for run in (one, two):
            table = pd.read_parquet(run / name).drop(columns="seconds", errors="ignore")
            if name == "eval/scores.parquet":
                # The folder of a model's pictures bears a hash of its files' times.
                table["image"] = table.image.str.replace(r"-\w{8}/", "/", regex=True)
            tables.append(table)
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    for k in range(3):
        assert same_tensors(weights_of(one, k), weights_of(two, k))


def kill_when(moment, run: Path) -> None:
    """Start the driver, and kill -9 it and all its processes when `moment()` is true."""
    process = subprocess.Popen(command(run), env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while not moment():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_again_and_again_ends_the_same(mini, tmp_path):
    """Once in a stage that samples, and once in one that trains."""
    run = tmp_path / "mini"
    kill_when(lambda: len(list(run.glob("seed/images/*.png"))) > 3, run)
    assert not (run / "prompts.parquet").exists()
    kill_when(lambda: (run / "iter0/checkpoint.pt").exists(), run)
    assert not (run / "iter0/unet").exists()
    finish(run)
    same_results(mini, run)

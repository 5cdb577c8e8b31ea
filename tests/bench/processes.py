"""A run of two processes, as several GPUs make it, beside one of a single process.

It takes half a minute, and is no part of the suite: .ci/run starts it.

    tests/run.sh tests/bench/processes.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ENV, MINI, ROOT, UNET_FILE, weights_of
from safetensors.torch import load_file

LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from conftest import stage
from lib.run import run_stage

def main(argv):
    for line in {stages!r}:
        number, *given = line.split()
        stage(number).main(["--run", argv[0], *given])
        PartialState().wait_for_everyone()
    print(f"process {{PartialState().process_index}} of {{PartialState().num_processes}}")

run_stage(main)
"""


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """A run up to round 1 as `accelerate launch` makes it, here on the CPU, in smaller batches."""
    folder = tmp_path_factory.mktemp("processes")
    smaller = ["--sample-batch", "5", "--rank-batch", "12", "--micro-batch", "1"]
    first = " ".join(["01", *MINI, *smaller])
    stages = [first, "04 --iter 0", "02 --iter 1", "03 --iter 1", "04 --iter 1", "05"]
    script = folder / "launched.py"
    script.write_text(LAUNCHED.format(tests=str(ROOT / "tests"), stages=stages))

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    done = subprocess.run([*launch, script, folder / "run"], env=ENV | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1 of 2" in done.stdout
    return folder / "run"


def both(mini: Path, of_two: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_parquet(mini / name), pd.read_parquet(of_two / name)


@pytest.mark.parametrize("name", [
    "seed/pairs.parquet", "seed/holdout.parquet", "prompts.parquet", "iter1/candidates.parquet"])
def test_two_processes_ask_for_the_same(mini, of_two, name):
    pd.testing.assert_frame_equal(*both(mini, of_two, name))


def test_two_processes_draw_the_same_timesteps(mini, of_two):
    one, two = both(mini, of_two, "iter1/draws.parquet")
    same = ["prompt_id", "candidate", "draw", "t"]
    pd.testing.assert_frame_equal(one[same], two[same])


def test_two_processes_give_the_same_rewards_and_pairs(mini, of_two):
    one, two = both(mini, of_two, "iter1/rewards.parquet")
    np.testing.assert_allclose(one.reward, two.reward, atol=.01 * one.reward.std())
    one, two = both(mini, of_two, "iter1/pairs.parquet")
    pd.testing.assert_frame_equal(one.drop(columns="margin"), two.drop(columns="margin"))


@pytest.mark.parametrize("k", [0, 1])
def test_two_processes_train_the_same_model(mini, of_two, k):
    """To the rounding of a sum in another order, measured by what training changed."""
    one, two = both(mini, of_two, f"iter{k}/train_log.parquet")
    columns = ["loss", "margin", "grad_norm"]
    np.testing.assert_allclose(one[columns], two[columns], rtol=.01, atol=.01)

    base = load_file(ROOT / "lib/world/base/unet" / UNET_FILE)
    one, two = weights_of(mini, k), weights_of(of_two, k)
    changed = difference = 0.
    for name in base:
        changed += (one[name] - base[name].float()).square().sum()
        difference += (one[name] - two[name]).square().sum()
    assert difference.sqrt() < .01 * changed.sqrt()


def test_two_processes_score_the_same(mini, of_two):
    one, two = both(mini, of_two, "eval/scores.parquet")
    one = one[one.model != "Iter2"].reset_index(drop=True)
    same = ["model", "prompt", "seed"]
    pd.testing.assert_frame_equal(one[same], two[same])
    np.testing.assert_allclose(one.utility, two.utility, atol=.05)


def test_the_ledger_counts_the_work_of_both_processes(mini, of_two):
    one, two = both(mini, of_two, "ledger.parquet")
    columns = ["stage", "iter", "images", "unet_forwards", "optimizer_steps"]
    to_round_1 = (one.iter.fillna(0) < 2) & (one.stage != "05_eval")
    one = one[to_round_1].reset_index(drop=True)
    pd.testing.assert_frame_equal(one[columns], two[columns][:-1])

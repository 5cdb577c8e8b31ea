"""tests/bench/gpu.sh, rehearsed on the CPU: not a minute of a GPU is to be spent on a slip.

It takes a minute or two, and is no part of the suite: .ci/run starts it.

    tests/run.sh tests/bench/rehearsal.py
"""

import subprocess
from pathlib import Path

import pytest
from conftest import ENV, ROOT

from tests.bench.gpu import __main__ as command
from tests.bench.gpu.results import DONE, read_lines, status_of

# A part of the name of each kind of measurement, and how many lines have it at least.
KINDS = {
    "denoising error, float32": 2,
    "gradient of the error, bfloat16": 1,
    "winners and losers that differ": 3,
    "picture, bfloat16": 1,
    "score hpsv2, float32": 1,
    "score imagereward, bfloat16": 1,
    "score pickscore, bfloat16": 1,
    "score aesthetics, float32": 1,
    "adapter off against the base": 2,
    "stopped and continued": 1,
    "tests on the card: passed": 1,
    "tests in this environment, on the CPU: passed": 1,
    "world, 04_train_dpo": 1,
    "world, Iter1 over base": 1,
    "world, bfloat16 for float32": 1,
    "matrix product": 2,
    "training, micro-batch": 2,
    "ranking, 2 draws, batch": 2,
    "sampling, 2 steps, batch": 2,
    "VAE encode": 2,
    "VAE decode": 2,
    "forward: channels_last": 1,
    "forward: torch.compile of the whole": 1,
    "training: torch.compile of the blocks": 1,
    "VAE decode, 2 at once: channels_last": 1,
    "world, the whole command": 1,
    "optimizer: AdamW, fused": 1,
    "ours over plain": 4,
    "03_rank, iter 1: seconds": 2,
    "04_train_dpo, iter 0: peak memory": 2,
    "of two processes, distance": 1,
}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """The --out folder of a rehearsal of all steps."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = subprocess.run(["bash", ROOT / "tests/bench/gpu.sh", "--rehearse", "--out", out],
                          env=ENV | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def test_every_step_ends_well_and_every_value_keeps_its_limit(rehearsal):
    lines = read_lines(rehearsal)
    names = {step.name for step in command.STEPS} - command.NOT_REHEARSED
    assert status_of(lines) == dict.fromkeys(names, DONE)
    assert command.faults(lines) == []
    assert all(line["value"] is not None for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_a_line_for_every_kind(rehearsal, kind):
    rows = (rehearsal / "results.md").read_text().splitlines()
    assert sum(kind in row for row in rows) >= KINDS[kind]

"""The steps of tests/bench/gpu.sh: one that fails leaves the others alone (the rehearsal of all of
them is tests/bench/rehearsal.py)."""

import functools
import time
from pathlib import Path

import pytest

from tests.bench.gpu import __main__ as command
from tests.bench.gpu.results import DONE, STATUS, read_lines, status_of


# ---- steps that fail ----

def end_well(scale, results):
    results.add("a value", 1.)


def fail(scale, results):
    results.add("a value before", 1.)
    raise ValueError("broken")


def take_too_long(scale, results):
    time.sleep(60)


@pytest.fixture
def steps(monkeypatch):
    """Three steps, of which one fails and one is slow."""
    three = [command.Step("a", fail, 20), command.Step("b", take_too_long, .5),
             command.Step("c", end_well, 20)]
    monkeypatch.setattr(command, "STEPS", three)


def seconds_of_steps(out: Path) -> dict[str, float]:
    return {line["step"]: line["value"] for line in read_lines(out) if line["name"] == STATUS}


def test_a_step_that_fails_or_is_late_leaves_the_next_ones_alone(steps, tmp_path):
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert status_of(read_lines(tmp_path)) == {
        "a": "failed with exit code 1, see a.log", "b": "over time", "c": DONE}
    assert "| a | a value before | 1 |" in (tmp_path / "results.md").read_text()


def test_the_same_command_takes_again_only_what_has_failed(steps, tmp_path):
    run = functools.partial(command.main, ["--rehearse", "--out", str(tmp_path)])
    run()
    before = seconds_of_steps(tmp_path)
    run()
    after = seconds_of_steps(tmp_path)
    assert after["c"] == before["c"]
    assert after["a"] != before["a"]
    assert len([line for line in read_lines(tmp_path) if line["step"] == "a"]) == 2


def test_no_step_begins_that_has_no_time_left(steps, tmp_path):
    command.main(["--rehearse", "--out", str(tmp_path), "--minutes", "0.1", "--only", "a,c"])
    assert read_lines(tmp_path) == []


def test_without_a_card_it_says_how_to_rehearse(capsys, tmp_path):
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().err

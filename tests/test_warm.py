"""lib/warm.py: a script that it forks ends as it would have ended alone."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {
    "done": ("import sys; print('given', sys.argv[1:])", 0),
    "refused": ("import sys; sys.exit(2)", 2),
    "told": ("import sys; sys.exit('a text')", 1),
    "broken": ("1 / 0", 1),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
    "after": ("import lib.models; print('goes on')", 0),
    "forked": ("import sys; print('torch is there:', 'torch' in sys.modules)", 0),
    # SIGTERM of the driver is for the stage, and then nothing more begins.
    "stopped": ("import os, signal, time\n"
                "os.kill(os.getppid(), signal.SIGTERM)\n"
                "time.sleep(60)", 143),
}
NEVER = ("print('goes on after its end')", 0)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """(what was printed, the exit codes) of all scripts in one warm process."""
    folder = tmp_path_factory.mktemp("warm")
    lines = ""
    for name, (code, _) in (*SCRIPTS.items(), ("never", NEVER)):
        (folder / f"{name}.py").write_text(code)
        lines += f"{folder}/{name}.py\n--run\na b\n\n"

    # The codes come on file descriptor 3, as the driver reads them.
    command = f'exec "{sys.executable}" -m lib.warm 3> "{folder}/codes"'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)       # as a user has it
    done = subprocess.run(["bash", "-c", command], input=lines, env=environment,
                          capture_output=True, text=True)
    return done.stdout, [int(code) for code in (folder / "codes").read_text().split()]


def test_a_script_has_the_exit_code_that_it_would_have_alone(warm):
    assert warm[1] == [code for _, code in SCRIPTS.values()]


def test_a_script_gets_its_arguments_whole(warm):
    assert "given ['--run', 'a b']" in warm[0]


def test_a_script_finds_the_libraries_imported(warm):
    """Also where there is no card, and torch had to ask CUDA for it."""
    assert "torch is there: True" in warm[0]


def test_a_killed_script_leaves_the_next_one_alone(warm):
    assert "goes on" in warm[0]


def test_a_driver_that_is_stopped_stops_its_stage_alone(warm):
    """By a line of the stage, and no further stage."""
    assert "after its end" not in warm[0]


def test_where_cuda_was_begun_a_stage_gets_a_python_of_its_own(monkeypatch):
    from lib import warm as program
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    started = []

    def execv(path, words):
        started.extend([path, *words])
        raise SystemExit(7)

    monkeypatch.setattr(program, "CARD", True)
    monkeypatch.setattr(program.torch.cuda, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(program, "answer_with", lambda handler: None)
    monkeypatch.setattr(os, "close", lambda number: None)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit, match="7"):
        program.in_child("02_generate.py", ["--iter", "1"])
    assert started == [sys.executable, sys.executable, "02_generate.py", "--iter", "1"]

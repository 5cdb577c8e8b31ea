"""One Python that has imported the libraries already, and forks a process for each stage of a run.

Importing torch and diffusers takes some four seconds, which a stage of the embedded world hardly
takes itself. The driver starts this program once, on Linux, and writes the script and its arguments
for each stage: one a line, and an empty line. The stage runs in a process of its own, as if it had
been started alone; its exit code comes back on file descriptor 3.

    python -m lib.warm <stages 3>codes
"""

import contextlib
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

# What every stage imports. Nothing is computed here: torch's threads start with the first
# computation, and a process that has them must not fork. Nor is CUDA begun, which no forked process
# could use: to learn whether there is a card, torch asks NVML.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
import torch

import lib.models  # noqa: F401
from lib.code import with_imports
from lib.program import answer_with, end_at_once

CARD = torch.cuda.is_available()

# A stage asks as it would alone.
del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]

# The stage that is at work, and the exit code where this process is to end after it.
child = 0
stopping = 0


def run_script(script: str, arguments: list[str]) -> int:
    """Run a script as the main program; return its exit code."""
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        # As Python itself takes what sys.exit is given: nothing is success, a text is a failure.
        if stop.code is None:
            return 0
        if isinstance(stop.code, int):
            return stop.code
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def in_child(script: str, arguments: list[str]) -> None:
    """The life of a forked process: a stage, which signals may end."""
    answer_with(end_at_once)

    # Only the parent tells exit codes.
    os.close(3)

    # Where CUDA was begun all the same, since there is no NVML, the stage gets a Python of its own.
    if CARD and torch.cuda._is_in_bad_fork():
        os.execv(sys.executable, [sys.executable, script, *arguments])
    code = run_script(script, arguments)

    # The process ends here, without what the parent has registered for its own end.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hand_on(number: int, frame) -> None:
    """SIGTERM of the driver: the stage ends, and then this process."""
    global stopping
    stopping = 128 + number
    if child == 0:
        sys.exit(stopping)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def main() -> None:
    """Read stages from standard input; run each, and tell its exit code."""
    global child

    # The ledger's fingerprints are of the code that is imported here, also where it is edited while
    # the run goes on.
    with_imports(Path(__file__).resolve())

    # Ctrl-C is for the stage. This process ends with the driver, which then writes no more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    # Newer Pythons warn of threads at a fork. Those here are of libraries that know how to fork.
    warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)

    words = []
    for line in iter(sys.stdin.readline, ""):
        word = line.rstrip("\n")
        if word:
            words.append(word)
            continue

        # An empty line: script and arguments are complete. The driver may have been killed since.
        if "SAIL_DRIVER" in os.environ and str(os.getppid()) != os.environ["SAIL_DRIVER"]:
            return
        child = os.fork()
        if child == 0:
            in_child(words[0], words[1:])

        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:                                   # killed by a signal: as a shell tells it
            code = 128 - code
        try:
            os.write(3, f"{code}\n".encode())
        except BrokenPipeError:                        # the driver is gone already
            return
        child = 0
        if stopping:
            sys.exit(stopping)
        words = []


if __name__ == "__main__":
    main()

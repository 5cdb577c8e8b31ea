"""A function in a process of its own, with a time limit, so that nothing of it can end the rest.

On a GPU each process is a fresh Python: CUDA does not survive a fork, and the memory of the card is
whole again after each. A rehearsal forks them, which spares the imports.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lib.warm import run_script
from tests.bench.gpu.results import DONE

OVER_TIME = "over time"


def call_apart(function: Callable, arguments: tuple, fork: bool, limit: float, log: Path) -> str:
    """Call a function of a module; returns DONE, OVER_TIME, or in words that it failed.

    What it prints goes to the log. What it has started ends with it.
    """
    process = new_process(fork, begin_alone, (function, arguments, log))
    process.start()
    try:
        process.join(limit)
    finally:
        late = process.is_alive()
        stop_group(process.pid)
        process.join()
    if late:
        return OVER_TIME
    if process.exitcode == 0:
        return DONE
    return f"failed with exit code {process.exitcode}, see {log.name}"


def new_process(fork: bool, function: Callable, arguments: tuple) -> multiprocessing.Process:
    method = "fork" if fork else "spawn"
    return multiprocessing.get_context(method).Process(target=function, args=arguments)


def begin_alone(function: Callable, arguments: tuple, log: Path) -> None:
    """The life of such a process: a group of its own, and its output in the log."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)

    # What is imported by now need not be looked at whenever a model is freed.
    gc.freeze()
    function(*arguments)


def stop_group(leader: int) -> None:
    """End what a process has left behind."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


# ---- stages ----

def run_stage(fork: bool, script: Path, arguments: list[str], processes: int = 1) -> float:
    """Run a numbered script as its users do, also by several processes; returns its seconds.

    Several share the one card: NCCL refuses that, so they speak through gloo. RuntimeError: one
    has failed.
    """
    port = 20_000 + os.getpid() % 20_000
    started = time.perf_counter()
    running = []
    for rank in range(processes):
        given = (script, arguments, rank, processes, port)
        running.append(new_process(fork, stage_of_process, given))
    for process in running:
        process.start()
    for process in running:
        process.join()

    codes = [process.exitcode for process in running]
    if any(codes):
        raise RuntimeError(f"{script.name} {' '.join(arguments)} ended with {codes}")
    return time.perf_counter() - started


def stage_of_process(script: Path, arguments: list[str], rank: int, processes: int,
                     port: int) -> None:
    """A stage in this process, number `rank` of several.

    Each is the only one of its "machine", whose first card is the same.
    """
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        join_by_gloo(processes)
    sys.exit(run_script(str(script), arguments))


def join_by_gloo(processes: int) -> None:
    """Become one of several processes; the stage then finds that it is."""
    import torch
    from accelerate import PartialState
    state = PartialState(cpu=not torch.cuda.is_available(), backend="gloo")
    if state.num_processes != processes:
        raise RuntimeError(f"one of {state.num_processes} processes, not of {processes}")

"""One at a time works on a run folder.

The file <run>/.lock is locked by the driver, for as long as it or one of its stages lives, or by a
stage that is started by hand. The system takes the lock back when they have ended, however that
was. The text in the file says who has it. Across machines this holds as far as the file system
knows locks.

    python -m lib.lock <run> <command>     for the driver, which has <run>/.lock open as 7
"""

import fcntl
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

from lib.files import TEMPORARY, is_whole, is_whole_model
from lib.program import UserError, told_in_one_line

DRIVERS_DESCRIPTOR = 7

# A stage that was started by hand has its lock open here until its process ends.
_open = {}

# Where this project writes in a run folder, as patterns.
FOLDERS = ("code", "embeds", "embeds/*", "seed", "seed/*", "seed/*/*", "iter*", "iter*/*",
           "iter*/latents/*", "judge/*", "judge/*/*",
           "eval", "eval/*", "eval/images/*", "eval/scores/*", "eval/scores/*/*")

# Tables that say that a stage is done. (Of stage 04 it is the folder iter*/unet.)
TABLES = ("seed/pairs.parquet", "seed/holdout.parquet", "benchmarks.parquet", "prompts.parquet",
          "iter*/candidates.parquet", "iter*/pairs.parquet")

# Seconds that the stage of a driver that was killed is given to end by itself: it may be loading
# its libraries.
PATIENCE = 30


def check_folder(run: Path) -> None:
    """UserError if a run folder has a name that cannot be used, or another process works in it."""
    run = Path(run)
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", str(run)):
        raise UserError(f"--run {str(run)!r}: a folder's name may have no line breaks, control "
                        f"characters or bytes that are not UTF-8; give another --run")

    # A stage of the driver's may write: the driver has the lock.
    if not run.is_dir() or "SAIL_DRIVER" in os.environ or run.resolve() in _open:
        return
    descriptor = open_lock(run)
    try:
        take(descriptor, run)
    finally:
        os.close(descriptor)


def hold(run: Path, script: str) -> None:
    """Lock a run folder until this process ends, if a stage is its main program.

    A stage of the driver's has its lock; tests and the study, which call stages as functions, see
    to it themselves. UserError: another process works on the run.
    """
    run = Path(run).resolve()
    is_by_hand = Path(sys.argv[0]).resolve() == Path(script).resolve()
    if not is_by_hand or "SAIL_DRIVER" in os.environ or run in _open:
        return
    _open[run] = open_lock(run)
    begin(_open[run], run, " ".join(sys.argv))


def begin(descriptor: int, run: Path, command: str) -> None:
    """Lock a run folder by the open file of its lock, and tidy it up."""
    if not take(descriptor, run):
        print(f"{run}: this file system has no locks; see to it that only one command works on "
              f"this run folder", file=sys.stderr)
    sign(descriptor, command)
    tidy(run)


def open_lock(run: Path) -> int:
    """A file descriptor of <run>/.lock."""
    return os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)


def take(descriptor: int, run: Path) -> bool:
    """Lock an open file; False if its file system has no locks. UserError: another has it."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        except OSError:
            return False

        if not is_gone(holder) or time.monotonic() - start > PATIENCE:
            raise UserError(f"{run}: another command works on this run folder "
                            f"({holder or 'it has just begun'}); wait until it is done, stop it, "
                            f"or give another --run")
        time.sleep(.1)


def is_gone(holder: str) -> bool:
    """Whether the process that has signed a lock was one of this machine's, and has ended."""
    signed = re.match(r"process (\d+) on (\S+) since", holder)
    if signed is None or signed[2] != socket.gethostname():
        return False
    try:
        os.kill(int(signed[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:                                     # another user's
        pass
    return False


def sign(descriptor: int, command: str) -> None:
    """Say in the lock's file who has it."""
    pid = os.environ.get("SAIL_DRIVER", os.getpid())
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = f"process {pid} on {socket.gethostname()} since {since}: {command}\n"
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(errors="backslashreplace"), 0)
    except OSError:                                     # a full disk: the lock holds without it
        pass


# ---- what a killed process has left ----

def tidy(run: Path) -> None:
    """Remove what a killed process left half-written, and results that are damaged.

    Only whoever has the lock may do so. Nothing is looked for: files with our own mark, and
    results, in the folders where this project writes.
    """
    run = Path(run)
    remove_temporary_files(run)
    for pattern in FOLDERS:
        for folder in run.glob(pattern):
            if folder.is_dir() and is_in(folder, run):
                remove_temporary_files(folder)

    for pattern in TABLES:
        for table in run.glob(pattern):
            if table.is_file() and is_in(table, run) and not is_whole(table):
                print(f"{table}: damaged, it is made again", file=sys.stderr)
                table.unlink()

    for model in run.glob("iter*/unet"):
        if model.is_dir() and is_in(model, run) and not is_whole_model(model):
            print(f"{model}: damaged, it is made again", file=sys.stderr)
            shutil.rmtree(model)
        elif is_in(model, run):
            # A kill just after the model got its name leaves what it was trained from.
            model.with_name("checkpoint.pt").unlink(missing_ok=True)


def is_in(path: Path, run: Path) -> bool:
    """Whether a path lies in the run folder, and no link on the way leads out of it."""
    return path.resolve().is_relative_to(run.resolve())


def remove_temporary_files(folder: Path) -> None:
    for entry in os.scandir(folder):
        is_file = entry.is_file(follow_symlinks=False)
        if is_file and TEMPORARY.fullmatch(entry.name):
            os.unlink(entry.path)


def main(argv: list[str]) -> None:
    run, command = argv
    begin(DRIVERS_DESCRIPTOR, Path(run), command)


if __name__ == "__main__":
    with told_in_one_line():
        main(sys.argv[1:])

"""How a stage ends as a program: a fault is told in one line, and it stops when it is told to.

Every stage imports this file first, before the libraries that take seconds to load: Ctrl-C is
answered from then on. SIGTERM (of a cluster, or of the driver), a closed terminal and the end of
the driver itself, however it came, are answered alike. Only the standard library is in here, and
psutil, which accelerate needs.
"""

import contextlib
import errno
import multiprocessing
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = "stopped; the same command continues from here"

# Seconds after a signal in which a stage may end by itself: it finishes what it is writing.
GRACE = 5

# What keeps a file from being written or opened, and what helps.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_IN_WORDS = ("os error 28", "No space left", "PytorchStreamWriter", "unexpected pos")
REMEDIES = {
    errno.EROFS: "give another --run, or make it writable",
    errno.EACCES: "make it yours to read and write, or give another --run",
    errno.EPERM: "make it yours to read and write, or give another --run",
    errno.EEXIST: "move away the file that stands where a folder belongs, or give another --run",
    errno.ENOTDIR: "move away the file that stands where a folder belongs, or give another --run",
    errno.EISDIR: "move it away: a file belongs there",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EPIPE: "what read the output has ended; the same command continues from here",
    errno.EIO: "look after the disk, then repeat the same command, which continues from here",
    errno.ESTALE: "mount it again, then repeat the same command, which continues from here",
}


class UserError(Exception):
    """Something the user can put right.

    The message names the file or setting and the remedy, in one line.
    """


class Stopped(KeyboardInterrupt):
    """A signal asks this program to end."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


# ---- errors in one line ----

@contextlib.contextmanager
def told_in_one_line():
    """Run a program's `main`; whatever ends it early becomes one line and an exit code.

    A UserError gives 2, as does a disk that is full or forbidden; a signal 128 and its number;
    anything else 1, and the whole of it stands in a file.
    """
    listen()
    try:
        yield
    except UserError as error:
        leave("error: " + " ".join(str(error).splitlines()), 2)
    except KeyboardInterrupt as stop:
        leave(STOPPED, 128 + getattr(stop, "number", signal.SIGINT))
    except Exception as error:
        message = message_of(error)
        if message is None:
            message = report(error)
            leave(f"error: {message}", 1)
        leave(f"error: {message}", 2)


def leave(line: str, code: int) -> None:
    """End the program with a last line."""
    # A progress bar may stand in this line.
    if line == STOPPED:
        line = "\n" + line
    print(line, file=sys.stderr)

    # Where nobody reads the output any more, Python would complain of it once again at its end.
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def message_of(error: Exception) -> str | None:
    """What the machine has refused (a disk, memory), in one line; None if it is something else."""
    run = run_folder(sys.argv) or Path()
    place = run
    text = str(error)

    number = None
    if isinstance(error, OSError):
        number = error.errno
        name = error.filename2 or error.filename            # a renamed file's new name counts
        if isinstance(name, (str, bytes, os.PathLike)):
            place = Path(os.fsdecode(name))

    # Not every library hands on the number: safetensors names it, torch says what it met.
    if any(words in text for words in FULL_DISK_IN_WORDS):
        number = errno.ENOSPC

    if number in NO_ROOM:
        folder = run if run.is_dir() else Path()
        free = shutil.disk_usage(folder).free / 1e9
        return (f"{place}: there is no room to write it ({os.strerror(number)}; {free:.1f} GB are "
                f"free in {folder}{still_needed(run)}); make room, --plan says what takes how much, "
                f"then repeat the same command, which continues from here")
    if number in REMEDIES:
        return f"{place}: {os.strerror(number)}; {REMEDIES[number]}"

    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (f"out of memory ({one_line(text)}); give a smaller --micro-batch (training), "
                f"--sample-batch (pictures) or --rank-batch (rewards), which a run may change, or "
                f"--grad-checkpoint on in another --run")
    return None


def still_needed(run: Path) -> str:
    """How much room the rest of a run takes, in words; "" where that cannot be told."""
    try:
        from lib.plan.disk import bytes_needed
        from lib.settings import planned
        return f", the run still needs {bytes_needed(planned([f'--run={run}'], '')) / 1e9:.1f} GB"
    # A disk is full: whatever else goes wrong now is of less weight.
    except Exception:
        return ""


def report(error: Exception) -> str:
    """Write an error that nobody has foreseen to a file; returns the line that tells of it."""
    whole = " ".join(sys.argv) + "\n\n" + "".join(traceback.format_exception(error))
    file = (run_folder(sys.argv) or Path()) / "error.txt"
    try:
        if not (file.parent / "config.json").exists():
            raise FileNotFoundError("no run folder")
        file.write_text(whole, errors="backslashreplace")
    except OSError:
        descriptor, file = tempfile.mkstemp(prefix="sail-error-", suffix=".txt")
        os.write(descriptor, whole.encode(errors="backslashreplace"))
        os.close(descriptor)

    return (f"{Path(sys.argv[0]).name} has failed at something that nobody has foreseen "
            f"({type(error).__name__}: {one_line(str(error))}); please report it with the file "
            f"{file}; the same command continues from here")


def one_line(text: str) -> str:
    """A text without line breaks, cut where it is long."""
    text = " ".join(text.split())
    if len(text) > 300:
        return text[:297] + "..."
    return text


def run_folder(arguments: list[str]) -> Path | None:
    """The run folder that a command line names."""
    folder = None
    for word, following in zip(arguments, [*arguments[1:], None]):
        if word == "--run" and following:
            folder = Path(following)
        if word.startswith("--run="):
            folder = Path(word.removeprefix("--run="))
    return folder


# ---- signals, and the driver ----

def end_at_once(number: int, frame) -> None:
    """While a program loads its libraries there is nothing to tidy up."""
    os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(128 + number)


def end_in_order(number: int, frame) -> None:
    """Leave by way of an exception, so that the ledger is written; only the first signal counts."""
    answer_with(go_on)
    raise Stopped(number)


def go_on(number, frame) -> None:
    """A further signal changes nothing. (Python complains of one that meets SIG_IGN too late.)"""


def answer_with(handler) -> None:
    """Set what happens at a signal, but for those that are ignored for good (nohup)."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def listen() -> None:
    """From here on signals, and the end of the driver, end this program in order."""
    if threading.current_thread() is not threading.main_thread():
        return
    answer_with(end_in_order)

    # The numbers of signals also arrive here, whatever the main thread is busy with.
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    threading.Thread(target=watch, args=(ours, driver()), daemon=True).start()


def watch(signals: int, driver) -> None:
    """Ask the program to end when its driver is gone; end it where it does not hear a signal."""
    asked = None
    while asked not in SIGNALS:
        if select.select([signals], [], [], .5)[0]:
            asked = os.read(signals, 1)[0]
        elif driver is not None and not is_alive(driver):
            os.kill(os.getpid(), signal.SIGTERM)
            driver = None

    # It may be waiting for another process, say, which does not come.
    time.sleep(GRACE)
    end_at_once(asked, None)


def driver():
    """The driver (a psutil.Process) that has started this program by way of others; or None."""
    import psutil

    # In a container, say, or on another machine that process cannot be seen.
    number = os.environ.get("SAIL_DRIVER")
    for process in psutil.Process().parents():
        if str(process.pid) == number:
            return process
    return None


def is_alive(process) -> bool:
    """Whether a process has not ended."""
    import psutil
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_program() -> bool:
    """Whether a file of this project is what Python runs, and not tests or another program."""
    root = Path(__file__).resolve().parent.parent
    script = sys.argv[0] if hasattr(sys, "argv") and sys.argv else ""
    is_worker = multiprocessing.parent_process() is not None
    path = Path(script).resolve()
    is_ours = path.is_file() and path.is_relative_to(root)
    is_installed = path.is_relative_to(Path(sys.prefix).resolve())
    return not is_worker and (script == "-m" or is_ours and not is_installed)


if is_program():
    answer_with(end_at_once)

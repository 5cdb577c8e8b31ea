"""How a stage ends: signals, its driver, the lock, faults of the machine, and what it has cost."""

import errno
import fcntl
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ENV, ROOT, refused
from PIL import Image

from lib import lock, program, settings
from lib.run import Ledger, UserError, save_image, save_tensors, write_table

STOPPED = "stopped; the same command continues from here"


def wait_for(condition, seconds: float = 20.) -> None:
    """Return when a condition holds, which it must within some seconds."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds
        time.sleep(.02)


# ---- signals ----

# A stage that says when it is at work, and would be for long.
STAGE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from lib.program import told_in_one_line
with told_in_one_line():
    Path({run!r}, "at work").touch()
    time.sleep(60)
"""

# Stands in for python: settings without torch, a run as it is, and the stage above for every stage.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m lib.settings") printf '1\\n0.25\\n%s/\\n' "{run}";;
"-m lib.again") ;;
"-m "*) exec "{python}" "$@";;
*environment.py*) ;;
*) exec "{python}" "{stage}";;
esac
"""


@pytest.fixture
def at_work(tmp_path):
    """start(): the driver, one of whose stages is at work in tmp_path/run."""
    run, stage, python = tmp_path / "run", tmp_path / "stage.py", tmp_path / "python"
    run.mkdir()
    stage.write_text(STAGE.format(root=str(ROOT), run=str(run)))
    python.write_text(PYTHON.format(run=run, python=sys.executable, stage=stage))
    python.chmod(0o755)
    env = os.environ | {"SAIL_ACTIVE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}",
                        "SAIL_LAUNCH": "python"}

    def start() -> subprocess.Popen:
        process = subprocess.Popen([ROOT / "run_sail.sh", "tiny"], env=env, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return process

    return start


def is_free(run: Path) -> bool:
    """Whether nobody has the lock of a run folder."""
    with open(run / ".lock", "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("name, code", [
    ("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGKILL", -9)])
def test_a_stage_ends_with_its_driver(at_work, tmp_path, name, code):
    """The signal is for the driver alone; its stage hears of it, and gives the folder back."""
    driver = at_work()
    run = tmp_path / "run"
    wait_for((run / "at work").exists)
    assert not is_free(run)

    # The same command beside it.
    _, second = (beside := at_work()).communicate()
    assert beside.returncode == 2
    refused(second.strip(), "error: ", f"process {driver.pid} on ", "run_sail.sh --preset tiny",
            "wait until it is done")
    assert driver.poll() is None

    driver.send_signal(getattr(signal, name))
    _, told = driver.communicate()
    assert driver.returncode == code
    assert told.strip() == STOPPED
    wait_for(lambda: is_free(run))


SLOW_LIBRARY = "import pathlib, time; pathlib.Path({flag!r}).touch(); time.sleep(60)"


STAGES = sorted(path.name for path in ROOT.glob("0*.py"))
MODULES = ["settings", "again", "warm", "preflight", "plan", "study", "eval.compare",
           "taste.label", "taste.duel"]


@pytest.mark.parametrize("script", [*STAGES, *MODULES])
def test_a_program_is_stopped_while_its_libraries_load(tmp_path, script):
    flag = tmp_path / "loading"
    for library in ("pandas", "numpy", "torch"):
        (tmp_path / f"{library}.py").write_text(SLOW_LIBRARY.format(flag=str(flag)))
    number = signal.SIGTERM if script.startswith("04") else signal.SIGINT

    command = [ROOT / script] if script in STAGES else ["-m", f"lib.{script}"]
    stage = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    wait_for(flag.exists)
    stage.send_signal(number)
    _, told = stage.communicate()
    assert told.strip() == STOPPED
    assert stage.returncode == 128 + number


# ---- the lock ----

def test_a_stage_that_is_started_by_hand_has_the_lock(tmp_path, monkeypatch):
    script = tmp_path / "04_train_dpo.py"
    monkeypatch.setattr(lock, "_open", {})
    monkeypatch.delenv("SAIL_DRIVER", raising=False)

    # Not what another program calls as a function, nor what the driver starts.
    lock.hold(tmp_path, script)
    monkeypatch.setattr(sys, "argv", [str(script), "--iter", "1"])
    with monkeypatch.context() as driven:
        driven.setenv("SAIL_DRIVER", "1")
        lock.hold(tmp_path, script)
    assert not (tmp_path / ".lock").exists()

    lock.hold(tmp_path, script)
    lock.hold(tmp_path, script)
    assert not is_free(tmp_path)
    text = (tmp_path / ".lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")
    assert text.endswith("04_train_dpo.py --iter 1\n")
    for descriptor in lock._open.values():
        os.close(descriptor)
    assert is_free(tmp_path)


def test_a_killed_drivers_stage_is_waited_for(tmp_path, monkeypatch):
    """It has the lock still, and ends within seconds."""
    with subprocess.Popen(["true"]) as driver:
        pass
    code = "import fcntl, time; fcntl.flock(1, fcntl.LOCK_EX); print(1, flush=True); time.sleep(.5)"
    with open(tmp_path / ".lock", "w") as file:
        stage = subprocess.Popen([sys.executable, "-c", code], stdout=file)
    wait_for((tmp_path / ".lock").read_text)
    signed = f"process {{}} on {socket.gethostname()} since today: x"
    (tmp_path / ".lock").write_text(signed.format(os.getpid()))
    refused(line_of(lock.check_folder, tmp_path), f"process {os.getpid()} on", "wait until")

    (tmp_path / ".lock").write_text(signed.format(driver.pid))
    lock.check_folder(tmp_path)
    assert stage.wait() == 0


def test_a_file_system_without_locks_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with open(tmp_path / ".lock", "w") as file:
        lock.begin(file.fileno(), tmp_path, "run_sail.sh tiny")
    assert capsys.readouterr().err.count("no locks") == 1
    assert (tmp_path / ".lock").read_text().endswith("run_sail.sh tiny\n")


# ---- names of run folders ----

def line_of(call, *arguments) -> str:
    """The line in which a program would tell why this call fails."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    except Exception as error:
        return program.message_of(error)
    raise AssertionError("it does not fail")


@pytest.mark.parametrize("name, words", [
    ("a\n", ["line breaks"]),
    ("\udcff", ["UTF-8"]),
    ("a" * 300, ["shorter name"]),
    ("file", ["move", "give another --run"]),
    ("file/below", ["move", "give another --run"]),
    ("/dev/null", ["give another --run"]),
])
def test_a_folder_that_cannot_be_is_refused_in_a_line(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    refused(line_of(settings.main, [f"--run={name}"]), *words)


@pytest.mark.parametrize("name", ["-delete", " a b ", "ü" * 100, "."])
def test_the_driver_is_told_a_folder_as_it_is(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    settings.main([f"--run={name}"])
    assert capsys.readouterr().out.splitlines()[2] == f"{name}/"
    assert (tmp_path / name / "config.json").exists()


# ---- what the machine refuses ----

@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, ["there is no room", "GB are free", "--plan", "continues"]),
    (errno.EDQUOT, ["there is no room"]),
    (errno.EROFS, ["Read-only file system", "another --run"]),
    (errno.EACCES, ["Permission denied", "another --run"]),
    (errno.EPERM, ["not permitted", "another --run"]),
    (errno.EPIPE, ["Broken pipe", "the same command continues"]),
])
def test_a_disk_that_refuses_is_told_in_a_line(number, words):
    error = OSError(number, os.strerror(number), "/some/run/seed/1.png")
    refused(program.message_of(error), "/some/run/seed/1.png: ", *words)
    assert program.message_of(ValueError("something else")) is None
    assert program.message_of(OSError("no number")) is None

    # Of a file that is renamed it is the name to be that counts.
    error = IsADirectoryError(errno.EISDIR, "Is a directory", ".a.1.sail.tmp", None, "a")
    refused(program.message_of(error), "a: Is a directory; move it away")


def test_a_full_disk_tells_what_the_run_still_needs(tmp_path, monkeypatch):
    from lib.settings import load
    load(["--run", str(tmp_path / "run")], "", create=True)
    monkeypatch.setattr("sys.argv", ["02_generate.py", f"--run={tmp_path / 'run'}"])
    line = program.message_of(OSError(errno.ENOSPC, "", "a"))
    needed = re.search(r"the run still needs ([\d.]+) GB", line)
    assert 0 < float(needed[1]) < 1

    # Where that cannot be told the line is there all the same.
    (tmp_path / "run/config.json").write_text("{")
    refused(program.message_of(OSError(errno.ENOSPC, "", "a")), "there is no room", "free in")


def test_every_library_says_that_there_is_no_room(tmp_path):
    """A limit on the size of files is met as a full disk is."""
    numbers = torch.rand(100_000)
    noise = Image.frombytes("RGB", (300, 300), os.urandom(270_000))
    writers = [
        lambda: save_tensors({"mean": numbers}, tmp_path / "1.safetensors"),
        lambda: torch.save(numbers, tmp_path / "1.pt"),
        lambda: write_table(pd.DataFrame({"error": numbers.numpy()}), tmp_path / "1.parquet"),
        lambda: save_image(noise, tmp_path / "1.png"),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        lines = [line_of(writer) for writer in writers]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for line in lines:
        refused(line, "there is no room")
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]


def test_what_nobody_has_foreseen_is_kept_in_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    for run, where in ((tmp_path, tmp_path / "error.txt"), (tmp_path / "none", "sail-error-")):
        monkeypatch.setattr(sys, "argv", ["04_train_dpo.py", "--run", str(run)])
        monkeypatch.setattr(program, "listen", lambda: None)
        with pytest.raises(SystemExit) as ended, program.told_in_one_line():
            raise KeyError("two\nlines")
        assert ended.value.code == 1
        line = capsys.readouterr().err.strip()
        refused(line, "error: 04_train_dpo.py", "KeyError", "report", str(where))
        file = Path(next(word for word in line.split() if str(where) in word).rstrip(";"))
        assert "raise KeyError" in file.read_text()
        file.unlink()


def test_output_that_nobody_reads_is_told_in_a_line(tmp_path):
    code = "from lib.program import *\nwith told_in_one_line(): print('a' * 100_000)"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-c", code], stdout=writes, stderr=subprocess.PIPE,
                          text=True, cwd=ROOT)
    os.close(writes)
    assert done.returncode == 2
    refused(done.stderr.strip(), "error: ", "Broken pipe", "continues from here")


# ---- the ledger ----

def killed(run: Path, images: int) -> None:
    """A stage that is killed when it has drawn so many images."""
    ledger = Ledger(run, "02_generate", 1, "cpu")
    ledger.images = images
    ledger.__enter__()
    wait_for(ledger.open_path.exists)
    ledger.ended.set()
    ledger.thread.join()


def images_of(run: Path) -> list[tuple]:
    table = pd.read_parquet(run / "ledger.parquet")
    assert table["iter"].dtype == "Int64"
    return list(zip(table.stage, table.images))


def test_the_cost_of_a_killed_stage_is_in_the_ledger(tmp_path):
    killed(tmp_path, 3)
    with Ledger(tmp_path, "02_generate", 1, "cpu") as ledger:
        ledger.images = 8
    assert images_of(tmp_path) == [("02_generate", 3), ("02_generate", 8)]

    # Killed between its row in the ledger and the end of its open one: it counts once.
    killed(tmp_path, 1)
    left = (tmp_path / "ledger.open.json").read_bytes()
    with Ledger(tmp_path, "03_rank", 1, "cpu"):
        pass
    (tmp_path / "ledger.open.json").write_bytes(left)
    with pytest.raises(KeyboardInterrupt), Ledger(tmp_path, "05_eval", None, "cpu"):
        raise program.Stopped(signal.SIGTERM)
    assert images_of(tmp_path)[2:] == [("02_generate", 1), ("03_rank", 0), ("05_eval", 0)]
    assert not (tmp_path / "ledger.open.json").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(500)])
def test_a_damaged_ledger_is_begun_anew(tmp_path, capsys, content):
    for name in ("ledger.parquet", "ledger.open.json"):
        (tmp_path / name).write_bytes(content)
    with Ledger(tmp_path, "03_rank", 1, "cpu"):
        pass
    assert images_of(tmp_path) == [("03_rank", 0)]
    assert (tmp_path / "ledger.damaged.parquet").read_bytes() == content
    assert capsys.readouterr().err.count("\n") == 1


# ---- the set-up ----

def test_an_interrupted_set_up_is_made_again(tmp_path):
    """An environment without pip is made anew; a whole one is left as it is."""
    for name in ("lib/setup.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    log, python = tmp_path / "log", tmp_path / "python3"
    environment = tmp_path / ".venv/bin/python"
    environment.parent.mkdir(parents=True)
    environment.write_text("#!/bin/sh\nexit 1\n")
    environment.chmod(0o755)
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n'
                      f'printf "#!/bin/sh\\nexit 0\\n" > {environment}\n')
    python.chmod(0o755)

    env = {"PATH": os.environ["PATH"], "SAIL_PYTHON": str(python), "root": str(tmp_path)}
    for _ in range(2):
        subprocess.run(["bash", "-euc", 'source "$root/lib/setup.sh"'], env=env, check=True,
                       capture_output=True)
    assert log.read_text() == f"-m venv --clear {tmp_path}/.venv\n"


@pytest.mark.parametrize("files, threads", [
    ({"cpu.max": "150000 100000\n"}, "2"),
    ({"cpu.max": "max 100000\n"}, ""),
    ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1"),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ""),
    ({}, ""),
])
def test_threads_follow_a_containers_quota(tmp_path, files, threads):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    script = f'source "$root/lib/setup.sh"; threads_of_quota "{tmp_path}"'
    done = subprocess.run(["bash", "-euc", script], env=ENV | {"root": str(ROOT)},
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == threads


@pytest.mark.parametrize("given, turns", [
    ({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, ""), ({"GOMP_SPINCOUNT": "9"}, "9")])
def test_what_a_user_has_set_of_threads_stays(given, turns):
    script = 'source "$root/lib/setup.sh"; echo "${GOMP_SPINCOUNT:-} $OMP_NUM_THREADS"'
    env = {"PATH": ENV["PATH"], "SAIL_ACTIVE": "1", "OMP_NUM_THREADS": "7", "root": str(ROOT)}
    done = subprocess.run(["bash", "-euc", script], env=env | given, capture_output=True,
                          text=True, check=True)
    assert done.stdout == f"{turns} 7\n"

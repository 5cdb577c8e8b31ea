"""lib/environment.py and lib/setup.sh: what an environment or a folder of wheels lacks."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ENV, ROOT, refused

from lib import environment

SET_UP = ["bash", "-euc", 'source "$root/lib/setup.sh"; echo "goes on"']


def pins() -> dict[str, str]:
    """The versions in requirements.txt by the package's name."""
    lines = (ROOT / "requirements.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def installed(folder: Path, versions: dict[str, str]) -> None:
    """What importlib.metadata takes for installed packages, without any code."""
    for name, version in versions.items():
        there = folder / f"{name}-{version}.dist-info"
        there.mkdir(parents=True)
        (there / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


# ---- the active environment ----

@pytest.mark.parametrize("version, words", [
    ("2.9.0", "sail-toy 2.9.0 is too old, 2.11 is needed"),
    ("2.11.0rc1", None), ("2.11", None), ("2.11.0+cu130", None), ("3.0", None),
    ("", "sail-toy is missing"), ("unknown", "sail-toy unknown is too old, 2.11 is needed")])
def test_versions_are_compared_by_their_numbers(tmp_path, monkeypatch, version, words):
    installed(tmp_path, {"sail_toy": version})
    monkeypatch.syspath_prepend(tmp_path)
    expected = {"sail-toy": words} if words else {}
    assert environment.faults({"sail-toy": "2.11"}) == expected


def test_the_pins_are_no_older_than_the_least_versions():
    pinned = pins()
    least = environment.LEAST | environment.PAGES

    # accelerate needs psutil, and brings it.
    assert set(least) - set(pinned) == {"psutil"}
    for name in set(least) & set(pinned):
        assert environment.numbers(pinned[name]) >= environment.numbers(least[name])


def set_up_active(folder: Path, versions: dict[str, str], *arguments: str):
    """The set-up with an active environment of these packages and no others."""
    installed(folder / "packages", versions)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/packages" '
                      f'exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "root": str(ROOT),
                        "SAIL_ACTIVE": "1"}
    return subprocess.run([*SET_UP, "run_sail.sh", *arguments], env=env, capture_output=True,
                          text=True)


def test_what_the_active_environment_lacks_is_one_line(tmp_path):
    versions = environment.LEAST | {"torch": "1.13.1"}
    del versions["diffusers"]
    done = set_up_active(tmp_path, versions, "tiny")
    least = environment.LEAST
    assert done.returncode == 2
    assert done.stdout == ""
    refused(done.stderr.strip(), "error: the active environment: ",
            f"torch 1.13.1 is too old, {least['torch']} is needed; diffusers is missing: ",
            f"-m pip install 'torch>={least['torch']}' 'diffusers>={least['diffusers']}', or ")


@pytest.mark.parametrize("command, code", [("tiny", 0), ("label", 2), ("duel", 2)])
def test_only_the_pages_need_what_serves_them(tmp_path, command, code):
    done = set_up_active(tmp_path, environment.LEAST, command)
    assert done.returncode == code
    assert ("starlette is missing; uvicorn is missing" in done.stderr) == (code == 2)


def test_the_look_imports_none_of_the_packages():
    """It costs what Python's own start costs, and little more."""
    code = ("import sys; from lib import environment; environment.check_active('label'); "
            "print(*{name.split('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], env=ENV | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True)
    packages = (set(environment.LEAST | environment.PAGES) - {"pillow"}) | {"PIL"}
    assert packages & set(done.stdout.split()) == set()


def test_an_old_python_is_told_before_its_packages(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    with pytest.raises(environment.Lacking, match="Python is 3.8.10, and 3.11 is needed"):
        environment.check_active("tiny")


def test_no_active_environment_is_told(tmp_path):
    (tmp_path / "cat").symlink_to("/bin/cat")
    env = {"PATH": str(tmp_path), "SAIL_ACTIVE": "1", "root": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["/bin/bash", *SET_UP[1:]], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    refused(done.stderr.strip(), "error: SAIL_ACTIVE=1", "no program `python`", "activate")


# ---- a folder of wheels ----

def make_wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any"):
    """A wheel of one empty module that pip installs."""
    info = f"{name}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
        record += f"{path},sha256={digest.decode().rstrip('=')},{len(content)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


def test_all_that_a_folder_lacks_is_named_at_once(tmp_path):
    """Also what its wheels need in turn; not what is for other systems, extras or Pythons."""
    make_wheel(tmp_path, "toy_a", "1.0", "toy-b[fast]>=2", "toy-win; sys_platform == 'win32'")
    make_wheel(tmp_path, "toy_b", "1.9")
    make_wheel(tmp_path, "toy_b", "2.1", "toy-fast==3; extra == 'fast'", "toy-doc; extra == 'doc'")
    make_wheel(tmp_path, "toy_c", "1.0", "toy-never")
    make_wheel(tmp_path, "toy_d", "1.0", tag="cp27-cp27m-win32")
    lacking = environment.lacking_wheels(tmp_path, ["Toy.A==1.0", "toy-d==1.0"], ["toy-c==1.0"])
    assert lacking == ["toy-d==1.0", "toy-fast==3"]


@pytest.fixture
def set_up_from(tmp_path):
    """set_up(): the set-up from tmp_path/wheels, of a made-up project that needs two packages.

    A stand-in for .venv hands on to this Python's pip, which installs into tmp_path/site.
    """
    pytest.importorskip("pip")
    for name in ("setup.sh", "environment.py"):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / name).write_bytes((ROOT / "lib" / name).read_bytes())
    (tmp_path / "requirements.txt").write_text("toy_a==1.0     # made up\n\ntoy_b==2.0\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {"root": str(tmp_path), "PIP_TARGET": str(tmp_path / "site"),
            "SAIL_WHEELS": str(tmp_path / "wheels")}
    env.pop("SAIL_ACTIVE", None)

    def set_up() -> subprocess.CompletedProcess:
        return subprocess.run(SET_UP, cwd=tmp_path, env=env, capture_output=True, text=True)

    return set_up


def test_the_set_up_installs_from_a_folder_of_wheels(tmp_path, set_up_from):
    """First it tells what the folder lacks; with that in it, all is installed, and once."""
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "toy_a", "1.0", "toy-dep>=1")
    make_wheel(wheels, "toy_b", "2.0")
    done = set_up_from()
    assert done.returncode == 2
    refused(done.stderr.strip(), f"error: SAIL_WHEELS={wheels}: lacks ",
            "clint==0.5.1, hpsv2==1.2.0, image-reward==1.5, toy-dep>=1; ", "pip wheel -w wheels")
    assert not (tmp_path / "site").exists()

    for name, version in (("toy_dep", "1.5"), ("clint", "0.5.1"), ("image_reward", "1.5")):
        make_wheel(wheels, name, version)
    make_wheel(wheels, "hpsv2", "1.2.0", "an-old-stack==0.1")
    done = set_up_from()
    assert done.stdout.splitlines()[-2:] == ["set-up: done", "goes on"]
    modules = {path.stem for path in (tmp_path / "site").glob("*.py")}
    assert modules == {"toy_a", "toy_b", "toy_dep", "clint", "image_reward", "hpsv2"}

    # What is installed is not looked at again.
    (wheels / "hpsv2-1.2.0-py3-none-any.whl").unlink()
    assert set_up_from().stdout == "goes on\n"


def test_a_folder_of_wheels_that_is_not_there_is_told(tmp_path, set_up_from):
    done = set_up_from()
    assert done.returncode == 2
    refused(done.stderr.strip(), f"error: SAIL_WHEELS={tmp_path}/wheels: no such folder")

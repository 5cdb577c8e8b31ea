"""Whether the packages that a run needs are here, told in one line before any of them is imported.

    python lib/environment.py COMMAND                       # SAIL_ACTIVE=1: the active environment
    python lib/environment.py --wheels FOLDER FILE PIN...   # SAIL_WHEELS: a folder of wheels

lib/setup.sh asks both. Only the standard library is in here (and pip's parser of requirements, for
wheels), nothing of lib, which wants psutil: a package's version stands in its metadata. What has
been tried with which versions is in tests/bench/ENVIRONMENTS.md.
"""

import re
import sys
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

PYTHON = "3.11"

# The oldest versions that have been tried and do. Of two it is known that older ones do not:
# diffusers before 0.40 passes over `dtype` and loads float32 without a word, and the text encoder
# of transformers before 5.6 gives its weights other names than the embedded world's files have.
# (Of tqdm and psutil the latest have been tried; any will do that the others accept.)
LEAST = {
    "torch": "2.9",
    "torchvision": "0.24",
    "diffusers": "0.40",
    "transformers": "5.6",
    "accelerate": "1.10",
    "peft": "0.18.1",
    "pandas": "2.3",
    "pyarrow": "21",
    "numpy": "2.2",
    "safetensors": "0.8",
    "pillow": "11.3",
    "matplotlib": "3.10",
    "tqdm": "4.42",
    "psutil": "5",
}

# What serves the pages, and which commands show one.
PAGES = {"starlette": "0.47", "uvicorn": "0.35"}
WITH_PAGES = ("label", "duel")

# So many names stand in a line.
NAMED = 12


class Lacking(Exception):
    """Something is not here that a run needs; the message tells the remedy, in one line."""


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 11, 0) of 2.11.0+cu130."""
    leading = re.match(r"\d+(\.\d+)*", version)
    if leading is None:
        return ()
    return tuple(int(number) for number in leading[0].split("."))


# ---- the active environment ----

def faults(least: dict[str, str]) -> dict[str, str]:
    """What is missing or too old, in words, by the package's name."""
    found = {}
    for name, needed in least.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None

        # What an interrupted installation has left may have no version.
        if not version:
            found[name] = f"{name} is missing"
        elif numbers(version) < numbers(needed):
            found[name] = f"{name} {version} is too old, {needed} is needed"
    return found


def check_active(command: str) -> None:
    """Raise Lacking unless this Python's environment has what a command of run_sail.sh needs."""
    version = ".".join(map(str, sys.version_info[:3]))
    if numbers(version) < numbers(PYTHON):
        raise Lacking(f"the active Python is {version}, and {PYTHON} is needed; activate another "
                        f"environment")

    least = dict(LEAST)
    if command in WITH_PAGES:
        least.update(PAGES)
    lacking = faults(least)
    if not lacking:
        return

    wanted = " ".join(f"'{name}>={least[name]}'" for name in lacking)
    raise Lacking(f"the active environment: {'; '.join(lacking.values())}: {sys.executable} -m "
                    f"pip install {wanted}, or leave out SAIL_ACTIVE=1")


# ---- a folder of wheels ----

def wheels_of(folder: Path) -> dict[str, list[tuple]]:
    """The wheels that suit this Python and system: (version, file) by the package's name."""
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import InvalidWheelFilename, parse_wheel_filename

    here = set(sys_tags())
    wheels = {}
    for path in folder.glob("*.whl"):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if tags & here:
            wheels.setdefault(name, []).append((version, path))
    return wheels


def needs_of(wheel: Path, extras: set[str]) -> list:
    """The requirements that a wheel's metadata states, for this Python, system and these extras."""
    from pip._vendor.packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        stated = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])

    needs = []
    for line in stated:
        need = Requirement(line)
        asked = [{"extra": extra} for extra in ("", *extras)]
        if need.marker is None or any(need.marker.evaluate(extra) for extra in asked):
            needs.append(need)
    return needs


def lacking_wheels(folder: Path, whole: list[str], alone: list[str]) -> list[str]:
    """The requirements that no wheel in the folder meets, sorted.

    Those in `whole` are followed to all that they require in turn, those in `alone` are not.
    """
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

    wheels = wheels_of(folder)
    to_look_at = [Requirement(line) for line in whole + alone]
    met = set()
    lacking = set()
    while to_look_at:
        need = to_look_at.pop()
        if str(need) in met:
            continue
        met.add(str(need))

        # The newest that will do, as pip takes it.
        fitting = []
        for version, path in wheels.get(canonicalize_name(need.name), []):
            if need.specifier.contains(version, prereleases=True):
                fitting.append((version, path))
        if not fitting:
            lacking.add(f"{need.name}{need.specifier}")
        elif str(need) not in alone:
            to_look_at += needs_of(max(fitting)[1], need.extras)
    return sorted(lacking, key=str.lower)


def check_wheels(folder: Path, file: Path, alone: list[str]) -> None:
    """Raise Lacking unless a folder has all of a requirements file and of the pins in `alone`."""
    if not folder.is_dir():
        raise Lacking(f"SAIL_WHEELS={folder}: no such folder; name one that holds the wheels")

    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    lacking = lacking_wheels(folder, [line for line in lines if line], alone)
    if not lacking:
        return

    named = ", ".join(lacking[:NAMED])
    if len(lacking) > NAMED:
        named += f" and {len(lacking) - NAMED} more"
    remedy = f"pip wheel -w wheels -r {file.name}"
    if alone:
        remedy += f" && pip wheel -w wheels --no-deps {' '.join(alone)}"
    raise Lacking(f"SAIL_WHEELS={folder}: lacks {named}; make the folder where there is a "
                    f"network, on a system and with a Python as here: {remedy}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--wheels"]:
        folder, file, *alone = arguments[1:]
        check_wheels(Path(folder), Path(file), alone)
    else:
        check_active(" ".join(arguments[:1]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Lacking as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

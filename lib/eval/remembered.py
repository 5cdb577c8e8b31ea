"""The rows that a run's table has been given, kept in <run>/eval/rows.json: {name: where}.

A row that was compared once stays in the table when stage 05 runs again, as the driver does after
every round, until `--drop NAME` takes it out.
"""

import json
from pathlib import Path

from lib.eval import rows
from lib.run import UserError, is_main, wait, write_json
from lib.settings import Settings


def recall(s: Settings, given: dict[str, str], dropped: list[str],
           taken: dict[str, int]) -> dict[str, str]:
    """The rows of a table: those that it has had, less those dropped, and those given now.

    `given` and what is returned say where each row lies (lib/eval/rows.py); names in `taken` are
    the run's own. A row that can no longer be had is left out, which is said, and stays remembered.
    """
    path = Path(s.run) / "eval" / "rows.json"
    remembered = read(path)
    for name in dropped:
        if name not in remembered:
            names = ", ".join(remembered) or "none"
            raise UserError(f"--drop {name}: the table has no such row (rows that can be dropped: "
                            f"{names})")
        del remembered[name]

    # Every process has read the file before one of them writes it. Where a row lies is kept so that
    # it is found from any working folder.
    wait()
    kept = remembered | {name: located(where) for name, where in given.items()}
    if is_main() and (kept or dropped):
        write_json(kept, path)

    compared = {}
    for name, where in remembered.items():
        if name in given or name in taken:
            continue
        try:
            where = shown(where)
            rows.check(s, where)
        except UserError as error:
            if is_main():
                print(f"row {name} is left out: {error} (--drop {name} forgets it)")
        else:
            compared[name] = where
    return compared | given


def read(path: Path) -> dict[str, str]:
    """The rows that were kept; a file that cannot be read is begun anew, and that is said."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): kept[name] + "" for name in kept}
    except (OSError, ValueError, TypeError):
        print(f"{path} cannot be read and is begun anew: give its rows again with --row")
        return {}


def located(where: str) -> str:
    """Where a row lies, with the whole path of a file or folder."""
    kind, path = split(where)
    if Path(path).exists():
        path = str(Path(path).absolute())
    return kind + path


def shown(where: str) -> str:
    """A kept place as one would give it from here."""
    kind, path = split(where)
    if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        path = str(Path(path).relative_to(Path.cwd()))
    return kind + path


def split(where: str) -> tuple[str, str]:
    """A row's place as what it begins with ("images:", or nothing) and the rest."""
    if where.startswith(rows.IMAGES):
        return rows.IMAGES, where.removeprefix(rows.IMAGES)
    return "", where

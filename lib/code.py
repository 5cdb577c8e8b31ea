"""Which code made a result: fingerprints of the stages.

Users edit stages, and pull newer versions. The ledger keeps with each stage's result the
fingerprint of the code that made it, so that a run whose code has changed since can say so
(`changed_since`) instead of showing old results under new code.
"""

import ast
import functools
import hashlib
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def fingerprint(script: str) -> str:
    """12 hexadecimal digits of a stage script and of the modules of lib that it stands on.

    They are of what Python runs: comments, docstrings and layout play no part. "" for what is no
    stage.
    """
    if not (ROOT / script).exists():
        return ""
    digest = hashlib.sha256()
    for path in sorted(with_imports(ROOT / script)):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(ast.dump(without_docstrings(parsed(path))).encode())
    return digest.hexdigest()[:12]


@functools.cache
def parsed(path: Path) -> ast.Module:
    """A source file's syntax tree."""
    return ast.parse(path.read_bytes())


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree less the texts that stand alone: docstrings, which change nothing."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not is_text(part)]
    return tree


def is_text(statement: ast.AST) -> bool:
    """Whether a statement is a text and nothing else."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)


def with_imports(script: Path) -> set[Path]:
    """A script and the modules of lib that it imports at its head, directly or not.

    What a function imports when it is called (a rival's ranking, say) is not among them.
    """
    found = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_names(parsed(path)):
            waiting += module_files(name)
    return found


def imported_names(tree: ast.Module) -> list[str]:
    """The dotted names of lib that a file's head imports; for `from lib import a` also `lib.a`."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "lib"]


def module_files(name: str) -> list[Path]:
    """The file of a module of lib, or none where the name is that of a function, say."""
    path = ROOT / name.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return [file for file in files if file.exists()]


def changed_since(ledger: pd.DataFrame) -> dict[str, list[str]]:
    """The stage scripts that are not what they were when they worked on a run.

    By name, with what they made then: "seed", "iter1", ... `ledger` is ledger.parquet, whose last
    row of a stage and a round is that of the result. Stage 05 is left out: it is run again and
    again.
    """
    changed = {}
    if "code" not in ledger:
        return changed

    last = ledger.drop_duplicates(["stage", "iter"], keep="last")
    for row in last.dropna(subset="code").itertuples():
        script = f"{row.stage}.py"
        if row.stage != "05_eval" and row.code != fingerprint(script):
            made = "seed" if pd.isna(row.iter) else f"iter{row.iter}"
            changed.setdefault(script, []).append(made)
    return changed

"""What the steps have found: a JSON line for each value, and the table that is made of the lines.

A line of results.jsonl has `step`, `name`, `value`, `unit` and `detail`; `within`, which says
whether a value that has a limit keeps it; and `card`, `versions`, `date`. The line named STATUS is
the step's own: its seconds, and in `detail` how it ended. What a step has said before it begins
anew does not count any more.
"""

import json
import math
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")

STATUS = "status"
BEGUN = "begun"
DONE = "done"

# What stands in `detail` of a value that could not be had.
FAILED = "failed: "


@dataclass(frozen=True)
class Results:
    """Where the lines of one step go."""

    out: Path
    step: str
    card: str

    def add(self, name: str, value: float | None, unit: str = "", detail: str = "",
            within: bool | None = None) -> None:
        """Append a line; None is a value that could not be had, and `detail` says why."""
        if value is not None:
            value = float(value)
            if not math.isfinite(value):
                value, detail, within = None, f"{FAILED}{value}", False
        line = {
            "step": self.step,
            "name": name,
            "value": value,
            "unit": unit,
            "detail": detail,
            "within": within,
            "card": self.card,
            "versions": {package: version(package) for package in PACKAGES},
            "date": str(date.today()),
        }
        with open(self.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(row_of(line), flush=True)

    def check(self, name: str, value: float, limit: float, reason: str) -> None:
        """Append a value that may be `limit` at most, and why so much."""
        self.add(name, value, "", f"at most {limit:.2g}: {reason}", within=bool(value <= limit))

    def fail(self, name: str, error: BaseException) -> None:
        """Append that a value could not be had."""
        words = " ".join(str(error).split())[:200]
        self.add(name, None, "", f"{FAILED}{type(error).__name__}: {words}", within=False)


def read_lines(out: Path) -> list[dict]:
    """The lines that count, in the order in which they came."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["name"] == STATUS:
            same = line["detail"] != BEGUN
            lines = [old for old in lines if old["step"] != line["step"]
                     or (same and old["name"] != STATUS)]
        lines.append(line)
    return lines


def status_of(lines: list[dict]) -> dict[str, str]:
    """How each step that was begun has ended."""
    return {line["step"]: line["detail"] for line in lines if line["name"] == STATUS}


def write_table(out: Path) -> None:
    """Write results.md anew."""
    lines = read_lines(out)
    if not lines:
        return
    last = lines[-1]
    versions = ", ".join(f"{package} {number}" for package, number in last["versions"].items())
    text = [f"{last['date']}, {last['card']}; {versions}", ""]
    text += ["| step | what | value | | within | how |", "| --- | --- | --- | --- | --- | --- |"]
    text += [row_of(line) for line in lines]
    (out / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def row_of(line: dict) -> str:
    """A line as a row of the table."""
    value = ""
    if line["value"] is not None:
        value = f"{line['value']:.4g}"
    within = {None: "", True: "yes", False: "**NO**"}[line["within"]]
    detail = line["detail"].replace("|", "/")
    return f"| {line['step']} | {line['name']} | {value} | {line['unit']} | {within} | {detail} |"

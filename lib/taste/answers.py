"""What people answered: one JSON line an answer, appended, never rewritten, on disk at once.

    {"id": "...", "pair": "8c1f...", "turn": 1, "answer": "left", "left": "b", "seconds": 1.94,
     "time": "2026-01-31T12:00:00+00:00", "labeller": "me", "sitting": 1}

A pair has the pictures a and b; `left` says which of them was shown on the left. A tenth of the
pairs comes twice: turn 2 has the sides swapped. The last word on a pair and turn counts: another
answer replaces the one before, "undo" takes it back. Several labellers may write to one file at
once.
"""

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import pandas as pd

ANSWERS = ("left", "right", "tie", "skip")      # a pair that is skipped says nothing of taste
UNDO = "undo"

# One row per vote: what was shown on either side, and which of the two won ("" where neither did).
VOTE_COLUMNS = ["pair_id", "prompt", "labeller", "turn", "left", "right", "winner", "seconds",
                "time", "sitting"]


class Answer(NamedTuple):
    """One line of the file."""

    id: str                                 # the page's own: a line that is sent twice counts once
    pair: str
    turn: int
    answer: str                             # one of ANSWERS, or UNDO
    left: str                               # a or b
    seconds: float                          # from the moment that both pictures could be seen
    time: str
    labeller: str
    sitting: int                            # how many times the labeller had begun

    @property
    def right(self) -> str:
        return "b" if self.left == "a" else "a"

    @property
    def winner(self) -> str:
        """The picture preferred, a or b, or ""."""
        return {"left": self.left, "right": self.right}.get(self.answer, "")


def parse(line: str) -> Answer:
    """The answer that a line holds; ValueError says what it lacks.

    A line that a person wrote needs pair, answer and left alone.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")

    values = {"id": "", "turn": 1, "seconds": math.nan, "time": "", "labeller": "", "sitting": 0}
    values |= {name: record[name] for name in Answer._fields if name in record}
    allowed = {"pair": None, "answer": (*ANSWERS, UNDO), "left": ("a", "b"), "turn": (1, 2)}
    for name, choices in allowed.items():
        if name not in values:
            raise ValueError(f"no {name}")
        if choices and values[name] not in choices:
            raise ValueError(f"{name} is {values[name]!r}, not one of {choices}")

    # A table needs numbers in these columns.
    values["seconds"] = float(values["seconds"])
    values["sitting"] = int(values["sitting"])
    for name in ("id", "pair", "time", "labeller"):
        values[name] = str(values[name])
    return Answer(**values)


class AnswerFile:
    """The answers in a file, read again whenever the file has changed."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.stamp = None
        self.lines: list[Answer] = []
        self.faults: list[str] = []         # lines that are no answers, a sentence each
        self.read()

    def read(self) -> None:
        """Read the file if it is another than last time: other labellers write to it too."""
        try:
            stat = self.path.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if stamp == self.stamp:
                return
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            stamp, text = None, ""

        self.stamp, self.lines, self.faults = stamp, [], []
        rows = text.split("\n")
        for row, line in enumerate(rows, start=1):
            if not line.strip():
                continue
            try:
                self.lines.append(parse(line))
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                # Only a last line has no end: the writing of it was cut off.
                reason = "cut off" if row == len(rows) else f"no answer ({error})"
                self.faults.append(f"{self.path}, row {row}: {reason}; it is passed over")

    def append(self, answer: Answer) -> None:
        """Add a line; it is on the disk when this returns.

        OSError: it could not be written, a full disk say. The file is then as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(answer._asdict(), ensure_ascii=False).encode() + b"\n"

        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size

            # What was cut off stays a line of its own.
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                if os.write(file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        self.read()

    def has(self, id: str) -> bool:
        """Whether a line with this id is in the file."""
        return any(line.id == id for line in self.lines)

    def next_sitting(self, labeller: str) -> int:
        sittings = [line.sitting for line in self.lines if line.labeller == labeller]
        return max(sittings, default=0) + 1


def standing(lines: list[Answer]) -> list[Answer]:
    """The answers that hold, in their order: of each pair, turn and labeller the last word."""
    words = last_words(lines)
    return [line for line in words if line.answer != UNDO]


def taken_back(lines: list[Answer]) -> list[Answer]:
    """The undo lines that nothing has followed, in their order."""
    words = last_words(lines)
    return [line for line in words if line.answer == UNDO]


def last_words(lines: list[Answer]) -> list[Answer]:
    words = {}
    for line in lines:
        key = (line.labeller, line.pair, line.turn)

        # Another word moves to the end, where it was said.
        words.pop(key, None)
        words[key] = line
    return list(words.values())


def votes(lines: list[Answer], pairs: pd.DataFrame) -> pd.DataFrame:
    """The standing answers to `pairs` (pair_id, prompt) but for skips, with VOTE_COLUMNS."""
    prompts = dict(zip(pairs.pair_id, pairs.prompt))
    rows = []
    for line in standing(lines):
        if line.pair in prompts and line.answer != "skip":
            row = line._asdict() | {"pair_id": line.pair, "prompt": prompts[line.pair]}
            rows.append(row | {"right": line.right, "winner": line.winner})
    return pd.DataFrame(rows, columns=VOTE_COLUMNS)


def labels(cast: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs to train on (prompt, win, lose) from the votes cast on `pairs` (pair_id, prompt, a, b).

    The votes of all labellers and turns on a pair count alike; where as many are for either picture
    there is no pair.
    """
    lead = (cast.winner == "a").astype(int) - (cast.winner == "b").astype(int)
    lead = lead.groupby(cast.pair_id).sum()

    rows = []
    for pair in pairs.itertuples():
        ahead = lead.get(pair.pair_id, 0)
        if ahead > 0:
            rows.append((pair.prompt, pair.a, pair.b))
        if ahead < 0:
            rows.append((pair.prompt, pair.b, pair.a))
    return pd.DataFrame(rows, columns=["prompt", "win", "lose"])

"""Judge models blind: whose picture of the same prompt is better?

reads   the rows' pictures of the evaluation's prompts, which stage 05 draws where they are lacking,
        or pictures that exist
writes  eval/duel.parquet   pair_id, prompt_id, prompt, seed, a, b, model_a, model_b: what is shown
        eval/duel.jsonl     what was answered, line by line (lib/taste/answers.py)
        eval/votes.parquet  prompt_id, seed, pair_id, prompt, labeller, turn, left, right, winner
                            ("" is a tie), seconds, time, sitting: all votes of the folder

Two rows or more, each a row of the run's table by its name, or NAME=WHERE as stage 05's --row.
NAME=images:PATH needs no run where all rows are such. The same command goes on where it was.

    ./run_sail.sh duel base Iter3
    ./run_sail.sh duel --run runs/mine base Iter0 Iter3 --labeller anna
    ./run_sail.sh duel ours=images:my/pictures theirs=images:other/pictures
"""

import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd

from lib.run import UserError, inside, read_table, run_stage, seed_of, write_table
from lib.settings import ROOT, Parser
from lib.taste import votes
from lib.taste.answers import VOTE_COLUMNS, AnswerFile
from lib.taste.answers import votes as votes_of
from lib.taste.label import SERVER_ARGUMENTS
from lib.taste.server import Desk, listed, serve
from lib.taste.showings import id_of

IMAGES = "images:"
OF_RUN = re.compile(r"base|Iter\d+")
PROMPTS = 100                       # that each two rows are judged on: intervals of +-10 points
SCORES_COLUMNS = ("model", "prompt_id", "prompt", "seed", "image")
SHOWN_COLUMNS = ["pair_id", "prompt_id", "prompt", "seed", "a", "b", "model_a", "model_b"]

ARGUMENTS = {
    "rows": {"nargs": "+", "metavar": "ROW", "help": "two rows or more: names, or NAME=WHERE"},
    "--run": {"default": str(ROOT / "runs/tiny"), "help": "the run whose rows they are"},
    "--count": {"type": int, "default": PROMPTS,
                "help": f"prompts to judge each two rows on ({PROMPTS})"},
} | SERVER_ARGUMENTS


# ---- pictures of the rows ----

def rows_given(texts: list[str]) -> dict[str, str]:
    """The rows by name, and where each lies, "" for one of the run's table."""
    rows = {}
    for text in texts:
        name, _, where = text.partition("=")
        if text.startswith(IMAGES):
            name, where = Path(text).stem, text
        if name in rows:
            raise UserError(f"row {text}: the name {name!r} is given twice; give NAME=WHERE with "
                            f"another name")
        rows[name] = where
    if len(rows) < 2:
        raise UserError(f"{' '.join(texts)}: a duel needs two rows, say base Iter3")
    return rows


def pictures_of_rows(run: Path, rows: dict[str, str]) -> pd.DataFrame:
    """SCORES_COLUMNS of every picture of the rows; pictures that exist are copied into the run."""
    of_models = {name: where for name, where in rows.items() if not where.startswith(IMAGES)}
    parts = []
    if of_models:
        parts.append(pictures_of_models(run, of_models))
    for name, where in rows.items():
        if name not in of_models:
            parts.append(pictures_that_exist(run, name, where.removeprefix(IMAGES)))
    return pd.concat(parts, ignore_index=True)


def pictures_of_models(run: Path, rows: dict[str, str]) -> pd.DataFrame:
    """The pictures of models, which stage 05 is asked to draw where they are not there."""
    path = run / "eval" / "scores.parquet"
    if not (run / "config.json").exists():
        raise UserError(f"{run}: no run lies there; give its folder with --run, or pictures as "
                        f"NAME={IMAGES}PATH")
    for name in rows:
        if OF_RUN.fullmatch(name) and not rows[name] and name not in models_of(run):
            raise UserError(f"{run}: has no model {name}; give one of {', '.join(models_of(run))}, "
                            f"or another as NAME=WHERE")

    table = None
    if path.exists():
        table = read_table(path, SCORES_COLUMNS, "05_eval.py")
    if table is None or not has_rows(run, table, rows):
        draw(run, rows, table)
        table = read_table(path, SCORES_COLUMNS, "05_eval.py")

    # A prompt of two styles stands there twice.
    table = table[table.model.isin(rows)].drop_duplicates(["model", "prompt_id", "seed"])
    for row, image in table.image.items():
        inside(run, image, path, row + 1)
    return table[list(SCORES_COLUMNS)]


def models_of(run: Path) -> list[str]:
    """The names of the run's own models."""
    rounds = sorted(int(unet.parent.name.removeprefix("iter")) for unet in run.glob("iter*/unet"))
    return ["base", *(f"Iter{k}" for k in rounds)]


def has_rows(run: Path, table: pd.DataFrame, rows: dict[str, str]) -> bool:
    """Whether stage 05 has drawn these rows. One that is given by its place is asked for anew."""
    wanted = table[table.model.isin(rows)]
    if set(wanted.model) != set(rows) or any(rows.values()):
        return False
    return all((run / image).exists() for image in wanted.image)


def draw(run: Path, rows: dict[str, str], before: pd.DataFrame | None) -> None:
    """Let stage 05 draw rows; scores.parquet keeps those that it had beside them."""
    # This imports what loads models, too.
    from lib.eval import remembered

    # A row that the table has had is known by its name.
    kept = remembered.read(run / "eval" / "rows.json")
    rows = {name: where or kept.get(name, "") for name, where in rows.items()}
    own = [name for name in rows if OF_RUN.fullmatch(name) and not rows[name]]
    command = [sys.executable, str(ROOT / "05_eval.py"), "--run", str(run), "--scores-only",
               "--only", ",".join(own) or "base"]
    for name, where in rows.items():
        if where:
            command += ["--row", f"{name}={where}"]
        elif name not in own:
            raise UserError(f"{run}/eval/scores.parquet: has no row {name!r} with its pictures; "
                            f"give it as {name}=WHERE")

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.returncode)                # stage 05 has said why

    scores = run / "eval" / "scores.parquet"
    table = pd.read_parquet(scores)
    if before is not None:
        others = before[~before.model.isin(table.model)]
        write_table(pd.concat([others, table], ignore_index=True), scores)


def pictures_that_exist(run: Path, name: str, where: str) -> pd.DataFrame:
    # This imports what loads models, too.
    from lib.eval.rows import image_jobs

    jobs = image_jobs(run, name, where, None)
    return jobs.assign(model=name)[list(SCORES_COLUMNS)]


# ---- which are shown ----

def duels(pictures: pd.DataFrame, names: list[str], count: int) -> pd.DataFrame:
    """The pairs to show (SHOWN_COLUMNS): the same prompts for each two rows, `count` at most.

    The n-th picture of a prompt meets the n-th; a prompt comes again only when all have come.
    """
    order = pictures.groupby(["model", "prompt"]).cumcount()
    pictures = pictures.assign(number=order)

    rows = []
    for one, other in itertools.combinations(names, 2):
        both = pictures[pictures.model == one].merge(pictures[pictures.model == other],
                                                     on=["prompt", "number"], suffixes=("", "_b"))
        if both.empty:
            raise UserError(f"{one} and {other}: have no prompt in common; give rows with pictures "
                            f"of the same prompts")
        place = both.prompt.map(lambda prompt: seed_of("duel", prompt))
        both = both.assign(place=place).sort_values(["number", "place"]).head(count)
        for pair in both.itertuples():
            pair_id = id_of(one, other, pair.prompt, pair.image, pair.image_b)
            rows.append((pair_id, pair.prompt_id, pair.prompt, pair.seed, pair.image,
                         pair.image_b, one, other))
    return pd.DataFrame(rows, columns=SHOWN_COLUMNS)


def remember(shown: pd.DataFrame, path: Path) -> pd.DataFrame:
    """eval/duel.parquet: these pairs and those of other duels, whose votes still count."""
    if path.exists():
        before = read_table(path, SHOWN_COLUMNS, "./run_sail.sh duel")
        shown = pd.concat([before, shown]).drop_duplicates("pair_id", ignore_index=True)
    write_table(shown, path)
    return shown


# ---- what comes of it ----

def cast_votes(file: AnswerFile, shown: pd.DataFrame) -> pd.DataFrame:
    """votes.parquet: the answers, with the models' names for the pictures a and b."""
    cast = votes_of(file.lines, shown).merge(shown.drop(columns=["prompt", "a", "b"]), on="pair_id")
    named = cast.copy()
    for column in ("left", "right", "winner"):
        named[column] = cast.model_a.where(cast[column] == "a",
                                           cast.model_b.where(cast[column] == "b", ""))
    return named[["prompt_id", "seed", *VOTE_COLUMNS]]


def lines_about(cast: pd.DataFrame, names: list[str]) -> list[str]:
    """What one labeller's votes, or all of them, tell of the rows: a line each."""
    lines = []
    for first, second in itertools.combinations(names, 2):
        # The later row is the one that is hoped to be better.
        rate = votes.win_rate(cast, second, first)
        if rate is None:
            lines.append(f"{second} over {first}: no votes yet")
            continue
        lines.append(f"{second} over {first}: preferred in {rate.value:.1%} [{rate.low:.1%}, "
                     f"{rate.high:.1%}] of {rate.prompts} prompts ({rate.votes} votes, "
                     f"{rate.ties:.0%} ties); {rate.more} prompts more would halve the interval")
    if len(names) > 2 and len(cast):
        strengths = votes.strengths(cast, names)
        words = [f"{row.model} {row.strength:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
                 for row in strengths.itertuples()]
        lines.append(f"Bradley-Terry strengths, {names[0]} being 0: {', '.join(words)}")
    lines.append(f"the left picture was preferred in {votes.side_bias(cast)}")
    itself = votes.self_agreement(cast)
    if itself.n:
        lines.append(f"{itself.n} pairs shown twice: the same answer in {itself}")
    return lines


def write_results(run: Path, file: AnswerFile, names: list[str]) -> list[str]:
    """Write votes.parquet; lines about the rows `names` for people."""
    # Another duel of this run may have added pairs since this one began.
    shown = read_table(run / "eval" / "duel.parquet", SHOWN_COLUMNS, "./run_sail.sh duel")
    cast = cast_votes(file, shown)
    write_table(cast, run / "eval" / "votes.parquet")

    cast = cast[cast.left.isin(names) & cast.right.isin(names)]
    labellers = cast.labeller.unique().tolist()
    if len(labellers) < 2:
        return lines_about(cast, names)
    lines = []
    for name in labellers:
        lines += [f"{name}: {line}" for line in lines_about(cast[cast.labeller == name], names)]
    lines += [f"all: {line}" for line in lines_about(cast, names)]
    for (one, other), value in votes.between_labellers(cast).items():
        if value.n:
            lines.append(f"{one} and {other} agree in {value} of {value.n} pairs")
    return lines


def worth(cast: int, comparisons: int) -> str:
    """How close the votes so far come in each comparison, without telling who is ahead."""
    if not cast:
        return "names are told at the end"
    return f"{cast} votes: ±{98 / math.sqrt(cast / comparisons):.0f} points"


# ---- the command ----

def desk_of(run: Path, now: pd.DataFrame, names: list[str], file: AnswerFile,
            labeller: str) -> Desk:
    """What the page's server needs to know: of the pairs shown `now`, no names."""
    return Desk(
        title="duel",
        question="Which is the better picture of this?",
        pairs=listed(run, now),
        file=file,
        labeller=labeller,
        worth=lambda: worth(len(votes_of(file.lines, now)), math.comb(len(names), 2)),
        results=lambda: write_results(run, file, names),
    )


def main(argv: list[str]) -> None:
    parser = Parser(prog="./run_sail.sh duel", description=__doc__.split("\n\n")[0])
    for name, options in ARGUMENTS.items():
        parser.add_argument(name, **options)
    given = parser.parse_args(argv)
    if given.count < 1:
        raise UserError(f"--count {given.count}: must be at least 1")
    run = Path(given.run)
    rows = rows_given(given.rows)
    names = list(rows)

    now = duels(pictures_of_rows(run, rows), names, given.count)
    remember(now, run / "eval" / "duel.parquet")
    file = AnswerFile(run / "eval" / "duel.jsonl")
    for fault in file.faults:
        print(fault)

    desk = desk_of(run, now, names, file, given.labeller)
    try:
        serve(desk, given.host, given.port, not given.no_browser)
    finally:
        print(*desk.summary(), sep="\n")
        if (run / "iter0").exists():
            print(f"next: ./run_sail.sh --run {shlex.quote(str(run))} puts this into the table and "
                  f"the page")


if __name__ == "__main__":
    run_stage(main)

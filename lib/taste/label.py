"""Label pairs of pictures in a page: which of the two do you prefer?

reads   prompts (the world's captions, --prompts FILE, or the pair source's) and the model, or
        pictures that exist (--images)
writes  shown.parquet       pair_id, prompt, a, b, source: the pairs, a and b in images/
        images/, latents/   what the model has drawn for them, or copies of the pictures
        answers.jsonl       what was answered, line by line (lib/taste/answers.py)
        pairs.csv           prompt, win, lose: what was preferred, for --pairs
        agreement.json      how far people agree with themselves and with each other

The model draws while the first pairs are being labelled. The same command goes on where it was;
a larger --count adds pairs. The folder is runs/taste unless --run names another.

    ./run_sail.sh label
    ./run_sail.sh label sd15 --run runs/my-taste --prompts my/prompts.txt --count 200
    ./run_sail.sh label --run runs/my-taste --images my/pictures --labeller anna
"""

import hashlib
import os
import shlex
import subprocess
import sys
import threading
from itertools import count as numbers
from pathlib import Path

import pandas as pd

from lib.data.few import HELD_OUT
from lib.data.prompts import pair_prompts, read_prompt_file
from lib.run import (UserError, inside, is_whole, read_table, run_stage, write_json, write_table,
                     write_text)
from lib.settings import PRESETS, ROOT, Settings, config_of, flag, load, parse
from lib.taste import votes
from lib.taste.answers import AnswerFile, labels, standing
from lib.taste.answers import votes as votes_of
from lib.taste.server import LOCAL, Desk, listed, serve
from lib.taste.showings import PAIR_COLUMNS, id_of, neighbours
from lib.world import captions

PORT = 8765
PAIRS = 60                          # enough to see one's own taste appear in the embedded world
TABLE_COLUMNS = [*PAIR_COLUMNS, "source"]
PATIENCE = 3                        # seconds that drawing may take to end what it is writing
MADE_BY = "./run_sail.sh label"

# Settings that a run on the labels is to have as their pictures had them.
OF_THE_MODEL = ("model", "vae", "resolution", "sampler", "sample_steps", "cfg_scale")

SERVER_ARGUMENTS = {
    "--labeller": {"default": "me", "help": "who answers: people are told apart by it"},
    "--port": {"type": int, "default": PORT, "help": "of the page; taken, the next free one"},
    "--host": {"default": LOCAL, "help": "address to listen on; 0.0.0.0 lets others in"},
    "--no-browser": {"action": "store_true", "default": False,
                     "help": "print the address, and open no browser"},
}
ARGUMENTS = {
    "--count": {"type": int, "default": 0,
                "help": f"pairs to label, {PAIRS} in a new folder; more than it has adds some"},
    "--images": {"default": "", "metavar": "PATH",
                 "help": "label these pictures: a table with prompt and image, or a folder; "
                         "several of one prompt are paired"},
} | SERVER_ARGUMENTS


# ---- which pairs ----

def read_pairs(run: Path) -> pd.DataFrame:
    """The pairs that a folder has, none for a new one; their pictures lie inside it."""
    path = run / "shown.parquet"
    if not path.exists():
        return pd.DataFrame(columns=TABLE_COLUMNS)
    table = read_table(path, TABLE_COLUMNS, MADE_BY)
    for row, pair in enumerate(table.itertuples(), start=1):
        inside(run, pair.a, path, row)
        inside(run, pair.b, path, row)
    return table


def pairs_to_draw(s: Settings, count: int):
    """Pairs without end that the model is to draw: where prompts are few, they come again."""
    if s.prompts == "world":
        prompts = captions.permuted(captions.world_captions()["rest"], "taste", s.seed)
    elif s.prompts == "pairs":
        try:
            prompts = pair_prompts(s.pairs, s.seed, (), count)
        except UserError as error:
            raise UserError(f"{error}; or give --prompts a file with one prompt a line") from None
    else:
        prompts = read_prompt_file(s.prompts)
    if not prompts:
        raise UserError(f"--prompts {s.prompts}: holds no prompt; give a text with one a line")

    for turn in numbers():
        for prompt in prompts:
            pair_id = id_of(prompt, turn)
            yield (pair_id, prompt, f"images/{pair_id}_a.png", f"images/{pair_id}_b.png", "drawn")


def copied_pairs(run: Path, where: str):
    """Pairs of pictures that exist; each is copied into the folder as it is asked for."""
    # This imports what loads models, too.
    from lib.eval.rows import copy_picture, ending_of, read_images

    pictures = read_images(where)
    for places in neighbours([picture.prompt for picture in pictures]):
        two = [pictures[place] for place in places]
        contents = [content_of(picture.image) for picture in two]
        pair_id = id_of(two[0].prompt, *contents)

        # The same picture twice is no pair.
        if contents[0] == contents[1]:
            continue
        names = []
        for side, picture in zip("ab", two):
            name = f"images/{pair_id}_{side}{ending_of(picture)}"
            if not is_whole(run / name):
                copy_picture(picture, run / name)
            names.append(name)
        yield (pair_id, two[0].prompt, *names, "copied")


def content_of(image: Path | bytes) -> str:
    """A hash of a picture, which may lie in a file or in a table."""
    if isinstance(image, Path):
        image = image.read_bytes()
    return hashlib.sha256(image).hexdigest()


def choose_pairs(s: Settings, images: str, count: int) -> pd.DataFrame:
    """The folder's pairs, and new ones until there are `count`; shown.parquet has them."""
    run = Path(s.run)
    table = read_pairs(run)
    rows = table[TABLE_COLUMNS].values.tolist()
    known = set(table.pair_id)

    wanted = count or len(rows) or PAIRS
    stream = copied_pairs(run, images) if images else pairs_to_draw(s, wanted)
    while len(rows) < wanted:
        pair = next(stream, None)
        if pair is None:
            break
        if pair[0] not in known:
            rows.append(pair)
    if not rows:
        raise UserError(f"--images {images}: no prompt has two pictures; a pair needs two of one "
                        f"prompt")

    # A copied picture that has disappeared is copied again.
    if images and not all((run / image).exists() for image in [*table.a, *table.b]):
        lost = set(known)
        for pair in copied_pairs(run, images):
            lost.discard(pair[0])
            if not lost:
                break

    if len(rows) > len(table):
        table = pd.DataFrame(rows, columns=TABLE_COLUMNS)
        write_table(table, run / "shown.parquet")
    return table


# ---- drawing in the background ----

class Drawing:
    """The process that draws what pictures are lacking; it ends with this one."""

    def __init__(self, run: Path):
        self.log = run / "draw.log"
        self.failure = ""
        self.ending = False
        command = [sys.executable, "-m", "lib.taste.draw", "--run", str(run)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with open(self.log, "w") as log:
            # A session of its own: Ctrl-C comes to it by way of this process alone.
            self.process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path},
                                            stdin=subprocess.PIPE, stderr=log,
                                            start_new_session=True)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Wait for the end, and say so if it is a failure."""
        code = self.process.wait()
        if self.ending:
            return
        if code == 0:
            print("all pictures are drawn", flush=True)
            return
        lines = self.log.read_text(errors="replace").strip().splitlines() or [f"code {code}"]
        self.failure = lines[-1].removeprefix("error: ")
        print(f"error: drawing has stopped: {self.failure} (all of it: {self.log})",
              file=sys.stderr, flush=True)

    def state(self) -> str:
        if self.process.poll() is None:
            return "on"
        return self.failure

    def end(self) -> None:
        self.ending = True
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()


def lacks_pictures(run: Path, pairs: pd.DataFrame) -> bool:
    drawn = pairs[pairs.source == "drawn"]
    return not all((run / image).exists() for image in [*drawn.a, *drawn.b])


# ---- what comes of it ----

def for_json(value: votes.Share) -> dict:
    """A share for JSON, which knows no NaN."""
    if not value.n:
        return {"pairs": 0}
    return {"value": value.value, "low": value.low, "high": value.high, "pairs": value.n}


def median_seconds(own: pd.DataFrame) -> float | None:
    """The median time of an answer, where times are known."""
    seconds = own.seconds.dropna()
    if seconds.empty:
        return None
    return float(seconds.median())


def agreements(file: AnswerFile, pairs: pd.DataFrame) -> dict:
    """agreement.json: of all labellers together, of each, and of each two."""
    cast = votes_of(file.lines, pairs)
    skipped = [line.labeller for line in standing(file.lines) if line.answer == "skip"]

    labellers = {}
    for name in sorted({*cast.labeller, *skipped}):
        own = cast[cast.labeller == name]
        labellers[name] = {
            "pairs": own.pair_id.nunique(),
            "ties": int((own.winner == "").sum()),
            "skipped": skipped.count(name),
            "seconds": median_seconds(own),
            "agrees_with_self": for_json(votes.self_agreement(own)),
            "prefers_left": for_json(votes.side_bias(own)),
        }
    between = []
    for (one, other), value in votes.between_labellers(cast).items():
        between.append({"labellers": [one, other], **for_json(value)})
    return {
        "pairs": len(labels(cast, pairs)),
        "agrees_with_self": for_json(votes.self_agreement(cast)),
        "labellers": labellers,
        "between": between,
    }


def write_results(s: Settings, file: AnswerFile, pairs: pd.DataFrame, labeller: str) -> list[str]:
    """Write pairs.csv and agreement.json; lines about them for people."""
    run = Path(s.run)
    cast = votes_of(file.lines, pairs)
    chosen = labels(cast, pairs)
    write_text(chosen.to_csv(index=False), run / "pairs.csv")
    write_json(agreements(file, pairs), run / "agreement.json")

    own = cast[cast.labeller == labeller]
    ties = int((own.winner == "").sum())
    lines = [f"{labeller}: {own.pair_id.nunique()} pairs; {ties} of {len(own)} answers a tie; the "
             f"left picture was preferred in {votes.side_bias(own)}"]
    itself = votes.self_agreement(own)
    if itself.n:
        lines.append(f"{itself.n} pairs shown twice: the same answer in {itself}; no judge can be "
                     f"expected to agree more")
    for (one, other), value in votes.between_labellers(cast).items():
        if value.n:
            lines.append(f"{one} and {other} agree in {value} of {value.n} pairs")

    lines.append(f"{run}/pairs.csv has {len(chosen)} pairs")
    if len(chosen) >= HELD_OUT:
        lines.append(f"to align the model to them: {command_to_align(s)}")
    return lines


def command_to_align(s: Settings) -> str:
    """The run that learns from the labels: with the model and prompts that they are of."""
    command = ["./run_sail.sh", s.preset, "--run", f"{s.run}-aligned", "--pairs", s.run]
    preset = PRESETS[s.preset]
    for name in OF_THE_MODEL:
        if getattr(s, name) != preset[name]:
            command += [flag(name), str(getattr(s, name))]

    # The labels have no validation split, and no prompts but their own.
    benchmarks = [name for name in s.eval_prompts.split(",") if name != "pickapic"]
    if benchmarks != preset["eval_prompts"].split(","):
        command += ["--eval-prompts", ",".join(benchmarks) or "hpsv2"]
    if s.prompts not in ("world", "pairs"):
        command += ["--prompts", s.prompts]
    words = shlex.join(command)
    if s.prompts == "pairs":
        words += " --prompts FILE   (FILE: new prompts, one a line)"
    return words


def worth(file: AnswerFile, pairs: pd.DataFrame) -> str:
    """What the labels are good for so far, as a run would divide them."""
    chosen = len(labels(votes_of(file.lines, pairs), pairs))
    to_measure = chosen // HELD_OUT
    return f"labels: {chosen - to_measure} to train, {to_measure} to measure the judge"


# ---- the command ----

def with_defaults(argv: list[str]) -> list[str]:
    """The arguments with the preset's flag before its name, and the folder for labels."""
    if argv and not argv[0].startswith("-"):
        argv = ["--preset", *argv]
    if not any(argument.split("=")[0] == "--run" for argument in argv):
        argv = [*argv, "--run", str(ROOT / "runs/taste")]
    return argv


def load_folder(argv: list[str]):
    """The settings of the folder that argv names, made where it is new, and the arguments."""
    argv = with_defaults(argv)
    given, _ = parse(argv, __doc__, ARGUMENTS)

    # Only a new folder is locked for a moment: another labeller's drawing may have it.
    return load(argv, __doc__, ARGUMENTS, create=not config_of(given).exists())


def desk_of(s: Settings, pairs: pd.DataFrame, file: AnswerFile, labeller: str) -> Desk:
    """What the page's server needs to know."""
    def write() -> list[str]:
        # Another labeller's command may have added pairs since this one began.
        return write_results(s, file, read_pairs(Path(s.run)), labeller)

    return Desk(
        title="label",
        question="Which do you prefer?",
        pairs=listed(Path(s.run), pairs),
        file=file,
        labeller=labeller,
        worth=lambda: worth(file, pairs),
        results=write,
        after_answer=write,
    )


def main(argv: list[str]) -> None:
    s, given = load_folder(argv)
    run = Path(s.run)
    if given.count < 0:
        raise UserError(f"--count {given.count}: must be at least 1")

    pairs = choose_pairs(s, given.images, given.count)
    file = AnswerFile(run / "answers.jsonl")
    for fault in file.faults:
        print(fault)
    known = set(pairs.pair_id)
    unknown = sum(line.pair not in known for line in file.lines)
    if unknown:
        print(f"{file.path}: {unknown} answers are to no pair of shown.parquet; they are passed "
              f"over")

    drawing = None
    desk = desk_of(s, pairs, file, given.labeller)
    if lacks_pictures(run, pairs):
        drawing = Drawing(run)
        desk.drawing = drawing.state
    try:
        serve(desk, given.host, given.port, not given.no_browser)
    finally:
        print(*desk.summary(), sep="\n")
        if drawing:
            drawing.end()


if __name__ == "__main__":
    run_stage(main)

"""The run folder, which is all that the stages exchange: tables, pictures, latents, the ledger.

Every file is written under a temporary name and renamed, so what exists is whole. Random numbers
come from keys such as (run seed, round, prompt, candidate), never from the order of calls: a run
that was stopped and goes on makes what an uninterrupted run makes. Several processes share a
stage's work in turns (`my_share`). No model and no method is in here.
"""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from numbers import Integral
from pathlib import Path

import pandas as pd

from lib import packs
from lib.code import fingerprint
from lib.files import (atomic, atomic_folder, is_whole, is_whole_model, save_tensors,  # noqa: F401
                       settle, write_json, write_text)
from lib.lock import hold
from lib.program import UserError, one_line, told_in_one_line

# The columns that a reader may ask of the tables that stages exchange (lib/README.md has them all).
PAIR_COLUMNS = ("pair_id", "prompt", "win", "lose", "source")
PROMPT_COLUMNS = ("prompt_id", "prompt", "split")
CANDIDATE_COLUMNS = ("prompt_id", "prompt", "candidate", "seed", "image")
DRAW_COLUMNS = ("draw", "t", "error", "anchor_error", "reward")
TRAIN_LOG_COLUMNS = ("step", "loss", "win_error_gain", "lose_error_gain", "margin", "accuracy",
                     "lr", "grad_norm", "seconds")

# What Pillow may try on a picture. Its other readers start programs (EPS) or read other files.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")


def shown(value) -> str:
    """A value for a message, in one line: a picture's bytes or a page of text only in part."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    text = short.repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def run_stage(main: Callable[[list[str]], None]) -> None:
    """Run a stage's `main` with the arguments of the command line.

    A UserError becomes one line and exit code 2, Ctrl-C a hint and exit code 130.
    """
    with told_in_one_line():
        # accelerate launch and torchrun give each of their processes its number.
        if "LOCAL_RANK" in os.environ:
            join_processes()
        main(sys.argv[1:])


# ---- several processes, one stage ----

def join_processes() -> None:
    """Become one of the processes that accelerate launch or torchrun started."""
    import torch
    from accelerate import PartialState

    # Without a GPU accelerate must be told that there are several processes, or each believes that
    # it is alone.
    device = torch.accelerator.current_accelerator(check_available=True)
    without_gpu = device is None or device.type == "mps"

    # A process may wait for hours while another one reads the pairs, say: that is no failure.
    PartialState(cpu=without_gpu, timeout=timedelta(days=1))


def process_state():
    """accelerate's PartialState: who this process is, among how many."""
    from accelerate import PartialState
    return PartialState()


def is_main() -> bool:
    """Whether this process is the one that writes the tables and prints."""
    return process_state().is_main_process


def wait() -> None:
    """Go on when all processes have come to this line, and the disk has their files."""
    settle()
    process_state().wait_for_everyone()
    packs.look_again()


def my_share(items):
    """The items of a list that are this process's turn: all of them where it is the only one."""
    # With 3 processes, process 0 has items 0, 3, 6, ...
    state = process_state()
    return items[state.process_index::state.num_processes]


def gathered(items: list) -> list:
    """The items of all processes, in the order of the processes."""
    from accelerate.utils import gather_object
    return gather_object(items)


def bar(items: Iterable, title: str, unit: str, **options):
    """A progress bar over items, of which only one process of a machine draws its own."""
    from tqdm import tqdm
    silent = not process_state().is_local_main_process
    return tqdm(items, desc=title, unit=unit, disable=silent, **options)


# ---- tables ----

def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, without its index."""
    settle()
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)
    settle()


def read_parquet(path: Path, made_by: str, **options) -> pd.DataFrame:
    """A Parquet file as pandas reads it. UserError: it is missing or damaged.

    `made_by` is the stage that writes it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: run {made_by} first")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; remove it and run {made_by} again")

    try:
        return pd.read_parquet(path, **options)
    except Exception as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({one_line(str(error))}); delete it and run "
            f"{made_by} again"
        ) from None


def read_table(path: Path, columns: Iterable[str], made_by: str) -> pd.DataFrame:
    """A Parquet table that must have these columns and at least one row.

    `made_by` is the stage that writes it. UserError: the table is missing, broken or empty.
    """
    table = read_parquet(path, made_by)
    for column in columns:
        if column not in table.columns:
            raise UserError(
                f"{path}: column {column!r} is missing (it has {', '.join(table.columns)}); "
                f"it needs {', '.join(columns)}"
            )
    if table.empty:
        raise UserError(f"{path}: has no rows; run {made_by} again with more data")
    return table


def refuse_other_kinds(path: Path, table: pd.DataFrame, made_by: str, texts: Iterable[str],
                       numbers: Iterable[str] = ()) -> None:
    """UserError if a cell of the columns `texts` is no text, or of `numbers` no whole number."""
    for columns, kind, name in ((texts, str, "a text"), (numbers, Integral, "a whole number")):
        for column in columns:
            for row, value in enumerate(table[column], start=1):
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise UserError(f"{path}, row {row}: {column} {shown(value)} is not {name}; "
                                    f"correct it, or delete {path} and run {made_by} again")


def inside(root: Path, relative: str, table: Path, row: int) -> Path:
    """The file that a table's row (from 1) names, which must lie within the folder `root`."""
    # Resolved, so that neither ".." nor a link leads outside.
    root = Path(root).resolve()
    path = (root / str(relative)).resolve()
    if not path.is_relative_to(root):
        raise UserError(
            f"{table}, row {row}: {relative!r} leaves the run folder; paths must stay inside it"
        )
    return path


def begin(run: Path, script: str) -> None:
    """Begin to work on a run: lock its folder, and keep the stage script in <run>/code/."""
    hold(run, script)

    # Users edit stages: the script of today may not be the one that made the run.
    source = Path(script)
    with atomic(Path(run) / "code" / source.name) as temporary:
        shutil.copyfile(source, temporary)


def differing_code(run: Path, other: Path) -> list[str]:
    """The stage scripts that two runs both keep and that are not the same."""
    names = []
    for script in sorted((Path(run) / "code").glob("0*.py")):
        theirs = Path(other) / "code" / script.name
        if theirs.exists() and theirs.read_bytes() != script.read_bytes():
            names.append(script.name)
    return names


# ---- random numbers by key ----

def seed_of(*key) -> int:
    """A 63-bit seed from a hash of `key`: the same on every machine and in every order of calls."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()

    # Tables keep seeds, as integers of 64 bits with a sign.
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key):
    """A torch.Generator on the CPU, seeded by seed_of(key)."""
    import torch
    return torch.Generator().manual_seed(seed_of(*key))


# ---- pictures and their latents: images/<name>.png beside latents/<name>.safetensors ----

# How a picture is written, by the ending of its name. WebP without loss is a third smaller than PNG
# and faster written and read (bench_files.py in tests/bench); JPEG is only for looking at.
WRITTEN_AS = {
    ".png": {"format": "PNG", "compress_level": 1},
    ".webp": {"format": "WEBP", "lossless": True, "quality": 0, "method": 0},
    ".jpg": {"format": "JPEG", "quality": 95},
}


def is_from_latent(image: Path) -> bool:
    """Whether a picture is its latent: a candidate of a round with --keep pairs, iterK/*/*.jpg.

    Wherever its pixels count they are decoded from the latent, always the same ones. The file of
    its name is for people alone, and is there only for pictures that they look at.
    """
    image = Path(image)
    return image.suffix == ".jpg" and re.fullmatch(r"iter\d+", image.parent.parent.name) is not None


def latent_path(image: Path, mirrored: bool = False) -> Path:
    """Where a picture's latent lies; the mirrored picture has a latent of its own."""
    image = Path(image)
    ending = ".flip.safetensors" if mirrored else ".safetensors"
    return image.parent.parent / "latents" / (image.stem + ending)


def save_latent(tensors: dict, image: Path, mirrored: bool = False) -> None:
    """Keep a picture's latent (C, h, w), in the UNet's scaled units.

    `tensors` has its `mean` and, for a VAE posterior, its `std`.
    """
    save_tensors(tensors, latent_path(image, mirrored))


def save_latents(tensors: list[dict], images: list[Path], mirrored: bool = False) -> None:
    """Keep the latents of a batch in one file, or one for each folder (lib/packs.py)."""
    paths = [latent_path(image, mirrored) for image in images]
    packs.save_pack(dict(zip(paths, tensors)))


def load_latent(image: Path, mirrored: bool = False) -> dict:
    """A picture's latent as `save_latent` or `save_latents` kept it."""
    return packs.load(latent_path(image, mirrored))


def save_image(picture, path: Path) -> None:
    """Write a PIL image in the format of its name's ending."""
    with atomic(path) as temporary:
        picture.save(temporary, **WRITTEN_AS[Path(path).suffix])


def read_picture(path: Path, mode: str):
    """A PIL image of this mode ("" is the file's own), read to its end."""
    from PIL import Image
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        return image.convert(mode) if mode else image.copy()


def open_image(path: Path, table: Path, row: int, mode: str = "RGB"):
    """A picture that a table names, as `read_picture` reads it.

    UserError: it cannot be read; the message names the row (from 1) of the table that names it.
    """
    try:
        return read_picture(path, mode)
    except Exception as error:
        raise UserError(
            f"{table}, row {row}: cannot read the image {path} ({error}); "
            f"replace it or drop the row"
        ) from None


def open_made(path: Path, mode: str = "RGB"):
    """A picture that the run itself has made, as `open_image` opens it.

    UserError: it cannot be read; the message says what makes it again.
    """
    try:
        return read_picture(path, mode)
    except Exception as error:
        # A stage that is finished looks at its pictures again only where its table is missing.
        folder = Path(path).parent.parent
        if is_from_latent(path):
            raise UserError(
                f"{path}: cannot read the image ({error}); where only pictures of pairs are kept, "
                f"03_rank.py makes them from their latents; --keep all keeps every one"
            ) from None
        table = folder / ("pairs.parquet" if folder.name == "seed" else "candidates.parquet")
        both = f"it and {table}" if table.exists() else "it"
        raise UserError(
            f"{path}: cannot read the image ({error}); delete {both}, "
            f"and the same command makes it again"
        ) from None


# ---- the ledger ----

# How old the row of a running stage may be that the next one enters if it is killed.
OPEN_ROW_SECONDS = 5


class Ledger:
    """What a stage cost.

    It counts what it is told, times itself, and appends one row to ledger.parquet.

        with Ledger(run, "02_generate", 1, device) as ledger:
            ledger.images += 8

    A stage that was interrupted leaves a row too: its work was paid for. Of one that was killed the
    row is in ledger.open.json, some seconds old, and the next stage enters it.
    """

    def __init__(self, run: Path, stage: str, iteration: int | None, device: str):
        self.path = Path(run) / "ledger.parquet"
        self.open_path = Path(run) / "ledger.open.json"
        self.stage = stage
        self.iteration = iteration
        self.device = device

        # What the stage counts as it goes.
        self.images = 0
        self.unet_forwards = 0
        self.optimizer_steps = 0

    def __enter__(self):
        self.started = time.perf_counter()
        if is_main():
            self.enter_killed_stage()
            self.ended = threading.Event()
            self.thread = threading.Thread(target=self.keep_open_row, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, error, *_):
        # The processes' counts are added up; an optimizer step is taken by all of them together.
        # After an error nobody is waited for.
        if process_state().num_processes > 1 and error is None:
            counts = gathered([(self.images, self.unet_forwards)])
            self.images = sum(images for images, _ in counts)
            self.unet_forwards = sum(forwards for _, forwards in counts)
        if not is_main():
            return

        self.ended.set()
        self.thread.join()
        self.append(self.row())
        self.open_path.unlink(missing_ok=True)

    def row(self) -> dict:
        """What the stage has cost so far."""
        return {
            "stage": self.stage,
            "iter": self.iteration,
            "seconds": time.perf_counter() - self.started,
            "images": self.images,
            "unet_forwards": self.unet_forwards,
            "optimizer_steps": self.optimizer_steps,
            "peak_memory_bytes": self.peak_memory(),
            "peak_host_bytes": peak_host_memory(),
            "device": self.device,
            "code": fingerprint(f"{self.stage}.py"),
        }

    def append(self, row: dict) -> None:
        """Write the ledger with one more row."""
        # Stages 01 and 05 belong to no round: a column of integers that may be empty.
        table = pd.DataFrame([row]).astype({"iter": "Int64"})
        before = self.read()
        if before is not None:
            table = pd.concat([before, table], ignore_index=True)
        write_table(table, self.path)

    def read(self) -> pd.DataFrame | None:
        """The ledger so far; one that cannot be read is set aside."""
        if not self.path.exists():
            return None
        try:
            return pd.read_parquet(self.path)
        except Exception:
            aside = self.path.with_name("ledger.damaged.parquet")
            os.replace(self.path, aside)
            print(f"{self.path}: damaged, begun anew (the old one is {aside})", file=sys.stderr)
            return None

    def keep_open_row(self) -> None:
        """Keep the row in a file, as long as the stage runs."""
        # A killed stage's row is entered only if the ledger has as many rows as at its start.
        before = self.read()
        content = {"rows": 0 if before is None else len(before)}
        while not self.ended.is_set():
            content["row"] = self.row()
            with contextlib.suppress(OSError), atomic(self.open_path) as temporary:
                temporary.write_text(json.dumps(content))
            self.ended.wait(OPEN_ROW_SECONDS)

    def enter_killed_stage(self) -> None:
        """Append the row that a killed stage has left."""
        try:
            content = json.loads(self.open_path.read_bytes())
            rows, row = content["rows"], content["row"]
        except (OSError, ValueError, KeyError, TypeError):
            return

        before = self.read()
        if isinstance(row, dict) and rows == (0 if before is None else len(before)):
            self.append(row)
        self.open_path.unlink()

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the card on CUDA, else of this process."""
        if self.device.startswith("cuda"):
            import torch
            return torch.cuda.max_memory_allocated()

        return peak_host_memory()


def peak_host_memory() -> int:
    """Peak memory of this process in bytes, the device's apart."""
    # macOS counts in bytes, Linux in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


# ---- tables that several stages read ----

def read_prompts(run: Path, split: str) -> pd.DataFrame:
    """The prompts (prompt_id, prompt) of a split.

    UserError: a prompt stands in two splits or among the human pairs, or the split has none.
    """
    path = Path(run) / "prompts.parquet"
    made_by = "01_seed.py"
    if not (Path(run) / "seed").exists():
        made_by = "05_eval.py"
    table = read_table(path, PROMPT_COLUMNS, made_by)
    refuse_other_kinds(path, table, made_by, ("prompt", "split"), numbers=("prompt_id",))
    refuse_repeated_prompts(path, table)
    refuse_prompts_of_pairs(path, table, Path(run) / "seed" / "pairs.parquet")

    rows = table[table.split == split].reset_index(drop=True)
    if rows.empty:
        splits = ", ".join(table.split.unique())
        raise UserError(f"{path}: no prompt has split {split!r} (there are {splits})")
    return rows


def refuse_repeated_prompts(path: Path, table: pd.DataFrame) -> None:
    """UserError if a prompt or a prompt_id stands in the table twice: it would be in two splits."""
    if table.prompt_id.duplicated().any():
        row = table.prompt_id.duplicated().argmax()
        raise UserError(
            f"{path}, row {row + 1}: prompt_id {table.prompt_id[row]} stands there already; "
            f"correct it, or delete {path} and run the same command again, which makes it again"
        )

    repeated = table[table.prompt.duplicated(keep=False)]
    if repeated.empty:
        return

    # The first such prompt, and its first two rows.
    prompt = repeated.prompt.iloc[0]
    first, second = repeated[repeated.prompt == prompt].index[:2]
    raise UserError(
        f"{path}, row {second + 1}: prompt {prompt!r} stands in split {table.split[first]!r} "
        f"already (row {first + 1}); every prompt belongs to one split, drop one row"
    )


def refuse_prompts_of_pairs(path: Path, table: pd.DataFrame, human: Path) -> None:
    """UserError if a prompt is one of the human pairs' (`human`), where those are there already."""
    if not human.exists():
        return

    prompts_of_pairs = set(read_table(human, ("prompt",), "01_seed.py").prompt)
    common = table[table.prompt.isin(prompts_of_pairs)]
    if len(common):
        raise UserError(
            f"{path}, row {common.index[0] + 1}: prompt {common.prompt.iloc[0]!r} is one of the "
            f"seed's ({human}); prompts of the rounds and of the evaluation must be new, drop the "
            f"row"
        )


def read_pairs(run: Path, relative: str, made_by: str) -> pd.DataFrame:
    """A table of pairs whose `win` and `lose` name pictures inside the run folder.

    `made_by` is the stage that writes it. UserError: a picture is missing or lies outside.
    """
    path = Path(run) / relative
    table = read_table(path, PAIR_COLUMNS, made_by)
    refuse_other_kinds(path, table, made_by, texts=("pair_id", "prompt", "win", "lose"))
    for row, pair in enumerate(table.itertuples(), start=1):
        for name in (pair.win, pair.lose):
            image = inside(run, name, path, row)

            # The picture or its latent: a lacking latent is made from the picture.
            if not image.exists() and not packs.is_there(latent_path(image)):
                raise UserError(
                    f"{path}, row {row}: image {name} does not exist in {run}; "
                    f"restore it or drop the row"
                )
    return table

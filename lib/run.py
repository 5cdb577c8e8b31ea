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
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import pandas as pd

# The columns that a reader may ask of the tables that stages exchange (lib/README.md has them all).
PAIR_COLUMNS = ("pair_id", "prompt", "win", "lose", "source")
PROMPT_COLUMNS = ("prompt_id", "prompt", "split")
CANDIDATE_COLUMNS = ("prompt_id", "prompt", "candidate", "seed", "image")
DRAW_COLUMNS = ("draw", "t", "error", "anchor_error", "reward")
TRAIN_LOG_COLUMNS = ("step", "loss", "win_error_gain", "lose_error_gain", "margin", "accuracy",
                     "lr", "grad_norm", "seconds")

# What Pillow may try on a picture. Its other readers start programs (EPS) or read other files.
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")


class UserError(Exception):
    """Something the user can put right.

    The message names the file or setting and the remedy, in one line.
    """


def run_stage(main: Callable[[list[str]], None]) -> None:
    """Run a stage's `main` with the arguments of the command line.

    A UserError becomes one line and exit code 2, Ctrl-C a hint and exit code 130.
    """
    try:
        # accelerate launch and torchrun give each of their processes its number.
        if "LOCAL_RANK" in os.environ:
            join_processes()
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)


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
    """Go on when all processes have come to this line."""
    process_state().wait_for_everyone()


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


# ---- files that are whole or not there ----

@contextlib.contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path`, which is renamed to `path` on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    # Two processes that write the same file do not disturb each other.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        # Where the writing failed, nothing stays behind.
        if temporary.is_file():
            temporary.unlink()


def is_whole(path: Path) -> bool:
    """Whether a file is there and complete, as far as its format's own marks tell.

    Looked at are a safetensors file's header and length, the end of a PNG, and both ends of a
    Parquet file; of any other format only that it is not empty.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            size = file.seek(0, os.SEEK_END)
            if path.suffix == ".safetensors":
                return is_whole_safetensors(file, int.from_bytes(start, "little"), size)
            file.seek(max(0, size - 12))
            end = file.read()
    except OSError:
        return False

    if path.suffix == ".png":
        return start == b"\x89PNG\r\n\x1a\n" and end == b"\0\0\0\0IEND\xaeB`\x82"
    if path.suffix == ".parquet":
        return start.startswith(b"PAR1") and end.endswith(b"PAR1") and size > 12
    return size > 0


def is_whole_safetensors(file, header_length: int, size: int) -> bool:
    """Whether an open safetensors file is as long as its header says."""
    if not 0 < header_length <= size - 8:
        return False
    file.seek(8)
    try:
        header = json.loads(file.read(header_length))
        ends = [entry["data_offsets"][1] for name, entry in header.items()
                if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
    return size == 8 + header_length + max(ends, default=0)


def write_text(text: str, path: Path) -> None:
    """Write a text file, in UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: dict, path: Path) -> None:
    """Write a value as JSON for people, one entry a line."""
    write_text(json.dumps(value, indent=1) + "\n", path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, without its index."""
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: Path, columns: Iterable[str], made_by: str) -> pd.DataFrame:
    """A Parquet table that must have these columns and at least one row.

    `made_by` is the stage that writes it. UserError: the table is missing, broken or empty.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: run {made_by} first")

    try:
        table = pd.read_parquet(path)
    except Exception as error:
        raise UserError(
            f"{path}: not a readable Parquet file ({error}); delete it and run {made_by} again"
        ) from None

    for column in columns:
        if column not in table.columns:
            raise UserError(
                f"{path}: column {column!r} is missing (it has {', '.join(table.columns)}); "
                f"it needs {', '.join(columns)}"
            )
    if table.empty:
        raise UserError(f"{path}: has no rows; run {made_by} again with more data")
    return table


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


def keep_code(run: Path, script: str) -> None:
    """Keep the stage script that works on this run, as it is now, in <run>/code/."""
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

def latent_path(image: Path, mirrored: bool = False) -> Path:
    """Where a picture's latent lies; the mirrored picture has a latent of its own."""
    image = Path(image)
    ending = ".flip.safetensors" if mirrored else ".safetensors"
    return image.parent.parent / "latents" / (image.stem + ending)


def save_latent(tensors: dict, image: Path, mirrored: bool = False) -> None:
    """Keep a picture's latent (C, h, w), in the UNet's scaled units.

    `tensors` has its `mean` and, for a VAE posterior, its `std`.
    """
    from safetensors.torch import save_file

    # The file format knows contiguous tensors only.
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic(latent_path(image, mirrored)) as temporary:
        save_file(contiguous, temporary)


def load_latent(image: Path, mirrored: bool = False) -> dict:
    """A picture's latent as `save_latent` kept it."""
    from safetensors.torch import load_file
    return load_file(latent_path(image, mirrored))


def save_image(picture, path: Path) -> None:
    """Write a PIL image as PNG or, if the name says so, as JPEG of high quality."""
    options = {"format": "PNG", "compress_level": 1}
    if path.suffix == ".jpg":
        options = {"format": "JPEG", "quality": 95}
    with atomic(path) as temporary:
        picture.save(temporary, **options)


def open_image(path: Path, table: Path, row: int):
    """An RGB PIL image, read to its end.

    UserError: it cannot be read; the message names the row (from 1) of the table that names it.
    """
    from PIL import Image
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:
        raise UserError(
            f"{table}, row {row}: cannot read the image {path} ({error}); "
            f"replace it or drop the row"
        ) from None


# ---- the ledger ----

class Ledger:
    """What a stage cost.

    It counts what it is told, times itself, and appends one row to ledger.parquet.

        with Ledger(run, "02_generate", 1, device) as ledger:
            ledger.images += 8

    A stage that was interrupted leaves a row too: its work was paid for.
    """

    def __init__(self, run: Path, stage: str, iteration: int | None, device: str):
        self.path = Path(run) / "ledger.parquet"
        self.stage = stage
        self.iteration = iteration
        self.device = device

        # What the stage counts as it goes.
        self.images = 0
        self.unet_forwards = 0
        self.optimizer_steps = 0

    def __enter__(self):
        self.started = time.perf_counter()
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

        row = {
            "stage": self.stage,
            "iter": self.iteration,
            "seconds": time.perf_counter() - self.started,
            "images": self.images,
            "unet_forwards": self.unet_forwards,
            "optimizer_steps": self.optimizer_steps,
            "peak_memory_bytes": self.peak_memory(),
            "device": self.device,
        }

        # Stages 01 and 05 belong to no round: a column of integers that may be empty.
        table = pd.DataFrame([row]).astype({"iter": "Int64"})
        if self.path.exists():
            table = pd.concat([pd.read_parquet(self.path), table], ignore_index=True)
        write_table(table, self.path)

    def peak_memory(self) -> int:
        """Peak memory in bytes: of the card on CUDA, else of this process."""
        if self.device.startswith("cuda"):
            import torch
            return torch.cuda.max_memory_allocated()

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
    table = read_table(path, PROMPT_COLUMNS, "01_seed.py")
    refuse_repeated_prompts(path, table)
    refuse_prompts_of_pairs(path, table, Path(run) / "seed" / "pairs.parquet")

    rows = table[table.split == split].reset_index(drop=True)
    if rows.empty:
        splits = ", ".join(table.split.unique())
        raise UserError(f"{path}: no prompt has split {split!r} (there are {splits})")
    return rows


def refuse_repeated_prompts(path: Path, table: pd.DataFrame) -> None:
    """UserError if a prompt stands in the table twice: it would belong to two splits."""
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
    for row, pair in enumerate(table.itertuples(), start=1):
        for name in (pair.win, pair.lose):
            image = inside(run, name, path, row)

            # The picture or its latent: a lacking latent is made from the picture.
            if not image.exists() and not latent_path(image).exists():
                raise UserError(
                    f"{path}, row {row}: image {name} does not exist in {run}; "
                    f"restore it or drop the row"
                )
    return table

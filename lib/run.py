"""The run folder: atomic tables, pictures, latents, the ledger of costs, and errors told in one line."""

import contextlib
import hashlib
import json
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import pandas as pd


class UserError(Exception):
    """Something the user can put right; the message names the file or setting and the remedy."""


def run_stage(main) -> None:
    """Run a stage's main: a UserError becomes one line and exit code 2, Ctrl-C a hint and 130."""
    try:
        if "LOCAL_RANK" in os.environ:
            join_processes()
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)


def join_processes() -> None:
    """Become one of those that accelerate launch or torchrun started; without a GPU accelerate has to be told, or each
    process believes that it is alone. Waiting long for another (one reads the pairs, say) is no failure."""
    import torch
    from accelerate import PartialState
    device = torch.accelerator.current_accelerator(check_available=True)
    PartialState(cpu=device is None or device.type == "mps", timeout=timedelta(days=1))


# ---- atomic files: written under a temporary name, then renamed ----

@contextlib.contextmanager
def atomic(path: Path):
    """Yields a temporary path beside `path`, renamed to it on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_text(text: str, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: dict, path: Path) -> None:
    write_text(json.dumps(value, indent=1) + "\n", path)


def write_table(table: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: Path, columns: tuple[str, ...], made_by: str) -> pd.DataFrame:
    """A Parquet table that must have these columns and at least one row."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: run {made_by} first")
    try:
        table = pd.read_parquet(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete it and run {made_by} again") from None
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise UserError(f"{path}: column {missing[0]!r} is missing (it has {', '.join(table.columns)}); "
                        f"it needs {', '.join(columns)}")
    if table.empty:
        raise UserError(f"{path}: has no rows; run {made_by} again with more data")
    return table


def inside(root: Path, relative: str, table: Path, row: int) -> Path:
    """The file that a table's row names, which must lie within the run folder."""
    path = (Path(root) / str(relative)).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise UserError(f"{table}, row {row}: {relative!r} leaves the run folder; paths must stay inside it")
    return path


def seed_of(*key) -> int:
    """A 63-bit seed from a hash of `key`: the same on every machine and in every order of calls."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU torch.Generator seeded by seed_of(key)."""
    import torch
    return torch.Generator().manual_seed(seed_of(*key))


# ---- pictures and latents: images/<name>.png beside latents/<name>.safetensors ----

def latent_path(image: Path, mirrored: bool = False) -> Path:
    """Where an image's latent lies; the mirrored image has one of its own."""
    image = Path(image)
    return image.parent.parent / "latents" / (image.stem + (".flip" if mirrored else "") + ".safetensors")


def save_latent(tensors: dict, image: Path, mirrored: bool = False) -> None:
    """Keep an image's latent: `mean` and, for a VAE posterior, `std`, (C, h, w), in the UNet's scaled units."""
    from safetensors.torch import save_file
    with atomic(latent_path(image, mirrored)) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)


def load_latent(image: Path, mirrored: bool = False) -> dict:
    from safetensors.torch import load_file
    return load_file(latent_path(image, mirrored))


def save_image(picture, path: Path) -> None:
    """PNG or, if the name says so, JPEG of high quality."""
    options = {"format": "JPEG", "quality": 95} if path.suffix == ".jpg" else {"format": "PNG", "compress_level": 1}
    with atomic(path) as temporary:
        picture.save(temporary, **options)


def open_image(path: Path, table: Path, row: int):
    """An RGB PIL image, or an error that names the table's row."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        raise UserError(f"{table}, row {row}: cannot read the image {path} ({error}); replace it or drop the "
                        f"row") from None


# ---- the ledger ----

class Ledger:
    """What a stage cost: counts what it is told, times itself, and appends one row to ledger.parquet.

        with Ledger(run, "02_generate", 1, device) as ledger: ledger.images += 8
    """

    def __init__(self, run: Path, stage: str, iteration: int | None, device: str):
        self.path, self.stage, self.iteration, self.device = Path(run) / "ledger.parquet", stage, iteration, device
        self.images = self.unet_forwards = self.optimizer_steps = 0

    def __enter__(self):
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind, *_):
        """A stage that was interrupted leaves a row too: its work was paid for. Processes add up their counts."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import gather_object
        state, counts = PartialState(), [self.images, self.unet_forwards, self.optimizer_steps]
        if state.num_processes > 1 and kind is None:
            every = gather_object([counts])
            counts = [*map(sum, zip(*every))][:2] + [self.optimizer_steps]       # a step is taken by all together
        if not state.is_main_process:
            return
        if self.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row = pd.DataFrame([{
            "stage": self.stage, "iter": self.iteration, "seconds": time.perf_counter() - self.started,
            "images": counts[0], "unet_forwards": counts[1], "optimizer_steps": counts[2],
            "peak_memory_bytes": peak, "device": self.device}]).astype({"iter": "Int64"})
        old = [pd.read_parquet(self.path)] if self.path.exists() else []
        write_table(pd.concat(old + [row], ignore_index=True), self.path)


# ---- the prompt pools ----

def read_prompts(run: Path, split: str) -> pd.DataFrame:
    """The prompts (prompt_id, prompt) of a split; no prompt may stand in two splits or in the seed."""
    path = Path(run) / "prompts.parquet"
    table = read_table(path, ("prompt_id", "prompt", "split"), "01_seed.py")
    repeated = table[table.prompt.duplicated(keep=False)]
    if len(repeated):
        first, second = repeated[repeated.prompt == repeated.prompt.iloc[0]].index[:2]
        raise UserError(f"{path}, row {second}: prompt {table.prompt[second]!r} stands in split "
                        f"{table.split[first]!r} already (row {first}); every prompt belongs to one split, drop one row")
    seed = Path(run) / "seed" / "pairs.parquet"
    if seed.exists():
        shared = table[table.prompt.isin(set(read_table(seed, ("prompt",), "01_seed.py").prompt))]
        if len(shared):
            raise UserError(f"{path}, row {shared.index[0]}: prompt {shared.prompt.iloc[0]!r} is one of the seed's "
                            f"({seed}); prompts of the rounds and of the evaluation must be new, drop the row")
    rows = table[table.split == split].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{path}: no prompt has split {split!r} (there are {', '.join(table.split.unique())})")
    return rows


def read_pairs(run: Path, relative: str, made_by: str) -> pd.DataFrame:
    """A table of pairs whose win and lose name images inside the run folder."""
    path = Path(run) / relative
    table = read_table(path, ("pair_id", "prompt", "win", "lose", "source"), made_by)
    for row, pair in table.iterrows():
        for column in ("win", "lose"):
            image = inside(run, pair[column], path, row)
            if not image.exists() and not latent_path(image).exists():
                raise UserError(f"{path}, row {row}: image {pair[column]} does not exist in {run}; restore it or drop "
                                f"the row")
    return table

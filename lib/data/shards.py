"""Parquet shards: one file, a folder of them, or a dataset on the hub.

Pick-a-Pic is 330 GB in some 645 shards, of which a run reads a few dozen. So a shard is opened, or
downloaded from the hub, only when it is asked for; of a shard that is open a small batch of rows is
in memory; and where prompts are all that is needed, only that column is fetched. What makes a row a
pair is said in pairs.py.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lib.data.tables import prompt_rows, shuffled
from lib.run import UserError

ROWS_HELD = 64                              # rows in memory at once: some 20 MB of Pick-a-Pic
BLOCK = 1 << 18                             # bytes that one request to the hub fetches of a column
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")         # a path, then, and not a hub id

# Shards that must not become training data.
OTHER_SPLIT = re.compile(r"(^|/)(test|val|validation)([-_./]|$)")

PICKAPIC_IS_GONE = (
    "Pick-a-Pic's own ids, yuvalkirstain/pickapic_v1 and _v2, have been gone from the hub since "
    "April 2025. Give --pairs a local folder of its Parquet shards, or a copy that others keep "
    "(neither is checked): liuhuohuo2/pick-a-pic-v2, or pickapic-anonymous/pickapic_v1 for v1"
)


@dataclass(frozen=True)
class Shards:
    """The Parquet files of a source: on this machine, or on the hub at the commit listed."""

    source: str                             # as the user gave it
    names: list[str]                        # relative to the folder or the dataset, unordered
    folder: Path | None                     # where they lie; None: on the hub
    commit: str | None = None               # of the hub's dataset

    def fetch(self, name: str) -> Path:
        """The whole file; from the hub it is downloaded into the hub's own cache."""
        if self.folder is not None:
            return self.folder / name

        # Imported here, since a run on local files has no need of the hub's library.
        from huggingface_hub import hf_hub_download

        with hub_errors(self.source):
            file = hf_hub_download(
                self.source, name, repo_type="dataset", revision=self.commit
            )
            return Path(file)

    def prompts(self, name: str) -> list[tuple[str, str]]:
        """(style or "", prompt) of a shard's rows; no image is read, nor fetched from the hub."""
        where = f"{self.source}, {name}"
        if self.folder is not None:
            return prompt_rows(self.folder / name, where)

        from huggingface_hub import HfFileSystem

        # Of a file on this file system, only what is read is fetched.
        path = f"datasets/{self.source}@{self.commit}/{name}"
        with hub_errors(self.source):
            return prompt_rows(HfFileSystem().open(path, block_size=BLOCK), where)


# ---- which shards there are ----

def find_shards(source: str, all_splits: bool = False) -> Shards:
    """The shards of a file, a folder or a hub dataset; UserError if there is none.

    Those of test and validation splits are left out unless `all_splits`; a single file is taken
    whatever its name.
    """
    path = Path(source)
    if path.is_file():
        return Shards(source, [path.name], path.parent)

    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*.parquet")]
        listed = Shards(source, names, path)
    elif HUB_ID.fullmatch(source) and path.suffix not in TABLE_SUFFIXES:
        listed = hub_shards(source)
    else:
        raise UserError(
            f"{source}: no such file or folder, nor a hub dataset id (owner/name); correct --pairs"
        )

    # Pick-a-Pic keeps its validation and test pairs beside the training ones.
    wanted = listed.names
    if not all_splits:
        wanted = [name for name in wanted if not OTHER_SPLIT.search(name)]
    if not wanted:
        but = " but of test and validation splits" if listed.names else ""
        raise UserError(
            f"{source}: no Parquet file in it{but}; "
            f"give --pairs training shards or one file of your own"
        )
    return replace(listed, names=wanted)


def hub_shards(source: str) -> Shards:
    """The Parquet files of a hub dataset, at the commit that stands now."""
    from huggingface_hub import HfApi

    with hub_errors(source):
        info = HfApi().dataset_info(source)
    names = []
    for file in info.siblings:
        if file.rfilename.endswith(".parquet"):
            names.append(file.rfilename)
    return Shards(source, names, folder=None, commit=info.sha)


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """What can go wrong between here and the hub becomes a UserError with a way round it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise

    # Each network library raises its own kinds of error.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        why = f"the hub did not give it ({type(error).__name__}: {text})"

        # Not its subclass GatedRepoError: there, terms are to be accepted.
        if type(error) is RepositoryNotFoundError:
            why = "no local file or folder, and the hub has no such dataset (404)"
        raise UserError(f"{source}: {why}. {PICKAPIC_IS_GONE}") from None


# ---- the rows of a shard ----

def shuffled_batches(
    table, name: str, seed: int, columns: tuple[str, ...]
) -> Iterator[list[tuple[int, dict]]]:
    """Batches of (row number, record) of an open Parquet file, in an order of seed and `name`.

    The row groups are shuffled, then the rows within each batch of `ROWS_HELD`, so that no more
    than a batch is in memory; columns that are not asked for stay unread.
    """
    sizes = []
    for group in range(table.num_row_groups):
        sizes.append(table.metadata.row_group(group).num_rows)

    for group in shuffled(range(len(sizes)), seed, name):
        # Rows are numbered through the file, from 1, whichever group comes first.
        first = sum(sizes[:group]) + 1
        for batch in table.iter_batches(ROWS_HELD, row_groups=[group], columns=columns):
            records = batch.to_pylist()
            numbers = shuffled(range(first, first + len(records)), seed, name)
            yield [(number, records[number - first]) for number in numbers]
            first += len(records)

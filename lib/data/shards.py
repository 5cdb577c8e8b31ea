"""Parquet shards: one file, a folder of them, or a dataset on the hub.

Pick-a-Pic is 330 GB in some 645 shards, of which a run reads a few dozen. So a shard is opened, or
downloaded from the hub, only when it is asked for; of a shard that is open a small batch of rows is
in memory; and where prompts are all that is needed, only that column is fetched. What makes a row a
pair is said in pairs.py.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from lib.data.tables import (brief, is_hidden, open_parquet, prompt_rows, shuffled,
                             suffix_of)
from lib.hub import HUB_ID
from lib.run import UserError

ROWS_HELD = 64                              # rows in memory at once: some 20 MB of Pick-a-Pic
BLOCK = 1 << 18                             # bytes that one request to the hub fetches of a column

# A path, then, and not a hub id.
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")

# Shards that must not become training data.
OTHER_SPLIT = re.compile(r"(^|/)(test|val|validation)([-_./]|$)")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# Pick-a-Pic's own ids are gone from the hub; these are copies that others keep.
PICKAPIC_GONE = ("yuvalkirstain/pickapic_v1", "yuvalkirstain/pickapic_v2")
PICKAPIC_COPIES = ("liuhuohuo2/pick-a-pic-v2", "pickapic-anonymous/pickapic_v1")


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

        with hub_errors(self.source):
            return prompt_rows(self.peek(name), where)

    def columns(self, name: str) -> list[str]:
        """The names of the columns of a shard on the hub, of which only the end is fetched."""
        with hub_errors(self.source), open_parquet(self.peek(name), name) as table:
            return table.schema_arrow.names

    def peek(self, name: str) -> BinaryIO:
        """A file on the hub, of which only what is read is fetched."""
        from huggingface_hub import HfFileSystem

        path = f"datasets/{self.source}@{self.commit}/{name}"
        return HfFileSystem().open(path, block_size=BLOCK)


# ---- which shards there are ----

def find_shards(source: str, all_splits: bool = False) -> Shards:
    """The shards of a file, a folder or a hub dataset; UserError if there is none.

    Those of test and validation splits are left out unless `all_splits`; a single file is taken
    whatever its name.
    """
    # os.path says no of what is no name of a file at all, where Path would raise an error.
    path = Path(source)
    if os.path.isfile(source):
        return Shards(source, [path.name], path.parent)

    if os.path.isdir(source):
        files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        listed = Shards(source, parquet_names(files), path)
    elif HUB_ID.fullmatch(source) and suffix_of(path) not in TABLE_SUFFIXES:
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
    names = parquet_names(Path(file.rfilename) for file in info.siblings)
    return Shards(source, names, folder=None, commit=info.sha)


def parquet_names(files: Iterable[Path]) -> list[str]:
    """The Parquet files among those of a source, without hidden ones."""
    return [file.as_posix() for file in files
            if suffix_of(file) == ".parquet" and not is_hidden(file)]


@contextlib.contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """What can go wrong between here and the hub becomes a UserError with a way round it."""
    try:
        yield
    except UserError:
        raise

    # Each network library raises its own kinds of error. A full disk is not the hub's fault.
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(
            f"{source}: {hub_problem(error)}, or give --pairs a local folder of Parquet shards"
            f"{pickapic_copies(source, error)}"
        ) from None


def hub_problem(error: Exception) -> str:
    """Why the hub did not give what it was asked for, and what to do there."""
    from huggingface_hub.errors import (HfHubHTTPError, LocalEntryNotFoundError,
                                        OfflineModeIsEnabled, RepositoryNotFoundError)

    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return "the hub is out of reach, or HF_HUB_OFFLINE is set; mend the network or unset it"

    # Not its subclass GatedRepoError: there, terms are to be accepted.
    if type(error) is RepositoryNotFoundError:
        return "no local file or folder, and the hub has no such dataset (404); correct the id"
    if isinstance(error, HfHubHTTPError):
        return f"the hub did not give it ({brief(error)}); look at its page there"
    return f"the hub is out of reach ({brief(error)}); mend the network"


def pickapic_copies(source: str, error: Exception) -> str:
    """Where else the hub has Pick-a-Pic, if it has answered and that is what was asked for."""
    from huggingface_hub.errors import HfHubHTTPError

    names = PICKAPIC_GONE + PICKAPIC_COPIES
    if source not in names or not isinstance(error, HfHubHTTPError):
        return ""
    copies = " or ".join(copy for copy in PICKAPIC_COPIES if copy != source)
    return (f" or another copy of Pick-a-Pic, which nobody here has checked: {copies} "
            f"({' and '.join(PICKAPIC_GONE)} have been gone since April 2025)")


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

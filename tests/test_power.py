"""A power cut at any moment: what was not brought to the disk is gone; the run ends the same."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from conftest import MINI, call, same_tensors, weights_of

from lib import files, packs


class PowerCut(BaseException):
    pass


class Disk:
    """The folder `root` on a disk that keeps what it must, and loses all else at a power cut.

    A file's bytes are there if it was flushed since it was written; a name, new or renamed, if its
    folder was flushed since. The power fails after so many `renames`.
    """

    def __init__(self, root: Path, renames: int, monkeypatch):
        self.root, self.left = root, renames
        self.flushed = {}           # inode: (size, time of change) as of its last flush
        self.names = []             # (path, what it named before or None) since its folder's flush
        self.real = {name: getattr(os, name) for name in ("replace", "fsync", "mkdir", "unlink")}
        for name in self.real:
            monkeypatch.setattr(os, name, getattr(self, name))
        for path in root.rglob("*"):
            self.flushed[path.stat().st_ino] = state_of(path)

    def replace(self, source, target, **options):
        target = Path(target)
        if self.left == 0:
            raise PowerCut
        self.left -= 1

        before = None
        if target.is_file():
            before = target.read_bytes()
        self.real["replace"](source, target, **options)
        self.names.append((target, before))

    def mkdir(self, path, *options, **more):
        self.real["mkdir"](path, *options, **more)
        self.names.append((Path(path), None))

    def unlink(self, path, **options):
        if self.left == 0:
            raise PowerCut
        self.real["unlink"](path, **options)

    def fsync(self, descriptor):
        if self.left == 0:
            raise PowerCut
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.flushed[os.fstat(descriptor).st_ino] = state_of(path)
        if path.is_dir():
            self.names = [(name, before) for name, before in self.names if name.parent != path]

    def lose(self) -> int:
        """What the disk has after the cut; returns how many files and names are lost."""
        kept = itertools.cycle([0, .5, 1])          # then an empty file, zeros behind, all of it
        lost = 0
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and self.flushed.get(path.stat().st_ino) != state_of(path):
                content = path.read_bytes()
                start = content[:int(len(content) * next(kept))]
                if start:
                    start = start.ljust(len(content), b"\0")
                path.write_bytes(start)
                lost += start != content

        # Of the names that are not on the disk every second one is lost, the others came through.
        for path, before in reversed(self.names[::2]):
            lost += path.exists()
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()
                if before is not None:
                    path.write_bytes(before)
        return lost


def state_of(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


# So many renames after the last cut: in stages 01, 01, 04, 02 and 03.
CUTS = (9, 100, 5, 26, 9)
STAGES = (("01", *MINI), ("04", "--iter", "0"), ("02", "--iter", "1"), ("03", "--iter", "1"),
          ("04", "--iter", "1"))

# With --keep pairs: in stage 02, whose latents are one file, before and after that; and in 03.
CUTS_OF_A_ROUND = (1, 2, 3, 6, 9)


def cut_again_and_again(run: Path, stages: tuple, cuts: tuple, *more: str) -> tuple[int, int]:
    """Begun again after each cut by the driver's tidying up and the same stages; returns how often
    the power failed, and how much was lost."""
    from lib.lock import tidy
    lost, failures = 0, 0
    for renames in (*cuts, 10 ** 9):
        files._unsettled.clear()
        packs.look_again()
        tidy(run)
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Disk(run, renames, monkeypatch)
            try:
                for stage, *arguments in stages:
                    if stage == "01" and (run / "prompts.parquet").exists():
                        continue
                    assert call(stage, run, *arguments, *more) is None
            except PowerCut:
                failures += 1
                monkeypatch.undo()
                lost += disk.lose()
    return failures, lost


def test_a_power_cut_loses_nothing_that_cannot_be_made_again(mini, tmp_path):
    run = tmp_path / "mini"
    run.mkdir()
    failures, lost = cut_again_and_again(run, STAGES, CUTS)
    assert (failures, lost > 10) == (len(CUTS), True)
    for k in (0, 1):
        assert same_tensors(weights_of(mini, k), weights_of(run, k))


def test_nor_does_it_where_candidates_are_their_latents(mini, tmp_path):
    run = shutil.copytree(mini, tmp_path / "mini", ignore=shutil.ignore_patterns("iter[12]"))
    failures, lost = cut_again_and_again(run, STAGES[2:], CUTS_OF_A_ROUND, "--keep", "pairs")
    assert (failures, lost > 3) == (len(CUTS_OF_A_ROUND), True)
    assert same_tensors(weights_of(mini, 1), weights_of(run, 1))
    assert not list(run.glob("iter1/images/*.png"))


def test_a_table_is_on_the_disk_after_what_it_names(tmp_path):
    """The same order for the folder of a model."""
    import pandas as pd

    from lib.files import place_folder
    from lib.run import atomic, write_table
    for last in ("table", "model"):
        run = tmp_path / last
        run.mkdir()
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = Disk(run, 10, monkeypatch)
            with atomic(run / "new/images/1.png") as temporary:
                temporary.write_bytes(b"picture")
            if last == "table":
                write_table(pd.DataFrame({"image": ["1.png"]}), run / "table.parquet")
            else:
                (run / "unet.tmp").mkdir()
                (run / "unet.tmp/weights").write_bytes(b"weights")
                place_folder(run / "unet.tmp", run / "unet")
        assert disk.names == []
        assert disk.lose() == 0
        assert (run / "new/images/1.png").read_bytes() == b"picture"

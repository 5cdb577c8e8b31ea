"""Human pairs from outside: Pick-a-Pic shards, the hub, the user's tables, pictures."""

import errno
import io
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import (
    ROOT,
    encoded,
    fails_with,
    fake_hub,
    http_error,
    jpeg,
    make_shards,
    picture,
    shard_row,
    write_rows,
    write_shard,
)
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import EpsImagePlugin, Image

from lib.data.folders import count_pairs, is_own
from lib.data.pairs import stream_pairs
from lib.data.pictures import decode, digest
from lib.data.prompts import pair_prompts, read_prompt_file
from lib.eval.rows import image_jobs
from lib.run import UserError, open_image, open_made

SIDES = ("win", "lose")


def ids_of(source: Path | str, seed: int, count: int | None = None) -> list[str]:
    """The ids of the first `count` pairs of a source, or of all, in their order."""
    return [pair["pair_id"] for pair in itertools.islice(stream_pairs(str(source), seed), count)]


def prompts_of(source: Path | str, seed: int, count: int | None = None) -> list[str]:
    return [pair["prompt"] for pair in itertools.islice(stream_pairs(str(source), seed), count)]


# ---- Pick-a-Pic shards: what is a pair ----

def test_the_preferred_picture_comes_first(tmp_path):
    write_shard(tmp_path / "train-0.parquet", [shard_row(i) for i in range(6)], row_group_size=4)
    pairs = list(stream_pairs(str(tmp_path), 0))
    assert len(pairs) == 6
    for pair in pairs:
        number = int(pair["prompt"].split()[1])
        assert pair["win"] == jpeg(2 * number)
        assert pair["lose"] == jpeg(2 * number + 1)


ODD_ROWS = [
    ("tie", shard_row(10, label_0=.5, label_1=.5)),
    ("no label", shard_row(11, has_label=False)),
    ("no label", shard_row(20, label_0=None, label_1=None)),
    ("no label", shard_row(25, label_0=1., label_1=1.)),
    ("unreadable image", shard_row(12, jpg_1=jpeg(24)[:-20])),
    ("unreadable image", shard_row(22, jpg_0=b"")),
    ("unreadable image", shard_row(23, jpg_0=None)),
    ("unreadable image", shard_row(24, jpg_0=b"not an image")),
    ("empty prompt", shard_row(13, caption="  ")),
    ("empty prompt", shard_row(21, caption=None)),
    ("same image twice", shard_row(14, jpg_0=jpeg(1), jpg_1=jpeg(1))),
    ("repeated pair", shard_row(2)),
]


@pytest.mark.parametrize("reason, row", ODD_ROWS)
def test_an_odd_row_is_skipped_and_counted(tmp_path, reason, row):
    write_shard(tmp_path / "train-0.parquet", [shard_row(i) for i in range(3)] + [row])
    skipped = Counter()
    pairs = list(stream_pairs(str(tmp_path), 0, skipped))
    assert sorted(pair["prompt"] for pair in pairs) == ["prompt 0", "prompt 1", "prompt 2"]
    assert skipped == {reason: 1}


def test_odd_rows_are_counted_by_reason(tmp_path):
    rows = [shard_row(i) for i in range(6)] + [row for _, row in ODD_ROWS]
    write_shard(tmp_path / "train-0.parquet", rows, row_group_size=4)
    skipped = Counter()
    pairs = list(stream_pairs(str(tmp_path), 0, skipped))
    assert len({pair["pair_id"] for pair in pairs}) == 6
    assert skipped == Counter(reason for reason, _ in ODD_ROWS)


def test_a_prompt_may_come_again_and_need_not_be_ascii(tmp_path):
    captions = ["猫 à la carte 🐈", "猫 à la carte 🐈", " a dog "]
    rows = [shard_row(i, caption=caption) for i, caption in enumerate(captions)]
    write_shard(tmp_path / "0.parquet", rows)
    assert Counter(prompts_of(tmp_path, 0)) == {"猫 à la carte 🐈": 2, "a dog": 1}
    assert len(set(ids_of(tmp_path, 0))) == 3


def test_images_of_every_mode_are_pairs(tmp_path):
    kinds = [
        encoded(picture(1, mode="RGBA"), "PNG"),
        encoded(picture(2, mode="CMYK")),
        encoded(picture(3, mode="L")),
        encoded(picture(4, mode="P"), "PNG"),
        encoded(picture(5), "WEBP"),
    ]
    write_shard(tmp_path / "0.parquet", [shard_row(i, jpg_0=kind) for i, kind in enumerate(kinds)])
    skipped = Counter()
    pairs = list(stream_pairs(str(tmp_path), 0, skipped))
    assert len(pairs) == 5
    assert not skipped
    for pair in pairs:
        assert decode(pair["win"], 16).mode == "RGB"
        assert decode(pair["lose"], 16).mode == "RGB"


def test_pairs_with_a_prompt_of_the_evaluation_are_left_out_unread(tmp_path):
    taken = shard_row(9, caption="Taken  PROMPT", jpg_0=b"not an image")
    write_shard(tmp_path / "0.parquet", [shard_row(i) for i in range(4)] + [taken])
    skipped = Counter()
    avoid = ["taken prompt ", "prompt 2", "other"]
    pairs = list(stream_pairs(str(tmp_path), 0, skipped, avoid))
    assert {pair["prompt"] for pair in pairs} == {"prompt 0", "prompt 1", "prompt 3"}
    assert skipped == {"prompt of the evaluation": 2}


def test_a_copy_that_stores_images_as_structs(tmp_path):
    row = shard_row(1)
    for side in ("jpg_0", "jpg_1"):
        row[side] = {"bytes": row[side], "path": None}
    write_shard(tmp_path / "0.parquet", [row])
    pair, = stream_pairs(str(tmp_path), 0)
    assert pair["win"] == jpeg(2)
    assert pair["lose"] == jpeg(3)


# ---- Pick-a-Pic shards: which are opened, and in which order ----

@pytest.fixture(scope="module")
def four_shards(tmp_path_factory) -> Path:
    """A folder of 4 shards of 30 pairs each; only to be read."""
    return make_shards(tmp_path_factory.mktemp("shards"))


def test_the_seed_decides_the_order(four_shards):
    first, second = ids_of(four_shards, 0), ids_of(four_shards, 1)
    assert len(set(first)) == 120
    assert first == ids_of(four_shards, 0)
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_order_of_the_listing_does_not_matter(four_shards, monkeypatch):
    before = ids_of(four_shards, 0, 40)
    listed = Path.rglob

    def backwards(self, pattern):
        return reversed(list(listed(self, pattern)))

    monkeypatch.setattr(Path, "rglob", backwards)
    assert ids_of(four_shards, 0, 40) == before


def test_rows_are_shuffled_and_not_only_shards(four_shards):
    numbers = [int(prompt.split()[1]) for prompt in prompts_of(four_shards, 0, 10)]
    assert numbers != sorted(numbers)


def test_no_more_shards_are_opened_than_needed(four_shards, opened_shards):
    stream = stream_pairs(str(four_shards), 0)
    assert opened_shards == []

    list(itertools.islice(stream, 30))
    assert len(opened_shards) == 1

    next(stream)
    assert len(opened_shards) == 2

    assert len(list(stream)) == 89
    assert len(set(opened_shards)) == 4


def test_different_seeds_start_at_different_shards(four_shards, opened_shards):
    for seed in range(8):
        next(stream_pairs(str(four_shards), seed))
    assert len(set(opened_shards)) > 1


def test_a_row_group_is_never_all_in_memory(tmp_path):
    """Measured in a process of its own: Arrow's peak is of the whole process."""
    noise = np.random.default_rng(0)
    rows = []
    for i in range(600):
        padded = jpeg(i) + noise.bytes(100_000)
        rows.append(shard_row(i, unused=noise.bytes(100_000), jpg_0=padded))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=600, write_batch_size=16)

    code = """if True:
        import sys, pyarrow
        from lib.data.pairs import stream_pairs
        count = sum(1 for _ in stream_pairs(sys.argv[1], 0))
        print(count, pyarrow.default_memory_pool().max_memory())
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    count, peak = map(int, done.stdout.split())
    assert count == 600, done.stderr
    assert peak < 30e6                                  # the row group's jpg_0 alone are 60 MB


def test_validation_and_test_shards_are_left_alone(tmp_path, opened_shards):
    make_shards(tmp_path, count=1, rows=3)
    write_shard(tmp_path / "data/validation_unique-00000-of-00001.parquet", [shard_row(900)])
    write_shard(tmp_path / "data/test-00000-of-00014.parquet", [shard_row(901)])
    write_shard(tmp_path / "default/test/0000.parquet", [shard_row(902)])
    assert sorted(prompts_of(tmp_path, 0)) == ["prompt 0", "prompt 1", "prompt 2"]
    assert set(opened_shards) == {"train-00000-of-00001.parquet"}


def test_a_folder_of_test_shards_alone_is_refused(tmp_path):
    write_shard(tmp_path / "test/0000.parquet", [shard_row(902)])
    message = fails_with("no Parquet file", stream_pairs, str(tmp_path), 0)
    assert "but of test and validation splits" in message


# ---- Pick-a-Pic shards that cannot be used ----

def test_a_source_that_is_not_there(tmp_path):
    fails_with("no such file or folder, nor a hub", stream_pairs, str(tmp_path / "gone"), 0)


def test_a_folder_without_shards(tmp_path):
    fails_with("no Parquet file.*give --pairs", stream_pairs, str(tmp_path), 0)


def test_shards_without_any_pair(tmp_path):
    ties = [shard_row(i, label_0=.5, label_1=.5) for i in range(3)]
    write_shard(tmp_path / "0.parquet", ties)
    fails_with(r"no usable pair \(tie 3\)", stream_pairs, str(tmp_path), 0)


def test_a_shard_that_misses_a_column(tmp_path):
    row = shard_row(1)
    del row["label_1"]
    write_shard(tmp_path / "0.parquet", [row])
    fails_with("0.parquet: no column 'label_1'", stream_pairs, str(tmp_path), 0)


def test_a_shard_that_breaks_off(tmp_path):
    shard = write_shard(tmp_path / "0.parquet", [shard_row(1)])
    shard.write_bytes(shard.read_bytes()[:500])
    fails_with("0.parquet: not a readable Parquet file.*fetch", stream_pairs, str(tmp_path), 0)


def test_a_caption_that_is_no_utf_8(tmp_path):
    table = pa.Table.from_pylist([shard_row(1), shard_row(2)])
    captions = pa.array([b"prompt 1", b"\xff"]).view(pa.string())
    table = table.set_column(table.column_names.index("caption"), "caption", captions)
    pq.write_table(table, tmp_path / "0.parquet")
    match = "0.parquet: not a readable Parquet file .UnicodeDecodeError"
    fails_with(match, stream_pairs, str(tmp_path), 0)
    fails_with(match, pair_prompts, str(tmp_path), 0, (), 9)


# ---- the hub ----

def test_hub_shards_come_one_by_one_in_the_order_of_a_local_copy(tmp_path, monkeypatch):
    make_shards(tmp_path)
    (tmp_path / "README.md").write_text("not a shard")
    fetched = fake_hub(monkeypatch, tmp_path)
    ids = ids_of("some/pairs", 3, 31)
    assert len(fetched) == 2
    assert ids == ids_of(tmp_path, 3, 31)


def test_hub_prompts_are_peeked_at_and_nothing_is_downloaded(four_shards, monkeypatch):
    fetched = fake_hub(monkeypatch, four_shards)
    taken = {"PROMPT 1", "prompt  2"}
    prompts = pair_prompts("some/pairs", 0, taken, 40)
    assert len(set(prompts)) == 40
    assert not {"prompt 1", "prompt 2"} & set(prompts)
    assert len(fetched) == 2
    assert all(name.startswith("peek ") for name in fetched)
    assert prompts == pair_prompts(str(four_shards), 0, taken, 40)


GONE = http_error("RepositoryNotFoundError", 404)
NO_NETWORK = ConnectionError("[Errno -3] no name resolution")
LOCAL = "or give --pairs a local folder of Parquet shards"


@pytest.mark.parametrize("call", [
    lambda source: stream_pairs(source, 0),
    lambda source: pair_prompts(source, 0, set(), 5),
], ids=["pairs", "prompts"])
@pytest.mark.parametrize("source, error, match", [
    ("yuvalkirstain/pickapic_v2", GONE, "404.* liuhuohuo2/pick-a-pic-v2 or .*April 2025"),
    ("liuhuohuo2/pick-a-pic-v2", GONE, "404.*: pickapic-anonymous/pickapic_v1 .yuval"),
    ("some/pairs", GONE, f"404.; correct the id, {LOCAL}$"),
    ("some/pairs", http_error("GatedRepoError", 403), "GatedRepoError: .*look at its page"),
    ("some/pairs", http_error("HfHubHTTPError", 503), "did not give it .HfHubHTTPError"),
    ("liuhuohuo2/pick-a-pic-v2", NO_NETWORK, f"of reach .*no name.*mend the network, {LOCAL}$"),
    ("some/pairs", OfflineModeIsEnabled("offline"), f"HF_HUB_OFFLINE is set.*unset it, {LOCAL}$"),
])
def test_a_hub_that_fails_tells_why_and_the_ways_round(
    tmp_path, monkeypatch, source, error, match, call
):
    fake_hub(monkeypatch, tmp_path, error)
    assert fails_with(match, call, source).startswith(f"{source}: ")


def test_a_full_disk_is_not_told_as_the_hubs_fault(tmp_path, monkeypatch):
    fake_hub(monkeypatch, tmp_path, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        list(stream_pairs("some/pairs", 0))


def test_a_download_that_breaks_off(four_shards, monkeypatch):
    import huggingface_hub

    def download(*_, **__):
        raise TimeoutError("read timed out")

    fake_hub(monkeypatch, four_shards)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fails_with("TimeoutError: read timed out", stream_pairs, "some/pairs", 0)


# ---- the user's own tables ----

FORMATS = [".csv", ".jsonl", ".parquet"]


def user_rows(folder: Path, count: int = 12) -> list[dict]:
    """Rows of a table in `folder`, whose pictures lie in its images/."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        row = {"prompt": f'a cat, "no. {i}", ü'}
        for side, number in (("win", 2 * i), ("lose", 2 * i + 1)):
            row[side] = f"images/{number}.jpg"
            (folder / row[side]).write_bytes(jpeg(number))
        rows.append(row)
    return rows


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_of_each_format_gives_its_pairs(tmp_path, suffix):
    rows = user_rows(tmp_path)
    path = write_rows(tmp_path / f"my{suffix}", rows)
    given = [(row["prompt"], tmp_path / row["win"], tmp_path / row["lose"]) for row in rows]
    pairs = [(pair["prompt"], pair["win"], pair["lose"]) for pair in stream_pairs(str(path), 0)]
    assert sorted(pairs) == sorted(given)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_tables_rows_come_in_the_seeds_order(tmp_path, suffix):
    rows = user_rows(tmp_path)
    path = write_rows(tmp_path / f"my{suffix}", rows)
    order = prompts_of(path, 0)
    assert order != [row["prompt"] for row in rows]
    assert order == prompts_of(path, 0)
    assert order != prompts_of(path, 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_in_the_current_folder(tmp_path, suffix, monkeypatch):
    path = write_rows(tmp_path / f"my{suffix}", user_rows(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(list(stream_pairs(path.name, 0))) == 12


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_prompts_of_a_table(tmp_path, suffix):
    rows = user_rows(tmp_path)
    path = write_rows(tmp_path / f"my{suffix}", rows)
    prompts = pair_prompts(str(path), 0, {rows[0]["prompt"]}, 99)
    assert set(prompts) == {row["prompt"] for row in rows[1:]}


def test_parquet_with_bytes_or_structs_gives_the_same_pairs_as_files(tmp_path):
    rows = user_rows(tmp_path)
    in_each_way = {"paths": rows, "bytes": [], "structs with bytes": [], "structs with paths": []}
    for row in rows:
        content = {side: (tmp_path / row[side]).read_bytes() for side in SIDES}
        in_each_way["bytes"].append(row | content)
        in_each_way["structs with bytes"].append(
            row | {side: {"bytes": content[side], "path": "x.jpg"} for side in SIDES})
        in_each_way["structs with paths"].append(
            row | {side: {"bytes": None, "path": row[side]} for side in SIDES})

    ids = {}
    for way, table in in_each_way.items():
        ids[way] = set(ids_of(write_shard(tmp_path / f"{way}.parquet", table), 0))
    assert len(ids["paths"]) == 12
    for way in in_each_way:
        assert ids[way] == ids["paths"], way


def test_a_tables_rows_without_a_pair_are_counted(tmp_path):
    rows = user_rows(tmp_path, 3)
    odd = [rows[0], rows[1] | {"prompt": " "}, rows[1] | {"lose": rows[1]["win"]}]
    path = write_rows(tmp_path / "my.csv", rows + odd)
    skipped = Counter()
    assert len(list(stream_pairs(str(path), 0, skipped))) == 3
    assert skipped == {"repeated pair": 1, "empty prompt": 1, "same image twice": 1}


# ---- pairs as other programs write them ----

def chosen(row: dict, number: int) -> dict:
    return {"prompt": row["prompt"], "chosen": row["win"], "rejected": row["lose"]}


def prefer(row: dict, number: int) -> dict:
    """The winner is now the first picture, now the second."""
    first = number % 2 == 0
    images = (row["win"], row["lose"]) if first else (row["lose"], row["win"])
    return {"image_0": images[0], "image_1": images[1], "prompt": row["prompt"],
            "prefer_0": first, "prefer_1": not first}


def as_structs(row: dict, folder: Path) -> dict:
    """A row as the datasets library writes it: pictures within the table."""
    return row | {name: {"bytes": (folder / row[name]).read_bytes(), "path": row[name]}
                  for name in ("chosen", "rejected")}


def two_folders(folder: Path, rows: list[dict], captions: str = "w") -> str:
    for number, row in enumerate(rows):
        for name, side in (("w", "win"), ("l", "lose")):
            (folder / name).mkdir(exist_ok=True)
            (folder / row[side]).rename(folder / name / f"{number}.jpg")
        (folder / captions / f"{number}.txt").write_text(f"{row['prompt']}\n")
    return str(folder)


# How a program writes a user's rows -> what --pairs is given.
LAYOUTS = {
    "chosen.csv": lambda folder, rows: write_rows(folder / "a.csv", rows_as(chosen, rows)),
    "chosen.jsonl": lambda folder, rows: write_rows(folder / "a.jsonl", rows_as(chosen, rows)),
    "chosen.parquet": lambda folder, rows: write_rows(
        folder / "a.parquet", [as_structs(row, folder) for row in rows_as(chosen, rows)]),
    "prefer.jsonl": lambda folder, rows: write_rows(folder / "b.jsonl", rows_as(prefer, rows)),
    "prefer.csv": lambda folder, rows: write_rows(folder / "b.csv", rows_as(prefer, rows)),
    "invoke-training's folder": lambda folder, rows: write_rows(
        folder / "metadata.jsonl", rows_as(prefer, rows)).parent,
    "a labelling folder": lambda folder, rows: write_rows(folder / "pairs.csv", rows).parent,
    "two folders": two_folders,
    "two folders, captions of the losers": lambda folder, rows: two_folders(folder, rows, "l"),
}


def rows_as(layout, rows: list[dict]) -> list[dict]:
    return [layout(row, number) for number, row in enumerate(rows)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_as_other_programs_write_them(tmp_path, name):
    rows = user_rows(tmp_path, 6)
    wanted = sorted((row["prompt"], *((tmp_path / row[side]).read_bytes() for side in SIDES))
                    for row in rows)
    source = str(LAYOUTS[name](tmp_path, rows))

    def content(picture):
        return picture if isinstance(picture, bytes) else picture.read_bytes()

    pairs = [(pair["prompt"], content(pair["win"]), content(pair["lose"]))
             for pair in stream_pairs(source, 0)]
    assert sorted(pairs) == wanted
    assert sorted(pair_prompts(source, 0, (), 99)) == sorted(row["prompt"] for row in rows)
    assert (is_own(source), count_pairs(source)) == (True, 6)
    assert ids_of(source, 0) == ids_of(source, 0) != ids_of(source, 1)


def test_a_preference_for_neither_picture_is_no_pair(tmp_path):
    rows = rows_as(prefer, user_rows(tmp_path, 4))
    rows[1] |= {"prefer_0": False, "prefer_1": False}
    rows[2] |= {"prefer_0": .5, "prefer_1": .5}
    skipped = Counter()
    pairs = list(stream_pairs(str(write_rows(tmp_path / "b.jsonl", rows)), 0, skipped))
    assert len(pairs) == 2 and skipped == {"no label": 1, "tie": 1}


def test_broken_pictures_on_the_hub_are_skipped_and_ones_own_are_named(tmp_path, monkeypatch):
    rows = [as_structs(row, tmp_path) for row in rows_as(chosen, user_rows(tmp_path, 4))]
    rows[2]["rejected"] = {"bytes": jpeg(1)[:-20], "path": None}
    rows[3]["chosen"] = None
    write_shard(tmp_path / "hub/data/train-0.parquet", rows)
    fake_hub(monkeypatch, tmp_path / "hub")
    skipped = Counter()
    assert len(list(stream_pairs("someone/preferences", 0, skipped))) == 2
    assert skipped == {"unreadable image": 2}
    fails_with("row [34]: ", stream_pairs, str(tmp_path / "hub"), 0)


@pytest.mark.parametrize("change, match", [
    (lambda folder: (folder / "l/1.jpg").unlink(), "w/1.jpg: no picture of that name in .*/l; add"),
    (lambda folder: (folder / "w/1.jpg").unlink(), "l/1.jpg: no picture of that name in .*/w; add"),
    (lambda folder: (folder / "w/1.txt").unlink(), "w/1.jpg: no caption 1.txt beside it; write"),
    (lambda folder: (folder / "w/1.png").touch(), "w/1.png: 1.jpg beside it has the same"),
    (lambda folder: (folder / "l/2.jpg").write_bytes(b"x"), "w/2.jpg: cannot read an image"),
    (lambda folder: ((folder / "w/1.txt").unlink(), (folder / "w/1.txt").symlink_to(__file__)),
     "w/1.txt: leaves .* through a link; copy"),
])
def test_two_folders_that_do_not_fit_are_told(tmp_path, change, match):
    two_folders(tmp_path, user_rows(tmp_path, 3))
    change(tmp_path)
    fails_with(match, stream_pairs, str(tmp_path), 0)


def test_a_labelling_folder_without_labels_is_told_how_to_get_some(tmp_path):
    (tmp_path / "shown.parquet").touch()
    fails_with("has no labels yet; give some with ./run_sail.sh label --run", stream_pairs,
               str(tmp_path), 0)


# ---- the user's own tables that cannot be used ----

@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("bad, match", [
    ("/etc/hostname", ".* leaves the table's folder"),
    ("../outside.jpg", ".* leaves the table's folder"),
    ("images/../images/0.jpg", ".* leaves the table's folder"),
    ("link.jpg", ".* leaves the table's folder through a link"),
    ("a\0b", "no file "),
    ("x" * 5000, "no file 'xxx"),
    ("images/none.jpg", "no file 'images/none.jpg'"),
    ("", "no image but ''"),
    ("images/cut.jpg", "cannot read an image .*truncated.*replace it"),
])
def test_a_bad_image_names_file_row_and_remedy(tmp_path, suffix, bad, match):
    folder = tmp_path / "mine"
    rows = user_rows(folder, 3)
    (tmp_path / "outside.jpg").write_bytes(jpeg(0))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "images" / "cut.jpg").write_bytes(jpeg(1)[:-10])
    path = write_rows(folder / f"my{suffix}", rows[:2] + [rows[2] | {"lose": bad}])
    message = fails_with(rf"my{suffix}, row 3: {match}", stream_pairs, str(path), 0)
    assert len(message) < 500


def test_pictures_behind_a_link_are_had_as_the_message_says(tmp_path):
    rows = user_rows(tmp_path / "photos", 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/images").symlink_to(tmp_path / "photos/images")
    path = write_rows(tmp_path / "mine/my.csv", rows)
    place = tmp_path / "photos/images"
    fails_with(rf"move the table to where the pictures are \({place}\)", stream_pairs, str(path), 0)

    # Moved; and a folder that is named through a link is no link out of it.
    for row in rows:
        for side in SIDES:
            row[side] = row[side].removeprefix("images/")
    write_rows(place / "my.csv", rows)
    assert len(ids_of(tmp_path / "mine/images/my.csv", 0)) == 3


PICTURE = jpeg(1)
HUGE = "x" * 100_000


@pytest.mark.parametrize("suffix, changes, match", [
    (".jsonl", {"prompt": 5}, "prompt is 5 and no text"),
    (".jsonl", {"prompt": ["a", HUGE]}, "prompt is .'a', 'xxx"),
    (".jsonl", {"prompt": {"a": 1}}, "prompt is {'a': 1} and no text"),
    (".jsonl", {"prompt": "half \ud800"}, r"prompt 'half \\ud800' has half a character"),
    (".jsonl", {"win": [HUGE]}, "no image but .'xxx"),
    (".jsonl", {"win": None}, "no image but None"),
    (".jsonl", {"win": "\ud800.png"}, r"no file '\\ud800.png'"),
    (".parquet", {"prompt": 5}, "prompt is 5 and no text"),
    (".parquet", {"prompt": b"a"}, "prompt is b'a' and no text"),
    (".parquet", {"win": [PICTURE]}, "no image but .b'"),
    (".parquet", {"win": b"%!PS " + HUGE.encode()}, "cannot read an image .no whole PNG, JPEG"),
    (".parquet", {"win": PICTURE[:-20]}, "cannot read an image .OSError: image file is truncated"),
    (".parquet", {"win": {"bytes": None, "path": HUGE}}, "no file 'xxx"),
])
def test_an_odd_cell_is_told_in_one_short_line(tmp_path, suffix, changes, match):
    row = {"prompt": "a", "win": "images/0.jpg", "lose": "images/1.jpg"}
    user_rows(tmp_path, 1)
    path = tmp_path / f"my{suffix}"
    if suffix == ".jsonl":
        path.write_text(json.dumps(row | changes))
    else:
        write_shard(path, [row | changes])
    message = fails_with(f"my{suffix}, row 1: {match}", stream_pairs, str(path), 0)
    assert len(message) < 500


@pytest.mark.parametrize("changes, match", [
    ({"label_0": [1.], "label_1": [0.]}, r"label_0 is \[1.0\] and no number; write 1"),
    ({"label_0": "yes", "label_1": "0"}, "label_0 is 'yes' and no number"),
    ({"caption": 7}, "caption is 7 and no text"),
    ({"caption": b"a cat"}, "caption is b'a cat' and no text"),
    ({"caption": ["a cat"]}, "caption is .'a cat'. and no text"),
    ({"jpg_0": "picture.jpg"}, "jpg_0 is 'picture.jpg' and no picture's bytes"),
    ({"jpg_1": [PICTURE]}, "jpg_1 is .b'"),
])
def test_columns_of_another_kind_than_pick_a_pics(tmp_path, monkeypatch, changes, match):
    # A text that happens to be the name of a picture here is not opened.
    monkeypatch.chdir(tmp_path)
    Path("picture.jpg").write_bytes(PICTURE)
    write_shard(tmp_path / "0.parquet", [shard_row(i) | changes for i in range(2)])
    message = fails_with(f"0.parquet, row [12]: {match}", stream_pairs, str(tmp_path), 0)
    assert len(message) < 400


@pytest.mark.parametrize("name", ["MY.CSV", "My.JsonL", "MY.PARQUET"])
def test_a_name_in_capitals_is_of_the_same_format(tmp_path, name):
    rows = user_rows(tmp_path, 3)
    path = write_rows(tmp_path / name.lower(), rows).rename(tmp_path / name)
    assert len(ids_of(path, 0)) == 3
    assert set(pair_prompts(str(path), 0, (), 9)) == {row["prompt"] for row in rows}
    if name.endswith("PARQUET"):
        assert len(ids_of(tmp_path, 0)) == 3


@pytest.mark.parametrize("hidden", ["._0.parquet", ".cache/1.parquet", "data/._1.parquet"])
def test_hidden_files_of_a_folder_are_no_shards(tmp_path, monkeypatch, hidden):
    write_shard(tmp_path / "0.parquet", [shard_row(1)])
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_bytes(b"\0\5\x16\7 Mac OS X")
    fake_hub(monkeypatch, tmp_path)
    assert len(ids_of(tmp_path, 0)) == len(ids_of("some/pairs", 0)) == 1


def test_a_folder_that_is_named_like_a_shard_holds_shards(tmp_path):
    write_shard(tmp_path / "all.parquet/part-0.parquet", [shard_row(1)])
    assert len(ids_of(tmp_path, 0)) == len(ids_of(tmp_path / "all.parquet", 0)) == 1


@pytest.mark.parametrize("address", [
    "https://x.org/a.csv", "s3://bucket/a.parquet", "s3:/bucket/a.parquet", "file://{}/a.parquet",
    "file:{}/a.parquet",
])
def test_an_address_is_no_file_and_nothing_is_opened(tmp_path, opened_shards, address):
    write_shard(tmp_path / "a.parquet", [shard_row(1)])
    address = address.format(tmp_path)
    fails_with("no such file or folder", stream_pairs, address, 0)
    fails_with("not (a )?readable .*No such file", read_prompt_file, address)
    assert opened_shards == []


def test_absolute_paths_are_refused_even_within_the_folder(tmp_path):
    row, = user_rows(tmp_path, 1)
    path = write_rows(tmp_path / "my.csv", [row | {"win": str(tmp_path / row["win"])}])
    fails_with("row 1: .* leaves the table's folder", stream_pairs, str(path), 0)


def test_bad_paths_of_a_text_table_are_found_before_the_first_pair(tmp_path):
    rows = user_rows(tmp_path, 30)
    path = write_rows(tmp_path / "my.csv", rows + [rows[0] | {"win": "none.jpg"}])
    with pytest.raises(UserError, match="row 31"):
        next(stream_pairs(str(path), 0))


@pytest.mark.parametrize("name, text, match", [
    ("a.csv", "prompt,win\na,b\n",
     r"a.csv, row 1: no column 'lose'; it has prompt, win; needed: prompt, win, lose"),
    ("a.csv", "prompt,win,lose\na cat, sitting,1.jpg,2.jpg\n", "row 1: .*double quotes"),
    ("a.csv", 'prompt,win,lose\na,1.jpg,2.jpg\n"b,1.jpg,2.jpg\n"c",1.jpg,2.jpg\n',
     "a.csv: not readable as csv .row 2: "),
    ("a.csv", "prompt,win,lose\n", "no usable pair .it has no rows"),
    ("a.csv", "", "no usable pair"),
    ("a.csv", b"prompt,win,lose\n\xff\xfe,a,b\n", "a.csv, line 2: not readable as UTF-8; save"),
    ("a.jsonl", "", "no usable pair"),
    ("a.jsonl", '{"prompt": "a"}\n', "row 1: no column 'win'"),
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', "a.jsonl: not readable as jsonl .row 2"),
    ("a.csv", "prompt,win,lose\na,b,c\n".encode("utf-16"), "line 1: not readable.*iconv -f UTF-16"),
    ("a.jsonl", "5\n", "row 1: is 5, neither a prompt nor"),
    ("a.txt", "a\n", "no column 'win'"),
    ("a.parquet", "", "not a readable"),
])
def test_tables_that_cannot_be_read(tmp_path, name, text, match):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails_with(match, stream_pairs, str(path), 0)


def test_a_parquet_table_that_misses_a_column(tmp_path):
    path = write_shard(tmp_path / "a.parquet", [{"prompt": "a", "chosen": b"x"}])
    fails_with("a.parquet: no column 'rejected'; it has prompt, chosen", stream_pairs, str(path), 0)


def test_a_parquet_table_without_rows(tmp_path):
    path = tmp_path / "b.parquet"
    table = pa.table({
        "prompt": pa.array([], pa.string()),
        "win": pa.array([], pa.binary()),
        "lose": pa.array([], pa.binary()),
    })
    pq.write_table(table, path)
    fails_with("b.parquet: no usable pair .it has no rows", stream_pairs, str(path), 0)


# ---- pictures ----

def table_of_one(folder: Path, content: bytes) -> None:
    (folder / "x.png").write_bytes(content)
    (folder / "my.csv").write_text("prompt,win,lose\na,x.png,x.png\n")
    list(stream_pairs(str(folder / "my.csv"), 0))


def parquet_of_one(folder: Path, content: bytes) -> None:
    path = write_shard(folder / "my.parquet", [{"prompt": "a", "win": content, "lose": PICTURE}])
    list(stream_pairs(str(path), 0))


def shard_of_one(folder: Path, content: bytes) -> None:
    write_shard(folder / "0.parquet", [shard_row(1, jpg_0=content)])
    list(stream_pairs(str(folder), 0))


def images_row(folder: Path, content: bytes) -> None:
    (folder / "x.png").write_bytes(content)
    (folder / "x.txt").write_text("a cat")
    image_jobs(folder / "run", "mine", str(folder), None)


def picture_of_a_run(folder: Path, content: bytes) -> None:
    (folder / "x.png").write_bytes(content)
    open_made(folder / "x.png")


def table_of_a_run(folder: Path, content: bytes) -> None:
    (folder / "x.png").write_bytes(content)
    open_image(folder / "x.png", folder / "pairs.parquet", 1)


@pytest.mark.parametrize("door", [
    table_of_one, parquet_of_one, shard_of_one, images_row, picture_of_a_run, table_of_a_run,
])
def test_no_picture_starts_a_program(tmp_path, monkeypatch, door):
    """A PostScript file named .png: Pillow, left to itself, has Ghostscript run it."""
    ghostscript = tmp_path / "bin/gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)

    postscript = encoded(picture(0), "EPS")
    with pytest.raises(UserError):
        door(tmp_path, postscript)
    assert not (tmp_path / "started").exists()

    # Left to itself it does.
    with pytest.raises(Exception):
        Image.open(io.BytesIO(postscript)).load()
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_picture_whose_white_nobody_knows_is_refused(mode):
    content = encoded(Image.new(mode, (8, 8)), "TIFF")
    with pytest.raises(OSError, match="32 bits a pixel; save it with 8"):
        decode(content, 4)


def test_a_picture_that_unpacks_to_too_many_pixels_is_refused():
    bomb = encoded(Image.new("1", (9_500, 9_500)), "PNG")
    assert len(bomb) < 20_000
    for call in (digest, lambda content: decode(content, 16)):
        with pytest.raises(OSError, match="more than 89,478,485 pixels; make it smaller"):
            call(bomb)


@pytest.mark.parametrize("size", [(64, 64), (100, 70), (70, 101), (40, 33), (333, 20)])
@pytest.mark.parametrize("resolution", [32, 64])
def test_decode_resizes_and_crops_as_torchvision_does(size, resolution):
    from torchvision import transforms

    image = picture(0, size)
    oracle = transforms.Compose([
        transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(resolution),
    ])
    ours = decode(encoded(image, "PNG"), resolution)
    assert ours.size == (resolution, resolution)
    assert ours.mode == "RGB"
    assert np.abs(np.asarray(ours, int) - np.asarray(oracle(image), int)).max() <= 1


def palette_image() -> Image.Image:
    image = Image.new("P", (20, 12), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    return image


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (20, 12), colour)


@pytest.mark.parametrize("content, colour, tolerance", [
    (encoded(flat("RGBA", (255, 0, 0, 0)), "PNG"), (255, 255, 255), 0),
    (encoded(flat("RGBA", (255, 0, 0, 128)), "PNG"), (255, 127, 127), 3),
    (encoded(flat("LA", (0, 128)), "PNG"), (127, 127, 127), 3),
    (encoded(palette_image(), "PNG"), (50, 60, 70), 0),
    (encoded(palette_image(), "PNG", transparency=1), (255, 255, 255), 0),
    (encoded(flat("L", 77), "JPEG"), (77, 77, 77), 3),
    (encoded(flat("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 3),
    (encoded(flat("1", 1), "PNG"), (255, 255, 255), 0),
    (encoded(flat("I;16", 256 * 77), "PNG"), (77, 77, 77), 3),
], ids=["clear", "half clear", "grey half clear", "palette", "clear palette", "grey", "CMYK",
        "black and white", "16-bit grey"])
def test_decode_makes_rgb_of_every_mode(content, colour, tolerance):
    pixel = decode(content, 8).getpixel((4, 4))
    assert len(pixel) == 3
    assert np.abs(np.subtract(pixel, colour)).max() <= tolerance


def test_decode_reads_a_file_as_it_reads_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    assert decode(tmp_path / "a.jpg", 8) == decode(jpeg(1), 8)


def test_decode_turns_a_picture_upright():
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6                                    # shown after a quarter turn clockwise
    upright = decode(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0), 16)
    assert upright.getpixel((13, 8))[0] > 200           # red on the right
    assert upright.getpixel((2, 8))[2] > 200            # blue on the left


@pytest.mark.parametrize("progressive", [False, True])
def test_every_truncation_is_noticed_by_decode_and_by_digest(progressive):
    whole = encoded(picture(0, (64, 48)), progressive=progressive)
    digest(whole)
    half = len(whole) // 2
    for length in (0, 10, 300, half, len(whole) - 200, len(whole) - 3, len(whole) - 2):
        with pytest.raises(OSError):
            digest(whole[:length])
        with pytest.raises(OSError):
            decode(whole[:length], 16)


def test_a_truncated_png_is_noticed():
    with pytest.raises(OSError):
        decode(encoded(picture(0), "PNG")[:-100], 16)

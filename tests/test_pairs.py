"""lib/pairs.py: Pick-a-Pic shards, hub datasets, one's own tables, pictures of every kind, and disjoint prompts."""

import io
import itertools
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from lib import benchmarks, pairs
from lib.run import UserError

DATA = ROOT.parent / "shared" / "data"


def picture(number: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    return encoded(picture(number))


def shard_row(number: int, **changes) -> dict:
    """A Pick-a-Pic row; the winner's picture is 2 * number, whichever side it is on."""
    first = number % 3 != 0
    win, lose = jpeg(2 * number), jpeg(2 * number + 1)
    row = {"are_different": True, "caption": f"prompt {number}", "has_label": True, "image_0_uid": f"a{number}",
           "image_1_uid": f"b{number}", "jpg_0": win if first else lose, "jpg_1": lose if first else win,
           "label_0": float(first), "label_1": float(not first), "model_0": "x", "unused": b"y" * 1000}
    return row | changes


def write(path: Path, rows: list[dict], row_group_size: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def make_shards(folder: Path, count: int = 4, rows: int = 30) -> Path:
    for shard in range(count):
        write(folder / "data" / f"train-{shard:05d}-of-{count:05d}.parquet",
              [shard_row(shard * rows + i) for i in range(rows)])
    return folder


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the Parquet files that are opened, in order."""
    names, real = [], pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda file, **options: names.append(Path(str(file)).name)
                        or real(file, **options))
    return names


def fails(match: str, call, *arguments) -> str:
    with pytest.raises(UserError, match=match) as caught:
        result = call(*arguments)
        if not isinstance(result, (list, dict)):
            list(result)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Pick-a-Pic shards ----

def test_winner_first_and_odd_rows_counted(tmp_path):
    rows = [shard_row(i) for i in range(6)]
    odd = {"tie": shard_row(10, label_0=.5, label_1=.5), "no label": shard_row(11, has_label=False),
           "unreadable image": shard_row(12, jpg_1=jpeg(24)[:-20]), "empty prompt": shard_row(13, caption="  "),
           "same image twice": shard_row(14, jpg_0=jpeg(1), jpg_1=jpeg(1)), "repeated pair": shard_row(2)}
    more = [shard_row(20, label_0=None, label_1=None), shard_row(21, caption=None), shard_row(22, jpg_0=b""),
            shard_row(23, jpg_0=None), shard_row(24, jpg_0=b"not an image"), shard_row(25, label_0=1., label_1=1.)]
    write(tmp_path / "train-0.parquet", rows + list(odd.values()) + more, row_group_size=4)
    skipped = Counter()
    found = list(pairs.read_pairs(str(tmp_path), 0, skipped))
    assert sorted(p["prompt"] for p in found) == [f"prompt {i}" for i in range(6)]
    for pair in found:
        number = int(pair["prompt"].split()[1])
        assert (pair["win"], pair["lose"]) == (jpeg(2 * number), jpeg(2 * number + 1))
    assert skipped == {"tie": 1, "no label": 3, "unreadable image": 4, "empty prompt": 2, "same image twice": 1,
                       "repeated pair": 1}
    assert len({p["pair_id"] for p in found}) == 6


def test_a_prompt_may_come_again_and_need_not_be_ascii(tmp_path):
    captions = ["猫 à la carte 🐈", "猫 à la carte 🐈", " a dog "]
    write(tmp_path / "0.parquet", [shard_row(i, caption=caption) for i, caption in enumerate(captions)])
    found = list(pairs.read_pairs(str(tmp_path), 0))
    assert Counter(p["prompt"] for p in found) == {"猫 à la carte 🐈": 2, "a dog": 1}
    assert len({p["pair_id"] for p in found}) == 3


def test_images_of_every_mode_are_kept(tmp_path):
    kinds = [encoded(picture(1, mode="RGBA"), "PNG"), encoded(picture(2, mode="CMYK")), encoded(picture(3, mode="L")),
             encoded(picture(4, mode="P"), "PNG"), encoded(picture(5), "WEBP")]
    write(tmp_path / "0.parquet", [shard_row(i, jpg_0=kind) for i, kind in enumerate(kinds)])
    skipped = Counter()
    found = list(pairs.read_pairs(str(tmp_path), 0, skipped))
    assert len(found) == 5 and not skipped
    assert all(pairs.decode(p[side], 16).mode == "RGB" for p in found for side in ("win", "lose"))


def test_the_seed_decides_the_order_and_listing_does_not(tmp_path, monkeypatch):
    source = str(make_shards(tmp_path))
    ids = lambda seed: [p["pair_id"] for p in pairs.read_pairs(source, seed)]
    first = ids(0)
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(listed(self, pattern))))
    assert ids(0) == first
    assert ids(1) != first and sorted(ids(1)) == sorted(first) and len(set(first)) == 120
    prompts = [p["prompt"] for p in itertools.islice(pairs.read_pairs(source, 0), 10)]
    assert prompts != sorted(prompts, key=lambda p: int(p.split()[1]))       # rows are shuffled, not only shards


def test_opens_no_more_shards_than_needed(tmp_path, opened):
    stream = pairs.read_pairs(str(make_shards(tmp_path)), 0)
    assert opened == []
    list(itertools.islice(stream, 30))
    assert len(opened) == 1
    next(stream)
    assert len(opened) == 2
    assert len(list(stream)) == 89 and len(set(opened)) == 4


def test_different_seeds_start_at_different_shards(tmp_path, opened):
    source = str(make_shards(tmp_path))
    for seed in range(8):
        next(pairs.read_pairs(source, seed))
    assert len(set(opened)) > 1


def test_one_row_group_is_never_all_in_memory(tmp_path):
    """Measured in a process of its own: Arrow's peak is of the whole process."""
    noise = np.random.default_rng(0)
    big = [shard_row(i, unused=noise.bytes(100_000), jpg_0=jpeg(i) + noise.bytes(100_000)) for i in range(600)]
    pq.write_table(pa.Table.from_pylist(big), tmp_path / "0.parquet", row_group_size=600, write_batch_size=16)
    code = ("import sys, pyarrow as pa; from lib import pairs; n = sum(1 for _ in pairs.read_pairs(sys.argv[1], 0)); "
            "print(n, pa.default_memory_pool().max_memory())")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    count, peak = map(int, done.stdout.split())
    assert count == 600 and peak < 30e6, done.stderr                         # the row group's jpg_0 are 60 MB


def test_validation_and_test_shards_are_left_alone(tmp_path, opened):
    make_shards(tmp_path, count=1, rows=3)
    for name in ("data/validation_unique-00000-of-00001.parquet", "data/test-00000-of-00014.parquet",
                 "default/test/0000.parquet"):
        write(tmp_path / name, [shard_row(900)])
    assert len(list(pairs.read_pairs(str(tmp_path), 0))) == 3 and set(opened) == {"train-00000-of-00001.parquet"}
    assert "test and validation" in fails("no Parquet file", pairs.read_pairs, str(tmp_path / "default"), 0)


def test_a_copy_that_stores_images_as_structs(tmp_path):
    row = shard_row(1)
    write(tmp_path / "0.parquet", [row | {side: {"bytes": row[side], "path": None} for side in ("jpg_0", "jpg_1")}])
    pair, = pairs.read_pairs(str(tmp_path), 0)
    assert (pair["win"], pair["lose"]) == (jpeg(2), jpeg(3))


def test_shards_that_cannot_be_used(tmp_path):
    fails("no such file or folder, nor a hub", pairs.read_pairs, str(tmp_path / "gone"), 0)
    (tmp_path / "empty").mkdir()
    fails("no Parquet file.*give --pairs", pairs.read_pairs, str(tmp_path / "empty"), 0)
    write(tmp_path / "ties" / "0.parquet", [shard_row(i, label_0=.5, label_1=.5) for i in range(3)])
    fails(r"no usable pair \(tie 3\)", pairs.read_pairs, str(tmp_path / "ties"), 0)
    row = shard_row(1)
    del row["label_1"]
    write(tmp_path / "column" / "0.parquet", [row])
    fails("0.parquet: no column 'label_1'", pairs.read_pairs, str(tmp_path / "column"), 0)
    half = write(tmp_path / "half" / "0.parquet", [shard_row(1)])
    half.write_bytes(half.read_bytes()[:500])
    fails("0.parquet: not a readable Parquet file.*fetch", pairs.read_pairs, str(tmp_path / "half"), 0)


# ---- the hub ----

def fake_hub(monkeypatch, folder: Path, fail=None) -> list[str]:
    """huggingface_hub's three entry points, answered from a local folder; returns what was fetched."""
    import huggingface_hub
    log = []

    def dataset_info(self, repo):
        if fail:
            raise fail
        names = sorted((p.relative_to(folder).as_posix() for p in folder.rglob("*.*")), reverse=True)
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repo, name, repo_type, revision):
        assert (repo_type, revision) == ("dataset", "abc")
        log.append(name)
        return str(folder / name)

    class FileSystem:
        def open(self, path, block_size):
            log.append("peek " + path.removeprefix("datasets/some/pairs@abc/"))
            return open(folder / log[-1].removeprefix("peek "), "rb")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    return log


def http_error(kind: str, status: int):
    """huggingface_hub's own exception, made the way it makes them."""
    from huggingface_hub import errors
    response = SimpleNamespace(headers={}, status_code=status, request=None)
    return getattr(errors, kind)(f"{status} Client Error.\n\nRepository Not Found", response=response)


def test_hub_shards_come_one_by_one_in_the_order_of_a_local_copy(tmp_path, monkeypatch):
    make_shards(tmp_path)
    (tmp_path / "README.md").write_text("not a shard")
    log = fake_hub(monkeypatch, tmp_path)
    stream = pairs.read_pairs("some/pairs", 3)
    ids = [next(stream)["pair_id"] for _ in range(31)]
    assert len(log) == 2
    assert ids == [p["pair_id"] for p in itertools.islice(pairs.read_pairs(str(tmp_path), 3), 31)]


def test_hub_prompts_are_peeked_at_and_nothing_is_downloaded(tmp_path, monkeypatch):
    log = fake_hub(monkeypatch, make_shards(tmp_path))
    found = pairs.pair_prompts("some/pairs", 0, {"PROMPT 1", "prompt  2"}, 40)
    assert len(set(found)) == 40 and not {"prompt 1", "prompt 2"} & set(found)
    assert len(log) == 2 and all(name.startswith("peek ") for name in log)
    assert pairs.pair_prompts(str(tmp_path), 0, {"PROMPT 1", "prompt  2"}, 40) == found


@pytest.mark.parametrize("error, match", [
    (http_error("RepositoryNotFoundError", 404), "404"),
    (http_error("GatedRepoError", 403), "GatedRepoError"),
    (ConnectionError("[Errno -3] no name resolution"), "ConnectionError: .*resolution"),
    (http_error("HfHubHTTPError", 503), "HfHubHTTPError")])
def test_a_hub_that_fails_names_the_ways_round(tmp_path, monkeypatch, error, match):
    fake_hub(monkeypatch, tmp_path, error)
    for call in (lambda: pairs.read_pairs("yuvalkirstain/pickapic_v2", 0),
                 lambda: pairs.pair_prompts("yuvalkirstain/pickapic_v2", 0, set(), 5)):
        message = fails(match, call)
        assert all(part in message for part in ("yuvalkirstain/pickapic_v2:", "April 2025", "local folder", "checked",
                                                "liuhuohuo2/pick-a-pic-v2"))


def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    import huggingface_hub
    fake_hub(monkeypatch, make_shards(tmp_path, count=1))

    def download(*_, **__):
        raise TimeoutError("read timed out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fails("TimeoutError: read timed out", pairs.read_pairs, "some/pairs", 0)


# ---- one's own tables ----

def own_rows(folder: Path, count: int = 12) -> list[dict]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(2 * count):
        (folder / "images" / f"{i}.jpg").write_bytes(jpeg(i))
    return [{"prompt": f'a cat, "no. {i}", ü', "win": f"images/{2 * i}.jpg", "lose": f"images/{2 * i + 1}.jpg"}
            for i in range(count)]


def write_own(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        quoted = lambda cell: '"' + str(cell).replace('"', '""') + '"'
        lines = [",".join(rows[0])] + [",".join(map(quoted, row.values())) for row in rows]
        path.write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    else:
        write(path, rows, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_own_tables_in_each_format(tmp_path, suffix, monkeypatch):
    rows = own_rows(tmp_path)
    path = write_own(tmp_path / f"my{suffix}", rows)
    found = list(pairs.read_pairs(str(path), 0))
    key = lambda pair: pair["prompt"]
    assert sorted((p["prompt"], p["win"], p["lose"]) for p in found) == sorted(
        (row["prompt"], tmp_path / row["win"], tmp_path / row["lose"]) for row in rows)
    assert [key(p) for p in found] != [row["prompt"] for row in rows]
    assert found == list(pairs.read_pairs(str(path), 0))
    assert list(map(key, found)) != list(map(key, pairs.read_pairs(str(path), 1)))
    monkeypatch.chdir(tmp_path)
    assert len(list(pairs.read_pairs(path.name, 0))) == 12
    assert set(pairs.pair_prompts(str(path), 0, {rows[0]["prompt"]}, 99)) == {row["prompt"] for row in rows[1:]}


def test_own_parquet_with_bytes_and_with_structs_gives_the_same_pairs_as_files(tmp_path):
    rows = own_rows(tmp_path)
    read = lambda name: (tmp_path / name).read_bytes()
    tables = {"paths": rows, "bytes": [row | {s: read(row[s]) for s in ("win", "lose")} for row in rows],
              "structs": [row | {s: {"bytes": read(row[s]), "path": "x.jpg"} for s in ("win", "lose")} for row in rows],
              "files": [row | {s: {"bytes": None, "path": row[s]} for s in ("win", "lose")} for row in rows]}
    ids = {name: {p["pair_id"] for p in pairs.read_pairs(str(write(tmp_path / f"{name}.parquet", table)), 0)}
           for name, table in tables.items()}
    assert len(ids["paths"]) == 12 and all(found == ids["paths"] for found in ids.values())


def test_pairs_with_a_prompt_of_the_evaluation_are_left_out_unread(tmp_path):
    rows = [shard_row(i) for i in range(4)] + [shard_row(9, caption="Taken  PROMPT", jpg_0=b"not an image")]
    write(tmp_path / "0.parquet", rows)
    skipped = Counter()
    found = list(pairs.read_pairs(str(tmp_path), 0, skipped, ["taken prompt ", "prompt 2", "other"]))
    assert {p["prompt"] for p in found} == {"prompt 0", "prompt 1", "prompt 3"}
    assert skipped == {"prompt of the evaluation": 2}


def test_own_rows_without_a_pair_are_counted(tmp_path):
    rows = own_rows(tmp_path, 3)
    rows += [rows[0], rows[1] | {"prompt": " "}, rows[1] | {"lose": rows[1]["win"]}]
    skipped = Counter()
    assert len(list(pairs.read_pairs(str(write_own(tmp_path / "my.csv", rows)), 0, skipped))) == 3
    assert skipped == {"repeated pair": 1, "empty prompt": 1, "same image twice": 1}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("bad, match", [
    ("/etc/hostname", ".* leaves the table's folder"), ("../outside.jpg", ".* leaves the table's folder"),
    ("images/../images/0.jpg", ".* leaves the table's folder"), ("link.jpg", ".* leaves the table's folder"),
    ("images/none.jpg", "no file 'images/none.jpg'"), ("", "no image but ''"),
    ("images/cut.jpg", "cannot read an image .*truncated.*replace it")])
def test_own_bad_images_name_file_row_and_remedy(tmp_path, suffix, bad, match):
    folder = tmp_path / "mine"
    rows = own_rows(folder, 3)
    (tmp_path / "outside.jpg").write_bytes(jpeg(0))
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "images" / "cut.jpg").write_bytes(jpeg(1)[:-10])
    path = write_own(folder / f"my{suffix}", rows[:2] + [rows[2] | {"lose": bad}])
    fails(rf"my{suffix}, row 3: {match}", pairs.read_pairs, str(path), 0)


def test_own_absolute_paths_are_refused_even_within_the_folder(tmp_path):
    rows = [row | {"win": str(tmp_path / row["win"])} for row in own_rows(tmp_path, 1)]
    fails("row 1: .* leaves the table's folder", pairs.read_pairs, str(write_own(tmp_path / "my.csv", rows)), 0)


def test_own_bad_paths_are_found_before_the_first_pair(tmp_path):
    rows = own_rows(tmp_path, 30)
    path = write_own(tmp_path / "my.csv", rows + [rows[0] | {"win": "none.jpg"}])
    with pytest.raises(UserError, match="row 31"):
        next(pairs.read_pairs(str(path), 0))


@pytest.mark.parametrize("name, text, match", [
    ("a.csv", "prompt,win\na,b\n", r"a.csv, row 1: no column 'lose'; it has prompt, win; needed: prompt, win, lose"),
    ("a.csv", "prompt,win,lose\na cat, sitting,1.jpg,2.jpg\n", "row 1: .*double quotes"),
    ("a.csv", "prompt,win,lose\n", "no usable pair .it has no rows"), ("a.csv", "", "no usable pair"),
    ("a.jsonl", "", "no usable pair"), ("a.jsonl", '{"prompt": "a"}\n', "row 1: no column 'win'"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "a.jsonl: not readable as UTF-8 jsonl .*line 2"),
    ("a.jsonl", "5\n", "row 1: does not fit"), ("a.txt", "a\n", "no column 'win'"), ("a.parquet", "", "not a readable"),
    ("a.csv", b"prompt,win,lose\n\xff\xfe,a,b\n", "not readable as UTF-8")])
def test_own_tables_that_cannot_be_read(tmp_path, name, text, match):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(match, pairs.read_pairs, str(path), 0)


def test_own_parquet_misses_a_column_or_is_empty(tmp_path):
    path = write(tmp_path / "a.parquet", [{"prompt": "a", "chosen": b"x"}])
    fails("a.parquet: no column 'win'; it has prompt, chosen", pairs.read_pairs, str(path), 0)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "win": pa.array([], pa.binary()),
                             "lose": pa.array([], pa.binary())}), tmp_path / "b.parquet")
    fails("b.parquet: no usable pair .it has no rows", pairs.read_pairs, str(tmp_path / "b.parquet"), 0)


# ---- pictures ----

@pytest.mark.parametrize("size", [(64, 64), (100, 70), (70, 101), (40, 33), (333, 20)])
@pytest.mark.parametrize("resolution", [32, 64])
def test_decode_resizes_and_crops_as_torchvision_does(size, resolution):
    from torchvision import transforms
    image = picture(0, size)
    oracle = transforms.Compose([transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR),
                                 transforms.CenterCrop(resolution)])
    ours = pairs.decode(encoded(image, "PNG"), resolution)
    assert ours.size == (resolution, resolution) and ours.mode == "RGB"
    assert np.abs(np.asarray(ours, int) - np.asarray(oracle(image), int)).max() <= 1


def flat(mode: str, colour, kind: str, **options) -> tuple[int, ...]:
    return pairs.decode(encoded(Image.new(mode, (20, 12), colour), kind, **options), 8).getpixel((4, 4))


def test_decode_makes_rgb_of_every_mode(tmp_path):
    close = lambda got, want: max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 3
    assert flat("RGBA", (255, 0, 0, 0), "PNG") == (255, 255, 255)
    assert close(flat("RGBA", (255, 0, 0, 128), "PNG"), (255, 127, 127))
    assert close(flat("LA", (0, 128), "PNG"), (127, 127, 127))
    palette = Image.new("P", (20, 12), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert pairs.decode(encoded(palette, "PNG"), 8).getpixel((4, 4)) == (50, 60, 70)
    assert pairs.decode(encoded(palette, "PNG", transparency=1), 8).getpixel((4, 4)) == (255, 255, 255)
    assert close(flat("L", 77, "JPEG"), (77, 77, 77))
    assert close(flat("CMYK", (0, 255, 255, 0), "JPEG"), (255, 0, 0))
    assert flat("1", 1, "PNG") == (255, 255, 255)
    assert close(flat("I;16", 256 * 77, "PNG"), (77, 77, 77))
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    assert pairs.decode(tmp_path / "a.jpg", 8) == pairs.decode(jpeg(1), 8)


def test_decode_turns_a_picture_upright():
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6                                                         # shown after a quarter turn clockwise
    upright = pairs.decode(encoded(image, "JPEG", exif=exif, quality=95, subsampling=0), 16)
    assert upright.getpixel((13, 8))[0] > 200 and upright.getpixel((2, 8))[2] > 200


@pytest.mark.parametrize("progressive", [False, True])
def test_every_truncation_is_noticed_by_decode_and_by_the_check(progressive):
    whole = encoded(picture(0, (64, 48)), progressive=progressive)
    pairs.digest(whole)
    for length in [0, 10, 300, len(whole) // 2, len(whole) - 200, len(whole) - 3, len(whole) - 2]:
        for read in (pairs.digest, lambda image: pairs.decode(image, 16)):
            with pytest.raises(OSError):
                read(whole[:length])
    with pytest.raises(OSError):
        pairs.decode(encoded(picture(0), "PNG")[:-100], 16)


# ---- prompts ----

def test_read_prompts_in_each_format(tmp_path):
    texts = ["a cat", "ein Hündchen", "犬, 赤い", "A CAT"]
    given = [texts[0], texts[1], texts[0], texts[2], texts[3]]
    (tmp_path / "a.txt").write_text("\ufeffa cat\r\n\n  ein Hündchen \r\na cat\n犬, 赤い\nA CAT", encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(given))
    (tmp_path / "b.json").write_text(json.dumps([{"caption": text} for text in given]))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": text, "x": 1}) for text in given))
    write_own(tmp_path / "a.csv", [{"style": "x", "caption": text} for text in given + [" "]])
    (tmp_path / "c.json").write_text(json.dumps({"x": given[:2], "y": given[2:]}))
    (tmp_path / "a.tsv").write_text("Category\tPrompt\n" + "".join(f"x\t{text}\n" for text in given), encoding="utf-8")
    write(tmp_path / "a.parquet", [{"caption": text, "jpg_0": b"x"} for text in [*given, None, ""]])
    for path in sorted(tmp_path.iterdir()):
        assert pairs.read_prompts(path) == texts, path


@pytest.mark.parametrize("name, text, match", [
    ("a.txt", "\n \n", "a.txt: holds no prompt"), ("a.json", "[]", "holds no prompt"), ("a.json", "{}", "no list"),
    ("a.json", "[", "not readable as UTF-8 json"), ("a.csv", "x\n1\n", "a.csv, row 1: no column 'prompt'; it has x"),
    ("a.json", "[[1]]", "row 1: does not fit"), ("a.parquet", "x", "not a readable Parquet file")])
def test_prompt_files_that_cannot_be_read(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    fails(match, pairs.read_prompts, tmp_path / name)


def test_a_missing_prompt_file_is_named(tmp_path):
    fails("none.txt: not readable .*No such file", pairs.read_prompts, tmp_path / "none.txt")
    fails("none.parquet: not a readable", pairs.read_prompts, tmp_path / "none.parquet")
    fails("no column 'prompt'", pairs.read_prompts, write(tmp_path / "a.parquet", [{"text": "a"}]))


@pytest.mark.parametrize("name, count", [("pickapic_v2_test_unique_prompts", 487), ("partiprompts", 1632)])
def test_the_published_prompt_files(name, count):
    path = DATA / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    assert len(pairs.read_prompts(path)) == count


def test_splits_are_disjoint_reproducible_and_not_taken():
    pool = [f"prompt {i}" for i in range(100)]
    counts = {"eval": 10, "iter1": 30, "iter2": 50}
    taken = {"PROMPT  7", "prompt 8\n"}
    splits = benchmarks.split_prompts(pool, taken, counts, 0)
    together = [prompt for split in splits.values() for prompt in split]
    assert {name: len(split) for name, split in splits.items()} == counts
    assert len(set(together)) == 90 and not {"prompt 7", "prompt 8"} & set(together)
    assert benchmarks.split_prompts(pool[::-1], taken, counts, 0) == splits
    assert benchmarks.split_prompts(pool, taken, counts, 1) != splits
    assert benchmarks.split_prompts(pool, taken, {"eval": 10, "iter1": 30}, 0)["iter1"] == splits["iter1"]
    assert together[:10] != sorted(together[:10]), "a split must be drawn, not cut off the front"


def test_prompts_that_only_look_different_are_one():
    composed, apart = unicodedata.normalize("NFC", "Café au lait"), unicodedata.normalize("NFD", "Café au lait")
    pool = [composed, apart, "CAFÉ  AU\tLAIT", "Straße", "STRASSE", "", "tea"]
    assert sorted(benchmarks.split_prompts(pool, set(), {"a": 3}, 0)["a"]) == [composed, "Straße", "tea"]
    assert benchmarks.split_prompts(pool, {apart, "strasse"}, {"a": 1}, 0) == {"a": ["tea"]}


def test_a_pool_too_small_says_what_is_there_and_what_is_needed():
    fails(r"6 prompts are needed \(iter1 2, iter2 4\), but of 5 only 3 are left", benchmarks.split_prompts,
          ["a", "b", "c", "A", "d"], {"D"}, {"iter1": 2, "iter2": 4}, 0)

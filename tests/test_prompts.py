"""Prompts from outside: files of every format, splits, benchmarks by name, and stage 01."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SHARED_DATA,
    call,
    configure,
    fails_with,
    fake_hub,
    http_error,
    make_shards,
    refused,
    settings_of,
    shard_row,
    stage,
    write_rows,
    write_shard,
)

from PIL import Image

from lib import models
from lib.data import pairs
from lib.data.pictures import decode
from lib.data.prompts import (
    HPSV2_STYLES,
    evaluation_prompts,
    fold,
    read_benchmarks,
    read_prompt_file,
    split_prompts,
    write_eval,
)
from lib.run import latent_path, read_prompts
from lib.world import captions


def rows_of(names, count: int = 0, source: str = "") -> list[tuple[str, str, str]]:
    """(benchmark, style, prompt) of --eval-prompts."""
    table = evaluation_prompts(str(names), count, source)
    return list(table.itertuples(index=False, name=None))


# ---- files of prompts ----

TEXTS = ["a cat", "ein Hündchen", "犬, 赤い", "A CAT"]
GIVEN = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[3]]      # what the files hold: one repeated


def text_file(folder: Path) -> Path:
    text = "\ufeffa cat\r\n\n  ein Hündchen \r\na cat\n犬, 赤い\nA CAT"
    (folder / "a.txt").write_text(text, encoding="utf-8")
    return folder / "a.txt"


def json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(GIVEN))
    return folder / "a.json"


def json_of_captions(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps([{"caption": text} for text in GIVEN]))
    return folder / "a.json"


def json_of_styles(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps({"x": GIVEN[:2], "y": GIVEN[2:]}))
    return folder / "a.json"


def json_lines(folder: Path) -> Path:
    lines = [json.dumps({"prompt": text, "x": 1}) for text in GIVEN]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder / "a.jsonl"


def csv_file(folder: Path) -> Path:
    rows = [{"style": "x", "caption": text} for text in GIVEN + [" "]]
    return write_rows(folder / "a.csv", rows)


def tsv_file(folder: Path) -> Path:
    lines = ["Category\tPrompt"] + [f"x\t{text}" for text in GIVEN]
    (folder / "a.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "a.tsv"


def parquet_file(folder: Path) -> Path:
    rows = [{"caption": text, "jpg_0": b"x"} for text in [*GIVEN, None, ""]]
    return write_shard(folder / "a.parquet", rows)


@pytest.mark.parametrize("write", [
    text_file, json_list, json_of_captions, json_of_styles, json_lines, csv_file, tsv_file,
    parquet_file,
])
def test_read_prompts_in_each_format(tmp_path, write):
    assert read_prompt_file(write(tmp_path)) == TEXTS


@pytest.mark.parametrize("name, text, match", [
    ("a.txt", "\n \n", "a.txt: holds no prompt"),
    ("a.json", "[]", "holds no prompt"),
    ("a.json", "{}", "no list"),
    ("a.json", "[", "not readable as json"),
    ("a.json", "[[1]]", r"row 1: is \[1\], neither"),
    ("a.json", "[" * 100_000, "not readable as json .maximum recursion depth"),
    ("a.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "not readable as jsonl .row 2: maximum"),
    ("a.json", '["a", "\\ud800"]', r"row 2: prompt '\\ud800' has half a character; correct it"),
    ("a.json", '["a", 5]', "row 2: is 5, neither"),
    ("a.json", '[{"caption": 5}]', "row 1: caption is 5 and no text"),
    ("a.json", '{"x": ["a", ["b"]]}', "row 2: prompt is .'b'. and no text"),
    ("a.jsonl", '{"prompt": {"text": "a"}}', "row 1: prompt is {'text': 'a'} and no text"),
    ("a.jsonl", '{"style": ["x"], "prompt": "a"}', "row 1: style is .'x'. and no text"),
    ("a.jsonl", '{"prompt": null}', "a.jsonl: holds no prompt"),
    ("a.csv", "x\n1\n", "a.csv, row 1: no column 'prompt'; it has x"),
    ("a.parquet", "x", "not a readable Parquet file"),
])
def test_prompt_files_that_cannot_be_read(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    fails_with(match, read_prompt_file, tmp_path / name)


@pytest.mark.parametrize("name", ["none.txt", "none.parquet", "n" * 5000, "a\0b", "."])
def test_a_missing_prompt_file_is_named(tmp_path, name):
    match = "not (a )?readable .*(No such file|too long)"
    fails_with(match, read_prompt_file, tmp_path / name)


def test_a_file_in_another_encoding_is_told_with_its_line_and_read_when_converted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a cat\n\nein Hündchen\n", encoding="latin-1")
    match = "a.txt, line 3: not readable as UTF-8; save it .*(iconv -f .* -t UTF-8)"
    told = fails_with(match, read_prompt_file, path)
    command = re.search(r"iconv -f \S+ -t \S+", told)[0].split()
    path.write_bytes(subprocess.run([*command, path], capture_output=True, check=True).stdout)
    assert read_prompt_file(path) == ["a cat", "ein Hündchen"]


def test_parquet_prompts_of_another_kind_are_told_by_their_row(tmp_path):
    path = write_shard(tmp_path / "a.parquet", [{"prompt": ["a"]}, {"prompt": None}])
    fails_with("a.parquet, row 1: prompt is .'a'. and no text", read_prompt_file, path)


def test_numbered_styles_and_empty_cells(tmp_path):
    rows = [{"prompt": "a", "category": 3}, {"prompt": None, "category": None},
            {"prompt": "b", "category": None}]
    for path in (write_shard(tmp_path / "mine.parquet", rows),
                 write_rows(tmp_path / "MINE.JSONL".lower(), rows).rename(tmp_path / "mine.JSONL")):
        assert rows_of(path) == [("mine", "3", "a"), ("mine", "", "b")]


def test_hidden_files_of_a_benchmarks_folder_are_left_alone(tmp_path):
    (tmp_path / "oil.JSON").write_text('["a"]')
    (tmp_path / "._oil.json").write_bytes(b"\0\5\x16\7")
    assert rows_of(f"mine={tmp_path}") == [("mine", "oil", "a")]


def test_a_parquet_file_without_prompts(tmp_path):
    path = write_shard(tmp_path / "a.parquet", [{"text": "a"}])
    fails_with("no column 'prompt'", read_prompt_file, path)


@pytest.mark.parametrize("name, count", [
    ("pickapic_v2_test_unique_prompts", 487),
    ("partiprompts", 1632),
])
def test_the_published_prompt_files(name, count):
    path = SHARED_DATA / f"{name}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    assert len(read_prompt_file(path)) == count


# ---- splits of a pool ----

POOL = [f"prompt {i}" for i in range(100)]
COUNTS = {"eval": 10, "iter1": 30, "iter2": 50}
TAKEN = {"PROMPT  7", "prompt 8\n"}


def test_splits_have_their_counts_and_nothing_in_common():
    splits = split_prompts(POOL, TAKEN, COUNTS, 0, "x")
    together = [prompt for split in splits.values() for prompt in split]
    assert {name: len(split) for name, split in splits.items()} == COUNTS
    assert len(set(together)) == 90


def test_splits_have_no_prompt_that_is_taken():
    splits = split_prompts(POOL, TAKEN, COUNTS, 0, "x")
    for split in splits.values():
        assert not {"prompt 7", "prompt 8"} & set(split)


def test_splits_depend_on_the_seed_and_not_on_the_pools_order():
    splits = split_prompts(POOL, TAKEN, COUNTS, 0, "x")
    assert split_prompts(POOL[::-1], TAKEN, COUNTS, 0, "x") == splits
    assert split_prompts(POOL, TAKEN, COUNTS, 1, "x") != splits


def test_a_further_split_leaves_the_others_as_they_are():
    splits = split_prompts(POOL, TAKEN, COUNTS, 0, "x")
    fewer = split_prompts(POOL, TAKEN, {"eval": 10, "iter1": 30}, 0, "x")
    assert fewer["iter1"] == splits["iter1"]


def test_a_split_is_drawn_and_not_cut_off_the_front():
    first = split_prompts(POOL, TAKEN, COUNTS, 0, "x")["eval"]
    assert first != sorted(first)


COMPOSED = unicodedata.normalize("NFC", "Café au lait")
APART = unicodedata.normalize("NFD", "Café au lait")
ALIKE = [COMPOSED, APART, "CAFÉ  AU\tLAIT", "Straße", "STRASSE", "", "tea"]


def test_of_prompts_that_only_look_different_the_first_is_kept():
    splits = split_prompts(ALIKE, set(), {"a": 3}, 0, "x")
    assert sorted(splits["a"]) == [COMPOSED, "Straße", "tea"]


def test_a_prompt_that_only_looks_different_is_taken():
    assert split_prompts(ALIKE, {APART, "strasse"}, {"a": 1}, 0, "x") == {"a": ["tea"]}


def test_a_pool_too_small_says_what_is_there_and_what_is_needed():
    match = r"^my.txt: 6 prompts are needed \(iter1 2, iter2 4\), but of 5 only 3 are left"
    pool = ["a", "b", "c", "A", "d"]
    fails_with(match, split_prompts, pool, {"D"}, {"iter1": 2, "iter2": 4}, 0, "my.txt")


# ---- HPSv2 ----

def hpsv2_lists() -> dict[str, list[str]]:
    """What HPSv2's lists are like: a prompt in every style, one repeated within its style."""
    lists = {}
    for style in HPSV2_STYLES:
        lists[style] = [f"{style} {i}" for i in range(4)]
        lists[style] += ["in every style ", "in every style", " "]
    return lists


def hpsv2_folder(folder: Path) -> Path:
    """The folder in which HPSv2 publishes its lists, beside another benchmark's."""
    folder.mkdir()
    for style, prompts in hpsv2_lists().items():
        (folder / f"{style}.json").write_text(json.dumps(prompts))
    (folder / "drawbench.json").write_text('["not one of the four"]')
    return folder


def test_hpsv2_keeps_order_and_styles_and_drops_repeats_within_a_style(tmp_path):
    wanted = []
    for style in HPSV2_STYLES:
        for i in range(4):
            wanted.append(("hpsv2", style, f"{style} {i}"))
        wanted.append(("hpsv2", style, "in every style"))
    assert rows_of(f"hpsv2={hpsv2_folder(tmp_path / 'benchmark')}") == wanted


def test_hpsv2_in_one_file_is_as_in_a_folder(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(hpsv2_lists()))
    assert rows_of(f"hpsv2={path}") == rows_of(f"hpsv2={hpsv2_folder(tmp_path / 'benchmark')}")


def test_every_style_gives_its_first_prompts_in_equal_numbers(tmp_path):
    wanted = []
    for style in HPSV2_STYLES:
        wanted += [("hpsv2", style, f"{style} 0"), ("hpsv2", style, f"{style} 1")]
    assert rows_of(f"hpsv2={hpsv2_folder(tmp_path / 'benchmark')}", 8) == wanted


def test_hpsv2_without_one_of_its_lists(tmp_path):
    folder = hpsv2_folder(tmp_path / "benchmark")
    (folder / "photo.json").unlink()
    match = "benchmark hpsv2: .*photo.json: .*No such file"
    assert "zhwang/HPDv2" in fails_with(match, rows_of, f"hpsv2={folder}")


def test_hpsv2_of_the_package(tmp_path, monkeypatch, capsys):
    package = pytest.importorskip("hpsv2")
    monkeypatch.setattr(package, "root_path", str(tmp_path / "home"))
    monkeypatch.setattr(package.utils, "root_path", str(tmp_path / "home"))
    fetched = []

    def download(repo, name, subfolder, repo_type):
        fetched.append((repo, subfolder, name))
        (tmp_path / name).write_text(json.dumps([f"{name} a", f"{name} b"]))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    rows = rows_of("hpsv2", 4)
    assert rows == [("hpsv2", style, f"{style}.json a") for style in HPSV2_STYLES]
    assert fetched == [("zhwang/HPDv2", "benchmark", f"{style}.json") for style in HPSV2_STYLES]
    said = capsys.readouterr().out
    assert said == "evaluation prompts: hpsv2 4 of 8 in 4 styles (published: 3174)\n"


# ---- PartiPrompts ----

PARTI_ROWS = [
    ("parti", "Abstract", "bond"),
    ("parti", "Artifacts", 'A red "stop" sign'),
    ("parti", "Illustrations", "G I G painted"),
    ("parti", "Animals", "ein Hündchen"),
    ("parti", "Abstract", "life"),
]


@pytest.fixture
def parti_tsv(tmp_path) -> Path:
    text = (
        "Prompt\tCategory\tChallenge\tNote\n"
        "bond\tAbstract\tBasic\tOne, two\n"
        'A red "stop" sign\tArtifacts\tBasic\t\n'
        '"G I G" painted\tIllustrations\tWriting\t\n'
        "ein Hündchen \tAnimals\tBasic\t\n"
        "life\tAbstract\tBasic\t\n"
    )
    (tmp_path / "P.tsv").write_text(text, encoding="utf-8")
    return tmp_path / "P.tsv"


def test_parti_from_its_tsv(parti_tsv):
    assert rows_of(f"parti={parti_tsv}") == PARTI_ROWS


def test_a_second_prompt_of_a_style_waits_for_one_of_each(parti_tsv):
    assert rows_of(f"parti={parti_tsv}", 4) == PARTI_ROWS[:4]


def test_parti_from_the_hub(parti_tsv, monkeypatch):
    def download(repo, name, repo_type):
        assert (repo, name) == ("nateraw/parti-prompts", "PartiPrompts.tsv")
        assert repo_type == "dataset"
        return str(parti_tsv)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert rows_of("parti") == PARTI_ROWS


# ---- Pick-a-Pic ----

VALIDATION = "data/validation_unique-00000-of-00001.parquet"
VALIDATION_ROWS = [("pickapic", "", "b"), ("pickapic", "", "a"), ("pickapic", "", "猫")]


@pytest.fixture
def pickapic_folder(tmp_path) -> Path:
    """Training shards, and shards of all four splits that one can evaluate on."""
    make_shards(tmp_path, count=2, rows=3)
    splits = {
        "validation_unique": ["b", "a", "b", " ", "猫"],
        "validation": ["x"],
        "test_unique": ["y"],
        "test": ["z"],
    }
    for split, texts in splits.items():
        rows = [shard_row(i, caption=text) for i, text in enumerate(texts)]
        write_shard(tmp_path / f"data/{split}-00000-of-00001.parquet", rows)
    return tmp_path


def test_pickapic_of_a_folder_has_the_validation_captions_alone(pickapic_folder, capsys):
    assert rows_of("pickapic", 0, str(pickapic_folder)) == VALIDATION_ROWS
    said = capsys.readouterr().out
    assert said == "evaluation prompts: pickapic 3 (published: 500)\n"


def test_pickapic_of_a_local_copy_by_name(pickapic_folder):
    assert rows_of(f"pickapic={pickapic_folder}", 2) == VALIDATION_ROWS[:2]


def test_pickapic_of_the_hub_is_peeked_at(pickapic_folder, monkeypatch):
    fetched = fake_hub(monkeypatch, pickapic_folder)
    assert rows_of("pickapic", 0, "some/pairs") == VALIDATION_ROWS
    assert fetched == [f"peek {VALIDATION}"]


def test_pickapic_without_its_first_split_takes_the_next(pickapic_folder):
    (pickapic_folder / VALIDATION).unlink()
    assert rows_of("pickapic", 0, str(pickapic_folder)) == [("pickapic", "", "x")]


# ---- the lists as they were published ----

@pytest.mark.parametrize("name, file, count", [
    ("hpsv2", "hpsv2_benchmark_prompts", 3174),
    ("parti", "partiprompts", 1632),
    ("pickapic", "pickapic_v2_test_unique_prompts", 487),
])
def test_the_published_lists(name, file, count, capsys):
    path = SHARED_DATA / f"{file}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    table = evaluation_prompts(f"{name}={path}", 0)
    assert len(table) == count
    assert not table.duplicated().any()

    other_than_published = name == "pickapic"
    assert ("published" in capsys.readouterr().out) == other_than_published


def test_the_published_list_of_hpsv2():
    path = SHARED_DATA / "hpsv2_benchmark_prompts.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    table = evaluation_prompts(f"hpsv2={path}", 0)
    assert table.prompt.nunique() == 3172
    assert table["style"].nunique() == 4
    some = evaluation_prompts(f"hpsv2={path}", 400)
    assert some.groupby("style").size().tolist() == [100] * 4


# ---- the user's files, several benchmarks, and the world ----

STYLED = [("oil", "a, b"), ("ink", "c"), ("oil", "ü"), ("oil", "d"), ("ink", "d")]


@pytest.fixture(params=[".csv", ".jsonl", ".parquet"])
def styled_file(tmp_path, request) -> Path:
    rows = [{"style": style, "prompt": prompt} for style, prompt in STYLED]
    return write_rows(tmp_path / f"mine{request.param}", rows)


def test_a_users_file_is_a_benchmark_named_after_it(styled_file):
    assert rows_of(styled_file) == [("mine", *row) for row in STYLED]


def test_a_users_file_may_have_another_name(styled_file):
    assert rows_of(f"other={styled_file}", 3) == [("other", *row) for row in STYLED[:3]]


def test_several_files_stand_one_after_another(styled_file):
    plain = styled_file.parent / "plain.txt"
    plain.write_text("one\n\n two \none\n")
    without_styles = [("plain", "", "one"), ("plain", "", "two")]
    wanted = [("mine", *row) for row in STYLED] + without_styles
    assert rows_of(f"{styled_file}, {plain}") == wanted


@pytest.mark.parametrize("part, count", [("world", 240), ("dev", 160)])
def test_the_worlds_prompts_have_every_style_in_turn(part, count):
    table = evaluation_prompts(part, 0)
    assert table.prompt.tolist() == captions.world_captions()[part]
    assert len(table) == count
    assert set(table.benchmark) == {part}
    assert table["style"].value_counts().nunique() == 1
    assert table["style"][:4].tolist() == list(captions.STYLES)


@pytest.mark.parametrize("part, count", [("world", 240), ("dev", 160)])
def test_the_worlds_prompts_by_number(part, count):
    assert evaluation_prompts(part, 8).equals(evaluation_prompts(part, 0)[:8])
    fails_with(f"--eval-count {count + 1}: .*{count} {part}", rows_of, part, count + 1)


# ---- the tables of a run ----

@pytest.fixture
def comparing_run(tmp_path) -> SimpleNamespace:
    """Settings of a run that only compares models, on two benchmarks that share prompts."""
    (tmp_path / "h.json").write_text(json.dumps({"anime": ["a", "b"], "photo": ["b", "c"]}))
    (tmp_path / "t.txt").write_text("c\nd\n")
    return SimpleNamespace(
        run=str(tmp_path / "run"),
        eval_prompts=f"{tmp_path / 'h.json'},{tmp_path / 't.txt'}",
        eval_count=0,
        pairs="none/such",
    )


def test_the_tables_of_a_run_hold_each_prompt_once(comparing_run):
    write_eval(comparing_run)
    prompts = read_prompts(comparing_run.run, "eval")
    assert prompts.prompt.tolist() == ["a", "b", "c", "d"]
    assert prompts.prompt_id.tolist() == [0, 1, 2, 3]


def test_the_tables_of_a_run_hold_each_place_a_prompt_stands_in(comparing_run):
    write_eval(comparing_run)
    prompts = read_prompts(comparing_run.run, "eval")
    table = pd.read_parquet(Path(comparing_run.run) / "benchmarks.parquet").merge(prompts)
    places = table[["benchmark", "style", "prompt"]].itertuples(index=False, name=None)
    assert list(places) == [
        ("h", "anime", "a"),
        ("h", "anime", "b"),
        ("h", "photo", "b"),
        ("h", "photo", "c"),
        ("t", "", "c"),
        ("t", "", "d"),
    ]


def test_tables_that_are_there_are_not_made_again(comparing_run, tmp_path, capsys):
    write_eval(comparing_run)
    (tmp_path / "t.txt").unlink()
    write_eval(comparing_run)
    assert capsys.readouterr().out == "evaluation prompts: h 4 in 2 styles, t 2\n"


# ---- what is wrong is told in one line ----

@pytest.mark.parametrize("names, source, match", [
    ("nonesuch", "", "benchmark nonesuch: neither one of pickapic, hpsv2, parti nor a file"),
    (",", "", "names no benchmark"),
    ("pickapic", "", "benchmark pickapic: .*no validation.*pickapic=PATH"),
    ("pickapic", "{}/a.csv", "benchmark pickapic: .*a.csv is not Pick-a-Pic.*pickapic=PATH"),
    ("pickapic", "{}/train",
     "benchmark pickapic: .*no shards of validation_unique.*pickapic=PATH"),
    ("pickapic=gone/gone", "", "benchmark pickapic: gone/gone: .*404.*pickapic=PATH"),
    ("hpsv2={}/none.json", "", "benchmark hpsv2: .*none.json: .*No such file.*hpsv2=PATH"),
    ("parti={}/a.csv", "", "benchmark parti: .*no column 'prompt'; it has x, y.*parti=PATH"),
    ("{}/empty.txt", "", "benchmark empty: holds no prompt"),
    ("{}/t.txt,t={}/empty.txt", "", "benchmark t: holds no prompt"),
    ("{}/t.txt,t={}/t.txt", "", "two benchmarks are named t; give one as another=.*t.txt"),
])
def test_a_benchmark_that_cannot_be_read(tmp_path, monkeypatch, names, source, match):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "t.txt").write_text("one\n")
    make_shards(tmp_path / "train", count=1, rows=1)
    fake_hub(monkeypatch, tmp_path, http_error("RepositoryNotFoundError", 404))
    names = names.replace("{}", str(tmp_path))
    source = source.replace("{}", str(tmp_path))
    fails_with(match, rows_of, names, 0, source)


@pytest.mark.parametrize("name", ["hpsv2", "parti"])
def test_a_hub_out_of_reach_names_the_local_copy(monkeypatch, name):
    if name == "hpsv2":
        pytest.importorskip("hpsv2")

    def download(*_, **__):
        raise ConnectionError("no name\nresolution")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    why = "cannot fetch its list: the hub is out of reach .ConnectionError: no name resolution."
    fails_with(f"benchmark {name}: {why}; mend .*{name}=PATH", rows_of, name)


# ---- stage 01 ----

def run_stage_01(run: Path, *more) -> None:
    stage("01").main([
        "--run", str(run),
        "--iters", "2",
        "--iter-prompts", "3,4",
        "--eval-count", "0",
        "--seed-pairs", "12",
        "--holdout-pairs", "5",
        *map(str, more),
    ])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Pick-a-Pic's layout; prompts of its validation split stand in the training shards too."""
    folder = tmp_path_factory.mktemp("pickapic")
    make_shards(folder, count=3, rows=20)
    texts = [f"PROMPT  {i}" for i in range(0, 60, 4)] + ["new"]
    rows = [shard_row(i, caption=text) for i, text in enumerate(texts)]
    write_shard(folder / "data/validation_unique-0.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def seeded(tmp_path_factory, source) -> SimpleNamespace:
    """A run after stage 01 on these shards, what the stage said, and the shards read for pairs."""
    folder = tmp_path_factory.mktemp("seeded")
    (folder / "own.txt").write_text("new\nmy own\n")
    said = io.StringIO()
    read = []
    real = pairs.shard_rows

    def note_and_read(file, *more, **options):
        read.append(file.name)
        return real(file, *more, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(pairs, "shard_rows", note_and_read)
        run_stage_01(
            folder / "run",
            "--pairs", source,
            "--prompts", "pairs",
            "--eval-prompts", f"pickapic,{folder / 'own.txt'}",
            "--holdout-pairs", 3,
        )
    return SimpleNamespace(run=folder / "run", said=said.getvalue(), shards=read)


def test_stage_01_makes_the_splits_that_are_asked_for(seeded):
    prompts = pd.read_parquet(seeded.run / "prompts.parquet")
    assert prompts.split.value_counts().to_dict() == {"eval": 17, "iter1": 3, "iter2": 4}


def test_the_evaluation_comes_first_and_nothing_else_has_its_prompts(seeded):
    prompts = pd.read_parquet(seeded.run / "prompts.parquet")
    pools = {}
    for name in ("pairs", "holdout"):
        pools[name] = pd.read_parquet(seeded.run / f"seed/{name}.parquet").prompt
    for split in ("iter1", "iter2", "eval"):
        pools[split] = prompts.prompt[prompts.split == split]

    folded = {name: set(map(fold, pool)) for name, pool in pools.items()}
    counts = {name: len(pool) for name, pool in folded.items()}
    assert counts == {"pairs": 12, "holdout": 3, "iter1": 3, "iter2": 4, "eval": 17}
    assert len(set().union(*folded.values())) == sum(counts.values())


def test_a_prompt_of_two_benchmarks_stands_in_both(seeded):
    prompts = pd.read_parquet(seeded.run / "prompts.parquet")
    table = pd.read_parquet(seeded.run / "benchmarks.parquet")
    new_id = prompts.prompt_id[prompts.prompt == "new"].item()
    assert len(table) == 18
    assert table.benchmark[table.prompt_id == new_id].tolist() == ["pickapic", "own"]


def test_stage_01_reads_no_more_shards_than_it_needs(seeded):
    assert len(seeded.shards) == 1                      # 15 of its 20 pairs are enough


def test_stage_01_says_what_it_skipped(seeded):
    assert "prompt of the evaluation 5;" in seeded.said


def test_stage_01_leaves_a_picture_and_a_latent_for_each_side(seeded):
    assert len(list((seeded.run / "seed/images").iterdir())) == 30
    assert len(list((seeded.run / "seed/latents").iterdir())) == 30


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path, source, monkeypatch):
    given = ["--pairs", source, "--prompts", "pairs", "--eval-prompts", "pickapic"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_stage_01(whole, *given)
    real = models.save_latent
    saved = []

    def save(tensors, image, *more):
        if len(saved) == 20:
            raise KeyboardInterrupt
        saved.append(image)
        real(tensors, image, *more)

    monkeypatch.setattr(models, "save_latent", save)
    with pytest.raises(KeyboardInterrupt):
        run_stage_01(run, *given)
    assert not (run / "prompts.parquet").exists()

    # What was made before the interruption stays as it is.
    written = {}
    for kind in ("images", "latents"):
        for file in (run / "seed" / kind).iterdir():
            written[file] = file.stat().st_mtime_ns
    assert len(written) == 34 + 20

    # But for a picture of which a power cut left the name alone.
    without_latent = [file for file in written if file.parent.name == "images"
                      and not latent_path(file).exists()]
    without_latent[0].write_bytes(b"")
    del written[without_latent[0]]
    monkeypatch.setattr(models, "save_latent", real)
    run_stage_01(run, *given)
    for file, time in written.items():
        assert file.stat().st_mtime_ns == time, file

    # And the whole is what an uninterrupted stage makes, byte for byte.
    compared = 0
    for file in run.rglob("*.*"):
        if file.name not in ("config.json", "ledger.parquet", ".lock"):
            compared += 1
            name = file.relative_to(run)
            assert file.read_bytes() == (whole / name).read_bytes(), name
    assert compared > 80


@pytest.mark.parametrize("more, match", [
    (["--pairs", "SOURCE", "--prompts", "pairs", "--eval-prompts", "pickapic,parti=none.tsv"],
     "benchmark parti: none.tsv"),
    (["--pairs", "SOURCE", "--prompts", "none.txt", "--eval-prompts", "pickapic"],
     "none.txt: not readable"),
    (["--pairs", "SOURCE", "--prompts", "FEW", "--eval-prompts", "pickapic"],
     "7 prompts are needed .*of 3 only 2"),
    (["--eval-count", "999"], "--eval-count 999"),
    (["--iter-prompts", "999"], "--iter-prompts 999"),
])
def test_what_cannot_work_is_refused_before_anything_is_fetched_or_painted(
    tmp_path, source, more, match
):
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\nprompt 4\n")
    places = {"SOURCE": source, "FEW": few}
    given = [places.get(part, part) for part in more]
    fails_with(match, run_stage_01, tmp_path / "run", *given)
    assert not (tmp_path / "run/seed").exists()


# ---- human pictures ----

def test_latents_are_of_the_resized_pictures_as_they_are(seeded, source):
    """No loss in between, as there is none between a candidate and its latent."""
    given = {}
    for pair in pairs.stream_pairs(str(source), 0):
        for side in ("win", "lose"):
            given[f"{pair['pair_id']}_{side[0]}"] = pair[side]

    s = settings_of(seeded.run)
    vae = models.load_vae(s)
    files = sorted((seeded.run / "seed/images").iterdir())
    pictures = [decode(given[file.stem], s.resolution) for file in files]
    for start in range(0, len(files), 10):
        part = slice(start, start + 10)
        expected = models.encode(vae, models.as_batch(pictures[part]))["mean"]
        mean, _ = models.stack_latents(files[part])
        assert torch.allclose(mean, expected, atol=1e-4)
    assert np.array_equal(np.asarray(Image.open(files[0])), np.asarray(pictures[0]))


# ---- what was lost since is made again ----

TABLES = ("seed/pairs.parquet", "seed/holdout.parquet", "benchmarks.parquet", "prompts.parquet")


@pytest.mark.parametrize("name, damage", zip(TABLES, [
    lambda file: file.unlink(),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-50]),
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
]), ids=["gone", "empty", "cut off", "zeros"])
def test_a_lost_table_is_made_again(seeded, tmp_path, capsys, name, damage):
    run = shutil.copytree(seeded.run, tmp_path / "run")
    shutil.copyfile(seeded.run.parent / "own.txt", tmp_path / "own.txt")
    (run / "iter0").mkdir()
    before = {table: (run / table).read_bytes() for table in TABLES}
    damage(run / name)
    assert call("01", run) is None
    assert f"01 seed: {run / name} is lost or damaged, and is made again" in capsys.readouterr().out
    assert {table: (run / table).read_bytes() for table in TABLES} == before
    assert call("01", run) is None
    assert "nothing to do" in capsys.readouterr().out


def test_rows_that_were_dropped_stay_out_and_another_source_is_refused(seeded, source, tmp_path):
    run = shutil.copytree(seeded.run, tmp_path / "run")
    kept = pd.read_parquet(run / "seed/pairs.parquet")[1:]
    kept.to_parquet(run / "seed/pairs.parquet", index=False)
    (run / "seed/holdout.parquet").unlink()
    assert call("01", run) is None
    assert len(pd.read_parquet(run / "seed/pairs.parquet")) == 11
    assert len(pd.read_parquet(run / "seed/holdout.parquet")) == 3

    # Human pairs that the training has not seen would measure another judge.
    (run / "seed/holdout.parquet").unlink()
    other = shutil.copytree(source, tmp_path / "other")
    for number in range(3):
        rows = [shard_row(100 * number + i) for i in range(20)]
        write_shard(other / f"data/train-{number:05d}-of-00003.parquet", rows)
    configure(run, pairs=str(other))
    refused(call("01", run), "seed/pairs.parquet: --pairs", "holdout.parquet cannot be made again")


def test_a_damaged_picture_of_the_world_is_made_again_as_the_message_says(mini, mini_copy):
    """In the middle, so that only who reads it to its end will notice."""
    pictures = {
        mini_copy / pd.read_parquet(mini / "seed/pairs.parquet").win[0]: ("01",),
        mini_copy / pd.read_parquet(mini / "iter1/pairs.parquet").win[0]: ("02", "--iter", "1"),
    }
    marks = {"01": "seed/holdout.parquet", "02": "iter1/pairs.parquet"}
    for picture, maker in pictures.items():
        whole = picture.read_bytes()
        half = len(whole) // 2
        picture.write_bytes(whole[:half] + b"?" * 20 + whole[half + 20:])
        (mini_copy / marks[maker[0]]).unlink()

        looker = ("03", "--iter", "1") if maker[0] == "02" else maker
        told = call(looker[0], mini_copy, *looker[1:])
        refused(told, f"{picture}: cannot read the image", "the same command makes it again")
        picture.unlink()
        Path(re.search("delete it and (.*), and", told)[1]).unlink()
        assert call(maker[0], mini_copy, *maker[1:]) is None
        assert call(looker[0], mini_copy, *looker[1:]) is None
        assert picture.read_bytes() == whole
        for name in (*TABLES, "iter1/candidates.parquet", "iter1/pairs.parquet"):
            assert (mini_copy / name).read_bytes() == (mini / name).read_bytes(), name


@pytest.mark.parametrize("ids, prompts, told", [
    ([0, None, 2], ["a", "b", "c"], "row 1: prompt_id 0.0 is not a whole number"),
    (["0", "1", "2"], ["a", "b", "c"], "row 1: prompt_id '0' is not a whole number"),
    ([0, 1, 0], ["a", "b", "c"], "row 3: prompt_id 0 stands there already"),
    ([0, 1, 2], ["a", None, "c"], "row 2: prompt nan is not a text"),
    ([0, 1, 2], [b"a", b"b", b"c"], "row 1: prompt b'a' is not a text"),
])
def test_an_odd_row_of_prompts_is_told_with_its_remedy(tmp_path, ids, prompts, told):
    table = pd.DataFrame({"prompt_id": ids, "prompt": prompts, "split": "eval"})
    table.to_parquet(tmp_path / "prompts.parquet")
    message = fails_with(told, read_prompts, tmp_path, "eval")
    assert re.search("or delete .*prompts.parquet and run .* again", message)


def test_benchmarks_of_other_prompts_are_told_and_made_again(comparing_run):
    write_eval(comparing_run)
    of_eval = read_prompts(comparing_run.run, "eval")
    path = Path(comparing_run.run) / "benchmarks.parquet"
    whole = pd.read_parquet(path)
    for damaged, told in [
        (whole.assign(prompt_id=whole.prompt_id + 90), "row 1: prompt_id 90 is none of"),
        (whole.assign(prompt_id="x"), "row 1: prompt_id 'x' is none of"),
        (whole[1:], "prompt_id 0 is not in it"),
    ]:
        damaged.to_parquet(path, index=False)
        message = fails_with(told, read_benchmarks, comparing_run.run, of_eval)
        assert "delete it and run 05_eval.py" in message

    path.unlink()
    (Path(comparing_run.run) / "prompts.parquet").unlink()
    write_eval(comparing_run)
    assert pd.read_parquet(path).equals(whole)
    assert len(read_benchmarks(comparing_run.run, of_eval)) == 6


def test_prompts_of_a_run_with_human_pairs_are_not_those_of_a_comparison(mini_copy):
    (mini_copy / "prompts.parquet").write_bytes(b"")
    told = fails_with("run 01_seed.py --run", write_eval, settings_of(mini_copy))
    assert call("01", *re.search("--run (.*),", told).groups()) is None
    write_eval(settings_of(mini_copy))
    assert len(read_prompts(mini_copy, "iter1")) == 3


def test_a_folder_made_to_compare_models_is_not_taken_for_a_seed(tmp_path):
    run = tmp_path / "run"
    s = SimpleNamespace(run=str(run), eval_prompts="world", eval_count=4, pairs="world")
    write_eval(s)
    fails_with("has no seed; give the run another folder", run_stage_01, run)

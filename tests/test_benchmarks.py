"""lib/benchmarks.py and stage 01: evaluation prompts by name, from the formats they are published in, set aside first."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pandas as pd
import pytest
from conftest import stage
from test_pairs import DATA, fails, fake_hub, http_error, make_shards, shard_row, write, write_own

from lib import benchmarks, models, pairs, world
from lib.run import read_prompts

TSV = ('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tOne, two\nA red "stop" sign\tArtifacts\tBasic\t\n'
       '"G I G" painted\tIllustrations\tWriting\t\nein Hündchen \tAnimals\tBasic\t\nlife\tAbstract\tBasic\t\n')


def rows(names, count: int = 0, source: str = "") -> list[tuple[str, str, str]]:
    return list(benchmarks.load(str(names), count, source).itertuples(index=False, name=None))


# ---- each benchmark as it is published ----

def test_hpsv2_file_and_folder_keep_order_and_styles_and_drop_repeats_within_a_style(tmp_path):
    given = {style: [f"{style} {i}" for i in range(4)] + ["in every style ", "in every style", " "]
             for style in ("anime", "concept-art", "paintings", "photo")}
    (tmp_path / "list.json").write_text(json.dumps(given))
    for style, prompts in given.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(prompts))
    (tmp_path / "drawbench.json").write_text('["not one of the four"]')
    found = rows(f"hpsv2={tmp_path}")
    assert found == rows(f"hpsv2={tmp_path / 'list.json'}")
    assert found == [("hpsv2", style, p) for style in given for p in [f"{style} {i}" for i in range(4)] + ["in every style"]]
    assert rows(f"hpsv2={tmp_path}", 8) == [("hpsv2", style, f"{style} {i}") for style in given for i in range(2)]
    (tmp_path / "photo.json").unlink()
    assert "zhwang/HPDv2" in fails("benchmark hpsv2: .*photo.json: .*No such file", rows, f"hpsv2={tmp_path}")


def test_hpsv2_of_the_package(tmp_path, monkeypatch, capsys):
    package = pytest.importorskip("hpsv2")
    monkeypatch.setattr(package, "root_path", str(tmp_path / "home"))
    monkeypatch.setattr(package.utils, "root_path", str(tmp_path / "home"))
    asked = []

    def download(repo, name, subfolder, repo_type):
        asked.append((repo, subfolder, name))
        (tmp_path / name).write_text(json.dumps([f"{name} a", f"{name} b"]))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert rows("hpsv2", 4) == [("hpsv2", style, f"{style}.json a") for style in benchmarks.HPSV2_STYLES]
    assert asked == [("zhwang/HPDv2", "benchmark", f"{style}.json") for style in benchmarks.HPSV2_STYLES]
    assert capsys.readouterr().out == "evaluation prompts: hpsv2 4 of 8 in 4 styles (published: 3174)\n"


def test_parti_from_the_hub_and_from_its_tsv(tmp_path, monkeypatch):
    (tmp_path / "P.tsv").write_text(TSV, encoding="utf-8")
    found = rows(f"parti={tmp_path / 'P.tsv'}")
    assert found == [("parti", "Abstract", "bond"), ("parti", "Artifacts", 'A red "stop" sign'),
                     ("parti", "Illustrations", "G I G painted"), ("parti", "Animals", "ein Hündchen"),
                     ("parti", "Abstract", "life")]
    assert rows(f"parti={tmp_path / 'P.tsv'}", 4) == found[:4]               # the second Abstract after one of each
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: tmp_path / {
        ("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset"): "P.tsv"}[repo, name, repo_type])
    assert rows("parti") == found


def test_pickapic_of_a_folder_and_of_the_hub_reads_the_validation_captions_alone(tmp_path, monkeypatch, capsys):
    make_shards(tmp_path, count=2, rows=3)
    captions = ["b", "a", "b", " ", "猫"]
    for split, some in {"validation_unique": captions, "validation": ["x"], "test_unique": ["y"], "test": ["z"]}.items():
        write(tmp_path / f"data/{split}-00000-of-00001.parquet", [shard_row(i, caption=c) for i, c in enumerate(some)])
    assert rows("pickapic", 0, str(tmp_path)) == [("pickapic", "", p) for p in ("b", "a", "猫")]
    assert capsys.readouterr().out == "evaluation prompts: pickapic 3 (published: 500)\n"
    assert rows(f"pickapic={tmp_path}", 2) == [("pickapic", "", "b"), ("pickapic", "", "a")]
    log = fake_hub(monkeypatch, tmp_path)
    assert rows("pickapic", 0, "some/pairs") == rows("pickapic", 0, str(tmp_path))
    assert log == ["peek data/validation_unique-00000-of-00001.parquet"]
    (tmp_path / "data/validation_unique-00000-of-00001.parquet").unlink()
    assert rows("pickapic", 0, str(tmp_path)) == [("pickapic", "", "x")]


@pytest.mark.parametrize("name, file, count", [("hpsv2", "hpsv2_benchmark_prompts", 3174), ("parti", "partiprompts", 1632),
                                               ("pickapic", "pickapic_v2_test_unique_prompts", 487)])
def test_the_published_lists(name, file, count, capsys):
    path = DATA / f"{file}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not at hand")
    table = benchmarks.load(f"{name}={path}", 0)
    assert len(table) == count and not table.duplicated().any()
    assert ("published" in capsys.readouterr().out) == (name == "pickapic")
    if name == "hpsv2":
        assert table.prompt.nunique() == 3172 and table["style"].nunique() == 4
        assert benchmarks.load(f"{name}={path}", 400).groupby("style").size().tolist() == [100] * 4


# ---- one's own, several, and the world ----

@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_own_files_with_and_without_styles(tmp_path, suffix):
    path = write_own(tmp_path / f"mine{suffix}", [{"style": s, "prompt": p} for s, p in
                                                  [("oil", "a, b"), ("ink", "c"), ("oil", "ü"), ("oil", "d"), ("ink", "d")]])
    found = [("mine", "oil", "a, b"), ("mine", "ink", "c"), ("mine", "oil", "ü"), ("mine", "oil", "d"), ("mine", "ink", "d")]
    assert rows(path) == found and rows(f"other={path}", 3) == [("other", *row[1:]) for row in found[:3]]
    (tmp_path / "plain.txt").write_text("one\n\n two \none\n")
    assert rows(f"{path}, {tmp_path / 'plain.txt'}") == found + [("plain", "", "one"), ("plain", "", "two")]


def test_the_worlds_prompts_are_every_style_in_turn_and_in_no_two_parts():
    parts = benchmarks.world_captions()
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == len(world.CAPTIONS)
    for name, count in {"world": 240, "dev": 160}.items():
        table = benchmarks.load(name, 0)
        assert table.prompt.tolist() == parts[name] and len(table) == count and set(table.benchmark) == {name}
        assert table["style"].value_counts().nunique() == 1 and table["style"][:4].tolist() == list(world.STYLES)
        assert benchmarks.load(name, 8).equals(table[:8])
        fails(f"--eval-count {count + 1}: .*{count} {name}", rows, name, count + 1)


def test_tables_hold_each_prompt_once_and_each_place_it_stands_in(tmp_path, capsys):
    (tmp_path / "h.json").write_text(json.dumps({"anime": ["a", "b"], "photo": ["b", "c"]}))
    (tmp_path / "t.txt").write_text("c\nd\n")
    s = SimpleNamespace(run=str(tmp_path / "run"), eval_prompts=f"{tmp_path / 'h.json'},{tmp_path / 't.txt'}", eval_count=0,
                        pairs="none/such")
    benchmarks.write_eval(s)
    prompts, table = read_prompts(s.run, "eval"), pd.read_parquet(tmp_path / "run/benchmarks.parquet")
    assert prompts.prompt.tolist() == ["a", "b", "c", "d"] and prompts.prompt_id.tolist() == [0, 1, 2, 3]
    assert list(table.merge(prompts)[["benchmark", "style", "prompt"]].itertuples(index=False, name=None)) == [
        ("h", "anime", "a"), ("h", "anime", "b"), ("h", "photo", "b"), ("h", "photo", "c"), ("t", "", "c"), ("t", "", "d")]
    (tmp_path / "t.txt").unlink()
    benchmarks.write_eval(s)                                                 # what is there is not asked for again
    assert capsys.readouterr().out == "evaluation prompts: h 4 in 2 styles, t 2\n"


@pytest.mark.parametrize("names, source, match", [
    ("nonesuch", "", "benchmark nonesuch: neither one of pickapic, hpsv2, parti nor a file"), (",", "", "names no benchmark"),
    ("pickapic", "", "benchmark pickapic: .*no validation.*pickapic=PATH"),
    ("pickapic", "{}/a.csv", "benchmark pickapic: .*a.csv is not Pick-a-Pic.*pickapic=PATH"),
    ("pickapic", "{}/train", "benchmark pickapic: .*no shards of validation_unique.*pickapic=PATH"),
    ("pickapic=gone/gone", "", "benchmark pickapic: gone/gone: .*404.*pickapic=PATH"),
    ("hpsv2={}/none.json", "", "benchmark hpsv2: .*none.json: .*No such file.*hpsv2=PATH"),
    ("parti={}/a.csv", "", "benchmark parti: .*no column 'prompt'; it has x, y.*parti=PATH"),
    ("{}/empty.txt", "", "benchmark empty: holds no prompt"), ("{}/t.txt,t={}/empty.txt", "", "benchmark t: holds no prompt"),
    ("{}/t.txt,t={}/t.txt", "", "two benchmarks are named t; give one as another=.*t.txt")])
def test_what_is_wrong_is_told_in_one_line(tmp_path, monkeypatch, names, source, match):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "t.txt").write_text("one\n")
    make_shards(tmp_path / "train", count=1, rows=1)
    fake_hub(monkeypatch, tmp_path, http_error("RepositoryNotFoundError", 404))
    fails(match, rows, names.replace("{}", str(tmp_path)), 0, source.replace("{}", str(tmp_path)))


@pytest.mark.parametrize("name", ["hpsv2", "parti"])
def test_a_hub_out_of_reach_names_the_local_copy(monkeypatch, name):
    def download(*_, **__):
        raise ConnectionError("no name\nresolution")

    if name == "hpsv2":
        pytest.importorskip("hpsv2")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fails(f"benchmark {name}: cannot fetch its list .ConnectionError: no name resolution.; .*{name}=PATH", rows, name)


# ---- stage 01 ----

def call(run: Path, *more) -> None:
    stage("01").main(["--run", str(run), "--iters", "2", "--iter-prompts", "3,4", "--eval-count", "0", "--seed-pairs", "12",
                      "--holdout-pairs", "5", *map(str, more)])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Pick-a-Pic's layout; prompts of its validation split stand in the training shards too."""
    folder = tmp_path_factory.mktemp("pickapic")
    make_shards(folder, count=3, rows=20)
    captions = [f"PROMPT  {i}" for i in range(0, 60, 4)] + ["new"]
    write(folder / "data/validation_unique-0.parquet", [shard_row(i, caption=c) for i, c in enumerate(captions)])
    return folder


def test_the_evaluation_comes_first_and_nothing_else_has_its_prompts(tmp_path, source, monkeypatch, capsys):
    run, opened = tmp_path / "run", []
    real = pairs.parquet_rows
    monkeypatch.setattr(pairs, "parquet_rows", lambda file, *more: opened.append(file.name) or real(file, *more))
    (tmp_path / "own.txt").write_text("new\nmy own\n")
    call(run, "--pairs", source, "--prompts", "pairs", "--eval-prompts", f"pickapic,{tmp_path / 'own.txt'}",
         "--holdout-pairs", 3)
    seed, held = (pd.read_parquet(run / f"seed/{name}.parquet") for name in ("pairs", "holdout"))
    prompts, table = pd.read_parquet(run / "prompts.parquet"), pd.read_parquet(run / "benchmarks.parquet")
    assert prompts.split.value_counts().to_dict() == {"eval": 17, "iter1": 3, "iter2": 4} and len(table) == 18
    pools = [seed.prompt, held.prompt, *(prompts.prompt[prompts.split == split] for split in ("iter1", "iter2", "eval"))]
    folded = [set(map(pairs.fold, pool)) for pool in pools]
    assert list(map(len, folded)) == [12, 3, 3, 4, 17] and len(set().union(*folded)) == 39
    assert len(opened) == 1 and "prompt of the evaluation 5;" in capsys.readouterr().out    # 15 of its 20 are enough
    assert len(list((run / "seed/images").iterdir())) == len(list((run / "seed/latents").iterdir())) == 30
    ids = dict(zip(prompts.prompt, prompts.prompt_id))
    assert table[table.prompt_id == ids["new"]].benchmark.tolist() == ["pickapic", "own"]


def test_an_interrupted_stage_goes_on_where_it_was(tmp_path, source, monkeypatch):
    given = ["--pairs", source, "--prompts", "pairs", "--eval-prompts", "pickapic"]
    call(tmp_path / "whole", *given)
    run, real, saved = tmp_path / "run", models.save_latent, []

    def save(tensors, image, *more):
        if len(saved) == 20:
            raise KeyboardInterrupt
        saved.append(image)
        real(tensors, image, *more)

    monkeypatch.setattr(models, "save_latent", save)
    with pytest.raises(KeyboardInterrupt):
        call(run, *given)
    assert not (run / "prompts.parquet").exists()
    before = {file: file.stat().st_mtime_ns for kind in ("images", "latents") for file in (run / "seed" / kind).iterdir()}
    assert len(before) == 34 + 20
    monkeypatch.setattr(models, "save_latent", real)
    call(run, *given)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    files = [file.relative_to(run) for file in run.rglob("*.*") if file.name not in ("config.json", "ledger.parquet")]
    assert len(files) > 80 and all((run / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files)


@pytest.mark.parametrize("more, match", [
    (["--pairs", "{}", "--prompts", "pairs", "--eval-prompts", "pickapic,parti=none.tsv"], "benchmark parti: none.tsv"),
    (["--pairs", "{}", "--prompts", "none.txt", "--eval-prompts", "pickapic"], "none.txt: not readable"),
    (["--pairs", "{}", "--prompts", "{}/few.txt", "--eval-prompts", "pickapic"], "7 prompts are needed .*of 3 only 2"),
    (["--eval-count", "999"], "--eval-count 999"), (["--iter-prompts", "999"], "--iter-prompts 999")])
def test_what_cannot_work_is_refused_before_anything_is_fetched_or_painted(tmp_path, source, more, match):
    (source / "few.txt").write_text("one\ntwo\nprompt 4\n")
    fails(match, call, tmp_path / "run", *(part.replace("{}", str(source)) for part in more))
    assert not (tmp_path / "run/seed").exists()


def test_a_folder_made_to_compare_models_is_not_taken_for_a_seed(tmp_path):
    run = tmp_path / "run"
    benchmarks.write_eval(SimpleNamespace(run=str(run), eval_prompts="world", eval_count=4, pairs="world"))
    fails("has no seed; give the run another folder", call, run)

"""What a run will need is asked for at once: one list, remedies that work, and nothing spent."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import (ENV, ROOT, fails_with, fake_hub, make_pairs, make_pipeline, make_shards,
                      refused)
from huggingface_hub import constants

from lib import hub, models, preflight, settings
from lib.plan import disk
from lib.plan.architecture import architecture_of
from lib.plan.report import in_gb
from lib.preflight import check_memory
from lib.run import UserError
from lib.settings import PRESETS, Settings

HPS = "HPS_v2_compressed.pt"


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory) -> Path:
    """A folder with a model, pairs, prompts and a score: all that a run needs."""
    folder = tmp_path_factory.mktemp("at hand") / "all"
    make_pairs(folder, 12)
    make_pipeline(folder / "model", xl=False, prediction="epsilon")
    (folder / "more.txt").write_text("other things\n")
    (folder / "score").mkdir()
    (folder / "score" / HPS).write_bytes(b"weights")
    return folder


@pytest.fixture
def own(at_hand, tmp_path, monkeypatch) -> Path:
    """A copy of it to break, on a machine with room whose hub does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 ** 12))
    monkeypatch.setattr(preflight, "check_memory", lambda *_: "")
    hub.hub_names.cache_clear()
    models.pipeline_config.cache_clear()
    return shutil.copytree(at_hand, tmp_path / "all")


def flags(own: Path, *more: str) -> list[str]:
    """The command line of a run with all that is at hand; what is given twice holds last."""
    return [
        "--preset", "sd15", "--run", str(own.parent / "run"), "--device", "cpu",
        "--resolution", "64", "--model", f"{own}/model", "--pairs", f"{own}/pairs.csv",
        "--prompts", f"{own}/prompts.txt", "--eval-prompts", f"{own}/eval.txt",
        "--scores", "hpsv2", "--score-weights", f"hpsv2={own}/score", *more]


def ask(capsys, *argv: str) -> tuple[dict[str, str], str]:
    """The lines of --check, by what they are about, and the error that it ends with."""
    error = ""
    capsys.readouterr()
    try:
        preflight.main([*argv, "--check"])
    except UserError as caught:
        error = str(caught)
    lines = capsys.readouterr().out.splitlines()
    return dict(line.split(": ", 1) for line in lines), error


def missing(lines: dict[str, str]) -> list[str]:
    return [thing for thing, told in lines.items() if not told.startswith("ok")]


def test_with_everything_at_hand_all_is_ok_and_nothing_is_made(own, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "check_memory", check_memory)
    lines, error = ask(capsys, *flags(own))
    assert error == ""
    assert missing(lines) == []
    assert list(lines) == ["device", "processes", "size", "weights of scores", "model",
                           "benchmark " + f"{own}/eval.txt", "pairs", "prompts", "score hpsv2",
                           "disk", "memory"]
    assert lines["pairs"] == "ok 12 rows"
    assert lines["prompts"] == "ok 6 prompts"
    assert lines["disk"].endswith("to be downloaded: nothing")
    assert not (own.parent / "run").exists()


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


# What is broken, which thing is told, in which words, and the flags that mend it (OWN is the
# folder). Where there are none, the files that are named are put back as they were.
BREAKS = [
    (["--model", "me/none"], None, "model", ["me/none", "out of reach", "local copy"],
     ["--model", "OWN/model"]),
    (["--model", "OWN/model/unet/diffusion_pytorch_model.safetensors"], None, "model",
     ["is one file", "convert it", "give that FOLDER"], ["--model", "OWN/model"]),
    ([], lambda own: (own / "model/unet/diffusion_pytorch_model.safetensors").unlink(), "model",
     ["unet/", "download it again"], []),
    ([], lambda own: cut_off(own / "model/text_encoder/model.safetensors"), "model",
     ["text_encoder/model.safetensors", "cut off", "download it again"], []),
    ([], lambda own: shutil.rmtree(own / "model/tokenizer"), "model",
     ["tokenizer/", "vocab.json", "download it again"], []),
    (["--resolution", "100"], None, "model", ["--resolution 100", "--resolution 128"],
     ["--resolution", "128"]),
    (["--vae", "me/vae"], None, "VAE", ["me/vae", "out of reach", "local copy"],
     ["--vae", "OWN/model/vae"]),
    (["--start", "OWN/nope"], None, "start", ["nope", "no such file or folder"],
     ["--start", "OWN/model"]),
    (["--pairs", "OWN/none.csv"], None, "pairs", ["none.csv", "correct --pairs"],
     ["--pairs", "OWN/pairs.csv"]),
    ([], lambda own: (own / "11l.png").unlink(), "pairs", ["row 12", "11l.png", "drop the row"],
     []),
    ([], lambda own: (own / "0w.png").write_bytes(b"GIF"), "pairs", ["row 1", "cannot read"], []),
    (["--seed-pairs", "50"], None, "pairs", ["12 rows", "--seed-pairs 50"],
     ["--seed-pairs", "8", "--holdout-pairs", "4"]),
    (["--prompts", "OWN/none.txt"], None, "prompts", ["none.txt", "correct the name"],
     ["--prompts", "OWN/prompts.txt"]),
    (["--iter-prompts", "3"], None, "prompts", ["9 prompts are needed", "--iters"],
     ["--iters", "2"]),
    (["--eval-prompts", "OWN/eval.txt,parti"], None, "benchmark parti",
     ["out of reach", "parti=PATH"], ["--eval-prompts", "OWN/eval.txt,parti=OWN/more.txt"]),
    (["--eval-prompts", "OWN/eval.txt,eval=OWN/more.txt"], None, "benchmarks",
     ["another=OWN/more.txt"], ["--eval-prompts", "OWN/eval.txt,another=OWN/more.txt"]),
    (["--score-weights", ""], None, "score hpsv2",
     [f"https://huggingface.co/xswu/HPSv2/resolve/main/{HPS}", "--score-weights hpsv2=FOLDER"],
     ["--score-weights", "hpsv2=OWN/score"]),
    (["--score-weights", "hpsv2=OWN"], None, "score hpsv2", [f"OWN/{HPS}", "does not exist"],
     ["--score-weights", "hpsv2=OWN/score"]),
    (["--reward", "pickscore"], None, "reward", ["PickScore_v1", "pickscore=FOLDER"],
     ["--reward", "implicit"]),
]


@pytest.mark.parametrize("given, spoil, thing, words, mend", BREAKS)
def test_one_thing_that_is_missing_is_named_and_its_remedy_works(
        own, at_hand, capsys, monkeypatch, given, spoil, thing, words, mend):
    # Disk and memory do not depend on it.
    monkeypatch.setattr(preflight, "look_for_room", lambda *_: [])

    def filled(words):
        return [word.replace("OWN", str(own)) for word in words]

    if spoil:
        spoil(own)
    lines, error = ask(capsys, *flags(own, *filled(given)))
    assert missing(lines) == [thing]
    refused(lines[thing], "missing: ", *filled(words))
    refused(error, "1 of ", "missing")

    if spoil:
        shutil.rmtree(own)
        shutil.copytree(at_hand, own)
    lines, error = ask(capsys, *flags(own, *filled(given), *filled(mend)))
    assert (missing(lines), error) == ([], "")
    assert not (own.parent / "run").exists()


@pytest.mark.parametrize("score, files", [
    ("pickscore", ["model.safetensors", "config.json", "tokenizer.json"]),
    ("imagereward", ["ImageReward.pt", "vocab.txt"]),
    ("aesthetics", ["sac%2Blogos%2Bava1-l14-linearMSE.pth", "model.safetensors", "config.json"]),
    ("hpsv2.1", ["HPS_v2.1_compressed.pt"]),
])
def test_all_files_of_a_score_are_named_and_found_in_one_folder(
        own, monkeypatch, score, files):
    def no_web(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("lib.eval.scorers.urlopen", no_web)
    monkeypatch.setattr("lib.eval.scorers.web_path", lambda file: own / "cache" / file)
    s = Settings(**PRESETS["tiny"] | {"scores": score})
    [answer] = preflight.look_for_scores(s)
    assert not answer.refuses
    refused(answer.line(), f"--score-weights {score}=FOLDER")
    addresses = re.findall(r"https://\S+", answer.fault)
    assert [address.rpartition("/")[2] for address in addresses] == files

    folder = own / "weights"
    folder.mkdir()
    for name in files:
        (folder / name.replace("%2B", "+")).write_bytes(b"weights")
    [answer] = preflight.look_for_scores(replace(s, score_weights=f"{score}={folder}"))
    assert answer.line() == f"score {score}: ok"


def test_a_disk_that_is_too_small_is_told_with_what_is_needed(own, capsys, monkeypatch):
    monkeypatch.setattr(disk, "free_disk", lambda s: (1000, own))
    lines, _ = ask(capsys, *flags(own))
    assert missing(lines) == ["disk"]
    refused(lines["disk"], "1e-06 GB free", "takes about", "--run")


def test_memory_that_is_too_small_is_told_with_settings_that_fit(own, monkeypatch):
    s = settings.planned(flags(own, "--sample-batch", "20000"), "")
    architecture = architecture_of(s, ask_hub=False)
    monkeypatch.setattr(preflight, "room_of_device", lambda s: ("a small card", int(2e9)))
    message = fails_with("a small card has 2 GB, and the run takes about", check_memory, s,
                         architecture)

    words = message.rpartition("give ")[2].split()
    assert words[0] == "--sample-batch"
    given, _ = settings.parse(words, "", {})
    assert check_memory(replace(s, **given), architecture).endswith(" of 2 GB")


# ---- the hub ----

class Silent:
    """A network session that reaches nothing, and counts how often it was tried."""

    def __init__(self):
        self.tried = 0

    def head(self, *_, **__):
        self.tried += 1
        raise OSError("no route")


def test_a_hub_that_does_not_answer_is_asked_once(own, capsys, monkeypatch):
    silent = Silent()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: silent)
    monkeypatch.setattr("lib.eval.scorers.is_within_reach", lambda *_: False)
    monkeypatch.setattr(preflight, "look_for_room", lambda *_: [])
    run = own.parent / "run"
    lines, error = ask(capsys, "--preset", "sdxl", "--device", "cpu", "--run", str(run),
                       "--eval-prompts", "pickapic,hpsv2,parti")
    assert missing(lines) == ["model", "VAE", "benchmark pickapic", "benchmark hpsv2",
                              "benchmark parti", "pairs", "score pickscore", "score imagereward",
                              "score aesthetics", "score hpsv2"]
    for thing in ("model", "VAE", "benchmark pickapic", "benchmark hpsv2", "pairs"):
        assert "out of reach" in lines[thing]
    refused(error, "10 of ")

    # The list of scores stands within the whole, and does not ask anew.
    assert silent.tried == 1
    assert constants.HF_HUB_OFFLINE is False
    assert not run.exists()


def test_of_a_hub_that_answers_lists_are_asked_and_nothing_is_downloaded(
        own, capsys, monkeypatch):
    make_shards(own / "hub", 3, 30)
    log = fake_hub(monkeypatch, own / "hub")
    answers = SimpleNamespace(head=lambda *_, **__: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answers)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)

    lines, error = ask(capsys, *flags(own, "--pairs", "some/pairs", "--prompts", "pairs",
                                      "--score-weights", ""))
    assert (missing(lines), error) == ([], "")
    assert lines["pairs"] == "ok 3 shards on the hub"
    assert lines["prompts"] == "ok those of --pairs"
    size = in_gb(disk.SCORE_WEIGHTS["hpsv2"][0])
    assert lines["disk"].endswith(f"to be downloaded: pairs 21 GB, scores {size}")
    assert log == [name for name in log if name.startswith("peek data/train")]
    assert len(log) == 1


# ---- slips ----

@pytest.mark.parametrize("given, words", [
    ("--scores wolrd", ["'wolrd' is no score", "pickscore"]),
    ("--device banana", ["--device banana", "auto, cpu"]),
    ("--device cuda:9", ["--device cuda:9", "--device auto"]),
    ("--start nope", ["--start nope", "no such file or folder"]),
    ("--resolution 30", ["--resolution 30", "32"]),
    ("--iters many", ["--iters", "invalid int"]),
    ("--sampel-steps 3", ["did you mean --sample-steps"]),
    ("--lr nan", ["--lr nan", "above 0"]),
    ("--cfg-scale nan", ["--cfg-scale nan", "at least 0"]),
    ("--weight-decay nan", ["--weight-decay nan", "at least 0"]),
    ("--micro-batch 0", ["--micro-batch 0", "at least 1"]),
    ("--scores hpsv2 --score-weights hpsv2=/none", ["hpsv2=/none", "no such file"]),
    ("--eval-count 99999", ["--eval-count 99999", "ask for fewer"]),
])
def test_a_slip_is_told_before_anything_is_made(tmp_path, capsys, monkeypatch, given, words):
    monkeypatch.setattr(preflight, "look_for_room", lambda *_: [])
    lines, error = ask(capsys, "--run", str(tmp_path / "run"), *given.split())
    assert error
    told = "\n".join([*lines.values(), error])
    for word in words:
        assert word in told
    assert not (tmp_path / "run").exists()


def test_the_driver_checks_alone_and_ends_with_2_where_something_is_wrong(tmp_path):
    command = [ROOT / "run_sail.sh", "tiny", "--run", tmp_path / "run", "--scores", "x", "--check"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    refused(done.stderr.strip(), "error: --scores x")
    assert not (tmp_path / "run").exists()


# ---- a run begins, and goes on ----

def drive(capsys, *argv: str) -> tuple[list[str], str]:
    """What the driver's first call tells, line by line, and the error that it ends with."""
    error = ""
    capsys.readouterr()
    try:
        settings.main(list(argv))
    except UserError as caught:
        error = str(caught)
    return capsys.readouterr().err.splitlines(), error


def test_a_run_is_refused_with_the_list_of_what_its_stages_would_lack(own, capsys):
    lacking = flags(own, "--start", "nope", "--prompts", "none.txt", "--score-weights", "")
    lines, error = drive(capsys, *lacking)
    assert [line.partition(":")[0] for line in lines] == ["start", "prompts", "score hpsv2"]
    refused(error, "2 of the things", "missing", "same command again")

    # One thing is the error itself.
    lines, error = drive(capsys, *flags(own, "--start", "nope", "--score-weights", ""))
    assert [line.partition(":")[0] for line in lines] == ["score hpsv2"]
    refused(error, "--start nope", "no such file")
    assert not (own.parent / "run").exists()


def test_without_a_score_a_run_begins_and_says_so(own, capsys):
    lines, error = drive(capsys, *flags(own, "--score-weights", ""))
    assert error == ""
    assert len(lines) == 1
    refused(lines[0], "score hpsv2: missing", HPS, "the run begins, or goes on, all the same")
    assert (own.parent / "run/config.json").exists()


def test_a_run_that_goes_on_is_asked_for_what_is_still_to_come(own, capsys, monkeypatch):
    run = own.parent / "run"
    assert drive(capsys, *flags(own)) == ([], "")
    (run / "prompts.parquet").touch()
    (own / "pairs.csv").unlink()
    assert drive(capsys, "--run", str(run)) == ([], "")

    # A run from another one has its pairs, too.
    other = ["--run", str(own.parent / "other"), "--from", str(run)]
    assert drive(capsys, *other) == ([], "")

    # A full disk stops no run that can wait for room.
    with monkeypatch.context() as small:
        small.setattr(disk, "free_disk", lambda s: (1000, own))
        lines, error = drive(capsys, "--run", str(run))
    assert error == ""
    assert [line.partition(":")[0] for line in lines] == ["disk"]

    shutil.rmtree(own / "model")
    lines, error = drive(capsys, "--run", str(run))
    refused(error, f"{own}/model")


def test_the_embedded_world_brings_all_it_needs(tmp_path, capsys, monkeypatch):
    def too_long(*_):
        raise AssertionError("the world's runs wait for nothing")

    monkeypatch.setattr(preflight, "look_for_all", too_long)
    monkeypatch.setattr(preflight, "hub_asked_once", too_long)
    run = ["--run", str(tmp_path / "run")]
    assert drive(capsys, *run) == ([], "")
    (tmp_path / "run/prompts.parquet").touch()
    assert drive(capsys, *run) == ([], "")

    # And what looks for it loads no library.
    code = ("import sys; from pathlib import Path; from lib.preflight import refuse_lacking; "
            "from lib.settings import Settings; "
            f"refuse_lacking(Settings(run={str(tmp_path)!r}), Path({str(tmp_path)!r})); "
            "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

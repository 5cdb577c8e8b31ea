"""Settings: the presets, what a run keeps, what is refused, a second start, few pairs, earlier
versions, --help."""

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from conftest import ENV, ROOT, call, make_pairs, refused

from lib import settings
from lib.data import few
from lib.run import UserError
from lib.settings import (BOUNDS, FIELDS, PRESETS, Settings, amend, check, micro_batch_of, planned,
                          round_prompts)


def start(run: Path, *given: str) -> Settings:
    """The settings of a run, which begins here if it has no config.json."""
    return settings.load(["--run", str(run), *given], "", create=True)[0]


def refusal(run: Path, *given: str) -> str:
    with pytest.raises(UserError) as caught:
        start(run, *given)
    return str(caught.value)


def drive(run: Path, *given: str) -> None:
    """The driver's first call."""
    settings.main(["--run", str(run), *given])


def made(s: Settings) -> None:
    """Make of a run's folder one in which stage 01 is done."""
    (Path(s.run) / "prompts.parquet").touch()


def saved(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


# ---- presets ----

@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_passes_its_own_check(preset):
    check(Settings(**PRESETS[preset]))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_a_value_of_the_right_type_for_every_setting(preset):
    for name, field in FIELDS.items():
        assert type(PRESETS[preset][name]) is field.type, name


def test_the_default_of_every_setting_is_that_of_preset_tiny():
    assert Settings() == Settings(**PRESETS["tiny"])


PAPER = {
    "sd15": {
        "resolution": 512,
        "seed_pairs": 50_000,
        "iters": 3,
        "iter_prompts": "10000,20000,20000",
        "candidates": 8,
        "draws": 10,
        "sampler": "ddpm",
        "sample_steps": 50,
        "cfg_scale": 7.5,
        "beta": 5000.,
        "alpha": .25,
        "batch": 128,
        "optimizer": "adamw",
        "anchor": "base",
    },
    "sdxl": {
        "resolution": 1024,
        "seed_pairs": 50_000,
        "iters": 2,
        "iter_prompts": "10000,20000",
        "candidates": 8,
        "draws": 10,
        "sampler": "ddim",
        "sample_steps": 20,
        "cfg_scale": 5.,
        "beta": 5000.,
        "alpha": .25,
        "batch": 128,
        "optimizer": "adafactor",
        "anchor": "base",
    },
}


@pytest.mark.parametrize("preset", PAPER)
def test_a_preset_has_the_papers_values(preset):
    for name, value in PAPER[preset].items():
        assert PRESETS[preset][name] == value, name


def test_prompts_of_the_rounds_are_as_listed_and_the_last_number_repeats():
    s = Settings(iter_prompts="10,20")
    assert [round_prompts(s, k) for k in (1, 2, 3)] == [10, 20, 20]


# ---- config.json ----

def test_a_new_run_keeps_every_setting(tmp_path):
    s = start(tmp_path / "r", "--preset", "sdxl", "--alpha", ".5")
    kept = saved(tmp_path / "r")["settings"]
    assert Settings(**kept) == s
    assert kept == PRESETS["sdxl"] | {"alpha": .5, "run": str(tmp_path / "r")}


def test_a_new_run_keeps_what_it_was_made_with(tmp_path):
    start(tmp_path / "r")
    config = saved(tmp_path / "r")
    assert set(config) == {"settings", "versions", "commit", "hardware"}
    assert config["versions"]["torch"]
    assert config["hardware"]["threads"] >= 1


def test_a_stage_finds_the_settings_of_its_run(tmp_path):
    s = start(tmp_path / "r", "--draws", "7")
    again, stage = settings.load(["--run", str(tmp_path / "r"), "--iter", "2"], "", settings.ITER)
    assert again == s
    assert stage.iter == 2


def test_a_run_may_be_moved(tmp_path):
    start(tmp_path / "r")
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    assert start(tmp_path / "elsewhere").run == str(tmp_path / "elsewhere")


def test_only_the_first_stage_begins_a_run(tmp_path):
    with pytest.raises(UserError) as caught:
        settings.load(["--run", str(tmp_path / "r")], "")
    refused(str(caught.value), "config.json", "does not exist", "01_seed.py")
    assert not (tmp_path / "r").exists()


def test_a_run_that_has_made_something_keeps_its_settings(tmp_path):
    made(start(tmp_path / "r"))
    refused(refusal(tmp_path / "r", "--beta", "5000"), "beta = 2000.0", "5000", "--run")
    assert saved(tmp_path / "r")["settings"]["beta"] == 2000


def test_a_run_that_has_made_something_never_changes_its_preset(tmp_path):
    made(start(tmp_path / "r"))
    refused(refusal(tmp_path / "r", "--preset", "sd15"), "preset = tiny", "sd15", "--run")


FREE = {"micro_batch": 6, "rank_batch": 8, "device": "cpu", "scores": "none",
        "score_weights": "pickscore=some/where"}


@pytest.mark.parametrize("name", FREE)
def test_what_a_free_setting_was_given_last_holds_from_then_on(tmp_path, name):
    run = tmp_path / "r"
    made(start(run))
    before = saved(run)
    drive(run, "--preset", "tiny", settings.flag(name), str(FREE[name]))
    assert getattr(settings.load(["--run", str(run)], "")[0], name) == FREE[name]
    assert saved(run) == before | {"settings": before["settings"] | {name: FREE[name]}}


def test_stage_04_trains_with_the_micro_batch_of_a_resumed_run(tmp_path, train, monkeypatch):
    made(start(tmp_path / "r"))
    trained = []

    def note(s, k):
        trained.append(s.micro_batch)
        raise UserError("enough")

    monkeypatch.setattr(train, "training_pairs", note)
    stage = ["--run", str(tmp_path / "r"), "--iter", "0"]
    for given in (["--micro-batch", "6"], ["--micro-batch", "4"]):
        drive(tmp_path / "r", *given)
        with pytest.raises(UserError, match="enough"):
            train.main(stage)

    # By hand, and again without it.
    for arguments in ([*stage, "--micro-batch", "2"], stage):
        with pytest.raises(UserError, match="enough"):
            train.main(arguments)
    assert trained == [6, 4, 2, 2]


def test_a_plan_changes_no_run(tmp_path):
    run = tmp_path / "r"
    made(start(run))
    before = (run / "config.json").read_bytes()
    s = planned(["--run", str(run), "--plan", "--micro-batch", "6"], "",
                {"--plan": {"action": "store_true"}})
    assert s.micro_batch == 6
    assert (run / "config.json").read_bytes() == before
    assert planned(["--run", str(tmp_path / "none")], "").iters == 3
    assert not (tmp_path / "none").exists()


def test_amended_settings_are_kept_beside_what_the_run_was_made_with(tmp_path):
    s = start(tmp_path / "r")
    before = saved(tmp_path / "r")
    assert amend(s, {"seed_pairs": 3}).seed_pairs == 3
    assert saved(tmp_path / "r") == before | {
        "settings": before["settings"] | {"seed_pairs": 3}, "fitted": ["seed_pairs"]}


def test_amended_settings_are_checked(tmp_path):
    s = start(tmp_path / "r")
    with pytest.raises(UserError, match="--seed-pairs 0"):
        amend(s, {"seed_pairs": 0})


@pytest.mark.parametrize("alpha, draws", [("0", 0), ("-0.0", 0), (".25", 1)])
def test_the_driver_is_told_rounds_whether_they_draw_and_folder(tmp_path, capsys, alpha, draws):
    settings.main(["--run", str(tmp_path / "r"), "--iters", "5", f"--alpha={alpha}"])
    assert capsys.readouterr().out == f"5\n{draws}\n{tmp_path / 'r'}/\n"


# ---- refusals: one line that names the setting, and no folder is made ----

NUMBERS = [name for name, field in FIELDS.items() if field.type in (int, float)]


def test_every_number_has_bounds():
    assert set(BOUNDS) == set(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_or_far_out_are_refused(tmp_path, name):
    values = ["-1", str(10 ** 30), "1" * 5000]
    if FIELDS[name].type is float:
        values = ["nan", "inf", "-inf", "-1e-9", "1e30"]
    for value in values:
        # As the driver gives them, in one word: a minus might begin a flag.
        message = refusal(tmp_path / "r", f"{settings.flag(name)}={value}")
        refused(message, settings.flag(name))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("given, words", [
    ("--alhpa 0.5", ["--alhpa", "--help"]),
    ("--bet 1000", ["--bet"]),
    ("--beta x", ["--beta", "'x'"]),
    ("--preset sd99", ["sd99", "sd15"]),
    ("--alpha 1.5", ["--alpha 1.5", "0..1"]),
    ("--flip -1", ["--flip -1", "0..1"]),
    ("--prompt-dropout 1", ["--prompt-dropout 1", "0..1"]),
    ("--candidates 1", ["--candidates 1", "at least 2"]),
    ("--draws 0", ["--draws 0", "at least 1"]),
    ("--sample-batch 0", ["--sample-batch 0", "at least 1"]),
    ("--iters -1", ["--iters -1", "at least 0"]),
    ("--warmup -1", ["--warmup -1", "at least 0"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--rank-t-min 500 --rank-t-max 500", ["--rank-t-min 500", "min < max"]),
    ("--rank-t-max 1001", ["--rank-t-max 1001", "1000"]),
    ("--iter-prompts few", ["--iter-prompts few", "commas"]),
    ("--iter-prompts 5,0", ["--iter-prompts 5,0"]),
    ("--pairs mine.csv --prompts mine.txt", ["--prompts mine.txt", "all three", "--pairs alone"]),
    ("--eval-prompts mine.txt", ["--eval-prompts mine.txt", "all three"]),
    ("--pairs mine.csv --reward world", ["--reward world", "embedded world's people"]),
    ("--reward taste", ["--reward", "'taste'", "implicit", "pickscore"]),
    ("--pairs a --prompts b --eval-prompts c --reward world", ["--reward world", "embedded world"]),
    ("--timesteps uniform", ["--timesteps"]),
    ("--min-margin 0", ["--min-margin"]),
    ("--alhpa 0.5", ["did you mean --alpha?"]),
    ("--row mine=folder", ["--row", "05_eval.py"]),
    ("--iter 1", ["--iter", "04_train_dpo.py"]),
    ("--max-grad-norm 0", ["--max-grad-norm 0.0", "above 0"]),
    ("--cfg-scale -1", ["--cfg-scale -1.0", "at least 0"]),
    ("--micro-batch 0", ["--micro-batch 0", "at least 1"]),
    ("--sample-steps 1001", ["--sample-steps 1001", "at most 999"]),
    ("--alpha 1e-9 --iter-steps 0", ["--alpha 1e-09", "larger --alpha"]),
    ("--iter-steps 10000000 --batch 48", ["--iter-steps 10000000", "fewer"]),
    ("--iter0-steps 10000000 --batch 48", ["--iter0-steps 10000000", "fewer"]),
    ("--device banana", ["--device banana", "auto, cpu"]),
    ("--device cuda", ["--device cuda", "--device auto"]),
    ("--device cuda:7", ["--device cuda:7", "--device auto"]),
    ("--scores wolrd", ["--scores wolrd", "'wolrd'", "none"]),
    ("--scores world,pickscore", ["--scores world,pickscore", "'world'"]),
    ("--score-weights pikscore=x", ["--score-weights pikscore=x", "pickscore"]),
    ("--score-weights pickscore", ["--score-weights pickscore", "NAME=PATH"]),
    ("--pairs a --prompts b --eval-prompts c --scores world", ["--scores world", "--scores none"]),
])
def test_a_bad_setting_is_refused(tmp_path, given, words):
    refused(refusal(tmp_path / "r", *given.split()), *words)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("given, words", [
    ("--resolution 1", ["--resolution 1", "32"]),
    ("--resolution 64", ["--resolution 64", "32"]),
    ("--start nowhere", ["--start nowhere", "no such file or folder"]),
    ("--start images:x", ["--start images:x", "no model"]),
    ("--reward pickscore --score-weights pickscore=/none", ["pickscore=/none", "no such file"]),
    ("--reward pickscore --score-weights pickscore=EMPTY", ["--reward pickscore", "does not exist",
                                                            "--score-weights pickscore="]),
])
def test_what_a_run_would_lack_is_refused_at_its_start(tmp_path, given, words):
    given = given.replace("EMPTY", str(tmp_path)).split()
    with pytest.raises(UserError) as caught:
        drive(tmp_path / "r", *given)
    refused(str(caught.value), *words)
    assert not (tmp_path / "r").exists()
    assert refused(call("01", tmp_path / "r", *given), *words) is None
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("resolution", ["1", "33", "36", "60"])
def test_a_size_that_the_model_cannot_halve_is_refused_at_the_start(tmp_path, resolution):
    own = ["--pairs", "none.csv", "--prompts", "none.txt", "--eval-prompts", "none.txt"]
    message = call("01", tmp_path / "r", *own, "--resolution", resolution)
    refused(message, f"--resolution {resolution}", "8")
    assert not (tmp_path / "r/seed").exists()


@pytest.mark.parametrize("batch, most, processes, micro_batch", [
    (24, 24, 1, 24), (24, 24, 2, 12), (12, 24, 1, 12), (24, 5, 1, 4), (128, 8, 8, 8),
    (12, 12, 12, 1), (30, 4, 2, 3)])
def test_micro_batches_divide_among_processes(batch, most, processes, micro_batch):
    assert micro_batch_of(Settings(batch=batch, micro_batch=most), processes) == micro_batch


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SAIL_LAUNCH", "accelerate launch --num_processes 7")
    with pytest.raises(UserError) as caught:
        drive(tmp_path / "r")
    refused(str(caught.value), "--batch 24", "7 processes", "multiple of 7")
    drive(tmp_path / "r", "--batch", "21")


@pytest.mark.parametrize("launch, given", [
    ("accelerate launch --multi_gpu", "launch --num_machines 1 --mixed_precision no "
                                      "--dynamo_backend no --multi_gpu"),
    ("accelerate launch --config_file x", "launch --config_file x"),
])
def test_accelerate_is_told_what_it_would_warn_of(tmp_path, launch, given):
    """A program of that name stands in for it, and says what it was given."""
    fake = tmp_path / "bin/accelerate"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho given: $@\nexit 3\n")
    fake.chmod(0o755)
    env = ENV | {"SAIL_LAUNCH": launch, "HF_HOME": str(tmp_path / "hub"),
                 "PATH": f"{fake.parent}:{ENV['PATH']}"}
    done = subprocess.run([ROOT / "run_sail.sh", "tiny", "--run", tmp_path / "r"], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 3
    assert f"given: {given} {ROOT}/01_seed.py" in done.stdout


# ---- config.json damaged ----

def with_settings(**changes) -> str:
    return json.dumps({"settings": PRESETS["tiny"] | changes})


DAMAGED = {
    "is no JSON": ["", '{"settings": {"pre', "\x00\xff\xfe", "[" * 100_000],
    "has no settings": ["[1]", "{}", '{"settings": 3}', "null"],
    "names no preset": ['{"settings": {"beta": 3.0}}'],
    "beta = 'x'": [with_settings(beta="x")],
    "draws = 2.5": [with_settings(draws=2.5)],
    "iters = True": [with_settings(iters=True)],
    "sampler = 'none'": [with_settings(sampler="none")],
    "preset = 'sd99'": [with_settings(preset="sd99")],
}


@pytest.mark.parametrize("words, text", [(w, text) for w, texts in DAMAGED.items()
                                         for text in texts])
def test_a_damaged_config_is_named_and_its_remedy_works(tmp_path, words, text):
    run = tmp_path / "r"
    begin = ["--preset", "tiny", "--beta", "5000"]
    made(start(run, *begin))
    (run / "config.json").write_text(text, encoding="latin-1")
    refused(refusal(run, *begin), "config.json", words, "remove it")

    # As the message says: removed, and the whole command given again.
    (run / "config.json").unlink()
    assert start(run, *begin).beta == 5000
    assert (run / "prompts.parquet").exists()


def test_a_folder_in_the_place_of_config_is_refused(tmp_path):
    (tmp_path / "r/config.json").mkdir(parents=True)
    refused(refusal(tmp_path / "r", "--preset", "tiny"), "config.json", "is a folder", "remove it")


def test_a_damaged_config_of_a_run_without_work_is_written_anew(stopped, capsys):
    (stopped / "config.json").write_text("")
    assert start(stopped, "--preset", "sd15").resolution == 512
    assert saved(stopped)["settings"]["resolution"] == 512
    assert "written anew" in capsys.readouterr().err
    assert not (stopped / "embeds").exists()


def test_a_number_out_of_bounds_in_a_config_is_blamed_on_the_file(tmp_path):
    made(start(tmp_path / "r"))
    (tmp_path / "r/config.json").write_text(with_settings(beta=float("nan")))
    refused(refusal(tmp_path / "r"), "config.json", "--beta nan")


def test_settings_that_a_config_lacks_are_those_of_its_own_preset(tmp_path):
    made(start(tmp_path / "r", "--preset", "sd15"))
    config = saved(tmp_path / "r")
    for name in ("sampler", "resolution", "lr"):
        del config["settings"][name]
    (tmp_path / "r/config.json").write_text(json.dumps(config))
    s = start(tmp_path / "r")
    assert (s.sampler, s.resolution, s.lr) == ("ddpm", 512, 1.28e-6)


# ---- a second start, after a refused or stopped first one ----

LEFT_BEHIND = ("ledger.parquet", "log.txt", "code/01_seed.py", ".lock", "error.txt",
               "seed/images/00000_a.png", "embeds/x.safetensors", "benchmarks.parquet")


@pytest.fixture
def stopped(tmp_path) -> Path:
    """A run whose stage 01 was stopped."""
    run = tmp_path / "r"
    start(run, "--preset", "tiny", "--beta", "5000")
    for name in LEFT_BEHIND:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    return run


def test_a_run_that_has_made_nothing_may_be_corrected(stopped):
    assert start(stopped, "--lr", "1e-5").lr == 1e-5
    assert saved(stopped)["settings"]["lr"] == 1e-5
    assert all((stopped / name).exists() for name in LEFT_BEHIND)


@pytest.mark.parametrize("correction", ["--model other/model", "--preset sd15", "--seed 1"])
def test_what_stage_01_made_of_other_settings_goes(stopped, correction, capsys):
    start(stopped, *correction.split())
    assert "seed, embeds, benchmarks.parquet of other settings go" in capsys.readouterr().err
    left = {path.name for path in stopped.iterdir()}
    assert left == {"config.json", "ledger.parquet", "log.txt", "code", ".lock", "error.txt"}


def test_nothing_is_removed_through_a_link(stopped, tmp_path):
    shutil.move(stopped / "seed", tmp_path / "elsewhere")
    (stopped / "seed").symlink_to(tmp_path / "elsewhere")
    start(stopped, "--seed", "1")
    assert not (stopped / "seed").is_symlink()
    assert (tmp_path / "elsewhere/images/00000_a.png").exists()


def test_the_whole_command_given_again_leaves_nothing_of_the_refused_one(stopped):
    assert start(stopped, "--preset", "tiny").beta == 2000
    assert start(stopped, "--preset", "sd15").resolution == 512


def test_a_stage_keeps_the_settings_of_a_run_that_has_made_nothing_yet(stopped):
    assert start(stopped).beta == 5000
    assert start(stopped, "--lr", "1e-5").beta == 5000


def test_of_several_processes_the_first_writes(stopped, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert start(stopped, "--seed", "1").seed == 1
    assert saved(stopped)["settings"]["seed"] == 0
    assert (stopped / "seed").exists()


def own(folder: Path, run: Path, *more: str) -> list[str]:
    """The arguments of a run of preset tiny on somebody's own pairs."""
    return ["--preset", "tiny", "--run", str(run), "--pairs", str(folder / "pairs.csv"),
            "--prompts", str(folder / "prompts.txt"), "--eval-prompts", str(folder / "eval.txt"),
            *more]


def test_fitted_numbers_follow_the_file_while_nothing_was_made(tmp_path, capsys):
    run = tmp_path / "r"
    first, second = make_pairs(tmp_path / "first", 6), make_pairs(tmp_path / "second", 10)
    (first / "0w.png").write_bytes(b"")
    refused(call("01", run, *own(first, run)[4:], "--preset", "tiny"), "row 1", "cannot read")
    capsys.readouterr()

    # The driver, then stage 01, as the user goes on with the corrected file.
    settings.main(own(second, run))
    assert call("01", run) is None
    assert "--seed-pairs 8 --holdout-pairs 2" in capsys.readouterr().out
    assert saved(run)["fitted"][:2] == ["seed_pairs", "holdout_pairs"]
    assert len(pd.read_parquet(run / "seed/pairs.parquet")) == 8

    # From now on they hold.
    assert start(run).seed_pairs == 8


def test_own_pairs_without_rounds_need_no_prompts(tmp_path):
    files, run = make_pairs(tmp_path / "own", 6), tmp_path / "r"
    given = own(files, run, "--iters", "0")
    at = given.index("--prompts")
    settings.main([*given[:at], *given[at + 2:]])
    assert call("01", run) is None
    assert set(pd.read_parquet(run / "prompts.parquet").split) == {"eval"}


def test_own_pairs_are_not_scored_by_the_embedded_world(tmp_path, capsys):
    s = start(tmp_path / "r", *own(Path("mine"), tmp_path / "r")[4:])
    assert s.scores == "none"
    assert "--scores none" in capsys.readouterr().err
    again = start(tmp_path / "r", "--scores", "pickscore")
    assert again.scores == "pickscore"


# ---- few pairs ----

def passes(pairs: int, prompts: int, preset: str = "sd15", **changes) -> dict:
    """What becomes of a preset's steps with so many human pairs, and prompts a round."""
    s = Settings(**PRESETS[preset] | changes)
    small = Settings(**PRESETS[preset] | changes | {
        "seed_pairs": pairs, "iter_prompts": str(prompts)})
    return few.steps_of_passes(s, small)


@pytest.mark.parametrize("pairs, prompts, changes, steps", [
    # 19 passes over 80 pairs are 1,520 places; 6 over them in a mix of three quarters 640.
    (80, 100, {}, {"iter0_steps": 11, "iter_steps": 5}),
    # 6 passes over 10 self-made pairs, a quarter of the mix, are 240 places.
    (80, 10, {}, {"iter0_steps": 11, "iter_steps": 1}),
    (80, 10, {"alpha": 1.}, {"iter0_steps": 11, "iter_steps": 1}),
    (80, 10, {"alpha": 0.}, {"iter0_steps": 11, "iter_steps": 3}),
    # As many steps as the preset tiny has, where the passes allow them.
    (4000, 2000, {}, {"iter0_steps": 100, "iter_steps": 100}),
    (12_800, 3200, {}, {}),
    # One pass over 10,000 self-made pairs would be 30 over 1,000 human ones.
    (1000, 10_000, {}, {"iter0_steps": 100, "iter_steps": 62}),
    (10, 100, {"batch": 8}, {"iter0_steps": 23, "iter_steps": 10}),
    (3, 100, {}, {"iter0_steps": 1, "iter_steps": 1}),
    (80, 100, {"iters": 0}, {"iter0_steps": 11}),
    (80, 100, {"iter0_steps": 9, "iter_steps": 9}, {}),
    # The preset tiny has numbers of steps of its own: 16 pairs are an eighth of its 128.
    (128, 48, {"preset": "tiny"}, {}),
    (16, 6, {"preset": "tiny"}, {"iter0_steps": 12, "iter_steps": 5}),
    (16, 48, {"preset": "tiny"}, {"iter0_steps": 12, "iter_steps": 5}),
])
def test_passes_over_few_pairs_are_bounded(pairs, prompts, changes, steps):
    assert passes(pairs, prompts, **changes) == steps


def test_a_round_has_no_more_prompts_than_its_few_pairs_train_on(tmp_path):
    """10 human pairs, 6 times, are three quarters of 80 places: 20 of them are self-made."""
    files = make_pairs(tmp_path / "own", 12)
    (files / "prompts.txt").write_text("".join(f"a new thing {i}\n" for i in range(99)))
    s = Settings(**PRESETS["sd15"] | {"pairs": str(files / "pairs.csv"),
                                      "prompts": str(files / "prompts.txt")})
    changes = few.fit_to_few_pairs(s, [])
    assert changes == {"seed_pairs": 10, "holdout_pairs": 2, "iter_prompts": "20",
                       "iter0_steps": 1, "iter_steps": 1, "warmup": 0}
    assert "10 human pairs: 13 in Iter0, 10 in a round" in few.as_flags(s, changes)


def test_pairs_of_which_none_can_be_held_out_are_refused_and_the_remedy_works(tmp_path):
    files, run = make_pairs(tmp_path / "own", 3), tmp_path / "r"
    message = call("01", run, *own(files, run)[4:], "--preset", "tiny")
    refused(message, "pairs.csv", "3 pairs", "--seed-pairs 3 --holdout-pairs 0")
    remedy = "--seed-pairs 3 --holdout-pairs 0".split()
    assert call("01", run, *own(files, run)[4:], "--preset", "tiny", *remedy) is None
    assert len(pd.read_parquet(run / "seed/pairs.parquet")) == 3


# ---- runs of earlier versions ----

def old_run(folder: Path, **changes) -> Path:
    """A run as it was before the base model had moved and two settings had gone."""
    old = PRESETS["tiny"] | {"model": "lib/tiny", "timesteps": "uniform", "min_margin": 0.}
    old.pop("track")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": old | changes}))
    (folder / "iter0").mkdir()
    return folder


def test_an_earlier_run_opens_with_the_model_where_it_lies_now(tmp_path):
    s = start(old_run(tmp_path / "r", draws=7))
    assert s == Settings(run=str(tmp_path / "r"), draws=7)
    assert (ROOT / s.model / "model_index.json").exists()


def test_an_earlier_run_is_left_as_it_is(tmp_path):
    run = old_run(tmp_path / "r")
    before = (run / "config.json").read_bytes()
    start(run, "--model", "lib/world/base")
    assert (run / "config.json").read_bytes() == before


def test_an_earlier_run_keeps_its_settings_too(tmp_path):
    run = old_run(tmp_path / "r")
    refused(refusal(run, "--draws", "5"), "draws = 10", "5")


@pytest.mark.parametrize("name, value", [("timesteps", "stratified"), ("min_margin", 2.)])
def test_an_earlier_run_that_used_a_setting_that_is_gone_is_refused(tmp_path, name, value):
    run = old_run(tmp_path / "r", **{name: value})
    refused(refusal(run), "config.json", f"{name} = {value}", "is no more", "commit", "--run")


# ---- --help ----

@pytest.fixture(scope="module")
def help_of_settings() -> dict[str, str]:
    """What the driver's --help says of each setting."""
    done = subprocess.run([ROOT / "run_sail.sh", "--help"], env=ENV | {"COLUMNS": "9999"},
                          capture_output=True, text=True)
    texts = {}
    for line in done.stdout.splitlines():
        if line.startswith("  --"):
            name = line.split()[0].removeprefix("--").replace("-", "_")
            texts[name] = line
        elif line.startswith("   ") and texts:
            texts[name] += line
    return texts


@pytest.mark.parametrize("name", FIELDS)
def test_help_says_what_a_setting_means(help_of_settings, name):
    assert FIELDS[name].metadata["help"] in help_of_settings[name]


@pytest.mark.parametrize("name", FIELDS)
def test_help_gives_the_values_of_all_presets(help_of_settings, name):
    values = {preset: PRESETS[preset][name] for preset in PRESETS}
    if len(set(values.values())) == 1:
        assert f"all presets: {values['tiny']}" in help_of_settings[name]
        return
    for preset, value in values.items():
        assert f"{preset}: {value}" in help_of_settings[name]


@pytest.mark.parametrize("name, paper", [("beta", "5000"), ("alpha", "0.25"), ("draws", "10")])
def test_help_gives_the_papers_value(help_of_settings, name, paper):
    assert f"paper: {paper})" in help_of_settings[name]

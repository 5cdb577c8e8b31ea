"""Settings: the presets, what a run keeps, what is refused, runs of earlier versions, --help."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ENV, ROOT, refused

from lib import settings
from lib.run import UserError
from lib.settings import FIELDS, PRESETS, Settings, amend, check, round_prompts


def start(run: Path, *given: str) -> Settings:
    """The settings of a run, which begins here if it has no config.json."""
    return settings.load(["--run", str(run), *given], "", create=True)[0]


def refusal(run: Path, *given: str) -> str:
    with pytest.raises(UserError) as caught:
        start(run, *given)
    return str(caught.value)


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
    start(tmp_path / "r")
    (tmp_path / "r/seed").mkdir()
    refused(refusal(tmp_path / "r", "--beta", "5000"), "beta = 2000.0", "5000", "--run")
    assert saved(tmp_path / "r")["settings"]["beta"] == 2000


@pytest.mark.parametrize("name", ["ledger.parquet", "log.txt", "code"])
def test_a_run_that_has_made_nothing_may_be_corrected(tmp_path, name):
    start(tmp_path / "r")
    (tmp_path / "r" / name).touch()
    assert start(tmp_path / "r", "--beta", "5000").beta == 5000
    assert saved(tmp_path / "r")["settings"]["beta"] == 5000


def test_a_run_never_changes_its_preset(tmp_path):
    start(tmp_path / "r")
    refused(refusal(tmp_path / "r", "--preset", "sd15"), "preset = tiny", "sd15", "--run")


def test_how_to_compute_may_change_and_what_may_not(tmp_path):
    start(tmp_path / "r")
    (tmp_path / "r/seed").mkdir()
    assert start(tmp_path / "r", "--micro-batch", "6").micro_batch == 6
    assert saved(tmp_path / "r")["settings"]["micro_batch"] == 24


def test_amended_settings_are_kept_beside_what_the_run_was_made_with(tmp_path):
    s = start(tmp_path / "r")
    before = saved(tmp_path / "r")
    assert amend(s, {"seed_pairs": 3}).seed_pairs == 3
    assert saved(tmp_path / "r") == before | {"settings": before["settings"] | {"seed_pairs": 3}}


def test_amended_settings_are_checked(tmp_path):
    s = start(tmp_path / "r")
    with pytest.raises(UserError, match="--seed-pairs 0"):
        amend(s, {"seed_pairs": 0})


def test_the_driver_is_told_rounds_alpha_and_folder(tmp_path, capsys):
    settings.main(["--run", str(tmp_path / "r"), "--iters", "5", "--alpha", "0"])
    assert capsys.readouterr().out == f"5 0.0 {tmp_path / 'r'}\n"


# ---- refusals: one line that names the setting, and no folder is made ----

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
    ("--iters -1", ["--iters -1", "negative"]),
    ("--warmup -1", ["--warmup -1", "negative"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--batch 12 --micro-batch 5", ["--micro-batch 5", "--batch 12"]),
    ("--rank-t-min 500 --rank-t-max 500", ["--rank-t-min 500", "min < max"]),
    ("--rank-t-max 1001", ["--rank-t-max 1001", "1000"]),
    ("--iter-prompts few", ["--iter-prompts few", "commas"]),
    ("--iter-prompts 5,0", ["--iter-prompts 5,0"]),
    ("--pairs mine.csv", ["--pairs mine.csv", "all three"]),
    ("--reward taste", ["--reward", "'taste'", "implicit", "pickscore"]),
    ("--pairs a --prompts b --eval-prompts c --reward world", ["--reward world", "embedded world"]),
    ("--timesteps uniform", ["--timesteps"]),
    ("--min-margin 0", ["--min-margin"]),
])
def test_a_bad_setting_is_refused(tmp_path, given, words):
    refused(refusal(tmp_path / "r", *given.split()), *words)
    assert not (tmp_path / "r").exists()


# ---- runs of earlier versions ----

def old_run(folder: Path, **changes) -> Path:
    """A run as it was before the base model had moved and two settings had gone."""
    old = PRESETS["tiny"] | {"model": "lib/tiny", "timesteps": "uniform", "min_margin": 0.}
    old.pop("track")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"settings": old | changes}))
    (folder / "seed").mkdir()
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

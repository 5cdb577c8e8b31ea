"""A miniature run through the real driver: contracts, resume, errors in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENV, MINI, ROOT, UNET_FILE, call, refused
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from lib.run import latent_path


def command(run: Path, *more: str) -> list[str]:
    return [str(ROOT / "run_sail.sh"), "tiny", "--run", str(run), *MINI, *more]


def driver(run: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(run, *more), env=ENV, cwd="/", capture_output=True, text=True)


def edit(path: Path, change) -> None:
    """Write a table anew as `change` returns it."""
    change(pd.read_parquet(path)).to_parquet(path, index=False)


# ---- contracts ----

PAIRS = "pair_id prompt win lose source"
CANDIDATES = "prompt_id prompt candidate seed image"
DRAWS = "draw t error anchor_error reward"
LOG = "step loss win_error_gain lose_error_gain margin accuracy lr grad_norm seconds"
TABLES = {
    "seed/pairs.parquet": PAIRS,
    "seed/holdout.parquet": PAIRS,
    "prompts.parquet": "prompt_id prompt split",
    "benchmarks.parquet": "benchmark style prompt_id",
    "ledger.parquet": "stage iter seconds images unet_forwards optimizer_steps peak_memory_bytes "
                      "peak_host_bytes device code",
    "eval/scores.parquet": "model benchmark style prompt_id prompt seed image alignment aesthetics "
                           "utility",
    "iter0/train_log.parquet": LOG,
}
for k in (1, 2):
    TABLES[f"iter{k}/candidates.parquet"] = CANDIDATES
    TABLES[f"iter{k}/draws.parquet"] = f"prompt_id candidate {DRAWS}"
    TABLES[f"iter{k}/holdout_draws.parquet"] = f"pair_id side {DRAWS}"
    TABLES[f"iter{k}/rewards.parquet"] = f"{CANDIDATES} reward reward_se"
    TABLES[f"iter{k}/pairs.parquet"] = f"{PAIRS} margin prompt_id"
    TABLES[f"iter{k}/train_log.parquet"] = LOG


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_every_table(mini, name):
    columns = list(pd.read_parquet(mini / name).columns)
    wanted = TABLES[name].split()
    if name == "eval/scores.parquet":
        columns = columns[:len(wanted)]                     # a world has scores of its own besides
    assert columns == wanted


ROWS = {
    "seed/pairs.parquet": 8,
    "seed/holdout.parquet": 6,
    "prompts.parquet": 3 + 3 + 8,
    "benchmarks.parquet": 8,
    "iter1/candidates.parquet": 3 * 4,
    "iter1/draws.parquet": 3 * 4 * 3,
    "iter1/holdout_draws.parquet": 6 * 2 * 3,
    "iter1/rewards.parquet": 3 * 4,
    "iter1/pairs.parquet": 3,
    "iter0/train_log.parquet": 4,
    "iter1/train_log.parquet": 4,
    "eval/scores.parquet": 4 * 8 * 2,
    "ledger.parquet": 9,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_table(mini, name):
    assert len(pd.read_parquet(mini / name)) == ROWS[name]


def test_the_table_compares_the_base_and_every_round(mini):
    scores = pd.read_parquet(mini / "eval/scores.parquet")
    assert list(scores.model.unique()) == ["base", "Iter0", "Iter1", "Iter2"]


def test_the_judge_of_a_round_is_kept(mini):
    facts = {"accuracy", "low", "high", "pairs", "diversity", "draws", "anchor"}
    for k in (1, 2):
        assert facts <= set(json.loads((mini / f"iter{k}/judge.json").read_text()))


def test_config_has_settings_versions_commit_and_hardware(mini):
    config = json.loads((mini / "config.json").read_text())
    assert set(config) == {"settings", "versions", "commit", "hardware"}


def test_people_of_the_world_say_how_far_they_agree(mini):
    agreement = json.loads((mini / "seed/people.json").read_text())
    assert set(agreement) == {"labels_against_their_own_utility", "agree_with_themselves",
                              "agree_with_a_perfect_judge"}
    for share in agreement.values():
        assert 0 <= share <= 1


@pytest.mark.parametrize("name", [
    "eval/table.md", "eval/table.csv", "eval/curves.png", "eval/samples.png", "eval/index.html",
    "seed/preview.png", "iter1/preview.png", "iter2/preview.png"])
def test_what_is_to_be_looked_at_is_there(mini, name):
    assert (mini / name).stat().st_size > 100


def test_a_run_keeps_the_stages_that_made_it(mini):
    kept = {path.name: path.read_bytes() for path in (mini / "code").iterdir()}
    assert kept == {path.name: path.read_bytes() for path in ROOT.glob("0*.py")}
    assert len(kept) == 5


def test_a_table_says_whose_stages_differ(mini_copy, tmp_path):
    """A row that another run has made with an edited stage 04, and one with the same stages."""
    for name in ("edit", "same"):
        shutil.copytree(mini_copy, tmp_path / name)
    with (tmp_path / "edit/code/04_train_dpo.py").open("a") as script:
        script.write("# another loss\n")

    rows = [f"{name}={tmp_path / name}/iter1/unet" for name in ("edit", "same")]
    assert call("05", mini_copy, "--only", "base", "--row", rows[0], "--row", rows[1]) is None
    told = (mini_copy / "eval/table.md").read_text()
    assert "row edit: made by other stages than this run's: 04_train_dpo.py" in told
    assert "row same: made by other stages" not in told


def test_nothing_half_written_is_left(mini):
    assert not list(mini.rglob("*.tmp"))
    assert not list(mini.rglob("checkpoint*"))


@pytest.mark.parametrize("table, columns", [
    ("seed/pairs.parquet", ["win", "lose"]),
    ("seed/holdout.parquet", ["win", "lose"]),
    ("iter1/candidates.parquet", ["image"]),
    ("iter1/pairs.parquet", ["win", "lose"]),
    ("eval/scores.parquet", ["image"]),
])
def test_every_picture_that_a_table_names_is_in_the_run(mini, table, columns):
    for image in pd.read_parquet(mini / table)[columns].to_numpy().flatten():
        assert Image.open(mini / image).size == (32, 32)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_plain_diffusers_loads_the_model_of_a_round(mini, k):
    unet = UNet2DConditionModel.from_pretrained(mini / f"iter{k}/unet")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}


def test_no_prompt_stands_in_two_places(mini):
    prompts = pd.read_parquet(mini / "prompts.parquet")
    pairs = pd.read_parquet(mini / "seed/pairs.parquet")
    holdout = pd.read_parquet(mini / "seed/holdout.parquet")
    everything = [*prompts.prompt, *set(pairs.prompt), *set(holdout.prompt)]
    assert len(everything) == len(set(everything))
    assert set(prompts.split) == {"iter1", "iter2", "eval"}


# ---- a run that goes on ----

def test_a_finished_run_does_nothing_again(mini_copy):
    made = {}
    for path in [*mini_copy.rglob("images/**/*.png"), *mini_copy.rglob("*.safetensors")]:
        made[path] = path.stat().st_mtime_ns
    done = driver(mini_copy)
    assert done.returncode == 0
    assert "05 eval" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in made} == made
    ledger = pd.read_parquet(mini_copy / "ledger.parquet")
    assert list(ledger.stage[9:]) == ["05_eval"]


# ---- the driver ----

@pytest.fixture
def driven(tmp_path):
    """drive(draws): the stages that the driver asks for in tmp_path/run, which has its Iter0.

    A stand-in for python prints what it is asked; SAIL_LAUNCH stands before every stage. The run
    folder may have another name.
    """
    run, python = tmp_path / "run", tmp_path / "python"
    (run / "iter0/unet").mkdir(parents=True)
    (run / "iter0/unet/config.json").write_text("{}")
    save_file({"weight": torch.zeros(1)}, run / "iter0/unet" / UNET_FILE)
    python.write_text('#!/bin/sh\n'
                      'case "$1 $2" in\n'
                      '"-m lib.settings") printf "2\\n%s\\n%s/\\n" "$DRAWS" "$RUN";;\n'
                      '"-m lib.again") ;;\n'
                      f'"-m "*) exec "{sys.executable}" "$@";;\n'
                      '*) echo "$@";;\n'
                      'esac\n')
    python.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"SAIL_ACTIVE": "1", "PATH": path, "RUN": str(run),
                        "SAIL_LAUNCH": "python launch -n 2"}

    def drive(draws: str, folder: str = str(run)) -> list[str]:
        done = subprocess.run([ROOT / "run_sail.sh", "tiny"], cwd=tmp_path, capture_output=True,
                              env=env | {"DRAWS": draws, "RUN": folder}, text=True)
        first, *lines = done.stdout.splitlines()
        assert first == f"run folder: {folder}"
        return lines

    return drive


def launched(run: Path, *stages: str) -> list[str]:
    """What the stand-in prints for stages such as "02 --iter 1"."""
    lines = []
    for stage in stages:
        number, *arguments = stage.split()
        script = next(ROOT.glob(f"{number}_*.py"), ROOT / f"lib/{number}.py")
        lines.append(" ".join(["launch -n 2", str(script), *arguments, f"--run={run}"]))
    return lines


def test_the_driver_launches_every_stage_that_is_not_done(driven, tmp_path):
    assert driven("1") == launched(
        tmp_path / "run", "01", "02 --iter 1", "crossfit", "03 --iter 1", "04 --iter 1",
        "02 --iter 2", "03 --iter 2", "04 --iter 2", "05")


def test_human_pairs_alone_need_no_candidates(driven, tmp_path):
    assert driven("0") == launched(tmp_path / "run", "01", "04 --iter 1", "04 --iter 2", "05")


@pytest.mark.parametrize("folder", ["-delete", " a  b ", "--run", "*", "."])
def test_no_name_of_a_run_folder_is_an_option(driven, tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    bystanders = [tmp_path / ".0001.png.4711.tmp", tmp_path / "mine/.1.png.4711.sail.tmp"]
    for path in bystanders:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert driven("0", folder) == launched(folder, "01", "04 --iter 0", "04 --iter 1",
                                             "04 --iter 2", "05")
    assert all(path.exists() for path in bystanders)


# What a killed stage may leave, and what others may have put beside it.
LEFT = {
    "iter0/.0001.png.4711.sail.tmp": False,
    "iter1/images/.a b.png.7.sail.tmp": False,
    ".config.json.1.sail.tmp": False,
    "iter1/.pairs.parquet.1.tmp": True,
    "iter1/pairs.parquet.1.sail.tmp": True,
    "mine/.0001.png.4711.sail.tmp": True,
    "elsewhere/.0001.png.4711.sail.tmp": True,
}


def test_the_driver_sweeps_up_what_a_kill_left_half_written(driven, tmp_path):
    run = tmp_path / "run"
    for name in LEFT:
        (run / name).parent.mkdir(exist_ok=True, parents=True)
        (run / name).touch()
    (run / "elsewhere").rename(tmp_path / "elsewhere")
    (run / "iter2").symlink_to(tmp_path / "elsewhere")
    (run / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(run)

    driven("1", str(tmp_path / "linked"))
    assert {name: (run / name).exists() for name in LEFT} == LEFT


RESULTS = ["seed/holdout.parquet", "benchmarks.parquet", "prompts.parquet",
           "iter1/candidates.parquet", "iter2/pairs.parquet",
           "iter1/unet/diffusion_pytorch_model.safetensors", "iter0/unet/config.json"]


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(1000)])
def test_a_damaged_result_is_made_again(mini_copy, capsys, content):
    from lib.lock import tidy
    tidy(mini_copy)
    assert capsys.readouterr().err == ""
    for name in RESULTS:
        (mini_copy / name).write_bytes(content)
    tidy(mini_copy)
    assert capsys.readouterr().err.count("damaged, it is made again\n") == len(RESULTS)
    for name in RESULTS:
        assert not (mini_copy / name).exists()
    assert (mini_copy / "iter2/unet").exists()


def test_a_refusal_is_one_line_and_exit_code_2(mini):
    done = driver(mini, "--beta", "5000")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    refused(done.stderr.strip(), "error: ", "beta = 2000.0", "5000", "--run")


def test_a_stage_that_fails_stops_the_driver(mini_copy):
    shutil.rmtree(mini_copy / "iter2/unet")
    edit(mini_copy / "iter2/pairs.parquet", lambda t: t.drop(columns="win"))
    done = driver(mini_copy)
    assert done.returncode == 2
    refused(done.stderr.strip(), "error: ", "iter2/pairs.parquet", "'win' is missing")
    assert "05 eval" not in done.stdout


# ---- the same result in other batches ----

def test_a_picture_does_not_depend_on_its_batch(mini, mini_copy):
    """The same candidates and the same rewards, up to rounding."""
    for name in ("images", "latents"):
        shutil.rmtree(mini_copy / "iter1" / name)
    for name in ("candidates", "pairs"):
        (mini_copy / f"iter1/{name}.parquet").unlink()
    assert call("02", mini_copy, "--iter", "1", "--sample-batch", "5") is None
    assert call("03", mini_copy, "--iter", "1", "--rank-batch", "1") is None

    for path in (mini / "iter1/latents").iterdir():
        latent = load_file(path)["mean"]
        again = load_file(mini_copy / "iter1/latents" / path.name)["mean"]
        assert torch.allclose(again, latent, atol=1e-3), path.name
    reward = pd.read_parquet(mini / "iter1/rewards.parquet").reward
    again = pd.read_parquet(mini_copy / "iter1/rewards.parquet").reward
    np.testing.assert_allclose(again, reward, rtol=.02, atol=.05 * reward.std())


def test_a_missing_latent_is_made_once(mini_copy):
    shutil.rmtree(mini_copy / "iter0/unet")
    latents = {path: path.read_bytes() for path in (mini_copy / "seed/latents").iterdir()}
    lost = latent_path(mini_copy / pd.read_parquet(mini_copy / "seed/pairs.parquet").win[0])
    lost.unlink()
    assert call("04", mini_copy, "--iter", "0") is None

    made = load_file(lost)
    assert set(made) == {"mean", "std"}
    assert made["mean"].shape == (12, 8, 8)
    for path, content in latents.items():
        if path != lost:
            assert path.read_bytes() == content


# ---- settings without a finding of their own still run to the end ----

@pytest.mark.parametrize("settings", [
    "--alpha 1 --select random --holdout-pairs 0 --draws 1 --candidates 2",
    "--alpha 0 --sampler ddpm --cfg-scale 1 --prompt-dropout 0.5 --optimizer adafactor"])
def test_ablations_run_to_the_end(tmp_path, settings):
    run = tmp_path / "r"
    smaller = ("--iters 1 --seed-pairs 4 --holdout-pairs 2 --iter-prompts 2 --candidates 3 "
               "--draws 2 --sample-steps 2 --iter0-steps 2 --iter-steps 2")
    assert call("01", run, *MINI, *smaller.split(), *settings.split()) is None
    for number, k in (("04", 0), ("02", 1), ("03", 1), ("04", 1)):
        assert call(number, run, "--iter", str(k)) is None
    log = pd.read_parquet(run / "iter1/train_log.parquet")
    assert len(log) == 2
    assert np.isfinite(log.loss).all()


# ---- every error: one line, before anything is spent ----

@pytest.mark.parametrize("given, words", [
    ("--alpha 1.5", ["--alpha 1.5", "0..1"]),
    ("--iter-prompts 5000", ["--iter-prompts 5000", "embedded world"]),
    ("--model runs/nowhere", ["runs/nowhere", "does not exist"]),
    ("--pairs mine.csv", ["mine.csv", "no such file", "--pairs"]),
])
def test_a_bad_setting_is_refused_before_anything_is_spent(tmp_path, given, words):
    refused(call("01", tmp_path / "r", *given.split()), *words)
    assert not (tmp_path / "r/seed").exists()


def test_a_run_that_has_made_nothing_may_be_corrected(tmp_path):
    run = tmp_path / "r"
    refused(call("01", run, "--iter-prompts", "5000"), "--iter-prompts 5000")
    smaller = "--iter-prompts 2 --seed-pairs 2 --holdout-pairs 0"
    assert call("01", run, *MINI, *smaller.split()) is None
    refused(call("01", run, "--seed-pairs", "4"), "seed_pairs = 2")


def test_a_stage_without_a_run(tmp_path):
    refused(call("03", tmp_path / "none", "--iter", "1"), "config.json", "01_seed.py")


def test_a_stage_without_its_model(mini_copy):
    shutil.rmtree(mini_copy / "iter0/unet")
    shutil.rmtree(mini_copy / "iter1/images")
    (mini_copy / "iter1/candidates.parquet").unlink()
    refused(call("02", mini_copy, "--iter", "1"), "iter0/unet", "04_train_dpo.py")


def test_a_stage_without_its_table(mini_copy):
    (mini_copy / "iter1/pairs.parquet").unlink()
    (mini_copy / "iter1/candidates.parquet").unlink()
    refused(call("03", mini_copy, "--iter", "1"), "iter1/candidates.parquet", "02_generate.py")


def test_a_round_that_the_run_does_not_have(mini):
    refused(call("02", mini, "--iter", "7"), "iter7", "prompts.parquet")


CANDIDATE_FAULTS = {
    "a column that is missing":
        (lambda t: t.rename(columns={"image": "picture"}), ["'image' is missing"]),
    "a path that leaves the run":
        (lambda t: t.replace({"image": {t.image[2]: "../../outside.png"}}),
         ["row 3", "leaves the run folder"]),
    "a picture without a latent":
        (lambda t: t.replace({"image": {t.image[2]: "iter1/images/other.png"}}),
         ["row 3", "no whole latent", "02_generate.py"]),
    "a prompt with fewer candidates":
        (lambda t: t.drop(index=5), ["same number of candidates", "02_generate.py"]),
    "no rows":
        (lambda t: t.iloc[:0], ["no rows", "02_generate.py"]),
}


@pytest.mark.parametrize("fault", CANDIDATE_FAULTS)
def test_a_bad_table_of_candidates(mini_copy, fault):
    change, words = CANDIDATE_FAULTS[fault]
    (mini_copy / "iter1/pairs.parquet").unlink()
    edit(mini_copy / "iter1/candidates.parquet", change)
    refused(call("03", mini_copy, "--iter", "1"), "iter1/candidates.parquet", *words)


def test_a_table_of_pairs_without_rows(mini_copy):
    shutil.rmtree(mini_copy / "iter2/unet")
    edit(mini_copy / "iter2/pairs.parquet", lambda t: t.iloc[:0])
    refused(call("04", mini_copy, "--iter", "2"), "iter2/pairs.parquet", "no rows")


def test_a_table_of_pairs_that_leaves_the_run(mini_copy):
    shutil.rmtree(mini_copy / "iter2/unet")
    edit(mini_copy / "iter2/pairs.parquet", lambda t: t.assign(lose="/etc/passwd"))
    refused(call("04", mini_copy, "--iter", "2"), "iter2/pairs.parquet, row 1", "leaves the run")


def test_a_table_that_is_no_parquet(mini_copy):
    shutil.rmtree(mini_copy / "iter2/unet")
    (mini_copy / "seed/pairs.parquet").write_bytes(b"not parquet")
    refused(call("04", mini_copy, "--iter", "2"), "seed/pairs.parquet", "not a readable Parquet")
    (mini_copy / "seed/pairs.parquet").unlink()
    (mini_copy / "seed/pairs.parquet").mkdir()
    refused(call("04", mini_copy, "--iter", "2"), "seed/pairs.parquet: is a folder; remove it")


def test_a_prompt_in_two_splits(mini_copy):
    (mini_copy / "iter2/candidates.parquet").unlink()
    edit(mini_copy / "prompts.parquet",
         lambda t: t.assign(prompt=[t.prompt[0], t.prompt[0], *t.prompt[2:]]))
    refused(call("02", mini_copy, "--iter", "2"), "prompts.parquet, row 2",
            "stands in split 'iter1'", "(row 1)")


def test_a_prompt_of_the_human_pairs_in_a_round(mini_copy):
    (mini_copy / "iter2/candidates.parquet").unlink()
    human = pd.read_parquet(mini_copy / "seed/pairs.parquet").prompt[0]
    edit(mini_copy / "prompts.parquet",
         lambda t: t.assign(prompt=[t.prompt[0], human, *t.prompt[2:]]))
    refused(call("02", mini_copy, "--iter", "2"), "prompts.parquet, row 2", "seed")


@pytest.fixture
def without_a_latent(mini_copy) -> tuple[Path, Path]:
    """A run before Iter0 in which the winner of the fourth pair has no latent, and that picture."""
    shutil.rmtree(mini_copy / "iter0/unet")
    image = mini_copy / pd.read_parquet(mini_copy / "seed/pairs.parquet").win[3]
    latent_path(image).unlink()
    return mini_copy, image


def test_a_picture_without_latent_that_cannot_be_read(without_a_latent):
    run, image = without_a_latent
    image.write_bytes(b"no picture")
    refused(call("04", run, "--iter", "0"), "pairs.parquet, row 4", "cannot read the image")


def test_a_picture_without_latent_that_is_not_there(without_a_latent):
    run, image = without_a_latent
    image.unlink()
    refused(call("04", run, "--iter", "0"), "pairs.parquet, row 4", "does not exist")


def test_a_latent_that_is_not_finite_is_blamed_for_it(mini_copy):
    shutil.rmtree(mini_copy / "iter0/unet")
    for path in (mini_copy / "seed/latents").iterdir():
        latent = {name: values * float("nan") for name, values in load_file(path).items()}
        save_file(latent, path)
    message = call("04", mini_copy, "--iter", "0")
    refused(message, "seed/latents", "not finite", "delete it")
    assert "--lr" not in message
    assert not (mini_copy / "iter0/unet").exists()

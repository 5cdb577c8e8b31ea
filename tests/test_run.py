"""A miniature run through the real driver: contracts, resume, determinism, and every error in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, stage
from PIL import Image
from safetensors.torch import load_file, save_file

from lib.run import UserError

MINI = ["--iters", "2", "--seed-pairs", "8", "--holdout-pairs", "6", "--iter-prompts", "3", "--candidates", "4",
        "--draws", "3", "--sample-steps", "3", "--iter0-steps", "4", "--iter-steps", "4", "--batch", "4",
        "--micro-batch", "2", "--checkpoint-every", "1", "--eval-count", "8", "--lr", "1e-4"]
ENV = os.environ | {"SAIL_ACTIVE": "1", "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}",
                    "HF_HUB_OFFLINE": "1"}


def command(run, *more):
    return [ROOT / "run_sail.sh", "tiny", "--run", str(run), *MINI, *more]


def driver(run, *more):
    return subprocess.run(command(run, *more), env=ENV, cwd="/", capture_output=True, text=True)


def call(number, run, *more):
    """A stage's main in this process; its UserError as the one line that run_stage would print."""
    try:
        stage(number).main(["--run", str(run), *more])
    except UserError as error:
        return str(error)


def rest(run, *stages):
    """Stages in the driver's order, without its starts of Python, and the evaluation."""
    for number, k in stages:
        assert call(number, run, "--iter", str(k)) is None
    assert call("05", run) is None


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "mini"
    assert call("01", run, *MINI) is None
    rest(run, ("04", 0), ("02", 1), ("03", 1), ("04", 1), ("02", 2), ("03", 2), ("04", 2))
    return run


@pytest.fixture
def copy(mini, tmp_path):
    """A finished run to break."""
    return shutil.copytree(mini, tmp_path / "mini")


CONTRACT = {
    "seed/pairs.parquet": "pair_id prompt win lose source", "seed/holdout.parquet": "pair_id prompt win lose source",
    "prompts.parquet": "prompt_id prompt split", "benchmarks.parquet": "benchmark style prompt_id",
    "iter1/candidates.parquet": "prompt_id prompt candidate seed image",
    "iter1/rewards.parquet": "prompt_id prompt candidate seed image reward reward_se",
    "iter1/pairs.parquet": "pair_id prompt win lose source margin",
    "iter0/train_log.parquet": "step loss win_error_gain lose_error_gain margin accuracy lr grad_norm seconds",
    "ledger.parquet": "stage iter seconds images unet_forwards optimizer_steps peak_memory_bytes device"}


def test_contract_of_every_file(mini):
    for name, columns in CONTRACT.items():
        assert list(pd.read_parquet(mini / name).columns) == columns.split(), name
    scores = pd.read_parquet(mini / "eval/scores.parquet")
    assert list(scores.columns[:10]) == ("model benchmark style prompt_id prompt seed image alignment aesthetics "
                                         "utility").split()
    assert list(scores.model.unique()) == ["base", "Iter0", "Iter1", "Iter2"] and len(scores) == 4 * 8 * 2
    assert set(json.loads((mini / "iter1/judge.json").read_text())) >= {"accuracy", "low", "high", "pairs", "diversity",
                                                                         "draws", "anchor"}
    assert {"settings", "versions", "commit", "hardware"} == set(json.loads((mini / "config.json").read_text()))
    for name in ("table.md", "table.csv", "curves.png", "samples.png", "index.html"):
        assert (mini / "eval" / name).stat().st_size > 100, name
    assert (mini / "seed/preview.png").exists() and (mini / "iter2/preview.png").exists()
    assert not list(mini.rglob("*.tmp")) and not list(mini.rglob("checkpoint*"))
    images = [i for t in ("seed/pairs", "iter1/pairs") for c in ("win", "lose")
              for i in pd.read_parquet(mini / f"{t}.parquet")[c]]
    for image in images + list(scores.image):
        assert Image.open(mini / image).size == (32, 32)
    from diffusers import UNet2DConditionModel
    UNet2DConditionModel.from_pretrained(mini / "iter2/unet")


def test_prompts_are_disjoint_and_pairs_are_best_and_worst(mini):
    prompts, seed = pd.read_parquet(mini / "prompts.parquet"), pd.read_parquet(mini / "seed/pairs.parquet")
    holdout = pd.read_parquet(mini / "seed/holdout.parquet")
    everything = [*prompts.prompt, *set(seed.prompt), *set(holdout.prompt)]
    assert len(everything) == len(set(everything)) and set(prompts.split) == {"iter1", "iter2", "eval"}
    rewards, pairs = pd.read_parquet(mini / "iter2/rewards.parquet"), pd.read_parquet(mini / "iter2/pairs.parquet")
    best = rewards.loc[rewards.groupby("prompt_id").reward.idxmax()].set_index("prompt")
    worst = rewards.loc[rewards.groupby("prompt_id").reward.idxmin()].set_index("prompt")
    for pair in pairs.itertuples():
        assert (pair.win, pair.lose) == (best.image[pair.prompt], worst.image[pair.prompt]) and pair.source == "self"
        assert pair.margin == pytest.approx(best.reward[pair.prompt] - worst.reward[pair.prompt], rel=1e-4)


def test_rewards_equal_a_plain_loop(mini, rank):
    """Two candidates of round 1, draw by draw, without any of the stage's batching."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/tiny", dtype=torch.float32)
    model = UNet2DConditionModel.from_pretrained(mini / "iter0/unet")
    settings = rank.Settings(**json.loads((mini / "config.json").read_text())["settings"])
    rewards = pd.read_parquet(mini / "iter1/rewards.parquet")
    for row in (0, 7):
        r = rewards.iloc[row]
        tokens = pipe.tokenizer(r.prompt, padding="max_length", return_tensors="pt").input_ids
        x0 = load_file(mini / r.image.replace("images", "latents").replace(".png", ".safetensors"))["mean"]
        times, noises = rank.reward_draws(settings, (1, int(r.prompt_id)), x0.shape)
        total = 0.
        with torch.no_grad():
            embeds = pipe.text_encoder(tokens).last_hidden_state
            for t, noise in zip(times, noises):
                a = float(pipe.scheduler.alphas_cumprod[t])
                x_t = (a ** .5 * x0 + (1 - a) ** .5 * noise)[None]
                e = [float((u(x_t, t, embeds).sample[0].double() - noise.double()).square().mean())
                     for u in (model, pipe.unet)]
                total += -settings.beta / 2 * (e[0] - e[1]) / len(times)
        assert r.reward == pytest.approx(total, rel=1e-3, abs=2e-3)


def test_finished_run_does_nothing_again(mini):
    before = {p: p.stat().st_mtime_ns for p in mini.rglob("*") if p.suffix in (".png", ".safetensors")
              and "eval" not in p.parts and "preview" not in p.name}
    assert driver(mini).returncode == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def same_results(one, two):
    for name in [*CONTRACT, "eval/scores.parquet", "iter2/rewards.parquet", "iter2/train_log.parquet"]:
        if name != "ledger.parquet":
            a, b = (pd.read_parquet(run / name).drop(columns="seconds", errors="ignore") for run in (one, two))
            if name == "eval/scores.parquet":                             # a model's folder bears its files' times
                a.image, b.image = (t.image.str.replace(r"-\w{8}/", "/", regex=True) for t in (a, b))
            pd.testing.assert_frame_equal(a, b, check_exact=True)
    for k in range(3):
        a, b = (load_file(run / f"iter{k}/unet/diffusion_pytorch_model.safetensors") for run in (one, two))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_killed_again_and_again_ends_the_same(mini, tmp_path):
    """kill -9 the whole driver in a stage that samples and in one that trains, let it finish: all tables are equal."""
    run = tmp_path / "mini"
    for moment in (lambda: len(list(run.glob("seed/images/*.png"))) > 3, lambda: (run / "iter0/checkpoint.pt").exists()):
        process = subprocess.Popen(command(run), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        while not moment():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (run / "iter0/unet").exists()
    rest(run, ("04", 0), ("02", 1), ("03", 1), ("04", 1), ("02", 2), ("03", 2), ("04", 2))
    same_results(mini, run)


LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
from accelerate import PartialState
from conftest import stage
from lib.run import run_stage

def main(argv):
    for line in {stages!r}:
        number, *given = line.split()
        stage(number).main(["--run", argv[0], *given])
        PartialState().wait_for_everyone()
    print(f"process {{PartialState().process_index}} of {{PartialState().num_processes}}")

run_stage(main)
"""


def test_two_processes_equal_one(mini, tmp_path):
    """Round 1 as `accelerate launch` runs it, here on the CPU: the same candidates, rewards, pairs, training and scores,
    to the rounding of a sum in another order; and the ledger counts the work of both."""
    run, script = tmp_path / "two", tmp_path / "launched.py"
    first = " ".join(["01", *MINI, "--sample-batch", "5", "--rank-batch", "12", "--micro-batch", "1"])
    stages = [first, "04 --iter 0", "02 --iter 1", "03 --iter 1", "04 --iter 1", "05"]
    script.write_text(LAUNCHED.format(tests=str(ROOT / "tests"), stages=stages))
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                           "--num_machines", "1", "--main_process_port", "0", script, run],
                          env=ENV | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "process 1 of 2" in done.stdout, done.stderr[-3000:]
    read = lambda folder, name: pd.read_parquet(folder / name)
    for name in ("seed/pairs.parquet", "seed/holdout.parquet", "prompts.parquet", "iter1/candidates.parquet"):
        pd.testing.assert_frame_equal(read(mini, name), read(run, name))
    one, two = (read(folder, "iter1/rewards.parquet") for folder in (mini, run))
    np.testing.assert_allclose(one.reward, two.reward, atol=.01 * one.reward.std())
    one, two = (read(folder, "iter1/pairs.parquet") for folder in (mini, run))
    assert one.drop(columns="margin").equals(two.drop(columns="margin"))
    for k in (0, 1):
        one, two = (read(folder, f"iter{k}/train_log.parquet") for folder in (mini, run))
        columns = ["loss", "margin", "grad_norm"]
        np.testing.assert_allclose(one[columns], two[columns], rtol=.01, atol=.01)
        files = (folder / f"{part}/diffusion_pytorch_model.safetensors" for folder, part in (
            (ROOT / "lib/tiny", "unet"), (mini, f"iter{k}/unet"), (run, f"iter{k}/unet")))
        base, one, two = (torch.cat([v.float().flatten() for _, v in sorted(load_file(f).items())]) for f in files)
        assert (one - two).norm() < .01 * (one - base).norm()
    one, two = (read(folder, "eval/scores.parquet") for folder in (mini, run))
    one = one[one.model != "Iter2"].reset_index(drop=True)
    same = ["model", "prompt", "seed"]
    pd.testing.assert_frame_equal(one[same], two[same])
    np.testing.assert_allclose(one.utility, two.utility, atol=.05)
    counts = ["stage", "iter", "images", "unet_forwards", "optimizer_steps"]
    one, two = (read(folder, "ledger.parquet")[counts] for folder in (mini, run))
    done = (one.iter.fillna(0) < 2) & (one.stage != "05_eval")
    pd.testing.assert_frame_equal(one[done].reset_index(drop=True), two[:-1])


def test_the_driver_launches_every_stage_that_is_not_done(tmp_path):
    """SAIL_LAUNCH stands before every stage, the evaluation included. A stand-in for python prints what it is asked."""
    run, python = tmp_path / "run", tmp_path / "python"
    (run / "iter0/unet").mkdir(parents=True)
    python.write_text('#!/bin/sh\nif [ "$1" = -m ]; then echo "2 $ALPHA $RUN"; else echo "$@"; fi\n')
    python.chmod(0o755)
    env = os.environ | {"SAIL_ACTIVE": "1", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "RUN": str(run),
                        "SAIL_LAUNCH": "python launch -n 2"}
    for alpha, rounds in (("0.25", ("02", "03", "04")), ("0.0", ("04",))):
        done = subprocess.run([ROOT / "run_sail.sh", "tiny"], env=env | {"ALPHA": alpha}, capture_output=True, text=True)
        stages = [("01",), *((number, k) for k in "12" for number in rounds), ("05",)]
        expected = [" ".join(["launch -n 2", str(next(ROOT.glob(f"{number}_*.py"))), *(f"--iter {k}" for k in k),
                              f"--run {run}"]) for number, *k in stages]
        assert done.stdout.splitlines()[1:] == expected


def test_a_picture_does_not_depend_on_its_batch(copy):
    """Another batch size draws the same candidates and gives the same rewards, up to rounding."""
    old = {p.name: load_file(p)["mean"] for p in (copy / "iter1/latents").iterdir()}
    rewards = pd.read_parquet(copy / "iter1/rewards.parquet")
    for name in ("images", "latents"):
        shutil.rmtree(copy / "iter1" / name)
    for name in ("candidates", "pairs"):
        (copy / f"iter1/{name}.parquet").unlink()
    assert call("02", copy, "--iter", "1", "--sample-batch", "5") is None
    for name, latent in old.items():
        assert torch.allclose(load_file(copy / "iter1/latents" / name)["mean"], latent, atol=1e-3), name
    assert call("03", copy, "--iter", "1", "--rank-batch", "1") is None
    again = pd.read_parquet(copy / "iter1/rewards.parquet")
    np.testing.assert_allclose(again.reward, rewards.reward, rtol=.02, atol=.05 * rewards.reward.std())


def test_help_lists_every_setting(rank):
    import dataclasses
    text = subprocess.run([ROOT / "run_sail.sh", "--help"], env=ENV, capture_output=True, text=True).stdout
    for field in dataclasses.fields(rank.Settings):
        assert "--" + field.name.replace("_", "-") in text
    assert "paper: 5000" in text and "paper: 0.25" in text


# ---- every error: one line, exit code 2, before anything is spent ----

def refused(message, *words):
    assert message and "\n" not in message, message
    for word in words:
        assert word in message, message


def test_a_refusal_is_one_line_and_exit_code_2(mini):
    done = driver(mini, "--beta", "5000")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    refused(done.stderr.strip(), "error: ", "beta = 2000.0", "5000", "--run")


@pytest.mark.parametrize("arguments, words", [
    (["--alpha", "1.5"], ["--alpha 1.5", "0..1"]), (["--alhpa", "0.5"], ["--alhpa"]), (["--beta", "x"], ["--beta", "'x'"]),
    (["--batch", "12", "--micro-batch", "5"], ["--micro-batch 5"]), (["--iter-prompts", "5000"], ["--iter-prompts 5000"]),
    (["--model", "runs/nowhere"], ["runs/nowhere", "does not exist"]), (["--candidates", "1"], ["--candidates 1"]),
    (["--preset", "sd99"], ["sd99"]),
    (["--iter-prompts", "few"], ["--iter-prompts few"]), (["--pairs", "mine.csv"], ["--pairs mine.csv", "all three"])])
def test_bad_settings(tmp_path, arguments, words):
    refused(call("01", tmp_path / "r", *arguments), *words)
    assert not (tmp_path / "r/seed").exists()                             # nothing was spent


def test_stage_without_its_input(copy, tmp_path):
    refused(call("03", tmp_path / "none", "--iter", "1"), "config.json", "01_seed.py")
    shutil.rmtree(copy / "iter0/unet")
    (copy / "iter1/candidates.parquet").unlink()
    shutil.rmtree(copy / "iter1/images")
    refused(call("02", copy, "--iter", "1"), "iter0/unet", "04_train_dpo.py")
    refused(call("02", copy, "--iter", "7"), "iter7", "prompts.parquet")


def edit(path, change):
    table = pd.read_parquet(path)
    change(table).to_parquet(path, index=False)


def test_bad_tables(copy):
    (copy / "iter1/pairs.parquet").unlink()
    edit(copy / "iter1/candidates.parquet", lambda t: t.rename(columns={"image": "picture"}))
    refused(call("03", copy, "--iter", "1"), "candidates.parquet", "'image' is missing")
    edit(copy / "iter1/candidates.parquet", lambda t: t.rename(columns={"picture": "image"}).replace(
        {"image": {t.picture[2]: "../../outside.png"}}))
    refused(call("03", copy, "--iter", "1"), "row 2", "leaves the run folder")
    shutil.rmtree(copy / "iter2/unet")
    edit(copy / "iter2/pairs.parquet", lambda t: t.iloc[:0])
    refused(call("04", copy, "--iter", "2"), "iter2/pairs.parquet", "no rows")
    (copy / "seed/pairs.parquet").write_bytes(b"not parquet")
    refused(call("04", copy, "--iter", "2"), "seed/pairs.parquet", "not a readable Parquet")


def test_prompt_in_two_splits(copy):
    (copy / "iter2/candidates.parquet").unlink()
    edit(copy / "prompts.parquet", lambda t: t.assign(prompt=[t.prompt[0], t.prompt[0], *t.prompt[2:]]))
    refused(call("02", copy, "--iter", "2"), "prompts.parquet, row 1", "stands in split 'iter1'")
    seed = pd.read_parquet(copy / "seed/pairs.parquet").prompt[0]
    edit(copy / "prompts.parquet", lambda t: t.assign(prompt=[*t.prompt[:1], seed, *t.prompt[2:]]))
    refused(call("02", copy, "--iter", "2"), "prompts.parquet, row 1", "seed")


def test_unreadable_image_without_latent(copy):
    shutil.rmtree(copy / "iter0/unet")
    image = pd.read_parquet(copy / "seed/pairs.parquet").win[3]
    (copy / image).write_bytes(b"no picture")
    (copy / image.replace("images", "latents").replace(".png", ".safetensors")).unlink()
    refused(call("04", copy, "--iter", "0"), "row 3", "cannot read the image")
    (copy / image).unlink()
    refused(call("04", copy, "--iter", "0"), "row 3", "does not exist")


def test_missing_latent_is_made_once(copy):
    shutil.rmtree(copy / "iter0/unet")
    latents = {p: p.read_bytes() for p in (copy / "seed/latents").iterdir()}
    pair = pd.read_parquet(copy / "seed/pairs.parquet").iloc[0]
    lost = copy / pair.win.replace("images", "latents").replace(".png", ".safetensors")
    lost.unlink()
    assert call("04", copy, "--iter", "0") is None
    made = load_file(lost)
    assert set(made) == {"mean", "std"} and made["mean"].shape == (12, 8, 8)
    assert all(p.read_bytes() == old for p, old in latents.items() if p != lost)


def test_a_run_that_has_made_nothing_may_be_corrected(tmp_path):
    refused(call("01", tmp_path / "r", "--iter-prompts", "5000"), "--iter-prompts 5000")
    assert call("01", tmp_path / "r", *MINI, "--iter-prompts", "2", "--seed-pairs", "2", "--holdout-pairs", "0") is None
    refused(call("01", tmp_path / "r", "--seed-pairs", "4"), "seed_pairs = 2")


def test_nan_stops_training_and_keeps_the_last_checkpoint(copy):
    shutil.rmtree(copy / "iter0/unet")
    for path in (copy / "seed/latents").iterdir():
        save_file({k: v * float("nan") for k, v in load_file(path).items()}, path)
    refused(call("04", copy, "--iter", "0"), "iter0, step 0", "not finite", "--lr")
    assert not (copy / "iter0/unet").exists()


def test_anchor_iter0_holds_from_round_2_on(copy):
    """In round 1 Iter0 is the model itself, and would give every picture zero."""
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["anchor"] = "iter0"
    (copy / "config.json").write_text(json.dumps(config))
    for k, anchor in (("1", "base"), ("2", "Iter0")):
        old = pd.read_parquet(copy / f"iter{k}/rewards.parquet").reward
        (copy / f"iter{k}/pairs.parquet").unlink()
        assert call("03", copy, "--iter", k) is None
        new = pd.read_parquet(copy / f"iter{k}/rewards.parquet").reward
        assert json.loads((copy / f"iter{k}/judge.json").read_text())["anchor"] == anchor
        assert np.allclose(old, new) == (anchor == "base") and new.abs().max() > 0


@pytest.mark.parametrize("settings", [
    ["--alpha", "1", "--select", "random", "--holdout-pairs", "0", "--draws", "1", "--candidates", "2"],
    ["--alpha", "0", "--sampler", "ddpm", "--cfg-scale", "1", "--prompt-dropout", "0.5", "--optimizer", "adafactor"]])
def test_ablations_run_to_the_end(tmp_path, settings):
    run = tmp_path / "r"
    mini_ = ["--iters", "1", "--seed-pairs", "4", "--holdout-pairs", "2", "--iter-prompts", "2", "--candidates", "3",
             "--draws", "2", "--sample-steps", "2", "--iter0-steps", "2", "--iter-steps", "2", "--batch", "4",
             "--micro-batch", "4"]
    assert call("01", run, *mini_, *settings) is None
    for number, k in (("04", 0), ("02", 1), ("03", 1), ("04", 1)):
        assert call(number, run, "--iter", str(k)) is None
    log = pd.read_parquet(run / "iter1/train_log.parquet")
    assert len(log) == 2 and np.isfinite(log.loss).all()


def test_online_dpo_is_ranked_by_a_reward_from_outside(copy):
    """`--reward`: best and worst by the world's aesthetics, which then also is the judge."""
    from lib import oracle, report
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["reward"] = "world-aesthetics"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "iter1/pairs.parquet").unlink()
    assert call("03", copy, "--iter", "1") is None
    score = lambda t, images: oracle.score(list(t.prompt), report.read_pictures(copy, images))["aesthetics"]
    rewards, pairs = pd.read_parquet(copy / "iter1/rewards.parquet"), pd.read_parquet(copy / "iter1/pairs.parquet")
    np.testing.assert_allclose(rewards.reward, score(rewards, rewards.image), atol=1e-6)
    best = rewards.loc[rewards.groupby("prompt_id").reward.idxmax()].image
    assert set(pairs.win) == set(best) and set(pairs.source) == {"world-aesthetics"}
    held = pd.read_parquet(copy / "seed/holdout.parquet")
    judge = json.loads((copy / "iter1/judge.json").read_text())
    assert judge["reward"] == "world-aesthetics" and judge["accuracy"] == pytest.approx(
        (score(held, held.win) > score(held, held.lose)).float().mean().item())

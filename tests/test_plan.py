"""The plan of a run: its counts are those that the run's ledger then shows, its arithmetic that of the real models."""

import os
import subprocess

import pandas as pd
import pytest
from conftest import ROOT, make_pairs, stage

from lib import plan, probe
from lib.settings import PRESETS, Settings

SMALL = ["--iters", "2", "--seed-pairs", "5", "--holdout-pairs", "3", "--iter-prompts", "2,3", "--candidates", "2",
         "--draws", "2", "--sample-steps", "2", "--iter0-steps", "2", "--iter-steps", "0", "--batch", "2", "--micro-batch",
         "1", "--alpha", ".5", "--flip", ".5", "--anchor", "iter0", "--eval-count", "4", "--eval-seeds", "1"]
COUNTS = ["images", "unet_forwards", "optimizer_steps"]


def test_counts_and_disk_are_those_of_a_real_run(tmp_path):
    run, given = tmp_path / "run", ["--run", str(tmp_path / "run")]
    s = plan.settings_of([*given, *SMALL, "--plan"])
    planned = plan.counts(s)
    assert not run.exists()
    stage("01").main([*given, *SMALL])
    stage("04").main([*given, "--iter", "0"])
    for k in "12":
        for number in ("02", "03", "04"):
            stage(number).main([*given, "--iter", k])
    stage("05").main(given)
    ledger = pd.read_parquet(run / "ledger.parquet")
    sort = lambda table: table.sort_values(["stage", "iter"])[["stage", "iter", *COUNTS]].reset_index(drop=True)
    pd.testing.assert_frame_equal(sort(planned), sort(ledger), check_dtype=False)
    mirrored = len(list(run.rglob("*.flip.safetensors")))
    assert planned.encodes.sum() == mirrored > 0

    shape = plan.shape_of(s)
    expected = sum(plan.disk(s, shape, 0, row) for row in planned.to_dict("records"))           # without the UNets
    found = sum(f.stat().st_size for f in run.rglob("*") if {f.parent.name, f.parent.parent.name} &
                {"images", "latents", "embeds"})
    assert expected == pytest.approx(found, rel=.25)


def test_plan_of_the_papers_runs():
    """Section 4 of the paper in numbers: 10K, 20K, 20K prompts x 8 candidates, 50 steps with guidance; 128 pairs a step."""
    t = plan.counts(Settings(**PRESETS["sd15"])).set_index(["stage", "iter"])
    assert t.images["02_generate"].tolist() == [80_000, 160_000, 160_000]
    assert t.unet_forwards["02_generate", 1] == 80_000 * 100
    assert t.unet_forwards["03_rank"].tolist() == [2 * 800_000 + 40_000, 2 * 1_600_000 + 20_000, 2 * 1_600_000 + 20_000]
    assert t.optimizer_steps["04_train_dpo"].tolist() == [391, 312, 625, 625]       # 50K, 40K, 80K, 80K / 128
    assert t.images["05_eval"].item() == 5 * (500 + 3174)
    seed_only = plan.counts(Settings(**PRESETS["sd15"] | {"alpha": 0., "loss": "mapo"}))
    assert set(seed_only.stage) == {"01_seed", "04_train_dpo", "05_eval"} and seed_only.unet_forwards[1] == 391 * 128 * 2


@pytest.mark.parametrize("preset, unet, encode, decode", [("sd15", .803, 1.12, 2.51), ("sdxl", 6.76, 4.88, 10.5)])
def test_arithmetic_of_the_real_architectures(preset, unet, encode, decode):
    """Known counts of multiplications and additions, TFLOP for one picture."""
    s = Settings(**PRESETS[preset])
    shape = probe.Shape(probe.SD15_UNET if preset == "sd15" else probe.SDXL_UNET, probe.SD_VAE, 77, "")
    for what, expected in (("unet", unet), ("encode", encode), ("decode", decode)):
        assert probe.flops(shape, what, s.resolution) / 1e12 == pytest.approx(expected, rel=.005)


def test_probe_and_table(tmp_path, capsys, monkeypatch):
    """The whole command on the embedded world: hours of every stage, and of LoRA's training what its parts say."""
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .2))
    monkeypatch.setenv("SAIL_LAUNCH", "accelerate launch --num_processes 2")
    plan.main(["--plan", "--run", str(tmp_path / "none"), *SMALL])
    out = capsys.readouterr().out
    assert "2 x cpu" in out and "in all" in out and not (tmp_path / "none").exists()
    s = plan.settings_of(["--plan", "--run", str(tmp_path / "none"), "--lora-rank", "2", *SMALL])
    one, found = plan.plan(s, 1)
    assert (one.hours > 0).all() and set(found.seconds) == {"encode", "decode", "sample", "rank", "pair", "step"}
    training = one[one.stage == "04_train_dpo"].iloc[0]
    expected = training.optimizer_steps * (2 * found.seconds["pair"] + found.seconds["step"]) + 10 * found.seconds["encode"]
    assert training.hours * 3600 == pytest.approx(expected)


def test_plan_of_few_own_pairs(tmp_path, monkeypatch, capsys):
    """It counts what stage 01 would make of them, not the preset's 50,000."""
    files, seen = make_pairs(tmp_path / "own", 12), []

    def instead(s, processes):
        seen.append(plan.counts(s).images.iloc[0])
        raise InterruptedError
    monkeypatch.setattr(plan, "plan", instead)
    with pytest.raises(InterruptedError):
        plan.main(["--plan", "--preset", "sd15", "--pairs", str(files / "pairs.csv"), "--prompts",
                   str(files / "prompts.txt"), "--eval-prompts", str(files / "eval.txt"), "--run", str(tmp_path / "none")])
    assert seen == [24]
    assert "--seed-pairs 10 --holdout-pairs 2" in capsys.readouterr().out


def test_too_little_memory_is_said(monkeypatch):
    """A device that holds neither the UNet nor a training step: hours still, from the VAE's speed."""
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .1))
    monkeypatch.setattr(probe, "free_memory", lambda device: 10_000)
    s = Settings(run="none")
    found = probe.Probe(s, probe.shape_of(s)).run()
    assert any("do not fit" in note for note in found.notes) and any("not timed" in note for note in found.notes)
    assert found.seconds["pair"] == pytest.approx(8 * found.seconds["sample"])


def test_the_driver_hands_over_before_it_makes_a_folder(tmp_path):
    """With a stand-in for python that prints what it is asked."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"SAIL_ACTIVE": "1", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / "run_sail.sh", "sd15", "--plan", "--beta", "3"], env=env, capture_output=True, text=True)
    assert done.stdout == "-m lib.plan --preset sd15 --plan --beta 3\n"

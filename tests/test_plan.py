"""The plan of a run: its counts are those that the run's ledger then shows, its arithmetic that of
the real models."""

import os
import subprocess

import pandas as pd
import pytest
from conftest import ROOT, make_pairs, stage

from lib.plan import __main__ as command
from lib.plan import architecture, counts, probe, report
from lib.settings import PRESETS, Settings

# A run of a few seconds in which every kind of count occurs: mirrored pairs, another anchor.
SMALL = """
    --iters 2 --seed-pairs 5 --holdout-pairs 3 --iter-prompts 2,3 --candidates 2 --draws 2
    --sample-steps 2 --iter0-steps 2 --iter-steps 0 --batch 2 --micro-batch 1 --alpha .5
    --flip .5 --anchor iter0 --eval-count 4 --eval-seeds 1
""".split()
LEDGER_COUNTS = ["images", "unet_forwards", "optimizer_steps"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(settings, counts) of SMALL, planned before the run; and the folder of the run."""
    run = tmp_path_factory.mktemp("plan") / "run"
    s = command.settings_of(["--run", str(run), *SMALL, "--plan"])
    table = counts.counts(s)
    assert not run.exists()

    this_run = ["--run", str(run)]
    stage("01").main([*this_run, *SMALL])
    stage("04").main([*this_run, "--iter", "0"])
    for k in ("1", "2"):
        for number in ("02", "03", "04"):
            stage(number).main([*this_run, "--iter", k])
    stage("05").main([*this_run, "--scores-only"])
    return s, table, run


def test_counts_are_those_of_the_ledger_of_a_real_run(planned):
    _, table, run = planned
    ledger = pd.read_parquet(run / "ledger.parquet")

    def in_order(rows):
        columns = ["stage", "iter", *LEDGER_COUNTS]
        return rows.sort_values(["stage", "iter"])[columns].reset_index(drop=True)

    pd.testing.assert_frame_equal(in_order(table), in_order(ledger), check_dtype=False)


def test_encodings_are_those_of_the_mirror_images(planned):
    _, table, run = planned
    mirrored = len(list(run.rglob("*.flip.safetensors")))
    assert mirrored > 0
    assert table.encodes.sum() == mirrored


def test_disk_is_about_that_of_a_real_run(planned):
    """Without the UNets, whose size is their parameters."""
    s, table, run = planned
    expected = 0
    for row in table.to_dict("records"):
        expected += report.disk_of(s, architecture.architecture_of(s), 0, row)

    size = 0
    for file in run.rglob("*"):
        folders = {file.parent.name, file.parent.parent.name}
        if folders & {"images", "latents", "embeds"}:
            size += file.stat().st_size
    assert expected == pytest.approx(size, rel=.25)


@pytest.fixture(scope="module")
def sd15():
    """The counts of the paper's run of SD1.5."""
    return counts.counts(Settings(**PRESETS["sd15"])).set_index(["stage", "iter"])


def test_candidates_of_the_papers_run(sd15):
    """Section 4 of the paper: 10K, 20K, 20K prompts x 8 candidates, 50 steps with guidance."""
    assert sd15.images["02_generate"].tolist() == [80_000, 160_000, 160_000]
    assert sd15.unet_forwards["02_generate", 1] == 80_000 * 100


def test_ranking_of_the_papers_run(sd15):
    """10 draws of model and anchor; on held-out pairs the anchor is asked in round 1 alone."""
    expected = [2 * 800_000 + 40_000, 2 * 1_600_000 + 20_000, 2 * 1_600_000 + 20_000]
    assert sd15.unet_forwards["03_rank"].tolist() == expected


def test_steps_of_the_papers_run(sd15):
    """50K pairs, then mixes of 40K, 80K and 80K, over batches of 128."""
    assert sd15.optimizer_steps["04_train_dpo"].tolist() == [391, 312, 625, 625]


def test_evaluation_of_the_papers_run(sd15):
    assert sd15.images["05_eval"].item() == 5 * (500 + 3174)


def test_a_run_without_self_made_pairs_and_reference():
    table = counts.counts(Settings(**PRESETS["sd15"] | {"alpha": 0., "loss": "mapo"}))
    assert set(table.stage) == {"01_seed", "04_train_dpo", "05_eval"}
    assert table.unet_forwards[1] == 391 * 128 * 2


@pytest.mark.parametrize("preset, unet, what, tflop", [
    ("sd15", architecture.SD15_UNET, "unet", .803),
    ("sd15", architecture.SD15_UNET, "encode", 1.12),
    ("sd15", architecture.SD15_UNET, "decode", 2.51),
    ("sdxl", architecture.SDXL_UNET, "unet", 6.76),
    ("sdxl", architecture.SDXL_UNET, "encode", 4.88),
    ("sdxl", architecture.SDXL_UNET, "decode", 10.5),
])
def test_arithmetic_of_the_real_architectures(preset, unet, what, tflop):
    """Known counts of multiplications and additions for one picture."""
    resolution = Settings(**PRESETS[preset]).resolution
    real = architecture.Architecture(unet, architecture.SD_VAE, 77, "")
    flops = architecture.count_flops(real, what, resolution)
    assert flops / 1e12 == pytest.approx(tflop, rel=.005)


def test_the_command_prints_the_table_and_makes_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .2))
    monkeypatch.setenv("SAIL_LAUNCH", "accelerate launch --num_processes 2")
    command.main(["--plan", "--run", str(tmp_path / "none"), *SMALL])
    out = capsys.readouterr().out
    assert "2 x cpu" in out
    assert "in all" in out
    assert not (tmp_path / "none").exists()


def test_hours_are_those_of_the_probes_parts(tmp_path, monkeypatch):
    """On the embedded world, with LoRA."""
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .2))
    run = str(tmp_path / "none")
    s = command.settings_of(["--plan", "--run", run, "--lora-rank", "2", *SMALL])
    table, measured = report.plan(s, 1)
    seconds = measured.seconds
    assert (table.hours > 0).all()
    assert set(seconds) == {"encode", "decode", "sample", "rank", "pair", "step"}

    # A step has 2 pairs; the mirror images of 5 pairs are encoded first.
    training = table[table.stage == "04_train_dpo"].iloc[0]
    expected = training.optimizer_steps * (2 * seconds["pair"] + seconds["step"])
    expected += 10 * seconds["encode"]
    assert training.hours * 3600 == pytest.approx(expected)


def test_plan_of_few_own_pairs(tmp_path, monkeypatch, capsys):
    """It counts what stage 01 would make of them, not the preset's 50,000."""
    files = make_pairs(tmp_path / "own", 12)
    planned = []

    def stop_here(s, processes):
        planned.append(s)
        raise InterruptedError

    monkeypatch.setattr(command, "plan", stop_here)
    with pytest.raises(InterruptedError):
        command.main(["--plan", "--preset", "sd15", "--run", str(tmp_path / "none"),
                      "--pairs", str(files / "pairs.csv"),
                      "--prompts", str(files / "prompts.txt"),
                      "--eval-prompts", str(files / "eval.txt")])
    assert counts.counts(planned[0]).images.iloc[0] == 24
    assert "--seed-pairs 10 --holdout-pairs 2" in capsys.readouterr().out


def test_too_little_memory_is_said(monkeypatch):
    """A device that holds neither the UNet nor a training step: the VAE's speed gives the hours."""
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .1))
    monkeypatch.setattr(probe, "free_memory", lambda device: 10_000)
    s = Settings(run="none")
    measured = probe.Probe(s, architecture.architecture_of(s)).run()
    assert any("do not fit" in note for note in measured.notes)
    assert any("not timed" in note for note in measured.notes)
    assert measured.seconds["pair"] == pytest.approx(8 * measured.seconds["sample"])


def test_the_driver_hands_over_before_it_makes_a_folder(tmp_path):
    """With a stand-in for python that prints what it is asked."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"SAIL_ACTIVE": "1", "PATH": path}
    driver = [ROOT / "run_sail.sh", "sd15", "--plan", "--beta", "3"]
    done = subprocess.run(driver, env=env, capture_output=True, text=True)
    assert done.stdout == "-m lib.plan --preset sd15 --plan --beta 3\n"

"""The plan of a run: its counts are those that the run's ledger then shows, its arithmetic that of
the real models."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT, fails_with, make_pairs, refused, stage

from lib.plan import __main__ as command
from lib.plan import architecture, cards, counts, disk, memory, pilot, probe, report
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
    s, _ = command.settings_of(["--run", str(run), *SMALL, "--plan"])
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
        expected += disk.disk_of(s, architecture.architecture_of(s), 0, row)

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
    assert table.unet_forwards[1] == (391 + 1) * 128 * 2


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


@pytest.fixture
def short_probe(monkeypatch):
    """Calls are small, and made once."""
    monkeypatch.setattr(probe, "BUDGET", dict.fromkeys(probe.BUDGET, .1))
    monkeypatch.setattr(probe, "REPEATS", 1)


def test_the_command_prints_the_table_and_makes_no_folder(
        tmp_path, capsys, monkeypatch, short_probe):
    monkeypatch.setenv("SAIL_LAUNCH", "accelerate launch --num_processes 2")
    command.main(["--plan", "--run", str(tmp_path / "none"), *SMALL])
    out = capsys.readouterr().out
    assert "2 x cpu" in out
    assert "in all" in out
    assert "pilot" not in out
    assert not (tmp_path / "none").exists()


def test_hours_are_those_of_the_probes_parts(tmp_path, short_probe):
    """On the embedded world, with LoRA."""
    run = str(tmp_path / "none")
    s, _ = command.settings_of(["--plan", "--run", run, "--lora-rank", "2", *SMALL])
    table, measured, _ = report.plan(s, 1)
    seconds = measured.seconds
    assert (table.hours > 0).all()
    assert set(seconds) == {"encode", "decode", "sample", "rank", "pair", "step"}

    # A step has 2 pairs; the mirror images of 5 pairs are encoded first, and the last 2 pairs are
    # looked at once more.
    training = table[table.stage == "04_train_dpo"].iloc[0]
    expected = training.optimizer_steps * (2 * seconds["pair"] + seconds["step"])
    expected += 10 * seconds["encode"] + 2 * 4 * seconds["rank"]
    assert training.hours * 3600 == pytest.approx(expected)


def test_plan_of_few_own_pairs(tmp_path, monkeypatch, capsys):
    """It counts what stage 01 would make of them, not the preset's 50,000."""
    files = make_pairs(tmp_path / "own", 12)
    planned = []

    def stop_here(s, processes, card):
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


# ---- disk ----

def test_the_disk_still_needed_falls_as_a_run_goes_on(planned, tmp_path):
    """Before a run it is the plan's and a checkpoint's; of a whole one nothing is left but what
    the evaluation would paint that a run without its page has not."""
    s, table, run = planned
    fresh = replace(s, run=str(tmp_path / "none"))
    weights = disk.parameters_of(architecture.architecture_of(s))
    whole = sum(disk.disk_of(s, architecture.architecture_of(s), weights, row)
                for row in table.to_dict("records"))
    assert disk.bytes_needed(fresh) == pytest.approx(whole + disk.checkpoint_bytes(s, weights))
    assert disk.bytes_needed(s) == 0

    # A round that is to be trained again.
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "iter2/unet")
    needed = disk.bytes_needed(replace(s, run=str(again)))
    assert needed == pytest.approx(4 * weights + 24 * weights, rel=.1)


def test_a_given_iter0_leaves_the_human_pairs_mirrors_to_round_1():
    """4 pictures of 2 self-made pairs and 10 of 5 human ones; and a UNet more on the disk."""
    s, _ = command.settings_of([*SMALL, "--run", "none", "--start", "x/y"])
    table = counts.counts(s)
    trainings = table[table.stage == "04_train_dpo"]
    assert trainings.iter.tolist() == [1, 2]
    assert trainings.encodes.tolist() == [2 * 2 + 2 * 5, 2 * 3]

    rows = trainings.to_dict("records")
    found = architecture.architecture_of(s)
    first, second = [disk.disk_of(s, found, 10 ** 9, row) for row in rows]
    assert first - second == pytest.approx(4e9, rel=.01)


def test_few_held_out_pairs_take_five_trainings_more():
    """12 pairs of one's own in folds of 3, 3, 2, 2, 2, each judged by a model of the others."""
    own = dict(pairs="own.csv", prompts="own.txt", eval_prompts="", iters=2, iter_prompts="6",
               seed_pairs=10, holdout_pairs=2, iter0_steps=20, flip=.5, batch=4, draws=10)
    s = Settings(**PRESETS["tiny"] | own)
    table = counts.counts(s)
    assert table.stage.tolist()[1:5] == ["04_train_dpo", "02_generate", "crossfit", "03_rank"]

    # 20 steps for 10 pairs are 18 for 9; then both pictures of a pair by two models at each draw.
    # Each training looks at its last 4 pairs once more.
    row = table.to_dict("records")[3]
    steps, ranked = 18 + 18 + 20 + 20 + 20, 12 * 2 * 2 * 10 + 5 * 4 * 4
    found = [row[name] for name in ("optimizer_steps", "unet_forwards", "encodes")]
    assert found == [steps, steps * 4 * 4 + ranked, 4]
    seconds = {"encode": 0., "decode": 0., "sample": 0., "rank": 3., "pair": 5., "step": 7.}
    expected = ranked * 3 + steps * (4 * 5 + 7)
    assert report.hours_of(s, seconds, row) * 3600 == pytest.approx(expected)
    flops = {"unet": 1., "encode": 0., "decode": 0.}.get
    arithmetic = architecture.pair_arithmetic(s) * 4 * steps + ranked
    assert report.arithmetic_of(s, flops, row) == arithmetic
    assert "crossfit" not in set(counts.counts(replace(s, holdout_pairs=100)).stage)


# ---- a card that is not here ----

@pytest.fixture(scope="module")
def on_h100():
    """(settings, table, speed, memory) of the paper's run of SD1.5 on an H100."""
    s = Settings(**PRESETS["sd15"] | {"run": "none", "dtype": "bfloat16"})
    return s, *report.plan(s, 1, cards.CARDS["h100"])


def test_hours_of_a_card_are_its_arithmetic(on_h100):
    """At the shares that were measured; the optimizer's steps, which the memory's speed bounds, add
    little. Without torch.compile a ranking takes as much longer as its share is smaller."""
    s, table, speed, _ = on_h100
    shares = cards.SHARES["sd15"]
    flop = {part: table[f"{part}s"] * speed.flops(part) for part in ("encode", "decode")}
    unet = 1e12 * table.tflop - flop["encode"] - flop["decode"]
    training = table.stage == "04_train_dpo"
    way = training.map({True: shares["pair"], False: shares["compiled"]})
    expected = unet / way + sum(flop[part] / shares[part] for part in flop)
    steps = table.optimizer_steps.fillna(0) * 69 * 859_520_964 / 3.35e12
    seconds = expected / 989e12 + steps
    assert (3600 * table.hours).tolist() == pytest.approx(seconds.tolist(), rel=1e-3)

    eager = cards.Estimate(replace(s, compile="off"), speed.architecture, cards.CARDS["h100"])
    longer = eager.seconds["rank"] / speed.seconds["rank"]
    assert longer == pytest.approx(shares["compiled"] / shares["eager"])
    assert "as measured" in speed.notes[0]
    for card, of_run in (("a100", s), ("h100", replace(s, micro_batch=1)),
                         ("h100", replace(s, preset="tiny"))):
        estimate = cards.Estimate(of_run, speed.architecture, cards.CARDS[card])
        assert "ASSUMED" in estimate.notes[0]


def test_memory_of_a_card_is_what_it_would_hold(on_h100):
    """Frozen weights in bfloat16, whatever this machine has; 859.5 M parameters."""
    s, table, speed, held = on_h100
    assert speed.parameters == 859_520_964
    billions = {name: size / speed.parameters for name, size in held.held_in_training(s).items()}
    assert billions == {"policy": 4, "reference": 2, "gradients": 4, "optimizer": 8,
                        "autocast's copy": 2}
    assert (table.device_bytes < 80e9).all()
    assert held.held_in_training(replace(s, lora_rank=8)) == {"policy": 2 * speed.parameters}


def test_what_does_not_fit_is_told_with_settings_that_do(on_h100):
    s, _, speed, held = on_h100
    assert "fits into NVIDIA H100 SXM's 80 GB" in report.describe_memory(s, speed, held)[-1]
    smaller_card = cards.Estimate(s, speed.architecture, cards.CARDS["4090"])
    told = report.describe_memory(s, smaller_card, held)[-1]
    assert "does NOT fit into NVIDIA RTX 4090's 24 GB; this does: --" in told

    # A small device, and a small model whose batches are large: the advice holds.
    few = dict(sample_batch=4096, rank_batch=4096, micro_batch=128, batch=128)
    world = Settings(**PRESETS["tiny"] | few | {"dtype": "float32", "device": "cpu"})
    found = architecture.architecture_of(world)
    large = memory.Memory(world, found, True)
    capacity = (memory.CONTEXT + .1e9) / memory.FITS
    advice = memory.smaller(large, capacity)
    assert advice.keys() >= {"sample_batch", "rank_batch", "micro_batch"}
    changed = memory.Memory(replace(world, **advice), found, True)
    assert max(changed.device.values()) <= memory.FITS * capacity + 1
    assert memory.smaller(large, memory.CONTEXT) is None


# A UNet of middle size, and what a process does: it trains a small one first, so that all is loaded
# that a first call loads, and then this one, whose second micro-batch finds gradients there.
MIDDLE = architecture.SD15_UNET | {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": (64, 128, 192, 192),
    "cross_attention_dim": 64,
}
CALLS = """
import json, os, re, sys, psutil, torch
from diffusers import UNet2DConditionModel
from lib.diffusion import predict

def peak_of_training(config, side):
    unet = UNet2DConditionModel.from_config(config).train()
    embeds = torch.randn(4, 77, config["cross_attention_dim"])
    given = torch.randn(4, 4, side, side), torch.full((4,), 500), {"embeds": embeds}
    base = psutil.Process().memory_info().rss
    for micro_batch in range(2):
        predict(unet, *given).square().mean().backward()
    # getrusage would begin with the size of the process that has started this one.
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024 - base

config = json.loads(sys.argv[1])
peak_of_training(config | {"block_out_channels": (32,) * 4}, 8)
print(peak_of_training(config, 16))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in other units")
def test_the_memory_model_agrees_with_a_process():
    """The peak of a real training on 2 pairs, the allocator giving back what is free."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536",
                        "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CALLS, json.dumps(MIDDLE)], env=env,
                          capture_output=True, text=True, check=True)

    known = architecture.Architecture(MIDDLE, architecture.SD_VAE, 77, "")
    s = Settings(resolution=128, micro_batch=2, batch=2, dtype="float32", device="cpu")
    counted = memory.Memory(s, known, True)
    expected = counted.activations(s) + counted.held_in_training(s)["gradients"]
    assert int(done.stdout) == pytest.approx(expected, rel=.2)


def test_without_a_gpu_the_papers_models_are_planned_for_a_card(capsys):
    for argv, dtype, name in (
        (["--preset", "sd15"], "bfloat16", "NVIDIA H100 SXM"),
        (["--preset", "sdxl", "--gpu", "a100"], "bfloat16", "NVIDIA A100 80GB"),
        (["--preset", "sd15", "--gpu", "v100"], "float16", "NVIDIA V100 32GB"),
        (["--gpu", "t4", "--dtype", "float32"], "float32", "NVIDIA T4"),
    ):
        s, card = command.settings_of(["--plan", "--run", "none", *argv])
        assert (s.dtype, card.name) == (dtype, name)
    assert "this is the plan for --gpu h100" in capsys.readouterr().out

    for argv in (["--preset", "sd15", "--device", "cpu"], []):
        assert command.settings_of(["--plan", "--run", "none", *argv])[1] is None
    refused(str(fails_with("--gpu", command.settings_of, ["--plan", "--gpu", "h9000"])), "h100")


def test_a_pilot_is_a_tenth_of_the_run_and_its_command_line_says_so(on_h100):
    s, table, speed, _ = on_h100
    argv = ["--preset", "sd15", "--plan", "--gpu=h100", "--run", "none", "--iters=3"]
    small = pilot.pilot_of(s, lambda settings: report.hours_of_run(settings, speed.seconds, 1))
    words = pilot.command_of(small, s, argv)
    assert words[:3] == ["./run_sail.sh", "--preset", "sd15"]
    assert not {"--plan", "--gpu=h100", "none", "--iters=3"} & set(words)

    # What the command line makes is the pilot.
    again, _ = command.settings_of([*words[1:], "--gpu", "h100"])
    assert again == small
    assert again.run == "none-pilot"
    hours = report.hours_of_run(again, speed.seconds, 1)
    assert .02 < hours / table.hours.sum() <= .1

    # Minutes need no pilot.
    assert pilot.pilot_of(Settings(), lambda settings: .1) is None
    assert pilot.targets("sd15")[-1].split() == ["Iter3", "21", "0.2329", "5.49", "26.75"]
    assert pilot.targets("tiny") == []


@pytest.mark.parametrize("preset, source", [
    ("sd15", "SD1.5"), ("sdxl", "SDXL"), ("tiny", "a model that is nowhere")])
def test_a_model_that_is_out_of_reach(preset, source):
    """The hub is not asked for the presets' own; another one's architecture is taken as theirs."""
    s = Settings(**PRESETS[preset] | {"run": "none"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "check_hub", lambda *_: pytest.fail("the hub was asked"))
        if preset != "tiny":
            assert source in architecture.architecture_of(s).source

    other = replace(s, model="nobody/has-this")
    if preset != "tiny":
        found = architecture.architecture_of(other, ask_hub=False)
        assert source in found.source
        assert "nobody/has-this is not within reach" in found.source
    else:
        refused(fails_with("nobody", architecture.architecture_of, other, False), "--model")


def test_numbers_of_the_text_encoders():
    """Those of the world's base, counted from its files."""
    from safetensors.torch import load_file
    s = Settings()
    weights = load_file(ROOT / s.model / "text_encoder/model.safetensors")
    count = sum(weight.numel() for name, weight in weights.items() if "position_ids" not in name)
    assert architecture.architecture_of(s).text_weights == pytest.approx(count, rel=.02)


def test_too_little_memory_is_said(monkeypatch, short_probe):
    """A device that holds neither the UNet nor a training step: the VAE's speed gives the hours."""
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

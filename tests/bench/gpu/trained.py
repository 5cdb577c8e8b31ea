"""Whether training on the card is what it should be: adapters, a resume, two processes.

All of it on the embedded world, a run so small that a stage takes seconds. Two trainings on a card
differ in their last bits, since sums are not always taken in the same order, and AdamW's first
steps make much of small gradients: how far two uninterrupted trainings come apart is measured, and
a resumed one may be three times as far from the first, or a thousandth of the update.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from lib import diffusion, lora, models
from lib.models import BASE
from lib.plan.architecture import CLIP_TOKENS, random_inputs
from lib.plan.stages import load_stage
from lib.settings import PRESETS, ROOT, Settings
from tests.bench.gpu.apart import new_process, run_stage
from tests.bench.gpu.results import Results
from tests.bench.gpu.scale import Scale

STAGES = {path.name[:2]: path for path in sorted(ROOT.glob("0?_*.py"))}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

# Four micro-batches: two processes add up their gradients in another order than one.
SMALL = ["--iters", "1", "--seed-pairs", "8", "--holdout-pairs", "6", "--iter-prompts", "3",
         "--candidates", "4", "--draws", "3", "--sample-steps", "3", "--iter0-steps", "6",
         "--iter-steps", "4", "--batch", "4", "--micro-batch", "1", "--checkpoint-every", "1",
         "--eval-count", "4", "--lr", "1e-4", "--dtype", "float32"]
STOP_AFTER = 3

# Shares of the update, where nothing was measured that would say more.
FLOOR = 1e-3
OF_TWO = 1e-2


def stage(scale: Scale, number: str, run: Path, *arguments: str, processes: int = 1) -> None:
    run_stage(scale.rehearse, STAGES[number], [*arguments, f"--run={run}"], processes)


def seeded_run(scale: Scale, folder: Path) -> Path:
    """A run that stage 01 is through with."""
    run = folder / "seeded"
    stage(scale, "01", run, "--preset", "tiny", *SMALL)
    return run


def copy_of(run: Path, name: str) -> Path:
    return shutil.copytree(run, run.with_name(name))


# ---- a-training ----

def check_training(scale: Scale, results: Results) -> None:
    """The step a-training."""
    seeded = seeded_run(scale, scale.fresh("training"))
    runs = {name: copy_of(seeded, name) for name in ("one", "again", "stopped")}
    for name in ("one", "again"):
        stage(scale, "04", runs[name], "--iter", "0")
    stop_stage_04(scale, runs["stopped"])
    stage(scale, "04", runs["stopped"], "--iter", "0")

    by_chance = apart(runs["one"], runs["again"], 0)
    results.add("two uninterrupted trainings, distance over the update", by_chance)
    results.check("stopped and continued, distance over the update",
                  apart(runs["one"], runs["stopped"], 0), max(FLOOR, 3 * by_chance),
                  "three times what two uninterrupted ones come apart")
    log = pd.read_parquet(runs["one"] / "iter0/train_log.parquet")
    results.check("first loss less log 2", abs(log.loss[0] - np.log(2)), 1e-6,
                  "the policy is its reference")
    check_adapter(scale, results, seeded)


def stop_stage_04(scale: Scale, run: Path) -> None:
    """Let Iter0's training be stopped by Ctrl-C; RuntimeError where it was not."""
    process = new_process(scale.rehearse, train_until, (run, STOP_AFTER))
    process.start()
    process.join()
    if process.exitcode or not (run / "iter0/checkpoint.pt").exists():
        raise RuntimeError("stage 04 could not be stopped with a checkpoint")


def train_until(run: Path, step: int) -> None:
    """In a process of its own: stage 04 until a step has been watched."""
    module = load_stage("04")

    def interrupt(row, *_):
        if row["step"] == step:
            raise KeyboardInterrupt

    module.watch = interrupt
    try:
        module.main([f"--run={run}", "--iter", "0"])
    except KeyboardInterrupt:
        return
    raise RuntimeError("the training came to its end")


def apart(one: Path, other: Path, k: int) -> float:
    """The distance of two runs' models, over what training has changed."""
    base = load_file(ROOT / "lib/world/base" / WEIGHTS)
    ours = load_file(one / f"iter{k}" / WEIGHTS)
    theirs = load_file(other / f"iter{k}" / WEIGHTS)
    changed = difference = 0.
    for name, weight in base.items():
        changed += (ours[name] - weight.float()).square().sum().item()
        difference += (ours[name] - theirs[name]).square().sum().item()
    return (difference / changed) ** .5


@torch.no_grad()
def check_adapter(scale: Scale, results: Results, run: Path) -> None:
    """With its adapter off a policy is the base, to the bit; with it on it is another model."""
    for dtype in ("float32", "bfloat16"):
        s = Settings(**PRESETS["tiny"] | {"run": str(run), "device": scale.device, "dtype": dtype})
        base, policy = models.load_unet(s, BASE), models.load_unet(s, BASE)
        lora.add_adapters(policy, 4, Path("none"), 0)
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=.05)

        given = random_inputs(base, CLIP_TOKENS, 8, 4, scale.device)
        of_base = diffusion.predict(base, *given)
        of_policy = diffusion.predict(policy, *given)
        with lora.reference_of(policy) as reference:
            of_reference = diffusion.predict(reference, *given)
        results.check(f"adapter off against the base, {dtype}",
                      (of_reference - of_base).abs().max().item(), 0, "the same operations")
        effect = (of_policy - of_base).norm() / of_base.norm()
        results.add(f"adapter on against the base, {dtype}", effect.item())


# ---- e-two ----

def check_two(scale: Scale, results: Results) -> None:
    """The step e-two: two processes on one device, through gloo, against one."""
    seeded = seeded_run(scale, scale.fresh("two"))
    runs = {1: copy_of(seeded, "one"), 2: copy_of(seeded, "two")}
    for processes, run in runs.items():
        for number, k in (("04", "0"), ("02", "1"), ("03", "1")):
            stage(scale, number, run, "--iter", k, processes=processes)

    results.check("Iter0 of two processes, distance over the update", apart(runs[1], runs[2], 0),
                  OF_TWO, "gradients are summed in another order, and AdamW makes much of it")
    rewards = [pd.read_parquet(run / "iter1/rewards.parquet").reward for run in runs.values()]
    results.check("rewards of two processes, largest difference over their spread",
                  (rewards[0] - rewards[1]).abs().max() / rewards[0].std(), .1,
                  "their models are not the same to the bit")
    pairs = [pd.read_parquet(run / "iter1/pairs.parquet")[["win", "lose"]] for run in runs.values()]
    results.add("pairs of two processes that differ",
                int((pairs[0] != pairs[1]).any(axis=1).sum()), "", f"of {len(pairs[0])}")

"""Every setting of a run: its meaning, its value in the three presets, and the paper's.

The first stage saves a run's settings in its config.json; all others read them there. Settings that
are given again must agree with the saved ones once the run has made something, except those marked
`free`: they say how to compute or to evaluate, never what the run trains. What a free setting was
given last holds from then on.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lib.lock import check_folder
from lib.run import UserError, run_stage, write_json

ROOT = Path(__file__).resolve().parent.parent

# The learned scores of stage 05, and what can rank candidates.
SCORES = ("pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetics")
REWARDS = ("implicit", "self-confidence", "world", "world-aesthetics", *SCORES)
SAMPLERS = ("ddim", "ddpm", "dpmsolver")


def setting(help: str, tiny, sd15=None, sdxl=None, paper: str = "", free: bool = False,
            choices: tuple = ()):
    """A setting with its value in each preset.

    sd15 is as tiny, and sdxl as sd15, where nothing else is said. `paper` is the paper's value, in
    words; `free` settings may change within a run; `choices` are the values allowed, () for any.
    """
    if sd15 is None:
        sd15 = tiny
    if sdxl is None:
        sdxl = sd15

    metadata = {
        "help": help,
        "values": {"tiny": tiny, "sd15": sd15, "sdxl": sdxl},
        "paper": paper,
        "free": free,
        "choices": choices,
    }
    return field(default=tiny, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of a run: what each means, its values in the presets, and the paper's."""

    # ---- the run ----
    preset: str = setting(
        "the values to start from",
        "tiny", "sd15", "sdxl", choices=("tiny", "sd15", "sdxl"))
    run: str = setting(
        "run folder; empty means runs/<preset>",
        "", free=True)
    seed: int = setting(
        "run seed: draws data, noise, timesteps and order",
        0)
    iters: int = setting(
        "self-improvement rounds after Iter0",
        3, 3, 2, paper="SD1.5 3, SDXL 2")
    model: str = setting(
        "base model: a diffusers pipeline, hub id or folder (SD1.x or SDXL)",
        "lib/world/base", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-xl-base-1.0")
    vae: str = setting(
        "another VAE, hub id or folder; empty means the model's own",
        "", "", "madebyollin/sdxl-vae-fp16-fix")
    resolution: int = setting(
        "pixels per side",
        32, 512, 1024, paper="SD1.5 512, SDXL 1024")
    keep: str = setting(
        "what stays on the disk: all pictures, as PNG; or human ones without loss, and of the "
        "candidates those of pairs and of a round's first prompts, as JPEG to look at (latents of "
        "all stay, many to a file, and what is trained is the same)",
        "all", "pairs", free=True, choices=("all", "pairs"))

    # ---- 01: human pairs and prompts ----
    # Held-out pairs are not in the paper.
    pairs: str = setting(
        "human pairs: world, a folder of labels (./run_sail.sh label), a hub dataset id, a folder "
        "of Parquet shards, or a CSV, JSONL or Parquet file with prompt, win, lose",
        "world", "liuhuohuo2/pick-a-pic-v2", paper="Pick-a-Pic v2")
    prompts: str = setting(
        "prompts of the rounds: world, pairs (the pair source's other prompts), or a file of "
        "prompts (text with one a line, CSV, JSON, Parquet)",
        "world", "pairs", paper="Pick-a-Pic v2")
    eval_prompts: str = setting(
        "evaluation prompts: world, dev (the world's, for tuning), or a list with commas of "
        "pickapic, hpsv2, parti (each also as name=file) and files of prompts",
        "world", "pickapic,hpsv2", paper="Pick-a-Pic validation, HPSv2, PartiPrompts")
    seed_pairs: int = setting(
        "human pairs to train on",
        128, 50_000, paper="about 50000 of 0.8M")
    holdout_pairs: int = setting(
        "human pairs kept to measure the self-judge; never trained on",
        200, 1000)
    iter_prompts: str = setting(
        "new prompts per round; with commas, one number per round, the last one repeats",
        "48", "10000,20000,20000", "10000,20000",
        paper="SD1.5 10000,20000,20000, SDXL 10000,20000")
    label_noise: float = setting(
        "world only: the annotators' Bradley-Terry temperature, in units of utility",
        .15)

    # ---- 02: candidates ----
    candidates: int = setting(
        "N, candidates per prompt",
        8, paper="8")
    sampler: str = setting(
        "sampler of candidates and evaluation",
        "ddim", "ddpm", "ddim", paper="SD1.5 ddpm, SDXL ddim",
        choices=SAMPLERS)
    sample_steps: int = setting(
        "sampler steps",
        10, 50, 20, paper="SD1.5 50, SDXL 20")
    cfg_scale: float = setting(
        "classifier-free guidance scale; 1 or less is off",
        2., 7.5, 5., paper="SD1.5 7.5, SDXL 5")

    # Cheaper candidates, not in the paper: human pairs and evaluation stay what they are.
    candidate_sampler: str = setting(
        "another sampler for the candidates alone; empty means that of sampler",
        "", choices=("", *SAMPLERS))
    candidate_steps: int = setting(
        "sampler steps of the candidates alone; 0 means sample_steps",
        0)

    # ---- 03: ranking ----
    draws: int = setting(
        "(timestep, noise) draws per reward, shared by a prompt's candidates",
        10, paper="10")

    # ---- 04: training ----
    # The paper gives no learning rate: DiffusionDPO's rule is 1e-8 for each pair of the batch. Its
    # 500 warm-up steps were meant for 2,000 steps; here Iter0 has 390.
    beta: float = setting(
        "strength of the KL anchor in the loss and scale of the reward",
        2000., 5000., paper="5000")
    alpha: float = setting(
        "share of self-made pairs in a round's training data, 0..1",
        .25, paper="0.25")
    batch: int = setting(
        "pairs per optimizer step",
        24, 128, paper="128")
    iter0_steps: int = setting(
        "optimizer steps of Iter0; 0 means one pass over the human pairs",
        100, 0, paper="not given")
    iter_steps: int = setting(
        "optimizer steps of a round; 0 means one pass over its mix",
        40, 0, paper="one pass (our reading)")
    lr: float = setting(
        "learning rate after warm-up",
        2e-5, 1.28e-6, paper="not given")
    warmup: int = setting(
        "linear warm-up steps",
        10, 40, paper="DiffusionDPO 500 (SD1.5), 200 (SDXL)")
    optimizer: str = setting(
        "optimizer",
        "adamw", "adamw", "adafactor", paper="SD1.5 adamw, SDXL adafactor",
        choices=("adamw", "adafactor"))
    weight_decay: float = setting(
        "weight decay",
        1e-2, paper="1e-2 (DiffusionDPO)")
    max_grad_norm: float = setting(
        "gradient clipping",
        1., paper="1.0 (DiffusionDPO)")
    prompt_dropout: float = setting(
        "probability of training on the empty prompt",
        0., .2, paper="0.2 (DiffusionDPO)")
    flip: float = setting(
        "probability of mirroring both pictures of a pair",
        0., .5, paper="0.5 (DiffusionDPO, each picture alone)")
    lora_rank: int = setting(
        "rank of low-rank adapters on the attention layers, which want a higher --lr (SPO: "
        "6e-5 at rank 4); 0 trains every weight",
        0, paper="0")

    # ---- 05: evaluation ----
    eval_count: int = setting(
        "evaluation prompts of each benchmark; 0 means all",
        240, 0, paper="500, 3200 and 1632")
    eval_seeds: int = setting(
        "images per evaluation prompt and model",
        2, 1, paper="1")
    scores: str = setting(
        "world, none, or a list with commas of pickscore, hpsv2, hpsv2.1, imagereward, aesthetics",
        "world", "pickscore,imagereward,aesthetics,hpsv2", free=True,
        paper="pickscore,imagereward,aesthetics,hpsv2")
    score_weights: str = setting(
        "weights of the scores, where not the published ones: name=path with commas",
        "", free=True)

    # ---- the table's other rows, and ablations: not the paper's SAIL (lib/rivals/README.md) ----
    start: str = setting(
        "a UNet (hub id or folder) to take as Iter0 instead of training it: SAIL*",
        "", paper="SAIL*: DiffusionDPO's")
    loss: str = setting(
        "loss of all rounds; mapo (needs no reference) is a rival row of the table",
        "dpo", paper="dpo", choices=("dpo", "mapo"))
    reward: str = setting(
        "who ranks: implicit (the model itself), self-confidence (the model itself, by SOLACE's "
        "reward), or for online DPO a reward from outside: the world's, or a score of stage 05",
        "implicit", paper="implicit; online DPO: aesthetics", choices=REWARDS)
    select: str = setting(
        "how a prompt's pair is chosen",
        "best-worst", paper="best-worst", choices=("best-worst", "random"))
    anchor: str = setting(
        "reference of the reward; iter0 holds from round 2 on",
        "base", paper="the initial anchor (unclear)", choices=("base", "iter0"))
    rank_t_min: int = setting(
        "lowest timestep of the reward's draws",
        0, paper="0")
    rank_t_max: int = setting(
        "one past the highest timestep of the reward's draws",
        1000, paper="1000")
    reward_weights: str = setting(
        "weight of a draw: plain, or balanced (over the anchor's own error at that draw, so "
        "that no timestep drowns the others), or root (the difference of the errors' roots)",
        "plain", paper="plain", choices=("plain", "balanced", "root"))

    # ---- the machine ----
    device: str = setting(
        "auto, cpu, mps, cuda, or one card such as cuda:1",
        "auto", free=True)
    dtype: str = setting(
        "auto (bf16 on CUDA, float32 elsewhere), float32, bfloat16 or float16",
        "auto", choices=("auto", "float32", "bfloat16", "float16"))
    sample_batch: int = setting(
        "images sampled at once",
        64, 32, 8, free=True)
    rank_batch: int = setting(
        "most noised latents per forward in ranking; whole prompts where N x draws of one fit",
        320, 80, 20, free=True)
    micro_batch: int = setting(
        "most pairs per forward in training; a batch is divided evenly, and accumulated",
        24, 8, 2, free=True)
    grad_checkpoint: str = setting(
        "recompute activations in the backward pass: less memory, a third more time",
        "off", free=True, choices=("off", "on"))
    compile: str = setting(
        "torch.compile the UNets that sample and rank (a minute or two as a stage starts; auto: on "
        "a card, where that works); a reference is computed as its policy is",
        "off", "auto", free=True, choices=("off", "on", "auto"))
    checkpoint_every: int = setting(
        "optimizer steps between checkpoints to resume from",
        40, 100, free=True)
    track: str = setting(
        "live curves of training, judge and scores, in <run>/tracking or on wandb",
        "off", free=True, choices=("off", "tensorboard", "wandb"))


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


def preset_values(preset: str) -> dict:
    """The values of all settings in a preset."""
    return {name: f.metadata["values"][preset] for name, f in FIELDS.items()}


PRESETS = {preset: preset_values(preset) for preset in ("tiny", "sd15", "sdxl")}


# The stages' own argument beside the settings.
ITER = {
    "--iter": {"type": int, "required": True, "help": "the round: 1, 2, ... (04: 0 is Iter0)"},
}

# The driver's own arguments: what they do is in lib/again.py.
RUN_ARGUMENTS = {
    "--from": {"default": "", "metavar": "RUN",
               "help": "a new run that goes on from another one's human pairs and Iter0, with its "
                       "settings but for those that are given"},
    "--redo-from": {"default": "", "metavar": "WHERE",
                    "help": "make again what the run has from seed, iter0, iter1, ... on"},
}

# Runs of earlier versions: the name that the base model had, and settings that are no more, with
# the value at which they did what is done now.
OLD_MODELS = {"lib/tiny": "lib/world/base"}
RETIRED = {"timesteps": "uniform", "min_margin": 0.}

# What a run folder may have before a stage has finished anything in it: what tells of the run, and
# what a stage 01 that was refused or stopped leaves, which writes prompts.parquet last.
NOT_YET_MADE = re.compile(r"\..*|config\.json|ledger\..*|log\.txt|error\.txt|code", re.DOTALL)
OF_STAGE_01 = ("seed", "embeds", "benchmarks.parquet")

# What those leavings depend on: with another value of these, stage 01 makes them again.
BEHIND_STAGE_01 = ("seed", "iters", "model", "vae", "resolution", "pairs", "prompts",
                   "eval_prompts", "seed_pairs", "holdout_pairs", "iter_prompts", "label_noise",
                   "sampler", "sample_steps", "cfg_scale", "dtype", "keep")

# Arguments of single stages, which the driver does not take.
OF_STAGES = {
    "--iter": "02_generate.py, 03_rank.py and 04_train_dpo.py",
    "--row": "05_eval.py",
    "--drop": "05_eval.py",
    "--only": "05_eval.py",
    "--rivals": "05_eval.py",
    "--images": "05_eval.py",
    "--scores-only": "05_eval.py",
}

# The packages whose versions a result may depend on.
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "pandas",
            "pyarrow", "numpy")


def has_reference(s: Settings) -> bool:
    """Whether the loss compares the policy with a reference model."""
    return s.loss != "mapo"


def needs_prompts(s: Settings) -> bool:
    """Whether the rounds draw candidates, for which they need prompts of their own."""
    return s.iters > 0 and s.alpha > 0


def micro_batch_of(s: Settings, processes: int) -> int:
    """Pairs per forward so that every process has as many forwards as the others.

    It is the setting's own number, or the next smaller one that divides the batch: what the batch
    trains on stays the same. UserError: it does not divide among the processes.
    """
    if s.batch % processes:
        raise UserError(
            f"--batch {s.batch} does not divide among {processes} processes; give a multiple of "
            f"{processes}, or start fewer"
        )
    of_process = s.batch // processes
    return max(size for size in range(1, s.micro_batch + 1) if of_process % size == 0)


def of_candidates(s: Settings) -> Settings:
    """The settings by which stage 02 samples its candidates."""
    sampler = s.candidate_sampler or s.sampler
    steps = s.candidate_steps or s.sample_steps
    return dataclasses.replace(s, sampler=sampler, sample_steps=steps)


def round_prompts(s: Settings, k: int) -> int:
    """The number of new prompts in round k = 1, 2, ..."""
    counts = [int(count) for count in s.iter_prompts.split(",")]

    # The last number holds for all rounds after it.
    return counts[min(k, len(counts)) - 1]


# ---- the parser ----

class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are the project's: one line, and the remedy."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown is None:
            raise UserError(f"{message}; --help lists every setting")

        # A stage's own argument that came to another program, or perhaps a slip.
        name = unknown[1]
        if name in OF_STAGES:
            raise UserError(f"{name} is no setting of a run, it belongs to {OF_STAGES[name]}; give "
                            f"it there, with the run's --run")
        hint = ""
        for near in difflib.get_close_matches(name, map(flag, FIELDS), n=1):
            hint = f"did you mean {near}? "
        raise UserError(f"{message}; {hint}--help lists every setting")


def flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def values_in_words(f: dataclasses.Field) -> str:
    """A setting's value in each preset and in the paper, for --help."""
    values = f.metadata["values"]

    # A value that is the same in all presets is given once.
    words = f"all presets: {values['tiny']}"
    if len(set(values.values())) > 1:
        words = "; ".join(f"{preset}: {value}" for preset, value in values.items())
    if f.metadata["paper"]:
        words += f"; paper: {f.metadata['paper']}"
    return words


def build_parser(stage_doc: str, extras: dict[str, dict] | None = None) -> argparse.ArgumentParser:
    """A parser of every setting and of a stage's own arguments.

    `extras` are the latter: {flag: options of add_argument}.
    """
    # What is not given is not in the result: only so can it be told from a default that is given.
    parser = Parser(
        description=stage_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, options in (extras or {}).items():
        parser.add_argument(name, **options)

    title = "settings (with their values in the presets, and the paper's)"
    group = parser.add_argument_group(title)
    for f in FIELDS.values():
        # argparse formats help texts with %.
        help = f"{f.metadata['help']} ({values_in_words(f)})"
        options = {"dest": f.name, "help": help.replace("%", "%%")}
        if f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        else:
            options["type"] = f.type
            options["metavar"] = f.type.__name__
        group.add_argument(flag(f.name), **options)
    return parser


# ---- what values are allowed ----

def require(condition, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check(s: Settings) -> Settings:
    """Refuse values that could only fail later, as far as the settings alone can tell.

    What takes a look at models, files and the device is in lib/start.py and lib/preflight.py.
    """
    check_bounds(s)

    require(
        s.rank_t_min < s.rank_t_max,
        f"--rank-t-min {s.rank_t_min} --rank-t-max {s.rank_t_max}: need 0 <= min < max <= 1000",
    )
    require(
        re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", s.iter_prompts),
        f"--iter-prompts {s.iter_prompts}: give a number, or one per round with commas",
    )
    require(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", s.device),
        f"--device {s.device}: give auto, cpu, mps, cuda, or one card such as cuda:1",
    )
    require(
        s.track == "off" or importlib.util.find_spec(s.track),
        f"--track {s.track}: the package {s.track} is not installed; install it with pip, or "
        f"leave --track off",
    )

    check_world(s)
    check_scores(s)
    check_length(s)
    return s


# The least and the greatest value of every number: what is beyond could only be a slip, and would
# fill the memory, run for ever or end in numbers that are not finite.
BOUNDS = {
    "seed": (0, 2 ** 63 - 1),
    "iters": (0, 1000),
    "resolution": (1, 16_384),
    "seed_pairs": (1, 10 ** 7),
    "holdout_pairs": (0, 10 ** 7),
    "label_noise": (0, 10 ** 6),
    "candidates": (2, 10_000),
    # All schedules have 1000 timesteps, and the samplers count them from 1.
    "sample_steps": (1, 999),
    "cfg_scale": (0, 1000),
    "candidate_steps": (0, 999),
    "draws": (1, 10_000),
    "beta": (0, 10 ** 9),
    "alpha": (0, 1),
    "batch": (1, 10 ** 6),
    "iter0_steps": (0, 10 ** 7),
    "iter_steps": (0, 10 ** 7),
    "lr": (0, 10),
    "warmup": (0, 10 ** 7),
    "weight_decay": (0, 100),
    "max_grad_norm": (0, 10 ** 9),
    "prompt_dropout": (0, 1),
    "flip": (0, 1),
    "lora_rank": (0, 10_000),
    "eval_count": (0, 10 ** 7),
    "eval_seeds": (1, 10_000),
    "rank_t_min": (0, 999),
    "rank_t_max": (1, 1000),
    "sample_batch": (1, 10 ** 6),
    "rank_batch": (1, 10 ** 6),
    "micro_batch": (1, 10 ** 6),
    "checkpoint_every": (1, 10 ** 7),
}

# Of these the bound itself is not allowed.
ABOVE_LEAST = ("beta", "lr", "max_grad_norm")
BELOW_GREATEST = ("prompt_dropout",)

# Pairs that one training may go through, again and again: their order is kept in memory.
PLACES = 10 ** 8


def check_bounds(s: Settings) -> None:
    """Refuse numbers beyond their bounds, and what is no number."""
    for name, (least, greatest) in BOUNDS.items():
        value = getattr(s, name)

        # No comparison holds for NaN.
        within = least <= value <= greatest
        if name in ABOVE_LEAST:
            within = within and value > least
        if name in BELOW_GREATEST:
            within = within and value < greatest

        what = f"must be at least {least} and at most {greatest}"
        if name in ABOVE_LEAST:
            what = f"must be above {least} and at most {greatest}"
        elif name in BELOW_GREATEST:
            what = f"must lie in {least}..{greatest}, below {greatest}"
        elif greatest == 1:
            what = "must lie in 0..1"
        require(within, f"{flag(name)} {value}: {what}")


def check_world(s: Settings) -> None:
    """The embedded world's prompts, rewards and scores make sense together only.

    Its own pairs need its prompts; pairs that people have labelled may be of its captions, too.
    Prompts that no round uses do not matter.
    """
    of_world = [in_world(s)]
    if s.pairs == "world":
        of_world.append(True)
    if needs_prompts(s):
        of_world.append(s.prompts == "world")
    require(
        all(of_world) or not any(of_world),
        f"--pairs {s.pairs} --prompts {s.prompts} --eval-prompts {s.eval_prompts}: the embedded "
        f"world's pairs and prompts belong together; give your own for all three or for none, or "
        f"--pairs alone if they are of its captions (./run_sail.sh label)",
    )

    # Its people's taste is nothing to rank by where others have labelled.
    require(
        s.pairs == "world" or not s.reward.startswith("world"),
        f"--reward {s.reward}: only the embedded world's people have it; give another --reward",
    )
    require(
        in_world(s) or s.scores != "world",
        f"--scores world: only the embedded world's captions and pictures have it; give "
        f"--scores none, or a list of {', '.join(SCORES)}",
    )


def in_world(s: Settings) -> bool:
    """Whether the captions are the embedded world's, whoever has labelled their pictures."""
    return s.eval_prompts in ("world", "dev")


def labelled_elsewhere(s: Settings) -> bool:
    """Whether the embedded world's pictures have been labelled by others than its own people."""
    return in_world(s) and s.pairs != "world"


def check_scores(s: Settings) -> None:
    """Refuse scores, and weights for scores, of a name that is none."""
    if s.scores not in ("world", "none"):
        for name in s.scores.split(","):
            require(
                name in SCORES,
                f"--scores {s.scores}: {name!r} is no score; give world, none, or a list with "
                f"commas of {', '.join(SCORES)}",
            )

    for name, where in named_weights(s):
        require(
            name in SCORES and where,
            f"--score-weights {s.score_weights}: give NAME=PATH, with commas where there are "
            f"several, NAME one of {', '.join(SCORES)}",
        )


def named_weights(s: Settings) -> list[tuple[str, str]]:
    """(name of a score, where its weights lie) of the setting score_weights."""
    pairs = []
    for part in s.score_weights.split(","):
        name, _, where = part.partition("=")
        if part:
            pairs.append((name, where))
    return pairs


def check_length(s: Settings) -> None:
    """Refuse a training whose order of pairs would not fit into memory."""
    # Steps of 0 mean one pass: over the human pairs, or over a mix with a share alpha of others.
    iter0 = s.iter0_steps * s.batch or s.seed_pairs
    require(
        iter0 <= PLACES,
        f"--iter0-steps {s.iter0_steps} --batch {s.batch}: trains on {iter0:.2g} pairs, one after "
        f"another; {PLACES:.0e} are the most, ask for fewer",
    )

    places = s.iter_steps * s.batch
    if places == 0 and needs_prompts(s):
        places = max(round_prompts(s, k) for k in range(1, s.iters + 1)) / s.alpha
    require(
        places <= PLACES,
        f"--iter-steps {s.iter_steps} --batch {s.batch} --alpha {s.alpha:g}: a round trains on "
        f"{places:.2g} pairs, one after another; {PLACES:.0e} are the most, ask for fewer steps or "
        f"give a larger --alpha",
    )


def check_device(s: Settings) -> None:
    """Refuse a device that this machine does not have."""
    if s.device in ("auto", "cpu"):
        return
    import torch

    if s.device == "mps":
        is_there = torch.backends.mps.is_available()
    else:
        number = int(s.device.partition(":")[2] or 0)
        is_there = number < torch.cuda.device_count()
    require(
        is_there,
        f"--device {s.device}: torch finds no such device here; leave --device auto, or install "
        f"the build of torch that knows it",
    )


# ---- config.json ----

def load(
    argv: list[str],
    stage_doc: str,
    extras: dict[str, dict] | None = None,
    create: bool = False,
    before_start: Callable[[Settings], None] | None = None,
) -> tuple[Settings, argparse.Namespace]:
    """The settings of the run that argv names, and the stage's own arguments `extras`.

    A new run folder gets its config.json if `create`; an existing one must agree with what argv
    gives, and free settings that are given are kept in it. While a run has made nothing yet it is
    `before_start` that may refuse its settings, before anything is written. UserError: it does, or
    the run does not agree, there is none and none is to be created, or a value is not allowed.
    """
    given, own = parse(argv, stage_doc, extras)
    config = config_of(given)
    if not config.exists() and not create:
        raise UserError(
            f"{config} does not exist: start the run with 01_seed.py --run {config.parent}"
        )

    s, content, changed = combine(config, given)
    check_device(s)
    if before_start and not has_made_something(config.parent):
        before_start(s)

    # Of several processes the first one writes.
    if os.environ.get("RANK", "0") == "0":
        if create or changed:
            check_folder(config.parent)
        if changed or not content:
            keep(s, content, changed)
    return s, own


def keep(s: Settings, content: dict, changed: list[str]) -> None:
    """Write config.json, which had this content, where settings have changed or are new."""
    if has_made_something(Path(s.run)):
        write_config(s, content or environment())
        return

    # What stage 01 has fitted to a file does not change what it makes of the file.
    fitted = set(content.get("fitted", ()))
    forget_stage_01(Path(s.run), set(changed) - fitted)
    write_config(s, environment())


def planned(argv: list[str], doc: str, extras: dict[str, dict] | None = None) -> Settings:
    """The settings that a run has or would have; nothing is written."""
    given, _ = parse(argv, doc, extras)
    s, _, _ = combine(config_of(given), given)
    return s


def parse(argv: list[str], doc: str,
          extras: dict[str, dict] | None) -> tuple[dict, argparse.Namespace]:
    """The settings that argv gives, by name, and the stage's own arguments, which are none."""
    given = vars(build_parser(doc, extras).parse_args(argv))
    own = argparse.Namespace()
    for name, options in (extras or {}).items():
        name = name.lstrip("-").replace("-", "_")
        value = given.pop(name, options.get("default"))
        setattr(own, name, value)

    source = getattr(own, "from", "")
    if source:
        given = settings_to_go_on_with(source, given)
    return given, own


def settings_to_go_on_with(source: str, given: dict) -> dict:
    """The settings of a run that goes on from the run `source`: its own, and those given."""
    config = Path(source) / "config.json"
    if not config.exists():
        raise UserError(f"--from {source}: is no run folder, it has no config.json")
    if not given.get("run") or Path(given["run"]).resolve() == config.parent.resolve():
        raise UserError(f"--from {source}: give the new run a folder of its own with --run")
    return read_config(config)["settings"] | given


def config_of(given: dict) -> Path:
    """Where the run that is given has its settings."""
    folder = given.get("run") or ROOT / "runs" / given.get("preset", "tiny")
    return Path(folder) / "config.json"


def combine(config: Path, given: dict) -> tuple[Settings, dict, list[str]]:
    """Saved and given settings as one: (settings, config.json's content, names that changed).

    The content is {} where there is none yet. What was saved in a damaged file may have been
    anything.
    """
    if not config.exists():
        return new_settings(given | {"run": str(config.parent)}), {}, []
    if is_worthless(config, given):
        return new_settings(given | {"run": str(config.parent)}), {}, list(FIELDS)

    content = read_config(config)
    saved = content["settings"]
    if has_made_something(config.parent):
        refuse_changes(config, saved, given)
        values = saved | given
    elif "preset" in given:
        # Whoever was refused gives the whole command again: what it leaves out is to go, too.
        values = dataclasses.asdict(new_settings(given))
    else:
        # The numbers that stage 01 fitted to a file are fitted again: the file may be another.
        preset = PRESETS[saved["preset"]]
        fitted = {name: preset[name] for name in content.get("fitted", ())}
        values = saved | fitted | given
    values["run"] = str(config.parent)

    try:
        s = check(Settings(**values))
    except UserError as error:
        # Where nothing new is given, the fault stands in the file.
        if given.keys() - {"run", "preset"}:
            raise
        raise UserError(f"{config}: {error}") from None
    changed = [name for name in saved if name != "run" and saved[name] != values[name]]
    return s, content, changed


def new_settings(given: dict) -> Settings:
    """The settings of a new run: its preset's values, and over them those that are given.

    What the preset scores the embedded world by is not for pairs and prompts from outside.
    """
    values = PRESETS[given.get("preset", "tiny")] | given
    outside = values["eval_prompts"] not in ("world", "dev")
    if outside and values["scores"] == "world" and "scores" not in given:
        values["scores"] = "none"
        print("the embedded world's scores are not for other prompts: --scores none",
              file=sys.stderr)
    return check(Settings(**values))


def is_worthless(config: Path, given: dict) -> bool:
    """Whether a config.json is damaged, and all that it told is given or may be chosen anew."""
    if "preset" not in given or not config.is_file() or has_made_something(config.parent):
        return False
    try:
        read_config(config)
    except UserError as error:
        print(f"{error}; nothing was made yet, so it is written anew", file=sys.stderr)
        return True
    return False


def read_config(config: Path) -> dict:
    """A run's config.json, whose settings are complete and of the right types.

    Settings that an earlier version did not have are those of the run's preset. UserError: the
    file is damaged, or has a retired setting at a value that is no longer done.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise damaged(config, "is a folder") from None
    except (ValueError, RecursionError):
        raise damaged(config, "is no JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        raise damaged(config, "has no settings")

    saved = content["settings"]
    for name, value in RETIRED.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{config}: this run has {name} = {saved[name]}, a setting that is no more; "
                f"go on with it at the commit that it names, or start another --run"
            )

    settings = {name: value for name, value in saved.items() if name in FIELDS}
    for name, value in settings.items():
        check_saved(config, name, value)
    if "preset" not in settings:
        raise damaged(config, "names no preset")

    settings = PRESETS[settings["preset"]] | settings
    settings["model"] = OLD_MODELS.get(settings["model"], settings["model"])
    return content | {"settings": settings}


def check_saved(config: Path, name: str, value) -> None:
    """Refuse a saved value of another type than the setting's, or none of its choices."""
    kind = FIELDS[name].type
    kinds = (float, int) if kind is float else (kind,)
    if type(value) not in kinds:
        raise damaged(config, f"has {name} = {value!r}, which is no {kind.__name__}")

    choices = FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        raise damaged(config, f"has {name} = {value!r}, which is none of {', '.join(choices)}")


def damaged(config: Path, what: str) -> UserError:
    return UserError(
        f"{config}: {what}; restore it, or remove it and give the whole command again that began "
        f"the run"
    )


def has_made_something(folder: Path) -> bool:
    """Whether a run has finished anything that its settings must stay true to."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - set(OF_STAGE_01)
    return not all(NOT_YET_MADE.fullmatch(name) for name in names)


def refuse_changes(config: Path, saved: dict, given: dict) -> None:
    """UserError if a setting that is not free is given with another value than the saved one."""
    for name, value in given.items():
        if not FIELDS[name].metadata["free"] and saved[name] != value:
            raise UserError(
                f"{config}: this run has {name} = {saved[name]}, not {value}; "
                f"keep it, or give the changed run its own folder with --run"
            )


def forget_stage_01(folder: Path, changed: set[str]) -> None:
    """Remove what a stage 01 that was refused or stopped made, where it would be made otherwise."""
    there = [name for name in OF_STAGE_01 if (folder / name).exists()]
    if not there or not changed & set(BEHIND_STAGE_01):
        return

    print(f"{folder}: {', '.join(there)} of other settings go, and are made again",
          file=sys.stderr)
    for name in there:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def amend(s: Settings, new: dict) -> Settings:
    """The run's settings, and its config.json, with numbers that follow from its data."""
    s = check(dataclasses.replace(s, **new))

    # What the run was begun with stays: versions, commit and hardware.
    content = read_config(Path(s.run) / "config.json")
    write_config(s, content | {"fitted": list(new)})
    return s


def write_config(s: Settings, made_with: dict) -> None:
    """config.json: the settings, and the versions, commit and hardware `made_with`."""
    # People open this file: the settings come first, also where `made_with` is a whole config.
    content = {"settings": {}}
    content.update(made_with)
    content["settings"] = dataclasses.asdict(s)
    write_json(content, Path(s.run) / "config.json")


# ---- what a result depends on beside the settings ----

def environment() -> dict:
    """Versions, code state and hardware."""
    import torch
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None

    hardware = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {"versions": versions, "commit": git_commit(), "hardware": hardware}


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where it was changed; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def cpu_name() -> str:
    """The processor's name."""
    # Linux names it here; elsewhere Python knows as much as there is to know.
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def main(argv: list[str]) -> None:
    """python -m lib.settings [settings]: start or check a run, and print what the driver needs."""
    from lib.preflight import refuse_lacking
    given, own = parse(argv, __doc__, RUN_ARGUMENTS)
    require(
        re.fullmatch(r"(seed|iter\d+)?", own.redo_from),
        f"--redo-from {own.redo_from}: give seed, iter0, iter1, ...",
    )
    made_in = Path(getattr(own, "from") or config_of(given).parent)

    def before_start(s: Settings) -> None:
        refuse_lacking(s, made_in)

    s, _ = load(argv, __doc__, RUN_ARGUMENTS, create=True, before_start=before_start)
    if has_made_something(Path(s.run)):
        refuse_lacking(s, Path(s.run))

    # The folder stands last, with a slash behind it: the driver's $(...) cuts blank ends.
    print(s.iters, int(needs_prompts(s)), f"{s.run}/", sep="\n")


if __name__ == "__main__":
    run_stage(main)

"""Every setting of a run: its meaning, its value in the three presets, and the paper's.

The first stage saves a run's settings in its config.json; all others read them there. Settings that
are given again must agree with the saved ones, except those marked `free`: they say how to compute,
never what.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from lib.run import UserError, run_stage, write_json

ROOT = Path(__file__).resolve().parent.parent


# What can rank candidates.
REWARDS = ("implicit", "world", "world-aesthetics", "pickscore", "hpsv2", "hpsv2.1", "imagereward",
           "aesthetics")


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

    # ---- 01: human pairs and prompts ----
    # Held-out pairs are not in the paper.
    pairs: str = setting(
        "human pairs: world, a hub dataset id, a folder of Parquet shards, or a CSV, JSONL or "
        "Parquet file with prompt, win, lose",
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
        choices=("ddim", "ddpm", "dpmsolver"))
    sample_steps: int = setting(
        "sampler steps",
        10, 50, 20, paper="SD1.5 50, SDXL 20")
    cfg_scale: float = setting(
        "classifier-free guidance scale; 1 is off",
        2., 7.5, 5., paper="SD1.5 7.5, SDXL 5")

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
        "world, or a list with commas of pickscore, hpsv2, hpsv2.1, imagereward, aesthetics",
        "world", "pickscore,imagereward,aesthetics,hpsv2",
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
        "who ranks: implicit (the model itself), or for online DPO a reward from outside: the "
        "world's, or a score of stage 05",
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
        "that no timestep drowns the others)",
        "plain", paper="plain", choices=("plain", "balanced"))

    # ---- the machine ----
    device: str = setting(
        "auto, cpu, cuda or mps",
        "auto", free=True)
    dtype: str = setting(
        "auto (bf16 on CUDA, float32 elsewhere), float32, bfloat16 or float16",
        "auto", choices=("auto", "float32", "bfloat16", "float16"))
    sample_batch: int = setting(
        "images sampled at once",
        64, 32, 8, free=True)
    rank_batch: int = setting(
        "noised latents per forward in ranking, of whole prompts: at least the N x draws of one",
        320, 80, 20, free=True)
    micro_batch: int = setting(
        "pairs per forward in training; divides batch, the rest is accumulated",
        24, 8, 2, free=True)
    grad_checkpoint: str = setting(
        "recompute activations in the backward pass: less memory, a third more time",
        "off", free=True, choices=("off", "on"))
    compile: str = setting(
        "torch.compile the frozen UNets, which sample, rank and are the reference (minutes as "
        "a stage starts)",
        "off", free=True, choices=("off", "on"))
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

# Runs of earlier versions: the name that the base model had, and settings that are no more, with
# the value at which they did what is done now.
OLD_MODELS = {"lib/tiny": "lib/world/base"}
RETIRED = {"timesteps": "uniform", "min_margin": 0.}

# What a run folder may have before a stage has made anything in it.
NOT_YET_MADE = {"config.json", "ledger.parquet", "log.txt", "code"}

# The packages whose versions a result may depend on.
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "pandas",
            "pyarrow", "numpy")


def has_reference(s: Settings) -> bool:
    """Whether the loss compares the policy with a reference model."""
    return s.loss != "mapo"


def round_prompts(s: Settings, k: int) -> int:
    """The number of new prompts in round k = 1, 2, ..."""
    counts = [int(count) for count in s.iter_prompts.split(",")]

    # The last number holds for all rounds after it.
    return counts[min(k, len(counts)) - 1]


# ---- the parser ----

class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are the project's: one line, and the remedy."""

    def error(self, message):
        raise UserError(f"{message}; --help lists every setting")


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
    """Refuse values that could only fail later."""
    check_bounds(s)

    require(
        s.candidates >= 2,
        f"--candidates {s.candidates}: a pair needs at least 2",
    )
    require(
        s.batch % s.micro_batch == 0,
        f"--micro-batch {s.micro_batch} does not divide --batch {s.batch}",
    )
    require(
        0 <= s.rank_t_min < s.rank_t_max <= 1000,
        f"--rank-t-min {s.rank_t_min} --rank-t-max {s.rank_t_max}: need 0 <= min < max <= 1000",
    )
    require(
        re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", s.iter_prompts),
        f"--iter-prompts {s.iter_prompts}: give a number, or one per round with commas",
    )

    # The embedded world's pairs and prompts only make sense together.
    in_world = [s.pairs == "world", s.prompts == "world", s.eval_prompts in ("world", "dev")]
    require(
        all(in_world) or not any(in_world),
        f"--pairs {s.pairs} --prompts {s.prompts} --eval-prompts {s.eval_prompts}: the embedded "
        f"world's pairs and prompts belong together; give your own for all three or for none",
    )

    require(
        s.track == "off" or importlib.util.find_spec(s.track),
        f"--track {s.track}: the package {s.track} is not installed; install it with pip, or "
        f"leave --track off",
    )

    # Only the embedded world has the oracle's reward.
    require(
        s.pairs == "world" or not s.reward.startswith("world"),
        f"--reward {s.reward}: only the embedded world has it",
    )
    return s


def check_bounds(s: Settings) -> None:
    """Refuse numbers beyond their bounds."""
    for name in ("seed_pairs", "draws", "sample_steps", "batch", "micro_batch", "eval_seeds",
                 "sample_batch", "rank_batch", "checkpoint_every"):
        value = getattr(s, name)
        require(value >= 1, f"{flag(name)} {value}: must be at least 1")

    for name in ("iters", "iter0_steps", "iter_steps", "warmup", "label_noise", "holdout_pairs",
                 "seed", "eval_count", "lora_rank"):
        value = getattr(s, name)
        require(value >= 0, f"{flag(name)} {value}: must not be negative")

    for name in ("beta", "lr"):
        value = getattr(s, name)
        require(value > 0, f"{flag(name)} {value}: must be above 0")

    for name in ("alpha", "flip"):
        value = getattr(s, name)
        require(0 <= value <= 1, f"{flag(name)} {value}: must lie in 0..1")

    # With a dropout of 1 no prompt would be learned at all.
    dropout = s.prompt_dropout
    require(0 <= dropout < 1, f"--prompt-dropout {dropout}: must lie in 0..1")


# ---- config.json ----

def load(argv: list[str], stage_doc: str, extras: dict[str, dict] | None = None,
         create: bool = False) -> tuple[Settings, argparse.Namespace]:
    """The settings of the run that argv names, and the stage's own arguments `extras`.

    A new run folder gets its config.json if `create`; an existing one must agree with what argv
    gives. UserError: it does not, there is no run and none is to be created, or a value is not
    allowed.
    """
    given = vars(build_parser(stage_doc, extras).parse_args(argv))

    # The stage's own arguments are no settings.
    own = argparse.Namespace()
    for name, options in (extras or {}).items():
        name = name.lstrip("-").replace("-", "_")
        value = given.pop(name, options.get("default"))
        setattr(own, name, value)

    preset = given.get("preset", "tiny")
    folder = Path(given.get("run") or ROOT / "runs" / preset)
    config = folder / "config.json"

    # The values of the run, or else of the preset, and over them those that are given.
    changed = []
    if config.exists():
        saved = saved_settings(config)
        changed = changes(saved, given)
        refuse_changes(config, saved, given, changed)
        values = saved | given
    elif create:
        values = PRESETS[preset] | given
    else:
        raise UserError(f"{config} does not exist: start the run with 01_seed.py --run {folder}")
    values["run"] = str(folder)

    s = check(Settings(**values))
    if changed or not config.exists():
        write_config(s, environment())
    return s, own


def saved_settings(config: Path) -> dict:
    """The settings in a config.json, also in one of an earlier version.

    UserError: the run has a retired setting at a value that is no longer done.
    """
    saved = json.loads(config.read_text())["settings"]
    for name, value in RETIRED.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"{config}: this run has {name} = {saved[name]}, a setting that is no more; "
                f"go on with it at the commit that it names, or start another --run"
            )

    settings = {name: value for name, value in saved.items() if name in FIELDS}
    model = settings.get("model")
    settings["model"] = OLD_MODELS.get(model, model)
    return settings


def changes(saved: dict, given: dict) -> list[str]:
    """The settings that are given with another value than the saved one.

    Those that are free to change are left out.
    """
    names = []
    for name, value in given.items():
        if FIELDS[name].metadata["free"]:
            continue
        if name in saved and saved[name] != value:
            names.append(name)
    return names


def refuse_changes(config: Path, saved: dict, given: dict, changed: list[str]) -> None:
    """UserError if the run may not change so.

    A run that has made something keeps its settings; one that has made nothing yet may be
    corrected, but for its preset.
    """
    made = {path.name for path in config.parent.iterdir()} - NOT_YET_MADE
    if changed and (made or "preset" in changed):
        name = changed[0]
        raise UserError(
            f"{config}: this run has {name} = {saved[name]}, not {given[name]}; "
            f"keep it, or give the changed run its own folder with --run"
        )


def amend(s: Settings, new: dict) -> Settings:
    """The run's settings, and its config.json, with changes that follow from its data."""
    s = check(dataclasses.replace(s, **new))

    # What the run was begun with stays: versions, commit and hardware.
    saved = json.loads((Path(s.run) / "config.json").read_text())
    write_config(s, saved)
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
    s, _ = load(argv, __doc__, create=True)
    print(s.iters, s.alpha, s.run)


if __name__ == "__main__":
    run_stage(main)

"""Every setting of a run in one place, with its meaning, the paper's value, and the three presets.

A run's settings are saved in its config.json by the first stage and read by all others. Settings given again must
agree with the saved ones; those marked `free` (how to compute, never what) may change between calls.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from lib.run import UserError, run_stage, write_text

ROOT = Path(__file__).resolve().parent.parent


def setting(default, help: str, paper: str = "", free: bool = False, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "paper": paper, "free": free, "choices": choices})


@dataclass(frozen=True)
class Settings:
    # the run
    preset: str = setting("tiny", "the values to start from", choices=("tiny", "sd15", "sdxl"))
    run: str = setting("", "run folder; empty means runs/<preset>", free=True)
    seed: int = setting(0, "run seed: draws data, noise, timesteps and order")
    iters: int = setting(3, "self-improvement rounds after Iter0", "SD1.5: 3, SDXL: 2")
    model: str = setting("lib/tiny", "base model: a diffusers pipeline, hub id or folder (SD1.x or SDXL)")
    vae: str = setting("", "another VAE, hub id or folder; empty means the model's own")
    resolution: int = setting(32, "pixels per side", "SD1.5: 512, SDXL: 1024")
    # 01: seed
    pairs: str = setting("world", "human pairs: world, a hub dataset id, a folder of Parquet shards, or a CSV, JSONL or "
                                  "Parquet file with prompt, win, lose", "Pick-a-Pic v2")
    prompts: str = setting("world", "prompts of the rounds: world, pairs (the pair source's other prompts), or a file of "
                                    "prompts (text with one a line, CSV, JSON, Parquet)", "Pick-a-Pic v2")
    eval_prompts: str = setting("world", "evaluation prompts: world, dev (the world's, for tuning), or a list with commas "
                                         "of pickapic, hpsv2, parti (each also as name=file) and files of prompts",
                                "Pick-a-Pic validation, HPSv2, PartiPrompts")
    seed_pairs: int = setting(128, "human pairs in the seed", "about 50000 of 0.8M")
    holdout_pairs: int = setting(200, "human pairs kept to measure the self-judge; never trained on")
    iter_prompts: str = setting("48", "new prompts per round; with commas, one number per round, the last one repeats",
                                "SD1.5: 10000,20000,20000; SDXL: 10000,20000")
    label_noise: float = setting(.15, "world only: the annotators' Bradley-Terry temperature, in units of utility")
    # 02: generate
    candidates: int = setting(8, "N, candidates per prompt", "8")
    sampler: str = setting("ddim", "sampler of candidates and evaluation", "SD1.5: ddpm, SDXL: ddim",
                           choices=("ddim", "ddpm", "dpmsolver"))
    sample_steps: int = setting(10, "sampler steps", "SD1.5: 50, SDXL: 20")
    cfg_scale: float = setting(2., "classifier-free guidance scale; 1 is off", "SD1.5: 7.5, SDXL: 5")
    sample_batch: int = setting(64, "images sampled at once", free=True)
    # 03: rank
    reward: str = setting("implicit", "who ranks: implicit (the model itself), or for online DPO world, "
                                      "world-aesthetics or a score of stage 05", "implicit; online DPO: aesthetics")
    draws: int = setting(10, "(timestep, noise) draws per reward, shared by a prompt's candidates", "10")
    rank_t_min: int = setting(0, "lowest timestep of the reward's draws", "0")
    rank_t_max: int = setting(1000, "one past the highest timestep of the reward's draws", "1000")
    timesteps: str = setting("uniform", "the draws' timesteps: each at random, or one at random in each of `draws` equal "
                                        "parts of the range", "uniform", choices=("uniform", "stratified"))
    reward_weights: str = setting("plain", "weight of a draw: plain, or balanced (over the anchor's own error at that "
                                           "draw, so that no timestep drowns the others)", "plain",
                                  choices=("plain", "balanced"))
    anchor: str = setting("base", "reference of the reward; iter0 holds from round 2 on",
                          "the initial anchor (unclear)", choices=("base", "iter0"))
    select: str = setting("best-worst", "how a prompt's pair is chosen", "best-worst", choices=("best-worst", "random"))
    min_margin: float = setting(0., "drop self-made pairs whose margin is below this many of its standard errors", "0")
    rank_batch: int = setting(320, "noised latents per forward in ranking", free=True)
    # 04: train
    loss: str = setting("dpo", "loss of all rounds; mapo (needs no reference) is a rival row of the table", "dpo",
                        choices=("dpo", "mapo"))
    start: str = setting("", "a UNet (hub id or folder) to take as Iter0 instead of training it", "SAIL*: DiffusionDPO's")
    beta: float = setting(2000., "strength of the KL anchor in the loss and scale of the reward", "5000")
    lr: float = setting(2e-5, "learning rate after warm-up", "not given")
    optimizer: str = setting("adamw", "optimizer", "SD1.5: adamw, SDXL: adafactor", choices=("adamw", "adafactor"))
    weight_decay: float = setting(1e-2, "weight decay", "1e-2 (DiffusionDPO)")
    max_grad_norm: float = setting(1., "gradient clipping", "1.0 (DiffusionDPO)")
    warmup: int = setting(10, "linear warm-up steps", "DiffusionDPO: 500 (SD1.5), 200 (SDXL)")
    batch: int = setting(24, "pairs per optimizer step", "128")
    micro_batch: int = setting(24, "pairs per forward; divides batch, the rest is accumulated", free=True)
    iter0_steps: int = setting(100, "optimizer steps of Iter0; 0 means one pass over the seed", "not given")
    iter_steps: int = setting(40, "optimizer steps of a round; 0 means one pass over its mix", "one pass (our reading)")
    alpha: float = setting(.25, "share of self-made pairs in a round's training data, 0..1", "0.25")
    prompt_dropout: float = setting(0., "probability of training on the empty prompt", "0.2 (DiffusionDPO)")
    flip: float = setting(0., "probability of mirroring both pictures of a pair", "0.5 (DiffusionDPO, each picture alone)")
    lora_rank: int = setting(0, "rank of low-rank adapters on the attention layers, which want a higher --lr (SPO: 6e-5 at "
                                "rank 4); 0 trains every weight", "0")
    grad_checkpoint: str = setting("off", "recompute activations in the backward pass: less memory, a third more time",
                                   free=True, choices=("off", "on"))
    checkpoint_every: int = setting(40, "optimizer steps between checkpoints to resume from", free=True)
    # 05: evaluate
    eval_count: int = setting(240, "evaluation prompts of each benchmark; 0 means all", "500, 3200 and 1632")
    eval_seeds: int = setting(2, "images per evaluation prompt and model", "1")
    scores: str = setting("world", "world, or a list with commas of pickscore, hpsv2, hpsv2.1, imagereward, aesthetics",
                          "pickscore,imagereward,aesthetics,hpsv2")
    score_weights: str = setting("", "weights of the scores, where not the published ones: name=path with commas",
                                 free=True)
    # the machine
    compile: str = setting("off", "torch.compile the frozen UNets, which sample, rank and are the reference (minutes as a "
                                  "stage starts)", free=True, choices=("off", "on"))
    device: str = setting("auto", "auto, cpu, cuda or mps", free=True)
    dtype: str = setting("auto", "auto (bf16 on CUDA, float32 elsewhere), float32, bfloat16 or float16",
                         choices=("auto", "float32", "bfloat16", "float16"))


# The paper's runs. Where the paper is silent the choice is ours: the learning rate is DiffusionDPO's rule, 1e-8 for each
# pair of the batch; its 500 warm-up steps were meant for 2,000, here Iter0 has 390; held-out pairs are not in the paper.
SD15 = {"preset": "sd15", "model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "resolution": 512,
        "pairs": "liuhuohuo2/pick-a-pic-v2", "prompts": "pairs", "eval_prompts": "pickapic,hpsv2",
        "seed_pairs": 50_000, "holdout_pairs": 1000, "iter_prompts": "10000,20000,20000", "iters": 3,
        "sampler": "ddpm", "sample_steps": 50, "cfg_scale": 7.5, "sample_batch": 32,
        "beta": 5000., "lr": 1.28e-6, "batch": 128, "micro_batch": 8, "warmup": 40, "iter0_steps": 0, "iter_steps": 0,
        "prompt_dropout": .2, "flip": .5, "checkpoint_every": 100, "rank_batch": 80, "eval_count": 0, "eval_seeds": 1,
        "scores": "pickscore,imagereward,aesthetics,hpsv2"}
SDXL = SD15 | {"preset": "sdxl", "model": "stabilityai/stable-diffusion-xl-base-1.0",
               "vae": "madebyollin/sdxl-vae-fp16-fix", "resolution": 1024, "iter_prompts": "10000,20000", "iters": 2,
               "sampler": "ddim", "sample_steps": 20, "cfg_scale": 5., "sample_batch": 8, "micro_batch": 2,
               "rank_batch": 20, "optimizer": "adafactor"}
PRESETS: dict[str, dict] = {"tiny": {}, "sd15": SD15, "sdxl": SDXL}
ITER = {"--iter": {"type": int, "required": True, "help": "the round: 1, 2, ... (04: 0 is Iter0)"}}


def round_prompts(s: Settings, k: int) -> int:
    """New prompts in round k = 1, 2, ..."""
    counts = [int(count) for count in s.iter_prompts.split(",")]
    return counts[min(k, len(counts)) - 1]


def build_parser(stage_doc: str, extras: dict[str, dict] | None = None) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; --help lists every setting")

    parser = Parser(description=stage_doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for flag, options in (extras or {}).items():
        parser.add_argument(flag, **options)
    group = parser.add_argument_group("settings (with the value of preset tiny, and the paper's)")
    for f in dataclasses.fields(Settings):
        m = f.metadata
        notes = [f"tiny: {f.default}"] + ([f"paper: {m['paper']}"] if m["paper"] else [])
        group.add_argument("--" + f.name.replace("_", "-"), dest=f.name, type=f.type,
                           choices=m["choices"] or None, metavar=None if m["choices"] else f.type.__name__,
                           help=f"{m['help']} ({'; '.join(notes)})".replace("%", "%%"))
    return parser


def check(s: Settings) -> Settings:
    """Refuse values that could only fail later."""
    need = lambda ok, text: None if ok else (_ for _ in ()).throw(UserError(text))
    need(0 <= s.alpha <= 1, f"--alpha {s.alpha}: must lie in 0..1")
    need(s.candidates >= 2, f"--candidates {s.candidates}: a pair needs at least 2")
    need(0 <= s.rank_t_min < s.rank_t_max <= 1000,
         f"--rank-t-min {s.rank_t_min} --rank-t-max {s.rank_t_max}: need 0 <= min < max <= 1000")
    need(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", s.iter_prompts), f"--iter-prompts {s.iter_prompts}: give a number, or one "
         f"per round with commas")
    need((s.pairs == "world") == (s.prompts == "world") == (s.eval_prompts in ("world", "dev")),
         f"--pairs {s.pairs} --prompts {s.prompts} --eval-prompts {s.eval_prompts}: the embedded world's pairs and prompts "
         f"belong together; give your own for all three or for none")
    rewards = ("implicit", "world", "world-aesthetics", "pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetics")
    need(s.reward in rewards, f"--reward {s.reward}: give one of {', '.join(rewards)}")
    need(not s.reward.startswith("world") or s.pairs == "world", f"--reward {s.reward}: only the embedded world has it")
    need(s.reward == "implicit" or not s.min_margin, "--min-margin: only the implicit reward has draws and so an error")
    need(s.draws > 1 or not s.min_margin, "--min-margin: one draw has no error; give --draws 2 or more")
    need(s.batch % s.micro_batch == 0, f"--micro-batch {s.micro_batch} does not divide --batch {s.batch}")
    need(0 <= s.prompt_dropout < 1, f"--prompt-dropout {s.prompt_dropout}: must lie in 0..1")
    need(0 <= s.flip <= 1, f"--flip {s.flip}: must lie in 0..1")
    for name in ("seed_pairs", "draws", "sample_steps", "batch", "micro_batch", "eval_seeds",
                 "sample_batch", "rank_batch", "checkpoint_every"):
        need(getattr(s, name) >= 1, f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1")
    for name in ("iters", "iter0_steps", "iter_steps", "warmup", "label_noise", "holdout_pairs", "seed", "eval_count",
                 "lora_rank", "min_margin"):
        need(getattr(s, name) >= 0, f"--{name.replace('_', '-')} {getattr(s, name)}: must not be negative")
    for name in ("beta", "lr"):
        need(getattr(s, name) > 0, f"--{name} {getattr(s, name)}: must be above 0")
    return s


def load(argv: list[str], stage_doc: str, extras: dict[str, dict] | None = None, create: bool = False):
    """Settings of the run that argv names, and a namespace of the stage's own arguments.

    A new run folder gets its config.json if `create`; an existing one must agree with what argv gives.
    """
    given = vars(build_parser(stage_doc, extras).parse_args(argv))
    own = argparse.Namespace(**{k.lstrip("-").replace("-", "_"): v.get("default") for k, v in (extras or {}).items()})
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    for name in [k for k in given if k not in fields]:
        setattr(own, name, given.pop(name))
    folder = Path(given.get("run") or ROOT / "runs" / given.get("preset", "tiny"))
    config, changed = folder / "config.json", []
    if config.exists():
        saved = json.loads(config.read_text())["settings"]
        changed = [k for k, v in given.items() if not fields[k].metadata["free"] and k in saved and saved[k] != v]
        made = {p.name for p in folder.iterdir()} - {"config.json", "ledger.parquet", "log.txt"}
        if changed and (made or "preset" in changed):          # a run that has made nothing yet may be corrected
            k = changed[0]
            raise UserError(f"{config}: this run has {k} = {saved[k]}, not {given[k]}; keep it, or give the changed "
                            f"run its own folder with --run")
        values = {k: v for k, v in saved.items() if k in fields} | given
    elif create:
        values = PRESETS[given.get("preset", "tiny")] | given
    else:
        raise UserError(f"{config} does not exist: start the run with 01_seed.py --run {folder}")
    s = check(Settings(**(values | {"run": str(folder)})))
    if changed or not config.exists():
        write_text(json.dumps({"settings": dataclasses.asdict(s), **environment()}, indent=1) + "\n", config)
    return s, own


def amend(s: Settings, changes: dict) -> Settings:
    """The run's settings, and its config.json, with changes that follow from its data."""
    s, config = check(dataclasses.replace(s, **changes)), Path(s.run) / "config.json"
    saved = json.loads(config.read_text())
    write_text(json.dumps(saved | {"settings": dataclasses.asdict(s)}, indent=1) + "\n", config)
    return s


def environment() -> dict:
    """Versions, code state and hardware that a result depends on."""
    import torch
    packages = ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "pandas", "pyarrow", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True,
                             text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        git = None
    hardware = {"machine": platform.machine(), "threads": torch.get_num_threads(), "cpu": cpu_name(),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    return {"versions": versions, "commit": git, "hardware": hardware}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":          # python -m lib.settings [settings]: start or check a run; prints iters, alpha, folder
    def main(argv: list[str]) -> None:
        s, _ = load(argv, __doc__, create=True)
        print(s.iters, s.alpha, s.run)
    run_stage(main)

"""DiffusionSPO, a rival row of the table: preferences at every step of the sampler, not at its end.

reads   seed/pairs.parquet, seed/holdout.parquet, their latents, prompts.parquet, the base
writes  RUN/rivals/spo/judge.safetensors     what the preference model has learned
        RUN/rivals/spo/judge.json            its accuracy on held-out human pairs
        RUN/rivals/spo/judge.parquet         tenth, judgements, spo, self_judge: by tenth of t
        RUN/rivals/spo/checkpoint.pt         while it trains
        RUN/rivals/spo/train_log.parquet     a row per walk
        RUN/rivals/spo/unet/                 a row of stage 05; of a LoRA run also lora/

Liang et al. (CVPR 2025, code: RockeyCoss/SPO). A walk goes down the sampler's steps for a batch of
prompts (DDIM with eta 1, guided). From a fifth of the steps on, each is a fork: k candidates
x_{t-1} are drawn from one x_t, a step-aware preference model (preference.py) scores them, the best
and the worst make a pair where the model is sure enough, and the walk goes on from a random one. So
the two of a pair have all their past in common. With p the Gaussian of a step of the sampler,

    r(x_{t-1}) = clamp( p_theta(x_{t-1} | x_t, y) / p_base(x_{t-1} | x_t, y), 0.9, 1.1 )
    L = -log sigmoid( b log r(x_{t-1}^w) - b log r(x_{t-1}^l) )

where log p is a mean over C, h, w. After each walk the policy is trained on its pairs, and walks
on. It stops at as many UNet forwards as the rounds of SAIL take with the settings of the run.

    ./run_sail.sh rival spo --run runs/tiny
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lib import lora, models
from lib.diffusion import repeat
from lib.models import BASE
from lib.plan.counts import counts
from lib.plan.stages import load_stage
from lib.rivals.ddim import Steps, forwards_of_step, step_gaussian, step_log_prob, steps_of
from lib.rivals.preference import SHARE, StepJudge, judge_held_out, learn_judge
from lib.run import (Ledger, UserError, atomic_folder, bar, begin, generator, is_whole,
                     is_whole_model, read_pairs, read_prompts, run_stage, save_tensors, seed_of,
                     write_json, write_table)
from lib.settings import Settings, in_world, load, micro_batch_of
from lib.training import encode_missing, load_checkpoint, same_norms, save_checkpoint

# The published settings (configs/basic_config.py of RockeyCoss/SPO); the sampler's are in ddim.py.
CANDIDATES = 4
BETA = 10.
EPS = .1
LORA_LR = 6e-5

GAP = .3

# In the embedded world the judge has seen far fewer pairs and is less sure: at .3 nearly every fork
# would be lost.
GAP_IN_THE_WORLD = .1

# Of full weights, the best of the study's tuning in the embedded world (lib/study/tune.py): half of
# it gains less, and twice as much loses alignment. For SD1.5 and SDXL it was not tuned.
LR = 1e-6

ARGUMENTS = {
    "--spo-lr": {"type": float, "default": 0., "metavar": "LR",
                 "help": f"learning rate; 0 means {LR:g}, or {LORA_LR:g} for adapters"},
    "--spo-gap": {"type": float, "default": None, "metavar": "GAP",
                  "help": "least difference of the two probabilities for a pair; else "
                          f"{GAP_IN_THE_WORLD:g} in the embedded world, {GAP:g} elsewhere"},
    "--rounds": {"type": int, "default": 0, "metavar": "K",
                 "help": "prompts and forwards of so many rounds; 0 means all that the run has"},
}


# ---- the method: pure functions of tensors ----

def spo_loss(win: torch.Tensor, lose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p_theta - log p_base (B,) of winners and losers -> loss (B,), margin (B,)."""
    # The ratios within 1 - EPS and 1 + EPS; in logarithms, where none can overflow.
    low, high = math.log(1 - EPS), math.log(1 + EPS)
    margin = BETA * win.clamp(low, high) - BETA * lose.clamp(low, high)
    return -F.logsigmoid(margin), margin


def pairs_of_step(scores: torch.Tensor,
                  gap: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (P, k) of k candidates -> indices (P,) of winner and loser, and whether to keep them.

    A pair is kept where the probabilities that the two scores give differ by more than `gap`.
    """
    best, win = scores.max(1)
    worst, lose = scores.min(1)
    p_win = torch.sigmoid(best - worst)
    return win, lose, p_win - (1 - p_win) > gap


# ---- a walk ----

class Parts(NamedTuple):
    """What walks and trains."""
    policy: torch.nn.Module
    ref: torch.nn.Module            # the base
    judge: StepJudge
    steps: Steps
    empty: dict                     # the condition (1, ...) of no prompt
    gap: float


class Pairs(NamedTuple):
    """The pairs of a walk: each field has a row for each pair, on the CPU."""
    number: torch.Tensor            # of the step, (B,)
    prompt: torch.Tensor            # of the walk's prompts, (B,)
    x_t: torch.Tensor               # (B, C, h, w)
    win: torch.Tensor               # x_{t-1}, (B, C, h, w)
    lose: torch.Tensor


@torch.no_grad()
def walk(
    s: Settings,
    parts: Parts,
    condition: dict,
    rng: torch.Generator,
    ledger: Ledger,
) -> Pairs:
    """Go down all steps for P prompts, and bring the pairs of the forks that the judge is sure of.
    """
    device = models.device_of(s)
    steps = parts.steps
    P = len(condition["embeds"])
    rows = torch.arange(P)
    shape = models.latent_shape(s)
    x_t = torch.randn((P, *shape), generator=rng).to(device)

    found = []
    for number in range(len(steps.t)):
        numbers = torch.full((P,), number)
        mean, sigma = step_gaussian(s, parts.policy, steps, numbers, x_t, condition, parts.empty)
        ledger.unet_forwards += forwards_of_step(s, P)

        # A fork has k candidates x_{t-1} of each prompt from one x_t, other steps one.
        count = CANDIDATES if steps.forks(number) else 1
        noise = torch.randn((P, count, *shape), generator=rng).to(device)
        candidates = mean[:, None] + sigma.view(-1, 1, 1, 1, 1) * noise
        if count > 1:
            scores = score_candidates(parts, number, candidates, condition)
            ledger.unet_forwards += round(P * count * SHARE)
            win, lose, sure = pairs_of_step(scores, parts.gap)
            pairs = Pairs(numbers, rows, x_t, candidates[rows, win], candidates[rows, lose])
            found.append([field.cpu()[sure] for field in pairs])

        # On from a random one: the next pair has its whole past in common, too.
        x_t = candidates[rows, torch.randint(count, (P,), generator=rng)]
    return Pairs(*[torch.cat(field) for field in zip(*found)])


def score_candidates(parts: Parts, number: int, candidates: torch.Tensor,
                     condition: dict) -> torch.Tensor:
    """The judge's scores (P, k), on the CPU, of candidates (P, k, C, h, w) where a step leads."""
    P, k = candidates.shape[:2]
    t_prev = parts.steps.t_prev[number].to(candidates.device)
    scores = parts.judge.score(candidates.flatten(0, 1), t_prev, repeat(condition, k))
    return scores.reshape(P, k).cpu()


# ---- training ----

def log_ratios(s: Settings, parts: Parts, pairs: Pairs, condition: dict) -> torch.Tensor:
    """log p_theta - log p_base of B winners and losers: (2, B). The two of a pair share their x_t.

    `condition` has a row for each pair.
    """
    device = models.device_of(s)
    dtype = models.dtype_of(s)
    asked = (parts.steps, pairs.number, pairs.x_t.to(device), condition, parts.empty)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        with torch.no_grad():
            ref_mean, sigma = step_gaussian(s, parts.ref, *asked)
        mean, _ = step_gaussian(s, parts.policy, *asked)

    ratios = []
    for x_prev in (pairs.win.to(device), pairs.lose.to(device)):
        log_prob = step_log_prob(x_prev, mean, sigma)
        ratios.append(log_prob - step_log_prob(x_prev, ref_mean, sigma))
    return torch.stack(ratios)


def train_on(
    s: Settings,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    condition: dict,
    rng: torch.Generator,
    ledger: Ledger,
) -> dict:
    """One pass over the pairs of a walk, in shuffled batches of about `batch`; means over pairs."""
    count = len(pairs.number)
    if count == 0:
        return {"pairs": 0, "loss": math.nan}

    trained = [p for p in parts.policy.parameters() if p.requires_grad]
    losses, margins = [], []
    for batch in torch.randperm(count, generator=rng).chunk(math.ceil(count / s.batch)):
        for rows in batch.split(s.micro_batch):
            some = Pairs(*[field[rows] for field in pairs])
            of_these = {name: values[some.prompt] for name, values in condition.items()}
            loss, margin = spo_loss(*log_ratios(s, parts, some, of_these))
            (loss.sum() / len(batch)).backward()
            losses.append(loss.detach())
            margins.append(margin.detach())
            ledger.unet_forwards += 2 * forwards_of_step(s, len(rows))

        torch.nn.utils.clip_grad_norm_(trained, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ledger.optimizer_steps += 1
    return {"pairs": count, "loss": torch.cat(losses).mean().item(), **means(torch.cat(margins))}


def means(margin: torch.Tensor) -> dict:
    """The log's numbers of the margins (B,) of a walk's pairs."""
    # Where both ratios are at the same bound nothing is learned: half right.
    undecided = (margin == 0).float().mean().item()
    right = (margin > 0).float().mean().item()
    return {"margin": margin.mean().item(), "accuracy": right + .5 * undecided,
            "at_bounds": undecided}


def load_models(s: Settings) -> tuple:
    """The policy, to be trained in float32, and the base, which is its reference."""
    ref = models.load_unet(s, BASE)
    if s.lora_rank:
        policy = models.load_unet(s, BASE)
        lora.add_adapters(policy, s.lora_rank, Path(s.run) / "none", seed_of(s.seed, "lora", "spo"))
    else:
        policy = models.load_unet(s, BASE, trained=True)
        same_norms(ref, policy)
    if s.grad_checkpoint == "on":
        policy.enable_gradient_checkpointing()
    return policy, ref


def one_walk(
    s: Settings,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    condition: dict,
    rng: torch.Generator,
    ledger: Ledger,
) -> dict:
    """A walk and the training on its pairs; returns the walk's row of the log."""
    started = time.perf_counter()
    forwards, steps = ledger.unet_forwards, ledger.optimizer_steps

    # Who only draws is in evaluation mode.
    parts.policy.eval()
    pairs = walk(s, parts, condition, rng, ledger)
    parts.policy.train()
    row = train_on(s, parts, optimizer, pairs, condition, rng, ledger)

    forks = sum(parts.steps.forks(number) for number in range(len(parts.steps.t)))
    return row | {
        "sure": row["pairs"] / (forks * len(condition["embeds"])),
        "lr": s.lr,
        "gap": parts.gap,
        "steps": ledger.optimizer_steps - steps,
        "unet_forwards": ledger.unet_forwards - forwards,
        "seconds": time.perf_counter() - started,
    }


def train(
    s: Settings,
    parts: Parts,
    prompts: list[str],
    budget: int,
    ledger: Ledger,
    checkpoint: Path,
) -> pd.DataFrame:
    """Walk and train until `budget` UNet forwards are spent; the log has a row per walk."""
    trained = {name: p for name, p in parts.policy.named_parameters() if p.requires_grad}
    optimizer = load_stage("04").make_optimizer(s, list(trained.values()))
    encoder = models.PromptEncoder(s).prepare(prompts)

    # A training that was stopped goes on from its last whole walk.
    log = load_checkpoint(checkpoint, trained, optimizer)
    refuse_other_settings(s, parts, log, checkpoint)
    spent = sum(row["unet_forwards"] for row in log)
    progress = bar(None, "spo", "forward", total=budget, initial=spent, unit_scale=True)
    while spent < budget or not log:
        # Other prompts for every walk.
        rng = generator(s.seed, "spo", len(log))
        chosen = torch.randperm(len(prompts), generator=rng)[:s.batch]
        condition = encoder([prompts[i] for i in chosen])
        row = one_walk(s, parts, optimizer, condition, rng, ledger)
        if row["pairs"] and not math.isfinite(row["loss"]):
            raise UserError(f"{checkpoint.parent}, walk {len(log) + 1}: the loss is not finite; "
                            f"remove the folder and give a lower --spo-lr (now {s.lr})")

        log.append({"step": len(log)} | row)
        save_checkpoint(checkpoint, trained, optimizer, log)
        spent += row["unet_forwards"]
        progress.update(row["unet_forwards"])
        progress.set_postfix(loss=f"{row['loss']:.3f}", sure=f"{row['sure']:.2f}")
    progress.close()
    return pd.DataFrame(log)


def refuse_other_settings(s: Settings, parts: Parts, log: list[dict], checkpoint: Path) -> None:
    """UserError if a training that goes on was begun with another learning rate or gap."""
    if log and (log[0]["lr"], log[0]["gap"]) != (s.lr, parts.gap):
        raise UserError(f"{checkpoint.parent}: was begun with --spo-lr {log[0]['lr']} --spo-gap "
                        f"{log[0]['gap']}; give these again, or remove the folder")


def save_model(s: Settings, policy, folder: Path) -> None:
    """Write unet/ in float32, whole or not at all; with LoRA also lora/, fused in unet/."""
    if s.lora_rank:
        lora.save_adapter(policy, folder / "lora")
        on_cpu = replace(s, device="cpu")
        base = models.load_unet(on_cpu, BASE, trained=True)
        policy = lora.fuse(base, folder / "lora")

    policy = policy.to("cpu")
    with atomic_folder(folder / "unet") as temporary:
        policy.save_pretrained(temporary)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# ---- the rival: read, compute, write ----

def prompts_of(s: Settings, rounds: int) -> list[str]:
    """The prompts of the run's rounds, which SAIL's candidates have too."""
    prompts = []
    for k in range(1, rounds + 1):
        prompts += read_prompts(s.run, f"iter{k}").prompt.tolist()
    return prompts


def budget_of(s: Settings, rounds: int) -> int:
    """UNet forwards of Iter0 and so many rounds of the run: all but the pairs and the evaluation.
    """
    table = counts(s)
    return int(table[table.iter <= rounds].unet_forwards.sum())


def judge_of(s: Settings, folder: Path, ledger: Ledger) -> tuple[StepJudge, dict]:
    """The preference model, learned and measured, or read where it is there; and its facts."""
    judge = StepJudge(models.load_unet(s, BASE))
    file = folder / "judge.safetensors"
    if is_whole(file):
        judge.weights = load_file(file)["weights"]
        return judge, json.loads((folder / "judge.json").read_text())

    pairs = read_pairs(s.run, "seed/pairs.parquet", "01_seed.py")
    holdout = None
    tables = {"seed/pairs.parquet": pairs}
    if s.holdout_pairs:
        holdout = read_pairs(s.run, "seed/holdout.parquet", "01_seed.py")
        tables["seed/holdout.parquet"] = holdout
    encode_missing(replace(s, flip=0.), tables)

    facts = learn_judge(s, judge, pairs, ledger)
    if holdout is not None:
        accuracy, table = judge_held_out(s, judge, holdout, ledger)
        facts |= accuracy
        write_table(table, folder / "judge.parquet")
    facts["unet_forwards"] = ledger.unet_forwards
    write_json(facts, folder / "judge.json")
    save_tensors({"weights": judge.weights}, file)
    return judge, facts


def gap_of(s: Settings, given: float | None) -> float:
    """How sure the preference model must be of a pair."""
    if given is not None:
        return given
    if in_world(s):
        return GAP_IN_THE_WORLD
    return GAP


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ARGUMENTS)
    lr = own.spo_lr or (LORA_LR if s.lora_rank else LR)
    gap = gap_of(s, own.spo_gap)
    s = replace(s, lr=lr, compile="off", micro_batch=micro_batch_of(s, 1))
    rounds = own.rounds or s.iters
    if rounds == 0:
        raise UserError(f"{s.run}: has no rounds, whose prompts SPO takes; give --iters 1 or more "
                        f"to a new run, in another --run")
    folder = Path(s.run) / "rivals" / "spo"
    row = f"05_eval.py --run {s.run} --row spo={folder}/unet"
    if is_whole_model(folder / "unet"):
        print(f"spo: {folder}/unet is there; {row}")
        return
    begin(s.run, __file__)

    # read
    prompts = prompts_of(s, rounds)

    # compute and write
    with Ledger(s.run, "spo", None, str(models.device_of(s))) as ledger:
        policy, ref = load_models(s)
        judge, facts = judge_of(s, folder, ledger)
        empty = models.PromptEncoder(s).prepare(prompts).unconditional()
        parts = Parts(policy, ref, judge, steps_of(s), empty, gap)
        budget = budget_of(s, rounds) - facts["unet_forwards"]
        log = train(s, parts, prompts, budget, ledger, folder / "checkpoint.pt")
        if not log.pairs.any():
            raise UserError(f"{folder}: the preference model was sure of no fork; remove the "
                            f"folder and give a lower --spo-gap (now {gap})")
        write_table(log, folder / "train_log.parquet")
        save_model(s, policy, folder)

    spent = facts["unet_forwards"] + log.unet_forwards.sum()
    accuracy = f"{facts['accuracy']:.2f}" if "accuracy" in facts else "not measured"
    print(f"spo: preference model {accuracy} on held-out pairs, sure of {log.sure.mean():.0%} of "
          f"the forks | {log.steps.sum()} steps, {spent} UNet forwards\n{row}")


if __name__ == "__main__":
    run_stage(main)

"""Stage 04: Diffusion-DPO on human pairs (Iter0), then on a mix of human and self-made pairs.

reads   seed/pairs.parquet, iterK/pairs.parquet, their latents,
        the model of round K-1 (Iter0: the base)
writes  iterK/checkpoint.pt       while it trains: where a stopped training goes on
        iterK/unet/               a diffusers folder
        iterK/lora/               with --lora-rank: the adapter, for pipe.load_lora_weights
        iterK/train_log.parquet   step, loss, win_error_gain, lose_error_gain, margin, accuracy, lr,
                                  grad_norm, seconds

With e(x_0) the mean over C, h, w of (eps - eps_hat(x_t, y, t))^2, and the same t and eps for the
two pictures of a pair,

    margin = -(beta / 2) [ (e_theta(x_w) - e_ref(x_w)) - (e_theta(x_l) - e_ref(x_l)) ]
    L = -log sigmoid(margin)

averaged over pairs after the log-sigmoid (Diffusion-DPO, Wallace et al. 2024, equation 14). Policy
theta and reference ref both start as the previous round's model; theta is trained, ref stays. A
round's data is alpha self-made and (1 - alpha) human pairs (ranked preference mixup): the human
part keeps later rounds from collapsing onto the model's own taste.

On pairs that are seen once the loss stays near log 2 = 0.693, since one (t, eps) says little about
a pair; on few pairs, seen again and again, it falls, which is memory. Watch the gains (reference
error minus policy error: above zero, the policy is better than the reference), their difference
(margin) and the implicit accuracy instead.

    python 04_train_dpo.py --run runs/tiny --iter 1
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

import math
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from lib import lora, models, tracking
from lib.diffusion import denoising_error, join
from lib.finite import refuse_unfinite_batch
from lib.judge import read_judge
from lib.models import BASE
from lib.rivals.mapo import mapo_loss
from lib.run import (TRAIN_LOG_COLUMNS, Ledger, atomic_folder, bar, begin, generator, is_main,
                     is_whole_model, my_share, process_state, read_pairs, run_stage, seed_of, wait,
                     write_table)
from lib.settings import ITER, Settings, has_reference, load, micro_batch_of
from lib.training import (encode_missing, gather_pairs, is_checkpoint_due, is_finite_loss,
                          load_checkpoint, log_row, same_norms, save_checkpoint, sum_gradients,
                          watch, watch_result)

# ---- the method: pure functions of tensors ----

def dpo_loss(
    win: torch.Tensor,
    lose: torch.Tensor,
    ref_win: torch.Tensor,
    ref_lose: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 14 of Diffusion-DPO: denoising errors (B,) of policy and reference on winners and
    losers -> loss (B,), margin (B,)."""
    margin = -beta / 2 * ((win - ref_win) - (lose - ref_lose))
    return -F.logsigmoid(margin), margin


# The door for a rival's loss: an entry here, with dpo_loss's arguments, and its name among the
# choices of the setting `loss`.
LOSSES = {"dpo": dpo_loss, "mapo": mapo_loss}


def mixup(
    n_human: int,
    n_self: int,
    alpha: float,
    length: int,
    rng: torch.Generator,
) -> torch.Tensor:
    """Ranked preference mixup: which pair each of `length` places of the training trains on.

    Pairs 0 to n_human - 1 are human, those from n_human on self-made; a share alpha of the places
    is self-made.
    """
    # Self-made places are spread evenly, so that every batch has its share: a place is self-made
    # where its number times alpha passes a whole number (1e-9 is against rounding).
    place = torch.arange(length, dtype=torch.float64)
    before = (place * alpha + 1e-9).floor()
    after = ((place + 1) * alpha + 1e-9).floor()
    is_self = after > before
    is_human = ~is_self

    order = torch.empty(length, dtype=torch.long)
    order[is_human] = shuffled_passes(n_human, int(is_human.sum()), rng)
    order[is_self] = n_human + shuffled_passes(n_self, int(is_self.sum()), rng)
    return order


def shuffled_passes(count: int, length: int, rng: torch.Generator) -> torch.Tensor:
    """`length` numbers below `count` in whole shuffled passes: none comes twice before all came."""
    if length == 0:
        return torch.empty(0, dtype=torch.long)
    passes = []
    for _ in range(math.ceil(length / count)):
        passes.append(torch.randperm(count, generator=rng))
    return torch.cat(passes)[:length]


def steps_of(s: Settings, k: int, n_human: int, n_self: int) -> int:
    """Optimizer steps: as set, or one pass over the human pairs (Iter0) or the round's mix.

    In the mix each self-made pair comes once.
    """
    if k == 0:
        steps, places = s.iter0_steps, n_human
    elif s.alpha == 0:
        steps, places = s.iter_steps, n_human
    else:
        steps, places = s.iter_steps, n_self / s.alpha

    if steps == 0:
        steps = max(1, round(places / s.batch))
    return steps


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up, then constant."""
    return s.lr * min(1., (step + 1) / (s.warmup + 1))


# ---- one batch of pairs ----

def step_randoms(s: Settings, k: int, step: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The random numbers of one optimizer step, one row for each of its `batch` pairs.

    They depend on (run seed, round, step) alone, whatever process or micro-batch uses them.
    """
    B = s.batch
    rng = generator(s.seed, "train", k, step)

    # The two pictures of a pair share t and noise; each has its own sample of the VAE's posterior.
    t = torch.randint(1000, (B,), generator=rng)
    noise = torch.randn((B, *shape), generator=rng)
    posterior = torch.randn((2, B, *shape), generator=rng)          # winners', losers'
    posterior = posterior.movedim(0, 1)                             # a row for each pair

    # Which pairs train on the empty prompt, and which are mirrored.
    drop = torch.rand(B, generator=rng) < s.prompt_dropout
    flip = torch.rand(B, generator=rng) < s.flip
    return {"t": t, "noise": noise, "posterior": posterior, "drop": drop, "flip": flip}


def pair_errors(
    s: Settings,
    policy,
    ref,
    schedule,
    pairs: pd.DataFrame,
    randoms: dict,
    encoder: models.PromptEncoder,
) -> torch.Tensor:
    """Denoising errors (4, B) on B pairs: win, lose (with gradient), ref_win, ref_lose.

    `randoms` are those of these pairs. `ref` may be None: a LoRA policy is its own reference, with
    its adapter off, or as it was when the round began (lora.reference_of).
    """
    device = models.device_of(s)

    # Winners, then losers. A latent that the VAE has made is sampled from its posterior; the
    # sampler's own, of a picture that the run has painted, has std 0.
    images = [Path(s.run) / image for image in (*pairs.win, *pairs.lose)]
    flips = randoms["flip"].tolist()
    mean, std = models.stack_latents(images, flips + flips)
    posterior = randoms["posterior"].movedim(1, 0).flatten(0, 1)
    x_0 = mean + std * posterior                                                # (2B, C, h, w)
    x_0 = x_0.to(device)

    # The two pictures of a pair meet the same timestep, the same noise and the same prompt.
    t = randoms["t"].repeat(2).to(device)                                       # (2B,)
    noise = randoms["noise"].repeat(2, 1, 1, 1).to(device)                      # (2B, C, h, w)
    prompts = []
    for prompt, drop in zip(pairs.prompt, randoms["drop"]):
        prompts.append("" if drop else prompt)
    condition = encoder(prompts)
    condition = join(condition, condition)

    dtype = models.dtype_of(s)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        ref_error = reference_error(s, policy, ref, schedule, x_0, t, noise, condition)
        error = denoising_error(policy, schedule, x_0, t, noise, condition)
    return torch.cat([error, ref_error]).reshape(4, len(pairs))


@torch.no_grad()
def reference_error(
    s: Settings,
    policy,
    ref,
    schedule,
    x_0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    condition: dict,
) -> torch.Tensor:
    """The reference's errors (2B,); not a number for a loss without a reference."""
    if not has_reference(s):
        return torch.full((len(t),), float("nan"), device=x_0.device)

    if ref is None:
        with lora.reference_of(policy) as reference:
            return denoising_error(reference, schedule, x_0, t, noise, condition)
    return denoising_error(ref, schedule, x_0, t, noise, condition)


def backward(
    s: Settings,
    policy,
    ref,
    schedule,
    pairs: pd.DataFrame,
    randoms: dict,
    encoder: models.PromptEncoder,
    ledger: Ledger,
) -> torch.Tensor:
    """Add the gradient of the mean loss over a batch of pairs to the policy's parameters.

    Returns (6, B): the four errors, loss and margin of every pair. Under torch.no_grad that is all
    it does. Micro-batches bound the memory, and several processes share them.
    """
    values = []
    for rows in my_share(torch.arange(s.batch).split(s.micro_batch)):
        part = {name: numbers[rows] for name, numbers in randoms.items()}
        errors = pair_errors(s, policy, ref, schedule, pairs.iloc[rows.tolist()], part, encoder)
        loss, margin = LOSSES[s.loss](*errors, s.beta)

        # The mean over the batch is taken here, after the log-sigmoid.
        if torch.is_grad_enabled():
            (loss.sum() / s.batch).backward()

        values.append(torch.stack([*errors, loss, margin]).detach())
        ledger.unet_forwards += len(rows) * forwards_per_pair(s)
    return torch.cat(values, 1)


def forwards_per_pair(s: Settings) -> int:
    """UNet forwards: the policy on two pictures, and the reference too if the loss has one."""
    if has_reference(s):
        return 4
    return 2


# ---- models ----

def adapter_base(s: Settings, k: int) -> int:
    """The model that round k's adapter stands on: the base, or Iter0 where --start gave it."""
    if s.start and k > 0:
        return 0
    return BASE


def load_policy_and_reference(s: Settings, k: int) -> tuple:
    """Both are model k-1. The policy is trained in float32; the reference is frozen, and None where
    the policy itself can play it (LoRA) or none is needed (MaPO)."""
    # A compiled reference would round in other places than the policy does.
    s = replace(s, compile="off")
    ref = None
    if s.lora_rank:
        policy = models.load_unet(s, adapter_base(s, k)).train()
        last = Path(s.run) / f"iter{k - 1}" / "lora"
        lora.add_adapters(policy, s.lora_rank, last, seed_of(s.seed, "lora", k))
    else:
        policy = models.load_unet(s, k - 1, trained=True)
        if has_reference(s):
            ref = models.load_unet(s, k - 1)

            # Under autocast too the two are to begin equal, to the bit.
            same_norms(ref, policy)

    if s.grad_checkpoint == "on":
        policy.enable_gradient_checkpointing()
    return policy, ref


def make_optimizer(s: Settings, parameters: list) -> torch.optim.Optimizer:
    if s.optimizer == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(
            parameters,
            lr=s.lr,
            weight_decay=s.weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    on_cuda = models.device_of(s).type == "cuda"
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=on_cuda)


def save_model(s: Settings, k: int, policy) -> None:
    """Write iterK/unet in float32, whole or not at all; with LoRA also iterK/lora, whose adapter is
    added to the weights of the base in iterK/unet."""
    folder = Path(s.run) / f"iter{k}"
    if s.lora_rank:
        lora.save_adapter(policy, folder / "lora")

        # The device has no room for a whole model beside the one that was trained.
        on_cpu = replace(s, device="cpu")
        base = models.load_unet(on_cpu, adapter_base(s, k), trained=True)
        policy = lora.fuse(base, folder / "lora")

    # The folder gets its name when it is whole; the checkpoint is then of no more use.
    policy = policy.to("cpu")
    with atomic_folder(folder / "unet") as temporary:
        policy.save_pretrained(temporary)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


# ---- training ----

def training_pairs(s: Settings, k: int) -> tuple[pd.DataFrame, int]:
    """Human pairs, then (in a round that uses them) self-made ones; and how many are human."""
    names = {"seed/pairs.parquet": "01_seed.py"}
    if k > 0 and s.alpha > 0:
        names[f"iter{k}/pairs.parquet"] = f"03_rank.py --iter {k}"

    tables = []
    for name, made_by in names.items():
        tables.append(read_pairs(s.run, name, made_by))

    # Pictures without a latent are encoded: one's own, and with --flip all of them mirrored.
    encode_missing(s, dict(zip(names, tables)))
    return pd.concat(tables, ignore_index=True), len(tables[0])


def train(
    s: Settings,
    k: int,
    pairs: pd.DataFrame,
    n_human: int,
    ledger: Ledger,
    checkpoint: Path,
) -> tuple:
    """The trained UNet, and the log with one row per step."""
    policy, ref = load_policy_and_reference(s, k)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer = make_optimizer(s, parameters)
    schedule = models.load_schedule(s)
    encoder = models.PromptEncoder(s)
    if is_main():
        encoder.prepare(pairs.prompt.tolist())
    wait()

    # Which pair each place of the training trains on, for all steps at once.
    n_self = len(pairs) - n_human
    steps = steps_of(s, k, n_human, n_self)
    alpha = s.alpha if k > 0 else 0.
    order = mixup(n_human, n_self, alpha, steps * s.batch, generator(s.seed, "mix", k))
    shape = models.latent_shape(s)

    # A training that was stopped goes on from its last checkpoint.
    log = load_checkpoint(checkpoint, trained, optimizer)
    first = len(log)
    before = tracking.steps_before(s, k)
    tracker = tracking.start(s, "train", before + first)
    progress = bar(range(first, steps), f"iter{k} training", "step", initial=first, total=steps)
    for step in progress:
        started = time.perf_counter()
        lr = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Gradients of the batch's mean loss.
        places = order[step * s.batch:(step + 1) * s.batch]
        batch = pairs.iloc[places.tolist()]
        randoms = step_randoms(s, k, step, shape)
        values = backward(s, policy, ref, schedule, batch, randoms, encoder, ledger)
        values = gather_pairs(values)
        sum_gradients(parameters)

        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ledger.optimizer_steps += 1

        seconds = time.perf_counter() - started
        row = log_row(values, step, lr, grad_norm, seconds)
        log.append(row)
        tracking.log(tracker, "train", row, before + step)
        progress.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}")

        # A training that can only get worse stops here.
        if not is_finite_loss(row):
            refuse_unfinite_batch(s, batch, randoms["flip"].tolist())
        watch(row, k, s)

        if is_checkpoint_due(s, step + 1, steps) and is_main():
            save_checkpoint(checkpoint, trained, optimizer, log)
    tracking.finish(tracker)

    # No further step tells what the last one did, so its batch is looked at once more.
    batch = pairs.iloc[order[-s.batch:].tolist()]
    randoms = step_randoms(s, k, steps - 1, shape)
    with torch.no_grad():
        values = backward(s, policy, ref, schedule, batch, randoms, encoder, ledger)
    watch_result(gather_pairs(values), parameters, k, steps, s)
    return policy, pd.DataFrame(log)


# ---- the stage: read, compute, write ----

def summary_line(k: int, log: pd.DataFrame, judge_file: Path) -> str:
    """A round in one line: the self-judge that made its pairs, and the second half of its steps."""
    judge = ""
    facts = read_judge(judge_file)
    if facts:
        accuracy = "not measured"
        if facts["pairs"]:
            accuracy = f"{facts['accuracy']:.2f} [{facts['low']:.2f}, {facts['high']:.2f}]"
        judge = (f"self-judge {accuracy}, diversity {facts['diversity']:.3f}, "
                 f"self-pair margin {facts['margin']:.2f} | ")

    last = log.tail(max(1, len(log) // 2)).mean()
    gains = ""
    if log.win_error_gain.notna().all():                      # MaPO has no reference to gain on
        gains = (f"winner gain {last.win_error_gain:+.1e}, "
                 f"loser gain {last.lose_error_gain:+.1e}, ")
    return (f"Iter{k}: {judge}{len(log)} steps: loss {last.loss:.3f}, {gains}"
            f"margin {last.margin:+.2f}, implicit accuracy {last.accuracy:.2f}")


def main(argv: list[str]) -> None:
    s, stage = load(argv, __doc__, ITER)
    k = stage.iter
    folder = Path(s.run) / f"iter{k}"
    if is_whole_model(folder / "unet"):
        print(f"04 train: {folder}/unet is there, nothing to do")
        return
    s = replace(s, micro_batch=micro_batch_of(s, process_state().num_processes))
    if is_main():
        begin(s.run, __file__)

    # SAIL* (--start): Iter0 is given.
    if s.start and k == 0:
        take_start(s)
        return

    # read
    pairs, n_human = training_pairs(s, k)

    # compute and write
    with Ledger(s.run, "04_train_dpo", k, str(models.device_of(s))) as ledger:
        policy, log = train(s, k, pairs, n_human, ledger, folder / "checkpoint.pt")
        if is_main():
            write_table(log[list(TRAIN_LOG_COLUMNS)], folder / "train_log.parquet")
            save_model(s, k, policy)
    if is_main():
        print(summary_line(k, log, folder / "judge.json"))


def take_start(s: Settings) -> None:
    from lib.rivals.given_start import load_start
    if is_main():
        save_model(replace(s, lora_rank=0), 0, load_start(s))
        print(f"Iter0: {s.start}, as given")


if __name__ == "__main__":
    run_stage(main)

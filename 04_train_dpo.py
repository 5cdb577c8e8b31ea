"""Stage 04: Diffusion-DPO on human pairs (Iter0), then on the mix of human and self-made pairs (round K).

reads   seed/pairs.parquet, iterK/pairs.parquet, their latents, the model of round K-1 (Iter0: the base)
writes  iterK/unet/ (a diffusers folder), iterK/train_log.parquet (step, loss, win_error_gain, lose_error_gain,
        margin, accuracy, lr, grad_norm, seconds), with --lora-rank also iterK/lora/ (for pipe.load_lora_weights)

With e(x) = mean over C, h, w of ||eps - eps_hat(x_t, y, t)||^2, the same t and eps for the two images of a pair,

    L = -log sigmoid( -(beta / 2) [ (e_theta(x_w) - e_ref(x_w)) - (e_theta(x_l) - e_ref(x_l)) ] )

averaged over pairs after the log-sigmoid (Diffusion-DPO, Wallace et al. 2024, equation 14). Policy and reference both
start from the previous round's model. A round's data is alpha self-made + (1 - alpha) human pairs (ranked preference
mixup): what keeps later rounds from collapsing onto the model's own taste.

The loss stays near log 2 = 0.693: one (t, eps) says little about a pair. Watch the gains (reference error minus
policy error, above zero is better than the reference), their difference (margin) and the implicit accuracy instead.

    python 04_train_dpo.py --run runs/tiny --iter 1
"""

import json
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather
from tqdm import tqdm

from lib import lora, models
from lib.run import Ledger, UserError, atomic, generator, open_image, read_pairs, run_stage, seed_of, write_table
from lib.settings import ITER, Settings, load

STRAY = 3.           # stop when the policy's error on winners is this many times the reference's (without a reference:
                     # 1, the error of a model that predicts zero): it has diverged
MAPO_BETA, MAPO_S, MAPO_T = .1, .5, 1000.                    # as MaPO's authors train (Hong et al. 2024)


def dpo_loss(win: torch.Tensor, lose: torch.Tensor, ref_win: torch.Tensor, ref_lose: torch.Tensor,
             beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Diffusion-DPO: denoising errors (B,) of policy and reference on winners and losers -> loss (B,), margin (B,)."""
    margin = -beta / 2 * ((win - ref_win) - (lose - ref_lose))
    return -F.logsigmoid(margin), margin


def mapo_loss(win: torch.Tensor, lose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MaPO, the rival without a reference: errors (B,) of the policy -> loss (B,), margin (B,).

    phi(e) = s e / (exp(s e) - 1) falls from 1 at e = 0; L = e_w - beta log sigmoid(T (phi(e_w) - phi(e_l))).
    """
    scaled = lambda e: (MAPO_S * e).clamp_min(1e-12)                      # for the limit at e = 0
    phi = lambda e: scaled(e) / torch.expm1(scaled(e))
    margin = MAPO_T * (phi(win) - phi(lose))
    return win - MAPO_BETA * F.logsigmoid(margin), margin


def mixup(n_seed: int, n_self: int, alpha: float, length: int, rng: torch.Generator) -> torch.Tensor:
    """Which pair each of `length` slots trains on: 0..n_seed-1 human, n_seed.. self-made; alpha of them self-made.

    Self-made slots are spread evenly, so every batch has its share; each source is gone through in whole shuffled
    passes, so no pair is seen twice before all of its source are seen once.
    """
    slots = torch.arange(length)
    is_self = ((slots + 1) * alpha + 1e-9).floor() > (slots * alpha + 1e-9).floor()
    order = torch.empty(length, dtype=torch.long)
    for chosen, count, start in ((~is_self, n_seed, 0), (is_self, n_self, n_seed)):
        need = int(chosen.sum())
        passes = [torch.randperm(count, generator=rng) for _ in range(-(-need // count))] if need else []
        order[chosen] = start + torch.cat(passes)[:need] if need else order[chosen]
    return order


def steps_of(s: Settings, k: int, n_seed: int, n_self: int) -> int:
    """As set, or one pass: over the seed in Iter0, in a round over the mix in which each self-made pair comes once."""
    fixed = s.iter_steps if k else s.iter0_steps
    size = n_self / s.alpha if k and s.alpha > 0 else n_seed
    return fixed or max(1, round(size / s.batch))


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up, then constant."""
    return s.lr * min(1., (step + 1) / (s.warmup + 1))


def step_draws(s: Settings, k: int, step: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The random numbers of one whole optimizer step (batch pairs), whatever process or micro-batch uses them."""
    rng = generator(s.seed, "train", k, step)
    return {"t": torch.randint(1000, (s.batch,), generator=rng), "noise": torch.randn((s.batch, *shape), generator=rng),
            "posterior": torch.randn((2, s.batch, *shape), generator=rng),
            "drop": torch.rand(s.batch, generator=rng) < s.prompt_dropout,
            "flip": torch.rand(s.batch, generator=rng) < s.flip}


def pair_errors(s, policy, ref, scheduler, pairs: pd.DataFrame, draws: dict, encoder) -> torch.Tensor:
    """(4, B) denoising errors: policy on winners and losers (with gradient), reference on winners and losers."""
    run, device, b = Path(s.run), models.device_of(s), len(pairs)
    mean, std = models.stack_latents([run / i for i in (*pairs.win, *pairs.lose)], draws["flip"].tolist() * 2)
    latents = (mean + std * draws["posterior"].flatten(0, 1)).to(device)                         # (2B, C, h, w)
    t, noise = draws["t"].repeat(2).to(device), draws["noise"].repeat(2, 1, 1, 1).to(device)    # shared by the pair
    x_t = scheduler.add_noise(latents, noise, t)
    condition = encoder(["" if d else p for p, d in zip(pairs.prompt, draws["drop"])])
    condition = models.join(condition, condition)
    with torch.autocast(device.type, models.dtype_of(s), enabled=models.dtype_of(s) != torch.float32):
        ref_error = torch.full((2 * b,), float("nan"), device=device)
        if s.loss == "dpo":
            with torch.no_grad(), lora.reference_of(policy) if ref is None else nullcontext(ref) as model:
                ref_error = models.denoising_error(model, scheduler, x_t, latents, noise, t, condition)
        error = models.denoising_error(policy, scheduler, x_t, latents, noise, t, condition)
    return torch.cat([error, ref_error]).reshape(4, b)


def load_policy(s: Settings, k: int) -> tuple:
    """The UNet to train, and the reference, both model K-1; with LoRA the reference is the policy's own adapter off."""
    if s.lora_rank:
        policy, ref = models.load_unet(replace(s, compile="off"), lora_base(s, k)).train(), None
        lora.add_adapters(policy, s.lora_rank, Path(s.run) / f"iter{k - 1}" / "lora", seed_of(s.seed, "lora", k))
    else:
        policy = models.load_unet(s, k - 1, trained=True)
        ref = models.load_unet(s, k - 1) if s.loss == "dpo" else None
    if s.grad_checkpoint == "on":
        policy.enable_gradient_checkpointing()
    return policy, ref


def lora_base(s: Settings, k: int) -> int:
    """The number of the model that round K's adapter stands on: the base, or Iter0 where --start gave it."""
    return 0 if s.start and k else -1


def save_model(s: Settings, k: int, policy) -> None:
    """iterK/unet in float32; with LoRA also iterK/lora, and in iterK/unet the base with the adapter in its weights."""
    folder = Path(s.run) / f"iter{k}"
    if s.lora_rank:
        lora.save_adapter(policy, folder / "lora")
        policy = lora.fuse(models.load_unet(s, lora_base(s, k), trained=True), folder / "lora")
    shutil.rmtree(folder / "unet.tmp", ignore_errors=True)
    policy.save_pretrained(folder / "unet.tmp")
    (folder / "unet.tmp").rename(folder / "unet")
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def make_optimizer(s: Settings, parameters):
    if s.optimizer == "adafactor":
        from transformers.optimization import Adafactor
        return Adafactor(parameters, lr=s.lr, weight_decay=s.weight_decay, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=models.device_of(s).type == "cuda")


def training_pairs(s: Settings, k: int) -> tuple[pd.DataFrame, int]:
    """Human pairs, then (in a round that uses them) self-made ones; and how many are human."""
    pairs = [read_pairs(s.run, "seed/pairs.parquet", "01_seed.py")]
    if k and s.alpha > 0:
        pairs.append(read_pairs(s.run, f"iter{k}/pairs.parquet", f"03_rank.py --iter {k}"))
    table = pd.concat(pairs, ignore_index=True)
    files, names = [Path(s.run) / i for i in (*table.win, *table.lose)], ["seed/pairs.parquet", f"iter{k}/pairs.parquet"]
    where = [(Path(s.run) / name, row) for name, part in zip(names, pairs) for row in range(len(part))] * 2
    for mirrored in [False, True] if s.flip else [False]:
        models.ensure_latents(files, s, lambda i: open_image(files[i], *where[i]), mirrored)
    return table, len(pairs[0])


def train(s: Settings, k: int, pairs: pd.DataFrame, n_human: int, ledger: Ledger) -> tuple:
    """The trained UNet and the log."""
    state, folder = PartialState(), Path(s.run) / f"iter{k}"
    policy, ref = load_policy(s, k)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    optimizer, scheduler = make_optimizer(s, parameters), models.load_schedule(s)
    encoder = models.PromptEncoder(s)
    if state.is_main_process:
        encoder.prepare(pairs.prompt.tolist())
    state.wait_for_everyone()
    steps = steps_of(s, k, n_human, len(pairs) - n_human)
    if s.batch // s.micro_batch % state.num_processes:
        raise UserError(f"--batch {s.batch} in micro-batches of {s.micro_batch} does not divide among "
                        f"{state.num_processes} processes; choose --micro-batch so that it does")
    order = mixup(n_human, len(pairs) - n_human, s.alpha if k else 0., steps * s.batch, generator(s.seed, "mix", k))
    shape = models.stack_latents([Path(s.run) / pairs.win[0]])[0].shape[1:]
    log, start, checkpoint = [], 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=models.device_of(s), weights_only=True)
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved["unet"][name])
        optimizer.load_state_dict(saved["optimizer"])
        log, start = saved["log"], saved["step"]
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=f"iter{k} training", unit="step",
               disable=not state.is_local_main_process)
    for step in bar:
        started, lr = time.perf_counter(), learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows, draws = order[step * s.batch:(step + 1) * s.batch], step_draws(s, k, step, shape)
        parts = []
        for slots in torch.arange(s.batch).split(s.micro_batch)[state.process_index::state.num_processes]:
            part = {name: v[:, slots] if name == "posterior" else v[slots] for name, v in draws.items()}
            errors = pair_errors(s, policy, ref, scheduler, pairs.iloc[rows[slots].tolist()], part, encoder)
            loss, margin = dpo_loss(*errors, s.beta) if s.loss == "dpo" else mapo_loss(*errors[:2])
            (loss.sum() / s.batch).backward()
            parts.append(torch.cat([errors, loss[None], margin[None]]).detach())
            ledger.unet_forwards += (4 if s.loss == "dpo" else 2) * len(slots)
        parts = torch.cat(parts, 1)
        if state.num_processes > 1:                           # every process took its share of the micro-batches
            parts = gather(parts[None]).movedim(0, 1).flatten(1)
            for p in parameters:
                torch.distributed.all_reduce(p.grad)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        log.append(log_row(parts, step, lr, grad_norm, time.perf_counter() - started))
        watch(log[-1], k, s)
        bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", accuracy=f"{log[-1]['accuracy']:.2f}")
        ledger.optimizer_steps += 1
        if (step + 1) % s.checkpoint_every == 0 and step + 1 < steps and state.is_main_process:
            with atomic(checkpoint) as temporary:
                torch.save({"unet": trained, "optimizer": optimizer.state_dict(), "step": step + 1,
                            "log": log}, temporary)
    return policy, pd.DataFrame(log)


def log_row(parts: torch.Tensor, step: int, lr: float, grad_norm: torch.Tensor, seconds: float) -> dict:
    """One line of the log from (6, B): four errors, loss, margin. Gains are reference minus policy error."""
    win, lose, ref_win, ref_lose, loss, margin = parts
    values = torch.stack([loss.mean(), (ref_win - win).mean(), (ref_lose - lose).mean(), margin.mean(),
                          (margin > 0).float().mean() + .5 * (margin == 0).float().mean(), grad_norm, win.mean(),
                          ref_win.mean()])
    names = ("loss", "win_error_gain", "lose_error_gain", "margin", "accuracy", "grad_norm", "win_error", "ref_error")
    return {"step": step, **dict(zip(names, values.tolist())), "lr": lr, "seconds": seconds}


def watch(row: dict, k: int, s: Settings) -> None:
    """Stop a run that can only get worse; the last checkpoint stays."""
    if not torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all():
        raise UserError(f"iter{k}, step {row['step']}: the loss is not finite ({row['loss']}); lower --lr (now {s.lr}) "
                        f"or use --dtype float32, in another --run; nothing after the last checkpoint was kept")
    if row["win_error"] > STRAY * (row["ref_error"] if s.loss == "dpo" else 1):
        raise UserError(f"iter{k}, step {row['step']}: the policy's error on winners ({row['win_error']:.3g}) is over "
                        f"{STRAY:g} times the reference's, it has diverged; lower --lr (now {s.lr}) or raise --beta (now "
                        f"{s.beta}), in another --run; nothing after the last checkpoint was kept")


def summary_line(k: int, log: pd.DataFrame, judge: Path) -> str:
    """A round in one line: the self-judge that made its pairs, and the second half of its training."""
    last, said = log.tail(max(1, len(log) // 2)).mean(), ""
    if judge.exists():
        j = json.loads(judge.read_text())
        accuracy = f"{j['accuracy']:.2f} [{j['low']:.2f}, {j['high']:.2f}]" if j["pairs"] else "not measured"
        said = f"self-judge {accuracy}, diversity {j['diversity']:.3f}, self-pair margin {j['margin']:.2f} | "
    gains = f"winner gain {last.win_error_gain:+.1e}, loser gain {last.lose_error_gain:+.1e}, "
    gains = gains if log.win_error_gain.notna().all() else ""                 # MaPO has no reference to gain on
    return (f"Iter{k}: {said}{len(log)} steps: loss {last.loss:.3f}, {gains}margin {last.margin:+.2f}, "
            f"implicit accuracy {last.accuracy:.2f}")


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, ITER)
    k, folder = own.iter, Path(s.run) / f"iter{own.iter}"
    if (folder / "unet").exists():
        return print(f"04 train: {folder}/unet is there, nothing to do")
    if s.start and k == 0:
        from lib import rows
        if PartialState().is_main_process:
            save_model(replace(s, lora_rank=0), 0, rows.load_unet(replace(s, dtype="float32"), s.start))
        return print(f"Iter0: {s.start}, as given")
    pairs, n_human = training_pairs(s, k)
    with Ledger(s.run, "04_train_dpo", k, str(models.device_of(s))) as ledger:
        policy, log = train(s, k, pairs, n_human, ledger)
        if PartialState().is_main_process:
            columns = ["step", "loss", "win_error_gain", "lose_error_gain", "margin", "accuracy", "lr", "grad_norm",
                       "seconds"]
            write_table(log[columns], folder / "train_log.parquet")
            save_model(s, k, policy)
    PartialState().print(summary_line(k, log, folder / "judge.json"))


if __name__ == "__main__":
    run_stage(main)

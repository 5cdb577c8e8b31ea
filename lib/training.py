"""What stage 04 needs beside the method: latents, processes, the log and its watch, the checkpoint.

The loss, the mix and the loop are in the stage itself.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from lib import models
from lib.run import UserError, atomic, is_main, open_image, process_state
from lib.settings import Settings, has_reference

# A run whose policy has an error on winners of this many times the reference's has diverged, and
# stops. Without a reference it is compared with 1, the error of a model that predicts zero.
STRAY = 3.

# Gradients are summed over the processes in pieces of this size: fewer calls than parameters, and
# not twice the memory of all gradients.
BUCKET_BYTES = 64 * 2 ** 20


# ---- latents ----

def encode_missing(s: Settings, tables: dict[str, pd.DataFrame]) -> None:
    """Encode the pictures of pairs that have no latent; with --flip also their mirror images.

    `tables` are the tables of pairs, by their paths in the run folder.
    """
    # Each picture, and where it is named: all winners, then all losers.
    run = Path(s.run)
    images, places = [], []
    for side in ("win", "lose"):
        for name, table in tables.items():
            for row, image in enumerate(table[side], start=1):
                images.append(run / image)
                places.append((run / name, row))

    def open_picture(i):
        table, row = places[i]
        return open_image(images[i], table, row)

    models.ensure_latents(images, s, open_picture)
    if s.flip:
        models.ensure_latents(images, s, open_picture, mirrored=True)


# ---- a policy and its reference ----

def same_norms(ref: nn.Module, policy: nn.Module) -> None:
    """Give the reference the policy's normalisation weights in float32.

    Autocast computes all other layers of both in the reference's precision, and normalisation in
    that of its weights. So the two are the same model before the first step, to the bit.
    """
    for mine, other in zip(ref.modules(), policy.modules()):
        if isinstance(mine, (nn.GroupNorm, nn.LayerNorm)):
            mine.float().load_state_dict(other.state_dict())


# ---- several processes, one batch ----

def gather_pairs(values: torch.Tensor) -> torch.Tensor:
    """The values (n, pairs) of all processes' pairs side by side."""
    if process_state().num_processes == 1:
        return values
    from accelerate.utils import gather
    return gather(values[None]).movedim(0, 1).flatten(1)


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes.

    A parameter that no process has a gradient for keeps none.
    """
    if process_state().num_processes == 1:
        return
    from torch.distributed import ReduceOp, all_reduce
    used = [parameter.grad is not None for parameter in parameters]
    used = torch.tensor(used, dtype=torch.int32, device=parameters[0].device)
    all_reduce(used, ReduceOp.MAX)

    gradients = []
    for parameter, is_used in zip(parameters, used.tolist()):
        if is_used and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if is_used:
            gradients.append(parameter.grad)

    for bucket in buckets(gradients):
        summed = torch.cat([gradient.flatten() for gradient in bucket])
        all_reduce(summed)
        parts = summed.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts):
            gradient.copy_(part.view_as(gradient))


def buckets(tensors: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """The tensors, in their order, in lists of about BUCKET_BYTES."""
    bucket, size = [], 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


# ---- the log, and what a training is stopped for ----

def log_row(
    values: torch.Tensor,
    step: int,
    lr: float,
    grad_norm: torch.Tensor,
    seconds: float,
) -> dict:
    """One line of the log from (6, B) errors, losses and margins: means over the pairs.

    Gains are reference minus policy error; a margin of exactly zero counts as half right.
    """
    win, lose, ref_win, ref_lose, loss, margin = values
    right = (margin > 0).float().mean()
    undecided = (margin == 0).float().mean()
    row = {
        "loss": loss.mean(),
        "win_error_gain": (ref_win - win).mean(),
        "lose_error_gain": (ref_lose - lose).mean(),
        "margin": margin.mean(),
        "accuracy": right + .5 * undecided,
        "grad_norm": grad_norm,
        "win_error": win.mean(),
        "ref_error": ref_win.mean(),
    }

    # The device is asked once for all of them.
    numbers = torch.stack(list(row.values())).tolist()
    return {"step": step, **dict(zip(row, numbers)), "lr": lr, "seconds": seconds}


def is_finite_loss(row: dict) -> bool:
    """Whether loss and gradient of a line of the log are finite."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def watch(row: dict, k: int, s: Settings) -> None:
    """UserError if a line of the log tells of a training that can only get worse.

    The last checkpoint stays.
    """
    where = f"iter{k}, step {row['step']}"
    reference_fails = has_reference(s) and not math.isfinite(row["ref_error"])
    if not is_finite_loss(row) and (row["step"] == 0 or reference_fails):
        raise UserError(f"{where}: the loss or its gradient is not finite ({row['loss']}) before "
                        f"any training could matter; use --dtype float32, in another --run")
    if not is_finite_loss(row):
        raise UserError(f"{where}: the loss is not finite ({row['loss']}); lower --lr (now {s.lr}) "
                        f"or use --dtype float32, in another --run; nothing after the last "
                        f"checkpoint was kept")

    reference = 1.
    if has_reference(s):
        reference = row["ref_error"]
    if row["win_error"] > STRAY * reference:
        raise UserError(f"{where}: the policy's error on winners ({row['win_error']:.3g}) is over "
                        f"{STRAY:g} times the reference's, it has diverged; lower --lr (now "
                        f"{s.lr}) or raise --beta (now {s.beta}), in another --run; nothing after "
                        f"the last checkpoint was kept")


def watch_result(values: torch.Tensor, parameters: list, k: int, steps: int, s: Settings) -> None:
    """UserError if the last of a training's steps has ruined the model: it is not written.

    `values` (6, B) are those of the last batch, after its step.
    """
    no_gradient = torch.zeros((), device=values.device)
    watch(log_row(values, steps, 0., no_gradient, 0.), k, s)
    for parameter in parameters:
        if not parameter.isfinite().all():
            raise UserError(f"iter{k}: the trained weights are not finite; lower --lr (now {s.lr}),"
                            f" in another --run; nothing after the last checkpoint was kept")


# ---- where a stopped training goes on ----

def is_checkpoint_due(s: Settings, done: int, steps: int) -> bool:
    """Whether to keep a checkpoint after so many steps of all.

    The last step needs one only where the model is still to be put together from an adapter, which
    may fail for lack of memory or disk.
    """
    if done == steps:
        return s.lora_rank > 0
    return done % s.checkpoint_every == 0


def save_checkpoint(path: Path, trained: dict, optimizer, log: list[dict]) -> None:
    """Keep the trained parameters by name, the optimizer's states, and the log of the steps."""
    state = {"unet": trained, "optimizer": optimizer.state_dict(), "log": log}
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, trained: dict, optimizer) -> list[dict]:
    """Put back what a stopped training had reached; return the log of its steps.

    A checkpoint that is damaged, or of another training, is left aside: the log is then empty.
    """
    if not path.exists():
        return []
    try:
        return restore(path, trained, optimizer)
    # Garbage in a file of pickled tensors raises nearly every kind of error.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if is_main():
            print(f"{path}: not usable ({type(error).__name__}: {reason}); the training of this "
                  f"round begins anew")
        return []


def restore(path: Path, trained: dict, optimizer) -> list[dict]:
    """As `load_checkpoint`, but for the errors, which leave parameters and optimizer as they were.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")

    # The device's memory is full with what trains: the file is read on the CPU, page by page where
    # all of it is copied from there (what is on the CPU becomes the optimizer's own).
    on_cpu = all(parameter.device.type == "cpu" for parameter in trained.values())
    state = torch.load(path, map_location="cpu", mmap=not on_cpu, weights_only=True)

    shapes = {name: weight.shape for name, weight in state["unet"].items()}
    if shapes != {name: parameter.shape for name, parameter in trained.items()}:
        raise ValueError("its weights are of another model")
    if not all({"step", "loss"} <= row.keys() for row in state["log"]):
        raise ValueError("its log is none")

    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["unet"][name])
    return state["log"]

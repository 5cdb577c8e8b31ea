"""What stage 04 needs beside the method: its checkpoint, the sum over processes, a like reference.

The loss, the mix and the loop are in the stage itself.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from lib.run import atomic, is_main, process_state

# Gradients are summed over the processes in pieces of this size: fewer calls than parameters, and
# not twice the memory of all gradients.
BUCKET_BYTES = 64 * 2 ** 20


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


# ---- where a stopped training goes on ----

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

"""From counts and seconds to what a user wants to know: hours, disk, arithmetic, memory, a table.

A `row` here is a dict of lib/plan/counts.py's table: the stage, its round and what it counts.
"""

from collections.abc import Callable

import pandas as pd
import torch

from lib import models
from lib.plan.architecture import Architecture, architecture_of, pair_arithmetic
from lib.plan.counts import counts, eval_prompts
from lib.plan.probe import Probe
from lib.settings import Settings, has_reference, round_prompts

# Bytes per pixel of a photograph as run.save_image writes it; bytes of a safetensors file's header.
PNG, JPEG = 2.0, 0.7
HEADER = 150

# The columns that are numbers of things, and their titles.
WHOLE_NUMBERS = {"images": "images", "unet_forwards": "UNet forwards", "optimizer_steps": "steps"}


def plan(s: Settings, processes: int) -> tuple[pd.DataFrame, Probe]:
    """The table counts(s) with `tflop`, `disk_bytes` and `hours` on `processes` devices like this.

    Returned beside it is the probe from which they follow.
    """
    table = counts(s)
    architecture = architecture_of(s)
    probe = Probe(s, architecture).run()

    tflop, disk_bytes, hours = [], [], []
    for row in table.to_dict("records"):
        tflop.append(arithmetic_of(s, probe.flops, row) / 1e12)
        disk_bytes.append(disk_of(s, architecture, probe.parameters, row))
        hours.append(hours_of(s, probe.seconds, row) / processes)
    return table.assign(tflop=tflop, disk_bytes=disk_bytes, hours=hours), probe


# ---- what a stage costs ----

def hours_of(s: Settings, seconds: dict[str, float], row: dict) -> float:
    """Hours of a stage on one device; `seconds` are those of Probe."""
    total = row["encodes"] * seconds["encode"] + row["decodes"] * seconds["decode"]

    # Ranking's batches are not sampling's, and a step has its optimizer.
    if row["stage"] == "04_train_dpo":
        step = s.batch * seconds["pair"] + seconds["step"]
        total += row["optimizer_steps"] * step
    elif row["stage"] == "03_rank":
        total += row["unet_forwards"] * seconds["rank"]
    else:
        total += row["unet_forwards"] * seconds["sample"]
    return total / 3600


def arithmetic_of(s: Settings, flops: Callable[[str], float], row: dict) -> float:
    """FLOP of a stage; `flops` is that of Probe."""
    # In training the backwards count, which are no forwards of the ledger.
    forwards = row["unet_forwards"]
    if row["optimizer_steps"]:
        pairs = row["optimizer_steps"] * s.batch
        forwards = pairs * pair_arithmetic(s)

    unet = forwards * flops("unet")
    return unet + row["encodes"] * flops("encode") + row["decodes"] * flops("decode")


def disk_of(s: Settings, architecture: Architecture, parameters: int, row: dict) -> int:
    """Bytes that a stage leaves behind: pictures, latents, prompt embeddings, a UNet in float32."""
    stage = row["stage"]
    from_outside = stage == "01_seed" and s.pairs != "world"

    # People's own pictures stay JPEG; painted ones are PNG.
    bytes_per_pixel = PNG
    if from_outside:
        bytes_per_pixel = JPEG
    size = row["images"] * s.resolution ** 2 * bytes_per_pixel

    # Of an encoded picture the mean and the std of its posterior are kept.
    side = s.resolution // architecture.factor
    values = architecture.vae["latent_channels"] * side ** 2
    itemsize = models.dtype_of(s).itemsize
    size += row["encodes"] * (2 * itemsize * values + HEADER)

    # Of a painted one the sampler's own latent, in float32; the evaluation keeps none.
    keeps_latents = stage == "02_generate" or (stage == "01_seed" and not from_outside)
    if keeps_latents:
        size += row["images"] * (4 * values + HEADER)

    if stage == "01_seed":
        size += count_prompts(s) * itemsize * values_of_prompt(architecture)
    if stage == "04_train_dpo":
        size += 4 * parameters
    return int(size)


def count_prompts(s: Settings) -> int:
    """The prompts of a run, whose embeddings stage 01 keeps."""
    total = s.seed_pairs + s.holdout_pairs + eval_prompts(s)
    for k in range(1, s.iters + 1):
        total += round_prompts(s, k)
    return total


def values_of_prompt(architecture: Architecture) -> int:
    """Numbers in a prompt's embedding, with SDXL's pooled one."""
    unet = architecture.unet
    pooled = unet.get("projection_class_embeddings_input_dim") or 0
    return architecture.tokens * unet["cross_attention_dim"] + pooled


# ---- memory ----

def describe_memory(s: Settings, probe: Probe) -> str:
    """What training holds for every weight and, on CUDA, the measured peaks beside the card."""
    parts = bytes_in_training(s, probe)
    words = [f"{name} {in_gb(size)}" for name, size in parts.items() if size]
    total = in_gb(sum(parts.values()))
    text = f"memory in training: {' + '.join(words)} = {total} and activations"
    if probe.device.type != "cuda":
        return f"{text} (measured on CUDA only)"

    card = torch.cuda.get_device_properties(probe.device).total_memory
    peaks = ", ".join(f"{name} {in_gb(size)}" for name, size in probe.peak.items())
    verdict = "does NOT fit"
    if max(probe.peak.values()) < 0.95 * card:
        verdict = "fits"
    return f"{text}\nmeasured peaks: {peaks}; the card has {in_gb(card)}: {verdict}"


def bytes_in_training(s: Settings, probe: Probe) -> dict[str, int]:
    """Bytes of policy, reference, gradients and optimizer.

    Trained weights, their gradients and AdamW's two states are float32, frozen weights are in the
    run's dtype. An adapter (LoRA) is too small to count, and so are Adafactor's states.
    """
    frozen = probe.parameters * probe.dtype.itemsize
    trained = 4 * probe.parameters
    if s.lora_rank:
        return {"policy": frozen}

    parts = {"policy": trained}
    if has_reference(s):
        parts["reference"] = frozen
    parts["gradients"] = trained
    if s.optimizer == "adamw":
        parts["optimizer"] = 2 * trained
    return parts


def checkpoint_bytes(s: Settings, probe: Probe) -> int:
    """Disk that checkpoints take while a model trains: two, as one goes when the next is whole."""
    # A checkpoint holds the trained weights, in float32, and the states of AdamW.
    bytes_of_weight = 12
    if s.lora_rank:
        bytes_of_weight = 0
    elif s.optimizer == "adafactor":
        bytes_of_weight = 4
    return 2 * bytes_of_weight * probe.parameters


def in_gb(size: float) -> str:
    """A number of bytes in words."""
    if size < 1e10:
        return f"{size / 1e9:.2g} GB"
    return f"{size / 1e9:.0f} GB"


# ---- the printed report ----

def print_report(s: Settings, table: pd.DataFrame, probe: Probe, processes: int) -> None:
    """The plan's table, and below it what was measured and what is left out."""
    # Whose hours these are.
    device = probe.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name()
    dtype = str(probe.dtype).removeprefix("torch.")
    print(f"plan of preset {s.preset} on {processes} x {device}, {dtype}; "
          f"from {probe.architecture.source}, with random weights")

    total = sum_up(table)
    shown = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    print(readable(shown).to_string(index=False))

    # What does not depend on the device.
    forward, encode, decode = [probe.flops(what) / 1e12 for what in ("unet", "encode", "decode")]
    at_100 = total["tflop"] / 100 / 3600
    print(f"one picture: UNet forward {forward:.3g} TFLOP, VAE encode {encode:.3g}, "
          f"decode {decode:.3g}; all of it at 100 TFLOP/s: {at_100:,.2g} hours")

    # What does.
    print("measured here:")
    for note in probe.notes:
        print(f"  {note}")
    print(describe_memory(s, probe))

    checkpoints = checkpoint_bytes(s, probe) / 1e9
    print(f"while a model trains its checkpoint takes up to {checkpoints:.1f} GB more disk")
    print("not in the hours: scores of stage 05, prompt embeddings, downloads, files, "
          "starting Python")


def sum_up(table: pd.DataFrame) -> dict:
    """The table's last row: the whole run."""
    total = table[[*WHOLE_NUMBERS, "tflop", "disk_bytes", "hours"]].sum().to_dict()
    return {"stage": "in all", **total}


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as people read it: all cells are texts, zeros are empty."""
    rows = []
    for row in table.to_dict("records"):
        cells = {"stage": row["stage"], "round": ""}
        if not pd.isna(row["iter"]):
            cells["round"] = str(row["iter"])
        for column, title in WHOLE_NUMBERS.items():
            cells[title] = f"{row[column]:,.0f}" if row[column] else ""
        cells["TFLOP"] = f"{row['tflop']:,.0f}" if row["tflop"] >= 100 else f"{row['tflop']:,.1f}"
        cells["disk, GB"] = f"{row['disk_bytes'] / 1e9:,.2f}"
        cells["hours"] = f"{row['hours']:,.1f}" if row["hours"] >= 1 else f"{row['hours']:.2g}"
        rows.append(cells)
    return pd.DataFrame(rows)

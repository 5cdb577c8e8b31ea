"""From counts and seconds to what a user wants to know: hours, disk, arithmetic, memory, a table.

A `row` here is a dict of lib/plan/counts.py's table: the stage, its round and what it counts.
"""

import shlex
from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from lib.plan.architecture import architecture_of, pair_arithmetic
from lib.plan.cards import Card, Estimate
from lib.plan.counts import counts, forwards_of_training
from lib.plan.disk import (bytes_needed, checkpoint_bytes, disk_of, downloads, free_disk,
                           parts_of_run)
from lib.plan.memory import FITS, Memory, smaller
from lib.plan.pilot import WATCH, command_of, pilot_of, targets
from lib.plan.probe import Probe
from lib.settings import Settings, flag

# The columns that are numbers of things, and their titles.
WHOLE_NUMBERS = {"images": "images", "unet_forwards": "UNet forwards", "optimizer_steps": "steps"}


def plan(s: Settings, processes: int,
         card: Card | None = None) -> tuple[pd.DataFrame, Probe | Estimate, Memory]:
    """The table counts(s) with `tflop`, `disk_bytes`, `hours`, and the memory of each stage.

    The hours are those of `processes` devices like this one, or like the card if one is given.
    Returned beside the table is what they follow from.
    """
    architecture = architecture_of(s)
    speed = Probe(s, architecture).run() if card is None else Estimate(s, architecture, card)
    memory = Memory(s, architecture, speed.device.type == "cuda")

    table = counts(s)
    rows = table.to_dict("records")
    table["tflop"] = [arithmetic_of(s, speed.flops, row) / 1e12 for row in rows]
    table["disk_bytes"] = [disk_of(s, architecture, speed.parameters, row) for row in rows]
    table["hours"] = [hours_of(s, speed.seconds, row) / processes for row in rows]
    table["device_bytes"] = table.stage.map(memory.device)
    table["host_bytes"] = table.stage.map(memory.host)
    return table, speed, memory


# ---- what a stage costs ----

def hours_of(s: Settings, seconds: dict[str, float], row: dict) -> float:
    """Hours of a stage on one device; `seconds` are those of Probe."""
    total = row["encodes"] * seconds["encode"] + row["decodes"] * seconds["decode"]

    # A step has its optimizer, and ranking's batches are not sampling's.
    total += row["optimizer_steps"] * (s.batch * seconds["pair"] + seconds["step"])
    call = "rank" if row["stage"] in ("03_rank", "crossfit") else "sample"
    total += forwards_beside_training(s, row) * seconds[call]
    return total / 3600


def arithmetic_of(s: Settings, flops: Callable[[str], float], row: dict) -> float:
    """FLOP of a stage; `flops` is that of Probe."""
    # In training the backwards count, which are no forwards of the ledger.
    pairs = row["optimizer_steps"] * s.batch
    forwards = pairs * pair_arithmetic(s) + forwards_beside_training(s, row)
    unet = forwards * flops("unet")
    return unet + row["encodes"] * flops("encode") + row["decodes"] * flops("decode")


def forwards_beside_training(s: Settings, row: dict) -> int:
    """UNet forwards of a stage that paint or rank."""
    return row["unet_forwards"] - forwards_of_training(s, row["optimizer_steps"])


def hours_of_run(s: Settings, seconds: dict[str, float], processes: int) -> float:
    """Hours of all stages together."""
    return sum(hours_of(s, seconds, row) for row in counts(s).to_dict("records")) / processes


def in_gb(size: float) -> str:
    """A number of bytes in words."""
    if size < 1e10:
        return f"{size / 1e9:.2g} GB"
    return f"{size / 1e9:,.0f} GB"


# ---- the printed report ----

def print_report(s: Settings, table: pd.DataFrame, speed: Probe | Estimate, memory: Memory,
                 processes: int, argv: list[str]) -> None:
    """The plan's table, and below it what it follows from, memory, disk, downloads and a pilot.

    `argv` is the command line, from which that of the pilot is made.
    """
    dtype = str(speed.dtype).removeprefix("torch.")
    print(f"plan of preset {s.preset} on {processes} x {speed.where}, {dtype}; "
          f"from {speed.architecture.source}")
    total = sum_up(table)
    shown = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    print(readable(shown).to_string(index=False))

    # What does not depend on the device, and what does.
    forward, encode, decode = [speed.flops(what) / 1e12 for what in ("unet", "encode", "decode")]
    at_100 = total["tflop"] / 100 / 3600
    print(f"one picture: UNet forward {forward:.3g} TFLOP, VAE encode {encode:.3g}, "
          f"decode {decode:.3g}; all of it at 100 TFLOP/s: {at_100:,.2g} hours")
    print("the hours:")
    for note in speed.notes:
        print(f"  {note}")
    print("  not in them: scores of stage 05 (nor is their memory in the table), prompt "
          "embeddings, downloads, files, starting Python, compiling")

    for line in (*describe_memory(s, speed, memory), describe_disk(s, speed.parameters),
                 *describe_parts(s, speed), describe_downloads(s, speed),
                 *describe_pilot(s, speed, processes, argv)):
        print(line)


def describe_memory(s: Settings, speed: Probe | Estimate, memory: Memory) -> list[str]:
    """What training holds for every weight, the highest peak, and whether it fits."""
    parts = memory.held_in_training(s) | {"activations": memory.activations(s)}
    words = [f"{name} {in_gb(size)}" for name, size in parts.items()]
    lines = [f"memory in training: {' + '.join(words)} = {in_gb(sum(parts.values()))}"]

    # What was measured counts; the rest is counted from the model's shapes.
    peaks = speed.peak or memory.device
    if speed.peak:
        told = ", ".join(f"{name} {in_gb(size)}" for name, size in peaks.items())
        lines.append(f"measured peaks: {told}")
    highest = max(peaks.values())
    if highest <= FITS * speed.capacity:
        lines.append(f"the highest peak, {in_gb(highest)}, fits into {speed.where}'s "
                     f"{in_gb(speed.capacity)}")
        return lines

    advice = "no setting of this project does; take a larger one"
    changes = smaller(memory, speed.capacity)
    if changes:
        advice = "this does: " + as_flags(changes)
    elif changes is not None:
        advice = "by the count of shapes all but the encoding would; try smaller batches"
    lines.append(f"the highest peak, {in_gb(highest)}, does NOT fit into {speed.where}'s "
                 f"{in_gb(speed.capacity)}; {advice}")
    return lines


def as_flags(changes: dict) -> str:
    """Settings as the command line has them."""
    return " ".join(f"{flag(name)} {value}" for name, value in changes.items())


def describe_disk(s: Settings, parameters: int) -> str:
    """What the run still needs, beside what is free."""
    needed = bytes_needed(s)
    free, folder = free_disk(s)
    verdict = "enough" if needed < free else "NOT enough; give another disk's folder with --run"
    return (f"disk: {in_gb(needed)} still to be written, {in_gb(checkpoint_bytes(s, parameters))} "
            f"of it a training's checkpoints; {folder} has {in_gb(free)} free: {verdict}")


def describe_parts(s: Settings, speed: Probe | Estimate) -> list[str]:
    """What takes the disk, part by part, and what it would be with every picture kept."""
    parts = parts_of_run(s, speed.architecture, speed.parameters)
    lines = [f"the run's disk, --keep {s.keep}:"]
    lines += [f"  {name:<26} {in_gb(size):>8}" for name, size in parts.items()]
    total = f"  {'in all':<26} {in_gb(sum(parts.values())):>8}"
    if s.keep != "all":
        everything = parts_of_run(replace(s, keep="all"), speed.architecture, speed.parameters)
        total += f" (with --keep all {in_gb(sum(everything.values()))})"
    return [*lines, total]


def describe_downloads(s: Settings, speed: Probe | Estimate) -> str:
    """What is fetched, as far as it is not here."""
    parts = downloads(s, speed.architecture, speed.parameters)
    words = [f"{name} {in_gb(size)}" for name, size in parts.items()]
    return f"downloads, about: {', '.join(words) or 'none'}"


def describe_pilot(s: Settings, speed: Probe | Estimate, processes: int,
                   argv: list[str]) -> list[str]:
    """A pilot of a long run, what to look for in it, and the paper's numbers."""
    def hours(settings: Settings) -> float:
        return hours_of_run(settings, speed.seconds, processes)

    pilot = pilot_of(s, hours)
    if pilot is None:
        return []
    lines = [f"a pilot first, {hours(pilot):,.1f} of {hours(s):,.0f} hours:",
             f"  {shlex.join(command_of(pilot, s, argv))}", "before the rest is spent, look for:"]
    lines += [f"  - {line}" for line in WATCH]
    return lines + targets(s.preset)


def sum_up(table: pd.DataFrame) -> dict:
    """The table's last row: the whole run, of memory the highest peak."""
    total = table[[*WHOLE_NUMBERS, "tflop", "disk_bytes", "hours"]].sum().to_dict()
    peaks = table[["device_bytes", "host_bytes"]].max().to_dict()
    return {"stage": "in all", **total, **peaks}


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
        cells["device, GB"] = f"{row['device_bytes'] / 1e9:,.1f}"
        cells["host, GB"] = f"{row['host_bytes'] / 1e9:,.1f}"
        rows.append(cells)
    return pd.DataFrame(rows)

"""Prove and measure on a GPU, or rehearse that on a CPU: see gpu.sh, which starts this.

    tests/bench/gpu.sh [--rehearse] [--out FOLDER] [--only a,c-sd15] [--minutes 60] [--again]

--rehearse   the same code on the CPU with shrunken sizes: its numbers mean nothing
--out        where results.jsonl, results.md, logs and models go (runs/gpu)
--only       steps by the beginnings of their names
--minutes    no step begins that would not be through by then
--again      also what is done

Each step runs in a process of its own with a time limit, and one that fails leaves the others
alone. The same command again takes what is left, and last what has failed.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from lib.settings import ROOT, cpu_name
from tests.bench.gpu import correct, miniature, on_card, speed, trained, world
from tests.bench.gpu.apart import call_apart
from tests.bench.gpu.results import (BEGUN, DONE, STATUS, Results, read_lines, status_of,
                                     write_table)
from tests.bench.gpu.scale import Scale

# A step that has less than this share of its limit left is not begun.
LEAST = .6


class Step(NamedTuple):
    name: str
    function: Callable          # of the scale and the results, and of a preset where there is one
    limit: float                # seconds on a card
    preset: str = ""


# The most valuable measurements first.
STEPS = [
    Step("a-numbers", correct.compare_numbers, 60),
    Step("a-scores", correct.compare_scores, 60),
    Step("a-training", trained.check_training, 180),
    Step("c-sd15", speed.measure, 180, "sd15"),
    Step("c-sdxl", speed.measure, 240, "sdxl"),
    Step("b-world", world.run_world, 180),
    Step("c-sd15-forward", speed.measure_ways, 240, "sd15"),
    Step("c-sdxl-forward", speed.measure_ways, 420, "sdxl"),
    Step("d-sd15", miniature.run_miniature, 300, "sd15"),
    Step("e-two", trained.check_two, 240),
    Step("c-sd15-plain", speed.measure_plain, 180, "sd15"),
    Step("c-sd15-options", speed.measure_options, 180, "sd15"),
    Step("d-sdxl", miniature.run_miniature, 300, "sdxl"),
    Step("c-sdxl-options", speed.measure_options, 240, "sdxl"),
    Step("c-sdxl-plain", speed.measure_plain, 180, "sdxl"),
    Step("a-tests", on_card.run_tests, 240),
]

# The compiler traces long, and SD1.5 goes through the same lines.
NOT_REHEARSED = {"c-sdxl-forward", "c-sdxl-options"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=60.)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--card", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def steps_to_take(lines: list[dict], only: str, again: bool, rehearse: bool) -> list[Step]:
    """The chosen steps: first those that were never begun, then those that have failed."""
    chosen = []
    for step in STEPS:
        if step.name.startswith(tuple(only.split(","))):
            chosen.append(step)
    if rehearse:
        chosen = [step for step in chosen if step.name not in NOT_REHEARSED]
    if again:
        return chosen

    status = status_of(lines)
    new = [step for step in chosen if step.name not in status]
    failed = [step for step in chosen if status.get(step.name, DONE) != DONE]
    return new + failed


def take(step: Step, scale: Scale, limit: float) -> None:
    """Run a step in a process of its own, and keep how it has ended."""
    results = Results(scale.out, step.name, scale.card)
    results.add(STATUS, 0., "s", BEGUN)
    log = scale.out / f"{step.name}.log"
    log.unlink(missing_ok=True)
    given = (scale, results)
    if step.preset:
        given = (scale, results, step.preset)

    started = time.monotonic()
    ended = call_apart(step.function, given, scale.rehearse, limit, log)
    results.add(STATUS, time.monotonic() - started, "s", ended)
    write_table(scale.out)
    shutil.rmtree(scale.out / "work", ignore_errors=True)


def faults(lines: list[dict]) -> list[str]:
    """What is not as it should be: steps that are not done, values beyond their limit."""
    found = []
    for line in lines:
        if line["name"] == STATUS and line["detail"] != DONE:
            found.append(f"{line['step']}: {line['detail']}")
        elif line["within"] is False:
            found.append(f"{line['step']}, {line['name']}: {line['value']}, {line['detail']}")
    return found


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if not options.rehearse and not options.card:
        print("error: no CUDA device here; --rehearse runs the same code on a CPU",
              file=sys.stderr)
        return 2
    scale = Scale(options.rehearse, options.out.resolve(), options.card or cpu_name())
    scale.out.mkdir(parents=True, exist_ok=True)

    ends = time.monotonic() + 60 * options.minutes
    lines = read_lines(scale.out)
    for step in steps_to_take(lines, options.only, options.again, scale.rehearse):
        left = ends - time.monotonic()
        if left < LEAST * step.limit:
            print(f"{step.name}: no time left, the same command takes it", flush=True)
            continue
        take(step, scale, min(step.limit, left))

    found = faults(read_lines(scale.out))
    print(f"{scale.out}/results.md; {len(found)} faults", *found, sep="\n", flush=True)
    return int(len(found) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a run will cost, told before anything is spent: `./run_sail.sh sd15 --plan`.

Any preset and any settings may stand there.
Counts (images, UNet forwards, optimizer steps) follow from the settings; the ledger of the run will
say the same. Hours come from a probe of this device, a minute or so: the run's own UNet and VAE at
its resolution and batches. With SAIL_LAUNCH="accelerate launch --num_processes N" they are those of
N such devices.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from lib.data import few
from lib.plan.report import plan, print_report
from lib.run import run_stage
from lib.settings import PRESETS, ROOT, Settings, build_parser, check, load

FLAG = {"--plan": {"action": "store_true", "help": "print what the run will cost, and stop"}}


def settings_of(argv: list[str]) -> Settings:
    """A run's saved settings, or those that a new run would have; no folder is made."""
    given = vars(build_parser(__doc__, FLAG).parse_args(argv))
    given.pop("plan", None)

    preset = given.get("preset", "tiny")
    run = Path(given.get("run") or ROOT / "runs" / preset)
    if (run / "config.json").exists():
        s, _ = load(argv, __doc__, FLAG)
        return s

    values = PRESETS[preset] | given | {"run": str(run)}
    return check(Settings(**values))


def count_processes() -> int:
    """How many processes SAIL_LAUNCH starts, by accelerate or torchrun; each has a device."""
    launch = os.environ.get("SAIL_LAUNCH", "")
    number = re.search(r"--(?:num_processes|nproc[-_]per[-_]node)[= ](\d+)", launch)
    if number is None:
        return 1
    return int(number[1])


def main(argv: list[str]) -> None:
    s = settings_of(argv)

    # Stage 01 would fit a preset to a small file of pairs, and say so.
    changes = few.fit_to_few_pairs(s, ())
    if changes:
        print(few.as_flags(s, changes))
        s = replace(s, **changes)

    processes = count_processes()
    table, probe = plan(s, processes)
    print_report(s, table, probe, processes)


if __name__ == "__main__":          # python -m lib.plan [settings] --plan: prints, makes nothing
    run_stage(main)

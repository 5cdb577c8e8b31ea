"""What a run is refused for at once: a look at the device, the processes and single settings.

lib/settings.py tells what the settings alone can tell (`check`). Stage 01 and the first call of a
run of the embedded world ask `check_start`, which loads torch for unusual settings only. All that
a longer run needs is asked for in lib/preflight.py, by these checks and others. Each raises a
UserError with the remedy.
"""

import importlib.util
import os
import re
from pathlib import Path

from lib import hub
from lib.run import UserError
from lib.settings import (ROOT, SCORES, Settings, check_device, in_world, micro_batch_of,
                          named_weights, needs_prompts, require)
from lib.world import captions

# Rows of the table that no training can start from.
NO_MODELS = ("images:", "extrapolate:", "guide:")

# What computes a score, where it is not transformers.
OPEN_CLIP = ("hpsv2", "hpsv2.1")


def check_start(s: Settings) -> None:
    """Refuse a run that could only fail later, as far as that can be told at once."""
    for check in AT_ONCE:
        check(s)


# ---- the checks ----

def check_processes(s: Settings) -> None:
    """Refuse a batch that does not divide among the processes that SAIL_LAUNCH starts."""
    micro_batch_of(s, processes_of_launch())


def processes_of_launch() -> int:
    """How many processes SAIL_LAUNCH starts, by accelerate or torchrun; each has a device."""
    launch = os.environ.get("SAIL_LAUNCH", "")
    number = re.search(r"--(?:num_processes|nproc[-_]per[-_]node)[= ](\d+)", launch)
    if number is None:
        return 1
    return max(1, int(number[1]))


def check_size_of_world(s: Settings) -> None:
    """Refuse pictures that the embedded world's people cannot look at."""
    require(
        not in_world(s) or s.resolution == captions.SIZE,
        f"--resolution {s.resolution}: the embedded world's pictures have {captions.SIZE} pixels a "
        f"side; take preset tiny and leave it out, or give pairs and prompts of your own",
    )


def check_score_weights(s: Settings) -> None:
    """Refuse weights that are no file or folder here, and can be none on the hub."""
    for name, where in named_weights(s):
        require(
            Path(where).expanduser().exists() or hub.HUB_ID.fullmatch(where),
            f"--score-weights {name}={where}: no such file or folder, nor a hub id (owner/name); "
            f"correct it, or leave {name} to its published weights",
        )


def check_reward(s: Settings) -> None:
    """Refuse a run that cannot have the score that ranks its candidates."""
    if s.reward not in SCORES or not needs_prompts(s):
        return
    try:
        check_score(s, s.reward)
    except UserError as error:
        raise UserError(f"--reward {s.reward}: {error}") from None


def check_score(s: Settings, name: str) -> None:
    """Refuse a score of which a package or a file is neither here nor within reach."""
    package = "open_clip" if name in OPEN_CLIP else "transformers"
    for needed in ("torchvision", package):
        require(
            importlib.util.find_spec(needed),
            f"the package {needed} is not installed; pip install -r {ROOT}/requirements.txt",
        )
    from lib.eval.scorers import refuse_lacking

    try:
        refuse_lacking(name, dict(named_weights(s)).get(name, ""))
    except UserError as error:
        raise UserError(
            f"{error}; give the folder as --score-weights {name}=FOLDER"
        ) from None


def check_given_start(s: Settings) -> None:
    """Refuse a --start that holds no UNet and no adapter."""
    if not s.start:
        return
    require(
        not s.start.startswith(NO_MODELS),
        f"--start {s.start}: is no model; give a UNet or an adapter (a folder, a file or a hub id)",
    )
    from lib.eval import rows

    try:
        rows.check(s, s.start)
    except UserError as error:
        raise UserError(f"--start {error}") from None


AT_ONCE = (check_device, check_processes, check_size_of_world, check_score_weights, check_reward,
           check_given_start)

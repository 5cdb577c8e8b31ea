"""One door for all rivals that are trained: `./run_sail.sh rival NAME --run RUN [settings]`.

    spo             DiffusionSPO, on the human pairs and prompts of a run that has begun (spo.py)
    mapo            a run of its own with another loss (mapo.py)
    diffusion-dpo   a run of its own: Diffusion-DPO on 2,048 human pairs, without rounds
    online-dpo      a run of its own whose candidates a reward from outside ranks (online_dpo.py)

A run of its own is what the driver makes with the rival's settings; what is given behind them wins.
A preset may stand before them, as for the driver: `rival online-dpo sd15 --reward pickscore`.
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

import os
import sys

from lib.run import UserError, run_stage
from lib.settings import ROOT

# The settings that make a rival of a run of SAIL; beta and learning rate are those that the study
# has found best for it (lib/study/questions.py).
RIVALS = {
    "mapo": "--loss mapo",
    "diffusion-dpo": "--iters 0 --seed-pairs 2048 --iter0-steps 220 --beta 500 --lr 1e-5",
    "online-dpo": "--reward world",
}
NAMES = ("spo", *RIVALS)


def command_of(name: str, given: list[str]) -> list[str]:
    """The driver's command line for a rival that is a run of its own."""
    preset = []
    if given and not given[0].startswith("-"):
        preset, given = ["--preset", given[0]], given[1:]
    return [str(ROOT / "run_sail.sh"), *preset, *RIVALS[name].split(), *given]


def main(argv: list[str]) -> None:
    name, given = (argv or [""])[0], argv[1:]
    if name in ("--help", "-h"):
        print(__doc__)
        return
    if name not in NAMES:
        raise UserError(f"rival {name or '(no name)'}: give one of {', '.join(NAMES)}, then --run "
                        f"RUN and settings")

    if name == "spo":
        from lib.rivals import spo
        spo.main(given)
        return

    # The driver takes this process's place.
    command = command_of(name, given)
    print(" ".join(command))
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":          # python -m lib.rivals
    run_stage(main)

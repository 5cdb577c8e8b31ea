"""One door for all rivals that are trained: `./run_sail.sh rival NAME --run RUN [settings]`.

    spo             DiffusionSPO, on the human pairs and prompts of a run that has begun (spo.py)
    mapo            a run of its own: another loss (mapo.py) on human pairs, without rounds
    diffusion-dpo   a run of its own: Diffusion-DPO on human pairs, without rounds
    online-dpo      a run of its own whose candidates a reward from outside ranks (online_dpo.py)

A run of its own is what the driver makes with the rival's settings; what is given behind them wins.
In the embedded world they are those of the study's rows, with 2,048 human pairs. A preset may stand
before them, as for the driver: `rival diffusion-dpo sd15 --seed-pairs 800000`, or `rival online-dpo
sd15 --reward pickscore`.
"""

import lib.program  # noqa: F401, I001  first: Ctrl-C is answered from here on

import os
import sys

from lib.run import UserError, run_stage
from lib.settings import ROOT, RUN_ARGUMENTS, in_world, labelled_elsewhere, planned

# The settings that make a rival of a run of SAIL.
RIVALS = {
    "mapo": "--iters 0 --loss mapo",
    "diffusion-dpo": "--iters 0",
    "online-dpo": "--reward world",
}

# In the embedded world: as many human pairs and steps as the study gives it, and the beta and
# learning rate that it has found best (lib/study/questions.py).
IN_THE_WORLD = {
    "mapo": "--seed-pairs 2048 --iter0-steps 220",
    "diffusion-dpo": "--seed-pairs 2048 --iter0-steps 220 --beta 500 --lr 1e-5",
}
NAMES = ("spo", *RIVALS)

# What the driver takes beside the settings of a run.
OF_THE_DRIVER = RUN_ARGUMENTS | {
    "--check": {"action": "store_true"}, "--plan": {"action": "store_true"}, "--gpu": {}}


def command_of(name: str, given: list[str]) -> list[str]:
    """The driver's command line for a rival that is a run of its own."""
    if given and not given[0].startswith("-"):
        given = ["--preset", *given]
    words = [*RIVALS[name].split(), *given]
    driver = str(ROOT / "run_sail.sh")
    if "--help" in given or "-h" in given:
        return [driver, *words]
    if not any(word.partition("=")[0] == "--run" for word in given):
        raise UserError(f"rival {name}: is a run of its own; give it a folder with --run")

    # The world's own people label as many pairs as one likes.
    s = planned(words, __doc__, OF_THE_DRIVER)
    if in_world(s) and not labelled_elsewhere(s):
        words = [*RIVALS[name].split(), *IN_THE_WORLD.get(name, "").split(), *given]
    return [driver, *words]


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

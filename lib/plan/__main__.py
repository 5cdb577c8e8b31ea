"""What a run will cost, told before anything is spent: `./run_sail.sh sd15 --plan`.

Any preset and any settings may stand there.
Counts (images, UNet forwards, optimizer steps) follow from the settings; the ledger of the run will
say the same. Hours come from a probe of this device, a few minutes: the run's own UNet and VAE at
its resolution and batches. With --gpu, or for the paper's models on a machine without a GPU, they
are those of a card that is not here, from what its vendor states and a share of it. With
SAIL_LAUNCH="accelerate launch --num_processes N" they are those of N such devices.
"""

from dataclasses import replace

from lib.data import few
from lib.models import device_of
from lib.plan.cards import CARDS, DEFAULT, Card
from lib.plan.report import plan, print_report
from lib.run import run_stage
from lib.settings import Settings, parse, planned
from lib.start import processes_of_launch

FLAGS = {
    "--plan": {"action": "store_true", "help": "print what the run will cost, and stop"},
    "--gpu": {"choices": tuple(CARDS), "default": "",
              "help": "the card to plan for, where it is not this machine's own device"},
}


def settings_of(argv: list[str]) -> tuple[Settings, Card | None]:
    """A run's saved settings, or those that a new run would have, and the card to plan for.

    No folder is made. On a card the dtype is settled: what `auto` means there.
    """
    _, own = parse(argv, __doc__, FLAGS)
    s = planned(argv, __doc__, FLAGS)
    card = CARDS.get(own.gpu) or stand_in(s)
    if card and s.dtype == "auto":
        s = replace(s, dtype=card.dtype)
    return s, card


def stand_in(s: Settings) -> Card | None:
    """The card whose hours are told where one of the paper's models would need a GPU."""
    without_gpu = s.device == "auto" and device_of(s).type == "cpu"
    if s.preset == "tiny" or not without_gpu:
        return None
    print(f"no GPU here: this is the plan for --gpu {DEFAULT}; name your own, or --device cpu for "
          f"this machine")
    return CARDS[DEFAULT]


def main(argv: list[str]) -> None:
    s, card = settings_of(argv)

    # Stage 01 would fit a preset to a small file of pairs, and say so.
    changes = few.fit_to_few_pairs(s, ())
    if changes:
        print(few.as_flags(s, changes))
        s = replace(s, **changes)

    processes = processes_of_launch()
    table, speed, memory = plan(s, processes, card)
    print_report(s, table, speed, memory, processes, argv)


if __name__ == "__main__":          # python -m lib.plan [settings] --plan: prints, makes nothing
    run_stage(main)

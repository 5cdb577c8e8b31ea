"""What is shown to whom, in which order, on which side; and the pairs that existing pictures make.

A pair is a row (pair_id, prompt, a, b); a showing is a pair in turn 1 or 2. Everything random comes
from keys (lib/run.py): whoever goes on after a stop is shown what would have come.
"""

from collections.abc import Callable
from itertools import chain, zip_longest
from typing import NamedTuple

from lib.run import seed_of
from lib.taste.answers import Answer, standing, taken_back

PAIR_COLUMNS = ("pair_id", "prompt", "a", "b")
TENTH = 10                  # one pair in so many comes twice
GAP = 20                    # showings before it comes again: GAP to 2 GAP - 1


class Showing(NamedTuple):
    """A pair by its id, for the first or second time."""

    pair: str
    turn: int


class Outlook(NamedTuple):
    """What comes next for a labeller, and how much is left."""

    next: list[Showing]                     # that can be shown now, in order
    left: int                               # showings without an answer, also of pairs to be drawn
    answered: int


def id_of(*key) -> str:
    """A pair's id, from what makes it this pair."""
    return f"{seed_of('pair', *key):016x}"


def left_of(pair: str, labeller: str, turn: int) -> str:
    """The picture, a or b, that a labeller sees on the left; the second turn swaps the sides."""
    first = seed_of("left", labeller, pair) % 2
    return "ab"[(first + turn - 1) % 2]


def in_own_order(pairs: list[str], twice: set[str], labeller: str) -> list[str]:
    """A labeller's own order. Those that come `twice` begin early, so that time can pass."""
    def place(pair: str) -> float:
        early = 2 / 3 if pair in twice else 1
        return seed_of("order", labeller, pair) * early

    return sorted(pairs, key=place)


def comes_twice(pairs: list[str], labeller: str) -> set[str]:
    """One of every ten pairs, in the order of the table: more pairs leave the earlier choice."""
    twice = set()
    for start in range(0, len(pairs), TENTH):
        place = start + seed_of("twice", labeller, start) % TENTH
        twice.update(pairs[place:place + 1])
    return twice


def outlook(
    pairs: list[str],
    can_be_shown: Callable[[str], bool],
    lines: list[Answer],
    labeller: str,
    all_drawn: bool,
) -> Outlook:
    """What a labeller is to see, given all lines of the file of answers.

    What was taken back comes first, the latest of it before the others; then pairs that are due a
    second time; then new ones in the labeller's own order. With all pictures drawn, what is still
    to come twice ends the row, due or not.
    """
    known = set(pairs)
    own = [line for line in lines if line.labeller == labeller and line.pair in known]
    answers = standing(own)
    answered = {Showing(line.pair, line.turn) for line in answers}
    again = [Showing(line.pair, line.turn) for line in reversed(taken_back(own))]

    # A pair that was skipped does not come again.
    due, later = [], []
    twice = comes_twice(pairs, labeller)
    for place, line in enumerate(answers):
        second = Showing(line.pair, 2)
        if line.turn == 2 or line.pair not in twice or line.answer == "skip":
            continue
        if second in answered or second in again:
            continue
        gap = GAP + seed_of("gap", labeller, line.pair) % GAP
        if len(answers) - 1 - place >= gap:
            due.append(second)
        else:
            later.append(second)

    new = []
    for pair in in_own_order(pairs, twice, labeller):
        first = Showing(pair, 1)
        if first not in answered and first not in again:
            new.append(first)
    skipped = {line.pair for line in answers if line.answer == "skip"}
    to_come_twice = {pair for pair in twice - skipped if Showing(pair, 2) not in answered}
    left = len(new) + len([s for s in again if s.turn == 1]) + len(to_come_twice)

    row = [*again, *due, *new]
    if all_drawn:
        row += later
    shown = [showing for showing in row if can_be_shown(showing.pair)]
    return Outlook(shown, left, len(answered))


# ---- pairs of pictures that exist ----

def neighbours(prompts: list[str]) -> list[tuple[int, int]]:
    """Pairs of pictures that have one prompt, given the prompt of each picture.

    Each picture of a prompt meets at most two others. First comes a pair of every prompt, then a
    second one of those with three pictures, and so on.
    """
    of_prompts = {}
    for place, prompt in enumerate(prompts):
        of_prompts.setdefault(prompt, []).append(place)

    pairs_of_prompts = []
    for prompt, places in of_prompts.items():
        places.sort(key=lambda place: seed_of("picture", prompt, place))
        pairs = list(zip(places, places[1:]))

        # Pairs without a picture in common come before those that link them.
        pairs_of_prompts.append(pairs[::2] + pairs[1::2])

    rounds = zip_longest(*pairs_of_prompts)
    return [pair for pair in chain.from_iterable(rounds) if pair is not None]

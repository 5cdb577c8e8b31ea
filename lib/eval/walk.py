"""How a run went, step by step: a story in the run's own pictures and numbers.

`tell` follows the method from the first human pair to the evaluation, and says of each step what
happens, why, and what it looked like in this run. It returns blocks, which lib/eval/page.py shows
in the page and `as_markdown` writes for eval/walk.md. A word is explained where it first stands, so
the story needs no other text.

The numbers are those that the stages have written; nothing is measured here and no scorer is asked.
What a run does not have is left out, and a folder without a model of its own has no story at all.
"""

import json
import posixpath
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from lib.eval.scores import names_of
from lib.eval.table import KEYS, Cell, markdown, plain, summarise
from lib.eval.words import lost
from lib.judge import read_judge
from lib.run import (PAIR_COLUMNS, TRAIN_LOG_COLUMNS, atomic, is_whole, read_parquet,
                     read_table)
from lib.settings import Settings, has_reference, labelled_elsewhere

# What the story relies on in people.json; all of it is numbers.
PEOPLE = ("labels_against_their_own_utility", "agree_with_themselves",
          "agree_with_a_perfect_judge")

# How stage 04's Diffusion-DPO ends, by which a run that keeps its code is known not to have edited
# it; and how far from log 2 the first step's loss may be, in half precision.
DPO_LOSS = "return -F.logsigmoid(margin), margin"
NEAR_LOG_2 = .05

# Blocks in order; page.write_page says what kinds there are.
Story = list[tuple]

# What is needed of iterK/rewards.parquet.
REWARD_COLUMNS = ("prompt_id", "candidate", "image", "reward")

TITLE = "How this run went, step by step"
LONG_PROMPT = 200                           # characters; the rest of a longer prompt is cut
MOST_DRAWS = 16                             # a table of the reward's draws has no more rows

# In Markdown: how many pictures stand side by side, and widths in pixels.
ACROSS = 8
PICTURE_WIDTH = 96
FIGURE_WIDTH = 600

# The dashed lines in a figure.
LINE = {"ls": "--", "color": "black", "lw": 1.5}


def tell(s: Settings, pictures: pd.DataFrame, results: pd.DataFrame) -> Story:
    """Tell how the run went, and draw the story's figures into <run>/eval/walk/.

    `pictures` is scores.parquet, and `results` the table that people read (lib/eval/table.py,
    readable). Image paths in the blocks are relative to the run folder.
    """
    people = _read_numbers(Path(s.run) / "seed" / "people.json", PEOPLE)
    story = tell_people(s, people)
    story += tell_iter0(s, pictures)
    for k in range(1, s.iters + 1):
        story += tell_candidates(s, k, people)
        story += tell_training(s, k, pictures)

    # A folder that only compares models from elsewhere has nothing of all this.
    if not story:
        return []

    opening = _text(
        "A text-to-image model paints a picture for a text, the prompt.",
        "SAIL (Self-Amplified Iterative Learning) teaches such a model what people like, with few",
        "answers from people. They compare some pairs of pictures, and the model learns from these",
        "pairs. Then it paints new pictures, compares them itself, and learns from its own",
        "comparisons too. The model before all this is called base; the one that has learned from",
        "the human pairs is Iter0; the one after the first round of its own comparisons is Iter1,",
        "and so on.")
    return [opening, *story, *tell_evaluation(s, pictures, results)]


# ---- people compare two pictures ----

def tell_people(s: Settings, people: dict) -> Story:
    """The human pairs: one of them, how many there are, and how far people agree."""
    run = Path(s.run)
    path = run / "seed" / "pairs.parquet"
    if not is_whole(path):
        return []

    pairs = read_table(path, PAIR_COLUMNS, "01_seed.py")
    counts = f"This run learns from {len(pairs)} such pairs."
    held_out = _rows_of(run / "seed" / "holdout.parquet")
    if held_out:
        counts += (f" {held_out} more are held out: the model never learns from them, so they can "
                   "tell whether its own judgement agrees with people's.")

    pair = pairs.iloc[0]
    story = [
        ("heading", "People compare two pictures"),
        _text(
            "A person sees two pictures of one prompt and says which is the better one.",
            "It is the winner of the pair, and the other is the loser.",
            "Nothing else is ever asked of people.",
            f"The first pair of this run, for the prompt {_quoted(pair.prompt)}:"),
        *_strip(run, [(pair.win, "winner: preferred"), (pair.lose, "loser: the other")]),
        _text(counts),
    ]
    if s.pairs == "world":
        story += explain_world()
        story += tell_errors_of_people(s, people)
    return story


def explain_world() -> Story:
    """The taste of the embedded world's people (lib/world/people.py has the formula)."""
    return [
        _text(
            "This run plays in a small world of coloured shapes. Its people are a program with a",
            "hidden taste, the utility of a picture under its prompt:"),
        _equation("utility = alignment + 2 aesthetics"),
        _text(
            "Alignment is how much of the prompt the picture gets right: the shape, its colour,",
            "the background's colour and its pattern. Aesthetics is what no prompt mentions:",
            "light, rich colours, a large shape in the middle, and a clean picture. Both go from",
            "0 to 1, and the model is told neither."),
    ]


def tell_errors_of_people(s: Settings, people: dict) -> Story:
    """How often the embedded world's people err, and what that leaves to agree on."""
    if not people or s.label_noise == 0:
        return []

    against = people["labels_against_their_own_utility"]
    again = people["agree_with_themselves"]
    best_judge = people["agree_with_a_perfect_judge"]
    return [
        _text(
            "Like real people, these are not always true to their taste. Of two pictures a and b,",
            "they prefer a with probability"),
        _equation(f"p = sigmoid((utility of a - utility of b) / {s.label_noise:g})"),
        _text(
            "which is 50% for two equally good pictures, the toss of a coin, and nearly 100% for",
            "one that is much better.",
            f"In this run {against:.0%} of the answers go against the people's own taste.",
            f"Asked twice about a pair, they would give the same answer in {again:.0%} of cases.",
            f"Even a judge who knew their taste perfectly would agree with only {best_judge:.0%}",
            "of their answers: no judge can do better."),
    ]


# ---- Iter0: how a model learns from pairs ----

def tell_iter0(s: Settings, pictures: pd.DataFrame) -> Story:
    """How a model learns from pairs, and how Iter0 did."""
    run = Path(s.run)
    if not (run / "iter0").exists():
        return []

    story = [("heading", "Iter0 learns from the human pairs")]
    if s.start:
        story = [
            ("heading", "Iter0 is given; how the later models learn from pairs"),
            _text(f"This run has not trained Iter0 but was given it: {s.start}."),
        ]

    story += explain_noise()
    if s.loss == "mapo":
        story += explain_mapo()
    elif is_dpo(s):
        story += explain_dpo(s)
    else:
        story.append(_text(
            "How this run learns from pairs is not the Diffusion-DPO of the paper: its loss was",
            "changed. code/04_train_dpo.py in the run folder has it as it is."))

    log = _read_log(run, 0)
    if log is not None:
        human = _rows_of(run / "seed" / "pairs.parquet")
        story.append(_text(
            f"Iter0 starts as a copy of the base and is changed in {len(log)} small steps, each of",
            f"which looks at {s.batch} pairs. So each of the {human} human pairs comes",
            f"{_times(len(log) * s.batch, human)}, with new t and new noise each time. This is",
            "what the training looked like:"))
        story += _figure_of_log(s, 0, log)
        story += explain_curves(s, log)
    return story + _same_prompt(s, pictures, 0)


def explain_noise() -> Story:
    """What a diffusion model learns, and what its error on a picture is."""
    return [
        _text(
            "The model is a diffusion model. It paints by starting from pure noise and taking the",
            "noise away, little by little, and all that it ever learns is to see the noise in a",
            "picture. Take a picture x (more precisely its latent, the compressed form that the",
            "model works in) and mix it with random noise eps. The timestep t, from 0 to 999, sets",
            "how much of the mixture is noise: next to nothing at 0, next to all of it at 999."),
        _equation("x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps"),
        _text("where abar_t, the part of the picture that is left, falls from 1 to 0."),
        _text(
            "The model theta gets the mixture x_t, the timestep t and the prompt y, and predicts",
            "eps. Its error on the picture is the mean square of the difference:"),
        _equation("e_theta(x) = mean of (eps - eps_theta(x_t, y, t))^2"),
        _text("The smaller the error, the likelier the model finds this picture for this prompt."),
    ]


def explain_dpo(s: Settings) -> Story:
    """Diffusion-DPO, from the gains over the margin to the loss (Wallace et al., equation 14)."""
    return [
        _text(
            "Diffusion-DPO makes of this a way to learn from pairs. Two copies of one model look",
            "at a pair: theta, which is trained, and the reference, ref, which stays as it is.",
            "Both pictures get the same t and the same noise. With x_w the winner and x_l the",
            "loser,"),
        _equation(
            "winner gain = e_ref(x_w) - e_theta(x_w)",
            "loser gain = e_ref(x_l) - e_theta(x_l)",
            "margin = (beta / 2) (winner gain - loser gain)",
            "loss = -log sigmoid(margin)"),
        _text(
            "A gain says how much better than the reference theta has become at seeing the noise",
            "in a picture. The margin is above 0 if theta has gained more on the winner than on",
            "the loser. sigmoid(margin) is the probability that theta gives in this way to the",
            "person's choice, 50% at a margin of 0 and nearly 100% at a large one. The loss falls",
            "as this rises, and to lower the loss is what theta is trained for: it turns towards",
            f"winners and away from losers. The larger beta, here {s.beta:g}, the smaller a turn",
            "is enough: beta keeps theta near the reference."),
    ]


def is_dpo(s: Settings) -> bool:
    """Whether a run has learned by Diffusion-DPO, as far as its code and its logs can tell.

    People edit `dpo_loss`. At the first step theta is the reference, and the loss is log 2.
    """
    if s.loss != "dpo":
        return False
    code = Path(s.run) / "code" / "04_train_dpo.py"
    if code.exists() and DPO_LOSS not in code.read_text(encoding="utf-8", errors="replace"):
        return False
    for k in range(s.iters + 1):
        log = _read_log(Path(s.run), k)
        if log is not None and abs(log.loss.iloc[0] - np.log(2)) > NEAR_LOG_2:
            return False
    return True


def explain_mapo() -> Story:
    """MaPO, a rival that learns without a reference (lib/rivals/mapo.py)."""
    return [
        _text(
            "This run learns from pairs by MaPO, not by the Diffusion-DPO of the paper. Both",
            "pictures of a pair get the same t and the same noise. With x_w the winner, x_l the",
            "loser, and phi a function that falls as the error e grows,"),
        _equation(
            "phi(e) = (e / 2) / (exp(e / 2) - 1)",
            "margin = 1000 (phi(e_theta(x_w)) - phi(e_theta(x_l)))",
            "loss = e_theta(x_w) - 0.1 log sigmoid(margin)"),
        _text(
            "The margin is above 0 if the model's error on the winner is the smaller one, and a",
            "larger margin is a lower loss. The first term keeps the model good at winners."),
    ]


def explain_curves(s: Settings, log: pd.DataFrame) -> Story:
    """How to read each curve of a training log, with the numbers of this one."""
    first, late = log.iloc[0], _second_half(log)
    loss = [f"Loss: {first.loss:.3f} at the first step, {late.loss:.3f} on average over the",
            "second half of the steps."]
    if is_dpo(s):
        loss += ["The dashed line is log 2 = 0.693, the loss of a margin of 0, where every",
                 "training starts: at first theta is the same as the reference. One t and one",
                 "noise say little about a pair, so pairs that come once hardly move the loss from",
                 "this line even if the model learns. Pairs that come often are learned by heart,",
                 "and that is what brings it down."]
    story = [_text(*loss)]

    if _has_gains(log):
        story.append(_text(
            f"Winner gain and loser gain: {late.win_error_gain:+.2g} and",
            f"{late.lose_error_gain:+.2g} over the second half. Above 0, theta sees the noise in",
            "these pictures better than the reference. Both may fall below 0, as long as the",
            "loser gain falls further, since the loss asks for their difference only."))
    story += [
        _text(
            f"Margin: {late.margin:+.2f} over the second half. It should rise from 0. It jumps",
            "from step to step because t and noise are random; what counts is the trend."),
        _text(
            f"Implicit accuracy: {late.accuracy:.2f} over the second half. It is the part of a",
            "step's pairs whose margin is above 0, on which theta sides with people; a coin would",
            "reach 0.5. Since these are the pairs that it learns from, it says nothing of others."),
    ]
    return story


# ---- a round: the model paints candidates, and ranks them ----

def tell_candidates(s: Settings, k: int, people: dict) -> Story:
    """The candidates of round k, how they were ranked, and whether people would agree."""
    folder = Path(s.run) / f"iter{k}"
    rewards_path, pairs_path = folder / "rewards.parquet", folder / "pairs.parquet"
    if s.alpha == 0 or not is_whole(rewards_path) or not is_whole(pairs_path):
        return []

    candidates = read_table(rewards_path, REWARD_COLUMNS, f"03_rank.py --iter {k}")
    pairs = read_table(pairs_path, PAIR_COLUMNS, f"03_rank.py --iter {k}")
    judge = read_judge(folder / "judge.json")

    ranks = "ranks them itself"
    if s.reward != "implicit":
        ranks = f"{s.reward} ranks them"
    prompts = candidates.prompt_id.nunique()
    story = [
        ("heading", f"Round {k}: Iter{k - 1} paints candidates and {ranks}"),
        _text(f"Iter{k - 1} paints {len(candidates) // prompts} pictures, the candidates, for each "
              f"of {prompts} new prompts."),
    ]
    if k > 1:
        story += recall_reward(s, k, judge)
    elif s.reward == "implicit":
        story += explain_reward(s, judge)
    else:
        story += explain_outside_reward(s)

    story += tell_one_prompt(s, k, candidates, pairs.iloc[0])
    story += tell_agreement(s, k, judge, people)
    return story


def explain_reward(s: Settings, judge: dict) -> Story:
    """The implicit reward (the paper's equations 8 and 9) and the pair that it makes."""
    mean = f"the mean is over {s.draws} of them."
    if s.draws == 1:
        mean = "this run makes do with one."
    story = [
        _text(
            "Now the model itself says which are good: it is the self-judge. By learning from",
            "pairs it has acquired a taste: measured against the model before, its error is now",
            "lower on pictures that people prefer than on the others. Read backwards, this is a",
            "score of any picture, its reward:"),
        _equation("r(x) = mean of -(beta / 2) (e_theta(x) - e_anchor(x))"),
        _text(
            "Here theta is the current model, Iter0, and the anchor is a fixed model to compare it",
            f"with, {judge.get('anchor', 'base')}. The reward is high if theta finds the picture",
            "likelier than the anchor does; beta is that of the training.",
            f"A draw is one random t with one random noise; {mean}",
            "All candidates of a prompt meet the same draws, so that luck favours none. Only the",
            "differences of their rewards count, not whether these lie above or below 0."),
    ]
    if s.rank_t_min > 0 or s.rank_t_max < 1000:
        story.append(_text(f"In this run t is taken from {s.rank_t_min} to {s.rank_t_max - 1}."))
    if s.reward_weights == "balanced":
        story.append(_text(
            "In this run each draw is weighed by 1 over the anchor's error at it, so that no t",
            "speaks louder than another."))
    if s.reward_weights == "root":
        story.append(_text("In this run each draw compares the roots of the two errors."))

    margin = "The difference of their rewards is its margin."
    if has_reference(s):
        margin = ("The difference of their rewards is its margin, as in training, but with the "
                  "anchor as the reference.")
    story += [
        _text(_chosen_pair(s), margin, "The self-judge believes that a person would prefer the "
              "winner with probability"),
        _equation("p = sigmoid(margin)"),
    ]
    return story


def explain_outside_reward(s: Settings) -> Story:
    """Another ranking than SAIL's: the model's confidence, or a score from outside (online DPO)."""
    if s.reward == "self-confidence":
        return [_text(
            "In this run the model ranks them by its confidence: noise is added to a picture, and",
            "the better the model tells that noise, the higher the reward (SOLACE). No human label",
            "is in it.",
            _chosen_pair(s),
            "The difference of their rewards is the pair's margin.")]
    return [_text(
        f"In this run the model does not rank them itself. A score from outside, {s.reward}, is",
        "their reward; this is called online DPO.",
        _chosen_pair(s),
        "The difference of their rewards is the pair's margin.")]


def recall_reward(s: Settings, k: int, judge: dict) -> Story:
    """What is new in the ranking of a later round."""
    if s.reward != "implicit":
        return [_text("They are ranked as in round 1.")]
    return [_text(f"They are ranked as in round 1. Now theta is Iter{k - 1}, and the anchor is "
                  f"{judge.get('anchor', 'base')}.")]


def _chosen_pair(s: Settings) -> str:
    """Which candidates become a pair, in a sentence."""
    if s.select == "random":
        return ("Two candidates of a prompt, taken at random in this run, become a new pair; the "
                "one with the higher reward is the winner.")
    return "The best and the worst candidate of a prompt become a new pair, winner and loser."


def tell_one_prompt(s: Settings, k: int, candidates: pd.DataFrame, pair: pd.Series) -> Story:
    """The candidates of a pair's prompt in order of reward, and what its margin is made of."""
    winner = candidates[candidates.image == pair.win]
    loser = candidates[candidates.image == pair.lose]
    if winner.empty or loser.empty:
        return []

    winner, loser = winner.iloc[0], loser.iloc[0]
    ranked = candidates[candidates.prompt_id == winner.prompt_id]
    ranked = ranked.sort_values("reward", ascending=False, kind="stable")
    pictures = []
    for place, candidate in enumerate(ranked.itertuples(), start=1):
        caption = f"{place}: reward {candidate.reward:+.2f}"
        if candidate.image == pair.win:
            caption += ", the winner"
        if candidate.image == pair.lose:
            caption += ", the loser"
        pictures.append((candidate.image, caption))

    margin = winner.reward - loser.reward
    said = f"The margin of the pair is {margin:+.2f}"
    if s.reward == "implicit":
        said += f": the self-judge is {1 / (1 + np.exp(-margin)):.0%} sure"
    return [
        _text(f"The first prompt of this round is {_quoted(pair.prompt)}. Its candidates, from the "
              "highest reward to the lowest:"),
        *_strip(Path(s.run), pictures),
        _text(f"{said}."),
        *tell_draws(s, k, winner, loser),
    ]


def tell_draws(s: Settings, k: int, winner: pd.Series, loser: pd.Series) -> Story:
    """What each draw adds to the margin of two candidates of a prompt."""
    draws = _draws_of_pair(s, k, winner, loser)
    count = len(draws)
    if count < 2:
        return []

    # The largest part, against all the others.
    largest = draws.loc[draws.part.idxmax()]
    rest = draws.part.sum() - largest.part
    ending = [f"The draw at t = {largest.t:.0f} alone makes {largest.part:+.2f} of the margin, all",
              f"the others together {rest:+.2f}."]

    introduction = ["Draw by draw, by t:"]
    if k == 1:
        introduction = [
            "Rewards are means over draws, so the margin can be taken apart. Each row is a draw,",
            "and the last column, its part of the difference, adds up to the margin:"]
        ending.append("The judge speaks loudest where such a part is largest, which need not be "
                      "where it knows most.")
    if count > MOST_DRAWS:
        introduction.insert(0, f"Of {count} draws, those with the {MOST_DRAWS} largest parts.")
        draws = draws.loc[draws.part.abs().nlargest(MOST_DRAWS).index].sort_index()

    table = pd.DataFrame({
        "t of the draw": draws.t,
        "winner's reward": draws.winner.map("{:+.2f}".format),
        "loser's reward": draws.loser.map("{:+.2f}".format),
        f"difference / {count}": draws.part.map("{:+.2f}".format),
    })
    return [_text(*introduction), ("table", table), _text(*ending)]


def _draws_of_pair(s: Settings, k: int, winner: pd.Series, loser: pd.Series) -> pd.DataFrame:
    """The draws (t, winner, loser, part) of two candidates of a prompt, sorted by t.

    `part` is what a draw adds to their margin. A score from outside has no draws.
    """
    path = Path(s.run) / f"iter{k}" / "draws.parquet"
    if s.reward != "implicit" or not is_whole(path):
        return pd.DataFrame()

    # The table of a large run has a million rows; only those of this prompt are read.
    of_prompt = [("prompt_id", "==", int(winner.prompt_id))]
    draws = read_parquet(path, f"03_rank.py --iter {k}", filters=of_prompt)
    of_winner = draws[draws.candidate == winner.candidate].set_index("draw")
    of_loser = draws[draws.candidate == loser.candidate].set_index("draw")
    pair = pd.DataFrame({
        "t": of_winner.t,
        "winner": of_winner.reward,
        "loser": of_loser.reward,
        "part": (of_winner.reward - of_loser.reward) / len(of_winner),
    })
    return pair.sort_values("t", kind="stable", ignore_index=True)


def tell_agreement(s: Settings, k: int, judge: dict, people: dict) -> Story:
    """How often the judge agrees with people on the held-out pairs, beside how often they agree."""
    if not judge.get("pairs"):
        return []

    name = "the self-judge" if s.reward == "implicit" else s.reward
    low, high = judge["low"], judge["high"]
    sentences = [
        f"Does {name} agree with people? Of {_judged(judge)} it gives the",
        f"winner the higher reward in {judge['accuracy']:.0%} [{low:.0%}, {high:.0%}]."]
    if k == 1:
        sentences.append("The brackets are a 95% interval, what so few pairs leave open; a coin "
                         "would reach 50%.")
    if low <= .5 <= high:
        sentences.append("So these pairs cannot tell it from a coin.")
    if "agree_pairs" in judge:
        sentences.append("Whoever labelled gave the same answer again in "
                         f"{judge['agree_with_themselves']:.0%} of {judge['agree_pairs']:.0f} "
                         "pairs that were shown twice; no judge can be expected to do better.")
    elif people:
        sentences.append(f"People agree with themselves in {people['agree_with_themselves']:.0%}, "
                         "and a perfect judge with them in "
                         f"{people['agree_with_a_perfect_judge']:.0%}.")
    return [_text(*sentences)]


def _judged(judge: dict) -> str:
    """The pairs that the judge was asked about."""
    if judge.get("crossfit"):
        return f"all {judge['pairs']} human pairs, each asked of a model that has not seen it,"
    return f"the {judge['pairs']} held-out pairs"


# ---- a round: the mix of pairs, and the next model ----

def tell_training(s: Settings, k: int, pictures: pd.DataFrame) -> Story:
    """What model k learned from, how its training went, and what it paints."""
    log = _read_log(Path(s.run), k)
    if log is None:
        return []

    start = f"Iter{k} starts as a copy of Iter{k - 1}."
    if has_reference(s):
        start = f"Iter{k} starts as a copy of Iter{k - 1}, which is its reference too."
    story = [
        *tell_mix(s, k, len(log)),
        ("heading", f"Round {k}: the next model, Iter{k}"),
        _text(f"{start} This is what its training looked like:"),
        *_figure_of_log(s, k, log),
    ]

    # Where Iter0 was given, these are the first curves.
    if k == 1 and _read_log(Path(s.run), 0) is None:
        story += explain_curves(s, log)
    else:
        story += recall_curves(log)
    return story + _same_prompt(s, pictures, k)


def recall_curves(log: pd.DataFrame) -> Story:
    """The numbers of a later log, in one sentence."""
    late = _second_half(log)
    gains = ""
    if _has_gains(log):
        gains = f"winner gain {late.win_error_gain:+.2g}, loser gain {late.lose_error_gain:+.2g},"
    return [_text(
        f"Loss: {log.loss.iloc[0]:.3f} at the first step. Over the second half of the steps: loss",
        f"{late.loss:.3f}, {gains} margin {late.margin:+.2f},",
        f"implicit accuracy {late.accuracy:.2f}.")]


def tell_mix(s: Settings, k: int, steps: int) -> Story:
    """Ranked preference mixup: how many self-made and human pairs, and how often each comes."""
    run = Path(s.run)
    human = _rows_of(run / "seed" / "pairs.parquet")
    if s.alpha == 0:
        return [
            ("heading", f"Round {k}: human pairs alone"),
            _text(
                "In this run alpha, the share of pairs made by the model itself, is 0. So it",
                f"paints no candidates and goes on learning from the {human} human pairs,",
                f"{steps} steps of {s.batch} pairs."),
        ]

    kind = "self-made" if s.reward == "implicit" else "new"
    new = _rows_of(run / f"iter{k}" / "pairs.parquet")
    places = steps * s.batch
    new_places = int(places * s.alpha + 1e-9)                       # as 04_train_dpo.py, mixup
    sentences = [
        f"{new} {kind} pairs and {human} human pairs are what Iter{k} can learn from. It takes",
        f"{steps} steps of {s.batch} pairs, which makes {places} places for pairs. A share",
        f"alpha = {s.alpha:g} of them, {new_places}, goes to {kind} pairs: each comes",
        f"{_times(new_places, new)}."]
    if new_places < places:
        sentences.append(f"Each human pair comes {_times(places - new_places, human)}.")
        if k == 1 and s.reward == "implicit":
            sentences.append("The human pairs keep the model from trusting its own taste too much.")
    else:
        sentences.append("No human pair is left in the mix.")
    return [("heading", f"Round {k}: the mix of pairs"), _text(*sentences)]


# ---- the evaluation ----

def tell_evaluation(s: Settings, pictures: pd.DataFrame, results: pd.DataFrame) -> Story:
    """The table, and what it says of the run's last model."""
    models = _models_of_run(s, pictures)
    if not models:
        return []

    names = names_of(s)
    explained = f"Higher is better in each score: {', '.join(names)}."
    if not names:
        explained = "No score was computed; the pictures are there to be looked at."
    if labelled_elsewhere(s):
        explained = ("Alignment and aesthetics are measured by a program that knows nothing of the "
                     "taste of whoever labelled: a duel tells whether they like the result.")
    elif "utility" in names:
        explained = ("The scores are alignment, aesthetics and utility, the people's hidden taste "
                     "itself, which is looked up here.")
    each = "one picture" if s.eval_seeds == 1 else f"{s.eval_seeds} pictures"
    last = models[-1]
    story = [
        ("heading", "The evaluation"),
        _text(
            f"Every model paints {each} of the same {pictures.prompt_id.nunique()} prompts, from",
            "which none has learned, and each picture from the same noise as the other models. So",
            f"they can be compared prompt by prompt. {explained} In the table a gain is the mean",
            "difference of scores, and wins are the part of the prompts whose pictures have the",
            "higher score on average."),
        ("table", results),
    ]
    if names:
        story += tell_gains(results[results["model"] == last], last, names[0])
        story += tell_losses(s, pictures, last)

    # What the numbers do not say.
    if s.iters > 0 and 0 < s.alpha < 1:
        story.append(_text(
            "A round is new pairs, but also more training on the human ones. What the latter alone",
            "would have brought, a run with --alpha 0 tells."))
    story.append(_text(
        "The brackets are 95% intervals over prompts: what other prompts might have given. They",
        "say nothing of another run seed. The same run with other random numbers, and so with",
        "other pairs, candidates and draws, may come out higher or lower by more than that. Only",
        "several runs can tell (./run_sail.sh study)."))
    return story


def tell_gains(results: pd.DataFrame, model: str, score: str) -> Story:
    """The gains of a model over base and over Iter0, a paragraph for each benchmark."""
    story = []
    for row in results.to_dict("records"):
        sentences = []
        over_base = row.get(f"{score}: gain over base")
        if isinstance(over_base, Cell) and over_base.text:
            sentences.append(f"{model} against base in {score}: {over_base}, "
                             f"{_verdict(over_base)}.")
        over_iter0 = row.get(f"{score}: over Iter0")
        if isinstance(over_iter0, Cell) and over_iter0.text:
            sentences.append(f"Against Iter0: {over_iter0}, {_verdict(over_iter0)}; this is what "
                             "the rounds have changed.")
        if sentences and "benchmark" in row:
            sentences.insert(0, f"Prompts of {row['benchmark']}.")
        if sentences:
            story.append(_text(*sentences))
    return story


def tell_losses(s: Settings, pictures: pd.DataFrame, model: str) -> Story:
    """Where the model has fallen behind the base: in scores, and in the skills that they tell."""
    columns = pictures.columns.drop(KEYS)

    # Whether large, light or rich colours are good, whoever labelled decides.
    if labelled_elsewhere(s):
        columns = columns.intersection(["alignment"])
    losses = lost(summarise(pictures, list(columns), "base", "Iter0"), model)
    return [_text(f"{losses}.")] if losses else []


def _verdict(gain: Cell) -> str:
    """What a gain with its interval says, in words."""
    if gain.sign > 0:
        return "a clear gain"
    if gain.sign < 0:
        return "a clear loss"
    return "no difference that these prompts can tell"


# ---- what the run has ----

def _read_numbers(path: Path, names: tuple[str, ...]) -> dict:
    """A JSON file's content; nothing if there is none in which these names are numbers."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        numbers = [float(content[name]) for name in names]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return content if np.isfinite(numbers).all() else {}


def _rows_of(path: Path) -> int:
    """How many rows a table has; 0 if there is none that is whole."""
    if not is_whole(path):
        return 0
    return len(read_parquet(path, "01_seed.py"))


def _read_log(run: Path, k: int) -> pd.DataFrame | None:
    """The training log of model k, if this run has trained it and the log is whole."""
    path = run / f"iter{k}" / "train_log.parquet"
    if not is_whole(path):
        return None
    return read_table(path, TRAIN_LOG_COLUMNS, f"04_train_dpo.py --iter {k}")


def _second_half(log: pd.DataFrame) -> pd.Series:
    """The mean of a log's second half, which stage 04 prints too."""
    return log.tail(max(1, len(log) // 2)).mean()


def _has_gains(log: pd.DataFrame) -> bool:
    """Whether there was a reference to gain on (MaPO has none)."""
    return log.win_error_gain.notna().all()


def _models_of_run(s: Settings, pictures: pd.DataFrame) -> list[str]:
    """The run's own models among those that are evaluated, in their order."""
    names = ["base"]
    for k in range(s.iters + 1):
        names.append(f"Iter{k}")
    evaluated = set(pictures["model"])
    return [name for name in names if name in evaluated]


# ---- blocks ----

def _text(*parts: str) -> tuple[str, str]:
    """A paragraph of these parts."""
    return "text", " ".join(parts)


def _equation(*lines: str) -> tuple[str, str]:
    """Equations, one below the other."""
    return "equation", "\n".join(lines)


def _quoted(prompt: str) -> str:
    """A prompt in quotation marks, in one line, cut if it is long."""
    line = " ".join(str(prompt).split())
    if len(line) > LONG_PROMPT:
        line = line[:LONG_PROMPT] + "..."
    return f'"{line}"'


def _times(count: int, of: int) -> str:
    """How often each of `of` things comes if `count` are taken."""
    if of == 0:
        return "not at all"
    if round(count / of, 1) == 1:
        return "once"
    return f"about {count / of:.2g} times"


def _strip(run: Path, pictures: list[tuple[str, str]]) -> Story:
    """Pictures with captions, side by side: those that are still there."""
    present = []
    for image, caption in pictures:
        if (run / image).exists():
            present.append((image, caption))
    return [("pictures", present)] if present else []


def _same_prompt(s: Settings, pictures: pd.DataFrame, k: int) -> Story:
    """One evaluation prompt as base, Iter0, ..., model k have painted it from the same noise."""
    models = _models_of_run(s, pictures)
    if f"Iter{k}" not in models:
        return []

    # The first prompt of the evaluation, the same one in all rounds.
    first = pictures[pictures["model"] == models[0]].iloc[0]
    same = (pictures["prompt_id"] == first.prompt_id) & (pictures["seed"] == first.seed)
    shown = pictures[same].drop_duplicates("model").set_index("model")

    names = names_of(s)
    strip = []
    for model in models[:models.index(f"Iter{k}") + 1]:
        if model in shown.index:
            row = shown.loc[model]
            caption = f"{model}: {names[0]} {row[names[0]]:.3g}" if names else model
            strip.append((row.image, caption))
    strip = _strip(Path(s.run), strip)
    if not strip:
        return []

    introduction = _text(
        f"The evaluation prompt {_quoted(first.prompt)}, from which no model has learned, as",
        f"painted by base, Iter0 and so on up to Iter{k}, all from the same noise:")
    if k == 0:
        introduction = _text(
            f"An evaluation prompt, {_quoted(first.prompt)}, from which no model has learned, as",
            "painted by the base and by Iter0 from the same noise:")
    return [introduction, *strip]


def _figure_of_log(s: Settings, k: int, log: pd.DataFrame) -> Story:
    """Draw the curves of a training log; returns the figure as a block."""
    image = f"eval/walk/iter{k}.png"
    width = max(1, len(log) // 10)
    draw_log(log, width, is_dpo(s), Path(s.run) / image)
    caption = f"The training of Iter{k}: each step, the mean over its {s.batch} pairs"
    if width > 1:
        caption += f" (pale), and the mean over {width} steps (strong)"
    return [("picture", image, caption)]


def draw_log(log: pd.DataFrame, width: int, is_dpo: bool, path: Path) -> None:
    """Draw a training log: loss, gains, margin, accuracy; each also as a mean over `width` steps.

    The figure is nearly square, with large letters, so that it can be read on a phone.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    with matplotlib.rc_context({"font.size": 18, "axes.titlesize": 20}):
        figure, axes = plt.subplots(2, 2, figsize=(9, 8.4), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=.12, h_pad=.12)
        _draw_panels(axes, log, width, is_dpo)
        figure.canvas.draw()
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        plt.close(figure)

    # Few colours make a small file.
    with atomic(path) as temporary:
        picture = picture.quantize(32, method=Image.Quantize.FASTOCTREE)
        picture.save(temporary, format="PNG", optimize=True)


def _draw_panels(axes, log: pd.DataFrame, width: int, is_dpo: bool) -> None:
    """The four curves; dashed lines are where a model stands that has learned nothing."""
    loss_axis, gain_axis, margin_axis, accuracy_axis = axes.flat
    _draw_curve(loss_axis, log.loss, width, "C0")
    loss_axis.set_title("loss")
    if is_dpo:
        loss_axis.axhline(np.log(2), **LINE)

    gain_axis.set_visible(_has_gains(log))
    gain_axis.set_title("gain")
    _draw_curve(gain_axis, log.win_error_gain, width, "C2", "winner")
    _draw_curve(gain_axis, log.lose_error_gain, width, "C3", "loser")
    gain_axis.axhline(0, **LINE)
    gain_axis.legend(frameon=False)

    _draw_curve(margin_axis, log.margin, width, "C0")
    margin_axis.set_title("margin")
    margin_axis.axhline(0, **LINE)

    _draw_curve(accuracy_axis, log.accuracy, width, "C0")
    accuracy_axis.set_title("implicit accuracy")
    accuracy_axis.set_ylim(0, 1.02)
    accuracy_axis.axhline(.5, **LINE)

    for axis in axes.flat:
        axis.grid(alpha=.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("step")


def _draw_curve(axis, values: pd.Series, width: int, colour: str, label: str = "") -> None:
    """A column of the log: pale as it is, strong as a running mean."""
    smooth = values.rolling(width, center=True, min_periods=1).mean()
    axis.plot(values, color=colour, alpha=.35, lw=1.2)
    axis.plot(smooth, color=colour, lw=3, label=label)


# ---- the same story as Markdown ----

def as_markdown(story: Story) -> str:
    """The story as the text of <run>/eval/walk.md, from where its pictures are found."""
    parts = [f"# {TITLE}"]
    for kind, *content in story:
        parts.append(_markdown_block(kind, *content))
    return "\n\n".join(parts) + "\n"


def _markdown_block(kind: str, content, caption: str = "") -> str:
    """One block in Markdown."""
    if kind == "heading":
        return f"## {plain(content)}"
    if kind == "text":
        return plain(content)
    if kind == "equation":
        return "".join(f"    {line}\n" for line in content.split("\n")).rstrip()
    if kind == "table":
        return markdown(content).strip()
    if kind == "picture":
        return f"{_image(content, FIGURE_WIDTH)}\n\n{plain(caption)}"

    # Pictures are a table: a row of them, and their captions below. The first row is its head.
    lines = []
    for start in range(0, len(content), ACROSS):
        row = content[start:start + ACROSS]
        lines.append([_image(image, PICTURE_WIDTH) for image, _ in row])
        lines.append([plain(caption) for _, caption in row])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _image(image: str, width: int) -> str:
    """A picture of the run, addressed from the folder eval."""
    address = quote(posixpath.relpath(image, "eval"))
    return f'<img src="{address}" width="{width}" alt="">'

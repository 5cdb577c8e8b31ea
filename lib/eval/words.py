"""What the names in a table and on the page mean, and what an evaluation says in sentences.

The meanings explain the page's table. The sentences end stage 05 and open the page: how far the
run's last model has come from the base, what it has lost on the way, whether its judge could be
trusted, and a command to try next. No number is computed here.
"""

import shlex
from pathlib import Path

import pandas as pd

from lib.eval.scores import WORLD
from lib.settings import FIELDS, PRESETS, Settings, flag

MEANINGS = {
    "base": "the model before any training",
    "Iter0": "the base after training on the human pairs alone",
    "Iter1": "the model after one more round, in which it has also learned from pairs that it made "
             "and judged itself; Iter2, Iter3 likewise",
    "human pairs": "pairs of pictures that people have compared: all that people were asked for "
                   "this model",
    "minutes": "what it took to make this model on this machine, without its evaluation",
    "prompts": "prompts that were painted and scored; no model has learned from them",
    "gain over base": "mean difference to the base, prompt by prompt, from the same noise",
    "over Iter0": "mean difference to Iter0: what the rounds have brought",
    "wins over base": "share of prompts whose pictures have the higher mean score; ties count half",
    "[a, b]": "95% interval over prompts; another run seed may give more or less than that",
    "pickscore": "what people prefer, as a model trained on Pick-a-Pic guesses it; about 20",
    "hpsv2": "what people prefer, as a model trained on HPD v2 guesses it; about 27",
    "hpsv2.1": "as hpsv2, from other weights: never mix the two",
    "imagereward": "what people prefer, as ImageReward guesses it; about 0 on average",
    "aesthetics": "how beautiful a picture is whatever its prompt, 1 to 10 (LAION)",
}
WORLD_MEANINGS = {
    "utility": "what the embedded world's people like: alignment + 2 aesthetics, 0 to 3",
    "alignment": "how much of the prompt a picture shows, 0 to 1",
    "aesthetics": "what no prompt mentions, 0 to 1: light, saturation, size, centring, cleanness",
}

# Where somebody else has labelled the embedded world's pictures.
OTHERS_MEANINGS = {
    "aesthetics": "what no prompt mentions, 0 to 1: light, saturation, size, centring, cleanness, "
                  "as the embedded world's own people like them, and not whoever has labelled",
}


# ---- names ----

def meanings(scores: list[str]) -> dict[str, str]:
    """What each name of the table means, for an evaluation with these scores."""
    if set(WORLD) & set(scores) == {*WORLD[1:]}:
        return MEANINGS | WORLD_MEANINGS | OTHERS_MEANINGS
    if set(WORLD) <= set(scores):
        return MEANINGS | WORLD_MEANINGS
    return MEANINGS


def training_of(s: Settings) -> str:
    """The settings of a run's training, by which two runs can be told apart."""
    return (f"alpha {s.alpha:g}, beta {s.beta:g}, learning rate {s.lr:g}, N {s.candidates} "
            f"candidates, {s.draws} draws, Iter0 {_length(s.iter0_steps)}, a round "
            f"{_length(s.iter_steps)}, {s.batch} pairs a step, run seed {s.seed}")


def _length(steps: int) -> str:
    """The length of a training; 0 steps stand for one pass over its pairs."""
    return f"{steps} steps" if steps else "one pass"


def near(path: str | Path) -> str:
    """A path as one would type it here: relative where it lies below the working folder."""
    path = Path(path).absolute()
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


# ---- sentences ----

def learned(summary: pd.DataFrame, score: str, model: str, labels: str) -> list[str]:
    """How far a model has come from the base in a score: a sentence for each benchmark."""
    sentences = []
    several = summary["benchmark"].nunique() > 1
    for row in rows_with_gain(summary, model, score):
        gain, low, high = row["gain"], row["gain_low"], row["gain_high"]
        if round(low, 3) > 0:
            result = f"beats base by {gain:.3f} {score} [{low:.3f}, {high:.3f}]"
        elif round(high, 3) < 0:
            result = f"does not beat base: {gain:+.3f} {score} [{low:+.3f}, {high:+.3f}]"
        else:
            result = f"cannot be told from base: {gain:+.3f} {score} [{low:+.3f}, {high:+.3f}]"
        where = f" of {row['benchmark']}" if several else ""
        sentences.append(f"{model} {result} on {row['prompts']:.0f} unseen prompts{where}, with "
                         f"{labels} human pairs")
    return sentences


def lost(summary: pd.DataFrame, model: str) -> str:
    """The scores and skills in which a model is clearly behind the base, in a sentence, or ""."""
    falls = []
    several = summary["benchmark"].nunique() > 1
    for row in rows_with_gain(summary, model):
        if round(row["gain_high"], 3) < 0:
            where = f" on {row['benchmark']}" if several else ""
            falls.append(f"{row['score']}{where} falls by {-row['gain']:.3f} "
                         f"[{-row['gain_high']:.3f}, {-row['gain_low']:.3f}]")
    return f"What {model} has lost: {', '.join(falls)}" if falls else ""


def changed(summary: pd.DataFrame, model: str) -> str:
    """What can be measured and is clearly other than in the base, in a sentence, or "".

    Which of it is good, only those know who have labelled.
    """
    changes = []
    for row in rows_with_gain(summary, model):
        if round(row["gain_low"], 3) > 0 or round(row["gain_high"], 3) < 0:
            changes.append(f"{row['score']} {row['gain']:+.3f} [{row['gain_low']:+.3f}, "
                           f"{row['gain_high']:+.3f}]")
    return f"What has changed from base to {model}: {', '.join(changes)}" if changes else ""


def rows_with_gain(summary: pd.DataFrame, model: str, score: str = "") -> list[dict]:
    """The rows of a model over whole benchmarks, those with a gain over the base."""
    chosen = (summary["model"] == model) & (summary["style"] == "")
    if score:
        chosen &= summary["score"] == score
    rows = summary[chosen]
    if "gain" not in rows:
        return []
    return rows[rows["gain"].notna()].to_dict("records")


def next_command(s: Settings) -> str:
    """A run to try after this one: the question that it leaves most open.

    It differs from this run in one setting. Where its folder is there already, the two are to be
    compared.
    """
    name, change = "no-mixup", {"alpha": 1.0}
    if s.alpha == 1:
        name, change = "mixup", {"alpha": .25}
    if s.iters == 0:
        name, change = "rounds", {"iters": 3}

    # A run that was begun on this advice leads back to where it came from.
    run = Path(s.run).absolute()
    other = run.with_name(f"{run.name}-{name}")
    if s.alpha == 1 and run.name.endswith("-no-mixup"):
        other = run.with_name(run.name.removesuffix("-no-mixup"))
    if other.exists():
        return f"./run_sail.sh compare {near(run)} {near(other)}"

    # Whatever this run has that its preset has not, the other one has too.
    words = ["./run_sail.sh", s.preset, "--run", near(other)]
    for field in FIELDS.values():
        value = change.get(field.name, getattr(s, field.name))
        if not field.metadata["free"] and value != PRESETS[s.preset][field.name]:
            words.append(f"{flag(field.name)} {shlex.quote(str(value))}")
    return " ".join(words)

"""The table of an evaluation: means, gains and win rates, in words for people and for programs.

`summarise` computes all the numbers, once; the other functions put them in a form: `readable` and
`markdown` for table.md and the page, `for_terminal` for the screen, `for_programs` for table.csv.
Gains are paired: every model has drawn the same prompts with the same noise. No score is computed
here (lib/eval/scores.py), and the paper's own table is lib/eval/paper.py.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.intervals import bootstrap
from lib.settings import Settings

# The columns of scores.parquet before the scores.
KEYS = ["model", "benchmark", "style", "prompt_id", "prompt", "seed", "image"]

# What every row of `summarise` says beside its numbers.
SUMMARY_KEYS = ["model", "benchmark", "style", "score"]

# What begins so is a formula to a spreadsheet, which may run programs and ask the network.
FORMULA = re.compile(r"\s*[=+\-@]")

# What would begin code, emphasis, another cell, or a link or picture in Markdown.
MARKDOWN = re.compile(r"[\\`*|]|(?<=\])[(\[:]")


@dataclass(frozen=True)
class Cell:
    """A cell of the readable table that knows whether it shows a clear gain (+1) or loss (-1).

    A gain is clear if its interval, as printed, lies above zero; any other cell has sign 0.
    """
    text: str
    sign: int = 0

    def __str__(self) -> str:
        return self.text


# ---- the numbers ----

def summarise(scores: pd.DataFrame, names: list[str], base: str, iter0: str) -> pd.DataFrame:
    """Compute all numbers of the table from `scores` (scores.parquet); `names` are its scores.

    There is one row per benchmark, style, score and model; style "" is the whole benchmark. The
    columns are

        prompts, mean, low, high                              the score, with its interval
        gain, gain_low, gain_high, win_rate                   over the model `base`
        over_iter0, over_iter0_low, over_iter0_high           over the model `iter0`

    Intervals are 95%, from the bootstrap over prompts. The win rate is the share of prompts whose
    pictures have the higher mean score, ties counted half. A model that lacks prompts is compared
    on those that it has. Without names there are no rows.
    """
    models = scores["model"].unique()
    rows = []
    for benchmark, of_benchmark in scores.groupby("benchmark", sort=False):
        for style in _styles(of_benchmark):
            part = of_benchmark
            if style:
                part = of_benchmark[of_benchmark["style"] == style]

            # Each score for itself: means per prompt, then what there is to say of the models.
            for name in names:
                key = {"benchmark": benchmark, "style": style, "score": name}
                means = _means_of_prompts(part, name, models)
                rows.extend(_compare(means, key, base, iter0))
    return pd.DataFrame(rows, columns=None if rows else SUMMARY_KEYS)


def _styles(scores: pd.DataFrame) -> list[str]:
    """The parts of a benchmark: "" for the whole, and its styles if it has several."""
    parts = [""]
    if scores["style"].nunique() > 1:
        parts += [style for style in scores["style"].unique() if style]
    return parts


def _means_of_prompts(scores: pd.DataFrame, name: str, models) -> pd.DataFrame:
    """One score as (prompts, models), in the order of `models`; NaN where there is none."""
    # A prompt is what the bootstrap resamples, so its pictures are averaged first. A prompt that
    # stands in two styles counts in both.
    prompt = ["style", "prompt_id"]
    means = scores.pivot_table(index=prompt, columns="model", values=name, sort=False)

    # A benchmark may have been given to some of the models only.
    return means[[model for model in models if model in means.columns]]


def _compare(means: pd.DataFrame, key: dict, base: str, iter0: str) -> list[dict]:
    """The rows of one benchmark, style and score from its means (prompts, models)."""
    rows = {}
    for model in means.columns:
        rows[model] = {"model": model} | key

    for model, of_model in _statistics(means).items():
        rows[model]["prompts"] = of_model["prompts"]
        rows[model]["mean"] = of_model["mean"]
        rows[model]["low"] = of_model["low"]
        rows[model]["high"] = of_model["high"]

    # Differences are taken prompt by prompt: what a prompt adds to both models drops out.
    if base in means.columns:
        over_base = _statistics(means.sub(means[base], axis=0))
        for model, of_model in over_base.items():
            if model != base:
                rows[model]["gain"] = of_model["mean"]
                rows[model]["gain_low"] = of_model["low"]
                rows[model]["gain_high"] = of_model["high"]
                rows[model]["win_rate"] = of_model["positive"]

    # The gain of the rounds alone: over the model that has seen the human pairs and no other.
    if iter0 in means.columns:
        over_iter0 = _statistics(means.sub(means[iter0], axis=0))
        for model, of_model in over_iter0.items():
            if model not in (base, iter0):
                rows[model]["over_iter0"] = of_model["mean"]
                rows[model]["over_iter0_low"] = of_model["low"]
                rows[model]["over_iter0_high"] = of_model["high"]
    return list(rows.values())


def _statistics(values: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Statistics of each column of (prompts, models): prompts, mean, low, high, positive.

    `positive` is the share of prompts above zero, ties counted half. A model without any prompt has
    no statistics.
    """
    # Models that have all prompts are resampled together, any other over the prompts it has.
    is_complete = values.notna().all()
    groups = [values.columns[is_complete].tolist()]
    for model in values.columns[~is_complete]:
        groups.append([model])

    statistics = {}
    for group in groups:
        table = values[group].dropna().to_numpy()
        if table.size == 0:
            continue

        low, high = bootstrap(table)
        for i, model in enumerate(group):
            column = table[:, i]
            statistics[model] = {
                "prompts": len(column),
                "mean": column.mean(),
                "low": low[i],
                "high": high[i],
                "positive": (column > 0).mean() + .5 * (column == 0).mean(),
            }
    return statistics


def with_first(names: list[str], scores: pd.DataFrame) -> pd.DataFrame:
    """The table scores.parquet with these scores first, then what else was measured."""
    others = scores.columns.drop([*KEYS, *names])
    return scores[[*KEYS, *names, *others]]


# ---- the table that people read ----

def readable(summary: pd.DataFrame, names: list[str], facts: dict[str, dict]) -> pd.DataFrame:
    """The table that people read: a row per benchmark and model, whole benchmarks only.

    `summary` comes from `summarise`; the first of its score `names` is the one that the models were
    trained for. `facts` has texts by model and column, such as the human pairs behind it. Gains are
    `Cell`s, all else is text. Columns that would be empty are left out.
    """
    whole = summary[summary["style"] == ""]
    fact_names = _names_of_facts(facts)

    # Where models have different numbers of prompts, each says its own.
    uneven = whole.groupby("benchmark").prompts.nunique().max() > 1

    rows = []
    for (benchmark, model), part in whole.groupby(["benchmark", "model"], sort=False):
        results = part.set_index("score").to_dict("index")

        # Who it is, and what is behind it.
        row = {"model": model, "benchmark": benchmark}
        for fact in fact_names:
            row[fact] = facts.get(model, {}).get(fact, "")
        if uneven:
            row["prompts"] = f"{results[names[0]]['prompts']:.0f}"

        # Score by score, so that a reader who sees the first columns alone has the main thing.
        for name in names:
            row[name] = _mean(results[name])
            row[f"{name}: gain over base"] = _gain(results[name], "gain")
            if name == names[0]:
                row[f"{name}: over Iter0"] = _gain(results[name], "over_iter0")
            row[f"{name}: wins over base"] = _win_rate(results[name])
        rows.append(row)

    return _without_needless_columns(pd.DataFrame(rows))


def without_scores(scores: pd.DataFrame, facts: dict[str, dict]) -> pd.DataFrame:
    """The table that people read where nothing was scored: who painted how many prompts."""
    rows = []
    for (benchmark, model), part in scores.groupby(["benchmark", "model"], sort=False):
        row = {"model": model, "benchmark": benchmark}
        for fact in _names_of_facts(facts):
            row[fact] = facts.get(model, {}).get(fact, "")
        row["prompts"] = str(part.prompt_id.nunique())
        rows.append(row)
    return _without_needless_columns(pd.DataFrame(rows))


def for_terminal(summary: pd.DataFrame, names: list[str], facts: dict[str, dict],
                 width: int = 100) -> str:
    """The main columns of the readable table as plain text of at most `width` characters a line."""
    main = names[0]
    rows = []
    whole = summary[summary["style"] == ""]
    for (benchmark, model), part in whole.groupby(["benchmark", "model"], sort=False):
        results = part.set_index("score").to_dict("index")
        row = {
            "model": _short(model),
            "benchmark": _short(benchmark),
            "human pairs": facts.get(model, {}).get("human pairs", ""),
            main: _decimal(results[main]["mean"]),
            "over base": _gain(results[main], "gain"),
            "over Iter0": _gain(results[main], "over_iter0"),
            "wins": _win_rate(results[main]),
        }
        for name in names[1:]:
            row[name] = _decimal(results[name]["mean"])
        rows.append(row)

    # What does not fit stands in table.md.
    table = _without_needless_columns(pd.DataFrame(rows))
    text = table.to_string(index=False)
    while max(map(len, text.split("\n"))) > width and table.shape[1] > 2:
        table = table.iloc[:, :-1]
        text = table.to_string(index=False)
    return text


def _short(name) -> str:
    """A name in one line of at most 20 characters that a terminal shows."""
    line = "".join(letter for letter in " ".join(str(name).split()) if letter.isprintable())
    return line if len(line) <= 20 else line[:17] + "..."


def _decimal(number: float) -> str:
    return "" if pd.isna(number) else f"{number:.3f}"


def _names_of_facts(facts: dict[str, dict]) -> list[str]:
    """The columns that facts have, each once, in order of first occurrence."""
    names = []
    for of_model in facts.values():
        for name in of_model:
            if name not in names:
                names.append(name)
    return names


def _mean(result: dict) -> str:
    """A mean with its interval."""
    if pd.isna(result["mean"]):
        return ""
    return f"{result['mean']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"


def _gain(result: dict, name: str) -> Cell:
    """A gain with its interval; `name` is gain or over_iter0. The base has none of either."""
    gain = result.get(name, np.nan)
    if pd.isna(gain):
        return Cell("")

    low = result[f"{name}_low"]
    high = result[f"{name}_high"]
    text = f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"

    # The interval as printed decides: a colour beside +0.000 would puzzle the reader.
    if round(low, 3) > 0:
        return Cell(text, sign=1)
    if round(high, 3) < 0:
        return Cell(text, sign=-1)
    return Cell(text)


def _win_rate(result: dict) -> str:
    """The share of prompts on which a model beats the base."""
    rate = result.get("win_rate", np.nan)
    if pd.isna(rate):
        return ""
    return f"{rate:.0%}"


def _without_needless_columns(table: pd.DataFrame) -> pd.DataFrame:
    """The table without empty columns, and without the benchmark's name where there is but one."""
    is_empty = (table.map(str) == "").all()
    needless = table.columns[is_empty].tolist()
    if table["benchmark"].nunique() == 1:
        needless.append("benchmark")
    return table.drop(columns=needless)


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, one line per row."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    text = ""
    for line in lines:
        text += "| " + " | ".join(plain(value) for value in line) + " |\n"
    return text


def plain(value) -> str:
    """Any value in one line of Markdown, as text: no HTML, no new cell, no link and no picture."""
    line = " ".join(str(value).split())
    return MARKDOWN.sub(r"\\\g<0>", html.escape(line, quote=False))


# ---- the table that programs read ----

def for_programs(summary: pd.DataFrame, facts: dict[str, dict], paper: dict,
                 versions: list[str]) -> pd.DataFrame:
    """table.csv: `summary`, each model's facts, the paper's number, and what computed the score.

    `paper` has the paper's numbers by (model, benchmark, style, score); over_paper is ours less the
    paper's. A line of `versions` begins with the name of its score; the first line stands for
    scores that have none.
    """
    table = summary.copy()
    for fact in _names_of_facts(facts):
        values = [facts.get(model, {}).get(fact, "") for model in table.model]
        table[fact.replace(" ", "_")] = values

    keys = zip(table["model"], table["benchmark"], table["style"], table["score"])
    table["paper"] = [paper.get(key, np.nan) for key in keys]
    table["over_paper"] = table["mean"] - table["paper"]

    # The scores of the embedded world come from one scorer, which does not bear their names.
    version_of = {version.split()[0]: version for version in versions}
    table["scorer"] = [version_of.get(score, versions[0]) for score in table["score"]]
    return table


def as_csv(table: pd.DataFrame) -> str:
    """A table as CSV; a text that a spreadsheet would run as a formula gets a ' before it."""
    return table.map(_no_formula).to_csv(index=False, float_format="%.6g")


def _no_formula(value):
    """A cell's value, a text in one line: as a formula it would not be taken, nor as a new row."""
    if not isinstance(value, str):
        return value
    line = re.sub(r"[\t\r\n]", " ", value)
    return "'" + line if FORMULA.match(line) else line


# ---- what the numbers depend on, and what they cost ----

def notes(s: Settings, made: dict, begun_at: str | None, scores: pd.DataFrame,
          versions: list[str], outside: dict[str, str]) -> list[str]:
    """All that the numbers depend on, in lines of text.

    `made` is settings.environment(), `begun_at` the commit at which the run was begun, `versions`
    has a line per scorer, and `outside` says of each row that is no model of the run where it lies.
    """
    counts = []
    for name, part in scores.groupby("benchmark", sort=False):
        counts.append(f"{name} {part.prompt_id.nunique()} prompts")
    drawn = (f"{', '.join(counts)}, {s.eval_seeds} picture(s) each; {s.sampler}, "
             f"{s.sample_steps} steps, guidance {s.cfg_scale}, {s.resolution} pixels, {s.dtype}; "
             f"base {s.model}")
    if s.vae:
        drawn += f", VAE {s.vae}"

    lines = [drawn]
    lines.append("intervals: 95%, bootstrap over prompts; gains and wins (ties half) paired by "
                 "prompt and noise")
    for name, where in outside.items():
        lines.append(f"row {name}: {where}")
    for version in versions:
        lines.append(f"scorer {version}")

    # A package that is not installed has no version, and a machine may have no GPU to name.
    packages = [f"{name} {version}" for name, version in made["versions"].items() if version]
    hardware = [f"{name} {value}" for name, value in made["hardware"].items() if value]
    lines.append(" ".join(packages))
    code = f"code {begun_at}"
    if made["commit"] != begun_at:
        code += f" (the run), {made['commit']} (this evaluation)"
    lines.append(f"{code}, " + ", ".join(hardware))
    return lines


def cost(run: Path) -> pd.DataFrame:
    """The ledger of a run, summed by stage and round."""
    ledger = pd.read_parquet(Path(run) / "ledger.parquet")
    by_round = ledger.groupby(["stage", "iter"], dropna=False, sort=True)
    return by_round.agg(
        seconds=("seconds", "sum"),
        images=("images", "sum"),
        unet_forwards=("unet_forwards", "sum"),
        optimizer_steps=("optimizer_steps", "sum"),
        peak_memory_bytes=("peak_memory_bytes", "max"),
        device=("device", "last"),
    ).reset_index()

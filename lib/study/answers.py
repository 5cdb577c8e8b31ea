"""The answer to a question: a table and a figure, with intervals over run seeds."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lib.eval.table import markdown
from lib.run import write_text
from lib.study import figures
from lib.study.means import interval
from lib.study.questions import ARMS, Question
from lib.study.results import SCORES, Results, Row, is_round

# ---- the table of a question ----

def rows_of(results: Results) -> list[Row]:
    """Base and Iter0 of the first arm, then each arm's last model and its further rows."""
    first = results.arms[0]
    rows = []
    for model in ("base", "Iter0"):
        if model in results.models(first):
            rows.append(Row(model, first, model))

    # The last model is the arm's answer, or the rival that was trained in the run; further rows,
    # the controls say, keep their own names.
    for arm in results.arms:
        rival = ARMS[arm].rival
        rounds, others = [], []
        for model in results.models(arm):
            if is_round(model):
                rounds.append(model)
            elif model == rival:
                continue
            else:
                others.append(Row(model, arm, model))
        rows.append(Row(arm, arm, rival or rounds[-1]))
        rows += others
    return rows


def table_of(results: Results) -> pd.DataFrame:
    """One line per row: means, gains in utility over the base and over the first arm, and costs."""
    rows = rows_of(results)
    first_arm = results.arms[0]
    first_row = next(row for row in rows if row.name == first_arm)

    # Where a row has no such number its cell stays empty.
    lines = []
    for row in rows:
        line = {"row": row.name, "seeds": results.runs_of(row.arm).seed.nunique()}
        for score in SCORES:
            line[score] = results.values(row.arm, row.model, score).to_numpy().mean()
        line |= gain_columns(results, row, "over base", Row("base", row.arm, "base"))
        line |= gain_columns(results, row, f"over {first_arm}", first_row)
        line |= fact_columns(results, row)
        lines.append(line)
    return pd.DataFrame(lines)


def gain_columns(results: Results, row: Row, title: str, other: Row) -> dict:
    """The gain in utility over another row, with its interval and seed by seed.

    There is none over itself, and none of the base.
    """
    if row.name == "base" or (row.arm, row.model) == (other.arm, other.model):
        return {}
    gains = results.gains(row, other, "utility").to_numpy()
    mean, low, high = interval(gains)
    by_seed = " ".join(f"{gain:+.3f}" for gain in gains.mean(1))
    return {title: mean, f"{title} low": low, f"{title} high": high, f"{title}, by seed": by_seed}


def fact_columns(results: Results, row: Row) -> dict:
    """What a row cost, and how its arm judged."""
    # The judge is the arm's, so it stands in one of its rows alone.
    runs = results.runs_of(row.arm)
    pairs = runs.pairs.max()
    if row.name == "base":
        pairs = 0
    accuracy = np.nan
    if row.name == row.arm:
        judges = runs
        if ARMS[row.arm].rival:
            judges = runs[runs.model == row.model]
        accuracy = judges.accuracy.mean()

    # A control costs what its Iter0 does.
    of_iter0 = runs[runs.model == "Iter0"].forwards.mean()
    is_control = not is_round(row.model) and row.model != ARMS[row.arm].rival
    forwards = runs[runs.model == row.model].forwards.mean()
    if is_control:
        forwards = of_iter0

    # What the rounds alone cost: who has human pairs and an Iter0 pays no more than this.
    in_rounds = np.nan
    if is_round(row.model) or is_control:
        in_rounds = forwards - of_iter0
    return {"human pairs": pairs, "UNet forwards": forwards, "in the rounds": in_rounds,
            "judge accuracy": accuracy}


def readable(table: pd.DataFrame, first_arm: str, over: str = "") -> str:
    """The table as people read it, in Markdown; over forwards, with what the rounds alone cost."""
    rows = []
    of_first = table.set_index("row")["in the rounds"].get(first_arm)
    for line in table.to_dict("records"):
        in_rounds = {}
        if over == "forwards":
            share = number(line["in the rounds"] / of_first, " ({:.0%})")
            in_rounds = {"in the rounds": number(line["in the rounds"] / 1e3, "{:.0f}k") + share}
        seeds = {}
        if table.seeds.nunique() > 1:
            seeds = {"run seeds": line["seeds"]}
        rows.append({
            "row": line["row"],
            **seeds,
            "human pairs": number(line["human pairs"], "{:.0f}"),
            "UNet forwards": number(line["UNet forwards"] / 1e3, "{:.0f}k"),
            **in_rounds,
            "alignment": f"{line['alignment']:.3f}",
            "aesthetics": f"{line['aesthetics']:.3f}",
            "utility": f"{line['utility']:.3f}",
            "utility over base": gain(line, "over base"),
            f"over {first_arm}": gain(line, f"over {first_arm}"),
            "judge": number(line["judge accuracy"], "{:.2f}"),
        })
    return markdown(pd.DataFrame(rows))


def number(value: float, form: str) -> str:
    """A number in words; empty where it is missing."""
    if pd.isna(value):
        return ""
    return form.format(value)


def gain(line: dict, title: str) -> str:
    """A gain with its interval; empty where there is none."""
    if pd.isna(line.get(title)):
        return ""
    low, high = line[f"{title} low"], line[f"{title} high"]
    return f"{line[title]:+.3f} [{low:+.3f}, {high:+.3f}]"


# ---- an answer ----

def answer(out: Path, name: str, question: Question, results: Results,
           notes: Iterable[str] = ()) -> None:
    """Write a question's table, NAME.md and NAME.csv, and figure, NAME.png; print the table.

    The notes stand below the table.
    """
    # For programs, then for people.
    table = table_of(results)
    write_text(table.to_csv(index=False, float_format="%.5g"), out / f"{name}.csv")
    seeds = results.seeds
    shown = readable(table, results.arms[0], question.over)
    text = f"{question.title}; {seeds} run seeds\n\n{shown}"
    for note in notes:
        text += f"\n- {note}"
    write_text(text, out / f"{name}.md")
    print(text)

    if question.over == "rounds":
        figure = figures.draw_over_rounds(results)
    elif question.over == "forwards":
        figure = figures.draw_over_forwards(table, results.arms[0])
    elif question.over:
        figure = figures.draw_over_setting(results, question.over)
    else:
        figure = figures.draw_side_by_side(table)
    title = figure.suptitle(f"{question.title} ({seeds} run seeds, 95% intervals)", fontsize=10)
    title.set_in_layout(False)              # the axes have made room for it
    figures.save_figure(figure, out / f"{name}.png")

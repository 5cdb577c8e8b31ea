"""The primary comparisons, which were stated before the runs were made (questions.PRIMARY).

writes  <out>/primary.md, <out>/primary.csv

The rows come from several questions, of the same run seeds. Several looks are corrected together.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lib.eval.table import markdown
from lib.run import write_text
from lib.study.answers import Results, Row, rows_of
from lib.study.means import Means, holm, interval, p_value
from lib.study.questions import PRIMARY

QUESTIONS = ("rivals", "better")
TITLE = "Primary comparisons"

# Below this a difference is not put down to luck.
LEVEL = 0.05


def find_rows(answers: Iterable[Results]) -> dict[str, tuple[Results, Row]]:
    """Every row of some questions by its name, with the results that it is in."""
    rows = {}
    for results in answers:
        for row in rows_of(results):
            rows.setdefault(row.name, (results, row))
    return rows


def utility_of(found: tuple[Results, Row]) -> Means:
    """The utility of a row."""
    results, row = found
    return results.means(row.arm, row.model, "utility")


def compare(answers: Iterable[Results]) -> pd.DataFrame:
    """A line for each primary comparison whose two rows are there.

    row, over, seeds, mean, low, high (of the gain in utility), p, and p_holm: p corrected for all
    that are there. Of one run seed there is neither.
    """
    rows = find_rows(answers)
    lines = []
    for name, other in PRIMARY:
        if name in rows and other in rows:
            gain = utility_of(rows[name]).over(utility_of(rows[other]))
            mean, low, high = interval(gain)
            line = {"row": name, "over": other, "seeds": len(gain.by_seed),
                    "mean": mean, "low": low, "high": high}
            if len(gain.by_seed) > 1:
                line["p"] = p_value(gain)
            lines.append(line)

    table = pd.DataFrame(lines)
    if "p" in table:
        table["p_holm"] = holm(table.p)
    return table


def readable(table: pd.DataFrame) -> str:
    """The comparisons as people read them, in Markdown."""
    rows = []
    for line in table.to_dict("records"):
        verdict = "not told from luck"
        if line["p_holm"] < LEVEL:
            verdict = "better" if line["mean"] > 0 else "worse"
        rows.append({
            "comparison": f"{line['row']} over {line['over']}",
            "utility, 95 % interval": f"{line['mean']:+.3f} [{line['low']:+.3f}, "
                                      f"{line['high']:+.3f}]",
            "p": f"{line['p']:.4f}",
            "p, corrected (Holm)": f"{line['p_holm']:.4f}",
            "verdict": verdict,
        })
    return markdown(pd.DataFrame(rows))


def answer(out: Path, answered: dict[str, Results]) -> None:
    """Write and print the primary comparisons, if their questions are answered over run seeds."""
    if not set(QUESTIONS) <= set(answered):
        return
    table = compare([answered[name] for name in QUESTIONS])
    if "p" not in table:
        return

    text = f"{TITLE}; {table.seeds.min()} run seeds\n\n{readable(table)}"
    write_text(text, out / "primary.md")
    write_text(table.to_csv(index=False, float_format="%.5g"), out / "primary.csv")
    print(text)

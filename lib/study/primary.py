"""The primary comparisons, which were stated before the runs were made (questions.PRIMARY).

writes  <out>/primary.md, <out>/primary.csv

The rows come from several questions, of the same run seeds. Several looks are corrected together.
"""

import math
from pathlib import Path

import pandas as pd

from lib.eval.table import markdown
from lib.run import write_text
from lib.study.answers import rows_of
from lib.study.means import holm, interval, p_value
from lib.study.questions import PRIMARY, SECONDARY
from lib.study.results import Results

QUESTIONS = ("rivals", "better")
TITLE = "Primary comparisons, corrected for looking at all of them"
FURTHER = "Secondary comparisons, corrected among themselves"

# Below this a difference is not put down to luck.
LEVEL = 0.05


def compare(results: Results, pairs: tuple[tuple[str, str], ...]) -> pd.DataFrame:
    """A line for each pair of rows that are there, on the run seeds that both have.

    row, over, seeds; mean, low, high of the gain in utility; and p, which one run seed has not.
    """
    rows = {row.name: row for row in rows_of(results)}
    lines = []
    for name, other in pairs:
        if name in rows and other in rows:
            gain = results.gains(rows[name], rows[other], "utility").to_numpy()
            mean, low, high = interval(gain)
            p = math.nan
            if len(gain) > 1:
                p = p_value(gain)
            lines.append((name, other, len(gain), mean, low, high, p))
    return pd.DataFrame(lines, columns=["row", "over", "seeds", "mean", "low", "high", "p"])


def corrected(table: pd.DataFrame, looks: int) -> pd.DataFrame:
    """The lines that have run seeds, with p_holm: a comparison that is missing counts as a look."""
    table = table[table.seeds > 1]
    missing = [1.0] * (looks - len(table))
    return table.assign(p_holm=holm([*table.p, *missing])[:len(table)])


def readable(table: pd.DataFrame, with_verdict: bool) -> str:
    """The comparisons as people read them, in Markdown."""
    rows = []
    for line in table.to_dict("records"):
        row = {
            "comparison": f"{line['row']} over {line['over']}",
            "run seeds": line["seeds"],
            "utility, 95 % interval": f"{line['mean']:+.3f} [{line['low']:+.3f}, "
                                      f"{line['high']:+.3f}]",
        }
        row["p"] = f"{line['p']:.4f}"
        row["p, corrected (Holm)"] = f"{line['p_holm']:.4f}"
        if with_verdict:
            row["verdict"] = verdict(line)
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def verdict(line: dict) -> str:
    """What a comparison says, in words."""
    if line["p_holm"] >= LEVEL:
        return "not told from luck"
    return "better" if line["mean"] > 0 else "worse"


def answer(out: Path, results: Results) -> None:
    """Write and print the primary comparisons, and the next; only where there are run seeds."""
    table = corrected(compare(results, PRIMARY), len(PRIMARY))
    further = corrected(compare(results, SECONDARY), len(SECONDARY))
    if table.empty:
        return

    text = f"{TITLE}\n\n{readable(table, with_verdict=True)}"
    if len(further):
        text += f"\n{FURTHER}\n\n{readable(further, with_verdict=False)}"
    write_text(text, out / "primary.md")
    both = pd.concat([table, further])
    write_text(both.to_csv(index=False, float_format="%.5g"), out / "primary.csv")
    print(text)

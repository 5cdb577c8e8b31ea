"""The primary comparisons, which were stated before the runs were made (questions.PRIMARY).

writes  <out>/primary.md, <out>/primary.csv

The rows come from several questions, of the same run seeds. Several looks are corrected together.
"""

from pathlib import Path

import pandas as pd

from lib.eval.table import markdown
from lib.run import write_text
from lib.study.answers import Results, rows_of
from lib.study.means import holm, interval, p_value
from lib.study.questions import PRIMARY

QUESTIONS = ("rivals", "better")
TITLE = "Primary comparisons"

# Below this a difference is not put down to luck.
LEVEL = 0.05


def compare(results: Results) -> pd.DataFrame:
    """A line for each primary comparison whose two rows are there.

    row, over, seeds, mean, low, high (of the gain in utility), p, and p_holm: p corrected for all
    that are there. Of one run seed there is neither.
    """
    rows = {row.name: row for row in rows_of(results)}
    lines = []
    for name, other in PRIMARY:
        if name in rows and other in rows:
            gain = results.gains(rows[name], rows[other], "utility").to_numpy()
            mean, low, high = interval(gain)
            line = {"row": name, "over": other, "seeds": len(gain),
                    "mean": mean, "low": low, "high": high}
            if len(gain) > 1:
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


def answer(out: Path, results: Results) -> None:
    """Write and print the primary comparisons, where there are several run seeds."""
    table = compare(results)
    if "p" not in table:
        return

    text = f"{TITLE}; {table.seeds.min()} run seeds\n\n{readable(table)}"
    write_text(text, out / "primary.md")
    write_text(table.to_csv(index=False, float_format="%.5g"), out / "primary.csv")
    print(text)

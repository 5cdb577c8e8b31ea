"""The runs whose numbers the findings tell, kept here: `./run_sail.sh study --published`.

published/runs.csv          a row per run and model: its settings, what it cost and came to, the
                            commit and processor that made it, and by what its weights are known
published/scores.parquet    arm, seed, model, prompt_id, alignment and aesthetics of every prompt
published/judge.csv         what the question `judge` measured, a row per run and judge

From these the tables in lib/study/README.md are made again, interval by interval, without a run;
of the questions `size` and `reward`, measured at an earlier commit, no run is kept. A study writes
the same of its own runs, and says how many of them are the published ones to the last bit of their
weights.
"""

from pathlib import Path

import pandas as pd

from lib.run import write_table, write_text

FOLDER = Path(__file__).parent / "published"
RUNS, SCORES, JUDGE = "runs.csv", "scores.parquet", "judge.csv"


def keep(scores: pd.DataFrame, runs: pd.DataFrame, folder: Path) -> None:
    """Write what results.collect() found into a folder."""
    # Utility is alignment + 2 x aesthetics; of a single picture's score four digits will do.
    kinds = {"arm": "category", "seed": "int16", "model": "category", "prompt_id": "int32",
             "alignment": "float32", "aesthetics": "float32"}
    small = scores.round({"aesthetics": 4}).astype(kinds)[list(kinds)]
    write_text(runs.to_csv(index=False), folder / RUNS)
    write_table(small, folder / SCORES)


def read() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The published scores and runs, as results.collect() has them."""
    scores = pd.read_parquet(FOLDER / SCORES).astype({"arm": "str", "model": "str"})
    scores = scores.astype({"alignment": "float64", "aesthetics": "float64"})
    scores["utility"] = scores.alignment + 2 * scores.aesthetics
    return scores, pd.read_csv(FOLDER / RUNS)


def tell_equal(runs: pd.DataFrame) -> str:
    """A line on how many of these runs have the weights of the published ones."""
    _, published = read()
    names = ["arm", "seed", "settings", "model"]
    both = runs.merge(published, on=names, suffixes=("", " published")).dropna(subset="weights")
    if len(both) == 0:
        return "none of these runs is published"

    # A run is equal if all its models are.
    same = (both.weights == both["weights published"]).groupby([both.arm, both.seed]).all()
    line = f"{same.sum()} of {len(same)} runs have the published weights, bit for bit"
    if not same.all():
        line += f" (published: {published.cpu.mode()[0]}; another processor rounds otherwise)"
    return line

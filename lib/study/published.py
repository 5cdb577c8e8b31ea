"""The runs whose numbers the findings tell, kept here: `./run_sail.sh study --published`.

published/runs.csv          a row per run and model: its settings, what it cost and came to, the
                            commit and processor that made it, and by what its weights are known
published/prompts.parquet   question, arm, model, prompt_id and the scores' means over run seeds
published/judge.csv         what the question `judge` measured, a row per run and judge

From these every table of lib/study/README.md is made again, interval by interval, without a
run. A study writes the same of its own runs, and says how many of them are the published ones
to the last bit of their weights.
"""

from pathlib import Path

import pandas as pd

from lib.run import UserError, write_table, write_text
from lib.study import answers, judge, primary
from lib.study.answers import SCORES, Results
from lib.study.questions import Question

FOLDER = Path(__file__).parent / "published"
RUNS, PROMPTS, JUDGE = "runs.csv", "prompts.parquet", "judge.csv"


def keep(answered: dict[str, Results], folder: Path) -> None:
    """Write runs and prompts of the questions' results, by their names, into a folder."""
    if not answered:
        return
    runs = pd.concat([results.runs for results in answered.values()])
    runs = runs.drop_duplicates(["arm", "seed", "model"])

    prompts = []
    for name, results in answered.items():
        prompts.append(results.prompts.assign(question=name))
    prompts = pd.concat(prompts)[["question", "arm", "model", "prompt_id", *SCORES]]

    write_text(runs.to_csv(index=False), folder / RUNS)
    write_table(prompts.astype(dict.fromkeys(SCORES, "float32")), folder / PROMPTS)


def read(questions: dict[str, Question]) -> dict[str, Results]:
    """The published results of those of the questions that are published."""
    runs = pd.read_csv(FOLDER / RUNS)
    prompts = pd.read_parquet(FOLDER / PROMPTS)

    published = {}
    for name, question in questions.items():
        mine = prompts[prompts.question == name].drop(columns="question")
        if len(mine):
            arms = [arm for arm in question.arms if arm in set(mine.arm)]
            seeds = range(question.seeds)
            of_arms = runs[runs.arm.isin(arms) & runs.seed.isin(seeds)]
            published[name] = Results(of_arms, mine, arms, seeds)
    return published


def answer(out: Path, questions: dict[str, Question]) -> None:
    """Answer the questions again, into a folder. UserError: one is not published."""
    published = read(questions)
    for name, question in questions.items():
        if name == "judge":
            print(judge.readable(pd.read_csv(FOLDER / JUDGE)))
        elif name in published:
            answers.answer(out, name, question, published[name])
        else:
            raise UserError(f"--questions {name}: its runs are not published; "
                            f"run it: leave out --published")
    primary.answer(out, published)


def tell_equal(runs: pd.DataFrame) -> str:
    """A line on how many of these runs have the weights of the published ones."""
    published = pd.read_csv(FOLDER / RUNS)
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

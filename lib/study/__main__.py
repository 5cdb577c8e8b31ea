"""When and why does SAIL work? The rival rows and every ablation, over several run seeds.

writes  <out>/<arm>-<seed>/ (run folders), <out>/runs.csv and <out>/scores.parquet (published.py),
        for each question <out>/<question>.md, .csv, .png, and <out>/primary.md, .csv

An arm is a run of the embedded world with other settings; lib/study/questions.py lists them, and
the questions that they answer. Two processes work at once, each on half of the processors. The same
command continues a stopped study.

Every arm's beta and learning rate were chosen alike: `study --tune` tries the same four settings
for each on the development prompts, with a run seed used for nothing else, and takes the best that
keeps base's alignment. The evaluation prompts are fresh.

    ./run_sail.sh study                                     the main questions: hours, see --plan
    ./run_sail.sh study --questions all                     every question
    ./run_sail.sh study --questions rivals --seeds 2        a part of it
    ./run_sail.sh study --finished                          answers from the runs that are finished
    ./run_sail.sh study --published                         answers from those that are published
    ./run_sail.sh study --tune                              how TUNED was found
    ./run_sail.sh study --plan                              what it would cost; makes nothing

Settings of a run, such as --draws 4, may follow: all arms then have them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from lib.run import run_stage
from lib.settings import ROOT, Parser, require
from lib.settings import build_parser as settings_parser
from lib.study import answers, cost, judge, primary, published
from lib.study.questions import ARMS, MAIN_QUESTIONS, QUESTIONS, Question
from lib.study.results import collect, results_of
from lib.study.runner import Job, folder_of, is_done, planned_settings, run_all
from lib.study.tune import all_jobs, tune

# The study gives these settings to every run itself; what to give instead.
OWN_SETTINGS = {"seed": "--seeds N is the number of run seeds", "run": "--out names the folder",
                "preset": "the study is of the embedded world",
                "iters": "an arm has its own rounds (lib/study/questions.py)"}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="run_sail.sh study", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--questions", nargs="+", default=list(MAIN_QUESTIONS),
                        choices=[*QUESTIONS, "all"])
    parser.add_argument("--seeds", type=int, default=0,
                        help="run seeds of every question; 0 leaves its own number")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--tune", action="store_true",
                        help="try GRID for every arm of TUNE_ARMS instead")
    parser.add_argument("--plan", action="store_true",
                        help="print what is still to be run and what it costs, and stop")
    parser.add_argument("--finished", action="store_true",
                        help="run nothing; answer from the runs that are finished")
    parser.add_argument("--published", action="store_true",
                        help="run nothing; answer from the runs that are published")
    return parser


def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The study's own options, and settings of a run that all arms are to have.

    UserError: a flag is neither, or a setting that the study gives itself.
    """
    options, more = build_parser().parse_known_args(argv)
    require(options.seeds >= 0, f"--seeds {options.seeds}: must not be negative")
    require(options.workers >= 1, f"--workers {options.workers}: must be at least 1")

    place = next(folder for folder in (options.out, *options.out.absolute().parents)
                 if folder.exists())
    require(place.is_dir(), f"--out {options.out}: {place} is no folder; name another one")

    given = vars(settings_parser("").parse_args(more))
    for name, instead in OWN_SETTINGS.items():
        require(name not in given, f"--{name} is not for the study: {instead}")
    return options, more


def choose_questions(names: list[str], seeds: int) -> dict[str, Question]:
    """The questions by name, with another number of run seeds if one is given."""
    if "all" in names:
        names = list(QUESTIONS)

    questions = {}
    for name in names:
        questions[name] = QUESTIONS[name]
        if seeds:
            questions[name] = replace(QUESTIONS[name], seeds=seeds)
    return questions


def jobs_of(questions: dict[str, Question], more: list[str]) -> list[Job]:
    """Every run that the questions need, once."""
    jobs = {}
    for question in questions.values():
        for arm in question.arms:
            for seed in range(question.seeds):
                jobs[arm, seed] = Job(arm, seed, tuple(more), ARMS[arm].rows)
    return list(jobs.values())


def ended_early(failed: dict[tuple[str, int], str], question: Question) -> dict[str, str]:
    """The arms of a question that are left out because a run did not come to its end, and why."""
    left_out = {}
    for arm in question.arms:
        messages = []
        for seed in range(question.seeds):
            if (arm, seed) in failed:
                messages.append(failed[arm, seed])
        if messages:
            left_out[arm] = (f"left out: {arm}, {len(messages)} of {question.seeds} run seeds "
                             f"ended early ({messages[0]})")
    return left_out


def answer_questions(
    out: Path,
    questions: dict[str, Question],
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    failed: dict[tuple[str, int], str],
) -> None:
    """Answer each question, with the arms that are there and of which no run ended early."""
    for name, question in questions.items():
        left_out = ended_early(failed, question)
        there = set(runs.arm) - set(left_out)
        arms = [arm for arm in question.arms if arm in there]
        missing = [arm for arm in question.arms if arm not in there and arm not in left_out]
        if missing:
            left_out["missing"] = f"left out, no run of it is there: {'; '.join(missing)}"
        if not arms or (name == "judge" and "SAIL" not in arms):
            print("\n".join([f"{question.title}: no answer", *left_out.values()]))
        elif name == "judge":
            answer_judge(out, question, arms, runs)
        else:
            results = results_of(scores, runs, arms, range(question.seeds))
            answers.answer(out, name, question, results, left_out.values())

    # Their rows stand in several questions; an arm of which a run ended early is in none.
    asked = [question for name, question in questions.items() if name in primary.QUESTIONS]
    there = set(runs.arm)
    for question in asked:
        there -= set(ended_early(failed, question))
    arms = [arm for question in asked for arm in question.arms if arm in there]
    if arms and len(asked) == len(primary.QUESTIONS):
        seeds = range(min(question.seeds for question in asked))
        primary.answer(out, results_of(scores, runs, list(dict.fromkeys(arms)), seeds))


def answer_judge(out: Path, question: Question, arms: list[str], runs: pd.DataFrame) -> None:
    """Answer the question of the judge, each arm on the run seeds that it has."""
    folders = {}
    for arm in arms:
        seeds = sorted(set(runs.seed[runs.arm == arm]) & set(range(question.seeds)))
        folders[arm] = {seed: folder_of(out, arm, seed) for seed in seeds}
    judge.answer(out, question.title, folders.pop("SAIL"), folders)


def main(argv: list[str]) -> None:
    options, more = read_arguments(argv)
    out = options.out
    questions = choose_questions(options.questions, options.seeds)
    if options.published:
        if "judge" in questions:
            print(judge.readable(pd.read_csv(published.FOLDER / published.JUDGE)))
            del questions["judge"]
        # Not among the answers of one's own runs.
        out = out.with_name(f"{out.name}-published")
        answer_questions(out, questions, *published.read(), failed={})
        print(f"tables and figures: {out}")
        return

    jobs = jobs_of(questions, more)
    runs = [(out, job) for job in jobs]
    if options.tune:
        runs = all_jobs(out, more)

    # What no run could have is refused before the first one is begun.
    for folder, job in runs:
        planned_settings(folder, job)
    if options.plan:
        cost.print_plan(runs)
        return
    if options.tune:
        tune(out, options.workers, more)
        return

    # Run what the questions need.
    failed = {}
    if options.finished:
        jobs = [job for job in jobs if is_done(out, job)]
        require(jobs, f"{out}: no run of these questions is finished")
    else:
        cost.tell_cost(runs)
        failed = run_all(out, jobs, options.workers)

    # Gather what the runs say, and answer.
    ended = [job for job in jobs if (job.arm, job.seed) not in failed]
    scores, runs = collect(out, ended)
    published.keep(scores, runs, out)
    answer_questions(out, questions, scores, runs, failed)
    print(published.tell_equal(runs))


if __name__ == "__main__":          # python -m lib.study
    run_stage(main)

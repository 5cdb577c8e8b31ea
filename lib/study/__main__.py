"""When and why does SAIL work? The rival rows and every ablation, over several run seeds.

writes  <out>/<arm>-<seed>/ (run folders), <out>/results.parquet, <out>/facts.parquet,
        and for each question <out>/<question>.md, .csv, .png

An arm is a run of the embedded world with other settings; lib/study/questions.py lists them, and
the questions that they answer. Two processes work at once, each on half of the processors. The same
command continues a stopped study.

Every arm's beta and learning rate were chosen alike: `study --tune` tries the same four settings
for each on the development prompts, with a run seed used for nothing else, and takes the best that
keeps base's alignment. The evaluation prompts are fresh.

    ./run_sail.sh study                                     everything: under 3 hours on 2 cores
    ./run_sail.sh study --questions rivals --seeds 2        a part of it
    ./run_sail.sh study --tune                              how TUNED was found

Settings of a run, such as --draws 4, may follow: all arms then have them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from lib.run import run_stage, write_table
from lib.settings import ROOT
from lib.study import answers, judge
from lib.study.questions import ARMS, QUESTIONS, Question
from lib.study.runner import Job, folder_of, run_all
from lib.study.tune import tune


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_sail.sh study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=0,
                        help="run seeds of every question; 0 leaves its own number")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--tune", action="store_true",
                        help="try GRID for every arm of TUNE_ARMS instead")
    return parser


def choose_questions(names: list[str], seeds: int) -> dict[str, Question]:
    """The questions by name, with another number of run seeds if one is given."""
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


def main(argv: list[str]) -> None:
    options, more = build_parser().parse_known_args(argv)
    out = options.out
    if options.tune:
        tune(out, options.workers, more)
        return

    # Run what the questions need.
    questions = choose_questions(options.questions, options.seeds)
    jobs = jobs_of(questions, more)
    failed = run_all(out, jobs, options.workers)

    # Gather what the runs say.
    ended = [job for job in jobs if (job.arm, job.seed) not in failed]
    scores, facts = answers.collect(out, ended)
    write_table(scores, out / "results.parquet")
    write_table(facts, out / "facts.parquet")

    # Answer each question, with the arms of which all runs came to an end.
    for name, question in questions.items():
        left_out = ended_early(failed, question)
        arms = [arm for arm in question.arms if arm not in left_out]
        seeds = range(question.seeds)
        if not arms:
            print(f"{question.title}: no answer\n" + "\n".join(left_out.values()))
        elif name == "judge":
            runs = [folder_of(out, "SAIL", seed) for seed in seeds]
            judge.answer(out, question.title, runs)
        else:
            results = answers.Results(scores, facts, arms, seeds)
            answers.answer(out, name, question, results, left_out.values())


if __name__ == "__main__":          # python -m lib.study
    run_stage(main)

"""Does a model come to please the very person who labelled its pairs? The experiment of this room.

writes  <out>/labels-TASTE-SEED-COUNT/   folders of labels, as ./run_sail.sh label makes them
        <out>/TASTE-SEED-COUNT/          runs on them, with the votes of a duel
        <out>/votes.csv                  taste, seed, labels, pairs, agrees, model, over, and the
                                         win rate: rate, low, high, ties, votes, prompts
        <out>/experiment.csv, .png       win rates over all run seeds

A scripted person (person.py), whose taste is not that of the embedded world's people, labels COUNT
pairs through the page's own interface; SAIL learns from them with the preset's settings; then the
same person judges base, Iter0 and the last model blind, in the page again, on captions that nobody
has seen. The same command continues, and finished runs are left alone.

    python -m lib.taste.experiment                     all of it: under an hour on 2 free cores
    python -m lib.taste.experiment --tastes small-dark --seeds 1 --labels 64     one of its 24 runs

Settings of a run, such as --eval-prompts dev, may follow: all runs then have them.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lib.data.folders import agreement_beside
from lib.lend import files_at, lend
from lib.run import UserError, run_stage, write_text
from lib.settings import ROOT, Parser, Settings, load, require
from lib.settings import build_parser as settings_parser
from lib.study.figures import draw_line, new_figure, save_figure
from lib.study.means import interval
from lib.study.runner import make_pool, run_rounds
from lib.taste import person, tally, votes

PROMPTS = 100                               # captions that each two models are judged on
NOISE = .15                                 # of the person's labels and votes, in units of utility

# What a folder of labels needs of another one of the same run seed: its pictures.
PICTURES = ("images", "latents", "embeds")

# The experiment gives these settings to every run itself; what to give instead.
OWN_SETTINGS = {"seed": "--seeds N is the number of run seeds", "run": "--out names the folder",
                "preset": "the experiment is of the embedded world",
                "pairs": "the scripted person labels them",
                "eval_count": "--prompts N is the number of captions"}


@dataclass(frozen=True)
class Job:
    """One run: who labels how many pairs, and the run seed; `more` settings of the run."""

    out: Path
    taste: str
    seed: int
    labels: int
    prompts: int
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.taste}-{self.seed}-{self.labels}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def folder_of_labels(self) -> Path:
        return self.out / f"labels-{self.name}"

    def settings(self) -> list[str]:
        """The run's settings as its first stage is given them."""
        return ["--run", str(self.folder), "--seed", str(self.seed),
                "--pairs", str(self.folder_of_labels), "--eval-count", str(self.prompts),
                "--eval-seeds", "1", *self.more]


# ---- one run ----

def work(job: Job) -> str:
    """Label, train, judge; returns a line about it. What is printed goes to the run's log.txt."""
    done = job.folder / "done.json"
    stamp = json.dumps([*job.settings(), job.labels])
    if done.exists() and done.read_text() == stamp:
        return f"{job.name}: there"

    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        label(job, log)
        s, _ = load(job.settings(), "", create=True)
        run_rounds(job.folder, s.iters, s.alpha)
        judge(job, s, log)
    write_text(stamp, done)
    return f"{job.name}: done"


def label(job: Job, log) -> None:
    """Let the person label pairs; those that a stopped call has labelled stay."""
    for other in sorted(job.out.glob(f"labels-*-{job.seed}-*")):
        if other != job.folder_of_labels:
            lend(whole_pictures(other), other, job.folder_of_labels)
    at_page(job, log, "lib.taste.label", "--run", str(job.folder_of_labels),
            "--seed", str(job.seed), "--count", str(job.labels))


def whole_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder of labels with their latents, less what is being written."""
    return [file for file in files_at(folder, PICTURES) if not file.name.startswith(".")]


def judge(job: Job, s: Settings, log) -> None:
    """Let the person judge base, Iter0 and the last model on all captions of the evaluation."""
    at_page(job, log, "lib.taste.duel", "--run", str(job.folder), "--count", str(job.prompts),
            *models_of(s))


def models_of(s: Settings) -> list[str]:
    """The models that are judged, in their order."""
    return list(dict.fromkeys(["base", "Iter0", f"Iter{s.iters}"]))


def at_page(job: Job, log, module: str, *arguments: str) -> None:
    """Start a command that serves the page, and answer in it to the end as a person would."""
    command = [sys.executable, "-u", "-m", module, *arguments, "--no-browser",
               "--labeller", job.taste]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log,
                          text=True) as process:
        try:
            for line in process.stdout:
                log.write(line)
                address = re.search(r"http://\S+", line)
                if address:
                    person.answer_all(address[0], job.taste, NOISE, job.seed)
        except BaseException:
            # Nobody would finish the page.
            process.terminate()
            raise
    if process.returncode:
        raise UserError(f"{job.folder}: {module} has stopped; {job.folder}/log.txt tells why")


# ---- all runs ----

def run_all(jobs: Iterable[Job], workers: int) -> list[Job]:
    """Make all runs, `workers` at once; returns those that came to their end."""
    ended = []
    with make_pool(workers) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        for future in tqdm(as_completed(running), total=len(running), desc="runs", unit="run"):
            job = running[future]
            try:
                future.result()
                ended.append(job)
            except UserError as error:
                print(f"{job.name} ended early: {error}")
            except BrokenProcessPool:
                raise UserError(
                    f"{job.out}: a worker was killed, for want of memory perhaps; the same command "
                    f"continues, and takes less with --workers 1"
                ) from None
    return ended


# ---- what came of it ----

def votes_of(job: Job) -> pd.DataFrame:
    """The votes of a run."""
    return tally.read_votes(job.folder)


def comparisons(job: Job) -> pd.DataFrame:
    """votes.csv of one run."""
    s, _ = load(["--run", str(job.folder)], "")
    table = tally.compare(votes_of(job), models_of(s)).drop(columns="labeller")
    facts = {
        "taste": job.taste,
        "seed": job.seed,
        "labels": job.labels,
        "pairs": s.seed_pairs,
        "agrees": agreement_beside(str(job.folder_of_labels)).get("agree_with_themselves"),
    }
    for place, (name, value) in enumerate(facts.items()):
        table.insert(place, name, value)
    return table


def over_seeds(jobs: list[Job]) -> pd.DataFrame:
    """experiment.csv: taste, labels, model, over, seeds, rate, low, high, lowest, highest.

    The interval is over run seeds and prompts; lowest and highest are single run seeds.
    """
    rows = []
    for taste, labels in dict.fromkeys((job.taste, job.labels) for job in jobs):
        of_cell = [job for job in jobs if (job.taste, job.labels) == (taste, labels)]
        cast = [votes_of(job) for job in of_cell]
        names = tally.in_order(cast[0], ["base", "Iter0"])
        for place, over in enumerate(names):
            for model in names[place + 1:]:
                points = np.stack([points_of_prompts(part, model, over) for part in cast])
                rate, low, high = interval(points)
                of_seeds = points.mean(1)
                rows.append((taste, labels, model, over, len(of_cell), rate, low, high,
                             of_seeds.min(), of_seeds.max()))
    return pd.DataFrame(rows, columns=["taste", "labels", "model", "over", "seeds", "rate", "low",
                                       "high", "lowest", "highest"])


def points_of_prompts(cast: pd.DataFrame, model: str, over: str) -> np.ndarray:
    """What a model gets of the votes on each prompt, in the prompts' alphabetical order."""
    compared = votes.between(cast, model, over)
    points = votes.points_of(compared, model)
    return points.groupby(compared.prompt).mean().sort_index().to_numpy()


def in_words(row) -> str:
    """A line of the table for people."""
    line = (f"{row.taste:>12}, {row.labels:>3} labels: {row.model} over {row.over} "
            f"{row.rate:.0%} [{row.low:.0%}, {row.high:.0%}]")
    if row.seeds > 1:
        line += f", {row.seeds} run seeds {row.lowest:.0%} to {row.highest:.0%}"
    return line


def draw(table: pd.DataFrame, path: Path) -> None:
    """Win rates over base against the number of labels, a panel for each taste."""
    tastes = table.taste.unique()
    figure, axes = new_figure(len(tastes), (4.6 * len(tastes), 3.4), squeeze=False, sharey=True)
    for axis, taste in zip(axes[0], tastes):
        over_base = table[(table.taste == taste) & (table.over == "base")]
        for number, (model, part) in enumerate(over_base.groupby("model", sort=False)):
            points = part[["labels", "rate", "low", "high"]].to_numpy().tolist()
            draw_line(axis, points, 4 * number, f"C{number}", model)
        axis.axhline(.5, color="gray", lw=.8)
        axis.set_xscale("log", base=2)
        counts = sorted(over_base.labels.unique())
        axis.set_xticks(counts, list(map(str, counts)))
        axis.set_title(taste)
        axis.set_xlabel("pairs labelled")
    axes[0, 0].set_ylabel("preferred to base, blind")
    axes[0, 0].legend()
    save_figure(figure, path)


# ---- the command ----

def read_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The experiment's own options, and settings of a run that all runs are to have."""
    parser = Parser(prog="python -m lib.taste.experiment", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "taste-experiment")
    parser.add_argument("--tastes", nargs="+", default=list(person.TASTES), choices=person.TASTES)
    parser.add_argument("--seeds", type=int, default=3, help="run seeds: 0, 1, ...")
    parser.add_argument("--labels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--prompts", type=int, default=PROMPTS,
                        help="captions that each two models are judged on")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    options, more = parser.parse_known_args(argv)

    for name in ("seeds", "prompts", "workers"):
        value = getattr(options, name)
        require(value >= 1, f"--{name} {value}: must be at least 1")
    require(min(options.labels) >= 1, f"--labels {min(options.labels)}: must be at least 1")
    given = vars(settings_parser("").parse_args(more))
    for name, instead in OWN_SETTINGS.items():
        require(name not in given, f"--{name.replace('_', '-')} is not for the experiment: "
                                   f"{instead}")
    return options, more


def main(argv: list[str]) -> None:
    options, more = read_arguments(argv)
    out = options.out.absolute()

    # Most labels first: the pictures to fewer labels are among theirs.
    jobs = []
    for labels in sorted(options.labels, reverse=True):
        for seed in range(options.seeds):
            for taste in options.tastes:
                jobs.append(Job(out, taste, seed, labels, options.prompts, tuple(more)))
    ended = run_all(jobs, options.workers)
    jobs = [job for job in jobs if job in ended]
    if not jobs:
        raise UserError(f"{out}: no run came to its end; their log.txt tell why")

    # write
    table = pd.concat([comparisons(job) for job in jobs], ignore_index=True)
    write_text(table.to_csv(index=False, float_format="%.4g"), out / "votes.csv")
    table = over_seeds(jobs)
    write_text(table.to_csv(index=False, float_format="%.4g"), out / "experiment.csv")
    draw(table, out / "experiment.png")
    print(*map(in_words, table.itertuples()), sep="\n")
    print(f"see {out}/experiment.png")


if __name__ == "__main__":          # python -m lib.taste.experiment
    run_stage(main)

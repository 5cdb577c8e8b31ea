"""Runs the arms of the study: each is a run folder, made by the same stages as run_sail.sh's.

Runs of one run seed share by hard links what they have in common: the human pairs, Iter0, the
base's evaluation, the first candidates. Several processes work at once, each on its part of the
processors; a process imports the stages once and runs arm after arm. A finished run is left alone,
so the same command continues a stopped study.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib.lend import COMMON_FILES, agree, equal_steps, files_at, lend, number_alike
from lib.plan.stages import load_stage
from lib.rivals import spo
from lib.run import UserError, write_text
from lib.settings import PRESETS, Settings, build_parser, check, load
from lib.study.questions import ARMS, COMMON, ROUNDS, TUNED, method_of


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    arm: str
    seed: int
    more: tuple[str, ...] = ()  # further settings, as given on the command line; they win
    rows: tuple[str, ...] = ()  # further rows of the evaluation
    rival: tuple[str, ...] = ()     # settings of the rival that is trained in the run


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """The run folder of an arm and a run seed."""
    name = arm.replace("*", " start")
    name = re.sub(r"[^\w.]", "-", name)
    return out / f"{name}-{seed}"


def settings_of(out: Path, job: Job) -> list[str]:
    """The settings of a run as its first stage is given them; of two values the later one wins."""
    run = ["--run", str(folder_of(out, job.arm, job.seed)), "--seed", str(job.seed)]
    words = []
    for word in arguments_of(job):
        words.append(word.replace("{out}", str(out)).replace("{seed}", str(job.seed)))
    return [*run, *words]


def arguments_of(job: Job) -> list[str]:
    """A run's settings without its folder and seed; {out} and {seed} stand for them."""
    tuned = TUNED.get(method_of(job.arm), "")
    return [*COMMON.split(), *ARMS[job.arm].settings.split(), *tuned.split(), *job.more]


def planned_settings(out: Path, job: Job) -> Settings:
    """The settings that a run will have, checked before any folder is made."""
    given = vars(build_parser("").parse_args(settings_of(out, job)))
    s = Settings(**PRESETS[given.get("preset", "tiny")] | given)

    # A model to start from may be one that another arm is still to make.
    check(dataclasses.replace(s, start=""))
    return s


# ---- what two runs share ----

# By these the world's captions are dealt out, and their pictures painted.
CAPTIONS = ("seed", "holdout_pairs", "iter_prompts", "iters", "sampler", "sample_steps",
            "cfg_scale", "model")


def share(source: Path, target: Path, rounds: int) -> None:
    """Give the new run `target` by hard links what the finished run `source` has in common with it.

    The stages of `target`, which has so many rounds, then find these files made. Both folders have
    their config.json.
    """
    mine, theirs = settings_of_run(target), settings_of_run(source)
    steps = equal_steps(source, mine, theirs)
    files = []
    if steps or number_alike(mine, theirs):
        files += files_at(source, COMMON_FILES)
    for step in steps:
        files += files_at(source, step.files)

    # Six rounds go on from three, and human pairs may be more of the same.
    if same_arm(mine, theirs):
        files += files_of_rounds(source, rounds)
    files += first_pictures(source, mine, theirs)

    lend(files, source, target)


def same_arm(mine: Settings, theirs: Settings) -> bool:
    """Whether two runs differ at most in the number of rounds that they have gone."""
    fields = dataclasses.fields(Settings)
    deciding = [field.name for field in fields if not field.metadata["free"]]
    return agree(mine, theirs, deciding)


def files_of_rounds(source: Path, rounds: int) -> list[Path]:
    """All files of the first rounds."""
    files = []
    for k in range(1, rounds + 1):
        files += files_at(source, (f"iter{k}", f"eval/*/Iter{k}-*"))
    return files


def first_pictures(source: Path, mine: Settings, theirs: Settings) -> list[Path]:
    """The pictures of human pairs that both runs have, if one only has more of them."""
    if not agree(mine, theirs, CAPTIONS):
        return []

    pictures = []
    for file in files_at(source, ("seed/images", "seed/latents")):
        number, _ = file.name.split("_")
        if int(number) < min(mine.seed_pairs, theirs.seed_pairs):
            pictures.append(file)
    return pictures


def settings_of_run(run: Path) -> Settings:
    """The settings of a run folder."""
    s, _ = load(["--run", str(run)], "")
    return s


# ---- running ----

def run_arm(out: Path, job: Job, lenders: Iterable[Path] = ()) -> str:
    """Make one run as run_sail.sh would, and its evaluation; returns a line about it.

    What finished runs of the same seed in `out` and in the folders `lenders` have in common with
    this one is not made again. What the stages print goes to the run's log.txt.
    """
    folder = folder_of(out, job.arm, job.seed)
    if is_done(out, job):
        return f"{folder.name}: there"

    # The folder with its settings, and what others have made of it.
    arm = ARMS[job.arm]
    folder.mkdir(parents=True, exist_ok=True)
    s, _ = load(settings_of(out, job), "", create=True)
    for other in finished_runs((out, *lenders), job.seed):
        if other != folder:
            share(other, folder, arm.rounds)

    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        run_rounds(folder, arm.rounds, s.alpha)
        if arm.rival == "spo":
            spo.main(["--run", str(folder), "--rounds", str(ROUNDS), *job.rival])
        evaluate(folder, job)

    # done.json comes last: from then on the run lends to others, and is not touched again.
    if not arm.keeps_candidates:
        remove_candidates(folder, arm.rounds)
    write_text(stamp_of(job), folder / "done.json")
    return f"{folder.name}: done"


def stamp_of(job: Job) -> str:
    """What a finished run's done.json holds: the settings and rows that it was made with.

    Its folder is not among them, so that a study may be moved.
    """
    return json.dumps([["--seed", str(job.seed), *arguments_of(job)], list(job.rows), *job.rival])


def is_done(out: Path, job: Job) -> bool:
    """Whether a run is finished, with these very settings and rows."""
    done = folder_of(out, job.arm, job.seed) / "done.json"
    return done.is_file() and done.read_bytes() == stamp_of(job).encode()


def finished_runs(places: Iterable[Path], seed: int) -> list[Path]:
    """The folders of all finished runs with this run seed."""
    runs = []
    for place in places:
        runs += [done.parent for done in sorted(place.glob(f"*-{seed}/done.json"))]
    return runs


def run_rounds(folder: Path, rounds: int, alpha: float) -> None:
    """Stages 01 to 04, as in run_sail.sh; each but stage 01 finds for itself what is there."""
    run = ["--run", str(folder)]
    if not (folder / "prompts.parquet").exists():
        load_stage("01").main(run)
    load_stage("04").main([*run, "--iter", "0"])

    for k in range(1, rounds + 1):
        this_round = [*run, "--iter", str(k)]
        if alpha > 0:
            load_stage("02").main(this_round)
            load_stage("03").main(this_round)
        load_stage("04").main(this_round)


def evaluate(folder: Path, job: Job) -> None:
    """Stage 05 on the base, Iter0, the last model or that of every round, and further rows."""
    # The study draws figures of its own; a run's page is made by stage 05 without --scores-only.
    models = models_of(job)
    arguments = ["--run", str(folder), "--scores-only", "--only", ",".join(models)]
    rival = ARMS[job.arm].rival
    if rival:
        arguments += ["--row", f"{rival}={folder}/rivals/{rival}/unet"]
    for row in job.rows:
        arguments += ["--row", row]
    load_stage("05").main(arguments)


def models_of(job: Job) -> list[str]:
    """The models of a run that are evaluated: the base, Iter0, and the last or all rounds'."""
    arm = ARMS[job.arm]
    rounds = {0, arm.rounds}
    if arm.every_round:
        rounds = range(arm.rounds + 1)
    return ["base", *(f"Iter{k}" for k in sorted(rounds))]


def remove_candidates(folder: Path, rounds: int) -> None:
    """Thousands of small files that nobody needs again."""
    for k in range(1, rounds + 1):
        for name in ("images", "latents"):
            shutil.rmtree(folder / f"iter{k}" / name, ignore_errors=True)


# ---- many runs ----

def run_all(out: Path, jobs: Iterable[Job], workers: int,
            lenders: Iterable[Path] = ()) -> dict[tuple[str, int], str]:
    """Make all runs, `workers` at once; returns what ended early, as {(arm, seed): its message}.

    A training that ran away ends early, say; the other runs go on.
    """
    jobs = list(jobs)
    failed = {}
    with make_pool(workers) as pool, tqdm(total=len(jobs), desc="study", unit="run") as bar:
        for turn in range(TURNS):
            # All runs of a turn at once, then those that share what they have made.
            running = {}
            for job in jobs:
                if turn_of(job.arm) == turn:
                    running[pool.submit(run_arm, out, job, lenders)] = job

            for future in as_completed(running):
                job = running[future]
                try:
                    bar.set_postfix_str(future.result())
                except UserError as error:
                    failed[job.arm, job.seed] = str(error)
                except BrokenProcessPool:
                    raise UserError(
                        f"{out}: a worker of the study was killed, for want of memory perhaps; "
                        f"the same command continues, and takes less with --workers 1"
                    ) from None
                bar.update()
    return failed


TURNS = 4


def turn_of(arm: str) -> int:
    """When an arm's runs are made: those that others share things with, or start from, go first."""
    if arm in ("SAIL", "DiffusionDPO"):
        return 0
    if ARMS[arm].rounds > ROUNDS:
        return 3  # goes on from the run of the usual rounds
    if method_of(arm) == "SAIL":
        return 1
    return 2


def make_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that share the processors; each starts afresh, and imports the stages once."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, set_threads, (threads,))


def set_threads(threads: int) -> None:
    """Give this process so many threads."""
    import torch

    torch.set_num_threads(threads)

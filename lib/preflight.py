"""Everything that a run will need, asked for at once: `./run_sail.sh sd15 --check`.

Model, pairs, prompts, benchmarks, the weights of every score, the device, memory and disk: each is
a line, with the remedy where it is missing. Nothing is downloaded but lists and configurations, and
no folder is made. The driver's first call looks at the same list and refuses what a later stage
could only fail for. A score is no such thing: stage 05 makes everything else without it.
"""

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lib import hub, start
from lib.run import UserError, is_whole, run_stage
from lib.settings import (RUN_ARGUMENTS, SCORES, Settings, has_made_something, needs_prompts,
                          parse, planned, round_prompts)

FLAGS = RUN_ARGUMENTS | {
    "--check": {"action": "store_true",
                "help": "say what the run will need and does not have, and stop"},
}

# A table of more rows is not read to its end, picture by picture, only to count its pairs.
READ_WHOLE = 1000

# A model's folders with weights that a run reads.
USED = ("unet", "vae", "text_encoder", "text_encoder_2")

# The peaks of memory are counted, and are right within a fifth (lib/plan/README.md).
WITHIN = 1.2


class Answer(NamedTuple):
    """What came of looking for one thing."""

    thing: str
    told: str = ""              # of what is there
    fault: str = ""             # what is missing, and the remedy; "" if nothing is
    refuses: bool = True        # whether a run must have it

    def line(self) -> str:
        """The answer as it is printed."""
        if self.fault:
            fault = self.fault.removeprefix(f"{self.thing}: ")
            further = "" if self.refuses else " (the run begins, or goes on, all the same)"
            return f"{self.thing}: missing: {fault}{further}"
        return f"{self.thing}: ok {self.told}".rstrip()


def look(thing: str, check: Callable, *given, refuses: bool = True) -> Answer:
    """Ask a check, which raises a UserError or returns some words on what is there."""
    try:
        return Answer(thing, check(*given) or "")
    except UserError as error:
        return Answer(thing, fault=str(error), refuses=refuses)


# ---- the two ways to ask ----

def refuse_lacking(s: Settings, made_in: Path) -> None:
    """UserError if a run lacks what it will need; what it can do without is told.

    `made_in` is the folder that has what is made already: the run's, or that of the run it goes on
    from. The embedded world brings all it needs.
    """
    if s.pairs == "world":
        if not has_made_something(Path(s.run)):
            start.check_start(s)
        answers = look_for_scores(s)
    else:
        # The driver reads what is printed, and some libraries print.
        with contextlib.redirect_stdout(sys.stderr):
            answers = look_for_all(s, made_in)

    # A single thing is the error itself.
    missing = [answer for answer in answers if answer.fault]
    refusing = [answer for answer in missing if answer.refuses]
    for answer in missing:
        if len(refusing) > 1 or not answer.refuses:
            print(answer.line(), file=sys.stderr)
    if len(refusing) == 1:
        raise UserError(refusing[0].fault)
    if refusing:
        raise UserError(f"{len(refusing)} of the things that the run will need are missing, as "
                        f"told above; put them right, and give the same command again")


def main(argv: list[str]) -> None:
    """python -m lib.preflight [settings] --check: prints, makes nothing."""
    _, own = parse(argv, __doc__, FLAGS)
    s = planned(argv, __doc__, FLAGS)
    answers = look_for_all(s, Path(getattr(own, "from") or s.run))
    for answer in answers:
        print(answer.line())

    missing = [answer for answer in answers if answer.fault]
    if missing:
        raise UserError(f"{len(missing)} of {len(answers)} things are missing; the lines above "
                        f"say what helps")


# ---- all that a run needs ----

def look_for_all(s: Settings, made_in: Path) -> list[Answer]:
    """Look for everything that the stages still to come will need."""
    run = Path(s.run)
    with hub_asked_once():
        answers = [look("device", check_device, s), look("processes", start.check_processes, s),
                   look("size", start.check_size_of_world, s),
                   look("weights of scores", start.check_score_weights, s)]
        answers += look_for_model(s)
        if s.start and not (run / "iter0" / "unet").exists():
            answers.append(look("start", check_start, s))

        # What stage 01 has taken from pairs and prompts, it has.
        small = s
        if not (made_in / "prompts.parquet").exists():
            of_data, small = look_for_data(s)
            answers += of_data
        if s.reward in SCORES and not (run / f"iter{s.iters}" / "pairs.parquet").exists():
            answers.append(look("reward", start.check_reward, s))
        answers += look_for_scores(s)

        # What cannot be counted for a fault that has been told is not told again.
        told = {answer.fault for answer in answers if answer.fault}
        if not answers[0].fault:
            answers += [answer for answer in look_for_room(small, made_in)
                        if answer.fault not in told]
    return answers


@contextlib.contextmanager
def hub_asked_once() -> Iterator[None]:
    """Within this block nothing is asked of the hub unless it answers now.

    Its library would try for half a minute, and at each file anew.
    """
    from huggingface_hub import constants, get_session

    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not was_offline:
            get_session().head(constants.ENDPOINT, timeout=5)
    # Each network library raises its own kinds of errors.
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        # Libraries warn of each other's options, to which nobody here can do anything.
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def check_device(s: Settings) -> str:
    """Refuse a device that is not here; returns the name of the one that the run will use."""
    start.check_device(s)
    name, _ = room_of_device(s)
    if name == "cpu" and s.pairs != "world":
        return "cpu (there is no GPU, or it is not asked for; --plan tells the hours)"
    return name


# ---- models ----

def look_for_model(s: Settings) -> list[Answer]:
    """The model, and the VAE in place of its own."""
    model = look("model", check_model, s)
    if not s.vae:
        return [model]

    # Without the VAE the model is no more than looked into.
    vae = look("VAE", check_vae, s)
    if vae.fault:
        from lib import kinds
        model = look("model", kinds.check_parts, s)
    return [model, vae]


def check_model(s: Settings) -> str:
    """Refuse a model that lacks a file, or is of a kind that the stages do not compute."""
    from lib import kinds

    kinds.check_model(s)
    source = hub.local_or_hub(s.model)
    refuse_cut_off(source)
    names = set(hub.names_at(source))
    for part in ("tokenizer", "tokenizer_2"):
        has_words = {f"{part}/vocab.json", f"{part}/merges.txt"} <= names
        if has_words or f"{part}/tokenizer.json" in names:
            continue
        if part == "tokenizer" or f"{part}/tokenizer_config.json" in names:
            raise UserError(f"{s.model}: {part}/ has no vocab.json with merges.txt, and no "
                            f"tokenizer.json; download it again")
    return s.model


def refuse_cut_off(source: str) -> None:
    """Refuse files of weights, in a folder, that are not whole; of each the head alone is read."""
    for path in hub.two_levels(Path(source)):
        is_used = path.parent == Path(source) or path.parent.name in USED
        if is_used and path.suffix == ".safetensors" and not is_whole(path):
            raise UserError(f"{path}: is damaged or cut off; download it again")


def check_vae(s: Settings) -> str:
    """Refuse a --vae that lacks its configuration or its weights."""
    from lib import models

    models.vae_config(s)
    source = hub.local_or_hub(s.vae)
    hub.weight_files(source, "", "diffusion_pytorch_model")
    refuse_cut_off(source)
    return s.vae


def check_start(s: Settings) -> str:
    """Refuse a --start that is not there. Of a single file on the hub only the name is asked."""
    source, file = hub.split_file(s.start)
    if not file or os.path.isfile(s.start):
        start.check_given_start(s)
    elif file not in hub.names_at(source):
        raise UserError(f"--start {s.start}: {source} has no such file; correct the name")
    return s.start


# ---- pairs and prompts ----

def look_for_data(s: Settings) -> tuple[list[Answer], Settings]:
    """Benchmarks, pairs and prompts; and the settings with the numbers fitted to a small file."""
    from lib.data import few, folders

    answers, tables = [], []
    for part in s.eval_prompts.split(","):
        if part.strip():
            answers.append(look(f"benchmark {part.strip()}", check_benchmark, s, part, tables))
    names = look("benchmarks", check_names, s, tables)
    if names.fault and len(tables) == len(answers):
        answers.append(names)
    evaluation = {prompt for table in tables for prompt in table.prompt}

    small = s
    pairs = look("pairs", check_pairs, s, evaluation)
    if not pairs.fault and is_small(s):
        try:
            small = replace(s, **few.fit_to_few_pairs(s, evaluation))
        except UserError as error:
            pairs = Answer("pairs", fault=str(error))
    answers.append(pairs)

    if needs_prompts(s):
        # Beside a user's own pairs the preset's number of prompts shrinks to what is there.
        shrinks = bool(pairs.fault) or folders.is_own(s.pairs)
        fitted = shrinks and few.as_in_preset(s, "iter_prompts")
        answers.append(look("prompts", check_prompts, s, evaluation, fitted))
    return answers, small


def check_benchmark(s: Settings, part: str, tables: list) -> str:
    """Refuse a list of evaluation prompts that is not there; the table joins `tables`."""
    from lib.data import prompts

    words = []
    tables.append(prompts.evaluation_prompts(part, s.eval_count, s.pairs, words.append))
    return "".join(words).removeprefix("evaluation prompts: ")


def check_names(s: Settings, tables: list) -> None:
    """Refuse a list without benchmarks, or with two of one name."""
    from lib.data import prompts

    names = [table.benchmark.iloc[0] for table in tables]
    if not names or len(set(names)) < len(names):
        prompts.evaluation_prompts(s.eval_prompts, s.eval_count, s.pairs)


def check_pairs(s: Settings, evaluation: set[str]) -> str:
    """Refuse pairs that are not there, whose first rows are none, or that are too few."""
    from lib.data.folders import count_pairs, is_own
    from lib.data.pairs import pair_columns, stream_pairs
    from lib.data.shards import find_shards
    from lib.data.tables import count_rows, shuffled

    if s.pairs == "world":
        return "the embedded world's"

    # Of pairs on the hub, the shard that will come first tells its columns.
    shards = None if is_own(s.pairs) else find_shards(s.pairs)
    if shards and shards.folder is None:
        first = shuffled(shards.names, s.seed)[0]
        pair_columns(shards.columns(first), f"{s.pairs}, {first}")
        return f"{len(shards.names)} shards on the hub"

    next(stream_pairs(s.pairs, s.seed, avoid=evaluation))
    if shards:
        rows = sum(count_rows(shards.folder / name) for name in shards.names)
    else:
        rows = count_pairs(s.pairs)
    wanted = s.seed_pairs + s.holdout_pairs
    if rows < wanted and not is_fitted(s):
        raise UserError(f"{s.pairs}: has {rows} rows; --seed-pairs {s.seed_pairs} and "
                        f"--holdout-pairs {s.holdout_pairs} ask for {wanted} pairs; give smaller "
                        f"numbers or more pairs")
    return f"{rows} rows"


def is_fitted(s: Settings) -> bool:
    """Whether the preset's numbers shrink to what the file of pairs has."""
    from lib.data import few, folders
    return folders.is_own(s.pairs) and few.as_in_preset(s, "seed_pairs", "holdout_pairs")


def is_small(s: Settings) -> bool:
    """Whether the pairs are a file that is soon read to its end."""
    from lib.data.folders import count_pairs, is_own
    return is_own(s.pairs) and count_pairs(s.pairs) <= READ_WHOLE


def check_prompts(s: Settings, evaluation: set[str], fitted: bool) -> str:
    """Refuse a file of prompts that is not there, or has too few for the rounds.

    If their number will be `fitted` to the file, one a round is enough.
    """
    from lib.data import prompts

    if s.prompts == "world":
        return "the embedded world's"
    if s.prompts == "pairs":
        return "those of --pairs"

    pool = prompts.read_prompt_file(s.prompts)
    counts = {}
    for k in range(1, s.iters + 1):
        counts[f"iter{k}"] = 1 if fitted else round_prompts(s, k)
    prompts.split_prompts(pool, evaluation, counts, s.seed, f"--prompts {s.prompts}")
    return f"{len(pool)} prompts"


# ---- scores ----

def look_for_scores(s: Settings) -> list[Answer]:
    """The learned scores of stage 05."""
    if s.scores in ("world", "none"):
        return []
    with hub_asked_once():
        return [look(f"score {name}", start.check_score, s, name, refuses=False)
                for name in s.scores.split(",")]


# ---- room: disk, memory ----

def look_for_room(s: Settings, made_in: Path) -> list[Answer]:
    """Disk and memory, against what lib/plan counts."""
    from lib.plan.architecture import architecture_of

    # Of a model that cannot be had nothing can be counted, and it has been told.
    try:
        architecture = architecture_of(s, ask_hub=False)
    except UserError:
        return []

    # These are counts. A run that has begun may try: what does not fit stops it, and it goes on
    # when there is room.
    is_new = not has_made_something(Path(s.run))
    return [look("disk", check_disk, s, architecture, made_in, refuses=is_new),
            look("memory", check_memory, s, architecture, refuses=is_new)]


def check_disk(s: Settings, architecture, made_in: Path) -> str:
    """Refuse disks that are too small for the run, and for what is downloaded."""
    from huggingface_hub import constants

    from lib.plan import disk
    from lib.plan.report import in_gb

    needed = disk.bytes_needed(s)
    parts = disk.downloads(s, architecture, disk.parameters_of(architecture))
    if (made_in / "prompts.parquet").exists():
        parts.pop("pairs", None)
    fetched = sum(parts.values())
    words = ", ".join(f"{name} {in_gb(size)}" for name, size in parts.items()) or "nothing"

    free, folder = disk.free_disk(s)
    cache = existing(Path(constants.HF_HUB_CACHE))
    if cache.stat().st_dev == folder.stat().st_dev:
        needed += fetched
    elif fetched > (free_there := shutil.disk_usage(cache).free):
        raise UserError(f"{cache} has {in_gb(free_there)} free, and downloads ({words}) take "
                        f"about {in_gb(fetched)}; make room, or set HF_HOME to another disk's "
                        f"folder")
    if needed > free:
        raise UserError(f"{folder} has {in_gb(free)} free, and the run takes about "
                        f"{in_gb(needed)} with downloads ({words}); make room, or give another "
                        f"disk's folder with --run")
    return f"{in_gb(needed)} of {in_gb(free)} in {folder}; to be downloaded: {words}"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def check_memory(s: Settings, architecture) -> str:
    """Refuse a device, or a machine, that is too small even if the plan counts a fifth too much."""
    from lib import models
    from lib.plan.memory import Memory, smaller
    from lib.plan.report import as_flags, in_gb

    on_cuda = models.device_of(s).type == "cuda"
    memory = Memory(s, architecture, on_cuda)
    name, capacity = room_of_device(s)
    peak = max(memory.device.values())
    if peak > WITHIN * capacity:
        changes = smaller(memory, capacity)
        advice = f"give {as_flags(changes)}" if changes else "take a larger device"
        raise UserError(f"{name} has {in_gb(capacity)}, and the run takes about {in_gb(peak)}; "
                        f"{advice}")

    of_host, capacity_of_host = max(memory.host.values()), memory_of_machine()
    if of_host > WITHIN * capacity_of_host:
        raise UserError(f"this machine has {in_gb(capacity_of_host)} of memory, and the run takes "
                        f"about {in_gb(of_host)} beside the device's; take a larger one")
    return f"{in_gb(peak)} of {in_gb(capacity)}"


def room_of_device(s: Settings) -> tuple[str, int]:
    """The name of the run's device, and its memory in bytes."""
    import torch

    from lib import models

    device = models.device_of(s)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return card.name, card.total_memory
    return device.type, memory_of_machine()


def memory_of_machine() -> int:
    """Bytes of memory here, or the less that a container is given (cgroups, version 2 or 1)."""
    import psutil

    total = psutil.virtual_memory().total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):              # there is none, or it is "max"
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


if __name__ == "__main__":
    run_stage(main)

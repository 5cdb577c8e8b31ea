"""Prompts from outside: of the rounds, and of the evaluation, by name.

`--eval-prompts` is `world` or `dev`, which are captions of the embedded world that nothing else
uses (dev is for tuning), or a list with commas of

    pickapic, hpsv2, parti         fetched from where they are published
    name=FILE_OR_FOLDER            one of these, or any other, from a local copy
    FILE_OR_FOLDER                 the user's own prompts, named after the file

`--prompts` is a file of prompts, or `pairs`: the other prompts of the pair source. The formats of a
file are those of tables.py; a folder holds one file for each style. Two prompts are the same if
they differ only in case, white space or the Unicode form of their letters.
"""

import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd

from lib.data.folders import is_two_folders, own_rows, table_of
from lib.data.shards import DISK_ERRORS, find_shards, hub_problem
from lib.data.tables import is_hidden, prompt_rows, shuffled, suffix_of
from lib.run import UserError, is_whole, read_table, shown, write_table
from lib.settings import Settings
from lib.world.captions import style_of, world_captions

# How many prompts each benchmark has; HPSv2's 3,200 less 26 that are repeated within a style.
PUBLISHED = {"pickapic": 500, "hpsv2": 3174, "parti": 1632}

LOCAL_COPIES = {
    "pickapic": "a folder or hub id with its validation_unique shards, or a file of prompts",
    "hpsv2": (
        "the folder benchmark of the hub dataset zhwang/HPDv2, "
        "or one JSON file of style: [prompts]"
    ),
    "parti": "PartiPrompts.tsv of github.com/google-research/parti",
}

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
FOLDER_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")

# Splits of Pick-a-Pic to evaluate on: the first of these that a source has.
EVALUATION_SPLITS = ("validation_unique", "validation", "test_unique", "test")

COLUMNS = ("benchmark", "style", "prompt")
Rows = list[tuple[str, str]]                # (style or "", prompt), in the benchmark's order


# ---- when two prompts are the same ----

def fold(prompt: str) -> str:
    """What two prompts are compared by: NFC, case folded, each run of white space one blank."""
    return " ".join(unicodedata.normalize("NFC", prompt.casefold()).split())


def distinct(prompts: Iterable[str], taken: Iterable[str]) -> Iterator[str]:
    """The first of each prompt, stripped, but for those taken and the empty one."""
    seen = {fold(prompt) for prompt in taken}
    seen.add("")
    for prompt in prompts:
        folded = fold(prompt)
        if folded not in seen:
            seen.add(folded)
            yield prompt.strip()


# ---- prompts of the rounds ----

def read_prompt_file(path: str | Path) -> list[str]:
    """The prompts of a file of any format, in order, each once as it is written."""
    rows = prompt_rows(Path(path), str(path))
    prompts = list(dict.fromkeys(prompt for _, prompt in rows if prompt))
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give a text file with one prompt a line")
    return prompts


def pair_prompts(source: str, seed: int, taken: Iterable[str], count: int) -> list[str]:
    """Up to `count` distinct prompts of a pair source, in the seed's order, none of those taken.

    No image is read, and no shard after those that suffice.
    """
    def stream() -> Iterator[str]:
        if os.path.isdir(table) and is_two_folders(table):
            yield from shuffled([record["prompt"] for _, record in own_rows(table)], seed)
            return

        shards = find_shards(table)
        for name in shuffled(shards.names, seed):
            for _, prompt in shards.prompts(name):
                yield prompt

    table = table_of(source)
    return list(itertools.islice(distinct(stream(), taken), count))


def split_prompts(
    pool: list[str], taken: Iterable[str], counts: dict[str, int], seed: int, source: str
) -> dict[str, list[str]]:
    """Random splits of a pool, `counts` prompts each; no two alike, none alike to one taken.

    UserError, which names the pool's `source`, if it is too small.
    """
    usable = list(distinct(pool, taken))
    total = sum(counts.values())
    if len(usable) < total:
        parts = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise UserError(
            f"{source}: {total} prompts are needed ({parts}), but of {len(pool)} only "
            f"{len(usable)} are left without repeats and those in use elsewhere; "
            f"give more, or ask for fewer with --iter-prompts or --iters"
        )

    # Splits are cut off one after another: a further one leaves those before it as they are.
    order = iter(shuffled(usable, seed))
    splits = {}
    for split, count in counts.items():
        splits[split] = list(itertools.islice(order, count))
    return splits


# ---- the evaluation's benchmarks: where each comes from ----

def pickapic(source: str) -> Rows:
    """The captions of Pick-a-Pic's validation split, in a local folder or a hub dataset.

    No image is read.
    """
    if not source or os.path.isfile(source):
        place = source or "the pair source"
        raise UserError(f"{place} is not Pick-a-Pic and has no validation shards")

    shards = find_shards(source, all_splits=True)
    names = evaluation_shards(shards.names)
    if not names:
        others = ", ".join(EVALUATION_SPLITS[:-1])
        raise UserError(f"{source} has no shards of {others} or {EVALUATION_SPLITS[-1]}")

    rows = []
    for name in names:
        for _, prompt in shards.prompts(name):
            rows.append(("", prompt))
    return rows


def evaluation_shards(names: list[str]) -> list[str]:
    """The shards of the first evaluation split that is there, sorted; [] if there is none."""
    for split in EVALUATION_SPLITS:
        of_split = [name for name in names if re.search(rf"(^|/){split}[-./]", name)]
        if of_split:
            return sorted(of_split)
    return []


def hpsv2() -> Rows:
    """HPSv2's prompts as its package lists them.

    The package fetches four JSON files of the dataset zhwang/HPDv2 from the hub.
    """
    import hpsv2 as package

    rows = []
    for style, prompts in package.benchmark_prompts("all").items():
        for prompt in prompts:
            rows.append((style, prompt.strip()))
    return rows


def parti() -> Rows:
    """PartiPrompts, style = category, from the hub's copy of the TSV that its authors published."""
    from huggingface_hub import hf_hub_download

    file = hf_hub_download("nateraw/parti-prompts", "PartiPrompts.tsv", repo_type="dataset")
    return prompt_rows(Path(file), "parti")


def fetch_published(name: str, pair_source: str) -> Rows:
    """A known benchmark from where it is published; UserError if that is out of reach."""
    try:
        if name == "pickapic":
            return pickapic(pair_source)
        if name == "hpsv2":
            return hpsv2()
        return parti()
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"its package cannot be loaded ({error}); pip install --no-deps "
                        f"hpsv2==1.2.0 clint==0.5.1") from None

    # The package, the hub and the network raise all kinds of error.
    except Exception as error:
        if getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise UserError(f"cannot fetch its list: {hub_problem(error)}") from None


def read_copy(name: str, path: Path) -> Rows:
    """The prompts of a file, or of a folder with one file for each style, named after it."""
    if not os.path.isdir(path):
        return prompt_rows(path, str(path))

    # The folder in which HPSv2 publishes its lists has another benchmark's too.
    if name == "hpsv2":
        files = [path / f"{style}.json" for style in HPSV2_STYLES]
    else:
        files = sorted(file for file in path.iterdir() if suffix_of(file) in FOLDER_SUFFIXES
                       and not is_hidden(file.relative_to(path)))

    rows = []
    for file in files:
        for style, prompt in prompt_rows(file, str(file)):
            rows.append((style or file.stem, prompt))
    return rows


# ---- the evaluation's prompts ----

def evaluation_prompts(
    names: str, count: int, pair_source: str = "", say: Callable[[str], None] = print
) -> pd.DataFrame:
    """(benchmark, style, prompt) of all that `names` (--eval-prompts) lists.

    Of each benchmark come up to `count` prompts, 0 means all; of several styles each gives its
    first, in equal numbers. A benchmark keeps its own order, and a prompt that it has in several
    styles; within a style a prompt stands once. `pickapic` is looked for in `pair_source`. What
    was found is said in one line; UserError if something was not.
    """
    if names in ("world", "dev"):
        return pd.DataFrame(world_rows(names, count), columns=COLUMNS)

    table = []
    notes = {}
    for part in names.split(","):
        part = part.strip()
        if not part:
            continue

        benchmark, rows = benchmark_rows(part, pair_source)
        if benchmark in notes:
            path = part.partition("=")[2] or part
            raise UserError(
                f"--eval-prompts {names}: two benchmarks are named {benchmark}; "
                f"give one as another={path}"
            )
        chosen = first_of_each_style(rows, count)
        notes[benchmark] = in_words(benchmark, rows, chosen)
        for style, prompt in chosen:
            table.append((benchmark, style, prompt))

    if not table:
        raise UserError(
            f"--eval-prompts {names!r}: names no benchmark; "
            f"give {', '.join(PUBLISHED)} or a file of prompts"
        )
    say(f"evaluation prompts: {', '.join(notes.values())}")
    return pd.DataFrame(table, columns=COLUMNS)


def world_rows(part: str, count: int) -> list[tuple[str, str, str]]:
    """(part, style, caption) of the embedded world's `world` or `dev`: the first `count`, 0 all."""
    captions = world_captions()[part]
    if count > len(captions):
        raise UserError(
            f"--eval-count {count}: the embedded world has {len(captions)} {part} prompts; "
            f"ask for fewer"
        )
    if count > 0:
        captions = captions[:count]
    return [(part, style_of(text), text) for text in captions]


def benchmark_rows(part: str, pair_source: str) -> tuple[str, Rows]:
    """The name and the prompts of one part of --eval-prompts; UserError tells the way round."""
    # What exists is a path, even with a "=" in it; yet `parti` is the benchmark, even beside a
    # folder of that name.
    name, _, path = part.partition("=")
    if part not in PUBLISHED and os.path.exists(part):
        name = Path(part).stem
        path = part

    try:
        if path and name == "pickapic" and not os.path.isfile(path):
            rows = pickapic(path)
        elif path:
            rows = read_copy(name, Path(path))
        elif name in PUBLISHED:
            rows = fetch_published(name, pair_source)
        else:
            known = ", ".join(PUBLISHED)
            raise UserError(f"neither one of {known} nor a file or folder; correct --eval-prompts")

        rows = without_repeats(rows)
        if not rows:
            raise UserError("holds no prompt; correct --eval-prompts")
        return name, rows
    except UserError as error:
        remedy = ""
        if name in LOCAL_COPIES:
            remedy = f"; or give a local copy, {name}=PATH: {LOCAL_COPIES[name]}"
        raise UserError(f"benchmark {name}: {error}{remedy}") from None


def without_repeats(rows: Rows) -> Rows:
    """The rows with a prompt, each once."""
    return list(dict.fromkeys(row for row in rows if row[1]))


def first_of_each_style(rows: Rows, count: int) -> Rows:
    """`count` rows (0 is all), equal numbers of each style; they stay in their order.

    The styles take turns: the first row of each, then the second of each, until it is enough. A
    style that has no more is passed over.
    """
    if count == 0:
        return rows

    # The n-th row of a style has its turn in round n; within a round, order decides.
    met = defaultdict(int)
    turns = []
    for i, (style, _) in enumerate(rows):
        turns.append((met[style], i))
        met[style] += 1

    chosen = sorted(i for _, i in sorted(turns)[:count])
    return [rows[i] for i in chosen]


def in_words(benchmark: str, rows: Rows, chosen: Rows) -> str:
    """How many prompts a benchmark gives, and whether it has as many as were published."""
    text = f"{benchmark} {len(chosen)}"
    if len(chosen) < len(rows):
        text += f" of {len(rows)}"

    styles = {style for style, _ in rows}
    if len(styles) > 1:
        text += f" in {len(styles)} styles"

    if len(rows) != PUBLISHED.get(benchmark, len(rows)):
        text += f" (published: {PUBLISHED[benchmark]})"
    return text


# ---- the tables of a run ----

def prompt_tables(
    splits: dict[str, list[str]], evaluation: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """benchmarks.parquet and prompts.parquet of a run.

    prompts.parquet has the prompts of the splits and, as split `eval`, each of the evaluation's
    once; benchmarks.parquet says in which benchmarks and styles each of those stands.
    """
    splits = splits | {"eval": list(dict.fromkeys(evaluation.prompt))}
    rows = []
    for split, pool in splits.items():
        for prompt in pool:
            rows.append((prompt, split))
    prompts = pd.DataFrame(rows, columns=["prompt", "split"])
    prompts.insert(0, "prompt_id", range(len(prompts)))

    # A prompt of two benchmarks or styles has one id, and a row for each.
    id_of = prompts[prompts.split == "eval"].set_index("prompt").prompt_id
    table = evaluation.assign(prompt_id=evaluation.prompt.map(id_of))
    return table[["benchmark", "style", "prompt_id"]], prompts


def write_eval(s: Settings) -> None:
    """The tables of a run folder without human pairs, which only compares models.

    Nothing happens where they are there already. One process writes; the others have to wait.
    UserError: the folder has human pairs, so its prompts are more than the evaluation's.
    """
    run = Path(s.run)
    if is_whole(run / "prompts.parquet"):
        return
    if (run / "seed").exists():
        raise UserError(f"{run}/prompts.parquet is lost or damaged: run 01_seed.py --run {run}, "
                        f"which makes it again")

    # prompts.parquet says that both are there, so it comes last.
    evaluation = evaluation_prompts(s.eval_prompts, s.eval_count, s.pairs)
    benchmarks, prompts = prompt_tables({}, evaluation)
    write_table(benchmarks, run / "benchmarks.parquet")
    write_table(prompts, run / "prompts.parquet")


def read_benchmarks(run: Path, of_eval: pd.DataFrame) -> pd.DataFrame:
    """(benchmark, style, prompt_id, prompt) of the evaluation's prompts (prompt_id, prompt).

    UserError: benchmarks.parquet is broken, or has other prompts.
    """
    path = Path(run) / "benchmarks.parquet"
    made_by = f"01_seed.py --run {run}"
    if not (Path(run) / "seed").exists():
        made_by = f"05_eval.py --run {run} without prompts.parquet"

    table = read_table(path, ("benchmark", "style", "prompt_id"), made_by)
    ids = set(of_eval.prompt_id)
    for row, prompt_id in enumerate(table.prompt_id, start=1):
        if prompt_id not in ids:
            raise UserError(f"{path}, row {row}: prompt_id {shown(prompt_id)} is none of the "
                            f"evaluation's in prompts.parquet; delete it and run {made_by} again")
    missing = ids - set(table.prompt_id)
    if missing:
        raise UserError(f"{path}: the evaluation's prompt_id {min(missing)} is not in it; "
                        f"delete it and run {made_by} again")
    return table.merge(of_eval[["prompt_id", "prompt"]], on="prompt_id")

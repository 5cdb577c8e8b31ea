"""Evaluation prompts (the embedded world's, published benchmarks by name, files of one's own) and the rounds' pools.

`--eval-prompts` is `world` or `dev` (captions of the embedded world that nothing else uses; dev is for tuning), or a
list with commas of
    pickapic, hpsv2, parti         fetched from where they are published
    name=FILE_OR_FOLDER            one of these, or any other, from a local copy
    FILE_OR_FOLDER                 prompts of one's own, named after the file
A file is a text of one prompt a line, CSV, TSV, JSON (a list, or style: [prompts]), JSON lines or Parquet, with columns
`prompt` (or `caption`) and, if there are styles, `style` (or `category`). A folder holds one such file for each style.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from lib import world
from lib.pairs import distinct, hub, prompt_rows, shards, shuffled
from lib.run import UserError, generator, write_table
from lib.settings import Settings

EVAL_PER_STYLE, DEV_PER_STYLE = 60, 40         # the world's captions set aside, the same for every run seed
SPLITS = ("validation_unique", "validation", "test_unique", "test")       # of Pick-a-Pic, the first that is there
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
PUBLISHED = {"pickapic": 500, "hpsv2": 3174, "parti": 1632}    # prompts; HPSv2's 3,200 less 26 repeated within a style
COPIES = {"pickapic": "a folder or hub id with its validation_unique shards, or a file of prompts",
          "hpsv2": "the folder benchmark of the hub dataset zhwang/HPDv2, or one JSON file of style: [prompts]",
          "parti": "PartiPrompts.tsv of github.com/google-research/parti"}
Rows = list[tuple[str, str]]                   # (style, prompt), in the benchmark's order


# ---- where each comes from ----

def permuted(items: list, *key) -> list:
    """Items in a random order that depends on the key and on their order."""
    import torch
    return [items[i] for i in torch.randperm(len(items), generator=generator(*key))]


def world_captions() -> dict[str, list[str]]:
    """The world's captions in three parts: world (evaluation), dev (tuning), rest. Styles take turns within a part."""
    by_style: dict[str, list[str]] = {style: [] for style in world.STYLES}
    for text in permuted(world.CAPTIONS, "world splits"):
        by_style[world_style(text)].append(text)
    turns = [text for row in zip(*by_style.values()) for text in row]
    first, second = 4 * EVAL_PER_STYLE, 4 * (EVAL_PER_STYLE + DEV_PER_STYLE)
    return {"world": turns[:first], "dev": turns[first:second], "rest": turns[second:]}


def world_style(caption: str) -> str:
    return world.STYLES[world.parse(caption)[2]]


def pickapic(source: str) -> Rows:
    """The captions of Pick-a-Pic's validation split, from a local folder or a hub dataset; no image is read."""
    if not source or Path(source).is_file():
        raise UserError(f"{source or 'the pair source'} is not Pick-a-Pic and has no validation shards")
    names, _, peek = shards(source, every=True)
    of = {split: sorted(n for n in names if re.search(rf"(^|/){split}[-./]", n)) for split in SPLITS}
    split = next((split for split in SPLITS if of[split]), None)
    if split is None:
        raise UserError(f"{source} has no shards of {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    read = hub(source)(lambda name: prompt_rows(peek(name), f"{source}, {name}"))
    return [("", prompt) for name in of[split] for _, prompt in read(name)]


def hpsv2() -> Rows:
    """The benchmark as the hpsv2 package lists it; the package fetches four JSON files of zhwang/HPDv2 from the hub."""
    import hpsv2 as package
    return [(style, prompt.strip()) for style, prompts in package.benchmark_prompts("all").items() for prompt in prompts]


def parti() -> Rows:
    """PartiPrompts, style = category, from the hub's copy of the TSV that its authors published."""
    from huggingface_hub import hf_hub_download
    return prompt_rows(Path(hf_hub_download("nateraw/parti-prompts", "PartiPrompts.tsv", repo_type="dataset")), "parti")


def local(path: Path, only: tuple[str, ...] = ()) -> Rows:
    """A file of prompts, or a folder of one file for each style (`only`: JSON files of these styles)."""
    if path.is_dir():
        files = [path / f"{style}.json" for style in only] or sorted(
            file for file in path.iterdir() if file.suffix in (".json", ".jsonl", ".csv", ".tsv", ".parquet"))
        return [(style or file.stem, prompt) for file in files for style, prompt in prompt_rows(file, str(file))]
    return prompt_rows(path, str(path))


def published(name: str, pairs: str) -> Rows:
    """A known benchmark from where it is published."""
    try:
        return pickapic(pairs) if name == "pickapic" else {"hpsv2": hpsv2, "parti": parti}[name]()
    except UserError:
        raise
    except Exception as error:                                      # the package, the hub and the network raise all kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"cannot fetch its list ({why})") from None


def find(token: str, pairs: str) -> tuple[str, Rows]:
    """The name and the rows of one part of --eval-prompts."""
    name, _, where = token.partition("=")
    if token not in PUBLISHED and Path(token).exists():
        name, where = Path(token).stem, token
    try:
        if where and name == "pickapic" and not Path(where).is_file():
            rows = pickapic(where)
        elif where:
            rows = local(Path(where), HPSV2_STYLES if name == "hpsv2" else ())
        elif name in PUBLISHED:
            rows = published(name, pairs)
        else:
            raise UserError(f"neither one of {', '.join(PUBLISHED)} nor a file or folder; correct --eval-prompts")
        rows = list(dict.fromkeys(row for row in rows if row[1]))
        if not rows:
            raise UserError("holds no prompt; correct --eval-prompts")
        return name, rows
    except UserError as error:
        remedy = f"; or give a local copy, {name}=PATH: {COPIES[name]}" if name in COPIES else ""
        raise UserError(f"benchmark {name}: {error}{remedy}") from None


# ---- what stages 01 and 05 use ----

def split_prompts(pool: list[str], taken: Iterable[str], counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Disjoint random splits of a pool, `counts` prompts each, all distinct and none taken; UserError if too few."""
    usable, total = list(distinct(pool, taken)), sum(counts.values())
    if len(usable) < total:
        parts = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{total} prompts are needed ({parts}), but of {len(pool)} only {len(usable)} are left without "
                        f"repeats and those in use elsewhere; give more, or ask for fewer")
    order = iter(shuffled(usable, seed))
    return {name: list(itertools.islice(order, count)) for name, count in counts.items()}

def first_of_each(rows: Rows, count: int) -> Rows:
    """The first `count` rows (0 is all) if styles take turns, so an equal number of each; in the order of `rows`."""
    turn: Counter[str] = Counter()
    key = []
    for i, (style, _) in enumerate(rows):
        key.append((turn[style], i))
        turn[style] += 1
    return [rows[i] for i in sorted(i for _, i in sorted(key)[:count or None])]


def load(names: str, count: int, pairs: str = "", say: Callable = print) -> pd.DataFrame:
    """(benchmark, style, prompt) of all that --eval-prompts names: up to `count` of each benchmark, 0 is all.

    A benchmark keeps its own order, and a prompt that it has in several styles; within a style a prompt stands once.
    Of several styles each gives its first, in equal numbers. `pairs` is the source in which to look for pickapic.
    """
    if names in ("world", "dev"):
        captions = world_captions()[names]
        if count > len(captions):
            raise UserError(f"--eval-count {count}: the embedded world has {len(captions)} {names} prompts; ask for fewer")
        return pd.DataFrame([(names, world_style(c), c) for c in captions[:count or None]],
                            columns=["benchmark", "style", "prompt"])
    table, notes = [], {}
    for token in filter(None, map(str.strip, names.split(","))):
        name, rows = find(token, pairs)
        if name in notes:
            raise UserError(f"--eval-prompts {names}: two benchmarks are named {name}; give one as "
                            f"another={token.partition('=')[2] or token}")
        chosen, styles = first_of_each(rows, count), len({style for style, _ in rows})
        notes[name] = f"{name} {len(chosen)}" + (f" of {len(rows)}" if len(chosen) < len(rows) else "") + \
            (f" in {styles} styles" if styles > 1 else "") + \
            (f" (published: {PUBLISHED[name]})" if len(rows) != PUBLISHED.get(name, len(rows)) else "")
        table += [(name, *row) for row in chosen]
    if not table:
        raise UserError(f"--eval-prompts {names!r}: names no benchmark; give {', '.join(PUBLISHED)} or a file of prompts")
    say(f"evaluation prompts: {', '.join(notes.values())}")
    return pd.DataFrame(table, columns=["benchmark", "style", "prompt"])


def write_prompts(run: Path, splits: dict[str, list[str]], evaluation: pd.DataFrame) -> pd.DataFrame:
    """benchmarks.parquet, then prompts.parquet: the splits and, each once, the prompts of the evaluation."""
    splits = splits | {"eval": list(dict.fromkeys(evaluation.prompt))}
    prompts = pd.DataFrame([(p, split) for split, pool in splits.items() for p in pool], columns=["prompt", "split"])
    prompts.insert(0, "prompt_id", range(len(prompts)))
    number = prompts[prompts.split == "eval"].set_index("prompt").prompt_id
    table = evaluation.assign(prompt_id=evaluation.prompt.map(number))[["benchmark", "style", "prompt_id"]]
    write_table(table, Path(run) / "benchmarks.parquet")
    write_table(prompts, Path(run) / "prompts.parquet")
    return prompts


def write_eval(s: Settings) -> None:
    """The tables of a run folder that has no seed and only compares models; nothing to do where they are there.
    For one process: others wait meanwhile."""
    if not (Path(s.run) / "prompts.parquet").exists():
        write_prompts(s.run, {}, load(s.eval_prompts, s.eval_count, s.pairs))

"""Stage 05: every model's scores on prompts nobody trained on, the table, the curves, and a page to look at.

reads   prompts.parquet (split eval), benchmarks.parquet, the base model, iterK/unet/ of all rounds, rows given by hand
writes  eval/images/, eval/scores.parquet (one row per image and style it stands in), eval/table.md, eval/table.csv,
        eval/curves.png, eval/samples.png, eval/index.html

All models get the same prompts and the same noise per prompt, so differences are paired: the intervals are 95%
bootstrap intervals over prompts of the mean and of the mean difference. They say nothing of how another run seed
would have trained; for that, several runs (`./run_sail.sh study`).

    python 05_eval.py --run runs/tiny                                              the run's own models
    python 05_eval.py --run runs/tiny --only base,Iter0,Iter3                      some of them
    python 05_eval.py --run runs/tiny --row "seed only=runs/tiny-seed-only/iter3/unet"     and others (lib/rows.py)
    python 05_eval.py --preset sd15 --run runs/mine --row mine=me/my-model         any model, without a run
    python 05_eval.py --preset sd15 --run runs/scores --images my/pictures         pictures that exist, without a model
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from lib import benchmarks, models, page, paper, report, rows, scoring
from lib.run import Ledger, UserError, read_prompts, read_table, run_stage, seed_of, write_table, write_text
from lib.settings import Settings, environment, load

OWN = {"--row": {"action": "append", "default": [], "metavar": "NAME=WHERE",
                 "help": "another row: a model, an adapter, a control or existing pictures (lib/rows.py says how)"},
       "--only": {"default": "", "metavar": "NAMES", "help": "of the run's own models, base included, draw and score these "
                  "alone, say base,Iter0,Iter3"},
       "--rivals": {"action": "store_true", "default": False, "help": "the public checkpoints of the paper's other rows"},
       "--images": {"default": "", "metavar": "PATH", "help": "score these pictures alone: a table with prompt and image, "
                    "or a folder"}}


def rows_of(s: Settings, own) -> dict[str, int | str]:
    """What the table compares, by name: the number of a model of the run (-1 is the base), or where another lies."""
    if own.images:
        if own.row or own.only or own.rivals:
            raise UserError("--images scores pictures alone, beside no model; for a comparison give --row NAME=images:PATH")
        return {"images": f"images:{own.images}"}
    own_models = {"base": -1} | {f"Iter{k}": k for k in range(s.iters + 1) if models.unet_folder(s, k).exists()}
    wanted = [name.strip() for name in own.only.split(",")] if own.only else list(own_models)
    for name in wanted:
        if name not in own_models:
            raise UserError(f"--only {own.only}: {name!r} is no model of this run, which has {', '.join(own_models)}; give "
                            f"other models as --row NAME=WHERE")
    found: dict[str, int | str] = {name: k for name, k in own_models.items() if name in wanted}
    for text in own.row:
        name, _, where = text.partition("=")
        if not name or not where:
            raise UserError(f"--row {text}: give NAME=WHERE, say mine=path/to/unet")
        if name in found | own_models:
            raise UserError(f"--row {text}: the name {name!r} is taken already; give another")
        found[name] = os.path.expanduser(where)
    for where in found.values():
        if isinstance(where, str):
            rows.check(s, where)
    for name, where in rows.RIVALS.get(s.preset, {}).items() if own.rivals else ():
        try:
            rows.check(s, where)
            found.setdefault(name, where)
        except UserError as error:                       # a checkpoint that is gone must not cost a finished run
            print(f"row {name} is left out: {error}")
    return found


def evaluation(s: Settings) -> pd.DataFrame:
    """(benchmark, style, prompt_id, prompt): a prompt in two styles stands there twice, and is drawn once."""
    if not (Path(s.run) / "prompts.parquet").exists() and PartialState().is_main_process:
        benchmarks.write_eval(s)
    PartialState().wait_for_everyone()
    prompts, where = read_prompts(s.run, "eval"), Path(s.run) / "benchmarks.parquet"
    if where.exists():
        return read_table(where, ("benchmark", "style", "prompt_id"), "01_seed.py").merge(
            prompts[["prompt_id", "prompt"]], on="prompt_id")
    return prompts.assign(benchmark=Path(s.eval_prompts).stem, style="")[["benchmark", "style", "prompt_id", "prompt"]]


def jobs_of(s: Settings, name: str, where: int | str, prompts: pd.DataFrame | None) -> pd.DataFrame:
    """One line per picture. The noise depends on prompt and number only: the same for all models, runs and run seeds.

    The folder of a row bears a hash of all that its pictures depend on, so that none is ever taken for another's.
    """
    if str(where).startswith("images:"):
        return rows.image_jobs(Path(s.run), name, where.removeprefix("images:"), prompts)
    made_by = [rows.identity(s, where), rows.identity(s, -1), s.sampler, s.sample_steps, s.cfg_scale, s.resolution, s.vae,
               str(models.dtype_of(s))]
    folder = rows.folder_name(name, json.dumps(made_by))
    return pd.DataFrame([{"prompt_id": p.prompt_id, "prompt": p.prompt, "seed": seed_of("eval", p.prompt, n),
                          "image": f"eval/images/{folder}/{p.prompt_id:06d}_{n}.png"}
                         for p in prompts.drop_duplicates("prompt_id").itertuples() for n in range(s.eval_seeds)])


def collect(results: dict[str, pd.DataFrame], prompts: pd.DataFrame | None, title: str) -> pd.DataFrame:
    """scores.parquet: the pictures of every row, in every benchmark and style that their prompt stands in."""
    parts = []
    for name, jobs in results.items():
        if prompts is None:
            parts.append(jobs.assign(model=name, benchmark=title))
        else:
            parts.append(prompts.drop(columns="prompt").merge(jobs.drop(columns="style", errors="ignore"), on="prompt_id"
                                                              ).assign(model=name))
    table = pd.concat(parts, ignore_index=True)
    return table[report.KEYS + [c for c in table.columns if c not in report.KEYS]]


def facts_of(s: Settings, found: dict[str, int | str]) -> dict[str, dict[str, str]]:
    """Human pairs behind each model, and for the run's own the minutes that the ledger has for making it."""
    cost, facts = report.cost(s.run), {}
    spent = lambda k: cost[(cost.stage != "05_eval") & (cost.iter.fillna(0) <= k)].seconds.sum() / 60
    for name, where in found.items():
        control = rows.parse_control(where) if isinstance(where, str) else None
        k = control[1] if control else where
        if k == -1:
            facts[name] = {"human pairs": "0", "minutes": ""}
        elif isinstance(k, int):
            own = [str(s.seed_pairs)] if k or not s.start else []                    # a model to start from had its own
            facts[name] = {"human pairs": " + ".join(own + ["the start's"] * bool(s.start)), "minutes": f"{spent(k):.1f}"}
        elif rows.RIVALS.get(s.preset, {}).get(name) == where:
            facts[name] = {"human pairs": str(rows.FULL_DATA)}
    return facts


def write_results(s: Settings, found: dict[str, int | str], scores: pd.DataFrame, versions: list[str]) -> None:
    """table.md, table.csv, the curves, the sheet of samples, and the page."""
    run, folder, names = Path(s.run), Path(s.run) / "eval", scoring.names_of(s)
    summary, facts = report.summarise(scores, names, "base", "Iter0"), facts_of(s, found)
    table = report.readable(summary, names, facts)
    beside = paper.table(s.preset, summary, {name: fact["human pairs"] for name, fact in facts.items()})
    notes = report.notes(replace(s, dtype=str(models.dtype_of(s))), environment(), scores, versions,
                         {n: w for n, w in found.items() if isinstance(w, str)})
    title = "As the paper's table 1: mean [95% interval] (the paper's number, ours less it)"
    if len(beside) and (other := paper.departures(s)):
        title += f". Not as in the paper: {other}"
    tables = [(title, beside)] * bool(len(beside)) + [("Means, gains and win rates", table)]
    text = "\n".join(f"{report.plain(title)}\n\n{report.markdown(one)}" for title, one in tables)
    write_text(text + "\n" + "".join(f"- {report.plain(n)}\n" for n in notes), folder / "table.md")
    csv = report.for_programs(summary, facts, paper.numbers(s.preset), versions)
    write_text(csv.to_csv(index=False, float_format="%.6g"), folder / "table.csv")
    rounds = sorted((int(p.parent.name[4:]), p.parent) for p in run.glob("iter*/judge.json"))
    judges = [json.loads((p / "judge.json").read_text()) for _, p in rounds]
    report.curves(summary, names, [n for n, k in found.items() if isinstance(k, int)], [j for j in judges if j["pairs"]],
                  folder / "curves.png")
    report.sample_sheet(run, scores, folder / "samples.png")
    sheets = [("each score over the rounds", "eval/curves.png"), ("the same prompts and noise", "eval/samples.png"),
              ("seed pairs", "seed/preview.png")]
    sheets += [(f"round {k}: the model's own best and worst", f"{p.name}/preview.png") for k, p in rounds]
    page.write_page(run, tables, scores, f"SAIL: {run.name}", notes, [(c, p) for c, p in sheets if (run / p).exists()])
    print("", text, report.cost(run).iloc[:, :6].round(1).to_string(index=False), sep="\n")
    print(f"05 eval: {folder}/table.md, curves.png, samples.png; open {folder}/index.html")


def main(argv: list[str]) -> None:
    s, own = load(argv, __doc__, OWN, create=any(a.startswith("--preset") for a in argv))
    found = rows_of(s, own)
    with Ledger(s.run, "05_eval", None, str(models.device_of(s))) as ledger:
        prompts = None if own.images else evaluation(s)
        jobs = {name: jobs_of(s, name, where, prompts) for name, where in found.items()}
        scoring.paint_rows(s, found, jobs, ledger)
        results, versions = scoring.score_rows(s, jobs)
    if PartialState().is_main_process:
        scores = collect(results, prompts, Path(own.images).stem)
        write_table(scores, Path(s.run) / "eval/scores.parquet")
        write_results(s, found, scores, versions)


if __name__ == "__main__":
    run_stage(main)

"""The paper's table 1 (He et al., ICLR 2026), and a run's own numbers in its form."""

import pandas as pd

from lib.settings import PRESETS

COLUMNS = ["HPSv2 anime", "HPSv2 concept-art", "HPSv2 paintings", "HPSv2 photo",          # HPSv2 score, by style
           "PickScore", "ImageReward", "Aesthetics", "HPSv2"]                             # Pick-a-Pic v2 validation
# The same columns as (benchmark, style, score) here.
OURS = [("hpsv2", style, "hpsv2") for style in ("anime", "concept-art", "paintings", "photo")] + \
       [("pickapic", "", score) for score in ("pickscore", "imagereward", "aesthetics", "hpsv2")]
TABLE = {
    "sd15": {"base": (27.23, 26.65, 26.52, 27.41, 20.62, -.0130, 5.38, 26.21),
             "DiffusionDPO": (27.64, 26.97, 26.90, 27.56, 21.07, .2056, 5.48, 26.57),
             "DiffusionSPO": (28.05, 27.49, 27.61, 27.55, 21.20, .1577, 5.68, 26.75),
             "Iter0": (27.41, 26.75, 26.72, 27.50, 20.80, .0715, 5.42, 26.38),
             "Iter1": (27.56, 26.88, 26.83, 27.59, 20.89, .1137, 5.46, 26.49),
             "Iter2": (27.75, 27.06, 27.03, 27.74, 20.95, .1729, 5.47, 26.65),
             "Iter3": (27.88, 27.16, 27.15, 27.79, 21.00, .2329, 5.49, 26.75)},
    "sdxl": {"base": (28.03, 27.17, 27.22, 27.50, 22.13, .6891, 6.04, 26.80),
             "DiffusionDPO": (28.71, 27.75, 27.82, 27.89, 22.59, .9336, 6.02, 27.27),
             "MaPO": (28.39, 27.60, 27.58, 27.74, 22.24, .8227, 6.16, 27.05),
             "Iter0": (28.41, 27.50, 27.49, 27.76, 22.40, .8705, 6.04, 27.08),
             "Iter1": (28.59, 27.62, 27.59, 27.90, 22.53, .9355, 6.08, 27.21),
             "Iter2": (28.74, 27.80, 27.78, 28.09, 22.51, .9844, 6.16, 27.32)}}


PAIRS = {"base": "", "DiffusionDPO": "0.8M", "DiffusionSPO": "0.8M", "MaPO": "0.8M"}         # Iter0, Iter1, ...: 0.05M


def numbers(preset: str) -> dict[tuple[str, str, str, str], float]:
    """The paper's scores by (model, benchmark, style, score)."""
    return {(model, *key): value for model, values in TABLE.get(preset, {}).items() for key, value in zip(OURS, values)}


def table(preset: str, summary: pd.DataFrame, pairs: dict[str, str]) -> pd.DataFrame:
    """Rows and columns of table 1: our mean [its interval], then (the paper's number, ours minus it), where it has one;
    and the human pairs behind each model, ours from `pairs` and the paper's.

    Columns that this evaluation did not measure are left out; the table is empty if none was, or if the paper has no
    such model.
    """
    ours = summary.set_index(["model", "benchmark", "style", "score"])[["mean", "low", "high"]].to_dict("index")
    columns = [(i, *key) for i, key in enumerate(OURS) if any(k[1:] == key for k in ours)]
    rows, paper = [], numbers(preset)
    for model in summary.model.unique() if columns and paper else ():
        known = f" ({PAIRS.get(model, '0.05M')})" if model in TABLE[preset] and PAIRS.get(model) != "" else ""
        row = {"model": f"SAIL ({model})" if model.startswith("Iter") else model,
               "human pairs": pairs.get(model, "") + known}
        for i, *key in columns:
            it, theirs, digits = ours.get((model, *key)), paper.get((model, *key)), 4 if key[2] == "imagereward" else 2
            row[COLUMNS[i]] = "" if it is None else "{mean:.{0}f} [{low:.{0}f}, {high:.{0}f}]".format(digits, **it) + (
                "" if theirs is None else f" ({theirs:.{digits}f}, {it['mean'] - theirs:+.{digits}f})")
        rows.append(row)
    return pd.DataFrame(rows)


def departures(s) -> str:
    """Settings of the evaluation that differ from the paper's, which stand in brackets; empty where it has no such run."""
    names = ("resolution", "eval_count", "eval_seeds", "sampler", "sample_steps", "cfg_scale")
    return ", ".join(f"{name} {getattr(s, name)} ({PRESETS[s.preset][name]})" for name in names
                     if s.preset in TABLE and getattr(s, name) != PRESETS[s.preset][name])

"""The paper's table 1 (He et al., ICLR 2026), and a run's own numbers in its form.

Nothing is computed here: the means and intervals come from lib/eval/table.py. In the paper a number
stands alone; here it stands beside ours, with the difference.
"""

import pandas as pd

from lib.settings import PRESETS, Settings

# The columns: title, and (benchmark, style, score) as scores.parquet names them.
COLUMNS = [
    ("HPSv2 anime", "hpsv2", "anime", "hpsv2"),
    ("HPSv2 concept-art", "hpsv2", "concept-art", "hpsv2"),
    ("HPSv2 paintings", "hpsv2", "paintings", "hpsv2"),
    ("HPSv2 photo", "hpsv2", "photo", "hpsv2"),
    ("PickScore", "pickapic", "", "pickscore"),                  # the Pick-a-Pic v2 validation set
    ("ImageReward", "pickapic", "", "imagereward"),
    ("Aesthetics", "pickapic", "", "aesthetics"),
    ("HPSv2", "pickapic", "", "hpsv2"),
]

# The rows, by preset and by the name that the model has in our table.
TABLE = {
    "sd15": {
        "base": (27.23, 26.65, 26.52, 27.41, 20.62, -.0130, 5.38, 26.21),
        "DiffusionDPO": (27.64, 26.97, 26.90, 27.56, 21.07, .2056, 5.48, 26.57),
        "DiffusionSPO": (28.05, 27.49, 27.61, 27.55, 21.20, .1577, 5.68, 26.75),
        "Iter0": (27.41, 26.75, 26.72, 27.50, 20.80, .0715, 5.42, 26.38),
        "Iter1": (27.56, 26.88, 26.83, 27.59, 20.89, .1137, 5.46, 26.49),
        "Iter2": (27.75, 27.06, 27.03, 27.74, 20.95, .1729, 5.47, 26.65),
        "Iter3": (27.88, 27.16, 27.15, 27.79, 21.00, .2329, 5.49, 26.75),
    },
    "sdxl": {
        "base": (28.03, 27.17, 27.22, 27.50, 22.13, .6891, 6.04, 26.80),
        "DiffusionDPO": (28.71, 27.75, 27.82, 27.89, 22.59, .9336, 6.02, 27.27),
        "MaPO": (28.39, 27.60, 27.58, 27.74, 22.24, .8227, 6.16, 27.05),
        "Iter0": (28.41, 27.50, 27.49, 27.76, 22.40, .8705, 6.04, 27.08),
        "Iter1": (28.59, 27.62, 27.59, 27.90, 22.53, .9355, 6.08, 27.21),
        "Iter2": (28.74, 27.80, 27.78, 28.09, 22.51, .9844, 6.16, 27.32),
    },
}

# The human pairs behind each row; SAIL's rows (Iter0, Iter1, ...) share one number.
HUMAN_PAIRS = {"base": "", "DiffusionDPO": "0.8M", "DiffusionSPO": "0.8M", "MaPO": "0.8M"}
SAIL_HUMAN_PAIRS = "0.05M"

# Settings of an evaluation that move its numbers.
COMPARED = ("resolution", "eval_count", "eval_seeds", "sampler", "sample_steps", "cfg_scale")


def numbers(preset: str) -> dict[tuple[str, str, str, str], float]:
    """The paper's scores by (model, benchmark, style, score); none for a preset it has not run."""
    scores = {}
    for model, values in TABLE.get(preset, {}).items():
        for (_, benchmark, style, score), value in zip(COLUMNS, values):
            scores[model, benchmark, style, score] = value
    return scores


def table(preset: str, summary: pd.DataFrame, pairs: dict[str, str]) -> pd.DataFrame:
    """Our means in the rows and columns of table 1, the paper's numbers beside them.

    A cell is our mean [its interval] and then, where the paper has it, (the paper's number, ours
    less it). `summary` is that of lib/eval/table.py; `pairs` has the human pairs behind each of our
    models.

    Columns that this evaluation did not measure are left out. The table is empty if none was
    measured, or if the paper has no such base model.
    """
    keys = ["model", "benchmark", "style", "score"]
    ours = summary.set_index(keys)[["mean", "low", "high"]].to_dict("index")
    theirs = numbers(preset)

    # Of the paper's columns, those that this evaluation has measured for any model.
    measured = {key[1:] for key in ours}
    columns = [column for column in COLUMNS if column[1:] in measured]
    if not columns or not theirs:
        return pd.DataFrame()

    rows = []
    for model in summary.model.unique():
        row = {"model": model}
        if model.startswith("Iter"):
            row["model"] = f"SAIL ({model})"
        row["human pairs"] = pairs.get(model, "") + _papers_pairs(preset, model)
        for title, benchmark, style, score in columns:
            key = (model, benchmark, style, score)
            row[title] = _cell(ours.get(key), theirs.get(key), score)
        rows.append(row)
    return pd.DataFrame(rows)


def _papers_pairs(preset: str, model: str) -> str:
    """The human pairs that the paper has for a model, in brackets; nothing where it has none."""
    if model not in TABLE[preset]:
        return ""
    count = HUMAN_PAIRS.get(model, SAIL_HUMAN_PAIRS)
    if not count:
        return ""
    return f" ({count})"


def _cell(ours: dict[str, float] | None, theirs: float | None, score: str) -> str:
    """One cell of the table; ours has mean, low and high."""
    if ours is None:
        return ""

    # As many digits as the paper prints.
    digits = 4 if score == "imagereward" else 2
    mean = ours["mean"]
    text = f"{mean:.{digits}f} [{ours['low']:.{digits}f}, {ours['high']:.{digits}f}]"
    if theirs is not None:
        text += f" ({theirs:.{digits}f}, {mean - theirs:+.{digits}f})"
    return text


def departures(s: Settings) -> str:
    """Name the settings of the evaluation that differ from the paper's, which stand in brackets.

    The text is empty where nothing differs, and where the paper has no run of this preset.
    """
    if s.preset not in TABLE:
        return ""

    papers = Settings(**PRESETS[s.preset])
    different = []
    for name in COMPARED:
        if getattr(s, name) != getattr(papers, name):
            different.append(f"{name} {getattr(s, name)} ({getattr(papers, name)})")
    return ", ".join(different)

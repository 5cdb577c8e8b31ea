"""Numbers with intervals, the table, the curves and the sheets of pictures."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont

from lib.run import atomic, open_image

RESAMPLES = 4000
KEYS = ["model", "benchmark", "style", "prompt_id", "prompt", "seed", "image"]      # scores.parquet, before the scores


# ---- intervals ----

def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    p, scale = successes / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / scale, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return middle - half, middle + half


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile interval of the mean over rows of (prompts, ...): all columns share their resamples."""
    n = len(values)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n          # (RESAMPLES, n)
    means = np.tensordot(weights, values, 1)
    return np.percentile(means, 2.5, axis=0), np.percentile(means, 97.5, axis=0)


def summarise(scores: pd.DataFrame, names: list[str], base: str, iter0: str | None) -> pd.DataFrame:
    """One row per benchmark, style, model and score (style "" is the whole benchmark): prompts, mean, low, high; gain over
    base and over Iter0, paired by prompt, with intervals; win rate over base (share of prompts with a higher score, ties
    half). A row that lacks prompts is compared on those it has."""
    rows = []
    for benchmark, rest in scores.groupby("benchmark", sort=False):
        styles = [""] + [x for x in rest["style"].unique() if x and rest["style"].nunique() > 1]
        for style in styles:
            part = rest if style == "" else rest[rest["style"] == style]
            for name in names:
                wide = part.pivot_table(index=["style", "prompt_id"], columns="model", values=name, sort=False)
                models = [m for m in scores.model.unique() if m in wide.columns]
                rows += _lines(wide[models], {"benchmark": benchmark, "style": style, "score": name}, base, iter0)
    return pd.DataFrame(rows)


def _lines(wide: pd.DataFrame, key: dict, base: str, iter0: str | None) -> list[dict]:
    """The rows of one benchmark, style and score from (prompts, models)."""
    lines = {m: {"model": m} | key for m in wide.columns}
    for title, reference in (("", None), ("gain", base), ("over_iter0", iter0)):
        if reference is not None and reference not in wide.columns:
            continue
        values = wide if reference is None else wide.sub(wide[reference], axis=0)
        complete = [m for m in wide.columns if not values[m].isna().any()]
        for group in [complete] * bool(complete) + [[m] for m in wide.columns if m not in complete]:
            table = values[group].dropna().to_numpy()
            if not len(table):
                continue
            low, high = bootstrap(table)
            for i, m in enumerate(group):
                if title == "":
                    lines[m] |= {"prompts": len(table), "mean": table[:, i].mean(), "low": low[i], "high": high[i]}
                elif m not in (base, reference):
                    lines[m] |= {title: table[:, i].mean(), f"{title}_low": low[i], f"{title}_high": high[i]}
                    if title == "gain":
                        lines[m]["win_rate"] = (table[:, i] > 0).mean() + .5 * (table[:, i] == 0).mean()
    return list(lines.values())


# ---- the table ----

def readable(summary: pd.DataFrame, names: list[str], facts: dict[str, dict]) -> pd.DataFrame:
    """The table people read: a row per benchmark and model; `facts` adds columns such as human pairs, by model."""
    cell = lambda r, k, sign: "" if pd.isna(r.get(k, np.nan)) else \
        f"{r[k]:{sign}.3f} [{r[k + '_low']:{sign}.3f}, {r[k + '_high']:{sign}.3f}]"
    rows = []
    summary = summary[summary["style"] == ""]
    for (benchmark, model), part in summary.groupby(["benchmark", "model"], sort=False):
        part = part.rename(columns={"low": "mean_low", "high": "mean_high"})
        by_score = {r["score"]: r for r in part.to_dict("records")}
        row = {"benchmark": benchmark, "model": model, **facts.get(model, {})}
        row |= {name: cell(by_score[name], "mean", "") for name in names}
        for name in names:
            row[f"{name}: gain over base"] = cell(by_score[name], "gain", "+")
        main = by_score[names[-1]]
        row[f"{names[-1]}: over Iter0"] = cell(main, "over_iter0", "+")
        row["win rate over base"] = "" if pd.isna(main.get("win_rate", np.nan)) else f"{main['win_rate']:.0%}"
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    return table.drop(columns=[c for c in table if (table[c].astype(str) == "").all()])


def markdown(table: pd.DataFrame) -> str:
    cell = lambda v: str(v).replace("|", "\\|").replace("\n", " ")
    lines = [list(map(cell, table.columns)), ["---"] * len(table.columns), *(list(map(cell, r)) for r in table.to_numpy())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def notes(s, config: dict, scores: pd.DataFrame, versions: list[str], outside: dict[str, str]) -> list[str]:
    """All that the numbers depend on, in lines of text: prompts, sampling, models, scorers, packages, hardware."""
    counts = [f"{name} {part.prompt_id.nunique()} prompts" for name, part in scores.groupby("benchmark", sort=False)]
    return [f"{', '.join(counts)}, {s.eval_seeds} picture(s) each; {s.sampler}, {s.sample_steps} steps, guidance "
            f"{s.cfg_scale}, {s.resolution} pixels, {s.dtype} precision; base {s.model}" + (f", VAE {s.vae}" if s.vae else ""),
            "intervals: 95%, bootstrap over prompts; gains paired by prompt and noise",
            *(f"row {name}: {where}" for name, where in outside.items()), *(f"scorer {v}" for v in versions),
            " ".join(f"{k} {v}" for k, v in config["versions"].items() if v),
            f"code {config['commit']}, {config['hardware']}"]


# ---- pictures ----

def read_pictures(run: Path, images) -> torch.Tensor:
    """(B, 3, H, W) in 0..1 of image files named relative to the run folder."""
    return as_tensor([open_image(Path(run) / image, Path(run), i) for i, image in enumerate(images)])


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """(B, 3, H, W) in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float() / 255


def sheet(rows: list[list[Image.Image]], columns: list[str], labels: list[str], path: Path, side: int = 96) -> None:
    """A grid of pictures with column titles and a line of text above each row."""
    font, gap, head = ImageFont.load_default(12), 4, 18
    width = max(map(len, rows)) * (side + gap) + gap
    canvas = Image.new("RGB", (width, head + len(rows) * (side + head + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, title in enumerate(columns):
        draw.text((gap + j * (side + gap), 2), title, "black", font)
    for i, row in enumerate(rows):
        top = head + i * (side + head + gap)
        text = labels[i]
        while draw.textlength(text, font) > width - 2 * gap and len(text) > 4:
            text = text[:-4] + "..."
        draw.text((gap, top), text, "dimgray", font)
        for j, picture in enumerate(row):
            small = picture.width < side
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS),
                         (gap + j * (side + gap), top + head - 2))
    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def pair_sheet(run: Path, pairs: pd.DataFrame, path: Path, titles: tuple[str, str], across: int = 4) -> None:
    """Winners beside losers, `across` pairs a row."""
    run, pairs = Path(run), pairs.reset_index(drop=True)
    rows, labels = [], []
    for start in range(0, len(pairs), across):
        part = pairs.iloc[start:start + across]
        rows.append([open_image(run / image, path, start) for p in part.itertuples() for image in (p.win, p.lose)])
        labels.append("  |  ".join(p.replace(" background", "") for p in part.prompt))
    sheet(rows, list(titles) * min(across, len(pairs)), labels, path)


def sample_sheet(run: Path, scores: pd.DataFrame, path: Path, count: int = 8) -> None:
    """Rows: the first prompts of each style in turn that every model has drawn; columns: the models."""
    first = scores.drop_duplicates(["prompt_id", "model"])
    models = list(scores.model.unique())
    drawn = first.groupby("prompt_id").model.transform("size") == len(models)
    first = first[drawn] if drawn.any() else first[first.model == models[0]]
    models = [m for m in models if m in set(first.model)]
    ids = first.drop_duplicates("prompt_id").groupby("style", sort=False, dropna=False).head(
        -(-count // first["style"].nunique(dropna=False))).prompt_id[:count]
    at = first.set_index(["prompt_id", "model"])
    rows = [[open_image(Path(run) / at.loc[(i, m), "image"], path, 0) for m in models] for i in ids]
    sheet(rows, models, [at.loc[(i, models[0]), "prompt"] for i in ids], path)


def curves(summary: pd.DataFrame, names: list[str], steps: list[str], judges: list[dict], path: Path) -> None:
    """The paper's Figure 2: each score over base, Iter0, ..., with its interval; other rows as dashed lines; and the
    self-judge's accuracy on held-out human pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    summary = summary[summary["style"] == ""]
    benchmarks = list(summary.benchmark.unique())
    extra = 1 if judges else 0
    figure, axes = plt.subplots(len(benchmarks), len(names) + extra, squeeze=False,
                                figsize=(3.6 * (len(names) + extra), 3 * len(benchmarks)))
    for line, benchmark in zip(axes, benchmarks):
        for axis, name in zip(line, names):
            part = summary[(summary.benchmark == benchmark) & (summary["score"] == name)].set_index("model")
            own = part.loc[[m for m in steps if m in part.index]]
            if len(own):
                axis.fill_between(own.index, own.low, own.high, alpha=.2, color="C0", linewidth=0)
                axis.plot(own.index, own["mean"], "o-", color="C0", markersize=4)
            for i, other in enumerate(m for m in part.index if m not in steps):
                axis.axhline(part.loc[other, "mean"], ls="--", lw=1, color=f"C{i + 1}", label=other)
            axis.set_title(name if len(benchmarks) == 1 else f"{benchmark}: {name}")
            axis.grid(alpha=.3)
            if len(part) > len(own):
                axis.legend(fontsize=7)
        if judges:
            axis, rounds = line[-1], [f"Iter{j['model']}" for j in judges]
            middle = np.array([j["accuracy"] for j in judges])
            spread = np.abs(np.array([[j["low"], j["high"]] for j in judges]).T - middle)
            axis.errorbar(rounds, middle, spread, fmt="o-", color="C3", markersize=4, capsize=3)
            axis.axhline(.5, color="gray", lw=.8)
            axis.set_title("self-judge on held-out human pairs")
            axis.grid(alpha=.3)
    figure.tight_layout()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def cost(run: Path) -> pd.DataFrame:
    """The ledger, summed by stage and round."""
    ledger = pd.read_parquet(Path(run) / "ledger.parquet")
    return ledger.groupby(["stage", "iter"], dropna=False, sort=True).agg(
        seconds=("seconds", "sum"), images=("images", "sum"), unet_forwards=("unet_forwards", "sum"),
        optimizer_steps=("optimizer_steps", "sum"), peak_memory_bytes=("peak_memory_bytes", "max"),
        device=("device", "last")).reset_index()

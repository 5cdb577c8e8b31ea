"""Numbers with intervals, the table, the curves and the sheets of pictures."""

import functools
import html
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


@functools.lru_cache(maxsize=1)
def resamples(n: int) -> np.ndarray:
    """How often each of n prompts stands in each resample, over n: (RESAMPLES, n). The same for all that is compared."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile interval of the mean over rows of (prompts, ...): all columns share their resamples."""
    means = np.tensordot(resamples(len(values)), values, 1)
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
    summary = summary[summary["style"] == ""].rename(columns={"low": "mean_low", "high": "mean_high"})
    several = summary.groupby("benchmark").prompts.nunique().max() > 1        # a row that lacks some must say so
    for (benchmark, model), part in summary.groupby(["benchmark", "model"], sort=False):
        by_score = {r["score"]: r for r in part.to_dict("records")}
        main = by_score[names[-1]]
        row = {"model": model, "benchmark": benchmark, **facts.get(model, {})}
        row |= {"prompts": f"{main['prompts']:.0f}"} if several else {}
        row |= {name: cell(by_score[name], "mean", "") for name in names}
        row |= {f"{name}: gain over base": cell(by_score[name], "gain", "+") for name in names}
        row[f"{names[-1]}: over Iter0"] = cell(main, "over_iter0", "+")
        row |= {f"{name}: wins over base": "" if pd.isna(rate := by_score[name].get("win_rate", np.nan)) else f"{rate:.0%}"
                for name in names}
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    one = ["benchmark"] if table.benchmark.nunique() == 1 else []
    return table.drop(columns=one + [c for c in table if (table[c].astype(str) == "").all()])


def for_programs(summary: pd.DataFrame, facts: dict[str, dict], paper: dict, versions: list[str]) -> pd.DataFrame:
    """table.csv: `summary` with each model's facts, the paper's number and ours less it, and what computed the score."""
    table = summary.copy()
    for fact in dict.fromkeys(fact for one in facts.values() for fact in one):
        table[fact.replace(" ", "_")] = [facts.get(m, {}).get(fact, "") for m in table.model]
    keys = zip(*(table[column] for column in ("model", "benchmark", "style", "score")))
    table["paper"] = [paper.get(key, np.nan) for key in keys]
    table["over_paper"] = table["mean"] - table.paper
    by_score = {version.split()[0]: version for version in versions}
    return table.assign(scorer=[by_score.get(score, versions[0]) for score in table["score"]])


def markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "".join("| " + " | ".join(map(plain, line)) + " |\n" for line in lines)


def plain(value) -> str:
    """Any text in one line of Markdown: no HTML, no new cell."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")


def notes(s, made: dict, scores: pd.DataFrame, versions: list[str], outside: dict[str, str]) -> list[str]:
    """All that the numbers depend on, in lines of text: prompts, sampling, models, scorers, packages, hardware (`made`
    is settings.environment())."""
    counts = [f"{name} {part.prompt_id.nunique()} prompts" for name, part in scores.groupby("benchmark", sort=False)]
    drawn = f"{', '.join(counts)}, {s.eval_seeds} picture(s) each; {s.sampler}, {s.sample_steps} steps, guidance " \
            f"{s.cfg_scale}, {s.resolution} pixels, {s.dtype}; base {s.model}" + (f", VAE {s.vae}" if s.vae else "")
    return [drawn, "intervals: 95%, bootstrap over prompts; gains and wins (ties half) paired by prompt and noise",
            *(f"row {name}: {where}" for name, where in outside.items()), *(f"scorer {v}" for v in versions),
            " ".join(f"{k} {v}" for k, v in made["versions"].items() if v),
            f"code {made['commit']}, " + ", ".join(f"{k} {v}" for k, v in made["hardware"].items() if v)]


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

    def fitting(text: str, room: int) -> str:
        """One line of text, cut where there is no more room."""
        text = " ".join(str(text).split())
        while draw.textlength(text, font) > room and len(text) > 4:
            text = text[:-4] + "..."
        return text

    for j, title in enumerate(columns):
        draw.text((gap + j * (side + gap), 2), fitting(title, side), "black", font)
    for i, row in enumerate(rows):
        top = head + i * (side + head + gap)
        draw.text((gap, top), fitting(labels[i], width - 2 * gap), "dimgray", font)
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
    side = 96 if max(picture.width for row in rows for picture in row) <= 128 else 192
    sheet(rows, models, [at.loc[(i, models[0]), "prompt"] for i in ids], path, side)


def curves(summary: pd.DataFrame, names: list[str], steps: list[str], judges: list[dict], path: Path) -> None:
    """The paper's Figure 2: each score over base, Iter0, ..., with its interval; other rows as dashed lines; and the
    self-judge's accuracy on held-out human pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    summary = summary[summary["style"] == ""]
    benchmarks, wide = list(summary.benchmark.unique()), len(names) + bool(judges)
    words = lambda text: str(text).replace("$", r"\$")                   # a dollar sign would begin a formula
    figure, axes = plt.subplots(len(benchmarks), wide, squeeze=False, layout="constrained",
                                figsize=(3.6 * wide, 3 * len(benchmarks) + .3))
    for line, benchmark in zip(axes, benchmarks):
        for axis, name in zip(line, names):
            part = summary[(summary.benchmark == benchmark) & (summary["score"] == name)].set_index("model")
            own = part.loc[[m for m in steps if m in part.index]]
            if len(own):
                axis.fill_between(own.index, own.low, own.high, alpha=.2, color="C0", linewidth=0)
                axis.plot(own.index, own["mean"], "o-", color="C0", markersize=4)
            for i, other in enumerate(m for m in part.index if m not in steps):
                axis.axhline(part.loc[other, "mean"], ls="--", lw=1.2, color=f"C{i + 1}", label=words(other))
            axis.set_title(words(name if len(benchmarks) == 1 else f"{benchmark}: {name}"))
    dashed = dict(zip(*(axes[0, 0].get_legend_handles_labels()[::-1])))
    if dashed:
        figure.legend(dashed.values(), dashed.keys(), loc="outside lower left", ncols=6, fontsize=8, frameon=False)
    if judges:
        axis, rounds = axes[0, -1], [f"Iter{j['model']}" for j in judges]
        middle = np.array([j["accuracy"] for j in judges])
        spread = np.abs(np.array([[j["low"], j["high"]] for j in judges]).T - middle)
        axis.errorbar(rounds, middle, spread, fmt="o-", color="C3", markersize=4, capsize=3)
        axis.axhline(.5, color="gray", lw=.8)
        axis.set_title("self-judge on held-out human pairs")
    for axis in axes.flat:
        axis.grid(alpha=.3)
        axis.set_visible(axis.has_data())
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

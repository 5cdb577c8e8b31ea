"""The study's tables and figures: one of each per question, with intervals over run seeds and prompts."""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lib.report import markdown
from lib.run import atomic, write_text

SCORES = ["alignment", "aesthetics", "utility"]
T975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}   # Student's t, 97.5%


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95% interval of (seeds, prompts): Student's t over run seeds, the prompts' sampling error added.

    Seeds and prompts are few and many draws of two populations: the variance of the mean is that of the seeds' means
    over their number plus that of the prompts' means over theirs. With one seed only the prompts' part is known.
    """
    seeds, prompts = values.shape
    variance = values.mean(0).var(ddof=1) / prompts + (values.mean(1).var(ddof=1) / seeds if seeds > 1 else 0)
    half = (T975.get(seeds - 1, 2.0) if seeds > 1 else 1.96) * math.sqrt(variance)
    return values.mean(), values.mean() - half, values.mean() + half


def values_of(scores: pd.DataFrame, arm: str, model: str, seeds, score: str) -> np.ndarray:
    """(seeds, prompts) of one model of an arm."""
    part = scores[(scores.arm == arm) & (scores.model == model) & scores.seed.isin(list(seeds))]
    return part.pivot(index="seed", columns="prompt_id", values=score).to_numpy()


def rows_of(scores: pd.DataFrame, arms: list[str]) -> list[tuple[str, str, str]]:
    """(name, arm, model) of a question's rows: base and Iter0 of the first arm, each arm's last model, other rows."""
    numbered = lambda m: m == "base" or (m.startswith("Iter") and m[4:].isdigit())
    models = {arm: list(dict.fromkeys(scores[scores.arm == arm].model)) for arm in arms}
    rows = [(m, arms[0], m) for m in ("base", "Iter0") if m in models[arms[0]]]
    for arm in arms:
        rows.append((arm, arm, [m for m in models[arm] if numbered(m)][-1]))
        rows += [(m, arm, m) for m in models[arm] if not numbered(m)]
    return rows


def table_of(scores: pd.DataFrame, facts: pd.DataFrame, arms: list[str], seeds) -> pd.DataFrame:
    """One line per row: means, the gains in utility over base and over the question's first arm, and what it cost."""
    lines, rows = [], rows_of(scores, arms)
    first = next(r for r in rows if r[0] == arms[0])
    for name, arm, model in rows:
        line = {"row": name, "seeds": len(list(seeds))}
        line |= {score: values_of(scores, arm, model, seeds, score).mean() for score in SCORES}
        mine = values_of(scores, arm, model, seeds, "utility")
        for title, other in (("over base", (arm, "base")), (f"over {arms[0]}", first[1:])):
            if (arm, model) != other and name != "base":
                values = mine - values_of(scores, *other, seeds, "utility")
                line |= dict(zip((title, f"{title} low", f"{title} high"), interval(values)))
                line[f"{title}, by seed"] = " ".join(f"{v:+.3f}" for v in values.mean(1))
        fact = facts[(facts.arm == arm) & (facts.model == model) & facts.seed.isin(list(seeds))]
        own = facts[(facts.arm == arm) & facts.seed.isin(list(seeds))]
        line |= {"human pairs": 0 if name == "base" else own.pairs.max(), "UNet forwards": fact.forwards.mean(),
                 "judge accuracy": own.accuracy.mean() if name == arm else np.nan}
        lines.append(line)
    return pd.DataFrame(lines)


def readable(table: pd.DataFrame, first: str) -> str:
    """The table as people read it."""
    gain = lambda r, t: "" if pd.isna(r.get(t)) else f"{r[t]:+.3f} [{r[t + ' low']:+.3f}, {r[t + ' high']:+.3f}]"
    number = lambda v, form: "" if pd.isna(v) else form.format(v)
    return markdown(pd.DataFrame([{
        "row": r["row"], "human pairs": number(r["human pairs"], "{:.0f}"),
        "UNet forwards": number(r["UNet forwards"] / 1e3, "{:.0f}k"), "alignment": f"{r['alignment']:.3f}",
        "aesthetics": f"{r['aesthetics']:.3f}", "utility": f"{r['utility']:.3f}", "utility over base": gain(r, "over base"),
        f"over {first}": gain(r, f"over {first}"), "judge": number(r["judge accuracy"], "{:.2f}")}
        for r in table.to_dict("records")]))


def answer(out: Path, name: str, title: str, arms: list[str], seeds, scores: pd.DataFrame, facts: pd.DataFrame,
           notes: list[str] = ()) -> None:
    """A question's table (.md, .csv; `notes` below it) and figure (.png)."""
    table = table_of(scores, facts, arms, seeds)
    write_text(table.to_csv(index=False, float_format="%.5g"), out / f"{name}.csv")
    text = f"{title}; {len(list(seeds))} run seeds\n\n{readable(table, arms[0])}" + "".join(f"\n- {note}" for note in notes)
    write_text(text, out / f"{name}.md")
    print(text)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawings = {"rounds": over_rounds} | dict.fromkeys(("size", "noise", "alpha"), over_setting)
    figure = drawings.get(name, side_by_side)(plt, scores, facts, arms, seeds, table)
    figure.suptitle(f"{title} ({len(list(seeds))} run seeds, 95% intervals)", fontsize=10)
    figure.tight_layout()
    with atomic(out / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def side_by_side(plt, scores, facts, arms, seeds, table):
    """Left: every row's gain over base with its interval, a point per run seed. Right: gain against computing."""
    rows = table[table["over base"].notna()].reset_index(drop=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, .35 * len(rows) + 1.4), width_ratios=(1.4, 1))
    for i, r in rows.iterrows():
        middle, low, high = r["over base"], r["over base low"], r["over base high"]
        left.errorbar(middle, -i, xerr=[[middle - low], [high - middle]], fmt="o", color=f"C{i % 10}", capsize=3,
                      markersize=5)
        each = [float(v) for v in r["over base, by seed"].split()]
        left.plot(each, [-i - .22] * len(each), "|", color=f"C{i % 10}", markersize=5)
        if not pd.isna(r["UNet forwards"]):
            right.plot(r["UNet forwards"] / 1e3, r["over base"], "o", color=f"C{i % 10}")
            right.annotate(r["row"], (r["UNet forwards"] / 1e3, r["over base"]), fontsize=6, xytext=(3, 3),
                           textcoords="offset points")
    left.set_yticks([-i for i in range(len(rows))], rows["row"], fontsize=8)
    left.axvline(0, color="gray", lw=.8)
    left.set_xlabel("utility: gain over base")
    right.set_xlabel("UNet forwards, thousands")
    right.set_ylabel("utility: gain over base")
    right.margins(x=.25)                                        # room for the names
    return figure


def over_setting(plt, scores, facts, arms, seeds, table):
    """Gains against the number of human pairs, label noise, or the share of self-made pairs; one line per method."""
    from matplotlib.transforms import offset_copy
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    names = {"noise": "label noise (temperature, in units of utility)", "alpha": "alpha, the share of self-made pairs"}
    preset = {"noise": .15, "alpha": .25}                       # of the arms that do not name it
    kind = next((k for k in names if any(f", {k} " in arm for arm in arms)), "")
    lines: dict[str, list] = {}
    for name, arm, model in rows_of(scores, arms):
        if name in arms:
            method, _, rest = arm.partition(", ")
            pairs = facts[(facts.arm == arm) & facts.seed.isin(list(seeds))].pairs.max()
            x = (float(rest.split()[1]) if rest else preset[kind]) if kind else pairs
            gains = [values_of(scores, arm, model, seeds, score) - values_of(scores, arm, "base", seeds, score)
                     for score in ("utility", "alignment")]
            lines.setdefault(method, []).append((x, *interval(gains[0]), *interval(gains[1])))
    for i, (method, points) in enumerate(lines.items()):
        x, *ends = np.array(sorted(points)).T
        for axis, (y, low, high) in zip(axes, (ends[:3], ends[3:])):
            axis.plot([*x, *x], [*low, *high], alpha=0)         # the limits of the axes: shifted points do not count
            beside = offset_copy(axis.transData, figure, 5 * (i - (len(lines) - 1) / 2), 0, "points")
            axis.errorbar(x, y, [y - low, high - y], fmt="o-", capsize=3, color=f"C{i}", label=method, transform=beside)
    for axis, score in zip(axes, ("utility", "alignment")):
        if not kind:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(names.get(kind, "human pairs"))
        axis.set_ylabel(f"{score}: gain over base")
        axis.axhline(0, color="gray", lw=.8)
        axis.grid(alpha=.3)
    axes[0].legend(fontsize=8)
    return figure


def over_rounds(plt, scores, facts, arms, seeds, table):
    """Utility and alignment gains, the judge's accuracy on held-out human pairs and the candidates' diversity, by round."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))
    for i, arm in enumerate(arms):
        rounds = [m for m in dict.fromkeys(scores[scores.arm == arm].model) if m.startswith("Iter") and m[4:].isdigit()]
        for axis, score in zip(axes, ("utility", "alignment")):
            base = values_of(scores, arm, "base", seeds, score)
            y, low, high = np.array([interval(values_of(scores, arm, m, seeds, score) - base) for m in rounds]).T
            axis.fill_between(rounds, low, high, alpha=.12, color=f"C{i}", linewidth=0)
            axis.plot(rounds, y, "o-", color=f"C{i}", markersize=4, label=arm)
            axis.set_title(f"{score}: gain over base", fontsize=9)
        own = facts[(facts.arm == arm) & facts.accuracy.notna()].groupby("model")[["accuracy", "diversity"]].mean()
        for axis, column in zip(axes[2:], ("accuracy", "diversity")):
            axis.plot(own.index, own[column], "o-", color=f"C{i}", markersize=4)
            axis.set_title({"accuracy": "self-judge on held-out human pairs"}.get(column, column), fontsize=9)
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=.3)
    return figure

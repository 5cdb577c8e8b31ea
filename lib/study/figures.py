"""The study's figures: gains in utility and alignment, with their intervals over run seeds."""

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from lib.run import atomic
from lib.study.means import interval
from lib.study.questions import method_of
from lib.study.results import Results, is_round

# What an arm's settings may be drawn against, and in words.
AXES = {
    "pairs": "human pairs",
    "label_noise": "label noise (temperature, in units of utility)",
    "alpha": "alpha, the share of self-made pairs",
}


# Room for the title above the axes, in shares of the figure.
BELOW_TITLE = (0, 0, 1, 0.95)


def new_figure(columns: int, size: tuple[float, float], **options):
    """A figure and its axes, a row of them; nothing is shown on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=size, **options)


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, and close it."""
    import matplotlib.pyplot as plt

    figure.tight_layout(rect=BELOW_TITLE)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def draw_side_by_side(table: pd.DataFrame):
    """Left: every row's gain over the base with its interval, a tick per run seed.

    Right: the same gains against what they cost.
    """
    rows = table[table["over base"].notna()].to_dict("records")
    height = 0.35 * len(rows) + 1.4
    figure, (left, right) = new_figure(2, (10, height), width_ratios=(1.4, 1))
    names = []

    for i, row in enumerate(rows):
        color = f"C{i % 10}"
        mean = row["over base"]
        reach = [[mean - row["over base low"]], [row["over base high"] - mean]]
        left.errorbar(mean, -i, xerr=reach, fmt="o", color=color, capsize=3, markersize=5)
        by_seed = [float(value) for value in row["over base, by seed"].split()]
        left.plot(by_seed, [-i - 0.22] * len(by_seed), "|", color=color, markersize=5)

        if not pd.isna(row["UNet forwards"]):
            right.plot(row["UNet forwards"] / 1e3, mean, "o", color=color)
            names.append((row["row"], row["UNet forwards"] / 1e3, mean))

    left.set_yticks([-i for i in range(len(rows))], [row["row"] for row in rows], fontsize=8)
    left.axvline(0, color="gray", lw=0.8)
    left.set_xlabel("utility: gain over base")
    right.set_xlabel("UNet forwards, thousands")
    right.set_ylabel("utility: gain over base")
    right.margins(x=0.2)
    # The axes take the places that they will be saved with.
    figure.tight_layout(rect=BELOW_TITLE)
    write_names(right, names)
    return figure


def write_names(axis, names: list[tuple[str, float, float]]) -> None:
    """Write (name, x, y) beside points where nothing is written yet, within the frame.

    A name for which there is no room is left out; the left panel has it.
    """
    from matplotlib.text import Text

    renderer = axis.figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    points = axis.transData.transform([place for _, *place in names])
    taken = []
    for name, *place in names:
        # To the right or the left, above or below, or further away with a line to its point.
        for height, side in product((0, 7, -7, 14, -14, 21, -21), (7, -7)):
            line = {"arrowstyle": "-", "lw": 0.4, "shrinkA": 0} if height else None
            text = axis.annotate(name, place, fontsize=6, xytext=(side, height), va="center",
                                 ha="left" if side > 0 else "right", textcoords="offset points",
                                 arrowprops=line)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)        # without the line
            is_free = not any(box.overlaps(other) for other in taken)
            is_inside = frame.contains(*box.min) and frame.contains(*box.max)
            if is_free and is_inside and box.padded(4).count_contains(points) == 0:
                break
            text.remove()
        else:
            continue
        taken.append(box)


def draw_over_forwards(table: pd.DataFrame, first_arm: str):
    """Every row's gain over the first arm against what its rounds cost."""
    rows = table[table["in the rounds"] > 0].to_dict("records")
    figure, axis = new_figure(1, (9, 4.5))
    for i, row in enumerate(rows):
        forwards = row["in the rounds"] / 1e3
        if row["row"] == first_arm:
            axis.plot(forwards, 0, "o", color="black", label=first_arm)
            continue
        mean, low, high = (row[f"over {first_arm}{end}"] for end in ("", " low", " high"))
        marker = "o" if i < 10 else "s"         # there are ten colors
        axis.errorbar(forwards, mean, [[mean - low], [high - mean]], fmt=marker,
                      color=f"C{i % 10}", capsize=3, markersize=5, label=row["row"])

    # The controls go on along Iter0's update without training.
    controls = table[(table["in the rounds"] == 0) & (table["row"] != "Iter0")]
    for i, row in enumerate(controls.to_dict("records")):
        axis.axhline(row[f"over {first_arm}"], ls=("--", ":")[i % 2], color="black", lw=1,
                     label=f"{row['row']}: no training")

    axis.axhline(0, color="gray", lw=0.8)
    axis.set(xlabel="UNet forwards in the rounds, thousands",
             ylabel=f"utility: gain over {first_arm}", xscale="log")
    axis.set_xticks([10, 20, 40, 80], ["10", "20", "40", "80"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_over_setting(results: Results, setting: str):
    """Gains in utility and alignment against a setting, one of AXES; a line per method."""
    figure, axes = new_figure(2, (9, 3.8))
    lines = lines_over(results, setting)
    for axis, score in zip(axes, ("utility", "alignment")):
        for i, (method, points) in enumerate(lines.items()):
            # Lines lie side by side, so that their intervals can be told apart.
            draw_line(axis, points[score], 5 * (i - (len(lines) - 1) / 2), f"C{i}", method)
        if setting == "pairs":
            axis.set_xscale("log", base=2)
        axis.set_xlabel(AXES[setting])
        axis.set_ylabel(f"{score}: gain over base")
        axis.axhline(0, color="gray", lw=0.8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def lines_over(results: Results, setting: str) -> dict[str, dict[str, list]]:
    """For each method and score the points (setting, mean gain, low, high) of its arms."""
    lines = {}
    for arm in results.arms:
        last = [model for model in results.models(arm) if is_round(model)][-1]
        points = lines.setdefault(method_of(arm), {"utility": [], "alignment": []})
        x = results.runs_of(arm)[setting].max()
        for score in points:
            points[score].append((x, *interval(results.gains_over_base(arm, last, score))))
    return lines


def draw_line(axis, points: list[tuple], shift: float, color: str, label: str) -> None:
    """Points (x, y, low, high) with their intervals, drawn `shift` points to the right."""
    from matplotlib.transforms import offset_copy

    x, y, low, high = np.array(sorted(points)).T

    # The limits of an axis do not count what is shifted: an invisible line sets them.
    axis.plot([*x, *x], [*low, *high], alpha=0)
    shifted = offset_copy(axis.transData, axis.figure, shift, 0, "points")
    axis.errorbar(x, y, [y - low, high - y], fmt="o-", capsize=3, color=color, label=label,
                  transform=shifted)


def draw_over_rounds(results: Results):
    """By round: gains in utility and alignment, the judge's accuracy, and diversity."""
    figure, axes = new_figure(4, (14, 3.4))
    for i, arm in enumerate(results.arms):
        color = f"C{i}"
        rounds = [m for m in results.models(arm) if is_round(m) and m != "base"]
        for axis, score in zip(axes[:2], ("utility", "alignment")):
            gains = [interval(results.gains_over_base(arm, model, score)) for model in rounds]
            y, low, high = np.array(gains).T
            axis.fill_between(rounds, low, high, alpha=0.12, color=color, linewidth=0)
            axis.plot(rounds, y, "o-", color=color, markersize=4, label=arm)
            axis.set_title(f"{score}: gain over base", fontsize=9)

        # Every round but the last has a judge: it is the next round's.
        runs = results.runs_of(arm)
        runs = runs[runs.accuracy.notna()]
        judge = runs.groupby("model")[["accuracy", "diversity"]].mean()
        for axis, column in zip(axes[2:], judge.columns):
            axis.plot(judge.index, judge[column], "o-", color=color, markersize=4)

    axes[2].set_title("self-judge on held-out human pairs", fontsize=9)
    axes[3].set_title("diversity", fontsize=9)
    axes[0].legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure

"""The paper's Figure 2 for a run: each score over base, Iter0, Iter1, ..."""

from pathlib import Path

import numpy as np
import pandas as pd

from lib.run import atomic


def curves(summary: pd.DataFrame, names: list[str], steps: list[str], judges: list[dict],
           path: Path) -> None:
    """Draw each score (across) on each benchmark (down) over the models of the run.

    `summary` comes from lib/eval/table.py. `steps` are the run's own models in order; other rows of
    the table are dashed lines. `judges` holds each round's judge.json (model, accuracy, low, high):
    where there is one, the self-judge's accuracy on held-out human pairs stands on the right.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summary = summary[summary["style"] == ""]
    benchmarks = list(summary.benchmark.unique())
    across = len(names)
    if judges:
        across += 1
    size = (3.6 * across, 3 * len(benchmarks) + .3)
    figure, axes = plt.subplots(len(benchmarks), across, squeeze=False, layout="constrained",
                                figsize=size)

    # Lines are benchmarks, columns are scores.
    for line, benchmark in zip(axes, benchmarks):
        for axis, name in zip(line, names):
            shown = (summary["benchmark"] == benchmark) & (summary["score"] == name)
            _draw_score(axis, summary[shown].set_index("model"), steps)
            title = name if len(benchmarks) == 1 else f"{benchmark}: {name}"
            axis.set_title(_literal(title))

    # The dashed lines have the same colours everywhere, so they are named once.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", ncols=6, fontsize=8, frameon=False)

    if judges:
        _draw_judge(axes[0, -1], judges)

    # A place without data (below the judge's, say) stays white.
    for axis in axes.flat:
        axis.grid(alpha=.3)
        axis.set_visible(axis.has_data())

    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _draw_score(axis, results: pd.DataFrame, steps: list[str]) -> None:
    """One score: a line over the run's models with its interval, other models dashed."""
    # The band is each mean's own interval; whether a gain is clear is for the table to say.
    of_run = results.loc[[model for model in steps if model in results.index]]
    if len(of_run):
        axis.fill_between(of_run.index, of_run["low"], of_run["high"], alpha=.2, color="C0",
                          linewidth=0)
        axis.plot(of_run.index, of_run["mean"], "o-", color="C0", markersize=4)

    others = results.index[~results.index.isin(steps)]
    for i, model in enumerate(others, start=1):
        axis.axhline(results.loc[model, "mean"], ls="--", lw=1.2, color=f"C{i}",
                     label=_literal(model))


def _draw_judge(axis, judges: list[dict]) -> None:
    """The accuracy of the self-judge, by the model that judges."""
    names = [f"Iter{judge['model']}" for judge in judges]
    results = pd.DataFrame(judges)
    accuracy = results["accuracy"].to_numpy()
    interval = results[["low", "high"]].to_numpy().T             # (2, rounds)

    # matplotlib wants the lengths of the bars, below and above.
    axis.errorbar(names, accuracy, np.abs(interval - accuracy), fmt="o-", color="C3",
                  markersize=4, capsize=3)
    axis.axhline(.5, color="gray", lw=.8)                        # chance
    axis.set_title("self-judge on held-out human pairs")


def _literal(text: str) -> str:
    """Text as matplotlib is to show it: a dollar sign would begin a formula."""
    return str(text).replace("$", r"\$")

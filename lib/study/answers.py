"""What the runs say: for each question a table and a figure, with intervals over run seeds.

The numbers come from the runs' own evaluations. A gain is always against another model of the same
run seed on the same prompts and noise, so what run seeds have in common cancels.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lib.eval.table import markdown
from lib.plan.counts import counts
from lib.run import atomic, read_parquet, read_table, write_text
from lib.study.means import interval
from lib.study.questions import ARMS, Question, method_of
from lib.study.runner import Job, arguments_of, folder_of, settings_of_run

SCORES = ["alignment", "aesthetics", "utility"]

# What an arm's settings may be drawn against, and in words.
AXES = {
    "pairs": "human pairs",
    "label_noise": "label noise (temperature, in units of utility)",
    "alpha": "alpha, the share of self-made pairs",
}


# ---- from run folders to two tables ----

def collect(out: Path, jobs: Iterable[Job]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores by prompt, and what is told of every run, of finished runs.

    scores has a row per prompt and model: arm, seed, model, prompt_id, alignment, aesthetics,
    utility. runs has a row per model: arm, seed, model; what made the run (facts_of_run); what each
    round cost (facts_of_rounds); and the scores' means over prompts, where it was evaluated.
    """
    scores, runs = [], []
    for job in jobs:
        # An evaluation may have several pictures of a prompt.
        folder = folder_of(out, job.arm, job.seed)
        columns = ("model", "prompt_id", *SCORES)
        table = read_table(folder / "eval" / "scores.parquet", columns, "05_eval.py")
        by_prompt = table.groupby(["model", "prompt_id"], sort=False)[SCORES].mean().reset_index()
        scores.append(by_prompt.assign(arm=job.arm, seed=job.seed))

        # A round's model need not be evaluated, and a control has no round.
        means = by_prompt.groupby("model", sort=False)[SCORES].mean().reset_index()
        table = means.merge(pd.DataFrame(facts_of_rounds(folder, job)), "outer", "model")
        runs.append(pd.DataFrame([facts_of_run(out, job)]).merge(table, "cross"))
    return pd.concat(scores, ignore_index=True), pd.concat(runs, ignore_index=True)


def facts_of_run(out: Path, job: Job) -> dict:
    """What made a run: its settings in full or by what an axis may show, and on what."""
    folder = folder_of(out, job.arm, job.seed)
    s = settings_of_run(folder)
    config = json.loads((folder / "config.json").read_text())
    return {
        "arm": job.arm,
        "seed": job.seed,
        "settings": " ".join(arguments_of(job)),
        "pairs": s.seed_pairs,
        "alpha": s.alpha,
        "label_noise": s.label_noise,
        "commit": config["commit"],
        "cpu": config["hardware"]["cpu"],
    }


def facts_of_rounds(folder: Path, job: Job) -> list[dict]:
    """A row for each round of a run, and for its rival.

    They have accuracy and diversity of the model as a judge of its candidates; forwards, the UNet
    forwards up to that model, evaluation left out, which the arm alone would take; and by what its
    weights are known.
    """
    cost = counts(settings_of_run(folder))
    cost = cost[cost.stage != "05_eval"]
    round_of = cost.iter.fillna(0)

    rows = []
    for k in range(ARMS[job.arm].rounds + 1):
        # The judge of round k + 1 is model k.
        judge = {}
        path = folder / f"iter{k + 1}" / "judge.json"
        if path.exists():
            judge = json.loads(path.read_text())
        rows.append({
            "model": f"Iter{k}",
            "forwards": int(cost[round_of <= k].unet_forwards.sum()),
            "accuracy": judge.get("accuracy"),
            "diversity": judge.get("diversity"),
            "weights": mark_of(folder / f"iter{k}" / "unet"),
        })

    # A rival's own cost comes to that of the human pairs.
    rival = ARMS[job.arm].rival
    if rival:
        place = folder / "rivals" / rival
        judge = json.loads((place / "judge.json").read_text())
        log = read_parquet(place / "train_log.parquet", "rival " + rival)
        of_pairs = cost[cost.stage == "01_seed"].unet_forwards.sum()
        rows.append({
            "model": rival,
            "forwards": int(of_pairs + judge["unet_forwards"] + log.unet_forwards.sum()),
            "accuracy": judge.get("accuracy"),
            "weights": mark_of(place / "unet"),
        })
    return rows


def mark_of(unet: Path) -> str:
    """By what a model's weights are known: the first digits of the SHA-256 of their file."""
    [file] = unet.glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Results:
    """What a question's arms came to, each over the run seeds that it has."""

    scores: pd.DataFrame        # both as collect() has them
    runs: pd.DataFrame
    arms: list[str]

    def values(self, arm: str, model: str, score: str) -> pd.DataFrame:
        """A score of one model of an arm: a row per run seed, a column per prompt."""
        part = self.scores[(self.scores.arm == arm) & (self.scores.model == model)]
        return part.pivot(index="seed", columns="prompt_id", values=score)

    def gains(self, row: "Row", other: "Row", score: str) -> pd.DataFrame:
        """What a row gains over another, on the run seeds that both have: (seeds, prompts)."""
        mine = self.values(row.arm, row.model, score)
        theirs = self.values(other.arm, other.model, score)
        both = mine.index.intersection(theirs.index)
        return mine.loc[both] - theirs.loc[both]

    def gains_over_base(self, arm: str, model: str, score: str) -> np.ndarray:
        """What a model gains over the base of its runs: (seeds, prompts)."""
        row, base = (Row(name, arm, name) for name in (model, "base"))
        return self.gains(row, base, score).to_numpy()

    def models(self, arm: str) -> list[str]:
        """The models of an arm that were evaluated, in the order of its evaluation."""
        return list(dict.fromkeys(self.scores[self.scores.arm == arm].model))

    def runs_of(self, arm: str) -> pd.DataFrame:
        """What is told of an arm, of all rounds and run seeds."""
        return self.runs[self.runs.arm == arm]

    @property
    def seeds(self) -> int:
        """The run seeds of the first arm, which the others are compared with."""
        return self.runs_of(self.arms[0]).seed.nunique()


def results_of(scores: pd.DataFrame, runs: pd.DataFrame, arms: list[str], seeds: range) -> Results:
    """The results of some arms and run seeds, of what collect() found."""
    scores = scores[scores.arm.isin(arms) & scores.seed.isin(seeds)]
    runs = runs[runs.arm.isin(arms) & runs.seed.isin(seeds)]
    return Results(scores, runs, arms)


# ---- the table of a question ----

@dataclass(frozen=True)
class Row:
    """A line of a question's table: a model of an arm, under a name."""

    name: str
    arm: str
    model: str


def is_round(model: str) -> bool:
    """Whether a model is a step of its run: the base, Iter0, Iter1, ..."""
    return model == "base" or (model.startswith("Iter") and model[4:].isdigit())


def rows_of(results: Results) -> list[Row]:
    """Base and Iter0 of the first arm, then each arm's last model and its further rows."""
    first = results.arms[0]
    rows = []
    for model in ("base", "Iter0"):
        if model in results.models(first):
            rows.append(Row(model, first, model))

    # The last model is the arm's answer, or the rival that was trained in the run; further rows,
    # the controls say, keep their own names.
    for arm in results.arms:
        rival = ARMS[arm].rival
        rounds, others = [], []
        for model in results.models(arm):
            if is_round(model):
                rounds.append(model)
            elif model == rival:
                continue
            else:
                others.append(Row(model, arm, model))
        rows.append(Row(arm, arm, rival or rounds[-1]))
        rows += others
    return rows


def table_of(results: Results) -> pd.DataFrame:
    """One line per row: means, gains in utility over the base and over the first arm, and costs."""
    rows = rows_of(results)
    first_arm = results.arms[0]
    first_row = next(row for row in rows if row.name == first_arm)

    # Where a row has no such number its cell stays empty.
    lines = []
    for row in rows:
        line = {"row": row.name, "seeds": results.runs_of(row.arm).seed.nunique()}
        for score in SCORES:
            line[score] = results.values(row.arm, row.model, score).to_numpy().mean()
        line |= gain_columns(results, row, "over base", Row("base", row.arm, "base"))
        line |= gain_columns(results, row, f"over {first_arm}", first_row)
        line |= fact_columns(results, row)
        lines.append(line)
    return pd.DataFrame(lines)


def gain_columns(results: Results, row: Row, title: str, other: Row) -> dict:
    """The gain in utility over another row, with its interval and seed by seed.

    There is none over itself, and none of the base.
    """
    if row.name == "base" or (row.arm, row.model) == (other.arm, other.model):
        return {}
    gains = results.gains(row, other, "utility").to_numpy()
    mean, low, high = interval(gains)
    by_seed = " ".join(f"{gain:+.3f}" for gain in gains.mean(1))
    return {title: mean, f"{title} low": low, f"{title} high": high, f"{title}, by seed": by_seed}


def fact_columns(results: Results, row: Row) -> dict:
    """What a row cost, and how its arm judged."""
    # The judge is the arm's, so it stands in one of its rows alone.
    runs = results.runs_of(row.arm)
    pairs = runs.pairs.max()
    if row.name == "base":
        pairs = 0
    accuracy = np.nan
    if row.name == row.arm:
        accuracy = runs.accuracy.mean()
    forwards = runs[runs.model == row.model].forwards.mean()

    # What the rounds alone cost: who has human pairs and an Iter0 pays no more than this.
    in_rounds = np.nan
    if is_round(row.model):
        in_rounds = forwards - runs[runs.model == "Iter0"].forwards.mean()
    return {"human pairs": pairs, "UNet forwards": forwards, "in the rounds": in_rounds,
            "judge accuracy": accuracy}


def readable(table: pd.DataFrame, first_arm: str, over: str = "") -> str:
    """The table as people read it, in Markdown; over forwards, with what the rounds alone cost."""
    rows = []
    of_first = table.set_index("row")["in the rounds"].get(first_arm)
    for line in table.to_dict("records"):
        in_rounds = {}
        if over == "forwards":
            share = number(line["in the rounds"] / of_first, " ({:.0%})")
            in_rounds = {"in the rounds": number(line["in the rounds"] / 1e3, "{:.0f}k") + share}
        seeds = {}
        if table.seeds.nunique() > 1:
            seeds = {"run seeds": line["seeds"]}
        rows.append({
            "row": line["row"],
            **seeds,
            "human pairs": number(line["human pairs"], "{:.0f}"),
            "UNet forwards": number(line["UNet forwards"] / 1e3, "{:.0f}k"),
            **in_rounds,
            "alignment": f"{line['alignment']:.3f}",
            "aesthetics": f"{line['aesthetics']:.3f}",
            "utility": f"{line['utility']:.3f}",
            "utility over base": gain(line, "over base"),
            f"over {first_arm}": gain(line, f"over {first_arm}"),
            "judge": number(line["judge accuracy"], "{:.2f}"),
        })
    return markdown(pd.DataFrame(rows))


def number(value: float, form: str) -> str:
    """A number in words; empty where it is missing."""
    if pd.isna(value):
        return ""
    return form.format(value)


def gain(line: dict, title: str) -> str:
    """A gain with its interval; empty where there is none."""
    if pd.isna(line.get(title)):
        return ""
    low, high = line[f"{title} low"], line[f"{title} high"]
    return f"{line[title]:+.3f} [{low:+.3f}, {high:+.3f}]"


# ---- an answer ----

def answer(out: Path, name: str, question: Question, results: Results,
           notes: Iterable[str] = ()) -> None:
    """Write a question's table, NAME.md and NAME.csv, and figure, NAME.png; print the table.

    The notes stand below the table.
    """
    # For programs, then for people.
    table = table_of(results)
    write_text(table.to_csv(index=False, float_format="%.5g"), out / f"{name}.csv")
    seeds = results.seeds
    shown = readable(table, results.arms[0], question.over)
    text = f"{question.title}; {seeds} run seeds\n\n{shown}"
    for note in notes:
        text += f"\n- {note}"
    write_text(text, out / f"{name}.md")
    print(text)

    if question.over == "rounds":
        figure = draw_over_rounds(results)
    elif question.over == "forwards":
        figure = draw_over_forwards(table, results.arms[0])
    elif question.over:
        figure = draw_over_setting(results, question.over)
    else:
        figure = draw_side_by_side(table)
    figure.suptitle(f"{question.title} ({seeds} run seeds, 95% intervals)", fontsize=10)
    save_figure(figure, out / f"{name}.png")


def new_figure(columns: int, size: tuple[float, float], **options):
    """A figure and its axes, a row of them; nothing is shown on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=size, **options)


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, and close it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
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

    for i, row in enumerate(rows):
        color = f"C{i % 10}"
        mean = row["over base"]
        reach = [[mean - row["over base low"]], [row["over base high"] - mean]]
        left.errorbar(mean, -i, xerr=reach, fmt="o", color=color, capsize=3, markersize=5)
        by_seed = [float(value) for value in row["over base, by seed"].split()]
        left.plot(by_seed, [-i - 0.22] * len(by_seed), "|", color=color, markersize=5)

        # The controls have no cost of their own.
        if not pd.isna(row["UNet forwards"]):
            place = (row["UNet forwards"] / 1e3, mean)
            right.plot(*place, "o", color=color)
            right.annotate(row["row"], place, fontsize=6, xytext=(3, 3),
                           textcoords="offset points")

    left.set_yticks([-i for i in range(len(rows))], [row["row"] for row in rows], fontsize=8)
    left.axvline(0, color="gray", lw=0.8)
    left.set_xlabel("utility: gain over base")
    right.set_xlabel("UNet forwards, thousands")
    right.set_ylabel("utility: gain over base")
    right.margins(x=0.25)  # room for the names
    return figure


def draw_over_forwards(table: pd.DataFrame, first_arm: str):
    """Every row's gain over the base against what its rounds cost; a band for the first arm's."""
    rows = table[(table["in the rounds"] > 0) & table["over base"].notna()].to_dict("records")
    figure, axis = new_figure(1, (9, 5))
    for i, row in enumerate(rows):
        mean, low, high = (row[f"over base{end}"] for end in ("", " low", " high"))
        color = f"C{i % 10}"
        if row["row"] == first_arm:
            color = "black"
            axis.axhspan(low, high, color="gray", alpha=0.12, linewidth=0)
            axis.axhline(mean, color="gray", lw=0.8)
        axis.errorbar(row["in the rounds"] / 1e3, mean, [[mean - low], [high - mean]], fmt="o",
                      color=color, capsize=3, markersize=5, label=row["row"])

    axis.set(xlabel="UNet forwards in the rounds, thousands", ylabel="utility: gain over base")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
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

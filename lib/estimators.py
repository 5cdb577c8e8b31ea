"""How should the reward's draws be spent? The self-judge of finished runs, asked again with a bank of draws.

For the model and the anchor of one round a bank of denoising errors is made, one draw in each of BANK equal parts of
the timesteps. Every estimator is then a choice of draws from the bank (and weights for them), tried TRIALS times, all
at the cost of 10 draws per picture unless said otherwise. Two things are measured: how often the judge prefers what
people preferred on held-out pairs, and how far apart in true utility the best and the worst candidate are that it
picks (this looks at the oracle, as an evaluation may).
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from lib import models, oracle, report
from lib.figures import interval
from lib.probe import stage
from lib.run import Ledger, atomic, read_table, write_json, write_text
from lib.settings import load

BANK, TRIALS = 60, 40


def errors(run: Path, k: int) -> dict:
    """{"held": (pairs, 2, 2, BANK), "candidates": (prompts, N, 2, BANK)} errors of model K-1 and the base, kept on disk,
    and "utility" (prompts, N) of the candidates."""
    kept = run / "estimators" / f"iter{k}.json"
    if not kept.exists():
        rank = stage("03")
        s = replace(load(["--run", str(run)], "")[0], draws=BANK, timesteps="stratified", rank_t_min=0, rank_t_max=1000)
        table = read_table(run / f"iter{k}" / "candidates.parquet", ("prompt_id", "prompt", "image"), "study")
        groups = [{"key": (k, int(pid)), "prompt": g.prompt.iloc[0], "images": [run / i for i in g.image]}
                  for pid, g in table.groupby("prompt_id", sort=False)]
        unets = [models.load_unet(s, k - 1), models.load_unet(s, -1)]
        with Ledger(run / "estimators", "judge", k, "cpu") as ledger:
            found = {name: rank.errors_of(s, unets, part, ledger, name)
                     for name, part in (("held", rank.holdout_groups(s)), ("candidates", groups))}
        value = {name: [e.transpose(0, 1).tolist() for e in part.values()] for name, part in found.items()}
        by_key = {json.dumps(g["key"]): g for g in groups}
        ordered = [by_key[key] for key in found["candidates"]]
        utility = oracle.score([g["prompt"] for g in ordered for _ in g["images"]],
                               report.read_pictures("", [i for g in ordered for i in g["images"]]))["utility"]
        write_json(value | {"utility": utility.reshape(len(groups), -1).tolist()}, kept)
    return {name: np.array(v) for name, v in json.loads(kept.read_text()).items()}


def saved(bank: np.ndarray, draws: np.ndarray, balanced: bool = False) -> np.ndarray:
    """(P, n) mean error saved over chosen draws of a bank (P, n, 2, BANK); balanced: each over the anchor's own error."""
    gain = (bank[:, :, 1] - bank[:, :, 0])[..., draws]
    weights = 1 / bank[:, :, 1].mean(1, keepdims=True)[..., draws] if balanced else np.ones_like(gain[:, :1])
    return (gain * weights / weights.mean(-1, keepdims=True)).mean(-1)


def anywhere(n, low=0, high=BANK):
    return lambda rng: rng.choice(np.arange(low, high), n, replace=n > high - low)


def stratified(n):
    return lambda rng: (np.arange(n) + rng.random(n)) * BANK // n


def antithetic(n):
    def draw(rng):
        half = rng.choice(BANK // 2, n // 2, replace=False)
        return np.concatenate([half, BANK - 1 - half])
    return draw


ESTIMATORS = {                                              # name: (choice of draws, balanced)
    "1 draw": (anywhere(1), False), "4 draws": (anywhere(4), False), "10 draws (the paper's)": (anywhere(10), False),
    "30 draws": (anywhere(30), False), "10, stratified": (stratified(10), False), "10, antithetic": (antithetic(10), False),
    "10, balanced": (anywhere(10), True), "10, stratified and balanced": (stratified(10), True),
    "10, t below 500": (anywhere(10, 0, BANK // 2), False), "10, t above 500": (anywhere(10, BANK // 2), False),
    "10, t in 300..700": (anywhere(10, 18, 42), False), "10, t in 500..900": (anywhere(10, 30, 54), False),
    "60, all there are": (stratified(BANK), False), "60, balanced": (stratified(BANK), True),
}


def agreement(bank: np.ndarray, draws, balanced: bool) -> float:
    """Share of held-out pairs (preferred first) on which the judge agrees."""
    reward = saved(bank, draws.astype(int), balanced)
    return (np.sign(reward[:, 0] - reward[:, 1]) / 2 + .5).mean()


def gap(bank: np.ndarray, utility: np.ndarray, draws, balanced: bool) -> float:
    """True utility of the chosen best minus the chosen worst, mean over prompts."""
    reward, every = saved(bank, draws.astype(int), balanced), np.arange(len(bank))
    return (utility[every, reward.argmax(1)] - utility[every, reward.argmin(1)]).mean()


def race(bank: np.ndarray, utility: np.ndarray, rng) -> float:
    """The gap when 5 draws go to all 8 candidates and 10 more to the two best and two worst: 80 in all, as 10 each."""
    draws = rng.permutation(BANK)[:15]
    first, final, every = saved(bank, draws[:5]), saved(bank, draws), np.arange(len(bank))[:, None]
    order = first.argsort(1)
    best = np.take_along_axis(order[:, -2:], final[every, order[:, -2:]].argmax(1)[:, None], 1)
    worst = np.take_along_axis(order[:, :2], final[every, order[:, :2]].argmin(1)[:, None], 1)
    return (utility[every, best] - utility[every, worst]).mean()


def measure(bank: dict) -> pd.DataFrame:
    """One run: a line per estimator."""
    lines = []
    for name, (choose, balanced) in ESTIMATORS.items():
        rng = np.random.default_rng(0)
        trials = [choose(rng) for _ in range(TRIALS)]
        lines.append({"estimator": name, "accuracy": np.mean([agreement(bank["held"], d, balanced) for d in trials]),
                      "gap": np.mean([gap(bank["candidates"], bank["utility"], d, balanced) for d in trials])})
    rng = np.random.default_rng(0)
    lines.append({"estimator": "race: 5, then 10 more for contenders", "accuracy": np.nan,
                  "gap": np.mean([race(bank["candidates"], bank["utility"], rng) for _ in range(TRIALS)])})
    true = bank["utility"]
    lines.append({"estimator": "best and worst in truth", "accuracy": np.nan, "gap": (true.max(1) - true.min(1)).mean()})
    return pd.DataFrame(lines)


def answer(out: Path, runs: list[Path], k: int = 1) -> None:
    """judge.md, .csv and .png: the estimators over several runs, and where in t the judge knows something."""
    banks = [errors(run, k) for run in runs]
    every = pd.concat([measure(b).assign(run=run.name) for b, run in zip(banks, runs)])
    cell = lambda v: "" if np.isnan(v).any() else "{:.3f} [{:.3f}, {:.3f}]".format(*interval(v[:, None].repeat(2, 1)))
    wide = {c: every.pivot(index="run", columns="estimator", values=c)[list(dict.fromkeys(every.estimator))]
            for c in ("accuracy", "gap")}
    paper = "10 draws (the paper's)"
    table = pd.DataFrame([{"estimator": name, "agrees with people": cell(wide["accuracy"][name].to_numpy()),
                           "over the paper's": cell((wide["accuracy"][name] - wide["accuracy"][paper]).to_numpy()),
                           "utility, best over worst": cell(wide["gap"][name].to_numpy())} for name in wide["gap"]])
    text = f"The judge of round {k}, {len(runs)} run seeds\n\n{report.markdown(table)}"
    write_text(text, out / "judge.md")
    write_text(every.to_csv(index=False, float_format="%.5g"), out / "judge.csv")
    print(text)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    bins, width = np.arange(0, BANK, 6), 1000 / BANK
    bars = np.array([[agreement(b["held"], np.arange(i, i + 6), False) for i in bins] for b in banks])
    left.plot((bins + 3) * width, bars.T, color="C0", lw=.6, alpha=.6)
    left.plot((bins + 3) * width, bars.mean(0), "o-", color="C0")
    left.axhline(.5, color="gray", lw=.8)
    left.set(xlabel="timestep (6 draws in each tenth)", ylabel="agrees with people")
    spread = np.array([[(b["held"][:, :, 1] - b["held"][:, :, 0])[..., i:i + 6].std() for i in bins] for b in banks])
    right.semilogy((bins + 3) * width, spread.T, color="C3", lw=.6, alpha=.6)
    right.semilogy((bins + 3) * width, spread.mean(0), "o-", color="C3")
    right.set(xlabel="timestep", ylabel="spread of the error saved by one draw")
    for axis in (left, right):
        axis.grid(alpha=.3)
    figure.tight_layout()
    with atomic(out / "judge.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)

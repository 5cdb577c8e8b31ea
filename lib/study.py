"""Is it luck? Several arms over several run seeds, with intervals over seeds and prompts.

writes  <out>/<arm>-<seed>/ (run folders), <out>/table.md, table.csv, study.png

Arms of one run seed share everything they have in common: the seed pairs, the prompts, Iter0, and base's pictures
(hard links). Two arms run at once, on half the processors each. The same command continues an interrupted study.

    ./run_sail.sh study                                     SAIL and its seed-only control, 3 run seeds
    ./run_sail.sh study --arms "SAIL" "seed only" "random pair" "no mixup" --seeds 5 --beta 10000
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import report  # noqa: E402
from lib.run import UserError, run_stage, write_text  # noqa: E402
from lib.settings import ROOT  # noqa: E402

ARMS = {"SAIL": [], "seed only": ["--alpha", "0"], "random pair": ["--select", "random"], "no mixup": ["--alpha", "1"]}
SHARED = ("seed", "prompts.parquet", "embeds", "iter0", "eval/images/base", "eval/images/Iter0",
          "eval/scores/base.parquet", "eval/scores/Iter0.parquet")
SCORES = ("alignment", "aesthetics", "utility")


def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{arm.replace(' ', '-')}-{seed}"


def link(source: Path, target: Path) -> None:
    """Hard links of what arms share, where the source has it."""
    for name in SHARED:
        if (source / name).exists() and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-rl", source / name, target / name], check=True)


def run_arm(out: Path, arm: str, seed: int, settings: list[str], workers: int) -> None:
    folder = folder_of(out, arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    if arm != "SAIL":
        link(folder_of(out, "SAIL", seed), folder)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run([ROOT / "run_sail.sh", "tiny", "--run", folder, "--seed", str(seed), *ARMS[arm], *settings],
                              env=os.environ | {"OMP_NUM_THREADS": threads}, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = (folder / "log.txt").read_text().strip().splitlines()[-1]
        raise UserError(f"{arm}, run seed {seed}: {last} (see {folder}/log.txt)")
    print(f"{arm}, run seed {seed}: done", flush=True)


def gather(out: Path, arms: list[str], seeds: list[int]) -> dict[tuple[str, str], np.ndarray]:
    """{(arm, model): (seeds, prompts, 3 scores)}; the noise of a picture's evaluation is the same everywhere."""
    found: dict[tuple[str, str], list] = {}
    for seed in seeds:
        for arm in arms:
            scores = pd.read_parquet(folder_of(out, arm, seed) / "eval" / "scores.parquet")
            for model, part in scores.groupby("model", sort=False):
                found.setdefault((arm, model), []).append(part.groupby("prompt")[list(SCORES)].mean().sort_index().to_numpy())
    return {key: np.stack(v) for key, v in found.items()}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds, prompts) and its 95% interval by resampling both run seeds and prompts."""
    rng = np.random.default_rng(0)
    s, p = values.shape
    means = [values[rng.integers(s, size=s)][:, rng.integers(p, size=p)].mean() for _ in range(report.RESAMPLES)]
    return values.mean(), *np.percentile(means, [2.5, 97.5])


def contrasts(data: dict, arms: list[str], last: str) -> list[tuple[str, np.ndarray]]:
    """What the study asks: (question, differences (seeds, prompts, scores))."""
    first = arms[0]
    rows = [("Iter0 over base", data[first, "Iter0"] - data[first, "base"])]
    rows += [(f"{arm}: {last} over Iter0", data[arm, last] - data[arm, "Iter0"]) for arm in arms]
    rows += [(f"{arm}: {last} over base", data[arm, last] - data[arm, "base"]) for arm in arms]
    return rows + [(f"{first} over {arm}, at {last}", data[first, last] - data[arm, last]) for arm in arms[1:]]


def write_results(out: Path, arms: list[str], seeds: list[int]) -> None:
    data = gather(out, arms, seeds)
    models = list(dict.fromkeys(model for arm, model in data if arm == arms[0]))
    rows = []
    for question, difference in contrasts(data, arms, models[-1]):
        for i, score in enumerate(SCORES):
            mean, low, high = interval(difference[..., i])
            rows.append({"question": question, "score": score, "mean": mean, "low": low, "high": high})
            for seed, part in zip(seeds, difference[..., i]):
                lo, hi = report.bootstrap(part)
                rows[-1] |= {f"seed {seed}": part.mean(), f"seed {seed} low": lo, f"seed {seed} high": hi}
    table = pd.DataFrame(rows)
    write_text(table.to_csv(index=False, float_format="%.6g"), out / "table.csv")
    show = lambda r, a, b, c: f"{r[a]:+.3f} [{r[b]:+.3f}, {r[c]:+.3f}]"
    text = pd.DataFrame([{"": r["question"], "score": r["score"], "all seeds": show(r, "mean", "low", "high")}
                         | {f"seed {s}": show(r, f"seed {s}", f"seed {s} low", f"seed {s} high") for s in seeds}
                         for r in rows])
    levels = pd.DataFrame([{"arm": arm, "model": m} | {score: f"{data[arm, m][..., i].mean():.3f}"
                                                       for i, score in enumerate(SCORES)}
                           for arm, m in data if m not in ("base", "Iter0") or arm == arms[0]])
    write_text(report.markdown(levels) + "\n" + report.markdown(text), out / "table.md")
    print((out / "table.md").read_text())
    plot(data, arms, models, out / "study.png")


def plot(data: dict, arms: list[str], models: list[str], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(SCORES), figsize=(4 * len(SCORES), 3.2))
    for i, (axis, score) in enumerate(zip(axes, SCORES)):
        for c, arm in enumerate(arms):
            gains = np.stack([data[arm, m][..., i] - data[arm, "base"][..., i] for m in models])  # (models, seeds, prompts)
            bands = np.array([interval(g)[1:] for g in gains]).T
            axis.fill_between(models, *bands, color=f"C{c}", alpha=.15, linewidth=0)
            axis.plot(models, gains.mean(2), color=f"C{c}", lw=.6, alpha=.6)
            axis.plot(models, gains.mean((1, 2)), "o-", color=f"C{c}", markersize=4, label=arm)
        axis.set_title(f"{score}: gain over base")
        axis.axhline(0, color="gray", lw=.8)
        axis.grid(alpha=.3)
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--arms", nargs="+", default=["SAIL", "seed only"], choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3, help="run seeds 0 .. N-1")
    parser.add_argument("--workers", type=int, default=2, help="arms that run at once")
    own, settings = parser.parse_known_args(argv)
    seeds = list(range(own.seeds))
    with ThreadPoolExecutor(own.workers) as pool:
        start = lambda arm, seed, after=None: pool.submit(
            lambda: (after and after.result(), run_arm(own.out, arm, seed, settings, own.workers)))
        first = {seed: start("SAIL", seed) for seed in seeds}
        rest = [start(arm, seed, first[seed]) for seed in seeds for arm in own.arms if arm != "SAIL"]
        for future in [*first.values(), *rest]:
            future.result()
    write_results(own.out, own.arms, seeds)


if __name__ == "__main__":
    run_stage(main)

"""When and why does SAIL work? The rival rows and every ablation of the embedded world, over several run seeds.

writes  <out>/<arm>-<seed>/ (run folders), <out>/results.parquet, and for each question <out>/<question>.md, .csv, .png

An arm is a run of the same stages with other settings. Arms of a run seed share what they have in common by hard
links: the pictures of the human pairs, Iter0, base's evaluation. Two processes work at once, each on half of the
processors; a process imports the stages once and runs arm after arm. The same command continues a stopped study.

Every arm's beta and learning rate were chosen alike: `study --tune` tries the same four settings for each on the
development prompts, with a run seed used for nothing else, and takes the best that keeps base's alignment. The
evaluation prompts are fresh.

    ./run_sail.sh study                                     everything: under 3 hours on 2 cores, by its parts
    ./run_sail.sh study --questions rivals --seeds 2        a part of it
    ./run_sail.sh study --tune                              how TUNED below was found
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import estimators, figures, plan  # noqa: E402
from lib.probe import stage  # noqa: E402
from lib.run import UserError, read_table, run_stage, write_table, write_text  # noqa: E402
from lib.settings import ROOT, load  # noqa: E402

FULL = 2048                                     # 16 times the seed, as the paper's 0.8M are of its 50K
COMMON = "--iters 6 --eval-seeds 1"             # prompts for six rounds are set aside; most arms use three
ARMS = {                                        # name: (rounds, settings)
    "SAIL": (3, ""),
    "seed only": (3, "--alpha 0"),
    "seed only, equal exposure": (3, "--alpha 0 --iter-steps 30"),      # to human pairs: SAIL gives them 75% of 40 steps
    "random pair": (3, "--select random"),
    "no mixup": (3, "--alpha 1"),
    "DiffusionDPO": (0, f"--seed-pairs {FULL} --iter0-steps 220"),      # as many steps as SAIL's four trainings together
    "MaPO": (0, f"--seed-pairs {FULL} --iter0-steps 220 --loss mapo"),
    "online DPO": (3, "--reward world"),
    "online DPO, aesthetics": (3, "--reward world-aesthetics"),
    "SAIL*": (3, "--start {out}/DiffusionDPO-{seed}/iter0/unet"),
    "1 draw": (3, "--draws 1"), "4 draws": (3, "--draws 4"), "30 draws": (3, "--draws 30"),
    "N = 4": (3, "--candidates 4"), "N = 16": (3, "--candidates 16"),
    "anchor Iter0": (3, "--anchor iter0"),      # round 1 keeps the base: Iter0 against itself says nothing
    "t below 500": (3, "--rank-t-max 500"), "t above 500": (3, "--rank-t-min 500"),
    "balanced": (3, "--timesteps stratified --reward-weights balanced"),
    "margin over 2 errors": (3, "--min-margin 2"),
    "balanced, margin over 2": (3, "--timesteps stratified --reward-weights balanced --min-margin 2"),
}
for alpha in (.5, 1.):
    for judge in ("SAIL", "balanced", "online DPO"):
        ARMS[f"{judge}, alpha {alpha:g}"] = (3, f"{ARMS[judge][1]} --alpha {alpha}")
for size in (32, 64, 512):                      # few pairs are gone through no more often than the preset's 128
    few = f"--seed-pairs {size} --iter0-steps {min(100, 100 * size // 128)}"
    ARMS[f"SAIL, {size} pairs"] = (3, few)
    ARMS[f"seed only, {size} pairs"] = (3, f"{few} --alpha 0")
for noise in (0., .4, 1.):
    ARMS[f"SAIL, noise {noise:g}"] = (3, f"--label-noise {noise}")
    ARMS[f"seed only, noise {noise:g}"] = (3, f"--label-noise {noise} --alpha 0")
for arm in ("SAIL", "seed only", "no mixup"):
    ARMS[f"{arm}, 6 rounds"] = (6, ARMS[arm][1])
# Settings of an arm, and of its variants "arm, ...", where tuning found better than the preset's, which are SAIL's own
# ("no mixup" loses more alignment than allowed with all four: the one that loses least).
TUNED = {"seed only": "--beta 1000 --lr 1e-5", "DiffusionDPO": "--beta 500 --lr 1e-5", "no mixup": "--lr 1e-5"}
CONTROLS = ("Iter0 extrapolated=extrapolate:Iter0:2", "Iter0 as guidance=guide:Iter0:1")    # rows of the arm "seed only"
GRID = ("--beta 2000 --lr 1e-5", "--beta 1000 --lr 1e-5", "--beta 500 --lr 1e-5", "--beta 2000 --lr 2e-5")
CONTROL_GRID = [f"extrapolated x{g}=extrapolate:Iter0:{g}" for g in (1.5, 2, 3, 4)] + \
               [f"guided {w}=guide:Iter0:{w}" for w in (.5, 1, 2, 3)]
TUNE_ARMS = ("SAIL", "seed only", "random pair", "no mixup", "online DPO", "DiffusionDPO", "MaPO")
TUNE_SEED, ALIGNMENT_LOSS = 100, .01            # best utility among the settings that lose no more alignment than this
QUESTIONS = {                                   # name: (title, arms, run seeds)
    "rivals": ("The rows of the paper's table", ["SAIL", "seed only", "seed only, equal exposure", "DiffusionDPO", "MaPO",
               "online DPO", "online DPO, aesthetics", "SAIL*"], 5),
    "pairs": ("Which pair, and the mixup",
              ["SAIL", "random pair", "no mixup", "SAIL, alpha 0.5", "margin over 2 errors"], 5),
    "better": ("Better than the paper's ranking", ["SAIL", "random pair", "balanced", "t above 500",
               "margin over 2 errors", "balanced, margin over 2"], 5),
    "reward": ("The reward's settings", ["SAIL", "1 draw", "4 draws", "30 draws", "N = 4", "N = 16", "t below 500",
               "t above 500", "anchor Iter0"], 3),
    "alpha": ("The share of self-made pairs that a judge is good for", [f"{judge}{share}" for judge in
              ("SAIL", "balanced", "online DPO") for share in ("", ", alpha 0.5", ", alpha 1")], 5),
    "size": ("Utility against the number of human pairs", ["SAIL", "seed only", "DiffusionDPO"] +
             [f"{a}, {n} pairs" for a in ("SAIL", "seed only") for n in (32, 64, 512)], 3),
    "noise": ("Utility against label noise", ["SAIL", "seed only"] +
              [f"{a}, noise {n:g}" for a in ("SAIL", "seed only") for n in (0, .4, 1)], 3),
    "rounds": ("Six rounds", [f"{a}, 6 rounds" for a in ("SAIL", "seed only", "no mixup")], 3),
    "judge": ("How the reward's draws are best spent (lib/estimators.py)", ["SAIL"], 3),
}
# What decides that two runs make the same thing, step by step; a step also needs all before it to be the same.
MAKES_CAPTIONS = ("seed", "holdout_pairs", "iter_prompts", "iters", "sampler", "sample_steps", "cfg_scale", "model")
MAKES_SEED = (*MAKES_CAPTIONS, "seed_pairs", "label_noise", "eval_prompts", "eval_count")
MAKES_ITER0 = ("beta", "lr", "loss", "iter0_steps", "start", "batch", "lora_rank", "flip", "optimizer", "warmup",
               "weight_decay", "prompt_dropout")
MAKES_REWARDS = ("reward", "draws", "rank_t_min", "rank_t_max", "timesteps", "reward_weights")
STEPS = ((MAKES_SEED, "seed/*.p*", "seed/images", "seed/latents", "prompts.parquet", "benchmarks.parquet"),
         (MAKES_ITER0, "iter0", "eval/*/Iter0-*"),
         (("candidates",), "iter1/candidates.parquet", "iter1/images", "iter1/latents"),
         ((*MAKES_REWARDS, "select", "min_margin"), "iter1/pairs.parquet", "iter1/rewards.parquet", "iter1/judge.json",
          "iter1/preview.png"))


# ---- running ----

def folder_of(out: Path, arm: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() or c == '.' else '-' for c in arm.replace('*', ' start'))}-{seed}"


def settings_of(out: Path, arm: str, seed: int, more: list[str]) -> list[str]:
    """The settings of an arm as given to its first stage; later ones win."""
    _, own = ARMS[arm]
    start = own.format(out=out, seed=seed)
    given = ["--run", str(folder_of(out, arm, seed)), "--seed", str(seed), *COMMON.split(), *start.split(),
             *TUNED.get(arm, TUNED.get(arm.split(",")[0], "")).split(), *more]
    return given


def share(source: Path, target: Path, mine, theirs, rounds: int) -> None:
    """Hard links of what two runs of one seed have in common, so that a stage finds it made; rounds: of the target."""
    same = lambda names: all(getattr(mine, n) == getattr(theirs, n) for n in names)
    tops = ["embeds", "eval/*/base-*"]
    for names, *patterns in STEPS if mine.alpha else STEPS[:2]:
        if not same(names) or not all(any(source.glob(pattern)) for pattern in patterns):
            break
        tops += patterns
    everything = [f.name for f in dataclasses.fields(mine) if not f.metadata["free"]]
    if same(everything):                                        # the same arm with more or fewer rounds
        tops += [top for k in range(1, rounds + 1) for top in (f"iter{k}", f"eval/*/Iter{k}-*")]
    if same((*MAKES_SEED, *MAKES_REWARDS)):
        tops += ["seed/holdout_errors_-1.json"]
    files = [p for pattern in tops for top in source.glob(pattern) for p in (top, *top.rglob("*")) if p.is_file()]
    if same(MAKES_CAPTIONS):                                    # the first pictures are those of a smaller seed too
        files += [p for name in ("images", "latents") for p in (source / "seed" / name).glob("*")
                  if int(p.name.split("_")[0]) < min(mine.seed_pairs, theirs.seed_pairs)]
    for path in sorted(files, key=lambda p: p.suffix == ".parquet"):         # what marks a step as done comes last
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists():
            os.link(path, copy)


def run_arm(out: Path, arm: str, seed: int, more: list[str], rows: list[str]) -> str:
    """One run, as run_sail.sh would do it; and its evaluation, with further rows if asked."""
    rounds, folder = ARMS[arm][0], folder_of(out, arm, seed)
    given = settings_of(out, arm, seed, more)
    stamp = json.dumps([given, rows])
    done = folder / "done.json"
    if done.exists() and done.read_text() == stamp:
        return f"{folder.name}: there"
    folder.mkdir(parents=True, exist_ok=True)
    s, _ = load(given, "", create=True)
    for other in (p.parent for where in (out, out.parent / "0") for p in sorted(where.glob(f"*-{seed}/done.json"))):
        if other != folder:
            share(other, folder, s, load(["--run", str(other)], "")[0], rounds)
    run = ["--run", str(folder)]
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        if not (folder / "prompts.parquet").exists():
            stage("01").main(run)
        stage("04").main([*run, "--iter", "0"])
        for k in range(1, rounds + 1):
            if s.alpha:
                stage("02").main([*run, "--iter", str(k)])
                stage("03").main([*run, "--iter", str(k)])
            stage("04").main([*run, "--iter", str(k)])
        only = range(rounds + 1) if arm.endswith("rounds") else sorted({0, rounds})
        stage("05").main([*run, "--only", ",".join(["base", *(f"Iter{k}" for k in only)]),
                          *(part for row in rows for part in ("--row", row))])
    for k in range(1, rounds + 1) if arm != "SAIL" else ():     # thousands of small files that nobody needs again
        for name in ("images", "latents"):
            shutil.rmtree(folder / f"iter{k}" / name, ignore_errors=True)
    write_text(stamp, done)
    return f"{folder.name}: done"


def one_thread(threads: int) -> None:
    import torch
    torch.set_num_threads(threads)


def make_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that share the processors, each of which imports the stages once."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), one_thread, (threads,))


def run_all(out: Path, jobs: list[tuple], workers: int) -> dict[tuple[str, int], str]:
    """Jobs (arm, seed, more, rows): first those that others share things with, last those that go on from another.
    Returns what ended early, a training that ran away say, by (arm, seed); the others are done."""
    turn = lambda job: 3 if job[0].endswith("rounds") else 0 if job[0] in ("SAIL", "DiffusionDPO") else \
        1 if job[0].startswith("SAIL,") else 2
    with make_pool(workers) as pool, tqdm(total=len(jobs), desc="study", unit="run") as bar:
        failed = {}
        for part in ([j for j in jobs if turn(j) == n] for n in range(4)):
            running = {pool.submit(run_arm, out, *job): job[:2] for job in part}
            for future in as_completed(running):
                try:
                    bar.set_postfix_str(future.result())
                except UserError as error:                      # the other runs go on
                    failed[running[future]] = str(error)
                bar.update()
    return failed


def ended_early(failed: dict[tuple[str, int], str], arms: list[str], seeds: int) -> list[str]:
    """A line for each arm that is left out because not all of its runs came to an end."""
    told = {arm: [text for (other, seed), text in failed.items() if other == arm and seed < seeds] for arm in arms}
    return [f"left out: {arm}, {len(texts)} of {seeds} run seeds ended early ({texts[0]})"
            for arm, texts in told.items() if texts]


# ---- what the runs say ----

def collect(out: Path, jobs: list[tuple]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores (arm, seed, model, prompt_id, alignment, aesthetics, utility), one row per prompt; and facts of each round
    (arm, seed, model, pairs, forwards: UNet forwards up to it without the evaluation, as the arm alone would take,
    accuracy, diversity)."""
    scores, facts = [], []
    for arm, seed, *_ in jobs:
        folder = folder_of(out, arm, seed)
        table = read_table(folder / "eval" / "scores.parquet", ("model", "prompt_id", *figures.SCORES), "05_eval.py")
        means = table.groupby(["model", "prompt_id"], sort=False)[figures.SCORES].mean().reset_index()
        scores.append(means.assign(arm=arm, seed=seed))
        s = load(["--run", str(folder)], "")[0]
        cost = plan.counts(s).query("stage != '05_eval'")
        for k in range(ARMS[arm][0] + 1):
            path = folder / f"iter{k + 1}" / "judge.json"       # the judge of round k+1 is model k
            judge = json.loads(path.read_text()) if path.exists() else {}
            facts.append({"arm": arm, "seed": seed, "model": f"Iter{k}", "pairs": s.seed_pairs,
                          "forwards": int(cost[cost.iter.fillna(0) <= k].unet_forwards.sum()),
                          "accuracy": judge.get("accuracy"), "diversity": judge.get("diversity")})
    return pd.concat(scores, ignore_index=True), pd.DataFrame(facts)


def tune(own, more: list[str]) -> None:
    """Every arm of TUNE_ARMS with every setting of GRID, on development prompts and a run seed of its own; and gamma and w
    of the controls, of which the best are those of the Iter0 that "seed only" is best with."""
    rows = []
    for i, setting in enumerate(GRID):
        out = own.out / "tune" / str(i)
        jobs = [(arm, TUNE_SEED, [*setting.split(), "--eval-prompts", "dev", "--eval-count", "160", *more],
                 CONTROL_GRID if arm == "seed only" else []) for arm in TUNE_ARMS]
        failed = run_all(out, jobs, own.workers)
        scores, _ = collect(out, [job for job in jobs if job[:2] not in failed])
        for arm, part in scores.groupby("arm", sort=False):
            means = part.groupby("model")[figures.SCORES].mean()
            wanted = [f"Iter{ARMS[arm][0]}", *(row.split("=")[0] for row in CONTROL_GRID if arm == "seed only")]
            rows += [{"arm": arm if m.startswith("Iter") else m.split()[0], "model": m, "setting": setting}
                     | (means.loc[m] - means.loc["base"]).round(4).to_dict() for m in wanted]
    table = pd.DataFrame(rows)
    best = lambda part: part[part.alignment >= -ALIGNMENT_LOSS].groupby("arm").utility.idxmax()
    arms = best(table[table.arm.isin(TUNE_ARMS)])
    controls = table[~table.arm.isin(TUNE_ARMS)]
    controls = controls[controls.setting == table.setting.get(arms.get("seed only"))]
    table["best"] = table.index.isin([*arms, *best(controls)])
    write_text(table.to_csv(index=False), own.out / "tune.csv")
    print("gains over base on development prompts\n" + table.sort_values(["arm", "setting"]).to_string(index=False))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--seeds", type=int, default=0, help="run seeds of every question; 0 leaves its own number")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    parser.add_argument("--tune", action="store_true", help="try GRID for every arm of TUNE_ARMS instead")
    own, more = parser.parse_known_args(argv)
    if own.tune:
        return tune(own, more)
    jobs = {(arm, seed): (arm, seed, more, list(CONTROLS) if arm == "seed only" else [])
            for name in own.questions for arm in QUESTIONS[name][1] for seed in range(own.seeds or QUESTIONS[name][2])}
    failed = run_all(own.out, list(jobs.values()), own.workers)
    scores, facts = collect(own.out, [job for key, job in jobs.items() if key not in failed])
    write_table(scores, own.out / "results.parquet")
    write_table(facts, own.out / "facts.parquet")
    for name in own.questions:
        title, arms, seeds = QUESTIONS[name]
        seeds = own.seeds or seeds
        notes = ended_early(failed, arms, seeds)
        arms = [arm for arm in arms if not any((arm, seed) in failed for seed in range(seeds))]
        if not arms:
            print(f"{title}: no answer\n" + "\n".join(notes))
        elif name == "judge":
            runs = [folder_of(own.out, "SAIL", seed) for seed in range(seeds)]
            with make_pool(own.workers) as pool:
                list(pool.map(estimators.errors, runs, [1] * len(runs)))
            estimators.answer(own.out, runs)
        else:
            figures.answer(own.out, name, title, arms, range(seeds), scores, facts, notes)


if __name__ == "__main__":
    run_stage(main)

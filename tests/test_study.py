"""The study: an arm that shares what others made equals one that was run alone, in its results and in its ledger."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from lib import estimators, figures, study

MINI = ["--seed-pairs", "8", "--holdout-pairs", "4", "--iter-prompts", "2", "--candidates", "3", "--draws", "2",
        "--sample-steps", "2", "--iter0-steps", "2", "--iter-steps", "2", "--batch", "4", "--micro-batch", "4",
        "--eval-count", "4", "--beta", "2000", "--lr", "1e-4"]
ARMS = ["SAIL", "random pair", "no mixup", "seed only", "SAIL, 6 rounds"]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "a"
    jobs = [(arm, 0, MINI, ["further=extrapolate:Iter0:2"] if arm == "SAIL" else []) for arm in ARMS]
    for job in jobs:
        study.run_arm(out, *job)
    return out, jobs


@pytest.mark.parametrize("arm", ["random pair", "no mixup"])
def test_sharing_changes_nothing(studied, tmp_path, arm):
    shared, alone = study.folder_of(studied[0], arm, 0), study.folder_of(tmp_path, arm, 0)
    study.run_arm(tmp_path, arm, 0, MINI, [])
    sail = study.folder_of(studied[0], "SAIL", 0)
    inode = lambda folder, name: (folder / name).stat().st_ino
    for name in ("seed/pairs.parquet", "iter0/unet/diffusion_pytorch_model.safetensors", "iter1/candidates.parquet"):
        assert inode(shared, name) == inode(sail, name)
    assert (inode(shared, "iter1/pairs.parquet") == inode(sail, "iter1/pairs.parquet")) == (arm == "no mixup")
    for k in range(4):
        a, b = (load_file(f / f"iter{k}/unet/diffusion_pytorch_model.safetensors") for f in (shared, alone))
        assert all(torch.equal(a[name], b[name]) for name in a)
    ledger = pd.read_parquet(alone / "ledger.parquet").query("stage != '05_eval'")
    _, facts = study.collect(studied[0], [(arm, 0)])
    assert facts.forwards.tolist() == [ledger[ledger.iter.fillna(0) <= k].unet_forwards.sum() for k in range(4)]


def test_six_rounds_go_on_from_three(studied):
    three, six = (study.folder_of(studied[0], arm, 0) for arm in ("SAIL", "SAIL, 6 rounds"))
    trained = pd.read_parquet(six / "ledger.parquet").query("stage == '04_train_dpo'").iter.tolist()
    assert trained == [4, 5, 6] and (three / "iter3/unet/config.json").samefile(six / "iter3/unet/config.json")
    assert list(pd.read_parquet(six / "eval/scores.parquet").model.unique()) == ["base", *(f"Iter{k}" for k in range(7))]


def test_a_run_that_ended_early_leaves_its_arm_out_and_is_told():
    failed = {("SAIL", 1): "iter0, step 68: diverged", ("no mixup", 4): "x"}
    line, = study.ended_early(failed, ["SAIL", "no mixup"], 3)
    assert "SAIL, 1 of 3" in line and "step 68" in line


def test_the_judges_draws_are_compared(studied):
    out, _ = studied
    estimators.answer(out, [study.folder_of(out, "SAIL", 0)])
    table = pd.read_csv(out / "judge.csv").set_index("estimator")
    best = table.gap["best and worst in truth"]
    assert (table.gap <= best + 1e-9).all() and table.accuracy.dropna().between(0, 1).all() and (out / "judge.png").exists()


def test_a_finished_arm_is_left_alone_and_settings_are_not_confused(studied):
    out, jobs = studied
    weights = study.folder_of(out, "SAIL", 0) / "iter3/unet/diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert study.run_arm(out, *jobs[0]).endswith("there") and weights.stat().st_mtime_ns == before
    with pytest.raises(study.UserError, match="lr"):
        study.run_arm(out, "SAIL", 0, [*MINI, "--lr", "5e-5"], [])


def test_tables_and_figures_say_what_the_runs_did(studied):
    out, jobs = studied
    scores, facts = study.collect(out, jobs)
    table = figures.table_of(scores, facts, ARMS, range(1)).set_index("row")
    assert list(table.index) == ["base", "Iter0", "SAIL", "further", *ARMS[1:]]
    kept = pd.read_parquet(study.folder_of(out, "no mixup", 0) / "eval/scores.parquet").groupby("model").utility.mean()
    assert table.loc["no mixup", "over base"] == pytest.approx(kept["Iter3"] - kept["base"])
    assert table.loc["seed only", "UNet forwards"] < table.loc["SAIL", "UNet forwards"]
    figures.answer(out, "pairs", "title", ARMS, range(1), scores, facts)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = figures.over_setting(plt, scores, facts, ["SAIL", "no mixup"], range(1), table)
    for axis, score in zip(figure.axes, ("utility", "alignment")):              # the points lie within the axes
        gains = [table.loc[row, score] - table.loc["base", score] for row in ("SAIL", "no mixup")]
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        assert left < table.loc["SAIL", "human pairs"] < right and low < min(gains) and max(gains) < high
    plt.close(figure)
    assert "no mixup" in (out / "pairs.md").read_text() and (out / "pairs.png").stat().st_size > 1000


def test_tuning_takes_the_best_setting_that_keeps_alignment(tmp_path, monkeypatch):
    """The arms and the settings cut down; the controls are chosen on the Iter0 of the arm's own best setting."""
    monkeypatch.setattr(study, "GRID", ("--beta 2000 --lr 1e-4", "--beta 2000 --lr 5e-4"))
    monkeypatch.setattr(study, "TUNE_ARMS", ("seed only",))
    monkeypatch.setattr(study, "CONTROL_GRID", [study.CONTROL_GRID[0], study.CONTROL_GRID[-1]])
    monkeypatch.setattr(study, "ALIGNMENT_LOSS", 9.)                    # four prompts say little: any setting may be best
    study.main(["--out", str(tmp_path), "--tune", "--workers", "1", *MINI[:-4], "--eval-count", "4"])
    table = pd.read_csv(tmp_path / "tune.csv")
    assert len(table) == 2 * (1 + len(study.CONTROL_GRID)) and table.groupby("arm").best.sum().eq(1).all()
    arm, controls = table[table.arm == "seed only"], table[table.arm != "seed only"]
    assert arm[arm.best].utility.item() == arm.utility.max()
    assert set(controls[controls.best].setting) == set(arm[arm.best].setting)
    scores = pd.read_parquet(study.folder_of(tmp_path / "tune/1", "seed only", 100) / "eval/scores.parquet")
    means = scores.groupby("model").utility.mean()
    assert arm.utility.iloc[1] == pytest.approx(means["Iter3"] - means["base"], abs=1e-4)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Means of a population of run seeds and of prompts, 5 seeds and 60 prompts at a time."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        values = 1 + .5 * rng.normal(size=(5, 1)) + .3 * rng.normal(size=(1, 60)) + rng.normal(size=(5, 60))
        _, low, high = figures.interval(values)
        covered += low <= 1 <= high
    assert .92 < covered / 400 < .995

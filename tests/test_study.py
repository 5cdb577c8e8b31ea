"""The study: an arm that shares what others made equals one that was run alone, in its results and
in its ledger; and the tables say what the runs did."""

import dataclasses
import itertools
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, refused
from safetensors.torch import load_file

from lib import lend
from lib.plan.counts import counts
from lib.plan.stages import load_stage
from lib.run import UserError
from lib.settings import PRESETS, Settings, build_parser, check, load
from lib.sheets import read_pictures
from lib.study import __main__ as command
from lib.study import (answers, cost, figures, judge, means, primary, published, questions, runner,
                       tune)
from lib.study import results as results_of_runs
from lib.study.runner import Job, folder_of
from lib.world import people

# A run of a few seconds.
MINI = tuple("""
    --seed-pairs 8 --holdout-pairs 4 --iter-prompts 2 --candidates 3 --draws 2 --sample-steps 2
    --iter0-steps 2 --iter-steps 2 --batch 4 --micro-batch 4 --eval-count 4 --beta 2000 --lr 1e-4
""".split())
ARMS = ["SAIL", "random pair", "no mixup", "seed only", "SAIL, 6 rounds", "self-confidence"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """(the study's folder, its jobs), all of them run; each arm shares with those before it."""
    out = tmp_path_factory.mktemp("study") / "a"
    jobs = [Job(arm, 0, MINI, questions.ARMS[arm].rows) for arm in ARMS]
    for job in jobs:
        runner.run_arm(out, job)
    return out, jobs


@pytest.fixture(scope="module")
def results(studied):
    """What `studied` found, as a question of all its arms."""
    return results_of_runs.results_of(*results_of_runs.collect(*studied), ARMS, range(1))


def test_a_study_that_has_moved_is_as_finished_as_it_was(studied, tmp_path):
    out, jobs = studied
    moved = tmp_path / "elsewhere"
    for job in jobs:
        folder = runner.folder_of(out, job.arm, job.seed)
        (moved / folder.name).mkdir(parents=True)
        shutil.copy(folder / "done.json", moved / folder.name)
        assert runner.is_done(moved, job)
    assert not runner.is_done(moved, dataclasses.replace(jobs[0], more=(*MINI, "--alpha", ".5")))


# ---- the arms as data ----

@pytest.mark.parametrize("arm", questions.ARMS)
def test_an_arm_has_settings_that_a_run_takes(arm):
    given = runner.settings_of(ROOT / "out", Job(arm, 0))
    build_parser("").parse_args(given)


def test_questions_and_variants_name_arms():
    named = set(questions.TUNED) | set(questions.TUNE_ARMS)
    for question in questions.QUESTIONS.values():
        named |= set(question.arms)
    for arm in questions.ARMS:
        named.add(questions.method_of(arm))
    assert named <= set(questions.ARMS)


def test_a_variant_takes_the_tuned_settings_of_its_method():
    given = " ".join(runner.settings_of(ROOT / "out", Job("seed only, 32 pairs", 0)))
    assert given.endswith("--alpha 0 --beta 1000 --lr 1e-5")


# ---- sharing ----

@pytest.fixture(scope="module", params=["random pair", "no mixup"])
def twins(studied, tmp_path_factory, request):
    """(arm, its folder in the study, the folder of the same arm run alone)."""
    alone = tmp_path_factory.mktemp("alone")
    runner.run_arm(alone, Job(request.param, 0, MINI))
    arm = request.param
    return arm, folder_of(studied[0], arm, 0), folder_of(alone, arm, 0)


@pytest.mark.parametrize("name", [
    "seed/pairs.parquet", f"iter0/{WEIGHTS}", "iter1/candidates.parquet"])
def test_what_is_the_same_is_shared(studied, twins, name):
    sail = folder_of(studied[0], "SAIL", 0)
    assert (twins[1] / name).samefile(sail / name)


@pytest.mark.parametrize("name", ["iter1/pairs.parquet", "iter1/draws.parquet"])
def test_a_ranking_is_shared_whole_or_not_at_all(studied, twins, name):
    """Another choice of the pair needs stage 03 anew."""
    arm, shared, _ = twins
    sail = folder_of(studied[0], "SAIL", 0)
    assert (shared / name).samefile(sail / name) == (arm == "no mixup")


@pytest.mark.parametrize("other, shared", [("--seed-pairs 6", True), ("--iter-prompts 3", False)])
def test_the_bases_pictures_are_shared_where_prompts_have_the_same_numbers(
        studied, tmp_path, other, shared):
    given = [*runner.settings_of(studied[0], Job("SAIL", 0, MINI)), *other.split()]
    load([*given, "--run", str(tmp_path)], "", create=True)
    runner.share(folder_of(studied[0], "SAIL", 0), tmp_path, 3)
    assert bool(list(tmp_path.glob("eval/images/base-*/*.png"))) == shared


def test_human_pairs_without_prompts_for_rounds_serve_no_run_with_rounds():
    with_rounds = Settings(pairs="mine.csv", prompts="mine.txt", eval_prompts="eval.txt")
    without = dataclasses.replace(with_rounds, alpha=0.)
    assert lend.agreeing_steps(with_rounds, without) == []
    assert lend.HUMAN_PAIRS in lend.agreeing_steps(without, with_rounds)


def test_sharing_changes_no_weight(twins):
    _, shared, alone = twins
    for k in range(4):
        ours = load_file(shared / f"iter{k}" / WEIGHTS)
        theirs = load_file(alone / f"iter{k}" / WEIGHTS)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_cost_is_that_of_the_arm_run_alone(studied, twins):
    arm, _, alone = twins
    ledger = pd.read_parquet(alone / "ledger.parquet").query("stage != '05_eval'")
    _, runs = results_of_runs.collect(studied[0], [Job(arm, 0)])
    expected = [ledger[ledger.iter.fillna(0) <= k].unet_forwards.sum() for k in range(4)]
    assert runs.forwards.dropna().tolist() == expected


def test_six_rounds_go_on_from_three(studied):
    three, six = (folder_of(studied[0], arm, 0) for arm in ("SAIL", "SAIL, 6 rounds"))
    trained = pd.read_parquet(six / "ledger.parquet").query("stage == '04_train_dpo'")
    assert trained.iter.tolist() == [4, 5, 6]
    assert (three / "iter3/unet/config.json").samefile(six / "iter3/unet/config.json")


def test_six_rounds_are_all_evaluated(studied):
    scores = pd.read_parquet(folder_of(studied[0], "SAIL, 6 rounds", 0) / "eval/scores.parquet")
    assert list(scores.model.unique()) == ["base", *(f"Iter{k}" for k in range(7))]


def test_a_finished_arm_is_left_alone(studied):
    out, jobs = studied
    weights = folder_of(out, "SAIL", 0) / "iter3" / WEIGHTS
    before = weights.stat().st_mtime_ns
    assert runner.run_arm(out, jobs[0]).endswith("there")
    assert weights.stat().st_mtime_ns == before


def test_a_finished_arm_takes_no_other_settings(studied):
    with pytest.raises(UserError, match="lr"):
        runner.run_arm(studied[0], Job("SAIL", 0, (*MINI, "--lr", "5e-5")))


# ---- the plan, and what is refused before anything is run ----

def test_the_plan_counts_what_the_runs_of_a_study_then_make(studied, tmp_path):
    """All runs' counts, with what they share counted once, are those of their ledgers."""
    out, jobs = studied
    table = cost.cost_of([(tmp_path / "none", job) for job in jobs])
    made = pd.concat(pd.read_parquet(folder_of(out, arm, 0) / "ledger.parquet") for arm in ARMS)
    assert table.runs_left.sum() == len(ARMS)
    for column in cost.COUNTED:
        assert table[column].sum() == made[column].sum()
    assert not (tmp_path / "none").exists()


def test_the_plan_leaves_finished_runs_out(studied):
    out, jobs = studied
    table = cost.cost_of([(out, job) for job in [*jobs, Job("t below 500", 0, MINI)]])
    assert table.runs_left.tolist() == [arm == "t below 500" for arm in table.arm]
    assert (table.unet_forwards > 0).tolist() == [arm == "t below 500" for arm in table.arm]


@pytest.mark.parametrize("flags, words", [
    ("--seed 2", ["--seed ", "--seeds"]),
    ("--run x", ["--run", "--out"]),
    ("--preset sd15", ["--preset"]),
    ("--iters 2", ["--iters"]),
    ("--sedes 2", ["--sedes"]),
    ("--draws 0", ["--draws 0"]),
    ("--seeds -1", ["--seeds -1"]),
    ("--workers 0", ["--workers 0"]),
    ("--questions nope", ["nope", "rivals"]),
    ("--out {file}/x", ["--out", "no folder"]),
    ("--tune --lr 0", ["--lr 0"]),
])
def test_what_the_study_cannot_do_is_said_before_anything_is_made(flags, words, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    argv = ["--out", str(tmp_path / "study"), *flags.format(file=file).split()]
    with pytest.raises(UserError) as error:
        command.main(argv)
    refused(str(error.value), *words)
    assert not (tmp_path / "study").exists()


def test_the_plan_of_the_whole_study_makes_no_folder(tmp_path, capsys):
    command.main(["--plan", "--out", str(tmp_path / "study"), "--seeds", "1",
                  "--questions", "all"])
    last = capsys.readouterr().out.splitlines()[-2].split()
    assert last[:3] == ["in", "all", str(len(questions.ARMS))]
    assert not (tmp_path / "study").exists()


# ---- answers ----

def test_a_run_that_ended_early_leaves_its_arm_out_and_is_told():
    question = questions.Question("title", ("SAIL", "no mixup"), seeds=3)
    failed = {("SAIL", 1): "iter0, step 68: diverged", ("no mixup", 4): "x"}
    left_out = command.ended_early(failed, question)
    assert list(left_out) == ["SAIL"]
    assert "SAIL, 1 of 3" in left_out["SAIL"]
    assert "step 68" in left_out["SAIL"]


def test_the_table_has_a_row_for_each_arm_and_further_model(results):
    table = answers.table_of(results)
    controls = ["Iter0 extrapolated", "Iter0 as guidance"]
    assert list(table.row) == ["base", "Iter0", *ARMS[:4], *controls, *ARMS[4:]]


def test_the_table_says_what_the_runs_did(studied, results):
    table = answers.table_of(results).set_index("row")
    scores = pd.read_parquet(folder_of(studied[0], "no mixup", 0) / "eval/scores.parquet")
    means = scores.groupby("model").utility.mean()
    assert table.loc["no mixup", "over base"] == pytest.approx(means["Iter3"] - means["base"])


def test_training_without_candidates_costs_less(results):
    table = answers.table_of(results).set_index("row")
    assert table.loc["seed only", "UNet forwards"] < table.loc["SAIL", "UNet forwards"]


def test_points_that_lie_close_have_names_that_can_be_read():
    """Every name is written, within the frame, and none upon another."""
    from matplotlib.text import Text

    figure, axis = figures.new_figure(1, (6, 4))
    names = [(f"row {i}", x, .5 + .001 * i) for i, x in enumerate((1, 1, 2, 9, 10))]
    for _, *place in names:
        axis.plot(*place, "o")
    axis.set_ylim(0, 1)
    figures.write_names(axis, names)

    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in axis.texts]
    assert sorted(text.get_text() for text in axis.texts) == sorted(name for name, *_ in names)
    assert all(frame.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("over", ["", "pairs", "rounds", "forwards"])
def test_an_answer_is_a_table_and_a_figure(results, tmp_path, over):
    question = questions.Question("title", tuple(ARMS), seeds=1, over=over)
    answers.answer(tmp_path, "pairs", question, results, ["left out: one"])
    text = (tmp_path / "pairs.md").read_text()
    assert "no mixup" in text
    assert ("in the rounds" in text) == (over == "forwards")
    assert text.endswith("- left out: one")
    assert (tmp_path / "pairs.png").stat().st_size > 1000


def test_the_points_of_a_figure_lie_within_its_axes(results):
    import matplotlib.pyplot as plt

    two = dataclasses.replace(results, arms=["SAIL", "no mixup"])
    table = answers.table_of(results).set_index("row")
    figure = figures.draw_over_setting(two, "pairs")
    for axis, score in zip(figure.axes, ("utility", "alignment")):
        gains = table.loc[two.arms, score] - table.loc["base", score]
        left, right = axis.get_xlim()
        low, high = axis.get_ylim()
        assert left < table.loc["SAIL", "human pairs"] < right
        assert low < gains.min()
        assert gains.max() < high
    plt.close(figure)


def test_arms_of_a_figure_stand_at_their_own_settings(results):
    lines = figures.lines_over(results, "alpha")
    at = {method: [point[0] for point in points["utility"]] for method, points in lines.items()}
    assert at == {"SAIL": [.25, .25], "random pair": [.25], "no mixup": [1.], "seed only": [0.],
                  "self-confidence": [.25]}


def test_interval_covers_the_truth_as_often_as_it_says():
    """Means of a population of run seeds and of prompts, 5 seeds and 60 prompts at a time."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        of_seeds = .5 * rng.normal(size=(5, 1))
        of_prompts = .3 * rng.normal(size=(1, 60))
        values = 1 + of_seeds + of_prompts + rng.normal(size=(5, 60))
        _, low, high = means.interval(values)
        covered += low <= 1 <= high
    assert .92 < covered / 400 < .995


def test_the_p_value_is_that_of_students_t():
    """With ten run seeds t = 2.262 is .05, and t = 3.250 is .01, in any table of Student's t."""
    for t, p in ((2.2622, .05), (-3.2498, .01)):
        by_seed = np.arange(10.) - 4.5
        by_seed += t * by_seed.std(ddof=1) / np.sqrt(10)
        assert means.p_value(by_seed[:, None]) == pytest.approx(p, rel=1e-3)


@pytest.mark.parametrize("seeds, quantile", [(2, 12.7062), (5, 2.7764), (11, 2.2281), (31, 2.0423)])
def test_intervals_are_as_wide_as_a_table_of_students_t_says(seeds, quantile):
    by_seed = np.arange(float(seeds))[:, None]
    mean, low, high = means.interval(by_seed)
    expected = quantile * by_seed.std(ddof=1) / np.sqrt(seeds)
    assert [mean - low, high - mean] == pytest.approx([expected, expected], rel=1e-4)


def test_a_comparison_that_is_missing_counts_as_a_look():
    table = pd.DataFrame({"seeds": [5, 5, 1], "p": [.01, .04, math.nan]})
    assert primary.corrected(table, 4).p_holm.tolist() == pytest.approx([.04, .12])


def test_several_looks_are_corrected_by_holm():
    assert means.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert means.holm([.5, .6]) == [1., 1.]


def test_primary_comparisons_name_rows_of_their_questions():
    rows = {"Iter0", *(row.partition("=")[0] for row in questions.CONTROLS)}
    for name in primary.QUESTIONS:
        rows |= set(questions.QUESTIONS[name].arms)
    assert {name for pair in questions.PRIMARY + questions.SECONDARY for name in pair} <= rows


# ---- what is kept of the runs ----

@pytest.fixture
def kept(results, tmp_path, monkeypatch):
    """`results` as if they were published."""
    published.keep(results.scores, results.runs, tmp_path)
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    return results


def test_every_table_comes_out_of_what_is_kept(kept):
    again = results_of_runs.results_of(*published.read(), ARMS, range(1))
    pd.testing.assert_frame_equal(answers.table_of(again), answers.table_of(kept), atol=2e-4)


def test_rows_are_compared_on_the_run_seeds_that_both_have(results):
    """An arm with another run seed of its own gains over SAIL what it gains on the common one."""
    more = results.scores.query("arm == 'no mixup'").assign(seed=1)
    more["utility"] += 9.
    ragged = dataclasses.replace(results, scores=pd.concat([results.scores, more]))
    before, after = (answers.table_of(each).set_index("row") for each in (results, ragged))
    assert after["over SAIL"].equals(before["over SAIL"])
    assert after.utility["no mixup"] == pytest.approx(before.utility["no mixup"] + 4.5)


def test_equal_runs_are_told_by_their_weights(kept):
    runs = kept.runs
    assert published.tell_equal(runs).startswith("6 of 6 runs")
    other = runs.assign(weights=runs.weights.where(runs.arm != "no mixup", "another"))
    assert published.tell_equal(other).startswith("5 of 6 runs")
    assert published.tell_equal(runs.assign(settings="--lr 1")) == "none of these runs is published"


# ---- the judge ----

@pytest.fixture(scope="module")
def judged(studied):
    """(folder of the arm SAIL, its round 1 as lib/study/judge.py reads it)."""
    run = folder_of(studied[0], "SAIL", 0)
    return run, judge.read_round(run, 1)


def test_all_draws_are_the_judge_that_the_run_had(judged):
    run, of_round = judged
    table = judge.measure(of_round).set_index("draws")
    of_run = json.loads((run / "iter1/judge.json").read_text())
    assert table.accuracy[judge.ALL] == pytest.approx(of_run["accuracy"])


def test_all_draws_choose_the_pairs_that_the_run_had(judged):
    run, of_round = judged
    table = judge.measure(of_round).set_index("draws")
    pairs = pd.read_parquet(run / "iter1/pairs.parquet")
    win, lose = (people.score(pairs.prompt.tolist(), read_pictures(run, pairs[side]))["utility"]
                 for side in ("win", "lose"))
    assert table.gap[judge.ALL] == pytest.approx((win - lose).mean().item(), abs=1e-6)


def made_up_draws():
    """Two comparisons of two pictures with three draws each, all above t = 500 in the second.

    The first picture is better by 1 in the first comparison at low t, and worse by 5 at high t; in
    the second it is better at all t.
    """
    t = torch.tensor([[100, 200, 900], [600, 700, 800]])
    reward = torch.tensor([[[1., 1., 0.], [0., 0., 5.]], [[3., 3., 3.], [0., 0., 0.]]])
    anchor_error = torch.tensor([.1, .1, 10.]).expand(2, 2, 3)
    return load_stage("03").Draws(t, anchor_error - reward, anchor_error, reward)


@pytest.mark.parametrize("choice, agrees", [
    (judge.ALL, .5),            # the one loud draw at t = 900 decides the first comparison
    (judge.LOW, 1.),            # the second comparison has no draw there, and does not count
    (judge.HIGH, .5),
    (judge.BALANCED, 1.),       # a draw of error 10 is a hundred times quieter than one of .1
])
def test_agreement_by_the_draws_that_are_chosen(choice, agrees):
    draws = made_up_draws()
    assert judge.agreement(draws, judge.weights_of(choice, draws)) == agrees


def test_the_gap_is_that_of_the_pictures_that_are_chosen():
    draws = made_up_draws()
    utility = torch.tensor([[2., 1.], [1.5, 1.]])
    weights = judge.weights_of(judge.ALL, draws)
    assert judge.gap(draws, weights, utility) == pytest.approx((-1 + .5) / 2)


def test_tenths_of_t_are_measured_by_their_own_draws():
    tenths = judge.measure_tenths(made_up_draws()).set_index("t")
    assert tenths.accuracy[950] == 0
    assert tenths.accuracy[650] == 1
    assert np.isnan(tenths.accuracy[50])
    assert tenths.spread[950] == pytest.approx(torch.tensor([0., 5.]).std().item())


def test_the_judge_is_answered_from_finished_runs(studied, tmp_path):
    of_spo = tmp_path / "SPO-0"
    (of_spo / "rivals/spo").mkdir(parents=True)
    (of_spo / "rivals/spo/judge.json").write_text('{"accuracy": 0.625}')
    shutil.copy(folder_of(studied[0], "SAIL", 0) / "config.json", of_spo)
    by_tenth = pd.DataFrame({"tenth": range(10), "judgements": 20, "spo": .6})
    by_tenth.to_parquet(of_spo / "rivals/spo/judge.parquet")
    others = {"self-confidence": {0: folder_of(studied[0], "self-confidence", 0)},
              "SPO": {0: of_spo}}

    judge.answer(tmp_path, "title", {0: folder_of(studied[0], "SAIL", 0)}, others)
    table = pd.read_csv(tmp_path / "judge.csv").set_index("draws")
    assert (table.gap.dropna() <= table.gap["best and worst in truth"] + 1e-4).all()
    assert table.accuracy.dropna().between(0, 1).all()
    assert table.accuracy["SPO"] == .625
    assert table.forwards["self-confidence"] == 40
    assert table.forwards["SPO"] == 1                   # half a UNet at each of two draws
    assert (tmp_path / "judge.png").stat().st_size > 1000


# ---- tuning and the whole command ----

@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(the study's folder, tune.csv): an arm, two settings, a control of each kind, and a rival."""
    out = tmp_path_factory.mktemp("tuned")
    controls = {kind: rows[:1] for kind, rows in tune.CONTROL_GRID.items()}

    # A process of its own takes long to start: the first setting has one.
    def run_all(out, jobs, workers, lenders):
        if out.name == "0":
            return runner.run_all(out, jobs, workers, lenders)
        for job in jobs:
            runner.run_arm(out, job, lenders)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "GRID", ("--beta 2000 --lr 1e-4", "--beta 2000 --lr 5e-4"))
        patch.setattr(tune, "TUNE_ARMS", ("seed only",))
        patch.setattr(tune, "CONTROL_GRID", controls)
        patch.setattr(tune, "RIVAL_GRID", {"SPO": ("--spo-lr 1e-6",)})
        patch.setattr(tune, "run_all", run_all)
        patch.setattr(tune, "ALIGNMENT_LOSS", 9.)       # four prompts say little: any may be best
        settings = MINI[:MINI.index("--beta")]
        command.main(["--out", str(out), "--tune", "--workers", "1", *settings])
    return out, pd.read_csv(out / "tune.csv")


def test_tuning_chooses_one_setting_for_each_arm_and_kind_of_control(tuned):
    _, table = tuned
    assert len(table) == 2 * (1 + 2) + 1
    assert table.groupby("arm").best.sum().eq(1).all()


def test_tuning_takes_the_highest_utility(tuned):
    _, table = tuned
    arm = table[table.arm == "seed only"]
    assert arm[arm.best].utility.item() == arm.utility.max()


def test_controls_are_chosen_on_the_iter0_of_the_best_setting(tuned):
    _, table = tuned
    best = table[table.best & (table.arm != "SPO")]
    assert best.setting.nunique() == 1


def test_tuning_says_what_the_runs_did(tuned):
    out, table = tuned
    run = folder_of(out / "tune/1", "seed only", 100)
    means = pd.read_parquet(run / "eval/scores.parquet").groupby("model").utility.mean()
    second = table[(table.arm == "seed only") & (table.setting == "--beta 2000 --lr 5e-4")]
    expected = means["Iter3"] - means["base"]
    assert second.utility.item() == pytest.approx(expected, abs=1e-4)


def test_a_question_is_answered_without_an_arm_that_ended_early(studied, capsys, monkeypatch):
    """The whole command, on runs that are there; its processes are left out."""
    out, jobs = studied

    def run_all(out, jobs, workers):
        for job in jobs:
            assert runner.run_arm(out, job).endswith("there")
        return {("no mixup", 0): "it diverged"}

    question = questions.Question("Some arms", tuple(ARMS), seeds=5)
    monkeypatch.setitem(questions.QUESTIONS, "pairs", question)
    judges = dataclasses.replace(questions.QUESTIONS["judge"], arms=("SAIL", "self-confidence"))
    monkeypatch.setitem(questions.QUESTIONS, "judge", judges)
    monkeypatch.setattr(command, "run_all", run_all)
    command.main(["--out", str(out), "--questions", "pairs", "judge", "--seeds", "1", *MINI])
    assert set(pd.read_csv(out / "runs.csv").arm) == set(ARMS) - {"no mixup"}

    printed = capsys.readouterr().out
    assert "Some arms; 1 run seeds" in printed
    assert "left out: no mixup, 1 of 1" in printed
    assert "no mixup |" not in printed
    assert (out / "judge.png").exists()


def test_one_run_seed_has_no_interval():
    assert judge.cell(pd.Series([.63])) == "0.630"
    assert judge.cell(pd.Series([.6, .7])).startswith("0.650 [")


# ---- the findings ----

@pytest.fixture(scope="module")
def published_answers(tmp_path_factory):
    """What the questions are answered from the published runs: every line, as it is printed."""
    out = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers.figures, "save_figure", lambda figure, path: None)
        asked = ["--questions", *questions.MAIN_QUESTIONS, "pairs", "alpha", "rounds", "noise"]
        command.main(["--out", str(out), "--published", *asked])
    files = sorted(out.with_name(f"{out.name}-published").glob("*.md"))
    texts = [file.read_text() for file in files]
    texts.append(judge.readable(pd.read_csv(published.FOLDER / published.JUDGE)))
    return "\n".join(texts).splitlines()


FINDINGS = (ROOT / "lib/study/README.md").read_text().splitlines()


def test_the_tables_of_the_findings_are_those_of_the_published_runs(published_answers):
    shown = [line for line in published_answers if line.startswith("|")]
    assert len(shown) > 40
    assert set(shown) <= set(FINDINGS)


# What the claims compare and no table has side by side: (arm, model) over (arm, model).
SIX = "SAIL, 6 rounds"
BESIDE = [
    *(((SIX, f"Iter{k}"), (SIX, f"Iter{before}")) for k, before in
      ((1, 0), (2, 1), (3, 2), (4, 3), (6, 3))),
    *(((f"online DPO, alpha {alpha}", "Iter3"), ("online DPO", "Iter3")) for alpha in ("0.5", "1")),
    *(((f"SAIL, noise {noise}", "Iter3"), (f"seed only, noise {noise}", "Iter3")) for noise in
      ("0", "0.4", "1")),
]


def gains_beside_the_tables() -> str:
    """These, of the published runs, as the claims have them."""
    scores, runs = published.read()
    told = []
    for mine, theirs in BESIDE:
        results = results_of_runs.Results(scores, runs, [mine[0]])
        rows = [results_of_runs.Row("", *row) for row in (mine, theirs)]
        gains = results.gains(*rows, "utility").to_numpy()
        if len(gains):
            told.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*means.interval(gains)))
    return "\n".join(told)


def test_the_claims_tell_gains_that_the_runs_have(published_answers):
    """But for the questions whose runs are not kept, which say the commit that they are of."""
    begin = FINDINGS.index("## The paper's claims, and its reviewers' questions")
    claims = [line for line in FINDINGS[begin + 1:FINDINGS.index("## How it is measured")]
              if line.startswith("|") and "4461184" not in line]
    told = [gain for line in claims for gain in re.findall(r"[+-][\d.]+ \[[^]]*\]", line)]
    tables = "\n".join([*published_answers, gains_beside_the_tables()])
    assert len(told) > 8
    assert [gain for gain in told if gain not in tables] == []


def test_every_published_run_says_what_made_it():
    scores, runs = published.read()
    assert runs[["settings", "commit", "cpu"]].notna().all().all()
    trained = runs[runs.model.str.fullmatch(r"Iter\d|spo")]
    assert trained.weights.str.fullmatch("[0-9a-f]{12}").all()
    assert set(scores.arm) == set(runs.arm)


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
def test_the_thrifty_line_of_the_findings_is_one_that_the_preset_takes(preset):
    [line] = [line for line in FINDINGS if line.strip().startswith(f"./run_sail.sh {preset} --")]
    given = vars(build_parser("").parse_args(line.split()[2:]))
    plain = Settings(**PRESETS[preset])
    thrifty = dataclasses.replace(plain, **given)
    check(thrifty)

    # Candidates are most of a run.
    forwards = [counts(s).unet_forwards.sum() for s in (plain, thrifty)]
    assert forwards[1] < .3 * forwards[0]

"""DiffusionSPO, trained here: its equations, its preference model, a run of it, and the rivals'
door."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (UNET_FILE, call, configure, fails_with, make_pairs, make_pipeline,
                      same_tensors, settings_of)
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from lib import models
from lib.models import BASE
from lib.rivals import __main__ as door
from lib.rivals import ddim, preference, spo
from lib.rivals.preference import StepJudge
from lib.run import generator
from lib.settings import PRESETS, Settings, build_parser
from lib.study import answers, questions, runner
from lib.study import results as results_of_runs
from lib.study.runner import Job

# ---- the equations ----

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
def test_a_step_is_that_of_diffusers_with_eta_1(rng, kind, to_one):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind, set_alpha_to_one=to_one)
    scheduler.set_timesteps(10)
    abar = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps]
    x_t, prediction, noise = torch.randn(3, 2, 4, 8, 8, generator=rng)
    for number, t in enumerate(scheduler.timesteps):
        after = [*abar, scheduler.final_alpha_cumprod][number + 1]
        mean, sigma = ddim.ddim_step(prediction, x_t, abar[number].repeat(2), after.repeat(2), kind)
        expected = scheduler.step(prediction, t, x_t, eta=1., variance_noise=noise).prev_sample
        assert torch.allclose(mean + sigma[0] * noise, expected, atol=2e-5)


def test_a_steps_log_probability_is_the_gaussians_mean_over_the_latent(rng):
    x_prev, mean = torch.randn(2, 3, 4, 8, 8, generator=rng)
    sigma = torch.tensor([.1, 1., 3.])
    for i, log_prob in enumerate(ddim.step_log_prob(x_prev, mean, sigma)):
        expected = torch.distributions.Normal(mean[i], sigma[i]).log_prob(x_prev[i]).mean()
        assert log_prob.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("win, lose", [(0., 0.), (.05, -.02), (-.05, .08), (.3, -.3), (-.3, .02)])
def test_spo_loss_equals_a_plain_computation(win, lose):
    """Ratios of probabilities count between .9 and 1.1 only."""
    loss, margin = spo.spo_loss(torch.tensor([win]), torch.tensor([lose]))
    r_win, r_lose = min(max(np.exp(win), .9), 1.1), min(max(np.exp(lose), .9), 1.1)
    expected = 10 * np.log(r_win) - 10 * np.log(r_lose)
    assert margin.item() == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(np.log1p(np.exp(-expected)), abs=1e-5)


def test_a_ratio_beyond_its_bounds_is_pushed_no_further():
    ratios = torch.tensor([[.2, .05], [-.05, -.2]], requires_grad=True)
    loss, _ = spo.spo_loss(*ratios)
    loss.sum().backward()
    assert ratios.grad[0, 0] == 0 and ratios.grad[1, 1] == 0
    assert ratios.grad[0, 1] < 0 < ratios.grad[1, 0]


def test_a_step_that_ran_away_has_a_finite_gradient():
    ratios = torch.tensor([[500.], [-500.]], requires_grad=True)
    loss, _ = spo.spo_loss(*ratios)
    loss.sum().backward()
    assert loss.isfinite().all() and ratios.grad.isfinite().all()


def test_a_fork_gives_best_and_worst_where_their_softmax_gap_exceeds_the_threshold(rng):
    scores = .5 * torch.randn(50, 4, generator=rng)
    win, lose, sure = spo.pairs_of_step(scores, .3)
    for row in range(50):
        best, worst = max(scores[row].tolist()), min(scores[row].tolist())
        assert (scores[row, win[row]], scores[row, lose[row]]) == (best, worst)
        p = np.exp([best, worst]) / np.exp([best, worst]).sum()
        assert sure[row].item() == (p[0] - p[1] > .3)
    assert 0 < sure.sum() < 50


# ---- the preference model ----

def test_a_fit_finds_the_direction_that_decides_and_stops_where_pairs_kept_aside_say(rng):
    truth = torch.tensor([1., -2., 0.])
    gaps = torch.randn(600, 1, 3, generator=rng)
    people = torch.rand(600, 1, generator=rng) < torch.sigmoid(gaps @ truth)
    gaps = torch.where(people[..., None], gaps, -gaps)
    weights, facts = preference.fit(gaps[:400], gaps[400:])
    assert torch.nn.functional.cosine_similarity(weights, truth, dim=0) > .9
    plain = np.log1p(np.exp(-(gaps[400:] @ weights).numpy())).mean()
    assert facts["loss_aside"] == pytest.approx(plain, rel=1e-5)

    # Where the labels are of chance, the pairs kept aside stop it at once.
    _, noise = preference.fit(gaps[:20], -gaps[:20])
    assert noise["steps"] == 0


def test_features_are_mean_and_spread_of_the_blocks_on_the_way_down(mini, rng):
    """Computed a second time by the UNet's own parts."""
    unet = models.load_unet(settings_of(mini), BASE)
    x_t = torch.randn(2, 12, 8, 8, generator=rng)
    embeds = torch.randn(2, 5, unet.config.cross_attention_dim, generator=rng)
    t = torch.tensor([700, 20])
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(t))
        hidden = unet.conv_in(x_t)
        first, _ = unet.down_blocks[0](hidden, emb)
        second, _ = unet.down_blocks[1](first, emb, encoder_hidden_states=embeds)
        mid = unet.mid_block(second, emb, encoder_hidden_states=embeds)

    features = StepJudge(unet).features(x_t, t, {"embeds": embeds})
    expected = [torch.cat([block.mean((2, 3)), block.std((2, 3), correction=0)], 1)
                for block in (first, second, mid)]
    assert torch.allclose(features, torch.cat(expected, 1), atol=1e-5)


def test_accuracy_by_tenth_of_t_counts_judgements():
    table = preference.by_tenth(pd.DataFrame({
        "t": [3, 99, 100, 950, 999], "right": [True, False, True, False, False]}))
    assert table.tenth.tolist() == [0, 1, 9]
    assert table.judgements.tolist() == [2, 1, 2]
    assert table.accuracy.tolist() == [.5, 1., 0.]


# ---- a run of it ----

ARGUMENTS = ["--spo-lr", "1e-4", "--spo-gap", "0"]


def make_short(patch) -> None:
    """Few looks at the pairs, and some walks."""
    patch.setattr(preference, "MOST_DRAWS", 2)
    patch.setattr(spo, "budget_of", lambda s, rounds: 200)


def train(run, *arguments) -> dict:
    """Train SPO on a run, for a short time; returns its weights."""
    with pytest.MonkeyPatch.context() as patch:
        make_short(patch)
        spo.main(["--run", str(run), *ARGUMENTS, *arguments])
    return load_file(run / "rivals/spo/unet" / UNET_FILE)


@pytest.fixture(scope="module")
def trained(mini, tmp_path_factory):
    """(a miniature run with SPO trained on it, the weights)."""
    run = shutil.copytree(mini, tmp_path_factory.mktemp("spo") / "mini")
    return run, train(run)


def test_a_run_of_spo_is_a_row_of_the_table_and_of_the_ledger(trained):
    run, weights = trained
    base = load_file(models.local_or_hub(settings_of(run).model) + f"/unet/{UNET_FILE}")
    assert weights.keys() == base.keys() and not same_tensors(weights, base)
    assert call("05", run, "--row", f"spo={run}/rivals/spo/unet", "--scores-only") is None
    assert "spo" in set(pd.read_parquet(run / "eval/scores.parquet").model)

    log = pd.read_parquet(run / "rivals/spo/train_log.parquet")
    facts = json.loads((run / "rivals/spo/judge.json").read_text())
    row = pd.read_parquet(run / "ledger.parquet").query("stage == 'spo'").iloc[0]
    assert row.unet_forwards == facts["unet_forwards"] + log.unet_forwards.sum()
    assert row.optimizer_steps == log.steps.sum() > 0


def test_the_cost_of_walk_and_training_is_counted(trained):
    """4 prompts: 3 guided steps, two of them forks, whose 4 candidates cost half a forward each; a
    pair's x_t asks policy and base twice."""
    log = pd.read_parquet(trained[0] / "rivals/spo/train_log.parquet")
    assert (log.unet_forwards == 4 * 3 * 2 + 2 * 4 * 4 / 2 + 4 * log.pairs).all()
    assert (log.pairs == log.sure * 2 * 4).all()
    assert len(log) > 1


def test_it_stops_at_the_forwards_that_the_rounds_have_taken(mini):
    ledger = pd.read_parquet(mini / "ledger.parquet").dropna(subset="iter")
    for rounds in (1, 2):
        spent = ledger[ledger.iter <= rounds].unet_forwards.sum()
        assert spo.budget_of(settings_of(mini), rounds) == spent


def test_both_judges_are_measured_on_the_same_draws(trained):
    run, _ = trained
    table = pd.read_parquet(run / "rivals/spo/judge.parquet")
    draws = pd.read_parquet(run / "iter1/holdout_draws.parquet")
    assert table.judgements.sum() * 2 == len(draws)
    win, lose = (draws[draws.side == side].reward.to_numpy() for side in ("win", "lose"))
    right = (table.self_judge * table.judgements).sum()
    assert right == pytest.approx((win > lose).sum())


def test_held_out_pairs_are_not_trained_on(trained, mini_copy):
    """Other persons' votes on them turn the accuracy, and nothing else."""
    table = pd.read_parquet(mini_copy / "seed/holdout.parquet")
    table = table.rename(columns={"win": "lose", "lose": "win"})
    table.to_parquet(mini_copy / "seed/holdout.parquet")
    assert same_tensors(train(mini_copy), trained[1])
    before, after = (json.loads((run / "rivals/spo/judge.json").read_text())["accuracy"]
                     for run in (trained[0], mini_copy))
    assert before + after == pytest.approx(1)


def test_a_stopped_training_ends_as_an_uninterrupted_one(trained, mini_copy, monkeypatch):
    walk, walks = spo.walk, []

    def stop_at_the_second(*arguments):
        walks.append(None)
        if len(walks) == 2:
            raise KeyboardInterrupt
        return walk(*arguments)

    monkeypatch.setattr(spo, "walk", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(mini_copy)
    assert (mini_copy / "rivals/spo/checkpoint.pt").exists()
    fails_with("was begun with --spo-lr 0.0001", train, mini_copy, "--spo-lr", "1e-3")

    monkeypatch.setattr(spo, "walk", walk)
    assert same_tensors(train(mini_copy), trained[1])


def test_a_walk_goes_on_from_a_candidate_of_the_fork_and_pairs_share_their_past(mini):
    s = settings_of(mini)
    unet, steps = models.load_unet(s, BASE), ddim.steps_of(s)
    judge = StepJudge(models.load_unet(s, BASE))
    encoder = models.PromptEncoder(s)
    prompts = pd.read_parquet(mini / "prompts.parquet").prompt.tolist()[:3]
    condition, empty = encoder.prepare(prompts)(prompts), encoder.unconditional()
    judge.weights = torch.ones(len(judge.features(
        torch.zeros(1, 12, 8, 8), torch.tensor(0), {n: v[:1] for n, v in condition.items()})[0]))
    ledger = type("Ledger", (), {"unet_forwards": 0})()
    parts = spo.Parts(unet, unet, judge, steps, empty, -1.)
    pairs = spo.walk(s, parts, condition, generator(0), ledger)

    assert pairs.number.tolist() == [1] * 3 + [2] * 3
    numbers, rows = pairs.number, pairs.prompt
    asked = {name: values[rows] for name, values in condition.items()}
    mean, sigma = ddim.step_gaussian(s, unet, steps, numbers, pairs.x_t, asked, empty)
    for x_prev in (pairs.win, pairs.lose):
        z = (x_prev - mean) / sigma[:, None, None, None]
        assert z.mean().abs() < .1 and abs(z.std() - 1) < .1
    win = judge.score(pairs.win, steps.t_prev[numbers], asked)
    assert (win > judge.score(pairs.lose, steps.t_prev[numbers], asked)).all()


# ---- SD1.5 and SDXL ----

@pytest.mark.parametrize("xl, rank", [(False, 0), (True, 2)], ids=["SD1.5", "SDXL with LoRA"])
def test_spo_trains_on_other_pipelines(tmp_path, xl, rank):
    make_pipeline(tmp_path / "model", xl, "epsilon")
    files = make_pairs(tmp_path / "own").parent / "own"
    run = tmp_path / "run"
    arguments = {
        "preset": "sdxl" if xl else "sd15", "model": tmp_path / "model", "vae": "",
        "pairs": files / "pairs.csv", "prompts": files / "prompts.txt",
        "eval-prompts": files / "eval.txt", "scores": "none", "resolution": 64, "seed-pairs": 5,
        "holdout-pairs": 2, "iters": 1, "iter-prompts": 2, "candidates": 2, "draws": 2,
        "sample-steps": 3, "batch": 2, "micro-batch": 1, "iter0-steps": 1, "iter-steps": 1,
        "lora-rank": rank,
    }
    given = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    assert call("01", run, *given) is None
    weights = train(run)
    base = load_file(tmp_path / "model/unet" / UNET_FILE)
    changed = [name for name in base if not torch.equal(base[name], weights[name])]
    assert changed
    if rank:
        assert all("attn" in name for name in changed)
        assert (run / "rivals/spo/lora/pytorch_lora_weights.safetensors").exists()
    assert "self_judge" not in pd.read_parquet(run / "rivals/spo/judge.parquet")


# ---- an arm of the study ----

def test_an_arm_of_the_study_has_spo_for_its_answer(tmp_path, monkeypatch):
    make_short(monkeypatch)
    given = """--seed-pairs 8 --holdout-pairs 4 --iter-prompts 2 --candidates 3 --draws 2 --batch 4
        --sample-steps 2 --iter0-steps 2 --iter-steps 2 --micro-batch 4 --eval-count 4"""
    monkeypatch.setitem(spo.ARGUMENTS["--spo-gap"], "default", 0.)
    job = Job("SPO", 0, tuple(given.split()))
    runner.run_arm(tmp_path, job)

    scores, runs = results_of_runs.collect(tmp_path, [job])
    rows = answers.rows_of(results_of_runs.results_of(scores, runs, ["SPO"], range(1)))
    assert [(row.name, row.model) for row in rows] == [
        ("base", "base"), ("Iter0", "Iter0"), ("SPO", "spo")]

    ledger = pd.read_parquet(runner.folder_of(tmp_path, "SPO", 0) / "ledger.parquet")
    spent = ledger[ledger.stage.isin(["01_seed", "spo"])].unet_forwards.sum()
    assert runs.set_index("model").forwards["spo"] == spent


# ---- the door ----

def test_the_door_names_its_rivals_and_refuses_others():
    fails_with("rival nobody: give one of spo, mapo, diffusion-dpo, online-dpo", door.main,
               ["nobody"])
    fails_with(r"rival \(no name\)", door.main, [])


@pytest.mark.parametrize("name", door.RIVALS)
def test_a_rivals_settings_are_the_drivers_and_what_is_given_wins(name):
    own = ["--reward", "pickscore"] if name == "online-dpo" else []
    driver, *words = door.command_of(name, ["sd15", "--run", "runs/x", "--beta", "7", *own])
    given = vars(build_parser("").parse_args(words))
    assert driver.endswith("run_sail.sh")
    assert (given.pop("preset"), given.pop("run"), given.pop("beta")) == ("sd15", "runs/x", 7)
    assert given == {"mapo": {"iters": 0, "loss": "mapo"}, "diffusion-dpo": {"iters": 0},
                     "online-dpo": {"reward": "pickscore"}}[name]


def test_ones_own_labels_are_not_asked_to_be_thousands(tmp_path, mini):
    """Nor does a rival of an SD1.5 run have the embedded world's numbers."""
    labelled = ["--run", f"{tmp_path}/x", "--pairs", f"{tmp_path}/labels"]
    assert "--seed-pairs" not in door.command_of("mapo", labelled)
    other = shutil.copytree(mini, tmp_path / "other")
    configure(other, **{name: value for name, value in PRESETS["sd15"].items() if name != "run"})
    of_other = ["--run", f"{tmp_path}/x", "--from", str(other)]
    assert "--seed-pairs" not in door.command_of("mapo", of_other)
    assert "--seed-pairs" in door.command_of("mapo", ["--run", f"{tmp_path}/x", "--from", str(mini)])


@pytest.mark.parametrize("asked", ["--check", "--plan", "--plan --gpu a100"])
def test_what_a_rival_would_need_and_cost_is_asked_of_the_driver(asked):
    command = door.command_of("diffusion-dpo", ["sd15", "--run", "runs/x", *asked.split()])
    assert " ".join(command).endswith(f"--preset sd15 --run runs/x {asked}")


def test_a_rival_of_its_own_wants_a_folder_of_its_own():
    fails_with("rival mapo: is a run of its own; give it a folder with --run", door.main, ["mapo"])


def test_the_judge_is_to_be_as_sure_as_the_published_one_but_in_the_embedded_world():
    assert spo.gap_of(Settings(), None) == .1
    assert spo.gap_of(Settings(**PRESETS["sd15"]), None) == .3
    assert spo.gap_of(Settings(), 0.) == 0.


@pytest.mark.parametrize("name, arm", [
    ("mapo", "MaPO"), ("diffusion-dpo", "DiffusionDPO"), ("online-dpo", "online DPO")])
def test_in_the_embedded_world_a_rival_is_the_studys_row(name, arm):
    _, *words = door.command_of(name, ["--run", "runs/x"])
    mine = vars(build_parser("").parse_args(words))
    theirs = vars(build_parser("").parse_args(runner.arguments_of(runner.Job(arm, 0))))
    rounds = questions.ARMS[arm].rounds
    assert mine.pop("iters", 3) == rounds

    # Where the study keeps its runs, and that its runs set prompts aside for six rounds.
    for given in (mine, theirs):
        for setting in ("run", "iters", "seed", "eval_seeds"):
            given.pop(setting, None)
    assert mine == theirs


def test_spo_says_what_a_run_lacks(tmp_path, mini_copy):
    fails_with("config.json does not exist: start the run", spo.main, ["--run", str(tmp_path)])
    configure(mini_copy, iters=0)
    fails_with("has no rounds", spo.main, ["--run", str(mini_copy)])

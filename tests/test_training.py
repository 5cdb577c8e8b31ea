"""Stage 04 against plain computations: the published losses on a real batch, adapters, accumulation, resume, stops."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_pairs, make_pipeline, stage
from PIL import Image, ImageOps
from safetensors.torch import load_file

from lib import lora, models, settings
from lib.run import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(pipeline, run): a run whose stage 01 is done, with everything that can enter a batch: mirrored pairs, dropped
    prompts, posterior noise. Rounds without self-made pairs (alpha 0), so that stage 04 is all they need."""
    folder = tmp_path_factory.mktemp("training")
    files, run = make_pairs(folder / "own"), folder / "run"
    pipe = make_pipeline(folder / "model", False, "epsilon")
    stage("01").main(["--preset", "sd15", "--run", str(run), "--model", str(folder / "model"), "--resolution", "64",
                      "--pairs", str(files / "pairs.csv"), "--prompts", str(files / "prompts.txt"), "--eval-prompts",
                      str(files / "eval.txt"), "--seed-pairs", "8", "--holdout-pairs", "0", "--iters", "2", "--alpha", "0",
                      "--iter-prompts", "1", "--batch", "4", "--micro-batch", "2", "--iter0-steps", "3", "--iter-steps",
                      "2", "--lr", "1e-3", "--warmup", "0", "--flip", ".5", "--prompt-dropout", ".3"])
    return pipe, run


def configure(run: Path, **changes) -> settings.Settings:
    """The run with other settings, as if it had been started with them."""
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= changes | {"run": str(run)}
    (run / "config.json").write_text(json.dumps(config))
    return settings.load(["--run", str(run)], "")[0]


@pytest.fixture
def copy(base, tmp_path):
    """make(**settings) -> settings of a copy of the run, with those changes."""
    def make(**changes):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(base[1], run)
        return configure(run, **changes)
    return make


def trained(s, k: int = 0) -> tuple[dict, pd.DataFrame]:
    """Weights and log of stage 04."""
    stage("04").main(["--run", s.run, "--iter", str(k)])
    return (load_file(Path(s.run) / f"iter{k}/unet/diffusion_pytorch_model.safetensors"),
            pd.read_parquet(Path(s.run) / f"iter{k}/train_log.parquet").drop(columns="seconds"))


def update(weights: dict, pipe) -> torch.Tensor:
    """What training changed, one long vector."""
    return torch.cat([(weights[name] - old).flatten() for name, old in pipe.unet.state_dict().items()])


def nudge(unet, size: float = .02) -> None:
    """Another model than the base: trained parameters moved at random."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=rng)


def ask(unet, given: int = 0) -> torch.Tensor:
    """A UNet's output on fixed inputs."""
    rng = torch.Generator().manual_seed(given)
    with torch.no_grad():
        return unet(torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([3, 400, 950]),
                    torch.randn(3, 12, 16, generator=rng)).sample


# ---- the losses ----

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_real_batch_has_the_published_loss(base, train, prediction):
    """Diffusion-DPO's equation 14 from pictures and prompts: own encoding, mirroring, noising, UNet calls, float64."""
    pipe, run = base
    s = replace(settings.load(["--run", str(run)], "")[0], micro_batch=4)
    pairs, _ = train.training_pairs(s, 0)
    encoder = models.PromptEncoder(s).prepare(pairs.prompt.tolist())
    policy, ref = train.load_policy(s, 0)
    nudge(policy)
    rows, draws = [0, 3, 5, 6], train.step_draws(s, 0, 2, (4, 8, 8))
    draws |= {"flip": torch.tensor([True, False, True, False]), "drop": torch.tensor([False, True, True, False])}
    scheduler = models.DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    errors = train.pair_errors(s, policy, ref, scheduler, pairs.iloc[rows], draws, encoder)
    loss, margin = train.dpo_loss(*errors, s.beta)

    abar = np.cumprod(1 - np.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2)
    expected = np.empty((4, 4))
    for i, row in enumerate(rows):
        pair, t, noise = pairs.iloc[row], int(draws["t"][i]), draws["noise"][i].double()
        a, b = abar[t] ** .5, (1 - abar[t]) ** .5
        tokens = pipe.tokenizer("" if draws["drop"][i] else pair.prompt, padding="max_length", truncation=True,
                                max_length=12, return_tensors="pt").input_ids
        for side, name in enumerate((pair.win, pair.lose)):
            picture = Image.open(run / name)
            picture = ImageOps.mirror(picture) if draws["flip"][i] else picture
            pixels = torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                posterior = pipe.vae.encode(pixels).latent_dist
                x0 = .18215 * (posterior.mean + posterior.std * draws["posterior"][side, i])[0].double()
                x_t, target = a * x0 + b * noise, noise if prediction == "epsilon" else a * noise - b * x0
                for half, unet in ((0, policy), (2, ref)):
                    out = unet(x_t[None].float(), t, pipe.text_encoder(tokens).last_hidden_state).sample[0].double()
                    expected[half + side, i] = (target - out).square().mean()
    assert errors.shape == (4, 4) and errors.detach().numpy() == pytest.approx(expected, rel=1e-5)
    win, lose, ref_win, ref_lose = expected
    z = -s.beta / 2 * ((win - ref_win) - (lose - ref_lose))
    assert margin.tolist() == pytest.approx(z, abs=s.beta * 1e-5) and np.abs(z).max() > 1
    assert loss.mean().item() == pytest.approx(np.logaddexp(0, -margin.detach().double().numpy()).mean(), rel=1e-6)


def test_a_pair_is_mirrored_together_and_its_latents_are_kept(base, train):
    _, run = base
    s = settings.load(["--run", str(run)], "")[0]
    pairs, _ = train.training_pairs(s, 0)
    kept = {p.name for p in (run / "seed/latents").iterdir()}
    assert kept == {Path(i).stem + end + ".safetensors" for i in (*pairs.win, *pairs.lose) for end in ("", ".flip")}
    before = {p: p.stat().st_mtime_ns for p in (run / "seed/latents").iterdir()}
    train.training_pairs(s, 0)
    assert before == {p: p.stat().st_mtime_ns for p in before}                          # encoded once

    asked = []
    stack, models.stack_latents = models.stack_latents, lambda images, mirrored: asked.append((images, mirrored)) or \
        stack(images, mirrored)
    try:
        draws = train.step_draws(s, 0, 0, (4, 8, 8)) | {"flip": torch.tensor([True, False, False, True])}
        with torch.no_grad():
            unet = models.load_unet(s, -1)
            train.pair_errors(s, unet, unet, models.load_schedule(s), pairs[:4], draws,
                              models.PromptEncoder(s).prepare(pairs.prompt.tolist()))
    finally:
        models.stack_latents = stack
    (images, mirrored), = asked
    assert images == [run / i for i in (*pairs.win[:4], *pairs.lose[:4])] and mirrored == [True, False, False, True] * 2
    flips = torch.stack([train.step_draws(s, 0, n, (4, 8, 8))["flip"] for n in range(100)]).float()
    assert .4 < flips.mean() < .6


def test_mapo_loss_equals_a_plain_computation(train):
    """L = e_w - beta log sigmoid(T (phi(e_w) - phi(e_l))), phi(e) = s e / (exp(s e) - 1), which is 1 at e = 0."""
    win = torch.tensor([.1, .5, 1e-3, 0., 1e-9, .2, 2.5])
    lose = torch.tensor([.2, .4, 2e-3, 0., .1, 1e-9, .1])
    loss, margin = train.mapo_loss(win, lose)
    phi = lambda e: .5 * e / np.expm1(.5 * e) if e else 1.
    for w, l, got, m in zip(win.double().tolist(), lose.double().tolist(), loss.tolist(), margin.tolist()):
        z = 1000 * (phi(w) - phi(l))
        assert m == pytest.approx(z, rel=1e-4, abs=1e-3)                  # phi in float32, times a thousand
        assert got == pytest.approx(w + .1 * np.logaddexp(0, -z), rel=1e-4, abs=1e-4)
    errors = torch.full((2, 1), .002, requires_grad=True)
    train.mapo_loss(*errors)[0].sum().backward()                          # phi falls by s / 2 there, the sigmoid is a half
    assert errors.grad[0].item() == pytest.approx(1 + .1 / 2 * 1000 / 4, rel=.01)
    assert errors.grad[1].item() == pytest.approx(-.1 / 2 * 1000 / 4, rel=.01)


@pytest.mark.parametrize("rank", [0, 2])
def test_mapo_needs_no_reference(copy, train, monkeypatch, rank):
    s = copy(loss="mapo", lora_rank=rank)
    loaded, load = [], models.load_unet
    monkeypatch.setattr(models, "load_unet", lambda *given, **options: loaded.append(given[1]) or load(*given, **options))
    monkeypatch.setattr(lora, "reference_of", lambda policy: pytest.fail("asked for a reference"))
    assert train.load_policy(s, 0)[1] is None and loaded == [-1]
    weights, log = trained(s)
    assert np.isfinite(log[["loss", "margin", "accuracy", "grad_norm"]]).all(axis=None) and log.win_error_gain.isna().all()
    assert pd.read_parquet(Path(s.run) / "ledger.parquet").unet_forwards.iloc[-1] == 3 * 4 * 2


# ---- adapters ----

def test_lora_reference_is_the_base_exactly(copy, train):
    s = copy(lora_rank=2)
    plain = models.UNet2DConditionModel.from_pretrained(s.model, subfolder="unet")
    policy, ref = train.load_policy(s, 0)
    nudge(policy)
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert ref is None and trainable and all("lora_" in name and ".policy." in name for name in trainable)
    with lora.reference_of(policy) as model:
        assert torch.equal(ask(model), ask(plain))
    assert (ask(policy) - ask(plain)).abs().max() > 1e-3
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trainable


def test_lora_rounds_go_on_from_the_last_adapter(base, copy, train):
    """Round 2's reference is round 1's adapter on the base; what a round saves is one adapter, and plain diffusers has
    the same model from it as from the folder of the fused UNet."""
    pipe, _ = base
    s = copy(lora_rank=2)
    for k in (0, 1):
        trained(s, k)
    plain = models.UNet2DConditionModel.from_pretrained(s.model, subfolder="unet")
    pipe = type(pipe).from_pretrained(s.model, unet=plain, safety_checker=None)
    pipe.load_lora_weights(Path(s.run) / "iter1/lora")
    whole = models.UNet2DConditionModel.from_pretrained(Path(s.run) / "iter1/unet")
    effect = (ask(base[0].unet) - ask(whole)).abs().max()
    assert (ask(plain) - ask(whole)).abs().max() < 1e-3 * effect

    policy, _ = train.load_policy(s, 2)
    assert torch.equal(ask(policy), ask(plain))                          # starts as model 1
    nudge(policy)
    with lora.reference_of(policy) as model:
        assert torch.equal(ask(model), ask(plain))                       # and is compared with it, whatever it becomes
    assert not torch.equal(ask(policy), ask(plain))
    last = load_file(Path(s.run) / "iter0/lora" / lora.FILE), load_file(Path(s.run) / "iter1/lora" / lora.FILE)
    assert last[0].keys() == last[1].keys() and all(v.shape[0 if "lora_A" in k else 1] == 2 for k, v in last[1].items())
    assert any(not torch.equal(last[0][k], last[1][k]) for k in last[0])


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_saved_is_what_was_trained(base, copy, train, rank):
    s = copy(lora_rank=rank)
    policy, _ = train.load_policy(s, 0)
    nudge(policy, .1 if rank else .02)
    train.save_model(s, 0, policy)
    effect = (ask(policy) - ask(base[0].unet)).abs().max()
    assert (ask(models.load_unet(s, 0)) - ask(policy)).abs().max() < 1e-3 * effect
    assert (Path(s.run) / "iter0/lora").exists() == bool(rank)


def test_lora_trains_in_float32_on_a_base_in_bfloat16(copy, train):
    s = copy(lora_rank=2, dtype="bfloat16", grad_checkpoint="on")
    policy, _ = train.load_policy(s, 0)
    kinds = {p.dtype for p in policy.parameters() if p.requires_grad}, {p.dtype for p in policy.parameters()}
    assert kinds == ({torch.float32}, {torch.float32, torch.bfloat16})
    _, log = trained(s)
    adapter = load_file(Path(s.run) / "iter0/lora" / lora.FILE)
    assert log.grad_norm.min() > 0 and all(v.dtype == torch.float32 for v in adapter.values())
    assert all(v.any() for k, v in adapter.items() if "to_out.0.lora_B" in k)            # they have learned


def test_a_given_start_is_the_reference_of_round_1(copy, train):
    s = copy(lora_rank=2)
    start = models.UNet2DConditionModel.from_pretrained(s.model, subfolder="unet")
    nudge(start)
    start.save_pretrained(Path(s.run).parent / "start")
    s = configure(Path(s.run), start=str(Path(s.run).parent / "start"))
    stage("04").main(["--run", s.run, "--iter", "0"])
    policy, _ = train.load_policy(s, 1)
    with lora.reference_of(policy) as model:
        assert torch.equal(ask(model), ask(start))
    trained(s, 1)


# ---- the same step, however it is computed ----

@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"micro_batch": 4}, {"grad_checkpoint": "on"}])
def test_how_a_step_is_computed_does_not_matter(base, copy, monkeypatch, change):
    """Accumulation and recomputed activations give the big batch's weights, with plain descent: an update is then the
    gradient, where Adam would blow up the rounding of those near zero."""
    def run(**changes):
        s, module = copy(**changes), stage("04")
        monkeypatch.setattr(module, "make_optimizer", lambda s, parameters: torch.optim.SGD(parameters, lr=s.lr))
        module.main(["--run", s.run, "--iter", "0"])
        weights = load_file(Path(s.run) / "iter0/unet/diffusion_pytorch_model.safetensors")
        return update(weights, base[0]), pd.read_parquet(Path(s.run) / "iter0/train_log.parquet").drop(columns="seconds")
    (one, log), (other, other_log) = run(), run(**change)
    assert one.norm() > 1e-4 and (one - other).norm() < 1e-3 * one.norm()
    np.testing.assert_allclose(log, other_log, rtol=1e-3, atol=1e-3)


def test_optimizers(base, train):
    s = settings.load(["--run", str(base[1])], "")[0]
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    assert train.make_optimizer(replace(s, device="cuda"), weights).defaults["fused"]
    assert not train.make_optimizer(s, weights).defaults["fused"]
    adafactor = train.make_optimizer(replace(s, optimizer="adafactor"), weights)
    assert not adafactor.defaults["scale_parameter"] and not adafactor.defaults["relative_step"]


def test_warm_up(train):
    s = settings.Settings(lr=1e-3, warmup=4)
    assert [train.learning_rate(s, step) for step in (0, 1, 4, 99)] == pytest.approx([2e-4, 4e-4, 1e-3, 1e-3])


# ---- resume, and stops ----

@pytest.mark.parametrize("rank, k", [(2, 1), (0, 0)])
def test_resumed_training_equals_the_uninterrupted_one(copy, monkeypatch, rank, k):
    whole, cut = copy(lora_rank=rank, checkpoint_every=1), copy(lora_rank=rank, checkpoint_every=1)
    if k:
        for s in (whole, cut):
            trained(s, 0)
    weights, log = trained(whole, k)
    module, stop = stage("04"), whole.iter_steps - 1 if k else 2

    def interrupt(row, *_):
        if row["step"] == stop:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, "watch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            module.main(["--run", cut.run, "--iter", str(k)])
    assert (Path(cut.run) / f"iter{k}/checkpoint.pt").exists() and not (Path(cut.run) / f"iter{k}/unet").exists()
    again, again_log = trained(cut, k)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    pd.testing.assert_frame_equal(log, again_log, check_exact=True)
    if rank:
        one, two = (load_file(Path(s.run) / f"iter{k}/lora" / lora.FILE) for s in (whole, cut))
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (Path(cut.run) / f"iter{k}/checkpoint.pt").exists()
    assert pd.read_parquet(Path(cut.run) / "ledger.parquet").optimizer_steps.tail(2).tolist()[-1] == 1


@pytest.mark.parametrize("loss", ["dpo", "mapo"])
def test_a_run_away_stops_with_advice(copy, loss):
    s = copy(loss=loss, lr=3., checkpoint_every=1, iter0_steps=9)
    with pytest.raises(UserError, match="(times the reference's|not finite).*lower --lr .now 3.0.*last checkpoint"):
        stage("04").main(["--run", s.run, "--iter", "0"])
    assert (Path(s.run) / "iter0/checkpoint.pt").exists() and not (Path(s.run) / "iter0/unet").exists()


def test_what_counts_as_a_run_away(train):
    row = {"step": 7, "loss": .7, "grad_norm": 1., "win_error": .29, "ref_error": .1}
    s = settings.Settings()
    train.watch(row, 1, s)
    train.watch(row | {"ref_error": float("nan")}, 1, replace(s, loss="mapo"))
    for bad, match in (({"win_error": .31}, "iter1, step 7: .*over 3 times"), ({"loss": float("nan")}, "not finite"),
                       ({"grad_norm": float("inf")}, "not finite")):
        with pytest.raises(UserError, match=match):
            train.watch(row | bad, 1, s)
    with pytest.raises(UserError, match="over 3 times"):
        train.watch(row | {"win_error": 3.1, "ref_error": float("nan")}, 1, replace(s, loss="mapo"))


# ---- loading ----

def test_no_sampler_clips_latents(base, tmp_path):
    """A pipeline saved with a sampler that has no such option leaves it to the default, which is to clip."""
    from diffusers import EulerDiscreteScheduler
    shutil.copytree(Path(settings.load(["--run", str(base[1])], "")[0].model), tmp_path / "model")
    shutil.rmtree(tmp_path / "model/scheduler")
    EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_pretrained(
        tmp_path / "model/scheduler")
    for name in models.SAMPLERS:
        config = models.load_sampler(settings.Settings(model=str(tmp_path / "model"), sampler=name)).config
        assert not config.get("clip_sample") and config.prediction_type == "v_prediction"

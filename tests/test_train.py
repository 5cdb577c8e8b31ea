"""Stage 04 against plain computations: loss, mix, adapters, accumulation, resume, stops."""

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (call, configure, make_pairs, make_pipeline, nudge, random_batch, refused,
                      same_tensors, settings_of, stage, tiny_unet, weights_of)
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from lib import lora, models, packs, training
from lib.diffusion import denoising_error
from lib.lock import tidy
from lib.models import BASE
from lib.run import UserError, latent_path
from lib.settings import Settings

LATENT = (4, 8, 8)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """(pipeline, run): a run that stage 01 is through with.

    It has everything that can enter a batch: mirrored pairs, dropped prompts, posterior noise. Its
    rounds have no self-made pairs (alpha 0), so stage 04 is all that they need.
    """
    folder = tmp_path_factory.mktemp("training")
    files = make_pairs(folder / "own")
    pipe = make_pipeline(folder / "model", False, "epsilon")
    arguments = [
        "--preset", "sd15",
        "--model", folder / "model",
        "--resolution", "64",
        "--pairs", files / "pairs.csv",
        "--prompts", files / "prompts.txt",
        "--eval-prompts", files / "eval.txt",
        "--seed-pairs", "8",
        "--holdout-pairs", "0",
        "--iters", "2",
        "--iter-prompts", "1",
        "--alpha", "0",
        "--batch", "4",
        "--micro-batch", "2",
        "--iter0-steps", "3",
        "--iter-steps", "2",
        "--lr", "1e-3",
        "--warmup", "0",
        "--flip", ".5",
        "--prompt-dropout", ".3",
    ]
    assert call("01", folder / "run", *map(str, arguments)) is None
    return pipe, folder / "run"


@pytest.fixture
def new_run(seeded, tmp_path):
    """make(**changes): the settings of a copy of the run, with these changes."""
    def make(**changes) -> Settings:
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(seeded[1], run)
        return configure(run, **changes)
    return make


def log_of(s: Settings, k: int) -> pd.DataFrame:
    log = pd.read_parquet(Path(s.run) / f"iter{k}/train_log.parquet")
    return log.drop(columns="seconds")


def adapter_of(s: Settings, k: int) -> dict[str, torch.Tensor]:
    return load_file(Path(s.run) / f"iter{k}/lora" / lora.FILE)


def train_round(s: Settings, k: int = 0) -> tuple[dict, pd.DataFrame]:
    """Run stage 04; returns the weights and the log."""
    assert call("04", Path(s.run), "--iter", str(k)) is None
    return weights_of(Path(s.run), k), log_of(s, k)


@pytest.fixture(scope="module")
def iter0(seeded, tmp_path_factory) -> Settings:
    """A run after Iter0, to be read only."""
    run = shutil.copytree(seeded[1], tmp_path_factory.mktemp("iter0") / "run")
    s = settings_of(run)
    train_round(s)
    return s


def base_unet(s: Settings) -> UNet2DConditionModel:
    """The base by plain diffusers."""
    return UNet2DConditionModel.from_pretrained(s.model, subfolder="unet")


def output_of(unet) -> torch.Tensor:
    """A UNet's output on fixed inputs."""
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, *LATENT, generator=rng)
    embeds = torch.randn(3, 12, 16, generator=rng)
    with torch.no_grad():
        return unet(x_t, torch.tensor([3, 400, 950]), embeds).sample


def distance(one, other) -> float:
    """The greatest difference between two UNets' outputs."""
    return (output_of(one) - output_of(other)).abs().max().item()


def flat(tensors) -> torch.Tensor:
    """All numbers of several tensors in one row."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def trainable(unet) -> set[str]:
    return {name for name, parameter in unet.named_parameters() if parameter.requires_grad}


# ---- the loss: pure functions ----

def test_the_loss_equals_a_plain_computation(train, rng):
    win, lose, ref_win, ref_lose = torch.rand(4, 16, generator=rng) * .2 + .05
    loss, margin = train.dpo_loss(win, lose, ref_win, ref_lose, 5000.)
    for i in range(16):
        gain_on_winner = float(win[i]) - float(ref_win[i])
        gain_on_loser = float(lose[i]) - float(ref_lose[i])
        z = -5000 / 2 * (gain_on_winner - gain_on_loser)
        expected = -z if z < -500 else math.log1p(math.exp(-z))
        assert float(margin[i]) == pytest.approx(z, rel=1e-5, abs=1e-3)
        assert float(loss[i]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_loss_of_the_reference_itself_is_log_2(train, rng):
    win, lose = torch.rand(2, 16, generator=rng)
    loss, margin = train.dpo_loss(win, lose, win, lose, 5000.)
    assert torch.allclose(loss, torch.full((16,), math.log(2)))
    assert (margin == 0).all()


def test_the_loss_is_averaged_after_the_log_sigmoid(train):
    """One pair is right and one is as wrong: averaged before, the loss would be log 2."""
    win, lose = torch.tensor([.1, .3]), torch.tensor([.3, .1])
    reference = torch.full((2,), .2)
    loss, _ = train.dpo_loss(win, lose, reference, reference, 1000.)
    assert loss.mean() > 50


def test_the_loss_pulls_the_winners_error_down_and_the_losers_up(train):
    errors = torch.full((4, 1), .1, requires_grad=True)
    loss, _ = train.dpo_loss(*errors, 5000.)
    loss.sum().backward()
    assert errors.grad[0] > 0
    assert errors.grad[1] < 0


def test_a_step_lowers_the_winners_error_against_the_losers(train, rng):
    policy, ref = tiny_unet(), tiny_unet().requires_grad_(False)
    x_0, noise, t, condition = random_batch(rng, 8)

    # Four winners, then four losers, which share what a pair shares.
    noise, t = noise[:4].repeat(2, 1, 1, 1), t[:4].repeat(2)
    condition = {"embeds": condition["embeds"][:4].repeat(2, 1, 1)}

    def errors(unet):
        return denoising_error(unet, DDIMScheduler(), x_0, t, noise, condition).chunk(2)

    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
    before, _ = train.dpo_loss(*errors(policy), *errors(ref), 5000.)
    before.mean().backward()
    optimizer.step()

    (win, lose), (ref_win, ref_lose) = errors(policy), errors(ref)
    loss, margin = train.dpo_loss(win, lose, ref_win, ref_lose, 5000.)
    assert loss.mean() < before.mean()
    assert margin.mean() > 0
    assert (win - ref_win).mean() < (lose - ref_lose).mean()


# ---- the loss of a real batch ----

RANDOMS = {
    "flip": torch.tensor([True, False, True, False]),
    "drop": torch.tensor([False, True, True, False]),
}


def plain_errors(pipe, unets: list, run: Path, pair, randoms: dict, i: int) -> list[float]:
    """Errors of each UNet on the winner and on the loser of pair i of a batch, from the files.

    Encoding, mirroring, noising and averaging are done here, in float64 but for the networks.
    """
    t, noise = int(randoms["t"][i]), randoms["noise"][i].double()
    betas = np.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2
    abar = np.cumprod(1 - betas)[t]
    prompt = "" if randoms["drop"][i] else pair.prompt
    tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=12,
                            return_tensors="pt").input_ids
    embeds = pipe.text_encoder(tokens).last_hidden_state

    errors = []
    for unet in unets:
        for side, name in enumerate((pair.win, pair.lose)):
            picture = Image.open(run / name)
            if randoms["flip"][i]:
                picture = ImageOps.mirror(picture)
            pixels = torch.tensor(np.asarray(picture), dtype=torch.float32).permute(2, 0, 1)
            posterior = pipe.vae.encode(pixels[None] / 127.5 - 1).latent_dist
            x_0 = posterior.mean + posterior.std * randoms["posterior"][i, side]
            x_0 = .18215 * x_0[0].double()

            x_t = abar ** .5 * x_0 + (1 - abar) ** .5 * noise
            target = noise
            if pipe.scheduler.config.prediction_type == "v_prediction":
                target = abar ** .5 * noise - (1 - abar) ** .5 * x_0
            output = unet(x_t[None].float(), t, embeds).sample[0].double()
            errors.append((target - output).square().mean().item())
    return errors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_real_batch_has_the_published_loss(seeded, train, monkeypatch, prediction):
    """Equation 14 of Diffusion-DPO from the pictures and prompts of four pairs."""
    pipe, run = seeded
    schedule = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    monkeypatch.setattr(pipe, "scheduler", schedule)
    s = settings_of(run)
    pairs, _ = train.training_pairs(s, 0)
    pairs = pairs.iloc[[0, 3, 5, 6]]
    encoder = models.PromptEncoder(s).prepare(pairs.prompt.tolist())
    policy, ref = train.load_policy_and_reference(s, 0)
    nudge(policy)
    randoms = train.step_randoms(s, 0, 2, LATENT) | RANDOMS
    with torch.no_grad():
        errors = train.pair_errors(s, policy, ref, schedule, pairs, randoms, encoder)
        expected = []
        for i, pair in enumerate(pairs.itertuples()):
            expected.append(plain_errors(pipe, [policy, ref], run, pair, randoms, i))
    win, lose, ref_win, ref_lose = np.array(expected).T
    assert errors.numpy() == pytest.approx(np.array([win, lose, ref_win, ref_lose]), rel=1e-5)

    loss, margin = train.dpo_loss(*errors, s.beta)
    z = -s.beta / 2 * ((win - ref_win) - (lose - ref_lose))
    assert np.abs(z).max() > 1
    assert margin.numpy() == pytest.approx(z, abs=s.beta * 1e-5)
    expected_loss = np.logaddexp(0, -margin.double().numpy()).mean()
    assert loss.mean().item() == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_is_that_of_the_mean_loss_over_the_batch(seeded, train, micro_batch):
    s = replace(settings_of(seeded[1]), micro_batch=micro_batch)
    pairs, _ = train.training_pairs(s, 0)
    pairs = pairs[:4]
    encoder = models.PromptEncoder(s).prepare(pairs.prompt.tolist())
    policy, ref = train.load_policy_and_reference(s, 0)
    nudge(policy)
    randoms, schedule = train.step_randoms(s, 0, 0, LATENT), models.load_schedule(s)

    errors = train.pair_errors(s, policy, ref, schedule, pairs, randoms, encoder)
    loss, _ = train.dpo_loss(*errors, s.beta)
    expected = flat(torch.autograd.grad(loss.mean(), list(policy.parameters())))

    ledger = SimpleNamespace(unet_forwards=0)
    values = train.backward(s, policy, ref, schedule, pairs, randoms, encoder, ledger)
    gradient = flat([parameter.grad for parameter in policy.parameters()])
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
    assert values.shape == (6, 4)
    assert torch.allclose(values[4], loss, rtol=1e-3)
    assert ledger.unet_forwards == 4 * 4                                # errors times pairs


# ---- what a batch is made of ----

def test_a_human_picture_is_encoded_once_as_it_is_and_mirrored(seeded, train):
    _, run = seeded
    s = settings_of(run)
    pairs, _ = train.training_pairs(s, 0)
    expected = set()
    for image in (*pairs.win, *pairs.lose):
        expected |= {f"{Path(image).stem}.safetensors", f"{Path(image).stem}.flip.safetensors"}
    files = (run / "seed/latents/packs").iterdir
    written = {path: path.stat().st_mtime_ns for path in files()}
    keys = [key for path in written for key in load_file(path)]
    assert {key.split("/")[0] for key in keys} == expected

    train.training_pairs(s, 0)
    assert {path: path.stat().st_mtime_ns for path in files()} == written


def test_a_pair_is_mirrored_together(seeded, train, monkeypatch):
    _, run = seeded
    s = settings_of(run)
    pairs, _ = train.training_pairs(s, 0)
    pairs = pairs[:4]
    stacked = []
    stack_latents = models.stack_latents

    def note(images, mirrored):
        stacked.append((images, mirrored))
        return stack_latents(images, mirrored)

    monkeypatch.setattr(models, "stack_latents", note)
    randoms = train.step_randoms(s, 0, 0, LATENT) | RANDOMS
    unet = models.load_unet(s, BASE)
    encoder = models.PromptEncoder(s).prepare(pairs.prompt.tolist())
    with torch.no_grad():
        train.pair_errors(s, unet, unet, models.load_schedule(s), pairs, randoms, encoder)

    images, mirrored = stacked[0]
    assert images == [run / image for image in (*pairs.win, *pairs.lose)]
    assert mirrored == [True, False, True, False] * 2


def test_half_of_the_pairs_are_mirrored(train):
    s = Settings(flip=.5)
    flips = [train.step_randoms(s, 0, step, (1, 1, 1))["flip"] for step in range(20)]
    assert .4 < torch.cat(flips).float().mean() < .6


def test_randoms_of_a_step_depend_on_seed_round_and_step_alone(train):
    s = Settings(prompt_dropout=.5)
    randoms = train.step_randoms(s, 1, 7, LATENT)
    assert same_tensors(randoms, train.step_randoms(replace(s, micro_batch=1), 1, 7, LATENT))
    for other in (train.step_randoms(s, 1, 8, LATENT), train.step_randoms(s, 2, 7, LATENT),
                  train.step_randoms(replace(s, seed=1), 1, 7, LATENT)):
        assert not torch.equal(randoms["noise"], other["noise"])


def test_randoms_of_a_step_have_a_row_for_each_pair(train):
    s = Settings(prompt_dropout=.5)
    randoms = train.step_randoms(s, 1, 7, LATENT)
    assert {len(rows) for rows in randoms.values()} == {s.batch}
    assert randoms["posterior"].shape == (s.batch, 2, *LATENT)
    assert randoms["drop"].any()
    assert not randoms["drop"].all()


# ---- ranked preference mixup ----

N_HUMAN, N_SELF, LENGTH, BATCH = 64, 32, 720, 12


@pytest.mark.parametrize("alpha", [0., .25, .5, 1 / 3, 1.])
def test_every_batch_has_its_share_of_self_made_pairs(train, rng, alpha):
    order = train.mixup(N_HUMAN, N_SELF, alpha, LENGTH, rng)
    is_self = order >= N_HUMAN
    assert is_self.sum() == round(alpha * LENGTH)
    assert (is_self.view(-1, BATCH).sum(1) == round(alpha * BATCH)).all()


@pytest.mark.parametrize("alpha", [0., .25, .5, 1 / 3, 1.])
def test_pairs_are_seen_equally_often_within_one(train, rng, alpha):
    order = train.mixup(N_HUMAN, N_SELF, alpha, LENGTH, rng)
    times = order.bincount(minlength=N_HUMAN + N_SELF)
    assert len(times) == N_HUMAN + N_SELF
    for part in (times[:N_HUMAN], times[N_HUMAN:]):
        assert part.max() - part.min() <= 1


def test_a_pass_is_shuffled_and_no_pass_is_like_another(train, rng):
    first, second = train.shuffled_passes(50, 100, rng).split(50)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(50))
    assert first.tolist() != list(range(50))
    assert first.tolist() != second.tolist()


def test_one_pass_uses_each_self_made_pair_once(train):
    s = Settings(iter_steps=0, iter0_steps=0, batch=10, micro_batch=10)
    assert train.steps_of(s, 1, 1000, 100) == 40                        # 100 / .25 / 10
    assert train.steps_of(s, 0, 1000, 0) == 100


def test_without_self_made_pairs_one_pass_is_over_the_human_pairs(train):
    s = Settings(iter_steps=0, alpha=0., batch=10, micro_batch=10)
    assert train.steps_of(s, 1, 1000, 0) == 100


def test_steps_that_are_given_hold(train):
    s = Settings(iter0_steps=7, iter_steps=5)
    assert train.steps_of(s, 0, 1000, 0) == 7
    assert train.steps_of(s, 1, 1000, 100) == 5


@pytest.mark.parametrize("alpha, of_self", [(.25, 1), (.5, 2), (1., 4)])
def test_a_round_trains_on_its_mix(mini_copy, alpha, of_self):
    """Of the 4 pairs of each step so many are self-made, and all of these are of this round."""
    configure(mini_copy, alpha=alpha)
    shutil.rmtree(mini_copy / "iter2/unet")
    module, batches = stage("04"), []
    backward = module.backward

    def note(s, policy, ref, schedule, pairs, *others):
        batches.append(pairs)
        return backward(s, policy, ref, schedule, pairs, *others)

    module.backward = note
    module.main(["--run", str(mini_copy), "--iter", "2"])
    *batches, looked_at_again = batches
    assert looked_at_again.equals(batches[-1])
    assert [(batch.source == "self").sum() for batch in batches] == [of_self] * 4
    pairs = pd.concat(batches)
    assert pairs.pair_id[pairs.source == "self"].str.startswith("self-2-").all()


# ---- MaPO, which has no reference ----

@pytest.mark.parametrize("rank", [0, 2])
def test_mapo_loads_no_reference(new_run, train, monkeypatch, rank):
    loaded = []
    load_unet = models.load_unet

    def note(s, k, **options):
        loaded.append(k)
        return load_unet(s, k, **options)

    monkeypatch.setattr(models, "load_unet", note)
    _, ref = train.load_policy_and_reference(new_run(loss="mapo", lora_rank=rank), 0)
    assert ref is None
    assert loaded == [BASE]


@pytest.mark.parametrize("rank", [0, 2])
def test_mapo_trains_without_a_reference(new_run, monkeypatch, rank):
    monkeypatch.setattr(lora, "reference_of", lambda policy: pytest.fail("asked for a reference"))
    s = new_run(loss="mapo", lora_rank=rank)
    _, log = train_round(s)
    assert np.isfinite(log[["loss", "margin", "accuracy", "grad_norm"]]).all(axis=None)
    assert log.win_error_gain.isna().all()
    forwards = pd.read_parquet(Path(s.run) / "ledger.parquet").unet_forwards

    # Three steps and a last look, of 4 pairs, of 2 pictures.
    assert forwards.iloc[-1] == (3 + 1) * 4 * 2


# ---- adapters ----

def test_only_the_adapter_is_trained(new_run, train):
    policy, ref = train.load_policy_and_reference(new_run(lora_rank=2), 0)
    names = trainable(policy)
    assert ref is None
    assert names
    for name in names:
        assert "lora_" in name
        assert ".policy." in name


def test_an_adapters_reference_is_the_base_exactly(new_run, train):
    s = new_run(lora_rank=2)
    base = base_unet(s)
    policy, _ = train.load_policy_and_reference(s, 0)
    names = trainable(policy)
    nudge(policy)
    with lora.reference_of(policy) as model:
        assert distance(model, base) == 0
    assert distance(policy, base) > 1e-3
    assert trainable(policy) == names


@pytest.fixture(scope="module")
def two_rounds(seeded, tmp_path_factory) -> Settings:
    """A LoRA run after Iter0 and round 1, to be read only."""
    run = shutil.copytree(seeded[1], tmp_path_factory.mktemp("adapters") / "run")
    s = configure(run, lora_rank=2)
    for k in (0, 1):
        train_round(s, k)
    return s


def test_plain_diffusers_has_the_same_model_from_adapter_and_folder(seeded, two_rounds):
    s = two_rounds
    whole = UNet2DConditionModel.from_pretrained(Path(s.run) / "iter1/unet")
    plain = base_unet(s)
    pipe = type(seeded[0]).from_pretrained(s.model, unet=plain, safety_checker=None)
    pipe.load_lora_weights(Path(s.run) / "iter1/lora")
    effect = distance(seeded[0].unet, whole)
    assert distance(pipe.unet, whole) < 1e-3 * effect


def test_a_round_starts_from_the_last_adapter_and_is_compared_with_it(two_rounds, train):
    s = two_rounds
    last = base_unet(s)
    last.load_lora_adapter(adapter_of(s, 1), prefix="unet")
    policy, _ = train.load_policy_and_reference(s, 2)
    assert distance(policy, last) == 0

    nudge(policy)
    with lora.reference_of(policy) as model:
        assert distance(model, last) == 0
    assert distance(policy, last) > 0


def test_a_round_saves_one_adapter_of_the_same_rank(two_rounds):
    first, second = adapter_of(two_rounds, 0), adapter_of(two_rounds, 1)
    assert first.keys() == second.keys()
    assert not same_tensors(first, second)
    for name, weight in second.items():
        assert weight.shape[0 if "lora_A" in name else 1] == 2


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_saved_is_what_was_trained(seeded, new_run, train, rank):
    s = new_run(lora_rank=rank)
    policy, _ = train.load_policy_and_reference(s, 0)
    nudge(policy, .1 if rank else .02)
    train.save_model(s, 0, policy)
    effect = distance(policy, seeded[0].unet)
    assert distance(models.load_unet(s, 0), policy) < 1e-3 * effect
    assert (Path(s.run) / "iter0/lora").exists() == bool(rank)


def test_an_adapter_trains_in_float32_on_a_base_in_bfloat16(new_run, train):
    s = new_run(lora_rank=2, dtype="bfloat16", grad_checkpoint="on")
    policy, _ = train.load_policy_and_reference(s, 0)
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    trained = {p.dtype for p in policy.parameters() if p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert trained == {torch.float32}

    _, log = train_round(s)
    assert log.grad_norm.min() > 0
    for name, weight in adapter_of(s, 0).items():
        assert weight.dtype == torch.float32
        if "to_out.0.lora_B" in name:
            assert weight.any(), f"{name} has not learned"


def test_a_given_start_is_the_reference_of_round_1(new_run, train, tmp_path):
    s = new_run(lora_rank=2)
    start = base_unet(s)
    nudge(start)
    start.save_pretrained(tmp_path / "start")
    s = configure(Path(s.run), start=str(tmp_path / "start"))
    assert call("04", Path(s.run), "--iter", "0") is None
    policy, _ = train.load_policy_and_reference(s, 1)
    with lora.reference_of(policy) as model:
        assert distance(model, start) == 0
    train_round(s, 1)


# ---- the same step, however it is computed ----

def plain_descent(seeded, run: Path, **changes) -> tuple[torch.Tensor, pd.DataFrame]:
    """Update and log of Iter0 under plain gradient descent, in a copy of the run at `run`.

    The update is then the gradient, where Adam would blow up the rounding of those near zero.
    """
    def sgd(s, parameters):
        return torch.optim.SGD(parameters, lr=s.lr)

    pipe, seed_run = seeded
    shutil.copytree(seed_run, run)
    s, module = configure(run, **changes), stage("04")
    module.make_optimizer = sgd
    module.main(["--run", s.run, "--iter", "0"])
    base, weights = pipe.unet.state_dict(), weights_of(run, 0)
    return flat([weights[name] - base[name] for name in base]), log_of(s, 0)


@pytest.fixture(scope="module")
def update_and_log(seeded, tmp_path_factory):
    """In micro-batches of 2, without checkpoints of activations."""
    return plain_descent(seeded, tmp_path_factory.mktemp("descent") / "run")


@pytest.mark.parametrize("change", [
    {"micro_batch": 1}, {"micro_batch": 4}, {"grad_checkpoint": "on"}])
def test_how_a_step_is_computed_does_not_matter(seeded, update_and_log, tmp_path, change):
    """Accumulation and recomputed activations give the same weights."""
    update, log = update_and_log
    other_update, other_log = plain_descent(seeded, tmp_path / "run", **change)
    assert update.norm() > 1e-4
    assert (update - other_update).norm() < 1e-3 * update.norm()
    np.testing.assert_allclose(log, other_log, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device, fused", [("cuda", True), ("cpu", False)])
def test_adamw_is_fused_on_cuda(train, device, fused):
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    adamw = train.make_optimizer(Settings(device=device), weights)
    assert bool(adamw.defaults["fused"]) == fused


def test_adafactor_takes_our_learning_rate(train):
    weights = [torch.nn.Parameter(torch.ones(2, 2))]
    adafactor = train.make_optimizer(Settings(optimizer="adafactor", device="cpu"), weights)
    assert not adafactor.defaults["scale_parameter"]
    assert not adafactor.defaults["relative_step"]


def test_warm_up_is_linear_and_then_constant(train):
    s = Settings(lr=1e-3, warmup=4)
    rates = [train.learning_rate(s, step) for step in (0, 1, 4, 99)]
    assert rates == pytest.approx([2e-4, 4e-4, 1e-3, 1e-3])


def test_every_process_has_as_many_micro_batches(new_run, monkeypatch):
    module, s = stage("04"), new_run()
    monkeypatch.setattr(module, "process_state", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(UserError, match="--batch 4 does not divide among 3 processes"):
        module.main(["--run", s.run, "--iter", "0"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_in_half_precision_a_model_is_compared_with_itself_at_first(mini, train, dtype, rank):
    """The embedded world's model has trained normalisation weights, which half precision rounds."""
    s = replace(settings_of(mini), dtype=dtype, lora_rank=rank, compile="on")
    pairs, _ = train.training_pairs(s, 0)
    randoms = train.step_randoms(s, 0, 0, (12, 8, 8))
    encoder, schedule = models.PromptEncoder(s), models.load_schedule(s)
    policy, ref = train.load_policy_and_reference(s, 0)
    with torch.no_grad():
        errors = train.pair_errors(s, policy, ref, schedule, pairs[:4], randoms, encoder)
    loss, margin = train.dpo_loss(*errors, s.beta)
    assert (margin == 0).all()
    assert torch.allclose(loss, torch.tensor(math.log(2)))
    assert errors.std() > 0


# ---- gradients of several processes ----

def as_two_processes(monkeypatch, others: list[torch.Tensor | None]) -> list[int]:
    """Let this process be one of two; the other has the gradients `others`. Returns sizes of what
    is summed."""
    sizes, waiting = [], [grad.flatten() for grad in others if grad is not None]

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        if op == torch.distributed.ReduceOp.MAX:
            has = torch.tensor([grad is not None for grad in others])
            return tensor.copy_(torch.maximum(tensor, has.to(tensor.dtype)))
        sizes.append(len(tensor))
        theirs = torch.cat(waiting)
        del waiting[:]
        waiting.append(theirs[len(tensor):])
        return tensor.add_(theirs[:len(tensor)])

    monkeypatch.setattr(training, "process_state", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return sizes


def test_gradients_are_summed_in_few_pieces(monkeypatch, rng):
    """Parameters of several shapes and memory formats, of which one has no gradient here and one
    nowhere."""
    shapes = [(3, 2), (4, 3, 5, 5), (7,), (2, 2), (5,)]
    mine = [torch.randn(shape, generator=rng) for shape in shapes]
    mine[1] = mine[1].to(memory_format=torch.channels_last)
    theirs = [torch.randn(shape, generator=rng) for shape in shapes]
    theirs[4] = None
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters[:3], mine):
        parameter.grad = gradient.clone(memory_format=torch.preserve_format)

    # Pieces of at least 300 numbers: the first two parameters, and the rest.
    monkeypatch.setattr(training, "BUCKET_BYTES", 4 * 300)
    sizes = as_two_processes(monkeypatch, theirs)
    training.sum_gradients(parameters)
    assert sizes == [6 + 300, 7 + 4]
    for i in range(3):
        assert torch.equal(parameters[i].grad, mine[i] + theirs[i])
    assert torch.equal(parameters[3].grad, theirs[3])
    assert parameters[4].grad is None


# ---- the log ----

def test_a_log_row_has_the_means_over_the_pairs(train):
    win, lose = torch.tensor([.1, .2]), torch.tensor([.3, .4])
    ref_win, ref_lose = torch.tensor([.2, .4]), torch.tensor([.3, .2])
    loss, margin = torch.tensor([.5, .7]), torch.tensor([2., 0.])
    values = torch.stack([win, lose, ref_win, ref_lose, loss, margin])
    row = train.log_row(values, 5, 1e-3, torch.tensor(.9), 2.5)
    expected = {"step": 5, "lr": 1e-3, "seconds": 2.5, "loss": .6, "margin": 1., "grad_norm": .9,
                "win_error_gain": .15, "lose_error_gain": -.1, "accuracy": .75,
                "win_error": .15, "ref_error": .3}
    assert row == pytest.approx(expected)


# ---- resume, and stops ----

def interrupt_at(monkeypatch, module, step: int) -> None:
    """Let stage 04 be stopped by Ctrl-C after a step."""
    def interrupt(row, *_):
        if row["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "watch", interrupt)


@pytest.mark.parametrize("trained, k, stop", [("iter0", 0, 2), ("two_rounds", 1, 1)])
def test_resumed_training_equals_the_uninterrupted_one(request, tmp_path, monkeypatch, trained, k,
                                                       stop):
    whole = request.getfixturevalue(trained)
    cut = configure(shutil.copytree(whole.run, tmp_path / "cut"), checkpoint_every=1)
    shutil.rmtree(Path(cut.run) / f"iter{k}")

    module, folder = stage("04"), Path(cut.run) / f"iter{k}"
    interrupt_at(monkeypatch, module, stop)
    with pytest.raises(KeyboardInterrupt):
        module.main(["--run", cut.run, "--iter", str(k)])
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "unet").exists()

    resumed, resumed_log = train_round(cut, k)
    assert same_tensors(weights_of(Path(whole.run), k), resumed)
    pd.testing.assert_frame_equal(log_of(whole, k), resumed_log, check_exact=True)
    if whole.lora_rank:
        assert same_tensors(adapter_of(whole, k), adapter_of(cut, k))
    assert not (folder / "checkpoint.pt").exists()
    steps = pd.read_parquet(Path(cut.run) / "ledger.parquet").optimizer_steps
    assert steps.iloc[-1] == 1                                          # the step that was missing


def zeroed(content: bytes) -> bytes:
    """As after a power cut: the length is right, and a part is nothing."""
    half = len(content) // 2
    return content[:half // 2] + bytes(half) + content[half // 2 + half:]


def pickled(value):
    """A checkpoint that is whole, and no checkpoint of this training."""
    def write(content: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()
    return write


@pytest.mark.parametrize("damage", [
    lambda content: b"",
    lambda content: b"garbage",
    lambda content: content[:len(content) // 2],
    lambda content: bytes(len(content)),
    zeroed,
    pickled([1, 2]),
    pickled({"unet": {"a": torch.ones(2)}, "optimizer": {}, "log": []}),
    pickled({"unet": {}, "step": 1}),
])
def test_a_checkpoint_that_is_none_is_left_aside(seeded, train, tmp_path, capsys, damage):
    s = settings_of(seeded[1])
    policy, _ = train.load_policy_and_reference(s, 0)
    trained = dict(policy.named_parameters())
    optimizer = train.make_optimizer(s, list(trained.values()))
    path = tmp_path / "checkpoint.pt"
    training.save_checkpoint(path, trained, optimizer, [{"step": 0, "loss": .7}])
    assert len(training.load_checkpoint(path, trained, optimizer)) == 1
    assert capsys.readouterr().out == ""

    path.write_bytes(damage(path.read_bytes()))
    assert training.load_checkpoint(path, trained, optimizer) == []
    line = capsys.readouterr().out
    refused(line.strip(), str(path), "begins anew")
    assert distance(policy, base_unet(s)) == 0


def test_a_round_with_a_damaged_checkpoint_begins_anew(iter0, new_run, capsys):
    again = new_run()
    (Path(again.run) / "iter0").mkdir()
    (Path(again.run) / "iter0/checkpoint.pt").write_bytes(b"garbage")
    assert same_tensors(weights_of(Path(iter0.run), 0), train_round(again)[0])
    assert "checkpoint.pt: not usable" in capsys.readouterr().out
    assert not (Path(again.run) / "iter0/checkpoint.pt").exists()


def test_what_a_kill_left_of_a_finished_round_is_removed(two_rounds, tmp_path):
    """At the next start, also of the last round, whose training is not started again."""
    run = shutil.copytree(two_rounds.run, tmp_path / "run")
    left = [run / f"iter{k}/checkpoint.pt" for k in (0, 1)]
    going_on = run / "iter2/checkpoint.pt"
    going_on.parent.mkdir()
    for path in (*left, going_on):
        path.write_bytes(b"a whole checkpoint")
    tidy(run)
    assert not any(path.exists() for path in left)
    assert going_on.exists()


def test_an_adapter_is_saved_before_the_model_that_may_not_fit(two_rounds, new_run, monkeypatch):
    """And the training of the round is not lost."""
    def fail(*_):
        raise MemoryError

    s = new_run(lora_rank=2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(lora, "fuse", fail)
        stage("04").main(["--run", s.run, "--iter", "0"])
    assert same_tensors(adapter_of(s, 0), adapter_of(two_rounds, 0))
    assert not (Path(s.run) / "iter0/unet").exists()

    assert same_tensors(train_round(s)[0], weights_of(Path(two_rounds.run), 0))
    ledger = pd.read_parquet(Path(s.run) / "ledger.parquet")
    assert ledger.optimizer_steps.iloc[-1] == 0
    assert not (Path(s.run) / "iter0/checkpoint.pt").exists()


def test_a_model_is_put_together_off_the_device(new_run, train, monkeypatch):
    """The device holds what was trained, and has no room for a second model."""
    s = new_run(lora_rank=2)
    policy, _ = train.load_policy_and_reference(s, 0)
    devices = []
    load_unet = models.load_unet

    def note(s, k, **options):
        devices.append(s.device)
        return load_unet(s, k, **options)

    monkeypatch.setattr(models, "load_unet", note)
    train.save_model(s, 0, policy)
    assert s.device == "auto"
    assert devices == ["cpu"]


@pytest.mark.parametrize("loss", ["dpo", "mapo"])
def test_what_the_last_step_has_ruined_is_not_saved(new_run, loss):
    """No step follows that would notice."""
    s = new_run(loss=loss, lr=3., iter0_steps=1)
    refused(call("04", Path(s.run), "--iter", "0"), "iter0, step 1", "lower --lr (now 3.0)")
    assert not (Path(s.run) / "iter0/unet").exists()


def test_weights_that_are_not_finite_are_not_saved(train):
    """Also where the errors of a batch do not show it."""
    weights = torch.nn.Parameter(torch.ones(3))
    values = torch.full((6, 2), .1)
    train.watch_result(values, [weights], 1, 4, Settings())
    with torch.no_grad():
        weights[1] = float("inf")
    with pytest.raises(UserError, match="iter1: the trained weights are not finite; lower --lr"):
        train.watch_result(values, [weights], 1, 4, Settings())


def spoil(path: Path) -> Path:
    """Let a file of tensors, which lies in a pack, hold one number that is none; the pack."""
    pack = packs.file_of(path)
    tensors = load_file(pack)
    of_file = [tensor for key, tensor in tensors.items() if key.startswith(path.name)]
    of_file[0].view(-1)[3] = float("inf")
    save_file(tensors, pack)
    return pack


@pytest.mark.parametrize("of, changes, word", [
    (lambda s, pair: latent_path(Path(s.run) / pair.win), {"flip": 0.}, "latent"),
    (lambda s, pair: latent_path(Path(s.run) / pair.lose, True), {"flip": 1.}, "latent"),
    (lambda s, pair: models.PromptEncoder(s).path(pair.prompt), {"loss": "mapo"}, "embedding"),
    (lambda s, pair: models.PromptEncoder(s).path(""), {"prompt_dropout": .9}, "embedding"),
])
def test_what_makes_a_loss_not_finite_is_named_and_made_again(new_run, train, of, changes, word):
    s = new_run(**changes)
    pairs, _ = train.training_pairs(s, 0)
    path = of(s, pairs.iloc[2])
    pack = spoil(path)
    message = call("04", Path(s.run), "--iter", "0")
    refused(message, str(pack), word, "not finite", "delete it")
    assert "--lr" not in message

    pack.unlink()
    assert call("04", Path(s.run), "--iter", "0") is None


def broken(table: pd.DataFrame, column: str, value) -> pd.DataFrame:
    return table.assign(**{column: [*table[column][:1], *[value] * (len(table) - 1)]})


@pytest.mark.parametrize("column, value", [
    ("prompt", None), ("pair_id", None), ("win", None), ("lose", None)])
def test_pairs_of_other_kinds_are_refused(new_run, column, value):
    s = new_run()
    path = Path(s.run) / "seed/pairs.parquet"
    broken(pd.read_parquet(path), column, value).to_parquet(path, index=False)
    refused(call("04", Path(s.run), "--iter", "0"), str(path), "row 2", column, "correct it")


def test_a_round_needs_no_judge_to_tell_of_itself(mini_copy, capsys):
    shutil.rmtree(mini_copy / "iter2/unet")
    (mini_copy / "iter2/judge.json").write_text('{"pairs": "garbage"}')
    assert call("04", mini_copy, "--iter", "2") is None
    assert "Iter2: 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["dpo", "mapo"])
def test_a_run_away_stops_with_advice(new_run, loss):
    s = new_run(loss=loss, lr=3., checkpoint_every=1, iter0_steps=9)
    message = call("04", Path(s.run), "--iter", "0")
    refused(message, "iter0, step", "lower --lr (now 3.0)", "last checkpoint")
    assert "times the reference's" in message or "not finite" in message
    assert (Path(s.run) / "iter0/checkpoint.pt").exists()
    assert not (Path(s.run) / "iter0/unet").exists()


HEALTHY = {"step": 7, "loss": .7, "grad_norm": 1., "win_error": .29, "ref_error": .1}
WITHOUT_REFERENCE = HEALTHY | {"ref_error": float("nan")}


def test_a_healthy_run_goes_on(train):
    train.watch(HEALTHY, 1, Settings())
    train.watch(WITHOUT_REFERENCE, 1, Settings(loss="mapo"))


@pytest.mark.parametrize("loss, row, match", [
    ("dpo", HEALTHY | {"win_error": .31}, "iter1, step 7: .*over 3 times"),
    ("dpo", HEALTHY | {"loss": float("nan")}, "not finite"),
    ("dpo", HEALTHY | {"grad_norm": float("inf")}, "lower --lr"),
    ("dpo", HEALTHY | {"loss": float("nan"), "ref_error": float("nan")}, "use --dtype float32"),
    ("dpo", HEALTHY | {"loss": float("inf"), "step": 0}, "not finite.*use --dtype float32"),
    ("mapo", WITHOUT_REFERENCE | {"loss": float("nan")}, "lower --lr"),
    ("mapo", WITHOUT_REFERENCE | {"win_error": 3.1}, "over 3 times"),
])
def test_what_counts_as_a_run_away(train, loss, row, match):
    with pytest.raises(UserError, match=match):
        train.watch(row, 1, Settings(loss=loss))

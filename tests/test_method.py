"""The equations, against plain computations of their own in float64."""

import math

import numpy as np
import pytest
import torch

from lib import models
from lib.settings import Settings


def plain_error(target, prediction):
    """mean over C, h, w by loops over images, float64."""
    return [float(((t.double() - p.double()) ** 2).sum() / t.numel()) for t, p in zip(target, prediction)]


def test_loss_equals_a_plain_computation(train, rng):
    draw = lambda: torch.rand(16, generator=rng) * .2 + .05
    win, lose, ref_win, ref_lose = draw(), draw(), draw(), draw()
    loss, margin = train.dpo_loss(win, lose, ref_win, ref_lose, beta=5000.)
    for i in range(16):
        w, l, rw, rl = (float(v[i]) for v in (win, lose, ref_win, ref_lose))
        z = -5000 / 2 * ((w - rw) - (l - rl))
        assert float(margin[i]) == pytest.approx(z, rel=1e-5, abs=1e-3)
        assert float(loss[i]) == pytest.approx(math.log1p(math.exp(-z)) if z > -500 else -z, rel=1e-4, abs=1e-6)
    zero, _ = train.dpo_loss(win, lose, win, lose, 5000.)
    assert torch.allclose(zero, torch.full((16,), math.log(2)))


def test_loss_is_averaged_after_the_log_sigmoid(train):
    win, lose = torch.tensor([.1, .3]), torch.tensor([.3, .1])             # one pair right, one as wrong
    loss, _ = train.dpo_loss(win, lose, torch.full((2,), .2), torch.full((2,), .2), 1000.)
    assert loss.mean() > 50                                               # averaged before, it would be log 2


def test_reward_equals_a_plain_computation_and_its_sign(rank, rng):
    error, ref = torch.rand(3, 8, 10, generator=rng), torch.rand(3, 8, 10, generator=rng)
    reward = rank.implicit_reward(error, ref, 5000.).mean(-1)
    by_hand = sum(-2500. * (float(error[1, 4, d]) - float(ref[1, 4, d])) for d in range(10)) / 10
    assert float(reward[1, 4]) == pytest.approx(by_hand, rel=1e-5)
    assert rank.implicit_reward(torch.tensor(.1), torch.tensor(.2), 5000.) > 0       # a smaller error is a reward
    win, lose = rank.best_and_worst(reward)
    assert (reward.gather(1, win[:, None]) >= reward).all() and (reward.gather(1, lose[:, None]) <= reward).all()


def test_random_pair_is_two_candidates_in_order_of_reward(rank, rng):
    rewards = torch.randn(200, 8, generator=rng)
    win, lose = rank.random_pair(rewards, rng)
    assert (rewards.gather(1, win[:, None]) > rewards.gather(1, lose[:, None])).all()
    assert 10 < (win == rewards.argmax(1)).sum() < 90                     # 2 of 8: the best is in a quarter of them


def test_stratified_timesteps_are_one_in_each_part(rank):
    s = Settings(draws=8, rank_t_min=200, rank_t_max=1000, timesteps="stratified")
    drawn = torch.stack([rank.reward_draws(s, (1, n), (2, 2, 2))[0] for n in range(50)])
    assert ((drawn - 200) // 100 == torch.arange(8)).all() and drawn.unique(dim=0).shape[0] > 40
    uniform = torch.stack([rank.reward_draws(Settings(draws=8, rank_t_min=200), (1, n), (2, 2, 2))[0] for n in range(50)])
    assert uniform.min() >= 200 and not ((uniform - 200) // 100 == torch.arange(8)).all()


def test_balanced_weights_make_every_draw_speak_as_loud(rank, rng):
    ref = torch.tensor([[.01, .1, 1.]]) * (1 + .1 * torch.rand(200, 3, generator=rng))
    error = ref * (1 + .05 * torch.randn(200, 3, generator=rng))           # the spread grows with the error
    weights = rank.balance(ref)
    assert weights.mean().item() == pytest.approx(1)
    spread = (weights * rank.implicit_reward(error, ref, 5000.)).std(0)
    assert spread.max() < 1.2 * spread.min()
    plain = rank.implicit_reward(error, ref, 5000.).std(0)
    assert plain.max() > 50 * plain.min()                                  # as it is without them


def test_pairs_of_a_small_margin_are_dropped(rank):
    """A margin counts in its own standard errors, over draws that both pictures share."""
    groups = [{"key": (1, n), "prompt": str(n)} for n in range(2)]
    images = np.array([["a", "b", "c"], ["d", "e", "f"]])
    common = torch.tensor([9., -9., 5., -5.])                              # what a draw adds to all candidates alike
    sure = torch.stack([common + 1, common, common + 3 + torch.tensor([.1, -.1, .1, -.1])])
    unsure = torch.stack([torch.tensor([8., -8., 1., 0.]), torch.zeros(4), torch.full((4,), -.1)])
    for least, kept in ((0., ["0", "1"]), (2., ["0"]), (1e6, [])):
        pairs = rank.make_pairs(Settings(min_margin=least), 1, groups, images, torch.stack([sure, unsure]))
        assert list(pairs.prompt) == kept
    pair = rank.make_pairs(Settings(), 1, groups, images, torch.stack([sure, unsure])).iloc[0]
    assert (pair.win, pair.lose, pair.source) == ("c", "b", "self") and pair.margin == pytest.approx(3)


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return models.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, cross_attention_dim=8)


def batch(rng, b=4):
    return (torch.randn(b, 4, 8, 8, generator=rng), torch.randn(b, 4, 8, 8, generator=rng),
            torch.randint(1000, (b,), generator=rng), {"embeds": torch.randn(b, 5, 8, generator=rng)})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_error_is_the_mean_square_to_the_target(rng, kind):
    scheduler = models.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", prediction_type=kind)
    unet = tiny_unet()
    x0, noise, t, condition = batch(rng)
    abar = torch.cumprod(1 - torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2, 0)[t]
    a, b = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    x_t = (a * x0 + b * noise).float()
    target = noise if kind == "epsilon" else a * noise - b * x0
    with torch.no_grad():
        error = models.denoising_error(unet, scheduler, scheduler.add_noise(x0, noise, t), x0, noise, t, condition)
        expected = plain_error(target, unet(x_t, t, condition["embeds"]).sample)
    assert error.dtype == torch.float32 and error.tolist() == pytest.approx(expected, rel=1e-4)


def test_identical_models_have_reward_zero(rank, rng):
    scheduler = models.DDIMScheduler()
    x0, noise, t, condition = batch(rng, 8)
    with torch.no_grad():
        errors = [models.denoising_error(tiny_unet(), scheduler, scheduler.add_noise(x0, noise, t), x0, noise, t, condition)
                  for _ in range(2)]
    assert (rank.implicit_reward(*errors, 5000.) == 0).all()


def test_a_step_lowers_the_winners_error_and_raises_the_losers(train, rng):
    policy, ref, scheduler = tiny_unet(), tiny_unet().requires_grad_(False), models.DDIMScheduler()
    x0, noise, t, condition = batch(rng, 8)
    noise, t = noise[:4].repeat(2, 1, 1, 1), t[:4].repeat(2)              # shared by winner and loser
    condition = {"embeds": condition["embeds"][:4].repeat(2, 1, 1)}
    errors = lambda unet: models.denoising_error(unet, scheduler, scheduler.add_noise(x0, noise, t), x0, noise, t,
                                                 condition).chunk(2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-6)
    before = train.dpo_loss(*errors(policy), *errors(ref), 5000.)[0].mean()
    before.backward()
    optimizer.step()
    win, lose = errors(policy)
    ref_win, ref_lose = errors(ref)
    loss, margin = train.dpo_loss(win, lose, ref_win, ref_lose, 5000.)
    assert loss.mean() < before and margin.mean() > 0
    assert (win - ref_win).mean() < (lose - ref_lose).mean()
    # and pair by pair, each image pulled its own way when it alone may move
    errors = torch.full((4, 1), .1, requires_grad=True)
    train.dpo_loss(*errors, 5000.)[0].sum().backward()
    assert errors.grad[0] > 0 > errors.grad[1]                            # descent: winner's error down, loser's up


@pytest.mark.parametrize("alpha", [0., .25, .5, 1 / 3, 1.])
def test_mixup_proportions_and_passes(train, rng, alpha):
    n_seed, n_self, length, size = 64, 32, 720, 12
    order = train.mixup(n_seed, n_self, alpha, length, rng)
    is_self = order >= n_seed
    assert int(is_self.sum()) == round(alpha * length)
    assert (is_self.view(-1, size).sum(1) == round(alpha * size)).all()   # in every batch
    for chosen, count in ((order[~is_self], n_seed), (order[is_self] - n_seed, n_self)):
        if len(chosen):                                                   # whole passes: seen equally often, within 1
            seen = chosen.bincount(minlength=count)
            assert seen.max() - seen.min() <= 1 and len(seen) == count


def test_one_pass_uses_each_self_made_pair_once(train):
    s = Settings(iter_steps=0, iter0_steps=0, batch=10, micro_batch=10)
    assert train.steps_of(s, 1, 1000, 100) == 40                          # 100 / 0.25 / 10
    assert train.steps_of(s, 0, 1000, 0) == 100


def test_draws_of_a_step_do_not_depend_on_how_it_is_split(train):
    """What a pair trains on is a function of (seed, round, step, slot)."""
    s = Settings(prompt_dropout=.5)
    one, two = train.step_draws(s, 1, 7, (4, 8, 8)), train.step_draws(s, 1, 7, (4, 8, 8))
    other = train.step_draws(s, 1, 8, (4, 8, 8))
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(one["noise"], other["noise"])
    assert one["posterior"].shape == (2, s.batch, 4, 8, 8) and one["drop"].any()

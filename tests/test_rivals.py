"""The rivals and ablations of lib/rivals by themselves; the stages' tests enter by their doors."""

import numpy as np
import pytest
import torch

from lib.rivals.balanced import balance
from lib.rivals.mapo import mapo_loss
from lib.rivals.random_pair import random_pair

# ---- MaPO ----

NOTHING = torch.tensor(float("nan"))        # MaPO has no reference


def phi(error: float) -> float:
    """s e / (exp(s e) - 1) with s = 1/2, which is 1 at e = 0."""
    if error == 0:
        return 1.
    return .5 * error / np.expm1(.5 * error)


@pytest.mark.parametrize("win, lose", [
    (.1, .2), (.5, .4), (1e-3, 2e-3), (0., 0.), (1e-9, .1), (.2, 1e-9), (2.5, .1)])
def test_mapo_loss_equals_a_plain_computation(win, lose):
    """L = e_w - beta log sigmoid(T (phi(e_w) - phi(e_l))), with beta = .1 and T = 1000."""
    win, lose = torch.tensor([win]), torch.tensor([lose])
    loss, margin = mapo_loss(win, lose, NOTHING, NOTHING, 5000.)

    z = 1000 * (phi(win.double().item()) - phi(lose.double().item()))
    expected = win.item() + .1 * np.logaddexp(0, -z)
    assert margin.item() == pytest.approx(z, rel=1e-4, abs=1e-3)     # phi is float32, times 1000
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_mapo_pulls_the_winner_down_and_pushes_the_loser_up():
    """At equal small errors phi falls by s / 2, and the sigmoid is a half."""
    errors = torch.full((2, 1), .002, requires_grad=True)
    loss, _ = mapo_loss(*errors, NOTHING, NOTHING, 5000.)
    loss.sum().backward()
    contrast = .1 / 2 * 1000 / 4
    assert errors.grad[0].item() == pytest.approx(1 + contrast, rel=.01)
    assert errors.grad[1].item() == pytest.approx(-contrast, rel=.01)


# ---- a random pair ----

def test_the_winner_of_a_random_pair_has_the_higher_reward(rng):
    rewards = torch.randn(200, 8, generator=rng)
    win, lose = random_pair(rewards, rng)
    for prompt in range(200):
        assert rewards[prompt, win[prompt]] > rewards[prompt, lose[prompt]]


def test_a_random_pair_holds_the_best_candidate_as_often_as_chance(rng):
    rewards = torch.randn(400, 8, generator=rng)
    win, _ = random_pair(rewards, rng)
    share = (win == rewards.argmax(1)).float().mean()
    assert .17 < share < .33                # 2 of 8, with 400 prompts: .25 +- .022


# ---- balanced draws ----

@pytest.fixture
def anchor_error(rng) -> torch.Tensor:
    """200 candidates at three draws of very different errors."""
    return torch.tensor([[.01, .1, 1.]]) * (1 + .1 * torch.rand(200, 3, generator=rng))


def test_balanced_weights_have_mean_one(anchor_error):
    assert balance(anchor_error).mean().item() == pytest.approx(1)


def test_balanced_weights_are_the_inverse_of_a_draws_mean_error(anchor_error):
    weights = balance(anchor_error)
    assert weights.shape == (1, 3)
    products = weights * anchor_error.mean(0)
    assert torch.allclose(products, products[0, 0])


def test_balanced_weights_make_every_draw_speak_as_loud(rank, rng, anchor_error):
    """The spread of a draw's reward grows with its error."""
    error = anchor_error * (1 + .05 * torch.randn(200, 3, generator=rng))
    reward = rank.implicit_reward(error, anchor_error, 5000.)
    plain = reward.std(0)
    balanced = (balance(anchor_error) * reward).std(0)
    assert plain.max() > 50 * plain.min()
    assert balanced.max() < 1.2 * balanced.min()


def test_prompts_are_balanced_each_for_itself(anchor_error):
    prompts = torch.stack([anchor_error[:8], 7 * anchor_error[8:16]])
    weights = balance(prompts)
    assert weights.shape == (2, 1, 3)
    assert torch.allclose(weights[0], balance(anchor_error[:8]))
    assert torch.allclose(weights[1], balance(anchor_error[8:16]))

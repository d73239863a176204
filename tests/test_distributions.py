"""Distributions over actions: log-probabilities, entropies, samples, and what the environment gets."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as td
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from foveal.agents.distributions import log_slope, make_distribution

LOW, HIGH = np.array([-0.1, -3.0], np.float32), np.array([0.3, 5.0], np.float32)
SPACES: dict[str, Any] = {
    "categorical": spaces.Discrete(5, start=-2),
    "multi-categorical": spaces.MultiDiscrete([2, 3, 4], start=[1, -1, 0]),
    "bernoulli": spaces.MultiBinary([2, 3]),
    "gaussian": spaces.Box(LOW, HIGH),
    "squashed": spaces.Box(LOW, HIGH),
}


def build(kind: str) -> Any:
    return make_distribution(SPACES[kind], squash=kind == "squashed")


def theirs(kind: str, params: torch.Tensor) -> Any:
    """The same distribution from torch.distributions."""
    if kind == "categorical":
        return td.Categorical(logits=params)
    if kind == "multi-categorical":
        return [td.Categorical(logits=part) for part in params.split([2, 3, 4], -1)]
    if kind == "bernoulli":
        return td.Independent(td.Bernoulli(logits=params), 1)
    mean, log_std = params.chunk(2, -1)
    return td.Independent(td.Normal(mean, log_std.exp()), 1)


def parameters(distribution: Any, *batch: int) -> torch.Tensor:
    params = torch.randn(*batch, distribution.num_logits + distribution.num_log_stds)
    params[..., distribution.num_logits :].clamp_(max=0.5)  # standard deviations below 1.65
    return params


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("batch", [(6,), (3, 4)])
def test_log_probabilities_and_entropies_are_torchs(kind, batch):
    distribution = build(kind)
    params = parameters(distribution, *batch)
    actions = distribution.sample(params, distribution.noise(batch, torch.Generator().manual_seed(0)))
    log_prob, entropy = distribution.log_prob_entropy(params, actions)
    assert log_prob.shape == entropy.shape == batch
    other = theirs(kind, params)
    if kind == "multi-categorical":
        expected = sum(part.log_prob(actions[..., i]) for i, part in enumerate(other))
        expected_entropy: Any = sum(part.entropy() for part in other)
    elif kind == "squashed":
        middle, half = torch.tensor((HIGH + LOW) / 2), torch.tensor((HIGH - LOW) / 2)
        squash = [td.TanhTransform(), td.AffineTransform(middle.double(), half.double(), event_dim=1)]
        squashed = td.TransformedDistribution(theirs(kind, params.double()), squash)
        expected = squashed.log_prob(middle + half * actions.double().tanh()).float()
        noise = distribution.noise((20_000, *batch), torch.Generator().manual_seed(1)).double()
        draws = middle + half * distribution.sample(params.double(), noise).tanh()
        surprise = -squashed.log_prob(draws)
        spread = surprise.std(0) / math.sqrt(len(draws))
        assert ((entropy - surprise.mean(0)).abs() < 4.5 * spread).all()
        expected_entropy = entropy
    else:
        expected, expected_entropy = other.log_prob(actions), other.entropy()
    torch.testing.assert_close(log_prob, expected, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(entropy, expected_entropy)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("by_entropy", [0.0, -0.3])
def test_gradients_in_closed_form_are_autograds(kind, by_entropy):
    distribution = build(kind)
    params = parameters(distribution, 3, 4).double().requires_grad_()
    actions = distribution.sample(params, distribution.noise((3, 4), torch.Generator().manual_seed(0)))
    actions = actions.detach()
    by_log_prob = torch.randn(3, 4, dtype=torch.float64)
    log_prob, entropy = distribution.log_prob_entropy(params, actions)
    loss = (by_log_prob * log_prob + by_entropy * entropy).sum()
    (expected,) = torch.autograd.grad(loss, params)
    with torch.no_grad():
        got = distribution.gradient(params, actions, by_log_prob, by_entropy)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("log_std", [-3.0, -1.0, 0.0, 0.5])
@pytest.mark.parametrize("mean", [0.0, 0.5, -2.0])
def test_entropy_of_the_squashed_gaussian_is_its_integral(mean, log_std):
    distribution = make_distribution(spaces.Box(-3, 1, (1,)), squash=True)
    z = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    u = mean + math.exp(log_std) * z
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    slope = torch.log1p(-u.tanh().square()).clamp(min=-60) + math.log(2)
    expected = log_std + 0.5 * math.log(2 * math.pi * math.e) + torch.trapezoid(density * slope, z)
    params = torch.tensor([mean, log_std], requires_grad=True)
    entropy = distribution.log_prob_entropy(params, torch.zeros(1))[1]
    assert entropy.item() == pytest.approx(expected.item(), abs=2e-3)
    # and it can be maximised: its slope in log_std is 1 - 2 E[tanh(u) z std]
    (gradient,) = torch.autograd.grad(entropy, params)
    wanted = 1 - 2 * torch.trapezoid(density * u.tanh() * z * math.exp(log_std), z)
    assert gradient[1].item() == pytest.approx(wanted.item(), abs=2e-2)


def test_log_slope_far_from_zero():
    u = torch.tensor([-60.0, -3.0, 0.0, 3.0, 60.0], requires_grad=True)
    expected = 2 * math.log(2) - 120
    torch.testing.assert_close(log_slope(u)[[0, -1]], torch.tensor([expected, expected]))
    torch.testing.assert_close(log_slope(u)[1:-1], torch.log(1 - u[1:-1].tanh() ** 2))
    (gradient,) = torch.autograd.grad(log_slope(u).sum(), u)
    torch.testing.assert_close(gradient, -2 * u.tanh())


@pytest.mark.parametrize("kind", SPACES)
def test_samples_have_the_probabilities(kind):
    """Frequencies within 4.5 standard errors; of the Gaussian mean and standard deviation."""
    distribution, n = build(kind), 20_000
    params = parameters(distribution)
    noise = distribution.noise((n,), torch.Generator().manual_seed(3))
    samples = distribution.sample(params, noise)
    if kind in ("gaussian", "squashed"):
        mean, std = params[:2], params[2:].exp()
        assert ((samples.mean(0) - mean).abs() < 4.5 * std / math.sqrt(n)).all()
        assert ((samples.std(0) / std - 1).abs() < 4.5 / math.sqrt(2 * n)).all()
        assert abs(np.corrcoef(samples.T)[0, 1]) < 4.5 / math.sqrt(n), "dimensions are drawn apart"
        return
    columns = samples.reshape(n, -1)
    other = theirs(kind, params)
    if kind == "bernoulli":
        probabilities = [torch.stack([1 - p, p]) for p in params.sigmoid()]
    else:
        probabilities = [part.probs for part in (other if isinstance(other, list) else [other])]
    assert columns.shape[1] == len(probabilities)
    for column, p in zip(columns.unbind(1), probabilities):
        share = torch.bincount(column.long(), minlength=len(p)) / n
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("kind", SPACES)
def test_noise_comes_from_the_generator_alone(kind):
    distribution = build(kind)
    noise = [distribution.noise((4, 3), torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    assert noise[0].shape == (4, 3, distribution.num_logits)
    before = torch.get_rng_state()
    distribution.sample(parameters(distribution, 4, 3), noise[0])
    distribution.noise((1,), torch.Generator().manual_seed(1))
    torch.set_rng_state(before)
    generator = torch.Generator().manual_seed(5)
    first = distribution.noise((1,), generator)
    assert not torch.equal(first, distribution.noise((1,), generator)), "the generator moves on"


@pytest.mark.parametrize("kind", SPACES)
def test_environment_gets_its_own_shapes_types_and_bounds(kind):
    distribution, space = build(kind), SPACES[kind]
    params = parameters(distribution, 50) * 10
    for actions in (
        distribution.sample(params, distribution.noise((50,), torch.Generator().manual_seed(0))),
        distribution.mode(params),
    ):
        given_to_env = distribution.to_env(actions)
        assert given_to_env.shape == (50, *(space.shape or ()))
        assert given_to_env.dtype == space.dtype
        for action in given_to_env:
            assert space.contains(action), action


def test_environment_gets_these_actions():
    def to_env(kind, actions):
        return build(kind).to_env(torch.tensor(actions)).tolist()

    assert to_env("categorical", [0, 4]) == [-2, 2]
    assert to_env("multi-categorical", [[0, 2, 3]]) == [[1, 1, 3]]
    assert to_env("bernoulli", [[1.0, 0, 0, 0, 1, 1]]) == [[[1, 0, 0], [0, 1, 1]]]
    np.testing.assert_allclose(to_env("gaussian", [[0.2, 9.0], [-7.0, 1.5]]), [[0.2, 5.0], [-0.1, 1.5]])
    # tanh(ln 2) = 3/5 of the way from the middle 0.1 to 0.3, and from the middle 1 to 5
    squashed = to_env("squashed", [[math.log(2), -math.log(2)]])
    np.testing.assert_allclose(squashed, [[0.1 + 0.6 * 0.2, 1 - 0.6 * 4]], rtol=1e-6)


@given(st.floats(-1e3, 1e3, width=32), st.floats(2**-10, 1e3, width=32))
def test_squashed_actions_never_leave_the_bounds(low, width):
    space = spaces.Box(np.float32(low), np.float32(low) + np.float32(width), (1,))
    actions = make_distribution(space, squash=True).to_env(torch.tensor([[60.0], [-60.0], [9.0], [-9.0]]))
    assert all(space.contains(action) for action in actions)


@pytest.mark.parametrize("kind", SPACES)
def test_mode_is_the_likeliest(kind):
    distribution = build(kind)
    params = parameters(distribution, 40)
    mode = distribution.mode(params)
    best = distribution.log_prob_entropy(params, mode)[0]
    if kind == "squashed":  # kept before the tanh: the likeliest there
        torch.testing.assert_close(mode, params[:, :2])
        return
    for seed in range(20):
        noise = distribution.noise((40,), torch.Generator().manual_seed(seed))
        other = distribution.log_prob_entropy(params, distribution.sample(params, noise))[0]
        assert (best >= other).all()


@pytest.mark.parametrize("kind", SPACES)
def test_double_precision_stays_double_and_stacks(kind):
    distribution = build(kind)
    params = parameters(distribution, 3, 5).double()
    noise = distribution.noise((3, 5), torch.Generator().manual_seed(0)).double()
    actions = distribution.sample(params, noise)
    log_prob, entropy = distribution.log_prob_entropy(params, actions)
    assert log_prob.dtype == entropy.dtype == torch.float64
    stacked = torch.func.vmap(distribution.log_prob_entropy)(params, actions)
    torch.testing.assert_close(stacked, (log_prob, entropy))
    single = distribution.log_prob_entropy(
        params.float(), actions if kind[-5:] == "rical" else actions.float()
    )
    torch.testing.assert_close(single[0].double(), log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SPACES)
def test_extreme_parameters_give_finite_numbers_and_gradients(kind):
    distribution = build(kind)
    params = (30 * parameters(distribution, 20)).clamp(-60, 60)
    if distribution.num_log_stds:
        params[:, 2:] = params[:, 2:].clamp(-5, 2)
    params.requires_grad_()
    noise = distribution.noise((20,), torch.Generator().manual_seed(0))
    log_prob, entropy = distribution.log_prob_entropy(params, distribution.sample(params, noise).detach())
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), params)
    for tensor in (log_prob, entropy, gradient):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize(
    ("space", "squash", "message"),
    [
        (spaces.Tuple([spaces.Discrete(2)]), False, "ppo takes Discrete, .* got Tuple"),
        (spaces.Text(3), False, "ppo takes Discrete, .* got Text"),
        (spaces.Box(0, 5, (2,), np.int32), False, "ppo takes .* Box actions \\(of floats\\), got Box\\(0, 5"),
        (spaces.Box(0, 255, (2,), np.uint8), True, "ppo takes .*got Box"),
        (spaces.MultiDiscrete(np.full((2, 2), 2)), False, "MultiDiscrete \\(of one axis\\)"),
        (spaces.Dict({"a": spaces.Discrete(2)}), False, "got Dict"),
        (spaces.Discrete(3), True, "squash is for Box actions, got Discrete"),
        (spaces.MultiBinary(3), True, "squash is for Box actions, got MultiBinary"),
        (spaces.Box(-np.inf, np.inf, (1,)), True, "squash needs actions with bounds, got Box"),
        (spaces.Box(np.array([-1, -np.inf], np.float32), 1, (2,)), True, "squash needs actions with bounds"),
    ],
)
def test_other_spaces_are_refused_in_one_line(space, squash, message):
    with pytest.raises(ValueError, match=message) as refused:
        make_distribution(space, squash, "ppo")
    assert "\n" not in str(refused.value)

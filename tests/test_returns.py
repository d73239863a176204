"""Returns: numbers worked out by hand, and sums over each episode written down as they are defined."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foveal.agents import returns

# Any, because a type checker does not count what *args holds.
discounted_returns: Any = returns.discounted_returns
n_step_returns: Any = returns.n_step_returns
gae: Any = returns.gae
q_lambda: Any = returns.q_lambda


class Case(NamedTuple):
    """A rollout, float64; `args` are rewards, next_values, terminated, truncated."""

    args: tuple[Any, ...]
    values: torch.Tensor
    gamma: float
    decay: float
    n: int


numbers = st.floats(-10, 10, width=16)
unit = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def cases(draw):
    """Terminations, truncations, and both at once, anywhere; values at a termination are nonsense."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    ends = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 0, 0, 1, 2, 3])))
    rewards, values, next_values = (draw(hnp.arrays(np.float64, shape, elements=numbers)) for _ in range(3))
    terminated, truncated = ends % 2 == 1, ends >= 2
    next_values[terminated] = np.nan
    args = tuple(torch.from_numpy(x) for x in (rewards, next_values, terminated, truncated))
    return Case(args, torch.from_numpy(values), draw(unit), draw(unit), draw(st.integers(1, 15)))


def by_definition(case, function):
    """function(t, end, rewards, bootstrap) at every step of every environment.

    `end` is the last row of the step's episode in the rollout; bootstrap[t] is the value that follows row t.
    """
    rewards, next_values, terminated, truncated = (x.numpy() for x in case.args)
    result = np.empty_like(rewards)
    for column in range(rewards.shape[1]):
        ended = terminated[:, column] | truncated[:, column]
        ended[-1] = True
        bootstrap = np.where(terminated[:, column], 0.0, next_values[:, column])
        for t in range(len(rewards)):
            end = t + int(np.argmax(ended[t:]))
            result[t, column] = function(t, end, rewards[:, column], bootstrap, column)
    return torch.from_numpy(result)


def n_step(t, end, n, gamma, rewards, bootstrap):
    last = min(t + n - 1, end)
    total = sum(gamma ** (k - t) * rewards[k] for k in range(t, last + 1))
    return total + gamma ** (last - t + 1) * bootstrap[last]


def assert_same(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


HAND: Any = (
    torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2).T,  # rewards
    torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 2).T,  # next values
    torch.tensor([[False, True, False, False], [False] * 4]).T,  # the first column terminates,
    torch.tensor([[False, False, True, False], [False] * 4]).T,  # and is truncated right after
)


@pytest.mark.parametrize(
    ("result", "ending", "whole"),
    [
        (discounted_returns(*HAND, 0.5), [2, 2, 18, 24], [5.75, 9.5, 15, 24]),
        (n_step_returns(*HAND, 0.5, 1), [6, 2, 18, 24], [6, 12, 18, 24]),
        (n_step_returns(*HAND, 0.5, 2), [2, 2, 18, 24], [7, 11, 15, 24]),
        (
            gae(HAND[0], torch.ones(4, 2), *HAND[1:], 0.5, 0.5),
            [5.25, 1, 17, 23],
            [9.171875, 16.6875, 22.75, 23],
        ),
        (q_lambda(*HAND, 0.5, 0.5), [4, 2, 18, 24], [6.28125, 11.125, 16.5, 24]),
    ],
    ids=["discounted", "1-step", "2-step", "gae", "q_lambda"],
)
def test_by_hand(result, ending, whole):
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.tensor([ending, whole], dtype=torch.float32).T)


@settings(max_examples=50)
@given(cases())
def test_discounted_returns_are_the_sum_to_the_end(case):
    expected = by_definition(
        case, lambda t, end, r, boot, _: n_step(t, end, end - t + 1, case.gamma, r, boot)
    )
    assert_same(discounted_returns(*case.args, case.gamma), expected)


@settings(max_examples=50)
@given(cases())
def test_n_step_returns_are_at_most_n_rewards_and_a_value(case):
    expected = by_definition(case, lambda t, end, r, boot, _: n_step(t, end, case.n, case.gamma, r, boot))
    assert_same(n_step_returns(*case.args, case.gamma, case.n), expected)
    one_step = by_definition(case, lambda t, end, r, boot, _: r[t] + case.gamma * boot[t])
    assert_same(n_step_returns(*case.args, case.gamma, 1), one_step)
    longest = n_step_returns(*case.args, case.gamma, len(one_step))
    assert_same(longest, discounted_returns(*case.args, case.gamma))


@settings(max_examples=50)
@given(cases())
def test_gae_is_the_decayed_sum_of_td_errors(case):
    values = case.values.numpy()

    def advantage(t, end, r, boot, column):
        delta = r + case.gamma * boot - values[:, column]
        return sum((case.gamma * case.decay) ** (k - t) * delta[k] for k in range(t, end + 1))

    rewards, *rest = case.args
    result = gae(rewards, case.values, *rest, case.gamma, case.decay)
    assert_same(result, by_definition(case, advantage))


def consistent(case):
    """The values that go with `next_values`: the successor of a step is what the next step starts from."""
    values = case.values.clone()
    going = ~(case.args[2] | case.args[3])[:-1]
    values[1:] = torch.where(going, case.args[1][:-1], values[1:])
    return values


@settings(max_examples=50)
@given(cases())
def test_gae_between_one_step_errors_and_whole_returns(case):
    rewards, next_values, terminated, truncated = case.args
    values = consistent(case)
    rest = (values, next_values, terminated, truncated, case.gamma)
    assert_same(gae(rewards, *rest, 1.0), discounted_returns(*case.args, case.gamma) - values)
    one_step = rewards + case.gamma * torch.where(terminated, 0.0, next_values) - values
    assert_same(gae(rewards, *rest, 0.0), one_step)


@settings(max_examples=50)
@given(cases())
def test_q_lambda_mixes_the_n_step_returns(case):
    """(1 - lambda) sum of lambda^(n-1) G^(n), and what is left for the return to the end."""

    def mixture(t, end, r, boot, _):
        longest = end - t + 1
        returns = [n_step(t, end, n, case.gamma, r, boot) for n in range(1, longest + 1)]
        mixed = sum((1 - case.decay) * case.decay ** (n - 1) * returns[n - 1] for n in range(1, longest))
        return mixed + case.decay ** (longest - 1) * returns[-1]

    result = q_lambda(*case.args, case.gamma, case.decay)
    assert_same(result, by_definition(case, mixture))
    # and they are what generalised advantages add to the values
    rewards, *rest = case.args
    values = consistent(case)
    assert_same(result, gae(rewards, values, *rest, case.gamma, case.decay) + values)


FUNCTIONS: Any = {
    "discounted": lambda *args: discounted_returns(*args, 0.9),
    "n_step": lambda *args: n_step_returns(*args, 0.9, 3),
    "gae": lambda rewards, next_values, *ends: gae(rewards, rewards * 2, next_values, *ends, 0.9, 0.8),
    "q_lambda": lambda *args: q_lambda(*args, 0.9, 0.8),
}


def rollout(*shape):
    rewards, next_values = torch.randn(2, *shape)
    terminated, truncated = torch.rand(2, *shape) < 0.2
    return rewards, next_values, terminated, truncated


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_more_axes_and_seeds_side_by_side(name):
    """(T, N, 4) is four rollouts of (T, N), and so is (4, T, N) under vmap."""
    args = rollout(9, 3, 4)
    together = FUNCTIONS[name](*args)
    stacked = torch.func.vmap(FUNCTIONS[name], in_dims=2, out_dims=2)(*args)
    for i in range(4):
        alone = FUNCTIONS[name](*(x[..., i] for x in args))
        torch.testing.assert_close(together[..., i], alone)
        torch.testing.assert_close(stacked[..., i], alone)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("steps", [1, 2, 6, 33])
def test_doubling_gives_what_going_row_by_row_gives(name, steps, monkeypatch):
    args = [x.double() if x.is_floating_point() else x for x in rollout(steps, 3)]
    results = []
    for few in (0, 100):
        monkeypatch.setattr(returns, "FEW", few)
        results.append(FUNCTIONS[name](*args))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_gradients_reach_rewards_and_values(name):
    rewards, next_values, *ends = rollout(6, 2)
    inputs = [x.double().requires_grad_() for x in (rewards, next_values)]
    assert torch.autograd.gradcheck(lambda *given: FUNCTIONS[name](*given, *ends), inputs)


@pytest.mark.slow  # torch's compiler takes its time to start
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_compiles_as_one_graph(name):
    args = rollout(6, 2)
    compiled: Any = torch.compile(FUNCTIONS[name], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), FUNCTIONS[name](*args))


def test_no_rewards_ahead_is_refused():
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        n_step_returns(*rollout(3, 2), 0.9, 0)

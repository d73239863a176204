"""Recurrent cores: the numbers of torch.nn's, resets inside of sequences, stacking over seeds."""

from typing import Any

import pytest
import torch

from foveal.agents.recurrent import CORES, unroll

T, N, INPUTS, SIZE = 7, 3, 4, 5


def make(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    core: Any = CORES[kind](INPUTS, SIZE)
    for name, parameter in core.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return core


def torchs(kind: str, core: Any) -> Any:
    """torch.nn's module with the weights of ours."""
    other: Any = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](INPUTS, SIZE)
    with torch.no_grad():
        other.weight_ih_l0.copy_(core.weight_ih)
        other.weight_hh_l0.copy_(core.weight_hh)
        if kind == "lstm":
            other.bias_ih_l0.copy_(core.bias)
            other.bias_hh_l0.zero_()
        else:
            other.bias_ih_l0.copy_(core.bias_ih)
            other.bias_hh_l0.copy_(core.bias_hh)
    return other


def run_torchs(kind: str, other: Any, x: torch.Tensor, state: torch.Tensor) -> tuple[Any, Any]:
    if kind == "gru":
        output, last = other(x, state.unsqueeze(0))
        return output, last[0]
    h, c = (part.unsqueeze(0).contiguous() for part in state.chunk(2, -1))
    output, (h, c) = other(x, (h, c))
    return output, torch.cat([h[0], c[0]], -1)


@pytest.mark.parametrize("kind", CORES)
def test_outputs_states_and_gradients_are_torchs(kind):
    core = make(kind)
    other = torchs(kind, core)
    assert core.state_size == (2 if kind == "lstm" else 1) * SIZE
    x = torch.randn(T, N, INPUTS, requires_grad=True)
    state = torch.randn(N, core.state_size, requires_grad=True)
    output, states = unroll(core, x, state, torch.zeros(T, N, dtype=torch.bool))
    expected, last = run_torchs(kind, other, x, state)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(states[-1], last)
    weights = torch.randn_like(output)

    def gradients(module, output, last):
        loss = (output * weights).sum() + last.square().sum()
        return torch.autograd.grad(loss, [x, state, *module.parameters()])

    ours, theirs = gradients(core, output, states[-1]), gradients(other, expected, last)
    for one, two in zip(ours, theirs):  # of the LSTM's two biases, one
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CORES)
def test_every_state_is_where_the_sequence_goes_on_from(kind):
    core = make(kind)
    x, state, starts = torch.randn(T, N, INPUTS), torch.randn(N, core.state_size), torch.rand(T, N) < 0.3
    output, states = unroll(core, x, state, starts)
    for t in range(T - 1):
        rest, _ = unroll(core, x[t + 1 :], states[t], starts[t + 1 :])
        torch.testing.assert_close(rest, output[t + 1 :])
        one, after = core.step(core.project(x[t + 1]), states[t] * ~starts[t + 1].unsqueeze(-1))
        torch.testing.assert_close(one, output[t + 1])
        torch.testing.assert_close(after, states[t + 1])


@pytest.mark.parametrize("kind", CORES)
def test_a_reset_in_a_sequence_is_a_new_sequence(kind):
    """Nothing crosses a start, neither forward nor in gradients, and only where there is one."""
    core = make(kind)
    x = torch.randn(T, N, INPUTS, requires_grad=True)
    state = torch.randn(N, core.state_size, requires_grad=True)
    starts = torch.zeros(T, N, dtype=torch.bool)
    starts[3, 0] = starts[0, 1] = starts[5, 1] = True
    output, _ = unroll(core, x, state, starts)
    free = torch.zeros(T, 1, dtype=torch.bool)

    def alone(first, last, env, before):
        return unroll(core, x[first:last, env : env + 1], before, free[first:last])[0]

    zeros = torch.zeros(1, core.state_size)
    torch.testing.assert_close(output[:3, :1], alone(0, 3, 0, state[:1]))
    torch.testing.assert_close(output[3:, :1], alone(3, T, 0, zeros))
    torch.testing.assert_close(output[:5, 1:2], alone(0, 5, 1, zeros))
    torch.testing.assert_close(output[5:, 1:2], alone(5, T, 1, zeros))
    torch.testing.assert_close(output[:, 2:], alone(0, T, 2, state[2:]))
    to_x, to_state = torch.autograd.grad(output[-1].square().sum(), [x, state])
    reached = to_x.abs().sum(-1) > 0  # (T, N)
    assert reached[:, 0].tolist() == [False] * 3 + [True] * 4
    assert reached[:, 1].tolist() == [False] * 5 + [True] * 2
    assert reached[:, 2].all()
    assert (to_state.abs().sum(-1) > 0).tolist() == [False, False, True]


@pytest.mark.parametrize("kind", CORES)
def test_cores_stack_over_seeds(kind):
    """vmap over stacked weights, forward and gradient, gives each seed's own."""
    cores = [make(kind, seed) for seed in range(3)]
    stacked, _ = torch.func.stack_module_state(cores)
    x, state = torch.randn(3, T, N, INPUTS), torch.randn(3, N, cores[0].state_size)
    starts = torch.rand(3, T, N) < 0.3

    class Unroll(torch.nn.Module):
        def __init__(self, core):
            super().__init__()
            self.core = core

        def forward(self, *arguments):
            return unroll(self.core, *arguments)

    def loss(parameters, *arguments):
        parameters = {f"core.{name}": value for name, value in parameters.items()}
        output, states = torch.func.functional_call(Unroll(cores[0]), parameters, arguments)
        return output.square().sum() + states[-1].sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(stacked, x, state, starts)
    for i, core in enumerate(cores):
        output, states = unroll(core, x[i], state[i], starts[i])
        own = torch.autograd.grad(output.square().sum() + states[-1].sum(), list(core.parameters()))
        for gradient, (name, _) in zip(own, core.named_parameters()):
            torch.testing.assert_close(gradients[name][i], gradient, rtol=1e-4, atol=1e-4)

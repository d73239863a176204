"""Recurrent cores of plain matrix products, which torch.func can stack over seeds (nn.LSTM and nn.GRU it
refuses).

A state is one tensor (N, S), zeros at the start of an episode.
"""

import torch
from torch import Tensor, nn

from .initialization import orthogonal_


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with the gates of torch.nn.LSTM in its order.

    The state holds h and c: S = 2 `size`.
    """

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.size, self.state_size = size, 2 * size
        self.weight_ih = nn.Parameter(torch.empty(4 * size, inputs))
        self.weight_hh = nn.Parameter(torch.empty(4 * size, size))
        self.bias = nn.Parameter(torch.zeros(4 * size))
        for weight in (self.weight_ih, self.weight_hh):
            orthogonal_(weight)

    def project(self, x: Tensor) -> Tensor:
        """What does not depend on the state, for all steps at once: (..., inputs) -> (..., 4 size)."""
        return torch.nn.functional.linear(x, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 4 size), (N, S) -> output (N, size), state (N, S)."""
        h, c = state.chunk(2, -1)
        gates = torch.addmm(projected, h, self.weight_hh.T)
        # One sigmoid over all four, though g has no use for it: fewer kernels, which is what a step consists
        # of.
        i, f, _, o = gates.sigmoid().chunk(4, -1)
        g = gates[..., 2 * self.size : 3 * self.size].tanh()
        c = torch.addcmul(f * c, i, g)
        h = o * c.tanh()
        return h, torch.cat([h, c], -1)


class GRU(nn.Module):
    """Gated recurrent unit (Cho et al. 2014, 1406.1078), with the gates of torch.nn.GRU in its order; S =
    `size`."""

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.size = self.state_size = size
        self.weight_ih = nn.Parameter(torch.empty(3 * size, inputs))
        self.weight_hh = nn.Parameter(torch.empty(3 * size, size))
        self.bias_ih = nn.Parameter(torch.zeros(3 * size))
        self.bias_hh = nn.Parameter(torch.zeros(3 * size))
        for weight in (self.weight_ih, self.weight_hh):
            orthogonal_(weight)

    def project(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight_ih, self.bias_ih)

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        split = (2 * self.size, self.size)
        x_gates, x_new = projected.split(split, -1)
        h_gates, h_new = torch.nn.functional.linear(state, self.weight_hh, self.bias_hh).split(split, -1)
        r, z = (x_gates + h_gates).sigmoid().chunk(2, -1)
        new = torch.addcmul(x_new, r, h_new).tanh()
        h = torch.lerp(new, state, z)
        return h, h


class RNN(nn.Module):
    """The plain recurrent net, ReLU(W x + V h + b) (Mnih et al. 2014, 1406.6247, section 4); S = `size`.

    V starts as the identity, with which such a net remembers from the first (Le et al. 2015, 1504.00941).
    """

    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.size = self.state_size = size
        self.weight_ih = nn.Parameter(torch.empty(size, inputs))
        self.weight_hh = nn.Parameter(torch.eye(size))
        self.bias = nn.Parameter(torch.zeros(size))
        orthogonal_(self.weight_ih)

    def project(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight_ih, self.bias)

    def step(self, projected: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.addmm(projected, state, self.weight_hh.T).relu()
        return h, h


CORES: dict[str, type[LSTM] | type[GRU]] = {"lstm": LSTM, "gru": GRU}


def unroll(core: LSTM | GRU, x: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Run a core over time: x (T, N, inputs), state (N, S) before the first step, starts (T, N) bool, True
    where a step is the first of an episode and the state before it is forgotten.

    Returns outputs (T, N, size) and the states after each step (T, N, S).
    """
    keep = (~starts).to(x.dtype).unsqueeze(-1)  # (T, N, 1)
    outputs, states = [], []
    for projected, kept in zip(core.project(x).unbind(), keep.unbind()):
        output, state = core.step(projected, state * kept)
        outputs.append(output)
        states.append(state)
    return torch.stack(outputs), torch.stack(states)

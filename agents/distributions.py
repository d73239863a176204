"""Policies' distributions over actions, one for each kind of action space.

All of them are functions of a tensor of parameters (..., P), which a network gives. Noise is drawn apart from
sampling, for a whole rollout at once, so that acting draws nothing, is the same on every device, and can be
captured in a CUDA graph. Actions are kept as the distribution has them; `to_env` makes the environment's.
"""

import math
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor


class Distribution(Protocol):
    """A distribution over the actions of one space; leading axes (...) are any batch."""

    num_logits: int
    """Width of a network's output for it."""
    num_log_stds: int
    """Parameters beside, which do not depend on the observation; they are appended to the output."""

    def noise(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise (*batch, K) for `sample`, on the generator's device."""

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Actions (..., K), or (...) for Discrete, from parameters (..., P)."""

    def mode(self, params: Tensor) -> Tensor:
        """The likeliest actions."""

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """log p(actions) and the entropy, both (...), in nats."""

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        """d loss / d params (..., P) in closed form, from d loss / d log p(actions) (...) and d loss / d
        entropy, one number for all."""

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Actions (B, ...) as the environment takes them."""


def make_distribution(space: spaces.Space, squash: bool = False, agent: str = "the agent") -> Distribution:
    """The distribution for an action space. ValueError, which names `agent`, for a space it does not take."""
    got = " ".join(str(space).split())  # arrays print over several lines
    if squash and not isinstance(space, spaces.Box):
        raise ValueError(f"squash is for Box actions, got {got}")
    match space:
        case spaces.Discrete():
            return Categorical(space)
        case spaces.MultiDiscrete() if space.nvec.ndim == 1:
            return MultiCategorical(space)
        case spaces.MultiBinary():
            return Bernoulli(space)
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            if not squash:
                return Gaussian(space)
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise ValueError(f"squash needs actions with bounds, got {got}")
            return SquashedGaussian(space)
    raise ValueError(
        f"{agent} takes Discrete, MultiDiscrete (of one axis), MultiBinary and Box actions (of floats), "
        f"got {got}"
    )


def gumbel(batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gumbel(0, 1) noise: argmax(logits + noise) is a draw from the softmax."""
    exponential = torch.empty(batch, device=generator.device).exponential_(generator=generator)
    return exponential.log_().neg_()


def softmax_gradient(logits: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
    """`Distribution.gradient` of one choice: d log p_a / d logit_i = [i = a] - p_i, and
    d H / d logit_i = -p_i (log p_i + H)."""
    log_p = logits.log_softmax(-1)
    p, by_log_prob = log_p.exp(), by_log_prob.unsqueeze(-1)
    gradient = (p * -by_log_prob).scatter_add_(-1, actions.unsqueeze(-1), by_log_prob)
    if by_entropy:
        negative = p * log_p  # entropy, each action's share of it
        gradient -= by_entropy * (negative - p * negative.sum(-1, keepdim=True))
    return gradient


class Categorical:
    """One of n actions: a softmax over n logits. Actions (...) int64, from 0."""

    num_log_stds = 0

    def __init__(self, space: spaces.Discrete):
        self.num_logits, self.start = int(space.n), int(space.start)

    def noise(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return gumbel((*batch, self.num_logits), generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return (params + noise).argmax(-1)

    def mode(self, params: Tensor) -> Tensor:
        return params.argmax(-1)

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_p = params.log_softmax(-1)
        # A gather, whose gradient is one kernel here and four there.
        nll = F.nll_loss(log_p.flatten(0, -2), actions.flatten(), reduction="none")
        return -nll.view(actions.shape), -(log_p.exp() * log_p).sum(-1)

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        return softmax_gradient(params, actions, by_log_prob, by_entropy)

    def to_env(self, actions: Tensor) -> np.ndarray:
        return actions.numpy(force=True) + self.start


class MultiCategorical:
    """K independent choices: a softmax for each. Actions (..., K) int64, from 0."""

    num_log_stds = 0

    def __init__(self, space: spaces.MultiDiscrete):
        self.sizes = [int(n) for n in space.nvec]
        self.num_logits, self.start = sum(self.sizes), np.asarray(space.start)

    def noise(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return gumbel((*batch, self.num_logits), generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return self.mode(params + noise)

    def mode(self, params: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in params.split(self.sizes, -1)], -1)

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_p = [part.log_softmax(-1) for part in params.split(self.sizes, -1)]
        chosen = [part.gather(-1, column.unsqueeze(-1)) for part, column in zip(log_p, actions.unbind(-1))]
        log_p_all = torch.cat(log_p, -1)
        return torch.cat(chosen, -1).sum(-1), -(log_p_all.exp() * log_p_all).sum(-1)

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        parts = zip(params.split(self.sizes, -1), actions.unbind(-1))
        return torch.cat([softmax_gradient(*part, by_log_prob, by_entropy) for part in parts], -1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        return actions.numpy(force=True) + self.start


class Bernoulli:
    """Independent bits: a logit for each. Actions (..., n) float32, 0 or 1."""

    num_log_stds = 0

    def __init__(self, space: spaces.MultiBinary):
        self.shape, self.dtype = space.shape, space.dtype
        self.num_logits = math.prod(space.shape)

    def noise(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        # The difference of two Gumbels is logistic: the softmax over two logits, of which one is 0.
        first, second = (gumbel((*batch, self.num_logits), generator) for _ in range(2))
        return first - second

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        return self.mode(params + noise)

    def mode(self, params: Tensor) -> Tensor:
        return (params > 0).float()

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_prob = (actions * params - F.softplus(params)).sum(-1)
        # H = p softplus(-x) + (1 - p) softplus(x) = softplus(x) - p x
        return log_prob, (F.softplus(params) - params.sigmoid() * params).sum(-1)

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        p = params.sigmoid()
        return by_log_prob.unsqueeze(-1) * (actions - p) - by_entropy * params * p * (1 - p)

    def to_env(self, actions: Tensor) -> np.ndarray:
        return actions.numpy(force=True).astype(self.dtype).reshape(-1, *self.shape)


class Gaussian:
    """Independent normal actions, whose standard deviations are parameters of their own, the same in every
    state. Actions (..., A) float32; the environment gets them cut to its bounds, learning sees them uncut."""

    def __init__(self, space: spaces.Box):
        self.space = space
        self.num_logits = self.num_log_stds = math.prod(space.shape)

    def noise(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn((*batch, self.num_logits), generator=generator, device=generator.device)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = params.chunk(2, -1)
        return mean + log_std.exp() * noise

    def mode(self, params: Tensor) -> Tensor:
        return params.chunk(2, -1)[0]

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = params.chunk(2, -1)
        scaled = (actions - mean) * (-log_std).exp()
        constant = 0.5 * math.log(2 * math.pi)
        log_prob = (-0.5 * scaled.square() - log_std - constant).sum(-1)
        return log_prob, (log_std + 0.5 + constant).sum(-1)

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        mean, log_std = params.chunk(2, -1)
        inverse, by_log_prob = (-log_std).exp(), by_log_prob.unsqueeze(-1)
        scaled = (actions - mean) * inverse
        by_log_std = by_log_prob * (scaled.square() - 1) + by_entropy
        return torch.cat([by_log_prob * scaled * inverse, by_log_std], -1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        array = actions.numpy(force=True).reshape(-1, *self.space.shape)
        return np.clip(array, self.space.low, self.space.high).astype(self.space.dtype)


# Gauss-Hermite quadrature: an integral over the standard normal as a sum, exact for polynomials of degree 31.
_NODES, _WEIGHTS = (
    torch.as_tensor(part, dtype=torch.float32) for part in np.polynomial.hermite_e.hermegauss(16)
)
_WEIGHTS = _WEIGHTS / math.sqrt(2 * math.pi)


class SquashedGaussian(Gaussian):
    """A Gaussian through tanh, stretched to the bounds of the space, so that nothing is ever cut.

    Actions are kept before the tanh, u (..., A), which no rounding can bring to an infinite log p.
    """

    def __init__(self, space: spaces.Box):
        super().__init__(space)
        self.middle, self.half = (space.high + space.low) / 2, (space.high - space.low) / 2
        self.log_half = float(np.log(self.half).sum())

    def log_prob_entropy(self, params: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_prob, entropy = super().log_prob_entropy(params, actions)
        mean, log_std = (part.unsqueeze(-1) for part in params.chunk(2, -1))  # (..., A, 1)
        # H(tanh u) = H(u) + E log |d tanh u / du|: no closed form, but one smooth integral a dimension.
        slopes = log_slope(mean + log_std.exp() * _NODES.to(params)) @ _WEIGHTS.to(params)
        return (
            log_prob - log_slope(actions).sum(-1) - self.log_half,
            entropy + slopes.sum(-1) + self.log_half,
        )

    def gradient(self, params: Tensor, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        gradient = super().gradient(params, actions, by_log_prob, by_entropy)
        if by_entropy:
            mean, log_std = (part.unsqueeze(-1) for part in params.chunk(2, -1))  # (..., A, 1)
            noise, weights = log_std.exp() * _NODES.to(params), _WEIGHTS.to(params)
            slopes = -2 * (mean + noise).tanh()  # of log_slope
            gradient += by_entropy * torch.cat([slopes @ weights, (slopes * noise) @ weights], -1)
        return gradient

    def to_env(self, actions: Tensor) -> np.ndarray:
        array = actions.tanh().numpy(force=True).reshape(-1, *self.space.shape)
        array = self.middle + self.half * array
        return np.clip(array, self.space.low, self.space.high).astype(self.space.dtype)  # rounding alone


def log_slope(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2), without overflow."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))

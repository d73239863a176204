"""A network with a policy and a value: what REINFORCE, A2C and PPO learn."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from .agent import map_tensors
from .distributions import Distribution
from .initialization import orthogonal_
from .normalization import ObservationNormalizer
from .recurrent import CORES, unroll
from .small import Layers, plain_layers


class ActorCritic(nn.Module):
    """Observations to the parameters of a distribution over actions, and to a value.

    Both read the features of one encoder, or each has its own (`value_encoder`). With a recurrent core, after
    each encoder, there is a state (N, S) that goes from step to step; without one S is 0.
    """

    def __init__(
        self,
        encoder: nn.Module,
        value_encoder: nn.Module | None,
        space: spaces.Space,
        distribution: Distribution,
        recurrent: str | None = None,
        recurrent_size: int = 64,
        log_std_init: float = 0.0,
        normalize: bool = False,
        orthogonal: bool = True,
    ):
        super().__init__()
        self.normalizer = ObservationNormalizer(space) if normalize else None
        self.encoder, self.value_encoder = encoder, value_encoder
        features: Any = encoder.features_dim
        self.core = self.value_core = None
        if recurrent is not None:
            self.core = CORES[recurrent](features, recurrent_size)
            if value_encoder is not None:
                self.value_core = CORES[recurrent](features, recurrent_size)
            features = recurrent_size
        self.policy_head = nn.Linear(features, distribution.num_logits)
        self.value_head = nn.Linear(features, 1)
        # Small weights make the first policy nearly uniform, whatever the observation (Andrychowicz et al.
        # 2020, 2006.05990, section 3.2); biases start at zero.
        for head, gain in ((self.policy_head, 0.01), (self.value_head, 1.0)):
            if orthogonal:
                orthogonal_(head.weight, gain)
                nn.init.zeros_(head.bias)
        self.log_std = None
        if distribution.num_log_stds:
            self.log_std = nn.Parameter(torch.full((distribution.num_log_stds,), log_std_init))
        cores = [core for core in (self.core, self.value_core) if core is not None]
        self.state_size = sum(core.state_size for core in cores)

    def forward(self, obs: Any, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole sequences: obs (T, N, ...), state (N, S) before them, starts (T, N) bool, True where a step
        is the first of an episode -> parameters (T, N, P), values (T, N), states after each step (T, N,
        S)."""
        shape = starts.shape
        obs = map_tensors(lambda x: x.flatten(0, 1), obs)
        if self.normalizer is not None:
            obs = self.normalizer(obs)
        features = value_features = self.encoder(obs)
        if self.value_encoder is not None:
            value_features = self.value_encoder(obs)
        states = state.expand(*shape, -1)
        if self.core is not None:
            parts = state.split([core.state_size for core in (self.core, self.value_core) if core], -1)
            features, states = unroll(self.core, features.unflatten(0, shape), parts[0], starts)
            features = value_features_of_core = features.flatten(0, 1)
            if self.value_core is not None:
                value_features, value_states = unroll(
                    self.value_core, value_features.unflatten(0, shape), parts[1], starts
                )
                states = torch.cat([states, value_states], -1)
                value_features = value_features.flatten(0, 1)
            else:
                value_features = value_features_of_core
        values = self.value_head(value_features).view(shape)
        return self.parameters_of(self.policy_head(features)).unflatten(0, shape), values, states

    def act(
        self,
        obs: Any,
        state: Tensor,
        starts: Tensor,
        logits_of: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: obs (N, ...), state (N, S), starts (N,) -> parameters (N, P), state (N, S).

        `logits_of`, given normalised observations, may take the place of encoder and head where there is no
        memory."""
        if self.core is not None:  # the value's core has to see every step too
            params, _, states = self(map_tensors(lambda x: x.unsqueeze(0), obs), state, starts.unsqueeze(0))
            return params[0], states[0]
        if self.normalizer is not None:
            obs = self.normalizer(obs)
        logits = self.policy_head(self.encoder(obs)) if logits_of is None else logits_of(obs)
        return self.parameters_of(logits), state

    def parameters_of(self, logits: Tensor) -> Tensor:
        """The head's output (B, L) -> parameters of the distribution (B, P)."""
        if self.log_std is None:
            return logits
        return torch.cat([logits, self.log_std.expand_as(logits)], -1)


class PlainLearner:
    """Policy and value where they are `plain` networks of their own: outputs, and gradients by the chain
    rule, in half of the time that autograd takes."""

    def __init__(
        self, network: ActorCritic, policy: Layers, value: Layers, gradient_of: Mapping[Tensor, Tensor]
    ):
        """`gradient_of` says where the gradient of each parameter goes."""
        self.network, self.policy, self.value, self.gradient_of = network, policy, value, gradient_of

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (T, N, n) -> parameters (T, N, P), values (T, N)."""
        x = obs.flatten(0, 1)
        if self.network.normalizer is not None:
            x = self.network.normalizer(x)
        params = self.network.parameters_of(self.policy.forward(x))
        return params.unflatten(0, obs.shape[:2]), self.value.forward(x).view(obs.shape[:2])

    def backward(self, by_params: Tensor, by_values: Tensor) -> None:
        """d loss / d outputs of the last `forward` -> d loss / d parameters, where they go.

        Steps at the end that the loss does not depend on may be left out.
        """
        logits, log_std = by_params.flatten(0, -2).tensor_split([self.network.policy_head.out_features], -1)
        self.policy.backward(logits)
        self.value.backward(by_values.reshape(-1, 1))
        if self.network.log_std is not None:
            torch.sum(log_std, 0, out=self.gradient_of[self.network.log_std])


def plain_learner(
    network: ActorCritic, space: spaces.Space, gradient_of: Mapping[Tensor, Tensor]
) -> PlainLearner | None:
    """For a network without memory or shared parts, all of whose parameters are trained; else None."""
    if network.value_encoder is None or network.core is not None:
        return None
    policy = plain_layers(network.encoder, network.policy_head, space, gradient_of)
    value = plain_layers(network.value_encoder, network.value_head, space, gradient_of)
    return PlainLearner(network, policy, value, gradient_of) if policy and value else None

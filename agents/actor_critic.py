"""A2C, synchronous advantage actor-critic: "Asynchronous methods for deep reinforcement learning" (Mnih et al.
2016, 1602.01783), all environments stepped together and learned from at once.

Advantages are n-step returns minus values, as in the paper, or generalised advantage estimates (Schulman et al.
2015, 1506.02438).
"""

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..envs import VectorEnv
from .agent import Row, UnmadeEnv, check_finite, passes
from .distributions import Distribution
from .on_policy import OnPolicyAgent, PolicyConfig, Report, Rollout
from .optimization import adam_state, adam_step, clip_norm, linear, rmsprop_state, rmsprop_step, take_gradient
from .returns import gae, n_step_returns


@dataclass(frozen=True)
class A2CConfig(PolicyConfig):
    """Hyper-parameters of A2C."""

    num_steps: int = 5
    """Steps of each environment between two updates."""
    advantage: Literal["n-step", "gae"] = "n-step"
    """Rewards to the end of the rollout and the value there, or generalised advantage estimates."""
    gae_lambda: float = 0.95
    """Trade between bias (0) and variance (1) of generalised advantage estimates, in [0, 1]."""
    normalize_advantage: bool = False
    """Advantages of an update to mean 0 and variance 1."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSprop as in TensorFlow (epsilon inside of the root), or Adam."""
    optimizer_eps: float = 1e-5
    """The optimizer's epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be 1 or more, got {self.num_steps}")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must be between 0 and 1, got {self.gae_lambda}")
        if not self.optimizer_eps > 0:
            raise ValueError(f"optimizer_eps must be greater than 0, got {self.optimizer_eps}")
        for name, choices in (("advantage", ("n-step", "gae")), ("optimizer", ("rmsprop", "adam"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")


# Settings known to work, by environment id. Advantages over 16 steps, normalised, and Adam with a step size that
# falls to zero learn these several times as fast as the paper's settings, which are the defaults.
ADAM_GAE: dict[str, Any] = {
    "num_steps": 16,
    "advantage": "gae",
    "normalize_advantage": True,
    "optimizer": "adam",
    "learning_rate": 2e-3,
    "learning_rate_final": 0.0,
}
RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {**ADAM_GAE, "gamma": 0.98},
    "Acrobot-v*": {**ADAM_GAE, "num_envs": 16, "normalize_observations": True},
    "LunarLander-v*": {**ADAM_GAE, "num_envs": 16, "gamma": 0.995},
    "ALE/*": {"num_envs": 16, "entropy_coefficient": 0.01, "value_coefficient": 0.25, "share_encoder": True},
    "MinAtar/*": {**ADAM_GAE, "num_envs": 16, "entropy_coefficient": 0.01, "share_encoder": True},
}


def recipe(env_id: str, **changes: Any) -> A2CConfig:
    """The settings known to work on an environment (the defaults where none are), with `changes` made."""
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
    return A2CConfig(**{**settings, **changes})


LOSSES = ("policy_loss", "value_loss", "entropy")


def a2c_loss(
    distribution: Distribution,
    params: Tensor,
    values: Tensor,
    actions: Tensor,
    advantages: Tensor,
    returns: Tensor,
    weights: Tensor,
    config: A2CConfig,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and `LOSSES` (3,), from what the network gives for a rollout: parameters (T, N, P) and
    values (T, N), with actions (T, N, ...), advantages and returns (T, N), which carry no gradient.

    `weights` (3,) are those of `LOSSES` in the sum.
    """
    log_prob, entropy = distribution.log_prob_entropy(params, actions)
    if config.normalize_advantage and advantages.numel() > 1:
        std, mean = torch.std_mean(advantages)
        advantages = (advantages - mean) / (std + 1e-8)
    if not config.entropy_coefficient:
        entropy = entropy.detach()
    # One mean for all of them: small kernels are what an update of a small network consists of.
    losses = torch.stack([-advantages * log_prob, (returns - values).square(), entropy]).flatten(1).mean(1)
    return losses @ weights, losses.detach()


class A2C(OnPolicyAgent):
    """Synchronous advantage actor-critic, with or without memory.

    Takes Discrete, MultiDiscrete, MultiBinary and Box actions, and any observations an encoder takes.

    >>> from foveal.agents import A2C
    >>> agent = A2C("CartPole-v1", seed=1).learn(400, progress=False)
    >>> agent.predict(agent.env.reset(), deterministic=True)[0].shape
    (8,)
    """

    name: ClassVar[str] = "a2c"
    Config: ClassVar[type] = A2CConfig
    recipe = staticmethod(recipe)
    config: A2CConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: A2CConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        rmsprop = self.config.optimizer == "rmsprop"
        self.moments: Any = (rmsprop_state if rmsprop else adam_state)(self.weights.detach())
        weights = [1.0, self.config.value_coefficient, -self.config.entropy_coefficient]
        self.loss_weights = torch.tensor(weights, device=self.device)
        self.optimizer_step: Callable[..., None] = rmsprop_step if rmsprop else adam_step

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        config = self.config
        self.start()
        report = Report(self, LOSSES)
        self.prime()
        while self.env_step < total_steps or not self.grad_step:  # priming may take all steps
            before = self.env_step
            rollout = self.collect(config.num_steps)
            rate = linear(config.learning_rate, config.learning_rate_final, self.env_step / total_steps)
            losses = self.update(rollout, rate)
            self.observe(rollout)
            report.add(losses)
            check_finite(dict(zip(LOSSES, losses.tolist())), self.env_step, self.grad_step)
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                yield report.row(**{"train/learning_rate": rate})
                report.restart()

    def update(self, rollout: Rollout, learning_rate: float) -> Tensor:
        """One gradient step on a rollout; `LOSSES` (3,)."""
        config = self.config
        self.network.train()  # dropout and the like belong to the loss alone
        # One pass for everything: the last row only lends its value, which carries no gradient.
        params, values, states = self.network(rollout.obs, rollout.state, rollout.starts)
        with torch.no_grad():
            parts = (rollout.rewards, self.next_values(rollout, values, states))
            ends = (rollout.terminated, rollout.truncated)
            if config.advantage == "gae":
                advantages = gae(parts[0], values[:-1], parts[1], *ends, config.gamma, config.gae_lambda)
                returns = advantages + values[:-1]
            else:
                returns = n_step_returns(*parts, *ends, config.gamma, config.num_steps)
                advantages = returns - values[:-1]
        loss, losses = a2c_loss(
            self.distribution,
            params[:-1],
            values[:-1],
            rollout.actions,
            advantages,
            returns,
            self.loss_weights,
            config,
        )
        take_gradient(loss, self.parameters, self.gradients)
        clip_norm(self.gradient, config.max_grad_norm)
        self.optimizer_step(
            self.weights, self.gradient, self.moments, learning_rate, eps=config.optimizer_eps
        )
        self.grad_step += 1
        self.network.eval()
        return losses

    @property
    def rollout_steps(self) -> int:
        return self.config.num_steps

    def optimizer(self) -> dict[str, Tensor]:
        return self.moments._asdict()

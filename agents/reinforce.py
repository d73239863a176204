"""REINFORCE: "Simple statistical gradient-following algorithms for connectionist reinforcement learning"
(Williams 1992), with causality (an action answers for the rewards that follow it) and a choice of baselines.

An update takes one whole episode of every environment, all begun together and played by the same policy, so
that the gradient is that of the expected return, without bias. Where an environment waits for the longest
episode, its steps are taken, counted, and not learned from.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision.optimization import adam_state, adam_step, clip_norm, linear, set_training, take_gradient
from .agent import Report, Row, UnmadeEnv, passes
from .distributions import Distribution
from .on_policy import OnPolicyAgent, PolicyConfig, Rollout
from .returns import discounted_returns


@dataclass(frozen=True)
class REINFORCEConfig(PolicyConfig):
    """Hyper-parameters of REINFORCE."""

    num_envs: int = 4
    """Environments stepped side by side, hence episodes in an update."""
    learning_rate: float = 3e-3
    """Adam's step size."""
    baseline: Literal["none", "average", "value"] = "value"
    """What is subtracted from returns: nothing, their moving average, or a learned state value (which also
    completes episodes that a time limit cuts off; without it, their return ends with their last reward)."""
    average_decay: float = 0.9
    """Weight of the past in the moving average, an update, in [0, 1)."""
    discount_gradient: bool = False
    """Weigh step t by gamma^t, as the gradient of the discounted return does (Sutton and Barto 2018, section
    13.3). Practice leaves it out, so that late steps are learned from too."""
    max_grad_norm: float = 10.0
    """L2 norm that gradients are clipped to. They are sums over an episode."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in ("none", "average", "value"):
            raise ValueError(f"baseline must be none, average or value, got {self.baseline!r}")
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay must be at least 0 and less than 1, got {self.average_decay}")
        if not self.adam_eps > 0:
            raise ValueError(f"adam_eps must be greater than 0, got {self.adam_eps}")


RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {"learning_rate": 5e-3, "learning_rate_final": 0.0},
}


def recipe(env_id: str, **changes: Any) -> REINFORCEConfig:
    """The settings known to work on an environment (the defaults where none are), with `changes` made."""
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
    return REINFORCEConfig(**{**settings, **changes})


LOSSES = ("policy_loss", "value_loss", "entropy")


def reinforce_loss(
    distribution: Distribution,
    params: Tensor,
    values: Tensor,
    actions: Tensor,
    returns: Tensor,
    baseline: Tensor,
    weights: Tensor,
    config: REINFORCEConfig,
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and `LOSSES` (3,), for N episodes of up to T steps.

    Parameters (T, N, P) and values (T, N) carry gradients; actions (T, N, ...), returns and baseline (T, N)
    do not. `weights` (T, N) are 0 after an episode's end; else 1, or gamma^t. The gradient of the policy's
    part is an unbiased estimate of minus that of the expected return: a sum over steps, a mean over
    episodes.
    """
    episodes, played = weights.shape[1], (weights > 0).to(weights.dtype)
    log_prob, entropy = distribution.log_prob_entropy(params, actions)
    policy_loss = -(weights * (returns - baseline) * log_prob).sum() / episodes
    value_loss = (played * (returns - values).square()).sum() / episodes
    entropy = (played * entropy).sum() / episodes
    loss = policy_loss - config.entropy_coefficient * entropy
    if config.baseline == "value":
        loss = loss + config.value_coefficient * value_loss
    return loss, torch.stack([policy_loss, value_loss, entropy]).detach() / (played.sum() / episodes)


class REINFORCE(OnPolicyAgent):
    """Monte Carlo policy gradient, with no, an average or a learned baseline.

    Takes Discrete, MultiDiscrete, MultiBinary and Box actions, any observations an encoder takes, and
    environments whose episodes end.

    >>> from foveal.agents import REINFORCE
    >>> agent = REINFORCE("CartPole-v1", seed=1).learn(400, progress=False)
    >>> agent.predict(agent.env.reset(), deterministic=True)[0].shape
    (4,)
    """

    name: ClassVar[str] = "reinforce"
    Config: ClassVar[type] = REINFORCEConfig
    recipe = staticmethod(recipe)
    config: REINFORCEConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: REINFORCEConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        self.adam = adam_state(self.weights.detach())
        self.average = torch.zeros((), device=self.device)
        """Moving average of returns, of all updates before."""

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        config = self.config
        self.start()
        report = Report(self, LOSSES)
        self.prime()
        while self.env_step < total_steps or not self.grad_step:  # priming may take all steps
            before = self.env_step
            rollout = self.play()
            rate = linear(config.learning_rate, config.learning_rate_final, before / total_steps)
            losses = self.update(rollout, rate)
            self.observe(rollout)
            report.add(losses)
            self.check(dict(zip(LOSSES, losses.tolist())))
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                yield report.row(**{"train/learning_rate": rate})
                report.restart()

    def play(self) -> Rollout:
        """One whole episode in each environment, with what some play beyond it."""
        self.obs = self.env.reset()
        self.starts = np.ones(self.env.num_envs, np.bool_)
        return self.collect(None)

    def update(self, rollout: Rollout, learning_rate: float) -> Tensor:
        """One gradient step on whole episodes; `LOSSES` (3,)."""
        set_training(self.modal, True)  # dropout and the like belong to the loss alone
        loss, losses = self.loss(rollout)
        take_gradient(loss, self.parameters, self.gradients)
        clip_norm(self.gradient, self.config.max_grad_norm)
        with self.paced():
            adam_step(self.weights, self.gradient, self.adam, learning_rate, self.config.adam_eps)
        self.grad_step += 1
        set_training(self.modal, False)
        return losses

    def loss(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The loss of one episode in each environment; takes its returns into the moving average."""
        config = self.config
        params, values, states = self.network(rollout.obs, rollout.state, rollout.starts)
        values = values[:-1]
        with torch.no_grad():
            ended_before = (
                rollout.starts[1:].cumsum(0) - rollout.starts[1:].long()
            )  # episodes over before step t
            weights = (ended_before == 0).float()
            if config.baseline == "value":
                next_values = self.next_values(rollout, torch.cat([values, values[-1:]]), states)
            else:
                next_values = torch.zeros_like(values)
            ends = (rollout.terminated, rollout.truncated)
            returns = discounted_returns(rollout.rewards, next_values, *ends, config.gamma)
            baseline = values.detach() if config.baseline == "value" else self.average.expand_as(values)
            if config.baseline == "average":
                seen = (weights * returns).sum() / weights.sum()
                decay = config.average_decay if self.grad_step else 0.0
                baseline, self.average = baseline.clone(), torch.lerp(seen, self.average, decay)
            if config.discount_gradient:
                steps = torch.arange(len(weights), device=self.device)
                weights = weights * config.gamma ** steps.unsqueeze(1)
        return reinforce_loss(
            self.distribution, params[:-1], values, rollout.actions, returns, baseline, weights, config
        )

    def optimizer(self) -> dict[str, Tensor]:
        return {**self.adam._asdict(), "average": self.average}

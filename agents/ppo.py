"""PPO: "Proximal policy optimization algorithms" (Schulman et al. 2017, 1707.06347).

Where we differ from the paper: advantages are normalised in each minibatch, gradients are clipped by norm,
policy and value have encoders of their own unless told otherwise, and an episode cut by a time limit is
completed by the value of its true last observation.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision.optimization import adam_state, adam_step, clip_norm, linear, set_training, take_gradient
from .agent import Report, Row, UnmadeEnv, map_tensors, passes
from .distributions import Distribution
from .on_policy import OnPolicyAgent, PolicyConfig, Rollout
from .policy import ActorCritic
from .returns import gae


@dataclass(frozen=True)
class PPOConfig(PolicyConfig):
    """Hyper-parameters of PPO."""

    learning_rate: float = 3e-4
    """Adam's step size."""
    num_steps: int = 128
    """Steps of each environment between two updates."""
    epochs: int = 4
    """Passes over the rollout at each update."""
    minibatch_size: int = 256
    """Transitions in one gradient step; divides num_envs * num_steps. With memory it is made of whole
    sequences of num_steps, so num_steps divides it too."""
    gae_lambda: float = 0.95
    """Trade between bias (0) and variance (1) of the advantages, in [0, 1]."""
    clip: float = 0.2
    """How far the ratio of new to old probability counts: 1 +- clip."""
    clip_final: float | None = None
    """What `clip` falls to, linearly over the training; None keeps it constant."""
    value_clip: float | None = None
    """How far a value may move from the rollout's before its gradient stops; None for no limit."""
    target_kl: float | None = None
    """An update stops where the policy has moved by 1.5 times this KL divergence (nats); None for never."""
    normalize_advantage: bool = True
    """Advantages of a minibatch to mean 0 and variance 1."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_steps", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("clip", "value_clip", "target_kl", "adam_eps"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.clip_final is not None and not self.clip_final >= 0:
            raise ValueError(f"clip_final must be 0 or more, got {self.clip_final}")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must be between 0 and 1, got {self.gae_lambda}")
        size = self.num_envs * self.num_steps
        if size % self.minibatch_size:
            raise ValueError(
                f"minibatch_size must divide num_envs * num_steps = {self.num_envs} * {self.num_steps} = "
                f"{size}, "
                f"got {self.minibatch_size}"
            )
        if self.recurrent and self.minibatch_size % self.num_steps:
            raise ValueError(
                f"minibatch_size must be a multiple of num_steps = {self.num_steps} with recurrent "
                f"{self.recurrent}, got {self.minibatch_size}"
            )


# Settings known to work, by environment id. Those of the classic environments are the Stable-Baselines3
# zoo's (Pendulum without its state-dependent exploration), as are HalfCheetah's; the rest of MuJoCo has those
# of the paper's appendix with normalised observations and rewards, Atari the paper's. (With the zoo's, Hopper
# learns to stand still: 1,196 after 300,000 steps.)
RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {
        "num_steps": 32,
        "epochs": 20,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
        "clip_final": 0.0,
    },
    "foveal/MaskedCartPole-v*": {
        "num_envs": 16,
        "num_steps": 64,
        "epochs": 10,
        "gamma": 0.98,
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
        "share_encoder": True,
        "normalize_rewards": True,  # else the value's gradient drowns the policy's in what they share
    },
    "Acrobot-v*": {
        "num_envs": 16,
        "num_steps": 256,
        "minibatch_size": 64,
        "gae_lambda": 0.94,
        "normalize_observations": True,
        "normalize_rewards": True,
    },
    "LunarLander-v*": {
        "num_envs": 16,
        "num_steps": 1024,
        "minibatch_size": 64,
        "gamma": 0.999,
        "gae_lambda": 0.98,
        "entropy_coefficient": 0.01,
    },
    "Pendulum-v*": {
        "num_envs": 4,
        "num_steps": 1024,
        "epochs": 10,
        "minibatch_size": 64,
        "gamma": 0.9,
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
    },
    "MountainCar-v*": {
        "num_envs": 16,
        "num_steps": 16,
        "minibatch_size": 64,
        "gae_lambda": 0.98,
        "normalize_observations": True,
        "normalize_rewards": True,
    },
    "MinAtar/*": {
        "num_envs": 16,
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
        "clip_final": 0.0,
        "entropy_coefficient": 0.01,
        "share_encoder": True,
    },
    "ALE/*": {
        "learning_rate": 2.5e-4,
        "learning_rate_final": 0.0,
        "clip": 0.1,
        "clip_final": 0.0,
        "entropy_coefficient": 0.01,
        "share_encoder": True,
    },
}
MUJOCO: dict[str, Any] = {
    "num_envs": 4,
    "num_steps": 512,
    "epochs": 10,
    "minibatch_size": 64,
    "learning_rate": 3e-4,
    "learning_rate_final": 0.0,
    "normalize_observations": True,
    "normalize_rewards": True,
}
MUJOCO_TASKS = (
    "Ant Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher Swimmer"
)
for task in (*MUJOCO_TASKS.split(), "Walker2d"):
    RECIPES[f"{task}-v*"] = MUJOCO
RECIPES["HalfCheetah-v*"] = {
    "num_envs": 1,
    "num_steps": 512,
    "minibatch_size": 64,
    "normalize_observations": True,
    "normalize_rewards": True,
    "vector_encoder": "mlp",
    "orthogonal_init": False,
    "log_std_init": -2.0,
    "epochs": 20,
    "gamma": 0.98,
    "gae_lambda": 0.92,
    "learning_rate": 2.0633e-5,
    "clip": 0.1,
    "entropy_coefficient": 0.000401762,
    "value_coefficient": 0.58096,
    "max_grad_norm": 0.8,
}


def recipe(env_id: str, **changes: Any) -> PPOConfig:
    """The settings known to work on an environment (the defaults where none are), with `changes` made."""
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
    return PPOConfig(**{**settings, **changes})


class Batch(NamedTuple):
    """What the loss sees of T steps of N sequences; where there is no memory, of one step of N (T = 1)."""

    obs: Any  # (T, N, ...)
    state: Tensor  # (N, S)
    starts: Tensor  # (T, N) bool
    actions: Tensor  # (T, N, ...)
    log_probs: Tensor  # (T, N) of the policy that acted
    values: Tensor  # (T, N) of the network that acted
    advantages: Tensor  # (T, N)
    returns: Tensor  # (T, N)


LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


def ppo_loss(
    network: ActorCritic,
    distribution: Distribution,
    batch: Batch,
    clip: float,
    config: PPOConfig,
) -> tuple[Tensor, Tensor]:
    """The clipped objective (equations 7 and 9), negated: a scalar; and `LOSSES` (5,), without gradient."""
    params, values, _ = network(batch.obs, batch.state, batch.starts)
    log_probs, entropy = distribution.log_prob_entropy(params, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    advantages = batch.advantages
    if config.normalize_advantage and advantages.numel() > 1:
        std, mean = torch.std_mean(advantages)
        advantages = (advantages - mean) / (std + 1e-8)
    # min(r A, clip(r, 1 - c, 1 + c) A) cuts r on one side only, above where A > 0 and below where A < 0. With
    # s the sign of A that is |A| min(s r, s + c): three small kernels instead of six, and as many backwards.
    sign = advantages.sign()
    policy_loss = -advantages.abs() * torch.clamp(sign * ratio, max=sign + clip)
    value_loss = F.mse_loss(values, batch.returns, reduction="none")
    if config.value_clip is not None:
        near = batch.values + (values - batch.values).clamp(-config.value_clip, config.value_clip)
        value_loss = torch.max(value_loss, (near - batch.returns).square())
    loss = torch.add(policy_loss, value_loss, alpha=config.value_coefficient)
    if config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * entropy
    with torch.no_grad():
        # Of the estimators of KL(old || new), the one that is unbiased and never negative (Schulman 2020,
        # "Approximating KL divergence").
        kl = ratio - 1 - log_ratio
        clipped = ((ratio - 1).abs() > clip).to(ratio.dtype)
        losses = torch.stack([policy_loss, value_loss, entropy, kl, clipped]).flatten(1).mean(1)
    return loss.mean(), losses


def ppo_gradient(
    params: Tensor,
    values: Tensor,
    distribution: Distribution,
    batch: Batch,
    clip: float,
    config: PPOConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """d `ppo_loss` / d params (T, N, P) and d values (T, N), in closed form, and `LOSSES` (5,).

    For small batches, where it takes less than half of autograd's time.
    """
    log_probs, entropy = distribution.log_prob_entropy(params, batch.actions)
    log_ratio = log_probs - batch.log_probs
    ratio = log_ratio.exp()
    advantages, count = batch.advantages, log_probs.numel()
    if config.normalize_advantage and count > 1:
        std, mean = torch.std_mean(advantages)
        advantages = (advantages - mean) / (std + 1e-8)
    error = values - batch.returns
    value_loss = error.square()
    if config.value_clip is not None:
        near = batch.values + (values - batch.values).clamp(-config.value_clip, config.value_clip)
        clipped_loss = (near - batch.returns).square()
        error.masked_fill_(clipped_loss > value_loss, 0.0)  # which is so beyond the clip only
        value_loss = torch.maximum(value_loss, clipped_loss)
    sign = advantages.sign()
    # As in `ppo_loss`; beyond the clip nothing is left of the gradient, which else is -A r.
    reached, limit, size = sign * ratio, sign + clip, -advantages.abs()
    by_log_prob = (size * reached).masked_fill_(reached > limit, 0.0).div_(count)
    by_params = distribution.gradient(params, batch.actions, by_log_prob, -config.entropy_coefficient / count)
    by_values = error * (2 * config.value_coefficient / count)
    moved = ratio - 1
    measured = [
        size * torch.minimum(reached, limit),
        value_loss,
        entropy,
        moved - log_ratio,
        (moved.abs() > clip).to(ratio.dtype),
    ]
    return by_params, by_values, torch.stack(measured).flatten(1).mean(1)


class PPO(OnPolicyAgent):
    """Proximal policy optimization, with or without memory.

    Takes Discrete, MultiDiscrete, MultiBinary and Box actions, and any observations an encoder takes.

    >>> from foveal.agents import PPO
    >>> agent = PPO("CartPole-v1", seed=1).learn(256, progress=False)
    >>> agent.predict(agent.env.reset(), deterministic=True)[0].shape
    (8,)
    """

    name: ClassVar[str] = "ppo"
    Config: ClassVar[type] = PPOConfig
    recipe = staticmethod(recipe)
    config: PPOConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: PPOConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        self.adam = adam_state(self.weights.detach())

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        config = self.config
        self.start()
        report = Report(self, LOSSES)
        self.prime()
        while self.env_step < total_steps or not self.grad_step:  # priming may take all steps
            before = self.env_step
            rollout = self.collect(config.num_steps)
            progress = before / total_steps
            rate = linear(config.learning_rate, config.learning_rate_final, progress)
            clip = linear(config.clip, config.clip_final, progress)
            batch = self.advantages(rollout)
            losses, count = self.update(batch, rate, clip)
            self.observe(rollout)
            report.add(losses, count)
            self.check(dict(zip(LOSSES, losses.tolist())))
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                unexplained = (batch.returns - batch.values).var() / batch.returns.var()
                yield report.row(
                    **{
                        "train/learning_rate": rate,
                        "train/clip": clip,
                        "train/explained_variance": 1 - unexplained.item(),
                    }
                )
                report.restart()

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> Batch:
        """What the policy that acted says of its rollout: probabilities, values, advantages, returns."""
        config = self.config
        params, values, states = self.network(rollout.obs, rollout.state, rollout.starts)
        next_values = self.next_values(rollout, values, states)
        log_probs, _ = self.distribution.log_prob_entropy(params[:-1], rollout.actions)
        ends = (rollout.terminated, rollout.truncated)
        advantages = gae(rollout.rewards, values[:-1], next_values, *ends, config.gamma, config.gae_lambda)
        obs = map_tensors(lambda x: x[:-1], rollout.obs)
        returns = advantages + values[:-1]
        return Batch(
            obs,
            rollout.state,
            rollout.starts[:-1],
            rollout.actions,
            log_probs,
            values[:-1],
            advantages,
            returns,
        )

    def update(self, batch: Batch, learning_rate: float, clip: float) -> tuple[Tensor, Tensor]:
        """Gradient steps on minibatches of a rollout: sums of `LOSSES` (5,) and the number of steps taken."""
        config = self.config
        set_training(self.modal, True)  # dropout and the like belong to the loss alone
        sums = torch.zeros(len(LOSSES), device=self.device)
        count = torch.zeros((), device=self.device)
        going = torch.ones((), dtype=torch.bool, device=self.device)
        for epoch in range(config.epochs):
            if epoch and config.target_kl is not None and not going:
                break
            for minibatch in self.minibatches(batch):
                losses = self.take_gradient(minibatch, clip)
                clip_norm(self.gradient, config.max_grad_norm)
                if config.target_kl is None:
                    with self.paced():
                        adam_step(self.weights, self.gradient, self.adam, learning_rate, config.adam_eps)
                else:  # a mask instead of a break, so that nothing waits for the device
                    going = going & (losses[3] <= 1.5 * config.target_kl)
                    self.masked_step(going, learning_rate)
                    losses = losses.masked_fill(~going, 0.0)
                sums += losses
                count += going
        self.grad_step += int(count)
        set_training(self.modal, False)
        return sums, count

    def take_gradient(self, minibatch: Batch, clip: float) -> Tensor:
        """The loss's gradient, into `self.gradient`; `LOSSES` (5,)."""
        if self.learner is None:
            loss, losses = ppo_loss(self.network, self.distribution, minibatch, clip, self.config)
            take_gradient(loss, self.parameters, self.gradients)
            return losses
        with torch.no_grad():
            outputs = self.learner.forward(minibatch.obs)
            *derivatives, losses = ppo_gradient(*outputs, self.distribution, minibatch, clip, self.config)
            self.learner.backward(*derivatives)
        return losses

    def minibatches(self, batch: Batch) -> Iterator[Batch]:
        """The rollout in random order: single steps, or, with memory, whole sequences."""
        config, device = self.config, self.device
        size = config.num_envs * config.num_steps
        if config.minibatch_size == size:
            yield batch  # all of it, whose order is nothing to the loss
            return
        if config.recurrent:
            order = torch.randperm(config.num_envs, generator=self.rng).to(device)
            for envs in order.split(config.minibatch_size // config.num_steps):
                yield Batch(
                    map_tensors(lambda x: x[:, envs], batch.obs),  # noqa: B023 - used at once
                    batch.state[envs],
                    *(part[:, envs] for part in batch[2:]),
                )
            return
        flat = [map_tensors(lambda x: x.flatten(0, 1), part) for part in (batch.obs, *batch[2:])]
        order = torch.randperm(size, generator=self.rng).to(device)
        for steps in order.split(config.minibatch_size):
            obs, *rest = (map_tensors(lambda x: x[steps].unsqueeze(0), part) for part in flat)  # noqa: B023
            yield Batch(obs, batch.state[:1].expand(len(steps), -1), *rest)

    def masked_step(self, going: Tensor, learning_rate: float) -> None:
        """A step of Adam that leaves everything as it was where `going` is False."""
        tensors = (self.weights.detach(), *self.adam)
        before = [tensor.clone() for tensor in tensors]
        with self.paced():
            adam_step(self.weights, self.gradient, self.adam, learning_rate, self.config.adam_eps)
        for tensor, old in zip(tensors, before):
            torch.where(going, tensor, old, out=tensor)

    @property
    def rollout_steps(self) -> int:
        return self.config.num_steps

    def optimizer(self) -> dict[str, Tensor]:
        return self.adam._asdict()

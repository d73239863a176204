"""What REINFORCE, A2C and PPO share: settings, networks, rollouts, and the state of a checkpoint.

Each of them adds its loss, its update and its training loop, in a file of its own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision import ENCODERS, is_image, make_encoder
from .agent import Agent, UnmadeEnv, map_tensors, random_streams, to_tensors
from .distributions import make_distribution
from .initialization import orthogonal
from .normalization import RewardScaler
from .policy import ActorCritic, plain_learner
from .small import without_modules


@dataclass(frozen=True)
class PolicyConfig:
    """Hyper-parameters that the policy gradient agents share. Steps are environment steps of all environments
    together, unless they are said to be of each."""

    num_envs: int = 8
    """Environments stepped side by side."""
    learning_rate: float = 7e-4
    """The optimizer's step size."""
    learning_rate_final: float | None = None
    """Step size that `learning_rate` falls to, linearly over the training; None keeps it constant."""
    encoder_learning_rate: float | None = None
    """Step size of the encoder (of a backbone: without its projection), in proportion where `learning_rate`
    falls; 0 freezes it, None is `learning_rate`."""
    gamma: float = 0.99
    """Discount a step, in [0, 1]."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy (nats), which is maximised, in the loss."""
    value_coefficient: float = 0.5
    """Weight of the value's squared error in the loss."""
    max_grad_norm: float = 0.5
    """L2 norm that gradients are clipped to."""
    share_encoder: bool = False
    """One encoder for policy and value; otherwise each has its own."""
    vector_encoder: str = "mlp-tanh"
    """What the encoder `auto` is for vectors: mlp-tanh (two layers of 64) or mlp (two of 256, ReLU), say."""
    orthogonal_init: bool = True
    """Orthogonal first weights and a first policy that is nearly uniform; otherwise PyTorch's own. An encoder
    that comes trained keeps its weights."""
    recurrent: Literal["lstm", "gru"] | None = None
    """A memory after the encoder, for what a single observation does not show."""
    recurrent_size: int = 64
    """Width of that memory."""
    squash: bool = False
    """Box actions: a Gaussian through tanh, stretched to the bounds, instead of one cut at them."""
    log_std_init: float = 0.0
    """Box actions: log of the standard deviations at the start."""
    normalize_observations: bool = False
    """Vectors of floats to mean 0 and variance 1. The first rollout is not learned from: it sets the
    statistics."""
    normalize_rewards: bool = False
    """Rewards, as learning sees them, over the standard deviation of the running discounted return."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "recurrent_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in (
            "learning_rate_final",
            "encoder_learning_rate",
            "entropy_coefficient",
            "value_coefficient",
        ):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, got {self.gamma}")
        if self.recurrent not in (None, "lstm", "gru"):
            raise ValueError(f"recurrent must be lstm, gru or None, got {self.recurrent!r}")


class Rollout(NamedTuple):
    """T steps of N environments, on the agent's device.

    obs         (T + 1, N, ...), what was acted on, and what comes next
    state       (N, S), the recurrent state before the first step
    starts      bool (T + 1, N), True where an observation is the first of an episode
    actions     (T, N, ...), as the distribution has them
    rewards     float32 (T, N), normalised where that is asked for
    terminated  bool (T, N)
    truncated   bool (T, N)
    final       steps (K,), environments (K,) and true final observations (K, ...) of the K truncated episodes
    """

    obs: Any
    state: Tensor
    starts: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    final: tuple[Tensor, Tensor, Any] | None


class OnPolicyAgent(Agent):
    """An agent that learns from what its current policy just did.

    A subclass gives `Config`, `recipe`, `training`, and `optimizer`: the tensors that its optimizer keeps.
    """

    network: ActorCritic
    config: PolicyConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: Any = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        settings: PolicyConfig = self.config
        try:
            self.distribution = make_distribution(self.action_space, settings.squash, self.name)
        except ValueError as error:
            raise ValueError(f"{self.env_spec()['env_id']}: {error}") from error
        _, self.rng, predicting, weights_seed = random_streams(seed)
        self.predict_rng = torch.Generator().manual_seed(int(predicting.integers(2**62)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            name = encoder if isinstance(encoder, str) else None
            made: Any = encoder if name is None else self.make_encoder(name)
            value_encoder = None
            if not settings.share_encoder:
                # One that begins as a copy learns the same features as the policy's, and A2C then loses
                # CartPole again and again. Weights that were given or trained before can only be copied.
                value_encoder = copy.deepcopy(made) if name is None else self.make_encoder(name)
            self.adopt(
                ActorCritic(
                    made,
                    value_encoder,
                    self.observation_space,
                    self.distribution,
                    settings.recurrent,
                    settings.recurrent_size,
                    settings.log_std_init,
                    settings.normalize_observations,
                    settings.orthogonal_init,
                )
            )
        gradient_of: dict[Tensor, Tensor] = dict(zip(self.parameters, self.gradients))
        self.learner = plain_learner(self.network, self.observation_space, gradient_of)
        self.logits_of = without_modules(
            self.network.encoder, self.network.policy_head, self.observation_space
        )
        self.reward_scaler = RewardScaler(self.config.num_envs, settings.gamma)
        self.obs: Any = None
        self.hidden = torch.zeros(self.config.num_envs, self.network.state_size, device=self.device)
        self.starts = np.ones(self.config.num_envs, np.bool_)

    def make_encoder(self, name: str) -> nn.Module:
        """A new encoder; one that was trained before keeps its weights."""
        if name == "auto":
            name = encoder_for(self.observation_space, self.config.vector_encoder)
        self.encoder_name = name
        encoder = make_encoder(name, self.observation_space)
        untrained = set(name.split("+")) <= ENCODERS.keys() | {"auto"}
        if self.config.orthogonal_init and untrained:
            orthogonal(encoder)
        return encoder

    def start(self) -> None:
        if self.obs is None:
            self.obs = self.env.reset()
            self.starts = np.ones(self.env.num_envs, np.bool_)

    def collect(self, num_steps: int | None) -> Rollout:
        """Act for `num_steps` steps in each environment; None: until an episode has ended in each of them."""
        env, network, distribution = self.env, self.network, self.distribution
        memory = network.state_size > 0
        state = self.hidden.clone()
        obs: list[Any] = []
        actions: list[Tensor] = []
        noise: Sequence[Tensor] = ()
        rewards, starts, terminated, truncated = [], [self.starts], [], []
        final_at: list[tuple[int, int]] = []
        final_obs: list[Any] = []
        finished = np.zeros(env.num_envs, np.bool_)
        drawn = num_steps or 64  # steps whose noise is drawn at once
        with torch.inference_mode():
            while len(actions) < num_steps if num_steps else not finished.all():
                # Act.
                t = len(actions) % drawn
                if t == 0:
                    noise = distribution.noise((drawn, env.num_envs), self.rng).to(self.device).unbind()
                x = to_tensors(self.obs, self.observation_space, self.device)
                new = torch.as_tensor(self.starts, device=self.device) if memory else state
                params, self.hidden = network.act(x, self.hidden, new, self.logits_of)
                action = distribution.sample(params, noise[t])
                step = env.step(distribution.to_env(action))
                # Remember.
                if step.episodes:
                    finished |= step.reset
                    self.episodes += step.episodes
                    for i in np.flatnonzero(step.truncated):
                        final_at.append((len(actions), int(i)))
                        final_obs.append(take(step.next_obs, int(i)))
                obs.append(x)
                actions.append(action)
                rewards.append(step.rewards)
                terminated.append(step.terminated)
                truncated.append(step.truncated)
                starts.append(step.reset)
                self.obs, self.starts = step.obs, step.reset
        obs.append(to_tensors(self.obs, self.observation_space, self.device))
        self.env_step += len(actions) * env.num_envs
        self.hidden = self.hidden.clone()  # of inference mode no more: the next rollout's loss may save it

        reward, ends = torch.from_numpy(np.array(rewards)), np.array([terminated, truncated])
        if self.config.normalize_rewards:
            reward = self.reward_scaler(reward, torch.from_numpy(ends.any(0)))
        final = None
        if final_at:
            at = torch.as_tensor(np.array(final_at).T, device=self.device)
            final = (at[0], at[1], map_tensors(lambda part: part.to(self.device), stack(final_obs)))
        both = torch.from_numpy(ends).to(self.device)
        return Rollout(
            obs=stack(obs),
            state=state,
            starts=torch.from_numpy(np.array(starts)).to(self.device),
            actions=torch.stack(actions),
            rewards=reward.to(self.device),
            terminated=both[0],
            truncated=both[1],
            final=final,
        )

    def next_values(self, rollout: Rollout, values: Tensor, states: Tensor) -> Tensor:
        """Values of the true successors (T, N), from the network's values (T + 1, N) and states (T + 1, N,
        S).

        At a truncation the true final observation is valued, from the state in which it was met. A step that
        terminated has no successor: what stands there is not used.
        """
        following = values[1:].detach().clone()
        if rollout.final is not None:
            t, n, obs = rollout.final
            one = map_tensors(lambda x: x.unsqueeze(0), obs)  # a sequence of one step
            with torch.no_grad():
                following[t, n] = self.network(
                    one, states[t, n], torch.zeros_like(t, dtype=torch.bool)[None]
                )[1][0]
        return following

    def observe(self, rollout: Rollout) -> None:
        """Let a rollout change the statistics of observations; not before it has been learned from."""
        if self.network.normalizer is not None:
            self.network.normalizer.update(map_tensors(lambda x: x[:-1], rollout.obs))

    def prime(self) -> None:
        """Before the first update: statistics of observations, from a rollout that is not learned from."""
        normalizer = self.network.normalizer
        if normalizer is not None and self.env_step == 0:
            self.observe(self.collect(self.rollout_steps))

    @property
    def rollout_steps(self) -> int | None:
        """Steps of a rollout in each environment; None: whole episodes."""
        return None

    def actions(
        self, obs: Any, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        batch = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        memory = state
        if state is None or not self.network.state_size:
            memory = np.zeros((batch, self.network.state_size), np.float32)
        if episode_start is None:
            episode_start = np.zeros(batch, np.bool_)
        hidden = torch.as_tensor(np.asarray(memory, np.float32).reshape(batch, -1), device=self.device)
        starts = torch.as_tensor(np.asarray(episode_start, np.bool_).reshape(batch), device=self.device)
        with torch.inference_mode():
            params, hidden = self.network.act(obs, hidden, starts, self.logits_of)
            if deterministic:
                actions = self.distribution.mode(params)
            else:
                noise = self.distribution.noise((batch,), self.predict_rng).to(self.device)
                actions = self.distribution.sample(params, noise)
            memory = hidden.numpy(force=True) if self.network.state_size else state
            return self.distribution.to_env(actions), memory

    # Checkpoints. Statistics of observations are buffers of the network, hence in the weights file.

    def optimizer(self) -> dict[str, Tensor]:
        """The tensors that the optimizer keeps, by name."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.start()
        arrays, env = self.env.state()
        tensors = {f"optimizer.{name}": tensor for name, tensor in self.optimizer().items()}
        tensors |= {f"rewards.{name}": tensor for name, tensor in self.reward_scaler.state().items()}
        tensors |= {f"env.{name}": torch.as_tensor(array) for name, array in arrays.items()}
        tensors |= {
            "rng": self.rng.get_state(),
            "predict_rng": self.predict_rng.get_state(),
            "hidden": self.hidden,
            "starts": torch.as_tensor(self.starts),
        }
        return tensors, {"env": env}

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        for name, tensor in self.optimizer().items():
            tensor.copy_(tensors[f"optimizer.{name}"])
        self.reward_scaler.restore(part("rewards."))
        self.rng.set_state(tensors["rng"])
        self.predict_rng.set_state(tensors["predict_rng"])
        self.hidden.copy_(tensors["hidden"])
        self.starts = tensors["starts"].numpy().copy()
        self.obs, exact = self.env.restore({k: v.numpy() for k, v in part("env.").items()}, meta["env"])
        if not exact:
            self.starts = np.ones_like(self.starts)
        return exact


def encoder_for(space: spaces.Space, vectors: str = "mlp-tanh") -> str:
    """What `auto` is: for vectors two small tanh layers, as policy gradients have had since TRPO."""
    if isinstance(space, spaces.Dict):
        return f"auto+{vectors}"
    if not is_image(space):
        return vectors
    return "minatar" if max(space.shape[1:]) <= 16 else "auto"  # type: ignore[index]


def take(obs: Any, i: int) -> Any:
    """Environment i's of observations (N, ...), as tensors of their own."""
    if isinstance(obs, dict):
        return {key: take(part, i) for key, part in obs.items()}
    return torch.tensor(obs[i])


def stack(trees: Sequence[Any]) -> Any:
    """T tensors (...), or dicts of them, as one (T, ...)."""
    if isinstance(trees[0], dict):
        return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
    return torch.stack(list(trees))

"""DQN: "Human-level control through deep reinforcement learning" (Mnih et al. 2015), with double Q-learning
(van Hasselt et al. 2015, 1509.06461) on by default.

Where we differ from the papers: Adam instead of RMSprop, gradients clipped by norm, the Huber loss written
as such (the paper clips the error term), any number of environments, and schedules in environment steps.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision import make_encoder, resolve_device
from ..vision.optimization import (
    adam_state,
    adam_step,
    clip_norm,
    compile_or_eager,
    flatten_parameters,
    linear,
    set_training,
    take_gradient,
)
from .agent import (
    Agent,
    Report,
    Row,
    UnmadeEnv,
    map_tensors,
    passes,
    random_streams,
    rng_from_json,
    rng_to_json,
    to_tensors,
    unbind,
)
from .replay import Replay
from .small import plain_layers, without_modules


@dataclass(frozen=True)
class DQNConfig:
    """Hyper-parameters. All steps are environment steps, counted over all environments together."""

    num_envs: int = 1
    """Environments stepped side by side."""
    learning_rate: float = 6.3e-4
    """Adam's step size."""
    learning_rate_final: float | None = None
    """Step size that `learning_rate` falls to, linearly over the training; None keeps it constant."""
    encoder_learning_rate: float | None = None
    """Step size of the encoder (of a backbone: without its projection), in proportion where `learning_rate`
    falls; 0 freezes it, None is `learning_rate`."""
    batch_size: int = 128
    """Transitions in one gradient step."""
    buffer_size: int = 50_000
    """Transitions that the replay keeps, all environments together."""
    learning_starts: int = 1_000
    """Environment steps taken at random before the first update."""
    train_every: int = 4
    """Environment steps between updates."""
    gradient_steps: int = 1
    """Gradient steps at each update."""
    target_every: int = 250
    """Environment steps between updates of the target network."""
    tau: float = 1.0
    """Share by which each update moves the target network to the online one, in (0, 1]; 1 copies it."""
    gamma: float = 0.99
    """Discount a step, in [0, 1]."""
    exploration_initial: float = 1.0
    """Epsilon at the start."""
    exploration_final: float = 0.05
    """Epsilon at the end of its linear schedule, and from then on."""
    exploration_fraction: float = 0.12
    """Share of the training over which epsilon falls, in (0, 1]."""
    double: bool = True
    """Double Q-learning: the online network chooses the next action, the target network values it."""
    max_grad_norm: float = 10.0
    """L2 norm that gradients are clipped to."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    buffer_device: str = "cpu"
    """Where the replay lives; cuda keeps sampling on the GPU."""
    compile: bool = False
    """Compile the loss and its gradient with torch.compile (about half a minute at the start)."""

    def __post_init__(self) -> None:
        counts = "num_envs batch_size buffer_size train_every gradient_steps target_every"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.learning_starts < 0:
            raise ValueError(f"learning_starts must be 0 or more, got {self.learning_starts}")
        for name in ("learning_rate", "max_grad_norm", "adam_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("learning_rate_final", "encoder_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("gamma", "exploration_initial", "exploration_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("tau", "exploration_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be greater than 0 and at most 1, got {getattr(self, name)}")


# Settings known to work, by environment id. The classic ones are those of the Stable-Baselines3 zoo, but for
# CartPole's: the zoo trains it at a constant 2.3e-3, every 256 steps with 128 gradient steps, and with a
# target no older than that. Values overshoot there, and some seeds lose their policy again. A smaller rate
# that falls to zero, and a target that waits for 64 gradient steps, keep them below 1 / (1 - gamma).
RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {
        "learning_rate": 1e-3,
        "learning_rate_final": 0.0,
        "batch_size": 64,
        "buffer_size": 100_000,
        "train_every": 64,
        "gradient_steps": 32,
        "target_every": 128,
        "exploration_fraction": 0.16,
        "exploration_final": 0.04,
    },
    "LunarLander-v*": {"exploration_final": 0.1},
    "Acrobot-v*": {"exploration_final": 0.1},
    "MountainCar-v*": {
        "learning_rate": 4e-3,
        "buffer_size": 10_000,
        "train_every": 16,
        "gradient_steps": 8,
        "target_every": 600,
        "gamma": 0.98,
        "exploration_fraction": 0.2,
        "exploration_final": 0.07,
    },
    "ALE/*": {
        "learning_rate": 1e-4,
        "batch_size": 32,
        "buffer_size": 100_000,
        "learning_starts": 100_000,
        "target_every": 1_000,
        "exploration_fraction": 0.1,
        "exploration_final": 0.01,
    },
    "MinAtar/*": {
        "learning_rate": 2.5e-4,
        "batch_size": 32,
        "buffer_size": 100_000,
        "learning_starts": 5_000,
        "target_every": 1_000,
        "exploration_fraction": 0.1,
    },
}


def recipe(env_id: str, **changes: Any) -> DQNConfig:
    """The settings known to work on an environment (the defaults where none are), with `changes` made."""
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
    return DQNConfig(**{**settings, **changes})


class QNetwork(nn.Module):
    """Observations (B, ...) -> one value an action (B, num_actions)."""

    def __init__(self, encoder: nn.Module, num_actions: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.features_dim, num_actions)  # type: ignore[arg-type]

    def forward(self, obs: Any) -> Tensor:
        return self.head(self.encoder(obs))


# The algorithm, as functions that touch only what they are given. `network` is anything that maps
# observations to values: a module, or torch.func.functional_call on stacked weights.


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """y = r + gamma (1 - terminated) V(s'), all (...). A truncated episode still bootstraps."""
    return rewards + gamma * ~terminated * next_values


def q_loss(network: Callable[[Any], Tensor], obs: Any, actions: Tensor, targets: Tensor) -> Tensor:
    """Huber(Q(s, a) - y), mean over the batch. obs (B, ...), actions (B,) int64, targets (B,) -> scalar."""
    q = network(obs).gather(1, actions.unsqueeze(1)).squeeze(1)  # (B,)
    return F.smooth_l1_loss(q, targets)


def q_gradient(q: Tensor, actions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """d `q_loss` / d q (B, A) in closed form, and the loss."""
    chosen = actions.unsqueeze(1)
    error = q.gather(1, chosen) - targets.unsqueeze(1)  # (B, 1)
    slope = error.clamp(-1, 1)
    loss = (slope * (error - 0.5 * slope)).mean()
    return torch.zeros_like(q).scatter_(1, chosen, slope.div_(len(q))), loss


def epsilon_at(env_step: int, total_steps: int, config: DQNConfig) -> float:
    """Linear from initial to final over the first part of the training; random before learning starts."""
    if env_step < config.learning_starts:
        return 1.0
    progress = min(1.0, env_step / (config.exploration_fraction * total_steps))
    return config.exploration_initial + progress * (config.exploration_final - config.exploration_initial)


def act(
    network: Callable[[Any], Tensor], obs: Any, num_actions: int, epsilon: float, rng: np.random.Generator
) -> np.ndarray:
    """Epsilon-greedy actions (B,) int64 for observations (B, ...); each environment draws its own epsilon."""
    batch_size = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    explore = rng.random(batch_size) < epsilon
    actions = rng.integers(num_actions, size=batch_size)
    if explore.all():
        return actions
    with torch.no_grad():
        greedy = network(obs).argmax(1).numpy(force=True)
    return np.where(explore, actions, greedy)


class DQN(Agent):
    """Deep Q-learning for Discrete actions and any observations an encoder takes.

    >>> from foveal.agents import DQN
    >>> agent = DQN("CartPole-v1", seed=1).learn(300, progress=False)
    >>> action, _ = agent.predict(agent.env.reset(), deterministic=True)
    >>> action.shape
    (1,)
    """

    name: ClassVar[str] = "dqn"
    Config: ClassVar[type] = DQNConfig
    recipe = staticmethod(recipe)
    config: DQNConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: DQNConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"dqn takes Discrete actions; {self.env_spec()['env_id']} has {self.action_space}"
            )
        if self.config.buffer_size < self.config.num_envs:
            raise ValueError(
                f"buffer_size must be at least num_envs={self.config.num_envs}, got {self.config.buffer_size}"
            )
        self.num_actions, self.first_action = int(self.action_space.n), int(self.action_space.start)
        self.acting_rng, self.sampling_rng, self.predict_rng, weights_seed = random_streams(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            if not isinstance(encoder, nn.Module):
                encoder = make_encoder(encoder, self.observation_space)
            network = QNetwork(encoder, self.num_actions)
            self.adopt(network)
            self.target = copy.deepcopy(self.network)
        self.acting: Callable[[Any], Tensor] = (
            without_modules(network.encoder, network.head, self.observation_space) or self.network
        )
        gradient_of: dict[Tensor, Tensor] = dict(zip(self.parameters, self.gradients))
        self.learner = plain_layers(network.encoder, network.head, self.observation_space, gradient_of)
        self.target_weights = flatten_parameters(self.target)
        self.adam = adam_state(self.weights)
        self.loss: Callable[..., Tensor] = q_loss
        self.epsilon = self.config.exploration_initial
        self.replay: Replay | None = None
        """Made, like the first observations, when training starts: an agent that only acts needs neither."""
        self.obs: Any = None
        self.collecting_since = 0
        """`env_step` at which the replay was empty."""
        self.buffer_device = resolve_device(self.config.buffer_device)

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        config, env = self.config, self.env
        self.start()
        replay = self.replay
        assert replay is not None
        report = Report(self, ("q_loss",))

        while self.env_step < total_steps:
            # Act.
            self.epsilon = epsilon_at(self.env_step, total_steps, config)
            obs = to_tensors(self.obs, self.observation_space, self.device)
            actions = act(self.acting, obs, self.num_actions, self.epsilon, self.acting_rng)
            step = env.step(actions + self.first_action)
            replay.add(actions, step)
            self.obs = step.obs
            self.episodes += step.episodes
            before, self.env_step = self.env_step, self.env_step + env.num_envs

            # Learn.
            if passes(config.target_every, before, self.env_step):
                self.update_target()
            collected = self.env_step - self.collecting_since
            if collected > config.learning_starts and passes(config.train_every, before, self.env_step):
                progress = self.env_step / total_steps
                rate = linear(config.learning_rate, config.learning_rate_final, progress)
                loss_sum = self.update(config.gradient_steps, rate)
                report.add(loss_sum, config.gradient_steps)
                self.check({"q_loss": loss_sum})

            # Report.
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                yield report.row(**{"train/epsilon": self.epsilon})
                report.restart()

    def start(self) -> None:
        if self.replay is None:
            self.replay = self._make_replay()
            self.collecting_since = self.env_step
        if self.obs is None:
            self.obs = self.env.reset()
            self.replay.reset(self.obs)
        if self.config.compile and self.loss is q_loss:
            obs = to_tensors(self.obs, self.observation_space, self.device)
            zeros = torch.zeros(self.env.num_envs, device=self.device)
            self.loss = compile_or_eager(q_loss, self.network, obs, zeros.long(), zeros)

    def _make_replay(self) -> Replay:
        size, spaces_ = self.config.buffer_size, (self.observation_space, self.action_space)
        frame_stack = self._env.frame_stack
        try:
            return Replay(
                size, self.config.num_envs, *spaces_, frame_stack=frame_stack, device=self.buffer_device
            )
        except (MemoryError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"buffer_size {size:,} does not fit into memory: {reason}") from error

    def update(self, gradient_steps: int, learning_rate: float) -> Tensor:
        """Take gradient steps on batches from the replay; the sum of their losses, still on the device."""
        config, replay = self.config, self.replay
        assert replay is not None, "update before training has started"
        values_of = self.network if self.learner is None else self.learner.forward

        def send(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        def flatten(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1)  # (steps, B, ...) -> (steps * B, ...)

        loss_sum = torch.zeros((), device=self.device)
        set_training(self.modal, True)  # dropout and the like belong to the loss alone
        # Sample many batches at once, so that what does not depend on the weights being learned, above all
        # the target network's values, costs one call for all of them; fewer where observations are large.
        at_once = min(2048, 2**22 // spaces.flatdim(self.observation_space)) // config.batch_size
        for done in range(0, gradient_steps, max(1, at_once)):
            shape = (min(max(1, at_once), gradient_steps - done), config.batch_size)
            batch = map_tensors(send, replay.sample(shape, self.sampling_rng))
            with torch.no_grad():
                next_q = self.target(map_tensors(flatten, batch["next_obs"]))  # (steps * B, A)
            batch["next_q"] = next_q.unflatten(0, shape)
            batch["targets"] = td_target(
                batch["rewards"], batch["terminated"], batch["next_q"].amax(-1), config.gamma
            )
            names = ("obs", "actions", "rewards", "terminated", "next_obs", "next_q", "targets")
            batches = zip(*(unbind(batch[name]) for name in names))
            for obs, actions, rewards, terminated, next_obs, values, target in batches:
                if config.double:  # the network that learns says which action is best
                    with torch.no_grad():
                        best = values_of(next_obs).argmax(1, keepdim=True)  # (B, 1)
                        value = values.gather(1, best).squeeze(1)
                        target = td_target(rewards, terminated, value, config.gamma)
                loss_sum += self.take_gradient(obs, actions, target)
                clip_norm(self.gradient, config.max_grad_norm)
                with self.paced():
                    adam_step(self.weights, self.gradient, self.adam, learning_rate, config.adam_eps)
            self.grad_step += shape[0]
        set_training(self.modal, False)
        return loss_sum

    def take_gradient(self, obs: Any, actions: Tensor, targets: Tensor) -> Tensor:
        """`q_loss`'s gradient on a batch, into `self.gradient`; the loss, without gradient."""
        if self.learner is None or self.loss is not q_loss:
            loss = self.loss(self.network, obs, actions, targets)
            take_gradient(loss, self.parameters, self.gradients)
            return loss.detach()
        with torch.no_grad():
            by_q, loss = q_gradient(self.learner.forward(obs), actions, targets)
            self.learner.backward(by_q)
        return loss

    def update_target(self) -> None:
        """target <- tau online + (1 - tau) target; buffers (batch statistics, say) are copied."""
        with torch.no_grad():
            self.target_weights.lerp_(self.weights, self.config.tau)
            for theirs, mine in zip(self.target.buffers(), self.network.buffers()):
                theirs.copy_(mine)

    def actions(
        self, obs: Any, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        # Greedy actions draw nothing, others from a stream of their own: predicting never changes a training.
        epsilon = 0.0 if deterministic else self.config.exploration_final
        actions = act(self.acting, obs, self.num_actions, epsilon, self.predict_rng)
        return actions + self.first_action, state

    # Checkpoints.

    def load_weights(self, tensors: dict[str, Tensor], source: Path) -> None:
        super().load_weights(tensors, source)
        self.target.load_state_dict(tensors)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.start()
        assert self.replay is not None
        tensors = {"target": self.target_weights.detach(), "sampling_rng": self.sampling_rng.get_state()}
        tensors |= {f"target_buffer.{name}": t for name, t in self.target.named_buffers()}
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam._asdict().items()}
        env_arrays, env_meta = self.env.state()
        tensors |= {f"env.{name}": torch.as_tensor(array) for name, array in env_arrays.items()}
        meta = {
            "env": env_meta,
            "replay": self.replay.state(),
            "acting_rng": rng_to_json(self.acting_rng),
            "predict_rng": rng_to_json(self.predict_rng),
            "epsilon": self.epsilon,
            "collecting_since": self.collecting_since,
        }
        return tensors, meta

    def segments(self) -> Iterable[tuple[str, Callable[[], dict[str, Tensor]]]]:
        self.start()
        assert self.replay is not None
        return self.replay.segments()

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        with torch.no_grad():
            self.target_weights.copy_(tensors["target"])
            for name, buffer in self.target.named_buffers():
                buffer.copy_(tensors[f"target_buffer.{name}"])
        self.sampling_rng.set_state(tensors["sampling_rng"])
        rng_from_json(self.acting_rng, meta["acting_rng"])
        rng_from_json(self.predict_rng, meta["predict_rng"])
        self.epsilon, self.collecting_since = meta["epsilon"], meta["collecting_since"]
        for name, tensor in self.adam._asdict().items():
            tensor.copy_(tensors[f"adam.{name}"])
        arrays = {k.removeprefix("env."): v.numpy() for k, v in tensors.items() if k.startswith("env.")}
        self.replay = self._make_replay()
        self.replay.restore(meta["replay"], load)
        self.obs, exact = self.env.restore(arrays, meta["env"])
        if not exact:
            self.replay.reset(self.obs)
        return exact

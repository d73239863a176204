"""PQN: "Simplifying Deep Temporal Difference Learning" (Gallici et al. 2024, 2407.04811): Q-learning on many
environments at once, without a replay and without a target network. Layer normalisation keeps it from
diverging, and lambda-returns over short rollouts, shuffled into minibatches, are what it regresses to.

Where we differ from the paper's code: truncated episodes bootstrap from their true final observation,
convolutions are normalised over the whole map, and schedules count environment steps.
"""

import fnmatch
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision import is_image, make_encoder
from ..vision.optimization import (
    adam_state,
    clip_norm,
    compile_or_eager,
    linear,
    radam_step,
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
)
from .dqn import QNetwork, act
from .returns import q_lambda


@dataclass(frozen=True)
class PQNConfig:
    """Hyper-parameters. A rollout is `num_envs * num_steps` environment steps, a training whole rollouts."""

    num_envs: int = 32
    """Environments stepped side by side."""
    num_steps: int = 64
    """Steps of each environment in one rollout."""
    epochs: int = 4
    """Times that each rollout is learned from."""
    minibatches: int = 16
    """Gradient steps an epoch; they divide the rollout into equal parts."""
    learning_rate: float = 5e-4
    """RAdam's step size."""
    learning_rate_final: float | None = 0.0
    """Step size that `learning_rate` falls to, linearly over the training; None keeps it constant."""
    encoder_learning_rate: float | None = None
    """Step size of the encoder (of a backbone: without its projection), in proportion where `learning_rate`
    falls; 0 freezes it, None is `learning_rate`."""
    gamma: float = 0.99
    """Discount a step, in [0, 1]."""
    q_lambda: float = 0.65
    """How far targets look along the rollout, in [0, 1]: 0 takes the next value, 1 all later rewards."""
    exploration_initial: float = 1.0
    """Epsilon at the start."""
    exploration_final: float = 0.05
    """Epsilon at the end of its linear schedule, and from then on."""
    exploration_fraction: float = 0.1
    """Share of the training over which epsilon falls, in (0, 1]."""
    max_grad_norm: float = 10.0
    """L2 norm that gradients are clipped to."""
    compile: bool = False
    """Compile the loss and its gradient with torch.compile (about half a minute at the start)."""

    def __post_init__(self) -> None:
        for name in ("num_envs", "num_steps", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        rollout = self.num_envs * self.num_steps
        if rollout % self.minibatches:
            product = f"num_envs * num_steps = {self.num_envs} * {self.num_steps} = {rollout}"
            raise ValueError(f"minibatches must divide {product}, got {self.minibatches}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("learning_rate_final", "encoder_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("gamma", "q_lambda", "exploration_initial", "exploration_final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.exploration_fraction <= 1:
            raise ValueError(
                f"exploration_fraction must be greater than 0 and at most 1, got {self.exploration_fraction}"
            )


# Settings known to work, by environment id. MinAtar's and Atari's are the paper's. CartPole's are the
# defaults: the paper's own (a fifth of the step size, q_lambda .95, rewards divided by ten) learn more
# slowly. Where rewards are far away, short rollouts with a longer look ahead find them sooner.
RECIPES: dict[str, dict[str, Any]] = {
    "CartPole-v*": {},
    "Acrobot-v*": {
        "num_envs": 16,
        "num_steps": 32,
        "minibatches": 4,
        "q_lambda": 0.9,
        "exploration_fraction": 0.5,
    },
    "LunarLander-v*": {
        "num_envs": 16,
        "num_steps": 32,
        "minibatches": 4,
        "q_lambda": 0.9,
        "exploration_fraction": 0.3,
    },
    "foveal/GridWorld-v*": {
        "num_envs": 16,
        "num_steps": 32,
        "minibatches": 4,
        "epochs": 2,
        "exploration_fraction": 0.5,
    },
    "MinAtar/*": {"num_envs": 128, "num_steps": 32, "epochs": 2, "minibatches": 32},
    "ALE/*": {
        "num_envs": 128,
        "num_steps": 32,
        "epochs": 2,
        "minibatches": 32,
        "learning_rate": 2.5e-4,
        "learning_rate_final": None,
        "exploration_final": 0.001,
    },
}


def recipe(env_id: str, **changes: Any) -> PQNConfig:
    """The settings known to work on an environment (the defaults where none are), with `changes` made."""
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(env_id, pattern)), {})
    return PQNConfig(**{**settings, **changes})


def normalized_encoder(space: spaces.Space) -> str:
    """What `auto` means here: the encoders with layer normalisation, the small one for boards up to 16x16."""
    if isinstance(space, spaces.Dict):
        images = {normalized_encoder(part) for part in space.values() if is_image(part)}
        if not images:
            return "mlp-norm"
        return f"{images.pop() if len(images) == 1 else 'impala-norm'}+mlp-norm"
    if not is_image(space):
        return "mlp-norm"
    _, height, width = space.shape or ()
    if max(height, width) <= 16:
        return "minatar-norm"
    return "nature-norm" if min(height, width) >= 36 else "impala-norm"


class Rollout(NamedTuple):
    """T steps of N environments, on the device, and what was then known of their values.

    obs                     (T, N, ...), or a dict of such
    actions                 int64 (T, N), counted from 0
    rewards, next_q_max     float32 (T, N); max_a Q of each step's true successor
    terminated, truncated   bool (T, N)
    """

    obs: Any
    actions: Tensor
    rewards: Tensor
    next_q_max: Tensor
    terminated: Tensor
    truncated: Tensor


# The algorithm, as functions that touch only what they are given. `network` is anything that maps
# observations to values: a module, or torch.func.functional_call on stacked weights.


def q_loss(network: Callable[[Any], Tensor], obs: Any, actions: Tensor, targets: Tensor) -> Tensor:
    """(Q(s, a) - y)^2 / 2, mean over the batch. obs (B, ...), actions (B,) int64, targets (B,) -> scalar."""
    q = network(obs).gather(1, actions.unsqueeze(1)).squeeze(1)  # (B,)
    return 0.5 * F.mse_loss(q, targets)


def epsilon_at(env_steps: np.ndarray, total_steps: int, config: PQNConfig) -> np.ndarray:
    """Linear from initial to final over the first part of the training; same shape as `env_steps`."""
    progress = np.minimum(1.0, env_steps / (config.exploration_fraction * total_steps))
    return config.exploration_initial + progress * (config.exploration_final - config.exploration_initial)


class PQN(Agent):
    """Q-learning without replay or target network, for Discrete actions and any observations.

    >>> from foveal.agents import PQN
    >>> agent = PQN("CartPole-v1", seed=1).learn(300, progress=False)
    >>> agent.env_step, agent.grad_step
    (2048, 64)
    """

    name: ClassVar[str] = "pqn"
    Config: ClassVar[type] = PQNConfig
    recipe = staticmethod(recipe)
    config: PQNConfig

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: PQNConfig | None = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(env, config, encoder, seed, device)
        if not isinstance(self.action_space, spaces.Discrete):
            raise ValueError(
                f"pqn takes Discrete actions; {self.env_spec()['env_id']} has {self.action_space}"
            )
        if encoder == "auto":
            encoder = self.encoder_name = normalized_encoder(self.observation_space)
        self.num_actions, self.first_action = int(self.action_space.n), int(self.action_space.start)
        self.acting_rng, self.shuffling_rng, self.predict_rng, weights_seed = random_streams(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            if not isinstance(encoder, nn.Module):
                encoder = make_encoder(encoder, self.observation_space)
            self.adopt(QNetwork(encoder, self.num_actions))
        self.radam = adam_state(self.weights)
        self.loss: Callable[..., Tensor] = q_loss
        self.epsilon = self.config.exploration_initial
        self.obs: Any = None
        """Made when training starts: an agent that only acts needs no environments."""

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        """Whole rollouts until `env_step` reaches `total_steps`; rows come at the end of rollouts only."""
        config, env = self.config, self.env
        self.start()
        report = Report(self, ("q_loss",))

        while self.env_step < total_steps:
            # Act.
            before = self.env_step
            epsilon = epsilon_at(before + env.num_envs * np.arange(config.num_steps), total_steps, config)
            rollout = self.collect(epsilon)
            self.epsilon = float(epsilon[-1])
            self.env_step += config.num_steps * env.num_envs

            # Learn.
            targets = q_lambda(*rollout[2:], config.gamma, config.q_lambda)
            rate = linear(config.learning_rate, config.learning_rate_final, before / total_steps)
            updates = self.grad_step
            loss_sum = self.update(rollout, targets, rate)
            report.add(loss_sum, self.grad_step - updates)
            self.check({"q_loss": loss_sum})

            # Report.
            if passes(log_every, before, self.env_step) or self.env_step >= total_steps:
                yield report.row(**{"train/epsilon": self.epsilon})
                report.restart()

    def start(self) -> None:
        if self.obs is None:
            self.obs = self.env.reset()
        if self.config.compile and self.loss is q_loss:
            obs = to_tensors(self.obs, self.observation_space, self.device)
            zeros = torch.zeros(self.env.num_envs, device=self.device)
            self.loss = compile_or_eager(q_loss, self.network, obs, zeros.long(), zeros)

    @torch.no_grad()
    def collect(self, epsilon: np.ndarray) -> Rollout:
        """Step all environments len(epsilon) times, epsilon-greedily.

        The values of a step's successor are those that the next step acts on, so each observation goes
        through the network once; only the last ones, and the final ones of truncated episodes, are extra.
        """
        env, num_envs = self.env, self.env.num_envs
        shape = (len(epsilon), num_envs)
        explore = self.acting_rng.random(shape) < epsilon[:, None]  # each environment draws its own
        chosen = self.acting_rng.integers(self.num_actions, size=shape)
        observed, q_max, steps = [], [], []
        cut: list[tuple[int, int]] = []  # (t, n) of truncations, and the observations they ended with
        finals: list[Any] = []
        for t in range(len(epsilon)):
            obs = to_tensors(self.obs, self.observation_space, self.device)
            best, greedy = self.network(obs).max(1)
            np.copyto(chosen[t], greedy.numpy(force=True), where=~explore[t])
            step = env.step(chosen[t] + self.first_action)
            observed.append(obs)
            q_max.append(best)
            steps.append((step.rewards, step.terminated, step.truncated))
            if step.episodes:
                self.episodes += step.episodes
                ends = np.flatnonzero(step.truncated & ~step.terminated)
                if len(ends):
                    cut += [(t, int(n)) for n in ends]
                    finals.append(map_tensors(operator.itemgetter(ends), step.next_obs))
            self.obs = step.obs
        last = combine(np.concatenate, [self.obs, *finals])
        values = self.network(to_tensors(last, self.observation_space, self.device)).amax(1)
        next_q_max = torch.stack([*q_max[1:], values[:num_envs]])
        if cut:
            next_q_max[tuple(zip(*cut))] = values[num_envs:]
        rewards, terminated, truncated = (
            torch.as_tensor(np.stack(x), device=self.device) for x in zip(*steps)
        )
        actions = torch.as_tensor(chosen, device=self.device)
        return Rollout(combine(torch.stack, observed), actions, rewards, next_q_max, terminated, truncated)

    def update(self, rollout: Rollout, targets: Tensor, learning_rate: float) -> Tensor:
        """Epochs of shuffled minibatches; the sum of their losses, still on the device."""
        config, network = self.config, self.network

        def flatten(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1)  # (T, N, ...) -> (T * N, ...)

        obs, actions, targets = map_tensors(flatten, rollout.obs), flatten(rollout.actions), flatten(targets)
        loss_sum = torch.zeros((), device=self.device)
        set_training(self.modal, True)  # dropout and the like belong to the loss alone
        for _ in range(config.epochs):
            order = torch.randperm(len(actions), generator=self.shuffling_rng).to(self.device)
            for index in order.view(config.minibatches, -1).unbind():
                pick = functools.partial(torch.index_select, dim=0, index=index)
                loss = self.loss(network, map_tensors(pick, obs), pick(actions), pick(targets))
                take_gradient(loss, self.parameters, self.gradients)
                clip_norm(self.gradient, config.max_grad_norm)
                with self.paced():
                    radam_step(self.weights, self.gradient, self.radam, learning_rate)
                loss_sum += loss.detach()
                self.grad_step += 1
        set_training(self.modal, False)
        return loss_sum

    def actions(
        self, obs: Any, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        # Greedy actions draw nothing, others from a stream of their own: predicting never changes a training.
        epsilon = 0.0 if deterministic else self.config.exploration_final
        actions = act(self.network, obs, self.num_actions, epsilon, self.predict_rng)
        return actions + self.first_action, state

    # Checkpoints. They are taken between rollouts, so there is no half of one to keep.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.start()
        tensors = {f"radam.{name}": tensor for name, tensor in self.radam._asdict().items()}
        tensors["shuffling_rng"] = self.shuffling_rng.get_state()
        env_arrays, env_meta = self.env.state()
        tensors |= {f"env.{name}": torch.as_tensor(array) for name, array in env_arrays.items()}
        meta = {
            "env": env_meta,
            "acting_rng": rng_to_json(self.acting_rng),
            "predict_rng": rng_to_json(self.predict_rng),
            "epsilon": self.epsilon,
        }
        return tensors, meta

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        self.shuffling_rng.set_state(tensors["shuffling_rng"])
        rng_from_json(self.acting_rng, meta["acting_rng"])
        rng_from_json(self.predict_rng, meta["predict_rng"])
        self.epsilon = meta["epsilon"]
        for name, tensor in self.radam._asdict().items():
            tensor.copy_(tensors[f"radam.{name}"])
        arrays = {k.removeprefix("env."): v.numpy() for k, v in tensors.items() if k.startswith("env.")}
        self.obs, exact = self.env.restore(arrays, meta["env"])
        return exact


def combine(join: Callable[[list[Any]], Any], trees: list[Any]) -> Any:
    """`join` of a list of arrays or tensors; of dicts of them, key by key."""
    if isinstance(trees[0], dict):
        return {key: join([tree[key] for tree in trees]) for key in trees[0]}
    return join(trees)

"""Stable-Baselines3's algorithms as agents: the same environments, encoders, run folders and metrics.

What learns is Stable-Baselines3's own code: `collect_rollouts` and `train`, in the order and with the
schedules of its `learn`, so that the weights are bit for bit those of `model.learn(total_steps)` on the same
SB3VecEnv. Settings bear its names, and the recipes are those of its zoo (`sb3_settings`). Nothing of it is
imported before such an agent is made.

Its own files are pickles, so weights are kept as every agent here keeps them, and its replay, optimizer and
random state are not kept: a run cannot be resumed.
"""

import copy
import importlib
import importlib.util
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import VectorEnv
from ..vision import is_image, make_encoder
from . import sb3_settings as zoo
from .agent import Agent, Row, UnmadeEnv, channels_first, check_finite, is_single, passes, random_streams
from .on_policy import encoder_for

POLICY_ARGUMENTS = {
    *("net_arch", "log_std_init", "ortho_init"),
    *("lstm_hidden_size", "enable_critic_lstm", "n_quantiles"),
}
"""Settings that Stable-Baselines3 takes as policy_kwargs, where they are not None."""
OUR_ARGUMENTS = {
    *("num_envs", "activation", "normalize", "rms_prop_tf"),
    *("learning_rate_final", "clip_range_final"),
}
"""Settings that are not its own."""

LOSSES = ("policy_loss", "value_loss", "entropy", "q_loss")
SCHEDULES = ("learning_rate", "clip", "epsilon")


class SB3Agent(Agent):
    """An algorithm of Stable-Baselines3's, which subclasses name."""

    resumable: ClassVar[bool] = False
    algorithm: ClassVar[str]
    """`package:Class`."""
    policies: ClassVar[str] = "Policy"
    """What the names of its policies end in: Mlp*, Cnn*, MultiInput*."""
    actions_taken: ClassVar[tuple[type[spaces.Space], ...]] = (
        spaces.Discrete,
        spaces.MultiDiscrete,
        spaces.MultiBinary,
        spaces.Box,
    )
    metrics: ClassVar[dict[str, str]] = {
        "train/policy_gradient_loss": "policy_loss",
        "train/policy_loss": "policy_loss",
        "train/policy_objective": "policy_objective",
        "train/value_loss": "value_loss",
        "train/entropy_loss": "entropy",
        "train/approx_kl": "approx_kl",
        "train/kl_divergence_loss": "approx_kl",
        "train/clip_fraction": "clip_fraction",
        "train/explained_variance": "explained_variance",
        "train/learning_rate": "learning_rate",
        "train/clip_range": "clip",
    }
    """Its names to ours."""

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: Any = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        """`encoder` may also be "sb3", its own network, which `auto` is for vectors."""
        super().__init__(env, config, encoder, seed, device)
        self._check_spaces()
        if encoder == "auto":
            encoder = self.encoder_name = self.default_encoder()
        self.predict_rng = random_streams(seed)[2]
        self._random: tuple[Any, ...] | None = None
        with self._own_random():
            self._make_model(encoder)
        self.network = Network(self.model.policy, self.normalizer)

    def _check_spaces(self) -> None:
        name, env_id = self.name, self.env_spec()["env_id"]
        actions = self.action_space
        if not isinstance(actions, self.actions_taken):
            kinds = " or ".join(kind.__name__ for kind in self.actions_taken)
            raise ValueError(f"{name} takes {kinds} actions; {env_id} has {_line(actions)}")
        if not _is_taken(actions, action=True):
            raise ValueError(
                f"{name} takes actions that are bits or count from 0 and are no matrices, and bounded boxes; "
                f"{env_id} has {_line(actions)}"
            )
        space = self.observation_space
        if not _is_taken(space):
            raise ValueError(
                f"{name} takes observations that are boxes, bits, or count from 0 and are no matrices, or a "
                f"dict of these; {env_id} has {_line(space)}"
            )
        if self.config.normalize and not _vectors(space):
            raise ValueError(
                f"normalize takes observations that are vectors of floats; {env_id} has {_line(space)}"
            )
        if getattr(self.config, "use_sde", False) and not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"use_sde takes Box actions; {env_id} has {_line(actions)}")

    def default_encoder(self) -> str:
        """Ours for images, as PPO and A2C here have them; its own network for vectors."""
        space = self.observation_space
        parts = space.values() if isinstance(space, spaces.Dict) else [space]
        return encoder_for(space) if any(is_image(part) for part in parts) else "sb3"

    def _make_model(self, encoder: str | nn.Module) -> None:
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.utils import set_random_seed
        from stable_baselines3.common.vec_env import VecNormalize

        from ..envs.sb3 import SB3VecEnv

        config, env_id = self.config, self.env_spec()["env_id"]
        # An agent that was loaded has no environments until it trains; this asks for their spaces alone.
        self.vec_env = SB3VecEnv(self._env)  # type: ignore[arg-type]
        vec_env: Any = self.vec_env
        self.normalizer: Any = None
        if config.normalize:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            keys = _vectors(self.observation_space) if is_dict else None
            vec_env = self.normalizer = VecNormalize(vec_env, gamma=config.gamma, norm_obs_keys=keys)
        policy_kwargs = self._policy_kwargs(encoder)
        arguments = {k: v for k, v in vars(config).items() if k not in POLICY_ARGUMENTS | OUR_ARGUMENTS}
        for name in ("learning_rate", "clip_range"):
            final = getattr(config, f"{name}_final", None)
            if final is not None:
                arguments[name] = _falling(arguments[name], final)
        if "buffer_size" in arguments:
            arguments["buffer_size"] = 1  # `start` makes the real one; an agent that only acts needs none
        # Seeded as it seeds itself, but for the environments, which keep the seed that they were made with.
        set_random_seed(self.seed, using_cuda=self.device.type == "cuda")
        vec_env.action_space.seed(self.seed)
        package, _, name = self.algorithm.partition(":")
        try:
            self.model: Any = getattr(importlib.import_module(package), name)(
                self._policy_name(encoder),
                vec_env,
                **arguments,
                policy_kwargs=policy_kwargs,
                stats_window_size=None,  # all episodes: each row takes them out
                device=self.device,
            )
        except RuntimeError as error:
            if encoder != "sb3":
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"encoder 'sb3' cannot take {env_id}'s observations: {reason}") from error
        self.model.set_logger(Logger(None, []))
        self.model.policy.optimizer.register_step_post_hook(self._count_step)

    def _count_step(self, *_: Any) -> None:
        self.grad_step += 1

    def _policy_name(self, encoder: str | nn.Module) -> str:
        from stable_baselines3.common.preprocessing import is_image_space

        if isinstance(self.observation_space, spaces.Dict):
            return f"MultiInput{self.policies}"
        images = is_image_space if encoder == "sb3" else is_image
        return f"{'Cnn' if images(self.observation_space) else 'Mlp'}{self.policies}"

    def _policy_kwargs(self, encoder: str | nn.Module) -> dict[str, Any]:
        settings = {name: getattr(self.config, name, None) for name in POLICY_ARGUMENTS}
        kwargs = {name: value for name, value in settings.items() if value is not None}
        kwargs["activation_fn"] = {"tanh": nn.Tanh, "relu": nn.ReLU}[self.config.activation]
        if "net_arch" in kwargs:
            kwargs["net_arch"] = list(kwargs["net_arch"])
        if encoder == "sb3":
            return kwargs
        kwargs |= {"features_extractor_class": _extractor(encoder), "normalize_images": False, "net_arch": []}
        # Orthogonal initialisation would overwrite an encoder that comes trained. One is made here only to
        # see whether it does, and to refuse a name that is none.
        probe = make_encoder(encoder, self.observation_space) if isinstance(encoder, str) else encoder
        if "ortho_init" in kwargs and (probe is encoder or getattr(probe, "loaded_as", None) is not None):
            kwargs["ortho_init"] = False
        return kwargs

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Within it the global generators, which Stable-Baselines3 draws from, are as it left them."""
        outside = _global_random(self.device)
        if self._random is not None:
            _set_global_random(self._random, self.device)
        try:
            yield
        finally:
            self._random = _global_random(self.device)
            _set_global_random(outside, self.device)

    def start(self) -> None:
        model = self.model
        self.vec_env.env = self.env
        model.num_timesteps = self.env_step
        size = getattr(self.config, "buffer_size", None)
        if size is not None and model.buffer_size != size:
            try:
                model.replay_buffer = model.replay_buffer_class(
                    size,
                    model.observation_space,
                    model.action_space,
                    device=model.device,
                    n_envs=model.n_envs,
                    **model.replay_buffer_kwargs,
                )
            except (MemoryError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"buffer_size {size:,} does not fit into memory: {reason}") from error
            model.buffer_size = size

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        self.start()
        model = self.model
        with self._own_random():
            _, callback = model._setup_learn(total_steps - self.env_step, reset_num_timesteps=False)
        window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step
        while self.env_step < total_steps:
            measured: dict[str, list[float]] = {}
            row_due = False
            with self._own_random():
                while not row_due:
                    before = self.env_step
                    self.iterate(callback, total_steps)
                    self.env_step = model.num_timesteps
                    for name, value in self._measured().items():
                        measured.setdefault(name, []).append(value)
                    row_due = passes(log_every, before, self.env_step) or self.env_step >= total_steps
            now = time.perf_counter()
            row: Row = {"env_step": self.env_step, "grad_step": self.grad_step}
            episodes = model.ep_info_buffer
            if episodes:
                row["train/return_mean"] = float(np.mean([episode["r"] for episode in episodes]))
                row["train/length_mean"] = float(np.mean([episode["l"] for episode in episodes]))
            row["train/episodes"] = len(episodes)
            episodes.clear()
            for name, values in measured.items():
                row[f"train/{name}"] = values[-1] if name in SCHEDULES else float(np.mean(values))
            row["speed/env_steps_per_s"] = (self.env_step - window_step) / (now - window)
            row["speed/updates_per_s"] = (self.grad_step - window_updates) / (now - window)
            yield row
            window, window_step, window_updates = time.perf_counter(), self.env_step, self.grad_step

    def iterate(self, callback: Any, total_steps: int) -> None:
        """One turn of the loop in its `learn`: a rollout, and the updates that follow."""
        model = self.model
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
        model._update_current_progress_remaining(model.num_timesteps, total_steps)
        model.train()

    def _measured(self) -> dict[str, float]:
        """What its logger was told since the last call, in our names; FloatingPointError for a NaN loss."""
        told = self.model.logger.name_to_value
        values = {name: float(told[theirs]) for theirs, name in self.metrics.items() if theirs in told}
        told.clear()
        if "entropy" in values:
            values["entropy"] *= -1
        losses = {name: value for name, value in values.items() if name in LOSSES}
        check_finite(losses, self.env_step, self.grad_step)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def predict(
        self,
        obs: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        obs = channels_first(obs, self.observation_space)
        is_single(obs, self.observation_space)  # refuses what is neither one nor a batch
        if self.normalizer is not None:
            obs = self.normalizer.normalize_obs(obs)
        policy = self.model.policy
        if deterministic:
            actions, state = policy.predict(obs, state, episode_start, deterministic=True)
        else:
            # From a stream of its own: predicting never changes a training.
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(int(self.predict_rng.integers(2**63)))
                actions, state = policy.predict(obs, state, episode_start, deterministic=False)
            actions = self.explore(actions)
        return np.asarray(actions, self.action_space.dtype), state

    def explore(self, actions: np.ndarray) -> np.ndarray:
        """What is at random beside the policy's own sampling."""
        return actions


class OffPolicyAgent(SB3Agent):
    """A value-based algorithm of Stable-Baselines3's."""

    actions_taken: ClassVar[tuple[type[spaces.Space], ...]] = (spaces.Discrete,)
    metrics: ClassVar[dict[str, str]] = {
        "train/loss": "q_loss",
        "train/learning_rate": "learning_rate",
        "rollout/exploration_rate": "epsilon",
    }

    def default_encoder(self) -> str:
        """Ours for images, as DQN here has them; its own network for vectors."""
        return "sb3" if super().default_encoder() == "sb3" else "auto"

    def _check_spaces(self) -> None:
        super()._check_spaces()
        if self.config.n_steps > 1 and isinstance(self.observation_space, spaces.Dict):
            raise ValueError(f"n_steps must be 1 for Dict observations, got {self.config.n_steps}")

    def iterate(self, callback: Any, total_steps: int) -> None:
        model = self.model
        rollout = model.collect_rollouts(
            model.env,
            train_freq=model.train_freq,
            action_noise=model.action_noise,
            callback=callback,
            learning_starts=model.learning_starts,
            replay_buffer=model.replay_buffer,
        )
        if model.num_timesteps > model.learning_starts:
            steps = model.gradient_steps if model.gradient_steps >= 0 else rollout.episode_timesteps
            model.train(batch_size=model.batch_size, gradient_steps=steps)

    def explore(self, actions: np.ndarray) -> np.ndarray:
        shape, rng = np.shape(actions), self.predict_rng
        at_random = rng.random(shape) < self.config.exploration_final_eps
        return np.where(at_random, rng.integers(self.action_space.n, size=shape), actions)  # type: ignore[attr-defined]


class SB3DQN(OffPolicyAgent):
    """Stable-Baselines3's DQN, for Discrete actions."""

    name: ClassVar[str] = "sb3/dqn"
    algorithm: ClassVar[str] = "stable_baselines3:DQN"
    Config: ClassVar[type] = zoo.DQNConfig
    recipe = staticmethod(zoo.recipe_of(zoo.DQNConfig, zoo.DQN_RECIPES))


class SB3A2C(SB3Agent):
    """Stable-Baselines3's A2C."""

    name: ClassVar[str] = "sb3/a2c"
    algorithm: ClassVar[str] = "stable_baselines3:A2C"
    Config: ClassVar[type] = zoo.A2CConfig
    recipe = staticmethod(zoo.recipe_of(zoo.A2CConfig, zoo.A2C_RECIPES))

    def _policy_kwargs(self, encoder: str | nn.Module) -> dict[str, Any]:
        kwargs = super()._policy_kwargs(encoder)
        if self.config.rms_prop_tf:
            from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

            kwargs["optimizer_class"] = RMSpropTFLike
            kwargs["optimizer_kwargs"] = {"eps": self.config.rms_prop_eps}
        return kwargs


class SB3PPO(SB3Agent):
    """Stable-Baselines3's PPO.

    >>> from foveal.agents.sb3 import SB3PPO
    >>> agent = SB3PPO("CartPole-v1", seed=1).learn(256, progress=False)
    >>> agent.predict(agent.env.reset(), deterministic=True)[0].shape
    (8,)
    """

    name: ClassVar[str] = "sb3/ppo"
    algorithm: ClassVar[str] = "stable_baselines3:PPO"
    Config: ClassVar[type] = zoo.PPOConfig
    recipe = staticmethod(zoo.recipe_of(zoo.PPOConfig, zoo.PPO_RECIPES))


class SB3RecurrentPPO(SB3Agent):
    """sb3-contrib's PPO with an LSTM."""

    name: ClassVar[str] = "sb3/recurrent_ppo"
    algorithm: ClassVar[str] = "sb3_contrib:RecurrentPPO"
    policies: ClassVar[str] = "LstmPolicy"
    Config: ClassVar[type] = zoo.RecurrentPPOConfig
    recipe = staticmethod(zoo.recipe_of(zoo.RecurrentPPOConfig, zoo.RECURRENT_PPO_RECIPES))


class SB3QRDQN(OffPolicyAgent):
    """sb3-contrib's quantile regression DQN, for Discrete actions."""

    name: ClassVar[str] = "sb3/qrdqn"
    algorithm: ClassVar[str] = "sb3_contrib:QRDQN"
    Config: ClassVar[type] = zoo.QRDQNConfig
    recipe = staticmethod(zoo.recipe_of(zoo.QRDQNConfig, zoo.QRDQN_RECIPES))


class SB3TRPO(SB3Agent):
    """sb3-contrib's TRPO."""

    name: ClassVar[str] = "sb3/trpo"
    algorithm: ClassVar[str] = "sb3_contrib:TRPO"
    Config: ClassVar[type] = zoo.TRPOConfig
    recipe = staticmethod(zoo.recipe_of(zoo.TRPOConfig, zoo.TRPO_RECIPES))


SB3_AGENTS: dict[str, type[Agent]] = {
    agent.name: agent
    for agent in (SB3DQN, SB3A2C, SB3PPO, SB3RecurrentPPO, SB3QRDQN, SB3TRPO)
    if importlib.util.find_spec(agent.algorithm.partition(":")[0])
}


class Network(nn.Module):
    """A policy of Stable-Baselines3's as our files have it.

    Its parameters are those that learn (a target network's do not). Its `state_dict` is the whole policy's,
    with the encoder's tensors under `encoder.`, where every file has them, and each tensor once, though an
    encoder shared by policy and value is in there three times; and the statistics of a VecNormalize, float64.
    """

    def __init__(self, policy: nn.Module, normalizer: Any):
        super().__init__()
        part = next((name for name in ("q_net", "quantile_net") if hasattr(policy, name)), None)
        self.online = getattr(policy, part) if part else policy
        self.prefix = f"{part}.features_extractor." if part else "features_extractor."
        self.policy = (policy,)  # in a tuple, which keeps it from being a module of this one
        self.statistics: dict[str, Any] = {}
        if normalizer is not None:
            self.statistics["normalize.returns"] = normalizer.ret_rms
            by_key = normalizer.obs_rms
            named = by_key.items() if isinstance(by_key, dict) else [("obs", by_key)]
            self.statistics |= {f"normalize.{key}": statistic for key, statistic in named}

    @property
    def encoder(self) -> nn.Module:
        return self.online.features_extractor  # type: ignore[return-value]

    def _names(self) -> dict[str, str]:
        """The policy's name of each of its tensors to ours."""
        first: dict[int, str] = {}
        names = {}
        for name, tensor in self.policy[0].state_dict().items():
            ours = f"encoder.{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name
            names[name] = first.setdefault(tensor.data_ptr(), ours)
        return names

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        tensors = self.policy[0].state_dict()
        stored = {ours: tensors[name] for name, ours in self._names().items()}
        for name, statistic in self.statistics.items():
            for part in ("mean", "var", "count"):
                stored[f"{name}.{part}"] = torch.tensor(getattr(statistic, part), dtype=torch.float64)
        return stored

    def load_state_dict(self, tensors: Mapping[str, Any], *_: Any, **__: Any) -> Any:  # type: ignore[override]
        for name, statistic in self.statistics.items():
            for part in ("mean", "var", "count"):
                setattr(statistic, part, tensors[f"{name}.{part}"].numpy(force=True).copy())
        return self.policy[0].load_state_dict({name: tensors[ours] for name, ours in self._names().items()})


def _extractor(encoder: str | nn.Module) -> type:
    """What Stable-Baselines3 makes its features with: a class, which it calls once for every network."""
    given = [encoder]

    class Extractor:
        def __new__(cls, observation_space: spaces.Space) -> Any:
            if isinstance(encoder, str):
                return make_encoder(encoder, observation_space)
            return given.pop() if given else copy.deepcopy(encoder)  # the first is the one that learns

    return Extractor


def _falling(initial: float, final: float) -> Callable[[float], float]:
    """A schedule in its terms: of the share of the training that remains.

    That is negative after a last rollout that went beyond the end, where the zoo's own schedule is then too.
    """
    return lambda remaining: final + max(0.0, remaining) * (initial - final)


def _is_taken(space: spaces.Space, action: bool = False) -> bool:
    match space:
        case spaces.Dict():
            return all(not isinstance(part, spaces.Dict) and _is_taken(part) for part in space.values())
        case spaces.Discrete():
            return int(space.start) == 0
        case spaces.MultiDiscrete():
            return space.nvec.ndim == 1 and not space.start.any()
        case spaces.MultiBinary():
            return not action or isinstance(space.n, int)
        case spaces.Box():
            return not action or space.is_bounded()
    return False


def _vectors(space: spaces.Space) -> list[str]:
    """Keys of the boxes of floats that are no images; [""] where the space itself is one."""
    parts = dict(space) if isinstance(space, spaces.Dict) else {"": space}
    boxes = {key: part for key, part in parts.items() if isinstance(part, spaces.Box) and not is_image(part)}
    return [key for key, part in boxes.items() if np.issubdtype(part.dtype, np.floating)]


def _line(space: spaces.Space) -> str:
    return " ".join(str(space).split())


def _global_random(device: torch.device) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002


def _set_global_random(states: tuple[Any, ...], device: torch.device) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3], device)

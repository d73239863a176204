"""The Agent contract: what every algorithm here shares, and nothing of how it learns."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..envs import Episode, VectorEnv, make_vec
from ..vision import (
    describe_encoder,
    find_weights,
    is_image,
    read_weights,
    refuse_imports,
    resolve_device,
    space_from_json,
    space_to_json,
    write_weights,
)
from ..vision.optimization import flatten_parameters, keep_freed_memory, views_of, with_modes
from .progress import progress as progress_display

Row = dict[str, Any]
"""One row of metrics: `env_step` and flat names to numbers."""


class Logger(Protocol):
    """What `learn(run=...)` writes to; `foveal.runs.create_run` makes one."""

    def log(self, row: Row) -> None: ...


@dataclass
class UnmadeEnv:
    """What a weights file knows of an environment: enough to build networks, and to make it when needed."""

    spec: dict[str, Any]
    single_observation_space: spaces.Space
    single_action_space: spaces.Space
    frame_stack: int
    num_envs: int

    def spec_dict(self) -> dict[str, Any]:
        return self.spec

    def make(self) -> VectorEnv:
        try:
            return make_vec(**self.spec)
        except TypeError as error:
            raise ValueError(
                f"the environment {self.spec} is not described as this version does: {error}"
            ) from error


class Agent:
    """Base of the agents: construction, `learn`, `predict`'s batching, `save` and `load`.

    A subclass defines `name`, `Config`, `training`, `actions`, `state` and `restore`, and in its constructor
    sets `network` (with an `encoder` in it).
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    recipe: Callable[..., Any]
    """`recipe(env_id, **changes)`: the Config known to work on an environment."""
    resumable: ClassVar[bool] = True
    """Whether there are `state` and `restore`; without them a checkpoint is weights alone."""
    network: nn.Module
    config: Any
    run_options: ClassVar[dict[str, Any]] = {}
    """Defaults of a training run's options that are other ones for this agent."""
    step_name: ClassVar[str] = "environment steps"
    """What `env_step` counts, for the axis of a plot."""
    converged: bool = False
    """Nothing is left to learn, and `training` ends before its last step; only agents that plan know."""

    def __init__(
        self,
        env: str | VectorEnv | UnmadeEnv,
        config: Any = None,
        encoder: str | nn.Module = "auto",
        seed: int = 0,
        device: str = "auto",
    ):
        """`env` is an id, or environments from `make_vec`, whose number then wins over the config's.

        Without a config it is the recipe for them. `encoder` is a name that `make_encoder` knows, or an
        encoder, which the agent then owns. Raises ValueError for whatever the agent cannot take.
        """
        if isinstance(encoder, type):
            raise ValueError(f"encoder must be a name or an encoder, got the class {encoder.__name__}")
        if isinstance(encoder, nn.Module) and not isinstance(getattr(encoder, "features_dim", None), int):
            raise ValueError(f"encoder must have a features_dim, got {type(encoder).__name__} without one")
        if not (config is None or isinstance(config, self.Config)):
            raise ValueError(f"config must be a {self.Config.__name__}, got {type(config).__name__}")
        if not isinstance(env, str | VectorEnv | UnmadeEnv):
            raise ValueError(
                f"env must be an environment id or what foveal.envs.make_vec gave, got {type(env).__name__}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        self.seed = int(seed)
        self.device = resolve_device(device)
        self.encoder_name = encoder if isinstance(encoder, str) else None
        if isinstance(env, str):
            config = config or self.recipe(env)
            env = make_vec(env, num_envs=config.num_envs, seed=seed)
        config = config or self.recipe(env.spec_dict()["env_id"])
        self.config = replace(config, num_envs=env.num_envs)
        self._env = env
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space
        self.env_step = 0
        """Environment steps taken, all environments together."""
        self.grad_step = 0
        """Optimizer steps taken."""
        self.episodes: list[Episode] = []
        """Finished since the last row of metrics."""

    @property
    def step(self) -> int:
        """What checkpoints are counted in."""
        return self.env_step

    @property
    def env(self) -> VectorEnv:
        """The training environments; made at first use where the agent was loaded from a file."""
        if isinstance(self._env, UnmadeEnv):
            self._env = self._env.make()
        return self._env

    def env_spec(self) -> dict[str, Any]:
        """Arguments of `make_vec` that make the training environments again."""
        return self._env.spec_dict()

    def training(self, total_steps: int, log_every: int = 1000) -> Iterator[Row]:
        """Train until `env_step` reaches `total_steps`; yield a row of metrics every `log_every` env steps.

        Between two rows the agent is whole: it may be evaluated, saved, or left.
        """
        raise NotImplementedError

    def learn(
        self,
        total_steps: int,
        callback: Callable[[Self, Row], bool | None] | None = None,
        progress: bool = True,
        run: Logger | None = None,
        log_every: int = 1000,
    ) -> Self:
        """Train for `total_steps` further environment steps.

        `callback(agent, row)` sees every row and stops the training by returning False. `run.log(row)` is
        called with every row.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be 1 or more, got {total_steps}")
        end = self.env_step + total_steps
        label = f"{self.name} {self.env_spec()['env_id']}"
        with progress_display(end, self.env_step, enabled=progress, label=label) as show:
            for row in self.training(end, log_every):
                show(row)
                if run is not None:
                    run.log(row)
                if callback is not None and callback(self, row) is False:
                    break
        return self

    def predict(
        self,
        obs: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions for raw observations, in Stable-Baselines3's convention.

        `obs` is one observation or a batch (B, ...), numpy, or a dict of them; images may be channels last,
        as the environment itself may give them. The actions have a leading B only where the observations do.
        `state` and `episode_start` (B,) are for agents with memory; others return `state` as it came.
        """
        obs = channels_first(obs, self.observation_space)
        single = is_single(obs, self.observation_space)
        batch = to_tensors(obs, self.observation_space, self.device, add_batch=single)
        actions, state = self.actions(batch, state, episode_start, deterministic)
        return (actions[0] if single else actions), state

    def actions(
        self, obs: Any, state: Any, episode_start: np.ndarray | None, deterministic: bool
    ) -> tuple[np.ndarray, Any]:
        """Actions (B, ...) for a batch of observations on the device, and the state for the next ones."""
        raise NotImplementedError

    def adopt(self, network: nn.Module) -> None:
        """Take a network to train: on the device, all weights in one tensor and their gradient in another.

        Encoders' trunks (all but the projection of a backbone) learn at `config.encoder_learning_rate`; at 0
        they stay as they are, in evaluation mode too.
        """
        # Convolutions' weights channels last in memory: their gradient takes a third less time on a CPU.
        self.network = network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoders = [getattr(network, name, None) for name in ("encoder", "value_encoder")]
        trunks = nn.ModuleList(getattr(e, "trunk", e) for e in encoders if e is not None)
        rate: float | None = getattr(self.config, "encoder_learning_rate", None)
        if rate == 0:
            trunks.requires_grad_(False)
        self.weights = flatten_parameters(self.network)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.pace: Tensor | None = None
        """Of each weight the share of the step size that it takes (P,); None where all take all of it."""
        if rate:
            slow = {id(p) for p in trunks.parameters()}
            share = rate / self.config.learning_rate
            paces = [torch.full((p.numel(),), share if id(p) in slow else 1.0) for p in self.parameters]
            self.pace = torch.cat(paces).to(self.device)
        keep_freed_memory()
        self.gradient = torch.empty_like(self.weights, requires_grad=False)
        self.gradients = views_of(self.gradient, self.parameters)
        self.network.eval()
        still = set(trunks.modules()) if rate == 0 else set()
        self.modal = [module for module in with_modes(self.network) if module not in still]

    @contextmanager
    def paced(self) -> Iterator[None]:
        """What an optimizer's step changes within it counts by each weight's pace."""
        if self.pace is None:
            yield
            return
        weights = self.weights.detach()
        before = weights.clone()
        yield
        torch.lerp(before, weights, self.pace, out=weights)

    def check(self, losses: Mapping[str, Tensor | float]) -> None:
        """FloatingPointError where a loss, or a weight after the step, is not finite: never to be saved."""
        weights = self.weights.detach().sum()  # one NaN or infinity makes it so
        check_finite({**losses, "sum of weights": weights}, self.env_step, self.grad_step)

    def describe(self) -> dict[str, Any]:
        """What a weights file says beside its tensors; enough to build the agent again."""
        return {
            "agent": self.name,
            "config": asdict(self.config),
            "seed": self.seed,
            "env_step": self.env_step,
            "grad_step": self.grad_step,
            "encoder": self.describe_network(),
            "env": self.env_spec(),
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "frame_stack": self._env.frame_stack,
        }

    def describe_network(self) -> dict[str, Any]:
        """The encoder's name and spec, from which the constructor builds the network again."""
        return describe_encoder(self.encoder_name, self.network.encoder, self.observation_space)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> Path:
        """Write the weights and the description of this agent to one safetensors file."""
        path = Path(path)
        write_weights(path, self.network.state_dict(), self.describe())
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: str | VectorEnv | None = None,
        encoder: nn.Module | None = None,
        device: str = "auto",
    ) -> Self:
        """Build the agent that a weights file, checkpoint or run folder holds.

        Its environment is made from the file at first use, unless `env` is given. `encoder` is needed where
        the agent was built with an encoder object of your own. Raises FileNotFoundError, or ValueError where
        the file is damaged, of another version, or of another agent.
        """
        path = find_weights(Path(path))
        tensors, description = read_weights(path)
        if description.get("agent") != cls.name:
            raise ValueError(f"{path} holds a {description.get('agent')!r} agent, not {cls.name!r}")
        refuse_imports(description.get("env", {}).get("env_id"), path)
        try:
            agent = cls(
                env or _unmade(description),
                cls.Config(**description["config"]),
                encoder=encoder if encoder is not None else _encoder_name(path, description),
                seed=description["seed"],
                device=device,
            )
            agent.env_step, agent.grad_step = description["env_step"], description["grad_step"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a {cls.name} of this version: {error}") from error
        agent.load_weights(tensors, path)
        return agent

    def load_weights(self, tensors: dict[str, Tensor], source: Path) -> None:
        """Copy weights into the network; ValueError names the first tensor that does not fit."""
        mine = self.network.state_dict()
        for name in sorted(mine.keys() | tensors.keys()):
            here, there = mine.get(name), tensors.get(name)
            if here is None or there is None or here.shape != there.shape:
                shapes = [tuple(t.shape) if t is not None else "absent" for t in (there, here)]
                raise ValueError(
                    f"{source} is of another architecture: {name} is {shapes[0]} there and {shapes[1]} here"
                )
        self.network.load_state_dict(tensors)

    def start(self) -> None:
        """Make memory and take first observations, as `training` does by itself.

        Raises ValueError where the memory does not fit.
        """

    # What a checkpoint holds beyond the weights, so that a resumed run is the run that was never stopped.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but weights and replay: small tensors, and JSON."""
        raise NotImplementedError

    def segments(self) -> Iterable[tuple[str, Callable[[], dict[str, Tensor]]]]:
        """Pieces of a replay as (name, read), the name new whenever the content is; none without a replay."""
        return ()

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        """Undo `state` and `segments`, whose pieces `load` reads by name.

        Raises ValueError, KeyError or RuntimeError for pieces that are not this agent's.

        Returns False where an environment could not be brought back exactly and starts a new episode.
        """
        raise NotImplementedError


def _unmade(description: dict[str, Any]) -> UnmadeEnv:
    return UnmadeEnv(
        description["env"],
        space_from_json(description["observation_space"]),
        space_from_json(description["action_space"]),
        description["frame_stack"],
        description["env"].get("num_envs", 1),
    )


def _encoder_name(path: Path, description: dict[str, Any]) -> str:
    name = description["encoder"]["name"]
    if name is None:
        raise ValueError(
            f"{path} was trained with an encoder object of its own; pass one like it as encoder="
        )
    for part in str(name).split("+"):
        refuse_imports(part, path)
    return name


def random_streams(seed: int) -> tuple[np.random.Generator, torch.Generator, np.random.Generator, int]:
    """The one door for seeds: streams to act, to sample (on the CPU), to predict; a seed for weights."""
    acting, sampling, predicting, weights = np.random.SeedSequence(seed).spawn(4)
    return (
        np.random.default_rng(acting),
        torch.Generator().manual_seed(_integer(sampling)),
        np.random.default_rng(predicting),
        _integer(weights),
    )


def _integer(sequence: np.random.SeedSequence) -> int:
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def rng_to_json(rng: np.random.Generator) -> str:
    """A numpy generator's state as text (its integers exceed JSON's safe range)."""
    return json.dumps(rng.bit_generator.state)


def rng_from_json(rng: np.random.Generator, state: str) -> None:
    rng.bit_generator.state = json.loads(state)


def channels_first(obs: Any, space: spaces.Space) -> Any:
    """Images (..., H, W, C) as (..., C, H, W), where that is what the space has; all else as it is."""
    if isinstance(space, spaces.Dict):
        return {key: channels_first(obs[key], part) for key, part in space.items()}
    shape = np.shape(obs)
    if is_image(space) and shape[-3:] != space.shape and (shape[-1:] + shape[-3:-1]) == space.shape:
        return np.moveaxis(obs, -1, -3)
    return obs


def is_single(obs: Any, space: spaces.Space) -> bool:
    """True for one observation, False for a batch; ValueError for neither."""
    if isinstance(space, spaces.Dict):
        key = next(iter(space.spaces))
        return is_single(obs[key], space[key])
    shape, wanted = np.shape(obs), space.shape or ()
    if shape == wanted:
        return True
    if shape[1:] == wanted:
        return False
    raise ValueError(f"obs has shape {shape}; one observation is {wanted}, a batch ({'B', *wanted})")


def to_tensors(obs: Any, space: spaces.Space, device: torch.device, add_batch: bool = False) -> Any:
    """numpy observations -> tensors on the device, images still uint8; a dict of them for a Dict space."""
    if isinstance(space, spaces.Dict):
        return {key: to_tensors(obs[key], part, device, add_batch) for key, part in space.items()}
    # from_numpy and a move are several times as fast as as_tensor with a device.
    tensor = torch.from_numpy(np.ascontiguousarray(obs).reshape(np.shape(obs))).to(device)
    return tensor.unsqueeze(0) if add_batch else tensor


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to a tensor, or to every tensor of (nested) dicts."""
    if isinstance(tree, dict):
        return {key: map_tensors(function, part) for key, part in tree.items()}
    return function(tree)


def unbind(tree: Any) -> list[Any]:
    """A tensor (T, ...), or dicts of them, as a list of T of the rest."""
    if isinstance(tree, dict):
        return [dict(zip(tree, parts)) for parts in zip(*(unbind(part) for part in tree.values()))]
    return list(tree.unbind())


def check_finite(losses: Mapping[str, Any], env_step: int, grad_step: int) -> None:
    """Raise FloatingPointError, which names the loss and the step, where one is NaN or infinite.

    Nothing that a training yields after such a loss is worth saving.
    """
    for name, value in losses.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {float(value)} at grad_step {grad_step} (env_step {env_step})"
            )


def passes(every: int, before: int, now: int) -> bool:
    """True where a multiple of `every` lies in (before, now]: a cadence for steps of num_envs."""
    return now // every > before // every


class Report:
    """Sums of what updates measured, and the clock, between two rows of metrics."""

    def __init__(self, agent: Agent, names: Sequence[str]):
        self.agent, self.names = agent, names
        self.sums = torch.zeros(len(names), device=agent.device)
        self.count = torch.zeros((), device=agent.device)
        self.restart()

    def restart(self) -> None:
        self.sums.zero_()
        self.count.zero_()
        self.agent.episodes = []
        self.clock, self.env_step, self.grad_step = (
            time.perf_counter(),
            self.agent.env_step,
            self.agent.grad_step,
        )

    def add(self, sums: Tensor, count: Tensor | int = 1) -> None:
        """Take in the sums of what `count` updates measured."""
        self.sums += sums
        self.count += count

    def row(self, **extra: float) -> Row:
        agent, seconds = self.agent, time.perf_counter() - self.clock
        row: Row = {"env_step": agent.env_step, "grad_step": agent.grad_step}
        if agent.episodes:
            row["train/return_mean"] = float(np.mean([e.episode_return for e in agent.episodes]))
            row["train/length_mean"] = float(np.mean([e.length for e in agent.episodes]))
        row["train/episodes"] = len(agent.episodes)
        if self.count > 0:
            row |= {
                f"train/{name}": value for name, value in zip(self.names, (self.sums / self.count).tolist())
            }
        row |= extra
        row["speed/env_steps_per_s"] = (agent.env_step - self.env_step) / seconds
        row["speed/updates_per_s"] = (agent.grad_step - self.grad_step) / seconds
        return row

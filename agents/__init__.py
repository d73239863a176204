"""The agents: one algorithm, one file."""

from pathlib import Path
from typing import Any

import torch.nn as nn

from ..envs import VectorEnv
from ..vision import find_weights, read_weights
from .actor_critic import A2C
from .agent import Agent
from .checkpoint import Checkpointed, load_checkpoint, newest_first, save_checkpoint, sweep
from .dqn import DQN
from .ppo import PPO
from .pqn import PQN
from .recurrent_attention import RAM
from .reinforce import REINFORCE
from .replay import Replay
from .sb3 import SB3_AGENTS
from .tabular import PolicyIteration, QLearning, TabularAgent, ValueIteration

AGENTS: dict[str, type[Agent]] = {
    "dqn": DQN,
    "reinforce": REINFORCE,
    "a2c": A2C,
    "ppo": PPO,
    "pqn": PQN,
    "value-iteration": ValueIteration,
    "policy-iteration": PolicyIteration,
    "q-learning": QLearning,
    **SB3_AGENTS,
}


def load(
    path: str | Path,
    env: str | VectorEnv | None = None,
    encoder: nn.Module | None = None,
    device: str = "auto",
) -> Any:
    """The agent, of whatever kind, that a weights file, a checkpoint or a run folder holds: an `Agent`, or a
    `RAM`, which learns from images and not from an environment.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another version.
    """
    path = find_weights(Path(path))
    description = read_weights(path)[1]
    name = description.get("agent")
    if description.get("model") == RAM.name:
        return RAM.load(path, device)
    if name not in AGENTS:
        raise ValueError(f"{path} holds {name!r}, which is no agent; agents are {', '.join(AGENTS)}")
    return AGENTS[name].load(path, env, encoder, device)


__all__ = [
    "A2C",
    "AGENTS",
    "DQN",
    "PPO",
    "PQN",
    "RAM",
    "REINFORCE",
    "Agent",
    "Checkpointed",
    "PolicyIteration",
    "QLearning",
    "Replay",
    "TabularAgent",
    "ValueIteration",
    "load",
    "load_checkpoint",
    "newest_first",
    "save_checkpoint",
    "sweep",
]

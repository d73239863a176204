"""The agents: one algorithm, one file."""

from pathlib import Path

import torch.nn as nn

from ..envs import VectorEnv
from ..vision import find_weights, read_weights
from .actor_critic import A2C
from .agent import Agent
from .checkpoint import Checkpointed, load_checkpoint, newest_first, save_checkpoint, sweep
from .dqn import DQN
from .ppo import PPO
from .pqn import PQN
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
) -> Agent:
    """The agent, of whatever kind, that a weights file, a checkpoint or a run folder holds.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or of another version.
    """
    path = find_weights(Path(path))
    name = read_weights(path)[1].get("agent")
    if name not in AGENTS:
        raise ValueError(f"{path} holds {name!r}, which is no agent; agents are {', '.join(AGENTS)}")
    return AGENTS[name].load(path, env, encoder, device)


__all__ = [
    "A2C",
    "AGENTS",
    "DQN",
    "PPO",
    "PQN",
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

"""Gymnasium environments as one vector environment of true transitions."""

from .gridworld import grid_map
from .make import make_vec
from .mdp import MDP, make_mdp
from .registry import find_spec, list_env_ids
from .vector import Episode, Step, VectorEnv

__all__ = [
    "MDP",
    "Episode",
    "Step",
    "VectorEnv",
    "find_spec",
    "grid_map",
    "list_env_ids",
    "make_mdp",
    "make_vec",
]

"""Gymnasium environments as one vector environment of true transitions."""

from .make import make_vec
from .registry import find_spec, list_env_ids
from .vector import Episode, Step, VectorEnv

__all__ = ["Episode", "Step", "VectorEnv", "find_spec", "list_env_ids", "make_vec"]

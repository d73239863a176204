"""Gymnasium spaces as JSON, so that a weights file says what it takes without the environment at hand."""

from collections import OrderedDict
from typing import Any

import numpy as np
from gymnasium import spaces


def is_image(space: spaces.Space) -> bool:
    """True for a Box of rank 3, which in foveal is always an image, channels first."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them.

    Raises ValueError for any other space.
    """
    match space:
        case spaces.Box():
            bounds = {k: _shorten(getattr(space, k)) for k in ("low", "high")}
            return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": np.asarray(space.n).tolist()}
        case spaces.Dict():
            return {"type": "Dict", "spaces": {key: space_to_json(part) for key, part in space.items()}}
    raise ValueError(
        f"space {space} is not supported; supported are Box, Discrete, MultiDiscrete, MultiBinary, Dict"
    )


def space_from_json(data: dict[str, Any]) -> spaces.Space:
    """The inverse of `space_to_json`."""
    match data["type"]:
        case "Box":
            dtype = np.dtype(data["dtype"]).type
            low, high = (
                np.broadcast_to(np.array(data[k], dtype=dtype), data["shape"]) for k in ("low", "high")
            )
            return spaces.Box(low, high, dtype=dtype)
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(np.array(data["nvec"]), start=np.array(data["start"]))
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case "Dict":
            # In the order of the file: a plain dict would be sorted, and the encoder's inputs with it.
            return spaces.Dict(
                OrderedDict((key, space_from_json(part)) for key, part in data["spaces"].items())
            )
    raise ValueError(f"unknown space type {data['type']!r}")


def _shorten(bound: np.ndarray) -> Any:
    """One number where the whole bound is that number: an image's would be 28,224 of them."""
    return bound.flat[0].item() if bound.size and (bound == bound.flat[0]).all() else bound.tolist()

"""The Encoder contract: observations in, features out.

Every network that sees goes through one of these, whether it belongs to an agent, a generative model or
Stable-Baselines3. An encoder is built from the observation space, and is the only place that scales images.
"""

import difflib
import importlib
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from .spaces import is_image, space_to_json
from .weights import find_weights, read_weights


class Encoder(nn.Module):
    """Observations (B, ...) to features (B, `features_dim`), float32.

    Its constructor is the one that Stable-Baselines3 calls its `features_extractor_class` with, so every
    encoder works there unchanged (with `normalize_images=False`, since images are scaled here).

    Subclasses implement `features(x)`, which receives the output of `preprocess`; image encoders implement
    `feature_map(obs)` -> (B, C, h, w) too.
    """

    def __init__(self, observation_space: spaces.Space, features_dim: int):
        super().__init__()
        if features_dim < 1:
            raise ValueError(f"features_dim must be 1 or more, got {features_dim}")
        self.observation_space = observation_space
        self.features_dim = features_dim
        self.loaded_as: str | None = None
        """The name under which `make_encoder` builds it, where its weights came from a file."""

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *observation shape) in any dtype -> (B, features_dim) float32."""
        return self.features(preprocess(obs, self.observation_space))

    def features(self, x: Tensor) -> Tensor:
        """(B, *preprocessed shape) float32 -> (B, features_dim)."""
        raise NotImplementedError


def preprocess(obs: Tensor, space: spaces.Space) -> Tensor:
    """Raw observations (B, ...) -> float32, ready for a network.

    Images and integer boxes are divided by the space's high, which depends on the space alone, never on the
    tensor's dtype: Stable-Baselines3 casts to float before it calls, and equal pixels must give equal
    features. Integers of Discrete and MultiDiscrete become one-hot vectors; what arrives as floats already
    is one (again Stable-Baselines3).
    """
    match space:
        case spaces.Box():
            obs = obs.float()
            scale = box_scale(space)
            return obs if scale == 1.0 else obs / scale
        case spaces.Discrete() if not obs.is_floating_point():
            return _one_hot(obs.reshape(-1) - int(space.start), int(space.n))
        case spaces.MultiDiscrete() if not obs.is_floating_point():
            columns = (obs - torch.as_tensor(space.start, device=obs.device)).flatten(1).unbind(1)
            return torch.cat([_one_hot(x, int(n)) for x, n in zip(columns, space.nvec.flat)], dim=1)
    return obs.float()


def box_scale(space: spaces.Box) -> float:
    """What a box's values are divided by: its high for images and integers, 1 for other vectors."""
    if not (is_image(space) or np.issubdtype(space.dtype, np.integer)):
        return 1.0
    high = float(np.max(space.high))
    return high if np.isfinite(high) and high > 0 else 1.0


def _one_hot(index: Tensor, n: int) -> Tensor:
    # A comparison, because F.one_hot checks its values on the host, which vmap and CUDA graphs refuse.
    return (index.unsqueeze(-1) == torch.arange(n, device=index.device)).float()


def flat_size(space: spaces.Space) -> int:
    """Length of a preprocessed and flattened observation."""
    return int(spaces.flatdim(space))


class DictEncoder(Encoder):
    """One encoder a key of a Dict space, features concatenated in the order of the space's keys."""

    def __init__(self, observation_space: spaces.Dict, build: Callable[[spaces.Space], Encoder]):
        parts = {key: build(space) for key, space in observation_space.items()}
        super().__init__(observation_space, sum(part.features_dim for part in parts.values()))
        self.keys = list(parts)
        self.parts = nn.ModuleList(parts.values())  # a ModuleDict would not take every key
        # Where parts came from a file, it is built again under the name that the file gave them.
        self.loaded_as = next((part.loaded_as for part in parts.values() if part.loaded_as), None)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return torch.cat([part(obs[key]) for key, part in zip(self.keys, self.parts)], dim=1)


class MLP(Encoder):
    """Fully connected layers with ReLU; anything is flattened first.

    `hidden` are the widths before the last layer, whose width is `features_dim`.
    """

    def __init__(
        self, observation_space: spaces.Space, features_dim: int = 256, hidden: tuple[int, ...] = (256,)
    ):
        super().__init__(observation_space, features_dim)
        widths = [flat_size(observation_space), *hidden, features_dim]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ImageEncoder(Encoder):
    """Convolutions, then ReLU(Linear(flatten(map))). Subclasses give `convolutions(channels)`."""

    smallest = 1
    """Smallest height and width that the convolutions take, in pixels."""

    def __init__(self, observation_space: spaces.Space, features_dim: int):
        super().__init__(observation_space, features_dim)
        name = type(self).__name__
        if not is_image(observation_space):
            raise ValueError(f"{name} takes images (a Box of shape (C, H, W)), got {observation_space}")
        channels, height, width = observation_space.shape or ()
        if min(height, width) < self.smallest:
            raise ValueError(
                f"{name} takes images of {self.smallest}x{self.smallest} pixels or more, got {height}x{width}"
            )
        self.conv = self.convolutions(channels)
        with torch.no_grad():
            flat = self.conv(torch.zeros(1, channels, height, width)).numel()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(flat, features_dim), nn.ReLU())

    def convolutions(self, channels: int) -> nn.Sequential:
        """(B, channels, H, W) -> (B, C, h, w)."""
        raise NotImplementedError

    def feature_map(self, obs: Tensor) -> Tensor:
        """(B, C, H, W) raw -> (B, C', h, w) float32."""
        return self.conv(preprocess(obs, self.observation_space))

    def features(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


class NatureCNN(ImageEncoder):
    """The network of "Human-level control through deep reinforcement learning" (Mnih et al. 2015).

    On 84x84x4: 20x20x32, 9x9x64, 7x7x64, then 512 features; 1,684,128 parameters.
    """

    smallest = 36

    def __init__(self, observation_space: spaces.Space, features_dim: int = 512):
        super().__init__(observation_space, features_dim)

    def convolutions(self, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            nn.ReLU(),
        )


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3, same size."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(torch.relu(x))))


class Impala(ImageEncoder):
    """The residual network of IMPALA (Espeholt et al. 2018, 1802.01561, figure 3 right), without its LSTM.

    Three stages of convolution, 3x3 max pooling at stride 2 and two residual blocks. On 84x84x4: 11x11x32,
    then 256 features; 1,089,232 parameters. Takes images down to a few pixels, such as MinAtar's 10x10.
    """

    smallest = 4

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int = 256,
        channels: tuple[int, ...] = (16, 32, 32),
    ):
        self.channels = channels
        super().__init__(observation_space, features_dim)

    def convolutions(self, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *self.channels), self.channels):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=3, padding=1),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(outputs),
                ResidualBlock(outputs),
            ]
        return nn.Sequential(*layers, nn.ReLU())


ENCODERS: dict[str, Callable[..., Encoder]] = {"mlp": MLP, "nature": NatureCNN, "impala": Impala}


def default_encoder(space: spaces.Space) -> str:
    """mlp for vectors, nature for images it takes, impala for smaller ones."""
    if not is_image(space):
        return "mlp"
    return "nature" if min(space.shape[1:]) >= NatureCNN.smallest else "impala"  # type: ignore[index]


def make_encoder(name: str, observation_space: spaces.Space, **kwargs: Any) -> Encoder:
    """Build an encoder for a space.

    `name` is a key of `ENCODERS`, `auto` for the default of the space, `module:Class` for one of your own
    (anything with the Encoder's constructor and a `features_dim`), or the path of a trained run or weights
    file, whose encoder is then loaded. For a Dict space the name goes to the images in it and every other
    key gets an mlp.

    Raises ValueError for an unknown name, with the nearest ones, and for weights of another spec.
    """
    if isinstance(observation_space, spaces.Dict):

        def build(space: spaces.Space) -> Encoder:
            return make_encoder(name if is_image(space) else "mlp", space, **kwargs)

        return DictEncoder(observation_space, build)
    if name == "auto":
        name = default_encoder(observation_space)
    if name in ENCODERS:
        return ENCODERS[name](observation_space, **kwargs)
    if ":" in name and not Path(name).exists():
        return _import_encoder(name)(observation_space, **kwargs)
    if Path(name).exists():
        return load_encoder(Path(name), observation_space)
    near = difflib.get_close_matches(name, ENCODERS, n=3, cutoff=0.4) or list(ENCODERS)
    raise ValueError(
        f"unknown encoder {name!r}; nearest: {', '.join(near)} "
        "(or module:Class, or the path of a trained run)"
    )


def describe_encoder(name: str | None, encoder: nn.Module, observation_space: spaces.Space) -> dict[str, Any]:
    """What a weights file says of its encoder, JSON-able: how to build it, and the spec it must meet.

    `name` is None for an object of the user's own. An encoder that was itself loaded from a file is described
    as that file described it.
    """
    if name == "auto" and not isinstance(observation_space, spaces.Dict):
        name = default_encoder(observation_space)
    spec = {"input": space_to_json(observation_space), "features_dim": encoder.features_dim}
    return {"name": getattr(encoder, "loaded_as", None) or name, "spec": spec}


def load_encoder(path: Path, observation_space: spaces.Space) -> Encoder:
    """The encoder of a trained run or weights file. ValueError names both specs where they differ."""
    tensors, description = read_weights(find_weights(path))
    try:
        name, stored = description["encoder"]["name"], description["encoder"]["spec"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no encoder") from error
    if not isinstance(name, str):
        raise ValueError(f"{path} was trained with an encoder object of its own, which no name builds again")
    refuse_imports(name, path)
    wanted = {"input": space_to_json(observation_space), "features_dim": stored["features_dim"]}
    if stored != wanted:
        raise ValueError(
            f"the encoder of {path} is for {stored['input']}; these observations are {wanted['input']}"
        )
    encoder = make_encoder(name, observation_space)
    prefix = "encoder."
    try:
        encoder.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    except RuntimeError as error:
        raise ValueError(f"the encoder of {path} is not the {name} that this version builds") from error
    encoder.loaded_as = name
    return encoder


def refuse_imports(name: Any, path: Path) -> None:
    """Names that a file holds never import anything: `module:Thing` needs its module to be imported already.

    Otherwise opening a file from somewhere else could run any module that lies on this machine.
    """
    module, colon, _ = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    if colon and module not in sys.modules:
        raise ValueError(
            f"{path} uses {name}; if you trust that module, import it first (on the command line: "
            f"--import {module})"
        )


def _import_encoder(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"encoder {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"encoder {name!r} must be a torch.nn.Module class, got {found!r}")
    return found

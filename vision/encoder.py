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

    @property
    def trunk(self) -> nn.Module:
        """What is trained elsewhere and moved: all of it, or, of a backbone, all but the last projection."""
        return self

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

    @property
    def trunk(self) -> nn.Module:
        return nn.ModuleList(part.trunk for part in self.parts)  # type: ignore[misc]

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return torch.cat([part(obs[key]) for key, part in zip(self.keys, self.parts)], dim=1)


class MLP(Encoder):
    """Fully connected layers with ReLU; anything is flattened first.

    `hidden` are the widths before the last layer, whose width is `features_dim`.
    """

    layer_norm = False
    """LayerNorm between each layer and its ReLU."""

    def __init__(
        self, observation_space: spaces.Space, features_dim: int = 256, hidden: tuple[int, ...] = (256,)
    ):
        super().__init__(observation_space, features_dim)
        widths = [flat_size(observation_space), *hidden, features_dim]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(widths):
            norm = [nn.LayerNorm(outputs)] if self.layer_norm else []
            layers += [nn.Linear(inputs, outputs), *norm, self.activation()]
        self.layers = nn.Sequential(*layers)

    def activation(self) -> nn.Module:
        return nn.ReLU(inplace=True)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TanhMLP(MLP):
    """Two fully connected layers of 64 with tanh, the usual network of policy gradients on vectors."""

    def __init__(
        self, observation_space: spaces.Space, features_dim: int = 64, hidden: tuple[int, ...] = (64,)
    ):
        super().__init__(observation_space, features_dim, hidden)

    def activation(self) -> nn.Module:
        return nn.Tanh()


class NormMLP(MLP):
    """The mlp with LayerNorm before each ReLU, as PQN needs it (2407.04811)."""

    layer_norm = True


class Linear(Encoder):
    """One linear layer and nothing after it, as in PCA; anything is flattened first."""

    def __init__(self, observation_space: spaces.Space, features_dim: int = 64):
        super().__init__(observation_space, features_dim)
        self.layer = nn.Linear(flat_size(observation_space), features_dim)

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class ImageEncoder(Encoder):
    """Convolutions, then ReLU(Linear(flatten(map))). Subclasses give `convolutions(channels)`."""

    smallest = 1
    """Smallest height and width that the convolutions take, in pixels."""
    layer_norm = False
    """Normalisation after each convolution and linear layer: a whole map (C, h, w) of one image to mean 0 and
    variance 1, then a scale and an offset a channel."""

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
        norm = [nn.LayerNorm(features_dim)] if self.layer_norm else []
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(flat, features_dim), *norm, nn.ReLU())

    def norm(self, channels: int) -> list[nn.Module]:
        """What comes after a convolution; one group of all channels is layer normalisation."""
        return [nn.GroupNorm(1, channels)] if self.layer_norm else []

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
            *self.norm(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            *self.norm(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            *self.norm(64),
            nn.ReLU(),
        )


class NormNatureCNN(NatureCNN):
    """The nature network with layer normalisation before each ReLU, as in PQN (2407.04811)."""

    layer_norm = True


class MinAtarCNN(ImageEncoder):
    """The network of MinAtar (Young and Tian 2019, 1903.03176): one 3x3 convolution, then 128 features.

    On 10x10x4: 8x8x16, then 128 features; 131,792 parameters.
    """

    smallest = 3

    def __init__(self, observation_space: spaces.Space, features_dim: int = 128):
        super().__init__(observation_space, features_dim)

    def convolutions(self, channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 16, kernel_size=3), *self.norm(16), nn.ReLU())


class NormMinAtarCNN(MinAtarCNN):
    """The minatar network with layer normalisation before each ReLU, as in PQN (2407.04811)."""

    layer_norm = True


class StridedCNN(ImageEncoder):
    """The convolutional net that "Recurrent Models of Visual Attention" (Mnih et al. 2014, 1406.6247, section
    4.1) compares with: 8 filters of 10x10 pixels, 5 apart, then 256 features."""

    smallest = 10

    def __init__(self, observation_space: spaces.Space, features_dim: int = 256):
        super().__init__(observation_space, features_dim)

    def convolutions(self, channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 8, kernel_size=10, stride=5), *self.norm(8), nn.ReLU())


class HalvingCNN(ImageEncoder):
    """Two 4x4 convolutions that halve the sides (16 and 32 filters), as in DCGAN's critic (Radford et al.
    2015, 1511.06434), then 256 features. On 28x28x1: 14x14x16, 7x7x32; 410,160 parameters."""

    smallest = 4

    def __init__(self, observation_space: spaces.Space, features_dim: int = 256):
        super().__init__(observation_space, features_dim)

    def convolutions(self, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, 16), (16, 32)):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), *self.norm(outputs), nn.ReLU()]
        return nn.Sequential(*layers)


class NormHalvingCNN(HalvingCNN):
    """The halving network with layer normalisation before each ReLU."""

    layer_norm = True


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3, same size; layer normalisation after each convolution if wanted."""

    def __init__(self, channels: int, layer_norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm1 = nn.GroupNorm(1, channels) if layer_norm else nn.Identity()
        self.norm2 = nn.GroupNorm(1, channels) if layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(torch.relu(x))))))


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
                *self.norm(outputs),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
                ResidualBlock(outputs, self.layer_norm),
                ResidualBlock(outputs, self.layer_norm),
            ]
        return nn.Sequential(*layers, nn.ReLU())


class NormImpala(Impala):
    """The impala network with layer normalisation after each layer."""

    layer_norm = True


ENCODERS: dict[str, Callable[..., Encoder]] = {
    "mlp": MLP,
    "mlp-tanh": TanhMLP,
    "mlp-norm": NormMLP,
    "linear": Linear,
    "nature": NatureCNN,
    "nature-norm": NormNatureCNN,
    "impala": Impala,
    "impala-norm": NormImpala,
    "minatar": MinAtarCNN,
    "minatar-norm": NormMinAtarCNN,
    "strided": StridedCNN,
    "halving": HalvingCNN,
    "halving-norm": NormHalvingCNN,
}


def default_encoder(space: spaces.Space) -> str:
    """mlp for vectors, nature for images it takes, impala for smaller ones."""
    if not is_image(space):
        return "mlp"
    return "nature" if min(space.shape[1:]) >= NatureCNN.smallest else "impala"  # type: ignore[index]


def make_encoder(name: str, observation_space: spaces.Space, **kwargs: Any) -> Encoder:
    """Build an encoder for a space.

    `name` is a key of `ENCODERS`; a backbone, `BACKBONE[@STAGE][,norm=KIND][,features_dim=N]`, where BACKBONE
    is a key of `BACKBONES`, `timm/NAME` or `torchvision/NAME` (these also with `,pretrained=1`); `auto` for
    the default of the space; `module:Class` for one of your own (anything with the Encoder's constructor and
    a `features_dim`); or the path of a trained run or weights file, whose encoder is then loaded
    (`PATH@STAGE` cuts a trained backbone there). For a Dict space the name goes to the images in it and every
    other key gets an mlp, or `IMAGES+VECTORS` names both, such as `nature+mlp-tanh`; where the space has no
    images, a single name goes to every key.

    Raises ValueError for an unknown name, with the nearest ones, and for weights of another spec.
    """
    if isinstance(observation_space, spaces.Dict):
        return _make_dict_encoder(name, observation_space, **kwargs)
    if "+" in name and not Path(name).exists():
        raise ValueError(f"encoder {name!r}: IMAGES+VECTORS takes Dict observations, not {observation_space}")
    if name == "auto":
        name = default_encoder(observation_space)
    if name in ENCODERS:
        return ENCODERS[name](observation_space, **kwargs)
    from .backbone_encoder import is_backbone, make_backbone_encoder  # which builds on this module
    from .backbones import BACKBONES

    if is_backbone(name):
        return make_backbone_encoder(name, observation_space, **kwargs)
    if Path(name).exists():
        return load_encoder(Path(name), observation_space)
    path, at, stage = name.rpartition("@")
    if at and Path(path).exists():
        return load_encoder(Path(path), observation_space, stage)
    if ":" in name:
        return _import_encoder(name)(observation_space, **kwargs)
    known = [*ENCODERS, *BACKBONES]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(ENCODERS)
    raise ValueError(
        f"unknown encoder {name!r}; nearest: {', '.join(near)} "
        "(or module:Class, or the path of a trained run)"
    )


def _make_dict_encoder(name: str, observation_space: spaces.Dict, **kwargs: Any) -> DictEncoder:
    if "+" in name and not Path(name).exists():
        images, _, vectors = name.partition("+")
    elif any(is_image(space) for space in observation_space.values()):
        images, vectors = name, "mlp"
    else:
        images = vectors = name

    def build(space: spaces.Space) -> Encoder:
        return make_encoder(images if is_image(space) else vectors, space, **kwargs)

    encoder = DictEncoder(observation_space, build)
    # Where parts came from a file, it is built again under the names that the file gave them.
    loaded: dict[bool, str] = {}
    for space, part in zip(observation_space.values(), encoder.parts):
        name_there = getattr(part, "loaded_as", None)
        if name_there is not None:
            loaded[is_image(space)] = str(name_there)
    if loaded:
        encoder.loaded_as = f"{loaded.get(True, images)}+{loaded.get(False, vectors)}"
    return encoder


def describe_encoder(name: str | None, encoder: nn.Module, observation_space: spaces.Space) -> dict[str, Any]:
    """What a weights file says of its encoder, JSON-able: how to build it, and the spec it must meet.

    `name` is None for an object of the user's own. An encoder that was itself loaded from a file is described
    as that file described it.
    """
    if name == "auto" and not isinstance(observation_space, spaces.Dict):
        name = default_encoder(observation_space)
    spec = {"input": space_to_json(observation_space), "features_dim": encoder.features_dim}
    return {"name": getattr(encoder, "loaded_as", None) or name, "spec": spec}


def load_encoder(path: Path, observation_space: spaces.Space, stage: str | None = None) -> Encoder:
    """The encoder of a trained run or weights file.

    Of a classifier with a backbone it is the trained backbone up to `stage` (None: as `BackboneEncoder`
    chooses), its batch normalisation frozen, under a projection that is new. ValueError names both specs
    where they differ.
    """
    tensors, description = read_weights(find_weights(path))
    stored = description.get("encoder")
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no encoder")
    if "backbone" in stored:
        return _load_backbone(path, observation_space, tensors, description, stage)
    if stage is not None:
        raise ValueError(f"{path} holds no backbone to cut at {stage!r}: its encoder is {stored.get('name')}")
    name, spec = stored.get("name"), stored.get("spec")
    if not isinstance(name, str) or not isinstance(spec, dict):
        raise ValueError(f"{path} was trained with an encoder object of its own, which no name builds again")
    for part in name.split("+"):
        refuse_imports(part, path)
    _check_input(path, spec.get("input"), observation_space)
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


def _load_backbone(
    path: Path,
    observation_space: spaces.Space,
    tensors: dict[str, Tensor],
    description: dict[str, Any],
    stage: str | None,
) -> Encoder:
    from .backbone_encoder import BackboneEncoder

    _check_input(path, description.get("space"), observation_space)
    name = description["encoder"]["backbone"]
    if name == "linear":
        raise ValueError(f"{path} is a linear classifier: it holds no encoder")
    trained = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    # Batch statistics go on as constants: that they are there says that the layers were batch normalisation.
    statistics = any(k.endswith("running_mean") for k in trained)
    norm = "frozen" if statistics else description["encoder"]["norm"] or "original"
    encoder = BackboneEncoder(observation_space, backbone=name, stage=stage, norm=norm)
    try:
        encoder.backbone.load_state_dict({k: trained[k] for k in encoder.backbone.state_dict()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the backbone of {path} is not the {name} that this version builds") from error
    encoder.loaded_as = f"{name}@{encoder.stage},norm={norm}"
    return encoder


def _check_input(path: Path, stored: Any, space: spaces.Space) -> None:
    if stored != (wanted := space_to_json(space)):
        raise ValueError(f"the encoder of {path} is for {stored}; these observations are {wanted}")


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

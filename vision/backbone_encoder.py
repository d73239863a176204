"""Encoders from backbones: cut at a stage, then LayerNorm(Linear(flatten(map))).

A map keeps where things are, which global pooling, the end of most classifiers, gives up. So the cut comes
early by default: at the deepest stage that still has a map of 4x4.
"""

from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from .backbone import check_size
from .backbones import BACKBONES, make_backbone
from .encoder import Encoder, preprocess
from .spaces import is_image

ADAPTED = ("timm/", "torchvision/")
"""Beginnings of names that belong to other libraries."""
OPTIONS = {"norm": str, "features_dim": int, "pretrained": int}


def is_backbone(name: str) -> bool:
    """Whether an encoder's name is that of a backbone, with or without a stage and options."""
    base = name.partition(",")[0].partition("@")[0]
    return base in BACKBONES or base.startswith(ADAPTED)


class BackboneEncoder(Encoder):
    """A backbone up to a stage, then LayerNorm(Linear(flatten(map))); images of any size that it takes.

    Args:
        backbone: a key of `BACKBONES`, `timm/NAME` or `torchvision/NAME`.
        stage: where to cut; None is the deepest with a map of 4x4 or more.
        norm: as in `make_backbone`, but None means group wherever the original has batch normalisation, whose
            statistics break target networks, batches of one, and acting while learning; "original" means the
            original's own.
        pretrained: published weights, of timm and torchvision; batch normalisation is then frozen.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        features_dim: int = 256,
        *,
        backbone: str,
        stage: str | None = None,
        norm: str | None = None,
        pretrained: bool = False,
    ):
        super().__init__(observation_space, features_dim)
        if not is_image(observation_space):
            raise ValueError(f"{backbone} takes images (a Box of shape (C, H, W)), got {observation_space}")
        channels, height, width = observation_space.shape or ()
        if backbone.startswith(ADAPTED):
            from .adapters import adapt

            norm = norm or ("frozen" if pretrained else "group")
            self.backbone: Any = adapt(backbone, channels, pretrained, norm)
            stage = stage or default_stage(self.backbone, height, width)
        else:
            if pretrained:
                raise ValueError(f"pretrained is for timm/NAME and torchvision/NAME, got {backbone}")
            check_size(backbone, (height, width), stage or first_stage(backbone))
            norm = own_norm(backbone) if norm is None else None if norm == "original" else norm
            if stage is None:
                with torch.device("meta"):
                    stage = default_stage(make_backbone(backbone, 1, channels), height, width)
            self.backbone = make_backbone(backbone, 1, channels, norm)
        self.backbone.cut(stage)
        self.stage = stage
        if pretrained:  # what is saved is built again without asking for the published weights
            self.loaded_as = f"{backbone}@{stage},norm={norm},features_dim={features_dim}"
        with torch.no_grad():
            flat = self.backbone.eval().feature_map(torch.zeros(1, channels, height, width)).numel()
        self.backbone.train()
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(flat, features_dim), nn.LayerNorm(features_dim))

    @property
    def trunk(self) -> nn.Module:
        return self.backbone

    def feature_map(self, obs: Tensor) -> Tensor:
        """(B, C, H, W) raw -> (B, C', h, w) float32."""
        return self.backbone.feature_map(preprocess(obs, self.observation_space))

    def features(self, x: Tensor) -> Tensor:
        return self.project(self.backbone.feature_map(x))


def make_backbone_encoder(name: str, observation_space: spaces.Space, **kwargs: Any) -> BackboneEncoder:
    """Build `BACKBONE[@STAGE][,norm=KIND][,features_dim=N][,pretrained=1]`. ValueError for anything else."""
    base, *options = name.split(",")
    backbone, _, stage = base.partition("@")
    for option in options:
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise ValueError(f"encoder {name!r}: options are {', '.join(OPTIONS)}, got {option!r}")
        try:
            kwargs[key] = OPTIONS[key](value)
        except ValueError as error:
            raise ValueError(f"encoder {name!r}: {key} takes a whole number, got {value!r}") from error
    return BackboneEncoder(observation_space, backbone=backbone, stage=stage or None, **kwargs)


def first_stage(backbone: str) -> str:
    with torch.device("meta"):
        return next(iter(make_backbone(backbone).stages))


def own_norm(backbone: str) -> str | None:
    """What an encoder's `norm` of None asks `make_backbone` for."""
    with torch.device("meta"):
        original = make_backbone(backbone)
    return "group" if any(isinstance(module, nn.BatchNorm2d) for module in original.modules()) else None


def default_stage(backbone: Any, height: int, width: int) -> str:
    """The deepest stage whose map is 4x4 or larger; where there is none, the first."""
    chosen = next(iter(backbone.stages))
    x = torch.zeros(1, backbone.in_channels, height, width, device=next(backbone.parameters()).device)
    backbone.eval()
    with torch.no_grad():
        for stage in backbone.stages:
            try:
                if min(backbone.feature_map(x, stage).shape[2:]) < 4:
                    break
            except RuntimeError:  # a map without pixels
                break
            chosen = stage
    backbone.train()
    return chosen

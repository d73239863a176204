"""Autoencoders: a code from which the image can be made again, and what keeps the code from being a copy.

    undercomplete   a short code, nothing else
    sparse-l1       few units active: ReLU codes, whose mean is added to the loss
    sparse-kl       few units active: sigmoid codes, each pulled to a mean activation by a KL divergence (Ng
                    2011, "Sparse autoencoder", CS294A lecture notes, section 3)
    denoising       the image from one with pixels set to 0 (Vincent et al. 2008)
    contractive     a code that changes little with the image: the squared Frobenius norm of its Jacobian
                    (Rifai et al. 2011, eq. 2), estimated without bias by one random projection an image
                    (Hutchinson 1990), because exactly it takes a backward pass a unit

The squared error is a sum over pixels in [0, 1] and a mean over images. There is no prior, hence no `sample`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import Dataset, describe_encoder, make_encoder
from ..vision.encoder import preprocess
from .decoder import make_decoder
from .likelihood import bernoulli_log_prob
from .model import Generative, Moment, reconstruction_rows


@dataclass(frozen=True)
class AutoencoderConfig:
    """Hyper-parameters. An epoch is one pass over the training images."""

    kind: Literal["undercomplete", "sparse-l1", "sparse-kl", "denoising", "contractive"] = "undercomplete"
    """What the code is kept from: see the top of the module."""
    encoder: str = "mlp"
    """A name of `foveal list encoders` or backbones, or a run's path. The decoder mirrors it."""
    latent_dim: int = 16
    """Numbers in the code."""
    loss: Literal["auto", "squared", "cross-entropy"] = "auto"
    """Of a reconstruction. cross-entropy takes images of 0 and 1, and is auto's choice for them."""
    penalty: float = 0.1
    """Weight of the sparse and contractive kinds' term."""
    sparsity: float = 0.1
    """Of sparse-kl: the mean activation that each unit is pulled to, in (0, 1)."""
    corruption: float = 0.3
    """Of denoising: share of pixels set to 0, in (0, 1)."""
    batch_size: int = 128
    """Images in one gradient step; as many as there are, at most."""
    learning_rate: float = 1e-3
    """Adam's step size before the schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the step size falls over the training: not, or to 0 by half a cosine, or linearly."""
    max_grad_norm: float | None = None
    """L2 norm that gradients are clipped to; None for no limit."""
    ema: float = 0.0
    """Decay a step of an average of the weights, which is then what is validated and saved; 0 for none."""
    validate_every: int = 1
    """Epochs between two validations."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks; losses stay float32."""

    def __post_init__(self) -> None:
        for name in ("latent_dim", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("sparsity", "corruption"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be greater than 0 and less than 1, got {getattr(self, name)}")
        if not self.penalty >= 0:
            raise ValueError(f"penalty must be 0 or more, got {self.penalty}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> AutoencoderConfig:
    """The settings known to work for a dataset, else the defaults, with `changes` made."""
    settings: dict[str, Any] = {"batch_size": 64, "validate_every": 5} if dataset == "digits" else {}
    named = {} if encoder is None else {"encoder": encoder}
    return AutoencoderConfig(**{**settings, **named, **changes})


def run_options(dataset: str) -> dict[str, Any]:
    """Defaults of `foveal train autoencoder` for a dataset."""
    return {"epochs": 150.0} if dataset == "digits" else {}


class Network(nn.Module):
    """Encoder, code and decoder."""

    def __init__(self, space: spaces.Box, config: AutoencoderConfig):
        super().__init__()
        self.encoder = make_encoder(config.encoder, space)
        self.head = nn.Linear(self.encoder.features_dim, config.latent_dim)
        activations = {"sparse-l1": nn.ReLU(), "sparse-kl": nn.Sigmoid()}
        self.activation = activations.get(config.kind, nn.Identity())
        self.decoder = make_decoder(self.encoder, config.latent_dim, space, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Raw images (B, C, H, W) -> codes (B, D)."""
        return self.activation(self.head(self.encoder(images)).float())


# The penalties, as functions that touch only what they are given.


def bernoulli_kl(target: float, activation: Tensor) -> Tensor:
    """Sum over units of KL(Bernoulli(target) || Bernoulli(mean activation)): (B, D) in (0, 1) -> a scalar."""
    mean = activation.mean(0).clamp(1e-6, 1 - 1e-6)
    ones = target * (math.log(target) - mean.log())
    return (ones + (1 - target) * (math.log(1 - target) - (1 - mean).log())).sum()


def jacobian_norm(codes: Tensor, pixels: Tensor, probe: Tensor) -> Tensor:
    """An unbiased estimate of sum (d code / d pixel)^2, mean over images: a scalar, differentiable.

    For a standard normal `probe` (B, D), E |J^T probe|^2 is the squared Frobenius norm of J.
    """
    (row,) = torch.autograd.grad((codes * probe).sum(), pixels, create_graph=True)
    return row.flatten(1).square().sum(1).mean()


class Autoencoder(Generative):
    """Learns a code from which an image can be made again.

    >>> from foveal.vision import load_dataset
    >>> from foveal.generative import Autoencoder
    >>> digits = load_dataset("digits")
    >>> config = Autoencoder.Config(latent_dim=8)
    >>> model = Autoencoder(digits.space, digits.classes, config).fit(digits, epochs=2)
    >>> codes = model.encode(digits.test.images[:3])
    >>> codes.shape, model.decode(codes).shape
    (torch.Size([3, 8]), torch.Size([3, 1, 8, 8]))
    """

    name: ClassVar[str] = "autoencoder"
    Config: ClassVar[type] = AutoencoderConfig
    recipe = staticmethod(recipe)
    run_options = staticmethod(run_options)
    measures: tuple[str, ...] = ("loss", "reconstruction", "penalty", "grad_norm")
    chosen_by: ClassVar[str] = "validation/fit"
    headline: ClassVar[str] = "test/squared_error"
    config: AutoencoderConfig
    network: Network

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: AutoencoderConfig | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, classes, config, seed, device)

    def build(self) -> nn.Module:
        self.binary = self.config.loss == "cross-entropy" or (self.config.loss == "auto" and self.high == 1)
        if self.binary and self.high != 1:
            raise ValueError(
                f"loss cross-entropy takes images of 0 and 1, these have values up to {self.high}: binarize "
                "them (--binarize), or take loss squared"
            )
        return Network(self.space, self.config)

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    def reconstruction_loss(self, out: Tensor, x: Tensor) -> Tensor:
        """What the decoder puts out, and scaled images, (B, C, H, W) each -> (B,), a sum over pixels."""
        out = out.float()
        each = -bernoulli_log_prob(out, x) if self.binary else (out - x).square()
        return each.flatten(1).sum(1)

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        """One step: loss, reconstruction, penalty (before its weight), and the gradient's norm."""
        config = self.config
        x = preprocess(images, self.space)
        given = images.float()
        if config.kind == "denoising":
            given = given * (torch.rand_like(given) >= config.corruption)
        elif config.kind == "contractive":
            given.requires_grad_()
        with self.autocast():
            codes = self.network.encode(given)
            out = self.network.decoder(codes)
        reconstruction = self.reconstruction_loss(out, x).mean()
        match config.kind:
            case "sparse-l1":
                penalty = codes.abs().sum(1).mean()
            case "sparse-kl":
                penalty = bernoulli_kl(config.sparsity, codes)
            case "contractive":  # the pixels were not scaled yet
                penalty = self.high**2 * jacobian_norm(codes, given, torch.randn_like(codes))
            case _:
                penalty = torch.zeros((), device=self.device)
        loss = reconstruction + config.penalty * penalty
        norm = self.learners["network"].step(loss, self.rate_at(moment.progress), config.max_grad_norm)
        return torch.stack([loss, reconstruction, penalty, norm]).detach()

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor | None = None, batch_size: int = 1000) -> Tensor:
        """Raw images (N, C, H, W) -> codes (N, D)."""
        self.check_labels(labels, len(images))
        images = self.check_images(images, whole=self.binary)
        with self.averaged(), self.autocast():
            return torch.cat([self.network.encode(part) for part in images.split(batch_size)])

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor | None = None, batch_size: int = 1000) -> Tensor:
        """Codes (N, D) -> images (N, C, H, W) float32 in [0, 1]."""
        self.check_labels(labels, len(z))
        with self.averaged(), self.autocast():
            out = [self.network.decoder(part.to(self.device)).float() for part in z.split(batch_size)]
        return torch.cat(out).sigmoid() if self.binary else torch.cat(out).clamp(0, 1)

    def squared_error(self, images: Tensor) -> float:
        """Of reconstructions, a sum over pixels in [0, 1], mean over images."""
        x = preprocess(images.to(self.device), self.space)
        return (self.decode(self.encode(images)) - x).square().flatten(1).sum(1).double().mean().item()

    @torch.no_grad()
    def validate(self, dataset: Dataset) -> dict[str, float]:
        """Of the validation images: minus the loss of reconstructions, and the squared error."""
        images = dataset.validation.images
        x = preprocess(images.to(self.device), self.space)
        with self.averaged(), self.autocast():
            out = torch.cat([self.network.decoder(codes) for codes in self.encode(images).split(1000)])
        fit = -self.reconstruction_loss(out, x).mean().item()
        return {"fit": fit, "squared_error": self.squared_error(images)}

    def test(self, dataset: Dataset) -> dict[str, float]:
        """The squared error of the test images, and the share of code units above 0.1 in size."""
        active = (self.encode(dataset.test.images).abs() > 0.1).double().mean().item()
        return {"squared_error": self.squared_error(dataset.test.images), "active_units": active}

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        """The squared error of the mean image, and of as many principal components as the code has units."""
        from sklearn.decomposition import PCA

        train, test = (
            preprocess(split.images, dataset.space).flatten(1).double().numpy()
            for split in (dataset.train, dataset.test)
        )
        if dataset.grey is not None:
            train = train / dataset.grey
        mean = float(np.square(test - train.mean(0)).sum(1).mean())
        pca = PCA(min(self.latent_dim, *train.shape), random_state=0).fit(train)
        again = pca.inverse_transform(pca.transform(test))
        return {"mean_image": mean, "pca": float(np.square(test - again).sum(1).mean())}

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """Test images over their reconstructions."""
        return {"reconstructions": reconstruction_rows(self, dataset)}

    def describe(self) -> dict[str, Any]:
        encoder = describe_encoder(self.config.encoder, self.network.encoder, self.space)
        return super().describe() | {"encoder": encoder}

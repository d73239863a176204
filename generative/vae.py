"""Auto-Encoding Variational Bayes (Kingma and Welling 2013, 1312.6114).

An encoder of `vision` gives features; a linear head on them gives the mean and log-variance of q(z | x); a
decoder that mirrors the encoder gives p(x | z). beta is that of beta-VAE (Higgins et al. 2017), free bits are
those of Kingma et al. (2016, 1606.04934, appendix C.8), the bound of k samples is that of IWAE (Burda et al.
2015, 1509.00519).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import Dataset, describe_encoder, make_encoder
from ..vision.encoder import preprocess
from .chain import Chain, chainable
from .decoder import make_decoder, with_label
from .likelihood import LIKELIHOODS, independent_pixels
from .model import Generative, Learner, Moment, interpolation, reconstruction_rows


@dataclass(frozen=True)
class VAEConfig:
    """Hyper-parameters. An epoch is one pass over the training images."""

    encoder: str = "mlp"
    """A name of `foveal list encoders` or backbones, or a run's path. The decoder mirrors it."""
    latent_dim: int = 16
    """Numbers in z, whose prior is a standard normal."""
    likelihood: Literal["auto", "bernoulli", "continuous-bernoulli", "gaussian", "logistic"] = "auto"
    """p(x | z) of a pixel. bernoulli: of 0 and 1 (--binarize). continuous-bernoulli: of [0, 1]. gaussian:
    with one learned variance. logistic: cut into the levels of the data, with a learned scale for each pixel.
    auto: bernoulli for two levels, else logistic."""
    conditional: bool = False
    """Give the label to encoder and decoder, so that images can be made of a class."""
    beta: float = 1.0
    """Weight of the KL term; 1 for a bound on the likelihood."""
    kl_warmup: float = 0.0
    """Epochs over which that weight rises from 0, linearly."""
    free_bits: float = 0.0
    """Nats of KL a latent, mean over the batch, below which it is not reduced further."""
    importance_samples: int = 1
    """Samples of z for each image in training; more than one trains the tighter bound of IWAE, in which the
    weight of the KL term is that of log p(z) - log q(z | x)."""
    dropout: float = 0.0
    """Share of features dropped before the head, in [0, 1)."""
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
    """Of the networks; likelihoods and KL stay float32."""

    def __post_init__(self) -> None:
        for name in ("latent_dim", "importance_samples", "batch_size", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("beta", "kl_warmup", "free_bits"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.importance_samples > 1 and self.free_bits:
            raise ValueError("importance_samples above 1 takes no free_bits: its bound has no KL term")


RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "batch_size": 64, "learning_rate": 3e-3, "kl_warmup": 100.0, "dropout": 0.3, "validate_every": 10,
    },
    "fashion-mnist": {
        "encoder": "halving-norm", "latent_dim": 24, "batch_size": 50, "learning_rate": 2e-3,
        "kl_warmup": 4.0, "dropout": 0.1, "ema": 0.999,
    },
    "mnist": {
        "encoder": "halving-norm", "latent_dim": 32, "batch_size": 100, "learning_rate": 2e-3,
        "kl_warmup": 2.0, "ema": 0.999,
    },
}  # fmt: skip
"""Settings by dataset. Of digits and Fashion-MNIST chosen by validation images; MNIST's are the latter's with
fewer steps an image."""
RUN_OPTIONS: dict[str, dict[str, Any]] = {
    "digits": {"binarize": "8", "epochs": 300.0},
    "mnist": {"binarize": "dynamic"},
    "fashion-mnist": {"binarize": "128"},
}


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> VAEConfig:
    """The settings known to work for a dataset, else the defaults, with `changes` made."""
    named = {} if encoder is None else {"encoder": encoder}
    return VAEConfig(**{**RECIPES.get(dataset or "", {}), **named, **changes})


def run_options(dataset: str) -> dict[str, Any]:
    """Defaults of `foveal train vae` for a dataset."""
    return RUN_OPTIONS.get(dataset, {})


class Posterior(NamedTuple):
    """q(z | x), a Gaussian with independent dimensions: (B, D) each."""

    mean: Tensor
    log_var: Tensor


class Network(nn.Module):
    """Encoder, head and decoder."""

    def __init__(self, space: spaces.Box, classes: int, config: VAEConfig, likelihood: str):
        super().__init__()
        self.space, self.classes = space, classes if config.conditional else 0
        self.encoder = make_encoder(config.encoder, space)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.encoder.features_dim + self.classes, 2 * config.latent_dim)
        # One for all pixels of a channel: a pixel that never changes would have an infinite density.
        shared = likelihood == "gaussian"
        self.log_scale = nn.Parameter(torch.zeros(1, space.shape[0], 1, 1)) if shared else None
        numbers = 1 if shared else LIKELIHOODS[likelihood].parameters
        self.decoder = make_decoder(self.encoder, config.latent_dim + self.classes, space, numbers)

    def encode(self, images: Tensor, labels: Tensor | None) -> Posterior:
        features = self.dropout(self.encoder(images))
        return Posterior(*self.head(with_label(features, labels, self.classes)).float().chunk(2, dim=1))

    def decode(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """z (B, D) -> parameters of the likelihood (B, P * C, H, W) float32."""
        out = self.decoder(with_label(z, labels, self.classes)).float()
        return out if self.log_scale is None else torch.cat([out, self.log_scale.expand_as(out)], dim=1)


# The algorithm, as functions that touch only what they are given.


def kl_divergence(q: Posterior) -> Tensor:
    """KL(q || N(0, I)) of each dimension, in nats: (B, D)."""
    return 0.5 * (q.mean.square() + q.log_var.exp() - 1 - q.log_var)


def draw_latent(q: Posterior, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """z ~ q by reparametrization, and the standard normal noise that it was made of: (B, D) each."""
    noise = torch.randn(q.mean.shape, device=q.mean.device, generator=generator)
    return q.mean + (0.5 * q.log_var).exp() * noise, noise


def log_ratio(z: Tensor, noise: Tensor, q: Posterior) -> Tensor:
    """log p(z) - log q(z | x) in nats: (B,)."""
    return 0.5 * (noise.square() + q.log_var - z.square()).sum(1)


class VAE(Generative):
    """Learns images as a decoder's view of a few Gaussian numbers, and to find these numbers from an image.

    >>> from foveal.vision import binarize, load_dataset
    >>> from foveal.generative import VAE
    >>> digits = binarize(load_dataset("digits"), 8)
    >>> vae = VAE(digits.space, digits.classes, VAE.recipe(dataset="digits")).fit(digits, epochs=2)
    >>> vae.sample(3).shape, vae.iwae(digits.test.images[:5], k=10).shape
    (torch.Size([3, 1, 8, 8]), torch.Size([5]))
    """

    name: ClassVar[str] = "vae"
    Config: ClassVar[type] = VAEConfig
    recipe = staticmethod(recipe)
    run_options = staticmethod(run_options)
    measures: tuple[str, ...] = ("loss", "reconstruction", "kl", "grad_norm")
    chosen_by: ClassVar[str] = "validation/elbo"
    headline: ClassVar[str] = "test/nats"
    config: VAEConfig
    network: Network

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: VAEConfig | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, classes, config, seed, device)

    def build(self) -> nn.Module:
        name = self.config.likelihood
        if name == "auto":
            name = "bernoulli" if self.high == 1 else "logistic"
        if name == "bernoulli" and self.high != 1:
            raise ValueError(
                f"likelihood bernoulli takes images of 0 and 1, these have values up to {self.high}: "
                "binarize them (--binarize), or take likelihood logistic or continuous-bernoulli"
            )
        self.likelihood = LIKELIHOODS[name]
        network = Network(self.space, len(self.classes), self.config, name)
        # Convolutions and their transposes take three fifths of the time that way round.
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def make_learners(self) -> dict[str, Learner]:
        learners, config = super().make_learners(), self.config
        plain = self.likelihood is LIKELIHOODS["bernoulli"] and config.precision == "float32"
        plain = plain and not (config.conditional or config.free_bits) and config.importance_samples == 1
        self.chain: Chain | None = None
        """What takes the place of autograd."""
        if plain and chainable(self.network):
            learner = learners["network"]
            self.chain = Chain(self.network, dict(zip(learner.parameters, learner.views)))
        return learners

    @property
    def latent_dim(self) -> int:
        return self.config.latent_dim

    def update(self, images: Tensor, labels: Tensor, moment: Moment) -> Tensor:
        """One step up the bound: loss, reconstruction and KL in nats an image, and the gradient's norm."""
        config = self.config
        given = labels if config.conditional else None
        k = config.importance_samples
        weight = config.beta * min(1.0, moment.epoch / config.kl_warmup if config.kl_warmup else 1.0)
        rate, learner = self.rate_at(moment.progress), self.learners["network"]
        if self.chain is not None:
            measured = self.chain(preprocess(images, self.space), weight)
            return torch.cat([measured, learner.descend(rate, config.max_grad_norm).unsqueeze(0)])
        with self.autocast():
            q = self.network.encode(images, given)
        x = preprocess(images, self.space)
        if k > 1:
            q = Posterior(*(part.repeat_interleave(k, 0) for part in q))
            x = x.repeat_interleave(k, 0)
            given = None if given is None else given.repeat_interleave(k, 0)
        z, noise = draw_latent(q)
        with self.autocast():
            parameters = self.network.decode(z, given)
        log_p = self.likelihood.log_prob(parameters, x, self.high).flatten(1).sum(1)
        kl = kl_divergence(q)
        if k > 1:
            log_w = (log_p + weight * log_ratio(z, noise, q)).unflatten(0, (-1, k))
            loss = math.log(k) - log_w.logsumexp(1).mean()
        else:
            penalty = kl.mean(0).clamp(min=config.free_bits).sum() if config.free_bits else kl.sum(1).mean()
            loss = weight * penalty - log_p.mean()
        norm = learner.step(loss, rate, config.max_grad_norm)
        return torch.stack([loss, -log_p.mean(), kl.sum(1).mean(), norm]).detach()

    # What is computed from images.

    @torch.no_grad()
    def posterior(self, images: Tensor, labels: Tensor | None = None, batch_size: int = 1000) -> Posterior:
        """q(z | x) of raw images (N, C, H, W)."""
        images = self.check_images(images, self.likelihood.discrete)
        labels = self.check_labels(labels, len(images))
        parts = []
        with self.averaged(), self.autocast():
            for start in range(0, len(images), batch_size):
                part = slice(start, start + batch_size)
                parts.append(self.network.encode(images[part], None if labels is None else labels[part]))
        return Posterior(*(torch.cat([getattr(p, name) for p in parts]) for name in Posterior._fields))

    def encode(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raw images (N, C, H, W) -> the mean of q(z | x), (N, D)."""
        return self.posterior(images, labels).mean

    @torch.no_grad()
    def decode(self, z: Tensor, labels: Tensor | None = None, batch_size: int = 1000) -> Tensor:
        """z (N, D) -> means of p(x | z), (N, C, H, W) float32 in [0, 1]."""
        labels = self.check_labels(labels, len(z))
        parts = []
        with self.averaged(), self.autocast():
            for start in range(0, len(z), batch_size):
                part = slice(start, start + batch_size)
                given = None if labels is None else labels[part]
                parts.append(self.likelihood.mean(self.network.decode(z[part].to(self.device), given)))
        return torch.cat(parts)

    @torch.no_grad()
    def elbo(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        samples: int = 1,
    ) -> Tensor:
        """The evidence lower bound of raw images (N, C, H, W), with the KL in closed form: (N,) nats."""
        q = self.posterior(images, labels)
        total = -kl_divergence(q).sum(1)
        for log_p, _ in self._importance(images, labels, q, samples, generator):
            total += log_p.sum(1) / samples
        return total

    @torch.no_grad()
    def iwae(
        self,
        images: Tensor,
        k: int,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The bound of k samples: log 1/k sum p(x, z) / q(z | x), of raw images (N, C, H, W): (N,) nats.

        It does not fall with k, on average, and reaches log p(x) for k -> infinity. ValueError for k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        q = self.posterior(images, labels)
        total = torch.full((len(images),), -math.inf, device=self.device)
        for log_p, ratio in self._importance(images, labels, q, k, generator):
            total = torch.logaddexp(total, (log_p + ratio).logsumexp(1))
        return total - math.log(k)

    def _importance(
        self,
        images: Tensor,
        labels: Tensor | None,
        q: Posterior,
        samples: int,
        generator: torch.Generator | None,
        rows: int = 10_000,
    ) -> Any:
        """log p(x | z) and log p(z) - log q(z | x), (N, s) each, in parts of s draws z of every image."""
        images = images.to(self.device)
        labels = self.check_labels(labels, len(images))
        x = preprocess(images, self.space)
        with self.averaged(), self.autocast():
            done = 0
            while done < samples:
                s = min(samples - done, max(1, rows // max(1, len(x))))
                wide = Posterior(*(part.repeat_interleave(s, 0) for part in q))
                z, noise = draw_latent(wide, generator)
                log_p = []
                # On the CPU more images at once fall out of the cache.
                step = max(1, (1000 if self.device.type == "cpu" else rows) // s)
                for start in range(0, len(x), step):
                    images_here = slice(start, start + step)
                    given = None if labels is None else labels[images_here].repeat_interleave(s, 0)
                    parameters = self.network.decode(z[start * s : (start + step) * s], given)
                    target = x[images_here].repeat_interleave(s, 0)
                    log_p.append(self.likelihood.log_prob(parameters, target, self.high).flatten(1).sum(1))
                yield torch.cat(log_p).unflatten(0, (-1, s)), log_ratio(z, noise, wide).unflatten(0, (-1, s))
                done += s

    def validate(self, dataset: Dataset) -> dict[str, float]:
        """The ELBO of the validation images, nats an image, always with the same noise."""
        split = dataset.validation
        labels = split.labels if self.conditional else None
        return {"elbo": self.elbo(split.images, labels, self.fixed_noise(1)).mean().item()}

    def test(self, dataset: Dataset, k: int = 500) -> dict[str, float]:
        """Of the test images, nats an image: the ELBO, and minus the bound of k samples."""
        split = dataset.test
        labels = split.labels if self.conditional else None
        bound = self.iwae(split.images, k, labels, self.fixed_noise(2)).mean().item()
        return {
            "nats": -bound,
            "nats_k": k,
            "elbo": self.elbo(split.images, labels, self.fixed_noise(3), samples=10).mean().item(),
            "active_latents": int((self.posterior(split.images, labels).mean.var(0) > 0.01).sum()),
        }

    def baseline(self, dataset: Dataset) -> dict[str, float]:
        return {"independent_pixels_nats": independent_pixels(dataset)} if self.likelihood.discrete else {}

    # What is made.

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """New images (n, C, H, W) uint8: z from the prior, x from p(x | z). `decode` gives means."""
        labels = self.check_labels(labels, n)
        z = torch.randn(n, self.latent_dim, device=self.device, generator=generator)
        parts = []
        with self.averaged(), self.autocast():
            for start in range(0, n, 1000):
                part = slice(start, start + 1000)
                parameters = self.network.decode(z[part], None if labels is None else labels[part])
                drawn = self.likelihood.draw(parameters, self.high, generator)
                parts.append((drawn * self.high).round().to(torch.uint8))
        return torch.cat(parts) if parts else torch.empty(0, *self.space.shape, dtype=torch.uint8)

    def pictures(self, dataset: Dataset) -> dict[str, Tensor]:
        """Means of images from the prior, test images over their reconstructions, and ways between them."""
        labels = self.labels_for(80 if self.conditional else 64)
        n = 64 if labels is None else len(labels)
        z = torch.randn(n, self.latent_dim, device=self.device, generator=self.fixed_noise())
        columns = 8 if labels is None else 10
        return {
            "samples": self.decode(z, labels).cpu().unflatten(0, (-1, columns)),
            "reconstructions": reconstruction_rows(self, dataset),
            "interpolation": interpolation(self, dataset),
        }

    def describe(self) -> dict[str, Any]:
        encoder = describe_encoder(self.config.encoder, self.network.encoder, self.space)
        return super().describe() | {"encoder": encoder}

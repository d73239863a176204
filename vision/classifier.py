"""Image classifiers: a backbone with its own classifier, or any encoder under a linear layer.

Where the papers augment, schedule and regularise, each choice is a field of the Config. The loss is the
cross-entropy, or the multiclass hinge loss of Crammer and Singer (2001), whose linear case is the linear SVM.
"""

import contextlib
import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from .augment import make_augment, mixup
from .backbone import check_size
from .backbones import make_backbone
from .datasets import Dataset, fits
from .encoder import describe_encoder, flat_size, make_encoder, preprocess
from .model import Model, Row, Shuffle, pack, seeds_of, unpack
from .readers import Split

Optimizer = Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lbfgs"]
Schedule = Literal["constant", "step", "cosine", "exponential", "inverse"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Hyper-parameters. An epoch is one pass over the training images."""

    backbone: str = "resnet20"
    """A name of `foveal list backbones`, or linear: one linear layer on the pixels."""
    encoder: str | None = None
    """Instead of a backbone with its own classifier: an encoder, a name of `foveal list encoders`, with a
    linear layer on its features."""
    norm: Literal["batch", "group", "frozen", "none"] | None = None
    """Normalisation layers of the backbone; None for its own."""
    batch_size: int = 128
    """Images in one gradient step; as many as there are, at most."""
    loss: Literal["softmax", "hinge"] = "softmax"
    """Cross-entropy, or the multiclass hinge loss max(0, 1 + the best wrong score - the right one)."""
    optimizer: Optimizer = "momentum"
    """The optimizer, torch.optim's; nesterov is momentum with Nesterov's correction."""
    learning_rate: float = 0.05
    """Step size before the schedule."""
    momentum: float = 0.9
    """Of momentum and nesterov, in [0, 1)."""
    schedule: Schedule = "cosine"
    """How the step size falls. constant: never. step: to a tenth at a half and at three quarters of the
    training. cosine: to 0 by half a cosine. exponential: by `decay` each epoch. inverse: as
    1 / (1 + decay * epoch)."""
    decay: float = 0.95
    """Of the exponential schedule a factor in (0, 1], of the inverse one a rate."""
    warmup: float = 0.0
    """Epochs over which the step size first rises, linearly from 0."""
    weight_decay: float = 0.0
    """Adds weight_decay / 2 times the sum of squared weights to the loss (L2); of adamw, its decoupled
    decay. Biases and normalisation layers are left out."""
    l1: float = 0.0
    """Adds l1 times the sum of absolute weights to the loss; with `weight_decay` the elastic net."""
    max_norm: float | None = None
    """Longest weight vector of one output unit; longer ones are cut to it after each step."""
    dropout: float | None = None
    """Share of units dropped, where the backbone has dropout or the encoder's linear layer; None for the
    backbone's own."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all classes alike, in [0, 1); of softmax only."""
    augment: tuple[str, ...] = ()
    """In this order: crop:P (padding P), flip, shift:P, cutout:S (square of side S)."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. Of softmax only."""
    ema: float = 0.0
    """Decay a step of an average of the weights, which is then what is validated and saved; 0 for none."""
    max_grad_norm: float | None = None
    """L2 norm that gradients are clipped to; None for no limit."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward and backward pass; float16 needs a GPU. Weights and losses stay float32."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")
        for name in ("learning_rate", "decay", "max_norm", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "l1", "mixup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("momentum", "dropout", "label_smoothing", "ema"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.schedule == "exponential" and self.decay > 1:
            raise ValueError(f"decay must be at most 1 with schedule exponential, got {self.decay}")
        if self.loss == "hinge" and (self.label_smoothing or self.mixup):
            raise ValueError("loss hinge takes neither label_smoothing nor mixup")
        if self.optimizer == "lbfgs" and self.precision == "float16":
            raise ValueError("optimizer lbfgs takes precision float32 or bfloat16, got float16")
        make_augment(self.augment)


# Settings known to work, by backbone. LeNet-5's and the linear ones were tried on MNIST; the residual
# networks' are those of their papers.
RESIDUAL = {"learning_rate": 0.1, "optimizer": "nesterov", "weight_decay": 1e-4}
RECIPES: dict[str, dict[str, Any]] = {
    "lenet5": {"weight_decay": 1e-4},
    "linear": {"optimizer": "adam", "learning_rate": 1e-3},
    "resnet*_cifar": RESIDUAL,
    "resnet20": RESIDUAL,
    "resnet32": RESIDUAL,
    "resnet44": RESIDUAL,
    "resnet56": RESIDUAL,
    "resnet110": {**RESIDUAL, "warmup": 1.0},
    "preresnet*_cifar": RESIDUAL,
    "wrn_*": {**RESIDUAL, "weight_decay": 5e-4},
    "densenet*_12": RESIDUAL,
    "alexnet*": {"learning_rate": 0.01, "weight_decay": 5e-4},
    "zfnet": {"learning_rate": 0.01, "weight_decay": 5e-4},
    "vgg*": {"learning_rate": 0.01, "weight_decay": 5e-4},
}


AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "digits": ("crop:1",),
    "mnist": ("crop:2",),
    "fashion-mnist": ("crop:2", "flip"),
    "cifar10": ("crop:4", "flip"),
}
"""By dataset: a mirrored digit is none. Of other images nothing is known, and linear models take none."""


ENCODER = {"optimizer": "adam", "learning_rate": 1e-3}
"""The recipe of all encoders."""


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> ClassifierConfig:
    """The settings known to work for a backbone or an encoder on a dataset, else the defaults, with `changes`
    made."""
    name = backbone or ClassifierConfig.backbone
    settings = next((r for pattern, r in RECIPES.items() if fnmatch.fnmatchcase(name, pattern)), {})
    if encoder is not None:
        settings = {**ENCODER, "encoder": encoder}
    if name != "linear":
        settings = {**settings, "augment": AUGMENTATIONS.get(dataset or "", ())}
    return ClassifierConfig(**{"backbone": name, **settings, **changes})


class BackboneClassifier(nn.Module):
    """Images (B, C, H, W) raw -> logits (B, K), by a backbone's own classifier."""

    def __init__(self, space: spaces.Box, num_classes: int, config: ClassifierConfig):
        super().__init__()
        self.space = space
        channels, height, width = space.shape
        dropout = {} if config.dropout is None else {"dropout": config.dropout}
        check_size(config.backbone, (height, width))  # before weights are made, which may be many
        try:
            self.backbone = make_backbone(config.backbone, num_classes, channels, config.norm, **dropout)
        except TypeError as error:
            raise ValueError(f"dropout: {config.backbone} has none, got {config.dropout}") from error

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(preprocess(images, self.space))

    def feature_map(self, images: Tensor) -> Tensor:
        """The backbone's last map (B, C', h, w)."""
        return self.backbone.feature_map(preprocess(images, self.space))

    def forward_train(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.backbone.forward_train(preprocess(images, self.space))


class EncoderClassifier(nn.Module):
    """Images (B, C, H, W) raw -> logits (B, K), by a linear layer on an encoder's features."""

    def __init__(self, space: spaces.Box, num_classes: int, config: ClassifierConfig):
        super().__init__()
        self.encoder = make_encoder(config.encoder or "auto", space)
        self.dropout = nn.Dropout(config.dropout or 0.0)
        self.head = nn.Linear(self.encoder.features_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.encoder(images)))

    def forward_train(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self(images), []


class LinearClassifier(nn.Module):
    """Images (B, C, H, W) raw -> logits (B, K), linear in the pixels."""

    def __init__(self, space: spaces.Box, num_classes: int, config: ClassifierConfig):
        super().__init__()
        self.space = space
        self.linear = nn.Linear(flat_size(space), num_classes)
        nn.init.zeros_(self.linear.weight)  # the problem is convex
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(preprocess(images, self.space).flatten(1))

    def forward_train(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self(images), []


def make_network(space: spaces.Box, num_classes: int, config: ClassifierConfig) -> Any:
    if config.encoder is not None:
        return EncoderClassifier(space, num_classes, config)
    return (LinearClassifier if config.backbone == "linear" else BackboneClassifier)(
        space, num_classes, config
    )


# The algorithm, as functions that touch only what they are given.


def hinge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """max(0, 1 + max_{j != y} s_j - s_y), mean (Crammer and Singer 2001, eq. 3). (B, K), (B,) -> scalar."""
    right = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = scores.scatter(1, labels.unsqueeze(1), -math.inf).amax(1)
    return (1 + wrong - right).clamp(min=0).mean()


def data_loss(scores: Tensor, labels: Tensor, config: ClassifierConfig) -> Tensor:
    """The loss of scores (B, K) for labels (B,) int64, or (B, K) probabilities (mixup): a scalar."""
    if config.loss == "hinge":
        return hinge_loss(scores, labels)
    return F.cross_entropy(scores.float(), labels, label_smoothing=config.label_smoothing)


def penalty(weights: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """l1 sum |w| + l2 / 2 sum w^2 over all weights: a scalar."""
    flat = torch.cat([weight.flatten() for weight in weights])
    return l1 * flat.abs().sum() + 0.5 * l2 * flat.square().sum()


def rate_at(epoch: float, epochs: float, config: ClassifierConfig) -> float:
    """The step size at a (fractional) epoch of a training of `epochs`."""
    progress = min(1.0, epoch / epochs)
    factor = {
        "constant": lambda: 1.0,
        "step": lambda: 0.1 ** ((progress >= 0.5) + (progress >= 0.75)),
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * progress)),
        "exponential": lambda: config.decay**epoch,
        "inverse": lambda: 1 / (1 + config.decay * epoch),
    }[config.schedule]()
    if config.warmup and epoch < config.warmup:
        factor *= epoch / config.warmup
    return config.learning_rate * factor


def make_optimizer(network: nn.Module, config: ClassifierConfig) -> torch.optim.Optimizer:
    """torch.optim's, by name. Only adamw decays weights by itself: elsewhere that is part of the loss."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    rate, momentum = config.learning_rate, config.momentum
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, rate)
        case "momentum":
            return torch.optim.SGD(parameters, rate, momentum)
        case "nesterov":
            return torch.optim.SGD(parameters, rate, momentum, nesterov=True)
        case "adagrad":
            return torch.optim.Adagrad(parameters, rate)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, rate)
        case "adam":
            return torch.optim.Adam(parameters, rate)
        case "adamw":
            decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
            others = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
            return torch.optim.AdamW([decayed, others], rate)
    return torch.optim.LBFGS(parameters, rate, max_iter=20, line_search_fn="strong_wolfe")


class Scores(NamedTuple):
    """What a classifier does on a split."""

    loss: float
    """Mean, without penalties and label smoothing."""
    error: float
    """Share of wrong answers, in [0, 1]."""
    predictions: Tensor
    """int64 (N,), on the CPU."""


class Classifier(Model):
    """Learns the labels of images.

    >>> from foveal.vision import Classifier, load_dataset
    >>> digits = load_dataset("digits")
    >>> config = Classifier.recipe("linear")
    >>> classifier = Classifier(digits.space, digits.classes, config).fit(digits, epochs=2)
    >>> classifier.predict(digits.test.images[:3]).shape
    torch.Size([3])
    """

    name: ClassVar[str] = "classifier"
    Config: ClassVar[type] = ClassifierConfig
    recipe = staticmethod(recipe)
    chosen_by: ClassVar[str] = "validation/accuracy"
    config: ClassifierConfig

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: ClassifierConfig | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, tuple(classes), config, seed, device)
        if self.config.precision == "float16" and self.device.type != "cuda":
            raise ValueError(f"precision float16 needs a GPU, got device {self.device}")
        weights_seed, self.shuffle_seed, augment_seed, noise_seed = seeds_of(seed, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights_seed)
            self.network = make_network(space, len(self.classes), self.config)
        self.network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.eval()
        self.average: dict[str, Tensor] = {}
        if self.config.ema:
            self.average = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.optimizer = make_optimizer(self.network, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")
        self.augment = make_augment(self.config.augment)
        self.augment_rng = torch.Generator().manual_seed(augment_seed)
        self.noise_rng = torch.Generator().manual_seed(noise_seed).get_state()
        """State of the global generator while a step is taken: dropout and dropped paths draw from it."""
        self.shuffle: Shuffle | None = None
        self.stored_shuffle: dict[str, Tensor] | None = None

    def training(self, dataset: Dataset, epochs: float, log_every: int = 100) -> Iterator[Row]:
        check_dataset(dataset, self.space, self.classes)
        train = dataset.train.to(self.device) if fits(dataset.train, self.device) else dataset.train
        self.shuffle = Shuffle(len(train), self.config.batch_size, self.shuffle_seed)
        if self.stored_shuffle is not None:
            self.shuffle.restore(self.stored_shuffle)
            self.stored_shuffle = None
        total_steps = self.total_steps(dataset, epochs)
        losses = torch.zeros(2, device=self.device)  # sums of loss and of right answers
        images, steps, clock = 0, 0, time.perf_counter()
        while self.grad_step < total_steps:
            index = self.shuffle.next().to(train.images.device)
            epoch = self.grad_step / self.shuffle.batches
            rate = rate_at(epoch, epochs, self.config)
            reporting = (self.grad_step + 1) % log_every == 0 or self.shuffle.at_end
            before = self.weight_vector() if reporting else None
            batch = train.images[index].to(self.device), train.labels[index].to(self.device)
            losses += self.update(*batch, rate)
            images, steps, self.grad_step = images + len(index), steps + 1, self.grad_step + 1
            if not reporting and self.grad_step < total_steps:
                continue
            loss, right = losses.tolist()
            check_finite(loss / steps, self.grad_step)
            row: Row = {
                "grad_step": self.grad_step,
                "epoch": self.grad_step / self.shuffle.batches,
                "train/loss": loss / steps,
                "train/accuracy": right / images,
                "train/learning_rate": rate,
            }
            if before is not None:
                after = self.weight_vector()
                row["train/update_to_weight"] = (
                    (after - before).norm() / before.norm().clamp(min=1e-12)
                ).item()
            row["speed/images_per_s"] = images / (time.perf_counter() - clock)
            if (self.shuffle.at_end or self.grad_step >= total_steps) and len(dataset.validation):
                scores = self.evaluate(dataset.validation)
                row |= {"validation/loss": scores.loss, "validation/accuracy": 1 - scores.error}
            yield row
            losses.zero_()
            images, steps, clock = 0, 0, time.perf_counter()

    def update(self, images: Tensor, labels: Tensor, learning_rate: float) -> Tensor:
        """One gradient step on raw images (B, C, H, W) and labels (B,): loss and right answers (2,)."""
        config, network = self.config, self.network
        images = self.augment(images, self.augment_rng)
        targets = labels
        if config.mixup:
            images, targets = mixup(images, labels, len(self.classes), config.mixup, self.augment_rng)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        l2 = 0.0 if config.optimizer == "adamw" else config.weight_decay
        weights = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
        measured = torch.zeros(2, device=self.device)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with self.autocast():
                scores, auxiliary = network.forward_train(images)  # type: ignore[operator]
            loss = data_loss(scores, targets, config)
            measured[0], measured[1] = loss.detach(), (scores.argmax(1) == labels).sum()
            for other in auxiliary:
                loss = loss + network.backbone.auxiliary_weight * data_loss(other, targets, config)  # type: ignore[union-attr, operator]
            if l2 or config.l1:
                loss = loss + penalty(weights, config.l1, l2)
            self.scaler.scale(loss).backward()
            if config.max_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            return loss

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.noise_rng)
            network.train()
            if config.optimizer == "lbfgs":
                self.optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                self.scaler.step(self.optimizer)
                self.scaler.update()
            network.eval()
            self.noise_rng = torch.get_rng_state()
        with torch.no_grad():
            if config.max_norm is not None:
                for weight in weights:
                    weight.copy_(weight.renorm(2, 0, config.max_norm))
            for name, tensor in network.state_dict().items() if self.average else ():
                if tensor.is_floating_point():
                    self.average[name].lerp_(tensor, 1 - config.ema)
                else:
                    self.average[name].copy_(tensor)
        return measured

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.precision))

    def weight_vector(self) -> Tensor:
        """All trained weights as one vector (P,), a copy."""
        return torch.cat([p.detach().flatten() for p in self.network.parameters() if p.requires_grad])

    @torch.no_grad()
    def scores(self, images: Tensor, batch_size: int = 1000) -> Tensor:
        """Raw images (N, C, H, W) -> logits (N, K) float32 on the CPU, by the weights that `save` writes."""
        with self.averaged(), self.autocast():
            parts = [self.network(part.to(self.device)).float().cpu() for part in images.split(batch_size)]
        return torch.cat(parts)

    def predict(self, images: Tensor) -> Tensor:
        """Raw images (N, C, H, W) -> the likeliest class of each, int64 (N,)."""
        return self.scores(images).argmax(1)

    def evaluate(self, split: Split) -> Scores:
        """Loss and error on a split; nothing of the training changes."""
        scores, labels = self.scores(split.images), split.labels.cpu()
        loss = hinge_loss(scores, labels) if self.config.loss == "hinge" else F.cross_entropy(scores, labels)
        predictions = scores.argmax(1)
        return Scores(loss.item(), (predictions != labels).double().mean().item(), predictions)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the network has the averaged weights, where there are any."""
        if not self.average:
            yield
            return
        mine = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        try:
            yield
        finally:
            self.network.load_state_dict(mine)

    def describe(self) -> dict[str, Any]:
        if self.config.encoder is not None:
            encoder = describe_encoder(self.config.encoder, self.network.encoder, self.space)  # type: ignore[arg-type]
        else:
            encoder = {"name": None, "backbone": self.config.backbone, "norm": self.config.norm}
        return super().describe() | {"encoder": encoder}

    def weights(self) -> dict[str, Tensor]:
        return self.average or self.network.state_dict()

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)
        for name, tensor in self.average.items():
            tensor.copy_(tensors[name])

    # Checkpoints.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"augment_rng": self.augment_rng.get_state(), "noise_rng": self.noise_rng}
        if self.average:
            tensors |= {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        if self.shuffle is not None:
            tensors |= {f"shuffle.{name}": tensor for name, tensor in self.shuffle.state().items()}
        meta = {
            "optimizer": pack(self.optimizer.state_dict(), tensors, "optimizer"),
            "scaler": self.scaler.state_dict(),
        }
        return tensors, meta

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        def part(name: str) -> dict[str, Tensor]:
            return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}

        self.augment_rng.set_state(tensors["augment_rng"])
        self.noise_rng = tensors["noise_rng"]
        if self.average:
            self.network.load_state_dict(part("network."))
        self.stored_shuffle = part("shuffle.") or None
        self.optimizer.load_state_dict(unpack(meta["optimizer"], tensors))
        self.scaler.load_state_dict(meta["scaler"])
        return True


def check_finite(loss: float, grad_step: int) -> None:
    """FloatingPointError where a loss is NaN or infinite: nothing after it is worth saving."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss is {loss} at grad_step {grad_step}; a smaller learning_rate may help")


def check_dataset(dataset: Dataset, space: spaces.Box, classes: Sequence[str]) -> None:
    """ValueError where a dataset is not of the images and classes that a model was built for."""
    if dataset.space != space:
        raise ValueError(f"the images of {dataset.name} are {dataset.space}, the model takes {space}")
    if tuple(dataset.classes) != tuple(classes):
        raise ValueError(
            f"the classes of {dataset.name} are {', '.join(dataset.classes)}; "
            f"the model's are {', '.join(classes)}"
        )

"""The Model contract: what everything that learns from a dataset of images can do.

    model = Classifier(dataset, Classifier.Config(...), seed=0)
    model.fit(dataset, epochs)                      # returns self; shows nothing, logs nothing
    for row in model.training(dataset, epochs): ... # the same as a generator: yields metrics, one dict a row
    model.save(path); Classifier.load(path)

A model never sees a logger or a run folder: it yields, and whoever drives it logs, draws and saves.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from .datasets import Dataset
from .spaces import space_from_json, space_to_json
from .weights import find_weights, read_weights, write_weights

Row = dict[str, Any]


class Model:
    """Base of the models: what they share of making, saving and resuming.

    A subclass builds `network` in its constructor, and implements `training`, `state` and `restore`.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    recipe: ClassVar[Callable[..., Any]]
    """Settings known to work: `recipe(dataset=..., **choices, **changes) -> Config`."""
    recipe_choices: ClassVar[tuple[str, ...]] = ("backbone", "encoder")
    """Fields of the Config that settings known to work depend on."""
    network: nn.Module
    resumable: ClassVar[bool] = True
    chosen_by: ClassVar[str]
    """The key of `training`'s rows whose highest value marks the weights to keep."""

    def __init__(self, space: spaces.Box, classes: tuple[str, ...], config: Any, seed: int, device: str):
        self.space, self.classes = space, classes
        self.config = config if config is not None else self.Config()
        self.seed = seed
        self.device = resolve_device(device)
        self.grad_step = 0
        """Optimizer steps taken."""

    @property
    def step(self) -> int:
        """What checkpoints are counted in."""
        return self.grad_step

    def total_steps(self, dataset: Dataset, epochs: float) -> int:
        """Gradient steps of `epochs` passes over the training images."""
        return max(1, round(epochs * math.ceil(len(dataset.train) / self.config.batch_size)))

    def training(self, dataset: Dataset, epochs: float, log_every: int = 100) -> Iterator[Row]:
        """Train until `epochs` passes over the training images are done, those of earlier calls included.

        Yields a row of metrics every `log_every` gradient steps and at the end of each epoch. Between two
        rows the model is whole: it may be evaluated, saved, or left.
        """
        raise NotImplementedError

    def fit(
        self,
        dataset: Dataset,
        epochs: float,
        callback: Callable[[Self, Row], bool | None] | None = None,
        log_every: int = 100,
    ) -> Self:
        """Train; `callback(model, row)` sees every row and stops the training by returning False."""
        for row in self.training(dataset, epochs, log_every):
            if callback is not None and callback(self, row) is False:
                break
        return self

    def describe(self) -> dict[str, Any]:
        """What a weights file says beside its tensors; enough to build the model again."""
        return {
            "model": self.name,
            "config": asdict(self.config),
            "seed": self.seed,
            "grad_step": self.grad_step,
            "space": space_to_json(self.space),
            "classes": list(self.classes),
        }

    def save(self, path: str | Path) -> Path:
        """Write the weights and the description of this model to one safetensors file."""
        path = Path(path)
        write_weights(path, self.weights(), self.describe())
        return path

    def weights(self) -> dict[str, Tensor]:
        """What `save` writes: the weights that the model is used with."""
        return self.network.state_dict()

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Self:
        """Build the model that a weights file, checkpoint or run folder holds.

        Raises FileNotFoundError, or ValueError where the file is damaged, of another version, or of another
        model.
        """
        path = find_weights(Path(path))
        tensors, description = read_weights(path)
        if description.get("model") != cls.name:
            what = description.get("model") or description.get("agent")
            raise ValueError(f"{path} holds a {what!r}, not a {cls.name!r}")
        try:
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
            model = cls.rebuild(description, cls.Config(**config), device)
            model.grad_step = description["grad_step"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a {cls.name} of this version: {error}") from error
        try:
            model.load_weights(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} is of another architecture: {error}") from error
        return model

    @classmethod
    def rebuild(cls, description: dict[str, Any], config: Any, device: str) -> Self:
        """The model that a file describes, without its weights yet."""
        space, classes, seed = cls.described(description)
        return cls(space, classes, config, seed=seed, device=device)

    @staticmethod
    def described(description: dict[str, Any]) -> tuple[spaces.Box, tuple[str, ...], int]:
        """Space, classes and seed of what a file describes."""
        space: Any = space_from_json(description["space"])
        return space, tuple(description["classes"]), description["seed"]

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Undo `weights`. Raises RuntimeError where they do not fit."""
        self.network.load_state_dict(tensors)

    # What a checkpoint holds beyond the weights, so that a resumed run is the run that was never stopped.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but the weights: tensors, and JSON."""
        raise NotImplementedError

    def segments(self) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
        """Nothing: models keep no replay."""
        yield from ()

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        """Undo `state`; True, since nothing can come back inexactly."""
        raise NotImplementedError


class Shuffle:
    """Indices of batches, epoch after epoch, each in a new order; resumable in the middle of an epoch.

    The last batch of an epoch is what is left of it.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size = size, min(batch_size, size)
        self.rng = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = size

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.size / self.batch_size)

    @property
    def at_end(self) -> bool:
        """Whether an epoch has just ended."""
        return self.position >= self.size

    def next(self) -> Tensor:
        """The next batch: int64 (B,), on the CPU."""
        if self.at_end:
            self.order, self.position = torch.randperm(self.size, generator=self.rng), 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index

    def state(self) -> dict[str, Tensor]:
        position = torch.tensor([self.size, self.position])
        return {"order": self.order, "position": position, "rng": self.rng.get_state()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state`. ValueError where it is of another number of images."""
        size, self.position = tensors["position"].tolist()
        if size != self.size:
            raise ValueError(f"the training was over {size:,} images, these are {self.size:,}")
        self.order = tensors["order"].clone()
        self.rng.set_state(tensors["rng"])


def pack(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Nested dicts and lists (an optimizer's state) as JSON; tensors go into `tensors`, named by their place.

    Keys that are integers come back as such.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"items": [[key, pack(part, tensors, f"{name}.{key}")] for key, part in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [pack(part, tensors, f"{name}.{i}") for i, part in enumerate(tree)]}
    return {"value": tree}


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; tuples come back as lists, tensors as copies."""
    match tree:
        case {"tensor": name}:
            return tensors[name].clone()
        case {"items": items}:
            return {key: unpack(part, tensors) for key, part in items}
        case {"list": parts}:
            return [unpack(part, tensors) for part in parts]
    return tree["value"]


def resolve_device(device: str) -> torch.device:
    """auto means cuda where there is one. ValueError for a device that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be auto, cpu or a device of this machine, got {device!r}: {reason}"
        ) from error
    return resolved


def seeds_of(seed: int, count: int) -> list[int]:
    """Independent seeds for `count` random generators, from one."""
    sequences = np.random.SeedSequence(seed).spawn(count)
    return [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences]

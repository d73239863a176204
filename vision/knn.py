"""k nearest neighbours on pixels: the baseline that learns nothing (Cover and Hart 1967).

The search is scikit-learn's; k is the one of `candidates` that is best on the validation images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from .classifier import Scores, check_dataset
from .datasets import Dataset
from .model import Model, Row
from .readers import Split


@dataclass(frozen=True)
class KNNConfig:
    """Settings."""

    metric: Literal["l1", "l2"] = "l2"
    """Distance between images as vectors of pixels: sum of absolute differences, or Euclidean."""
    candidates: tuple[int, ...] = (1, 3, 5, 7, 9, 11, 15, 21)
    """Numbers of neighbours to choose from, by validation."""

    def __post_init__(self) -> None:
        if not self.candidates or min(self.candidates) < 1:
            raise ValueError(f"candidates must be whole numbers of 1 or more, got {self.candidates}")


def recipe(
    backbone: str | None = None, dataset: str | None = None, encoder: str | None = None, **changes: Any
) -> KNNConfig:
    """The defaults, with `changes` made: they hold for all images, and there is no network."""
    return KNNConfig(**changes)


class Images(nn.Module):
    """What is remembered: the training images, their labels, and k."""

    images: Tensor
    labels: Tensor
    k: Tensor

    def __init__(self, space: spaces.Box, k: int):
        super().__init__()
        self.register_buffer("images", torch.zeros(0, *space.shape, dtype=torch.uint8))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("k", torch.tensor(k))


class KNN(Model):
    """Gives an image the label of most of its k nearest training images; of equals the nearest decides."""

    name: ClassVar[str] = "knn"
    Config: ClassVar[type] = KNNConfig
    recipe = staticmethod(recipe)
    chosen_by: ClassVar[str] = "validation/accuracy"
    config: KNNConfig
    network: "Images"

    def __init__(
        self,
        space: spaces.Box,
        classes: Sequence[str],
        config: KNNConfig | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        super().__init__(space, tuple(classes), config, seed, device)
        self.network = Images(space, self.config.candidates[0])

    def total_steps(self, dataset: Dataset, epochs: float) -> int:
        return 1

    def training(self, dataset: Dataset, epochs: float = 1.0, log_every: int = 100) -> Iterator[Row]:
        """Remember the training images and choose k: one row."""
        check_dataset(dataset, self.space, self.classes)
        if not len(dataset.validation):
            raise ValueError("knn chooses k by validation images, of which there are none (--validation)")
        candidates = [k for k in self.config.candidates if k <= len(dataset.train)]
        if not candidates:
            raise ValueError(
                f"candidates must include one of at most the {len(dataset.train)} training images, "
                f"got {self.config.candidates}"
            )
        self.load_weights(
            {
                "images": dataset.train.images,
                "labels": dataset.train.labels,
                "k": torch.tensor(max(candidates)),
            }
        )
        neighbours = self.neighbours(dataset.validation.images)
        truth = dataset.validation.labels
        accuracy = {k: (vote(neighbours[:, :k]) == truth).double().mean().item() for k in candidates}
        k = max(candidates, key=lambda k: (accuracy[k], -k))
        self.network.k.fill_(k)
        self.grad_step = 1
        yield {"grad_step": 1, "epoch": 1.0, "train/k": k, "validation/accuracy": accuracy[k]} | {
            f"validation/accuracy_k{k}": value for k, value in accuracy.items()
        }

    def neighbours(self, images: Tensor) -> Tensor:
        """Raw images (N, C, H, W) -> labels of the k nearest training images, nearest first: (N, k)."""
        from sklearn.neighbors import NearestNeighbors

        def vectors(pixels: Tensor) -> np.ndarray:
            return pixels.flatten(1).float().cpu().numpy()

        metric = {"l1": "manhattan", "l2": "euclidean"}[self.config.metric]
        search = NearestNeighbors(
            n_neighbors=int(self.network.k), algorithm="brute", metric=metric, n_jobs=-1
        )
        search.fit(vectors(self.network.images))
        nearest = search.kneighbors(vectors(images), return_distance=False)
        return self.network.labels[torch.from_numpy(nearest)]

    def predict(self, images: Tensor) -> Tensor:
        """Raw images (N, C, H, W) -> int64 (N,)."""
        return vote(self.neighbours(images))

    def evaluate(self, split: Split) -> Scores:
        """Error on a split; the loss, of which there is none, is the error."""
        predictions = self.predict(split.images)
        error = (predictions != split.labels.cpu()).double().mean().item()
        return Scores(error, error, predictions)

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name in ("images", "labels", "k"):
            setattr(self.network, name, tensors[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool:
        return True


def vote(labels: Tensor) -> Tensor:
    """The commonest label of each row (N, k), nearest first; of equally common ones the nearest: (N,)."""
    same = labels.unsqueeze(2) == labels.unsqueeze(1)  # (N, k, k)
    votes = same.sum(2)  # how often the label at each place occurs
    return labels.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)

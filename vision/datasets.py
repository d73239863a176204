"""Labelled images in memory: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10, folders and .npz files.

Images are uint8, channels first; networks scale them (by `Dataset.high`).
"""

import difflib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from .readers import SOURCES, Split, read_digits, read_folder, read_known, read_npz, resize


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to train on, to choose settings on, and to report on."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    """Names of the labels."""
    high: int
    """Largest value that a pixel may have: 16 for digits, 1 for binarised images, else mostly 255."""
    grey: int | None = None
    """Where the training images are binarised anew for each batch (see `binarize`): the largest value that
    their pixels still have. None: they are as the model sees them."""

    @property
    def space(self) -> spaces.Box:
        """The space of one image, which encoders are built from."""
        return spaces.Box(0, self.high, tuple(self.train.images.shape[1:]), np.uint8)

    @property
    def digest(self) -> str:
        """sha256 of all pixels and labels and of how they are split, in hex. Takes 0.1 s for MNIST."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(repr(tuple(split.images.shape)).encode())
            for tensor in (split.images, split.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Training images (B, C, H, W) uint8 as a model is to see them this time, within `space`."""
        if self.grey is None:
            return images
        chance = torch.rand(images.shape, device=images.device, generator=generator)
        return (chance * self.grey < images).to(torch.uint8)

    def to(self, device: str | torch.device) -> "Dataset":
        """All splits on another device; see `fits`."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)


def load_dataset(
    name: str | Path,
    data_dir: str | Path | None = None,
    seed: int = 0,
    validation: float | int | None = None,
    size: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    download: bool = True,
) -> Dataset:
    """Load a data set into memory, on the CPU, and split it.

    The test images are the data set's own, or else a fifth of all images. The validation images are cut from
    the training images (unless a folder or file has its own). All cuts keep the classes' shares; training and
    validation images depend on `seed`, test images never do. Within a split images keep their order.

    Args:
        name: `digits` (1,797 images, 8x8, comes with scikit-learn), `mnist`, `fashion-mnist`, `cifar10`; or
            the path of a folder of images (see `read_folder`) or of an .npz file (see `read_npz`).
        data_dir: folder of the known data sets' files, as `FILE` or `NAME/FILE`, packed as published or
            unpacked. Default: the environment variable FOVEAL_DATA. Where a file is not there, it is looked
            for in /usr/share/datasets (Debian's) and the cache ($XDG_CACHE_HOME/foveal or ~/.cache/foveal).
        seed: of the cut between training and validation images, 0 or more.
        validation: training images to hold out, as a share in [0, 1) or as a count (an int). Default: a
            tenth, at most 5,000.
        size: side in pixels that images are brought to, see `resize`.
        train_size: how many images remain in `train`, which changes nothing in `validation`: the first ones
            in an order that keeps the classes' shares, so that a smaller set is part of a larger one.
        test_size: how many images remain in `test`, chosen in the same manner, but whatever the seed.
        download: fetch files that are nowhere, into the cache.

    Raises:
        ValueError: an argument out of range, an unknown name, a file that is damaged or not the right one.
        FileNotFoundError: files that are nowhere and could not be fetched; says where they were looked for.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed!r}")
    if validation is not None and not (validation >= 0 and (isinstance(validation, int) or validation < 1)):
        raise ValueError(
            f"validation must be a share in [0, 1) or a count (an int) of 0 or more, got {validation!r}"
        )
    for argument, value in (("size", size), ("train_size", train_size), ("test_size", test_size)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be 1 or more, got {value!r}")

    path = Path(name).expanduser()
    if name == "digits":
        parts = read_digits()
    elif name in SOURCES:
        parts = read_known(str(name), data_dir, download)
    elif path.is_dir():
        parts = read_folder(path, size)
    elif path.suffix == ".npz" and path.is_file():
        parts = read_npz(path)
    else:
        known = ["digits", *SOURCES]
        near = difflib.get_close_matches(str(name), known, n=1) or known
        raise ValueError(
            f"unknown data set {str(name)!r}; nearest: {', '.join(near)} "
            "(or the path of a folder of images or of an .npz file)"
        )
    train, held_out, test, classes, high = parts
    if size is not None:
        train = _resized(train, size)
        held_out = None if held_out is None else _resized(held_out, size)
        test = None if test is None else _resized(test, size)
    if test is None:
        test, train = _cut(train, math.ceil(TEST_SHARE * len(train)), TEST_SEED)
        if not len(train):
            raise ValueError(
                f"{name} has a single image, which cannot be split into training and test images"
            )
    if test_size is not None:
        test = _limit("test_size", test, test_size, TEST_SEED)
    if held_out is None:
        count = _validation_count(validation, len(train))
        held_out, train = _cut(train, count, seed)
    elif validation is not None:
        raise ValueError(f"validation must be None for {name}, which has its own, got {validation!r}")
    if train_size is not None:
        train = _limit("train_size", train, train_size, seed)
    return Dataset(str(name), train, held_out, test, classes, high)


# Splits


TEST_SHARE = 0.2
"""Of all images, where a data set has no test images of its own."""
TEST_SEED = 2**31 - 1
"""Of what must not depend on the person's seed."""


def folds(labels: Tensor, k: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Stratified k-fold cross-validation: k pairs of indices (training images, held-out images).

    Each image is held out once. Held-out sets differ in size by at most one, and so does each class in them.

    Args:
        labels: (N,) int64.
        k: number of folds, 2 to N.
        seed: of which image comes into which fold, 0 or more.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed!r}")
    if not 2 <= k <= len(labels):
        raise ValueError(f"k must be 2 to {len(labels)} (the number of images), got {k!r}")
    order = _shuffled(len(labels), seed)
    by_class = order[np.argsort(labels.cpu().numpy()[order], kind="stable")]
    fold = np.empty(len(order), np.int64)
    fold[by_class] = np.arange(len(order)) % k
    return [
        (torch.from_numpy(np.flatnonzero(fold != i)), torch.from_numpy(np.flatnonzero(fold == i)))
        for i in range(k)
    ]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """All indices, (N,) int64, in an order whose every beginning has each class in its share.

    That is the order in which Webster's method hands out seats: of a class of n images the j-th has its turn
    at (j - 1/2) / n. Which image is the j-th is random.
    """
    of = labels.cpu().numpy()
    order = _shuffled(len(of), seed)
    turn = np.empty(len(of))
    for label in np.unique(of):
        members = order[of[order] == label]
        turn[members] = (np.arange(len(members)) + 0.5) / len(members)
    return torch.from_numpy(order[np.argsort(turn[order], kind="stable")])


def _shuffled(count: int, seed: int) -> np.ndarray:
    # NumPy promises that a bit generator's integers stay the same for ever; of permutation() it does not.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _cut(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """`count` images and the others."""
    order = stratified_order(split.labels, seed)
    return split.take(order[:count].sort().values), split.take(order[count:].sort().values)


def _limit(argument: str, split: Split, count: int, seed: int) -> Split:
    if count > len(split):
        raise ValueError(f"{argument} must be at most {len(split):,}, which is all there are, got {count!r}")
    return _cut(split, count, seed)[0]


def _validation_count(validation: float | int | None, available: int) -> int:
    if validation is None:
        return min(available // 10, 5_000)
    count = validation if isinstance(validation, int) else round(validation * available)
    if count >= available:
        raise ValueError(
            f"validation must leave one of {available:,} training images or more, got {validation!r}"
        )
    return count


# Batches


def batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator | None = None,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images (B, C, H, W) uint8, labels (B,) int64), on the split's device.

    Args:
        split: where the batches come from.
        batch_size: images in a batch; the last one has what is left.
        generator: on the CPU; shuffles, and is given to `augment`. None keeps the order, and the batches are
            then views of the split.
        augment: what changes the images, such as `make_augment` gives; needs a generator.
        drop_last: leave out a last batch that is not full.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}")
    if augment is not None and generator is None:
        raise ValueError("augment needs a generator, got None")

    end = len(split) - len(split) % batch_size if drop_last else len(split)
    slices = [slice(start, start + batch_size) for start in range(0, end, batch_size)]
    if generator is None:
        return ((split.images[chosen], split.labels[chosen]) for chosen in slices)

    def epoch(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(split), generator=generator).to(split.images.device)
        for chosen in slices:
            batch = split.take(order[chosen])
            yield augment(batch.images, generator) if augment else batch.images, batch.labels

    return epoch(generator)


# Levels of grey


HELD_OUT_SEED = 2**31 - 2
"""Of the pixels that are drawn once and for all."""


def binarize(dataset: Dataset, how: int | Literal["dynamic", "fixed"]) -> Dataset:
    """Images of zeros and ones. Raises ValueError for a threshold that leaves no ones or no zeros.

    A number is a threshold: pixels of at least that much become 1. `dynamic` (Salakhutdinov and Murray 2008)
    takes pixel / high as the chance of a 1: training images are drawn anew for each batch, by
    `Dataset.draw`, the held-out ones once and for all, whatever the seed. `fixed` draws the training images
    once and for all too, as Larochelle and Murray 2011 did (their very draws are other ones); the held-out
    images are the same.
    """
    if how not in ("dynamic", "fixed"):
        if not isinstance(how, int) or not 1 <= how <= dataset.high:
            raise ValueError(f"binarize must be dynamic, fixed or from 1 to {dataset.high}, got {how!r}")
        return _with_images(dataset, lambda images: (images >= how).to(torch.uint8), 1)
    grey = replace(dataset, grey=dataset.high)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    drawn = {}
    for name in ("test", "validation", *(["train"] if how == "fixed" else [])):
        split = getattr(dataset, name)
        drawn[name] = Split(grey.draw(split.images, generator), split.labels)
    whole: Dataset = replace(grey, high=1, **drawn)  # type: ignore[arg-type]
    return replace(whole, grey=None) if how == "fixed" else whole


def quantize(dataset: Dataset, levels: int) -> Dataset:
    """Images of `levels` equally wide levels, 0 to levels - 1. ValueError unless there are more now."""
    if not 2 <= levels <= dataset.high:
        raise ValueError(f"levels must be from 2 to {dataset.high}, got {levels}")
    scale = dataset.high + 1
    return _with_images(dataset, lambda x: (x.to(torch.int32) * levels // scale).to(torch.uint8), levels - 1)


def _with_images(dataset: Dataset, change: Callable[[Tensor], Tensor], high: int) -> Dataset:
    parts = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    changed = {name: Split(change(part.images), part.labels) for name, part in parts.items()}
    return replace(dataset, high=high, **changed)  # type: ignore[arg-type]


def fits(split: Split, device: str | torch.device) -> bool:
    """Whether a split may move to a device: it takes at most half of the memory that is free there now.

    The other half is for the network and its activations. True for the CPU, where the split is already.
    """
    if torch.device(device).type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * (split.images.nbytes + split.labels.nbytes) <= free


def _resized(split: Split, size: int) -> Split:
    return Split(resize(split.images, size), split.labels)

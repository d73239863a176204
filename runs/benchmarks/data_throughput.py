"""Training throughput of LeNet-5: `foveal train classifier`'s trainer beside a plain loop over a DataLoader.

    python -m foveal.runs.benchmarks.data_throughput               # MNIST, from FOVEAL_DATA or --data-dir
    python -m foveal.runs.benchmarks.data_throughput --synthetic   # random images of the same size

A figure is images a second of wall time over whole epochs of training (61,706 parameters, SGD with
momentum 0.9 and weight decay, batches of 128, no augmentation), with all cores; nothing else should be
running. Ours is `Classifier.training` as a user runs it, its rows of metrics included: it indexes the
uint8 images where they lie, and its convolutions are channels last. The peer is the loop that most people
write: torch's DataLoader over a data set that makes a float tensor of each image, as torchvision's do
(without their detour through Pillow), once with no and once with two worker processes, and the same
network as PyTorch lays it out. Its workers are started before the clock. The sides take turns, so that a
machine whose speed drifts does not favour one; a ratio is the median over the rounds, with a bootstrap
interval.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...vision.backbones import make_backbone
from ...vision.classifier import Classifier
from ...vision.datasets import Dataset, fits, load_dataset
from ...vision.readers import Split
from ..cli import guarded
from ..statistics import bootstrap_ci
from .common import RESULTS, argument_parser, count, machine_info, write_results

BATCH_SIZE = 128
PARAMETERS = 61_706
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
PEERS = {"DataLoader, 0 workers": 0, "DataLoader, 2 workers": 2}


class SingleImages(TorchDataset[tuple[Tensor, int]]):
    """Images one by one, float32 in [0, 1] and channels first, with their labels."""

    def __init__(self, split: Split):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.split.images[index].float() / 255, int(self.split.labels[index])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with mnist/ in it (default: FOVEAL_DATA)")
    parser.add_argument("--synthetic", action="store_true", help="random images instead of MNIST")
    parser.add_argument("--images", type=count, default=60_000, help="images in an epoch")
    parser.add_argument("--epochs", type=count, default=1, help="epochs of each side in a round")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_throughput.json")
    given = parser.parse_args()
    if given.synthetic:
        generator = torch.Generator().manual_seed(0)
        shape = (given.images, 1, 28, 28)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        split = Split(images, torch.randint(10, (given.images,), generator=generator))
        none = Split(images[:0], split.labels[:0])
        dataset = Dataset("synthetic", split, none, none, tuple("0123456789"), high=255)
    else:
        dataset = load_dataset("mnist", given.data_dir, validation=0, train_size=given.images, download=False)
    device = torch.device(given.device)
    if not fits(dataset.train, device):
        raise SystemExit(f"{len(dataset.train):,} images do not fit into the free memory of {device}")

    sides: dict[str, Callable[[int], float]] = {
        "foveal": functools.partial(train_ours, dataset=dataset, device=given.device)
    }
    for name, workers in PEERS.items():
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            SingleImages(dataset.train),  # type: ignore[arg-type]  # collated: tensors
            BATCH_SIZE,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(0),
        )
        sides[name] = functools.partial(train_plainly, loader=loader, device=device)

    speeds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for side, train in sides.items():
        train(1)  # starts workers, and whatever else happens once
        print(f"{side} is warm", flush=True)
    for number in range(given.rounds):
        for side in list(sides) if number % 2 == 0 else reversed(list(sides)):
            wait(device)
            began = time.perf_counter()
            loss = sides[side](given.epochs)
            wait(device)
            speeds[side].append(given.epochs * len(dataset.train) / (time.perf_counter() - began))
            losses[side].append(loss)
            print(f"{side:<22} {speeds[side][-1]:10,.0f} images/s, loss {loss:.3f}", flush=True)

    ratios = {peer: [ours / theirs for ours, theirs in zip(speeds["foveal"], speeds[peer])] for peer in PEERS}
    results: dict[str, Any] = {
        **machine_info(),
        "data": dataset.name,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "images": len(dataset.train),
        "epochs": given.epochs,
        "batch_size": BATCH_SIZE,
        "parameters": PARAMETERS,
        "images_per_second": speeds,
        "loss_of_last_epoch": losses,
        "ratios": ratios,
        "ratio": {peer: statistics.median(values) for peer, values in ratios.items()},
        "ratio_ci95": {peer: bootstrap_ci(values, np.median) for peer, values in ratios.items()},
    }
    write_results(given.out, results)
    for side, values in speeds.items():
        print(f"{side:<22} {statistics.median(values):10,.0f} images/s")
    for peer, (low, high) in results["ratio_ci95"].items():
        print(f"{results['ratio'][peer]:.2f} times {peer} (95 % interval {low:.2f} to {high:.2f})")


def train_ours(epochs: int, dataset: Dataset, device: str) -> float:
    """Train a new classifier: the mean loss of the last steps that it reports."""
    config = Classifier.recipe(
        "lenet5",
        batch_size=BATCH_SIZE,
        optimizer="momentum",
        momentum=MOMENTUM,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        weight_decay=WEIGHT_DECAY,
    )
    classifier = Classifier(dataset.space, dataset.classes, config, device=device)
    check_parameters(classifier.network)
    *_, last = classifier.training(dataset, epochs)
    return float(last["train/loss"])


def train_plainly(epochs: int, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Train a new network in a plain loop: the mean loss of the last epoch."""
    torch.manual_seed(0)
    network = make_backbone("lenet5", num_classes=10, in_channels=1).to(device)
    check_parameters(network)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    for _ in range(epochs):
        total, steps = torch.zeros((), device=device), 0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            steps += 1
    return (total / steps).item()


def check_parameters(network: torch.nn.Module) -> None:
    if (count := sum(p.numel() for p in network.parameters())) != PARAMETERS:
        raise SystemExit(f"lenet5 has {count:,} parameters, not {PARAMETERS:,}")


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Training throughput of LeNet-5 with the images on the device, beside a DataLoader over single images.

    python -m foveal.runs.benchmarks.data_throughput               # MNIST, from FOVEAL_DATA or --data-dir
    python -m foveal.runs.benchmarks.data_throughput --synthetic   # random images of the same size

A figure is images a second of wall time over whole epochs of training (61,706 parameters, SGD with momentum,
batches of 128), with all cores; nothing else should be running. Ours indexes the uint8 images where they lie.
The peer is torch's DataLoader over a data set that makes a float tensor of each image, as torchvision's do
(without their detour through Pillow), once with no and once with two worker processes; the faster one counts.
Its workers are started before the clock. The sides take turns, so that a machine whose speed drifts does not
favour one; the ratio is the median over the rounds, with a bootstrap interval.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...vision.datasets import batches, fits, load_dataset
from ...vision.readers import Split
from ..statistics import bootstrap_ci
from .common import RESULTS, argument_parser, machine_info, write_results

BATCH_SIZE = 128
PARAMETERS = 61_706
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
    parser.add_argument("--images", type=int, default=60_000, help="images in an epoch")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each side in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "data_throughput.json")
    given = parser.parse_args()
    if given.synthetic:
        generator = torch.Generator().manual_seed(0)
        shape = (given.images, 1, 28, 28)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        split = Split(images, torch.randint(10, (given.images,), generator=generator))
    else:
        split = load_dataset(
            "mnist", given.data_dir, validation=0, train_size=given.images, download=False
        ).train
    device = torch.device(given.device)
    if not fits(split, device):
        raise SystemExit(f"{len(split):,} images do not fit into the free memory of {device}")

    generator = torch.Generator().manual_seed(0)
    on_device = split.to(device)
    sides: dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = {
        "foveal": lambda: ((x.float() / 255, y) for x, y in batches(on_device, BATCH_SIZE, generator))
    }
    for name, workers in PEERS.items():
        loader = DataLoader(
            SingleImages(split),
            BATCH_SIZE,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=generator,
        )
        sides[name] = functools.partial(iter, loader)

    speeds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {side: [] for side in sides}
    for side, epoch in sides.items():
        train(epoch, 1, device)  # starts workers, and whatever else happens once
        print(f"{side} is warm", flush=True)
    for number in range(given.rounds):
        for side in list(sides) if number % 2 == 0 else reversed(list(sides)):
            seconds, loss = train(sides[side], given.epochs, device)
            speeds[side].append(given.epochs * len(split) / seconds)
            losses[side].append(loss)
            print(f"{side:<22} {speeds[side][-1]:10,.0f} images/s, loss {loss:.3f}", flush=True)

    peer = max(PEERS, key=lambda name: statistics.median(speeds[name]))
    ratios = [ours / theirs for ours, theirs in zip(speeds["foveal"], speeds[peer])]
    ratio, interval = statistics.median(ratios), bootstrap_ci(ratios, np.median)
    results: dict[str, Any] = {
        **machine_info(),
        "data": "synthetic" if given.synthetic else "mnist",
        "device": str(device),
        "threads": torch.get_num_threads(),
        "images": len(split),
        "epochs": given.epochs,
        "batch_size": BATCH_SIZE,
        "parameters": PARAMETERS,
        "images_per_second": speeds,
        "loss_of_last_epoch": losses,
        "peer": peer,
        "ratios": ratios,
        "ratio": ratio,
        "ratio_ci95": interval,
    }
    write_results(given.out, results)
    for side, values in speeds.items():
        print(f"{side:<22} {statistics.median(values):10,.0f} images/s")
    print(f"{ratio:.2f} times {peer} (95 % interval {interval[0]:.2f} to {interval[1]:.2f})")


def train(
    epoch: Callable[[], Iterable[tuple[Tensor, Tensor]]], epochs: int, device: torch.device
) -> tuple[float, float]:
    """Train a new network: seconds of wall time, and the mean loss of the last epoch."""
    from ...vision.backbones import make_backbone

    torch.manual_seed(0)
    network = make_backbone("lenet5", num_classes=10, in_channels=1).to(device)
    if (count := sum(p.numel() for p in network.parameters())) != PARAMETERS:
        raise SystemExit(f"lenet5 has {count:,} parameters, not {PARAMETERS:,}")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    wait(device)
    began = time.perf_counter()
    for _ in range(epochs):
        total, steps = torch.zeros((), device=device), 0
        for images, labels in epoch():
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            steps += 1
    wait(device)
    return time.perf_counter() - began, (total / steps).item()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

"""Variational autoencoders: nats of held-out images, and training throughput beside a plain loop.

    python -m foveal.runs.benchmarks.vae                  # all cells; finished ones are skipped
    python -m foveal.runs.benchmarks.vae --tasks digits   # of some tasks only
    python -m foveal.runs.benchmarks.vae --report         # the table of what is there, as Markdown

A cell is a task and a seed. The seed is of weights, batches and noise; the images are the same in all cells.
`digits`: scikit-learn's digits, binarised at 8, 1,437 to train and 360 to test. `fashion`: Fashion-MNIST,
binarised at 128, 10,000 of its training and 1,000 of its test images. `mnist`: MNIST, its 60,000 training
images drawn anew for each batch, 2,000 of its test images drawn once. No image is held out for validation:
the last weights (their average, where the settings have one) are scored, by the bound of k samples. One
thread.

`throughput` trains the models of `digits` and `fashion` with our trainer and with a plain loop of the same
network, loss and optimizer over torch's DataLoader of single images (0 and 2 worker processes, the faster one
counts), in turns.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ...generative import VAE, VAEConfig, independent_pixels
from ...vision import Dataset, binarize, load_dataset
from ..cli import guarded
from ..statistics import bootstrap_ci
from .common import RESULTS, a_seed, append_cell, argument_parser, count


class Task(NamedTuple):
    """What is trained on what."""

    dataset: str
    binarize: Any
    train_size: int | None
    test_size: int | None
    epochs: float
    k: int
    goal: float
    """Nats of a test image that are to be reached."""
    config: dict[str, Any]


TASKS = {
    "digits": Task("digits", 8, None, None, 300, 500, 17.1, {}),
    "fashion": Task("fashion-mnist", 128, 10_000, 1_000, 24, 500, 124.0, {}),
    "mnist": Task("mnist", "dynamic", None, 2_000, 13, 500, 86.8, {}),
}


def main() -> int:
    parser = argument_parser(__doc__)
    every = [*TASKS, "throughput"]
    parser.add_argument("--tasks", nargs="+", choices=every, default=every, help="which (all)")
    parser.add_argument("--seeds", type=count, default=5, help="how many of each task (5)")
    parser.add_argument("--first-seed", type=a_seed, default=0, help="of these, for several processes (0)")
    parser.add_argument("--data-dir", type=Path, help="folder with mnist/ and fashion-mnist/ in it")
    parser.add_argument("--rounds", type=count, default=5, help="of throughput (5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "vae.json")
    parser.add_argument("--report", action="store_true", help="print the table of finished cells")
    given = parser.parse_args()
    if given.report:
        print(report(read(given.out)))
        return 0
    torch.set_num_threads(1)
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for name, task in TASKS.items():
            if name in given.tasks and not any(
                (cell["task"], cell["seed"], cell.get("epochs")) == (name, seed, task.epochs)
                for cell in read(given.out)
            ):
                append(given.out, train_cell(name, seed, given.data_dir))
    for name in ("digits", "fashion") if "throughput" in given.tasks else ():
        if not any(cell["task"] == f"throughput-{name}" for cell in read(given.out)):
            append(given.out, throughput(name, given.data_dir, given.rounds))
    print(report(read(given.out)))
    return 0


def images_of(task: Task, data_dir: Path | None) -> Dataset:
    dataset = load_dataset(
        task.dataset, data_dir, validation=0, train_size=task.train_size, test_size=task.test_size
    )
    return binarize(dataset, task.binarize)


def model_of(task: Task, dataset: Dataset, seed: int) -> VAE:
    config = VAE.recipe(dataset=task.dataset, **task.config)
    return VAE(dataset.space, dataset.classes, config, seed=seed, device="cpu")


def train_cell(name: str, seed: int, data_dir: Path | None) -> dict[str, Any]:
    task = TASKS[name]
    dataset = images_of(task, data_dir)
    model = model_of(task, dataset, seed)
    before, clock = cpu_seconds(), time.perf_counter()
    model.fit(dataset, task.epochs, log_every=10**9)
    trained = cpu_seconds() - before
    figures = model.test(dataset, k=task.k)
    cell = {
        "task": name,
        "seed": seed,
        "epochs": task.epochs,
        "nats": figures["nats"],
        "k": task.k,
        "elbo": figures["elbo"],
        "train_cpu_s": round(trained, 1),
        "cpu_s": round(cpu_seconds() - before, 1),
        "wall_s": round(time.perf_counter() - clock, 1),
        "images": [len(dataset.train), len(dataset.test)],
        "independent_pixels": independent_pixels(dataset),
        "config": asdict(model.config),
    }
    print(
        f"{name} seed {seed}: {cell['nats']:.2f} nats (IWAE-{task.k}), {cell['cpu_s']:.0f} CPU-s", flush=True
    )
    return cell


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# Throughput.


class SingleImages(TorchDataset[Tensor]):
    """Images one by one, float32 of 0 and 1."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].float()


def plain_epochs(network: Any, config: VAEConfig, images: Tensor, workers: int) -> Iterator[None]:
    """Epochs of the loop that a tutorial has: DataLoader, torch.optim.Adam, the ELBO; one at each `next`."""
    loader: Any = DataLoader(
        SingleImages(images),
        config.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    network.train()
    while True:
        for x in loader:
            mean, log_var = network.encode(x, None)
            z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
            logits = network.decode(z, None)
            reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum() / len(x)
            optimizer.zero_grad()
            (reconstruction + kl).backward()
            optimizer.step()
        yield


def our_epochs(model: VAE, dataset: Dataset) -> Iterator[None]:
    """The same with our trainer."""
    epoch = 0
    while True:
        epoch += 1
        model.fit(dataset, epoch, log_every=10**9)
        yield


def throughput(name: str, data_dir: Path | None, rounds: int) -> dict[str, Any]:
    """Images a second of both sides, in turns, an epoch each; the first epoch of each is not counted."""
    task = TASKS[name]
    dataset = images_of(task, data_dir)
    plain = task._replace(config={"schedule": "constant", "kl_warmup": 0.0, "dropout": 0.0, "ema": 0.0})
    sides: dict[str, Iterator[None]] = {"ours": our_epochs(model_of(plain, dataset, 0), dataset)}
    for workers in (0, 2):
        model = model_of(plain, dataset, 0)
        sides[f"DataLoader, {workers} workers"] = plain_epochs(
            model.network, model.config, dataset.train.images, workers
        )
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for side, epochs in sides.items():
            clock = time.perf_counter()
            next(epochs)
            if number:
                speeds[side].append(len(dataset.train) / (time.perf_counter() - clock))
    peer = max((side for side in sides if side != "ours"), key=lambda side: statistics.median(speeds[side]))
    ratios = [mine / theirs for mine, theirs in zip(speeds["ours"], speeds[peer])]
    return {
        "task": f"throughput-{name}",
        "seed": 0,
        "images_per_s": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "peer": peer,
        "ratio": statistics.median(ratios),
        "ratio_ci95": list(bootstrap_ci(ratios, statistic=np.median)),
        "rounds": rounds,
    }


# Files.


def read(out: Path) -> list[dict[str, Any]]:
    """The finished cells."""
    return json.loads(out.read_text())["cells"] if out.exists() else []


def append(out: Path, cell: dict[str, Any]) -> None:
    """Put a cell among the finished ones, by task and seed."""
    append_cell(out, cell, ("task", "seed"), lambda one: (one["task"], one["seed"]))


def report(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of the tasks, and a line about throughput."""
    lines = [
        "| data | seeds | nats, mean | 95 % interval | ELBO | independent pixels | goal | epochs | CPU-s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, task in TASKS.items():
        mine = [cell for cell in cells if cell["task"] == name]
        if mine:
            nats, elbo, cpu_s = ([cell[key] for cell in mine] for key in ("nats", "elbo", "cpu_s"))
            low, high = bootstrap_ci(nats)
            cells_of_row = (
                name, len(mine), f"{np.mean(nats):.2f} (IWAE-{mine[0]['k']})",
                f"{low:.2f} to {high:.2f}" if len(mine) > 1 else "",
                f"{np.mean(elbo):.2f}", f"{mine[0]['independent_pixels']:.1f}", f"{task.goal:g}",
                f"{mine[0]['epochs']:g}", f"{np.mean(cpu_s):.0f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells_of_row)) + " |")
    for cell in cells:
        if cell["task"].startswith("throughput"):
            low, high = cell["ratio_ci95"]
            speeds = ", ".join(f"{name} {speed:,}" for name, speed in cell["images_per_s"].items())
            data = cell["task"].removeprefix("throughput-")
            lines += [
                "",
                f"Images a second on {data}: {speeds}; {cell['ratio']:.2f} times ({low:.2f} to {high:.2f}).",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Bits and nats of held-out images under pixel by pixel models.

    python -m foveal.runs.benchmarks.pixelcnn                        # all cells; finished ones are skipped
    python -m foveal.runs.benchmarks.pixelcnn --tasks digits-17 ...  # of some tasks only
    python -m foveal.runs.benchmarks.pixelcnn --report               # the table of what is there, as Markdown

A cell is a task and a seed, which is that of weights, batches and noise; the images are the same in all
cells: scikit-learn's digits, 1,437 to train and 360 to test, 10,000 training and 1,000 test images of
Fashion-MNIST, or all 60,000 and 10,000 of MNIST, whose greys are the chance of a one, drawn once (fixed) or
for each batch (dynamic). No image is held out for validation: the average of the weights at the end is
scored. The tasks order-... are all kinds of models on the digits (17 levels), for 12 epochs and with about as
many parameters. One thread.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...generative import ImageTransformer, PixelCNN, PixelRNN
from ...vision import Dataset, binarize, load_dataset
from ..cli import guarded
from ..statistics import bootstrap_ci
from .common import RESULTS, a_seed, append_cell, argument_parser
from .suite import read


class Task(NamedTuple):
    """What is trained on what."""

    dataset: str
    binarize: Any
    """How, see `vision.binarize`; None: the images as they are."""
    kind: Any
    epochs: float
    unit: str
    """bits_per_dim, or nats."""
    goal: float | None
    settings: dict[str, Any]


ORDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (PixelCNN, {"variant": "plain", "width": 40}),
    "gated": (PixelCNN, {}),
    "plusplus": (PixelCNN, {"variant": "plusplus", "width": 16, "layers": 1, "depth": 1}),
    "row": (PixelRNN, {"variant": "row", "width": 40, "layers": 2}),
    "diagonal": (PixelRNN, {"variant": "diagonal", "width": 32, "layers": 3}),
    "attention": (ImageTransformer, {}),
}
"""All models with about 80,000 parameters, for the tasks order-..."""
TASKS = {
    "digits-17": Task("digits", None, PixelCNN, 30, "bits_per_dim", 1.80, {}),
    "digits-binary": Task("digits", 8, PixelCNN, 30, "nats", 17.3, {}),
    "fashion-binary": Task("fashion-mnist", 128, PixelCNN, 1.5, "nats", 112.0, {}),
    "fashion-256": Task("fashion-mnist", None, PixelCNN, 3, "bits_per_dim", 3.2, {}),
    "mnist-fixed": Task("mnist", "fixed", PixelCNN, 1 / 6, "nats", None, {}),
    "mnist-dynamic": Task("mnist", "dynamic", PixelCNN, 1 / 6, "nats", None, {}),
    **{
        f"order-{name}": Task("digits", None, kind, 12, "bits_per_dim", None, settings)
        for name, (kind, settings) in ORDER.items()
    },
}  # fmt: skip
"""In the table's order. Settings were found on validation images. Of MNIST 10,000 images are seen, once."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which (all)")
    parser.add_argument("--seeds", type=a_seed, nargs="+", default=[0, 1, 2, 3, 4], help="which (0 to 4)")
    parser.add_argument("--data-dir", type=Path, help="folder with fashion-mnist/ and mnist/ in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "pixelcnn.json")
    parser.add_argument("--report", action="store_true", help="print the table of finished cells")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds if not given.report else ():
        for name in given.tasks:
            done = {(cell["task"], cell["seed"], cell["epochs"]) for cell in read(given.out)}
            if (name, seed, TASKS[name].epochs) not in done:
                train_cell(name, seed, given.data_dir, given.out)
    print(report(read(given.out)))
    return 0


def images_of(task: Task, data_dir: Path | None) -> Dataset:
    fashion = task.dataset == "fashion-mnist"
    sizes: dict[str, Any] = {"train_size": 10_000, "test_size": 1_000} if fashion else {}
    dataset = load_dataset(task.dataset, data_dir, validation=0, **sizes)
    return dataset if task.binarize is None else binarize(dataset, task.binarize)


def train_cell(name: str, seed: int, data_dir: Path | None, out: Path) -> None:
    task = TASKS[name]
    dataset = images_of(task, data_dir)
    config = task.kind.recipe(dataset=task.dataset, **task.settings)
    model = task.kind(dataset.space, dataset.classes, config, seed=seed, device="cpu")
    before, clock = time.process_time(), time.perf_counter()
    model.fit(dataset, task.epochs, log_every=10**9)
    row = {
        "task": name,
        "seed": seed,
        "epochs": task.epochs,
        **model.test(dataset),
        **model.baseline(dataset),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "train_cpu_s": round(time.process_time() - before, 1),
        "wall_s": round(time.perf_counter() - clock, 1),
    }
    append(out, row)
    print(f"{name} seed {seed}: {row[task.unit]:.4f} {task.unit}, {row['train_cpu_s']:.0f} CPU s", flush=True)


def append(out: Path, cell: dict[str, Any]) -> None:
    """Put a cell among the finished ones, in the table's order."""
    order = list(TASKS)
    append_cell(out, cell, ("task", "seed"), lambda one: (order.index(one["task"]), one["seed"]))


def report(cells: list[dict[str, Any]]) -> str:
    """A Markdown table: the mean over seeds, its interval, and what it took."""
    lines = [
        "| task | figure | seeds | mean | 95 % interval | independent pixels | goal | parameters | epochs | "
        "CPU-s a seed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, task in TASKS.items():
        mine = [cell for cell in cells if cell["task"] == name]
        if not mine:
            continue
        figures = [cell[task.unit] for cell in mine]
        low, high = bootstrap_ci(figures) if len(mine) > 1 else (float("nan"),) * 2
        interval = f"{low:.3f} to {high:.3f}" if len(mine) > 1 else ""
        nats = task.unit == "nats"
        trivial = mine[0]["independent_pixels_nats" if nats else "independent_pixels"]
        unit = "nats" if nats else "bits/dim"
        goal = "" if task.goal is None else f"<= {task.goal:g}"
        lines.append(
            f"| {name} | {unit} | {len(mine)} | {np.mean(figures):.3f} | {interval} | {trivial:.3f} | "
            f"{goal} | {mine[0]['parameters']:,} | {mine[0]['epochs']:.3g} | "
            f"{np.mean([cell['train_cpu_s'] for cell in mine]):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(main))

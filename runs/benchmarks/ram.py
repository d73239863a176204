"""Errors of RAM beside random looking, nets that see all, and agents on foveal/Glimpse-v0.

    python -m foveal.runs.benchmarks.ram --data-dir DATA    # all cells; finished ones are skipped
    python -m foveal.runs.benchmarks.ram --tasks doubled    # of some tasks only: this one needs no download
    python -m foveal.runs.benchmarks.ram --report           # the tables of what is there, as Markdown

A cell is a task, a model and a seed: of the weights, the batches, the looks, where things lie on the training
canvases and which images are held out. Every model is trained on the same canvases for as many epochs, with
the same batches and augmentation, and scored on all test images by the weights that did best on the images
held out: one pass, mean looks. `doubled` is scikit-learn's digits doubled in size, anywhere on 40x40 pixels.

The agents learn the doubled digits from the environment alone: it pays 1 for a right answer at the end, and
says no more. Their last weights are scored by 2,000 test episodes, greedily. One thread.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...agents import AGENTS, RAM
from ...vision import Dataset, Model, load_dataset
from ...vision.canvas import clutter_pieces, on_canvas
from ..attention import baselines
from ..cli import guarded
from ..evaluation import evaluate
from .common import RESULTS, a_seed, append_cell, argument_parser
from .suite import read as read_cells


class Task(NamedTuple):
    """What is trained on, and for how long."""

    dataset: str
    size: int | None
    """Side that images are resized to."""
    side: int | None
    """Of the canvas; None: the images as they are."""
    cluttered: bool
    epochs: float
    settings: dict[str, Any]
    """RAM's, beside its recipe."""
    paper: dict[str, str]
    """The paper's errors, %, as NIPS / arXiv where both have one."""


TASKS = {
    "mnist": Task(
        "mnist", None, None, False, 40, {"glimpses": 6},
        {"ram": "1.12 / 1.29", "fully_connected": "1.69", "conv": "1.21"},
    ),
    "translated60": Task(
        "mnist", None, 60, False, 10, {"glimpses": 8},
        {"ram": "1.20 / 1.84", "fully_connected": "2.63", "conv": "1.62"},
    ),
    "cluttered60": Task(
        "mnist", None, 60, True, 30, {"glimpses": 8},
        {"ram": "4.04 / 5.23", "random_looking": "14.4", "fully_connected": "11.96", "conv": "8.09"},
    ),
    "doubled": Task("digits", 16, 40, False, 12, {"glimpses": 6}, {}),
}  # fmt: skip
MODELS = {
    "ram": "RAM",
    "random_looking": "random looking",
    "fully_connected": "fully connected",
    "conv": "conv net",
}
STEPS = 200_000
AGENT_CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": (
        "foveal/GlimpseBox-v0",
        {"recurrent": "lstm", "num_envs": 64, "num_steps": 12, "minibatch_size": 192},
    ),
    "dqn": ("foveal/GlimpseGrid-v0", {}),
    "reinforce": ("foveal/GlimpseGrid-v0", {}),
    "sb3/ppo": ("foveal/GlimpseGrid-v0", {"num_envs": 64, "n_steps": 24, "batch_size": 256}),
}
"""Agent -> the form of the environment that it learns from, and settings."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "agents"], default=[*TASKS, "agents"])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *AGENT_CELLS], help="only these (all)")
    parser.add_argument("--seeds", type=a_seed, nargs="+", default=[0, 1, 2], help="which (0 to 2)")
    parser.add_argument("--data-dir", type=Path, help="folder with mnist/ in it")
    parser.add_argument("--out", type=Path, default=RESULTS / "ram.json")
    parser.add_argument("--report", action="store_true", help="print the tables of finished cells")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds if not given.report else ():
        for task in given.tasks:
            for model in AGENT_CELLS if task == "agents" else MODELS:
                if given.models and model not in given.models:
                    continue
                length = STEPS if task == "agents" else TASKS[task].epochs
                done = [(c["task"], c["model"], c["seed"], c["length"]) for c in read_cells(given.out)]
                if (task, model, seed, length) not in done:
                    cell = {"task": task, "model": model, "seed": seed, "length": length}
                    before, clock = time.process_time(), time.perf_counter()
                    cell |= agent_cell(model, seed) if task == "agents" else model_cell(cell, given.data_dir)
                    cell["cpu_s"] = round(time.process_time() - before, 1)
                    cell["wall_s"] = round(time.perf_counter() - clock, 1)
                    append(given.out, cell)
                    print(f"{task} {model} seed {seed}: {cell['error']:.2%}, {cell['cpu_s']:.0f} CPU-s",
                          flush=True)  # fmt: skip
    print(report(read_cells(given.out)))
    return 0


def images_of(task: Task, seed: int, data_dir: Path | None) -> Dataset:
    """As `foveal train` makes them."""
    dataset = load_dataset(task.dataset, data_dir, seed=seed, size=task.size)
    if task.side is None:
        return dataset
    return on_canvas(dataset, task.side, seed, clutter_pieces(task.side) if task.cluttered else 0)


def model_cell(cell: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    task = TASKS[cell["task"]]
    dataset = images_of(task, cell["seed"], data_dir)
    config = RAM.recipe(dataset=task.dataset, **task.settings)
    ram = RAM(dataset.space, dataset.classes, config, seed=cell["seed"], device="cpu")
    model: Any = ram if cell["model"] == "ram" else baselines(ram, dataset)[cell["model"]]
    best, held_out = train(model, dataset, task.epochs)
    scored = {"error": best.evaluate(dataset.test).error, "validation_error": held_out}
    if isinstance(best, RAM):
        scored["error_sampled"] = best.evaluate(dataset.test, sampled=True).error
    about = {"parameters": sum(p.numel() for p in best.network.parameters()), "config": asdict(best.config)}
    return {**scored, **about}


def train(model: Model, dataset: Dataset, epochs: float) -> tuple[Any, float]:
    """The weights that did best on the validation images, and their error there."""
    best, weights = 2.0, {}
    for row in model.training(dataset, epochs, log_every=10**9):
        if model.chosen_by in row and 1 - row[model.chosen_by] <= best:
            best = 1 - row[model.chosen_by]
            weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    model.network.load_state_dict(weights)
    return model, best


def agent_cell(name: str, seed: int) -> dict[str, Any]:
    """An agent on the environment, trained for `STEPS` of its steps."""
    env_id, settings = AGENT_CELLS[name]
    kind = AGENTS[name]
    config = kind.recipe(env_id, **settings)
    agent = kind(env_id, config, seed=seed, device="cpu")
    agent.learn(STEPS)
    result = evaluate(agent, 2_000, num_envs=500, env_kwargs={"split": "test"})
    return {
        "error": 1 - result["eval/return_mean"],
        "env_id": env_id,
        "parameters": sum(p.numel() for p in agent.network.parameters()),
        "config": asdict(config),
    }


# Files.


def append(out: Path, cell: dict[str, Any]) -> None:
    """Put a cell among the finished ones, in the table's order."""
    tasks, names = [*TASKS, "agents"], [*MODELS, *AGENT_CELLS]
    append_cell(
        out,
        cell,
        ("task", "model", "seed"),
        lambda one: (tasks.index(one["task"]), names.index(one["model"]), one["seed"]),
    )


def report(cells: list[dict[str, Any]]) -> str:
    """A Markdown table of errors, and one of the agents'."""
    lines = [
        "| task | model | test error, % | drawn looks | seeds | paper | parameters | epochs | CPU-s a seed |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for task in TASKS:
        for model, name in MODELS.items():
            mine = [one for one in cells if (one["task"], one["model"]) == (task, model)]
            if mine:
                sampled = percent(mine, "error_sampled") if "error_sampled" in mine[0] else ""
                about = (len(mine), TASKS[task].paper.get(model, ""), f"{mine[0]['parameters']:,}")
                row = (
                    task,
                    name,
                    percent(mine, "error"),
                    sampled,
                    *about,
                    f"{mine[0]['length']:g}",
                    cpu(mine),
                )
                lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        "| agent | environment | error, % | seeds | parameters | env steps | CPU-s a seed |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for agent in AGENT_CELLS:
        mine = [one for one in cells if (one["task"], one["model"]) == ("agents", agent)]
        if mine:
            end = f"{len(mine)} | {mine[0]['parameters']:,} | {mine[0]['length']:,} | {cpu(mine)}"
            lines.append(f"| {agent} | `{mine[0]['env_id']}` | {percent(mine, 'error')} | {end} |")
    return "\n".join(lines)


def percent(cells: list[dict[str, Any]], key: str) -> str:
    """The mean over seeds, and each of them."""
    errors = [100 * one[key] for one in cells]
    each = " ".join(f"{error:.2f}" for error in errors)
    return f"{np.mean(errors):.2f}" + f" ({each})" * (len(errors) > 1)


def cpu(cells: list[dict[str, Any]]) -> str:
    return f"{np.mean([one['cpu_s'] for one in cells]):.0f}"


if __name__ == "__main__":
    sys.exit(guarded(main))

"""DQN on CartPole-v1 beside Stable-Baselines3's: same budget, same network, same evaluation.

    python -m foveal.runs.benchmarks.cartpole            # about 20 CPU minutes; finished cells are skipped

Stable-Baselines3 has the zoo's recipe, foveal its own (`DQN.recipe`) and, for comparison, the zoo's.
A cell is one agent and one seed, trained for 50,000 environment steps in a process of its own. Two scores
a cell, each the mean of 100 fresh episodes: of the last weights, and of the checkpoint that did best on 20
validation episodes every 5,000 steps.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import guarded
from ..evaluation import Policy, evaluate, validation_seed
from ..statistics import bootstrap_ci, iqm
from .common import RESULTS, argument_parser, count, machine_info, write_results
from .peers import FOVEAL_CARTPOLE, SB3_CARTPOLE, Peer

STEPS, EVAL_EVERY = 50_000, 5_000
AGENTS = ("foveal", "foveal, zoo recipe", "sb3")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=count, default=10, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=AGENTS)
    parser.add_argument("--out", type=Path, default=RESULTS / "cartpole.json")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(arguments.cell[0], int(arguments.cell[1]))))
        return
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"cells": []}
    done = {(c["agent"], c["seed"]) for c in results["cells"]}
    for seed in range(arguments.seeds):
        for agent in arguments.agents:
            if (agent, seed) in done:
                continue
            command = [sys.executable, "-m", "foveal.runs.benchmarks.cartpole", "--cell", agent, str(seed)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results["cells"].append(json.loads(output.splitlines()[-1]))
            print(output.splitlines()[-1], flush=True)
            results.update(machine_info(), steps=STEPS)
            write_results(arguments.out, results)
    report(results["cells"])


def cell(agent: str, seed: int) -> dict[str, Any]:
    """Train one agent on one seed; the scores of its last and of its chosen weights."""
    import torch

    torch.set_num_threads(1)
    return train_sb3(seed) if agent == "sb3" else train_foveal(agent, seed)


class Scores:
    """Keeps the weights that did best in validation, and scores weights on fresh episodes."""

    def __init__(self, agent: Policy, weights: Callable[[], dict[str, Any]], seed: int):
        self.agent, self.weights, self.seed = agent, weights, seed
        self.best, self.best_step, self.best_weights = -np.inf, 0, weights()

    def validate(self, env_step: int) -> None:
        score = evaluate(self.agent, 20, seed=validation_seed(self.seed))["eval/return_mean"]
        if score >= self.best:
            self.best, self.best_step = score, env_step
            self.best_weights = {name: tensor.clone() for name, tensor in self.weights().items()}

    def test(self) -> float:
        return evaluate(self.agent, 100, seed=self.seed)["eval/return_mean"]


def train_foveal(agent: str, seed: int) -> dict[str, Any]:
    from ...agents.dqn import DQN, DQNConfig

    recipe = DQNConfig(**FOVEAL_CARTPOLE) if "zoo" in agent else DQN.recipe("CartPole-v1")
    dqn = DQN("CartPole-v1", recipe, seed=seed, device="cpu")
    scores = Scores(dqn, dqn.network.state_dict, seed)
    for row in dqn.training(STEPS, log_every=EVAL_EVERY):
        scores.validate(row["env_step"])
    last = scores.test()
    dqn.network.load_state_dict(scores.best_weights)
    return {
        "agent": agent,
        "seed": seed,
        "last": last,
        "chosen": scores.test(),
        "chosen_at": scores.best_step,
    }


def train_sb3(seed: int) -> dict[str, Any]:
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback

    model = DQN("MlpPolicy", "CartPole-v1", **SB3_CARTPOLE, seed=seed, device="cpu")
    scores = Scores(Peer(model.predict, "CartPole-v1", seed), model.q_net.state_dict, seed)

    class Validate(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % EVAL_EVERY == 0:
                scores.validate(self.num_timesteps)
            return True

    model.learn(STEPS, callback=Validate())
    last = scores.test()
    model.q_net.load_state_dict(scores.best_weights)
    return {
        "agent": "sb3",
        "seed": seed,
        "last": last,
        "chosen": scores.test(),
        "chosen_at": scores.best_step,
    }


def report(cells: list[dict[str, Any]]) -> None:
    """Print both columns, a line an agent."""
    for agent in AGENTS:
        own = sorted((c for c in cells if c["agent"] == agent), key=lambda c: c["seed"])
        for column in ("chosen", "last"):
            scores = [c[column] for c in own]
            if not scores:
                continue
            low, high = bootstrap_ci(scores)
            print(
                f"{agent:<20} {column:<7} {len(scores)} seeds  mean {np.mean(scores):5.1f} "
                f"({low:5.1f} to {high:5.1f})  IQM {iqm(scores):5.1f}  "
                f"{' '.join(f'{score:.0f}' for score in scores)}"
            )


if __name__ == "__main__":
    sys.exit(guarded(main))

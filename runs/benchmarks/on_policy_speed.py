"""Environment steps per CPU-second of A2C and PPO beside Stable-Baselines3's, with the same settings.

    python -m foveal.runs.benchmarks.on_policy_speed  # nothing else should be running; tasks done are skipped

A figure is a whole run of 102,400 steps in a process of its own: start, imports and child processes counted.
Eight environments, one thread, no tracking; Stable-Baselines3 steps its own DummyVecEnv, whose MinAtar
environments give the same channels-first images as ours. The two sides take turns, so that a machine whose
speed drifts does not favour one. Networks are the same: on CartPole two tanh layers of 64 for the policy and
two for the value, on MinAtar one encoder (the MinAtar paper's network) for both.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results

STEPS = 102_400  # a whole number of every rollout below
NUM_ENVS = 8
SIDES = ("foveal", "sb3")


class Task(NamedTuple):
    algorithm: str
    env: str
    ours: dict[str, Any]
    """Settings in our names."""
    theirs: dict[str, Any]
    """The same in Stable-Baselines3's."""


A2C = {"num_steps": 5, "learning_rate": 7e-4}, {"n_steps": 5, "learning_rate": 7e-4, "gae_lambda": 1.0}
TASKS = {
    "A2C, CartPole": Task("A2C", "CartPole-v1", *A2C),
    # The zoo's recipe.
    "PPO, CartPole, 20 epochs of 256": Task(
        "PPO",
        "CartPole-v1",
        {
            "num_steps": 32, "epochs": 20, "minibatch_size": 256, "gamma": 0.98, "gae_lambda": 0.8,
            "learning_rate": 1e-3, "learning_rate_final": 0.0, "clip": 0.2, "clip_final": 0.0,
        },
        {
            "n_steps": 32, "n_epochs": 20, "batch_size": 256, "gamma": 0.98, "gae_lambda": 0.8,
            "learning_rate": lambda left: left * 1e-3, "clip_range": lambda left: left * 0.2,
        },
    ),
    # Stable-Baselines3's defaults, whose rollout of 2048 steps is shared out among the environments.
    "PPO, CartPole, 10 epochs of 64": Task(
        "PPO",
        "CartPole-v1",
        {"num_steps": 256, "epochs": 10, "minibatch_size": 64, "learning_rate": 3e-4},
        {"n_steps": 256, "n_epochs": 10, "batch_size": 64, "learning_rate": 3e-4},
    ),
    "A2C, MinAtar Breakout": Task("A2C", "MinAtar/Breakout-v1", *A2C),
    # As in Atari: a fourth of a rollout at a time, four times.
    "PPO, MinAtar Breakout, 4 epochs of 256": Task(
        "PPO",
        "MinAtar/Breakout-v1",
        {"num_steps": 128, "epochs": 4, "minibatch_size": 256, "learning_rate": 2.5e-4, "clip": 0.1},
        {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "learning_rate": 2.5e-4, "clip_range": 0.1},
    ),
}  # fmt: skip
"""What is not given is the same by default: weights of entropy and value, gradient norm, optimizer."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=count, default=3, help="runs of each side and task")
    parser.add_argument("--steps", type=count, default=STEPS, help="fewer only to try it out")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--out", type=Path, default=RESULTS / "on_policy_speed.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(train(TASKS[given.tasks[0]], given.side, given.steps)))
        return
    results = json.loads(given.out.read_text()) if given.out.exists() else {"tasks": {}}
    for name in given.tasks:
        if name not in results["tasks"]:
            results["tasks"][name] = measure(name, given.rounds, given.steps)
            write_results(given.out, {**machine_info(), "num_envs": NUM_ENVS, "tasks": results["tasks"]})
    for name, row in results["tasks"].items():
        speeds = ", ".join(f"{side} {row['steps_per_cpu_second'][side]:,.0f}" for side in SIDES)
        low, high = min(row["ratio_to_sb3"]), max(row["ratio_to_sb3"])
        print(
            f"{name}: {speeds} steps per CPU-second; {row['ratio']:.2f} times sb3's ({low:.2f} to {high:.2f})"
        )


def measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    """CPU-seconds of both sides, a round each, and what follows from them."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    parameters: dict[str, int] = {}
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            command = [sys.executable, "-m", "foveal.runs.benchmarks.on_policy_speed", "--tasks", name]
            before = children()
            done = subprocess.run(
                [*command, "--side", side, "--steps", str(steps)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            seconds[side].append(round(children() - before, 2))
            parameters[side] = json.loads(done.stdout)
            print(f"{name:<40} {side:<7} {seconds[side][-1]:6.1f} CPU-seconds", flush=True)
    if parameters["foveal"] != parameters["sb3"]:
        raise SystemExit(f"{name}: not the same network, it has {parameters} parameters")
    ratios = [theirs / ours for ours, theirs in zip(seconds["foveal"], seconds["sb3"])]
    return {
        "steps": steps,
        "parameters": parameters["foveal"],
        "cpu_seconds": seconds,
        "steps_per_cpu_second": {side: steps / statistics.median(taken) for side, taken in seconds.items()},
        "ratio_to_sb3": ratios,
        "ratio": statistics.median(ratios),
    }


def train(task: Task, side: str, steps: int) -> int:
    """Train here, once; the number of parameters, to be compared."""
    import torch

    torch.set_num_threads(1)
    model = (train_foveal if side == "foveal" else train_sb3)(task, steps)
    return sum(p.numel() for p in model.parameters())


def train_foveal(task: Task, steps: int) -> Any:
    from ... import agents

    kind = getattr(agents, task.algorithm)
    images = task.env.startswith("MinAtar/")
    config = kind.Config(**task.ours, num_envs=NUM_ENVS, share_encoder=images)
    encoder = "minatar" if images else "mlp-tanh"
    agent = kind(task.env, config, encoder=encoder, seed=1, device="cpu")
    return agent.learn(steps, progress=False).network


def train_sb3(task: Task, steps: int) -> Any:
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

    from ...envs.registry import find_spec, make_env
    from ...vision import ENCODERS

    spec = find_spec(task.env)
    env = make_vec_env(lambda: make_env(spec, None, {}, os.getpid()), n_envs=NUM_ENVS, seed=1)
    policy: dict[str, Any] = {}
    if task.algorithm == "A2C":
        policy |= {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    if task.env.startswith("MinAtar/"):
        policy |= {"features_extractor_class": ENCODERS["minatar"], "normalize_images": False, "net_arch": []}
    kind = getattr(stable_baselines3, task.algorithm)
    model = kind("MlpPolicy", env, **task.theirs, policy_kwargs=policy, seed=1, device="cpu")
    return model.learn(steps).policy


def children() -> float:
    """CPU-seconds, user and system, of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Environment steps per CPU-second of DQN on CartPole-v1, beside Stable-Baselines3's, with the zoo's recipe.

    python -m foveal.runs.benchmarks.speed          # about 6 CPU minutes; nothing else should be running

A figure is a whole run of 50,000 steps in a process of its own: start, imports, warm-up and child processes
counted. One environment, one thread, no tracking. The agents take turns, so that a machine whose speed drifts
does not favour one; double Q-learning, which Stable-Baselines3 does not have, is reported as a third column.
"""

import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results
from .peers import FOVEAL_CARTPOLE, SB3_CARTPOLE

STEPS = 50_000
AGENTS = ("foveal", "sb3", "foveal, double")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=count, default=3, help="runs of each agent")
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--agent", choices=AGENTS, help="train this one here, once, and say nothing")
    arguments = parser.parse_args()
    if arguments.agent:
        train(arguments.agent)
        return
    seconds: dict[str, list[float]] = {agent: [] for agent in AGENTS}
    for _ in range(arguments.rounds):
        for agent in AGENTS:
            before = children()
            command = [sys.executable, "-m", "foveal.runs.benchmarks.speed", "--agent", agent]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
            seconds[agent].append(children() - before)
            print(f"{agent:<16} {seconds[agent][-1]:6.1f} CPU-seconds", flush=True)
    speeds = {agent: STEPS / statistics.median(times) for agent, times in seconds.items()}
    ratios = [sb3 / own for own, sb3 in zip(seconds["foveal"], seconds["sb3"])]
    results: dict[str, Any] = {**machine_info(), "steps": STEPS, "cpu_seconds": seconds}
    write_results(arguments.out, {**results, "steps_per_cpu_second": speeds, "ratio_to_sb3": ratios})
    for agent, speed in speeds.items():
        print(f"{agent:<16} {speed:6.0f} env steps per CPU-second, {speed / speeds['sb3']:.2f} times sb3's")


def train(agent: str) -> None:
    import torch

    torch.set_num_threads(1)
    if agent == "sb3":
        import stable_baselines3

        stable_baselines3.DQN("MlpPolicy", "CartPole-v1", **SB3_CARTPOLE, seed=1, device="cpu").learn(STEPS)
    else:
        from ...agents.dqn import DQN, DQNConfig

        config = DQNConfig(**FOVEAL_CARTPOLE, double=agent == "foveal, double")
        DQN("CartPole-v1", config, seed=1, device="cpu").learn(STEPS, progress=False)


def children() -> float:
    """CPU-seconds, user and system, of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(guarded(main))

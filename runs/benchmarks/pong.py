"""DQN on ALE/Pong-v5 from pixels beside Stable-Baselines3's: steps a second, memory, and that neither drifts.

    python -m foveal.runs.benchmarks.pong           # finished agents are skipped; needs the bench extra

Same settings on both sides (the zoo's: no sticky actions, frame skip 4, buffer of 100,000, learning from step
100,000 on), one environment, one thread each, each in a process of its own. Every 10,000 steps it notes CPU
seconds, wall seconds and resident memory, so that a leak of either shows.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results

EVERY = 10_000


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=count, default=200_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "pong.json")
    parser.add_argument("--agent", choices=("foveal", "sb3"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.agent:
        train(arguments.agent, arguments.steps)
        return
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"agents": {}}
    for agent in ("foveal", "sb3"):
        if agent in results["agents"]:
            continue
        command = [sys.executable, "-m", "foveal.runs.benchmarks.pong", "--agent", agent]
        process = subprocess.Popen(
            [*command, "--steps", str(arguments.steps)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        rows = []
        for line in process.stdout:
            rows.append(json.loads(line))
            print(agent, line, end="", flush=True)
        if process.wait():
            raise SystemExit(f"{agent} failed with exit code {process.returncode}")
        results["agents"][agent] = rows
        results.update(machine_info(), steps=arguments.steps)
        write_results(arguments.out, results)
    report(results["agents"])


def train(agent: str, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    (train_foveal if agent == "foveal" else train_sb3)(steps)


def train_foveal(steps: int) -> None:
    from ...agents import DQN
    from ...envs import make_vec

    env = make_vec("ALE/Pong-v5", env_kwargs={"repeat_action_probability": 0.0}, seed=1)
    dqn = DQN(env, DQN.recipe("ALE/Pong-v5", double=False), seed=1, device="cpu")
    for row in dqn.training(steps, log_every=EVERY):
        note(row["env_step"], row.get("train/return_mean"))


def train_sb3(steps: int) -> None:
    import ale_py  # noqa: F401  (registers the games)
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    settings = {"frameskip": 1, "repeat_action_probability": 0.0}
    env = VecFrameStack(make_atari_env("ALE/Pong-v5", seed=1, env_kwargs=settings), n_stack=4)

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % EVERY == 0:
                returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
                note(self.num_timesteps, sum(returns) / len(returns) if returns else None)
            return True

    model = DQN(
        "CnnPolicy",
        env,
        learning_rate=1e-4,
        batch_size=32,
        buffer_size=100_000,
        learning_starts=100_000,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=1_000,
        exploration_fraction=0.1,
        exploration_final_eps=0.01,
        seed=1,
        device="cpu",
    )
    model.learn(steps, callback=Note())


def note(env_step: int, score: float | None) -> None:
    """Print a row: steps, recent score, CPU and wall seconds so far, resident memory in MB."""
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    row = {"env_step": env_step, "return": score, "cpu_s": time.process_time(), "wall_s": time.perf_counter()}
    print(json.dumps({**row, "resident_mb": resident / 1000}), flush=True)


def report(agents: dict[str, list[dict[str, Any]]]) -> None:
    """Steps a CPU second before and after learning starts, and over the last fifth, with the memory."""
    for agent, rows in agents.items():
        parts = {"collecting": (20_000, 100_000), "learning": (110_000, 150_000), "last": (160_000, 200_000)}
        figures = []
        for name, (start, stop) in parts.items():
            first = next((row for row in rows if row["env_step"] == start), None)
            last = next((row for row in rows if row["env_step"] == stop), None)
            if first and last:
                speed = (stop - start) / (last["cpu_s"] - first["cpu_s"])
                figures.append(f"{name} {speed:.0f} steps per CPU-second at {last['resident_mb']:,.0f} MB")
        print(f"{agent:<8} {'; '.join(figures)}; last score {rows[-1]['return']}")


if __name__ == "__main__":
    sys.exit(guarded(main))

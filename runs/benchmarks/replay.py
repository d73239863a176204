"""Replay: memory of a million Atari transitions, and speed beside Stable-Baselines3's ReplayBuffer.

    python -m foveal.runs.benchmarks.replay            # about two minutes, 8 GB of memory
    python -m foveal.runs.benchmarks.replay --quick    # seconds; figures of no worth

Memory is the peak of a process of its own that fills the replay and then some, so that every row was written.
Speed is CPU time (all threads of the process, of which there is one), each figure the median of rounds in
which ours and Stable-Baselines3's take turns on buffers of the same size and content. That one runs in its
full-memory mode, the only one in which its final observations are right.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from rich.console import Console
from rich.table import Table

from ...agents.replay import Replay
from ...envs import Step
from ..cli import guarded
from .common import RESULTS, machine_info, write_results

ATARI = spaces.Box(0, 255, (4, 84, 84), np.uint8)
CARTPOLE = spaces.Box(-10, 10, (4,), np.float32)
EPISODE = 1000  # agent steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay: memory, and speed beside Stable-Baselines3's.")
    parser.add_argument("--quick", action="store_true", help="small sizes; prints, writes only with --out")
    parser.add_argument("--out", help=f"where to write the results (default: {RESULTS / 'replay.json'})")
    args = parser.parse_args()
    million, atari, cartpole, rounds = (
        (20_000, 2_000, 2_000, 2) if args.quick else (1_000_000, 100_000, 100_000, 9)
    )
    figures = {
        "memory": in_a_child(memory, million),
        "atari": in_a_child(speed, ATARI, atari, rounds, [32]),
        "cartpole": in_a_child(speed, CARTPOLE, cartpole, rounds, [64, 128 * 64]),
    }
    show(figures)
    out = args.out or (None if args.quick else RESULTS / "replay.json")
    if out:
        write_results(out, {**machine_info(), "threads": 1, "figures": figures})


def in_a_child(function: Callable[..., dict], *args: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def memory(capacity: int) -> dict[str, Any]:
    """Fill a replay of 84x84x4 images and measure what the process came to hold."""
    torch.set_num_threads(1)
    unit = 1 if sys.platform == "darwin" else 1024
    stream = steps(ATARI)
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    replay = Replay(capacity, 1, ATARI, spaces.Discrete(6), frame_stack=4)
    created = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    replay.reset(stream[0].obs)
    action = np.zeros(1, np.int64)
    for i in range(capacity + capacity // 20):  # beyond the spare rows
        replay.add(action, stream[-1 if i % EPISODE == EPISODE - 1 else i % (len(stream) - 1)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    generator = torch.Generator().manual_seed(0)
    return {
        "transitions": len(replay),
        "storage_gb": replay.nbytes / 1e9,
        "resident_gb": (peak - empty) / 1e9,
        "process_peak_gb": peak / 1e9,
        "resident_before_filling_gb": (created - empty) / 1e9,
        "sample_32_us": cpu_us(lambda: replay.sample(32, generator), 500),
    }


def speed(space: spaces.Box, capacity: int, rounds: int, batches: list[int]) -> dict[str, Any]:
    """CPU microseconds of one add, and of one sample of each batch size, beside Stable-Baselines3's."""
    from stable_baselines3.common.buffers import ReplayBuffer

    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002 (Stable-Baselines3 samples from it)
    ours = Replay(capacity, 1, space, spaces.Discrete(6), frame_stack=4 if space == ATARI else 1)
    theirs = ReplayBuffer(capacity, space, spaces.Discrete(6), device="cpu", optimize_memory_usage=False)
    stream = steps(space)
    action = np.zeros(1, np.int64)
    infos: list[dict[str, Any]] = [{}]
    ours.reset(stream[0].obs)
    place = {"ours": 0, "sb3": 0}

    def step(who: str) -> Step:
        place[who] += 1
        return stream[-1 if place[who] % EPISODE == 0 else place[who] % (len(stream) - 1)]

    def add_ours() -> None:
        ours.add(action, step("ours"))

    def add_theirs() -> None:
        s = step("sb3")
        theirs.add(s.obs, s.next_obs, action, s.rewards, s.terminated | s.truncated, infos)

    def read(obs: torch.Tensor, next_obs: torch.Tensor) -> None:
        """What a learner does first, so that ours can't win by handing out views."""
        obs.float(), next_obs.float()

    for _ in range(capacity + 10):  # so that every page of both is in use before anything is timed
        add_ours()
        add_theirs()
    generator = torch.Generator().manual_seed(0)
    functions: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
        "add": (add_ours, add_theirs, 1000)
    }
    for batch in batches:

        def sample_ours(batch: int = batch) -> dict[str, Any]:
            return ours.sample(batch, generator)

        def sample_theirs(batch: int = batch) -> Any:
            return theirs.sample(batch)

        def use_ours(batch: int = batch) -> None:
            sample = ours.sample(batch, generator)
            read(sample["obs"], sample["next_obs"])

        def use_theirs(batch: int = batch) -> None:
            sample = theirs.sample(batch)
            read(sample.observations, sample.next_observations)

        functions[f"sample_{batch}"] = (sample_ours, sample_theirs, 200)
        functions[f"sample_{batch}_float32"] = (use_ours, use_theirs, 200)
    results: dict[str, Any] = {"capacity": capacity}
    for name, (mine, other, repeats) in functions.items():
        pairs = [(cpu_us(mine, repeats), cpu_us(other, repeats)) for _ in range(rounds)]
        us, them = (statistics.median(column) for column in zip(*pairs))
        results[name] = {"ours_us": us, "sb3_us": them, "sb3_over_ours": them / us}
    return results


def steps(space: spaces.Box) -> list[Step]:
    """64 steps of noise of one environment, of which the last ends an episode."""
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 255, (65, 1, *space.shape)).astype(space.dtype)
    no, yes, reward = np.zeros(1, bool), np.ones(1, bool), np.ones(1, np.float32)
    going = [Step(obs[i], obs[i + 1], reward, no, no, no, []) for i in range(63)]
    return [*going, Step(obs[0], obs[64], reward, yes, no, yes, [])]


def cpu_us(function: Callable[[], Any], repeats: int) -> float:
    """CPU microseconds of one call."""
    function()
    start = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - start) / repeats * 1e6


def show(figures: dict[str, dict[str, Any]]) -> None:
    console = Console()
    m = figures["memory"]
    console.print(
        f"{m['transitions']:,} transitions of 84x84x4 uint8: {m['resident_gb']:.2f} GB resident when full, "
        f"{m['resident_before_filling_gb']:.2f} GB when created; sample of 32: {m['sample_32_us']:.0f} us"
    )
    table = Table("buffer", "what", "foveal, us", "SB3, us", "SB3 / foveal", title="CPU time of one call")
    table.columns[1].no_wrap = True
    for buffer in ("atari", "cartpole"):
        for name, row in figures[buffer].items():
            if name != "capacity":
                cells = (f"{row[key]:.1f}" for key in ("ours_us", "sb3_us", "sb3_over_ours"))
                table.add_row(f"{buffer}, {figures[buffer]['capacity']:,}", name, *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(guarded(main))

"""Several seeds of one configuration, each in a process of its own."""

import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .run import open_run
from .statistics import bootstrap_ci, iqm
from .train import signal_handlers


def train_seeds(agent: str, arguments: list[str], options: Any, seeds: int, jobs: int) -> int:
    """Train `seeds` consecutive seeds, `jobs` at a time, and print their scores together.

    `arguments` are those of `foveal train AGENT`, with the seed's own put behind them. Ctrl-C reaches every
    process by itself and SIGTERM is passed on; each saves what it has. Returns the largest exit code.
    """
    printing = threading.Lock()
    running: list[subprocess.Popen[str]] = []
    stopping: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        for process in running:
            if number == signal.SIGTERM and process.poll() is None:
                process.terminate()

    def one(seed: int) -> tuple[int, str | None]:
        if stopping:
            return 130, None
        own = ["--seed", str(seed), "--seeds", "1", "--jobs", "1"]
        command = [sys.executable, "-m", "foveal.runs", "train", agent, *arguments, *own]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(process)
        folder = None
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"run folder: (.+)", line):
                folder = match.group(1)
            with printing:
                print(f"[seed {seed}] {line}", end="", flush=True)
        return process.wait(), folder

    numbers = range(options.seed, options.seed + seeds)
    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop}
    with signal_handlers(handlers), ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, numbers))
    folders = [folder for _, folder in results if folder is not None]
    scores = [open_run(folder).summary["eval/return_mean"] for folder in folders]
    for seed, (code, folder) in zip(numbers, results):
        state = folder if folder is not None else f"did not finish (exit code {code})"
        print(f"seed {seed}: {state}")
    if scores:
        low, high = bootstrap_ci(scores)
        print(
            f"score over {len(scores)} seeds: mean {np.mean(scores):.1f} "
            f"(95 % interval {low:.1f} to {high:.1f}), IQM {iqm(scores):.1f}, "
            f"lowest {min(scores):.1f}, highest {max(scores):.1f}"
        )
    return max(code for code, _ in results)

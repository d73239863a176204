"""Several seeds of one configuration, each in a process of its own."""

import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .lifecycle import signal_handlers
from .run import open_run
from .statistics import bootstrap_ci, iqm


def train_seeds(
    agent: str, arguments: list[str], options: Any, seeds: int, jobs: int, key: str = "eval/return_mean"
) -> int:
    """Train `seeds` consecutive seeds, `jobs` at a time, and print their scores together: what summary.json
    has under `key`.

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
    scores = [open_run(folder).summary[key] for folder in folders]
    for seed, (code, folder) in zip(numbers, results):
        state = folder if folder is not None else f"did not finish (exit code {code})"
        print(f"seed {seed}: {state}")
    if scores:
        low, high = bootstrap_ci(scores)
        what, form = ("score", ".1f") if key == "eval/return_mean" else (key, ".4f")
        print(
            f"{what} over {len(scores)} seeds: mean {np.mean(scores):{form}} "
            f"(95 % interval {low:{form}} to {high:{form}}), IQM {iqm(scores):{form}}, "
            f"lowest {min(scores):{form}}, highest {max(scores):{form}}"
        )
    return max(code for code, _ in results)

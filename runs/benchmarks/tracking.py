"""What tracking costs the training, and how fast its files are read.

    python -m foveal.runs.benchmarks.tracking            # about 3 CPU minutes

1. Microseconds that `Run.log` takes its caller for a row of 20 values, with 50 ms of computing between two
   rows (training logs less often) and in a tight loop, where W&B's thread competes with every row.
2. The share of DQN's steps/s on CartPole that tracking takes at its default logging: W&B offline against off,
   each in a process of its own, in wall time and in CPU time (all threads, and W&B's processes). Off and
   offline take turns, so that a machine that gets slower or faster meets both; the median over the pairs.
3. The same share seen directly, where a busy machine blurs 2: the CPU time of a process that does nothing but
   log a row a second, W&B's processes with it, as a share of one core.
4. Records a second that our reader of W&B's files gets through.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..run import create_run
from ..wandb_file import read_records
from .common import RESULTS, machine_info, write_results

ROW = {"env_step": 0, "grad_step": 0} | {f"train/metric_{number}": 0.1 * number for number in range(18)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="DQN runs off and offline, each")
    parser.add_argument("--env-steps", type=int, default=20_000, help="of each DQN run")
    parser.add_argument("--out", type=Path, default=RESULTS / "tracking.json")
    parser.add_argument("--train", choices=("off", "offline"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.train, arguments.env_steps)))
        return

    results = machine_info()
    results["share_of_a_core"] = {track: share_of_a_core(track, 30) for track in ("off", "offline")}
    print(f"a row a second takes this share of a core: {results['share_of_a_core']}", flush=True)
    for track in ("off", "offline"):
        results[f"log, {track}"] = log_cost(track, rows=300, work_s=0.05)
        results[f"log in a tight loop, {track}"] = log_cost(track, rows=3000, work_s=0)
        print(track, results[f"log, {track}"], results[f"log in a tight loop, {track}"], flush=True)
    pairs = []
    for number in range(arguments.pairs):
        order = ("off", "offline") if number % 2 == 0 else ("offline", "off")
        pair = {track: in_a_process(track, arguments.env_steps) for track in order}
        print(pair, flush=True)
        pairs.append(pair)
    results["dqn"] = {"env_steps": arguments.env_steps, "pairs": pairs}
    for unit in ("wall_s", "cpu_s"):
        shares = [pair["offline"][unit] / pair["off"][unit] - 1 for pair in pairs]
        results["dqn"][f"share_of_{unit}"] = statistics.median(shares)
        low, middle, high = min(shares), statistics.median(shares), max(shares)
        print(f"tracking takes {middle:.2%} of {unit} ({low:.2%} to {high:.2%})")
    write_results(arguments.out, results)


def log_cost(track: str, rows: int, work_s: float) -> dict[str, float]:
    """Microseconds of `Run.log` over `rows` rows; offline, also the records/s at which the file is read
    back."""
    with tempfile.TemporaryDirectory() as results:
        run = create_run(results, group="benchmark", name="log", config={}, track=track)
        took, cpu = np.empty(rows), np.empty(rows)
        for step in range(rows):
            row = ROW | {"env_step": step}
            start, start_cpu = time.perf_counter(), time.thread_time()
            run.log(row)
            took[step], cpu[step] = time.perf_counter() - start, time.thread_time() - start_cpu
            while time.perf_counter() < start + work_s:
                pass
        run.finish("finished")
        cost = {"mean_us": took.mean() * 1e6, "p99_us": np.percentile(took, 99) * 1e6}
        cost |= {"cpu_mean_us": cpu.mean() * 1e6, "cpu_p99_us": np.percentile(cpu, 99) * 1e6}
        for file in run.path.glob("wandb/*/*.wandb"):
            start = time.perf_counter()
            records = sum(1 for _ in read_records(file))
            cost["records_read_per_s"] = records / (time.perf_counter() - start)
    return {name: round(float(value), 1) for name, value in cost.items()}


def share_of_a_core(track: str, seconds: int) -> float:
    with tempfile.TemporaryDirectory() as results:
        run = create_run(results, group="benchmark", name="idle", config={}, track=track)
        run.log(ROW)
        time.sleep(1)
        start, cpu = time.perf_counter(), cpu_s()
        for step in range(1, seconds + 1):
            run.log(ROW | {"env_step": step})
            time.sleep(1)
        share = (cpu_s() - cpu) / (time.perf_counter() - start)
        run.finish("finished")
    return round(share, 5)


def in_a_process(track: str, env_steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "foveal.runs.benchmarks.tracking"]
    command += ["--train", track, "--env-steps", str(env_steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def train(track: str, env_steps: int) -> dict[str, Any]:
    """Seconds that one DQN run takes from its second row to its last, and those to start and end tracking."""
    import torch

    from ...agents import DQN

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as results:
        start = time.perf_counter()
        run = create_run(results, group="benchmark", name="dqn", config={"agent": "dqn"}, track=track)
        start_s = time.perf_counter() - start
        rows = DQN("CartPole-v1", seed=1).training(env_steps)
        for _ in range(2):  # the updates have begun, everything is imported
            run.log(next(rows))
        wall, cpu = time.perf_counter(), cpu_s()
        for row in rows:
            run.log(row)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        start = time.perf_counter()
        run.finish("finished")
        end_s = time.perf_counter() - start
    times = {"wall_s": wall, "cpu_s": cpu, "start_s": start_s, "end_s": end_s}
    return {name: round(seconds, 3) for name, seconds in times.items()}


def cpu_s() -> float:
    """CPU seconds of this process, all threads, and of its children and theirs (on Linux), which is W&B's
    service."""
    seconds, family = time.process_time(), {os.getpid()}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # from the third on: state, parent, ...
        except OSError:
            continue  # gone by now
        if int(fields[1]) in family:
            family.add(int(stat.parent.name))
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


if __name__ == "__main__":
    main()

"""What tracking costs the training, and how fast its files are read.

    python -m foveal.runs.benchmarks.tracking            # about 2 CPU minutes

1. Microseconds that `Run.log` takes its caller for a row of 20 values, with 50 ms of computing between two
   rows (training logs less often) and in a tight loop, where W&B's thread competes with every row.
2. The share of DQN's steps/s on CartPole that tracking takes at its default logging, one row every 1,000
   steps. One training goes on while its rows go to a run that is tracked offline and to one that is not, in
   turn (ABBA), so that whatever slows the machine down meets both: the median over pairs of neighbours, of
   wall time, with its 95 % bootstrap interval. And the same share as CPU time, which a busy machine does not
   blur: what a row takes the caller, W&B's thread and W&B's process, over what 1,000 steps take.
3. Records a second that our reader of W&B's files gets through.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import guarded
from ..run import create_run
from ..wandb_file import read_records
from .common import RESULTS, count, machine_info, write_results

ROW = {"env_step": 0, "grad_step": 0} | {f"train/metric_{number}": 0.1 * number for number in range(18)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=count, default=40, help="of 1,000 steps tracked offline, and not")
    parser.add_argument("--out", type=Path, default=RESULTS / "tracking.json")
    arguments = parser.parse_args()

    results = machine_info()
    for track in ("off", "offline"):
        results[f"log, {track}"] = log_cost(track, rows=300, work_s=0.05)
        results[f"log in a tight loop, {track}"] = log_cost(track, rows=3000, work_s=0)
        print(track, results[f"log, {track}"], results[f"log in a tight loop, {track}"], flush=True)
    results["dqn"] = share_of_training(arguments.pairs)
    print(json.dumps({key: value for key, value in results["dqn"].items() if key != "wall_s"}, indent=2))
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


def share_of_training(pairs: int) -> dict[str, Any]:
    """What tracking takes of DQN on CartPole: wall time by pairs of blocks, CPU time by who spends it."""
    import torch

    from ...agents import DQN

    torch.set_num_threads(1)
    wall: dict[str, list[float]] = {"off": [], "offline": []}
    calls = 0.0
    with tempfile.TemporaryDirectory() as results:
        begin = time.perf_counter()
        start: dict[str, Any] = {"group": "benchmark", "name": "dqn", "config": {"agent": "dqn"}}
        runs = {track: create_run(results, **start, track=track) for track in wall}
        start_s = time.perf_counter() - begin
        assert runs["offline"]._tracker is not None
        clock = time.pthread_getcpuclockid(runs["offline"]._tracker._thread.ident or 0)
        rows = DQN("CartPole-v1", seed=1).training(1_000 * (2 * pairs + 3))
        for _ in range(3):  # the updates have begun, everything is imported
            row = next(rows)
            runs["offline"].log(row)
        time.sleep(2)
        before = time.process_time(), time.clock_gettime(clock), children_cpu_s()
        for number in range(2 * pairs):
            track = ("off", "offline", "offline", "off")[number % 4]
            began, cpu = time.perf_counter(), time.thread_time()
            runs[track].log(row)
            if track == "offline":
                calls += time.thread_time() - cpu
            row = next(rows)
            wall[track].append(time.perf_counter() - began)
        time.sleep(2)  # what W&B has not done yet counts too
        after = time.process_time(), time.clock_gettime(clock), children_cpu_s()
        begin = time.perf_counter()
        for run in runs.values():
            run.finish("finished")
        end_s = time.perf_counter() - begin
    process, thread, service = (now - then for now, then in zip(after, before))
    ratios = np.array(wall["offline"]) / np.array(wall["off"]) - 1
    draws = np.random.default_rng(0).integers(0, pairs, (10_000, pairs))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    training = (process - thread - calls) / (2 * pairs)
    # W&B's process works by the clock (it samples the machine), so in the blocks of both kinds.
    spent = {"caller": calls / pairs, "thread": thread / pairs, "W&B's process": service / (2 * pairs)}
    return {
        "pairs": pairs,
        "wall_share": round(float(np.median(ratios)), 5),
        "wall_share_ci95": [round(float(low), 5), round(float(high), 5)],
        "cpu_us_of_1000_steps": {who: round(seconds * 1e6, 1) for who, seconds in spent.items()},
        "cpu_ms_of_1000_steps": round(training * 1e3, 2),
        "cpu_share": round(sum(spent.values()) / training, 5),
        "cpu_share_of_this_process": round((spent["caller"] + spent["thread"]) / training, 5),
        "start_s": round(start_s, 3),
        "end_s": round(end_s, 3),
        "wall_s": {track: [round(seconds, 4) for seconds in blocks] for track, blocks in wall.items()},
    }


def children_cpu_s() -> float:
    """CPU seconds of this process's children and theirs (on Linux), to the nanosecond: W&B's service."""
    seconds, family = 0.0, {os.getpid()}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) in family:
                family.add(int(stat.parent.name))
                tasks = stat.parent.glob("task/*/schedstat")
                seconds += sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        except OSError:
            continue  # gone by now
    return seconds


if __name__ == "__main__":
    sys.exit(guarded(main))

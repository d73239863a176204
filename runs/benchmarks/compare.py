"""How long `foveal compare` takes for many runs, how large its page is, and how fast W&B's files are read.

    python -m foveal.runs.benchmarks.compare             # 100 runs of 1,000 rows: about a CPU minute

The runs are made up: 20 agents' names on two tasks, random walks of 20 numbers a row, an evaluation in each.
The W&B files are made by W&B itself, offline (three records a row), and read back with all values, as
`compare` reads those of other programs. CPU seconds are what a machine with nothing else to do takes.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import guarded
from ..run import create_run
from ..wandb_file import read_payloads, read_run
from .common import RESULTS, argument_parser, count, machine_info, write_results

METRICS = 18


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--runs", type=count, default=100)
    parser.add_argument("--rows", type=count, default=1_000, help="of each run")
    parser.add_argument("--keep", type=Path, help="make the runs and the page in this folder, and leave them")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare.json")
    given = parser.parse_args()
    results: dict[str, Any] = machine_info() | {"runs": given.runs, "rows": given.rows}
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_runs(folder / "results", given.runs, given.rows)
        command = [sys.executable, "-m", "foveal.runs", "compare", str(folder / "results")]
        begin, cpu = time.perf_counter(), os.times()
        done = subprocess.run(
            [*command, "--out", str(folder / "page")], check=True, capture_output=True, text=True
        )
        after = os.times()
        results["wall_s"] = round(time.perf_counter() - begin, 2)
        used = after.children_user + after.children_system - cpu.children_user - cpu.children_system
        results["cpu_s"] = round(used, 2)
        results["page_mb"] = round((folder / "page" / "compare.html").stat().st_size / 1e6, 2)
        results["not_in_the_page"] = done.stderr.splitlines()
        print(done.stdout.splitlines()[-1], *done.stderr.splitlines(), sep="\n", flush=True)
        results["wandb_reader"] = read_speed(folder / "wandb")
        print(results["wandb_reader"])
    write_results(given.out, results)


def make_runs(results: Path, runs: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(runs):
        agent, task, seed = number // 2 % 20, number % 2, number // 40
        config = {"agent": f"agent{agent:02}", "env_id": f"task-{task}", "seed": seed, "total_steps": rows}
        run = create_run(results, group=f"agent{agent:02}", name=f"seed{seed}", config=config, track="off")
        walks = rng.normal(size=(rows, METRICS)).cumsum(axis=0)
        for step, values in enumerate(walks.tolist(), start=1):
            numbers = {f"train/metric_{i:02}": value for i, value in enumerate(values[1:])}
            score = {"eval/return_mean": agent + values[0]}
            run.log({"env_step": 1000 * step, "grad_step": step} | score | numbers)
        run.summarize({"eval/return_mean": agent + float(walks[-1, 0]), "baseline/random_policy": 0.0})
        run.finish("finished")


def read_speed(folder: Path, rows: int = 20_000) -> dict[str, int]:
    """Records and rows a CPU second of `read_run`, from files that W&B wrote: rows of 5 and of 20 numbers."""
    import wandb

    speeds = {}
    for width in (5, 20):
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(mode="offline", dir=str(folder), settings=wandb.Settings(silent=True))
        for step in range(rows):
            run.log({"global_step": step} | {f"charts/metric_{i}": 0.1 * step + i for i in range(width - 1)})
        file = Path(run.settings.sync_file)
        run.finish()
        records = sum(1 for _ in read_payloads(file))
        begin = time.process_time()
        read = read_run(file)
        cpu_s = time.process_time() - begin
        assert len(read.rows) == rows
        speeds[f"records_per_cpu_s, {width} numbers"] = round(records / cpu_s)
        speeds[f"rows_per_cpu_s, {width} numbers"] = round(rows / cpu_s)
    return speeds


if __name__ == "__main__":
    sys.exit(guarded(main))

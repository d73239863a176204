"""Learning benchmark: A2C, PPO, PQN and REINFORCE beside Stable-Baselines3's, on eight environments.

    python -m foveal.runs.benchmarks.suite --plan       # what is left to do, and its cost; trains nothing
    python -m foveal.runs.benchmarks.suite              # finished cells are skipped
    python -m foveal.runs.benchmarks.suite --report     # the tables of what is there, as Markdown

A cell is one agent, one environment and one seed, trained on the CPU by `foveal train`'s own code with the
agent's recipe for the environment (Stable-Baselines3's agents have its zoo's), one thread, in a process and a
run folder of its own. Its two scores are the mean of 100 fresh episodes: of the weights that validation chose
and of the last ones; `foveal compare` draws the curves out of the file of cells. The suite may run several
times at once: each takes the cells that no other has. Ctrl-C and SIGTERM stop the cells that run, which go on
from there at the next start where their agent can, and else begin anew.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cli import guarded
from ..statistics import bootstrap_ci, iqm
from .common import RESULTS, a_seed, argument_parser, count, machine_info

EVERYBODY = {"ppo": 1_000_000, "pqn": 1_000_000, "sb3/ppo": 1_000_000}
TASKS: dict[str, dict[str, int]] = {
    "CartPole-v1": {
        "a2c": 100_000, "ppo": 100_000, "pqn": 100_000, "reinforce": 300_000,
        "sb3/a2c": 100_000, "sb3/ppo": 100_000,
    },
    "Pendulum-v1": {"ppo": 300_000, "sb3/ppo": 300_000},
    "Acrobot-v1": {"a2c": 500_000, "ppo": 500_000, "sb3/a2c": 500_000, "sb3/ppo": 500_000},
    "LunarLander-v3": {"ppo": 1_000_000, "sb3/ppo": 1_000_000},
    "MinAtar/Breakout-v1": EVERYBODY,
    "HalfCheetah-v5": {"ppo": 300_000, "sb3/ppo": 300_000},
    "Hopper-v5": {"ppo": 300_000, "sb3/ppo": 300_000},
    "MinAtar/SpaceInvaders-v1": EVERYBODY,
}  # fmt: skip
"""Environment, in the order of the runs -> agent -> environment steps."""

ENCODERS = {"ppo": "minatar", "pqn": "minatar-norm", "sb3/ppo": "minatar"}
"""On MinAtar; elsewhere each agent has its own default."""

SPEEDS = {"a2c": 3_000, "ppo": 2_500, "pqn": 4_500, "reinforce": 3_500, "sb3/a2c": 1_200, "sb3/ppo": 1_200}
SLOWER = {
    "Pendulum-v1": 0.5, "HalfCheetah-v5": 0.2, "Hopper-v5": 0.2,
    "MinAtar/Breakout-v1": 0.7, "MinAtar/SpaceInvaders-v1": 0.7,
}  # fmt: skip
"""Environment steps per CPU-second of a cell, with its evaluations: a guess until one has been measured."""


class Cell(NamedTuple):
    env: str
    agent: str
    seed: int

    @property
    def steps(self) -> int:
        return TASKS[self.env][self.agent]

    @property
    def name(self) -> str:
        """Of its run, and of its log."""
        return f"{self.agent.replace('/', '-')}-seed{self.seed}"

    def folder(self, results: Path) -> Path:
        """Of the runs of its environment."""
        return results / self.env.replace("/", "-")

    def __str__(self) -> str:
        return f"{self.env} {self.agent} seed {self.seed}"


def main() -> int:
    parser = argument_parser(__doc__)
    every_agent = list(dict.fromkeys(agent for agents in TASKS.values() for agent in agents))
    parser.add_argument("--seeds", type=count, default=5, help="how many (5)")
    parser.add_argument("--first-seed", type=a_seed, default=0, help="the first of them (0)")
    parser.add_argument("--agents", nargs="+", default=every_agent, choices=every_agent, metavar="AGENT")
    parser.add_argument("--envs", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="ENV")
    parser.add_argument("--jobs", type=count, default=1, help="cells at a time (1)")
    parser.add_argument("--retrain", action="store_true", help="also cells whose recipe is another one today")
    parser.add_argument("--plan", "--dry-run", action="store_true", help="print what is left, and its cost")
    parser.add_argument("--report", action="store_true", help="print the tables of finished cells")
    parser.add_argument("--results", type=Path, default=Path("results/suite"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "suite.json")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        env, agent, seed = given.cell
        train_cell(Cell(env, agent, int(seed)), given.results, given.out)
        return 0
    if given.report:
        print(report(read(given.out)))
        return 0
    cells = [
        cell
        for cell in plan(given.seeds, given.first_seed)
        if cell.agent in given.agents and cell.env in given.envs
    ]
    finished = read(given.out)
    show_plan(cells, finished, given.retrain)
    if given.plan:
        return 0
    return run(cells, given.results, given.out, given.jobs, given.retrain)


def plan(seeds: int, first_seed: int = 0) -> list[Cell]:
    """All cells in order. Agents take turns seed by seed, so that a table that is cut short closes evenly."""
    return [
        Cell(env, agent, seed)
        for env, agents in TASKS.items()
        for seed in range(first_seed, first_seed + seeds)
        for agent in agents
    ]


def remaining(cells: Sequence[Cell], finished: Sequence[dict[str, Any]], retrain: bool) -> list[Cell]:
    """The cells that are not finished; with `retrain` those too that were trained with another recipe."""
    done = {cell_of(row) for row in finished if not (retrain and outdated(row))}
    return [cell for cell in cells if cell not in done]


def cost(cells: Sequence[Cell], finished: Sequence[dict[str, Any]]) -> float:
    """CPU-seconds that cells take: by the median of what was measured on the task, else by a guess."""
    measured: dict[tuple[str, str], list[float]] = {}
    for row in finished:
        if row["cpu_s"]:
            measured.setdefault((row["env"], row["agent"]), []).append(row["steps"] / row["cpu_s"])
    seconds = 0.0
    for cell in cells:
        speeds = measured.get((cell.env, cell.agent))
        guess = SPEEDS[cell.agent] * SLOWER.get(cell.env, 1)
        seconds += cell.steps / (statistics.median(speeds) if speeds else guess)
    return seconds


def show_plan(cells: Sequence[Cell], finished: Sequence[dict[str, Any]], retrain: bool) -> None:
    left = remaining(cells, finished, retrain)
    tables = [(env, [cell for cell in cells if cell.env == env]) for env in TASKS]
    for name, table in [*tables, ("together", cells)]:
        here = [cell for cell in table if cell in left]
        hours = cost(here, finished) / 3600
        if table:
            print(f"{name:<26} {len(here):>3} of {len(table):>3} cells left, {hours:5.2f} CPU-hours")
    old = [row for row in finished if cell_of(row) in cells and outdated(row)]
    if old and not retrain:
        names = ", ".join(sorted({f"{row['agent']} on {row['env']}" for row in old}))
        print(f"{len(old)} cells had another recipe than today's (--retrain trains them anew): {names}")
    sys.stdout.flush()


def run(cells: Sequence[Cell], results: Path, out: Path, jobs: int, retrain: bool) -> int:
    """Train what is left, `jobs` cells at a time; 1 where one failed."""
    running: set[subprocess.Popen[bytes]] = set()
    stopping, failed = [], []

    def stop(number: int, frame: object) -> None:
        stopping.append(number)
        print("stopping: the cells that run save what they have", flush=True)
        for process in list(running):  # those of a terminal have had its Ctrl-C, and take one signal as two
            if process.poll() is None:
                process.terminate()

    def one(cell: Cell) -> None:
        if stopping:
            return
        with claim(cell, results) as log:
            # Not before: another process may have finished it since.
            if log is None or not remaining([cell], read(out), retrain):
                return
            command = [sys.executable, "-m", "foveal.runs.benchmarks.suite", "--cell", *map(str, cell)]
            command += ["--results", str(results), "--out", str(out)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            # A session of its own, out of the terminal's reach: it hears of Ctrl-C once, from `stop`.
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        running.add(process)
        if stopping:
            process.terminate()
        code = process.wait()
        running.discard(process)
        row = next((row for row in read(out) if cell_of(row) == cell), None)
        if code == 0 and row is not None:
            cpu = f", {row['cpu_s']:,.0f} CPU-seconds" if row["cpu_s"] else ""
            print(f"{cell}: chosen {row['chosen']:.1f}, last {row['last']:.1f}{cpu}", flush=True)
        elif stopping:
            print(f"{cell}: stopped", flush=True)
        else:
            failed.append(cell)
            print(f"{cell}: failed (exit code {code}), see {log_file(cell, results)}", flush=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, remaining(cells, read(out), retrain)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if stopping else int(bool(failed))


def log_file(cell: Cell, results: Path) -> Path:
    return cell.folder(results) / f"{cell.name}.log"


@contextmanager
def claim(cell: Cell, results: Path) -> Iterator[Any]:
    """The cell's log, open and locked; None where another process has the cell.

    Whoever inherits the file as its output holds the lock with it, so that a cell stays taken for as long as
    its process lives, even if this one is killed.
    """
    path = log_file(cell, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield log


def train_cell(cell: Cell, results: Path, out: Path) -> None:
    """Train a cell in this process, or go on with it, and append what came of it to `out`."""
    from ...agents import AGENTS
    from ..run import Run
    from ..train import Options, resume, train

    config = AGENTS[cell.agent].recipe(cell.env)
    options = {
        "env_id": cell.env,
        "seed": cell.seed,
        "total_steps": cell.steps,
        "encoder": ENCODERS[cell.agent] if cell.env.startswith("MinAtar/") else "auto",
        "device": "cpu",
        "threads": 1,
        "results": results,
        "group": cell.folder(results).name,
        "name": cell.name,
        "track": "off",
        "video": False,
        "progress": False,
    }
    trained: Run | None = None
    resumed = False
    for folder in cell.folder(results).glob(f"{cell.name}-*/"):
        try:
            before = Run(folder)
            if before.config["config"] != as_json(config) or before.config["total_steps"] != cell.steps:
                raise ValueError(f"{folder} is of other settings")
            if before.summary.get("state") == "finished":
                trained, resumed = before, True
            else:
                trained, resumed = resume(folder, None, None, progress=False), True
        except (ValueError, FileNotFoundError) as error:  # an agent that can't be resumed says so here
            print(f"starting anew: {error}", flush=True)
            shutil.rmtree(folder)
    if trained is None:
        trained = train(cell.agent, Options(**{**AGENTS[cell.agent].run_options, **options}), config)
    if trained.summary["state"] != "finished":
        raise SystemExit(130)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    origin, about = trained.config["run"], machine_info()
    git = origin["foveal_git"]
    row = {
        "env": cell.env,
        "agent": cell.agent,
        "seed": cell.seed,
        "steps": cell.steps,
        "chosen": trained.summary["eval/return_mean"],
        "chosen_at": trained.summary["eval/env_step"],
        "last": trained.summary["last/return_mean"],
        # Of a cell that was stopped in between, what it had taken until then is not known.
        "cpu_s": None if resumed else round(usage.ru_utime + usage.ru_stime, 1),
        "date": origin["started"],
        "commit": git and git["commit"] + "-dirty" * git["dirty"],
        "machine": about["cpu"],
        "run": f"{trained.path.parent.name}/{trained.path.name}",
        "config": as_json(config),
        "curve": curve_of(trained),
    }
    del about["command"]  # it is that of a cell
    append(out, row, about)


def curve_of(trained: Any) -> dict[str, list[float]]:
    """The validations of a run, from its metrics.jsonl: what `foveal compare` draws."""
    names = ("env_step", "eval/return_mean")
    rows = [row for row in trained.rows() if names[1] in row]
    return {name: [row[name] for row in rows] for name in names}


def as_json(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["env"], row["agent"], row["seed"])


def outdated(row: dict[str, Any]) -> bool:
    """Whether a setting that a cell was trained with, or its number of steps, is another one today."""
    from ...agents import AGENTS

    today = as_json(AGENTS[row["agent"]].recipe(row["env"])) | {"steps": cell_of(row).steps}
    used = row["config"] | {"steps": row["steps"]}
    return any(used[key] != today[key] for key in used.keys() & today.keys())


def read(out: Path) -> list[dict[str, Any]]:
    """The finished cells, in the order of the tables."""
    if not out.exists():
        return []
    return json.loads(out.read_text())["cells"]


def append(out: Path, row: dict[str, Any], about: dict[str, Any]) -> None:
    """Put a cell among the finished ones, in place of the one that was there; a line each, replaced at once.

    Held by one process at a time: the lock is on the folder, so that no file is left behind.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = [other for other in read(out) if cell_of(other) != cell_of(row)] + [row]
        order = list(TASKS)
        rows.sort(key=lambda r: (order.index(r["env"]), r["seed"], r["agent"]))
        lines = ",\n".join("    " + json.dumps(one) for one in rows)
        head = json.dumps(about, indent=2).removesuffix("\n}")
        draft = out.with_name(f".{out.name}.tmp")
        draft.write_text(f'{head},\n  "cells": [\n{lines}\n  ]\n}}\n')
        draft.replace(out)
    finally:
        os.close(folder)


def report(finished: Sequence[dict[str, Any]]) -> str:
    """A Markdown table an environment: two lines an agent, of its chosen and of its last weights."""
    tables, few = [], False
    for env, agents in TASKS.items():
        lines = []
        for agent in agents:
            rows = [row for row in finished if (row["env"], row["agent"]) == (env, agent)]
            rows.sort(key=lambda row: row["seed"])
            steps = " or ".join(f"{count:,}" for count in sorted({row["steps"] for row in rows}))
            for weights in ("chosen", "last") if rows else ():
                scores = [row[weights] for row in rows]
                mean = f"{np.mean(scores):.1f}"
                if len(scores) > 1:  # one says nothing about its spread
                    mean += " ({:.1f} to {:.1f})".format(*bootstrap_ci(scores))
                mark = "" if len(scores) >= 5 else " \\*"
                few = few or bool(mark)
                lines.append(
                    f"| {agent} | {steps} | {weights} | {mean} "
                    f"| {iqm(scores):.1f} | {len(scores)}{mark} | {' '.join(f'{s:.1f}' for s in scores)} |"
                )
        if lines:
            head = "| agent | steps | weights | mean (95 % interval) | IQM | seeds | each seed |\n"
            rule = "|---|--:|---|--:|--:|--:|---|\n"
            tables.append(f"**{env}**\n\n{head}{rule}" + "\n".join(lines))
    if few:
        tables.append("\\* fewer than five seeds")
    return "\n\n".join(tables) or "no cell is finished yet"


if __name__ == "__main__":
    sys.exit(guarded(main))

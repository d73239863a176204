"""A sweep of 20 short trainings on CartPole that is killed in the middle, and what it finds on other seeds.

    python -m foveal.runs.benchmarks.sweep            # about 15 CPU minutes

1. `foveal sweep`: 20 trials of DQN, 10,000 environment steps each, five settings searched by TPE with median
   pruning, two processes; all of it is killed with -9 once seven trials are done, and gone on with.
2. The best setting and the recipe, each trained on five seeds that the sweep has not seen, as long as the
   trials; a score is the mean of 100 fresh episodes, of the chosen checkpoint and of the last weights.

Everything goes on where it was when started again: trials and seeds are run folders below --work.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..cli import guarded
from ..run import list_runs, open_run
from ..statistics import bootstrap_ci
from ..sweep import read_trials
from .common import RESULTS, argument_parser, count, machine_info, write_results

SWEEP = """\
train: dqn
method: tpe
trials: {trials}
prune: median
parameters:
  env_id: CartPole-v1
  total_steps: {steps}
  eval_every: {cadence}
  final_episodes: 100
  video: false
  learning_rate: {{min: 1.0e-4, max: 1.0e-2, log: true}}
  batch_size: [32, 64, 128]
  train_every: {{min: 16, max: 128, step: 16}}
  gradient_steps: {{min: 8, max: 64, step: 8}}
  target_every: {{min: 32, max: 512, log: true}}
"""
SEEDS = range(101, 106)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--trials", type=count, default=20)
    parser.add_argument("--steps", type=count, default=10_000, help="environment steps of a trial")
    parser.add_argument("--kill-after", type=count, default=7, help="trials done, when all is killed")
    parser.add_argument("--work", type=Path, default=Path("results/sweep-benchmark"))
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.json")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "cartpole.yaml"
    steps = arguments.steps
    file.write_text(SWEEP.format(trials=arguments.trials, steps=steps, cadence=steps // 4))
    results = machine_info() | {"sweep_file": file.read_text()}

    killed = arguments.work / "killed.json"
    if not killed.exists():
        killed.write_text(json.dumps(sweep_and_kill(file, arguments.work, arguments.kill_after)))
    start = time.perf_counter()
    foveal("sweep", str(file), "--jobs", "2", "--results", str(arguments.work))
    folder = arguments.work / "cartpole"
    trials = read_trials(folder)
    assert trials is not None
    results |= {
        "killed": json.loads(killed.read_text()),
        "wall_s_after_the_kill": round(time.perf_counter() - start, 1),
        "trials": trials["trials"],
        "best": trials["best"],
        "importance": trials["importance"],
        "rows_twice": sum(rows_twice(entry["path"]) for entry in list_runs(arguments.work)),
    }
    fixed = {"env_id": "CartPole-v1", "total_steps": steps, "eval_every": steps // 4, "video": False}
    for name, settings in (("best", json.loads((folder / "best.json").read_text())), ("recipe", fixed)):
        results[name + "_on_other_seeds"] = on_other_seeds(name, settings, arguments.work)
        print(name, results[name + "_on_other_seeds"], flush=True)
    write_results(arguments.out, results)


def foveal(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "foveal.runs", *arguments], check=True)


def sweep_and_kill(file: Path, work: Path, after: int) -> dict[str, Any]:
    """Start the sweep, and kill it and its trials once `after` are done."""
    command = [sys.executable, "-m", "foveal.runs", "sweep", str(file), "--jobs", "2", "--results", str(work)]
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        time.sleep(0.5)
        trials = (read_trials(work / file.stem) or {"trials": []})["trials"]
        done = sum(trial["state"] not in ("running", "waiting") for trial in trials)
        # In the middle of a training, not before it has its folder.
        if done >= after and any(
            entry["state"] == "running" and entry["env_step"] for entry in list_runs(work)
        ):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(1)
            states = [entry["state"] for entry in list_runs(work)]
            return {"trials_done": done, "runs_killed": states.count("killed")}
    raise RuntimeError("the sweep ended before it was killed")


def rows_twice(path: Path) -> int:
    steps = [row["env_step"] for row in open_run(path).rows()]
    return len(steps) - len(set(steps))


def on_other_seeds(name: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """Scores of settings on seeds that the sweep has not seen, with 95 % bootstrap intervals over them."""
    found: dict[str, list[float]] = {"chosen": [], "last": []}
    for seed in SEEDS:
        options = {"results": str(work), "group": name, "name": f"seed{seed}", "seed": seed}
        done = [open_run(path) for path in (work / name).glob(f"seed{seed}-*")]
        if not any(run.summary.get("state") == "finished" for run in done):
            given = json.dumps(settings | options | {"final_episodes": 100, "progress": False})
            foveal("train", "dqn", "--settings", given)
            done = [open_run(path) for path in (work / name).glob(f"seed{seed}-*")]
        (run,) = [run for run in done if run.summary.get("state") == "finished"]
        found["chosen"].append(run.summary["eval/return_mean"])
        found["last"].append(run.summary["last/return_mean"])
    summary: dict[str, Any] = {}
    for which, scores in found.items():
        summary[which] = {"scores": scores, "mean": float(np.mean(scores)), "ci95": bootstrap_ci(scores)}
    return summary


if __name__ == "__main__":
    sys.exit(guarded(main))

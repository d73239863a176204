"""foveal sweep: trials of one sweep file, several processes at once, each a run folder of one group.

The group's folder holds, beside the runs:

    sweep.db     Optuna's study: what was tried and what came out (SQLite)
    sweep.json   the same to read without Optuna: the sweep, its trials, the importance of each setting
    best.json    the settings of the best trial so far, for `foveal train NAME --settings`
    trial*.log   what each trial printed

This process alone asks Optuna, starts trials and watches their metrics.jsonl; a trial is an ordinary `foveal
train`. Whichever of them is killed, the same command goes on: a trial with a checkpoint is resumed, one that
still runs is waited for.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..agents import newest_first
from .lifecycle import is_resumable, say, signal_handlers
from .origin import is_alive, process_of
from .run import Run, folder_name, open_run, write_json
from .sweep_file import Sweep, read_sweep, wandb_config

POLL_S = 0.3
RESTARTS = 3
"""Times that a killed trial is gone on with before it counts as failed: memory may be too small for it."""
HOPELESS = 3
"""Failed trials, with none that finished, that end a sweep."""


@dataclass(frozen=True)
class SweepCommand:
    """Search the settings of an agent or a model. The same command goes on with a sweep that was stopped."""

    file: tyro.conf.Positional[Path]
    """Sweep file: YAML, or Python that assigns the same names (README: Sweeps)."""
    jobs: int = 1
    """Trials at once, each a process."""
    trials: int | None = None
    """Trials in all, the finished ones included; by default the file's."""
    results: Path = Path("results")
    """Folder of all runs."""
    group: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Group of the trials' runs; by default the file's name."""
    wandb: bool = False
    """Only print the same sweep for W&B's server, to save and give to `wandb sweep`."""

    def __post_init__(self) -> None:
        for name in ("jobs", "trials"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def sweep(given: SweepCommand) -> int:
    spec = read_sweep(given.file)
    spec = replace(spec, trials=given.trials or spec.trials)
    if given.wandb:
        import yaml

        print(yaml.safe_dump(wandb_config(spec), sort_keys=False), end="")
        return 0
    return Trials(spec, given.results, given.group or given.file.stem, given.jobs).run()


def training_command(spec: Sweep, settings: dict[str, Any], options: dict[str, Any]) -> list[str]:
    given = json.dumps({**settings, **options, "progress": False}, default=str)
    return [sys.executable, "-m", "foveal.runs", "train", spec.train, "--settings", given]


def resuming_command(run: Run) -> list[str]:
    command = [sys.executable, "-m", "foveal.runs", "resume", str(run.path), "--no-progress"]
    names = (str(run.config.get("env_id")), *(run.config.get("encoder") or "").split("+"))
    for module in dict.fromkeys(name.rpartition(":")[0] for name in names if ":" in name):
        command += ["--import", module]
    return command


class Process:
    """A trial's process: our child, or one that an earlier `foveal sweep`, since killed, left behind."""

    def __init__(self, child: subprocess.Popen[bytes] | None, known: dict[str, Any]):
        self.child, self.known = child, known

    def poll(self) -> int | None:
        """None while it runs; the exit code, of another's child -1: that cannot be known."""
        if self.child is not None:
            return self.child.poll()
        return None if is_alive(self.known) else -1

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.known["pid"], signal.SIGTERM)


@dataclass
class Running:
    """A trial under way."""

    trial: Any  # of Optuna's
    settings: dict[str, Any]
    log: Path
    process: Process
    run: Run | None = None
    read: int = 0  # bytes of its metrics.jsonl
    reported: set[int] = field(default_factory=set)  # at which percent of the training
    restarts: int = 0
    pruned: bool = False

    @property
    def number(self) -> int:
        return self.trial.number


class Trials:
    """A sweep in its folder."""

    def __init__(self, spec: Sweep, results: Path, group: str, jobs: int):
        self.spec, self.results, self.jobs = spec, results, jobs
        self.group = folder_name("group", group)
        self.folder = results / self.group
        self._check_folder()
        self.optuna = _optuna()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = self._study()
        self.running: list[Running] = []
        self.stopping = False
        self._save()

    def run(self) -> int:
        def stop(number: int, frame: object) -> None:
            if self.stopping and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopping = True
            if number == signal.SIGTERM:  # Ctrl-C reaches the trials by itself
                for running in self.running:
                    running.process.terminate()

        with signal_handlers({signal.SIGINT: stop, signal.SIGTERM: stop}):
            self._take_up()
            while not self.stopping and not self._hopeless() and len(self.running) < self.jobs:
                if not self._start_next():
                    break
            while self.running:
                time.sleep(POLL_S)
                for running in list(self.running):
                    self._look_at(running)
                while len(self.running) < self.jobs and not self.stopping and not self._hopeless():
                    if not self._start_next():
                        break
        self._save(process=False)
        return self._conclude()

    # The study.

    def _check_folder(self) -> None:
        """ValueError where the folder holds another sweep, or one that another process is at."""
        state = read_trials(self.folder)
        if state is None:
            return
        if is_alive(state.get("process") or {"host": None}):
            raise ValueError(f"{self.folder}: its sweep still goes on, as process {state['process']['pid']}")
        before, now = state["sweep"], self.spec.to_json()
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            raise ValueError(
                f"{self.folder} holds another sweep (its {', '.join(differing)} differ): name another --group"
            )

    def _study(self) -> Any:
        optuna, spec = self.optuna, self.spec
        storage = optuna.storages.RDBStorage(f"sqlite:///{(self.folder / 'sweep.db').resolve()}")
        known = storage.get_all_studies()
        # Of a sampler that starts again with the same seed, the first draws would come again.
        seed = spec.seed + 7919 * (len(storage.get_all_trials(known[0]._study_id)) if known else 0)
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
            "grid": lambda: optuna.samplers.RandomSampler(seed=seed),  # all trials of a grid are enqueued
        }
        pruners = {
            "none": optuna.pruners.NopPruner,
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=10),
            "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=3),
        }
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            load_if_exists=True,
            direction=spec.goal,
            sampler=samplers[spec.method](),
            pruner=pruners[spec.prune](),
        )
        if spec.method == "grid":
            for settings in spec.grid():
                study.enqueue_trial(self._to_optuna(settings), skip_if_exists=True)
        elif not known and (default := spec.default_trial()) is not None:
            study.enqueue_trial(self._to_optuna(default), user_attrs={"default": True})
        return study

    def _to_optuna(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {name: _choice(value) for name, value in settings.items()}

    def _settings(self, trial: Any) -> dict[str, Any]:
        """What a trial searches, as the Config takes it."""
        found = {}
        for name, value in trial.params.items():
            choices = self.spec.searched[name].get("values", ())
            found[name] = next((choice for choice in choices if _choice(choice) == value), value)
        return found

    def _trials(self, *states: str) -> list[Any]:
        wanted = tuple(getattr(self.optuna.trial.TrialState, state) for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted or None)

    def _hopeless(self) -> bool:
        return not self._trials("COMPLETE", "PRUNED") and len(self._trials("FAIL")) >= HOPELESS

    # Trials.

    def _take_up(self) -> None:
        """The trials that an earlier process did not see the end of."""
        for frozen in self._trials("RUNNING"):
            trial = self.optuna.trial.Trial(self.study, frozen._trial_id)
            self._draw(trial)
            settings, log = self._settings(trial), self._log_of(frozen.number)
            process = Process(None, frozen.user_attrs.get("process", {"host": None}))
            running = Running(trial, settings, log, process, reported=set(frozen.intermediate_values))
            say(f"trial {frozen.number}: {'is still running' if process.poll() is None else 'goes on'}")
            self.running.append(running)
            self._look_at(running)

    def _draw(self, trial: Any) -> None:
        """Draw a trial's settings; those that a sweep, killed in the middle of this, had drawn stay."""
        for name, p in self.spec.searched.items():
            if "values" in p:
                trial.suggest_categorical(name, [_choice(value) for value in p["values"]])
            elif isinstance(p["min"], int):
                trial.suggest_int(name, p["min"], p["max"], log=p["log"], step=p["step"] or 1)
            else:
                trial.suggest_float(name, p["min"], p["max"], log=p["log"], step=p["step"])

    def _start_next(self) -> bool:
        """Start the next trial; False where all have been."""
        waiting = self._trials("WAITING")
        begun = len(self._trials()) - len(waiting)
        if begun >= self.spec.trials or (self.spec.method == "grid" and not waiting):
            return False
        trial = self.study.ask()
        self._draw(trial)
        settings = self._settings(trial)
        say(f"trial {trial.number}: {_text(settings)}")
        log = self._log_of(trial.number)
        running = Running(trial, settings, log, Process(None, {"host": None}))
        self.running.append(running)
        self._start(running)
        return True

    def _log_of(self, number: int) -> Path:
        return self.folder / f"{_name(number)}.log"

    def _start(self, running: Running) -> None:
        """Start a trial's process, or go on with its run where there is one that can."""
        run = running.run
        if run is not None and is_resumable(run) and newest_first(run.path / "checkpoints"):
            command = resuming_command(run)
        else:
            running.run, running.read = None, 0
            options = {
                "results": str(self.results),
                "group": self.group,
                "name": _name(running.number),
            }
            command = training_command(self.spec, self.spec.fixed | running.settings, options)
        environment = dict(os.environ)
        if self.jobs > 1:  # or each trial would take all cores for its images
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        with running.log.open("ab") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        running.process = Process(child, process_of(child.pid))
        running.trial.set_user_attr("process", running.process.known)

    def _look_at(self, running: Running) -> None:
        """Read the rows that a trial has written since, prune it if it is hopeless, and see to its end."""
        code = running.process.poll()  # before the rows, or the last ones might be missed
        if running.run is None:
            running.run = self._run_of(running.number)
        if running.run is not None:
            reported = self._report(running)
            if code is None and reported and not running.pruned and running.trial.should_prune():
                running.pruned = True
                running.process.terminate()  # which saves a checkpoint and stops
        if code is not None:
            self._ended(running, code)

    def _run_of(self, number: int) -> Run | None:
        runs = []
        for config in self.folder.glob(f"{_name(number)}-*/config.json"):
            with suppress(ValueError, OSError):
                runs.append(open_run(config.parent))
        return max(runs, key=lambda run: run.config["run"]["started"], default=None)

    def _report(self, running: Running) -> bool:
        """Tell Optuna the metric's values in new rows, against the percent of the training done."""
        assert running.run is not None
        with (running.run.path / "metrics.jsonl").open("rb") as file:
            file.seek(running.read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        running.read += len(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        percent = 0
        for row in rows:
            value = row.get(self.spec.metric)
            if isinstance(value, int | float) and value == value:
                percent = round(100 * _share(running.run, row))
                if percent not in running.reported:
                    running.reported.add(percent)
                    running.trial.report(float(value), percent)
        return 0 < percent < 100

    def _ended(self, running: Running, code: int) -> None:
        if running.run is not None:
            running.run = open_run(running.run.path)
        state = running.run.summary.get("state") if running.run is not None else None
        killed = code < 0 or code in (130, 143)
        if state == "finished":
            self._finished(running)
        elif running.pruned and state == "stopped":
            self._tell(running, "PRUNED", None, "pruned")
        elif self.stopping:
            self.running.remove(running)  # stays RUNNING in the study: the next sweep goes on with it
        elif state == "failed" or not killed:
            self._tell(running, "FAIL", None, f"failed: {_last_line(running.log)}")
        elif running.restarts >= RESTARTS:
            self._tell(running, "FAIL", None, f"failed: it was killed {RESTARTS + 1} times")
        else:
            # -1 at first sight is of an earlier process's child, and no restart of this one's.
            if running.process.child is not None:
                running.restarts += 1
                say(f"trial {running.number}: was killed, and goes on")
            self._start(running)

    def _finished(self, running: Running) -> None:
        assert running.run is not None
        metric = self.spec.metric
        value = trial_value(running.run, metric, self.spec.goal)
        if value is None:
            keys = sorted({*running.run.summary, *(key for row in running.run.rows() for key in row)})
            numbers = ", ".join(key for key in keys if "/" in key)
            self._tell(running, "FAIL", None, f"failed: its run has no {metric}; it has {numbers}")
        else:
            self._tell(running, "COMPLETE", value, f"{metric} {value:.6g}")

    def _tell(self, running: Running, state: str, value: float | None, what: str) -> None:
        if running.run is not None:
            running.trial.set_user_attr("run", running.run.path.name)
        self.study.tell(running.number, value, getattr(self.optuna.trial.TrialState, state))
        self.running.remove(running)
        self._save()
        say(f"trial {running.number}: {what}")

    # What is left behind.

    def _best(self) -> Any:
        trials = self._trials("COMPLETE")
        sign = 1 if self.spec.goal == "maximize" else -1
        return max(trials, key=lambda t: (sign * t.value, -t.number), default=None)

    def _save(self, process: bool = True) -> None:
        """Write sweep.json and best.json."""
        trials = []
        for trial in self._trials():
            if trial.state.name == "WAITING":
                continue
            trials.append(
                {
                    "number": trial.number,
                    "state": trial.state.name.lower(),
                    "value": trial.value,
                    "settings": self._settings(trial),
                    "run": trial.user_attrs.get("run"),
                    "default": trial.user_attrs.get("default", False),
                }
            )
        best = self._best()
        content = {
            "sweep": self.spec.to_json(),
            "trials": trials,
            "best": best.number if best else None,
            "importance": None if process else self._importance(),
            "process": process_of(os.getpid()) if process else None,
        }
        write_json(self.folder / "sweep.json", json.loads(json.dumps(content, default=str)))
        if best is not None:
            settings = self.spec.fixed | self._settings(best)
            write_json(self.folder / "best.json", json.loads(json.dumps(settings, default=str)))

    def _importance(self) -> dict[str, float] | None:
        """The share of each setting in how the metric varies (fANOVA, Hutter et al. 2014); None where there
        are too few trials to tell, or all came to the same."""
        trials = self._trials("COMPLETE")
        if len(trials) < 4 or len({trial.value for trial in trials}) < 2:
            return None
        evaluator = self.optuna.importance.FanovaImportanceEvaluator(seed=0)
        return self.optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    def _conclude(self) -> int:
        counts = {state: len(self._trials(state)) for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")}
        names = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "stopped"}
        told = ", ".join(f"{count} {names[state]}" for state, count in counts.items() if count)
        best = self._best()
        if best is None:
            say(f"trials: {told or 'none'}")
            say(f"logs of the trials: {self.folder}/trial*.log")
            return 130 if self.stopping else 1
        say(f"best of {told}: trial {best.number}, {self.spec.metric} {best.value:.6g}")
        say(f"  {_text(self._settings(best))}")
        default = next((t for t in self._trials("COMPLETE") if t.user_attrs.get("default")), None)
        if default is not None and default.number != best.number:
            say(f"  the recipe, trial {default.number}: {self.spec.metric} {default.value:.6g}")
        say(f"run folder: {self.folder / best.user_attrs['run']}")
        say(f"settings: {self.folder / 'best.json'}")
        quoted = shlex.quote(str(self.folder / "best.json"))
        say(f"again, on other seeds: foveal train {self.spec.train} --settings {quoted} --seed 101 --seeds 5")
        if self.stopping:
            say("stopped; the same command goes on")
        return 130 if self.stopping else 0


def read_trials(folder: Path) -> dict[str, Any] | None:
    """The sweep.json of a group's folder: "sweep", "trials" (number, state, value, settings, run, default),
    "best" (a number), "importance" (setting -> share, or None). None where the group is no sweep.

    Raises ValueError where it is damaged, or of something else."""
    try:
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{folder / 'sweep.json'} is damaged: {error}") from error
    if not isinstance(content, dict) or not {"sweep", "trials"} <= content.keys():
        raise ValueError(f"{folder / 'sweep.json'} is not what foveal sweep writes")
    return content


def trial_value(run: Run, metric: str, goal: str) -> float | None:
    """What a finished run is compared by: the metric in summary.json, else its best value in the rows."""
    choose: Callable[..., Any] = max if goal == "maximize" else min
    values = [run.summary[metric]] if metric in run.summary else [row.get(metric) for row in run.rows()]
    numbers = [value for value in values if isinstance(value, int | float) and value == value]
    return float(choose(numbers)) if numbers else None


def _share(run: Run, row: dict[str, Any]) -> float:
    """How far the training was at a row, from 0 to 1."""
    if "total_steps" in run.config:
        return row["env_step"] / run.config["total_steps"]
    return row.get("epoch", 0.0) / run.config["epochs"]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError(f"a sweep needs Optuna: pip install 'foveal[sweep]' ({error})") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _choice(value: Any) -> Any:
    """A choice as Optuna keeps it: scalars as they are, a list as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _name(number: int) -> str:
    return f"trial{number:03d}"


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("foveal: ") if lines else "it said nothing"

"""Sweeps: what a file may say, and trials that are started, watched, pruned, killed and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foveal.runs import sweep as sweeping
from foveal.runs.cli import main
from foveal.runs.origin import is_alive
from foveal.runs.run import list_runs, open_run
from foveal.runs.settings import take_settings, typed_value
from foveal.runs.sweep import SweepCommand, Trials, read_trials
from foveal.runs.sweep_file import read_sweep, wandb_config

pytest.importorskip("optuna", reason="Optuna is not installed (extra: sweep)")

FILE = """\
train: dqn
trials: 6
parameters:
  env_id: CartPole-v1
  total_steps: 1000
  learning_rate: {min: 1e-4, max: 1e-2, log: true}
  batch_size: [32, 64]
  train_every: {min: 16, max: 64, step: 16}
"""

# A trial without a training, in a bare Python: ten rows whose values the settings decide, a checkpoint at
# each and one before the first, or nothing could be resumed after a kill between the two; it stops, and goes
# on, as `foveal train` and `foveal resume` do.
TRIAL = """
import json, os, signal, socket, sys, time
from pathlib import Path
what, given, delay = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
if what == "train":
    path = Path(given["results"], given["group"], given["name"] + f"-{os.getpid():08x}")
    path.mkdir(parents=True)
    origin = {"id": path.name[-8:], "group": given["group"], "name": given["name"], "track": "off"}
    origin["started"] = str(time.time())
    config = {"agent": "dqn", "env_id": "x", "total_steps": 1000, "settings": given, "run": origin}
    (path / "metrics.jsonl").touch()
    (path / "config.json").write_text(json.dumps(config))
    (path / "checkpoints" / "step-000000000").mkdir(parents=True)
else:
    path = Path(given["path"])
settings = json.loads((path / "config.json").read_text())["settings"]
start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
process = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
def summarize(**summary):
    (path / ".draft").write_text(json.dumps(summary))
    (path / ".draft").rename(path / "summary.json")
summarize(state="running", process=process)
if settings["batch_size"] == 99:
    summarize(state="failed")
    sys.exit("foveal: there is no such batch")
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
value = -abs(settings["learning_rate"] - 1e-3) * 1e3 - settings["train_every"] / 64
rows = len((path / "metrics.jsonl").read_bytes().splitlines())
for step in range(100 * rows + 100, 1100, 100):
    time.sleep(delay * (20 if value < -8 else 1))  # a hopeless one is slow, to be seen in time
    with (path / "metrics.jsonl").open("a") as file:
        print(json.dumps({"env_step": step, "eval/return_mean": value + step / 1e5}), file=file)
    (path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    if asked and step < 1000:
        summarize(state="stopped")
        sys.exit(130)
summarize(state="finished", **{"eval/return_mean": value})
"""


def fake_trials(delay: float) -> None:
    """Trials that sleep instead of training."""

    def command(what, given):
        return [sys.executable, "-ISc", TRIAL, what, json.dumps(given), str(delay)]

    sweeping.training_command = lambda spec, settings, options: command("train", settings | options)
    sweeping.resuming_command = lambda run: command("resume", {"path": str(run.path)})
    sweeping.POLL_S = 0.05


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("training_command", "resuming_command", "POLL_S"):  # put back after the test
        monkeypatch.setattr(sweeping, name, getattr(sweeping, name))


def written(text: str, name: str = "s.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run(text: str, jobs: int = 2, delay: float = 0.0) -> int:
    fake_trials(delay)
    return sweeping.sweep(SweepCommand(written(text), jobs=jobs))


def outcome() -> dict:
    found = read_trials(Path("results/s"))
    assert found is not None
    return found


def scores() -> dict[int, float]:
    return {trial["number"]: trial["value"] for trial in outcome()["trials"]}


def test_a_file_is_read_with_the_types_of_the_fields():
    spec = read_sweep(written(FILE))
    assert spec.fixed == {"env_id": "CartPole-v1", "total_steps": 1000}
    assert spec.searched["learning_rate"] == {"min": 1e-4, "max": 1e-2, "log": True, "step": None}
    assert spec.searched["train_every"] == {"min": 16, "max": 64, "log": False, "step": 16}
    assert (spec.metric, spec.goal, spec.method) == ("eval/return_mean", "maximize", "tpe")
    assert spec.default_trial() == {
        "learning_rate": 1e-3,
        "batch_size": 64,
        "train_every": 64,
    }  # the recipe's
    assert read_sweep(written(FILE.replace("[32, 64]", "[32, 128]"))).default_trial() is None


def test_a_python_file_says_the_same():
    python = """
import math
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
train, trials = "dqn", 2 * 3
parameters = {
    "env-id": "CartPole-v1", "total_steps": 1000,
    "learning_rate": FloatDistribution(1e-4, 10 ** -2, log=True),
    "batch_size": CategoricalDistribution([32, 64]),
    "train_every": IntDistribution(16, 64, step=16),
}
"""
    assert read_sweep(written(python, "s.py")) == read_sweep(written(FILE))


def test_a_classifier_is_chosen_on_validation_images():
    searched = "augment: [[], ['shift:1']], momentum: [0.5, 0.9]"
    text = f"train: classifier\nparameters: {{dataset: digits, backbone: linear, {searched}}}"
    spec = read_sweep(written(text))
    assert (spec.metric, spec.goal) == ("validation/accuracy", "maximize")
    assert spec.searched["augment"] == {"values": [(), ("shift:1",)]}
    assert len(spec.grid()) == 4


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("train: dqn", "train: dnq", "unknown agent or model 'dnq'; nearest: dqn"),
        ("trials: 6", "trails: 6", "unknown name 'trails'; nearest: trials"),
        ("trials: 6", "trials: 0", "trials must be an integer of 1 or more, got 0"),
        ("trials: 6", "method: bayes", "method takes tpe, random, grid, got 'bayes'"),
        ("trials: 6", "prune: often", "prune takes none, median, asha, got 'often'"),
        ("trials: 6", "goal: up", "goal takes maximize, minimize, got 'up'"),
        ("trials: 6", "method: grid", "learning_rate: a grid needs a list of choices, or a step"),
        ("learning_rate", "learning_rat", "unknown setting 'learning_rat'; nearest: learning_rate"),
        ("max: 1e-2", "max: 1e-5", "learning_rate: the range is empty: min 0.0001 is not below max 1e-05"),
        ("min: 1e-4", "min: 0", "learning_rate: with log, min must be greater than 0, got 0.0"),
        ("min: 1e-4", "min: few", "learning_rate: min: takes a number, got 'few'"),
        ("min: 1e-4, ", "", "learning_rate: takes one value, a list of choices, or min and max"),
        ("min: 16,", "min: 16.5,", "train_every: min: takes an integer, got 16.5"),
        ("step: 16", "step: 0", "train_every: step must be greater than 0 and at most max - min, got 0"),
        ("[32, 64]", "[]", "batch_size: values is empty: it takes a list of one or more"),
        ("[32, 64]", "[32, big]", "batch_size: takes an integer, got 'big'"),
        (
            "[32, 64]",
            "[32, 0]",
            "batch_size = 0 is nothing to train with: batch_size must be 1 or more, got 0",
        ),
        ("batch_size: [32", "double: {min: 0, max: 1}\n  batch_size: [32", "double: takes a list of choices"),
        ("total_steps: 1000", "group: x", "group is the sweep's own"),
        ("CartPole-v1", "CartPol-v1", "env_id 'CartPol-v1' is no registered Gymnasium environment"),
        (FILE, "parameters: {gamma: [1]}", "s.yaml needs `train:`"),
        (FILE, "train: dqn\nparameters: {gamma: 1}", "nothing is searched"),
        (FILE, "{", "s.yaml is not YAML"),
        (FILE, "- a", "s.yaml is no sweep file"),
    ],
)
def test_what_cannot_be_searched_is_one_line_before_anything_starts(old, new, line, capsys):
    assert old in FILE
    written(FILE.replace(old, new))
    assert main(["sweep", "s.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err
    assert not Path("results").exists()


def test_the_same_for_files_and_folders(capsys):
    assert main(["sweep", "no.yaml"]) == 2
    assert "there is no sweep file no.yaml" in capsys.readouterr().err
    assert run(FILE.replace("trials: 6", "trials: 1")) == 0
    capsys.readouterr()
    written(FILE.replace("1e-2", "2e-2"))
    assert main(["sweep", "s.yaml"]) == 2
    assert "holds another sweep (its parameters differ): name another --group" in capsys.readouterr().err


def test_trials_are_runs_of_one_group_and_the_best_is_told(capsys):
    assert run(FILE) == 0
    out = capsys.readouterr().out
    runs = list_runs("results")
    assert [entry["state"] for entry in runs] == ["finished"] * 6
    assert {entry["group"] for entry in runs} == {"s"}
    values = scores()
    best = max(values, key=lambda number: values[number])
    trials = outcome()
    assert trials["best"] == best
    assert trials["process"] is None
    assert trials["trials"][0]["default"]
    assert f"best of 6 finished: trial {best}, eval/return_mean {values[best]:.6g}" in out
    settings = json.loads(Path("results/s/best.json").read_text())
    (folder,) = Path("results/s").glob(f"trial{best:03d}-*")
    assert settings.items() <= open_run(folder).config["settings"].items()
    assert set(trials["importance"]) == {"learning_rate", "batch_size", "train_every"}
    assert trials["importance"]["batch_size"] < 0.2 < trials["importance"]["learning_rate"]

    assert run(FILE) == 0  # all is done: nothing starts
    assert len(list_runs("results")) == 6
    assert run(FILE.replace("trials: 6", "trials: 8")) == 0  # more of the same
    values = scores()
    assert len(values) == 8
    assert len(set(values.values())) == 8  # no draw came twice


def test_a_grid_has_every_combination_once():
    text = FILE.replace("{min: 1e-4, max: 1e-2, log: true}", "[1e-3, 2e-3]")
    text = text.replace("trials: 6", "trials: 99").replace("[32, 64]", "64").replace("min: 16", "min: 32")
    assert run("method: grid\n" + text) == 0
    tried = [tuple(trial["settings"].values()) for trial in outcome()["trials"]]
    assert sorted(tried) == [(lr, every) for lr in (1e-3, 2e-3) for every in (32, 48, 64)]


def test_a_hopeless_trial_is_pruned():
    text = FILE.replace("{min: 1e-4, max: 1e-2, log: true}", "[1e-3, 1.1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 9e-3]")
    text = text.replace("[32, 64]", "64").replace("{min: 16, max: 64, step: 16}", "64")
    assert run("method: grid\nprune: median\n" + text, delay=0.02) == 0
    trials = outcome()["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 5 + ["pruned"]
    pruned = open_run(Path("results/s") / trials[-1]["run"])
    assert pruned.summary["state"] == "stopped"
    assert 1 <= len(pruned.rows()) < 10


def test_trials_that_all_fail_end_the_sweep(capsys):
    assert run(FILE.replace("[32, 64]", "99")) == 1
    out = capsys.readouterr().out
    assert "trial 0: failed: there is no such batch" in out
    assert "trials: 3 failed" in out.replace("4 failed", "3 failed")  # two at once: a fourth has begun


def test_a_metric_that_no_run_has_is_told_with_those_there_are(capsys):
    assert run(FILE + "metric: eval/retrun_mean\n", jobs=1) == 1
    assert "failed: its run has no eval/retrun_mean; it has eval/return_mean" in capsys.readouterr().out


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sweep
test_sweep.fake_trials(0.4)
sys.exit(test_sweep.sweeping.sweep(test_sweep.SweepCommand(Path("s.yaml"), jobs=2)))
"""


def start() -> subprocess.Popen:
    code = DRIVER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL)


def alive(at_least: int = 1) -> list[dict]:
    """The processes of at least so many trials that are before their last rows, once there are any."""
    deadline = time.monotonic() + 60
    while True:
        found = []
        for file in Path("results/s").glob("trial*-*/summary.json"):
            process = json.loads(file.read_text()).get("process", {})
            rows = len((file.parent / "metrics.jsonl").read_bytes().splitlines())
            if is_alive(process) and 1 <= rows <= 4:
                found.append(process)
        if len(found) >= at_least:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_kill_9_of_one_trial_of_everything_and_of_the_sweep_alone(capsys):
    """In turn: each trial ends with its ten rows once, and there are as many trials as asked for."""
    written(FILE)
    process = start()
    os.kill(alive()[0]["pid"], signal.SIGKILL)
    with pytest.raises(ValueError, match=f"its sweep still goes on, as process {process.pid}"):
        Trials(read_sweep(Path("s.yaml")), Path("results"), "s", 1)
    trials = alive(2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(is_alive, trials)):
        time.sleep(0.01)
    assert "killed" in {entry["state"] for entry in list_runs("results")}

    process = start()
    alive(2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(FILE, delay=0.01) == 0
    runs = list_runs("results")
    assert [entry["state"] for entry in runs] == ["finished"] * 6
    assert len(scores()) == 6
    for entry in runs:
        assert [row["env_step"] for row in open_run(entry["path"]).rows()] == list(range(100, 1100, 100))
    assert capsys.readouterr().out.count("is still running") == 2


def test_a_trial_whose_settings_were_half_drawn_gets_the_others(capsys):
    """Killed between two draws: what is there stays, the rest is drawn, and it is trained with all of it."""
    fake_trials(0.0)
    trials = Trials(read_sweep(written(FILE)), Path("results"), "s", 1)
    trials.study.ask()  # the recipe, of which nothing was drawn yet
    trials.study.ask().suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    drawn = trials.study.trials[1].params["learning_rate"]
    trials._save(process=False)
    assert run(FILE) == 0
    assert capsys.readouterr().out.count("goes on") == 2
    names = {"learning_rate", "batch_size", "train_every"}
    for trial in outcome()["trials"]:
        assert set(trial["settings"]) == names
        (folder,) = Path("results/s").glob(f"trial{trial['number']:03d}-*")
        assert trial["settings"].items() <= open_run(folder).config["settings"].items()
    assert outcome()["trials"][1]["settings"]["learning_rate"] == drawn
    assert outcome()["trials"][0]["settings"] == read_sweep(Path("s.yaml")).default_trial()


def test_settings_are_what_train_takes(capsys):
    json_ = json.dumps({"total_steps": 700, "batch_size": 16, "learning_rate": 1, "env_kwargs": []})
    assert take_settings(["--seed", "1", "--settings", json_]) == (["--seed", "1"], json.loads(json_))
    assert typed_value("x", tuple[str, ...], ["a"]) == ("a",)
    assert main(["train", "dqn", "--settings", '{"batch_siz": 1}']) == 2
    assert "unknown setting 'batch_siz'; nearest: batch_size" in capsys.readouterr().err
    assert main(["train", "dqn", "--settings", '{"batch_size": "x"}']) == 2
    assert "batch_size: takes an integer, got 'x'" in capsys.readouterr().err
    assert main(["train", "dqn", "--settings", "no.json"]) == 2
    assert "--settings takes a JSON file or a JSON object, got 'no.json'" in capsys.readouterr().err
    written(
        json.dumps({"total_steps": 10, "log_every": 10, "final_episodes": 1, "video": False, "gamma": 0.5})
    )
    quiet = ["--track", "off", "--no-progress", "--gamma", "0.25", "--eval-every", "0"]
    assert main(["train", "dqn", "--settings", "s.yaml", *quiet]) == 0
    (entry,) = list_runs("results")
    config = open_run(entry["path"]).config
    assert config["total_steps"] == 10
    assert config["config"]["gamma"] == 0.25  # a flag wins
    assert config["config"]["train_every"] == 64  # the recipe, where nothing else is said


def test_the_same_sweep_for_wandb(capsys):
    written(FILE.replace("trials: 6", "trials: 6\nprune: asha") + "  track: 'off'\n")
    assert main(["sweep", "s.yaml", "--wandb"]) == 0
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    assert config == wandb_config(read_sweep(Path("s.yaml")))
    assert config["method"] == "bayes"
    assert config["parameters"] == {
        "env_id": {"value": "CartPole-v1"},
        "total_steps": {"value": 1000},
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "batch_size": {"values": [32, 64]},
        "train_every": {"values": [16, 32, 48, 64]},
    }
    assert (config["run_cap"], config["early_terminate"]["type"]) == (6, "hyperband")
    assert not Path("results").exists()
    # W&B's agent puts a JSON object of the settings in the place of ${args_json}.
    assert config["command"][-2:] == ["--settings", "${args_json}"]

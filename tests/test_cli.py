"""The command line as a person meets it: what it prints, what it refuses, and what it leaves behind."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from foveal.runs.cli import main
from foveal.vision import MLP

QUICK = [
    *("--total-steps", "400", "--log-every", "100", "--eval-every", "200", "--eval-episodes", "2"),
    *("--final-episodes", "3", "--checkpoint-every", "200", "--learning-starts", "50", "--train-every", "16"),
    *("--gradient-steps", "2", "--track", "off", "--no-progress"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folder() -> Path:
    (path,) = (folder for folder in Path("results").glob("*/*") if folder.is_dir())
    return path


def refused(capsys, *arguments: str) -> str:
    """The one line that a wrong command ends with."""
    code: object
    try:
        code = main(list(arguments))
    except SystemExit as error:  # the parser's own
        code = error.code
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert "Traceback" not in err
    return err.strip()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "dqn", *QUICK, "--seed", "3", "--num-envs", "2"]) == 0
        return folder / run_folder()
    finally:
        os.chdir(before)


def test_a_run_leaves_all_that_it_says(trained):
    names = {path.relative_to(trained).parts[0] for path in trained.rglob("*") if path.is_file()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "videos", "plots"}
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {
        "best",
        "step-000000000200",
        "step-000000000400",
    }
    config = json.loads((trained / "config.json").read_text())
    assert config["config"]["gradient_steps"] == 2
    assert config["versions"]["torch"]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["eval/episodes"] == 3
    assert summary["versions"] == config["versions"]
    assert (summary["git"], summary["device"]) == (config["run"]["git"], "cpu")
    low, high = summary["eval/return_ci95"]
    assert low <= summary["eval/return_mean"] <= high
    assert {
        "baseline/random_policy",
        "speed/env_steps_per_s",
        "speed/updates_per_s",
        "wall_s",
    } <= summary.keys()
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_step"] for row in rows] == [100, 200, 300, 400]
    assert ["eval/return_mean" in row for row in rows] == [False, True, False, True]


def test_last_lines_say_the_score_and_where_everything_is(capsys):
    assert main(["train", "dqn", *QUICK]) == 0
    out = capsys.readouterr().out
    run = run_folder()
    assert out.startswith("score: ")
    for part in ("plots/learning_curve.png", "videos/policy.mp4", "checkpoints/best/weights.safetensors"):
        assert f"{run / part}\n" in out
        assert (run / part).stat().st_size > 1000
    assert f"run folder: {run}\n" in out


def test_evaluate_gives_the_same_figures_as_json(trained, capsys):
    assert main(["evaluate", str(trained), "--episodes", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["eval/episodes"] == 4
    assert np.mean(result["eval/returns"]) == pytest.approx(result["eval/return_mean"])
    assert main(["evaluate", str(trained), "--episodes", "4"]) == 0
    assert f"score: {result['eval/return_mean']:.1f} ±" in capsys.readouterr().out


def test_evaluate_records_a_video(trained, capsys):
    assert main(["evaluate", str(trained), "--episodes", "1", "--video", "film.mp4"]) == 0
    assert Path("film.mp4").stat().st_size > 1000


def test_list_shows_runs_agents_and_encoders(trained, capsys):
    assert main(["list", "--results", str(trained.parent.parent)]) == 0
    out = capsys.readouterr().out
    assert "dqn" in out
    assert "nature" in out
    assert "finished" in out
    assert main(["list", "environments", "--contains", "cartpole"]) == 0
    assert capsys.readouterr().out.split() == ["CartPole-v0", "CartPole-v1", "foveal/MaskedCartPole-v0"]


def test_help_shows_every_setting_with_its_explanation(capsys):
    with pytest.raises(SystemExit) as done:
        main(["train", "dqn", "--help"])
    assert done.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for flag in (
        "--env-id",
        "--learning-rate",
        "--double",
        "--target-every",
        "--seeds",
        "--results",
        "--track",
    ):
        assert flag in out
    assert "Environment steps between updates of the target network" in out.replace("│ │ ", "").replace(
        "│", ""
    ).replace("  ", " ")


def test_defaults_are_the_recipe_of_the_environment(capsys):
    with pytest.raises(SystemExit):
        main(["train", "dqn", "--env-id", "MountainCar-v0", "--help"])
    assert "0.98" in capsys.readouterr().out


def test_init_from_takes_weights_and_nothing_else(trained):
    flags = [*QUICK, "--init-from", str(trained), "--learning-rate", "1e-12", "--no-video"]
    assert main(["train", "dqn", *flags, "--num-envs", "2"]) == 0
    from foveal.agents import load

    old, new = load(trained), load(run_folder())
    assert new.env_step <= 400, "counts its own steps"
    for one, other in zip(old.network.parameters(), new.network.parameters()):
        np.testing.assert_allclose(one.detach(), other.detach(), atol=1e-6)
    parents = json.loads((run_folder() / "config.json").read_text())["run"]["parents"]
    assert parents[0]["run"] == json.loads((trained / "config.json").read_text())["run"]["id"]


def test_target_score_stops_early():
    assert main(["train", "dqn", *QUICK, "--target-score", "1", "--no-video"]) == 0
    rows = (run_folder() / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["env_step"] == 200
    assert json.loads((run_folder() / "summary.json").read_text())["state"] == "finished"


def test_finished_run_goes_on_with_more_steps(capsys):
    assert main(["train", "dqn", *QUICK, "--no-video"]) == 0
    run = str(run_folder())
    assert "is finished: 400 of 400 steps" in refused(capsys, "resume", run)
    assert main(["resume", run, "--total-steps", "600", "--no-progress"]) == 0
    rows = [json.loads(line) for line in (run_folder() / "metrics.jsonl").read_text().splitlines()]
    assert [row["env_step"] for row in rows] == [100, 200, 300, 400, 500, 600]


def test_same_name_twice_makes_two_runs():
    for _ in range(2):
        assert main(["train", "dqn", *QUICK, "--name", "mine", "--no-video"]) == 0
    assert len(list(Path("results/dqn-CartPole-v1").iterdir())) == 2


def test_seeds_run_in_processes_and_are_summed_up():
    command = [sys.executable, "-m", "foveal.runs", "train", "dqn", *QUICK, "--no-video"]
    done = subprocess.run([*command, "--seeds", "2", "--jobs", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "score over 2 seeds: mean" in done.stdout
    seeds = [json.loads(path.read_text())["seed"] for path in Path("results").glob("*/*/config.json")]
    assert sorted(seeds) == [1, 2]


class OwnEnv(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, size: int = 5):
        self.size = size

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, self.steps == self.size, False, {}


def test_own_environment_and_own_encoder(monkeypatch, capsys):
    module = types.ModuleType("mine")
    module.__dict__["Own"] = MLP
    monkeypatch.setitem(sys.modules, "mine", module)
    gym.register("Own-v0", lambda **kwargs: OwnEnv(**kwargs))
    flags = [*QUICK, "--env-id", "mine:Own-v0", "--env-kwargs", "size=7", "--encoder", "mine:Own"]
    assert main(["train", "dqn", *flags]) == 0
    assert "score: 7.0" in capsys.readouterr().out
    assert main(["evaluate", str(run_folder())]) == 0
    # Somewhere else a file alone imports nothing: its modules must be named by whoever opens it.
    monkeypatch.delitem(sys.modules, "mine")
    assert "--import mine" in refused(capsys, "evaluate", str(run_folder()))
    Path("mine.py").write_text("from foveal.vision import MLP as Own\n")
    assert main(["evaluate", str(run_folder()), "--import", "mine"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "unknown command 'tran'; nearest: train"),
        (["train", "dqnn"], "unknown agent or model 'dqnn'; nearest: dqn"),
        (["train", "dqn", "--env-id", "CartPol-v1"], "CartPole-v1"),
        (["train", "dqn", "--encoder", "natur"], "unknown encoder 'natur'; nearest: nature"),
        (["train", "dqn", "--encoder", "nature"], "NatureCNN takes images"),
        (["train", "dqn", "--env-id", "Pendulum-v1"], "dqn takes Discrete actions; Pendulum-v1 has Box"),
        (["train", "dqn", "--env-id", "nomodule:X-v0"], "nomodule"),
        (["train", "dqn", "--total-steps", "-5"], "total_steps must be 1 or more, got -5"),
        (["train", "dqn", "--total-steps", "0"], "total_steps must be 1 or more, got 0"),
        (["train", "dqn", "--num-envs", "0"], "num_envs must be 1 or more, got 0"),
        (["train", "dqn", "--batch-size", "-1"], "batch_size must be 1 or more, got -1"),
        (["train", "dqn", "--seed", "-1"], "seed must be between"),
        (["train", "dqn", "--env-kwargs", "size"], "env_kwargs takes name=value, got 'size'"),
        (["train", "dqn", "--env-kwargs", "sise=3"], "sise"),
        (["train", "dqn", "--device", "tpu9"], "device must be auto, cpu or a device of this machine"),
        (["train", "dqn", "--init-from", "nowhere"], "no weights file or run at nowhere"),
        (["train", "dqn", "--seeds", "0"], "seeds must be 1 or more, got 0"),
        (["train", "dqn", "--seeds", "2", "--seed", "4294967295"], "seed must be between"),
        (["train", "dqn", "--seeds", "2", "--encoder", "natur"], "unknown encoder 'natur'; nearest: nature"),
        (["train", "dqn", "--buffer-device", "nonsense"], "device must be auto"),
        (["train", "dqn", "--buffer-size", "1000000000000000"], "does not fit into memory"),
        (["train", "dqn", "--checkpoint-every", "10"], "checkpoint_every must be at least log_every (1000)"),
        (["train", "dqn", "--eval-every", "10"], "eval_every must be at least log_every (1000)"),
        (["train", "dqn", "--lerning-rate", "1"], "--learning-rate"),
        (["evaluate", "nowhere"], "no weights file or run at nowhere"),
        (["resume", "nowhere"], "no run at nowhere"),
        (["list", "runs", "--results", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(arguments, message, capsys):
    line = refused(capsys, *arguments)
    assert message in line
    if line.startswith("foveal: "):
        assert "\n" not in line
    assert not os.listdir(".")


def test_wrong_number_of_episodes(trained, capsys):
    assert "episodes must be at least 1, got 0" in refused(
        capsys, "evaluate", str(trained), "--episodes", "0"
    )


def test_folder_that_is_no_run(capsys):
    Path("folder").mkdir()
    assert "folder has no config.json" in refused(capsys, "resume", "folder")
    assert "folder is a folder without weights" in refused(capsys, "evaluate", "folder")


def test_results_that_cannot_be_written(capsys):
    Path("results").write_text("a file where the folder should be")
    assert "results" in refused(capsys, "train", "dqn", *QUICK)
    assert os.listdir(".") == ["results"]


def test_disk_that_fills_up(capsys, monkeypatch):
    """At the start nothing is left; later, what was saved stays and can be gone on from."""
    from foveal.vision import write_weights

    def full(path, tensors, description):
        if "step-" in str(path) and description["env_step"] >= fail_from:
            raise OSError(28, f"cannot write {path}: No space left on device")
        write_weights(path, tensors, description)

    with monkeypatch.context() as patch:
        patch.setattr("foveal.agents.agent.write_weights", full)
        fail_from = 0
        assert "No space left on device" in refused(capsys, "train", "dqn", *QUICK)
        assert not list(Path("results").glob("*/*"))

        fail_from = 400
        err = refused(capsys, "train", "dqn", *QUICK)
    run = run_folder()
    assert f"saved up to step-000000000200; to go on: foveal resume {run}" in err
    assert err.splitlines()[-1].endswith("No space left on device")
    assert json.loads((run / "summary.json").read_text())["state"] == "failed"
    assert main(["resume", str(run), "--no-progress"]) == 0


def test_damaged_checkpoint_names_the_one_before_it(trained, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "checkpoints" / "step-000000000400" / "training.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    line = refused(capsys, "resume", str(run), "--total-steps", "500")
    assert "training.safetensors is not a whole safetensors file" in line
    assert "--checkpoint step-000000000200" in line
    assert file.exists(), "nothing is removed by a refusal"
    flags = ["--total-steps", "500", "--checkpoint", "step-000000000200", "--no-progress"]
    assert main(["resume", str(run), *flags]) == 0


def test_checkpoint_of_another_version(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("foveal.vision.weights.FORMAT", 99)
    assert "has format 1; this foveal reads format 99" in refused(capsys, "evaluate", str(trained))


def test_missing_extra_names_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)  # import then raises ModuleNotFoundError
    assert 'pip install "foveal[atari]"' in refused(capsys, "train", "dqn", "--env-id", "ALE/Pung-v5")

"""A resumed run is the run that was never stopped: weights, metrics, replay, random streams, environments."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import foveal

from foveal.agents import DQN, load, load_checkpoint, newest_first, save_checkpoint
from foveal.agents.dqn import DQNConfig
from foveal.envs import make_vec
from foveal.vision import ENCODERS, MLP
from foveal.vision.weights import read_weights, write_weights

CONFIG = DQNConfig(
    learning_starts=60, train_every=7, gradient_steps=3, batch_size=8, buffer_size=100, target_every=13
)
ENVIRONMENTS = [
    ("CartPole-v1", {"num_envs": 1}),
    ("CartPole-v1", {"num_envs": 4}),
    ("LunarLander-v3", {"num_envs": 2}),
    ("MinAtar/Breakout-v1", {"num_envs": 2}),
    ("ALE/Pong-v5", {"num_envs": 2}),
    ("ALE/Breakout-v5", {"num_envs": 1, "env_kwargs": {"repeat_action_probability": 0.25}}),
]


def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))}


def everything(agent):
    """All tensors and numbers that the next step depends on."""
    tensors, meta = agent.state()
    pieces = {f"{name}/{key}": t for name, read in agent.segments() for key, t in read().items()}
    tensors = {"weights": agent.weights.detach(), **tensors, **pieces}
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(meta))


def assert_same(first, second):
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


@pytest.mark.parametrize(("env_id", "kwargs"), ENVIRONMENTS)
def test_checkpoint_and_go_on_is_bit_for_bit(env_id, kwargs, tmp_path, monkeypatch):
    """Stopped twice, after wrap-around and in the middle of episodes, in fresh agents each time."""
    # A small network, because what is tested is everything else.
    monkeypatch.setitem(ENCODERS, "tiny", partial(MLP, features_dim=4, hidden=()))

    def make():
        return DQN(make_vec(env_id, seed=3, **kwargs), CONFIG, encoder="tiny", seed=3, device="cpu")

    whole = make()
    rows = [timeless(row) for row in whole.training(360, log_every=40)]

    agent, resumed = make(), []
    for stop in (120, 240, 360):
        for row in agent.training(360, log_every=40):
            resumed.append(timeless(row))
            if row["env_step"] >= stop:
                break
        save_checkpoint(agent, tmp_path)
        agent = load(newest_first(tmp_path)[0])
        assert load_checkpoint(newest_first(tmp_path)[0], agent), "not replayed exactly"
    assert resumed == rows
    assert_same(everything(agent), everything(whole))


def test_keeps_two_and_links_what_did_not_change(tmp_path):
    agent = DQN("CartPole-v1", CONFIG, seed=1)
    agent.config = CONFIG
    agent.start()
    assert agent.replay is not None
    agent.replay.segment_bytes = 400  # a few rows a segment
    for _ in agent.training(90, log_every=30):
        save_checkpoint(agent, tmp_path)
    names = [path.name for path in newest_first(tmp_path)]
    assert names == ["step-000000000090", "step-000000000060"]
    new, old = ({f.name: f.stat().st_ino for f in (tmp_path / name).iterdir()} for name in names)
    shared = [name for name in new if name in old and name.startswith("replay-")]
    assert len(shared) >= 4
    assert all(new[name] == old[name] for name in shared), "written again instead of linked"
    assert any(name not in old for name in new)


def test_interrupted_write_leaves_no_checkpoint(tmp_path, monkeypatch):
    agent = DQN("CartPole-v1", CONFIG, seed=1)
    next(iter(agent.training(50, log_every=50)))
    save_checkpoint(agent, tmp_path)

    def fail():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent, "state", fail)
    agent.env_step = 60
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(agent, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000050"]


@pytest.mark.parametrize("victim", ["training.safetensors", "replay-frames"])
def test_checkpoint_cut_short_is_named(victim, tmp_path):
    agent = DQN("CartPole-v1", CONFIG, seed=1)
    next(iter(agent.training(50, log_every=50)))
    checkpoint = save_checkpoint(agent, tmp_path)
    path = next(f for f in checkpoint.iterdir() if f.name.startswith(victim))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=victim):
        load_checkpoint(checkpoint, load(checkpoint))


def test_an_environment_that_does_not_replay_starts_a_new_episode(tmp_path):
    """Told by the digest of its last observation; training goes on with memory and streams restored."""
    agent = DQN("CartPole-v1", CONFIG, seed=1)
    next(iter(agent.training(100, log_every=100)))
    checkpoint = save_checkpoint(agent, tmp_path)
    again: Any = load(checkpoint)
    tensors, description = read_weights(checkpoint / "training.safetensors")
    description["meta"]["env"]["digests"] = ["0" * 64]

    def segment(name):
        return read_weights(checkpoint / f"replay-{name}.safetensors")[0]

    assert again.restore(tensors, description["meta"], segment) is False
    assert len(again.replay) == 100
    assert abs(again.obs).max() <= 0.05, "the first observation of a new episode"
    assert again.learn(50, progress=False).env_step == 150


# The same through the command line, killed from outside.

FLAGS = [
    *("--total-steps", "2400", "--seed", "5", "--eval-every", "500", "--eval-episodes", "2"),
    *("--final-episodes", "2", "--checkpoint-every", "400", "--log-every", "100", "--no-video"),
    *("--learning-starts", "100", "--train-every", "32", "--gradient-steps", "16"),
]


def only_run(results: Path) -> Path:
    (path,) = (folder for folder in results.glob("*/*") if folder.is_dir())
    return path


def rows_of(run: Path):
    return [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path):
    return read_weights(newest_first(run / "checkpoints")[0] / "weights.safetensors")[0]


def wait_for_rows(run_results: Path, count: int, process) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(run_results.glob("*/*/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = foveal("train", "dqn", *FLAGS, "--track", "off", cwd=folder)
    output = process.communicate()
    assert process.returncode == 0, output
    return only_run(folder / "results")


def kill_and_resume(flags, folder: Path, kills: int, rows: int) -> Path:
    """Train by the command line, killed at random rows, each time resumed; the finished run's folder."""
    moments = random.Random(0)
    process = foveal("train", "dqn", *flags, "--track", "off", cwd=folder)
    for _ in range(kills):
        start = len(rows_of(only_run(folder / "results"))) if (folder / "results").exists() else 0
        wait_for_rows(folder / "results", min(start + moments.randint(1, 9), rows - 1), process)
        process.kill()
        process.communicate()
        process = foveal("resume", str(only_run(folder / "results")), cwd=folder)
    output = process.communicate()
    assert process.returncode == 0, output
    return only_run(folder / "results")


def assert_same_run(run: Path, whole: Path) -> None:
    assert rows_of(run) == rows_of(whole)
    first, second = weights_of(whole), weights_of(run)
    assert all(torch.equal(first[name], second[name]) for name in first)
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    assert summary["state"] == "finished"
    assert "resume_mismatch" not in summary
    assert summary["eval/return_mean"] == expected["eval/return_mean"]


def test_kill_9_at_random_moments(uninterrupted, tmp_path):
    """Killed three times at random rows; file and weights end as those of the run that was not."""
    assert_same_run(kill_and_resume(FLAGS, tmp_path, kills=3, rows=24), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["LunarLander-v3", "MinAtar/Breakout-v1", "ALE/Pong-v5"])
def test_kill_9_elsewhere(env_id, tmp_path):
    flags = [*FLAGS, "--env-id", env_id, "--batch-size", "16", "--buffer-size", "1000", "--num-envs", "2"]
    flags += ["--eval-every", "2400", "--eval-episodes", "1", "--final-episodes", "1"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = kill_and_resume(flags, tmp_path / "whole", kills=0, rows=24)
    assert_same_run(kill_and_resume(flags, tmp_path / "killed", kills=4, rows=24), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_save_and_resume_goes_on(number, uninterrupted, tmp_path):
    process = foveal("train", "dqn", *FLAGS, "--track", "off", cwd=tmp_path)
    wait_for_rows(tmp_path / "results", 5, process)
    process.send_signal(number)
    output = process.communicate()
    assert "Traceback" not in output
    assert process.returncode == 130
    assert "to go on: foveal resume results/dqn-CartPole-v1/seed5-" in output
    run = only_run(tmp_path / "results")
    assert json.loads((run / "summary.json").read_text())["state"] == "stopped"
    last = rows_of(run)[-1]["env_step"]
    assert newest_first(run / "checkpoints")[0].name == f"step-{last:012d}", "nothing learned is lost"
    process = foveal("resume", str(run), cwd=tmp_path)
    output = process.communicate()
    assert process.returncode == 0, output
    assert rows_of(run) == rows_of(uninterrupted)


def test_a_run_copied_elsewhere_resumes_there(uninterrupted, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(uninterrupted, copy)
    shutil.rmtree(newest_first(copy / "checkpoints")[0])  # as if killed before the last checkpoint
    process = foveal("resume", str(copy), cwd=tmp_path)
    output = process.communicate()
    assert process.returncode == 0, output
    assert rows_of(copy) == rows_of(uninterrupted)
    assert os.listdir(tmp_path) == ["elsewhere"], "wrote outside of the run folder"


def test_killed_while_it_was_scored_is_scored_by_resume(uninterrupted, tmp_path):
    """All steps are done and saved, but the run is not finished: resume has only the end to do."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    expected = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({"state": "running", "process": {"host": "gone", "pid": 1}}))
    shutil.rmtree(run / "plots")
    (run / "plots").mkdir()
    output = foveal("resume", str(run), cwd=tmp_path).communicate()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished", output
    assert summary["eval/return_mean"] == expected["eval/return_mean"]
    assert (run / "plots" / "learning_curve.png").exists()
    assert rows_of(run) == rows_of(uninterrupted)


def test_other_total_steps_are_remembered_and_the_abandoned_rows_dropped(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").write_text(json.dumps({"state": "stopped"}))
    newest, older = newest_first(run / "checkpoints")
    shutil.rmtree(newest)
    assert older.name == "step-000000002000"
    output = foveal("resume", str(run), "--total-steps", "2200", cwd=tmp_path).communicate()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished", output
    assert "resume_mismatch" not in summary
    rows = rows_of(run)
    assert [row["env_step"] for row in rows] == list(range(100, 2300, 100))
    assert rows[:20] == rows_of(uninterrupted)[:20]
    config = json.loads((run / "config.json").read_text())
    assert config["total_steps"] == config["options"]["total_steps"] == 2200
    assert "is finished: 2,200 of 2,200 steps" in foveal("resume", str(run), cwd=tmp_path).communicate()


def test_sigterm_to_several_seeds_reaches_each(tmp_path):
    flags = [*FLAGS, "--track", "off", "--no-progress", "--total-steps", "200000"]
    process = foveal("train", "dqn", *flags, "--seeds", "2", "--jobs", "2", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list((tmp_path / "results").glob("*/*/metrics.jsonl"))
        if len(files) == 2 and all(file.stat().st_size for file in files):
            break
        time.sleep(0.05)
    process.terminate()
    output = process.communicate()
    assert process.returncode == 130, output
    states = [json.loads(p.read_text())["state"] for p in (tmp_path / "results").glob("*/*/summary.json")]
    assert states == ["stopped", "stopped"], output


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda d: d["options"].pop("tags")),
        ("config.json", lambda d: d["options"].update(unheard_of=1)),
        ("config.json", lambda d: d["options"].update(total_steps="many")),
        ("config.json", lambda d: d.update(options=[])),
        ("config.json", lambda d: d.pop("options")),
    ],
)
def test_damaged_config_is_one_line(file, damage, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    config = json.loads((run / file).read_text())
    damage(config)
    (run / file).write_text(json.dumps(config))
    process = foveal("resume", str(run), cwd=tmp_path)
    output = process.communicate()
    assert process.returncode == 2
    assert "config.json has no options of a training of this version" in output
    assert len(output.strip().splitlines()) == 1


def test_checkpoint_of_another_agent_is_refused(tmp_path):
    agent = DQN("CartPole-v1", CONFIG, seed=1)
    next(iter(agent.training(50, log_every=50)))
    checkpoint = save_checkpoint(agent, tmp_path)
    tensors, description = read_weights(checkpoint / "training.safetensors")
    description.pop("format")
    write_weights(checkpoint / "training.safetensors", {**tensors, "adam.mean": torch.ones(3)}, description)
    with pytest.raises(ValueError, match="does not continue a dqn of this version"):
        load_checkpoint(checkpoint, load(checkpoint))
    description["meta"].pop("acting_rng")
    write_weights(checkpoint / "training.safetensors", tensors, description)
    with pytest.raises(ValueError, match="acting_rng"):
        load_checkpoint(checkpoint, load(checkpoint))

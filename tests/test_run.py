"""The run folder: what is in it, what survives a crash, what a resume does, what bad input leaves behind."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveal.runs import origin
from foveal.runs.run import Run, create_run, list_runs, open_run, resume_run


def start(results: Path, **arguments) -> Run:
    config = {"agent": "dqn", "env_id": "CartPole-v1", "seed": 1}
    return create_run(
        results, **({"group": "g", "name": "dqn", "config": config, "track": "off"} | arguments)
    )


def lines(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def fill(run: Run, steps: range, shift: float = 0.0) -> None:
    for step in steps:
        run.log({"env_step": step, "train/loss": 1 / (step + 1) + shift, "time/now": random.random()})


def test_a_row_is_written_as_json_dumps_writes_it(tmp_path):
    run = start(tmp_path)
    values: list[Any] = [
        0,
        -7,
        2**70,
        0.1,
        -0.0,
        1e22,
        5e-324,
        1 / 3,
        float("nan"),
        float("inf"),
        -float("inf"),
    ]
    values += [True, False, "text", 'a "quote", a \\ and é\n', "\u2028"]
    row = {"env_step": 3} | {f'train/é "{number}"': value for number, value in enumerate(values)}
    scalars = {
        "a": np.float64(0.1),
        "b": np.float32(0.1),
        "c": np.int64(5),
        "d": torch.tensor(0.25),
        "e": np.True_,
    }
    given = row | scalars
    run.log(given)
    assert given["c"] is scalars["c"]  # the caller's row stays as it is
    run.finish("finished")
    plain = row | {"a": 0.1, "b": float(np.float32(0.1)), "c": 5, "d": 0.25, "e": True}
    assert (run.path / "metrics.jsonl").read_text() == json.dumps(plain) + "\n"


def test_the_folder_says_what_ran(tmp_path):
    run = start(tmp_path, group="ALE/Pong-v5", name="my dqn", tags=["a"], job_type="benchmark")
    run.finish("finished")
    assert run.path == tmp_path / "ALE-Pong-v5" / f"my-dqn-{run.id}"
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoints", "videos", "plots"} == {
        path.name for path in run.path.iterdir()
    }
    config = json.loads((run.path / "config.json").read_text())
    assert (config["agent"], config["env_id"], config["seed"]) == ("dqn", "CartPole-v1", 1)
    assert (config["run"]["group"], config["run"]["name"]) == ("ALE/Pong-v5", "my dqn")
    assert (config["run"]["tags"], config["run"]["job_type"]) == (["a"], "benchmark")
    assert config["versions"]["torch"] == torch.__version__
    assert all(config["versions"][name] for name in ("foveal", "python", "gymnasium", "wandb", "numpy"))
    assert json.loads((run.path / "summary.json").read_text()) == {"state": "finished"}


def test_parents_are_known_by_content(tmp_path):
    parent = start(tmp_path)
    weights = parent.path / "checkpoints" / "weights.safetensors"
    weights.write_bytes(b"abc")
    child = start(tmp_path, parents=[weights])
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert child.config["run"]["parents"] == [
        {"file": "weights.safetensors", "sha256": digest, "run": parent.id}
    ]


def test_no_training_generator_is_touched(tmp_path):
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state())  # noqa: NPY002
    run = start(tmp_path)
    run.log({"env_step": 1})
    run.finish("finished")
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_git_commit_and_dirt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert origin.git_commit(Path.cwd()) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], check=True)
    git = origin.git_commit(Path.cwd())
    assert git is not None
    assert len(git["commit"]) == 40
    assert git["dirty"] is False
    Path("file").write_text("x")
    subprocess.run(["git", "add", "file"], check=True)
    assert origin.git_commit(Path.cwd()) == git | {"dirty": True}


def test_a_row_is_in_the_file_when_log_returns(tmp_path):
    run = start(tmp_path)
    row = {"env_step": np.int64(3), "a": np.float32(0.5), "b": torch.tensor(2.5), "c": True, "d": "x"}
    run.log(row)
    assert lines(run) == [{"env_step": 3, "a": 0.5, "b": 2.5, "c": True, "d": "x"}]
    run.log({"epoch": 1, "test/nats": float("nan"), "x": float("-inf")})
    read = run.rows()[1]
    assert np.isnan(read["test/nats"])
    assert read["x"] == -np.inf


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "env_step, grad_step, epoch"),
        ({"env_step": 1.5}, ValueError, "env_step: got 1.5"),
        ({"env_step": True}, ValueError, "env_step: got True"),
        ({"env_step": 1, "x": None}, TypeError, "x: got NoneType"),
        ({"env_step": 1, "x": [1]}, TypeError, "x: got list"),
        ({"env_step": 1, "x": np.zeros(2)}, TypeError, "x: got ndarray"),
        ({"env_step": 1, "x": torch.zeros(2)}, TypeError, "x: got Tensor"),
    ],
)
def test_bad_rows_are_refused_and_not_written(tmp_path, row, error, message):
    run = start(tmp_path)
    with pytest.raises(error, match=message):
        run.log(row)
    assert lines(run) == []


def test_a_disk_that_fills_up_leaves_whole_rows(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.log({"env_step": 1})
    write = os.write

    def half(fd, data):
        if len(data) > 8:
            return write(fd, data[:8])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        run.log({"env_step": 2})
    monkeypatch.undo()
    run.log({"env_step": 3})
    assert lines(run) == [{"env_step": 1}, {"env_step": 3}]


def test_summary_is_merged_and_replaced_in_one_step(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.summarize({"eval/return_mean": np.float64(3), "wall_s": 1})
    run.summarize({"wall_s": 2})
    on_disk = json.loads((run.path / "summary.json").read_text())
    assert on_disk["eval/return_mean"] == 3
    assert on_disk["wall_s"] == 2

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*summary.json"):
        run.summarize({"wall_s": 3})
    assert json.loads((run.path / "summary.json").read_text()) == on_disk
    assert run.summary["wall_s"] == 2
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_results_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/file/.*: Not a directory"):
        start(tmp_path / "file")
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/file/.*: Not a directory"):
        start(tmp_path / "file" / "results")
    assert (tmp_path / "file").read_text() == "mine"

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/there/.*: No space left on device"):
        start(tmp_path / "there" / "deep" / "results")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_results_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="Permission denied"):
        start(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"track": "of"}, "track: got 'of'"),
        ({"track": "online"}, "WANDB_API_KEY"),
        ({"group": "../.."}, "group: got"),
        ({"name": ""}, "name: got ''"),
        ({"config": {"run": 1}}, "config: the keys run"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "results", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tail", [b'{"env_step": 5, "tra', b'{"env_step": 5}', b"\0\0\0\0\n"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    run = start(tmp_path)
    fill(run, range(5))
    run.finish("stopped")
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(whole + tail)
    assert len(open_run(run.path).rows()) == 5
    assert (run.path / "metrics.jsonl").read_bytes() == whole + tail  # looking changes nothing
    run = resume_run(run.path)
    assert (run.path / "metrics.jsonl").read_bytes() == whole
    fill(run, range(5, 7))
    assert [row["env_step"] for row in lines(run)] == list(range(7))


def test_a_line_torn_in_the_middle_is_named(tmp_path):
    run = start(tmp_path)
    (run.path / "metrics.jsonl").write_bytes(b'{"env_step": 1}\n{"env_s\n{"env_step": 3}\n')
    run.finish("stopped")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged at line 2"):
        resume_run(run.path)


def test_rows_that_come_again_are_compared_and_not_appended(tmp_path):
    run = start(tmp_path)
    fill(run, range(10))
    run.log({"env_step": 10, "x": float("nan"), "speed/env_steps_per_s": 1.0})
    run.finish("stopped")
    before = (run.path / "metrics.jsonl").read_bytes()
    run = resume_run(run.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(run, range(4, 10))
        run.log({"env_step": 10, "x": float("nan"), "speed/env_steps_per_s": 2.0})
        assert (run.path / "metrics.jsonl").read_bytes() == before
        run.log({"env_step": 10, "eval/return_mean": 1.0})  # killed before this one was written
        fill(run, range(11, 13))
    assert [row["env_step"] for row in lines(run)] == [*range(11), 10, 11, 12]
    assert "resume_mismatch" not in run.summary


def test_rows_of_one_step_are_told_apart(tmp_path):
    run = start(tmp_path)
    for step in (1, 2):
        run.log({"env_step": step, "train/loss": 0.5})
        run.log({"env_step": step, "eval/return_mean": 1.0})
    run.finish("stopped")
    run = resume_run(run.path)
    run.log({"env_step": 1, "eval/return_mean": 1.0})
    run.log({"env_step": 2, "train/loss": 0.5})
    with pytest.warns(UserWarning, match=r"eval/return_mean at env_step 2 was 1.0, and is now 2.0"):
        run.log({"env_step": 2, "eval/return_mean": 2.0})
    assert len(lines(run)) == 4


def test_a_difference_is_reported_once_and_counted(tmp_path):
    run = start(tmp_path)
    fill(run, range(10))
    run.finish("stopped")
    before = lines(run)
    run = resume_run(run.path)
    with pytest.warns(UserWarning, match=r"train/loss at env_step 5 was 0.16666666666666666, and is") as seen:
        fill(run, range(5, 12), shift=0.25)
    run.log({"env_step": 8, "other": 1})  # a kind of row that the file does not have there
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert lines(run)[:10] == before
    assert [row["env_step"] for row in lines(run)] == list(range(12))
    run.finish("finished")
    assert json.loads((run.path / "summary.json").read_text())["resume_mismatch"] == 6


def test_a_moved_folder_opens_and_resumes(tmp_path):
    run = start(tmp_path / "here")
    fill(run, range(3))
    run.finish("stopped")
    (run.path / "checkpoints" / "last").mkdir()
    moved = tmp_path / "there"
    shutil.copytree(run.path, moved)
    shutil.rmtree(tmp_path / "here")
    assert open_run(moved / "checkpoints" / "last").id == run.id
    resumed = resume_run(moved)
    fill(resumed, range(2, 5))
    assert [row["env_step"] for row in lines(resumed)] == list(range(5))


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run at .*nowhere"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a run folder: .* has no config.json and no metrics.jsonl"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        open_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"config.json is not that of a run"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text('{"run": ')
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        open_run(tmp_path)


def test_states(tmp_path):
    run = start(tmp_path)
    with pytest.raises(ValueError, match="state: got 'done'"):
        run.finish("done")
    run.finish("failed")
    run.finish("finished")  # the first one counts
    assert run.summary == {"state": "failed"}
    with pytest.raises(RuntimeError, match="is not on"):
        run.log({"env_step": 1})


def test_running_and_killed_are_told_apart(tmp_path):
    run = start(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        process = origin.process_of(other.pid)
        run.summarize({"process": process})
        assert list_runs(tmp_path)[0]["state"] == "running"
        with pytest.raises(ValueError, match=f"still running, as process {other.pid}"):
            resume_run(run.path)
        if process["start"]:
            # The number again, of a process that started at another time.
            run.summarize({"process": process | {"start": process["start"] - 1}})
            assert list_runs(tmp_path)[0]["state"] == "killed"
    finally:
        other.communicate(b"\n")
    run.summarize({"process": process})
    assert list_runs(tmp_path)[0]["state"] == "killed"
    run.summarize({"process": process | {"host": "elsewhere"}})
    assert list_runs(tmp_path)[0]["state"] == "running"  # who knows
    resume_run(run.path).finish("finished")
    assert list_runs(tmp_path)[0]["state"] == "finished"


def test_list_runs_names_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        list_runs(tmp_path / "nothing")
    run = start(tmp_path)
    run.log({"env_step": 10, "grad_step": 3})
    run.log({"env_step": 20, "grad_step": 8})
    run.summarize({"eval/return_mean": 490.5, "wall_s": 12.0})
    run.finish("finished")
    broken = start(tmp_path, name="broken")
    broken.finish("finished")
    (broken.path / "config.json").write_text("{")
    entries = {entry["state"]: entry for entry in list_runs(tmp_path)}
    assert entries["damaged"]["path"] == broken.path
    assert "config.json is damaged" in entries["damaged"]["error"]
    assert entries["finished"] == {
        "path": run.path,
        "group": "g",
        "name": "dqn",
        "started": run.config["run"]["started"],
        "agent": "dqn",
        "env_id": "CartPole-v1",
        "seed": 1,
        "state": "finished",
        "env_step": 20,
        "grad_step": 8,
        "epoch": None,
        "score": 490.5,
        "test_error": None,
        "fid": None,
        "bits_per_dim": None,
        "nats": None,
        "wall_s": 12.0,
    }


def test_the_digest_of_a_folder_follows_names_and_contents(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_text("1")
    first = origin.sha256(tmp_path / "a")
    (tmp_path / "a" / "b" / "x").write_text("2")
    second = origin.sha256(tmp_path / "a")
    (tmp_path / "a" / "b" / "x").rename(tmp_path / "a" / "b" / "y")
    assert len({first, second, origin.sha256(tmp_path / "a")}) == 3


def test_tracking_off_never_imports_wandb(tmp_path):
    code = (
        "import sys; from foveal.runs.run import create_run, resume_run\n"
        f"run = create_run({str(tmp_path)!r}, group='g', name='n', config={{}}, track='off')\n"
        "run.log({'env_step': 1}); run.artifact('a', 'model', run.path / 'config.json', {})\n"
        "run.image('x', 'no.png', env_step=1); run.finish('finished')\n"
        "run = resume_run(run.path); run.finish('finished')\n"
        "assert 'wandb' not in sys.modules and not (run.path / 'wandb').exists()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_chosen_checkpoint_is_the_longest_trained_of_the_best(tmp_path, monkeypatch):
    """Of those at most a standard error of the best below it, whatever comes later; also after a resume."""
    from foveal.agents import A2C, load
    from foveal.runs import train as training

    # Mean and deviation of 4 episodes: half the deviation is the standard error.
    scores = [(10.0, 4.0), (20.0, 4.0), (17.9, 0.0), (18.5, 40.0), (17.5, 40.0), (17.0, 0.0)]
    row = {"eval/episodes": 4, "eval/length_mean": 1.0, "eval/return_ci95": [0.0, 0.0], "eval/returns": []}
    calls: list[int] = []

    def evaluate(agent, episodes, seed=None):
        if seed is None:  # the final score
            return {**row, "eval/return_mean": 0.0, "eval/return_std": 0.0}
        calls.append(agent.env_step)
        mean, std = scores[agent.env_step // 40 - 1]
        return {**row, "eval/return_mean": mean, "eval/return_std": std}

    monkeypatch.setattr(training, "evaluate", evaluate)
    options = training.Options(
        results=tmp_path, total_steps=240, eval_every=40, log_every=40, checkpoint_every=120,
        video=False, track="off", progress=False, device="cpu", final_episodes=1,
    )  # fmt: skip
    run = training.train("a2c", options, A2C.recipe("CartPole-v1"))
    assert calls == [40, 80, 120, 160, 200, 240]
    best = run.path / "checkpoints" / "best" / "weights.safetensors"
    assert load(best).env_step == 160
    # From step 120 on: what was best before is known from the rows.
    shutil.rmtree(run.path / "checkpoints" / "step-000000000240")
    calls.clear()
    again = training.resume(run.path, None, None, progress=False)
    assert calls == [160, 200, 240]
    assert again.summary["eval/env_step"] == load(best).env_step == 160

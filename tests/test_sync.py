"""What arrives at a W&B server, the tests' own: each row once, whatever was killed or sent twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import Server, wandb_server

from foveal.runs.run import create_run, open_run, resume_run
from foveal.runs.sync import Sync, sync_command

PNG = Path(__file__).parent.parent / "runs" / "benchmarks" / "measured" / "learning_curve.png"

# A run that goes on to the row `last`, and then waits to be killed, or finishes.
TRAIN = """
import os, signal, sys, time
from foveal.runs.run import create_run, resume_run
folder, last, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kill"
if os.path.exists(os.path.join(folder, "config.json")):
    run = resume_run(folder)
else:
    run = create_run(folder, group="g", name="n", config={"agent": "dqn", "env_id": "x"}, track="online")
if kill:
    print(run.path, flush=True)
    sys.stdin.readline()
for step in range(run._rows, last):
    run.log({"env_step": step, "grad_step": 2 * step, "train/loss": 1 / (step + 1)})
if kill:
    print("logged", flush=True)
    time.sleep(1000)
run.summarize({"eval/return_mean": 7.5, "wall_s": 1.0})
run.finish("finished")
"""
SYNC = "import sys; from pathlib import Path; from foveal.runs.sync import Sync, sync_command;"
SYNC += "sync_command(Sync(tuple(map(Path, sys.argv[1:]))))"


@pytest.fixture
def server():
    with wandb_server() as server:
        yield server


def python(code: str, server: Server, *arguments: object) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | server.environment,
        start_new_session=True,
    )


def train_and_kill(server: Server, folder: str | Path, last: int, arrived: int) -> str:
    """Kill the run, W&B's process with it, once it has logged `last` rows and the server has `arrived`; with
    none it gets none of this start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(folder), str(last), "kill"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | server.environment,
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        path = child.stdout.readline().strip()
        if not arrived:
            server.away.set()
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "logged\n"
        deadline = time.monotonic() + 60
        while len(server.runs[open_run(path).id]["history"]) < arrived:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        service = subprocess.check_output(["pgrep", "-P", str(child.pid)], text=True).split()
        for pid in (child.pid, *map(int, service)):
            os.kill(pid, signal.SIGKILL)
    server.away.clear()
    return path


def offline_run(results: Path):
    run = create_run(results, group="g", name="n", config={"agent": "dqn", "env_id": "x"})
    for step in range(5):
        run.log({"env_step": step, "train/loss": 1 / (step + 1)})
    shutil.copy(PNG, run.path / "plots" / "curve.png")
    run.image("plots/curve", run.path / "plots" / "curve.png", env_step=4)
    (run.path / "checkpoints" / "w.safetensors").write_bytes(b"weights")
    run.artifact("agent", "model", run.path / "checkpoints" / "w.safetensors", {"env_step": 4})
    run.summarize({"eval/return_mean": 3.0})
    run.finish("stopped")
    return run


def declared(server: Server, run: str) -> dict[str, str]:
    """Metrics or their family -> the metric that they are drawn against."""
    metrics = server.runs[run]["config"]["_wandb"]["value"]["m"]
    axes = [metric.get("1") or metric.get("2") for metric in metrics]
    return {metric.get("1") or metric.get("2"): axes[metric["5"] - 1] for metric in metrics if "5" in metric}


def test_an_online_run_killed_and_resumed_three_times_arrives_whole(server, tmp_path):
    path: str | Path = tmp_path
    # The server has some rows of two starts, or nothing would show that none of them comes twice.
    for last, arrived in ((10, 1), (20, 11), (30, 0)):
        path = train_and_kill(server, path, last, arrived)
    name = open_run(path).id
    assert len(open_run(path).rows()) == 30
    assert 11 <= len(server.runs[name]["history"]) < 30  # or nothing would show that the rest comes
    done = python(TRAIN, server, path, 40, "finish")
    assert (done.returncode, done.stderr) == (0, "")
    run = server.runs[name]
    assert server.rows(name) == open_run(path).rows()
    assert [row["_step"] for row in run["history"].values()] == list(range(40))
    assert run["overwritten"] == []
    assert run["summary"]["train/loss"] == {"min": 1 / 40, "last": 1 / 40}
    assert run["summary"]["eval/return_mean"] == {"max": 7.5, "last": 7.5}
    assert (run["groupName"], run["displayName"], run["jobType"]) == ("g", "n", "train")
    assert declared(server, name) == {"train/*": "env_step", "train/loss": "env_step"}
    assert run["config"]["env_id"]["value"] == "x"


def test_an_offline_run_is_sent_once_wherever_its_folder_lies(server, tmp_path):
    run = offline_run(tmp_path / "results")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "results", moved)
    done = python(SYNC, server, moved)
    assert done.stderr == ""
    assert re.fullmatch(
        r"sent: .*/g/n-\w+ \(5 rows that the server lacked\)\n1 runs sent, 0 were.*\n", done.stdout
    )
    there = server.runs[run.id]
    assert server.rows(run.id) == open_run(moved / "g" / run.path.name).rows()
    assert [row["_step"] for row in there["history"].values()] == list(range(6))  # with the picture
    assert there["summary"]["eval/return_mean"] == {"max": 3.0, "last": 3.0}
    assert there["summary"]["train/loss"] == {"min": 0.2, "last": 0.2}
    (picture,) = (data for path, data in server.files.items() if "/media/images/" in path)
    assert picture == PNG.read_bytes()
    (artifact,) = server.artifacts
    assert f"agent-{run.id}" in json.dumps(artifact)
    assert server.files["/up/a1/w.safetensors"] == b"weights"
    assert declared(server, run.id)["train/*"] == "env_step"

    before = json.dumps(server.runs), list(server.asked)
    assert python(SYNC, server, moved / "g").stdout == "0 runs sent, 1 were there already\n"
    mark = moved / "g" / run.path.name / "wandb" / "sent.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"rows": 0}))  # the rows only the server knows
    assert "(0 rows that the server lacked)" in python(SYNC, server, moved / "g" / run.path.name).stdout
    assert len(server.artifacts) == 1
    assert server.runs[run.id]["history"] == json.loads(before[0], object_hook=int_keys)[run.id]["history"]
    assert server.runs[run.id]["overwritten"] == []


def int_keys(thing: dict) -> dict:
    return {int(key) if key.isdigit() else key: value for key, value in thing.items()}


@pytest.mark.slow
def test_what_wandb_sync_sent_is_not_sent_again(server, tmp_path):
    run = offline_run(tmp_path)
    tool = "from wandb.cli.cli import cli; cli()"
    done = python(tool, server, "sync", *run.path.glob("wandb/offline-run-*"))
    assert done.returncode == 0, done.stderr
    assert server.rows(run.id) == run.rows()
    assert "(0 rows that the server lacked)" in python(SYNC, server, tmp_path).stdout
    assert len(server.runs[run.id]["history"]) == 6
    assert server.runs[run.id]["overwritten"] == []


# An online run that says when it has begun, and goes on when it is told to.
LOSE = """
import sys
from foveal.runs import tracking
from foveal.runs.run import create_run
tracking.SEND_S = 1
run = create_run(sys.argv[1], group="g", name="n", config={"agent": "dqn", "env_id": "x"}, track="online")
for step in range(5):
    run.log({"env_step": step, "train/loss": 1 / (step + 1)})
print(run.path, flush=True)
sys.stdin.readline()
for step in range(5, 10):
    run.log({"env_step": step, "train/loss": 1 / (step + 1)})
run.image("plots/curve", sys.argv[2], env_step=9)
run.summarize({"eval/return_mean": 2.0})
run.finish("finished")
"""


def test_a_server_lost_in_the_middle_gets_everything_later(server, tmp_path, monkeypatch, capsys):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    with subprocess.Popen(
        [sys.executable, "-c", LOSE, str(tmp_path), str(PNG)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | server.environment,
    ) as child:
        assert child.stdout is not None
        path = Path(child.stdout.readline().strip())
        run = open_run(path)
        deadline = time.monotonic() + 60
        while not server.runs[run.id]["history"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.away.set()
        _, errors = child.communicate("\n", timeout=100)
    assert child.returncode == 0, errors
    line = f"W&B has not all of this run (Timed out finishing run): it is kept whole in {path}; send the rest"
    assert [line in said for said in errors.splitlines() if "W&B" in said] == [True]
    assert f"with `foveal sync {path}`" in errors
    run = open_run(path)
    assert [row["env_step"] for row in run.rows()] == list(range(10))
    assert run.summary == {"state": "finished", "eval/return_mean": 2.0}
    assert len(server.runs[run.id]["history"]) <= 5

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match="does not answer"):
        sync_command(Sync((tmp_path,)))
    with pytest.warns(UserWarning, match=r"does not answer .*The run goes on offline"):
        again = resume_run(path)
    assert again.track == "offline"
    for step in range(8, 12):  # two of them again, as after a checkpoint
        again.log({"env_step": step, "train/loss": 1 / (step + 1)})
    again.finish("finished")
    server.away.clear()
    assert sync_command(Sync((tmp_path,))) == 0
    assert sync_command(Sync((tmp_path,))) == 0
    assert "1 runs sent, 0 were there already\n0 runs sent, 1 were there already\n" in capsys.readouterr().out
    there = server.runs[run.id]
    assert server.rows(run.id) == open_run(path).rows()
    assert [row["env_step"] for row in server.rows(run.id)] == list(range(12))
    assert [row["_step"] for row in there["history"].values()] == list(range(13))  # with the picture
    assert there["overwritten"] == []
    assert there["summary"]["train/loss"] == {"min": 1 / 12, "last": 1 / 12}
    assert there["summary"]["eval/return_mean"] == {"max": 2.0, "last": 2.0}
    assert declared(server, run.id)["train/*"] == "env_step"
    assert sum("/media/images/" in name for name in server.files) == 1


def test_a_server_that_does_not_answer(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no runs at"):
        sync_command(Sync((tmp_path / "no",)))
    run = offline_run(tmp_path / "results")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    line = r"W&B's server http://127.0.0.1:9 does not answer \(.*refused.*\): nothing was sent, all rows"
    with pytest.raises(ConnectionError, match=line):
        sync_command(Sync((tmp_path / "results",)))
    assert not (run.path / "wandb" / "sent.json").exists()
    with pytest.raises(ConnectionError, match="train with --track offline"):
        create_run(tmp_path / "online", group="g", name="n", config={}, track="online")
    assert not (tmp_path / "online").exists()

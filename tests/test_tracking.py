"""W&B holds what metrics.jsonl holds: each row once, through kills and resumes, against its axis, offline."""

import ast
import inspect
import json
import os
import queue
import re
import signal
import struct
import time
import types
import zlib
from pathlib import Path

import pytest
from forks import python

from foveal.runs import tracking, wandb_file
from foveal.runs.origin import sha256
from foveal.runs.run import Run, create_run, open_run, resume_run
from foveal.runs.wandb_file import items, read_payloads, read_records, read_rows


def fragments(run: Run) -> list[Path]:
    """The W&B files of a run, one a start, oldest first."""
    return sorted(run.path.glob("wandb/*run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def sent(run: Run) -> list[dict]:
    """The rows in a run's W&B files, media aside."""
    rows = [row for file in fragments(run) for row in read_rows(file)]
    return [row for row in rows if not any(isinstance(value, dict) for value in row.values())]


def records(file: Path, kind: str) -> list:
    return [
        getattr(record, kind) for record in read_records(file) if record.WhichOneof("record_type") == kind
    ]


def last_summary(file: Path) -> dict:
    summary: dict = {}
    for record in records(file, "summary"):
        summary |= items(record.update)
    return summary


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Run:
    """A run that was tracked offline, finished, lost half its W&B file, and was resumed."""
    run = create_run(
        tmp_path_factory.mktemp("results"),
        group="group",
        name="name",
        config={"agent": "dqn", "env_id": "CartPole-v1"},
        tags=["dqn"],
    )
    for step in range(0, 40, 10):
        run.log({"env_step": step, "grad_step": step // 2, "train/loss": 1 / (step + 1), "train/note": "x"})
        run.log({"env_step": step, "eval/return_mean": float(100 - step)})
    (run.path / "plots" / "curve.png").write_bytes(_png())
    (run.path / "videos" / "policy.mp4").write_bytes(b"frames")
    run.image("plots/curve", run.path / "plots" / "curve.png", env_step=30)
    run.video("eval/video", run.path / "videos" / "policy.mp4", env_step=30)
    (run.path / "checkpoints" / "best").mkdir()
    (run.path / "checkpoints" / "best" / "weights.safetensors").write_bytes(b"weights")
    run.artifact("checkpoint", "model", run.path / "checkpoints" / "best", {"env_step": 30})
    run.finish("stopped")

    again = resume_run(run.path)
    again.log({"env_step": 30, "eval/return_mean": 70.0})
    again.image("plots/curve", run.path / "plots" / "curve.png", env_step=30)
    again.log({"env_step": 40, "grad_step": 20, "train/loss": 0.5, "train/note": "y"})
    again.summarize({"eval/return_mean": 65.0, "wall_s": 2.0})
    again.finish("finished")
    return run


def _png() -> bytes:
    """One grey pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0\x80"))
        + chunk(b"IEND", b"")
    )


def test_wandb_has_the_rows_of_metrics_jsonl_each_once(tracked):
    assert len(fragments(tracked)) == 2
    assert sent(tracked) == tracked.rows()
    assert len(list(read_rows(fragments(tracked)[1]))) == 1  # nothing of the first start came again


def test_the_run_can_be_found_in_a_dashboard(tracked):
    for file in fragments(tracked):
        run = records(file, "run")[0]
        assert (run.run_id, run.display_name, run.run_group) == (tracked.id, "name", "group")
        assert (run.project, run.job_type, list(run.tags)) == ("foveal", "train", ["dqn"])
        config = items(run.config.update)
        assert config["env_id"] == "CartPole-v1"
        assert config["versions"] == tracked.config["versions"]


def test_metrics_are_declared_against_their_axis(tracked):
    declared = {
        metric.glob_name or metric.name: metric for metric in records(fragments(tracked)[0], "metric")
    }
    assert {name for name, metric in declared.items() if not metric.step_metric} == {"env_step", "grad_step"}
    assert {name for name, metric in declared.items() if metric.step_metric == "env_step"} >= {
        "train/*",
        "eval/*",
        "plots/*",
    }
    assert (declared["train/loss"].summary.min, declared["train/loss"].summary.last) == (True, True)
    best = declared["eval/return_mean"].summary
    assert (best.max, best.min, best.last) == (True, False, True)


def test_the_summary_is_that_of_the_whole_run(tracked):
    summary = last_summary(fragments(tracked)[1])
    assert summary["train/loss"] == {"min": 1 / 31, "last": 0.5}
    assert summary["eval/return_mean"] == {"max": 100.0, "last": 65.0}
    assert (summary["env_step"], summary["train/note"]) == (40, "y")
    assert (summary["wall_s"], summary["state"]) == (2.0, "finished")


def test_media_and_artifacts(tracked):
    rows = list(read_rows(fragments(tracked)[0]))[-2:]
    assert rows[0]["plots/curve"]["_type"] == "image-file"
    assert rows[1]["eval/video"]["_type"] == "video-file"
    assert rows[1]["env_step"] == 30
    files = fragments(tracked)[0].parent / "files"
    assert (files / rows[1]["eval/video"]["path"]).read_bytes() == b"frames"
    (artifact,) = records(fragments(tracked)[0], "artifact")
    assert (artifact.name, artifact.type) == (f"checkpoint-{tracked.id}", "model")
    assert json.loads(artifact.metadata) == {
        "env_step": 30,
        "sha256": sha256(tracked.path / "checkpoints" / "best"),
    }
    (entry,) = artifact.manifest.contents
    assert entry.path == "weights.safetensors"
    assert Path(entry.local_path).is_relative_to(tracked.path)  # not in the home folder


def test_nothing_lies_outside_the_folder_and_no_link_dangles(tracked):
    assert not list(Path.home().rglob("*wandb*"))
    assert not [path for path in tracked.path.rglob("*") if path.is_symlink()]
    assert not {name for name in os.environ if name.startswith("WANDB_")} - {"WANDB_SERVICE"}


def test_a_step_is_never_passed():
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(tracking))) if isinstance(node, ast.Call)]
    logs = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "log"]
    assert logs
    assert not [keyword for call in logs for keyword in call.keywords if keyword.arg == "step"]


CHILD = """
import sys, time
from foveal.runs.run import create_run, resume_run
if len(sys.argv) > 2:
    run = resume_run(sys.argv[2])
else:
    run = create_run(sys.argv[1], group="g", name="n", config={})
print(run.path, flush=True)
for step in range(run._rows, 10**6):
    run.log({"env_step": step, "train/loss": step / 7})
    time.sleep(0.05)
"""


def _environment() -> dict[str, str]:
    # A child that found the W&B service of this process would share it, and its death would not be one.
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def test_kill_9_loses_no_row_and_nothing_comes_twice(tmp_path):
    arguments = [str(tmp_path)]
    run = None
    for _ in range(2):
        child = python(CHILD, *arguments, cwd=tmp_path, env=_environment())
        while "\n" not in child.output:
            assert child.poll() is None, child.output
            time.sleep(0.01)
        path = child.output.splitlines()[0]
        rows = len(open_run(path).rows())
        # By default, W&B would write nothing for 15 seconds, or until 32 KiB have come together.
        while len(sent(open_run(path))) < rows + 10:
            assert len(open_run(path).rows()) < rows + 60
            time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        run = open_run(path)
        on_disk = [row["env_step"] for row in run.rows()]
        assert on_disk == list(range(len(on_disk)))
        kept = [row["env_step"] for row in sent(run)]
        assert kept == list(range(len(kept)))  # a prefix, no row twice
        assert rows + 10 <= len(kept) <= len(on_disk)
        arguments = [str(tmp_path), path]
    assert run is not None
    resumed = resume_run(run.path)
    resumed.finish("finished")
    assert len(fragments(run)) == 3
    assert sent(run) == run.rows()


def test_w_and_b_may_die_and_the_run_goes_on(tmp_path):
    code = """
import os, signal, subprocess, sys, time, warnings
from foveal.runs.run import create_run, resume_run
run = create_run(sys.argv[1], group="g", name="n", config={})
run.log({"env_step": 0, "x": 1.5})
for pid in map(int, subprocess.check_output(["pgrep", "-P", str(os.getpid())]).split()):
    if b"wandb-core" in open(f"/proc/{pid}/cmdline", "rb").read():
        os.kill(pid, signal.SIGKILL)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for step in range(1, 50):
        run.log({"env_step": step, "x": 1.5})
        time.sleep(0.002)
    run.finish("finished")
print(*(warning.message for warning in seen), sep=chr(10))
run = resume_run(run.path)
run.log({"env_step": 50, "x": 1.5})
run.finish("finished")
"""
    child = python(code, str(tmp_path), cwd=tmp_path, env=_environment())
    output = child.communicate()
    assert child.returncode == 0, output
    (path,) = tmp_path.glob("g/*")
    at_once, at_the_end = output.splitlines()  # neither W&B's words nor a traceback at the end
    assert re.fullmatch("W&B failed: .*\\. The run goes on without it", at_once)
    assert f": it is kept whole in {path}; send the rest with `foveal sync {path}`" in at_the_end
    run = open_run(path)
    assert [row["env_step"] for row in run.rows()] == list(range(51))
    assert sent(run) == run.rows()


def test_the_setting_that_keeps_rows_is_there():
    import wandb

    assert wandb.Settings(x_transaction_log_flush_interval=1).x_transaction_log_flush_interval == 1


def test_a_finished_file_is_whole_when_finish_returns(tracked, tmp_path):
    assert [wandb_file.has_exit(file) for file in fragments(tracked)] == [True, True]
    file = tmp_path / "run.wandb"
    for cut in (100, 10):
        file.write_bytes(fragments(tracked)[0].read_bytes()[:-cut])
        assert not wandb_file.has_exit(file)


def test_more_rows_than_the_queue_holds_all_arrive(tmp_path, monkeypatch):
    arrived = []

    class Slow:
        def define_metric(self, *args, **kwargs) -> None: ...

        def log(self, row: dict) -> None:
            time.sleep(0.001)
            arrived.append(row)
            assert tracker._queue.qsize() <= 5

        def finish(self, exit_code: int) -> None:
            assert exit_code == 0

        summary: dict = {}  # noqa: RUF012
        settings = types.SimpleNamespace(sync_dir=tmp_path)

    (tmp_path / "run.wandb").touch()
    monkeypatch.setattr(tracking, "has_exit", lambda file: True)
    monkeypatch.setattr(tracking, "QUEUE", 5)
    monkeypatch.setattr(tracking, "_init", lambda *args: Slow())
    tracker = tracking.Tracker(Path("nowhere"), {}, "offline")
    for step in range(50):
        tracker.log(step, "env_step", {"env_step": step})
    tracker.finish([], {}, failed=False)
    assert arrived == [{"env_step": step} for step in range(50)]
    assert isinstance(tracker._queue, queue.SimpleQueue)  # whose put is safe in signal handlers


def test_media_that_cannot_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_init", lambda *args: None)
    tracker = tracking.Tracker(tmp_path, {}, "offline")
    with pytest.raises(FileNotFoundError, match="x: there is no file"):
        tracker.media("image", "x", tmp_path / "no.png", {"env_step": 1})
    (tmp_path / "a.png").touch()
    for axis in ({}, {"step": 1}, {"env_step": 1, "epoch": 1}):
        with pytest.raises(ValueError, match="takes one of env_step, grad_step, epoch"):
            tracker.media("image", "x", tmp_path / "a.png", axis)
    tracker.finish([], {}, failed=False)
    assert "W&B has not all of this run" in str(tracker.failure)


def test_w_and_b_that_does_not_start_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise RuntimeError("no such server")

    monkeypatch.setattr(tracking, "_init", refuse)
    with pytest.raises(ConnectionError, match="did not start: no such server"):
        create_run(tmp_path / "results", group="g", name="n", config={})
    assert list(tmp_path.iterdir()) == []
    assert "WANDB_DATA_DIR" not in os.environ


def test_online_needs_a_key(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="online needs a W&B key"):
        tracking.check_track("online")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password " + 40 * "a")
    monkeypatch.setenv("NETRC", str(netrc))
    tracking.check_track("online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # the key is for another server
    with pytest.raises(ValueError, match="online needs a W&B key"):
        tracking.check_track("online")
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    tracking.check_track("online")


def encode(payloads: list[bytes]) -> bytes:
    """A W&B file as its writer makes it, from the layout that `wandb_file` documents."""
    out = bytearray(b":W&B\x17\xbe\x00")
    for payload in payloads:
        first = True
        while True:
            left = wandb_file.BLOCK - len(out) % wandb_file.BLOCK
            if left < 7:
                out += bytes(left)
                left = wandb_file.BLOCK
            part, payload = payload[: left - 7], payload[left - 7 :]
            kind = (1 if first else 4) if not payload else (2 if first else 3)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
            if not payload:
                break
    return bytes(out)


def test_records_across_blocks_and_a_tail_torn_anywhere(tmp_path):
    block = wandb_file.BLOCK
    # Records that end 7, 6 and 0 bytes before the end of a block, one over three blocks, an empty one.
    payloads = [
        bytes(block - 7 - 7 - 7),
        b"a" * 100,
        b"b" * (block - 107 - 7 - 6),
        b"c" * 3 * block,
        b"",
        b"d",
    ]
    data = encode(payloads)
    file = tmp_path / "run.wandb"
    file.write_bytes(data)
    assert list(read_payloads(file)) == payloads
    for cut in [*range(0, 40), block - 8, block - 1, block, block + 6, 2 * block + 1, len(data) - 1]:
        file.write_bytes(data[:cut])
        kept = list(read_payloads(file))
        assert kept == payloads[: len(kept)]
        assert len(encode(payloads[: len(kept)])) <= max(cut, 7)
    damaged = bytearray(data)
    damaged[2 * block] ^= 1
    file.write_bytes(damaged)
    assert list(read_payloads(file)) == payloads[:3]


def test_other_files_are_no_wandb_files(tmp_path):
    (tmp_path / "x").write_text('{"env_step": 1}')
    with pytest.raises(ValueError, match="not a W&B run file"):
        list(read_payloads(tmp_path / "x"))
    (tmp_path / "x").write_bytes(b"")
    assert list(read_payloads(tmp_path / "x")) == []

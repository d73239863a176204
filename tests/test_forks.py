"""Forked processes behave as those that they stand for."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from forks import Forked, foveal, python, write_commands


def test_a_fork_has_its_own_arguments_folder_environment_and_state(tmp_path: Path) -> None:
    code = (
        "import os, sys, wandb; print(sys.argv, os.getcwd(), os.environ['X']); wandb.x = hasattr(wandb, 'x')"
    )
    for _ in range(2):
        process = python(f"{code}; print(wandb.x)", "a", "b c", cwd=tmp_path, env={"X": "1"})
        assert process.communicate() == f"['-c', 'a', 'b c'] {tmp_path} 1\nFalse\n"
        assert process.returncode == 0


def test_the_server_has_one_thread_to_fork(tmp_path: Path) -> None:
    code = "import os, torch; print(len(os.listdir('/proc/self/task')), torch.get_num_threads())"
    assert python(code, cwd=tmp_path).communicate() == "1 1\n"
    code = "import os; print(len(os.listdir(f'/proc/{os.getppid()}/task')))"
    assert python(code, cwd=tmp_path).communicate() == "1\n"


@pytest.mark.parametrize(
    ("code", "status", "output"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import atexit; atexit.register(print, 'end'); print('begin')", 0, "begin\nend\n"),
        ("import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGKILL)", -9, "1\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_ends(code: str, status: int, output: str, tmp_path: Path) -> None:
    process = python(code, cwd=tmp_path)
    assert process.communicate().endswith(output)
    assert process.returncode == process.poll() == status


def test_signals_reach_it_and_only_it(tmp_path: Path) -> None:
    code = "import time; print(0, flush=True); time.sleep(60)"

    def running() -> Forked:
        process = python(code, cwd=tmp_path)
        while not process.output:
            time.sleep(0.001)
        return process

    first, second = running(), running()
    assert first.poll() is None
    first.terminate()
    assert first.wait() == -15
    assert second.poll() is None
    second.send_signal(2)
    assert "KeyboardInterrupt" in second.communicate()
    second.kill()  # is no more: nothing happens


def test_commands_for_a_shell(tmp_path: Path) -> None:
    write_commands(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    script = "echo $(foveal list agents | grep -c dqn) $(python -c 'print(input())' < word); foveal tran"
    (tmp_path / "word").write_text("word")
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("2 word\n", 2)
    assert done.stderr == "foveal: unknown command 'tran'; nearest: train\n"
    assert foveal("tran", cwd=tmp_path).communicate() == done.stderr

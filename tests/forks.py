"""Python processes that begin with everything imported, for tests that start the command line, kill it, and
look at what it leaves behind: importing torch, W&B and matplotlib takes longer than most of what they test.

A server imports once what a training uses and then forks at each request, while it has no second thread. The
fork takes arguments, folder, environment and open files from whoever asked, and is a process like any other:
it is killed, interrupted and waited for, and its Python ends in the usual way. Whether the imports work from
nothing is for others to show: `--seeds` starts real processes, and the slow tests run the README's blocks in
real ones.

This file is also what runs as the server, and as `foveal` and `python` of the README's blocks:

    python forks.py serve FD                                  requests come to the listening socket FD
    python forks.py ask ADDRESS foveal|python ARGUMENT ...    such a command, here and now
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTS = [
    "foveal.runs.train",
    "foveal.runs.fit",
    "foveal.runs.explain",
    "foveal.runs.seeds",
    "foveal.runs.listing",
    "foveal.runs.checks",
    "wandb.sdk.launch.inputs.internal",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.ImageFont",
    "imageio_ffmpeg",
    "sklearn.datasets",
    "stable_baselines3",
]


class Forked:
    """A forked process, as far as tests need subprocess.Popen. Its input is empty."""

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self._output = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - as long as the process
        self.returncode: int | None = None
        with open(os.devnull) as nothing:
            files = (nothing.fileno(), self._output.fileno(), self._output.fileno())
            self._answers, self.pid = ask(server(), command, os.fspath(cwd), dict(env or os.environ), files)

    @property
    def output(self) -> str:
        """What it has written so far, errors included."""
        return os.pread(self._output.fileno(), 2**24, 0).decode()

    def poll(self) -> int | None:
        """Its exit status once it has ended; negative is the signal that ended it."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = status(self._answers)
        return self.returncode

    def communicate(self) -> str:
        """Its whole output, after its end."""
        self.wait()
        return self.output

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def foveal(*arguments: str, cwd: Path) -> Forked:
    """`foveal ARGUMENTS` in the folder `cwd`."""
    return Forked(["foveal", *arguments], cwd)


def python(code: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Forked:
    """`python -c CODE ARGUMENTS` in the folder `cwd`."""
    return Forked(["python", "-c", code, *arguments], cwd, env)


def write_commands(folder: Path) -> None:
    """Executables `foveal` and `python` that ask the server, for a PATH."""
    for name in ("foveal", "python"):
        ask_it = shlex.join([sys.executable, "-SE", __file__, "ask", server(), name])
        (folder / name).write_text(f'#!/bin/sh\nexec {ask_it} "$@"\n')
        (folder / name).chmod(0o755)


# The client's side.


@functools.cache
def server() -> str:
    """The address of this process's server, which ends with it."""
    folder = tempfile.mkdtemp(prefix="forks-")
    address = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        process = subprocess.Popen(
            [sys.executable, __file__, "serve", str(listening.fileno())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def stop() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(folder)

    atexit.register(stop)
    return address


def ask(
    address: str, command: Sequence[str], cwd: str, env: dict[str, str], files: tuple[int, int, int]
) -> tuple[socket.socket, int]:
    """Have the server start a command with `files` as its input, output and errors: where its end will be
    told, and its number."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps({"command": list(command), "cwd": cwd, "env": env}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
    connection.sendall(request)
    return connection, receive(connection)


def status(answers: socket.socket) -> int:
    """The exit status of a command that was asked for, when it has ended."""
    return receive(answers)


def receive(connection: socket.socket) -> int:
    data = connection.recv(8, socket.MSG_WAITALL)
    if len(data) < 8:
        raise ConnectionError("the server of forks has ended")
    return int.from_bytes(data, "big", signed=True)


# The server's side.


def serve(listening: socket.socket) -> int:
    """Fork at each request until the parent is gone. In a fork: what the command returns."""
    parent = os.getppid()  # before the imports, during which it may end
    before = set(os.environ)
    for module in IMPORTS:
        importlib.import_module(module)
    imported = {name: value for name, value in os.environ.items() if name not in before}  # some set variables
    gc.freeze()  # or each fork looks through all of it when it ends, which takes a second and more
    running: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        if select.select([listening], [], [], 0.02)[0]:
            connection = listening.accept()[0]
            size, files, *_ = socket.recv_fds(connection, 8, 3)
            request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            pid = os.fork()
            if pid == 0:
                for other in (listening, connection, *running.values()):
                    other.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                os.chdir(request["cwd"])
                os.environ.clear()
                os.environ.update(imported | request["env"])
                # Who starts the tests in the background of a script starts them with Ctrl-C ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return run(request["command"])
            for file in files:
                os.close(file)
            running[pid] = connection
            connection.sendall(pid.to_bytes(8, "big"))
        while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with running.pop(ended[0]) as connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(os.waitstatus_to_exitcode(ended[1]).to_bytes(8, "big", signed=True))
    return 0


def run(command: Sequence[str]) -> int:
    match command:
        case ["foveal", *arguments]:
            from foveal.runs.cli import main

            sys.argv = ["foveal", *arguments]
            return main()
        case ["python", "-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            sys.path[0] = ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            return 0
        case _:
            raise ValueError(f"forks run foveal and python -c, got {command}")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["serve", descriptor]:
            return serve(socket.socket(fileno=int(descriptor)))
        case ["ask", address, *command]:
            answers, _ = ask(address, command, os.getcwd(), dict(os.environ), (0, 1, 2))
            return status(answers)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

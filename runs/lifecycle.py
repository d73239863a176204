"""What every training run does, whatever is trained: begin, save, stop on a signal, and say how to go on."""

import shlex
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ..agents import AGENTS, Checkpointed, load_checkpoint, newest_first, save_checkpoint
from .run import Run

T = TypeVar("T", bound=Checkpointed)
ALL_THREADS = torch.get_num_threads()
"""As many as torch takes by itself: the cores, or OMP_NUM_THREADS."""


@dataclass(frozen=True)
class RunOptions:
    """What every training run can be told, whatever is trained."""

    seed: int = 1
    """Seed of everything random in the run; with images, of their split for validation too."""
    device: str = "auto"
    """cpu, cuda, cuda:1...; auto is cuda where there is one."""
    threads: int = 0
    """CPU threads for torch; 0 is one for vectors (more only slows small networks down), all for images."""
    init_from: Path | None = None
    """Start from the weights (only) of this run, checkpoint or file."""

    results: Path = Path("results")
    """Folder of all runs."""
    group: str | None = None
    """Runs to be compared share a group; by default what is trained on what."""
    name: str | None = None
    """Name of the run; by default its seed."""
    tags: tuple[str, ...] = ()
    """Words to find the run by in a dashboard."""
    track: Literal["offline", "online", "off"] = "offline"
    """Weights & Biases: offline needs no account and no network."""
    progress: bool = True
    """Show progress while training."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")
        if self.threads < 0:
            raise ValueError(f"threads must be 0 or more, got {self.threads}")


def keep_first_checkpoint(run: Run, trained: Checkpointed) -> None:
    """So that a run can be resumed from its first moment; where there is no room for it, nothing is left."""
    try:
        save_checkpoint(trained, run.path / "checkpoints")
    except BaseException:
        with suppress(OSError):
            run.finish("failed")
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def summarize_model(run: Run, result: Mapping[str, Any], wall_s: float) -> None:
    """Put what a trained model scored into its run's summary, beside its speed (the median of its rows) and
    what it ran on."""
    speeds = [row["speed/images_per_s"] for row in run.rows() if "speed/images_per_s" in row]
    speed = {"speed/images_per_s": statistics.median(speeds)} if speeds else {}
    about = {name: run.config[name] for name in ("device", "versions")} | {"git": run.config["run"]["git"]}
    run.summarize({**result, **speed, **about, "wall_s": wall_s})


def load_chosen(run: Run, checkpoint: str | None, load: Callable[[Path], T]) -> tuple[T, bool, Path]:
    """What `load` builds from a run's newest checkpoint, or the one named, brought to where it was taken;
    whether exactly; and the checkpoint.

    Raises ValueError or FileNotFoundError, naming the file and the checkpoint before it, where it is not
    whole.
    """
    checkpoints = newest_first(run.path / "checkpoints")
    chosen = next((folder for folder in checkpoints if checkpoint in (None, folder.name)), None)
    if chosen is None:
        names = ", ".join(folder.name for folder in checkpoints) or "none"
        raise FileNotFoundError(
            f"{run.path} has no checkpoint {checkpoint or ''} to resume from; it has {names}"
        )
    try:
        trained = load(chosen)
        return trained, load_checkpoint(chosen, trained), chosen
    except (ValueError, FileNotFoundError) as error:
        older = next((folder.name for folder in checkpoints if folder < chosen), None)
        hint = f"; to go on from the one before it: --checkpoint {older}" if older else ""
        raise ValueError(f"{error}{hint}") from error


@contextmanager
def closing(run: Run) -> Iterator[None]:
    """A run that raises is marked: stopped by Ctrl-C or SIGTERM, else failed. What was saved stays."""

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        with signal_handlers({signal.SIGTERM: terminate}):
            yield
    except BaseException as error:
        on_purpose = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(OSError):  # the disk may be full, which must not hide what happened
            run.finish("stopped" if on_purpose else "failed")
        saved = next(iter(newest_first(run.path / "checkpoints")), None)
        if saved is not None and run.summary.get("state") != "finished":
            print(f"saved up to {saved.name}; to go on: {resume_command(run)}", file=sys.stderr)
        raise


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C and SIGTERM only ask to stop, which the function it gives tells.

    A second Ctrl-C interrupts at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping at the next row of metrics (Ctrl-C again: at once)", file=sys.stderr)

    with signal_handlers({signal.SIGINT: ask, signal.SIGTERM: ask}):
        yield lambda: bool(asked)


@contextmanager
def signal_handlers(handlers: Mapping[signal.Signals, Callable[[int, Any], None]]) -> Iterator[None]:
    """Handlers while it lasts; none outside of the main thread, where Python allows none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(run: Run) -> dict[str, float]:
    """The most memory in MB that this process, or one before a resume, has held: resident, and on the GPU."""
    peaks = {}
    with suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        peaks["memory/peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if torch.cuda.is_available():
        peaks["memory/gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return {key: round(max(peak, run.summary.get(key, 0)), 1) for key, peak in peaks.items()}


def say(line: str) -> None:
    print(line, flush=True)


def is_resumable(run: Run) -> bool:
    agent = AGENTS.get(run.config["agent"])
    return agent is None or agent.resumable


def resume_command(run: Run) -> str:
    """What goes on with a run: where it cannot be resumed, a new one from its weights."""
    if not is_resumable(run):
        agent, env_id = run.config["agent"], shlex.quote(run.config["env_id"])
        return f"foveal train {agent} --env-id {env_id} --init-from {shlex.quote(str(run.path))}"
    return f"foveal resume {shlex.quote(str(run.path))}{imports_of(run)}"


def imports_of(run: Run) -> str:
    """What a command about this run must import, since a file alone imports nothing."""
    names = (run.config["env_id"], *(run.config["encoder"] or "").split("+"))
    modules = dict.fromkeys(name.rpartition(":")[0] for name in names if ":" in name)
    return "".join(f" --import {module}" for module in modules)

"""Checkpoints: everything that training needs to go on as if it had never stopped.

    checkpoints/step-000000050000/
        weights.safetensors     weights and description; loads by itself as an agent
        training.safetensors    optimizer, target network, random streams, environments, counters
        replay-*.safetensors    pieces of the replay, hard-linked where they did not change since the last one

A folder of that name is whole: it is written beside its name, flushed, and renamed.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..vision import read_weights, write_weights


class Checkpointed(Protocol):
    """What a checkpoint asks of an agent or a model."""

    name: ClassVar[str]
    resumable: ClassVar[bool]

    @property
    def step(self) -> int: ...

    def save(self, path: str | Path) -> Path: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def segments(self) -> Iterable[tuple[str, Callable[[], dict[str, Tensor]]]]: ...

    def restore(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], load: Callable[[str], dict[str, Tensor]]
    ) -> bool: ...


def save_checkpoint(agent: Checkpointed, checkpoints: Path, keep: int = 2) -> Path:
    """Write a checkpoint of `agent` below the folder `checkpoints`; keep the newest `keep` of them."""
    whole = checkpoints / f"step-{agent.step:012d}"
    if whole.exists():
        return whole
    partial = checkpoints / f".{whole.name}.{os.getpid()}.partial"
    previous = next(iter(newest_first(checkpoints)), None)
    partial.mkdir(parents=True)
    try:
        agent.save(partial / "weights.safetensors")
        if agent.resumable:
            tensors, meta = agent.state()
            write_weights(partial / "training.safetensors", tensors, {"meta": meta})
        for name, read in agent.segments():
            file = f"replay-{name}.safetensors"
            if previous is None or not _link(previous / file, partial / file):
                write_weights(partial / file, read(), {})
        _flush(partial)
        partial.rename(whole)
        _flush(checkpoints)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in newest_first(checkpoints)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def load_checkpoint(path: Path, agent: Checkpointed) -> bool:
    """Bring `agent`, built from this checkpoint's weights file, to where the checkpoint was taken.

    Returns False where an environment could not be brought back exactly and starts a new episode. Raises
    FileNotFoundError or ValueError, naming the file, for a checkpoint that is not whole.
    """

    def load(name: str) -> dict[str, Tensor]:
        return read_weights(path / f"replay-{name}.safetensors")[0]

    tensors, description = read_weights(path / "training.safetensors")
    try:
        return agent.restore(tensors, description["meta"], load)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} does not continue a {agent.name} of this version: {error}") from error


def newest_first(checkpoints: Path) -> list[Path]:
    """The whole checkpoints below a folder."""
    return sorted(checkpoints.glob("step-*"), reverse=True)


def sweep(checkpoints: Path, after: Path) -> None:
    """Remove what a killed run left unfinished, and checkpoints newer than `after`, which it goes on from."""
    newer = [path for path in newest_first(checkpoints) if path.name > after.name]
    for path in [*checkpoints.glob(".step-*.partial"), *newer]:
        shutil.rmtree(path, ignore_errors=True)
    for file in checkpoints.glob("best/*.partial"):
        file.unlink(missing_ok=True)


def _link(old: Path, new: Path) -> bool:
    """Hard-link, or copy where the file system has no links; False where there is no old file."""
    if not old.exists():
        return False
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
    return True


def _flush(folder: Path) -> None:
    """Make the names in a folder durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

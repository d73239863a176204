"""Weights files: safetensors with a JSON description. Reading one can never run code."""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

FORMAT = 1
"""Version of everything foveal writes; a file of another version is refused by name."""


def write_weights(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write `tensors` and a JSON `description` to `path`: whole or not at all.

    The file is written beside its name, flushed to the disk, and renamed. Raises OSError, naming the path.
    """
    metadata = {"foveal": json.dumps({"format": FORMAT, **description}, default=lambda scalar: scalar.item())}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # Serialised by us rather than by save_file, which maps the file: a full disk would then be a
        # bus error instead of an exception.
        with partial.open("wb") as file:
            file.write(safetensors.torch.save(contiguous, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the description of a weights file.

    Raises FileNotFoundError where there is none, ValueError where it is cut short, is no foveal file, or
    is of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if "foveal" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but was not written by foveal")
    try:
        description = json.loads(metadata["foveal"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its description is no JSON") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} is damaged: its description is no JSON object")
    if description.get("format") != FORMAT:
        raise ValueError(f"{path} has format {description.get('format')}; this foveal reads format {FORMAT}")
    return tensors, description


def find_weights(path: Path) -> Path:
    """The weights file that `path` means: itself, or a run's best checkpoint, or else its last one.

    Raises FileNotFoundError that names what was looked for.
    """
    if path.is_dir():
        checkpoints = path / "checkpoints"
        candidates = [path, checkpoints / "best", *sorted(checkpoints.glob("step-*"), reverse=True)]
        for folder in candidates:
            if (folder / "weights.safetensors").is_file():
                return folder / "weights.safetensors"
        raise FileNotFoundError(
            f"{path} is a folder without weights: neither weights.safetensors nor a checkpoint"
        )
    if not path.exists():
        raise FileNotFoundError(f"no weights file or run at {path}")
    return path

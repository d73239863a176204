"""The runs of a results folder, and what encoders cost, as tables."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from ..vision import make_encoder
from .run import list_runs


def print_runs(results: Path) -> None:
    """Print one line a run: folder, state, steps, score and time; damaged ones last, with the reason."""
    runs = list_runs(results)
    whole = [run for run in runs if run["state"] != "damaged"]
    header = ("run", "state", "steps", "score", "seconds")
    rows = [
        (
            str(run["path"]),
            run["state"] or "?",
            _number(run["env_step"] if run["env_step"] is not None else run["grad_step"], ",.0f"),
            _score(run),
            _number(run["wall_s"], ",.0f"),
        )
        for run in whole
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for name, state, *numbers in [header, *rows]:
        cells = [name.ljust(widths[0]), state.ljust(widths[1])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:])]
        print("  ".join(cells).rstrip())
    for run in runs:
        if run["state"] == "damaged":
            print(f"damaged: {run['path']}: {run['error']}")
    if not runs:
        print(f"(no runs in {results})")


def measure_encoders(shape: tuple[int, ...], batch_size: int, names: Iterable[str]) -> None:
    """Print what each encoder makes of uint8 images (C, H, W): parameters, shapes of map and features, and
    milliseconds for a batch forward, the least of five; or, in a line, why it does not take them."""
    if len(shape) != 3 or min(shape) < 1 or batch_size < 1:
        raise ValueError(
            f"input_shape takes three numbers, C H W, and batch_size 1 or more; got {shape}, {batch_size}"
        )
    space = spaces.Box(0, 255, shape, np.uint8)
    images = torch.from_numpy(
        np.random.default_rng(0).integers(256, size=(batch_size, *shape), dtype=np.uint8)
    )
    print(f"{'encoder':<28}{'parameters':>12}  {'map':<14}{'features':>8}  ms for {batch_size}")
    for name in names:
        try:
            encoder = make_encoder(name, space).eval()
        except ValueError as error:
            print(f"{name:<28}{error}")
            continue
        parameters = sum(p.numel() for p in encoder.parameters())
        with torch.no_grad():
            feature_map = getattr(encoder, "feature_map", None)
            size = "x".join(map(str, feature_map(images[:1]).shape[1:])) if feature_map else "-"
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                features = encoder(images)
                times.append(time.perf_counter() - begin)
        print(
            f"{name:<28}{parameters:>12,}  {size:<14}{features.shape[1]:>8}  {1000 * min(times):.1f}",
            flush=True,
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _score(run: dict[str, Any]) -> str:
    """An agent's mean return, or a model's error or likelihood on test images."""
    if run["test_error"] is not None:
        return f"{run['test_error']:.2%} wrong"
    for name, what in (("fid", "FID"), ("bits_per_dim", "bits/dim"), ("nats", "nats")):
        if run[name] is not None:
            return f"{run[name]:.{2 if name != 'bits_per_dim' else 3}f} {what}"
    return _number(run["score"], ",.1f")

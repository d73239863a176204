"""How much faster PixelCNN draws with cached activations than with the whole network for every pixel.

    python -m foveal.runs.benchmarks.pixelcnn_sampling

Each case is a model with random weights, drawn with both ways from the same uniform numbers, in turns, on
one thread; the naive way draws only the first `--pixels` pixels of each image, each of which costs the same,
and is scaled to all of them. Seconds are CPU time, which other programs disturb less than the clock.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from ...generative import ImageTransformer, PixelCNN, PixelRNN
from ...generative.pixelcnn import PixelModel
from ..cli import guarded
from .common import RESULTS, argument_parser, count, machine_info, write_results

GATED: dict[str, Any] = {"variant": "gated", "kernel": 3, "layers": 6}
PLUS: dict[str, Any] = {"variant": "plusplus", "width": 24, "layers": 1, "depth": 2}
BIG = (1, 28, 28)
CASES: list[tuple[str, type[PixelModel], dict[str, Any], tuple[int, int, int], int, int]] = [
    ("gated, 0.15M", PixelCNN, {**GATED, "width": 33}, BIG, 2, 16),
    ("gated, 1.1M", PixelCNN, {**GATED, "width": 72, "layers": 10}, BIG, 2, 16),
    ("gated, 0.15M", PixelCNN, {**GATED, "width": 33}, BIG, 2, 1),
    ("gated, 0.15M, 8x8", PixelCNN, {**GATED, "width": 33}, (1, 8, 8), 17, 16),
    ("plain", PixelCNN, {"variant": "plain", "width": 48, "layers": 8}, BIG, 2, 16),
    ("plusplus, 256 levels", PixelCNN, PLUS, BIG, 256, 16),
    ("row LSTM", PixelRNN, {"variant": "row", "width": 32, "layers": 3}, BIG, 2, 16),
    ("diagonal BiLSTM", PixelRNN, {"variant": "diagonal", "width": 32, "layers": 3}, BIG, 2, 16),
    ("image transformer", ImageTransformer, {"width": 40, "layers": 4}, BIG, 2, 16),
]
"""Name, model, its settings, the images' shape and levels, and how many are drawn at once."""


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=count, default=3, help="how often each case is timed (3)")
    parser.add_argument("--pixels", type=count, default=16, help="pixels that the naive way draws (16)")
    parser.add_argument("--out", type=Path, default=RESULTS / "pixelcnn_sampling.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for name, kind, settings, shape, levels, n in CASES:
        cases.append(measure(name, kind, settings, shape, levels, n, given.rounds, given.pixels))
        line = "{case}, batch {n}: cached {cached_s:.3f} s, naive {naive_s:.1f} s, {ratio:.0f} times"
        print(line.format(**cases[-1]), flush=True)
    write_results(given.out, {**machine_info(), "rounds": given.rounds, "cases": cases})
    return 0


def measure(
    name: str, kind: type[PixelModel], settings: dict[str, Any], shape: tuple[int, int, int], levels: int,
    n: int, rounds: int, pixels: int,
) -> dict[str, Any]:  # fmt: skip
    model = kind(
        spaces.Box(0, levels - 1, shape, np.uint8), ("image",), kind.Config(**settings), device="cpu"
    )
    uniforms = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    total = shape[1] * shape[2]
    model.sample(n, uniforms=uniforms)
    cached, naive, alike = [], [], 1.0
    for _ in range(rounds):
        took, whole = seconds(lambda: model.sample(n, uniforms=uniforms))
        cached.append(took)
        took, part = seconds(lambda: first_pixels(model, n, uniforms, pixels))
        naive.append(took * total / pixels)
        same = whole.flatten(2)[..., :pixels] == part.flatten(2)[..., :pixels]
        alike = min(alike, same.float().mean().item())
    ratios = [slow / fast for slow, fast in zip(naive, cached)]
    return {
        "case": name,
        "n": n,
        "shape": list(shape),
        "levels": levels,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "cached_s": statistics.median(cached),
        "naive_s": statistics.median(naive),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "equal_pixels": alike,
        "settings": settings,
    }


class Enough(Exception):
    """The naive way has drawn as many pixels as it was to."""


def first_pixels(model: PixelModel, n: int, uniforms: torch.Tensor, pixels: int) -> torch.Tensor:
    def each(r: int, c: int, images: torch.Tensor) -> None:
        if r * images.shape[3] + c + 1 == pixels:
            raise Enough(images)

    try:
        return model.sample(n, fast=False, uniforms=uniforms, each=each)
    except Enough as enough:
        return enough.args[0]


def seconds(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    before = time.process_time()
    result = work()
    return time.process_time() - before, result


if __name__ == "__main__":
    sys.exit(guarded(main))

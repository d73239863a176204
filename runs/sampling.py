"""foveal sample: new images of a generative model, as a PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .fit import load_generative
from .generate import image_grid
from .lifecycle import say


@dataclass(frozen=True)
class Sample:
    """Make new images with a generative model's best checkpoint (its last one where none was chosen)."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or weights file."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """How many images."""
    out: Path = Path("samples.png")
    """The PNG to write."""
    label: str | None = None
    """Of a conditional model: the class to make images of (its name or number); by default all in turn."""
    seed: int = 0
    """Of the noise."""
    columns: int | None = None
    """Images in a row; by default about as many as rows."""
    device: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's encoder comes from; a file alone imports nothing."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be 1 or more, got {self.n}")
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be 1 or more, got {self.columns}")


def sample(given: Sample) -> int:
    model = load_generative(given.run, given.device)
    generator = torch.Generator(model.device).manual_seed(given.seed)
    labels = model.labels_for(given.n)
    if given.label is not None:
        if labels is None:
            raise ValueError(f"label: this {model.name} was trained without labels (--conditional)")
        labels = torch.full_like(labels, class_number(given.label, model.classes))
    images = model.sample(given.n, generator, labels).float() / model.high
    columns = given.columns or min(given.n, math.ceil(math.sqrt(given.n)))
    blank = torch.ones(-given.n % columns, *images.shape[1:], device=images.device)
    say(f"samples: {image_grid(torch.cat([images, blank]).unflatten(0, (-1, columns)), given.out)}")
    return 0


def class_number(name: str, classes: tuple[str, ...]) -> int:
    """The number of a class that is given by its name or its number. ValueError for any other."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise ValueError(
        f"label must be one of {', '.join(classes)}, or from 0 to {len(classes) - 1}, got {name!r}"
    )

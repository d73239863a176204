"""foveal sample: new images of a generative model, and walks through its latents, as a PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from ..generative.latent import class_sum, line, traverse
from ..generative.pixelcnn import PixelModel
from ..vision import Dataset
from .fit import load_generative, load_run
from .generate import grid_pixels, image_grid
from .lifecycle import say
from .video import write_mp4


@dataclass(frozen=True)
class Sample:
    """Make new images with a generative model's best checkpoint (its last one where none was chosen)."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or weights file."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 64
    """How many images; of walks, how many rows at most."""
    out: Path = Path("samples.png")
    """The PNG to write."""
    mean: bool = True
    """Show what the decoder says that each pixel is on average; --no-mean draws each pixel too."""
    interpolate: bool = False
    """Walk between pairs of draws (of test images, with --ends test), a pair a row."""
    path: Literal["spherical", "linear"] = "spherical"
    """Of walks between pairs: along the great circle, or straight."""
    ends: Literal["prior", "test"] = "prior"
    """Of walks: from draws of the prior, or the codes of test images."""
    traverse: bool = False
    """Change one latent a row, of those that change the image most, and keep the others."""
    arithmetic: str | None = None
    """Sum of classes' mean codes, such as 8-3+5: images of the first class, their reconstructions, and the
    same after the other means were taken off and added."""
    label: str | None = None
    """Of a conditional model: the class to make images of (its name or number); by default all in turn."""
    temperature: float = 1.0
    """Of pixel by pixel models: below 1 for likelier images, above for more varied ones."""
    video: Path | None = None
    """Of pixel by pixel models: film the drawing to this mp4."""
    seed: int = 0
    """Of the noise."""
    columns: int | None = None
    """Images in a row: by default about as many as rows; 11 in walks."""
    dataset: str | None = None
    """Where test images are needed: another dataset than the run's."""
    data_dir: Path | None = None
    """Where the dataset's files are."""
    device: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's encoder comes from; a file alone imports nothing."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be 1 or more, got {self.n}")
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be 1 or more, got {self.columns}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")
        if self.video is not None and self.video.suffix != ".mp4":
            raise ValueError(f"video must end in .mp4, got {self.video}")
        if self.interpolate + self.traverse + (self.arithmetic is not None) > 1:
            raise ValueError("interpolate, traverse and arithmetic exclude each other")
        if self.walks and self.columns is not None and self.columns < 2:
            raise ValueError(f"columns must be 2 or more in a walk, got {self.columns}")

    @property
    def walks(self) -> bool:
        return self.interpolate or self.traverse


def sample(given: Sample) -> int:
    model = load_generative(given.run, given.device)
    if model.conditional:
        number = None if given.label is None else class_number(given.label, model.classes)
    elif given.label is not None:
        raise ValueError(f"label: this {model.name} was trained without labels (--conditional)")
    else:
        number = None
    if not isinstance(model, PixelModel) and (given.video or given.temperature != 1):
        what = "video" if given.video else "temperature"
        raise ValueError(f"{what}: a model of the kind {model.name} does not draw pixel by pixel")
    if given.video is not None and not given.video.absolute().parent.is_dir():
        raise ValueError(f"video: there is no folder {given.video.parent}")
    if given.arithmetic is not None:
        what, images = "arithmetic", arithmetic(model, given)
    elif given.walks:
        what, images = "interpolation" if given.interpolate else "traversal", walk(model, given, number)
    else:
        what, images = "samples", draws(model, given, number)
    say(f"{what}: {image_grid(images, given.out)}")
    return 0


def needs(model: Any, method: str, what: str) -> None:
    """ValueError where a model has not what is asked for."""
    if not hasattr(model, method):
        raise ValueError(f"{what}: a model of the kind {model.name} has no {method}")


def draws(model: Any, given: Sample, number: int | None) -> Tensor:
    """A grid of new images."""
    needs(model, "sample", "sample")
    generator = torch.Generator(model.device).manual_seed(given.seed)
    labels = model.labels_for(given.n)
    if number is not None:
        labels = torch.full_like(labels, number)
    if given.mean and hasattr(model, "decode"):
        z = torch.randn(given.n, model.latent_dim, device=model.device, generator=generator)
        return in_rows(model.decode(z, labels), given)
    if not isinstance(model, PixelModel):
        return in_rows(model.sample(given.n, generator, labels).float() / model.high, given)
    with film(given.video, model, given) if given.video else nullcontext() as each:
        images = model.sample(given.n, generator, labels, temperature=given.temperature, each=each)
    return in_rows(images.float() / model.high, given)


def in_rows(images: Tensor, given: Sample, blank: float = 1.0) -> Tensor:
    """Images (n, C, H, W) -> (rows, columns, C, H, W), with blank ones at the end."""
    if images.shape[1] not in (1, 3):  # planes such as MinAtar's, of which empty ones show black
        blank = 0.0
    columns = given.columns or min(given.n, math.ceil(math.sqrt(given.n)))
    rest = torch.full((-given.n % columns, *images.shape[1:]), blank, device=images.device)
    return torch.cat([images, rest]).unflatten(0, (-1, columns))


@contextmanager
def film(path: Path, model: PixelModel, given: Sample) -> Iterator[Callable[[int, int, Tensor], None]]:
    """A function that sees each pixel drawn; at the end an mp4 of about ten seconds is written of it.

    What is not yet drawn is grey. The file appears whole or not at all.
    """
    _, height, width = model.space.shape
    every, frames = max(1, height * width // 300), []

    def each(r: int, c: int, images: Tensor) -> None:
        done = r * width + c + 1
        if done % every == 0 or done == height * width:
            shown = images.float() / model.high
            shown.flatten(2)[:, :, done:] = UNDRAWN
            frames.append(grid_pixels(in_rows(shown, given, UNDRAWN)))

    yield each
    still = [frames[-1]] * 60
    beside = path.with_name(f".{path.stem}.tmp.mp4")  # ffmpeg takes the format from the ending
    try:
        write_mp4(beside, (even(frame) for frame in (*frames, *still)), fps=30)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    say(f"video: {path}")


UNDRAWN = 0.3
"""Grey of pixels to come."""


def even(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) with a row and a column more where a side is odd."""
    high, wide = picture.shape[0] % 2, picture.shape[1] % 2
    return np.pad(picture, ((0, high), (0, wide), (0, 0)), mode="edge")


def walk(model: Any, given: Sample, number: int | None) -> Tensor:
    """Rows of images along ways through the latents."""
    needs(model, "decode", "interpolate" if given.interpolate else "traverse")
    steps = given.columns or 11
    rows = min(given.n, 8) if given.interpolate else 1
    label = None if not model.conditional else torch.tensor(number or 0)
    if given.ends == "test" or not hasattr(model, "sample"):
        needs(model, "encode", "ends test")
        dataset = load_run(given.run, given.dataset, given.data_dir, given.device)[1]
        codes, labels = encode(model, dataset, 2 * rows if given.interpolate else len(dataset.test))
        starts, center, spread = codes, codes[given.seed % len(codes)], codes.std(0)
        if labels is not None and number is None:
            label = labels[given.seed % len(codes)]
    else:
        generator = torch.Generator(model.device).manual_seed(given.seed)
        starts = torch.randn(2 * rows, model.latent_dim, device=model.device, generator=generator)
        center, spread = starts[0], torch.ones(model.latent_dim, device=model.device)
    if given.interpolate:
        ways = line(starts[:rows], starts[rows : 2 * rows], steps, given.path == "spherical")
    else:
        ways = traverse(center, spread, steps)
    flat = ways.flatten(0, 1)
    labels = None if label is None else label.expand(len(flat))
    images = model.decode(flat, labels).unflatten(0, ways.shape[:2])
    if given.traverse:
        change = (images[:, -1] - images[:, 0]).abs().flatten(1).mean(1)
        images = images[change.argsort(descending=True)[: given.n if given.n < 64 else 10]]
    return images


def encode(model: Any, dataset: Dataset, count: int) -> tuple[Tensor, Tensor | None]:
    part = dataset.test.take(torch.arange(min(count, len(dataset.test))))
    labels = part.labels if model.conditional else None
    return model.encode(part.images, labels), labels


def arithmetic(model: Any, given: Sample) -> Tensor:
    """Images of the first class, their reconstructions, and the images after the other classes' means were
    added or taken off: three rows."""
    needs(model, "encode", "arithmetic")
    needs(model, "decode", "arithmetic")
    if model.conditional:
        raise ValueError("arithmetic: this model is given its labels; change them with --label")
    terms = parse_terms(given.arithmetic or "", model.classes)
    dataset = load_run(given.run, given.dataset, given.data_dir, given.device)[1]
    codes = model.encode(dataset.test.images)
    change = class_sum(codes, dataset.test.labels, terms[1:])
    first = (dataset.test.labels == terms[0][1]).nonzero().flatten()[: given.columns or 10]
    if not len(first):
        raise ValueError(f"arithmetic: there are no test images of the first class of {given.arithmetic}")
    rows = [dataset.test.images[first].float() / model.high]
    rows += [model.decode(z).cpu() for z in (codes[first], codes[first] + change)]
    return torch.stack(rows)


def parse_terms(text: str, classes: tuple[str, ...]) -> list[tuple[int, int]]:
    """`8-3+5` -> [(1, 8), (-1, 3), (1, 5)]: classes by name or number. ValueError for anything else."""
    parts = re.split(r"([+-])", text)
    if len(parts) < 3 or not all(part.strip() for part in parts):
        raise ValueError(f"arithmetic must be a sum of classes such as a-b+c, got {text!r}")
    signs = ["+", *parts[1::2]]
    numbers = [class_number(name.strip(), classes, "arithmetic") for name in parts[::2]]
    return [(1 if sign == "+" else -1, number) for sign, number in zip(signs, numbers)]


def class_number(name: str, classes: tuple[str, ...], argument: str = "label") -> int:
    """The number of a class that is given by its name or its number. ValueError for any other."""
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    known = ", ".join(classes)
    raise ValueError(f"{argument} takes {known}, or numbers from 0 to {len(classes) - 1}, got {name!r}")

"""Train a model on a dataset of images into a run folder: log, validate, checkpoint, stop, resume, score."""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..agents import RAM, newest_first, save_checkpoint, sweep
from ..agents.progress import progress as progress_display
from ..generative import (
    GAN,
    VAE,
    Autoencoder,
    Generative,
    ImageTransformer,
    PixelCNN,
    PixelRNN,
    WorldModel,
)
from ..generative.world_model import read_experience
from ..vision import (
    KNN,
    Classifier,
    Dataset,
    Model,
    binarize,
    check_dataset,
    find_weights,
    folds,
    load_dataset,
    quantize,
    read_weights,
)
from ..vision.canvas import PIECE, clutter_pieces, on_canvas
from .attention import conclude_ram
from .classify import conclude_classifier
from .extractor import find_extractor
from .generate import conclude_gan, conclude_generative, draw_pictures
from .lifecycle import (
    ALL_THREADS,
    RunOptions,
    closing,
    keep_first_checkpoint,
    load_chosen,
    peak_memory,
    resume_command,
    say,
    stop_signals,
)
from .run import Run, create_run, open_run, resume_run

MODELS: dict[str, type[Model]] = {
    "classifier": Classifier,
    "knn": KNN,
    "ram": RAM,
    "autoencoder": Autoencoder,
    "vae": VAE,
    "pixelcnn": PixelCNN,
    "pixelrnn": PixelRNN,
    "image-transformer": ImageTransformer,
    "gan": GAN,
    "world-model": WorldModel,
}
"""What `foveal train` trains on images."""
DRAWN = ("dynamic", "fixed")
"""Ways to binarise that are not a threshold."""
CONCLUSIONS: dict[str, Callable[[Run, Any, Dataset, float], None]] = {
    "classifier": conclude_classifier,
    "knn": conclude_classifier,
    "ram": conclude_ram,
    "autoencoder": conclude_generative,
    "vae": conclude_generative,
    "pixelcnn": conclude_generative,
    "pixelrnn": conclude_generative,
    "image-transformer": conclude_generative,
    "gan": conclude_gan,
    "world-model": conclude_generative,
}
"""Model -> what scores it on the test images, and draws it."""


@dataclass(frozen=True)
class FitOptions(RunOptions):
    """What a training run on images is, beside the model's own settings."""

    dataset: str = "digits"
    """digits (always there), mnist, fashion-mnist, cifar10, a folder of images (a subfolder a class), or an
    .npz of images and labels."""
    data_dir: Path | None = None
    """Where the files are; by default FOVEAL_DATA, Debian's folder, or the cache, into which they are
    downloaded."""
    epochs: float = 20.0
    """Passes over the training images."""
    validation: float | None = None
    """Share (below 1) or number of training images to validate on; by default a tenth, at most 5,000."""
    folds: int | None = None
    """k-fold cross-validation instead: the training images in k parts, of which `fold` is held out."""
    fold: int = 0
    """Which of them, from 0."""
    train_size: int | None = None
    """Use only so many training images."""
    test_size: int | None = None
    """Use only so many test images."""
    image_size: int | None = None
    """Side in pixels that images are resized to."""
    translated: int | None = None
    """Put every image at a random place of a canvas of this side in pixels."""
    cluttered: int | None = None
    """The same, among pieces of other images."""
    clutter_pieces: int | None = None
    """How many; by default 4 on a canvas of 60 pixels and 8 on one of 100."""
    clutter_size: int = PIECE
    """Their side in pixels."""
    canvases: int = 60_000
    """Canvases to train on: where there are fewer training images, each lies on several."""
    baseline: bool = True
    """Train what ram is compared with as well, for as many epochs: random looking, a fully connected and a
    convolutional net. Other models have nothing of the kind."""
    binarize: str | None = None
    """A threshold (pixels of at least that much become 1, others 0), or dynamic: each pixel is drawn, with
    its grey as the chance of a 1, anew for each batch of training; or fixed: drawn once."""
    levels: int | None = None
    """Reduce grey to so many levels."""

    extractor: str = "auto"
    """What measures a GAN's samples (FID, precision, recall...). auto: a classifier that is trained on the
    dataset once and kept in the cache. A classifier's run. inception: torchvision's, where it is installed.
    none: nothing does."""

    log_every: int = 100
    """Gradient steps between two rows of metrics; the end of an epoch is always one, and is validated."""
    checkpoint_every: int = 1_000
    """Gradient steps between two checkpoints, at rows."""
    pictures_every: float = 10.0
    """Epochs between two sets of a generative model's pictures, which are always made of the same noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_size", "test_size", "image_size", "log_every", "checkpoint_every", "canvases"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.folds is not None and (self.folds < 2 or self.validation is not None):
            raise ValueError(f"folds must be 2 or more, and takes the place of validation; got {self.folds}")
        if not 0 <= self.fold < (self.folds or 1):
            raise ValueError(f"fold must be from 0 to folds - 1 = {(self.folds or 1) - 1}, got {self.fold}")
        for name in ("epochs", "pictures_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.binarize is not None and self.binarize not in DRAWN and not self.binarize.isdecimal():
            raise ValueError(f"binarize must be dynamic, fixed or a whole number, got {self.binarize!r}")
        if self.binarize is not None and self.levels is not None:
            raise ValueError("levels and binarize exclude each other")
        if self.translated is not None and self.cluttered is not None:
            raise ValueError(
                f"translated and cluttered are two tasks, got both: {self.translated} and {self.cluttered}"
            )


def open_dataset(options: FitOptions, name: str = "classifier") -> Dataset:
    """The dataset that a run of the model `name` asks for."""
    validation = 0.0 if options.folds is not None else options.validation
    dataset = load_dataset(
        options.dataset,
        options.data_dir,
        seed=options.seed,
        validation=int(validation) if validation is not None and validation >= 1 else validation,
        size=options.image_size,
        train_size=options.train_size,
        test_size=options.test_size,
    )
    if options.folds is not None:
        train, held_out = folds(dataset.train.labels, options.folds, options.seed)[options.fold]
        parts = {"train": dataset.train.take(train), "validation": dataset.train.take(held_out)}
        dataset = replace(dataset, **parts)  # type: ignore[arg-type]
    side = options.cluttered if options.cluttered is not None else options.translated
    if side is not None:
        pieces = options.clutter_pieces if options.clutter_pieces is not None else clutter_pieces(side)
        dataset = on_canvas(
            dataset,
            side,
            options.seed,
            pieces if options.cluttered is not None else 0,
            options.clutter_size,
            options.canvases,
        )
    if options.binarize is not None:
        how: Any = options.binarize
        dataset = binarize(dataset, how if how in DRAWN else int(how))
    if options.levels is not None:
        dataset = quantize(dataset, options.levels)
    return read_experience(dataset, options.dataset) if name == WorldModel.name else dataset


def make_model(name: str, options: FitOptions, config: Any, dataset: Dataset) -> Model:
    """The model that a run begins with. Raises ValueError for whatever cannot be taken."""
    kind = MODELS[name]
    if dataset.grey is not None and not issubclass(kind, Generative):
        raise ValueError(f"binarize dynamic is for generative models; {name} takes a threshold")
    model = kind(dataset.space, dataset.classes, config, seed=options.seed, device=options.device)
    if options.init_from is not None:
        path = find_weights(options.init_from)
        try:
            model.load_weights(read_weights(path)[0])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is of another architecture: {error}") from error
    equip(model, options, dataset)
    return model


def equip(model: Model, options: FitOptions, dataset: Dataset) -> None:
    """Give a model what it is measured with. ValueError where that cannot measure it."""
    if not isinstance(model, GAN):
        return
    whole = replace(options, seed=0, validation=None, folds=None, fold=0, train_size=None, test_size=None)
    model.extractor = find_extractor(options.extractor, dataset, lambda: open_dataset(whole), model.device)
    if model.extractor is not None and len(dataset.test) <= model.extractor.size:
        raise ValueError(
            f"extractor {options.extractor} has {model.extractor.size} features, which takes more than the "
            f"{len(dataset.test)} test images of {dataset.name}; --extractor none measures nothing"
        )


def fit(name: str, options: FitOptions, config: Any) -> Run:
    """Train a new model into a new run folder, which is finished or stopped when this returns.

    Raises ValueError or OSError, before any folder is made, for whatever cannot be taken.
    """
    torch.set_num_threads(options.threads or ALL_THREADS)
    dataset = open_dataset(options, name)
    model = make_model(name, options, config, dataset)
    run = create_run(
        options.results,
        group=options.group or f"{name}-{Path(options.dataset).stem}",
        name=options.name or f"seed{options.seed}",
        config={
            "agent": name,
            "env_id": options.dataset,
            "seed": options.seed,
            "epochs": options.epochs,
            "device": str(model.device),
            "encoder": model.describe().get("encoder", {}).get("name"),
            "parameters": sum(p.numel() for p in model.network.parameters()),
            "dataset": {
                "name": dataset.name,
                "sha256": dataset.digest,
                "images": [len(part) for part in (dataset.train, dataset.validation, dataset.test)],
                "shape": list(dataset.space.shape),
                "classes": list(dataset.classes),
                "levels": dataset.high + 1,
            },
            "config": asdict(model.config),
            "options": json.loads(json.dumps(asdict(options), default=str)),
        },
        tags=options.tags,
        track=options.track,
        parents=[find_weights(options.init_from)] if options.init_from else [],
    )
    keep_first_checkpoint(run, model)
    with closing(run):
        return _fit(run, model, options, dataset)


def resume_fit(path: Path, epochs: float | None, checkpoint: str | None, progress: bool = True) -> Run:
    """Go on with a run from its newest checkpoint, or the one named, as if it had never stopped.

    A finished run needs more `epochs` to go on; with another number of them the schedules are other ones, and
    rows after the checkpoint are dropped. Raises as `resume` does for an agent's run.
    """
    run = open_run(path)
    path, stored = run.path, options_of(run)
    options = replace(stored, progress=progress, epochs=epochs or stored.epochs)
    torch.set_num_threads(options.threads or ALL_THREADS)
    if run.summary.get("state") == "finished" and options.epochs <= stored.epochs:
        raise ValueError(
            f"{path} is finished: {stored.epochs:g} epochs are done; to train it further, give more --epochs"
        )
    dataset = open_dataset(options, run.config["agent"])
    if dataset.digest != run.config["dataset"]["sha256"]:
        raise ValueError(f"{path} was trained on other images than {options.dataset} now is")
    model, _, chosen = load_chosen(
        run, checkpoint, lambda folder: MODELS[run.config["agent"]].load(folder, device=options.device)
    )
    equip(model, options, dataset)
    if options.epochs != stored.epochs:
        run.rewind(model.grad_step)
        best = path / "checkpoints" / "best" / "weights.safetensors"
        if best.exists() and read_weights(best)[1]["grad_step"] > model.grad_step:  # of a row that is no more
            best.unlink()
        as_json = {**run.config["options"], "epochs": options.epochs}
        run.configure({"epochs": options.epochs, "options": as_json})
    sweep(path / "checkpoints", after=chosen)
    run = resume_run(path)
    with closing(run):
        return _fit(run, model, options, dataset)


def options_of(run: Run) -> FitOptions:
    """The options that a run was started with. ValueError where its config.json is not a training's."""
    try:
        stored = run.config["options"]
        data_dir = Path(stored["data_dir"]) if stored["data_dir"] else None
        paths = {"data_dir": data_dir, "results": Path(stored["results"]), "init_from": None}
        return FitOptions(**{**stored, "tags": tuple(stored["tags"]), **paths})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run.path}/config.json has no options of a training of this version: {error}"
        ) from error


def _fit(run: Run, model: Model, options: FitOptions, dataset: Dataset) -> Run:
    checkpoints = run.path / "checkpoints"
    before = model.grad_step
    past = [row for row in run.rows() if row["grad_step"] <= before]
    best = max((row[model.chosen_by] for row in past if model.chosen_by in row), default=float("-inf"))
    wall_s = max((row["time/wall_s"] for row in past), default=0.0)
    clock = time.perf_counter() - wall_s
    label = f"{model.name} {dataset.name} seed {options.seed}"
    total = model.total_steps(dataset, options.epochs)
    show_progress = progress_display(total, before, enabled=options.progress, label=label, axis="grad_step")
    stopped = False
    batches = model.total_steps(dataset, 1)
    between = max(1, round(options.pictures_every * batches))
    with stop_signals() as stop, show_progress as show:
        for row in model.training(dataset, options.epochs, options.log_every):
            now = row["grad_step"]
            # Of equals the one that was trained for longer.
            if model.chosen_by in row and row[model.chosen_by] >= best:
                best = row[model.chosen_by]
                (checkpoints / "best").mkdir(exist_ok=True)
                model.save(checkpoints / "best" / "weights.safetensors")
            wall_s = row["time/wall_s"] = time.perf_counter() - clock
            run.log(row)
            show(row)
            end = now >= total
            if isinstance(model, Generative) and now // between > before // between:
                draw_pictures(run, model, dataset, epoch=now / batches)
            stopped = stop() and not end
            if now // options.checkpoint_every > before // options.checkpoint_every or end or stopped:
                save_checkpoint(model, checkpoints)
            before = now
            if stopped:
                break
    if stopped:
        run.summarize({"wall_s": wall_s})
        run.finish("stopped")
        say(f"stopped at {model.grad_step:,} gradient steps; to go on: {resume_command(run)}")
        return run
    best_file = checkpoints / "best" / "weights.safetensors"
    chosen = best_file if best_file.exists() else newest_first(checkpoints)[0] / "weights.safetensors"
    scored = type(model).load(chosen, device=str(model.device))
    if isinstance(model, GAN) and isinstance(scored, GAN):
        scored.extractor = model.extractor
    CONCLUSIONS[model.name](run, scored, dataset, wall_s)
    run.summarize(peak_memory(run))
    run.artifact(model.name, "model", chosen, {"grad_step": scored.grad_step})
    say(f"weights: {chosen}")
    say(f"run folder: {run.path}")
    quoted = shlex.quote(str(run.path))
    if run.track == "offline":
        say(f"offline W&B run, to send once logged in: foveal sync {quoted}")
    say(f"again: foveal evaluate {quoted}")
    run.finish("finished")
    return run


def load_run(
    path: Path,
    dataset: str | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    extractor: str | None = None,
) -> tuple[Any, Dataset]:
    """The model that a run or a weights file holds, and the dataset it was trained on, or another one.

    Raises ValueError where the dataset does not fit, or is not known because the file lies in no run.
    """
    file = find_weights(path)
    name = read_weights(file)[1].get("model")
    if name not in MODELS:
        raise ValueError(f"{file} holds no model of images: models are {', '.join(MODELS)}")
    model = MODELS[name].load(file, device=device)
    try:
        options = options_of(open_run(file))
    except ValueError:
        if dataset is None:
            raise ValueError(f"{file} lies in no run folder: name a dataset with --dataset") from None
        options = FitOptions()
    options = replace(
        options,
        dataset=dataset or options.dataset,
        data_dir=data_dir or options.data_dir,
        extractor=extractor or options.extractor,
    )
    found = open_dataset(options, name)
    check_dataset(found, model.space, model.classes)
    equip(model, options, found)
    return model, found


def load_generative(path: Path, device: str = "auto") -> Generative:
    """The generative model that a run or a weights file holds. ValueError where it holds another one."""
    file = find_weights(path)
    kinds = {name: kind for name, kind in MODELS.items() if issubclass(kind, Generative)}
    description = read_weights(file)[1]
    name = description.get("model") or description.get("agent")
    if name not in kinds:
        raise ValueError(f"{file} holds a {name}; generative models are {', '.join(kinds)}")
    return kinds[name].load(file, device=device)

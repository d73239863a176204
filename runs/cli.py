"""The command line: foveal train | resume | evaluate | sample | explain | export | push | pull | compare ...

Whatever a person gave wrong is one line on the error output and exit code 2; a traceback is our mistake.
"""

import dataclasses
import difflib
import functools
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

COMMANDS = """\
usage: foveal COMMAND ...

  train NAME     train an agent, or a classifier of images, into a run folder; `foveal train NAME --help`
                 shows every setting
  resume RUN     go on with a stopped or killed run, as if it had never stopped
  evaluate RUN   score what was trained on fresh episodes, or on test images
  sample RUN     make new images with a generative model
  sweep FILE     search settings: many trials of `foveal train`, several at once; goes on when stopped
  collect        write what an agent, or a random policy, sees to a dataset of images
  sync RESULTS   send runs to Weights & Biases, whatever of them its server lacks
  explain RUN    show what a trained network looks at
  export RUN     write a policy, classifier, encoder or decoder as one ONNX file
  push RUN REPO  send a run to the Hugging Face Hub, or to a folder, with a model card
  pull REPO      fetch a run from there
  compare RUNS   curves, scores and intervals of many runs, as a page, figures, CSV and a table
  dashboard      a workspace and a report of a project on Weights & Biases, for all runs there
  bench SUITE    run a benchmark suite; make the README's tables from what was measured
  list           agents, models, encoders, backbones, environments, and the runs of a results folder

`foveal COMMAND --help` says more. Nothing needs an account or a network.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train_command,
        "resume": resume_command,
        "evaluate": evaluate_command,
        "sample": sample_command,
        "sweep": sweep_command,
        "collect": collect_command,
        "sync": sync_command,
        "explain": explain_command,
        "export": export_command,
        "push": push_command,
        "pull": pull_command,
        "compare": compare_command,
        "dashboard": dashboard_command,
        "bench": bench_command,
        "list": list_command,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(COMMANDS, end="")
        return 0
    if arguments[0] not in commands:
        return _refuse(_unknown("command", arguments[0], commands))
    warnings.showwarning = _show_warning
    if "" not in sys.path:
        sys.path.append(
            ""
        )  # `mine:Env-v0` is mine.py in the current folder; last, so that it shadows nothing
    return guarded(lambda: commands[arguments[0]](arguments[1:]))


def guarded(command: Callable[[], int | None]) -> int:
    """Run a command; returns its exit code. What was given wrong is one line there and exit code 2."""
    try:
        return command() or 0
    except (ValueError, FloatingPointError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            return 1
        if not isinstance(error, OSError) and not _raised_by_us(error):
            raise
        return _refuse(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train_command(arguments: list[str]) -> int:
    from ..agents import AGENTS
    from .fit import MODELS

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: foveal train NAME ...\n\nagents: {', '.join(AGENTS)}")
        print(f"models of images: {', '.join(MODELS)}")
        print("`foveal train NAME --help` shows every setting; --settings FILE reads them from JSON.")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name in MODELS:
        return train_model(name, rest)
    if name not in AGENTS:
        return _refuse(_unknown("agent or model", name, [*AGENTS, *MODELS]))
    from .seeds import train_seeds
    from .settings import default_settings, take_settings
    from .train import Options, make_agent, train

    flags, settings = take_settings(rest)
    recipe = AGENTS[name].recipe(_flag(flags, "env-id") or settings.get("env_id") or Options.env_id)
    options = functools.partial(Options, **AGENTS[name].run_options)
    options, recipe = default_settings(options, recipe, settings)
    about = f"Train {name} into a new run folder. Settings default to the recipe for --env-id."
    given, config = _parse_training(name, flags, about, options, recipe)
    if given.several.seeds > 1:
        last = dataclasses.replace(given.training, seed=given.training.seed + given.several.seeds - 1)
        make_agent(name, last, config).env.close()  # what cannot be taken is told once, here
        return train_seeds(name, rest, given.training, given.several.seeds, given.several.jobs)
    run = train(name, given.training, config)
    return 0 if run.summary["state"] == "finished" else 130


def train_model(name: str, rest: list[str]) -> int:
    from .fit import MODELS, FitOptions, fit, make_model, open_dataset
    from .seeds import train_seeds
    from .settings import default_settings, take_settings

    flags, settings = take_settings(rest)
    dataset = _flag(flags, "dataset") or settings.get("dataset") or FitOptions.dataset
    choices = {key: _flag(flags, key) or settings.get(key) for key in MODELS[name].recipe_choices}
    recipe = MODELS[name].recipe(dataset=dataset, **choices)
    about = f"Train {name} into a new run folder. Settings default to the recipe for network and dataset."
    checks = {"checks": Checks} if name == "classifier" else {}
    defaults = getattr(MODELS[name], "run_options", None)
    options_of = functools.partial(FitOptions, **defaults(dataset)) if defaults else FitOptions
    options_of, recipe = default_settings(options_of, recipe, settings)
    given, config = _parse_training(name, flags, about, options_of, recipe, **checks)
    options = given.training
    if checks and given.checks.any:
        from .checks import check_classifier

        return check_classifier(options, config, given.checks.find_lr, given.checks.overfit_one_batch)
    if given.several.seeds > 1:
        make_model(
            name, options, config, open_dataset(options, name)
        )  # what cannot be taken is told once, here
        headline = getattr(MODELS[name], "headline", "test/error")
        return train_seeds(name, rest, options, given.several.seeds, given.several.jobs, headline)
    run = fit(name, options, config)
    return 0 if run.summary["state"] == "finished" else 130


def sweep_command(arguments: list[str]) -> int:
    from .sweep import SweepCommand, sweep

    return sweep(_parse(SweepCommand, "foveal sweep", arguments))


def sync_command(arguments: list[str]) -> int:
    from .sync import Sync, sync_command

    return sync_command(_parse(Sync, "foveal sync", arguments))


def _parse_training(
    name: str, rest: list[str], about: str, options: Callable[[], Any], recipe: Any, **more: Any
) -> tuple[Any, Any]:
    """The parsed command, and the Config in it. The defaults shown by --help are those of the recipe."""
    field = re.sub(r"\W", "_", name)
    kind = options.func if isinstance(options, functools.partial) else options
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("training", kind, dataclasses.field(default_factory=options)),
            (field, type(recipe), dataclasses.field(default_factory=lambda: recipe)),
            ("several", Seeds, dataclasses.field(default_factory=Seeds)),
            *((key, part, dataclasses.field(default_factory=part)) for key, part in more.items()),
        ],
    )
    command.__doc__ = about
    given = _parse(command, f"foveal train {name}", rest)
    return given, getattr(given, field)


@dataclass(frozen=True)
class Checks:
    """What people try before a long training; neither makes a run folder."""

    find_lr: bool = False
    """Try growing step sizes for some steps, draw the loss, and suggest a learning_rate."""
    overfit_one_batch: bool = False
    """Learn one batch by heart, without augmentation and penalties: a right network gets a loss near 0."""

    @property
    def any(self) -> bool:
        return self.find_lr or self.overfit_one_batch


@dataclass(frozen=True)
class Seeds:
    """One configuration, several seeds."""

    seeds: int = 1
    """Runs to train, with consecutive seeds from --seed on, each in a process of its own."""
    jobs: int = 1
    """How many of them at once."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Resume:
    """Go on with a stopped or killed run from its newest checkpoint, as if it had never stopped."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    total_steps: int | None = None
    """Environment steps to reach, where more are wanted than the run was started with; schedules stretch."""
    epochs: float | None = None
    """The same of a model's run: passes over the training images."""
    checkpoint: str | None = None
    """Another checkpoint than the newest: the name of a folder in RUN/checkpoints."""
    progress: bool = True
    """Show progress while training."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's environment or encoder comes from; a file alone imports nothing."""


def resume_command(arguments: list[str]) -> int:
    given = _parse(Resume, "foveal resume", arguments)
    _import(given.imports)
    from .fit import MODELS, resume_fit
    from .run import open_run
    from .train import resume

    if open_run(given.run).config.get("agent") in MODELS:
        if given.total_steps is not None:
            raise ValueError(f"{given.run} is a model's run: it takes --epochs, not --total-steps")
        run = resume_fit(given.run, given.epochs, given.checkpoint, given.progress)
    else:
        if given.epochs is not None:
            raise ValueError(f"{given.run} is an agent's run: it takes --total-steps, not --epochs")
        run = resume(given.run, given.total_steps, given.checkpoint, given.progress)
    return 0 if run.summary["state"] == "finished" else 130


@dataclass(frozen=True)
class Evaluate:
    """Score a run's best checkpoint (its last one where none was chosen): an agent on fresh episodes, a model
    on the test images of its dataset."""

    run: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder or weights file."""
    episodes: int = 100
    """Episodes to play."""
    seed: int = 100
    """Seed of the episodes: by default none that a run has used."""
    num_envs: int = 8
    """Environments stepped side by side."""
    deterministic: bool = True
    """Greedy actions; --no-deterministic acts with the agent's own randomness, which is then reported."""
    dataset: str | None = None
    """A model's: another dataset than the run's, of the same images and classes."""
    data_dir: Path | None = None
    """A model's: where the dataset's files are."""
    k: int | None = None
    """A VAE's: samples for each image in the bound on the likelihood; None for its own number."""
    extractor: str | None = None
    """A GAN's: another extractor than the run's; see `foveal train gan --help`."""
    novelty: Path | None = None
    """An agent's: the run of a pixelcnn, pixelrnn or image-transformer, which says how novel the observations
    are to it."""
    json: bool = False
    """Print one JSON object instead of text."""
    video: Path | None = None
    """Record an episode to this mp4."""
    device: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is one."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's environment or encoder comes from; a file alone imports nothing."""


def evaluate_command(arguments: list[str]) -> int:
    given = _parse(Evaluate, "foveal evaluate", arguments)
    _import(given.imports)
    from ..vision import find_weights, read_weights

    if "model" in read_weights(find_weights(given.run))[1]:
        return evaluate_model(given)
    from ..agents import load
    from .evaluation import evaluate, score_text
    from .video import record

    agent = load(given.run, device=given.device)
    novelty = None
    if given.novelty is not None:
        from .novelty import Novelty

        novelty = Novelty(given.novelty, agent.observation_space, given.device)
    if given.video is not None:  # first, so that a name that cannot be written is told before the long part
        film = record(agent, given.video, seed=given.seed, deterministic=given.deterministic)
        print(f"video: {film}", file=sys.stderr if given.json else sys.stdout)
    result = evaluate(
        agent,
        given.episodes,
        seed=given.seed,
        num_envs=given.num_envs,
        deterministic=given.deterministic,
        watch=None if novelty is None else novelty.see,
    )
    if novelty is not None:
        result |= novelty.figures(given.episodes)
    about = {"agent": agent.name, "env_id": agent.env_spec()["env_id"], "env_step": agent.env_step}
    ours = getattr(agent.config, "exploration_final", None)
    epsilon = getattr(agent.config, "exploration_final_eps", ours)
    if not given.deterministic and epsilon is not None:
        about["epsilon"] = epsilon
    if given.json:
        print(json.dumps(about | result))
    else:
        print(f"{about['agent']} on {about['env_id']}, weights of step {about['env_step']:,}")
        print(f"score: {score_text(result)} of the mean), mean length {result['eval/length_mean']:.1f}")
        if novelty is not None:
            print(f"novelty: {novelty.text(result)}")
    return 0


def evaluate_model(given: Evaluate) -> int:
    from . import classify, generate
    from .fit import load_run

    model, dataset = load_run(given.run, given.dataset, given.data_dir, given.device, given.extractor)
    if isinstance(model, generate.Generative):
        result = generate.score(model, dataset, {} if given.k is None else {"k": given.k})
        text = generate.result_text(result)
    else:
        result = classify.score(model, dataset)
        text = classify.result_text(result)
    if given.json:
        print(
            json.dumps({"model": model.name, "dataset": dataset.name, "grad_step": model.grad_step} | result)
        )
    else:
        print(f"{model.name} on {dataset.name}, weights of gradient step {model.grad_step:,}")
        print(text)
    return 0


def sample_command(arguments: list[str]) -> int:
    from .sampling import Sample, sample

    given = _parse(Sample, "foveal sample", arguments)
    _import(given.imports)
    return sample(given)


def collect_command(arguments: list[str]) -> int:
    from .collect import Collect, collect

    given = _parse(Collect, "foveal collect", arguments)
    _import(given.imports)
    return collect(given)


def explain_command(arguments: list[str]) -> int:
    from .explain import Explain, explain

    given = _parse(Explain, "foveal explain", arguments)
    _import(given.imports)
    return explain(given)


def export_command(arguments: list[str]) -> int:
    from .export import Export, export

    given = _parse(Export, "foveal export", arguments)
    _import(given.imports)
    return export(given)


def push_command(arguments: list[str]) -> int:
    from .hub import Push, push

    return push(_parse(Push, "foveal push", arguments))


def pull_command(arguments: list[str]) -> int:
    from .hub import Pull, pull

    return pull(_parse(Pull, "foveal pull", arguments))


def compare_command(arguments: list[str]) -> int:
    from .compare import Compare, compare

    return compare(_parse(Compare, "foveal compare", arguments))


def dashboard_command(arguments: list[str]) -> int:
    from .dashboard import Dashboard, dashboard

    return dashboard(_parse(Dashboard, "foveal dashboard", arguments))


def bench_command(arguments: list[str]) -> int:
    from .bench import Bench, bench

    return bench(_parse(Bench, "foveal bench", arguments))


@dataclass(frozen=True)
class List:
    """What there is to train with, and what has been trained."""

    what: tyro.conf.Positional[
        Literal["all", "agents", "models", "encoders", "backbones", "environments", "runs"]
    ] = "all"
    """Which list; all leaves the long ones of environments and backbones out."""
    input_shape: tuple[int, ...] = ()
    """Of encoders and backbones: show parameters, output shapes and milliseconds a batch for images C H W."""
    batch_size: int = 32
    """Of that batch."""
    contains: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Only environments whose id contains this."""
    results: Path = Path("results")
    """Folder of the runs."""


def list_command(arguments: list[str]) -> int:
    given = _parse(List, "foveal list", arguments)
    from ..agents import AGENTS
    from ..envs import list_env_ids
    from ..vision import BACKBONES, ENCODERS
    from .fit import MODELS
    from .listing import measure_encoders, print_runs

    registries: dict[str, dict[str, Any]] = {
        "agents": AGENTS,
        "models": MODELS,
        "encoders": ENCODERS,
        "backbones": BACKBONES,
    }
    for what, registry in registries.items():
        if given.what == what or (given.what == "all" and what != "backbones" and not given.input_shape):
            print(what)
            for name, thing in registry.items():
                print(f"  {name:<26} {_first_line(thing)}")
    if given.input_shape and given.what in ("all", "encoders", "backbones"):
        measure_encoders(
            given.input_shape, given.batch_size, BACKBONES if given.what == "backbones" else ENCODERS
        )
    if given.what == "environments" or given.contains:
        for env_id in list_env_ids():
            if given.contains.lower() in env_id.lower():
                print(env_id)
    if given.what == "runs" or (given.what == "all" and given.results.is_dir()):
        print_runs(given.results)
    return 0


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _import(modules: tuple[str, ...]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"--import {module}: {error}") from error


def _parse(command: Any, program: str, arguments: list[str]) -> Any:
    return tyro.cli(command, args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,))


def _flag(arguments: list[str], name: str) -> str | None:
    """The value of --name in `arguments`, ahead of parsing them."""
    for here, following in zip(arguments, [*arguments[1:], ""]):
        flag, equals, value = here.partition("=")
        if flag.replace("_", "-") == f"--{name}":
            return value if equals else following
    return None


def _unknown(kind: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)
    return f"unknown {kind} {name!r}; nearest: {', '.join(near)}"


def _raised_by_us(error: BaseException) -> bool:
    """Whether foveal's own code raised: those lines are written for people, others need their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("foveal.")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"foveal: warning: {message}", file=sys.stderr)


def _refuse(line: str) -> int:
    print(f"foveal: {line}", file=sys.stderr)
    return 2

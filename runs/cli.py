"""The command line: foveal train | resume | evaluate | list.

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

  train AGENT    train an agent into a run folder; `foveal train AGENT --help` shows every setting
  resume RUN     go on with a stopped or killed run, as if it had never stopped
  evaluate RUN   score what was trained on fresh episodes
  list           agents, encoders, environments, and the runs of a results folder

`foveal COMMAND --help` says more. Nothing needs an account or a network.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train_command,
        "resume": resume_command,
        "evaluate": evaluate_command,
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
    try:
        return commands[arguments[0]](arguments[1:])
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
    from .seeds import train_seeds
    from .train import Options, make_agent, train

    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: foveal train AGENT ...\n\nagents: {', '.join(AGENTS)}")
        print("`foveal train AGENT --help` shows every setting.")
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in AGENTS:
        return _refuse(_unknown("agent", name, AGENTS))

    # The defaults shown by --help and used where a flag is absent are the recipe of the environment.
    field = re.sub(r"\W", "_", name)
    options = functools.partial(Options, **AGENTS[name].run_options)
    recipe = AGENTS[name].recipe(_flag(rest, "env-id") or Options.env_id)
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("training", Options, dataclasses.field(default_factory=options)),
            (field, AGENTS[name].Config, dataclasses.field(default_factory=lambda: recipe)),
            ("several", Seeds, dataclasses.field(default_factory=Seeds)),
        ],
    )
    command.__doc__ = f"Train {name} into a new run folder. Settings default to the recipe for --env-id."
    given: Any = _parse(command, f"foveal train {name}", rest)
    config = getattr(given, field)
    if given.several.seeds > 1:
        last = dataclasses.replace(given.training, seed=given.training.seed + given.several.seeds - 1)
        make_agent(name, last, config).env.close()  # what cannot be taken is told once, here
        return train_seeds(name, rest, given.training, given.several.seeds, given.several.jobs)
    run = train(name, given.training, config)
    return 0 if run.summary["state"] == "finished" else 130


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
    checkpoint: str | None = None
    """Another checkpoint than the newest: the name of a folder in RUN/checkpoints."""
    progress: bool = True
    """Show progress while training."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own that the run's environment or encoder comes from; a file alone imports nothing."""


def resume_command(arguments: list[str]) -> int:
    given = _parse(Resume, "foveal resume", arguments)
    _import(given.imports)
    from .train import resume

    run = resume(given.run, given.total_steps, given.checkpoint, given.progress)
    return 0 if run.summary["state"] == "finished" else 130


@dataclass(frozen=True)
class Evaluate:
    """Score a run's best checkpoint (its last one where none was chosen) on fresh episodes."""

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
    from ..agents import load
    from .evaluation import evaluate, score_text
    from .video import record

    agent = load(given.run, device=given.device)
    if given.video is not None:  # first, so that a name that cannot be written is told before the long part
        film = record(agent, given.video, seed=given.seed, deterministic=given.deterministic)
        print(f"video: {film}", file=sys.stderr if given.json else sys.stdout)
    result = evaluate(
        agent, given.episodes, seed=given.seed, num_envs=given.num_envs, deterministic=given.deterministic
    )
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
    return 0


@dataclass(frozen=True)
class List:
    """What there is to train with, and what has been trained."""

    what: tyro.conf.Positional[Literal["all", "agents", "encoders", "environments", "runs"]] = "all"
    """Which list; all leaves the long one of environments out."""
    contains: Annotated[str, tyro.conf.arg(metavar="TEXT")] = ""
    """Only environments whose id contains this."""
    results: Path = Path("results")
    """Folder of the runs."""


def list_command(arguments: list[str]) -> int:
    given = _parse(List, "foveal list", arguments)
    from ..agents import AGENTS
    from ..envs import list_env_ids
    from ..vision import ENCODERS
    from .listing import print_runs

    def first_line(thing: Any) -> str:
        return (thing.__doc__ or "").strip().splitlines()[0]

    for what, registry in (("agents", AGENTS), ("encoders", ENCODERS)):
        if given.what in ("all", what):
            print(what)
            for name, thing in registry.items():
                print(f"  {name:<16} {first_line(thing)}")
    if given.what == "environments" or given.contains:
        for env_id in list_env_ids():
            if given.contains.lower() in env_id.lower():
                print(env_id)
    if given.what == "runs" or (given.what == "all" and given.results.is_dir()):
        print_runs(given.results)
    return 0


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

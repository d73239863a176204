"""foveal bench: the lab's own benchmark suites, and the README's tables out of what they measured.

A suite is a list of benchmark modules and their arguments (runs/benchmarks/, each runnable by itself), which
skip what they have finished. Their figures are JSON in benchmarks/measured/, with machine, versions, commit;
the tables between `<!-- table: NAME -->` and `<!-- end of table -->` in a Markdown file are made from them.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from .statistics import bootstrap_ci, iqm

MEASURED = Path(__file__).parent / "benchmarks" / "measured"


class Part(NamedTuple):
    module: str
    """In runs/benchmarks."""
    arguments: tuple[str, ...] = ()


def learning(*envs: str) -> Part:
    """A2C, PPO, PQN, REINFORCE and Stable-Baselines3's there, for as many steps as suite.py says."""
    return Part("suite", ("--envs", *envs))


SUITES: dict[str, tuple[Part, ...]] = {
    "classic": (Part("cartpole"), learning("CartPole-v1", "Pendulum-v1", "Acrobot-v1")),
    "box2d": (learning("LunarLander-v3"),),
    "minatar": (learning("MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1"), Part("transfer")),
    "mujoco": (learning("HalfCheetah-v5", "Hopper-v5"),),
    "atari": (Part("pong"),),
    "generative": (Part("vae"), Part("pixelcnn"), Part("gan")),
    "speed": (
        Part("speed"), Part("on_policy_speed"), Part("glimpse_speed"), Part("pixelcnn_sampling"),
        Part("replay"), Part("checkpoint"), Part("tracking"), Part("compare"),
    ),
}  # fmt: skip
"""Name of a suite -> its benchmarks, in order."""
SEEDED = {"suite", "vae", "gan", "cartpole", "transfer"}
"""Benchmarks that take --seeds: how many."""


@dataclass(frozen=True)
class Bench:
    """Run a benchmark suite, or make the tables of a Markdown file from what has been measured."""

    what: tyro.conf.Positional[
        Literal["classic", "box2d", "minatar", "mujoco", "atari", "generative", "speed", "list", "tables"]
    ]
    """A suite; list says what is in them; tables writes them anew into --file."""
    seeds: int | None = None
    """Of the learning suites and the generative one: how many."""
    data_dir: Path | None = None
    """Of the generative suite: where the data sets are."""
    jobs: int = 1
    """Of the learning suites: trainings at a time."""
    plan: bool = False
    """Only say what would be run, and of learning suites what is left and what it costs."""
    file: Path = Path("README.md")
    """For tables: the file."""
    check: bool = False
    """For tables: change nothing; exit code 1 where a table is not what was measured."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def bench(given: Bench) -> int:
    if given.what == "list":
        for name, parts in SUITES.items():
            print(name)
            for part in parts:
                module = importlib.import_module(f"{__package__}.benchmarks.{part.module}")
                about = (module.__doc__ or "").split("\n")[0]
                print(f"  {shlex.join([part.module, *part.arguments])}\n      {about}")
        return 0
    if given.what == "tables":
        return write_tables(given.file, given.check)
    code = 0
    for part in SUITES[given.what]:
        own = list(part.arguments)
        if part.module == "suite":
            own += ["--jobs", str(given.jobs), *(["--plan"] if given.plan else [])]
        if given.seeds:
            if part.module in SEEDED:
                own += ["--seeds", str(given.seeds)]
            elif part.module == "pixelcnn":
                own += ["--seeds", *map(str, range(given.seeds))]
        if given.data_dir is not None and given.what == "generative":
            own += ["--data-dir", str(given.data_dir)]
        command = [sys.executable, "-m", f"foveal.runs.benchmarks.{part.module}", *own]
        print(f"== {shlex.join(['python', *command[1:]])}", flush=True)
        if not given.plan or part.module == "suite":
            code = subprocess.run(command).returncode  # Ctrl-C reaches it too, and it saves what it has
        if code:
            print(f"{part.module} ended with exit code {code}", file=sys.stderr)
            return code if code > 0 else 128 - code
    return 0


def write_tables(path: Path, check: bool) -> int:
    """Replace the tables between the markers of `path`; with `check` only tell which are not as measured.

    Raises ValueError for a marker of no known table, or one that is not closed.
    """
    before = path.read_text(encoding="utf-8")
    names = re.findall(r"^<!-- table: (.+) -->$", before, flags=re.M)
    if unknown := [name for name in names if name not in TABLES]:
        raise ValueError(f"{path}: unknown table {unknown[0]!r}; there are {', '.join(TABLES)}")
    if not names or before.count("<!-- end of table -->") != len(names):
        raise ValueError(f"{path}: takes tables between <!-- table: NAME --> and <!-- end of table -->")
    outdated = []

    def table(match: re.Match[str]) -> str:
        new = TABLES[match[1]](MEASURED)
        if new != match[2]:
            outdated.append(match[1])
        return f"<!-- table: {match[1]} -->\n{new}\n<!-- end of table -->"

    after = re.sub(r"<!-- table: (.+?) -->\n(.*?)\n<!-- end of table -->", table, before, flags=re.S)
    if check:
        for name in outdated:
            print(f"{path}: the table {name} is not what was measured; foveal bench tables", file=sys.stderr)
        return int(bool(outdated))
    if outdated:
        path.write_text(after, encoding="utf-8")
    print(f"{path}: {len(names)} tables, {len(outdated)} of them changed")
    return 0


def read(measured: Path, name: str) -> Any:
    return json.loads((measured / f"{name}.json").read_text(encoding="utf-8"))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, others are numbers."""
    rule = "|".join(["---", *["--:"] * (len(head) - 1)])
    lines = ["| " + " | ".join(line).lstrip() + " |" for line in [head, *rows]]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def suite_table(measured: Path) -> str:
    from .benchmarks.suite import read as cells
    from .benchmarks.suite import report

    return report(cells(measured / "suite.json"))


def cartpole_table(measured: Path) -> str:
    results = read(measured, "cartpole")
    names = {
        "foveal": "foveal, `DQN.recipe`",
        "foveal, zoo recipe": "foveal, zoo's recipe",
        "sb3": f"Stable-Baselines3 {results['versions']['stable-baselines3']}, zoo's recipe",
    }
    rows = []
    for agent, name in names.items():
        cells = sorted((c for c in results["cells"] if c["agent"] == agent), key=lambda cell: cell["seed"])
        if cells:
            both = {key: [cell[key] for cell in cells] for key in ("chosen", "last")}
            means = [
                "{:.1f} ({:.1f} to {:.1f})".format(np.mean(scores), *bootstrap_ci(scores))
                for scores in both.values()
            ]
            each = " ".join(f"{score:.0f}" for score in both["last"])
            rows.append([name, *means, f"{iqm(both['last']):.1f}", each])
    return markdown(["", "chosen", "last", "last, IQM", "last, seed by seed"], rows)


def speed_table(measured: Path) -> str:
    results = read(measured, "speed")
    speeds, ratios = results["steps_per_cpu_second"], results["ratio_to_sb3"]
    names = {
        "foveal": "foveal, double off", "foveal, double": "foveal, double on", "sb3": "Stable-Baselines3",
    }  # fmt: skip
    spread = f" ({min(ratios):.1f} to {max(ratios):.1f} round by round)"
    rows = [
        [name, f"{speeds[key]:,.0f}", f"{speeds[key] / speeds['sb3']:.1f}" + spread * (key == "foveal")]
        for key, name in names.items()
    ]
    return markdown(["", "env steps per CPU-second", "times Stable-Baselines3"], rows)


def on_policy_speed_table(measured: Path) -> str:
    rows = []
    for name, task in read(measured, "on_policy_speed")["tasks"].items():
        speeds, ratios = task["steps_per_cpu_second"], task["ratio_to_sb3"]
        spread = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
        rows.append(
            [name, f"{speeds['foveal']:,.0f}", f"{speeds['sb3']:,.0f}", f"{task['ratio']:.1f}{spread}"]
        )
    return markdown(["env steps per CPU-second", "foveal", "Stable-Baselines3", "times"], rows)


def report_of(name: str) -> Callable[[Path], str]:
    """What benchmark `name` itself says of its finished cells."""

    def table(measured: Path) -> str:
        module = importlib.import_module(f".benchmarks.{name}", __package__)
        return module.report(read(measured, name)["cells"])

    return table


TABLES: dict[str, Callable[[Path], str]] = {
    "cartpole": cartpole_table,
    "suite": suite_table,
    **{name: report_of(name) for name in ("transfer", "vae", "world_model", "gan", "pixelcnn", "ram")},
    "speed": speed_table,
    "on_policy_speed": on_policy_speed_table,
}

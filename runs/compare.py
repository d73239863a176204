"""foveal compare: runs side by side, as a page, as figures and CSV for papers, and as a table."""

from __future__ import annotations

import csv
import difflib
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from .history import History, axes_of, find_field, label, load, matches, text_of
from .plots import draw_curves, mean_curve, write_figure
from .statistics import (
    Statistic,
    bootstrap_ci,
    iqm,
    performance_profile,
    probability_of_improvement,
    stratified_ci,
)

SCORES = (
    "eval/return_mean", "test/error", "test/bits_per_dim", "test/nats", "test/fid", "test/squared_error",
    "last/return_mean",
)  # fmt: skip
"""Final scores of summary.json, in the order in which they are looked for."""
BASELINES = {
    "eval/return_mean": "baseline/random_policy",
    "last/return_mean": "baseline/random_policy",
    "test/error": "baseline/commonest_class",
    "test/bits_per_dim": "baseline/independent_pixels",
    "test/nats": "baseline/independent_pixels_nats",
    "test/squared_error": "baseline/mean_image",
}
"""What a trivial method gets, of each score that has one."""
CURVES = (
    "eval/return_mean", "test/error", "test/bits_per_dim", "test/nats", "test/fid",
    "last/return_mean", "validation/accuracy", "validation/error", "validation/bits_per_dim",
    "validation/nats", "validation/elbo", "validation/loss", "train/return_mean", "train/loss",
)  # fmt: skip
LOWER = ("error", "squared_error", "loss", "bits_per_dim", "bpd", "nats", "fid", "nll", "perplexity")
"""A metric with one of these as a word of its name is better when it is lower."""
FEW = 5
"""Fewer seeds than this say little about a mean's uncertainty: the bootstrap's intervals are too narrow."""
STATISTICS: dict[str, Statistic] = {"mean": np.mean, "iqm": iqm}


@dataclass(frozen=True)
class Compare:
    """Compare runs: one page with curves, scores, intervals and settings; figures; CSV; and a table.

    Runs are foveal's folders, the cells of a benchmark's JSON file, or the offline files of any other program
    that logs to Weights & Biases.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    """Run folders, folders of them, .wandb files, and what `foveal bench` has measured (.json)."""
    group: str | None = None
    """Only runs of this group (the folder that they are in); * and ? stand for any text."""
    where: tuple[str, ...] = ()
    """Only runs with these settings: agent=dqn,env=CartPole-v1; * and ? stand for any text."""
    by: tuple[str, ...] = ()
    """Settings whose values make runs one line, seeds of it; by default the agent, and whatever else its runs
    differ in apart from the seed."""
    score: str | None = None
    """Final score: a key of summary.json, or (of other programs) of the last row."""
    metric: str | None = None
    """What the curves show."""
    axis: str | None = None
    """What they are drawn against: env_step, grad_step, epoch, time/wall_s, ..."""
    statistic: Literal["mean", "iqm"] = "mean"
    """Over seeds: mean, or interquartile mean, which single lucky or failed seeds move less."""
    better: Literal["auto", "higher", "lower"] = "auto"
    """Which score is better; auto goes by its name (error, loss, nats, ... are better lower)."""
    rename: tuple[str, ...] = ()
    """Names of other programs' metrics and axes as ours: rollout/ep_rew_mean=train/return_mean
    global_step=env_step."""
    out: Path = Path("results/compare")
    """Folder for compare.html, curves.png, .svg and .csv, and scores.csv."""
    max_mb: float = 10.0
    """How large the page may get: what does not fit (films, then rarer metrics) is left out, and named."""

    def __post_init__(self) -> None:
        if not self.max_mb >= 3:
            raise ValueError(f"max_mb must be 3 or more (plotly alone takes 2), got {self.max_mb}")


@dataclass
class Comparison:
    """Runs and how they are looked at. `labels` go with `runs`: those of one label are seeds of one thing."""

    runs: list[History]
    labels: list[str]
    score: str
    lower: bool
    metric: str
    axis: str
    statistic: str
    damaged: list[tuple[Path, str]]

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run.task for run in self.runs))

    def of(self, task: str) -> dict[str, list[History]]:
        """The task's runs by label."""
        found: dict[str, list[History]] = {}
        for run, name in zip(self.runs, self.labels):
            if run.task == task:
                found.setdefault(name, []).append(run)
        return found

    def scores(self, task: str) -> dict[str, np.ndarray]:
        """The final scores (n,) of each label that has some, the best first."""
        found = {
            name: np.array([s for run in runs if (s := run.score(self.score)) is not None])
            for name, runs in self.of(task).items()
        }
        found = {name: scores for name, scores in found.items() if scores.size}
        order = sorted(found, key=lambda name: self.middle(found[name]), reverse=not self.lower)
        return {name: found[name] for name in order}

    def middle(self, scores: np.ndarray) -> float:
        return float(STATISTICS[self.statistic](scores, axis=-1))

    def improvement(self, better: Sequence[np.ndarray], worse: Sequence[np.ndarray]) -> tuple[float, ...]:
        """How likely a run of `better` beats one of `worse`, over tasks, with the interval."""
        if self.lower:
            better, worse = worse, better
        return probability_of_improvement(better, worse)

    def curves(self, task: str) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        return {
            name: [series for run in runs if (series := run.series(self.metric, self.axis))[0].size]
            for name, runs in self.of(task).items()
        }


def compare(given: Compare) -> int:
    """What `foveal compare` does: prints the table, and writes page, figures and CSV. Returns the exit code.

    Raises ValueError or OSError, before anything is written, for whatever cannot be taken.
    """
    began = time.perf_counter()
    found = choose(given)
    given.out.mkdir(parents=True, exist_ok=True)
    print(table_text(found), end="")
    for path, reason in found.damaged:
        print(f"skipped: {path}: {reason}", file=sys.stderr)
    if found.damaged:
        counted = f"{len(found.damaged)} run{'s' * (len(found.damaged) > 1)}"
        print(f"skipped {counted}, compared {len(found.runs)}", file=sys.stderr)
    figure = draw_curves(
        {task: found.curves(task) for task in found.tasks()},
        statistic=STATISTICS[found.statistic],
        x_label=axis_text(found.axis),
        y_label=found.metric,
    )
    for form in ("png", "svg"):
        print(f"curves: {write_figure(figure, given.out / f'curves.{form}', form)}")
    print(f"curves: {write_csv(given.out / 'curves.csv', curve_rows(found))}")
    print(f"scores: {write_csv(given.out / 'scores.csv', score_rows(found))}")
    if normalised(found):
        print(f"profiles: {write_csv(given.out / 'profiles.csv', profile_rows(found))}")
    try:
        from .page import write_page

        path, left_out = write_page(found, given.out / "compare.html", int(given.max_mb * 1e6))
    except ImportError as error:
        print(f'page: none, for it needs plotly: pip install "foveal[compare]" ({error})', file=sys.stderr)
        return 0
    for line in left_out:
        print(f"not in the page: {line}", file=sys.stderr)
    size = path.stat().st_size / 1e6
    print(f"page: {path} ({size:.1f} MB, {time.perf_counter() - began:.1f} s for {len(found.runs)} runs)")
    return 0


def choose(given: Compare) -> Comparison:
    """The runs that are asked for, and what of them can be compared. Raises ValueError where nothing can,
    with what there is."""
    runs, damaged = load(given.runs)
    where = parse_pairs("where", given.where)
    renames = parse_pairs("rename", given.rename)
    places = ", ".join(map(str, given.runs))
    if not runs:
        bad = f"; {len(damaged)} could not be read, the first because: {damaged[0][1]}" if damaged else ""
        raise ValueError(f"no runs in {places}{bad}")
    where = {find_field(runs, key): value for key, value in where.items()}
    if given.group is not None:
        where["group"] = given.group
    chosen = [run for run in runs if matches(run, where)]
    if not chosen:
        asked = ", ".join(f"{key}={value}" for key, value in where.items())
        there = "; ".join(f"{key}: {counts(run.fields.get(key) for run in runs)}" for key in where)
        raise ValueError(f"no run matches {asked}. {len(runs)} runs in {places} have {there}")
    for run in chosen:
        run.table = {renames.get(key, key): column for key, column in run.table.items()}
        run.summary = {renames.get(key, key): value for key, value in run.summary.items()}
    score = choose_score(chosen, given.score)
    metric, axis = choose_curve(chosen, given.metric, given.axis, score)
    words = score.replace("/", " ").replace("_", " ").split() + score.split("/")
    lower = given.better == "lower" or (given.better == "auto" and any(word in LOWER for word in words))
    labels = label(chosen, [find_field(chosen, key) for key in given.by])
    return Comparison(chosen, labels, score, lower, metric, axis, given.statistic, damaged)


def parse_pairs(argument: str, texts: Sequence[str]) -> dict[str, str]:
    """("a=1,b=2", "c=3") -> {"a": "1", "b": "2", "c": "3"}."""
    pairs = {}
    for part in itertools.chain.from_iterable(text.split(",") for text in texts):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise ValueError(f"{argument} takes name=value, got {part!r}")
        pairs[key.strip()] = value.strip()
    return pairs


def counts(values: Iterable[Any], most: int = 8) -> str:
    """`dqn (4 runs), ppo (1 run)`, the most frequent first."""
    found = Counter(text_of(value) for value in values).most_common()
    names = [f"{value} ({n} run{'s' * (n > 1)})" for value, n in found[:most]]
    return ", ".join(names) + (", ..." if len(found) > most else "")


def choose_score(runs: Sequence[History], asked: str | None) -> str:
    """The score that all runs with a score have."""
    if asked is not None:
        if not any(run.score(asked) is not None for run in runs):
            raise ValueError(_unknown("score", asked, numbers_of(runs)))
        return asked
    having = {key: [run for run in runs if run.score(key) is not None] for key in SCORES}
    having = {key: some for key, some in having.items() if some}
    scored = {id(run) for some in having.values() for run in some}
    for key, some in having.items():
        if len(some) == len(scored):
            return key
    if having:
        kinds = "; ".join(f"{key}: {counts(run.fields.get('agent') for run in some)}"
                          for key, some in having.items())  # fmt: skip
        raise ValueError(f"these runs have no score in common ({kinds}): choose some with --where agent=...")
    shared = set.intersection(*(set(run.table) for run in runs))
    return next((key for key in CURVES if key in shared), "eval/return_mean")


def choose_curve(
    runs: Sequence[History], metric: str | None, axis: str | None, score: str
) -> tuple[str, str]:
    """What the curves show against what: the first that all runs have, of those that were not asked for."""
    if metric is not None and not any(metric in run.table for run in runs):
        raise ValueError(_unknown("metric", metric, numbers_of(runs)))
    if axis is not None and not any(axis in run.table for run in runs):
        raise ValueError(_unknown("axis", axis, numbers_of(runs)))
    shared = [key for key in numbers_of(runs) if all(key in run.table for run in runs)]
    plain = [key for key in shared if not key.startswith(("speed/", "time/", "_")) and key not in AXIS_TEXTS]
    for name in [metric] if metric else [*dict.fromkeys([score, *CURVES, *plain])]:
        some = [run for run in runs if name in run.table] if metric else runs
        axes = axes_of(some, name) if axis is None else [axis]
        if axes and all(run.series(name, axes[0])[0].size for run in some):
            return name, axes[0]
    kinds: dict[str, list[History]] = {}
    for run in runs:
        kinds.setdefault(", ".join(axes_of([run])) or "none", []).append(run)
    if len(kinds) > 1:
        named = "; ".join(
            f"{axes}: {len(some)} run{'s' * (len(some) > 1)}, such as {some[0].path}"
            for axes, some in kinds.items()
        )
        raise ValueError(f"these runs have different axes ({named}): choose some with --where, or --rename")
    raise ValueError(
        f"these runs have no metric in common that all have values of: {named_metrics(runs)}; "
        "choose some with --where, or name one with --metric"
    )


def named_metrics(runs: Sequence[History]) -> str:
    having = {key: sum(key in run.table for run in runs) for key in numbers_of(runs)}
    return ", ".join(f"{key} ({n} of {len(runs)})" for key, n in list(having.items())[:12])


def numbers_of(runs: Sequence[History]) -> list[str]:
    """Names of all columns and numbers of the runs."""
    return list(dict.fromkeys(key for run in runs for key in [*run.table, *run.summary]))


AXIS_TEXTS = {
    "env_step": "environment steps", "grad_step": "gradient steps", "epoch": "epochs",
    "global_step": "global step", "_step": "logged step", "time/wall_s": "wall time in s",
}  # fmt: skip


def axis_text(axis: str) -> str:
    return AXIS_TEXTS.get(axis, axis)


def _unknown(argument: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:12]
    return f"{argument}: no run has {name!r}; nearest: {', '.join(near)}"


def form_of(scores: Iterable[float]) -> str:
    """How to print scores of this size: four digits."""
    size = max((abs(score) for score in scores), default=1.0)
    return f",.{max(0, min(6, 4 - math.ceil(math.log10(size)) if size > 0 else 1))}f"


def verdict(found: Comparison, task: str) -> str:
    """Which is best, and how sure that is, in a sentence."""
    scores = found.scores(task)
    if not scores:
        return f"On {task} no run has a score ({found.score}) yet."
    (best, ours), *others = scores.items()
    if not others:
        return f"On {task} there is only {best}."
    second, theirs = others[0]
    p, low, high = found.improvement([ours], [theirs])
    odds = (
        f"a run of it beats one of {second} with probability {p:.2f} (95 % interval {low:.2f} to {high:.2f})"
    )
    few = min(ours.size, theirs.size)
    if few < FEW:
        chance = 2 / math.comb(ours.size + theirs.size, ours.size)
        return (
            f"On {task} {best} is ahead: {odds}. Not sure: with {ours.size} and {theirs.size} seeds even the "
            f"clearest order comes by chance in {min(1, chance):.0%} of cases."
        )
    if low > 0.5:
        return f"On {task} {best} is best: {odds}."
    return f"On {task} {best} and {second} are not told apart: {odds}."


def table_text(found: Comparison) -> str:
    """A table a task, and one over all tasks, as the terminal shows them."""
    lines: list[str] = []
    few = False
    for task in found.tasks():
        scores = found.scores(task)
        form = form_of(np.concatenate(list(scores.values())) if scores else [])
        rows = [("", "seeds", f"{found.statistic} (95 % interval)", "best beats it", "steps/s", "MB")]
        names = [*scores, *(name for name in found.of(task) if name not in scores)]
        for place, name in enumerate(names):
            runs = found.of(task)[name]
            values = scores.get(name, np.empty(0))
            text, odds = "no score yet", ""
            if values.size:
                text = format(found.middle(values), form)
                if values.size > 1:
                    low, high = bootstrap_ci(values, STATISTICS[found.statistic])
                    text += f" ({low:{form}} to {high:{form}})"
                if place:
                    odds = "{:.2f} ({:.2f} to {:.2f})".format(
                        *found.improvement([scores[names[0]]], [values])
                    )
            few = few or values.size < FEW
            speed = average(runs, "speed/env_steps_per_s", "speed/updates_per_s", "speed/images_per_s")
            memory = average(runs, "memory/peak_mb")
            mark = " *" if values.size < FEW else "  "
            rows.append((name, f"{values.size}{mark}", text, odds, speed, memory))
        direction = "lower" if found.lower else "higher"
        lines += [f"{task}: {found.score}, {direction} is better", *aligned(rows), verdict(found, task), ""]
    if together := over_tasks(found):
        lines += [
            "All tasks, 0 the baseline (else the worst run) and 1 the best mean of each:",
            *together,
            "",
        ]
    if few:
        lines.append(f"* fewer than {FEW} seeds: an interval over so few is too narrow")
    return "\n".join(lines) + "\n"


def normalised(found: Comparison) -> dict[str, list[np.ndarray]]:
    """Of each label with scores on every one of several tasks: the scores by task, where 0 is the baseline's
    score (the worst run's where there is none) and 1 the best label's mean. Else empty."""
    tasks = found.tasks()
    scores = {task: found.scores(task) for task in tasks}
    names = [name for name in scores[tasks[0]] if all(name in scores[task] for task in tasks)]
    if len(tasks) < 2 or not names:
        return {}
    result: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for task in tasks:
        everything = np.concatenate(list(scores[task].values()))
        key = BASELINES.get(found.score)
        base = [run.summary[key] for run in found.runs if run.task == task and key in run.summary]
        zero = float(np.mean(base)) if base else (everything.max() if found.lower else everything.min())
        one = (min if found.lower else max)(float(values.mean()) for values in scores[task].values())
        for name in names:
            result[name].append((scores[task][name] - zero) / (one - zero if one != zero else 1.0))
    return result


def over_tasks(found: Comparison) -> list[str]:
    """Aggregates over several tasks, the best first, as lines of text."""
    scores = normalised(found)
    if not scores:
        return []
    names = sorted(scores, key=lambda name: -float(iqm(np.concatenate(scores[name]))))
    rows = [("", "runs", "IQM (95 % interval)", "best beats it")]
    for place, name in enumerate(names):
        pooled = np.concatenate(scores[name])
        low, high = stratified_ci(scores[name], iqm)
        p = probability_of_improvement(scores[names[0]], scores[name])
        odds = "{:.2f} ({:.2f} to {:.2f})".format(*p) if place else ""
        rows.append((name, str(pooled.size), f"{iqm(pooled):.3f} ({low:.3f} to {high:.3f})", odds))
    return aligned(rows)


def average(runs: Sequence[History], *keys: str) -> str:
    """The mean of the first key that runs have in their summaries, as text."""
    for key in keys:
        values = [run.summary[key] for run in runs if isinstance(run.summary.get(key), int | float)]
        if values:
            return f"{np.mean(values):,.0f}"
    return "-"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        (
            "  " + row[0].ljust(widths[0]) + "".join("  " + c.rjust(w) for c, w in zip(row[1:], widths[1:]))
        ).rstrip()
        for row in rows
    ]


def curve_rows(found: Comparison) -> Iterable[Sequence[Any]]:
    """The curves that the figure shows, every recorded step; a label with one run has no interval."""
    yield "task", "label", "seeds", found.axis, f"{found.metric} ({found.statistic})", "ci95_low", "ci95_high"
    for task in found.tasks():
        for name, curves in found.curves(task).items():
            if curves:
                for x, *values in zip(*mean_curve(curves, STATISTICS[found.statistic])):
                    bounds = values if len(curves) > 1 else [values[0], "", ""]
                    yield task, name, len(curves), *(float(v) if v != "" else v for v in (x, *bounds))


def score_rows(found: Comparison) -> Iterable[Sequence[Any]]:
    """Per task and label: the final score over seeds, its interval, and how likely the best one beats it."""
    yield "task", "label", "seeds", "mean", "ci95_low", "ci95_high", "iqm", "iqm_ci95_low", "iqm_ci95_high", \
        "best_beats_it", "beats_ci95_low", "beats_ci95_high", "scores"  # fmt: skip
    for task in found.tasks():
        scores = found.scores(task)
        for name, values in scores.items():
            best = next(iter(scores))
            beats = found.improvement([scores[best]], [values]) if name != best else ("", "", "")
            intervals = (
                [bootstrap_ci(values), bootstrap_ci(values, iqm)] if values.size > 1 else [("", "")] * 2
            )
            yield (
                task, name, values.size, values.mean(), *intervals[0], iqm(values), *intervals[1], *beats,
                " ".join(map(repr, values.tolist())),
            )  # fmt: skip


def profile_rows(found: Comparison) -> Iterable[Sequence[Any]]:
    """The share of runs above each normalised score, over all tasks."""
    yield "threshold", "label", "share_of_runs_above", "ci95_low", "ci95_high"
    thresholds = np.linspace(0, 1, 51)
    for name, tasks in normalised(found).items():
        for row in zip(thresholds, *performance_profile(tasks, thresholds)):
            yield row[0], name, *row[1:]


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> Path:
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    draft.replace(path)
    return path

"""The model card of a pushed run: README.md, whose head the Hub reads and whose body people read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..agents import AGENTS
from .fit import MODELS

SCORES = ("eval/", "test/", "last/", "baseline/")
"""What of summary.json stands in the table."""


def model_card(
    repo: str,
    folder: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    description: Mapping[str, Any],
    shown: Sequence[str],
) -> str:
    """Markdown with a YAML head, for a run pushed to `repo`, which is pulled into `folder`.

    `description` is that of the weights file, `shown` the pictures and films that lie beside it. The licence
    is left to whoever pushes.
    """
    name, task = str(config.get("agent")), str(config.get("env_id"))
    agent = name in AGENTS
    step = f"{description['env_step']:,} environment" if agent else f"{description['grad_step']:,} gradient"
    lines = ["---"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in head(name, task, summary).items()]
    lines += ["# license: whoever pushes chooses one", "---", "", f"# {name} on {task}", ""]
    kind = "An agent" if agent else "A model"
    lines += [f"{kind} of foveal, seed {config.get('seed')}, with the weights of {step} steps.", ""]
    if "eval/return_mean" in summary:
        lines += [f"Score: {score(summary)}.", ""]
    figures = [(key, value) for key, value in summary.items() if key.startswith(SCORES)]
    if rows := [f"| {key} | {value:g} |" for key, value in figures if isinstance(value, int | float)]:
        lines += ["| measure | value |", "|---|--:|", *rows, ""]
    for file in shown:
        lines += [f"![{file}]({file})" if file.endswith(".png") else f"[One episode]({file})", ""]
    lines += ["## To use it", "", "```bash", f"foveal pull {repo}", f"foveal evaluate {folder}", "```", ""]
    if agent:
        code = ["import foveal.agents", "", f'agent = foveal.agents.load("{folder}")']
        code += ["action, state = agent.predict(obs, deterministic=True)"]
    else:
        model = MODELS[name]
        code = [f"from {model.__module__.rpartition('.')[0]} import {model.__name__}", ""]
        code += [f'model = {model.__name__}.load("{folder}")']
    lines += ["```python", *code, "```", ""]
    if agent and str(description["env"].get("env_id", "")).count(":"):
        lines += ["Its environment is from a module of its own, which `--import` names.", ""]
    lines += ["## Settings", "", "```json", json.dumps(description["config"], indent=2), "```", ""]
    return "\n".join(lines)


def head(name: str, task: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML head, as JSON values, which are YAML too: what the Hub finds and ranks a repository by."""
    kind = "reinforcement-learning" if name in AGENTS else "generative"
    if name in ("classifier", "knn", "ram"):
        kind = "image-classification"
    found: dict[str, Any] = {"library_name": "foveal", "tags": [kind, name, task]}
    metric = None
    if "eval/return_mean" in summary:
        value = f"{summary['eval/return_mean']:.2f} +/- {summary['eval/return_std']:.2f}"
        metric = {"type": "mean_reward", "name": "mean_reward", "value": value, "verified": False}
    elif "test/error" in summary:
        value = round(1 - summary["test/error"], 4)
        metric = {"type": "accuracy", "name": "accuracy", "value": value, "verified": False}
    if metric is not None:
        dataset = {"name": task, "type": task}
        result = {"task": {"type": kind}, "dataset": dataset, "metrics": [metric]}
        found["model-index"] = [{"name": name, "results": [result]}]
    return found


def score(summary: Mapping[str, Any]) -> str:
    """The return with its interval and the episodes that it is the mean of."""
    text = f"{summary['eval/return_mean']:.1f} ± {summary['eval/return_std']:.1f}"
    low, high = summary.get("eval/return_ci95", (None, None))
    interval = "" if low is None else f", 95 % interval of the mean {low:.1f} to {high:.1f}"
    return f"{text} over {summary.get('eval/episodes')} fresh episodes{interval}"

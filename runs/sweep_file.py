"""What a sweep tries: a YAML file, or a Python file that assigns the same names.

    train: dqn                                    # what `foveal train` takes
    method: tpe                                   # random, grid
    trials: 20
    prune: median                                 # none, asha
    metric: eval/return_mean                      # a key of summary.json, or of metrics.jsonl: its best
    goal: maximize                                # minimize
    parameters:                                   # settings of the Config, or options of the run
      env_id: CartPole-v1                         # one value
      batch_size: [32, 64, 128]                   # choices
      learning_rate: {min: 1e-4, max: 1e-2, log: true}
      train_every: {min: 16, max: 128, step: 16}
      net_arch: {value: [64, 64]}                 # one value, which is a list

In a Python file a parameter may be a distribution of Optuna's too. Everything is checked before a trial
starts: names, types, ranges, and what the Config itself refuses.
"""

import itertools
import json
import math
import runpy
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .settings import check_known, default_settings, fields_of, numeric, type_of, typed_value

METHODS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "asha")
GOALS = ("maximize", "minimize")
OURS = ("results", "group", "name", "progress", "init_from")
"""Options of a run that a sweep gives by itself, or that would make trials depend on a file."""
RANGE = {"min", "max", "log", "step"}


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `parameters` are {"value": v}, {"values": [...]} or {"min", "max", "log",
    "step"}, with values of the fields' types."""

    train: str
    parameters: dict[str, dict[str, Any]]
    metric: str
    goal: str
    method: str = "tpe"
    trials: int = 20
    prune: str = "none"
    seed: int = 0
    """Of the sampler; a trial's own is the option `seed`."""
    unsearched: dict[str, Any] = field(default_factory=dict)
    """What the searched settings are by default, by the recipe."""

    @property
    def fixed(self) -> dict[str, Any]:
        return {name: p["value"] for name, p in self.parameters.items() if "value" in p}

    @property
    def searched(self) -> dict[str, dict[str, Any]]:
        return {name: p for name, p in self.parameters.items() if "value" not in p}

    def default_trial(self) -> dict[str, Any] | None:
        """The recipe's own values of what is searched, where all of them lie within it."""
        for name, parameter in self.searched.items():
            default = self.unsearched[name]
            if "values" in parameter:
                if default not in parameter["values"]:
                    return None
            elif not isinstance(default, int | float) or not within(parameter, default):
                return None
        return dict(self.unsearched)

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last parameter fastest."""
        values = [points(parameter) for parameter in self.searched.values()]
        return [dict(zip(self.searched, combination)) for combination in itertools.product(*values)]

    def to_json(self) -> dict[str, Any]:
        """What has to be equal for one sweep to go on with another's trials: all but their number."""
        content = {key: value for key, value in asdict(self).items() if key != "trials"}
        return json.loads(json.dumps(content, default=str))


def within(parameter: Mapping[str, Any], value: float) -> bool:
    low, high, step = parameter["min"], parameter["max"], parameter["step"]
    on_grid = step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-9)
    return low <= value <= high and on_grid


def points(parameter: Mapping[str, Any]) -> list[Any]:
    """What a grid tries: the choices, or every `step` of a range."""
    if "values" in parameter:
        return list(parameter["values"])
    low, high, step = parameter["min"], parameter["max"], parameter["step"]
    return [low + step * number for number in range(math.floor((high - low) / step + 1e-9) + 1)]


def ends(parameter: Mapping[str, Any]) -> list[Any]:
    """The values that tell whether a Config takes a parameter at all."""
    return list(parameter.get("values", ())) or [parameter["min"], parameter["max"]]


def read_sweep(path: Path) -> Sweep:
    """The sweep that a file describes. Raises ValueError, which names the setting, for whatever is wrong."""
    content = _content(path)
    known = {f.name for f in fields(Sweep)} - {"unsearched"}
    for key in content:
        check_known("name", key, known)
    if "train" not in content or not content.get("parameters"):
        raise ValueError(f"{path} needs `train:` (an agent or model) and `parameters:`")
    metric, options, config = _trained(content["train"], content["parameters"], path)
    sweep = Sweep(
        **{key: value for key, value in content.items() if key not in ("parameters", "metric", "goal")},
        parameters=_parameters(content["parameters"], fields_of(type(config)) | fields_of(options.func)),
        metric=content.get("metric", metric),
        goal=content.get("goal", _goal(content["metric"]) if "metric" in content else "maximize"),
    )
    _check(sweep)
    defaults = {**asdict(options()), **asdict(config)}
    sweep = replace(sweep, unsearched={name: defaults[name] for name in sweep.searched})
    _check_values(sweep, options, config)
    return sweep


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no sweep file {path}")
    if path.suffix == ".py":
        names = {name: value for name, value in runpy.run_path(str(path)).items() if name[:1] != "_"}
        return {
            name: value
            for name, value in names.items()
            if not isinstance(value, types.ModuleType | type) and not callable(value)
        }
    import yaml  # W&B brings it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no sweep file: it needs `train:` and `parameters:`")
    return {str(key): value for key, value in content.items()}


def _trained(name: Any, parameters: Any, path: Path) -> tuple[str, Any, Any]:
    """Of what is trained: the metric to choose by, the run's options, and the recipe."""
    import functools

    from ..agents import AGENTS
    from .fit import MODELS, FitOptions
    from .train import Options

    if not isinstance(parameters, dict):
        raise ValueError(f"{path}: parameters takes names and values, got {parameters!r}")

    def given(key: str, default: Any = None) -> Any:
        value = parameters.get(key, default)
        value = value.get("value", default) if isinstance(value, dict) else value
        return default if isinstance(value, list) else value

    if name in AGENTS:
        recipe = AGENTS[name].recipe(given("env_id", Options.env_id))
        return "eval/return_mean", functools.partial(Options, **AGENTS[name].run_options), recipe
    check_known("agent or model", str(name), [*AGENTS, *MODELS])
    choices = {key: given(key) for key in MODELS[name].recipe_choices}
    recipe = MODELS[name].recipe(dataset=given("dataset", FitOptions.dataset), **choices)
    defaults = getattr(MODELS[name], "run_options", None)
    options = defaults(given("dataset", FitOptions.dataset)) if defaults else {}
    return MODELS[name].chosen_by, functools.partial(FitOptions, **options), recipe


def _goal(metric: Any) -> str:
    from .tracking import best_of

    return "minimize" if best_of(str(metric)) == "min" else "maximize"


def _parameters(given: Mapping[str, Any], known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parameters = {}
    for key, what in given.items():
        name = str(key).replace("-", "_")
        if name in OURS:
            raise ValueError(f"{name} is the sweep's own: give `foveal sweep` its --results and --group")
        parameters[name] = _parameter(name, type_of(name, known), _plain(what))
    if all("value" in parameter for parameter in parameters.values()):
        raise ValueError("parameters: nothing is searched: each has one value")
    return parameters


def _plain(what: Any) -> Any:
    """Optuna's distributions as the dict that says the same."""
    if hasattr(what, "choices"):
        return {"values": list(what.choices)}
    if hasattr(what, "low") and hasattr(what, "high"):
        # An IntDistribution's step of 1 means none.
        step = getattr(what, "step", None)
        return {"min": what.low, "max": what.high, "log": what.log, "step": None if what.log else step}
    return what


def _parameter(name: str, kind: Any, what: Any) -> dict[str, Any]:
    if isinstance(what, list):
        what = {"values": what}
    if not isinstance(what, dict):
        what = {"value": what}
    keys = set(what)
    if keys == {"value"}:
        return {"value": typed_value(name, kind, what["value"])}
    if keys == {"values"}:
        if not isinstance(what["values"], list | tuple) or not what["values"]:
            raise ValueError(f"{name}: values is empty: it takes a list of one or more")
        return {"values": [typed_value(name, kind, value) for value in what["values"]]}
    if not {"min", "max"} <= keys <= RANGE:
        raise ValueError(
            f"{name}: takes one value, a list of choices, or min and max with log or step; got {what!r}"
        )
    number = numeric(kind)
    if number is None:
        raise ValueError(f"{name}: takes a list of choices, not a range")
    low, high = (typed_value(f"{name}: {end}", number, what[end]) for end in ("min", "max"))
    step, log = what.get("step"), what.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{name}: log takes true or false, got {log!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{name}: the range is empty: min {low} is not below max {high}")
    if log and not low > 0:
        raise ValueError(f"{name}: with log, min must be greater than 0, got {low}")
    if log and step is not None:
        raise ValueError(f"{name}: takes log or step, not both")
    if step is not None:
        step = typed_value(f"{name}: step", number, step)
        if not 0 < step <= high - low:
            raise ValueError(f"{name}: step must be greater than 0 and at most max - min, got {step}")
    elif number is int and not log:
        step = 1
    return {"min": low, "max": high, "log": log, "step": step}


def _check(sweep: Sweep) -> None:
    for name, allowed in (("method", METHODS), ("prune", PRUNERS), ("goal", GOALS)):
        if getattr(sweep, name) not in allowed:
            raise ValueError(f"{name} takes {', '.join(allowed)}, got {getattr(sweep, name)!r}")
    for name, least in (("trials", 1), ("seed", 0)):
        value = getattr(sweep, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}")
    if not isinstance(sweep.metric, str):
        raise ValueError(f"metric takes a key of summary.json or metrics.jsonl, got {sweep.metric!r}")
    if sweep.method == "grid":
        for name, parameter in sweep.searched.items():
            if "min" in parameter and parameter["step"] is None:
                raise ValueError(f"{name}: a grid needs a list of choices, or a step")


def _check_values(sweep: Sweep, options: Any, config: Any) -> None:
    """Make the Config with each end of each parameter; a ValueError is of one that no others go with.

    Then make what is trained, once, so that an unknown environment or encoder is told here too.
    """
    surroundings = list(_surroundings(sweep))
    for name, parameter in sweep.searched.items():
        for value in ends(parameter):
            problem = None
            for others in surroundings:
                try:
                    default_settings(options, config, others | {name: value})[0]()
                    break
                except ValueError as error:
                    problem = error
            else:
                raise ValueError(f"{name} = {value!r} is nothing to train with: {problem}") from problem
    made, problem = False, None
    for others in surroundings:
        try:
            _make(sweep.train, *default_settings(options, config, others))
            made = True
            break
        except ValueError as error:
            problem = problem or error
    if not made:
        raise ValueError(str(problem)) from problem


def _surroundings(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """The fixed settings with the defaults, and with the first and the last of what is searched."""
    yield sweep.fixed
    for end in (0, -1):
        yield sweep.fixed | {name: ends(parameter)[end] for name, parameter in sweep.searched.items()}


def _make(name: str, options: Any, config: Any) -> None:
    from ..agents import AGENTS
    from .fit import make_model, open_dataset
    from .train import make_agent

    if name in AGENTS:
        make_agent(name, options(), config).env.close()
    else:
        make_model(name, options(), config, open_dataset(options()))


def wandb_config(sweep: Sweep) -> dict[str, Any]:
    """The same sweep for W&B's server: `wandb sweep FILE`, then `wandb agent` on any machine."""
    parameters: dict[str, dict[str, Any]] = {}
    for name, p in sweep.parameters.items():
        if name == "track":
            continue
        if "min" not in p:
            parameters[name] = json.loads(json.dumps(p, default=str))
            continue
        whole = isinstance(p["min"], int)
        kind = {
            (False, False): "uniform",
            (False, True): "log_uniform_values",
            (True, False): "int_uniform",
            (True, True): "q_log_uniform_values",
        }[whole, p["log"]]
        parameters[name] = {"distribution": kind, "min": p["min"], "max": p["max"]}
        if whole and p["log"]:
            parameters[name]["q"] = 1
        elif p["step"] not in (None, 1) or (p["step"] is not None and sweep.method == "grid"):
            parameters[name] = {"values": points(p)}
    config: dict[str, Any] = {
        "method": {"tpe": "bayes"}.get(sweep.method, sweep.method),
        "metric": {"name": sweep.metric, "goal": sweep.goal},
        "parameters": parameters,
        "run_cap": sweep.trials,
        # The agent puts the settings in; flags would need another form for lists, true and false.
        "command": ["foveal", "train", sweep.train, "--track", "online", "--settings", "${args_json}"],
    }
    if sweep.prune != "none":  # W&B has one pruner, akin to ASHA
        config["early_terminate"] = {"type": "hyperband", "min_iter": 3, "eta": 3}
    return config

"""Settings of a training by name, as a JSON object: what `foveal train NAME --settings FILE` takes, what a
sweep tries, and what it writes as its best.

A name is a field of the agent's or model's Config, or of the run's options (`env_id`, `total_steps`, ...).
"""

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

Fields = dict[str, Any]
"""Names to types."""


def take_settings(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Command-line arguments without `--settings X`, and what X holds: a JSON file, or the JSON itself."""
    rest: list[str] = []
    settings: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--settings":
            rest.append(word)
            continue
        source = value if equals else next(words, "")
        text = source if source.lstrip().startswith("{") else _read(source)
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--settings {source}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"--settings {source}: takes a JSON object of names and values")
        settings |= content
    return rest, settings


def _read(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--settings takes a JSON file or a JSON object, got {source!r}: {error}") from error


def default_settings(options: Callable[[], Any], recipe: Any, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """`options` and `recipe` (a Config) with the settings in place of their defaults.

    Raises ValueError for an unknown name or a value of another type, and as the dataclasses do.
    """
    kind = options.func if isinstance(options, functools.partial) else options
    ours, theirs = fields_of(kind), fields_of(type(recipe))
    typed = {name: typed_value(name, type_of(name, theirs | ours), value) for name, value in settings.items()}
    changed = dataclasses.replace(recipe, **{name: value for name, value in typed.items() if name in theirs})
    given = {name: value for name, value in typed.items() if name not in theirs}
    return functools.partial(options, **given), changed


def fields_of(kind: Any) -> Fields:
    """The names that a dataclass is made of, and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def type_of(name: str, fields: Fields) -> Any:
    check_known("setting", name, fields)
    return fields[name]


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, with the nearest ones, for a name that is not known."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
        raise ValueError(f"unknown {kind} {name!r}; nearest: {', '.join(near)}")


def typed_value(name: str, kind: Any, value: Any) -> Any:
    """`value`, read from JSON or YAML, as a field's type takes it: 1 as 1.0, a list as a tuple, and 1e-4,
    which is text for YAML, as a number. Raises ValueError."""
    try:
        return _typed(kind, value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: takes {_words(kind)}, got {value!r}") from error


def _typed(kind: Any, value: Any) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        for part in parts:
            try:
                return _typed(part, value)
            except (ValueError, TypeError):
                continue
    elif origin is Literal:
        if value in parts:
            return value
    elif origin is tuple:
        if isinstance(value, list | tuple):
            if parts[-1] is Ellipsis:
                return tuple(_typed(parts[0], item) for item in value)
            if len(parts) == len(value):
                return tuple(_typed(part, item) for part, item in zip(parts, value))
    elif kind is Any:
        return value
    elif kind is Path:
        return Path(value)
    elif kind in (int, float) and not isinstance(value, bool):
        number = float(value)
        if kind is float:
            return number
        if number.is_integer():
            return int(value) if isinstance(value, int) else int(number)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError


def numeric(kind: Any) -> type[int] | type[float] | None:
    """int or float where a field takes a range of them (beside None, perhaps)."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    return float if float in parts else int if int in parts else None


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {_words(parts[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))

"""Where the library's files are, for the tests that read them."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {
    name.removeprefix("foveal."): ROOT / folder
    for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
}
"""The folder of every package, by its import name below foveal."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the library, as (package that it is in, file)."""
    for package, folder in sorted(FOLDERS.items()):
        for file in sorted(folder.glob("*.py")):
            yield package, file

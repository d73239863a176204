"""The house: which folder may import which, what the wheel holds, what is tracked."""

import ast
import doctest
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import FOLDERS, PROJECT, ROOT, modules

MAY_IMPORT = {
    "vision": set(),
    "envs": {"vision"},
    "generative": {"vision"},
    "agents": {"vision", "envs"},
    "runs": {"vision", "envs", "generative", "agents"},
}
"""The design's arrows: data flows from vision to runs, and so do imports."""

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "tests",
    "typings",
} | set(MAY_IMPORT)


def imports(source: str) -> Iterator[tuple[int, int, str]]:
    """All imports of a module, wherever they stand: (line, level, dotted name); level 0 is an absolute one.

    `from ..vision import a` gives `vision.a`: where only the name tells, as in `from .. import vision`, it is
    there. Names that import functions get as a literal count too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, node.level, f"{node.module}.{alias.name}" if node.module else alias.name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            function = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if function in ("import_module", "__import__") and names:
                name = names[0].lstrip(".")
                yield node.lineno, len(names[0]) - len(name), name


def wrong_imports(package: str, source: str) -> list[str]:
    """What a module of `package` (`runs`, `runs.benchmarks`) imports against the rules."""
    wrong = []
    here = ["foveal", *package.split(".")]
    for line, level, name in imports(source):
        if level > len(here):
            wrong.append(f"line {line}: {name} is above foveal")
            continue
        parts = here[: len(here) - level + 1] + name.split(".") if level else name.split(".")
        if level == 0 and parts[0] in MAY_IMPORT:
            wrong.append(f"line {line}: {name} exists only as foveal.{name}; imports in here are relative")
        elif level == 0 and parts[0] == "foveal":
            wrong.append(f"line {line}: {name}: imports in here are relative")
        if parts[0] == "foveal" and len(parts) > 1:
            mine, other = here[1], parts[1]
            if other != mine and other not in MAY_IMPORT[mine]:
                wrong.append(f"line {line}: {mine} may not import {other}")
    return wrong


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: getattr(x, "name", x))
def test_imports_are_relative_and_point_one_way(package: str, file: Path) -> None:
    assert wrong_imports(package, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "source", "error"),
    [
        ("vision", "from ..envs import make_vec", "vision may not import envs"),
        ("vision", "from .. import agents", "vision may not import agents"),
        ("envs", "def f():\n    from ..agents.dqn import DQN", "line 2: envs may not import agents"),
        ("agents", "from ..runs import run", "agents may not import runs"),
        ("agents", "from ..generative import VAE", "agents may not import generative"),
        ("generative", "import foveal.agents as a", "generative may not import agents"),
        ("agents", "import foveal.agents", "imports in here are relative"),
        ("agents", "from foveal.vision import make_encoder", "imports in here are relative"),
        ("runs", "from agents import DQN", "exists only as foveal.agents"),
        ("runs.benchmarks", "from ....agents import DQN", "is above foveal"),
        (
            "envs",
            "import importlib\nimportlib.import_module('..agents', __package__)",
            "may not import agents",
        ),
        ("envs", "__import__('foveal.runs')", "envs may not import runs"),
        (
            "agents",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..runs import Run",
            "may not",
        ),
    ],
)
def test_a_wrong_import_is_found(package: str, source: str, error: str) -> None:
    assert error in "\n".join(wrong_imports(package, source))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("agents", "from ..vision import make_encoder\nfrom .replay import Replay\nfrom . import dqn"),
        ("envs", "from ..vision import spaces"),
        ("runs", "from ..agents import DQN\nfrom ..generative import VAE"),
        ("runs.benchmarks", "from ...agents import DQN\nfrom ..run import Run"),
        ("vision", "import torch\nfrom gymnasium import envs\nimport gymnasium.envs"),
    ],
)
def test_a_right_import_is_none(package: str, source: str) -> None:
    assert wrong_imports(package, source) == []


def test_every_package_is_listed() -> None:
    on_disk = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in MAY_IMPORT
        for file in (ROOT / top).rglob("*.py")
    }
    assert set(FOLDERS) == on_disk
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == [f"foveal.{name}" for name in sorted(FOLDERS)]
    for name, folder in FOLDERS.items():
        assert folder == ROOT.joinpath(*name.split("."))
        assert (folder / "__init__.py").is_file()


def test_type_checkers_see_every_package() -> None:
    top = {name for name in FOLDERS if "." not in name}
    links = ROOT / "typings" / "foveal"
    assert {link.name for link in links.iterdir() if link.name != "__pycache__"} == top
    for name in top:
        assert os.readlink(links / name) == f"../../{name}"
        assert (ROOT / name / "py.typed").read_bytes() == b""


def test_only_known_things_are_tracked() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    files = [Path(name) for name in listed.stdout.split("\0") if name]
    assert {file.parts[0] for file in files} <= TOP_LEVEL
    outputs = {"results", "wandb", "checkpoints", "videos", "__pycache__", "build", "dist"}
    assert [file for file in files if outputs & set(file.parts)] == []
    assert [file for file in files if (ROOT / file).is_file() and (ROOT / file).stat().st_size > 2**20] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel, built from a copy of the checkout's packages with the setuptools at hand."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        if "." not in name:
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "agents" / "notes.txt").write_text("not for the wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, "out"], cwd=source, check=True, capture_output=True)
    (built,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(built) as file:
        yield file


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"foveal/{package.replace('.', '/')}/{file.name}" for package, file in modules()}
    expected |= {f"foveal/{name}/py.typed" for name in FOLDERS if "." not in name}
    expected |= {"foveal/runs/compare.html", "foveal/runs/compare.js"}
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"foveal-{PROJECT['project']['version']}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: MIT\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nRequires-Dist: torch<2.14,>=2.8\n" in metadata
    assert "foveal = foveal.runs.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert b"MIT License" in wheel.read(f"{info}/licenses/LICENSE")


def test_constraints_hold_every_requirement() -> None:
    def name(line: str) -> str:
        return line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].strip().lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line for line in pins)
    project = PROJECT["project"]
    required = {name(r) for r in sum(project["optional-dependencies"].values(), project["dependencies"])}
    assert required - {"foveal"} <= {name(line) for line in pins}
    assert "torch==2.13.0" in pins


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_a_library_package_stays_light(tmp_path: Path) -> None:
    heavy = ["wandb", "matplotlib", "stable_baselines3", "ale_py", "minatar", "sklearn", "pandas", "tyro"]
    packages = [name for name in FOLDERS if name in MAY_IMPORT and name != "runs"]
    code = f"""
import importlib, json, sys
imported = {{}}
for package in {packages}:  # one process for all: what one has imported counts against those after it too
    importlib.import_module("foveal." + package)
    imported[package] = [module for module in {heavy} if module in sys.modules]
print(json.dumps(imported))
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {package: [] for package in packages}


def test_a_package_is_not_found_without_its_namespace(tmp_path: Path) -> None:
    done = python("import agents", tmp_path)
    assert "ModuleNotFoundError: No module named 'agents'" in done.stderr
    # In the checkout itself Python finds the folder; it must not become a second copy of every class.
    done = python("import agents", ROOT)
    assert "ImportError: attempted relative import beyond top-level package" in done.stderr


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: getattr(x, "name", x))
def test_docstring_examples(package: str, file: Path) -> None:
    if file.stem == "__main__":
        pytest.skip("runs the command line when imported")
    name = f"foveal.{package}" if file.stem == "__init__" else f"foveal.{package}.{file.stem}"
    module = importlib.import_module(name)
    assert Path(str(module.__file__)).resolve() == file
    assert doctest.testmod(module).failed == 0


def test_tests_have_no_network() -> None:
    # Connecting a datagram socket sends nothing, so that this is harmless where the guard is broken.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        with pytest.raises(PermissionError, match="without a network"):
            outward.connect(("192.0.2.1", 9))
        outward.connect(("127.0.0.1", 9))

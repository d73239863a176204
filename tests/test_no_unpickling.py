"""Nothing here unpickles: what is read from disk is tensors and JSON, whoever wrote the file.

The first part reads the library's source for calls that would run code out of a file; the second part hands
such files to everything that loads. (Processes that send each other objects are another matter: that is
transport, and goes through multiprocessing, not through these calls.)
"""

import ast
import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import modules

from foveal.agents import DQN, load
from foveal.runs.cli import main
from foveal.vision import make_encoder, read_weights, write_weights

PICKLING = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "shelve",
    "marshal",
}
"""Modules that have no use here but to write or read pickles."""
SB3 = ("stable_baselines3", "sb3_contrib")
UNPICKLERS = {
    "read_pickle",  # pandas
    "load_replay_buffer",  # Stable-Baselines3, on any of its algorithms
    "load_from_zip_file",
    "load_from_pkl",
    "unsafe_load",  # yaml
    "full_load",
}
"""Names that unpickle whatever they are an attribute of."""


def unpickling(source: str) -> list[str]:
    """The lines of a module that read pickles, or anything else that runs code out of a file.

    Names are followed through imports and their aliases, not through assignments: where a module uses
    Stable-Baselines3, a `.load` of something unknown is taken for its, and a loader that is passed around
    instead of called is taken for a call without the safe argument.
    """
    tree = ast.parse(source)
    origin: dict[str, str] = {}  # name here -> where it is from
    found: list[tuple[int, str]] = []

    def dotted(node: ast.expr) -> str | None:
        """`th.load` -> torch.load; None where the name is not an imported one."""
        if isinstance(node, ast.Name):
            return origin.get(node.id)
        if isinstance(node, ast.Attribute) and (base := dotted(node.value)) is not None:
            return f"{base}.{node.attr}"
        return None

    def module_ban(line: int, name: str) -> None:
        if PICKLING & set(name.split(".")):
            found.append((line, f"imports {name}"))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module_ban(node.lineno, alias.name)
                origin[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = "." * node.level + f"{node.module or ''}.{alias.name}"
                if node.level == 0:
                    module_ban(node.lineno, name)
                origin[alias.asname or alias.name] = name
    uses_sb3 = any(name.split(".")[0] in SB3 for name in origin.values())

    safe: set[ast.expr] = set()  # functions of calls that are found harmless below
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func) or ""
        constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        given = {k.arg for k in node.keywords}
        if constants.get("weights_only") is True:
            safe.add(node.func)
        if "allow_pickle" in given and constants.get("allow_pickle", True) is not False:
            found.append((node.lineno, "allow_pickle is not False"))
        elif name == "numpy.load" and "allow_pickle" not in given and (len(node.args) > 2 or None in given):
            found.append((node.lineno, "numpy.load may be given allow_pickle"))
        if name in ("yaml.load", "yaml.load_all") and "Safe" not in ast.dump(node):
            found.append((node.lineno, f"{name} without a safe loader"))
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append((node.lineno, f"calls {node.func.id}"))
        if name in ("importlib.import_module",) or ast.unparse(node.func) == "__import__":
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    module_ban(node.lineno, argument.value)
        if ast.unparse(node.func) == "getattr" and len(node.args) > 1:
            base, attribute = dotted(node.args[0]) or "", node.args[1]
            wanted = str(attribute.value) if isinstance(attribute, ast.Constant) else ""
            if base.split(".")[0] == "torch" and "load" in wanted:
                found.append((node.lineno, f"gets {base}.{wanted} by its name"))

    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute) or node in safe:
            continue
        name = dotted(node) or ""
        root, last = name.split(".")[0], node.attr if isinstance(node, ast.Attribute) else name.split(".")[-1]
        if last in UNPICKLERS:
            found.append((node.lineno, f"uses {last}"))
        elif root == "torch" and last in ("load", "_load", "legacy_load", "load_state_dict_from_url"):
            found.append((node.lineno, f"{name} without weights_only=True"))
        elif name.startswith("torch.package") or (
            root in SB3 and (last == "load" or last.startswith("load_"))
        ):
            found.append((node.lineno, f"uses {name}"))
        elif uses_sb3 and not name and isinstance(node, ast.Attribute) and last == "load":
            found.append((node.lineno, f"{ast.unparse(node)} may be Stable-Baselines3's"))
    return [f"line {line}: {what}" for line, what in sorted(set(found))]


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: getattr(x, "name", x))
def test_no_module_reads_pickles(package: str, file: Path) -> None:
    assert unpickling(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle as cp",
        "def f():\n    from dill import loads",
        "from sklearn.externals import joblib",
        "import joblib.numpy_pickle",
        "import shelve",
        "from marshal import load",
        "import importlib\nimportlib.import_module('pickle')",
        "__import__('_pickle')",
        "import torch\ntorch.load(p)",
        "import torch as th\nth.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import torch\ntorch.load(p, **options)",
        "from torch import load\nload(p)",
        "from torch import load as read\nread(p)",
        "import torch.serialization\ntorch.serialization.load(p)",
        "import torch\ntorch.jit.load(p)",
        "import torch\nmap(torch.load, files)",
        "import torch\nread = torch.load\nread(p)",
        "import torch\ngetattr(torch, 'load')(p)",
        "import torch\ntorch.hub.load_state_dict_from_url(u)",
        "from torch.package import PackageImporter\nPackageImporter(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import numpy as np\nnp.load(p, allow_pickle=flag)",
        "import numpy as np\nnp.load(p, None, True)",
        "from numpy import load\nload(p, **options)",
        "import functools, numpy\nfunctools.partial(numpy.load, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(p)",
        "from pandas import read_pickle\nread_pickle(p)",
        "from stable_baselines3 import PPO\nPPO.load(p)",
        "import stable_baselines3 as sb3\nsb3.DQN.load(p)",
        "def f():\n    from stable_baselines3 import DQN as Theirs\n    return Theirs.load(p)",
        "from stable_baselines3 import PPO\nmodel = PPO('MlpPolicy', e)\nmodel.load(p)",
        "import stable_baselines3\ngetattr(stable_baselines3, name).load(p)",
        "from stable_baselines3.common.save_util import load_from_zip_file\nload_from_zip_file(p)",
        "model.load_replay_buffer(p)",
        "import yaml\nyaml.load(f, yaml.Loader)",
        "import yaml\nyaml.unsafe_load(f)",
        "eval(path.read_text())",
        "exec(compile(text, p, 'exec'))",
    ],
)
def test_a_call_that_unpickles_is_found(source: str) -> None:
    assert unpickling(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True, map_location='cpu')",
        "from torch import load\nload(p, weights_only=True)",
        "import torch\ntorch.hub.load_state_dict_from_url(u, weights_only=True)",
        "import torch\nnetwork = torch.nn.Linear(1, 1)\nnetwork.load_state_dict(s)\nnetwork.eval()",
        "import numpy as np\nnp.load(p)\nnp.load(p, mmap_mode='r', allow_pickle=False)",
        "import json\njson.load(f)\njson.loads(s)",
        "import yaml\nyaml.safe_load(f)\nyaml.load(f, Loader=yaml.SafeLoader)",
        "from stable_baselines3 import DQN as Theirs\nfrom ...agents import DQN, load\nDQN.load(p)\nload(p)",
        "from safetensors.torch import load_file\nload_file(p)",
        "agent.load(p)",
        "import multiprocessing\nmultiprocessing.Pipe()[0].recv()",
    ],
)
def test_a_call_that_does_not_is_none(source: str) -> None:
    assert unpickling(source) == []


class Mark:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def crafted(marker: Path) -> dict[str, bytes]:
    """Files that write `marker` when a careless reader loads them."""
    files = {"pickle": pickle.dumps(Mark(marker))}
    for name in ("torch", "old torch"):
        file = io.BytesIO()
        torch.save({"policy": Mark(marker)}, file, _use_new_zipfile_serialization=name == "torch")
        files[name] = file.getvalue()
    for name, save in (("npy", np.save), ("npz", np.savez)):
        file = io.BytesIO()
        save(file, np.array([Mark(marker)], dtype=object))
        files[name] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(
        file, "w"
    ) as archive:  # as Stable-Baselines3 saves, which unpickles what is in "data"
        archive.writestr(
            "data", json.dumps({"policy_class": {":type:": "", ":serialized:": "gASVAAAAAAAAAAAu"}})
        )
        archive.writestr("policy.pth", files["torch"])
    files["zip"] = file.getvalue()
    files["python"] = f"__import__('pathlib').Path({str(marker)!r}).touch()".encode()
    files["yaml"] = (
        f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{marker}]]".encode()
    )
    return files


def test_the_crafted_files_are_loaded_guns(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = crafted(marker)
    loaders: dict[str, Any] = {
        "pickle": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "old torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "npy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "npz": lambda data: np.load(io.BytesIO(data), allow_pickle=True)["arr_0"],
        "python": eval,
    }
    for name, loader in loaders.items():
        marker.unlink(missing_ok=True)
        loader(files[name])
        assert marker.exists(), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    results = tmp_path_factory.mktemp("results")
    short = "--total-steps 64 --learning-starts 32 --log-every 32 --eval-every 32 --eval-episodes 1"
    quiet = "--final-episodes 1 --no-video --no-progress --track off"
    assert main(["train", "dqn", "--results", str(results), *short.split(), *quiet.split()]) == 0
    (config,) = results.rglob("config.json")
    return config.parent


def test_crafted_files_in_a_run_folder_run_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, run = tmp_path / "marker", tmp_path / "run"
    files = {kind: crafted(marker)[kind] for kind in ("pickle", "torch", "npz", "python")}
    names = [
        file.relative_to(trained) for file in trained.rglob("*") if file.is_file() and file.suffix != ".png"
    ]
    assert {file.suffix for file in names} == {".json", ".jsonl", ".safetensors"}
    commands = (
        ["evaluate", str(run), "--episodes", "1"],
        ["resume", str(run), "--total-steps", "96", "--no-progress"],
    )
    for name in names:
        for kind, content in files.items():
            for command in commands:
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(trained, run)
                (run / name).write_bytes(content)
                capsys.readouterr()
                status = main(command)
                # A file that the command does not read, or writes anew, is no reason to fail.
                assert status in (0, 2), (command, name, kind)
                assert not marker.exists(), (command, name, kind)
                if status == 2:
                    assert capsys.readouterr().err.count("\n") == 1, (command, name, kind)


@pytest.mark.parametrize("kind", list(crafted(Path())))
@pytest.mark.parametrize(
    "file", ["weights.safetensors", "agent.zip", "agent.pt", "checkpoint/weights.safetensors"]
)
def test_a_crafted_weights_file_is_refused(file: str, kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(crafted(marker)[kind])
    space = DQN("CartPole-v1").observation_space
    for given in {path, path.parent} if file.startswith("checkpoint/") else {path}:
        for loads in (load, DQN.load, lambda path: make_encoder(str(path), space)):
            with pytest.raises(ValueError, match="safetensors"):
                loads(given)
    assert not marker.exists()


def test_a_weights_file_does_not_choose_what_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may name an encoder class of the person's own; anything else by that name is not called."""
    marker = tmp_path / "marker"
    (tmp_path / "crafted_for_foveal.py").write_text(
        f"import pathlib\ndef build(*args, **kwargs): pathlib.Path({str(marker)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = DQN("CartPole-v1").save(tmp_path / "weights.safetensors")
    tensors, description = read_weights(path)
    description["encoder"]["name"] = "crafted_for_foveal:build"
    write_weights(path, tensors, description)
    for loads in (load, lambda path: make_encoder(str(path), DQN("CartPole-v1").observation_space)):
        with pytest.raises(ValueError, match="crafted_for_foveal:build"):
            loads(path)
    assert not marker.exists()

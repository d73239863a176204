"""foveal push and foveal pull: to and from a folder, and by huggingface_hub to and from a loopback Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hub_server
import pytest
import yaml

import foveal.agents
from foveal.runs.cli import main
from foveal.runs.run import open_run
from foveal.vision import Classifier, load_dataset, read_weights

QUICK = ("--track", "off", "--no-progress")
PPO = [
    *("--total-steps", "8", "--num-envs", "2", "--num-steps", "4", "--minibatch-size", "4"),
    *("--final-episodes", "2", "--no-video"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    where = ("--results", str(results))
    assert main(["train", "ppo", *PPO, *QUICK, *where]) == 0
    flags = ["--backbone", "linear", "--epochs", "1", "--train-size", "100", "--test-size", "50"]
    assert main(["train", "classifier", *flags, *QUICK, *where]) == 0
    return results


@pytest.fixture
def run(results: Path) -> Path:
    return next(results.glob("ppo-*/*"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Xet, by which the client sends large files where it can, is a protocol of its own: HTTP here.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub_server.serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def refused(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), (out, err)
    return err


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def scored(path: Path, capsys: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(path), "--json", *(["--episodes", "2"] if "ppo" in str(path) else [])]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_goes_to_a_folder_and_comes_back(run: Path, capsys: Any) -> None:
    assert main(["push", str(run), "./ppo"]) == 0
    pushed = {"README.md", "config.json", "metrics.jsonl", "summary.json", "weights.safetensors"}
    assert names(Path("ppo")) == pushed | {"plots/learning_curve.png"}
    assert main(["pull", "./ppo"]) == 0
    out, err = capsys.readouterr()
    assert "to score it: foveal evaluate results/pulled/ppo" in out
    assert err == ""
    pulled = Path("results/pulled/ppo")
    assert names(pulled) == names(Path("ppo"))
    assert scored(pulled, capsys) == scored(run, capsys)
    agent = foveal.agents.load(pulled)
    assert agent.env_step == 8
    assert open_run(pulled).rows() == open_run(run).rows()
    assert main(["compare", "results"]) == 0
    assert "ppo" in capsys.readouterr().out


def test_a_model_too(results: Path, capsys: Any) -> None:
    run = next(results.glob("classifier-*/*"))
    assert main(["push", str(run), f"file://{Path.cwd()}/digits"]) == 0
    assert main(["pull", "./digits", "--out", "here"]) == 0
    assert scored(Path("here"), capsys) == scored(run, capsys)
    digits = load_dataset("digits")
    code = re.search(r"```python\n(.*?)```", Path("here/README.md").read_text(), re.S)
    assert code is not None
    assert code[1].strip().endswith('Classifier.load("results/pulled/digits")')
    assert Classifier.load("here").predict(digits.test.images[:3]).shape == (3,)


def test_the_card_says_what_it_is_and_names_nothing_of_this_machine(run: Path) -> None:
    assert main(["push", str(run), f"{Path.cwd()}/ppo"]) == 0
    _, head, body = Path("ppo/README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["tags"] == ["reinforcement-learning", "ppo", "CartPole-v1"]
    assert card["library_name"] == "foveal"
    assert "license" not in card
    summary = open_run(run).summary
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"][0]["value"].startswith(f"{summary['eval/return_mean']:.2f} +/- ")
    low, high = summary["eval/return_ci95"]
    assert f"95 % interval of the mean {low:.1f} to {high:.1f}" in body
    assert "foveal pull ./ppo\nfoveal evaluate results/pulled/ppo\n" in body
    assert '"learning_rate"' in body
    for file in Path("ppo").glob("*.*"):
        for place in (run.parent.parent, Path.cwd()):
            assert str(place).encode() not in file.read_bytes(), file
    assert {"hostname", "command"} <= open_run(run).config["run"].keys()
    assert not {"hostname", "command"} & open_run("ppo").config["run"].keys()


def test_a_checkpoint_goes_along_where_it_is_asked_for(run: Path, capsys: Any) -> None:
    assert main(["push", str(run), "./whole", "--checkpoint"]) == 0
    assert main(["pull", "./whole"]) == 0
    assert "no checkpoint" in refused(capsys, "resume", push_and_pull(run))
    assert main(["resume", "results/pulled/whole", "--total-steps", "16", "--no-progress"]) == 0
    assert foveal.agents.load("results/pulled/whole").env_step in (8, 16)
    assert open_run("results/pulled/whole").rows()[-1]["env_step"] == 16


def push_and_pull(run: Path) -> Path:
    assert main(["push", str(run), "./plain"]) == 0
    assert main(["pull", "./plain"]) == 0
    return Path("results/pulled/plain")


def test_a_folder_is_written_into_only_where_a_run_lies(run: Path, capsys: Any) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert "is there already; --update writes into it" in refused(capsys, "push", run, "./mine")
    assert "is no folder that a run was pushed to" in refused(capsys, "push", run, "./mine", "--update")
    assert names(Path("mine")) == {"thesis.txt"}
    assert main(["push", str(run), "./ppo"]) == 0
    Path("ppo/README.md").write_text("my words")
    assert main(["push", str(run), "./ppo", "--update"]) == 0
    assert Path("ppo/README.md").read_text() != "my words"
    assert main(["pull", "./ppo"]) == 0
    assert "results/pulled/ppo is there already" in refused(capsys, "pull", "./ppo")


def test_what_is_pulled_is_data(run: Path, capsys: Any, tmp_path: Path) -> None:
    assert main(["push", str(run), "./ppo"]) == 0
    for name in ("setup.py", "model.pkl", "weights.pt", "run.sh"):
        Path("ppo", name).write_text("raise SystemExit")
    Path("ppo/.git").mkdir()
    Path("ppo/.git/hooks.json").write_text("{}")
    assert main(["pull", "./ppo"]) == 0
    err = capsys.readouterr().err
    assert err == (
        "left there, of types that a run has no use for: model.pkl, run.sh, setup.py, weights.pt\n"
    )
    assert {Path(name).suffix for name in names(Path("results/pulled/ppo"))} <= {
        ".md", ".json", ".jsonl", ".safetensors", ".png",
    }  # fmt: skip
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    Path("ppo/notes.json").symlink_to(secret)
    assert "is refused: notes.json is a link" in refused(capsys, "pull", "./ppo", "--out", "b")
    Path("ppo/notes.json").unlink()
    Path("ppo/weights.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert "weights.safetensors is not a whole safetensors file" in refused(
        capsys, "pull", "./ppo", "--out", "b"
    )
    shutil.rmtree("ppo/plots")
    Path("ppo/metrics.jsonl").unlink()
    assert "it has no metrics.jsonl" in refused(capsys, "pull", "./ppo", "--out", "b")
    assert names(Path()) & {"b", ".b"} == set()
    assert [p for p in Path().iterdir() if p.name.endswith(".partial")] == []


def test_a_run_goes_to_the_hub_and_comes_back(run: Path, hub: Any, capsys: Any) -> None:
    repo = f"{hub_server.USER}/ppo-cartpole"
    assert main(["push", str(run), repo, "--private"]) == 0
    assert f"{hub.url}/{repo}/commit/{hub_server.SHA}" in capsys.readouterr().out
    assert hub.visibility == {repo: "private"}
    assert set(hub.repos[repo]) == {
        *("README.md", "config.json", "metrics.jsonl", "summary.json"),
        *("plots/learning_curve.png", "weights.safetensors"),
    }
    assert f"{repo} is taken; --update writes into it" in refused(capsys, "push", run, repo)
    assert main(["push", str(run), repo, "--update"]) == 0
    hub.repos[repo] |= {".gitattributes": b"*.safetensors filter=lfs", "evil.py": b"raise SystemExit"}
    assert main(["pull", repo]) == 0
    assert "left there, of types that a run has no use for: evil.py" in capsys.readouterr().err
    pulled = Path("results/pulled/someone-ppo-cartpole")
    assert names(pulled) == set(hub.repos[repo]) - {".gitattributes", "evil.py"}
    assert scored(pulled, capsys) == scored(run, capsys)


@pytest.mark.parametrize("name", ["../../escaped.json", "/etc/escaped.json", "a/..\\..\\b.json", "C:x.json"])
def test_a_path_that_points_out_is_refused(name: str, run: Path, hub: Any, capsys: Any) -> None:
    repo = f"{hub_server.USER}/bad"
    assert main(["push", str(run), repo]) == 0
    hub.repos[repo][name] = b"{}"
    before = len(hub.calls)
    assert "which points out of it" in refused(capsys, "pull", repo)
    assert not any("/resolve/" in call for call in hub.calls[before:])
    assert not Path("results").exists() or names(Path("results")) == set()


def test_what_breaks_off_leaves_nothing(run: Path, hub: Any, capsys: Any, monkeypatch: Any) -> None:
    repo = f"{hub_server.USER}/torn"
    assert main(["push", str(run), repo]) == 0
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it tries again
    hub.breaking = {"weights.safetensors"}
    assert f"no connection to {hub.url}" in refused(capsys, "pull", repo, "--out", "there/torn")
    assert list(Path("there").iterdir()) == []


def test_a_pull_that_was_killed_is_swept_away(run: Path) -> None:
    assert main(["push", str(run), "./ppo"]) == 0
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for pid in (killed.pid, os.getppid()):
        Path(f"results/pulled/.ppo.{pid}.partial").mkdir(parents=True)
    assert main(["pull", "./ppo"]) == 0
    left = [path.name for path in Path("results/pulled").iterdir()]
    assert sorted(left) == [f".ppo.{os.getppid()}.partial", "ppo"]  # one that goes on is left alone


def test_what_cannot_be_is_one_line(run: Path, hub: Any, capsys: Any, monkeypatch: Any) -> None:
    assert f"there is no repository someone/none at {hub.url}" in refused(capsys, "pull", "someone/none")
    assert "refused (403) for other/name: this token may not do that" in refused(
        capsys, "push", run, "other/name"
    )
    for repo in ("name", "a/b/c", "a b/c", ""):
        assert f"a folder such as ./NAME; got {repo!r}" in refused(capsys, "push", run, repo)
    assert "there is no folder" in refused(capsys, "pull", "./none")
    assert "no run at" in refused(capsys, "push", "./none", "someone/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refused (401) for someone/x: the token is not taken" in refused(capsys, "push", run, "someone/x")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token; `hf auth login` stores one" in refused(capsys, "push", run, "someone/x")
    assert hub.repos == {}
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert "no connection to http://127.0.0.1:9 (ConnectError)" in refused(capsys, "pull", "someone/x")
    assert "no connection to http://127.0.0.1:9 (ConnectError)" in refused(capsys, "push", run, "someone/x")
    assert not Path("results").exists() or list(Path("results/pulled").iterdir()) == []
    assert read_weights(run / "checkpoints" / "best" / "weights.safetensors")

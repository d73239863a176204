"""The W&B dashboard: every panel names what runs really log, and it arrives at a server, once."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from wandb_server import wandb_server

from foveal.agents import AGENTS
from foveal.runs import attention, classify, cli, dashboard, generate
from foveal.runs import train as train_module
from foveal.runs.dashboard import SECTIONS, Dashboard, design, logged_names, spec_of
from foveal.runs.fit import MODELS, FitOptions, fit
from foveal.runs.run import Run, create_run
from foveal.runs.train import Options, train


def foveal(*arguments: str) -> int:
    return cli.main(list(arguments))


def train_all(folder: Path, media: set[str]) -> dict[str, set[str]]:
    """What small runs log, by the kind of panel; their media keys are collected in `media`."""
    names: dict[str, set[str]] = {"curve": set(), "bars": set(), "media": media}
    common: dict[str, Any] = {"results": folder, "track": "off", "progress": False}

    def take(run: Run) -> Run:
        for kind, some in logged_names(run.rows(), run.summary, set()).items():
            names[kind] |= some
        return run

    for name, env_id, steps in (
        ("dqn", "CartPole-v1", 600),
        ("ppo", "CartPole-v1", 600),
        ("q-learning", "foveal/GridWorld-v0", 300),
    ):
        often: dict[str, Any] = {"log_every": steps // 2, "eval_every": steps // 2, "checkpoint_every": steps}
        often |= {"total_steps": steps, "eval_episodes": 1, "final_episodes": 1, "video": name == "dqn"}
        config = AGENTS[name].recipe(env_id, **({"learning_starts": 100} if name == "dqn" else {}))
        take(train(name, Options(env_id=env_id, **often, **common), config))
    small: dict[str, Any] = {
        "train_size": 280,
        "test_size": 280,
        "validation": 280,
        "epochs": 1.0,
        "log_every": 5,
        "pictures_every": 1.0,
        **common,
    }
    extractor = "none"
    models: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("classifier", {}, {"encoder": "lenet5"}),
        ("ram", {}, {"glimpses": 2, "hidden": 32}),
        ("vae", {}, {}),
        ("autoencoder", {}, {}),
        ("pixelcnn", {"levels": 4}, {}),
        ("gan", {}, {}),
    )
    for name, options, settings in models:
        if name == "gan":
            options = {"extractor": extractor}
        config = MODELS[name].recipe(dataset="digits", **settings)
        run = take(fit(name, FitOptions(**small, **options), config))
        extractor = str(run.path) if name == "classifier" else extractor
    return names


def bare(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Leave out what draws and films, which takes long; the keys under which that is shown are collected."""
    media: set[str] = set()
    for kind in ("image", "video"):
        monkeypatch.setattr(Run, kind, lambda run, key, path, **axis: media.add(key))
    drawing = {
        generate: ("image_grid", "measure_curves", "latent_map"),
        classify: ("training_curves", "confusion_matrix", "filters_grid"),
        attention: ("training_curves", "fixation_sheet", "fixation_film", "error_curve"),
        train_module: ("learning_curve", "values_on_map", "record"),
    }
    for module, functions in drawing.items():
        for name in functions:
            monkeypatch.setattr(module, name, lambda *a, **k: next(x for x in a if isinstance(x, Path)))
    return media


def test_every_panel_shows_what_is_logged(monkeypatch, tmp_path):
    names = train_all(tmp_path, bare(monkeypatch))
    missing = [
        panel for section in SECTIONS for panel in section.panels if panel.metric not in names[panel.kind]
    ]
    assert missing == []
    axes = {section.axis for section in SECTIONS}
    assert axes <= names["curve"]
    for column in dashboard.COLUMNS:
        where, _, name = column.partition(":")
        assert where != "summary" or name in names["bars"], column
        assert where != "config" or name.removesuffix(".value") in {*dashboard.PLAIN, "env_id"}, column


def panels_of(spec: dict) -> dict[str, list[dict]]:
    """Section -> its panels, of a workspace's spec."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def test_curves_are_means_over_seeds_of_each_agent_against_their_axis():
    spec = spec_of(design(Dashboard()))
    found = panels_of(spec["workspace"]["spec"])
    assert list(found) == [*(section.title for section in SECTIONS), "Runs"]
    kinds = {"curve": "Run History Line Plot", "bars": "Bar Chart", "media": "Media Browser"}
    for section in SECTIONS:
        for panel, sent in zip(section.panels, found[section.title], strict=True):
            config = sent["config"]
            assert (sent["viewType"], config["chartTitle"]) == (kinds[panel.kind], panel.title)
            assert config["mediaKeys" if panel.kind == "media" else "metrics"] == [panel.metric]
            if panel.kind == "curve":
                assert config["xAxis"] == section.axis
            if panel.kind != "media":
                assert (config["groupAgg"], config["groupArea"]) == ("mean", "stddev")
    assert {section.axis for section in SECTIONS[:2]} == {"env_step"}
    (runs,) = spec["workspace"]["spec"]["section"]["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "env_id.value"),
        ("config", "agent.value"),
    ]
    assert spec["workspace"]["spec"]["section"]["settings"]["shouldAutoGeneratePanels"] is False
    assert runs["runFeed"]["columnOrder"] == list(dashboard.COLUMNS)
    grids = [block for block in spec["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    shown = [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]
    assert len(shown) == sum(len(section.panels) for section in SECTIONS)
    spots = [tuple(panel["layout"].values()) for panel in shown[:7]]
    assert len(set(spots)) == 7  # side by side, not on one another


def run_of(results: Path, agent: str, env_id: str, rows: list[dict], summary: dict) -> Run:
    run = create_run(
        results, group="g", name=agent, config={"agent": agent, "env_id": env_id, "seed": 1}, track="off"
    )
    for row in rows:
        run.log(row)
    run.summarize(summary)
    run.finish("finished")
    return run


def test_of_runs_there_are_only_panels_of_what_they_logged(tmp_path, capsys):
    odd = 'it\'s "odd"/é-v0'
    run_of(tmp_path, "dqn", odd, [{"env_step": 1, "train/q_loss": 0.5}], {"eval/return_mean": 3.0})
    run_of(
        tmp_path,
        "vae",
        "digits",
        [{"grad_step": 1, "epoch": 1.0, "validation/elbo": -9.0}],
        {"test/nats": 8.0},
    )
    (tmp_path / "g" / "bad").mkdir()
    (tmp_path / "g" / "bad" / "config.json").write_text("{")
    spec = spec_of(design(Dashboard((tmp_path,), by=("agent", "learning_rate", "num_envs"))))
    assert "skipped: " in capsys.readouterr().err
    found = panels_of(spec["workspace"]["spec"])
    titles = {name: [panel["config"].get("chartTitle") for panel in panels] for name, panels in found.items()}
    assert titles == {
        "Return": ["final score", "best in evaluation"],
        "Learning of agents": ["Q loss"],
        "Likelihood and reconstruction": ["ELBO of validation images", "nats of test images"],
        "Runs": [None],
    }
    grouping = spec["workspace"]["spec"]["section"]["runSets"][0]["grouping"]
    assert [key["name"] for key in grouping] == [
        "env_id.value",
        "agent.value",
        "config.value.learning_rate",
        "config.value.num_envs",
    ]
    grids = [block["metadata"] for block in spec["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert [grid["runSets"][0]["filters"]["filters"][0]["value"] for grid in grids] == ["digits", odd]
    assert [len(grid["panelBankSectionConfig"]["panels"]) for grid in grids] == [2, 3]
    assert "env_id" not in json.dumps(grids[0]["runSets"][0]["grouping"])


@pytest.fixture
def server(monkeypatch):
    with wandb_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_saved_it_is_on_the_server_and_saved_again_it_is_replaced(server, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert foveal("dashboard", "--save") == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"workspace: {server.url}/me/mine?nw=" in out
    assert f"report: {server.url}/me/mine/reports/foveal--" in out
    workspace, report = server.views.values()
    assert (workspace["type"], report["type"]) == ("project-view", "runs")
    assert {(v["entityName"], v["projectName"], v["displayName"]) for v in (workspace, report)} == {
        ("me", "mine", "foveal")
    }
    spec = spec_of(design(Dashboard()))
    sent, said = (panels_of(s) for s in (json.loads(workspace["spec"]), spec["workspace"]["spec"]))
    assert without_ids(sent) == without_ids(said)
    assert next(iter(sent)) == "Return"
    blocks = json.loads(report["spec"])["blocks"]
    assert [b["type"] for b in blocks] == [b["type"] for b in spec["report"]["spec"]["blocks"]]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert {grid["runSets"][0]["project"]["id"] for grid in grids} == {"7"}

    assert foveal("dashboard", "--save", "--by", "encoder") == 0
    assert len(server.views) == 2
    assert "encoder.value" in server.views[workspace["id"]]["spec"]
    assert "encoder.value" in server.views[report["id"]]["spec"]
    assert foveal("dashboard", "--save", "--name", "other") == 0
    assert len(server.views) == 4


def without_ids(thing):
    if isinstance(thing, dict):
        return {key: without_ids(value) for key, value in thing.items() if key not in ("__id__", "id")}
    return [without_ids(item) for item in thing] if isinstance(thing, list) else thing


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--save"], "online needs a W&B key.*nothing was sent, the runs are kept.*foveal sync results"),
        (["no"], "no runs at no"),
        (["--by", "learning_rat"], "unknown setting 'learning_rat'; nearest: learning_rate"),
        (["--name", " "], "name: got ' ', takes a name without"),
        (["--project", "a/b"], "project: got 'a/b', takes a name without"),
        (["--out", "x.json"], "out: got x.json without --spec"),
        (["--save", "--spec"], "spec and save exclude each other"),
    ],
)
def test_bad_input_is_one_line(arguments, line, capsys):
    assert foveal("dashboard", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(line, err), err


def test_without_a_server_or_the_extra_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert foveal("dashboard", "--save") == 2
    line = capsys.readouterr().err
    assert "http://127.0.0.1:9 does not answer" in line
    assert "the runs are kept in their folders; send them with `foveal sync results`" in line
    assert line.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert foveal("dashboard") == 2
    assert "pip install 'foveal[dashboard]'" in capsys.readouterr().err


def test_the_spec_is_json_in_a_file_or_on_the_output(tmp_path, capsys):
    assert foveal("dashboard", "--spec") == 0
    printed = json.loads(capsys.readouterr().out)
    assert foveal("dashboard", "--spec", "--out", str(tmp_path / "new" / "spec.json")) == 0
    written = json.loads((tmp_path / "new" / "spec.json").read_text())
    assert without_ids(written) == without_ids(printed)
    assert printed["workspace"]["projectName"] == "foveal"
    assert foveal("dashboard") == 0
    assert "return in evaluation: eval/return_mean against env_step" in capsys.readouterr().out

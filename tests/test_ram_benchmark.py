"""The RAM benchmark's bookkeeping and table; one of its cells, on few images."""

import pytest

from foveal.agents import AGENTS
from foveal.runs.benchmarks import ram as benchmark
from foveal.runs.benchmarks.ram import AGENT_CELLS, MODELS, STEPS, TASKS, append, model_cell, report
from foveal.runs.benchmarks.suite import read


def cell(task: str, model: str, seed: int, error: float, **more) -> dict:
    length = STEPS if task == "agents" else TASKS[task].epochs
    about = {"length": length, "parameters": 1234, "cpu_s": 20.0, "env_id": "foveal/GlimpseBox-v0"}
    return {"task": task, "model": model, "seed": seed, "error": error, **about, **more}


def test_cells_are_replaced_and_reported(tmp_path):
    out = tmp_path / "deep" / "ram.json"
    append(out, cell("agents", "ppo", 0, 0.5))
    append(out, cell("mnist", "conv", 0, 0.02))
    for seed, error in ((1, 0.03), (0, 0.01), (1, 0.02)):
        append(out, cell("mnist", "ram", seed, error, error_sampled=error + 0.01))
    assert [(one["model"], one["seed"], one["error"]) for one in read(out)] == [
        ("ram", 0, 0.01), ("ram", 1, 0.02), ("conv", 0, 0.02), ("ppo", 0, 0.5),
    ]  # fmt: skip
    assert {path.name for path in out.parent.iterdir()} == {"ram.json"}
    lines = report(read(out)).splitlines()
    assert lines[2:4] == [
        "| mnist | RAM | 1.50 (1.00 2.00) | 2.50 (2.00 3.00) | 2 | 1.12 / 1.29 | 1,234 | 40 | 20 |",
        "| mnist | conv net | 2.00 |  | 1 | 1.21 | 1,234 | 40 | 20 |",
    ]
    assert lines[-1] == "| ppo | `foveal/GlimpseBox-v0` | 50.00 | 1 | 1,234 | 200,000 | 20 |"


def test_finished_cells_are_skipped(tmp_path, monkeypatch):
    trained: list[tuple[str, str, int]] = []

    def record(given, data_dir):
        trained.append((given["task"], given["model"], given["seed"]))
        return {"error": 0.5, "parameters": 1}

    monkeypatch.setattr(benchmark, "model_cell", record)
    out = tmp_path / "ram.json"
    append(out, cell("doubled", "ram", 1, 0.2))
    append(out, cell("doubled", "conv", 0, 0.2) | {"length": 3})  # of another budget: trained again
    monkeypatch.setattr("sys.argv", ["ram", "--tasks", "doubled", "--seeds", "0", "1", "--out", str(out)])
    assert benchmark.main() == 0
    assert trained == [("doubled", name, seed) for seed in (0, 1) for name in MODELS][:4] + [
        ("doubled", name, 1) for name in MODELS if name != "ram"
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_cell_is_the_model_that_did_best_on_the_validation_images(name, monkeypatch):
    settings = {"glimpses": 2, "patch": 4, "hidden": 16, "glimpse_hidden": 8}
    task = TASKS["doubled"]._replace(size=12, side=None, epochs=1, settings=settings)
    monkeypatch.setitem(TASKS, "doubled", task)
    scored = model_cell({"task": "doubled", "model": name, "seed": 0}, None)
    assert 0 < scored["error"] < 0.9
    assert 0 < scored["validation_error"] < 0.9
    assert ("error_sampled" in scored) == (name in ("ram", "random_looking"))


@pytest.mark.parametrize("name", AGENT_CELLS)
def test_agents_take_the_settings_of_their_cells(name):
    env_id, settings = AGENT_CELLS[name]
    config = AGENTS[name].recipe(env_id, **settings)
    assert {key: getattr(config, key) for key in settings} == settings

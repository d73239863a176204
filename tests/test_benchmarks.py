"""The learning benchmark's bookkeeping and tables, and the comparison of runs, against numbers by hand."""

import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from foveal.runs.benchmarks import suite
from foveal.runs.benchmarks.suite import Cell
from foveal.runs.plots import AGENT_COLORS, draw_curves, mean_curve


def row(
    cell: Cell, chosen: float = 1.0, last: float = 0.0, cpu_s: float | None = 50.0, **config: Any
) -> dict:
    about = {"env": cell.env, "agent": cell.agent, "seed": cell.seed, "steps": cell.steps}
    return {**about, "chosen": chosen, "last": last, "cpu_s": cpu_s, "config": config, "run": "x/y"}


def test_agents_take_turns_within_an_environment():
    cells = suite.plan(seeds=2, first_seed=5)
    assert list(dict.fromkeys(cell.env for cell in cells)) == list(suite.TASKS)
    pendulum = [cell for cell in cells if cell.env == "Pendulum-v1"]
    assert [(cell.seed, cell.agent) for cell in pendulum] == [
        (5, "ppo"), (5, "sb3/ppo"), (6, "ppo"), (6, "sb3/ppo"),
    ]  # fmt: skip
    assert len(set(cells)) == len(cells) == 2 * sum(len(agents) for agents in suite.TASKS.values())


def test_finished_cells_are_skipped():
    cells = [Cell("Pendulum-v1", "ppo", seed) for seed in range(3)]
    assert suite.remaining(cells, [row(cells[1])], retrain=False) == [cells[0], cells[2]]


def test_another_recipe_is_trained_again_only_where_asked():
    cells = [Cell("CartPole-v1", "ppo", seed) for seed in range(3)]
    from foveal.agents import PPO

    finished = [
        row(cells[0], gamma=PPO.recipe("CartPole-v1").gamma),
        row(cells[1], gamma=0.123),
        row(cells[2], a_setting_of_the_past=1),  # says nothing of today's
    ]
    assert suite.remaining(cells, finished, retrain=False) == []
    assert suite.remaining(cells, finished, retrain=True) == [cells[1]]


def test_cost_is_measured_where_it_can_be():
    cells = [Cell("Pendulum-v1", agent, seed) for agent in ("ppo", "sb3/ppo") for seed in (7, 8)]
    ours, theirs = (2 * 300_000 / (suite.SPEEDS[a] * suite.SLOWER["Pendulum-v1"]) for a in ("ppo", "sb3/ppo"))
    assert suite.cost(cells, []) == pytest.approx(ours + theirs)
    seconds = (100.0, 300.0, 150.0, None)  # None: was resumed
    finished = [row(Cell("Pendulum-v1", "ppo", seed), cpu_s=s) for seed, s in enumerate(seconds)]
    assert suite.cost(cells, finished) == pytest.approx(2 * 150 + theirs)


def append_many(out: Path, agent: str) -> None:
    for seed in range(15):
        suite.append(out, row(Cell("Pendulum-v1", agent, seed)), {"cpu": agent})


def test_concurrent_writers_lose_nothing(tmp_path):
    out = tmp_path / "measured" / "suite.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_many, args=(out, agent)) for agent in ("ppo", "sb3/ppo")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cells = [suite.cell_of(r) for r in suite.read(out)]
    assert cells == [Cell("Pendulum-v1", agent, seed) for seed in range(15) for agent in ("ppo", "sb3/ppo")]
    assert [path.name for path in out.parent.iterdir()] == ["suite.json"]  # no lock, no draft
    suite.append(out, row(cells[3], chosen=9.0), {"cpu": "new"})  # trained again: in place of the old one
    assert len(suite.read(out)) == 30
    assert [r["chosen"] for r in suite.read(out)][:5] == [1.0, 1.0, 1.0, 9.0, 1.0]
    assert json.loads(out.read_text())["cpu"] == "new"


def test_a_cell_is_taken_while_a_process_that_inherited_it_lives(tmp_path):
    cell = Cell("MinAtar/Breakout-v1", "sb3/ppo", 0)
    with suite.claim(cell, tmp_path) as log:
        assert log is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=log)
    with suite.claim(cell, tmp_path) as other:
        assert other is None
    with suite.claim(cell._replace(seed=1), tmp_path) as other:
        assert other is not None
    child.communicate(b"\n")
    with suite.claim(cell, tmp_path) as again:
        assert again is not None
    assert (tmp_path / "MinAtar-Breakout-v1" / "sb3-ppo-seed0.log").exists()


def test_a_cell_is_trained_recorded_and_gone_on_with(tmp_path, monkeypatch):
    from foveal.runs import train

    cell, results, out = Cell("CartPole-v1", "reinforce", 3), tmp_path / "runs", tmp_path / "suite.json"
    monkeypatch.setitem(suite.TASKS, "CartPole-v1", {"reinforce": 2_000})
    monkeypatch.setattr(train, "_conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        suite.train_cell(cell, results, out)
    assert suite.read(out) == []
    monkeypatch.undo()
    monkeypatch.setitem(suite.TASKS, "CartPole-v1", {"reinforce": 2_000})
    suite.train_cell(cell, results, out)
    (finished,) = suite.read(out)
    (folder,) = (results / "CartPole-v1").glob("reinforce-seed3-*")  # the same run, not another
    summary = json.loads((folder / "summary.json").read_text())
    assert finished["run"] == f"CartPole-v1/{folder.name}"
    assert suite.cell_of(finished) == cell
    assert (finished["steps"], finished["cpu_s"]) == (2_000, None)
    assert finished["chosen"] == summary["eval/return_mean"] > 9
    assert finished["last"] == summary["last/return_mean"]

    monkeypatch.setitem(suite.TASKS, "CartPole-v1", {"reinforce": 1_000})  # another task: begun anew
    suite.train_cell(cell, results, out)
    (again,) = suite.read(out)
    assert again["steps"] == 1_000
    assert again["cpu_s"] > 0
    assert again["run"] != finished["run"]
    assert not folder.exists()


def test_report():
    finished = [row(Cell("Pendulum-v1", "ppo", s), chosen=-100.0 - s, last=-200.0) for s in (4, 2, 0, 1, 3)]
    finished += [row(Cell("Pendulum-v1", "sb3/ppo", s), chosen=10.0 * s, last=7.0) for s in (0, 1)]
    lines = suite.report(finished).splitlines()
    assert lines[0] == "**Pendulum-v1**"
    assert lines[4].startswith("| ppo | 300,000 | chosen | -102.0 (-103.")
    assert lines[4].endswith("| -102.0 | 5 | -100.0 -101.0 -102.0 -103.0 -104.0 |")
    assert lines[5].startswith("| ppo | 300,000 | last | -200.0 (-200.0 to -200.0) | -200.0 | 5 |")
    assert lines[6] == "| sb3/ppo | 300,000 | chosen | 5.0 (0.0 to 10.0) | 5.0 | 2 \\* | 0.0 10.0 |"
    assert lines[-1] == "\\* fewer than five seeds"
    assert suite.report([]) == "no cell is finished yet"


def test_mean_of_seeds_at_different_steps():
    """Two seeds meet at 100 to 300, where each is a straight line between its evaluations."""
    one = (np.array([100.0, 200.0, 300.0]), np.array([0.0, 10.0, 20.0]))
    two = (np.array([50.0, 150.0, 350.0]), np.array([0.0, 20.0, 40.0]))
    steps, mean, low, high = mean_curve([one, two])
    assert steps.tolist() == [100, 150, 200, 300]
    # Of the second: 10 at 100, 20 at 150, 25 at 200, 35 at 300.
    assert mean.tolist() == [5, 12.5, 17.5, 27.5]
    assert low.tolist() == [0, 5, 10, 20]  # the bootstrap of two: the lower and the higher one
    assert high.tolist() == [10, 20, 25, 35]


def test_seeds_that_agree_have_no_band():
    same = (np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    _, mean, low, high = mean_curve([same] * 5)
    assert mean.tolist() == low.tolist() == high.tolist() == [3, 4]


def curve(*points: tuple[int, float]) -> tuple[np.ndarray, ...]:
    return np.array([x for x, _ in points], float), np.array([y for _, y in points], float)


def test_draws_means_bands_and_single_seeds():
    runs = {
        "CartPole-v1": {
            "ppo": [curve((100, 10.0 * seed), (200, 100.0)) for seed in range(3)],
            "sb3/ppo": [curve((100, 7.0), (200, 8.0)), curve((100, 9.0), (300, 6.0)), curve()],
            "mine": [curve((100, 1.0))],
            "apart": [curve((100, 1.0), (150, 3.0)), curve((200, 4.0)), curve((200, 5.0), (300, 6.0))],
        },
        "Pendulum-v1": {},
    }
    axes, empty = draw_curves(runs).axes
    assert [axes.get_title(loc="left"), empty.get_title(loc="left")] == ["CartPole-v1", "Pendulum-v1"]
    data = [np.array(line.get_data(), dtype=float).T.tolist() for line in axes.lines]
    lines = [(to_hex(line.get_color()), line.get_linestyle(), xy) for line, xy in zip(axes.lines, data)]
    assert lines[0] == (AGENT_COLORS["ppo"], "-", [[100, 10], [200, 100]])
    assert lines[1] == (AGENT_COLORS["sb3/ppo"], "--", [[100, 7], [200, 8]])
    assert lines[2] == (AGENT_COLORS["sb3/ppo"], "--", [[100, 9], [300, 6]])
    assert lines[3][0] not in AGENT_COLORS.values()
    assert data[4:] == [[[100, 1], [150, 3]], [[200, 4]], [[200, 5], [300, 6]]]
    (band,) = axes.collections
    assert {(x, y) for x, y in np.asarray(band.get_paths()[0].vertices)} == {(100, 0), (100, 20), (200, 100)}
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.texts]
    assert texts == ["ppo, 3 seeds", "sb3/ppo, 2 seeds", "mine, 1 seed", "apart, 3 seeds"]
    assert empty.get_legend() is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("gan --seeds -1", "argument --seeds: must be a whole number, 1 or more, got '-1'"),
        ("gan --seeds 0", "argument --seeds: must be a whole number, 1 or more, got '0'"),
        ("suite --jobs two", "argument --jobs: must be a whole number, 1 or more, got 'two'"),
        ("suite --first-seed -2", "argument --first-seed: must be a whole number, 0 or more, got '-2'"),
        ("pixelcnn --seeds 0 -1", "argument --seeds: must be a whole number, 0 or more, got '-1'"),
        ("gan --datasets mnits", "foveal: unknown data set 'mnits'"),
        ("ram --tasks mnist --models conv --data-dir nowhere", "data_dir must be a folder, got 'nowhere'"),
    ],
)
def test_what_a_benchmark_cannot_take_is_one_line(arguments: str, said: str, tmp_path, monkeypatch, capsys):
    name, *rest = arguments.split()
    monkeypatch.setattr(sys, "argv", [name, *rest, "--out", str(tmp_path / "out.json")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, f"foveal.runs.benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"foveal.runs.benchmarks.{name}", run_name="__main__")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not any(tmp_path.rglob("*"))

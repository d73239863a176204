"""What the learning curve draws, read from the figure, and the file it writes."""

import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from foveal.runs.generate import measure_curves
from foveal.runs.plots import draw_learning_curve, learning_curve

ROWS: list[dict[str, Any]] = [
    {"env_step": 1_000, "train/return_mean": 20.0, "train/q_loss": 0.5},
    {"env_step": 3_000, "train/return_mean": 60.0},
    {"env_step": 2_000, "train/return_mean": 40.0},  # out of order
    {"env_step": 2_500, "train/return_mean": None},  # no episode ended in this window
    {"env_step": 2_600, "train/return_mean": float("nan")},
    {"grad_step": 7, "train/return_mean": 1.0},  # of another axis
    {
        "env_step": 2_000,
        "eval/return_mean": 50.0,
        "eval/return_ci95_low": 45.0,
        "eval/return_ci95_high": 52.0,
    },
    {
        "env_step": 4_000,
        "eval/return_mean": 80.0,
        "eval/return_ci95_low": 75.0,
        "eval/return_ci95_high": 90.0,
    },
]


def lines(figure):
    """Legend label -> (x, y) of every line."""
    (axes,) = figure.axes
    return {line.get_label(): np.array(line.get_data(), dtype=float) for line in axes.lines}


def test_draws_the_rows():
    figure = draw_learning_curve(ROWS, title="dqn on CartPole-v1", baseline=22.25, best=(4_000, 80.0))
    drawn = lines(figure)
    assert drawn["training episodes, exploring"].tolist() == [[1_000, 2_000, 3_000], [20, 40, 60]]
    assert drawn["evaluation, mean"].tolist() == [[2_000, 4_000], [50, 80]]
    assert drawn["random policy: 22.2"][1].tolist() == [22.25, 22.25]
    assert drawn["best checkpoint: 80.0 at 4,000 steps"].ravel().tolist() == [4_000, 80]
    (axes,) = figure.axes
    (band,) = axes.collections
    corners = {(x, y) for x, y in np.asarray(band.get_paths()[0].vertices)}
    assert corners == {(2_000, 45), (2_000, 52), (4_000, 75), (4_000, 90)}
    assert axes.get_title(loc="left") == "dqn on CartPole-v1"
    assert axes.get_xlabel() == "environment steps"
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.texts) == 5


def test_thousands_are_short_on_the_axis():
    figure = draw_learning_curve([{"env_step": 2_500_000, "eval/return_mean": 12_345.0}])
    (axes,) = figure.axes
    assert axes.xaxis.get_major_formatter()(1_500_000) == "1.5M"
    assert axes.xaxis.get_major_formatter()(20_000) == "20k"
    assert axes.yaxis.get_major_formatter()(12_000) == "12,000"
    assert not axes.collections  # no interval, no band


@pytest.mark.parametrize(
    "rows", [[], [{"env_step": 10, "train/q_loss": 1.0}], [{"env_step": 5, "train/return_mean": None}]]
)
def test_nothing_to_draw_says_so(rows, tmp_path):
    (axes,) = draw_learning_curve(rows).axes
    assert [text.get_text() for text in axes.texts] == ["no episode has finished yet"]
    assert learning_curve(rows, tmp_path / "curve.png").exists()


def test_writes_one_png(tmp_path):
    path = tmp_path / "curve.png"
    path.write_bytes(b"an older one")
    assert learning_curve(ROWS, str(path), baseline=22.25) == path
    assert imread(path).shape[:2] == (750, 1200)
    assert list(tmp_path.iterdir()) == [path]  # nothing beside it


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        learning_curve(ROWS, tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_keeps_away_from_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
    learning_curve(ROWS, tmp_path / "curve.png")


def test_curves_of_a_model_show_a_lone_validation_and_parts_of_an_epoch(tmp_path, monkeypatch):
    """A validation at the end of a single epoch is a point that can be seen; what is minus another measure
    has no panel."""
    drawn = []
    monkeypatch.setattr("foveal.runs.generate.write_png", lambda figure, path: drawn.append(figure))
    rows = [
        {"epoch": 0.4, "train/loss": 3.0, "train/learning_rate": 1.0},
        {"epoch": 1.0, "train/loss": 2.0, "validation/nats": 5.0, "validation/log_prob": -5.0},
    ]
    measure_curves(rows, tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes if axes.axison}
    assert panels.keys() == {"loss", "nats"}
    (trained,), (validated,) = panels["loss"].lines, panels["nats"].lines
    assert trained.get_marker() == ""
    assert list(trained.get_xdata()) == [0.4, 1.0]
    assert validated.get_marker() == "o"
    assert list(validated.get_ydata()) == [5.0]
    formatter = panels["loss"].xaxis.get_major_formatter()
    assert [formatter(x, 0) for x in (0.2, 1.0, 20_000)] == ["0.2", "1", "20k"]

"""foveal train ram, by the command line: what a run leaves, its baselines, resuming, and what is refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_fit import in_empty_folder, refused, rows_of, run_folder  # noqa: F401

from foveal.agents import RAM, newest_first
from foveal.runs.attention import fixation_pictures, table
from foveal.runs.cli import main
from foveal.vision import Classifier, load_dataset
from foveal.vision.canvas import on_canvas
from foveal.vision.fixations import RIGHT, WRONG, margin, zoom_of
from foveal.vision.glimpse import glimpse
from foveal.vision.weights import read_weights

QUICK = [
    *("train", "ram", "--translated", "12", "--canvases", "600", "--train-size", "300", "--test-size", "100"),
    *("--glimpses", "3", "--patch", "4", "--hidden", "32", "--glimpse-hidden", "16", "--std", "0.3"),
    *("--epochs", "3", "--batch-size", "50", "--log-every", "4", "--checkpoint-every", "8"),
    *("--monte-carlo", "3", "--threads", "1", "--track", "off", "--no-progress"),
]
BASELINES = ("random_looking", "fully_connected", "conv")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(QUICK) == 0
    return folder / run_folder(folder)


def test_a_run_leaves_its_errors_and_those_of_its_baselines(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["state"] == "finished"
    data = on_canvas(load_dataset("digits", seed=1, train_size=300, test_size=100), 12, 1, canvases=600)
    config = json.loads((trained / "config.json").read_text())
    assert config["dataset"]["sha256"] == data.digest
    assert config["config"]["scales"] == 1  # settled, not None
    ram = RAM.load(trained, device="cpu")
    assert summary["test/error"] == ram.evaluate(data.test).error
    assert summary["test/error_sampled"] == ram.evaluate(data.test, sampled=True).error
    averaged = ram.evaluate(data.test, sampled=True, passes=3).error
    assert (summary["test/error_monte_carlo"], summary["test/monte_carlo"]) == (averaged, 3)
    assert 0.8 < summary["baseline/commonest_class"] < 0.95
    for name in BASELINES:
        model = RAM if name == "random_looking" else Classifier
        other = model.load(trained / "baselines" / name / "best.safetensors", device="cpu")
        assert summary[f"baseline/{name}"] == other.evaluate(data.test).error
        assert newest_first(trained / "baselines" / name)[0].name == "step-000000000036"  # 3 epochs of 12
    random = RAM.load(trained / "baselines" / "random_looking" / "best.safetensors", device="cpu")
    assert random.config.looking == "random"
    # Of the baselines that see everything, too, the best on the validation images is taken.
    assert {path.name for path in (trained / "plots").iterdir()} == {
        "training_curves.png", "glimpses.png", "glimpses.gif", "error_by_glimpses.png",
    }  # fmt: skip
    with Image.open(trained / "plots" / "glimpses.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]


def test_evaluate_reports_one_pass(trained, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    assert main(["evaluate", str(trained), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for key in ("test/error", "test/error_sampled", "test/error_monte_carlo"):
        assert result[key] == summary[key]
    assert main(["evaluate", str(trained)]) == 0
    out = capsys.readouterr().out
    assert f"test error: {summary['test/error']:.2%} of 100 images" in out
    assert f"with drawn ones {summary['test/error_sampled']:.2%}" in out


@pytest.mark.parametrize("during", ["the model", "a baseline"])
def test_resumed_after_kill_9_is_the_run_that_was_never_stopped(trained, tmp_path, during):
    process = subprocess.Popen(
        [sys.executable, "-m", "foveal.runs", *QUICK], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    awaited = "metrics.jsonl" if during == "the model" else "baselines/random_looking/step-*/training*"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(tmp_path.glob(f"results/*/*/{awaited}"))
        if files and files[0].read_bytes().count(b"\n") >= (3 if during == "the model" else 0):
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    run = run_folder(tmp_path)
    assert json.loads((run / "summary.json").read_text())["state"] == "running"
    assert main(["resume", str(run), "--no-progress"]) == 0
    assert rows_of(run) == rows_of(trained)
    files = ["checkpoints/best/weights.safetensors", "checkpoints/step-000000000036/weights.safetensors"]
    for name in (*files, *(f"baselines/{name}/best.safetensors" for name in BASELINES)):
        mine, theirs = read_weights(run / name)[0], read_weights(trained / name)[0]
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    mine, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, trained))
    assert mine["state"] == "finished"
    for key in ("test/error", "test/error_sampled", *(f"baseline/{name}" for name in BASELINES)):
        assert mine[key] == theirs[key]


def test_without_baselines_there_are_none(tmp_path):
    flags = ["train", "ram", *QUICK[4:], "--cluttered", "14", "--clutter-size", "3", "--epochs", "1"]
    assert main([*flags, "--no-baseline"]) == 0
    run = run_folder()
    summary = json.loads((run / "summary.json").read_text())
    assert not any(key.startswith("baseline/") and key[9:] in BASELINES for key in summary)
    assert not (run / "baselines").exists()
    assert json.loads((run / "config.json").read_text())["dataset"]["shape"] == [1, 14, 14]


def test_pictures_show_the_pixels_seen_and_whether_the_answer_is_right(trained):
    """The box of the last glimpse, found by its colour, holds the pixels of the glimpse that was consumed."""
    ram = RAM.load(trained, device="cpu")
    data = on_canvas(load_dataset("digits", seed=1, train_size=300, test_size=100), 12, 1, canvases=600)
    images, labels = data.test.images[:6], data.test.labels[:6]
    looks = ram.watch(images)
    zoom, m = zoom_of(images[0].numpy()), margin(images[0].numpy(), 4)
    for n, steps in enumerate(fixation_pictures(ram, images, labels)):
        for t, picture in enumerate(steps):
            right = looks.probabilities[t, n].argmax() == labels[n]
            above = picture[:-26]
            ys, xs = np.nonzero((above == (RIGHT if right else WRONG)).all(-1))
            assert not (above == (WRONG if right else RIGHT)).all(-1).any()
            left, top = xs.min(), ys.min()
            assert (xs.max() + 1 - left, ys.max() + 1 - top) == (4 * zoom, 4 * zoom)
            seen = glimpse(images[n : n + 1], looks.locations[t, n : n + 1], 4)[0, 0].numpy()
            canvas = np.pad(images[n, 0].numpy(), 4)
            x, y = (left - m) // zoom + 4, (top - m) // zoom + 4
            np.testing.assert_array_equal(canvas[y : y + 4, x : x + 4], seen)


def test_the_table_names_everyone():
    text = table(
        {"test/error": 0.1, "test/error_sampled": 0.2, "test/images": 50}, {"random_looking": 0.5}, 3
    )
    assert text.splitlines() == [
        "error on 50 test images, 3 epochs each",
        "  ram, mean looks     10.00%",
        "  ram, drawn looks    20.00%",
        "  random looking      50.00%",
    ]


def test_a_classifier_trains_on_canvases_too():
    assert main(["train", "classifier", "--encoder", "strided", "--cluttered", "20", "--canvases", "200",
                 "--clutter-size", "4", "--train-size", "100", "--epochs", "1", "--track", "off",
                 "--no-progress"]) == 0  # fmt: skip
    config = json.loads((run_folder() / "config.json").read_text())
    assert config["dataset"]["images"][0] == 200
    assert config["dataset"]["shape"] == [1, 20, 20]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "9"], "patch must be from 1 to the shorter side of the 8x8 canvas, got 9"),
        (["--translated", "6"], "canvas must be 8 pixels or more, to hold the images of 8x8, got 6"),
        (
            ["--cluttered", "20", "--clutter-size", "9"],
            "clutter_size must be from 1 to 8, the images', got 9",
        ),
        (["--cluttered", "20", "--clutter-pieces", "-1"], "clutter_pieces must be 0 or more, got -1"),
        (["--backbone", "lenet5"], "backbone: ram has a glimpse network of its own, got 'lenet5'"),
    ],
)
def test_what_cannot_be_taken_is_one_line_and_leaves_nothing(flags, message, capsys):
    assert message in refused(capsys, "train", "ram", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--glimpses", "0"], "glimpses must be 1 or more, got 0"),
        (["--std", "0"], "std must be greater than 0, got 0.0"),
        (["--translated", "20", "--cluttered", "20"], "translated and cluttered are two tasks"),
        (["--canvases", "0"], "canvases must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_told_by_the_parser(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "ram", *flags])
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not Path("results").exists()


def test_a_run_whose_baselines_are_gone_trains_them_again(trained, tmp_path):
    run = tmp_path / "results" / "group" / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "baselines")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "state": "stopped"}))
    assert main(["resume", str(run), "--no-progress"]) == 0
    again = json.loads((run / "summary.json").read_text())
    assert all(again[f"baseline/{name}"] == summary[f"baseline/{name}"] for name in BASELINES)

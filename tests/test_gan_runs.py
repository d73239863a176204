"""GANs by the command line: what a run leaves, measures and refuses, and that it goes on after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from foveal.generative import GAN
from foveal.runs import extractor
from foveal.runs.benchmarks import gan as benchmark
from foveal.runs.cli import main
from foveal.vision import Classifier, ClassifierConfig, load_dataset

QUICK = [
    *("train", "gan", "--width", "8", "--latent-size", "16", "--batch-size", "64", "--train-size", "300"),
    *("--log-every", "3", "--checkpoint-every", "5", "--threads", "1", "--track", "off", "--no-progress"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> str:
    """A classifier of 64 features that tells digits apart."""
    digits = load_dataset("digits")
    model = Classifier(digits.space, digits.classes, SMALL, device="cpu").fit(digits, 6)
    return str(model.save(tmp_path_factory.mktemp("judge") / "judge.safetensors"))


SMALL = ClassifierConfig(encoder="minatar", optimizer="adam", learning_rate=3e-3, batch_size=64)


def run_folder() -> Path:
    (path,) = Path().glob("results/*/*")
    return path


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]


def test_a_run_is_measured_and_says_with_what(judge: str, capsys) -> None:
    options = ("--loss", "hinge", "--conditional", "projection", "--epochs", "3", "--extractor", judge)
    assert main([*QUICK, *options, "--learning-rate", "0.1"]) == 0  # else samples are all grey, and all alike
    run = run_folder()
    summary, rows = summary_of(run), rows_of(run)
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert math.isfinite(summary[f"test/{name}"]), name
    assert summary["test/fid_images"] == [360, 360]
    assert summary["test/fid_split"] == "test"
    assert summary["test/fid_extractor"].startswith("classifier minatar, sha256 ")
    assert summary["test/fid_resize"] == "none"
    assert 0 <= summary["baseline/fid_of_training_images"] < summary["test/fid"]
    assert 0 <= summary["test/class_accuracy"] <= 1
    assert summary["last/grad_step"] == 15
    distances = [row["validation/fid"] for row in rows if "validation/fid" in row]
    assert len(set(distances)) == 3
    best = next(row for row in rows if row.get("validation/fid") == min(distances))
    assert summary["best/grad_step"] == best["grad_step"]
    assert {"train/critic_real", "train/critic_fake", "train/diversity"} <= set(rows[-1])
    for name in ("samples", "nearest"):
        with Image.open(run / "plots" / f"{name}.png") as picture:
            assert picture.width > 300

    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test/fid"] == summary["test/fid"]
    assert main(["sample", str(run), "-n", "6", "--label", "3", "--out", "threes.png"]) == 0
    with Image.open("threes.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 2


def test_without_an_extractor_nothing_is_measured_with_one(capsys) -> None:
    assert main([*QUICK, "--epochs", "1", "--extractor", "none"]) == 0
    summary = summary_of(run_folder())
    assert "test/fid" not in summary
    assert summary["test/nearest_train"] > 0


def test_an_extractor_is_trained_once_a_dataset(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extractor, "recipe", lambda dataset: (SMALL, 1.0))
    for seed, said in (("1", True), ("2", False)):
        assert main([*QUICK, "--epochs", "1", "--seed", seed]) == 0
        assert ("extractor: training minatar on digits, once" in capsys.readouterr().out) == said
    used = {summary_of(run)["test/fid_extractor"] for run in Path().glob("results/*/*")}
    assert len(used) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("--extractor", "nowhere"), "extractor must be auto, none, inception, or a classifier's run"),
    (("--loss", "hing"), "loss must be one of minimax"),
    (("--image-size", "9", "--architecture", "resnet", "--extractor", "none"), "9x9; dcgan and mlp make any"),
    (("--extractor", "JUDGE", "--test-size", "100"), "more than the 100 test images"),
    (("--extractor", "JUDGE", "--image-size", "16"), "the images of digits are"),
    (("--extractor", "inception"), "grey or RGB images of 256 levels"),
])  # fmt: skip
def test_what_cannot_be_taken_is_one_line_before_any_folder(judge, capsys, arguments, message) -> None:
    assert main([*QUICK, *(judge if a == "JUDGE" else a for a in arguments)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1
    assert not Path("results").exists()


@pytest.mark.parametrize("broken", ["generator", "critic"])
def test_a_broken_network_ends_the_run_and_leaves_a_good_checkpoint(broken, monkeypatch, capsys) -> None:
    update = GAN.update

    def breaking(self, images, labels, moment):
        if moment.step == 12:
            self.learners[broken].weights[0] = math.nan
        return update(self, images, labels, moment)

    monkeypatch.setattr(GAN, "update", breaking)
    assert main([*QUICK, "--epochs", "5", "--extractor", "none"]) == 2
    err = capsys.readouterr().err
    assert f"foveal: the {broken} is no longer finite at grad_step 15" in err
    assert "Traceback" not in err
    run = run_folder()
    assert summary_of(run)["state"] == "failed"
    newest = max((run / "checkpoints").glob("step-*"))
    good = GAN.load(newest, device="cpu")
    assert good.grad_step == 10
    assert all(torch.isfinite(t).all() for t in good.weights().values() if t.is_floating_point())


def test_a_killed_run_goes_on_bit_for_bit(judge: str) -> None:
    options = [*QUICK, "--loss", "wgan-gp", "--epochs", "8", "--extractor", judge, "--pictures-every", "100"]
    assert main([*options, "--name", "whole"]) == 0
    command = [sys.executable, "-m", "foveal.runs", *options, "--name", "killed"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (found := list(Path().glob("results/*/killed-*/checkpoints/step-000000000010"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (killed,) = Path().glob("results/*/killed-*")
    assert found
    assert summary_of(killed)["state"] != "finished"
    assert main(["resume", str(killed), "--no-progress"]) == 0
    (whole,) = Path().glob("results/*/whole-*")
    assert rows_of(killed) == rows_of(whole)
    ends = [max((run / "checkpoints").glob("step-*")) for run in (whole, killed)]
    for file in ("weights.safetensors", "training.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes()
    best = [(run / "checkpoints" / "best" / "weights.safetensors").read_bytes() for run in (whole, killed)]
    assert best[0] == best[1]


def test_the_benchmark_measures_a_cell_once(monkeypatch, capsys) -> None:
    monkeypatch.setattr(extractor, "recipe", lambda dataset: (SMALL, 1.0))
    monkeypatch.setattr(sys, "argv", [
        *("gan", "--datasets", "digits", "--variants", "hinge + SN, projection", "--seeds", "1"),
        *("--epochs", "0.1", "--out", "gan.json"),
    ])  # fmt: skip
    assert benchmark.main() == 0
    results = json.loads(Path("gan.json").read_text())
    (cell,) = results["cells"]
    assert cell["config"]["conditional"] == "projection"
    assert cell["images"] == [360, 360]
    assert cell["last"]["grad_step"] == 2
    assert 0 <= cell["best"]["class_accuracy"] <= 1
    assert cell["about"]["versions"]["torch"]
    assert benchmark.main() == 0
    assert json.loads(Path("gan.json").read_text()) == results
    assert len(list(Path().glob("results/*/*"))) == 1
    table = benchmark.report(results["cells"]).splitlines()
    assert [line.count("|") for line in table] == [13] * 5
    assert f"| {cell['last']['fid']:.2f} |" in table[3]

    seeds = [
        {**cell, "seed": seed, "last": cell["last"] | dict(zip(names, values))}
        for names in [("fid", "class_share_min", "class_share_max", "class_accuracy")]
        for seed, values in enumerate([(1.0, 0.08, 0.12, 0.98), (4.0, 0.04, 0.16, 0.9)])
    ]
    for both in (seeds, seeds[::-1]):
        line = benchmark.report(both).splitlines()[3]
        assert "| 2.50 (1.00 to 4.00) |" in line
        assert line.endswith("| 4.0% to 16.0% | 90.0% |")

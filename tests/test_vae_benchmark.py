"""The VAE benchmark's bookkeeping: finished cells are kept and skipped; both sides take the same steps."""

import itertools
import json

import torch

from foveal.runs.benchmarks import vae as benchmark
from foveal.runs.benchmarks.vae import (
    TASKS,
    append,
    images_of,
    model_of,
    our_epochs,
    plain_epochs,
    read,
    report,
)


def cell(task: str, seed: int, nats: float) -> dict:
    about = {
        "k": 500,
        "epochs": TASKS[task].epochs,
        "elbo": -nats - 1,
        "cpu_s": 10.0,
        "independent_pixels": 25.0,
    }
    return {"task": task, "seed": seed, "nats": nats, **about}


def test_cells_are_replaced_and_reported(tmp_path):
    out = tmp_path / "deep" / "vae.json"
    assert read(out) == []
    for seed, nats in ((1, 18.0), (0, 17.0), (1, 16.0)):
        append(out, cell("digits", seed, nats))
    assert [(one["seed"], one["nats"]) for one in read(out)] == [(0, 17.0), (1, 16.0)]
    assert {path.name for path in out.parent.iterdir()} == {"vae.json"}
    assert "date" in json.loads(out.read_text())["cells"][0]["about"]
    row = report(read(out)).splitlines()[2]
    assert row.startswith("| digits | 2 | 16.50 (IWAE-500) | 16.00 to 17.00 | -17.50 | 25.0 | 17.1 |")


def test_finished_cells_are_skipped(tmp_path, monkeypatch):
    trained: list[tuple[str, int]] = []

    def record(name, seed, data_dir):
        trained.append((name, seed))
        return cell(name, seed, 17.0)

    monkeypatch.setattr(benchmark, "train_cell", record)
    out = tmp_path / "vae.json"
    append(out, cell("digits", 1, 17.0))
    speed = {"images_per_s": {"ours": 2}, "ratio": 1.0, "ratio_ci95": [1.0, 1.0]}
    append(out, {"task": "throughput-digits", "seed": 0, **speed})
    monkeypatch.setattr("sys.argv", ["vae", "--tasks", "digits", "--seeds", "3", "--out", str(out)])
    assert benchmark.main() == 0
    assert trained == [("digits", 0), ("digits", 2)]


def test_the_plain_loop_takes_the_same_steps(monkeypatch):
    """Without noise, and with all images in a batch, whose order does not matter then."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    settings = {"schedule": "constant", "kl_warmup": 0.0, "dropout": 0.0, "batch_size": 5000}
    task = TASKS["digits"]._replace(config=settings, train_size=200)
    dataset = images_of(task, None)
    ours, theirs = model_of(task, dataset, 0), model_of(task, dataset, 0)
    start = ours.learners["network"].weights.clone()
    sides = our_epochs(ours, dataset), plain_epochs(theirs.network, theirs.config, dataset.train.images, 0)
    for side in sides:
        for _ in itertools.islice(side, 4):
            pass
    assert ours.grad_step == 4
    mine, plain = (model.learners["network"].weights for model in (ours, theirs))
    assert (mine - start).abs().mean() > 3e-3
    # Adam turns a rounding error in a tiny gradient into a step of another sign.
    assert ((mine - plain).abs() > 1e-5).double().mean() < 0.01

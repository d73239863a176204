"""The Generative contract by the command line: what a run leaves, resuming, sampling, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys  # noqa: F401 - registers its environments
from matplotlib.image import imread

from foveal.agents import newest_first
from foveal.generative import Generative, Learner, independent_pixels
from foveal.runs.cli import main
from foveal.runs.fit import MODELS, load_run
from foveal.vision import Dataset, Split, binarize, load_dataset, quantize
from foveal.vision.weights import read_weights

QUICK = [
    *(
        "train",
        "vae",
        "--test-size",
        "40",
        "--train-size",
        "200",
        "--epochs",
        "4",
        "--batch-size",
        "50",
        "--log-every",
        "4",
    ),
    *("--validate-every", "1", "--checkpoint-every", "4", "--pictures-every", "2", "--ema", "0.9"),
    *("--threads", "1", "--track", "off", "--no-progress"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(QUICK) == 0
        (path,) = Path().glob("results/*/*")
        return folder / path
    finally:
        os.chdir(before)


# Data.


def test_a_threshold_makes_ones_of_pixels_that_reach_it():
    digits = load_dataset("digits")
    two = binarize(digits, 8)
    assert two.high == 1
    assert two.space.high.max() == 1
    for name in ("train", "validation", "test"):
        grey, black = getattr(digits, name).images, getattr(two, name).images
        assert torch.equal(black, (grey >= 8).to(torch.uint8))
    for wrong in (0, 17, "static"):
        with pytest.raises(ValueError, match="binarize must be dynamic, fixed or from 1 to 16"):
            binarize(digits, wrong)  # type: ignore[arg-type]


def test_dynamic_pixels_are_ones_as_often_as_they_are_bright_and_held_out_ones_are_drawn_once():
    digits = load_dataset("digits", seed=3)
    drawn = binarize(digits, "dynamic")
    assert (drawn.high, drawn.grey) == (1, 16)
    assert torch.equal(drawn.train.images, digits.train.images)
    assert torch.equal(drawn.test.images, binarize(load_dataset("digits", seed=4), "dynamic").test.images)
    images = digits.train.images[:1].expand(4000, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    share = drawn.draw(images, generator).double().mean(0)
    chance = images[0].double() / 16
    assert (share - chance).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert torch.equal(share[images[0] == 16], torch.ones(int((images[0] == 16).sum()), dtype=torch.float64))
    assert drawn.test.images.max() == 1
    assert abs(drawn.test.images.double().mean() - digits.test.images.double().mean() / 16) < 0.01
    fixed = binarize(digits, "fixed")  # the training images are drawn once as well
    assert (fixed.high, fixed.grey) == (1, None)
    assert torch.equal(fixed.test.images, drawn.test.images)
    assert torch.equal(fixed.draw(fixed.train.images), fixed.train.images)
    assert fixed.train.images.max() == 1
    assert abs(fixed.train.images.double().mean() - digits.train.images.double().mean() / 16) < 0.005


def test_levels_are_equally_wide():
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    split = Split(grey, torch.zeros(1, dtype=torch.int64))
    coarse = quantize(Dataset("ramp", split, split, split, ("a",), 255), 8)
    assert coarse.high == 7
    assert coarse.train.images.flatten().bincount().tolist() == [32] * 8
    with pytest.raises(ValueError, match="levels must be from 2 to 255, got 256"):
        quantize(Dataset("ramp", split, split, split, ("a",), 255), 256)


def test_independent_pixels_by_hand():
    train = torch.tensor([[0, 1], [0, 1], [1, 1]], dtype=torch.uint8).reshape(3, 1, 1, 2)
    test = torch.tensor([[0, 0]], dtype=torch.uint8).reshape(1, 1, 1, 2)
    seen, new = (Split(x, torch.zeros(len(x), dtype=torch.int64)) for x in (train, test))
    nats = independent_pixels(Dataset("tiny", seen, seen, new, ("a",), 1))
    assert nats == pytest.approx(-np.log(3 / 5) - np.log(1 / 5))


# Learners.


def test_an_average_of_weights_is_what_is_used_and_saved():
    network = torch.nn.Linear(2, 1)
    learner = Learner(network, ema=0.5)
    averages = [learner.weights.clone()]
    for step in range(1, 4):
        learner.step(network.weight.sum(), 0.1)
        share = min(0.5, (1 + step) / (10 + step))
        averages.append(share * averages[-1] + (1 - share) * learner.weights)
    assert learner.average is not None
    assert torch.allclose(learner.average, averages[-1])
    assert not torch.allclose(learner.average, learner.weights)
    assert network.weight.data_ptr() == learner.weights.data_ptr()


# Runs.


def test_a_run_leaves_figures_curves_and_pictures(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["test/nats"] < -summary["test/elbo"]
    assert summary["test/nats_k"] == 500
    assert summary["baseline/independent_pixels_nats"] > 20
    config = json.loads((trained / "config.json").read_text())
    assert config["options"]["binarize"] == "8"
    assert config["dataset"]["levels"] == 2
    rows = rows_of(trained)
    assert [row["grad_step"] for row in rows] == [4, 8, 12, 16]
    assert all("validation/elbo" in row for row in rows)
    names = {path.name for path in (trained / "plots").iterdir()}
    assert names == {"training_curves.png", "latent_map.png"} | {
        f"{what}{when}.png"
        for what in ("samples", "reconstructions", "interpolation")
        for when in ("", "-epoch00002", "-epoch00004")
    }
    # The noise is the same: the last pictures are those of the same weights.
    best = read_weights(trained / "checkpoints" / "best" / "weights.safetensors")[1]["grad_step"]
    assert best == 16
    last, scheduled = (imread(trained / "plots" / f"samples{when}.png") for when in ("", "-epoch00004"))
    assert np.array_equal(last, scheduled)
    assert last.std() > 0.05


def test_evaluate_and_list_say_the_same(trained, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    assert main(["evaluate", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test/nats"] == summary["test/nats"]
    assert main(["evaluate", str(trained), "--k", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["test/nats_k"] == 1
    assert result["test/nats"] > summary["test/nats"]
    assert main(["list", "--results", str(trained.parent.parent)]) == 0
    assert f"{summary['test/nats']:.2f} nats" in capsys.readouterr().out


@pytest.mark.parametrize("dropped", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(trained, dropped, tmp_path):
    """With an average of weights, whose saved weights are not those that go on being trained."""
    run = tmp_path / "results" / "group" / "run"
    shutil.copytree(trained, run)
    if dropped == 1:
        shutil.rmtree(newest_first(run / "checkpoints")[0])
        (run / "summary.json").write_text(json.dumps({"state": "running"}))
        assert main(["resume", str(run), "--no-progress"]) == 0
        assert rows_of(run) == rows_of(trained)
    else:
        assert main(["resume", str(run), "--epochs", "5", "--no-progress"]) == 0
        assert [row["grad_step"] for row in rows_of(run)] == [4, 8, 12, 16, 20]
        return
    for name in ("best/weights", "step-000000000016/weights", "step-000000000016/training"):
        mine, theirs = (read_weights(f / "checkpoints" / f"{name}.safetensors")[0] for f in (run, trained))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert "resume_mismatch" not in json.loads((run / "summary.json").read_text())


def test_evaluation_and_pictures_leave_the_training_as_it_is():
    data = binarize(load_dataset("digits", train_size=100), 8)

    def after(look: bool) -> dict[str, torch.Tensor]:
        kind = MODELS["vae"]
        model: Any = kind(data.space, data.classes, kind.Config(batch_size=50), seed=1, device="cpu")
        for _ in model.training(data, 2, log_every=1):
            if look:
                model.pictures(data)
                model.test(data, k=2)
                model.sample(3)
        return model.state()[0]

    one, other = after(True), after(False)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_sample_writes_a_picture(trained, capsys):
    for seed in ("1", "1", "2"):
        assert main(["sample", str(trained), "-n", "6", "--columns", "3", "--seed", seed]) == 0
        assert capsys.readouterr().out == "samples: samples.png\n"
        Path("samples.png").rename(f"samples{len(list(Path().glob('samples*')))}.png")
    one, same, other = (imread(f"samples{number}.png") for number in (1, 2, 3))
    assert one.shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def size_of(path: str) -> tuple[int, int]:
    """Rows and columns of a grid of digits."""
    height, width = imread(path).shape[:2]
    return (height - 2) // 66, (width - 2) // 66


@pytest.mark.parametrize(
    ("flags", "what", "size"),
    [
        (["--interpolate", "-n", "3"], "interpolation", (3, 11)),
        (["--interpolate", "-n", "3", "--ends", "test", "--path", "linear"], "interpolation", (3, 11)),
        (["--traverse", "--columns", "5"], "traversal", (10, 5)),
        (["--traverse", "--ends", "test", "-n", "2"], "traversal", (2, 11)),
        (["--arithmetic", "8-3+5", "--columns", "3"], "arithmetic", (3, 3)),
        (["--no-mean", "-n", "7"], "samples", (3, 3)),
    ],
)
def test_walks_through_latents_are_drawn(trained, flags, what, size, capsys):
    assert main(["sample", str(trained), *flags, "--out", "walk.png"]) == 0
    assert capsys.readouterr().out == f"{what}: walk.png\n"
    assert size_of("walk.png") == size
    values = np.unique(imread("walk.png")[..., 0])
    assert (len(values) == 2) == (what == "samples")  # drawn pixels are black or white, means are grey


def test_arithmetic_with_nothing_changed_is_the_reconstruction(trained):
    assert main(["sample", str(trained), "--arithmetic", "8-3+3", "--columns", "4"]) == 0
    sheet = imread("samples.png")
    rows = [sheet[2 + 66 * row : 66 + 66 * row] for row in range(3)]
    assert np.array_equal(rows[1], rows[2])
    assert not np.array_equal(rows[0], rows[1])


def test_a_conditional_model_is_sampled_by_label(capsys):
    flags = ["--conditional", "--epochs", "1", "--test-size", "20", "--train-size", "100", "--track", "off"]
    assert main(["train", "vae", *flags, "--no-progress"]) == 0
    (run,) = Path().glob("results/*/*")
    assert main(["evaluate", str(run), "--k", "3"]) == 0
    assert main(["sample", str(run), "--label", "3", "-n", "2"]) == 0
    assert main(["sample", str(run), "--label", "three"]) == 2
    assert "label takes 0, 1, 2" in capsys.readouterr().err
    assert main(["sample", str(run), "--arithmetic", "1-2"]) == 2
    assert "arithmetic: this model is given its labels" in capsys.readouterr().err


def test_an_autoencoder_has_what_it_has(capsys):
    flags = ["--kind", "denoising", "--epochs", "2", "--test-size", "30", "--train-size", "100"]
    assert main(["train", "autoencoder", *flags, "--track", "off", "--no-progress"]) == 0
    (run,) = Path().glob("results/*/*")
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["baseline/pca"] < summary["baseline/mean_image"]
    assert summary["test/squared_error"] > summary["baseline/pca"]
    assert "test/nats" not in summary
    assert main(["sample", str(run)]) == 2
    assert "a model of the kind autoencoder has no sample" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--k", "3"]) == 2
    assert "autoencoder has no k" in capsys.readouterr().err
    assert main(["sample", str(run), "--interpolate", "-n", "2"]) == 0
    assert size_of("samples.png") == (2, 11)


# What agents see.


def test_collected_frames_are_a_dataset_whose_encoder_goes_into_an_agent(capsys):
    collect = ["collect", "--env-id", "toys/Sides-v0", "--frames", "100", "--num-envs", "4"]
    assert main([*collect, "--out", "seen.npz"]) == 0
    assert "100 frames of 1x20x20" in capsys.readouterr().out
    data = load_dataset("seen.npz")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [68, 12, 20]
    train = [
        "train",
        "vae",
        "--dataset",
        "seen.npz",
        "--encoder",
        "minatar",
        "--epochs",
        "1",
        "--track",
        "off",
    ]
    assert main([*train, "--no-progress", "--likelihood", "continuous-bernoulli"]) == 0
    (run,) = Path().glob("results/*/*")
    agent = ["train", "pqn", "--env-id", "toys/Sides-v0", "--encoder", str(run), "--total-steps", "32"]
    agent += ["--num-envs", "2", "--num-steps", "8", "--minibatches", "1", "--final-episodes", "2"]
    assert main([*agent, "--no-video", "--track", "off", "--no-progress"]) == 0
    (played,) = Path().glob("results/pqn*/*")
    again = ["collect", "--policy", str(played), "--frames", "24", "--every", "2", "--out", "more.npz"]
    assert main(again) == 0
    assert load_dataset("more.npz").space == data.space


def test_frames_keep_their_order_and_their_range():
    from foveal.runs.collect import Collect, play, write

    played = play(Collect(env_id="MinAtar/Breakout-v1", frames=50, num_envs=2))
    frames, high = played[:2]
    assert (frames.shape, frames.dtype, high) == ((50, 4, 10, 10), np.uint8, 1)
    thinned = play(Collect(env_id="MinAtar/Breakout-v1", frames=20, num_envs=2, every=2)).frames
    assert np.array_equal(thinned.reshape(10, 2, 4, 10, 10), frames[:40].reshape(20, 2, 4, 10, 10)[::2])
    write(Path("frames.npz"), played)
    data = load_dataset("frames.npz")
    assert data.high == 1
    parts = [part.images.numpy() for part in (data.train, data.validation, data.test)]
    assert np.array_equal(np.concatenate(parts), frames)


@pytest.mark.parametrize("high", [np.array(300), np.array([1]), np.array(1.5), np.array(3)])
def test_a_range_that_is_none_is_refused(high):
    np.savez("wrong.npz", images=np.full((9, 5, 5), 7, np.uint8), labels=np.zeros(9, np.int64), high=high)
    with pytest.raises(ValueError, match="high is"):
        load_dataset("wrong.npz")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["sample", "RUN", "--arithmetic", "8"],
            "arithmetic must be a sum of classes such as a-b+c, got '8'",
        ),
        (["sample", "RUN", "--arithmetic", "8-x"], "arithmetic takes 0, 1, 2"),
        (["sample", "RUN", "--traverse", "--interpolate"], "interpolate, traverse and arithmetic exclude"),
        (["collect"], "env_id is needed with a random policy"),
        (["collect", "--env-id", "CartPole-v1"], "env_id: CartPole-v1 shows Box"),
        (["collect", "--env-id", "CartPole-v1", "--out", "x.npy"], "out must end in .npz, got x.npy"),
        (["collect", "--env-id", "CartPole-v1", "--frames", "1"], "frames must be 10 or more, got 1"),
        (["collect", "--policy", "nowhere"], "no weights file or run at nowhere"),
        (["sample", "RUN", "-n", "0"], "n must be 1 or more, got 0"),
        (["sample", "RUN", "--label", "3"], "label: this vae was trained without labels"),
        (["sample", "nowhere"], "no weights file or run at nowhere"),
        (["train", "vae", "--binarize", "None", "--likelihood", "bernoulli"], "takes images of 0 and 1"),
        (
            ["train", "vae", "--binarize", "half"],
            "binarize must be dynamic, fixed or a whole number, got 'half'",
        ),
        (["train", "vae", "--binarize", "99"], "binarize must be dynamic, fixed or from 1 to 16, got 99"),
        (["train", "vae", "--levels", "4"], "levels and binarize exclude each other"),
        (["train", "vae", "--encoder", "nature"], "NatureCNN takes images of 36x36 pixels or more"),
        (["train", "vae", "--latent-dim", "0"], "latent_dim must be 1 or more, got 0"),
        (["train", "classifier", "--binarize", "dynamic"], "binarize dynamic is for generative models"),
    ],
)
def test_what_cannot_be_taken_is_one_line_and_leaves_nothing(command, message, trained, capsys):
    try:
        code = main([str(trained) if part == "RUN" else part for part in command])
    except SystemExit as stop:  # tyro's own refusal of a field
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in err
    assert not Path("results").exists()
    assert not Path("samples.png").exists()


def test_weights_that_are_no_longer_finite_are_named(trained):
    model, data = load_run(trained)
    assert isinstance(model, Generative)
    model.learners["network"].weights[0] = float("nan")
    with pytest.raises(FloatingPointError, match="loss is nan at grad_step|weights are no longer finite"):
        list(model.training(data, 100, log_every=1))
    with pytest.raises(FloatingPointError, match="the network's weights are no longer finite"):
        model.check_finite({})

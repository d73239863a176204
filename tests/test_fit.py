"""Training classifiers by the command line: what a run leaves, resuming, the checks, and what is refused."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys  # noqa: F401 - registers its environments
from forks import foveal
from matplotlib.image import imread
from PIL import Image

from foveal.agents import AGENTS, PPO, newest_first
from foveal.envs import make_vec
from foveal.runs import open_run
from foveal.runs.checks import find_learning_rate, overfit_one_batch, plain
from foveal.runs.classify import wilson
from foveal.runs.cli import main
from foveal.runs.explain import Scores, play, seen_image
from foveal.runs.model_plots import confusion_matrix, filters_grid, training_curves
from foveal.vision import Classifier, ClassifierConfig, load_dataset
from foveal.vision.explain import attribute
from foveal.vision.weights import read_weights

QUICK = [
    *("train", "classifier", "--encoder", "minatar", "--optimizer", "adam", "--learning-rate", "0.01"),
    *(
        "--train-size",
        "400",
        "--epochs",
        "4",
        "--batch-size",
        "25",
        "--log-every",
        "8",
        "--checkpoint-every",
        "16",
    ),
    *("--threads", "1", "--track", "off", "--no-progress"),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folder(where: Path = Path()) -> Path:
    (path,) = where.glob("results/*/*")
    return path


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]


def refused(capsys, *arguments: str) -> str:
    """The one line that a wrong command ends with; nothing is left behind."""
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    assert not Path("results").exists()
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(QUICK) == 0
        return folder / run_folder()
    finally:
        os.chdir(before)


def test_a_run_leaves_all_that_it_says(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["agent"] == "classifier"
    assert config["dataset"]["images"] == [400, 143, 360]
    assert config["dataset"]["sha256"] == load_dataset("digits", seed=1, train_size=400).digest
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["test/error"] < 0.25
    assert summary["test/error_ci95_low"] < summary["test/error"] < summary["test/error_ci95_high"]
    assert 0.85 < summary["baseline/commonest_class"] < 0.92
    run = open_run(trained)
    assert summary["device"] == run.config["device"]
    assert summary["versions"] == run.config["versions"]
    assert summary["wall_s"] > 0
    speeds = sorted(row["speed/images_per_s"] for row in run.rows() if "speed/images_per_s" in row)
    middle = (speeds[(len(speeds) - 1) // 2] + speeds[len(speeds) // 2]) / 2
    assert summary["speed/images_per_s"] == pytest.approx(middle)
    rows = rows_of(trained)
    assert [row["grad_step"] for row in rows] == list(range(8, 72, 8))
    assert ["validation/accuracy" in row for row in rows] == [False, True] * 4
    assert {path.name for path in (trained / "plots").iterdir()} == {
        "training_curves.png", "confusion.png", "filters.png",
    }  # fmt: skip
    # The best weights are those of the epoch with the best validation, the last of equals.
    accuracies = {
        row["grad_step"]: row["validation/accuracy"] for row in rows if "validation/accuracy" in row
    }
    best = max(accuracies, key=lambda step: (accuracies[step], step))
    assert read_weights(trained / "checkpoints" / "best" / "weights.safetensors")[1]["grad_step"] == best


def test_evaluate_gives_the_same_figures(trained, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    assert main(["evaluate", str(trained), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["test/error"] == summary["test/error"]
    assert main(["evaluate", str(trained)]) == 0
    assert f"test error: {summary['test/error']:.2%} of 360 images" in capsys.readouterr().out


def test_list_shows_models_and_their_runs(trained, capsys):
    assert main(["list", "--results", str(trained.parent.parent)]) == 0
    out = capsys.readouterr().out
    assert "classifier" in out
    summary = json.loads((trained / "summary.json").read_text())
    assert f"{summary['test/error']:.2%} wrong" in out


def test_list_measures_encoders_and_says_which_do_not_fit(capsys):
    assert main(["list", "encoders", "--input-shape", "4", "84", "84", "--batch-size", "2"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["nature"][1:4] == ["1,684,128", "64x7x7", "512"]
    assert lines["impala"][1:4] == ["1,089,232", "32x11x11", "256"]
    assert main(["list", "encoders", "--input-shape", "1", "10", "10"]) == 0
    assert "NatureCNN takes images of 36x36 pixels or more, got 10x10" in capsys.readouterr().out


# Stopping and resuming.


def test_resumed_after_kill_9_is_the_run_that_was_never_stopped(trained, tmp_path):
    process = foveal(*QUICK, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = list(tmp_path.glob("results/*/*/metrics.jsonl"))
        if files and files[0].read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    run = run_folder(tmp_path)
    if newest_first(run / "checkpoints")[0].name == "step-000000000064":  # too fast: as if killed before
        shutil.rmtree(newest_first(run / "checkpoints")[0])
        (run / "summary.json").write_text(json.dumps({"state": "running"}))
    assert main(["resume", str(run), "--no-progress"]) == 0
    assert rows_of(run) == rows_of(trained)
    names = ("best", "step-000000000064")
    for name in names:
        mine, theirs = (
            read_weights(folder / "checkpoints" / name / "weights.safetensors")[0]
            for folder in (run, trained)
        )
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert "resume_mismatch" not in summary


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [flag if flag != "4" else "4000" for flag in QUICK[:-3]]
    process = foveal(*flags, "--track", "off", "--no-progress", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        files = list(tmp_path.glob("results/*/*/metrics.jsonl"))
        if files and files[0].stat().st_size:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out = process.communicate()
    assert process.returncode == 130
    run = run_folder(tmp_path)
    assert f"to go on: foveal resume {run.relative_to(tmp_path)}" in out
    steps = rows_of(run)[-1]["grad_step"]
    assert newest_first(run / "checkpoints")[0].name == f"step-{steps:012d}"
    assert json.loads((run / "summary.json").read_text())["state"] == "stopped"


def test_more_epochs_go_on_from_the_end(trained, tmp_path, capsys):
    run = tmp_path / "results" / "group" / "run"
    shutil.copytree(trained, run)
    assert main(["resume", str(run)]) == 2
    assert (
        "is finished: 4 epochs are done; to train it further, give more --epochs" in capsys.readouterr().err
    )
    assert main(["resume", str(run), "--total-steps", "10"]) == 2
    assert "it takes --epochs, not --total-steps" in capsys.readouterr().err
    assert main(["resume", str(run), "--epochs", "5", "--no-progress"]) == 0
    rows = rows_of(run)
    assert rows[:8] == rows_of(trained)
    assert [row["grad_step"] for row in rows[8:]] == [72, 80]
    assert json.loads((run / "config.json").read_text())["epochs"] == 5


def test_best_weights_of_rows_that_are_no_more_go_with_them(trained, tmp_path):
    """From an older checkpoint with other epochs, what was best later never happened."""
    run = tmp_path / "results" / "group" / "run"
    shutil.copytree(trained, run)
    newest, older = newest_first(run / "checkpoints")
    shutil.rmtree(newest)
    assert older.name == "step-000000000048"
    best = run / "checkpoints" / "best" / "weights.safetensors"
    shutil.copy(trained / "checkpoints" / newest.name / "weights.safetensors", best)  # of step 64
    (run / "summary.json").write_text(json.dumps({"state": "stopped"}))
    # As long as the checkpoint: nothing is left to train that could become the best.
    assert main(["resume", str(run), "--epochs", "3", "--no-progress"]) == 0
    assert [row["grad_step"] for row in rows_of(run)] == list(range(8, 56, 8))
    assert not best.exists()


# The checks that come first.


def test_one_batch_is_learned_by_heart_by_a_right_network_and_not_by_a_dead_one(capsys):
    assert main([*QUICK, "--overfit-one-batch"]) == 0
    assert "accuracy 100%; passed" in capsys.readouterr().out
    assert main([*QUICK, "--overfit-one-batch", "--learning-rate", "1e-9"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert not Path("results").exists()


def test_overfitting_is_free_of_what_keeps_from_it():
    dataset = load_dataset("digits", train_size=100)
    config = ClassifierConfig(
        encoder="mlp", dropout=0.9, mixup=0.5, label_smoothing=0.5, weight_decay=1.0, optimizer="adam",
        learning_rate=3e-3, augment=("shift:3",),
    )  # fmt: skip
    model = Classifier(dataset.space, dataset.classes, plain(config), device="cpu")
    loss, accuracy = overfit_one_batch(model, dataset)
    assert accuracy == 1.0
    assert loss < 0.01


def test_suggested_step_size_learns_and_ten_thousand_times_it_does_not(tmp_path):
    dataset = load_dataset("digits")
    config = ClassifierConfig(encoder="minatar", schedule="constant")
    path = tmp_path / "search.png"

    def fresh(rate: float) -> Classifier:
        return Classifier(
            dataset.space,
            dataset.classes,
            ClassifierConfig(encoder="minatar", learning_rate=rate),
            device="cpu",
        )

    suggested = find_learning_rate(
        Classifier(dataset.space, dataset.classes, config, device="cpu"), dataset, path
    )
    assert imread(path).shape[2] == 4
    assert 1e-4 < suggested < 1
    good = fresh(suggested).fit(dataset, 3).evaluate(dataset.test).error
    slow = fresh(suggested / 1e4).fit(dataset, 3).evaluate(dataset.test).error
    assert good < 0.2 < 0.5 < slow


# Pictures and figures.


def test_wilson_interval_by_hand():
    # Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_pictures_are_drawn_of_any_rows(tmp_path):
    rows = [{"grad_step": 1, "epoch": 0.5, "train/loss": float("nan"), "train/accuracy": 0.5}]
    assert imread(training_curves(rows, tmp_path / "few.png")).shape == (480, 1000, 4)
    rows.append({"grad_step": 2, "epoch": 1.0, "train/update_to_weight": 1e-3})  # a panel of its own
    assert imread(training_curves(rows, tmp_path / "few.png")).shape == (480, 1500, 4)
    labels = np.arange(300) % 30
    classes = [f"class {i}" for i in range(30)]
    confusion_matrix(labels, labels[::-1], classes, tmp_path / "many.png", title="x")
    for shape in ((4, 1, 3, 3), (64, 3, 11, 11), (200, 4, 8, 8), (1, 1, 2, 2)):
        filters_grid(np.random.default_rng(0).normal(size=shape), tmp_path / "filters.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.png", "filters.png", "many.png"]


# Looking inside.


def test_explain_draws_a_classifier(trained, capsys):
    flags = [
        "--methods",
        "saliency",
        "integrated-gradients",
        "--images",
        "3",
        "--features",
        "40",
        "--patches",
        "2",
    ]
    assert main(["explain", str(trained), *flags, "--out", "inside"]) == 0
    names = {path.name for path in Path("inside").iterdir()}
    assert names == {"attributions.png", "filters.png", "features.png", "patches.png"}
    for name in names:
        assert f": inside/{name}" in capsys.readouterr().out or imread(Path("inside") / name).std() > 0.01


@pytest.mark.parametrize("agent", ["pqn", "ppo"])
def test_explain_draws_and_films_an_agent(agent, capsys):
    flags = {
        "pqn": ["--num-steps", "8", "--minibatches", "1", "--epochs", "1"],
        "ppo": ["--num-steps", "8", "--minibatch-size", "16", "--recurrent", "gru", "--recurrent-size", "8"],
    }
    train = ["train", agent, "--env-id", "toys/Sides-v0", "--encoder", "minatar", "--total-steps", "32"]
    train += ["--num-envs", "2", "--final-episodes", "2", "--no-video", "--track", "off", "--no-progress"]
    assert main([*train, *flags[agent]]) == 0
    run = run_folder()
    assert main(["explain", str(run), "--methods", "saliency", "--images", "2"]) == 0
    out = capsys.readouterr().out
    assert "an episode of 4 steps, return " in out
    folder = run / "plots" / "explain"
    assert {path.name for path in folder.iterdir()} == {
        "attributions.png", "filters.png", "features.png", "patches.png", "explained.mp4",
    }  # fmt: skip
    import imageio_ffmpeg

    film = imageio_ffmpeg.read_frames(str(folder / "explained.mp4"))
    width, height = next(film)["size"]
    assert sum(1 for _ in film) == 4
    assert (width, height) == (2 * 260 + 3 * 4, 260 + 8)  # 20 pixels 13 times as large, with gaps


def test_scores_of_an_agent_with_memory_are_those_it_acted_on():
    """The film's scores, computed in a batch, are the ones of the episode, memory and all."""
    config = PPO.Config(num_envs=2, num_steps=8, minibatch_size=16, recurrent="lstm", recurrent_size=8)
    agent = PPO("toys/Sides-v0", config, encoder="minatar", seed=3, device="cpu")
    agent.network.policy_head.weight.data.mul_(100)
    agent.network.core.weight_hh.data.mul_(3)  # type: ignore[union-attr]
    played = play(agent, seed=5)
    score = Scores(agent, None)
    images = score.look(played).float()
    actions = [agent.predict(played.obs[:1].numpy(), None, np.ones(1, bool), True)[0]]
    for t in range(1, 4):
        actions.append(agent.predict(played.obs[t : t + 1].numpy(), played.states[t : t + 1].numpy())[0])
    with torch.no_grad():
        with_memory = score(images)
        assert torch.equal(score.targets, with_memory.argmax(1))
        played.states.zero_()
        score.look(played)
        assert (with_memory - score(images))[1:].abs().max() > 1e-3
        assert torch.equal((with_memory - score(images))[0], torch.zeros(2))


@pytest.mark.parametrize("agent", ["a2c", "sb3/ppo"])
@pytest.mark.parametrize("actions", ["multi-discrete", "multi-binary", "box"])
def test_explain_of_a_dict_looks_at_its_image_whatever_the_actions(agent, actions, capsys):
    """Each image is scored with the other parts of its own observation, and by the policy's own formula."""

    kwargs = {"actions": actions, "images": True, "lengths": (6,)}
    if agent == "sb3/ppo" and actions == "multi-discrete":
        pytest.skip("Stable-Baselines3 takes actions that count from 0")
    env = make_vec("toys/Signs-v0", 2, seed=0, env_kwargs=kwargs)
    trained = AGENTS[agent](env, encoder="minatar+mlp-tanh", seed=2, device="cpu")
    with torch.no_grad():
        for parameter in trained.network.parameters():
            parameter.mul_(3)
    key, space = seen_image(trained, None)
    assert (key, space.shape) == ("picture", (1, 6, 6))
    score = Scores(trained, key)
    played = play(trained, seed=1)
    images = score.look(played)
    assert images.shape == (6, 1, 6, 6)
    assert played.obs["numbers"].shape == (6, 2)
    with torch.no_grad():
        scores = score(images.float())
    raw = {name: part.numpy() for name, part in played.obs.items()}
    greedy = torch.as_tensor(trained.predict(raw, deterministic=True)[0])
    if actions == "box":
        torch.testing.assert_close(scores.clamp(-2, 1), greedy)  # the bounds of the space
        z = (scores - scores.mean(0)).abs() / scores.std(0, correction=0)
        assert torch.equal(score.targets, z.argmax(1))
    else:
        assert scores.shape == (6, 1)
        assert (scores < 0).all()
        assert not score.targets.any()
        torch.manual_seed(0)
        samples = [trained.predict(raw, deterministic=False)[0] for _ in range(3_000)]
        share = torch.stack([(torch.as_tensor(a) == greedy).all(1).double() for a in samples]).mean(0)
        error = 4 * (share * (1 - share) / 3_000).sqrt() + 2e-3
        assert ((scores.squeeze(1).exp() - share).abs() <= error).all()
    # Of two images alone, whatever else is in the batch; and through copies of the batch.
    few = torch.tensor([4, 1])
    with torch.no_grad():
        twice = score.of(few)(images[few].float().repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, scores[few].repeat(2, 1))
    maps = attribute(score.of(few), images[few].float(), score.targets[few], "occlusion")
    assert maps.shape == (2, 1, 6, 6)
    assert maps.abs().max() > 0


def test_explain_refuses_what_it_cannot_look_into(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["explain", str(trained), "--methods", "magic"])
    err = " ".join(capsys.readouterr().err.split())
    assert "methods are saliency, guided-backprop, integrated-gradients, occlusion; got magic" in err
    train = ["train", "dqn", "--total-steps", "200", "--final-episodes", "1", "--no-video", "--track", "off"]
    assert main([*train, "--no-progress"]) == 0
    assert main(["explain", str(run_folder())]) == 2
    assert "explain is for agents that see images; CartPole-v1 shows Box" in capsys.readouterr().err
    with pytest.raises(ValueError, match="observation must name an image of the agent \\(no Dict"):
        seen_image(PPO("toys/Sides-v0", PPO.Config(num_envs=1, minibatch_size=128)), "left")
    lonely = tmp_path / "lonely.safetensors"
    shutil.copy(trained / "checkpoints" / "best" / "weights.safetensors", lonely)
    assert main(["explain", str(lonely), "--out", "x"]) == 2
    assert "lies in no run folder: name a dataset with --dataset" in capsys.readouterr().err


# Other datasets, and bad input.


def folder_of_images(path: Path, count: int = 20) -> Path:
    for name, dark in (("bright", 0), ("dark", 1)):
        (path / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i + 100 * dark).integers(100, size=(12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels + np.uint8(100 * (1 - dark))).save(path / name / f"{i}.png")
    return path


def test_a_folder_of_images_is_a_dataset(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "pictures")
    command = ["train", "classifier", "--encoder", "minatar", "--dataset", str(folder), "--epochs", "20"]
    command += ["--learning-rate", "0.01"]
    assert main([*command, "--threads", "1", "--track", "off", "--no-progress"]) == 0
    run = run_folder()
    assert run.parent.name == "classifier-pictures"
    assert json.loads((run / "summary.json").read_text())["test/error"] == 0
    encoder = ["train", "dqn", "--env-id", "CartPole-v1", "--encoder", str(run)]
    capsys.readouterr()
    assert main(encoder) == 2
    assert "the encoder of" in capsys.readouterr().err


def test_folds_hold_out_every_training_image_once():
    from foveal.runs.fit import FitOptions, open_dataset

    whole = load_dataset("digits", validation=0)
    held_out = [open_dataset(FitOptions(folds=4, fold=fold)) for fold in range(4)]
    assert sum(len(dataset.validation) for dataset in held_out) == len(whole.train)
    pixels = torch.cat([dataset.validation.images for dataset in held_out]).flatten(1)
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, whole.train.images.flatten(1).tolist()))
    for dataset in held_out:
        assert len(dataset.train) + len(dataset.validation) == len(whole.train)
        assert torch.equal(dataset.test.images, whole.test.images)
    with pytest.raises(ValueError, match="fold must be from 0 to folds - 1 = 3, got 4"):
        FitOptions(folds=4, fold=4)
    with pytest.raises(ValueError, match="folds must be 2 or more"):
        FitOptions(folds=1)


def test_without_validation_images_the_last_weights_count(capsys):
    assert main([*QUICK, "--validation", "0"]) == 0
    run = run_folder()
    assert not any("validation/accuracy" in row for row in rows_of(run))
    assert not (run / "checkpoints" / "best").exists()
    assert main(["evaluate", str(run), "--json"]) == 0
    assert main(["train", "knn", "--validation", "0", "--track", "off"]) == 2
    assert "knn chooses k by validation images, of which there are none" in capsys.readouterr().err


def test_neighbours_are_trained_by_the_same_command(capsys):
    command = ["train", "knn", "--metric", "l1", "--train-size", "400", "--track", "off", "--no-progress"]
    assert main(command) == 0
    assert "test error:" in capsys.readouterr().out
    assert main(["evaluate", str(run_folder())]) == 0
    assert json.loads((run_folder() / "summary.json").read_text())["test/error"] < 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "mnits"], "mnits"),
        (["--backbone", "resnet21"], "unknown backbone 'resnet21'; nearest: resnet"),
        (["--backbone", "alexnet"], "alexnet is too deep for images of 8x8 pixels: it takes"),
        (["--encoder", "nature"], "NatureCNN takes images of 36x36 pixels or more, got 8x8"),
        (["--encoder", "nowhere/run"], "unknown encoder 'nowhere/run'"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
        (["--train-size", "100000"], "train_size"),
        (["--device", "tpu"], "device must be auto, cpu or a device of this machine, got 'tpu'"),
    ],
)
def test_what_cannot_be_taken_is_one_line_and_leaves_nothing(flags, message, capsys, monkeypatch):
    assert message in refused(capsys, "train", "classifier", *flags)


def test_unknown_names_of_what_to_train_are_told_with_the_nearest(capsys):
    assert "unknown agent or model 'clasifier'; nearest: classifier" in refused(capsys, "train", "clasifier")


def test_broken_images_are_named(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "pictures", 3)
    broken = folder / "dark" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    line = refused(capsys, "train", "classifier", "--dataset", str(folder))
    assert str(broken) in line


def test_a_diverging_training_ends_in_one_line_with_its_checkpoint_kept(capsys):
    assert main([*QUICK, "--learning-rate", "1e30", "--optimizer", "sgd"]) == 2
    err = capsys.readouterr().err
    assert "foveal: loss is " in err
    run = run_folder()
    assert f"to go on: foveal resume {run}" in err
    assert json.loads((run / "summary.json").read_text())["state"] == "failed"
    assert newest_first(run / "checkpoints")


def test_images_that_have_changed_are_not_trained_on_further(tmp_path, capsys):
    folder = folder_of_images(tmp_path / "pictures")
    command = ["train", "classifier", "--encoder", "minatar", "--dataset", str(folder), "--epochs", "1"]
    assert main([*command, "--threads", "1", "--track", "off", "--no-progress"]) == 0
    (folder / "dark" / "0.png").unlink()
    assert main(["resume", str(run_folder()), "--epochs", "2"]) == 2
    assert "was trained on other images than" in capsys.readouterr().err

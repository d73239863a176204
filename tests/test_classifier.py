"""Classifiers: losses, schedules, regularisation, resuming, and what they learn."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

from foveal.vision import Classifier, ClassifierConfig, Dataset, Split, load_dataset, make_encoder
from foveal.vision.classifier import RECIPES, data_loss, hinge_loss, penalty, rate_at, recipe
from foveal.vision.knn import KNN, KNNConfig, vote
from foveal.vision.model import Shuffle, pack, unpack


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", train_size=300)


def small(**settings: Any) -> ClassifierConfig:
    return ClassifierConfig(**{"backbone": "linear", "batch_size": 50, **settings})


def make(dataset: Dataset, seed: int = 3, **settings: Any) -> Classifier:
    return Classifier(dataset.space, dataset.classes, small(**settings), seed=seed, device="cpu")


# The losses.


def test_hinge_loss_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.5], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0]])
    # 1 + 2.5 - 3 = 0.5; 1 + 1 - 5 < 0; 1 + 1 - 1 = 1
    assert hinge_loss(scores, torch.tensor([0, 1, 2])).item() == pytest.approx((0.5 + 0 + 1) / 3)


def test_hinge_loss_is_scikit_learns(digits):
    from sklearn.metrics import hinge_loss as theirs

    scores = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    mine = hinge_loss(scores, labels).item()
    assert mine == pytest.approx(theirs(labels.numpy(), scores.numpy(), labels=np.arange(10)), rel=1e-5)


def test_data_loss_takes_labels_and_mixtures_of_them():
    scores, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    hard = data_loss(scores, labels, small())
    soft = data_loss(scores, F.one_hot(labels, 3).float(), small())
    assert hard.item() == pytest.approx(soft.item())
    smoothed = data_loss(scores, labels, small(label_smoothing=0.3))
    uniform = data_loss(scores, torch.full((4, 3), 1 / 3), small())
    assert smoothed.item() == pytest.approx(0.7 * hard.item() + 0.3 * uniform.item(), rel=1e-5)


def test_penalty_by_hand():
    weights = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0], [0.0]])]
    assert penalty(weights, l1=0.1, l2=0.0).item() == pytest.approx(0.6)
    assert penalty(weights, l1=0.0, l2=0.2).item() == pytest.approx(0.1 * 14)
    assert penalty(weights, l1=0.1, l2=0.2).item() == pytest.approx(0.6 + 1.4)


def test_l2_is_torchs_weight_decay_on_weights_but_not_on_biases(digits):
    ours = make(digits, optimizer="momentum", weight_decay=0.1)
    images, labels = digits.train.images[:50], digits.train.labels[:50]
    start = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    linear: Any = ours.network.linear
    linear.weight.data.copy_(start)
    theirs = torch.nn.Linear(64, 10)
    theirs.load_state_dict(linear.state_dict())
    groups: list[dict[str, Any]] = [
        {"params": [theirs.weight], "weight_decay": 0.1},
        {"params": [theirs.bias]},
    ]
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    for _ in range(3):
        ours.update(images, labels, 0.05)
        optimizer.zero_grad()
        F.cross_entropy(theirs(images.flatten(1) / 16), labels).backward()
        optimizer.step()
    torch.testing.assert_close(linear.weight, theirs.weight)
    torch.testing.assert_close(linear.bias, theirs.bias)


def test_max_norm_cuts_the_weights_of_each_output(digits):
    model = make(digits, max_norm=0.05, learning_rate=1.0)
    model.update(digits.train.images[:50], digits.train.labels[:50], 1.0)
    norms = model.network.linear.weight.norm(dim=1)  # type: ignore[union-attr, operator]
    assert norms.max() <= 0.05 + 1e-6
    assert norms.max() > 0.049


# Schedules.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [0.1, 0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "step"}, [0.1, 0.1, 0.01, 0.001, 0.001]),
        (
            {"schedule": "cosine"},
            [0.1, 0.1 * (0.5 + math.sqrt(0.125)), 0.05, 0.1 * (0.5 - math.sqrt(0.125)), 0],
        ),
        ({"schedule": "exponential", "decay": 0.5}, [0.1, 0.025, 0.00625, 0.0015625, 0.000390625]),
        ({"schedule": "inverse", "decay": 0.5}, [0.1, 0.05, 0.1 / 3, 0.025, 0.02]),
        ({"schedule": "constant", "warmup": 4.0}, [0.0, 0.05, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules_by_hand(settings, expected):
    config = small(learning_rate=0.1, **settings)
    np.testing.assert_allclose([rate_at(epoch, 8, config) for epoch in (0, 2, 4, 6, 8)], expected, atol=1e-12)


def test_training_follows_the_schedule(digits):
    model = make(digits, learning_rate=0.1, schedule="step", batch_size=100)
    rates = [row["train/learning_rate"] for row in model.training(digits, 4, log_every=1)]
    steps = 3  # batches of an epoch: 300 images less none, by 100
    np.testing.assert_allclose(rates, [0.1] * 2 * steps + [0.01] * steps + [0.001] * steps)


# Training.


@pytest.mark.parametrize(
    "optimizer", ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "lbfgs"]
)
def test_every_optimizer_learns_digits(digits, optimizer):
    rates = {"adam": 0.01, "adamw": 0.01, "rmsprop": 0.01, "lbfgs": 1.0, "sgd": 0.5}
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": rates.get(optimizer, 0.1)}
    if optimizer == "lbfgs":
        settings |= {"batch_size": 300, "weight_decay": 1e-3}
    model = make(digits, **settings).fit(digits, 12)
    assert model.evaluate(digits.test).error < 0.12


@pytest.mark.parametrize("loss", ["softmax", "hinge"])
def test_linear_classifiers_reach_their_known_error_on_all_digits(loss):
    """Scikit-learn's logistic regression and linear SVM get about 4 % wrong on held-out digits."""
    dataset = load_dataset("digits")
    config = ClassifierConfig(backbone="linear", loss=loss, optimizer="adam", learning_rate=0.02)
    model = Classifier(dataset.space, dataset.classes, config, device="cpu").fit(dataset, 15)
    assert model.evaluate(dataset.test).error < 0.065


def test_rows_say_what_happened(digits):
    model = make(digits)
    rows = list(model.training(digits, 2, log_every=4))
    assert [row["grad_step"] for row in rows] == [4, 6, 8, 12]
    assert [row["epoch"] for row in rows] == pytest.approx([4 / 6, 1, 8 / 6, 2])
    assert ["validation/accuracy" in row for row in rows] == [False, True, False, True]
    scores = model.evaluate(digits.validation)
    assert rows[-1]["validation/accuracy"] == 1 - scores.error
    assert rows[-1]["validation/loss"] == pytest.approx(scores.loss)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert 0 < rows[-1]["train/update_to_weight"] < rows[0]["train/update_to_weight"]


def test_update_to_weight_is_the_ratio_of_norms(digits):
    model = make(digits)
    model.fit(digits, 1)
    before = model.weight_vector()
    row = next(iter(model.training(digits, 3, log_every=1)))
    after = model.weight_vector()
    assert row["train/update_to_weight"] == pytest.approx(((after - before).norm() / before.norm()).item())


def test_one_seed_one_training(digits):
    settings = {"encoder": "minatar", "augment": ("shift:1",), "mixup": 0.2}
    first, again, other = (make(digits, seed=seed, **settings).fit(digits, 1) for seed in (3, 3, 4))
    assert torch.equal(first.weight_vector(), again.weight_vector())
    assert not torch.equal(first.weight_vector(), other.weight_vector())


def test_training_and_evaluating_leave_the_global_generator_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(digits, encoder="mlp", dropout=0.5).fit(digits, 1).evaluate(digits.test)
    assert torch.equal(torch.rand(3), expected)


def test_average_of_weights_is_what_is_used_and_saved(digits, tmp_path):
    model = make(digits, ema=0.5, batch_size=100, schedule="constant")
    seen, average = [], torch.zeros(10, 64)
    for _ in model.training(digits, 1, log_every=1):
        seen.append(model.network.linear.weight.detach().clone())  # type: ignore[union-attr, operator]
    for weight in seen:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(model.average["linear.weight"], average)
    loaded = Classifier.load(model.save(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(loaded.network.linear.weight.detach(), average)  # type: ignore[union-attr, operator]
    assert torch.equal(loaded.predict(digits.test.images), model.predict(digits.test.images))
    torch.testing.assert_close(model.network.linear.weight.detach(), seen[-1])  # type: ignore[union-attr, operator]


def test_nan_stops_the_training(digits):
    model = make(digits, optimizer="sgd", learning_rate=1e30, encoder="minatar")
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at grad_step \d"):
        model.fit(digits, 3)


def test_gradients_are_clipped(digits):
    model = make(digits, optimizer="sgd", max_grad_norm=1e-3)
    before = model.weight_vector()
    model.update(digits.train.images[:50], digits.train.labels[:50], 1.0)
    assert (model.weight_vector() - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_bfloat16_trains_about_as_float32_does(digits):
    errors = [make(digits, precision=p, learning_rate=0.1).fit(digits, 10).evaluate(digits.test).error
              for p in ("float32", "bfloat16")]  # fmt: skip
    assert abs(errors[0] - errors[1]) < 0.03
    assert max(errors) < 0.12


# Saving and resuming.


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "minatar", "augment": ("shift:1",), "ema": 0.9},
        {"encoder": "mlp", "dropout": 0.5, "mixup": 0.3, "optimizer": "adamw", "weight_decay": 0.01},
        {"optimizer": "lbfgs", "learning_rate": 1.0, "weight_decay": 1e-3},
        {"backbone": "resnet20", "batch_size": 25, "optimizer": "nesterov"},
    ],
)
def test_resumed_is_the_training_that_was_never_stopped(digits, tmp_path, settings):
    size = 50 if settings.get("backbone") == "resnet20" else 150
    dataset = replace(digits, train=digits.train.take(torch.arange(size)))
    whole = make(dataset, **settings)
    expected = [timeless(row) for row in whole.training(dataset, 3, log_every=1)]
    model, rows = make(dataset, **settings), []
    for stop in (1, 2, 100):
        for row in model.training(dataset, 3, log_every=1):
            rows.append(timeless(row))
            if row["grad_step"] >= stop:
                break
        tensors, meta = model.state()
        again = Classifier.load(model.save(tmp_path / "weights.safetensors"), device="cpu")
        assert again.restore({k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(meta)), dict)  # type: ignore[arg-type]
        model = again
    assert rows == expected
    assert torch.equal(model.weight_vector(), whole.weight_vector())


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("speed/")}


def test_shuffle_is_every_image_once_an_epoch_and_resumes_in_the_middle():
    shuffle = Shuffle(10, 4, seed=1)
    epochs = [torch.cat([shuffle.next() for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(*epochs)
    shuffle.next()
    state = {name: tensor.clone() for name, tensor in shuffle.state().items()}
    expected = [shuffle.next().tolist() for _ in range(5)]
    other = Shuffle(10, 4, seed=99)
    other.restore(state)
    assert [other.next().tolist() for _ in range(5)] == expected
    with pytest.raises(ValueError, match="the training was over 10 images, these are 11"):
        Shuffle(11, 4, seed=1).restore(state)


def test_packed_trees_come_back():
    tree = {"a": [torch.arange(3), {"b": None, 7: (1.5, True)}], 2: "text"}
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(tree, tensors, "x"))), tensors)
    assert torch.equal(back["a"][0], torch.arange(3))
    assert back["a"][1] == {"b": None, 7: [1.5, True]}
    assert back[2] == "text"


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"learning_rate": -1.0}, r"learning_rate must be greater than 0, got -1\.0"),
        ({"learning_rate": math.nan}, "learning_rate must be greater than 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
        ({"ema": 1.0}, "ema must be at least 0 and less than 1, got 1.0"),
        ({"schedule": "exponential", "decay": 1.5}, "decay must be at most 1 with schedule exponential"),
        ({"loss": "hinge", "mixup": 0.2}, "loss hinge takes neither label_smoothing nor mixup"),
        ({"augment": ("spin",)}, "spin"),
        ({"optimizer": "lbfgs", "precision": "float16"}, "optimizer lbfgs takes precision"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_networks_that_are_refused(digits):
    with pytest.raises(ValueError, match="precision float16 needs a GPU, got device cpu"):
        make(digits, precision="float16")
    with pytest.raises(ValueError, match="unknown backbone 'lenet6'; nearest: lenet5"):
        make(digits, backbone="lenet6")
    with pytest.raises(ValueError, match="dropout: resnet20 has none, got 0.5"):
        make(digits, backbone="resnet20", dropout=0.5)
    with pytest.raises(
        ValueError, match="vgg16 is too deep for images of 8x8 pixels: it takes 32x32 or more"
    ):
        make(digits, backbone="vgg16")


def test_images_and_classes_of_another_kind_are_refused(digits):
    model = make(digits)
    parts = {
        name: Split(F.pad(part.images, (1, 1)), part.labels)
        for name in ("train", "validation", "test")
        for part in [getattr(digits, name)]
    }
    wide = replace(digits, name="wide", **parts)
    with pytest.raises(
        ValueError, match=r"the images of wide are Box\(0, 16, \(1, 8, 10\), uint8\), the model takes"
    ):
        model.fit(wide, 1)
    letters = replace(digits, classes=tuple("abcdefghij"))
    with pytest.raises(ValueError, match="the classes of digits are a, b, .*; the model's are 0, 1"):
        model.fit(letters, 1)


def test_files_of_other_models_are_refused(digits, tmp_path):
    file = make(digits).save(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="holds a 'classifier', not a 'knn'"):
        KNN.load(file)
    from foveal.agents import load

    with pytest.raises(ValueError, match="is no agent"):
        load(file)


def test_every_recipe_is_a_config():
    for name in RECIPES:
        assert recipe(name.replace("*", "x")).batch_size > 0
    assert recipe("resnet20").weight_decay == 1e-4
    assert recipe("resnet110_cifar", warmup=2.0).warmup == 2.0


# The encoder in a classifier, and out of it.


def test_encoder_of_a_classifier_is_the_encoder(digits, tmp_path):
    model = make(digits, encoder="impala").fit(digits, 1)
    file = model.save(tmp_path / "weights.safetensors")
    encoder = make_encoder(str(file), digits.space)
    images = digits.test.images[:7]
    torch.testing.assert_close(encoder(images), model.network.encoder(images))  # type: ignore[operator]
    other = spaces.Box(0, 255, (1, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"the encoder of .* is for .*16.*; these observations are .*255"):
        make_encoder(str(file), other)


# k nearest neighbours.


def test_vote_takes_the_commonest_and_of_equals_the_nearest():
    assert vote(torch.tensor([[3, 1, 1], [2, 0, 5], [4, 7, 7], [9, 9, 1]])).tolist() == [1, 2, 7, 9]


@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_neighbours_are_those_of_a_naive_search(digits, metric):
    model = KNN(digits.space, digits.classes, KNNConfig(metric=metric, candidates=(4,)))
    model.fit(digits, 1)
    images = digits.test.images[:20]
    difference = images.flatten(1).double()[:, None] - digits.train.images.flatten(1).double()[None]
    distance = difference.abs().sum(2) if metric == "l1" else difference.square().sum(2)
    order = distance.sort(dim=1, stable=True)
    clear = (order.values[:, 1:5] > order.values[:, :4]).all(1)  # no ties among the nearest
    assert clear.any()
    expected = digits.train.labels[order.indices[:, :4]]
    assert torch.equal(model.neighbours(images)[clear], expected[clear])


def test_k_is_the_best_on_validation_images(digits, tmp_path):
    model = KNN(digits.space, digits.classes, KNNConfig(candidates=(1, 5, 250)))
    (row,) = model.training(digits)
    accuracies = {k: row[f"validation/accuracy_k{k}"] for k in (1, 5, 250)}
    assert row["validation/accuracy"] == max(accuracies.values()) == accuracies[row["train/k"]]
    assert accuracies[250] < accuracies[1]
    loaded = KNN.load(model.save(tmp_path / "weights.safetensors"))
    assert torch.equal(loaded.predict(digits.test.images), model.predict(digits.test.images))
    assert loaded.evaluate(digits.test).error < 0.08
    with pytest.raises(ValueError, match="candidates must be whole numbers of 1 or more"):
        KNNConfig(candidates=(0,))

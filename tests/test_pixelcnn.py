"""PixelCNN and PixelRNN: causality, normalisation, and two samplers that agree on every pixel."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from foveal.generative import ImageTransformer, PixelCNN, PixelRNN
from foveal.generative.image_transformer import Network as Transformer
from foveal.generative.pixel_likelihoods import LogisticMixture, scale
from foveal.generative.pixelcnn_networks import GatedNetwork, PlainNetwork, PlusPlusNetwork
from foveal.vision import Dataset, Split, binarize, load_dataset

VARIANTS: list[tuple[Any, dict[str, Any]]] = [
    (PixelCNN, {"variant": "plain", "layers": 2}),
    (PixelCNN, {"variant": "gated", "layers": 2}),
    (PixelCNN, {"variant": "plusplus", "layers": 1, "depth": 2}),
    (PixelRNN, {"variant": "row", "layers": 2}),
    (PixelRNN, {"variant": "diagonal", "layers": 2}),
    (ImageTransformer, {"layers": 2, "heads": 2}),
]
IDS = ["plain", "gated", "plusplus", "row", "diagonal", "attention"]


def make(kind, settings, shape=(1, 8, 8), levels=2, seed=0, spread=0.3, **changes):
    """An untrained model in float64, whose weights are large enough that pixels depend on each other."""
    config = kind.Config(**{"width": 6, "components": 3, "dropout": 0.5, **settings, **changes})
    space = spaces.Box(0, levels - 1, shape, np.uint8)
    model = kind(space, ("a", "b", "c"), config, seed=seed, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for learner in model.learners.values():
            learner.weights += spread * torch.randn(learner.weights.shape, generator=generator)
            if learner.average is not None:
                learner.average.copy_(learner.weights)
    return model


def images_of(shape, levels, n, seed=0):
    return torch.randint(
        0, levels, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def gradient_map(network: nn.Module, shape: tuple[int, ...], parts: int, condition: Tensor | None = None):
    """|d output / d input| of two images in a batch, of each pixel and channel: (positions, 2, positions), in
    the order in which values are drawn. The outputs of a channel are its `parts`th of them."""
    _, height, width = shape
    x = torch.randn(
        2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    out = network(x, condition)
    weights = torch.randn(out.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = (out * weights[:, None, None]).unflatten(1, (parts, -1)).sum(2)  # (2, parts, H, W)
    maps = []
    for r, c, part in itertools.product(range(height), range(width), range(parts)):
        (gradient,) = torch.autograd.grad(out[0, part, r, c], x, retain_graph=True)
        maps.append(gradient.abs().permute(0, 2, 3, 1).flatten(1))
    return torch.stack(maps)


# Causality.


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("shape", "levels", "likelihood"),
    [((1, 4, 8), 5, "softmax"), ((3, 4, 4), 3, "softmax"), ((3, 4, 4), 5, "logistic")],
)
@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_no_pixel_sees_itself_or_a_later_one_or_another_image(
    kind, settings, shape, levels, likelihood, train
):
    if "depth" in settings and likelihood == "softmax" and shape[0] == 3:
        pytest.skip("refused")
    model = make(kind, settings, shape, levels, likelihood=likelihood, conditional=True)
    network = model.network.double().train(train)
    parts = shape[0] if likelihood == "softmax" else 1
    maps = gradient_map(network, shape, parts, torch.eye(3, dtype=torch.float64)[:2])
    assert (maps[:, 1] == 0).all()
    per_pixel = shape[0] // parts  # of a mixture all channels come at once
    seen = maps[:, 0]
    for position in range(len(seen)):
        assert (seen[position, position * per_pixel :] == 0).all()
    assert (seen > 0).any(0)[: -shape[0]].float().mean() > 0.9  # and it does see something


@pytest.mark.parametrize(
    "network",
    [
        GatedNetwork(1, 2, 8, 5, 3),
        PlusPlusNetwork(1, 2, 8, 2, 1),
        Transformer((1, 8, 8), 2, 8, 1, 2, 0.0, 1, 0),
    ],
    ids=["gated", "plusplus", "attention"],
)
def test_every_earlier_pixel_is_seen(network):
    seen = gradient_map(network.double(), (1, 8, 8), 1)[:, 0]
    earlier = torch.ones(64, 64).tril(-1).bool()
    assert (seen[earlier] > 0).all()


def test_plain_masks_have_a_blind_spot():
    """A masked convolution cannot see what lies above and far to the right."""
    torch.manual_seed(0)
    network = PlainNetwork(1, 2, 8, 8, 3).double()
    seen = gradient_map(network, (1, 8, 8), 1)[:, 0].view(8, 8, 8, 8)
    assert seen[7, 0, 6, 7] == 0
    assert seen[7, 0, 6, 3] > 0
    gated = gradient_map(GatedNetwork(1, 2, 8, 8, 3).double(), (1, 8, 8), 1)[:, 0].view(8, 8, 8, 8)
    assert gated[7, 0, 6, 7] > 0


# Probabilities.


@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_probabilities_of_all_binary_images_sum_to_one(kind, settings):
    shape = (1, 3, 4) if "depth" not in settings else (1, 2, 6)
    model = make(kind, {**settings, **({"depth": 1} if "depth" in settings else {})}, shape)
    model.network.double()
    images = torch.tensor(list(itertools.product((0, 1), repeat=12)), dtype=torch.uint8).view(-1, *shape)
    log_prob = torch.cat([double_log_prob(model, part) for part in images.split(1024)])
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert log_prob.exp().max() > 4 / 4096  # not all alike


def double_log_prob(model, images):
    with torch.no_grad():
        return model.log_levels(images, None).flatten(1).sum(1)


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.31, 1.3])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 2.0])
def test_the_discretised_logistic_sums_to_one(mean, log_scale):
    likelihood = LogisticMixture(1, 256, 1)
    parameters = torch.tensor([0.0, mean, log_scale]).view(1, 3, 1, 1).expand(256, 3, 1, 1)
    values = torch.arange(256).view(256, 1, 1, 1)
    parameters = parameters.clone().requires_grad_()
    log_prob = likelihood.log_prob(parameters, values)
    assert log_prob.double().exp().sum().item() == pytest.approx(1, abs=2e-5)
    (gradient,) = torch.autograd.grad(log_prob[[0, 255]].sum(), parameters)
    assert gradient.isfinite().all()
    cdf = likelihood.cdf(parameters[:1, :, 0, 0], 0, torch.zeros(1, 1))
    assert torch.allclose(cdf[0], log_prob.exp().flatten().cumsum(0)[:-1], atol=2e-5)


def test_a_colour_mixture_sums_to_one():
    likelihood = LogisticMixture(3, 5, 2)
    parameters = torch.randn(
        1, likelihood.parameters, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    values = torch.tensor(list(itertools.product(range(5), repeat=3))).view(-1, 3, 1, 1)
    log_prob = likelihood.log_prob(parameters.expand(125, -1, 1, 1), values)
    assert log_prob.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)
    for channel in range(3):  # and what is drawn has these probabilities
        before = scale(values[:, :, 0, 0], 5, torch.float64)
        cdf = likelihood.cdf(parameters[:, :, 0, 0].expand(125, -1), channel, before)
        chance = torch.diff(torch.nn.functional.pad(cdf, (1, 0)), append=torch.ones(125, 1), dim=1)
        mine = chance.gather(1, values[:, channel, 0]).flatten()
        assert torch.allclose(mine.log(), log_prob[:, channel].flatten(), atol=1e-9)


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="float32 or float64, got torch.float16"):
        LogisticMixture(1, 256, 1).log_prob(
            torch.zeros(1, 3, 1, 1).half(), torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        )


def test_uniform_is_eight_bits_whatever_the_batch():
    model = make(PixelCNN, VARIANTS[1][1], (1, 4, 4), 256, likelihood="softmax")
    with torch.no_grad():
        for layer in (model.network.head[3],):
            layer.weight.zero_(), layer.bias.zero_()
        model.learners["network"].average.copy_(model.learners["network"].weights)
    images = images_of((1, 4, 4), 256, 10)
    assert model.log_prob(images).mean().item() == pytest.approx(-8 * 16 * math.log(2), rel=1e-6)
    other = make(PixelCNN, VARIANTS[1][1], (1, 4, 4), 256)
    whole = other.log_prob(images)
    for size in (1, 3, 4):
        assert torch.allclose(other.log_prob(images, batch_size=size), whole, rtol=1e-5)
    split = Split(images, torch.zeros(10, dtype=torch.int64))
    data = Dataset("x", split, split, split, ("a", "b", "c"), 255)
    assert other.test(data)["nats"] == pytest.approx(-whole.double().mean().item(), rel=1e-6)
    assert other.test(data)["bits_per_dim"] == pytest.approx(
        -whole.mean().item() / 16 / math.log(2), rel=1e-6
    )


@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_activations_do_not_grow_with_depth(kind, settings):
    """A residual or a short cut that were added twice would double them with every layer."""

    def spread(layers):
        torch.manual_seed(0)
        model = make(kind, settings, (1, 16, 16), spread=0.0, width=16, layers=layers, dropout=0.0)
        found = []
        end = getattr(model.network, "norm", model.network.head)  # before it is normalised, where it is
        hook = end.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].std().item()))
        with torch.no_grad():
            model.network(torch.randn(4, 1, 16, 16).sign())
        hook.remove()
        return found[0]

    assert spread(12) < 3 * spread(2)


# Drawing.


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    ("shape", "levels", "likelihood"),
    [
        ((1, 8, 12), 2, "softmax"),
        ((1, 8, 8), 9, "logistic"),
        ((3, 4, 8), 4, "softmax"),
        ((3, 8, 4), 5, "logistic"),
    ],
)
@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_the_samplers_agree_on_every_pixel(kind, settings, shape, levels, likelihood, conditional):
    if "depth" in settings and likelihood == "softmax" and shape[0] == 3:
        pytest.skip("refused")
    model = make(kind, settings, shape, levels, likelihood=likelihood, conditional=conditional)
    model.network.double()
    labels = torch.arange(12) % 3 if conditional else None
    images = double_draw(model, 12, labels, fast=True)
    assert (images == double_draw(model, 12, labels, fast=False)).all()
    assert len(images.unique()) == levels
    assert images.float().std(0).mean() > 0.1


def double_draw(model, n, labels=None, fast=True, **options):
    """`sample` of a model whose network is float64."""
    uniforms = torch.rand(
        n, *model.space.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        from foveal.generative.pixel_sampling import Naive, draw

        condition = model.condition(labels, n)
        drawing = (
            model.cached(n, condition) if fast else Naive(model.network, n, model.space.shape, condition)
        )
        return draw(drawing, model.likelihood, uniforms, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_the_samplers_agree_on_a_million_pixels(kind, settings):
    model = make(kind, settings, (1, 4, 4), 17, likelihood="logistic")
    model.network.double()
    images = double_draw(model, 62_500)
    assert images.numel() == 1_000_000
    assert (images == double_draw(model, 62_500, fast=False)).all()


def test_draws_have_the_probabilities_that_log_prob_gives():
    model = make(PixelCNN, VARIANTS[1][1], (1, 2, 2), spread=0.5)
    images = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.uint8).view(16, 1, 2, 2)
    expected = model.log_prob(images).exp()
    drawn = model.sample(20_000, torch.Generator().manual_seed(0)).flatten(1)
    found = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / 20_000
    assert (found - expected).abs().max() < 4 * (expected * (1 - expected) / 20_000).sqrt().max()
    assert expected.max() > 0.1


def test_completion_keeps_what_the_mask_says_and_draws_the_rest():
    model = make(PixelCNN, VARIANTS[1][1], (1, 6, 6), 4)
    images = images_of((1, 6, 6), 4, 8)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:3] = True
    fast = model.complete(images, mask, torch.Generator().manual_seed(0))
    assert (fast[:, :, mask] == images[:, :, mask]).all()
    assert (fast[:, :, ~mask] != images[:, :, ~mask]).any()
    other = images.clone()
    other[:, :, :3] = 3 - other[:, :, :3]
    changed = model.complete(other, mask, torch.Generator().manual_seed(0))
    assert (changed[:, :, ~mask] != fast[:, :, ~mask]).any()  # it does look at the upper half
    with pytest.raises(ValueError, match=r"mask must be \(6, 6\) bool, got \(6, 5\)"):
        model.complete(images, mask[:, :5])


def test_a_low_temperature_draws_likelier_images():
    for likelihood in ("softmax", "logistic"):
        model = make(PixelCNN, VARIANTS[1][1], (1, 4, 4), 5, spread=0.6, likelihood=likelihood)
        warm = model.sample(50, torch.Generator().manual_seed(0))
        cold = model.sample(50, torch.Generator().manual_seed(0), temperature=0.3)
        assert model.log_prob(cold).mean() > model.log_prob(warm).mean() + 0.5
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        model.sample(1, temperature=0)


def test_a_condition_may_be_a_label_or_a_vector():
    model = make(PixelCNN, VARIANTS[1][1], (1, 4, 4), 3, conditional=True, dropout=0.0)
    images = images_of((1, 4, 4), 3, 3)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(model.log_prob(images, labels), model.log_prob(images, torch.eye(3)))
    assert not torch.allclose(model.log_prob(images, labels), model.log_prob(images, labels.roll(1)))
    with pytest.raises(ValueError, match=r"labels must be \(3, 3\), got \(3, 2\)"):
        model.log_prob(images, torch.ones(3, 2))


# What is refused.


def test_bad_input_is_refused_in_one_line():
    box = spaces.Box(0, 1, (1, 7, 8), np.uint8)
    with pytest.raises(ValueError, match=r"depth: images of 7x8 cannot be halved 1 times"):
        PixelCNN(box, ("a",), PixelCNN.Config(variant="plusplus"), device="cpu")
    colour = spaces.Box(0, 3, (3, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"width must be a multiple of the 3 channels, got 32"):
        PixelCNN(colour, ("a",), PixelCNN.Config(width=32), device="cpu")
    with pytest.raises(ValueError, match="likelihood must be logistic"):
        PixelCNN(
            colour, ("a",), PixelCNN.Config(variant="plusplus", width=6, likelihood="softmax"), device="cpu"
        )
    model = make(PixelCNN, VARIANTS[1][1], (1, 8, 8), 4)
    with pytest.raises(ValueError, match=r"images must be \(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model.log_prob(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images must have values from 0 to 3, got 0 to 4"):
        model.log_prob(torch.full((1, 1, 8, 8), 4, dtype=torch.uint8).index_fill(3, torch.tensor([0]), 0))
    digits = load_dataset("digits")
    with pytest.raises(ValueError, match="the model takes"):
        model.fit(digits, epochs=1)
    for changes, message in (
        ({"kernel": 4}, "kernel must be odd and 3 or more, got 4"),
        ({"layers": 0}, "layers must be 1 or more"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            PixelCNN.Config(**changes)


# Learning.


def tiny_digits():
    return binarize(load_dataset("digits", train_size=400, test_size=100, validation=40), 8)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS, ids=IDS)
def test_training_beats_independent_pixels(kind, settings):
    digits = tiny_digits()
    changes = {"depth": 1} if "depth" in settings else {}
    config = kind.Config(
        width=8, learning_rate=1e-2, ema=0.9, warmup=5, batch_size=32, **{**settings, **changes}
    )
    model = kind(digits.space, digits.classes, config, device="cpu")
    before = model.test(digits)["nats"]
    after = model.fit(digits, epochs=6).test(digits)["nats"]
    assert after < before - 10
    assert after < model.baseline(digits)["independent_pixels_nats"]


def test_a_resumed_training_is_the_one_that_was_never_stopped(tmp_path):
    digits = tiny_digits()
    config = PixelCNN.Config(width=6, layers=1, dropout=0.3, warmup=4, batch_size=32)

    def begin():
        return PixelCNN(digits.space, digits.classes, config, seed=3, device="cpu")

    whole = begin().fit(digits, epochs=4)
    part = begin()
    for row in part.training(digits, epochs=4, log_every=1):
        if row["grad_step"] == 5:  # in the middle of an epoch
            break
    part.save(tmp_path / "weights.safetensors")
    tensors, meta = part.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = PixelCNN.load(tmp_path / "weights.safetensors", device="cpu")
    resumed.restore(tensors, meta, lambda name: {})
    resumed.fit(digits, epochs=4)
    assert resumed.grad_step == whole.grad_step > 20
    for name, tensor in whole.weights().items():
        assert torch.equal(tensor, resumed.weights()[name]), name
    images = digits.test.images
    assert torch.equal(whole.log_prob(images), resumed.log_prob(images))
    loaded = PixelCNN.load(whole.save(tmp_path / "w.safetensors"), device="cpu")
    assert torch.equal(loaded.log_prob(images), whole.log_prob(images))
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(config)

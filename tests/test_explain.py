"""Attributions against their definitions, patches of networks made by hand, pictures by their numbers."""

import contextlib
import copy
import importlib
import sys
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import nn

from foveal.vision import make_encoder
from foveal.vision.encoder import ResidualBlock
from foveal.vision.explain import (
    METHODS,
    attribute,
    embed,
    first_layer_filters,
    grid,
    maximal_patches,
    overlay,
    receptive_field,
)

captum: Any = None
with contextlib.suppress(ImportError):
    captum = importlib.import_module("captum")
    importlib.import_module("captum.attr")

needs_captum = pytest.mark.skipif(captum is None, reason='needs captum: pip install "foveal[explain]"')


def network() -> nn.Sequential:
    """Images (B, 2, 12, 12) to 3 scores, some ReLUs in place, dropout that evaluation must leave out."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 25, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 3),
    )


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 2, 12, 12), torch.arange(n) % 3


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, of two maps."""
    ranks = torch.stack([values.flatten().argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# Attributions.


@needs_captum
def test_saliency_is_the_size_of_the_gradient():
    function, (x, target) = network(), batch()
    result = attribute(function, x, target, "saliency")
    leaf = x.clone().requires_grad_()
    score = function.eval()(leaf).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(result, gradient.abs())
    assert gradient.min() < 0, "the sign is gone"


@needs_captum
@pytest.mark.parametrize("baseline", [0.0, 0.5, torch.linspace(0, 1, 12)])
def test_integrated_gradients_are_complete(baseline):
    function: Any = network()
    x, target = batch()
    with torch.no_grad():
        function[-1].weight.mul_(30.0)
    given = {} if isinstance(baseline, float) and baseline == 0 else {"baseline": baseline}
    result = attribute(function, x, target, "integrated-gradients", steps=200, **given)
    function.eval()
    start = torch.as_tensor(baseline).expand_as(x)
    with torch.no_grad():
        change = (function(x) - function(start)).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(result.sum((1, 2, 3)), change, rtol=0.01, atol=0.005)
    assert change.abs().max() > 0.2, "or the tolerance would hide everything"


@needs_captum
def test_integrated_gradients_of_a_line_are_exact_in_one_step():
    function = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    x, target = torch.rand(3, 2, 2, 2), torch.tensor([0, 1, 1])
    result = attribute(function, x, target, "integrated-gradients", baseline=1.0, steps=1)
    weight: Any = function[1].weight
    torch.testing.assert_close(result, weight[target].view_as(x) * (x - 1.0))


@needs_captum
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (4, 2), (5, 3)])
def test_occlusion_is_a_naive_loop(window, stride):
    function, (x, target) = network().eval(), batch(2)
    result = attribute(function, x, target, "occlusion", window=window, stride=stride, baseline=0.25)

    def score(images):
        with torch.no_grad():
            return function(images).gather(1, target[:, None])[:, 0]

    total, count = torch.zeros_like(x), torch.zeros(12, 12)
    starts = [*range(0, 12 - window, stride), (12 - window + stride - 1) // stride * stride]
    for top in starts:
        for left in starts:
            rows, columns = slice(top, top + window), slice(left, left + window)
            occluded = x.clone()
            occluded[:, :, rows, columns] = 0.25
            total[:, :, rows, columns] += (score(x) - score(occluded))[:, None, None, None]
            count[rows, columns] += 1
    torch.testing.assert_close(result, total / count, atol=1e-5, rtol=1e-4)


@needs_captum
def test_guided_backpropagation_by_hand():
    """3 relu(x0 + 2 x1) - relu(x1) + relu(-x2), of ones: the second path is negative, the third is closed."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]))
        second.weight.copy_(torch.tensor([[3.0, -1.0, 1.0]]))
        first.bias.zero_()
    x, target = torch.ones(1, 1, 1, 3), torch.zeros(1, dtype=torch.int64)

    class Called(nn.Module):
        def __init__(self, relu):
            super().__init__()
            self.first, self.second, self.relu = first, second, relu

        def forward(self, x):
            return self.second(self.relu(self.first(x.flatten(1))))

    def in_place(x):
        x.relu_()  # and the result is not used
        return x

    for relu in (
        nn.ReLU(),
        nn.ReLU(inplace=True),
        torch.relu,
        F.relu,
        torch.relu_,
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(x, True),
        lambda x: F.relu(input=x),
        lambda x: x.relu(),
        in_place,
    ):
        result = attribute(Called(relu), x, target, "guided-backprop")
        assert result.tolist() == [[[[3.0, 6.0, 0.0]]]]
    plain = attribute(Called(torch.relu), x, target, "saliency")
    assert plain.tolist() == [[[[3.0, 5.0, 0.0]]]], "where the two differ"


@needs_captum
def test_guided_backpropagation_leaves_skip_connections_alone():
    """Of x - 2 relu(x), the second path passes back nothing, and the first all: 1, where captum says 0."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            x = x.flatten(1) * 1.0
            return (x - 2 * self.relu(x)).sum(1, keepdim=True)

    x, target = torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    assert attribute(Skip(), x, target, "guided-backprop").tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


@needs_captum
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_backpropagation_is_captums_where_there_are_no_skips():
    function, (x, target) = network().eval(), batch()
    result = attribute(function, x, target, "guided-backprop")
    for part in function:
        if isinstance(part, nn.ReLU):
            part.inplace = False
    expected = captum.attr.GuidedBackprop(function).attribute(x.clone().requires_grad_(), target)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result.abs(), attribute(function, x, target, "saliency"))


@needs_captum
@pytest.mark.parametrize("name", ["nature", "impala"])
def test_guided_backpropagation_through_encoders(name):
    """Each ReLU by hooks on its own output's gradient, written out as functions of their own."""
    encoder = make_encoder(name, spaces.Box(0, 255, (4, 40, 40), np.uint8))
    x, target = 255 * torch.rand(3, 4, 40, 40), torch.tensor([0, 7, 255])
    result = attribute(encoder, x, target, "guided-backprop")

    class Guided(nn.Module):
        def forward(self, x):
            x = x * 1.0  # a tensor of its own, so that the hook sees the gradient through the ReLU alone
            x.register_hook(lambda gradient: gradient.clamp(min=0))
            return torch.relu(x)

    def written_out(module):
        for key, child in module.named_children():
            setattr(module, key, Guided() if isinstance(child, nn.ReLU) else written_out(child))
        if isinstance(module, ResidualBlock):
            relu, block = Guided(), module
            module.forward = lambda x: x + block.conv2(relu(block.conv1(relu(x))))  # type: ignore[method-assign]
        return module

    leaf = x.clone().requires_grad_()
    score = written_out(encoder)(leaf).gather(1, target[:, None]).sum()
    torch.testing.assert_close(result, torch.autograd.grad(score, leaf)[0])
    assert result.abs().max() > 0


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_relu_in_place_that_comes_first(method):
    tail = [nn.Flatten(), nn.Linear(2 * 144, 3)]
    x, target = batch()
    maps = [
        attribute(nn.Sequential(nn.ReLU(inplace=inplace), *tail), x - 0.5, target, method)
        for inplace in (True, False)
    ]
    torch.testing.assert_close(*maps)


@needs_captum
def test_guided_backpropagation_needs_a_relu():
    function = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="guided-backprop needs a network with ReLU, got Sequential"):
        attribute(function, torch.rand(1, 1, 2, 2), torch.tensor([0]), "guided-backprop")


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_other_weights_give_another_explanation(method):
    """Adebayo et al. 2018: what does not change when the weights are drawn again says nothing of them."""
    (x, target), maps = batch(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        function = network()
        maps.append(attribute(function, x, target, method))
    again = attribute(function, x, target, method)
    for one, other, same in zip(*maps, again):
        assert abs(rank_correlation(one, other)) < 0.5
        assert rank_correlation(same, other) > 0.999


@needs_captum
@pytest.mark.parametrize("method", METHODS)
def test_module_and_images_are_left_as_they_were(method):
    function, (x, target) = network().train(), batch()
    function[2].requires_grad_(False)
    function[4].eval()
    hooks = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}

    def state():
        return [
            (
                part.training,
                getattr(part, "inplace", None),
                [len(getattr(part, name)) for name in sorted(hooks)],
                [(p.requires_grad, p.grad) for p in part.parameters()],
            )
            for part in function.modules()
        ]

    before, weights, pixels = state(), copy.deepcopy(function.state_dict()), x.clone()
    result = attribute(function, x, target, method)
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in function.state_dict().items())
    assert torch.equal(x, pixels)
    assert not x.requires_grad
    assert (result.shape, result.dtype, result.requires_grad) == (x.shape, x.dtype, False)
    with torch.no_grad():
        assert torch.equal(attribute(function, x, target, method), result), "whatever the caller's mode"
    each = torch.cat([attribute(function, x[i : i + 1], target[i : i + 1], method) for i in range(len(x))])
    torch.testing.assert_close(each, result, atol=1e-5, rtol=1e-4)


@needs_captum
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gradcam"}, "method must be one of saliency, .*got 'gradcam'"),
        ({"steps": 5}, "saliency takes no options, got steps"),
        ({"method": "occlusion", "steps": 5}, "occlusion takes baseline, window, stride, got steps"),
        ({"method": "occlusion", "window": 13}, "window must be at most the shorter side, 12 pixels, got 13"),
        (
            {"method": "occlusion", "window": 3, "stride": 4},
            "stride must be at most the window, 3 pixels, got 4",
        ),
        ({"method": "occlusion", "window": 1.5}, "window must be a whole number of 1 or more, got 1.5"),
        ({"method": "integrated-gradients", "steps": 0}, "steps must be a whole number of 1 or more, got 0"),
        (
            {"method": "integrated-gradients", "baseline": torch.zeros(5)},
            r"baseline must broadcast to \(4, 2, 12, 12\), got \(5,\)",
        ),
        ({"x": torch.zeros(4, 2, 12, 12, dtype=torch.uint8)}, "x must be floating-point images"),
        ({"x": torch.zeros(4, 12, 12)}, r"images \(B, C, H, W\), got torch.float32 \(4, 12, 12\)"),
        ({"target": torch.tensor([0, 1, 2, 3])}, r"target must be in 0..2, got \[0, 1, 2, 3\]"),
        ({"target": torch.tensor([0, 1])}, r"target must be int64 \(4,\), got torch.int64 \(2,\)"),
        ({"target": torch.zeros(4)}, r"target must be int64 \(4,\), got torch.float32 \(4,\)"),
        ({"function": nn.Conv2d(2, 3, 3)}, r"function must give scores \(4, K\), got \(4, 3, 10, 10\)"),
    ],
)
def test_bad_arguments_of_attribute(change, message):
    x, target = batch()
    given = {"function": network(), "x": x, "target": target, "method": "saliency", **change}
    with pytest.raises(ValueError, match=message) as error:
        attribute(**given)
    assert "\n" not in str(error.value)


def test_missing_captum(monkeypatch):
    for module in list(sys.modules):
        if module.partition(".")[0] == "captum":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ValueError, match="needs") as error:
        attribute(network(), *batch(), "saliency")
    assert str(error.value) == 'saliency needs the captum package: pip install "foveal[explain]"'


# Filters, features.


def test_filters_of_a_convolution():
    function = network()
    weight: Any = function[0].weight
    filters = first_layer_filters(function)
    assert torch.equal(filters, weight)
    assert not filters.requires_grad
    filters.zero_()
    assert weight.abs().max() > 0, "a copy"
    encoder: Any = make_encoder("nature", spaces.Box(0, 255, (4, 84, 84), np.uint8))
    assert torch.equal(first_layer_filters(encoder), encoder.conv[0].weight)


def test_filters_of_a_linear_layer_are_images():
    function: Any = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4, 5), nn.ReLU(), nn.Linear(5, 2))
    filters = first_layer_filters(function, (2, 3, 4))
    assert filters.shape == (5, 2, 3, 4)
    image = torch.rand(2, 3, 4)
    by_filter = (filters * image).sum((1, 2, 3)) + function[1].bias
    torch.testing.assert_close(by_filter, function[1](image.flatten()))
    for shape in (None, (24,), (3, 3, 3)):
        with pytest.raises(
            ValueError, match="image_shape must be .* = 24, the inputs of the first linear layer"
        ):
            first_layer_filters(function, shape)
    with pytest.raises(ValueError, match="a 2-D convolution or a linear layer, got ReLU"):
        first_layer_filters(nn.ReLU())


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embedding_separates_clusters(method):
    centres = torch.zeros(2, 20)
    centres[1, :4] = 8.0
    labels = torch.arange(40) % 2
    features = centres[labels] + torch.randn(40, 20)
    points = torch.as_tensor(embed(features.view(40, 5, 4), method, seed=3))
    assert (points.shape, points.dtype) == ((40, 2), torch.float32)
    means = torch.stack([points[labels == label].mean(0) for label in (0, 1)])
    nearest = torch.cdist(points, means).argmin(1)
    assert torch.equal(nearest, labels)
    spread = max(points[labels == label].std(0).norm() for label in (0, 1))
    assert (means[0] - means[1]).norm() > 2 * spread
    assert np.array_equal(points, embed(features.numpy(), method, seed=3)), "the seed fixes it"


def test_embedding_of_few_points():
    """t-SNE's perplexity has to stay below their number."""
    points = embed(torch.eye(4), "tsne")
    assert points.shape == (4, 2)
    assert np.isfinite(points).all()


def test_pca_keeps_the_largest_variance():
    features = torch.randn(200, 3) * torch.tensor([1.0, 10.0, 5.0])
    points = torch.as_tensor(embed(features))
    centred = features - features.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(points.norm(dim=0), values[:2])
    torch.testing.assert_close(points.abs(), (centred @ directions[:2].T).abs(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("features", "method", "message"),
    [
        (torch.rand(5, 3), "umap", "method must be pca or tsne, got 'umap'"),
        (torch.rand(2, 3), "pca", r"3 or more of 2 or more dimensions, got \(2, 3\)"),
        (torch.rand(5, 1), "pca", r"3 or more of 2 or more dimensions, got \(5, 1\)"),
        (torch.full((5, 3), torch.nan), "tsne", "features must be finite"),
    ],
)
def test_bad_features(features, method, message):
    with pytest.raises(ValueError, match=message):
        embed(features, method)


# Patches.

CROSS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])


def cross_detector(padding: int = 1) -> nn.Sequential:
    """A convolution whose second channel answers a cross of 3x3 pixels with 5, and all else with less."""
    conv = nn.Conv2d(1, 2, 3, padding=padding)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[1, 0] = 2 * CROSS - 1
        conv.bias.zero_()  # type: ignore[union-attr]
    return nn.Sequential(conv, nn.ReLU())


def test_patches_are_where_the_pattern_is():
    images = 0.2 * torch.rand(4, 1, 9, 11)
    images[0, 0, 4:7, 7:10] = 0.9 * CROSS
    images[2, 0, 1:4, 2:5] = CROSS
    images[3, 0, 6:9, 0:3] = 0.8 * CROSS
    detector = cross_detector().train()
    with torch.no_grad():
        patches, positions = maximal_patches(detector, images, channel=1, k=3)
    assert positions.tolist() == [[2, 1, 2], [0, 4, 7], [3, 6, 0]], "strongest first, one an image"
    assert torch.equal(patches[:, 0], torch.stack([CROSS, 0.9 * CROSS, 0.8 * CROSS]))
    assert detector.training
    assert len(maximal_patches(detector, images, channel=1, k=9)[0]) == 4


def test_patches_of_a_dilated_convolution_line_up():
    """At a border only some of its points fall into the image, which says less of where it lies."""
    conv = nn.Conv2d(1, 1, 3, dilation=3, padding=3)
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.zero_()  # type: ignore[union-attr]
    images = torch.zeros(2, 1, 20, 20)
    images[0, 0, 1:8:3, 4:11:3] = 2.0
    images[1, 0, 1:5:3, 16:20:3] = 1.0
    patches, positions = maximal_patches(conv, images, channel=0, k=2)
    assert positions.tolist() == [[0, 1, 4], [1, -2, 13]]
    assert patches[0, 0, ::3, ::3].tolist() == [[2.0] * 3] * 3
    assert patches[1, 0, ::3, ::3].tolist() == [[0.0] * 3, [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


def test_patches_reach_over_the_border():
    """Crosses with their middle in opposite corners: outside is 0, in the patch as in the padding."""
    images = torch.zeros(2, 1, 6, 7, dtype=torch.uint8)
    images[0, 0, :2, :2] = 200 * CROSS[1:, 1:]
    images[1, 0, -2:, -2:] = 100 * CROSS[:2, :2]
    patches, positions = maximal_patches(cross_detector(), images, channel=1, k=2)
    assert positions.tolist() == [[0, -1, -1], [1, 4, 5]]
    assert patches.dtype == torch.uint8
    assert patches[0, 0].tolist() == [[0, 0, 0], [0, 200, 200], [0, 200, 0]]
    assert patches[1, 0].tolist() == [[0, 100, 0], [100, 100, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("part", "size", "stride", "offset"),
    [
        (nn.Conv2d(2, 3, 5, stride=3), 5, 3, 0),
        (nn.Conv2d(2, 3, 5, padding=2), 5, 1, -2),
        (nn.MaxPool2d(3, 2, 1), 3, 2, -1),
        (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU6(), nn.Conv2d(4, 4, 3)),
            8,
            2,
            -1,
        ),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(1, 4), nn.ReLU(), nn.Conv2d(4, 4, 3)), 5, 1, 0),
    ],
)
def test_receptive_fields(part, size, stride, offset):
    """Cell i sees `size` pixels from offset + stride i, as far as the image goes, whatever the weights."""
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
    height, width = 24, 31
    cells = [(0, 0), (2, 3), (4, 4), (1, 5)]
    for (rows, columns), (row, column) in zip(receptive_field(part, (2, height, width), cells), cells):
        first = offset + stride * row
        assert rows == (max(0, first), min(height, first + size))
        first = offset + stride * column
        assert columns == (max(0, first), min(width, first + size))


def test_receptive_field_behind_a_network_that_normalises_its_images():
    """Images below 0 everywhere close no ReLU, and residual sums reach no ReLU6's end."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1)
            self.act = nn.ReLU6(inplace=True)

        def forward(self, x):
            x = self.conv(100 * x - 5)
            for _ in range(4):
                x = x + F.max_pool2d(F.relu(self.act(x)), 3, 1, 1)
            return x

    assert receptive_field(Part(), (1, 30, 30), [(15, 2)]) == [((10, 21), (0, 8))]

    class Constant(nn.Module):
        def forward(self, x):
            return 0 * x

    assert receptive_field(Constant(), (1, 5, 7), [(1, 1)]) == [((0, 5), (0, 7))], "nothing is known"


def test_receptive_field_of_the_nature_network():
    """8x8 at stride 4, 4x4 at stride 2, 3x3: 36 pixels, 8 apart."""
    encoder: Any = make_encoder("nature-norm", spaces.Box(0, 255, (4, 84, 84), np.uint8))

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            return self.encoder.feature_map(x)

    assert receptive_field(Map(), (4, 84, 84), [(0, 6), (3, 2)]) == [
        ((0, 36), (48, 84)),
        ((24, 60), (16, 52)),
    ]
    images = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    patches, positions = maximal_patches(Map(), images, channel=3, k=2)
    assert patches.shape == (2, 4, 36, 36)
    for patch, (index, top, left) in zip(patches, positions.tolist()):
        assert torch.equal(patch, images[index, :, top : top + 36, left : left + 36])
        maps = encoder.feature_map(images)[:, 3]
        assert maps[index].max() == maps[index, top // 8, left // 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channel": 2}, r"channel must be one of a map \(N, C, h, w\), got 2 and \(4, 2, 9, 9\)"),
        ({"channel": -1}, "got -1"),
        ({"k": 0}, "k must be 1 or more, got 0"),
        ({"images": torch.zeros(4, 9, 9)}, r"images must be \(N, C, H, W\), got \(4, 9, 9\)"),
        ({"network_part": nn.Flatten()}, r"one of a map \(N, C, h, w\), got 1 and \(4, 81\)"),
    ],
)
def test_bad_arguments_of_patches(change, message):
    given = {
        "network_part": cross_detector(),
        "images": torch.zeros(4, 1, 9, 9),
        "channel": 1,
        "k": 1,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        maximal_patches(**given)


# Pictures.


def test_overlay_of_nothing_is_the_image_enlarged():
    grey = torch.randint(2, 256, (1, 84, 100), dtype=torch.uint8)
    picture = overlay(grey)
    assert (picture.shape, picture.dtype) == ((336, 400, 3), np.uint8)
    assert np.array_equal(picture[::4, ::4], grey[0].numpy()[..., None].repeat(3, 2))
    assert np.array_equal(picture[3::4, 3::4], picture[::4, ::4]), "nearest neighbours"
    assert np.array_equal(overlay(grey, torch.zeros(84, 100)), picture), "and a map of zeros hides nothing"
    rgb = torch.randint(2, 256, (3, 300, 256), dtype=torch.uint8)
    assert np.array_equal(overlay(rgb), rgb.numpy().transpose(1, 2, 0)), "large enough as it is"
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 256, 256)
    assert overlay(red, torch.zeros(256, 256))[7, 7].tolist() == [60, 60, 60], "grey under a map"
    stack = torch.randint(2, 256, (4, 256, 256), dtype=torch.uint8)
    assert np.array_equal(overlay(stack)[..., 1], stack[-1]), "the last frame"


def test_binary_planes_have_a_colour_each():
    planes = np.zeros((4, 10, 10), np.uint8)
    planes[1, 2, 3] = planes[3, 5, 6] = 1
    picture = overlay(planes)[::26, ::26]
    tab10 = np.rint(255 * np.array(matplotlib.colormaps["tab10"].colors))  # type: ignore[attr-defined]
    assert picture[2, 3].tolist() == tab10[1].tolist()
    assert picture[5, 6].tolist() == tab10[3].tolist()
    assert picture.any(-1).sum() == 2
    assert overlay(planes[1:2])[::26, ::26][2, 3].tolist() == [255, 255, 255], "one plane is black and white"


def test_overlay_colours():
    image = np.full((1, 256, 256), 100, np.uint8)
    heat = np.zeros((256, 256))
    heat[0, 0], heat[0, 1], heat[0, 2] = 2.0, 0.5, -2.0

    def mixed(color, opacity):
        return np.rint((1 - opacity) * 100 + opacity * 255 * np.array(color[:3])).tolist()

    inferno, bwr = matplotlib.colormaps["inferno"], matplotlib.colormaps["bwr"]
    picture = overlay(image, np.abs(heat))
    assert picture[0, 0].tolist() == picture[0, 2].tolist() == mixed(inferno(1.0), 0.8)
    assert picture[0, 1].tolist() == mixed(inferno(0.25), 0.4)
    assert picture[5, 5].tolist() == [100, 100, 100]
    signed = overlay(image, torch.tensor(heat))
    assert signed[0, 0].tolist() == mixed((1, 0, 0), 0.8), "red above 0"
    assert signed[0, 2].tolist() == mixed((0, 0, 1), 0.8), "blue below"
    assert signed[0, 1].tolist() == mixed(bwr(0.625), 0.4)
    assert signed[5, 5].tolist() == [100, 100, 100]
    # Many strong values, and one that stands out: that one is not what full colour means.
    heat[1:9], heat[9, 9] = 0.3, 50.0
    assert overlay(image, np.abs(heat))[1, 0].tolist() == mixed(inferno(1.0), 0.8)
    heat[1:9], heat[9, 9] = 0.0, 0.0
    # The same scale for all frames of a film.
    film = overlay(image, np.abs(heat), limit=8.0, signed=True)
    assert film[0, 0].tolist() == mixed(bwr(0.625), 0.4)
    assert overlay(image, heat, limit=0.5)[0, 0].tolist() == signed[0, 0].tolist(), "clipped there"


def test_grid():
    a, b, c = (np.full((h, w, 3), v, np.uint8) for h, w, v in ((5, 7, 10), (6, 4, 20), (2, 2, 30)))
    sheet = grid([a, b, c], columns=2, gap=1)
    assert (sheet.shape, sheet.dtype) == ((1 + 2 * 7, 1 + 2 * 8, 3), np.uint8)
    assert np.array_equal(sheet[1:6, 1:8], a)
    assert np.array_equal(sheet[1:7, 9:13], b)
    assert np.array_equal(sheet[8:10, 1:3], c)
    assert (sheet == 255).all(2).sum() == sheet.shape[0] * sheet.shape[1] - 35 - 24 - 4, "white elsewhere"
    assert grid([a], columns=5, gap=0).shape == a.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlay(np.zeros((1, 4, 4))), r"image must be uint8 \(C, H, W\), got float64 \(1, 4, 4\)"),
        (lambda: overlay(np.zeros((4, 4), np.uint8)), r"got uint8 \(4, 4\)"),
        (
            lambda: overlay(np.zeros((1, 4, 5), np.uint8), np.zeros((5, 4))),
            r"image's shape \(4, 5\), got \(5, 4\)",
        ),
        (lambda: overlay(np.zeros((1, 2, 2), np.uint8), np.full((2, 2), np.nan)), "heat must be finite"),
        (lambda: overlay(np.zeros((1, 2, 2), np.uint8), np.ones((2, 2)), limit=0), "greater than 0, got 0"),
        (lambda: grid([], 2), "one or more, got none"),
        (lambda: grid([np.zeros((2, 2), np.uint8)], 2), r"uint8 \(H, W, 3\), got uint8 \(2, 2\)"),
        (lambda: grid([np.zeros((2, 2, 3), np.uint8)], 0), "columns must be 1 or more, got 0"),
    ],
)
def test_bad_pictures(call, message):
    with pytest.raises(ValueError, match=message):
        call()

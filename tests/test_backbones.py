"""Backbones against published numbers: parameters, shapes, torchvision's names, and what training does.

What needs no values is built on the meta device, which has only shapes.
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from foveal.vision.backbone import Backbone, check_size, smallest_size
from foveal.vision.backbones import BACKBONES, make_backbone
from foveal.vision.densenet import DenseLayer
from foveal.vision.fractalnet import ConvNorm, FractalBlock, FractalNet, join, local_mask
from foveal.vision.googlenet import INCEPTIONS
from foveal.vision.norm import FrozenBatchNorm2d, make_norm
from foveal.vision.resnet import BasicBlock, PreActivationBlock, ResNet, StochasticDepth

build: Any = make_backbone  # attributes of the single networks are looked at below

UNIQUE = list({id(make): name for name, make in reversed(BACKBONES.items())}.values())
"""All names but one of the two of CIFAR's ResNets."""
FAMILIES = [
    "lenet5",
    "alexnet",
    "zfnet",
    "vgg11",
    "nin",
    "googlenet",
    "resnet18",
    "resnet50",
    "resnet20",
    "preresnet18",
    "preresnet50",
    "wrn_16_8",
    "resnext50_32x4d",
    "fractalnet21_cifar",
    "densenet121",
    "densenet_40_12",
    "squeezenet1_0",
]
"""One or two of each class."""


@functools.cache
def meta(name: str, num_classes: int = 1000, in_channels: int = 3, norm: str | None = None) -> Any:
    """A network without values, shared by the tests: they leave it as it is."""
    return fresh(name, num_classes, in_channels, norm)


def fresh(name: str, *args: Any, **kwargs: Any) -> Any:
    with torch.device("meta"), only_shapes():
        return make_backbone(name, *args, **kwargs).eval()


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """What changes no shape does nothing: it is slow on the meta device."""

    def nothing(tensor, *args, **kwargs):
        return tensor

    with (
        mock.patch.object(torch.Tensor, "normal_", nothing),
        mock.patch.object(torch.Tensor, "uniform_", nothing),
        mock.patch.object(torch.nn.functional, "batch_norm", nothing),
        mock.patch.object(torch.nn.functional, "relu", nothing),
    ):
        yield


def listed(name: str) -> tuple[Any, int]:
    """The network with the classes and channels that its docstring counts, and that count."""
    text = BACKBONES[name].__doc__ or ""
    classes = re.search(r"([\d,]+) parameters(?: with (\d+) classes)?(?: and (\d) channel)?", text)
    assert classes, text
    count, num_classes, channels = classes.groups()
    return meta(name, int(num_classes or 1000), int(channels or 3)), int(count.replace(",", ""))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(channels: int, size: int, batch: int = 1) -> torch.Tensor:
    return torch.empty(batch, channels, size, size, device="meta")


@pytest.mark.parametrize("name", UNIQUE)
def test_parameters_are_those_of_the_docstring(name):
    backbone, count = listed(name)
    heads = sum(parameters(getattr(backbone, head)) for head in ("aux1", "aux2") if hasattr(backbone, head))
    assert parameters(backbone) - heads == count
    summary = BACKBONES[name].__doc__ or ""
    assert "\n" not in summary
    assert len(summary) <= 100
    assert re.search(r"\(\d{4}\.\d{5}\)|\(\d{4}\.\d{4}\)|et al\. \d{4}", summary)


@pytest.mark.parametrize(
    ("name", "classes", "channels", "count"),
    [
        ("lenet5", 10, 1, 61_706),
        ("alexnet", 1000, 3, 60_965_224),
        ("alexnet_ungrouped", 1000, 3, 62_378_344),
        ("zfnet", 1000, 3, 62_357_608),
        ("vgg16", 1000, 3, 138_357_544),
        ("nin", 10, 3, 966_986),
        ("resnet18", 1000, 3, 11_689_512),
        ("resnet50", 1000, 3, 25_557_032),
        ("resnet20", 10, 3, 269_722),
        ("resnet56_cifar", 10, 3, 853_018),
        ("wrn_28_10", 10, 3, 36_479_194),
        ("resnext50_32x4d", 1000, 3, 25_028_904),
        ("densenet121", 1000, 3, 7_978_856),
        ("densenet_40_12", 10, 3, 1_019_722),
        ("densenet_bc_100_12", 10, 3, 769_162),
        ("squeezenet1_0", 1000, 3, 1_248_424),
    ],
)
def test_published_parameters(name, classes, channels, count):
    assert parameters(meta(name, classes, channels)) == count


def test_googlenet_parameters_are_those_of_batch_normalisation_and_true_5x5():
    backbone = meta("googlenet")
    heads = parameters(backbone.aux1) + parameters(backbone.aux2)
    assert parameters(backbone) - heads == 7_005_832
    bare = fresh("googlenet", norm="none")
    assert parameters(bare) - parameters(bare.aux1) - parameters(bare.aux2) == 6_998_552
    # torchvision's, with 3x3 in their place
    less = sum((25 - 9) * widths[3] * widths[4] for widths in INCEPTIONS.values())
    assert parameters(backbone) - heads - less == 6_624_904
    assert parameters(backbone) - less == 13_004_888, "with its auxiliary heads"
    assert parameters(fresh("googlenet", auxiliary=False)) == 7_005_832


SHAPES: dict[tuple[str, int, int], dict[str, tuple[int, int]]] = {
    ("lenet5", 1, 28): {"conv1": (6, 14), "conv2": (16, 5)},
    ("alexnet", 3, 227): {
        "conv1": (96, 55),
        "conv2": (256, 27),
        "conv3": (384, 13),
        "conv4": (384, 13),
        "conv5": (256, 13),
        "pool5": (256, 6),
    },
    ("zfnet", 3, 224): {
        "conv1": (96, 110),
        "conv2": (256, 26),
        "conv3": (384, 13),
        "conv4": (384, 13),
        "conv5": (256, 13),
        "pool5": (256, 6),
    },
    ("vgg16", 3, 224): {
        "block1": (64, 112),
        "block2": (128, 56),
        "block3": (256, 28),
        "block4": (512, 14),
        "block5": (512, 7),
    },
    ("nin", 3, 32): {"block1": (96, 16), "block2": (192, 8), "block3": (192, 8)},
    ("nin_imagenet", 3, 224): {
        "block1": (96, 27),
        "block2": (256, 13),
        "block3": (384, 6),
        "block4": (1024, 6),
    },
    ("googlenet", 3, 224): {
        "stem": (192, 28),
        "inception3a": (256, 28),
        "inception3b": (480, 28),
        "inception4a": (512, 14),
        "inception4b": (512, 14),
        "inception4c": (512, 14),
        "inception4d": (528, 14),
        "inception4e": (832, 14),
        "inception5a": (832, 7),
        "inception5b": (1024, 7),
    },
    ("resnet18", 3, 224): {
        "stem": (64, 56),
        "layer1": (64, 56),
        "layer2": (128, 28),
        "layer3": (256, 14),
        "layer4": (512, 7),
    },
    ("resnext50_32x4d", 3, 224): {
        "stem": (64, 56),
        "layer1": (256, 56),
        "layer2": (512, 28),
        "layer3": (1024, 14),
        "layer4": (2048, 7),
    },
    ("preresnet50", 3, 224): {
        "stem": (64, 56),
        "layer1": (256, 56),
        "layer2": (512, 28),
        "layer3": (1024, 14),
        "layer4": (2048, 7),
    },
    ("resnet20", 3, 32): {"stem": (16, 32), "layer1": (16, 32), "layer2": (32, 16), "layer3": (64, 8)},
    ("wrn_28_10", 3, 32): {"stem": (16, 32), "layer1": (160, 32), "layer2": (320, 16), "layer3": (640, 8)},
    ("resnext29_8x64d_cifar", 3, 32): {
        "stem": (64, 32),
        "layer1": (256, 32),
        "layer2": (512, 16),
        "layer3": (1024, 8),
    },
    ("fractalnet21_cifar", 3, 32): {
        "block1": (64, 16),
        "block2": (128, 8),
        "block3": (256, 4),
        "block4": (512, 2),
        "block5": (512, 1),
    },
    ("densenet121", 3, 224): {
        "stem": (64, 56),
        "block1": (256, 56),
        "block2": (512, 28),
        "block3": (1024, 14),
        "block4": (1024, 7),
    },
    ("densenet_40_12", 3, 32): {
        "stem": (16, 32),
        "block1": (160, 32),
        "block2": (304, 16),
        "block3": (448, 8),
    },
    ("squeezenet1_0", 3, 224): {
        "stem": (96, 109),
        "block1": (256, 54),
        "block2": (512, 27),
        "block3": (512, 13),
    },
    ("squeezenet1_1", 3, 224): {
        "stem": (64, 111),
        "block1": (128, 55),
        "block2": (256, 27),
        "block3": (512, 13),
    },
}


@pytest.mark.parametrize(("name", "channels", "size"), SHAPES)
@torch.no_grad()
def test_maps_of_all_stages(name, channels, size):
    backbone, _ = listed(name)
    x = images(channels, size, batch=2)
    expected = SHAPES[name, channels, size]
    assert list(backbone.stages) == list(expected)
    after = None
    for stage, (maps, side) in expected.items():
        with only_shapes():
            x = backbone.apply_paths(backbone.paths(stage, after), x)
        assert x.shape == (2, maps, side, side), stage
        after = stage
    assert backbone.classify(x).shape == (2, backbone.num_classes)


def test_first_convolution_of_alexnet():
    backbone = meta("alexnet")
    assert parameters(backbone.conv1) == 34_944 == 96 * 11 * 11 * 3 + 96
    assert backbone.conv1(images(3, 227)).shape == (1, 96, 55, 55)


# Names and shapes of torchvision 0.29.2's state_dicts: how many, the start of the SHA-256 of the sorted lines
# "name shape", and some of them to read. Taken from torchvision itself, with which outputs were equal too.
TORCHVISION: dict[tuple[str, str | None], tuple[int, str, dict[str, tuple[int, ...]]]] = {
    ("vgg11", None): (22, "b11acd4f90d9643f", {}),
    ("vgg13", None): (26, "79ca8fd7a1480aa7", {}),
    ("vgg16", None): (
        32,
        "ba63c2556d912509",
        {
            "features.0.weight": (64, 3, 3, 3),
            "features.28.bias": (512,),
            "classifier.0.weight": (4096, 25088),
            "classifier.6.bias": (1000,),
        },
    ),
    ("vgg19", None): (38, "393fac8b08b63fbe", {}),
    ("vgg11", "batch"): (62, "56ed5816909a8132", {}),
    ("vgg13", "batch"): (76, "e4f52ce016e5e82f", {}),
    ("vgg16", "batch"): (
        97,
        "86bad13b66635552",
        {"features.0.bias": (64,), "features.1.running_var": (64,), "features.40.weight": (512, 512, 3, 3)},
    ),
    ("vgg19", "batch"): (118, "faf0fdbb92f698c6", {}),
    ("resnet18", None): (
        122,
        "5191d63ec3989592",
        {
            "conv1.weight": (64, 3, 7, 7),
            "bn1.num_batches_tracked": (),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.running_var": (512,),
            "fc.bias": (1000,),
        },
    ),
    ("resnet34", None): (218, "f8de2a1812ef85e4", {}),
    ("resnet50", None): (
        320,
        "a87e91cd6bd1f939",
        {"layer1.0.downsample.1.weight": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
    ),
    ("resnet101", None): (626, "dbc3ca74fffafc72", {}),
    ("resnet152", None): (932, "7d486dbdc941506e", {}),
    ("wide_resnet50_2", None): (320, "03413d59409d9728", {"layer1.0.conv2.weight": (128, 128, 3, 3)}),
    ("resnext50_32x4d", None): (320, "20929ac81dfcc94f", {"layer1.0.conv2.weight": (128, 4, 3, 3)}),
    ("resnext101_32x8d", None): (626, "5068f88fa77e6142", {"layer4.0.conv2.weight": (2048, 64, 3, 3)}),
    ("densenet121", None): (
        727,
        "9c659ec278435e95",
        {
            "features.conv0.weight": (64, 3, 7, 7),
            "features.denseblock1.denselayer1.norm1.weight": (64,),
            "features.denseblock4.denselayer16.conv2.weight": (32, 128, 3, 3),
            "features.transition1.conv.weight": (128, 256, 1, 1),
            "features.norm5.bias": (1024,),
            "classifier.weight": (1000, 1024),
        },
    ),
    ("densenet161", None): (967, "96e788964c2c431f", {}),
    ("densenet169", None): (1015, "03a0accd6e99d8d0", {}),
    ("densenet201", None): (1207, "ebf13d018b02ad9d", {}),
    ("squeezenet1_0", None): (
        52,
        "142983e4c19c76ad",
        {
            "features.0.weight": (96, 3, 7, 7),
            "features.3.squeeze.weight": (16, 96, 1, 1),
            "features.12.expand3x3.bias": (256,),
            "classifier.1.weight": (1000, 512, 1, 1),
        },
    ),
    ("squeezenet1_1", None): (52, "3fbd2a746421cada", {"features.12.expand1x1.weight": (256, 64, 1, 1)}),
}


@pytest.mark.parametrize(("name", "norm"), TORCHVISION)
def test_state_dict_has_the_names_and_shapes_of_torchvision(name, norm):
    count, digest, some = TORCHVISION[name, norm]
    shapes = {key: tuple(tensor.shape) for key, tensor in meta(name, norm=norm).state_dict().items()}
    assert {key: shapes.get(key) for key in some} == some
    assert len(shapes) == count
    lines = "\n".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


SMALLEST = {
    "lenet5": 12,
    "alexnet": 39,
    "zfnet": 47,
    "vgg": 32,
    "nin_imagenet": 39,
    "nin": 4,
    "googlenet": 31,
    "resnet": 1,
    "preresnet": 1,
    "wrn": 1,
    "wide_resnet": 1,
    "resnext": 1,
    "fractalnet": 32,
    "densenet_": 4,
    "densenet": 29,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
}
"""Sides of the smallest images by the beginnings of names; the first that fits counts. The 21, 17 and 29 are
the min_size of torchvision's weights."""


def takes(backbone: Backbone, size: int) -> bool:
    try:
        with only_shapes():
            return backbone(images(backbone.in_channels, size)).shape == (1, backbone.num_classes)
    except RuntimeError:
        return False


@pytest.mark.parametrize("name", UNIQUE)
@torch.no_grad()
def test_every_backbone_takes_its_smallest_images_and_no_smaller_ones(name):
    backbone, count = listed(name)
    size = next(size for beginning, size in SMALLEST.items() if name.startswith(beginning))
    assert takes(backbone, size)
    assert not takes(backbone, size - 1)
    if count < 1_300_000:
        network = make_backbone(name, 7, 2).eval()
        x = torch.rand(2, 2, size, size)
        logits = network(x)
        assert torch.isfinite(logits).all()
        assert not torch.allclose(network(1 - x), logits), "the image is seen"


@pytest.mark.parametrize(
    ("name", "stage", "size"),
    [
        ("vgg16", None, 32),
        ("vgg16", "block3", 8),
        ("lenet5", None, 12),
        ("alexnet", "conv1", 11),
        ("squeezenet1_0", None, 21),
        ("densenet_40_12", None, 4),
        ("densenet_40_12", "block2", 2),
        ("resnet18", None, 1),
    ],
)
def test_smallest_size(name, stage, size):
    assert smallest_size(name, stage) == size
    assert smallest_size(meta(name), stage) == size


def test_smallest_size_leaves_the_network_as_it_is():
    network = build("lenet5", 10).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert smallest_size(network.double()) == 12
    assert network.training
    assert isinstance(network.relu1, nn.ReLU)
    assert all(torch.equal(network.float().state_dict()[key], tensor) for key, tensor in before.items())
    assert smallest_size(network.cut("conv1")) == 2, "the last stage is another one"


def test_check_size():
    check_size("vgg16", (32, 50))
    check_size(meta("vgg16"), (8, 9), "block3")
    message = "vgg16 is too deep for images of 40x10 pixels: it takes 32x32 or more"
    with pytest.raises(ValueError, match=message):
        check_size("vgg16", (40, 10))
    with pytest.raises(ValueError, match=message):
        check_size(meta("vgg16"), (40, 10))
    with pytest.raises(
        ValueError, match="mine up to block3 is too deep for images of 7x90 pixels: it takes 8x8"
    ):
        check_size("vgg16", (7, 90), "block3", name="mine")
    with pytest.raises(ValueError, match="stage of vgg16 must be one of block1, .*, got 'block9'"):
        check_size("vgg16", (64, 64), "block9")


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_leaves_what_the_map_needs_and_nothing_else(name):
    backbone = fresh(name)
    stage = list(backbone.stages)[len(backbone.stages) // 2]
    x = images(3, 64)
    with only_shapes(), torch.no_grad():
        shape = meta(name).feature_map(x, stage).shape
    paths = backbone.paths(stage)
    whole = backbone.state_dict()
    assert backbone.cut(stage) is backbone
    left = backbone.state_dict()
    assert list(left) == [key for key in whole if any(key.startswith(f"{path}.") for path in paths)]
    assert 0 < len(left) < len(whole)
    bare = fresh(name, norm="none").cut(stage)
    with only_shapes():
        y = bare.feature_map(x)
        assert backbone.feature_map(x).shape == y.shape == shape
    y.sum().backward()
    assert all(p.grad is not None for p in bare.parameters())
    assert list(backbone.stages)[-1] == stage
    for broken in (backbone, backbone.forward_train):
        with pytest.raises(ValueError, match=f"{name} was cut at {stage} and has no classifier"):
            broken(x)


def test_cut_keeps_the_map_and_loads_whole_files():
    whole = build("resnet20", 10).eval()
    x = torch.rand(2, 3, 12, 12)
    cut = build("resnet20", 10).cut("layer2").eval()
    missing, unexpected = cut.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    assert {key.partition(".")[0] for key in unexpected} == {"layer3", "fc"}
    assert torch.equal(cut.feature_map(x), whole.feature_map(x, "layer2"))
    assert torch.equal(cut.cut("stem").feature_map(x), whole.feature_map(x, "stem"))
    assert list(dict(cut.named_children())) == ["conv1", "bn1", "relu"]
    with pytest.raises(ValueError, match="stage of resnet20 must be one of stem, got 'layer2'"):
        cut.feature_map(x, "layer2")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_channels_and_classes(name, channels):
    backbone = fresh(name, 7, channels)
    size = 47
    with only_shapes():
        assert backbone(images(channels, size)).shape == (1, 7)
    assert next(m for m in backbone.modules() if isinstance(m, nn.Conv2d)).in_channels == channels


def norms(network: nn.Module) -> set[type[nn.Module]]:
    kinds = (nn.BatchNorm2d, nn.GroupNorm, FrozenBatchNorm2d, nn.LocalResponseNorm)
    return {type(module) for module in network.modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_biases(name):
    own: set[type[nn.Module]] = {nn.BatchNorm2d}
    if name in ("alexnet", "zfnet"):
        own = {nn.LocalResponseNorm}
    elif name in ("lenet5", "vgg11", "nin", "squeezenet1_0"):
        own = set()
    assert norms(meta(name)) == own
    made = {}
    for kind, layer in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("frozen", FrozenBatchNorm2d)):
        backbone = made[kind] = fresh(name, norm=kind)
        assert norms(backbone) == {layer}
        count = sum(isinstance(module, layer) for module in backbone.modules())
        convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
        biased = sum(m.bias is not None for m in convolutions)
        if name.startswith("vgg"):
            assert biased == count == len(convolutions), "as torchvision's vgg*_bn"
        else:
            # what gives the logits, or in pre-activation networks a sum, has no norm behind it
            assert biased == (name in ("nin", "squeezenet1_0"))
            assert count >= len(convolutions) - biased - 2 * name.startswith(("preresnet", "wrn")) * len(
                backbone.stages
            )
    assert parameters(made["batch"]) == parameters(made["group"])
    frozen, batch = made["frozen"].state_dict(), made["batch"].state_dict()
    assert set(batch) - set(frozen) == {key for key in batch if key.endswith("num_batches_tracked")}
    assert not any("norm" in key or "bn" in key for key, _ in made["frozen"].named_parameters())
    none = fresh(name, norm="none")
    assert norms(none) == set()
    assert all(m.bias is not None for m in none.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(64, 32), (48, 24), (16, 8), (100, 25), (15, 5), (37, 1), (3, 1), (2, 1), (1, 1), (2048, 32)],
)
def test_group_norm_takes_all_channel_counts(channels, groups):
    norm: Any = make_norm("group", channels)
    assert norm.num_groups == groups
    x = torch.randn(4, channels, 3, 5) * 3 + 2
    y = norm(x).reshape(4, groups, -1)
    torch.testing.assert_close(y.mean(2), torch.zeros(4, groups), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(2, unbiased=False), torch.ones(4, groups), atol=1e-3, rtol=0)


def test_frozen_norm_is_batch_norm_in_evaluation():
    batch: Any = nn.BatchNorm2d(5)
    with torch.no_grad():
        for tensor in (batch.weight, batch.bias, batch.running_mean, batch.running_var):
            tensor.uniform_(0.5, 2.0)
    frozen = FrozenBatchNorm2d(5)
    x = torch.randn(3, 5, 4, 4, requires_grad=True)
    torch.testing.assert_close(frozen(x), x / (1 + 1e-5) ** 0.5)
    state = batch.state_dict()
    assert "num_batches_tracked" in state
    frozen.load_state_dict(state)
    assert "num_batches_tracked" in state, "the caller's dict is left alone"
    assert list(frozen.parameters()) == []
    before = {key: tensor.clone() for key, tensor in frozen.state_dict().items()}
    assert list(before) == ["weight", "bias", "running_mean", "running_var"]
    for _ in range(2):  # training mode
        y = frozen(x)
        torch.testing.assert_close(y, batch.eval()(x), rtol=0, atol=0)
        y.square().sum().backward()
    assert all(torch.equal(frozen.state_dict()[key], tensor) for key, tensor in before.items())
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_local_response_norm_is_the_paper_s():
    x = torch.rand(2, 96, 3, 3) * 50
    expected = torch.empty_like(x)
    for i in range(96):
        near = x[:, max(0, i - 2) : i + 3].square().sum(1)
        expected[:, i] = x[:, i] / (2 + 1e-4 * near) ** 0.75
    torch.testing.assert_close(meta("alexnet").lrn1(x), expected)
    assert [stage for stage, paths in meta("alexnet").stages.items() if f"lrn{stage[-1]}" in paths] == [
        "conv1",
        "conv2",
    ]


def test_alexnet_has_two_halves_where_the_paper_has():
    grouped, plain = meta("alexnet"), meta("alexnet_ungrouped")
    assert [getattr(grouped, f"conv{i}").groups for i in range(1, 6)] == [1, 2, 1, 2, 2]
    assert [getattr(plain, f"conv{i}").groups for i in range(1, 6)] == [1] * 5
    for conv in (grouped.conv2, grouped.conv4, grouped.conv5):
        conv = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups)
        x = torch.rand(1, conv.in_channels, 2, 2, requires_grad=True)
        conv(x)[:, : conv.out_channels // 2].sum().backward()
        assert x.grad is not None
        first, second = x.grad.chunk(2, dim=1)
        assert first.abs().min() > 0
        assert second.abs().max() == 0


def test_padded_shortcut():
    block = BasicBlock(3, 8, stride=2, norm="batch", pad=True).eval()
    x = torch.rand(2, 3, 5, 5)
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.zero_()
    y = block(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 3:], torch.zeros(2, 5, 3, 3))
    assert parameters(block) == 3 * 8 * 9 + 8 * 8 * 9 + 4 * 8


def test_stochastic_depth_keeps_what_the_paper_says():
    depths = [m for m in meta("resnet110_stochastic_cifar").modules() if isinstance(m, StochasticDepth)]
    survival = [m.survival for m in depths]
    assert len(survival) == 54
    assert sum(survival) == pytest.approx(40.25)
    assert survival[0] == pytest.approx(1 - 0.5 / 54)
    assert survival[26] == pytest.approx(0.75)
    assert survival[-1] == 0.5
    one = torch.ones(())
    drawn = [float(sum(m.train()(one) for m in depths)) for _ in range(100)]
    # 100 draws of a sum whose standard deviation is 2.9
    assert sum(drawn) / 100 == pytest.approx(40.25, abs=4 * 0.29)
    assert len(set(drawn)) > 3
    for m in depths:
        m.eval()
    assert float(sum(m(one) for m in depths)) == pytest.approx(40.25)


def test_stochastic_depth_drops_a_block_for_the_whole_batch_and_scales_it_in_evaluation():
    block = BasicBlock(4, 4, stride=1, norm="frozen", survival=0.5)
    x = torch.rand(6, 4, 5, 5)
    branch = block.conv2(torch.relu(block.bn1(block.conv1(x)))) / (1 + 1e-5) ** 0.5
    kept = []
    with torch.no_grad():
        for _ in range(64):
            y = block.train()(x)
            choices = [torch.allclose(y, torch.relu(x + s * branch), atol=1e-6) for s in (0, 1)]
            assert sum(choices) == 1, "all images together"
            kept.append(choices[1])
        assert 16 < sum(kept) < 48
        torch.testing.assert_close(block.eval()(x), torch.relu(x + 0.5 * branch))


def test_dropped_blocks_get_no_gradient():
    block = BasicBlock(4, 4, stride=1, norm="batch", survival=1e-9)
    block(torch.rand(2, 4, 5, 5)).sum().backward()
    assert block.conv1.weight.grad is not None
    assert block.conv1.weight.grad.abs().max() == 0


def test_pre_activation_block():
    block = PreActivationBlock(3, 3, stride=1, norm="none")
    x = torch.randn(2, 3, 5, 5)
    before = x.clone()
    first, _, _, _, second = block.branch
    torch.testing.assert_close(block(x), x + second(torch.relu(first(torch.relu(x)))))
    assert torch.equal(x, before), "nothing in place"
    wide: Any = PreActivationBlock(3, 6, stride=2, norm="none")
    activated = torch.relu(x)
    first, _, _, _, second = wide.branch
    torch.testing.assert_close(wide(x), wide.downsample(activated) + second(torch.relu(first(activated))))


def test_pre_activation_network_normalises_first_in_its_stem_and_last_behind_all_blocks():
    network: Any = ResNet(10, 3, block=PreActivationBlock, depths=(2, 1), widths=(4, 8), stem=4, cifar=True)
    assert isinstance(network.layer1[0].bn1, nn.Identity)
    assert isinstance(network.layer1[1].bn1, nn.BatchNorm2d)
    assert isinstance(network.layer2[0].bn1, nn.BatchNorm2d)
    x = torch.rand(2, 3, 8, 8)
    assert network.feature_map(x, "stem").min() == 0
    assert network.feature_map(x, "layer1").min() < 0
    assert network.feature_map(x).min() == 0
    assert any(m.p == 0.3 for m in build("wrn_16_8", 10, dropout=0.3).modules() if isinstance(m, nn.Dropout))


def test_dense_layer_adds_maps_behind_what_it_was_given():
    for bottleneck in (False, True):
        layer: Any = DenseLayer(3, growth=2, bottleneck=bottleneck, norm="none", dropout=0.0)
        x = torch.randn(2, 3, 4, 4)
        y = layer(x.clone())
        assert y.shape == (2, 5, 4, 4)
        assert torch.equal(y[:, :3], x)
        new = layer.conv1(torch.relu(x))
        torch.testing.assert_close(y[:, 3:], layer.conv2(torch.relu(new)) if bottleneck else new)


class TestFractalNet:
    def columns(self, block: FractalBlock) -> list[list[ConvNorm]]:
        """The convolutions of each of three columns, in order."""
        f: Any = block.fractal
        return [
            [f.conv],
            [f.first.conv, f.second.conv],
            [f.first.first.conv, f.first.second.conv, f.second.first.conv, f.second.second.conv],
        ]

    def make(self, **settings: Any) -> FractalBlock:
        defaults = {"columns": 3, "inputs": 2, "outputs": 4, "norm": "batch", "dropout": 0.0, "drop": 0.15}
        block = FractalBlock(**{**defaults, **settings})
        assert sum(isinstance(m, nn.Conv2d) for m in block.modules()) == 7
        return block

    def test_evaluation_is_the_mean_of_all_paths(self):
        block = self.make().eval()
        (a,), (b, c), (d, e, f, g) = self.columns(block)
        x = torch.rand(3, 2, 6, 6)
        middle = (b(x) + e(d(x))) / 2
        expected = block.pool((a(x) + c(middle) + g(f(middle))) / 3)
        torch.testing.assert_close(block(x), expected)

    @pytest.mark.parametrize("column", [0, 1, 2])
    def test_global_drop_path_is_one_column(self, column):
        block = self.make().eval()
        x = torch.rand(3, 2, 6, 6)
        y = block(x, torch.arange(3) == column)
        expected = x
        for layer in self.columns(block)[column]:
            expected = layer(expected)
        torch.testing.assert_close(y, block.pool(expected))
        y.sum().backward()
        for i, layers in enumerate(self.columns(block)):
            for layer in layers:
                gradient: Any = layer[0].weight.grad
                assert (gradient is not None and bool(gradient.abs().sum() > 0)) == (i == column)

    def test_local_drop_path_keeps_at_least_one(self):
        for inputs in (2, 3, 4):
            masks = torch.stack([local_mask(inputs, 0.5, torch.device("cpu")) for _ in range(300)])
            assert masks.any(1).all()
            assert masks.all(1).any()
            never = torch.stack([local_mask(inputs, 1.0, torch.device("cpu")) for _ in range(300)])
            assert (never.sum(1) == 1).all()
            assert (never.float().mean(0) > 0.5 / inputs).all(), "any of them may be left"
        assert local_mask(3, 0.0, torch.device("cpu")).all()
        masks = torch.stack([local_mask(3, 0.15, torch.device("cpu")) for _ in range(2000)])
        # 0.15, but for the draws that would drop all three
        assert (~masks).float().mean() == pytest.approx(0.15 - 0.15**3 / 3, abs=0.02)

    def test_local_join_is_the_mean_of_what_it_keeps(self):
        paths = [torch.full((1, 1, 1, 1), value) for value in (1.0, 10.0, 100.0)]
        everything = torch.ones(3, dtype=torch.bool)
        seen = {round(float(join(paths, everything, 0.5)), 3) for _ in range(200)}
        assert seen == {1.0, 10.0, 100.0, 5.5, 50.5, 55.0, 37.0}
        assert float(join(paths, None, 0.5)) == 37.0

    def test_half_of_the_batches_have_one_column_and_the_network_has_it_everywhere(self):
        network: Any = FractalNet.__new__(FractalNet)
        nn.Module.__init__(network)
        network.columns, network.global_share = 3, 0.5
        drawn = torch.stack([network.draw_columns(torch.device("cpu")) for _ in range(1000)])
        whole = drawn.all(1)
        assert whole.float().mean() == pytest.approx(0.5, abs=0.06)
        single = drawn[~whole]
        assert (single.sum(1) == 1).all()
        torch.testing.assert_close(single.float().mean(0), torch.full((3,), 1 / 3), atol=0.08, rtol=0)
        network = meta("fractalnet21_cifar", 10)
        given: list[Any] = []

        def block(path):
            def call(x, columns):
                given.append((path, columns))
                return x

            return call

        with mock.patch.object(network, "get_submodule", block):
            network.feature_map(images(3, 32), "block4")
            assert given == [(f"block{i}", None) for i in range(1, 5)], "no drop-path in evaluation"
            given.clear()
            network.training = True
            network.feature_map(torch.rand(1, 3, 32, 32))
            network.training = False
        assert len(given) == 5
        assert all(columns is given[0][1] for _, columns in given)

    def test_dropout_rises_to_the_last_block(self):
        rates = [
            {m.p for m in block.modules() if isinstance(m, nn.Dropout)}
            for block in (meta("fractalnet21_cifar", 10).get_submodule(f"block{i}") for i in range(1, 6))
        ]
        assert [round(rate.pop(), 6) for rate in rates] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_auxiliary_heads_of_googlenet():
    network = build("googlenet", 5, norm="group", dropout=0.0, auxiliary_dropout=0.0)
    assert network.auxiliary_weight == 0.3
    assert Backbone.auxiliary_weight == 0.0
    x = torch.rand(2, 3, 31, 31)
    logits, auxiliary = network.forward_train(x)
    assert [a.shape for a in auxiliary] == [(2, 5), (2, 5)]
    torch.testing.assert_close(logits, network(x))
    torch.testing.assert_close(auxiliary[0], network.aux1(network.feature_map(x, "inception4a")))
    torch.testing.assert_close(auxiliary[1], network.aux2(network.feature_map(x, "inception4d")))
    auxiliary[0].square().sum().backward(retain_graph=True)
    assert network.conv1.conv.weight.grad.abs().sum() > 0
    assert network.aux1.fc2.weight.grad.abs().sum() > 0
    assert network.aux2.fc2.weight.grad is None
    assert network.inception4b.branch1.conv.weight.grad is None
    auxiliary[1].square().sum().backward()
    assert network.aux2.conv.conv.weight.grad.abs().sum() > 0
    assert network.inception4d.branch1.conv.weight.grad.abs().sum() > 0
    assert network.inception4e.branch1.conv.weight.grad is None
    logits, auxiliary = build("lenet5", 10).forward_train(torch.rand(1, 3, 28, 28))
    assert logits.shape == (1, 10)
    assert auxiliary == []


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("alexnet", [0.5, 0.5]),
        ("zfnet", [0.5, 0.5]),
        ("vgg11", [0.5, 0.5]),
        ("nin", [0.5, 0.5]),
        ("nin_imagenet", [0.5]),
        ("googlenet", [0.7, 0.7, 0.4]),
        ("squeezenet1_0", [0.5]),
    ],
)
def test_dropout_is_where_the_originals_have_it(name, rates):
    assert [m.p for m in meta(name).modules() if isinstance(m, nn.Dropout)] == rates
    changed = [m.p for m in fresh(name, dropout=0.25).modules() if isinstance(m, nn.Dropout)]
    assert changed == [0.7, 0.7, 0.25] if name == "googlenet" else changed == [0.25] * len(rates)


@pytest.mark.parametrize(
    ("name", "norm", "training"),
    [
        ("lenet5", None, True),
        ("nin", "group", False),
        ("resnet20", None, False),
        ("resnet20", "frozen", True),
        ("densenet_40_12", "group", True),
        ("squeezenet1_1", None, False),
    ],
)
def test_networks_stack(name, norm, training):
    networks = [build(name, 3, 1, norm, **({"dropout": 0.0} if name == "nin" else {})) for _ in range(2)]
    for network in networks:
        network.train(training)
    weights, buffers = torch.func.stack_module_state(networks)
    x = torch.rand(2, 2, 1, 20, 20)
    out = torch.vmap(lambda w, b, x: torch.func.functional_call(networks[0], (w, b), (x,)))(
        weights, buffers, x
    )
    for i, network in enumerate(networks):
        torch.testing.assert_close(out[i], network(x[i]), atol=1e-4, rtol=1e-3)


def test_random_depths_and_paths_stack():
    block = BasicBlock(2, 2, stride=1, norm="none", survival=0.5)
    x = torch.rand(40, 1, 2, 3, 3)
    out = torch.vmap(block, randomness="different")(x)
    same = (out == x).flatten(1).all(1)
    assert 5 < same.sum() < 35, "each network draws for itself"
    fractal = TestFractalNet().make(norm="none")
    everything = torch.ones(3, dtype=torch.bool)
    x = torch.rand(1, 2, 4, 4).expand(40, 1, 2, 4, 4)
    out = torch.vmap(lambda x: fractal(x, everything), randomness="different")(x)
    assert len(torch.unique(out, dim=0)) > 3


def test_first_weights():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build("resnet20", 10).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layer3.2.conv2.weight"], other["layer3.2.conv2.weight"])
    # Kaiming, by the outputs: the variance is 2 / (64 * 9)
    assert first["layer3.2.conv2.weight"].std() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    # By the inputs, where no norm follows
    assert build("nin").block1[0].weight.detach().std() == pytest.approx((2 / 75) ** 0.5, rel=0.03)


@pytest.mark.parametrize(
    ("name", "mode", "linear"),
    [
        ("lenet5", "fan_in", 0),
        ("alexnet", "fan_in", 3),
        ("vgg11", "fan_out", 3),
        ("nin", "fan_in", 0),
        ("googlenet", "fan_out", 0),
        ("resnet20", "fan_out", 0),
        ("densenet_40_12", "fan_in", 0),
    ],
)
def test_every_convolution_starts_with_kaiming_s_weights(name, mode, linear):
    with (
        mock.patch.object(nn.init, "kaiming_normal_") as kaiming,
        mock.patch.object(nn.init, "normal_") as normal,
    ):
        backbone = fresh(name)
    drawn = {id(call.args[0]): call.kwargs["mode"] for call in kaiming.call_args_list}
    assert drawn == {id(m.weight): mode for m in backbone.modules() if isinstance(m, nn.Conv2d)}
    assert [call.kwargs for call in normal.call_args_list] == [{"std": 0.01}] * linear


def test_cifar_networks_have_two_names():
    for depth in (20, 32, 44, 56, 110):
        assert BACKBONES[f"resnet{depth}"] is BACKBONES[f"resnet{depth}_cifar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet-18"}, "unknown backbone 'resnet-18'; nearest: resnet18"),
        ({"name": "VGG16"}, "unknown backbone 'VGG16'; nearest: vgg16"),
        (
            {"name": "lenet5", "norm": "layer"},
            r"norm must be None \(the network's own\) or one of batch, group, frozen, none, got 'layer'",
        ),
        ({"name": "lenet5", "num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"name": "vgg11", "in_channels": -1}, "in_channels must be 1 or more, got -1"),
        ({"name": "resnet20", "survival": 0}, "survival must be greater than 0 and at most 1, got 0"),
        ({"name": "fractalnet21_cifar", "columns": 0}, "columns must be 1 or more, got 0"),
        ({"name": "fractalnet21_cifar", "drop_path": 1.5}, "drop_path must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_backbone(**arguments)
    assert "\n" not in str(error.value)


def test_bad_norms_are_refused_by_every_family():
    for name in FAMILIES:
        with pytest.raises(ValueError, match="norm must be None"), torch.device("meta"):
            make_backbone(name, norm="instance")

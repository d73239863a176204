"""Networks of timm and torchvision as backbones, both optional, and what any pretrained network needs here.

Where these differ from the libraries' own networks: the first convolution takes any number of channels and
answers a static grey stack as it answers one frame (timm's repeated weights are 37 % off), batch
normalisation is replaced, and a pretrained network normalises its images itself, which come in 0..1. Networks
are traced with torch.fx, which leaves exactly what a map needs; timm's own feature extraction keeps, in some
families, the layers behind a map.
"""

import copy
import difflib
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn

from .norm import make_norm


class AdaptedBackbone(nn.Module):
    """A network of timm or torchvision without its classifier, with the protocol of `Backbone`.

    float32 images (B, in_channels, H, W) in 0..1 -> maps (B, C, h, w). `adapt` makes them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        in_channels: int,
        network: fx.GraphModule,
        stages: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.name = name
        self.in_channels = in_channels
        self.network = network
        """Returns the maps of all stages, a tuple."""
        self.stages = {stage: [stage] for stage in stages}
        """From a stage's name to the submodule of the original whose output it is, in order."""
        # In the file, so that a network which is built again without its pretrained weights scales as it did.
        self.register_buffer("mean", _per_channel(mean, in_channels))
        self.register_buffer("std", _per_channel(std, in_channels))

    def feature_map(self, x: Tensor, stage: str | None = None) -> Tensor:
        """(B, in_channels, H, W) -> the map (B, C, h, w) of a stage, by default of the last.

        Later stages are computed all the same until they are cut off. Raises ValueError for an unknown stage.
        """
        index = self._index(stage)
        maps: tuple[Tensor, ...] = self.network((x - self.mean) / self.std)
        return maps[index]

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's map."""
        return self.feature_map(x)

    def cut(self, stage: str) -> Self:
        """Remove, in place, all that the map of `stage` does not need; return self.

        What stays keeps its names and its tensors. Raises ValueError for an unknown stage.
        """
        count = self._index(stage) + 1
        _keep_outputs(self.network, count)
        self.stages = dict(list(self.stages.items())[:count])
        return self

    def _index(self, stage: str | None) -> int:
        names = list(self.stages)
        if stage is None:
            return len(names) - 1
        if stage not in names:
            raise ValueError(f"stage of {self.name} must be one of {', '.join(names)}, got {stage!r}")
        return names.index(stage)


def adapt(name: str, in_channels: int, pretrained: bool = False, norm: str | None = None) -> AdaptedBackbone:
    """`timm/NAME` or `torchvision/NAME` as a backbone, in training mode.

    `find_stages` says what its stages are. Networks that take images of one size alone, as most transformers
    do, are refused.

    Args:
        name: timm's names may carry the tag of their weights (`timm/resnet18.a1_in1k`).
        in_channels: channels of the images. A pretrained first convolution goes through `adapt_first_conv`,
            a random one is drawn for this number.
        pretrained: take the library's weights, which it downloads unless it has them already. Images are then
            normalised with the mean and std of its training (their averages, unless there are 3 channels).
        norm: what takes the place of batch normalisation (other layers stay): `frozen`, `group` or `none`;
            `original` or `batch` keeps it. None is frozen where pretrained and group otherwise, because batch
            statistics break target networks and batches of one.

    Raises ValueError where the library is missing or cannot be imported, for an unknown name (with the
    nearest ones), for a network without maps, and where pretrained weights cannot be had.
    """
    library, _, model = name.partition("/")
    if library not in LIBRARIES:
        raise ValueError(f"name must be timm/NAME or torchvision/NAME, got {name!r}")
    if in_channels < 1:
        raise ValueError(f"in_channels must be 1 or more, got {in_channels!r}")
    if norm is None:
        norm = "frozen" if pretrained else "group"
    norm = "batch" if norm == "original" else norm
    make_norm(norm, 1)  # refuses unknown kinds before anything is built
    built = LIBRARIES[library](name, model, in_channels, pretrained)
    network = built.network
    if in_channels != 3 and pretrained:
        network = adapt_first_conv(network, in_channels)
    network = replace_batchnorm(network, norm)
    try:
        stages = find_stages(network, in_channels)
        traced = trace_stages(network, stages, built.whole, built.functions)
    except Exception as error:  # whatever a network raises that takes other images, or looks at values
        raise ValueError(f"{name} cannot be cut into stages: {_reason(error)}") from error
    return AdaptedBackbone(name, in_channels, traced.train(), stages, built.mean, built.std)


def adapt_first_conv(module: nn.Module, in_channels: int) -> nn.Module:
    """A copy of `module` whose first convolution takes `in_channels` channels.

    The weights over the old channels are summed and shared out among the new ones, sum / in_channels each:
    a stack of equal frames gives what one grey frame gives, and that is what the old network gives for the
    frame repeated in all its channels. (Not so where a layer normalises its own weights before use.) With the
    number that it has already, the copy is equal.

    Raises ValueError where there is no 2-D convolution, or a grouped one is first.
    """
    if in_channels < 1:
        raise ValueError(f"in_channels must be 1 or more, got {in_channels!r}")
    module = copy.deepcopy(module)
    conv = first_conv(module)
    if in_channels != conv.in_channels:
        if conv.groups != 1:
            raise ValueError(
                f"in_channels: the first convolution has {conv.groups} groups of channels, "
                f"which cannot be adapted from {conv.in_channels} to {in_channels}"
            )
        weight = conv.weight.detach().sum(1, keepdim=True) / in_channels  # (O, 1, kh, kw)
        weight = weight.repeat(1, in_channels, 1, 1)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.in_channels = in_channels
    return module


def first_conv(module: nn.Module) -> nn.Conv2d:
    """The first 2-D convolution, in the order in which modules were registered. ValueError without one."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part
    raise ValueError(f"module must have a 2-D convolution, got {type(module).__name__} without one")


def replace_batchnorm(module: nn.Module, kind: str) -> nn.Module:
    """A copy of `module` with other layers in the place of every BatchNorm2d.

    `kind` as in `make_norm`: `frozen` keeps statistics, affine map and eps as constants, and so computes what
    batch normalisation computes in evaluation mode; `group` keeps the affine map; `none` keeps nothing;
    `batch` changes nothing. Raises ValueError for another, and for frozen where no statistics are tracked.
    """
    root = nn.ModuleList([copy.deepcopy(module)])  # so that a lone BatchNorm2d has a parent too
    if kind == "batch":
        return root[0]
    made: dict[nn.BatchNorm2d, nn.Module] = {}
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.BatchNorm2d):
                if child not in made:
                    made[child] = _replacement(child, kind)
                parent._modules[name] = made[child]
    return root[0]


def _replacement(old: nn.BatchNorm2d, kind: str) -> nn.Module:
    new: Any = make_norm(kind, old.num_features)
    if kind == "frozen":
        if old.running_mean is None:
            raise ValueError("kind 'frozen' needs statistics, and a BatchNorm2d here tracks none")
        new.eps = old.eps
        new.load_state_dict(old.state_dict(), strict=old.affine)
    elif kind == "group" and old.affine:
        new.load_state_dict({"weight": old.weight.detach(), "bias": old.bias.detach()})
    tensor = old.weight if old.affine else old.running_mean
    if tensor is not None:
        new.to(tensor)
    new.train(old.training)
    # timm fuses batch normalisation with the activation behind it: the activation is a child.
    following = list(old.children())
    return nn.Sequential(new, *following) if following else new


def require(package: str, wanted_by: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises ValueError, in one line: with the command that installs it where it is missing, with the reason
    where it is there but does not import. (On a CPU-only torch, torchvision raises RuntimeError, not
    ImportError.)
    """
    top = package.partition(".")[0]
    try:
        importlib.import_module(top)
        return importlib.import_module(package)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise ValueError(f'{wanted_by} needs the {top} package: pip install "foveal[{extra}]"') from error
        raise ValueError(
            f"{wanted_by}: {top} is installed but cannot be imported with torch {torch.__version__}: "
            f"{_reason(error)}"
        ) from error


# The libraries.


class _Built(NamedTuple):
    """A whole network, its first convolution random for the channels asked for, or pretrained for three."""

    network: nn.Module
    mean: Sequence[float] = (0.0,)
    """Of the images, a channel; and their standard deviation. One number is for all channels."""
    std: Sequence[float] = (1.0,)
    whole: tuple[type, ...] = ()
    """What `trace_stages` does not look into; and functions."""
    functions: tuple[Callable[..., Any], ...] = ()


def _timm(name: str, model: str, in_channels: int, pretrained: bool) -> _Built:
    timm = require("timm", name, "backbones")
    if not timm.is_model(model):
        raise _unknown(name, timm.list_models())
    try:
        network = timm.create_model(model, pretrained=pretrained, in_chans=3 if pretrained else in_channels)
    except Exception as error:  # whatever the network itself, the hub or its HTTP library raises
        raise ValueError(f"{name} cannot be built: {_reason(error)}") from error
    built = _Built(network)
    if pretrained:
        built = _Built(network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    layers = importlib.import_module("timm.layers")
    return built._replace(
        whole=tuple(layers.get_notrace_modules()), functions=tuple(layers.get_notrace_functions())
    )


def _torchvision(name: str, model: str, in_channels: int, pretrained: bool) -> _Built:
    models = require("torchvision.models", name, "backbones")
    known = models.list_models(module=models)
    if model not in known:
        raise _unknown(name, known)
    inception = model in ("googlenet", "inception_v3")
    network = models.get_model(model, weights=None, **({"init_weights": True} if inception else {}))
    if not pretrained:
        if in_channels != 3:
            network = adapt_first_conv(network, in_channels)  # and new weights, drawn as torchvision does
            nn.init.kaiming_normal_(first_conv(network).weight, mode="fan_out", nonlinearity="relu")
        return _Built(network)
    weights = models.get_model_weights(model).DEFAULT
    try:
        network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    except Exception as error:
        raise ValueError(f"{name} has no pretrained weights here: {_reason(error)}") from error
    if inception:  # trained on pixels in -1..1, which torchvision hides in a transform inside the network
        return _Built(network, (0.5,), (0.5,))
    images = weights.transforms()
    return _Built(network, images.mean, images.std)


LIBRARIES: dict[str, Callable[[str, str, int, bool], _Built]] = {"timm": _timm, "torchvision": _torchvision}


# Cutting any network into stages.


def find_stages(network: nn.Module, in_channels: int) -> list[str]:
    """Submodules that give a network's maps: for each size of map the last that has it, from large to small.

    Looked at are the network's own submodules, and those of a plain Sequential among them: what is inside a
    block is no stage. Shapes alone are computed, on the meta device. The images are not square, which tells
    maps from poolings to a fixed size and from layouts that do not end in (h, w). Raises ValueError where
    there are none.
    """
    batch, height, width = 2, 224, 320
    found: dict[tuple[int, int], str] = {}

    def look(path: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4 or len(output) != batch:
            return
        h, w = output.shape[2:]
        if h > 1 and abs(h * width - w * height) <= width:
            found[h, w] = path

    def watch(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            if name == "classifier":  # SqueezeNet's is a convolution
                continue
            path = prefix + name
            child.register_forward_hook(lambda _, __, output, path=path: look(path, output))
            if type(child) is nn.Sequential:
                watch(child, f"{path}.")

    probe = copy.deepcopy(network).to("meta").eval()
    watch(probe, "")
    with torch.no_grad():
        probe(torch.zeros(batch, in_channels, height, width, device="meta"))
    if not found:
        raise ValueError("it has no maps (B, C, h, w)")
    return [found[size] for size in sorted(found, reverse=True)]


class _Tracer(fx.Tracer):
    """Modules without submodules are kept whole, and so is what a library says cannot be traced."""

    def __init__(self, whole: tuple[type, ...], functions: tuple[Callable[..., Any], ...]):
        super().__init__(autowrap_functions=functions)
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not list(m.children()) or isinstance(m, self.whole)


def trace_stages(
    network: nn.Module,
    stages: Sequence[str],
    whole: tuple[type, ...] = (),
    functions: tuple[Callable[..., Any], ...] = (),
) -> fx.GraphModule:
    """A network that returns a tuple of the maps of `stages` and has nothing else.

    Traced in evaluation mode, since auxiliary classifiers belong to training. Modules such as dropout still
    follow the mode that the network is in. Modules of the types `whole` and calls of `functions` are not
    looked into. It shares the modules of `network`, which work in place no more.
    """
    network.eval()
    for module in network.modules():
        if getattr(module, "inplace", False):  # it would overwrite one stage's map on the way to the next
            module.inplace = False  # type: ignore[assignment]
    graph = _Tracer((nn.BatchNorm2d, *whole), functions).trace(network)
    last: dict[str, fx.Node] = {}
    for node in graph.nodes:
        for path in node.meta.get("nn_module_stack", {}):
            last[path] = node
    (output,) = graph.find_nodes(op="output")
    output.args = (tuple(last[stage] for stage in stages),)
    traced = fx.GraphModule(network, graph)
    _keep_outputs(traced, len(stages))
    return traced


def _keep_outputs(traced: fx.GraphModule, count: int) -> None:
    """Keep the first `count` outputs of a traced network, and of its modules those that they need."""
    (output,) = traced.graph.find_nodes(op="output")
    output.args = (output.args[0][:count],)
    # Assertions on values that are used nowhere else would keep the layers behind those alive.
    traced.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    traced.delete_all_unused_submodules()
    traced.recompile()


def _per_channel(values: Sequence[float], channels: int) -> Tensor:
    """(1, channels, 1, 1): as many values as there are channels, or the mean of them for each."""
    tensor = torch.tensor(list(values), dtype=torch.float32)
    if len(tensor) != channels:
        tensor = tensor.mean().repeat(channels)
    return tensor.view(1, channels, 1, 1)


def _unknown(name: str, known: Sequence[str]) -> ValueError:
    library, _, model = name.partition("/")
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.4) or list(known)[:3]
    return ValueError(f"unknown model {name!r}; nearest: {', '.join(f'{library}/{n}' for n in near)}")


def _reason(error: Exception) -> str:
    """An error of any length in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"

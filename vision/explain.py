"""Looking inside trained networks: what in an image its scores rest on, and what its features respond to.

Attributions are captum's: saliency (Simonyan et al. 2013, 1312.6034), guided backpropagation (Springenberg et
al. 2014, 1412.6806), integrated gradients (Sundararajan et al. 2017, 1703.01365) and occlusion (Zeiler and
Fergus 2013, 1311.2901). Where we deviate: guided backpropagation changes ReLUs as they are called, while
captum 0.9 hooks their modules, misses ReLUs that are functions, and clips the gradient of a skip connection
that begins at the input of a ReLU. Whether a method shows what was learned is what "Sanity Checks for
Saliency Maps" (Adebayo et al. 2018, 1810.03292) ask; guided backpropagation largely does not.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .adapters import require

METHODS = ("saliency", "guided-backprop", "integrated-gradients", "occlusion")
OPTIONS: dict[str, tuple[str, ...]] = {
    "integrated-gradients": ("baseline", "steps"),
    "occlusion": ("baseline", "window", "stride"),
}
"""What `attribute` takes beside its arguments, by method."""


def attribute(function: nn.Module, x: Tensor, target: Tensor, method: str, **options: Any) -> Tensor:
    """What each value of each image adds to the score of its target.

    Computed on a copy of `function` in evaluation mode: the original is not touched. Each image must be
    scored by itself; `function` may be called with several copies of the batch in a row (x_1 .. x_B, x_1 ..
    x_B, ...).

    Args:
        function: images (B, C, H, W) to scores (B, K): logits, Q-values, log-probabilities.
        x: images (B, C, H, W), floating point, in the values that `function` takes.
        target: (B,) int64, the score of each image that is explained, in 0..K-1.
        method: `saliency`: |d score / d x|. `guided-backprop`: d score / d x, where each ReLU passes back
            only what is positive. `integrated-gradients`: shares of score(x) - score(baseline), which they
            add up to. `occlusion`: the mean fall of the score over the windows that cover a pixel, each set
            to the baseline in all channels.
        options: `baseline` of integrated-gradients and occlusion, a number or a tensor that broadcasts to x,
            0 by default, which is black; `steps` of integrated-gradients, points on the line from the
            baseline (50); `window` and `stride` of occlusion, in pixels (an eighth of the shorter side, and
            half the window).

    Returns:
        (B, C, H, W) of x's dtype, on its device.

    Raises ValueError for other shapes, targets, methods and options, where captum is missing, and for guided
    backpropagation through a network without ReLU.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if unknown := sorted(set(options) - set(OPTIONS.get(method, ()))):
        allowed = ", ".join(OPTIONS.get(method, ())) or "no options"
        raise ValueError(f"{method} takes {allowed}, got {', '.join(unknown)}")
    if x.ndim != 4 or not x.is_floating_point() or not len(x):
        raise ValueError(f"x must be floating-point images (B, C, H, W), got {x.dtype} {tuple(x.shape)}")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 ({len(x)},), got {target.dtype} {tuple(target.shape)}")
    captum: Any = require("captum.attr", method, "explain")

    copied = copy.deepcopy(function).eval().requires_grad_(False)
    for module in copied.modules():
        if getattr(module, "inplace", False):  # one that comes first would overwrite the images
            module.inplace = False  # type: ignore[assignment]
    device = _device(function, x)
    images, targets = x.detach().to(device, copy=True), target.to(device)
    with torch.no_grad():
        scores = copied(images)
    if scores.ndim != 2 or len(scores) != len(x):
        raise ValueError(f"function must give scores ({len(x)}, K), got {tuple(scores.shape)}")
    if targets.min() < 0 or targets.max() >= scores.shape[1]:
        raise ValueError(f"target must be in 0..{scores.shape[1] - 1}, got {target.tolist()}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum tells that it asks for the gradient of the images
        result: Tensor
        match method:
            case "saliency":
                result = captum.Saliency(copied).attribute(images, targets, abs=True)
            case "guided-backprop":
                with _GuidedReLUs() as relus:
                    result = captum.Saliency(copied).attribute(images, targets, abs=False)
                if not relus.count:
                    raise ValueError(
                        f"guided-backprop needs a network with ReLU, got {type(function).__name__}"
                    )
            case "integrated-gradients":
                steps = _positive("steps", options.get("steps", 50))
                result = captum.IntegratedGradients(copied).attribute(
                    images,
                    baselines=_baseline(options, images),
                    target=targets,
                    n_steps=steps,
                    internal_batch_size=max(len(x), EVALUATED),
                )
            case _:
                result = _occlusion(captum.Occlusion(copied), images, targets, options)
    return result.detach().to(x)


EVALUATED = 64
"""Images that a method of many evaluations puts into one batch, or one copy of the batch if that is more."""


def _occlusion(method: Any, images: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
    channels, height, width = images.shape[1:]
    side = min(height, width)
    window = _positive("window", options.get("window", max(1, round(side / 8))))
    stride = _positive("stride", options.get("stride", max(1, window // 2)))
    if window > side:
        raise ValueError(f"window must be at most the shorter side, {side} pixels, got {window}")
    if stride > window:
        raise ValueError(f"stride must be at most the window, {window} pixels, got {stride}")
    return method.attribute(
        images,
        (channels, window, window),
        strides=(channels, stride, stride),
        baselines=_baseline(options, images),
        target=targets,
        perturbations_per_eval=max(1, EVALUATED // len(images)),
    )


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    return value


def _baseline(options: dict[str, Any], images: Tensor) -> Tensor:
    baseline = torch.as_tensor(options.get("baseline", 0.0), dtype=images.dtype, device=images.device)
    try:
        return baseline.expand_as(images)
    except RuntimeError as error:
        raise ValueError(
            f"baseline must broadcast to {tuple(images.shape)}, got {tuple(baseline.shape)}"
        ) from error


class _GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad.clamp(min=0) * (y > 0)


class _GuidedReLUs(TorchFunctionMode):
    """While it is entered, every ReLU, module or function, passes back only what is positive."""

    functions = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.functions:
            return func(*args, **(kwargs or {}))
        self.count += 1
        given = {**dict(zip(("input", "inplace"), args)), **(kwargs or {})}
        x: Tensor = given["input"]
        y: Tensor = _GuidedReLU.apply(x)
        return x.copy_(y) if given.get("inplace") or func in (torch.relu_, Tensor.relu_) else y


def _device(module: nn.Module, x: Tensor) -> torch.device:
    return next((tensor.device for tensor in module.parameters()), x.device)


# Filters, features, patches.


def first_layer_filters(module: nn.Module, image_shape: tuple[int, ...] | None = None) -> Tensor:
    """Weights of the first 2-D convolution or linear layer, as images (O, C, kh, kw), a copy on the CPU.

    First is what was registered first. A linear layer sees whole images, flattened, of `image_shape` (C, H,
    W): its filters are (O, C, H, W). Raises ValueError where there is neither layer, and where `image_shape`
    is missing or does not fit a linear layer.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.weight.detach().cpu().clone()
        if isinstance(part, nn.Linear):
            weight = part.weight.detach().cpu().clone()
            if image_shape is None or len(image_shape) != 3 or math.prod(image_shape) != weight.shape[1]:
                raise ValueError(
                    f"image_shape must be (C, H, W) with C H W = {weight.shape[1]}, the inputs of the first "
                    f"linear layer, got {image_shape!r}"
                )
            return weight.view(-1, *image_shape)
    raise ValueError(f"module must have a 2-D convolution or a linear layer, got {type(module).__name__}")


def embed(features: Tensor | np.ndarray, method: str = "pca", seed: int = 0) -> np.ndarray:
    """Features (N, ...), flattened, as points in the plane: (N, 2) float32.

    `pca`: the two directions of largest variance, centred. `tsne`: t-SNE (van der Maaten and Hinton 2008),
    begun from them, at a perplexity of 30 or a third of the points if that is less; distances between far
    points say little. Raises ValueError for fewer than 3 points, fewer than 2 features, or values that are
    not finite.
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method must be pca or tsne, got {method!r}")
    values = features.numpy(force=True) if isinstance(features, Tensor) else np.asarray(features)
    values = values.reshape(len(values), -1).astype(np.float64)
    if len(values) < 3 or values.shape[1] < 2:
        raise ValueError(f"features must be 3 or more of 2 or more dimensions, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("features must be finite, got NaN or infinity")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "pca":
        points = PCA(2, random_state=seed).fit_transform(values)
    else:
        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)
    return np.asarray(points, np.float32)


def maximal_patches(network_part: nn.Module, images: Tensor, channel: int, k: int) -> tuple[Tensor, Tensor]:
    """The patches that move a channel of a feature map most, at most one an image, strongest first.

    Computed on a copy of `network_part` in evaluation mode. A patch is the receptive field of one place in
    the map (see `receptive_field`), padded with zeros where it reaches over the border of the image.

    Args:
        network_part: images (N, C, H, W) float32 to maps (N, C', h, w).
        images: (N, C, H, W), any dtype.
        channel: of the map, in 0..C'-1.
        k: number of patches; fewer where there are fewer images.

    Returns:
        patches (k, C, ph, pw) of the dtype of the images, and positions (k, 3) int64: image, top row and left
        column, in pixels, negative where the patch begins outside the image.

    Raises ValueError for other shapes and numbers.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k!r}")
    copied = copy.deepcopy(network_part).eval()
    device = _device(network_part, images)
    best, places = [], []
    with torch.no_grad():
        for batch in images.split(EVALUATED):
            maps = copied(batch.to(device).float())
            shape = tuple(maps.shape)
            if maps.ndim != 4 or not 0 <= channel < maps.shape[1]:
                raise ValueError(f"channel must be one of a map (N, C, h, w), got {channel!r} and {shape}")
            strengths, where = maps[:, channel].flatten(1).max(1)
            best.append(strengths.cpu())
            places.append(where.cpu())
    chosen = torch.cat(best).topk(min(k, len(images))).indices
    height, width = maps.shape[2:]
    cells = [divmod(int(place), width) for place in torch.cat(places)[chosen]]
    fields = receptive_field(network_part, tuple(images.shape[1:]), [*cells, (height // 2, width // 2)])
    full = [max(stop - start for start, stop in axis) for axis in zip(*fields)]

    patches, positions = [], []
    for index, field in zip(chosen.tolist(), fields):
        # A field that is shorter than the others is cut off by the border that it is nearer to.
        begins = [
            stop - size if start < side - stop else start
            for (start, stop), size, side in zip(field, full, images.shape[2:])
        ]
        (top, bottom), (left, right) = field
        patch = images.new_zeros(images.shape[1], *full)
        inside = images[index, :, top:bottom, left:right]
        row, column = top - begins[0], left - begins[1]
        patch[:, row : row + bottom - top, column : column + right - left] = inside
        patches.append(patch)
        positions.append([index, *begins])
    return torch.stack(patches), torch.tensor(positions)


Span = tuple[int, int]


def receptive_field(
    network_part: nn.Module, image_shape: tuple[int, ...], cells: Sequence[tuple[int, int]]
) -> list[tuple[Span, Span]]:
    """For each cell (row, column) of a map, the pixels that it can depend on: ((top, bottom), (left, right)).

    Where the gradient with respect to an image (C, H, W) is not zero, in a copy in which no path is closed:
    all weights positive, ReLUs the identity, means in the place of maxima, and no normalisation, which would
    make everything depend on everything. Stops are exclusive; where no gradient arrives at all, the whole
    image.
    """
    opened = nn.ModuleList([copy.deepcopy(network_part).eval()]).cpu()
    for module in list(opened.modules()):
        for name, child in list(module.named_children()):
            if "Norm" in type(child).__name__ and not list(child.children()):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for name, parameter in opened.named_parameters():
            many = parameter[0].numel() if parameter.ndim else 1
            parameter.fill_(0.0 if name.endswith("bias") else 1 / many)
    x = torch.zeros(1, *image_shape, requires_grad=True)
    with torch.enable_grad(), _Opened():
        maps = opened[0](x).sum(1)[0]  # (h, w)
        gradients = [torch.autograd.grad(maps[cell], x, retain_graph=True)[0] for cell in cells]
    return [
        (_span(touched.any(1)), _span(touched.any(0))) for touched in (g[0].ne(0).any(0) for g in gradients)
    ]


def _span(touched: Tensor) -> Span:
    (where,) = touched.nonzero(as_tuple=True)
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, len(touched))


class _Opened(TorchFunctionMode):
    """While it is entered, max pooling is average pooling, and ReLU and ReLU6 are the identity."""

    identity = (*_GuidedReLUs.functions, F.relu6, F.hardtanh)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.identity:
            return args[0] if args else kwargs["input"]
        return (_mean_pool if func in (F.max_pool2d, torch.max_pool2d) else func)(*args, **kwargs)


def _mean_pool(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *_: Any,
    ceil_mode: bool = False,
    **__: Any,
) -> Tensor:
    return F.avg_pool2d(x, kernel_size, stride or kernel_size, padding, ceil_mode)


# Pictures.

SIDE = 256
"""Pixels that the shorter side of a picture has at least."""


def overlay(
    image: Tensor | np.ndarray,
    heat: Tensor | np.ndarray | None = None,
    limit: float | None = None,
    signed: bool | None = None,
) -> np.ndarray:
    """An image under a heat map, enlarged without smoothing: (H', W', 3) uint8.

    Under a map the image is grey, and the stronger the map, the more its colour covers it; where it is 0 the
    image shows. Colours are matplotlib's: `inferno`, or for signed maps `bwr`, red above 0 and blue below.

    Args:
        image: (C, H, W) uint8: grey, RGB, or a stack of frames, of which the last is shown. Binary planes (no
            value above 1) are shown in a colour each.
        heat: (H, W), finite, or None for the image alone.
        limit: magnitude of full colour; by default the map's 99th percentile, or its largest where that is 0.
            A film needs one for all its frames.
        signed: whether the map is one of both signs; by default, whether it has a negative value.

    Raises ValueError for other shapes, dtypes and values.
    """
    picture = _rgb(image)
    if heat is not None:
        values = heat.numpy(force=True) if isinstance(heat, Tensor) else np.asarray(heat)
        values = values.astype(np.float64)
        if values.shape != picture.shape[:2]:
            raise ValueError(f"heat must be of the image's shape {picture.shape[:2]}, got {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError("heat must be finite, got NaN or infinity")
        picture = _blend(picture, values, limit, signed)
    factor = math.ceil(SIDE / min(picture.shape[:2]))
    return picture.repeat(factor, 0).repeat(factor, 1)


def _blend(picture: np.ndarray, heat: np.ndarray, limit: float | None, signed: bool | None) -> np.ndarray:
    if limit is None:  # single pixels often stand out by far
        limit = float(np.quantile(np.abs(heat), 0.99)) or float(np.abs(heat).max()) or 1.0
    if not limit > 0:
        raise ValueError(f"limit must be greater than 0, got {limit!r}")
    heat = np.clip(heat / limit, -1.0, 1.0)
    if signed is None:
        signed = bool((heat < 0).any())
    colors = _colormap("bwr")(heat / 2 + 0.5) if signed else _colormap("inferno")(heat)  # (H, W, 4) in 0..1
    opacity = 0.8 * np.sqrt(np.abs(heat))[..., None]  # the root, because most maps are few peaks over little
    grey = picture @ np.array([0.299, 0.587, 0.114])  # (H, W), as television weighs colours
    return np.rint((1 - opacity) * grey[..., None] + opacity * 255 * colors[..., :3]).astype(np.uint8)


def _rgb(image: Tensor | np.ndarray) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3) uint8, as `overlay` says."""
    pixels = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image must be uint8 (C, H, W), got {pixels.dtype} {pixels.shape}")
    channels, height, width = pixels.shape
    binary = pixels.max() <= 1
    if binary and channels not in (1, 3):
        picture = np.zeros((height, width, 3), np.uint8)
        for plane, color in zip(pixels, _colormap("tab10")(np.arange(channels) % 10)):
            picture[plane > 0] = np.rint(255 * color[:3])
        return picture
    shown = pixels if channels == 3 else pixels[-1:].repeat(3, 0)
    return shown.transpose(1, 2, 0) * np.uint8(255 if binary else 1)


def _colormap(name: str) -> Callable[[np.ndarray], np.ndarray]:
    import matplotlib

    return matplotlib.colormaps[name]


def grid(pictures: Sequence[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of any sizes side by side, row by row, on white: one picture (H', W', 3)
    uint8.

    Every cell is as large as the largest picture, which lies in its upper left corner; `gap` pixels of white
    lie between cells and around them all. Raises ValueError for no pictures, other shapes, or fewer than 1
    column.
    """
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns!r}")
    if not pictures:
        raise ValueError("pictures must be one or more, got none")
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"pictures must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    height, width = (max(picture.shape[axis] for picture in pictures) + gap for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = gap + index // columns * height, gap + index % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet

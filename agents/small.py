"""Small networks without modules and autograd, whose calls there cost more than the sums.

`InNumpy` and `OneConvolution` act, `Layers` learns. All read the weights where they lie, so that nothing is
copied and every optimizer step is seen at once; all give the network's numbers up to rounding.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from ..vision import MLP, MinAtarCNN, TanhMLP
from ..vision.encoder import box_scale

LARGEST = 2**17
"""Products in a layer, over all rows, beyond which numpy gains nothing and would start threads of its own."""


def plain(encoder: nn.Module, head: nn.Linear, space: spaces.Space) -> list[nn.Linear] | None:
    """The linear layers of `head(encoder(obs))` where the encoder is `mlp` or `mlp-tanh` on the CPU, for
    vectors of floats, and nothing stands between them but one kind of activation; else None."""
    vectors = isinstance(space, spaces.Box) and len(space.shape) == 1 and space.dtype == np.float32
    if not vectors or type(encoder) not in (MLP, TanhMLP) or head.weight.device.type != "cpu":
        return None
    return [module for module in (*encoder.modules(), head) if isinstance(module, nn.Linear)]


class InNumpy:
    """`head(encoder(obs))` as a function of a few observations (B, n), of what is `plain`."""

    def __init__(self, encoder: nn.Module, head: nn.Linear, linears: Sequence[nn.Linear]):
        self.encoder, self.head, self.linears = encoder, head, linears
        self.tanh = isinstance(encoder, TanhMLP)
        self.layers = [(linear.weight.detach().numpy().T, linear.bias.detach().numpy()) for linear in linears]
        self.largest = max(weight.size for weight, _ in self.layers)

    def __call__(self, obs: Tensor) -> Tensor:
        if len(obs) * self.largest > LARGEST:
            return self.head(self.encoder(obs))
        x = obs.numpy()
        for weight, bias in self.layers[:-1]:
            x = x @ weight
            x += bias
            if self.tanh:
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0, out=x)
        weight, bias = self.layers[-1]
        return torch.from_numpy(x @ weight + bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InNumpy":
        """Of a copied network the copy's weights; arrays would be copied for themselves."""
        return InNumpy(*copy.deepcopy((self.encoder, self.head, self.linears), memo))


FEW, SMALL = 32, 4096
"""Images, and numbers in a map of 16 filters, up to which `OneConvolution` is surely quicker than modules."""


class OneConvolution:
    """`head(encoder(obs))` as a function of a few images (B, C, H, W), where the encoder is `minatar` on the
    CPU: in half of the modules' time. For 10x10 pixels copying the patches under the kernel and a product
    take a third of what the library's convolution does."""

    def __init__(self, encoder: MinAtarCNN, head: nn.Linear):
        self.encoder, self.head = encoder, head
        self.scale = box_scale(encoder.observation_space)  # type: ignore[arg-type]
        convolution: Any = encoder.conv[0]
        linear: Any = encoder.head[1]
        self.side: int = convolution.kernel_size[0]
        self.kernel = convolution.weight.detach()
        self.offset = convolution.bias.detach().unsqueeze(1)
        self.linear = (linear.weight.detach(), linear.bias.detach())

    def __call__(self, obs: Tensor) -> Tensor:
        images, channels, height, width = obs.shape
        if images > FEW:
            return self.head(self.encoder(obs))
        x = obs.float().contiguous()
        x = x if self.scale == 1 else x / self.scale
        k = self.side
        h, w = height - k + 1, width - k + 1
        image, channel, row, column = x.stride()
        patches = x.as_strided(
            (images, channels, k, k, h, w), (image, channel, row, column, row, column)
        ).reshape(images, channels * k * k, h * w)
        kernel = self.kernel.flatten(1)  # now, because an agent's is channels last, of which this is a copy
        maps = torch.baddbmm(self.offset, kernel.expand(images, -1, -1), patches).relu_()
        features = F.linear(maps.flatten(1), *self.linear).relu_()
        return F.linear(features, self.head.weight, self.head.bias)


def without_modules(
    encoder: nn.Module, head: nn.Linear, space: spaces.Space
) -> InNumpy | OneConvolution | None:
    """A quicker `head(encoder(obs))` for acting in a few environments, where there is one; else None."""
    if type(encoder) is MinAtarCNN and head.weight.device.type == "cpu":
        linear: Any = encoder.head[1]
        if linear.in_features <= SMALL:
            return OneConvolution(encoder, head)
    linears = plain(encoder, head, space)
    return None if linears is None else InNumpy(encoder, head, linears)


class Layers:
    """Linear layers with tanh or ReLU in between, forwards and, by the chain rule, backwards."""

    def __init__(self, linears: Sequence[nn.Linear], tanh: bool, gradient_of: Mapping[Tensor, Tensor]):
        """`gradient_of` says where the gradient of each parameter goes."""
        self.weights = [linear.weight.detach() for linear in linears]
        self.turned = [weight.t() for weight in self.weights]
        self.biases = [linear.bias.detach() for linear in linears]
        self.gradients = [(gradient_of[linear.weight], gradient_of[linear.bias]) for linear in linears]
        self.tanh = tanh
        self.inputs: list[Tensor] = []
        """What each layer saw in the last `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs)."""
        self.inputs = [x]
        for weight, bias in zip(self.turned[:-1], self.biases):
            x = torch.addmm(bias, x, weight)
            x = x.tanh_() if self.tanh else x.relu_()
            self.inputs.append(x)
        return torch.addmm(self.biases[-1], x, self.turned[-1])

    def backward(self, gradient: Tensor) -> None:
        """d loss / d outputs of the last `forward` -> d loss / d parameters, where they go.

        Rows at the end that the loss does not depend on may be left out.
        """
        rows = gradient.shape[0]
        for i in reversed(range(len(self.weights))):
            x, (weight, bias) = self.inputs[i][:rows], self.gradients[i]
            torch.mm(gradient.t(), x, out=weight)
            torch.sum(gradient, 0, out=bias)
            if i > 0:
                gradient = gradient @ self.weights[i]
                slope = torch.ops.aten.tanh_backward if self.tanh else torch.ops.aten.threshold_backward
                gradient = slope(gradient, x) if self.tanh else slope(gradient, x, 0)


def plain_layers(
    encoder: nn.Module, head: nn.Linear, space: spaces.Space, gradient_of: Mapping[Tensor, Tensor]
) -> Layers | None:
    """`Layers` of `head(encoder(obs))` where that is `plain` and all of it is trained; else None.

    `gradient_of` says where the gradient of each trained parameter goes.
    """
    linears = plain(encoder, head, space)
    if linears is None or not all(p in gradient_of for linear in linears for p in linear.parameters()):
        return None
    return Layers(linears, isinstance(encoder, TanhMLP), gradient_of)

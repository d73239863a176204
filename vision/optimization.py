"""Flat parameters: one tensor for all weights, so that an optimizer step is one kernel, not one a layer.

The arithmetic is elementwise, so the same lines serve weights (P,) and the weights of S seeds (S, P).
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.radam import radam


class Flattened(nn.Parameter):
    """A parameter that shares memory with others. Copies of them share theirs, when all are copied in one go:
    PyTorch's own would each get memory of its own, and a copied agent's steps would not reach its network."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Flattened":
        if id(self) not in memo:
            memo[id(self)] = Flattened(copy.deepcopy(self.data, memo), self.requires_grad)
        return memo[id(self)]


def flatten_parameters(module: nn.Module) -> Flattened:
    """Move a module's trainable parameters into one contiguous tensor (P,) and return it.

    The module goes on working, and `copy.deepcopy` of what holds both: its parameters become views into the
    returned tensor, in the order of `module.parameters()`, each with the memory layout that it had (channels
    last, say). Call it after `.to(device)`, which would cut the views loose.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in parameters])
    for parameter, view in zip(parameters, views_of(flat, parameters)):
        parameter.data = view
        parameter.__class__ = Flattened
    return Flattened(flat)


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a flat tensor (P,) with the shapes and memory layouts of `parameters`."""
    parts = flat.split([p.numel() for p in parameters])
    return [part.as_strided(p.shape, p.stride(), part.storage_offset()) for part, p in zip(parts, parameters)]


def with_modes(network: nn.Module) -> list[nn.Module]:
    """The modules that may act differently in training: dropout, batch statistics, or anything of one's own.

    `set_training` on these does what `network.train()` does, which takes a tenth of a small network's update.
    """
    return [module for module in network.modules() if type(module) not in WITHOUT_MODES]


WITHOUT_MODES = {
    nn.Conv2d, nn.Flatten, nn.GroupNorm, nn.LayerNorm, nn.Linear, nn.MaxPool2d, nn.ModuleList, nn.ReLU,
    nn.Sequential, nn.Tanh,
}  # fmt: skip


def set_training(modules: Sequence[nn.Module], training: bool) -> None:
    for module in modules:
        # Past nn.Module's __setattr__, which looks for parameters and modules first: twenty times as fast.
        module.__dict__["training"] = training


def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next batch, up to 64 MB of it.

    glibc returns what is free at the top of its heap to the system beyond twice the largest block that was
    ever mapped and freed, and fetching it again page by page took 7 % of an update. So free one of 32 MB.
    It is never touched, hence never resident; other C libraries don't mind.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def take_gradient(loss: Tensor, parameters: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """Write d loss / d parameters into `views` of a flat gradient, made once by `views_of`.

    Kept from step to step, because memory of this size would go back to the system each time. Parameters
    that the loss does not depend on get zeros.
    """
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for view, gradient in zip(views, gradients):
        view.copy_(gradient)


def clip_norm(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale gradients (..., P), in place, down to an L2 norm of at most `max_norm` along the last axis."""
    norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
    return gradient.div_((norm / max_norm).clamp(min=1.0))


def linear(initial: float, final: float | None, progress: float) -> float:
    """From `initial` at the beginning of a training to `final` at its end; None keeps it at `initial`."""
    return initial if final is None else initial + min(1.0, progress) * (final - initial)


class Adam(NamedTuple):
    """What `adam_step` keeps: running means of gradients and of their squares (..., P), and the steps taken.

    The steps are a float32 scalar tensor, because CUDA graphs capture no Python numbers.
    """

    mean: Tensor
    square: Tensor
    steps: Tensor


def adam_state(weights: Tensor) -> Adam:
    """The state before the first step."""
    return Adam(torch.zeros_like(weights), torch.zeros_like(weights), weights.new_zeros(()))


@torch.no_grad()
def adam_step(
    weights: Tensor,
    gradient: Tensor,
    state: Adam,
    learning_rate: float | Tensor,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """One step of Adam (Kingma and Ba 2014, 1412.6980, algorithm 1), in place. Tensors are (..., P).

    torch's own kernel through its functional form: the class torch.optim.Adam imports torch's compiler at its
    first use, which is a second of every start.
    """
    mean, square, steps = state
    adam(
        *([weights], [gradient], [mean], [square], [], [steps]),
        fused=True,
        grad_scale=None,
        found_inf=None,
        amsgrad=False,
        maximize=False,
        weight_decay=0.0,
        beta1=betas[0],
        beta2=betas[1],
        lr=learning_rate,
        eps=eps,
    )


class RMSprop(NamedTuple):
    """What `rmsprop_step` keeps: the running mean of the gradients' squares (..., P)."""

    square: Tensor


def rmsprop_state(weights: Tensor, tensorflow: bool = False) -> RMSprop:
    """The state before the first step: zeros, or TensorFlow's ones, which make the first steps short."""
    return RMSprop((torch.ones_like if tensorflow else torch.zeros_like)(weights))


@torch.no_grad()
def rmsprop_step(
    weights: Tensor,
    gradient: Tensor,
    state: RMSprop,
    learning_rate: float,
    eps: float = 1e-8,
    decay: float = 0.99,
    tensorflow: bool = False,
) -> None:
    """One step of RMSprop (Tieleman and Hinton 2012), in place.

    Epsilon is added to the root, as in torch.optim.RMSprop, or as in TensorFlow under it.
    """
    state.square.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
    root = state.square.add(eps).sqrt_() if tensorflow else state.square.sqrt().add_(eps)
    weights.addcdiv_(gradient, root, value=-learning_rate)


@torch.no_grad()
def radam_step(
    weights: Tensor, gradient: Tensor, state: Adam, learning_rate: float, eps: float = 1e-8
) -> None:
    """One step of RAdam (Liu et al. 2019, 1908.03265, algorithm 2), in place. Tensors are (..., P).

    Its state is Adam's. On a GPU it is torch's RAdam, which CUDA graphs capture. On a CPU that takes four to
    ten times as long as Adam's fused kernel, so the same numbers come out of that one: a rectified step is
    Adam's with another step size and epsilon.
    """
    mean, square, steps = state
    beta1, beta2 = 0.9, 0.999
    if weights.is_cuda:
        radam(
            *([weights], [gradient], [mean], [square], [steps]),
            foreach=False,
            capturable=True,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=0.0,
            eps=eps,
        )
        return
    step = int(steps) + 1
    unbias = 1 - beta2**step  # what the mean of squares is divided by
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / unbias
    if length > 5:  # the variance of the mean of squares is known well enough
        ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        adam_step(weights, gradient, state, learning_rate * math.sqrt(ratio), eps / math.sqrt(unbias))
    else:
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        weights.add_(mean, alpha=-learning_rate / (1 - beta1**step))
        steps += 1


def compile_or_eager(function: Callable[..., Tensor], *example: object) -> Callable[..., Tensor]:
    """`torch.compile(function)`, tried on an example; the function itself where this machine cannot compile.

    A machine without a C++ compiler must train, only slower.
    """
    compiled = torch.compile(function)
    try:
        compiled(*example)
    except Exception as error:  # whatever the compiler stack raises, eager is right and slower
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"torch.compile does not work here ({reason}); training goes on without it", stacklevel=2
        )
        return function
    return compiled

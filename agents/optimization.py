"""Flat parameters: one tensor for all weights, so that an optimizer step is one kernel, not one a layer.

The arithmetic is elementwise, so the same lines serve weights (P,) and the weights of S seeds (S, P).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Move a module's trainable parameters into one contiguous tensor (P,) and return it.

    The module goes on working: its parameters become views into the returned tensor, in the order of
    `module.parameters()`, each with the memory layout that it had (channels last, say). Call it after
    `.to(device)`, which would cut the views loose.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().as_strided((p.numel(),), (1,)) for p in parameters])
    for parameter, view in zip(parameters, views_of(flat, parameters)):
        parameter.data = view
    return nn.Parameter(flat)


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a flat tensor (P,) with the shapes and memory layouts of `parameters`."""
    parts = flat.split([p.numel() for p in parameters])
    return [part.as_strided(p.shape, p.stride(), part.storage_offset()) for part, p in zip(parts, parameters)]


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
    weights: Tensor, gradient: Tensor, state: Adam, learning_rate: float | Tensor, eps: float = 1e-8
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
        beta1=0.9,
        beta2=0.999,
        lr=learning_rate,
        eps=eps,
    )


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

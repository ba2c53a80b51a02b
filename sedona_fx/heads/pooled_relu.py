"""Mean over positions of relu(W x + b), twice differentiable, without ever storing what is averaged.

W x is many times wider than both the input and the result. It is therefore computed in pieces that fit in the cache,
all in the same work space, and recomputed where a derivative needs to know where it is positive. Given that mask M the
rest is linear, and its derivatives are written out by hand. With S positions per example, g the gradient of the mean,
and (u, V, c) the cotangents of the gradients of (x, W, b):

    first     of x: W^T (M g) / S       of W: sum of (M g) x^T / S      of b: sum of M g / S
    second    of x: V^T (M g) / S       of W: sum of (M g) u^T / S      of g: mean of M (W u + V x + c)

Autograd's own operators under `torch.utils.checkpoint` give the same numbers but take several times as long on a CPU:
each of them fills memory that it has to allocate first, and adding the bias copies it. Here the bias is one more column
of W.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of W x in one piece. On a CPU 1 MiB of float32, which fits in the cache of one core; on other devices enough
# to keep them busy.
_CPU_ELEMENTS, _OTHER_ELEMENTS = 2**18, 2**24


def pooled_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``relu(x @ weight.T + bias).mean(1)``.

    Only the arguments are kept for the derivatives.

    Args:
        x: (N, S, C): N examples of S positions.
        weight: (F, C).
        bias: (F,). All three have the same dtype.

    Returns:
        The means, (N, F).

    Raises:
        RuntimeError: in a third derivative, which is not implemented.
    """
    pooled: Tensor = _PooledRelu.apply(x, weight, bias)
    return pooled


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the `backward` of an autograd function that cannot be differentiated again, and make an attempt raise.

    PyTorch's `once_differentiable` raises only when a further derivative is propagated through the function. If
    autograd prunes the function from the graph, since no path leads from it to the tensors asked for, that part of the
    derivative is silently left out. This decorator raises as soon as `backward` runs with gradients enabled.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this operator can be differentiated twice, not three times: leave out create_graph=True in the second "
                "torch.autograd.grad"
            )
        return backward(ctx, *gradients)

    return checked


class _PooledRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        pooled = x.new_empty(x.shape[0], weight.shape[0])
        for examples, _, product in _products(_with_ones(x), torch.cat([weight, bias[:, None]], 1)):
            torch.mean(product.relu_(), 1, out=pooled[examples])
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = _Gradients.apply(gradient, *ctx.saved_tensors, *ctx.needs_input_grad)
        return gradients


class _Gradients(torch.autograd.Function):
    """The gradients of x, W and b as a function of (g, x, W, b); `needed` says which of the three are computed."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *needed: bool) -> Any:
        ctx.save_for_backward(gradient, x, weight, bias)
        ctx.set_materialize_grads(False)
        needs_x, needs_weight, needs_bias = needed
        count, size, channels = x.shape
        share = (gradient / size)[:, None]
        grad_x = x.new_empty(channels, count, size) if needs_x else None
        grad_parameters = weight.new_zeros(channels + 1, weight.shape[0])  # of the weight, and of the bias in the end
        for examples, rows, product in _products(_with_ones(x), torch.cat([weight, bias[:, None]], 1)):
            masked = product.gt_(0).mul_(share[examples]).flatten(0, 1)
            if grad_x is not None:
                grad_x[:, examples] = (weight.t() @ masked.t()).view(channels, -1, size)
            if needs_weight or needs_bias:
                grad_parameters.addmm_(rows.t(), masked)
        return (
            grad_x.permute(1, 2, 0) if grad_x is not None else None,
            grad_parameters[:-1].t().contiguous() if needs_weight else None,
            grad_parameters[-1].clone() if needs_bias else None,
        )

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, x, weight, bias = ctx.saved_tensors
        (count, size, channels), features = x.shape, weight.shape[0]
        share = (gradient / size)[:, None]
        grad_gradient = torch.empty_like(gradient)
        grad_x = x.new_empty(channels, count, size) if v is not None else None
        grad_weight = weight.new_zeros(channels, features)
        # For (x, 1, u) the columns (W, b, 0) give W x + b, and the columns (V, c, W) give W u + V x + c.
        x_one_u = torch.cat([_with_ones(x), x.new_zeros(count, size, channels) if u is None else u.to(x.dtype)], 2)
        for_mask = torch.cat([weight, bias[:, None], torch.zeros_like(weight)], 1)
        for_slope = torch.cat([torch.zeros_like(weight) if v is None else v, _column(c, bias), weight], 1)
        slopes = _products(x_one_u, for_slope)
        for examples, rows, product in _products(x_one_u, for_mask):
            mask = product.gt_(0)
            _, _, slope = next(slopes)
            torch.mean(slope.mul_(mask), 1, out=grad_gradient[examples])
            masked = mask.mul_(share[examples]).flatten(0, 1)
            if grad_x is not None and v is not None:
                grad_x[:, examples] = (v.t() @ masked.t()).view(channels, -1, size)
            if u is not None:
                grad_weight.addmm_(rows[:, channels + 1 :].t(), masked)
        return (
            grad_gradient,
            grad_x.permute(1, 2, 0) if grad_x is not None else None,
            grad_weight.t() if u is not None else None,
            *[None] * 4,  # for the bias, which only the mask depends on, and for `needed`
        )


def _products(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Compute ``x @ weight.T`` of an x (N, S, C) in pieces of n examples.

    Yields:
        The examples of the piece, their rows (n S, C), and the product (n, S, F). The product lies in work space that
        the next piece overwrites.
    """
    (count, size, _), features = x.shape, weight.shape[0]
    elements = _CPU_ELEMENTS if x.device.type in ("cpu", "meta") else _OTHER_ELEMENTS
    step = min(count, max(1, elements // max(1, size * features)))
    space = x.new_empty(step * size, features)
    for start in range(0, count, max(1, step)):
        examples = slice(start, min(start + step, count))
        rows = x[examples].flatten(0, 1)
        yield examples, rows, torch.mm(rows, weight.t(), out=space[: len(rows)]).view(-1, size, features)


def _with_ones(x: Tensor) -> Tensor:
    """Return x with a last column of ones, by which the bias is multiplied."""
    return torch.cat([x, x.new_ones(1).expand(*x.shape[:-1], 1)], 2)


def _column(c: Tensor | None, bias: Tensor) -> Tensor:
    return (torch.zeros_like(bias) if c is None else c)[:, None]

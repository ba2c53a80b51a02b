"""Mean over places of relu(W x + b), twice differentiable, without ever holding what is averaged.

W x is many times wider than what goes in and what comes out. So it is made in pieces that stay in the cache, always in
the same work space, and made again where a derivative needs to know where it is positive. Given that mask M the rest is
linear, and its derivatives are written down below. With S places an example, g the gradient of the mean, and (u, V, c)
the cotangents of the gradients of (x, W, b) themselves:

    first     of x: W^T (M g) / S       of W: sum of (M g) x^T / S      of b: sum of M g / S
    second    of x: V^T (M g) / S       of W: sum of (M g) u^T / S      of g: mean of M (W u + V x + c)

Autograd's own operators under `torch.utils.checkpoint` give the same numbers in several times the time on a CPU: each
of them fills memory that it first has to ask for, and adding the bias copies it. Here the bias is one more column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of W x in one piece. On a CPU 1 MiB of float32, what a core's own cache holds; elsewhere, enough to be busy.
_CPU_ELEMENTS, _OTHER_ELEMENTS = 2**18, 2**24


def pooled_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``relu(x @ weight.T + bias).mean(1)``: (N, S, C), (F, C) and (F,) of one dtype to (N, F).

    Kept for the derivatives are the arguments alone. There is no third derivative: it raises.
    """
    pooled: Tensor = _PooledRelu.apply(x, weight, bias)
    return pooled


def last_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a `backward` that cannot be differentiated again: there it raises.

    PyTorch's `once_differentiable` raises where the graph is walked through. Where it is pruned, as it has no way on to
    the tensors that are asked for, the missing part of the derivative would go unnoticed.
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
        for examples, _, wide in _pieces(_with_ones(x), torch.cat([weight, bias[:, None]], 1)):
            torch.mean(wide.relu_(), 1, out=pooled[examples])
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = _Gradients.apply(gradient, *ctx.saved_tensors, *ctx.needs_input_grad)
        return found


class _Gradients(torch.autograd.Function):
    """The gradients of x, W and b, those that are wanted, as a function of (g, x, W, b)."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *wanted: bool) -> Any:
        ctx.save_for_backward(gradient, x, weight, bias)
        ctx.set_materialize_grads(False)
        count, size, channels = x.shape
        share = (gradient / size)[:, None]
        by_x = x.new_empty(channels, count, size) if wanted[0] else None
        by_rest = weight.new_zeros(channels + 1, weight.shape[0])
        for examples, rows, wide in _pieces(_with_ones(x), torch.cat([weight, bias[:, None]], 1)):
            masked = wide.gt_(0).mul_(share[examples]).flatten(0, 1)
            if by_x is not None:
                by_x[:, examples] = (weight.t() @ masked.t()).view(channels, -1, size)
            if wanted[1] or wanted[2]:
                by_rest.addmm_(rows.t(), masked)
        return (
            by_x.permute(1, 2, 0) if by_x is not None else None,
            by_rest[:-1].t().contiguous() if wanted[1] else None,
            by_rest[-1].clone() if wanted[2] else None,
        )

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, x, weight, bias = ctx.saved_tensors
        (count, size, channels), features = x.shape, weight.shape[0]
        share = (gradient / size)[:, None]
        by_gradient = torch.empty_like(gradient)
        by_x = x.new_empty(channels, count, size) if v is not None else None
        by_weight = weight.new_zeros(channels, features)
        moved = x.new_zeros(count, size, channels) if u is None else u.to(x.dtype)
        along = torch.cat([weight.new_zeros(features, channels) if v is None else v, _column(c, bias), weight], 1)
        both = torch.cat([_with_ones(x), moved], 2)
        slopes = _pieces(both, along)
        for examples, rows, wide in _pieces(both, torch.cat([weight, bias[:, None], torch.zeros_like(weight)], 1)):
            mask = wide.gt_(0)
            _, _, slope = next(slopes)
            torch.mean(slope.mul_(mask), 1, out=by_gradient[examples])
            masked = mask.mul_(share[examples]).flatten(0, 1)
            if by_x is not None and v is not None:
                by_x[:, examples] = (v.t() @ masked.t()).view(channels, -1, size)
            if u is not None:
                by_weight.addmm_(rows[:, channels + 1 :].t(), masked)
        given = by_x.permute(1, 2, 0) if by_x is not None else None
        return by_gradient, given, by_weight.t() if u is not None else None, None, None, None, None


def _pieces(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Go through (N, S, C) in pieces of the examples: which, their rows (n S, C), and ``rows @ weight.T`` (n, S, F).

    The product lies in work space that the next piece overwrites.
    """
    (count, size, _), features = x.shape, weight.shape[0]
    most = _CPU_ELEMENTS if x.device.type in ("cpu", "meta") else _OTHER_ELEMENTS
    step = min(count, max(1, most // max(1, size * features)))
    space = x.new_empty(step * size, features)
    for start in range(0, count, max(1, step)):
        examples = slice(start, min(start + step, count))
        rows = x[examples].flatten(0, 1)
        yield examples, rows, torch.mm(rows, weight.t(), out=space[: len(rows)]).view(-1, size, features)


def _with_ones(x: Tensor) -> Tensor:
    """Return x with a last column of ones, which the bias is multiplied with."""
    return torch.cat([x, x.new_ones(1).expand(*x.shape[:-1], 1)], 2)


def _column(c: Tensor | None, bias: Tensor) -> Tensor:
    return (torch.zeros_like(bias) if c is None else c)[:, None]

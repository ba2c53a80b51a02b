"""Convolution and BatchNorm with cheap second derivatives, which replace PyTorch's within a context.

PyTorch composes the second derivatives of both from many operators: some twenty passes over the activation for
BatchNorm, one small convolution per group for the weight of a grouped convolution. On a CPU that is most of the time of
a hypergradient. Both have short closed forms. Below, g is the gradient of the output.

A convolution B(x, w) is linear in x and in w. For the cotangents (u, v) of its gradients of (x, w), only convolutions
and their first derivatives occur:

    of g: B(u, w) + B(x, v)        of x: B's gradient of x at v        of w: B's gradient of w at u

BatchNorm, with r = 1/std, xh = (x - mean) r, means over a channel's n values, and P v = v - mean(v) - xh mean(v xh):

    first     dx = gamma r P g        dgamma = sum(g xh)        dbeta = sum(g)
    second, for cotangents (u, a, b) of these, k = mean(u xh), m = mean(g xh), A = sum(u P g):
              of g: gamma r P u + a xh + b        of gamma: r A
              of x: r ((a - gamma r k) P g - gamma r m P u) - gamma r^2 A xh / n

The forward pass and the first derivative are PyTorch's own kernels. Calls that these forms do not cover (several dtypes
in one call, complex numbers, autocast, frozen norms, padding by name) run unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sedona_fx.heads.pooled_relu import last_derivative
from sedona_fx.search.relaxed.state import RelaxedNet

_aten = torch.ops.aten


def short_second_derivatives(net: RelaxedNet) -> AbstractContextManager[Any]:
    """Return a context in which second derivatives of a net are cheap, where it takes none itself."""
    return nullcontext() if net.derives else ShortSecondDerivatives()


class ShortSecondDerivatives(TorchFunctionMode):
    """Context in which 2-d convolutions and BatchNorm with batch statistics are cheap to differentiate twice.

    A third derivative raises an error.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or x.dim() != 4 or not _covered(x, weight, bias):
        return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), False, [0, 0], groups)
    out: Tensor = _Convolution.apply(x, weight, bias, geometry)
    return out


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # A single value per channel is an error: PyTorch's own message is wanted there.
    if not training or weight is None or bias is None or not _covered(x, weight, bias) or x.numel() == x.shape[1]:
        return F.batch_norm(
            x, running_mean, running_var, weight=weight, bias=bias, training=training, momentum=momentum, eps=eps
        )
    out: Tensor = _Norm.apply(x, weight, bias, running_mean, running_var, momentum, eps)
    return out


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        out: Tensor = _aten.convolution(x, weight, bias, *geometry)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *_ConvolutionGradients.apply(g, *ctx.saved_tensors, ctx.geometry, ctx.needs_input_grad[:3]), None


class _ConvolutionGradients(torch.autograd.Function):
    """The gradients of x, w and the bias (those that are wanted), as a function of (g, x, w).

    `backward` gets their cotangents u, v and c.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Any, wanted: Any) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _aten.convolution_backward(g, x, weight, [weight.shape[0]], *geometry, wanted)

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        by_g = by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            terms = [] if u is None else [_aten.convolution(u, weight, c, *ctx.geometry)]
            if v is not None:
                terms.append(_aten.convolution(x, v, c if u is None else None, *ctx.geometry))
            if not terms and c is not None:
                terms.append(c[:, None, None].expand_as(g))
            by_g = terms[0].add_(terms[1]) if len(terms) == 2 else (terms[0] if terms else None)
        if ctx.needs_input_grad[1] and v is not None:
            by_x = _aten.convolution_backward(g, x, v, None, *ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[2] and u is not None:
            by_weight = _aten.convolution_backward(g, u, weight, None, *ctx.geometry, [False, True, False])[1]
        return by_g, by_x, by_weight, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, r = _aten.native_batch_norm(
            x,
            weight,
            bias,
            running_mean=running_mean,
            running_var=running_var,
            training=True,
            momentum=momentum,
            eps=eps,
        )
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps = eps
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, r = ctx.saved_tensors
        return *_NormGradients.apply(g, x, weight, mean, r, ctx.eps), None, None, None, None


class _NormGradients(torch.autograd.Function):
    """The gradients of x, gamma and beta, as a function of (g, x, gamma).

    `backward` gets their cotangents u, a and b. `mean` and `r` count as functions of x there.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, eps: float) -> Any:
        by_x, by_weight, by_bias = _norm_backward(g, x, weight, mean, r, eps=eps, by_input=True)
        ctx.save_for_backward(g, x, weight, mean, r, by_weight, by_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return by_x, by_weight, by_bias

    @staticmethod
    @last_derivative
    def backward(ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, gamma, mean, r, g_along_x, g_total = ctx.saved_tensors  # the last two: sum(g xh) = n m, and sum(g)
        n = x.numel() // x.shape[1]
        a = torch.zeros_like(gamma) if a is None else a
        b = torch.zeros_like(gamma) if b is None else b
        k = u_mean = spread = torch.zeros_like(r)  # spread: A
        if u is not None:
            k, u_mean = (t / n for t in _moments(u, x, gamma, mean, r, eps=ctx.eps))
            u_g, _ = _moments(u, g, gamma, torch.zeros_like(mean), torch.ones_like(r), eps=ctx.eps)
            spread = u_g - u_mean * g_total - k * g_along_x
        slope = a - gamma * r * k
        by_g = by_x = None
        if ctx.needs_input_grad[0]:
            by_g = _combined((gamma * r, u), (slope * r, x), constant=b - gamma * r * u_mean - slope * r * mean)
        if ctx.needs_input_grad[1]:
            on_u, on_g = -gamma * r * r * g_along_x / n, r * slope
            on_x = -r * (on_u * k + on_g * g_along_x / n + gamma * r * r * spread / n)
            constant = -on_u * u_mean - on_g * g_total / n - on_x * mean
            by_x = _combined((on_u, u), (on_g, g), (on_x, x), constant=constant)
        return by_g, by_x, r * spread, None, None, None


def _norm_backward(
    g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor, *, eps: float, by_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return PyTorch's own gradients of BatchNorm in training for x (if `by_input`), weight and bias."""
    gradients: tuple[Tensor, Tensor, Tensor] = _aten.native_batch_norm_backward(
        grad_out=g,
        input=x,
        weight=weight,
        running_mean=None,
        running_var=None,
        save_mean=mean,
        save_invstd=r,
        train=True,
        eps=eps,
        output_mask=[by_input, True, True],
    )
    return gradients


def _moments(v: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return sum(v (x - mean) r) and sum(v) of each channel, in one pass: BatchNorm's backward computes these."""
    _, along, total = _norm_backward(v, x, gamma, mean, r, eps=eps, by_input=False)
    return along, total


def _combined(*terms: tuple[Tensor, Tensor | None], constant: Tensor) -> Tensor:
    """Return constant + sum of factor * t over the terms that have a t; the constant and factors are per channel."""
    (first_factor, first), *others = [(factor, t) for factor, t in terms if t is not None]
    shape = [1, -1] + [1] * (first.dim() - 2)
    total = torch.addcmul(constant.view(shape), first_factor.view(shape), first)
    for factor, t in others:
        total.addcmul_(factor.view(shape), t)
    return total


def _covered(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors of one real dtype, outside autocast.

    Kernels are for real numbers: PyTorch makes a complex convolution of three real ones.
    """
    operands = [t for t in tensors if t is not None]
    device_type, dtype = operands[0].device.type, operands[0].dtype
    casting = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    unusual = casting or dtype.is_complex or any(type(t) not in (Tensor, torch.nn.Parameter) for t in operands)
    return not unusual and all(t.dtype == dtype for t in operands)


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)

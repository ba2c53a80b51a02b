"""The registry of auxiliary heads: small nets that map the activation at a cut to the model's primary output.

| name | net | from | to |
|---|---|---|---|
| ``sedona-1`` to ``-4`` | SEDONA's candidates (Pyeon et al., ICLR 2021), 512 features | spatial, vectors | scores |
| ``sedona-wide-1`` to ``-4`` | the same with 2048 features, for its four times wider nets | spatial, vectors | scores |
| ``sedona-basic-1`` to ``-4`` | the form for ResNet-18 and -34: C planes, expansion 1 | spatial, vectors | scores |
| ``mlp``, ``mlp-sr``, ``cnn`` | DGL's heads (Belilovsky et al., ICML 2020) | spatial, vectors | scores |
| ``linear`` | global average pool, linear | everything | scores |
| ``tokens-1`` to ``-3`` | LayerNorm, residual MLPs, pool over tokens, linear | everything of 2+ features | scores |
| ``tokens-attention-1`` to ``-3`` | the same, a learned query attends over the tokens | all but vectors | scores |
| ``dense-1`` to ``-3`` | 1x1 and 3x3 convolutions, resized to the output | spatial, grids of tokens | dense maps |
| ``logits-1`` to ``-3`` | LayerNorm, residual MLPs, linear, token by token | tokens of 2+ features | token logits |
| ``resample-1`` to ``-3`` | LayerNorm, cross-attention to all positions, MLPs, linear | positions | token logits |
| ``embedding`` | global average pool, linear | everything | (N, 128), for a ``local_loss`` of your own |

Spatial activations are images (N, C, H, W), video (N, C, T, H, W) and sequences (N, C, L); vectors are (N, D); tokens
are (N, T, D), or (N, H, W, D). Class scores are (N, classes), or (N,) for one number per example; dense maps are
(N, K, H, W) or (N, K, T, H, W); token logits are (N, T, V), with the activation's T but for the heads that resample.
For another output, register a factory of your own with :func:`register_head`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from sedona_fx.errors import HeadError, did_you_mean, shape_text
from sedona_fx.heads import fit as head_fit
from sedona_fx.heads.context import HeadContext, HeadFactory, HeadSpec
from sedona_fx.heads.rows import ArrangedHead
from sedona_fx.rng import seeded


@dataclass(frozen=True)
class _Entry:
    factory: HeadFactory
    refuses: head_fit.Refusal | None = None  # built-in heads only


_REGISTRY: dict[str, _Entry] = {}
_INSTEAD = (
    "Give a factory in heads=[...], an objective of your own in local_loss=..., or heads=False and a schedule that "
    "needs none (Backprop)"
)


def build_head(spec: HeadSpec, context: HeadContext) -> nn.Module:
    """Return a new head that fits `context`.

    The parameters are drawn from PyTorch's global random generator. A head from a factory of the user is run once on
    fake tensors, which computes nothing and leaves the module unchanged.

    Args:
        spec: a registered name or a factory.
        context: the activation that the head reads and the output that it must give.

    Raises:
        HeadError: the name is unknown, the head cannot be used in this context, or its output has the wrong shape.
    """
    _check_layout(context)
    entry = _entry(spec)
    name = head_name(spec)
    if entry.refuses is not None:
        _check_real(context)
    if entry.refuses is not None and (reason := entry.refuses(context)):
        fitting = fitting_heads(context)
        advice = "Heads that fit: " + ", ".join(map(repr, fitting)) if fitting else f"None fits: {_instead(context)}"
        raise HeadError(f"head {name!r} cannot stand{_after(context)}: {reason}. {_shapes(context)}. {advice}.")
    head = entry.factory(context)
    if entry.refuses is None:
        _check_users_head(name, head, context)
    if context.arrangement is None:
        return head
    return ArrangedHead(head, context.arrangement, free_output=context.free_output)


def reads(spec: HeadSpec, context: HeadContext) -> bool:
    """Whether a head reads the kind of numbers of an activation: built-in heads read real ones."""
    return not context.is_complex or _entry(spec).refuses is None


def head_name(spec: HeadSpec) -> str:
    """Return the registered name of `spec`, or ``"module:qualname"`` of a factory that is not registered.

    Raises:
        HeadError: `spec` is an unregistered name, or neither a name nor callable.
    """
    entry = _entry(spec)
    if isinstance(spec, str):
        return spec
    for name, registered in _REGISTRY.items():
        if registered is entry:
            return name
    target: Any = spec
    while isinstance(target, functools.partial):
        target = target.func
    if not hasattr(target, "__qualname__"):  # an instance with __call__
        target = type(target)
    return f"{target.__module__}:{target.__qualname__}"


def fitting_heads(context: HeadContext) -> tuple[str, ...]:
    """Return the names of all built-in heads that can be used in `context`; empty if there are none.

    Raises:
        HeadError: `context` names no dimension of channels besides the batch dimension.
    """
    _check_layout(context)
    return tuple(name for name, entry in _REGISTRY.items() if entry.refuses is not None and not entry.refuses(context))


def default_candidates(context: HeadContext) -> tuple[str, ...]:
    """Return the names of the heads that a search chooses from by default: one kind, in growing depth.

    For class scores these are SEDONA's four heads on spatial activations and the token heads elsewhere (``linear`` if
    there is only one feature), for dense maps the dense heads, and for token logits the logits heads, or those that
    resample where the activation has another number of positions than the output.

    Raises:
        HeadError: no built-in head fits. The message has both shapes and says why each kind does not fit.
    """
    _check_layout(context)
    _check_real(context)
    if ladder := head_fit.ladder(context):
        return ladder
    reasons = "; ".join(f"{name!r}: {refuses(context)}" for name, refuses in head_fit.KINDS.items())
    if context.no_output is not None:
        reasons = context.no_output.reason
    raise HeadError(f"no built-in head fits{_after(context)}. {_shapes(context)} ({reasons}). {_instead(context)}.")


def default_head(context: HeadContext) -> str:
    """Return the name of the head that is used without a search.

    Class scores on images and sequences of up to 128 channels get ``mlp-sr``, as DGL recommends. Its weights grow as
    51 C^2, beyond those of many nets themselves, so wider activations get ``sedona-1``, and so does video, where they
    would grow as 195 C^2. Everything else gets the second of :func:`default_candidates`, with one exception: a
    projection of D features to V token logits costs D V, which for V of 12 D and more exceeds the 12 D^2 of a
    transformer block. No head for such a vocabulary can be small compared with the block, so it gets the smallest,
    ``logits-1`` or ``resample-1``; a factory of your own can project through fewer features.

    Raises:
        HeadError: no built-in head fits.
    """
    candidates = default_candidates(context)
    smallest = candidates[0]
    if smallest == "sedona-1":
        return "mlp-sr" if len(context.positions) < 3 and context.channels <= 128 else smallest
    if smallest in ("logits-1", "resample-1") and context.output_shape[-1] >= 12 * context.channels:
        return smallest
    return candidates[min(1, len(candidates) - 1)]


def is_built_in(spec: HeadSpec) -> bool:
    """Whether a head is one of the package's own."""
    return _entry(spec).refuses is not None


def head_names() -> tuple[str, ...]:
    """Return all registered names in the order of registration, built-in heads first."""
    return tuple(_REGISTRY)


@overload
def register_head(name: str, factory: HeadFactory, *, override: bool = ...) -> HeadFactory: ...
@overload
def register_head(name: str, factory: None = ..., *, override: bool = ...) -> Callable[[HeadFactory], HeadFactory]: ...
def register_head(
    name: str, factory: HeadFactory | None = None, *, override: bool = False
) -> HeadFactory | Callable[[HeadFactory], HeadFactory]:
    """Register `factory` under `name`, or, without a factory, return a decorator that does so.

    Args:
        name: a text that is not empty and contains no ``:``.
        factory: takes a `HeadContext` and returns a module that maps `context.shape` to `context.output_shape`, for
            any batch size.
        override: whether to replace a head that is registered under this name.

    Returns:
        The factory, from both forms.

    Raises:
        HeadError: the name is taken and `override` is not set, the name is not valid, or the factory is not callable.
    """
    if factory is None:
        return functools.partial(register_head, name, override=override)
    if not isinstance(name, str) or not name or ":" in name:
        raise HeadError(f"{name!r} cannot name a head: give a text that is not empty and has no ':' in it.")
    if not callable(factory):
        raise HeadError(f"head {name!r} needs a factory, a callable from HeadContext to module, not {factory!r}.")
    if name in _REGISTRY and not override:
        raise HeadError(f"a head named {name!r} is registered already: take another name, or say override=True.")
    _REGISTRY[name] = _Entry(factory)
    return factory


def _entry(spec: HeadSpec) -> _Entry:
    if isinstance(spec, str):
        if spec in _REGISTRY:
            return _REGISTRY[spec]
        if ":" in spec:
            raise HeadError(
                f"head {spec!r} is a factory and not a registered name: hand over the factory itself, or register it "
                f"under a name of its own with register_head."
            )
        near = did_you_mean(spec, _REGISTRY)
        raise HeadError(f"there is no head named {spec!r}{near}. All names: {', '.join(_REGISTRY)}.")
    if not callable(spec):
        raise HeadError(
            f"a head is given by name or as a factory, a callable from HeadContext to module, not {spec!r}."
        )
    for entry in _REGISTRY.values():
        if entry.factory is spec:
            return entry
    return _Entry(spec)


def _check_layout(context: HeadContext) -> None:
    rank = len(context.shape)
    if rank < 2 or not (-rank <= context.channel_dim < rank) or context.channel_dim % rank == 0:
        raise HeadError(
            f"no head can stand{_after(context)}: the activation is {shape_text(context.shape)} with its channels in "
            f"dimension {context.channel_dim}; a head needs a batch dimension first and the channels in another one."
        )


def _check_real(context: HeadContext) -> None:
    if context.is_complex:
        raise HeadError(
            f"no built-in head reads complex numbers, and the activation{_after(context)} is complex: cut where "
            "activations are real, as behind z.abs() or torch.view_as_real(z), give a factory of your own in "
            "heads=[...], or heads=False and a schedule that needs none (Backprop)."
        )


def _check_users_head(name: str, head: object, context: HeadContext) -> None:
    """Check what a factory of the user returned against `context`, by a forward pass on fake tensors.

    The batch has at least two examples, since a BatchNorm in the head may refuse one. A head whose forward pass depends
    on values cannot be checked in this way and is accepted as it is.
    """
    where = f"head {name!r}{_after(context)}"
    if not isinstance(head, nn.Module):
        raise HeadError(f"{where}: the factory must return a torch.nn.Module, not {type(head).__name__}.")
    tensors: dict[str, Tensor] = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    if lazy := [key for key, tensor in tensors.items() if torch.nn.parameter.is_lazy(tensor)]:
        raise HeadError(f"{where}: {lazy[0]!r} is lazy. Build it in full: the shapes are in the HeadContext.")
    if context.free_output:
        return
    like = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    shape = (max(2, context.shape[0]), *context.shape[1:])
    output_shape = (shape[0], *context.output_shape[1:])
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with seeded(torch.device("cpu"), 0), mode, torch.no_grad():  # it may draw, which nobody should notice
            fakes: dict[str, Tensor] = {key: mode.from_tensor(tensor) for key, tensor in tensors.items()}
            dtype = context.dtypes.activation if context.dtypes and context.is_complex else like.dtype
            x = torch.empty(shape, dtype=dtype, device=like.device)
            output = torch.func.functional_call(head, fakes, (x,))
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return
    except Exception as error:
        raise HeadError(
            f"{where} fails on an input of shape {shape_text(shape)}, where it should give {shape_text(output_shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise HeadError(f"{where} must return one tensor {shape_text(output_shape)}, not {type(output).__name__}.")
    if tuple(output.shape) != output_shape:
        raise HeadError(
            f"{where} turns {shape_text(shape)} into {shape_text(output.shape)}, but the model's primary output "
            f"would be {shape_text(output_shape)}: make the factory read `context.output_shape`."
        )


def _instead(context: HeadContext) -> str:
    return _INSTEAD if context.no_output is None else context.no_output.instead


def _after(context: HeadContext) -> str:
    return f" behind {context.place!r}" if context.place else ""


def _shapes(context: HeadContext) -> str:
    return (
        f"The activation there is {shape_text(context.shape)} with its channels in dimension "
        f"{context.channel_dim % len(context.shape)}, the output {shape_text(context.output_shape)}"
    )


_REGISTRY.update({name: _Entry(*entry) for name, entry in head_fit.built_in().items()})

"""Auxiliary heads: small nets from the activation at a cut to the model's primary output, and their registry.

| name | net | from | to |
|---|---|---|---|
| ``sedona-1`` to ``-4`` | SEDONA's candidates (Pyeon et al., ICLR 2021), 512 features | spatial, vectors | scores |
| ``sedona-wide-1`` to ``-4`` | the same with 2048 features, for its four times wider nets | spatial, vectors | scores |
| ``sedona-basic-1`` to ``-4`` | the form for ResNet-18 and -34: C planes, expansion 1 | spatial, vectors | scores |
| ``mlp``, ``mlp-sr``, ``cnn`` | DGL's heads (Belilovsky et al., ICML 2020) | spatial, vectors | scores |
| ``linear`` | global average pool, linear | everything | scores |
| ``tokens-1`` to ``-3`` | LayerNorm, residual MLPs, pool over tokens, linear | everything of 2+ features | scores |
| ``tokens-attention-1`` to ``-3`` | the same with a learned query that attends over the tokens | but vectors | scores |
| ``dense-1`` to ``-3`` | 1x1 and 3x3 convolutions, resized to the output | spatial, grids of tokens | dense maps |
| ``logits-1`` to ``-3`` | LayerNorm, residual MLPs, linear, token by token | tokens of 2+ features | token logits |

Spatial activations are images (N, C, H, W), video (N, C, T, H, W) and sequences (N, C, L); vectors (N, D); tokens
(N, T, D), or (N, H, W, D). Class scores are (N, classes), or (N,) for one number an example; dense maps (N, K, H, W)
or (N, K, T, H, W); token logits (N, T, V) with the activation's T. For another output, register a factory of your own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from sedona_fx.errors import HeadError, did_you_mean, shape_text
from sedona_fx.heads import fit as head_fit
from sedona_fx.heads.context import HeadContext, HeadFactory


@dataclass(frozen=True)
class _Entry:
    factory: HeadFactory
    refuses: Callable[[HeadContext], str] | None = None  # only built-in heads: why not here, or ""


_REGISTRY: dict[str, _Entry] = {}
_INSTEAD = (
    "Give a factory in heads=[...], an objective of your own in local_loss=..., or heads=False and a schedule that "
    "needs none (Backprop)"
)


def build_head(spec: str | HeadFactory, context: HeadContext) -> nn.Module:
    """Return a new head, by registered name or from a factory, that fits `context`.

    The parameters are drawn from PyTorch's global random stream. What a factory of the user's returns is tried once on
    fake tensors, which computes nothing and leaves the module as it is.

    Raises:
        HeadError: the name is unknown, the head cannot stand there, or its output has the wrong shape.
    """
    _check_layout(context)
    entry = _entry(spec)
    name = head_name(spec)
    if entry.refuses is not None:
        if reason := entry.refuses(context):
            fitting = fitting_heads(context)
            advice = "Heads that fit: " + ", ".join(map(repr, fitting)) if fitting else f"None fits: {_INSTEAD}"
            raise HeadError(f"head {name!r} cannot stand{_behind(context)}: {reason}. {_shapes(context)}. {advice}.")
        return entry.factory(context)
    head = entry.factory(context)
    _check_users_head(name, head, context)
    return head


def head_name(spec: str | HeadFactory) -> str:
    """Return the registered name of `spec`, or ``"module:qualname"`` of a factory that is not registered.

    Raises:
        HeadError: `spec` is a name nobody registered, or neither a name nor callable.
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
    """Return the names of all built-in heads that can stand in `context`, none where none can."""
    _check_layout(context)
    return tuple(name for name, entry in _REGISTRY.items() if entry.refuses is not None and not entry.refuses(context))


def default_candidates(context: HeadContext) -> tuple[str, ...]:
    """Return the names of the heads a search chooses from: a ladder of depths.

    For class scores SEDONA's four on spatial activations and the token ones elsewhere (``linear`` where there is but
    one feature); for dense maps the dense ones; for token logits the logits ones.

    Raises:
        HeadError: no built-in head fits; with both shapes, and why each kind does not.
    """
    _check_layout(context)
    if ladder := head_fit.ladder(context):
        return ladder
    reasons = "; ".join(f"{name!r}: {refuses(context)}" for name, refuses in head_fit.KINDS.items())
    raise HeadError(f"no built-in head fits{_behind(context)}. {_shapes(context)} ({reasons}). {_INSTEAD}.")


def default_head(context: HeadContext) -> str:
    """Return the name of the head used without a search.

    For class scores on images and sequences ``mlp-sr``, as DGL recommends, up to 128 channels; its weights grow as 51
    C^2, beyond many a net's own, so wider activations get ``sedona-1``, and so does video, where they would grow as 195
    C^2. Elsewhere the second of the ladder, with one exception: a projection of D features to V token logits costs D V,
    which from V = 12 D on is more than a transformer block's own 12 D^2. No head for a vocabulary can be small beside
    such a block, so it gets the smallest, ``logits-1``; a factory of your own can project through fewer features.

    Raises:
        HeadError: no built-in head fits.
    """
    ladder = default_candidates(context)
    if ladder[0] == "sedona-1":
        return "mlp-sr" if len(context.positions) < 3 and context.channels <= 128 else ladder[0]
    if ladder[0] == "logits-1" and context.output_shape[-1] >= 12 * context.channels:
        return ladder[0]
    return ladder[min(1, len(ladder) - 1)]


def head_names() -> tuple[str, ...]:
    """Return all registered names, built-in ones first, in the order of their registration."""
    return tuple(_REGISTRY)


@overload
def register_head(name: str, factory: HeadFactory, *, override: bool = ...) -> HeadFactory: ...
@overload
def register_head(name: str, factory: None = ..., *, override: bool = ...) -> Callable[[HeadFactory], HeadFactory]: ...
def register_head(
    name: str, factory: HeadFactory | None = None, *, override: bool = False
) -> HeadFactory | Callable[[HeadFactory], HeadFactory]:
    """Make `factory` known under `name`. Without a factory, return a decorator that does so. Both return the factory.

    A factory takes a `HeadContext` and returns a module from `context.shape` to `context.output_shape`, for any batch.

    Raises:
        HeadError: the name is taken and `override` is not set, or the name or the factory is none.
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


def _entry(spec: str | HeadFactory) -> _Entry:
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
            f"no head can stand{_behind(context)}: the activation is {shape_text(context.shape)} with its channels in "
            f"dimension {context.channel_dim}; a head needs a batch dimension first and the channels in another one."
        )


def _check_users_head(name: str, head: object, context: HeadContext) -> None:
    """Hold what a user's factory returned against `context`, by a forward on fake tensors.

    A batch of two at least, since a BatchNorm of the user's may refuse one. Heads whose forward depends on values
    cannot be tried so and are taken on trust.
    """
    from torch._subclasses import fake_tensor  # here, as only users' heads need it

    where = f"head {name!r}{_behind(context)}"
    if not isinstance(head, nn.Module):
        raise HeadError(f"{where}: the factory must return a torch.nn.Module, not {type(head).__name__}.")
    tensors: dict[str, Tensor] = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    if lazy := [key for key, tensor in tensors.items() if torch.nn.parameter.is_lazy(tensor)]:
        raise HeadError(f"{where}: {lazy[0]!r} is lazy. Build it in full: the shapes are in the HeadContext.")
    first = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    if context.free_output:
        return
    given = (max(2, context.shape[0]), *context.shape[1:])
    wanted = (given[0], *context.output_shape[1:])
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            fakes: dict[str, Tensor] = {key: mode.from_tensor(tensor) for key, tensor in tensors.items()}
            x = torch.empty(given, dtype=first.dtype, device=first.device)
            output = torch.func.functional_call(head, fakes, (x,))
    except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException):
        return
    except Exception as error:
        raise HeadError(
            f"{where} fails on an input of shape {shape_text(given)}, where it should give {shape_text(wanted)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise HeadError(f"{where} must return one tensor {shape_text(wanted)}, not {type(output).__name__}.")
    if tuple(output.shape) != wanted:
        raise HeadError(
            f"{where} turns {shape_text(given)} into {shape_text(output.shape)}, but the model's primary output "
            f"would be {shape_text(wanted)}: make the factory read `context.output_shape`."
        )


def _behind(context: HeadContext) -> str:
    return f" behind {context.place!r}" if context.place else ""


def _shapes(context: HeadContext) -> str:
    return (
        f"The activation there is {shape_text(context.shape)} with its channels in dimension "
        f"{context.channel_dim % len(context.shape)}, the output {shape_text(context.output_shape)}"
    )


_REGISTRY.update({name: _Entry(*entry) for name, entry in head_fit.built_in().items()})

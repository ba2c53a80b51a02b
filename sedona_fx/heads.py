"""Auxiliary heads: small nets from the activation at a cut to the model's primary output, and their registry.

| name | net | serves |
|---|---|---|
| ``sedona-1`` to ``-4`` | SEDONA's candidates (Pyeon et al., ICLR 2021), 512 features | images, vectors |
| ``sedona-wide-1`` to ``-4`` | the same with 2048 features, for its four times wider nets | images, vectors |
| ``sedona-basic-1`` to ``-4`` | the form for ResNet-18 and -34: C planes, expansion 1 | images, vectors |
| ``mlp``, ``mlp-sr``, ``cnn`` | DGL's heads (Belilovsky et al., ICML 2020) | images, vectors |
| ``linear`` | global average pool, linear | everything |
| ``tokens-1`` to ``-3`` | LayerNorm, residual MLPs, mean over the tokens, linear | everything with 2 or more features |

Images are (N, C, H, W), vectors (N, D). All of these give class scores (N, classes); for another output, register a
factory of your own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from sedona_fx import head_layers
from sedona_fx.errors import HeadError, did_you_mean, shape_text


@dataclass(frozen=True)
class HeadContext:
    """What a head has to fit.

    `shape` is the activation at the cut and `output_shape` the model's primary output, both with the batch first. The
    size of the batch is an example: a head must serve any. `channel_dim` holds the channels or features: 1 in (N, C, H,
    W) and (N, D), -1 or 2 in tokens (N, T, D), -1 or 3 in (N, H, W, D). `place` is the user's module path.
    """

    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_dim: int = 1
    place: str = ""

    @property
    def channels(self) -> int:
        """Number of channels or features."""
        return self.shape[self.channel_dim]

    @property
    def is_vector(self) -> bool:
        """Whether the activation is (N, D)."""
        return len(self.shape) == 2

    @property
    def is_image(self) -> bool:
        """Whether the activation is (N, C, H, W)."""
        return len(self.shape) == 4 and self.channel_dim % 4 == 1


HeadFactory = Callable[[HeadContext], nn.Module]


@dataclass(frozen=True)
class _Entry:
    factory: HeadFactory
    refuses: Callable[[HeadContext], str] | None = None  # only built-in heads: why not here, or ""


_REGISTRY: dict[str, _Entry] = {}


def build_head(spec: str | HeadFactory, context: HeadContext) -> nn.Module:
    """Return a new head, by registered name or from a factory, that fits `context`.

    The parameters are drawn from PyTorch's global random stream. What a factory of the user's returns is tried once on
    fake tensors, which computes nothing and leaves the module as it is.

    Raises:
        HeadError: the name is unknown, the head cannot stand there, or its output has the wrong shape.
    """
    rank = len(context.shape)
    if rank < 2 or not (-rank <= context.channel_dim < rank) or context.channel_dim % rank == 0:
        raise HeadError(
            f"no head can stand{_behind(context)}: the activation is {shape_text(context.shape)} with its channels in "
            f"dimension {context.channel_dim}; a head needs a batch dimension first and the channels in another one."
        )
    entry = _entry(spec)
    name = head_name(spec)
    if entry.refuses is not None:
        if reason := entry.refuses(context):
            fitting = [n for n, e in _REGISTRY.items() if e.refuses is not None and not e.refuses(context)]
            advice = "Heads that fit: " + ", ".join(map(repr, fitting)) if fitting else "Give a factory of your own"
            raise HeadError(
                f"head {name!r} cannot stand{_behind(context)}: {reason}. The activation there is "
                f"{shape_text(context.shape)} with its channels in dimension {context.channel_dim % rank}, the output "
                f"{shape_text(context.output_shape)}. {advice}."
            )
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


def default_candidates(context: HeadContext) -> tuple[str, ...]:
    """Return the names of the heads a search chooses from: SEDONA's four on images, the token ones elsewhere."""
    if context.is_image:
        return tuple(f"sedona-{depth}" for depth in range(1, 5))
    if context.channels == 1:
        return ("linear",)
    return tuple(f"tokens-{depth}" for depth in range(1, 4))


def default_head(context: HeadContext) -> str:
    """Return the name of the head used without a search.

    On images ``mlp-sr``, as DGL recommends, up to 128 channels; its weights grow as 51 C^2, beyond many a net's own, so
    wider activations get ``sedona-1``. Elsewhere ``tokens-2``.
    """
    if context.is_image:
        return "mlp-sr" if context.channels <= 128 else "sedona-1"
    return "linear" if context.channels == 1 else "tokens-2"


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


def _refuses_any(context: HeadContext) -> str:
    if len(context.output_shape) != 2:
        return "the built-in heads give class scores (N, classes) only; register a factory of your own for this output"
    return ""


def _refuses_image(context: HeadContext) -> str:
    if not (context.is_image or context.is_vector):
        return "it reads images (N, C, H, W) or vectors (N, D)"
    return _refuses_any(context)


def _refuses_token(context: HeadContext) -> str:
    if context.channels == 1:
        return "it normalises over the features, and a single one would always come out as 0"
    return _refuses_any(context)


def _register_built_in() -> None:
    forms: dict[str, dict[str, Any]] = {
        "sedona": {},
        "sedona-wide": {"features": 2048},
        "sedona-basic": {"expansion": 1},
    }
    for form, options in forms.items():
        for depth in range(1, 5):
            sedona = functools.partial(_image_head, head_layers.sedona_head, depth=depth, **options)
            _REGISTRY[f"{form}-{depth}"] = _Entry(sedona, _refuses_image)
    mlp = functools.partial(_image_head, head_layers.mlp_head)
    _REGISTRY["mlp"] = _Entry(mlp, _refuses_image)
    _REGISTRY["mlp-sr"] = _Entry(functools.partial(mlp, spatial=3), _refuses_image)
    _REGISTRY["cnn"] = _Entry(functools.partial(_image_head, head_layers.cnn_head), _refuses_image)
    _REGISTRY["linear"] = _Entry(functools.partial(_any_head, head_layers.linear_head), _refuses_any)
    for depth in range(1, 4):
        token = functools.partial(_any_head, head_layers.token_head, depth=depth)
        _REGISTRY[f"tokens-{depth}"] = _Entry(token, _refuses_token)


def _image_head(build: Callable[..., nn.Module], context: HeadContext, **options: int) -> nn.Module:
    size = (1, 1) if context.is_vector else (context.shape[2], context.shape[3])
    return build(context.channels, size, context.output_shape[1], vector=context.is_vector, **options)


def _any_head(build: Callable[..., nn.Module], context: HeadContext, **options: int) -> nn.Module:
    rank = len(context.shape)
    dim = context.channel_dim % rank
    return build(context.channels, context.output_shape[1], channel_dim=dim, rank=rank, **options)


_register_built_in()

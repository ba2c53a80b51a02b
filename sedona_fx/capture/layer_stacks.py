"""PyTorch's stacks of layers (``nn.TransformerEncoder``, ``nn.TransformerDecoder``, ``nn.Transformer``) in a graph.

To fx they are layers like any other, since ``torch.nn`` defines them, and six layers would be one node without a place
to cut. So they are entered, and the layers inside stay whole. What PyTorch's code decides by numbers (whether a mask is
causal) or by the state that it runs in becomes a call in the graph, decided anew in every run.

In evaluation without gradients an encoder packs a padded batch into a nested tensor and takes it through all layers. No
head could read that at a cut. So each layer gets its input packed and gives it padded again, which are copies: numbers
at padded places are zero for PyTorch's fast path either way, and the others are the same bits. In all other runs the
calls return what they get.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from sedona_fx.ir.graph import info

_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)
_LAYERS = (
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention),
    *(nn.RNNBase, nn.RNNCellBase),
)
_encoder_forward, _transformer_forward = nn.TransformerEncoder.forward, nn.Transformer.forward
_TRANSFORMER = inspect.signature(_transformer_forward)


def is_leaf(module: nn.Module) -> bool | None:
    """Return whether tracing keeps a module whole; None: fx's own rule holds.

    Stacks are entered. A class of the user's that only inherits the forward of one of PyTorch's attention or recurrent
    layers is kept whole, as they are: that code looks at sizes and cannot be traced.
    """
    if isinstance(module, _STACKS) and is_pytorchs(type(module)):
        return isinstance(module, nn.TransformerEncoder) and packs(module) and not all(map(is_layer, module.layers))
    return True if is_layer(module) else None


def is_layer(module: nn.Module) -> bool:
    """Whether a module runs the forward of one of PyTorch's attention or recurrent layers."""
    if not isinstance(module, _LAYERS) or "forward" in vars(module):
        return False
    base = next(kind for kind in type(module).__mro__ if is_pytorchs(kind))
    return bool(type(module).forward is base.forward)  # type: ignore[attr-defined]


def is_pytorchs(kind: type) -> bool:
    """Whether ``torch.nn`` defines a class."""
    return kind.__module__.startswith("torch.nn.")


def packs(encoder: nn.TransformerEncoder) -> bool:
    """Whether an encoder may pack a padded batch into a nested tensor."""
    return bool(getattr(encoder, "use_nested_tensor", False))


# ---- calls in a graph -----------------------------------------------------------------------------------------------


def choose_form(layer: nn.Module, x: Tensor, key_mask: Tensor, mask_check: bool) -> tuple[Tensor, bool]:
    """Return the input of a stack, and whether its layers get nested tensors; PyTorch's own code decides.

    Args:
        layer: the first layer.
        x: (N, T, D), the input. It is returned so that this call runs where the first layer does.
        key_mask: (N, T), true or ``-inf`` at padded places.
        mask_check: the encoder's setting.
    """
    if isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        return x, False
    first = _FirstLayer(layer)
    settings = {"use_nested_tensor": True, "mask_check": mask_check, "norm": None}
    _encoder_forward(SimpleNamespace(layers=[first], **settings), x, None, key_mask, False)  # type: ignore[arg-type]
    return x, bool(first.given.is_nested)


class _FirstLayer:
    """Stands in for an encoder's first layer: has its attributes, and keeps what it is called with."""

    given: Tensor

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, x: Tensor, **_: Any) -> Tensor:
        self.given = x
        return x


def mask_of_layers(key_mask: Tensor, nested: bool) -> Tensor | None:
    """Return the mask that layers get: a nested tensor has no padded places."""
    return None if nested else key_mask


def to_nested(x: Tensor, key_mask: Tensor, nested: bool) -> Tensor:
    """Return (N, T, D) as a nested tensor if layers get those, else as it is."""
    return torch._nested_tensor_from_mask(x, key_mask.logical_not(), mask_check=False) if nested else x


def to_padded(x: Tensor, key_mask: Tensor, nested: bool) -> Tensor:
    """Return what a layer gives as (N, T, D), zero at padded places if it is a nested tensor."""
    return x.to_padded_tensor(0.0, (*key_mask.shape, x.size(2))) if nested else x


# ---- while a forward is recorded ------------------------------------------------------------------------------------


class PackingStack:
    """Records the layers of an encoder that may pack its batch.

    Args:
        encoder: the encoder; all of its layers are kept whole.
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.layers = set(encoder.layers)
        self.mask_check = bool(getattr(encoder, "mask_check", True))
        self._nested: Any = None
        self._mask: Any = None

    def record(self, call: Callable[..., Any], path: str, x: fx.Proxy, arguments: dict[str, Any]) -> fx.Proxy:
        """Record the call of a layer, and return what it gives as a plain tensor.

        Args:
            call: records the call of the layer itself, given its positional and its named arguments.
            path: module path of the layer.
            x: its input.
            arguments: its named arguments, as the encoder gives them.
        """
        create = x.tracer.create_proxy
        key_mask = arguments["src_key_padding_mask"]
        if self._nested is None:
            layer = create("get_attr", path, (), {})
            info(layer.node).site = f"{path}:itself"
            entered = create("call_function", choose_form, (layer, x, key_mask, self.mask_check), {})
            x, self._nested = entered[0], entered[1]  # type: ignore[index]
            info(x.node).sealed = True
            self._mask = create("call_function", mask_of_layers, (key_mask, self._nested), {})
        packed = create("call_function", to_nested, (x, key_mask, self._nested), {})
        result = call((packed,), {**arguments, "src_key_padding_mask": self._mask})
        for inner in (packed, result):
            info(inner.node).sealed = True
        padded = create("call_function", to_padded, (result, key_mask, self._nested), {})
        assert isinstance(padded, fx.Proxy)
        return padded


@contextmanager
def enter_stacks(packing: list[PackingStack | None]) -> Iterator[None]:
    """Let the code of PyTorch's stacks run on proxies in the body.

    Args:
        packing: its last entry is the encoder whose layers are recorded now, if that may pack its batch, else None.
    """

    def encoder(
        self: nn.TransformerEncoder,
        src: Any,
        mask: Any = None,
        src_key_padding_mask: Any = None,
        is_causal: bool | None = None,
    ) -> Any:
        may_pack = packs(self) and isinstance(src, fx.Proxy) and src_key_padding_mask is not None and mask is None
        if may_pack and not all(map(is_layer, self.layers)):
            raise TypeError("an encoder packs its batch into a nested tensor for layers of a class of your own")
        packing.append(PackingStack(self) if may_pack else None)
        try:
            return _encoder_forward(self, src, mask, src_key_padding_mask, is_causal)
        finally:
            packing.pop()

    enabled = torch.backends.mha.get_fastpath_enabled

    def fastpath_enabled() -> bool:
        """Answer the encoder, and nobody else, that there is no fast path: its layers still take theirs."""
        return sys._getframe(2).f_code is not _encoder_forward.__code__ and enabled()

    with ExitStack() as stack:
        for owner, name, function in (
            (nn.TransformerEncoder, "forward", encoder),
            (nn.Transformer, "forward", _without_checks),
            (torch.backends.mha, "get_fastpath_enabled", fastpath_enabled),
            (F, "_canonical_mask", _recorded(F._canonical_mask, _given_mask)),
            (F, "_none_or_dtype", _recorded(F._none_or_dtype)),
            (transformer, "_get_seq_len", _recorded(transformer._get_seq_len)),
            (transformer, "_detect_is_causal_mask", _recorded(transformer._detect_is_causal_mask, _undecided)),
        ):
            stack.enter_context(_replaced(owner, name, function))
        yield


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of an attribute for the body, in this thread alone."""
    original, thread = getattr(owner, name), threading.get_ident()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else original)(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield


@contextmanager
def unknown_masks() -> Iterator[None]:
    """Let stacks take no mask for causal in the body unless they are told, as there are no numbers to see it by.

    A causal mask then does what any other mask does: that it is causal is a hint, which saves time.
    """

    def told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with _replaced(transformer, "_detect_is_causal_mask", told):
        yield


def _without_checks(self: nn.Transformer, src: Any, tgt: Any, *masks: Any, **named_masks: Any) -> Any:
    """Run encoder and decoder as ``nn.Transformer`` does, without a look at the sizes: attention checks them, too."""
    if not isinstance(src, fx.Proxy) and not isinstance(tgt, fx.Proxy):
        return _transformer_forward(self, src, tgt, *masks, **named_masks)
    given = _TRANSFORMER.bind(self, src, tgt, *masks, **named_masks)
    given.apply_defaults()
    m = given.arguments
    memory = self.encoder(
        src, mask=m["src_mask"], src_key_padding_mask=m["src_key_padding_mask"], is_causal=m["src_is_causal"]
    )
    of_decoder = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    causal = {name: m[name] for name in ("tgt_is_causal", "memory_is_causal")}
    return self.decoder(tgt, memory, **{name: m[name] for name in of_decoder}, **causal)


def _recorded(function: Callable[..., Any], matters: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
    """Return a function that becomes a call in the graph where a proxy is among its arguments.

    Args:
        function: one of PyTorch's.
        matters: whether its result depends on the proxies, given the arguments.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        proxies = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)]
        if not proxies or not matters(*args, **kwargs):
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _given_mask(mask: Any, *_: Any, **__: Any) -> bool:
    return mask is not None


def _undecided(mask: Any, is_causal: Any = None, *_: Any, **__: Any) -> bool:
    return mask is not None and is_causal is None

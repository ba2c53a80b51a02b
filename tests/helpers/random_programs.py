"""The strategy that draws random programs, and how they are cut.

It keeps to what autograd allows: nothing is overwritten that a backward has kept. A program has some of the features at
most: hooks, regions of autocast and without gradients, frozen parts, stretches in other dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from random_draft import ACTIVATIONS, Draft
from random_instructions import FULL, ON_PARAMETERS, SINGLE, Hook, Kind, Program
from random_operations import REGIONS, TENSOR_HOOKS, WITH_LAYER, WRITES, layer_dtype, records

_DTYPES = (SINGLE, torch.bfloat16, FULL, torch.float16)
_WITHOUT_HOOKS = ("bias", "compare", "chunk", "first", "second", *TENSOR_HOOKS)
_PASSES_VALUES_ON = (*WRITES, "tick", "tick_in_training")
"""Operations on whose results a backward hook would make a view that is overwritten."""
_LAYERLESS_HOOKS = ("observe", "forward", "pre", "backward", "backward_if", "backward_pre")


@dataclass(frozen=True)
class Cutting:
    """How a model is cut: by a search into K blocks, or at places of the user's, given in hundredths of the way."""

    blocks: int
    search: Literal["uniform", "balanced"]
    max_live: int | None
    places: tuple[int, ...] | None


cuttings = st.builds(
    Cutting,
    blocks=st.sampled_from((3, 2, 4, 5, 1)),
    search=st.sampled_from(("uniform", "balanced")),
    max_live=st.sampled_from((None, None, 1, 2, 3, 4)),
    places=st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True).map(lambda p: tuple(sorted(p)))
    | st.none(),
)


@dataclass(frozen=True)
class _Features:
    """What a program may have."""

    hooks: bool
    regions: bool
    dtypes: bool
    frozen: tuple[float, float]  # the part of the program that is, from and to

    @property
    def bases(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the inputs: autocast leaves float64 alone."""
        return (FULL, SINGLE, SINGLE) if self.regions else (FULL, FULL, SINGLE) if self.dtypes else (FULL,)


_features = st.builds(
    _Features,
    hooks=st.booleans(),
    regions=st.booleans(),
    dtypes=st.sampled_from((False, False, True)),
    frozen=st.sampled_from(((2.0, 2.0),) * 4 + ((0.0, 0.3), (0.3, 0.6), (0.6, 2.0), (0.0, 0.8))),
)
_BACK = st.sampled_from((0, 0, 0, 1, 2, 3, 6))
"""How far back an argument is looked for: mostly the latest value, so that there is a way through the model to cut."""


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program."""
    features = draw(_features)
    base = draw(st.sampled_from(features.bases))
    draft = Draft([Kind("raw", 3, dtype=base), *([Kind("code", dtype=base)] if draw(st.booleans()) else [])])
    draft.frozen = features.frozen[0] == 0.0
    _put(draw, draft, features, "stem", (0,))
    if draw(st.booleans()):
        draft.append("flatten", (len(draft.inputs),))
        draft.append("transpose", (len(draft.inputs) + 1,))
    count = draw(st.integers(2, 16))
    for k in range(count):
        draft.frozen = features.frozen[0] <= k / count < features.frozen[1]
        if features.regions:
            _change_region(draw, draft)
        _grow(draw, draft, features)
    draft.frozen = features.frozen[0] <= 1.0 < features.frozen[1]
    draft.region = tuple(name for name in draft.region if records((name,)) and name != "enable")
    last = next(k for k in reversed(range(len(draft.kinds))) if draft.kinds[k].layout in ACTIVATIONS)
    if draft.kinds[last].dtype is not base and draw(st.booleans()):
        last = draft.append("to", (last,), dtype=base)
    if draft.kinds[last].layout != "vector":
        last = draft.append("pool", (last,))
    extras = [k for k in range(len(draft.inputs), last) if draft.kinds[k].layout in ACTIVATIONS]
    draft.append("logits", (last,))
    extra = draw(st.none() | st.sampled_from(extras)) if extras else None
    returns = draw(st.sampled_from(("tuple", "dict"))) if extra is not None else "tensor"
    return Program(tuple(draft.inputs), tuple(draft.body), extra, returns)


def _change_region(draw: st.DrawFn, draft: Draft) -> None:
    """Now and then enter another region, or leave one."""
    change = draw(st.sampled_from(("stay", "stay", "enter", "leave")))
    if change == "leave":
        draft.region = draft.region[:-1]
    elif change == "enter" and len(draft.region) < 3:
        names = [name for name in REGIONS if name != "enable" or not records(draft.region)]
        draft.region = (*draft.region, draw(st.sampled_from(names)))


def _grow(draw: st.DrawFn, draft: Draft, features: _Features) -> None:
    """Add an operation on one of the values so far."""

    def pick(values: list[int]) -> int:
        return values[min(draw(_BACK), len(values) - 1)]

    x = pick([k for k in reversed(range(len(draft.kinds))) if draft.kinds[k].layout in ACTIVATIONS])
    names = [op for op in draft.operations(x) if op != "stack" or features.hooks]
    if features.dtypes:
        names += ["to", "to"]
    if features.hooks:
        names += draft.hooks(x) * 2
    op = draw(st.sampled_from(names))
    pairs = draft.second_arguments(x)
    if op == "bias":
        draft.bias(draft.kinds[x].layout)
    elif op in ("stem", "encode"):
        _put(draw, draft, features, op, (0 if op == "stem" else 1,))
    elif op in ("first", "second"):
        _put(draw, draft, features, op, (pick(draft.find("pair")),))
    elif op == "to":
        dtypes = [dtype for dtype in _DTYPES if dtype is not draft.kinds[x].dtype]
        draft.append("to", (x,), dtype=draw(st.sampled_from(dtypes)))
    elif op == "residual":
        _residual(draw, draft, features, x)
    elif op in pairs:
        _put(draw, draft, features, op, (x, pick(pairs[op])))
    elif op in TENSOR_HOOKS:  # mostly in a module that is kept whole: elsewhere it is refused
        draft.append(op, (x,), whole=draw(st.sampled_from((True,) * 23 + (False,))))
    else:
        _put(draw, draft, features, op, (x,))


def _residual(draw: st.DrawFn, draft: Draft, features: _Features, x: int) -> None:
    """Add layers with a shortcut around them, whose module does nothing; it runs before them or behind."""
    shortcut, first = draw(st.sampled_from(("identity", "empty"))), draw(st.booleans())
    kept = _put(draw, draft, features, shortcut, (x,)) if first else x
    h, weight = x, "conv" if draft.kinds[x].layout == "image" else "linear"
    for op in (weight, draw(st.sampled_from(("relu", "tanh"))), weight)[: draw(st.sampled_from((1, 2, 3)))]:
        h = _put(draw, draft, features, op, (h,))
    kept = kept if first else _put(draw, draft, features, shortcut, (x,))
    _put(draw, draft, features, "add", (h, kept))


def _put(draw: st.DrawFn, draft: Draft, features: _Features, op: str, args: tuple[int, ...]) -> int:
    """Add an instruction, now and then with the layer, or the weight, of an earlier one, and with hooks."""
    source, kind = draft.kinds[args[0]], draft.result(op, args)
    dtype = layer_dtype(source, draft.region)
    alike = [
        k
        for k, step in enumerate(draft.body)
        if (step.op, step.source, step.kind) == (op, source, kind)
        and layer_dtype(step.source, step.region) is dtype
        and not any(hook.on_layer for hook in step.hooks)
    ]
    other = draw(st.sampled_from(alike)) if op in WITH_LAYER and alike and draw(st.booleans()) else None
    tied = other is not None and draw(st.booleans())
    shared = other is not None and not tied
    hooks = _hooks(draw, draft, op, args, shared) if features.hooks and op not in _WITHOUT_HOOKS else ()
    whole = features.hooks and not hooks and draw(st.sampled_from((False,) * 15 + (True,)))
    return draft.append(op, args, other=other, tied=tied, hooks=hooks, whole=whole)


def _hooks(draw: st.DrawFn, draft: Draft, op: str, args: tuple[int, ...], shared: bool) -> tuple[Hook, ...]:
    """Draw what hangs on the module of an instruction."""
    if op != "stack" and draw(st.sampled_from((True, True, False))):
        return ()
    kinds = list(_LAYERLESS_HOOKS)
    if op in _PASSES_VALUES_ON:
        kinds = ["observe", "forward", "pre"]
    elif not (draft.live[args[0]] and records(draft.region)):
        kinds.remove("backward")
    if draft.owns(op) and not draft.frozen and op != "stack":
        kinds = [*ON_PARAMETERS, *kinds]
    kind = draw(st.sampled_from(kinds))
    on_layer = draft.has_layer(op) and not shared and kind not in ON_PARAMETERS and draw(st.booleans())
    return (Hook(kind, on_layer),)

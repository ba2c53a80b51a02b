"""The strategy that draws the programs of :mod:`random_models`, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hypothesis import strategies as st
from random_models import (
    KEEPS_ARGUMENTS,
    KEEPS_RESULT,
    PER_CHANNEL,
    VIEWS,
    WITH_LAYER,
    Instruction,
    Kind,
    Layout,
    Program,
)

ACTIVATIONS = ("image", "flat", "tokens", "token", "vector")
_SAME = (
    "tanh",
    "relu",
    "sin",
    "dropout",
    "identity",
    "return",
    "compare",
    "tick",
    "tick_in_training",
    "level",
    "detach",
)
_BY_LAYOUT = {
    "image": ("conv", "conv", "conv", "batch_norm", "group_norm", "max_pool", "flatten", "pool"),
    "flat": ("linear", "linear", "linear", "batch_norm", "unflatten", "transpose", "pool"),
    "tokens": ("linear", "linear", "linear", "layer_norm", "transpose", "pool"),
    "token": ("linear",),
    "vector": ("linear", "linear", "linear", "batch_norm", "layer_norm", "unsqueeze"),
}
_RESULT = {"flatten": "flat", "unflatten": "image", "pool": "vector", "unsqueeze": "token", "compare": "mask"}


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
    places=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(lambda p: tuple(sorted(p)))
    | st.none(),
)


@dataclass
class _Draft:
    """A program under way, with what may still be overwritten."""

    inputs: list[Kind]
    body: list[Instruction] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # value -> the first value in the same memory
    fixed: set[int] = field(default_factory=set)  # memory that a backward has kept, or an input

    def __post_init__(self) -> None:
        self.kinds = list(self.inputs)
        self.memory = list(range(len(self.inputs)))
        self.fixed = set(self.memory)

    def find(self, layout: str, channels: int | None = None, of: str | None = None) -> list[int]:
        """Return the values of a kind, the latest first."""
        return [
            k
            for k in reversed(range(len(self.kinds)))
            if self.kinds[k].layout == layout
            and channels in (None, self.kinds[k].channels)
            and of in (None, self.kinds[k].of)
        ]

    def append(self, op: str, args: tuple[int, ...], other: int | None = None, tied: bool = False) -> None:
        """Add an instruction."""
        number, source = len(self.kinds), self.kinds[args[0]]
        kind = self.result(op, args)
        self.body.append(Instruction(op, args, kind, source, other, tied))
        self.kinds.append(kind)
        # In evaluation dropout hands its argument on: what may not be overwritten there may not be here.
        self.memory.append(self.memory[args[0]] if op in (*VIEWS, "dropout") else number)
        if op in KEEPS_ARGUMENTS:
            self.fixed |= {self.memory[a] for a in args}
        if op in KEEPS_RESULT:
            self.fixed.add(self.memory[number])

    def bias(self, layout: Layout) -> None:
        """Add what is made of parameters alone."""
        number, kind = len(self.kinds), Kind("bias", of=layout)
        self.body.append(Instruction("bias", (), kind, kind))
        self.kinds.append(kind)
        self.memory.append(number)
        self.fixed.add(number)

    def result(self, op: str, args: tuple[int, ...]) -> Kind:
        """Return what an operation makes."""
        source = self.kinds[args[0]]
        layout, channels = source.layout, source.channels
        if op in ("stem", "encode"):
            return Kind("image" if op == "stem" else "vector")
        if op == "chunk":
            return Kind("pair", channels // 2, layout)
        if op in ("first", "second"):
            return Kind(source.of, channels)
        if op == "cat":
            return Kind(layout, channels + self.kinds[args[1]].channels)
        if op == "compare":
            return Kind("mask", channels, layout)
        if op == "transpose":
            return Kind("tokens" if layout == "flat" else "flat", channels)
        if op == "conv" or (op == "linear" and layout != "flat"):
            return Kind(layout, 4)
        return Kind(_RESULT.get(op, layout), channels)

    def second_arguments(self, x: int) -> dict[str, list[int]]:
        """Return which values may go with `x` into the operations of two arguments, the latest first."""
        kind = self.kinds[x]
        same = self.find(kind.layout, kind.channels)
        found = {"add": same, "mul": same, "gate": self.find("mask", kind.channels, kind.layout)}
        joined = [y for y in self.find(kind.layout) if self.kinds[y].channels + kind.channels <= 8]
        found["cat"] = joined if kind.layout in ("image", "flat", "tokens", "vector") else []
        found["add_token"] = self.find("token", kind.channels) if kind.layout == "tokens" else []
        found["add_bias"] = self.find("bias", of=kind.layout) if kind.channels == 4 else []
        if self.memory[x] not in self.fixed:
            found["iadd"] = same
            found["assign"] = self.find(kind.layout, 2) if kind.channels == 4 else []
        return {op: values for op, values in found.items() if values}

    def operations(self, x: int) -> list[str]:
        """Return the operations that may read `x` first, the plainest in front."""
        kind = self.kinds[x]
        names = [*_BY_LAYOUT[kind.layout], *_SAME]
        if kind.channels == 4 and kind.layout in PER_CHANNEL:
            names += ["position", "scale", "masked", "bias", "position", "scale"]
        if kind.channels >= 4 and kind.layout != "token":
            names.append("chunk")
        names += [*self.second_arguments(x), "add", "mul"]
        if self.memory[x] not in self.fixed:
            names += ["relu_inplace", "imul", "fill", "relu_inplace", "imul", "fill"]
        if self.find("pair"):
            names += ["first", "second"]
        return [*names, "stem", *(["encode"] if len(self.inputs) > 1 else [])]


_BACK = st.sampled_from((0, 0, 0, 0, 1, 2, 3, 6))
"""How far back an argument is looked for: mostly the latest value, so that there is a way through the model to cut."""


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Draw a program."""
    draft = _Draft([Kind("raw", 3), *([Kind("code")] if draw(st.booleans()) else [])])
    draft.append("stem", (0,))
    if draw(st.booleans()):
        draft.append("flatten", (len(draft.inputs),))
        draft.append("transpose", (len(draft.inputs) + 1,))

    def pick(values: list[int]) -> int:
        return values[min(draw(_BACK), len(values) - 1)]

    for _ in range(draw(st.integers(2, 16))):
        floats = [k for k in reversed(range(len(draft.kinds))) if draft.kinds[k].layout in ACTIVATIONS]
        x = pick(floats)
        op = draw(st.sampled_from(draft.operations(x)))
        if op == "bias":
            draft.bias(draft.kinds[x].layout)
        elif op in ("stem", "encode"):
            _append(draw, draft, op, (0 if op == "stem" else 1,))
        elif op in ("first", "second"):
            draft.append(op, (pick(draft.find("pair")),))
        elif op in (pairs := draft.second_arguments(x)):
            draft.append(op, (x, pick(pairs[op])))
        else:
            _append(draw, draft, op, (x,))
    last = next(k for k in reversed(range(len(draft.kinds))) if draft.kinds[k].layout in ACTIVATIONS)
    if draft.kinds[last].layout != "vector":
        draft.append("pool", (last,))
        last = len(draft.kinds) - 1
    extras = [k for k in range(len(draft.inputs), last) if draft.kinds[k].layout in ACTIVATIONS]
    draft.append("logits", (last,))
    extra = draw(st.none() | st.sampled_from(extras)) if extras else None
    returns = draw(st.sampled_from(("tuple", "dict"))) if extra is not None else "tensor"
    return Program(tuple(draft.inputs), tuple(draft.body), extra, returns)


def _append(draw: st.DrawFn, draft: _Draft, op: str, args: tuple[int, ...]) -> None:
    """Add an instruction, now and then with the layer, or the weight, of an earlier one."""
    source, kind = draft.kinds[args[0]], draft.result(op, args)
    alike = [k for k, step in enumerate(draft.body) if (step.op, step.source, step.kind) == (op, source, kind)]
    if op in WITH_LAYER and alike and draw(st.booleans()):
        draft.append(op, args, other=draw(st.sampled_from(alike)), tied=draw(st.booleans()))
    else:
        draft.append(op, args)

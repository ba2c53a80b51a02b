"""A random program under way: what its values are, which of them may still be overwritten, which hold a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from random_instructions import Hook, Instruction, Kind, Layout
from random_operations import (
    KEEPS_ARGUMENTS,
    KEEPS_RESULT,
    NEW_VIEWS,
    PER_CHANNEL,
    VIEWS,
    WEIGHTY,
    WITH_LAYER,
    WRITES,
    attribute,
    records,
    result_dtype,
)

ACTIVATIONS = ("image", "flat", "tokens", "token", "vector")
_SAME = (
    *("tanh", "relu", "sin", "dropout", "identity", "return", "compare", "tick", "tick_in_training", "level", "detach"),
)
_BY_LAYOUT = {
    "image": ("conv", "conv", "conv", "batch_norm", "group_norm", "max_pool", "flatten", "pool"),
    "flat": ("linear", "linear", "linear", "batch_norm", "unflatten", "transpose", "pool"),
    "tokens": ("linear", "linear", "linear", "layer_norm", "transpose", "pool", "stack"),
    "token": ("linear",),
    "vector": ("linear", "linear", "linear", "batch_norm", "layer_norm", "unsqueeze", "stack"),
}
_RESULT = {"flatten": "flat", "unflatten": "image", "pool": "vector", "unsqueeze": "token", "compare": "mask"}
_LAYERS = ("relu", "relu_inplace", "dropout", "max_pool", "identity", "empty", "stack", *WITH_LAYER)
_SAME_OBJECT = ("identity", "empty", "return", "tick", "tick_in_training", "hook", "hook_if_grad", "hook_in_training")
_BLIND = ("detach", "compare")


@dataclass
class Draft:
    """A program under way.

    Attributes:
        inputs: its inputs.
        body: its instructions.
        kinds: of its values.
        memory: value -> the first value in the same memory.
        fixed: memory that a backward has kept, or an input, or a view that autograd does not let be overwritten.
        live: value -> whether it requires a gradient; False in case of doubt.
        region: the regions that the next instructions run in.
        frozen: whether the parameters of the next ones require no gradient.
    """

    inputs: list[Kind]
    body: list[Instruction] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)
    live: list[bool] = field(default_factory=list)
    region: tuple[str, ...] = ()
    frozen: bool = False
    _written: dict[int, int] = field(default_factory=dict)  # memory -> the last value that overwrote it
    _frozen_attributes: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kinds = list(self.inputs)
        self.memory = list(range(len(self.inputs)))
        self.fixed, self.live = set(self.memory), [False] * len(self.inputs)

    def find(self, layout: str, channels: int | None = None, of: str | None = None) -> list[int]:
        """Return the values of a kind, the latest first."""
        return [
            k
            for k in reversed(range(len(self.kinds)))
            if self.kinds[k].layout == layout
            and channels in (None, self.kinds[k].channels)
            and of in (None, self.kinds[k].of)
        ]

    def append(
        self,
        op: str,
        args: tuple[int, ...],
        *,
        other: int | None = None,
        tied: bool = False,
        dtype: torch.dtype | None = None,
        hooks: tuple[Hook, ...] = (),
        whole: bool = False,
    ) -> int:
        """Add an instruction; return the number of its value."""
        number = len(self.kinds)
        step = Instruction(
            op,
            args,
            self.result(op, args, dtype),
            self.kinds[args[0]],
            other,
            tied,
            self.region,
            self.frozen,
            hooks,
            whole,
        )
        self._add(step)
        changes = {hook.kind for hook in hooks} & {"forward", "pre"}
        # In evaluation dropout hands its argument on: what may not be overwritten there may not be here.
        self.memory.append(self.memory[args[0]] if op in (*VIEWS, "dropout") and not changes else number)
        if op in WRITES:
            self._written[self.memory[args[0]]] = number
        if op in KEEPS_ARGUMENTS:
            self.fixed |= {self.memory[a] for a in args}
        if op in KEEPS_RESULT:
            self.fixed.add(self.memory[number])
        if op in NEW_VIEWS and not records(self.region):  # such a view may not be overwritten outside
            self.fixed.add(self.memory[number])
        if any(hook.kind.startswith("backward") for hook in hooks):  # makes views that may not be overwritten
            self.fixed |= {self.memory[number], *(self.memory[a] for a in args)}
        return number

    def bias(self, layout: Layout) -> None:
        """Add what is made of parameters alone."""
        number, source = len(self.kinds), Kind("bias", of=layout, dtype=self.inputs[0].dtype)
        self._add(Instruction("bias", (), source, source, region=self.region, frozen=self.frozen))
        self.memory.append(number)
        self.fixed.add(number)

    def _add(self, step: Instruction) -> None:
        """Note an instruction, and whether its value requires a gradient."""
        name = attribute(step)
        frozen = self._frozen_attributes.setdefault(name, step.frozen) if name is not None else step.frozen
        if step.other is not None and not step.tied:
            frozen = self.body[step.other].frozen
        source = bool(step.args) and self.live[step.args[0]]
        live = any(self.live[a] for a in step.args) or (self.owns(step.op) and not frozen)
        if not records(step.region):
            live = step.op in (*_SAME_OBJECT, *WRITES) and source and not step.hooks
        self.body.append(step)
        self.kinds.append(step.kind)
        self.live.append(live and step.op not in _BLIND)

    def hooks(self, x: int) -> list[str]:
        """Return the operations that may put a hook on a value.

        PyTorch (2.14) crashes where one is put on a view that was overwritten through another one.
        """
        if self._written.get(self.memory[x], -1) > x:
            return []
        return ["hook_if_grad", "hook_in_training", *(["hook"] if self.live[x] else [])]

    def owns(self, op: str) -> bool:
        """Whether an operation has parameters, or reads one of the model's own."""
        return op in WITH_LAYER or op in WEIGHTY or op in ("position", "scale", "bias")

    def has_layer(self, op: str) -> bool:
        """Whether an operation calls a layer."""
        return op in _LAYERS

    def result(self, op: str, args: tuple[int, ...], dtype: torch.dtype | None = None) -> Kind:
        """Return what an operation makes, of a dtype if one is given."""
        source = self.kinds[args[0]]
        layout, channels, of = source.layout, source.channels, None
        if op in ("stem", "encode"):
            layout, channels = "image" if op == "stem" else "vector", 4
        elif op in ("chunk", "compare"):
            layout, of = "pair" if op == "chunk" else "mask", layout
            channels = channels // 2 if op == "chunk" else channels
        elif op in ("first", "second"):
            layout = source.of
        elif op == "cat":
            channels += self.kinds[args[1]].channels
        elif op == "transpose":
            layout = "tokens" if layout == "flat" else "flat"
        elif op == "conv" or (op == "linear" and layout != "flat"):
            channels = 4
        else:
            layout = _RESULT.get(op, layout)
        found = result_dtype(op, [self.kinds[a] for a in args], self.region) if dtype is None else dtype
        return Kind(layout, channels, of, found)

    def second_arguments(self, x: int) -> dict[str, list[int]]:
        """Return which values may go with `x` into the operations of two arguments, the latest first."""
        kind = self.kinds[x]
        same = self.find(kind.layout, kind.channels)
        found = {"add": same, "mul": same, "gate": self.find("mask", kind.channels, kind.layout)}
        joined = [y for y in self.find(kind.layout) if self.kinds[y].channels + kind.channels <= 8]
        found["cat"] = joined if kind.layout in ("image", "flat", "tokens", "vector") else []
        found["add_token"] = self.find("token", kind.channels) if kind.layout == "tokens" else []
        found["add_bias"] = self.find("bias", of=kind.layout) if kind.channels == 4 else []
        others = [y for layout in ACTIVATIONS for y in self.find(layout) if self.kinds[y].dtype is not kind.dtype]
        found["to_like"] = sorted(others, reverse=True)
        if self.memory[x] not in self.fixed:
            found["iadd"] = same
            found["assign"] = self.find(kind.layout, 2) if kind.channels == 4 else []
        return {op: values for op, values in found.items() if values}

    def operations(self, x: int) -> list[str]:
        """Return the operations that may read `x` first, the plainest in front."""
        kind = self.kinds[x]
        names = [*_BY_LAYOUT[kind.layout], *_SAME]
        if kind.channels == 4:
            names += ["residual", "residual"]
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

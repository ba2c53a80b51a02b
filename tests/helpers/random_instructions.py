"""What a random program is: values of typed layouts, numbered, and instructions that make one of others.

Values are numbered: the inputs first, then one an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["raw", "code", "image", "flat", "tokens", "token", "vector", "bias", "pair", "mask"]
FULL, SINGLE = torch.float64, torch.float32


@dataclass(frozen=True)
class Kind:
    """What a value is: ``image`` (N, C, 4, 4), ``flat`` (N, C, 16), ``tokens`` (N, 16, C), ``token`` (N, 1, C),
    ``vector`` (N, C), an input, or no activation: a ``bias`` made of parameters alone, a ``pair`` of activations, a
    boolean ``mask``.
    """

    layout: Layout
    channels: int = 4
    of: Layout | None = None  # of a bias, a pair or a mask: the layout that it belongs to
    dtype: torch.dtype = FULL

    def __str__(self) -> str:
        return self.layout if self.dtype is FULL else f"{self.layout} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Hook:
    """A hook that hangs on the module of an instruction, or on the layer in it, or on its parameters.

    Attributes:
        kind: ``forward`` and ``pre`` change values, ``observe`` counts calls, ``backward``, ``backward_if`` (which
            looks whether there is a gradient) and ``backward_pre`` scale gradients of values, ``parameter`` and
            ``accumulated`` those of parameters.
        on_layer: on the layer in the place of the module around it.
    """

    kind: str
    on_layer: bool = False

    def __str__(self) -> str:
        return f"{self.kind} on layer" if self.on_layer else self.kind


@dataclass(frozen=True)
class Instruction:
    """``value = op(*args)``; with `other`, by the layer of an earlier instruction, or by one that has its weight.

    Attributes:
        region: the regions that it runs in, the outermost first (:data:`random_operations.REGIONS`).
        frozen: its own parameters require no gradient.
        hooks: what hangs on its module.
        whole: its module is one node, by ``leaf_modules=``.
    """

    op: str
    args: tuple[int, ...]
    kind: Kind  # of the result
    source: Kind  # of the first argument
    other: int | None = None
    tied: bool = False
    region: tuple[str, ...] = ()
    frozen: bool = False
    hooks: tuple[Hook, ...] = ()
    whole: bool = False

    @property
    def is_node(self) -> bool:
        """Whether its module is one node of a graph: by name, or because hooks on its forward or backward hang there.

        Hooks of parameters, and those of the layer inside, leave the module around it to be recorded.
        """
        return self.whole or any(not hook.on_layer and hook.kind not in ON_PARAMETERS for hook in self.hooks)

    def notes(self) -> str:
        """Return what is special about it, for people."""
        found = [f"{'tied to' if self.tied else 'again'} steps.{self.other}"] if self.other is not None else []
        found += [f"in {'/'.join(self.region)}"] if self.region else []
        found += ["frozen"] if self.frozen else []
        found += ["whole"] if self.whole else []
        found += [f"hooks {', '.join(map(str, self.hooks))}"] if self.hooks else []
        return f"  # {'; '.join(found)}" if found else ""


ON_PARAMETERS = ("parameter", "accumulated")
"""Kinds of hooks that hang on parameters."""


@dataclass(frozen=True)
class Program:
    """A model: its inputs, its instructions (the last one makes the logits), and what it returns besides the logits."""

    inputs: tuple[Kind, ...]
    body: tuple[Instruction, ...]
    extra: int | None = None
    returns: Literal["tensor", "tuple", "dict"] = "tensor"

    @property
    def outputs(self) -> tuple[int, ...]:
        """The numbers of the values that the model returns, the logits first."""
        last = len(self.inputs) + len(self.body) - 1
        return (last,) if self.extra is None else (last, self.extra)

    @property
    def base(self) -> torch.dtype:
        """The dtype of the inputs."""
        return self.inputs[0].dtype

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all values, and those that regions cast to."""
        return {kind.dtype for step in self.body for kind in (step.kind, step.source)} | {self.base}

    @property
    def whole(self) -> list[str]:
        """The paths of the modules that are to be kept whole."""
        return [f"steps.{k}" for k, step in enumerate(self.body) if step.whole]

    def __str__(self) -> str:
        names = [f"v{k} = <{kind}>" for k, kind in enumerate(self.inputs)]
        for k, step in enumerate(self.body):
            arguments = ", ".join(f"v{a}" for a in step.args)
            names.append(f"v{k + len(self.inputs)} = steps.{k}:{step.op}({arguments}) -> {step.kind}{step.notes()}")
        return "\n".join([*names, f"return {self.returns} {self.outputs}"])

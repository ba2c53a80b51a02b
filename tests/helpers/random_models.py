"""Random small models: a program of typed instructions, a module that runs it as plain PyTorch, a strategy that draws.

Every instruction is one operation in a module of its own, ``steps.<k>``, so that a cut's name says which one it ends.
Values are numbered: the inputs first, then one an instruction. The strategy keeps to what autograd allows: nothing is
overwritten that a backward has kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, CLASSES = 4, 3
INPUT_SHAPES = {"raw": (3, 8, 8), "code": (4,)}

Layout = Literal["raw", "code", "image", "flat", "tokens", "token", "vector", "bias", "pair", "mask"]


@dataclass(frozen=True)
class Kind:
    """What a value is: ``image`` (N, C, 4, 4), ``flat`` (N, C, 16), ``tokens`` (N, 16, C), ``token`` (N, 1, C),
    ``vector`` (N, C), an input, or no activation: a ``bias`` made of parameters alone, a ``pair`` of activations, a
    boolean ``mask``.
    """

    layout: Layout
    channels: int = 4
    of: Layout | None = None  # of a bias, a pair or a mask: the layout that it belongs to


@dataclass(frozen=True)
class Instruction:
    """``value = op(*args)``; with `other`, by the layer of an earlier instruction, or by one that has its weight."""

    op: str
    args: tuple[int, ...]
    kind: Kind  # of the result
    source: Kind  # of the first argument
    other: int | None = None
    tied: bool = False


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

    def __str__(self) -> str:
        names = [f"v{k} = <{kind.layout}>" for k, kind in enumerate(self.inputs)]
        for k, step in enumerate(self.body):
            arguments = ", ".join(f"v{a}" for a in step.args)
            by = "" if step.other is None else f"  # {'tied to' if step.tied else 'again'} steps.{step.other}"
            names.append(f"v{k + len(self.inputs)} = steps.{k}:{step.op}({arguments}) -> {step.kind.layout}{by}")
        return "\n".join([*names, f"return {self.returns} {self.outputs}"])


# ---- what the operations do ----------------------------------------------------------------------------------------


def _layer(op: str, source: Kind, kind: Kind) -> nn.Module | None:
    """Make the layer that an operation calls; None if it calls a function."""
    wide, narrow = source.channels, kind.channels
    if op == "linear":
        return nn.Linear(16, 16) if source.layout == "flat" else nn.Linear(wide, narrow)
    made: Mapping[str, Callable[[], nn.Module]] = {
        "stem": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
        "encode": lambda: nn.Linear(4, 4),
        "conv": lambda: nn.Conv2d(wide, narrow, 3, padding=1),
        "batch_norm": lambda: nn.BatchNorm2d(wide) if source.layout == "image" else nn.BatchNorm1d(wide),
        "group_norm": lambda: nn.GroupNorm(2, wide),
        "layer_norm": lambda: nn.LayerNorm(wide),
        "relu": nn.ReLU,
        "relu_inplace": lambda: nn.ReLU(inplace=True),
        "dropout": lambda: nn.Dropout(0.3),
        "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
        "identity": nn.Identity,
        "logits": lambda: nn.Linear(wide, CLASSES),
    }
    return made[op]() if op in made else None


def _iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _imul(x: Tensor) -> Tensor:
    x *= 0.5
    return x


def _fill(x: Tensor) -> Tensor:
    x[:, 0] = 0.5
    return x


def _assign(x: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    if channel_dim == 1:
        x[:, 2:] = y
    else:
        x[..., 2:] = y
    return x


def _tick(x: Tensor, level: Tensor) -> Tensor:
    level.add_(0.25)
    return x


def _function(op: str, source: Kind) -> Callable[..., Any]:
    """Return what an operation without a layer does. Those that read the model get its tensor as the last argument."""
    dim = -1 if source.layout == "tokens" else 1
    functions: Mapping[str, Callable[..., Any]] = {
        "tanh": torch.tanh,
        "sin": lambda x: x.sin(),
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "gate": lambda x, mask: x * mask,
        "compare": lambda x: x > 0,
        "cat": lambda x, y: torch.cat([x, y], dim),
        "chunk": lambda x: x.chunk(2, dim),
        "first": lambda pair: pair[0],
        "second": lambda pair: pair[1],
        "flatten": lambda x: x.flatten(2),
        "unflatten": lambda x: x.unflatten(2, (4, 4)),
        "transpose": lambda x: x.transpose(1, 2),
        "pool": lambda x: x.mean({"image": (2, 3), "flat": 2}.get(source.layout, 1)),
        "unsqueeze": lambda x: x.unsqueeze(1),
        "detach": lambda x: x.detach(),
        "iadd": _iadd,
        "imul": _imul,
        "fill": _fill,
        "assign": functools.partial(_assign, channel_dim=dim),
        "return": lambda x: x,
        "tick": _tick,
        "tick_in_training": _tick,
        "level": lambda x, level: x + level,
        "masked": lambda x, keep: x * keep,
        "position": lambda x, table: x + table,
        "scale": lambda x, weight: x * weight,
        "bias": lambda table: table.exp(),
        "add_bias": lambda x, bias: x + bias,
        "add_token": lambda x, token: x + token,
    }
    return functions[op]


WRITES = ("relu_inplace", "iadd", "imul", "fill", "assign")
"""Operations that overwrite their first argument."""
KEEPS_ARGUMENTS = ("stem", "encode", "conv", "linear", "batch_norm", "group_norm", "layer_norm", "max_pool", "mul")
KEEPS_ARGUMENTS += ("gate", "masked", "scale", "sin", "chunk", "logits")
KEEPS_RESULT = ("tanh", "relu", "relu_inplace", "bias")
VIEWS = ("flatten", "unflatten", "transpose", "unsqueeze", "first", "second", "chunk", "detach", "identity", "return")
VIEWS += ("tick", "tick_in_training", *WRITES)
WITH_LAYER = ("conv", "linear", "batch_norm", "group_norm", "layer_norm", "stem", "encode")

PER_CHANNEL = {"image": (4, 1, 1), "flat": (4, 1), "tokens": (4,), "vector": (4,)}
_PER_EXAMPLE = {"image": (4, 4, 4), "flat": (4, 16), "tokens": (16, 4), "vector": (4,)}


def attribute(step: Instruction) -> str | None:
    """Name the model's own parameter or buffer that an instruction reads directly."""
    layout = step.kind.of or step.source.layout
    if step.op in ("tick", "tick_in_training", "level"):
        return "level"
    names = {"masked": "keep", "position": "position", "scale": "scale", "bias": "scale"}
    return f"{names[step.op]}_{layout}" if step.op in names else None


class Step(nn.Module):
    """One instruction."""

    def __init__(self, step: Instruction, layer: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.function = None if layer is not None else _function(step.op, step.source)
        self.only_in_training = step.op == "tick_in_training"

    def forward(self, *args: Any) -> Any:
        if self.only_in_training and not self.training:
            return args[0]
        return self.layer(*args) if self.layer is not None else self.function(*args)


class RandomModel(nn.Module):
    """A program, run."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, made = program, list[Step]()
        for step in program.body:
            layer = _layer(step.op, step.source, step.kind)
            if step.other is not None and not step.tied:
                layer = made[step.other].layer
            elif step.other is not None:
                layer.weight = made[step.other].layer.weight
            made.append(Step(step, layer))
        self.steps = nn.ModuleList(made)
        for name in dict.fromkeys(filter(None, map(attribute, program.body))):
            use, _, layout = name.partition("_")
            if use == "position":
                setattr(self, name, nn.Parameter(torch.randn(_PER_EXAMPLE[layout])))
            elif use == "scale":
                setattr(self, name, nn.Parameter(torch.randn(PER_CHANNEL[layout])))
            elif use == "keep":
                self.register_buffer(name, (torch.arange(4) != 2).float().view(PER_CHANNEL[layout]))
            else:
                self.register_buffer(name, torch.tensor(0.5))

    def run(self, *inputs: Tensor) -> Any:
        """Run the instructions one after the other."""
        values: list[Any] = list(inputs)
        for step, instruction in zip(self.steps, self.program.body, strict=True):
            arguments = [values[a] for a in instruction.args]
            name = attribute(instruction)
            values.append(step(*arguments, *([getattr(self, name)] if name is not None else [])))
        return self.result(values)

    def result(self, values: list[Any]) -> Any:
        """Return the values that the model returns, in its own form."""
        found = [values[k] for k in self.program.outputs]
        if self.program.returns == "dict":
            return dict(zip(("logits", "extra"), found, strict=False))
        return tuple(found) if self.program.returns == "tuple" else found[0]

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class TwoInputs(RandomModel):
    """A program with a second input."""

    def forward(self, x: Tensor, code: Tensor) -> Any:
        return self.run(x, code)


def build(program: Program) -> RandomModel:
    """Make the model of a program in float64, the same every time, no parameter of it zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (RandomModel if len(program.inputs) == 1 else TwoInputs)(program).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(program: Program) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return inputs and classes."""
    noise = torch.Generator().manual_seed(1)
    made = (torch.randn(BATCH, *INPUT_SHAPES[k.layout], generator=noise, dtype=torch.float64) for k in program.inputs)
    return tuple(made), torch.arange(BATCH) % CLASSES


def objective(output: Any, target: Tensor) -> Tensor:
    """Return a loss of everything that a model, or a head in its place, returns."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    logits, *others = output.values() if isinstance(output, dict) else output
    loss = F.cross_entropy(logits, target)
    for other in others:
        loss = loss if other is None else loss + 0.1 * other.square().mean()
    return loss

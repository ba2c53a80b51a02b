"""Random small models: a module that runs a program of typed instructions as plain PyTorch, with data and a loss.

Every instruction is one operation in a module of its own, ``steps.<k>``, so that a cut's name says which one it ends.
"""

from __future__ import annotations

from typing import Any

import torch
from random_instructions import ON_PARAMETERS, Instruction, Kind, Program
from random_operations import (
    CLASSES,
    INPUT_SHAPES,
    PER_CHANNEL,
    PER_EXAMPLE,
    REGIONS,
    attribute,
    function_of,
    hang,
    hang_on_parameters,
    layer_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 4


class Step(nn.Module):
    """One instruction."""

    def __init__(self, step: Instruction, layer: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.function = None if layer is not None else function_of(step)
        self.only_in_training = step.op in ("tick_in_training", "hook_in_training")

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
            layer = layer_of(step)
            if layer is not None and step.frozen:
                layer.requires_grad_(False)
            if step.other is not None and not step.tied:
                layer = made[step.other].layer
            elif step.other is not None:
                layer.weight = made[step.other].layer.weight
            made.append(Step(step, layer))
        self.steps = nn.ModuleList(made)
        for step in program.body:
            name = attribute(step)
            if name is not None and not hasattr(self, name):
                self._add(name, step)

    def _add(self, name: str, step: Instruction) -> None:
        """Make the model's own parameter or buffer that an instruction is the first to read."""
        use, layout, dtype = name.partition("_")[0], step.kind.of or step.source.layout, step.source.dtype
        if use in ("position", "scale"):
            shape = PER_EXAMPLE[layout] if use == "position" else PER_CHANNEL[layout]
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=dtype), requires_grad=not step.frozen))
        elif use == "keep":
            self.register_buffer(name, (torch.arange(4) != 2).to(dtype).view(PER_CHANNEL[layout]))
        else:
            self.register_buffer(name, torch.tensor(0.5, dtype=self.program.base))

    def run(self, *inputs: Tensor) -> Any:
        """Run the instructions one after the other."""
        values: list[Any] = list(inputs)
        self._stretch(values, end=len(self.steps), depth=0)
        return self.result(values)

    def _stretch(self, values: list[Any], end: int, depth: int) -> None:
        """Run the instructions up to `end`, `depth` regions around them being entered: the next ones are entered."""
        body, offset = self.program.body, len(self.program.inputs)
        while (k := len(values) - offset) < end:
            if len(body[k].region) == depth:
                arguments = [values[a] for a in body[k].args]
                values.append(self.steps[k](*arguments, *self.attributes(k)))
                continue
            region = body[k].region[: depth + 1]
            behind = next((j for j in range(k, end) if body[j].region[: depth + 1] != region), end)
            with REGIONS[region[-1]]():
                self._stretch(values, end=behind, depth=depth + 1)

    def attributes(self, k: int) -> list[Tensor]:
        """Return the model's own tensor that an instruction reads, if it reads one."""
        name = attribute(self.program.body[k])
        return [] if name is None else [getattr(self, name)]

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
    """Make the model of a program, the same every time, no parameter of it zero, with its hooks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (RandomModel if len(program.inputs) == 1 else TwoInputs)(program)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for k, step in enumerate(program.body):
        for hook in step.hooks:
            module = model.steps[k].layer if hook.on_layer else model.steps[k]
            if hook.kind in ON_PARAMETERS:
                hang_on_parameters(hook, [*module.parameters(), *model.attributes(k)])
            else:
                hang(hook, f"steps.{k}", module)
    return model


def batch(program: Program) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return inputs and classes."""
    noise = torch.Generator().manual_seed(1)

    def made(kind: Kind) -> Tensor:
        values = torch.randn(BATCH, *INPUT_SHAPES[kind.layout], generator=noise, dtype=torch.float64)
        return values.to(kind.dtype)

    return tuple(map(made, program.inputs)), torch.arange(BATCH) % CLASSES


def objective(output: Any, target: Tensor) -> Tensor:
    """Return a loss of everything that a model, or a head in its place, returns."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    logits, *others = output.values() if isinstance(output, dict) else output
    loss = F.cross_entropy(logits, target)
    for other in others:
        loss = loss if other is None else loss + 0.1 * other.square().mean()
    return loss

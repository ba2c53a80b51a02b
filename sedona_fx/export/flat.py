"""A graph as a function of tensors alone, each with a name: what an ONNX file holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sedona_fx.ir.outputs import fields, is_container


class Flat(nn.Module):
    """Calls a graph whose inputs and outputs are containers (mappings, tuples, dataclasses) with tensors.

    Args:
        program: the graph.
        inputs: argument name -> value, for example, in the order in which `program` takes them.

    Attributes:
        inputs: the names of the tensors among the arguments: ``x``, or ``batch.ids`` if an argument is a container.
        outputs: those of the tensors in what `program` returns: ``logits``, ``hidden.0``; ``output`` for a bare one.
    """

    def __init__(self, program: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.program = program
        self.train(program.training)
        leaves, self._spec = pytree.tree_flatten(list(inputs.values()))
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.inputs = [name for name, _ in _in_arguments(inputs)]
        with torch.no_grad():
            self.outputs = [name for name, _ in _in_output(program(*inputs.values()))]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the output in the order of its fields, each of them an object of its own."""
        leaves = list(self._others)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        output = self.program(*pytree.tree_unflatten(leaves, self._spec))
        taken = {id(tensor) for tensor in (*tensors, *self.program.parameters(), *self.program.buffers())}
        results = []
        for _, tensor in _in_output(output):
            results.append(tensor.clone() if id(tensor) in taken else tensor)
            taken.add(id(tensor))
        return tuple(results)


def flat(inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the tensors in the arguments of a call, as :meth:`Flat.forward` takes them."""
    return tuple(tensor for _, tensor in _in_arguments(inputs))


def _in_output(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a model's output with their names."""
    if isinstance(output, Tensor):
        yield path or "output", output
    elif is_container(output):
        for key, value in fields(output):
            start = path if path else "" if isinstance(key, str) else "output"
            yield from _in_output(value, f"{start}.{key}".lstrip("."))


def _in_arguments(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the arguments of a call with their names."""
    for name, value in inputs.items():
        for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                yield ".".join([name, *map(_text, keys)]), leaf


def _text(key: Any) -> str:
    """Return a key of pytree as a user would write it."""
    if isinstance(key, pytree.SequenceKey):
        return str(key.idx)
    return str(key.key if isinstance(key, pytree.MappingKey) else key.name)

"""Attributes that a forward writes: no obstacle to a graph, if they carry no value from one call to the next.

A graph writes no attributes. That makes no difference if the forward writes one before it reads it (``self.feat = h``),
or if it keeps what it would compute again in every call (anchors for a size of image, a table of angles). Which of
these it is, or neither, is found by running the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.capture.hooks import Registrations, watch_hooks
from sedona_fx.capture.keep import keep_gradients, keep_parameters, keep_state
from sedona_fx.capture.state_watch import Left, StateWatch, content_of, refill
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.copies import COMPUTED
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import map_tensors
from sedona_fx.ir.same_numbers import same_bits
from sedona_fx.rng import seed_all

UNWRITTEN = "unwritten_attributes"
"""Key in the ``meta`` of a graph: the attributes that the forward writes and the graph does not."""


def scratch_attributes(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the attributes that the forward leaves behind, if no later call is another one for them; else None.

    This is tested, in the present mode. The model is run on the same inputs and draws from two states, as it is and
    with what another call has left, and must return the same bits and leave the same. That other call is one whose
    results no code can use (all that it left is replaced by bare objects), or, since a cache is read, one on other
    numbers, and one on these with other parameters. In eval mode the latter is followed by ``train()`` and ``eval()``,
    since in between parameters are trained: a cache of what follows from them has to be dropped there.

    Args:
        model: its state is the same afterwards.
        arguments: name -> value.
    """
    inputs = Args(**arguments).first(2).kwargs
    runs = _Runs(model)
    with keep_parameters(model) as overwritten:
        try:
            expected, left = runs.of(inputs)
            again, kept = runs.of(inputs, left)
            if not same_bits(expected, again) or not _same_content(left, kept) or overwritten():
                return None
            paths = tuple(path for one in left for path in one.paths)
            if _succeeds(lambda: same_bits(expected, runs.of(inputs, _poisoned(left))[0])):
                return paths
            _, others = runs.of(_other_numbers(inputs))
            if not _succeeds(lambda: same_bits(expected, runs.of(inputs, others)[0])):
                return None
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point() or parameter.is_complex():
                        parameter.data.mul_(1.25)
            _, others = runs.of(_other_numbers(inputs))
        except Exception:
            return None
    return paths if _succeeds(lambda: same_bits(expected, runs.of(inputs, others, trained=True)[0])) else None


def check_computed(model: nn.Module, example: Args) -> None:
    """Raise TraceError if the forward reads a tensor that the user's model had computed before, from parameters.

    The copy of such a tensor has no graph, so that its gradients would be lost. (That of a weight norm is computed
    again before it is read.) This is tested: with NaN in its place the model must return the same.

    Args:
        model: the copy that the net owns; its state is the same afterwards.
        example: one batch.
    """
    computed = dict(_computed(model))
    runs, inputs = _Runs(model), example.first(2).bind(model.forward) if computed else {}
    for path, tensor in computed.items():
        for training in (True, False):
            with keep_modes(model), keep_state(model):
                model.train(training)
                try:
                    expected, _ = runs.of(inputs)
                except Exception:  # the proof of the graph says so later
                    continue
                with torch.no_grad():
                    tensor.fill_(float("nan"))
                if not _succeeds(lambda: same_bits(expected, runs.of(inputs)[0])):  # noqa: B023 (called at once)
                    raise TraceError(
                        f"the forward of {type(model).__name__} reads the attribute {path!r}, a tensor that was "
                        "computed before, from something that requires a gradient. The net's own copy has no graph to "
                        "that, and its gradients would be lost. Compute it in forward, or detach it."
                    )


def _computed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the attributes that hold copies of computed tensors, with their paths."""

    def within(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor) and hasattr(value, COMPUTED):
            yield path, value
        elif isinstance(value, (dict, list, tuple, deque)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from within(f"{path}.{key}", item)

    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                yield from within(f"{path}.{name}".lstrip("."), value)


def settle(model: nn.Module, example: Args) -> tuple[StateWatch, Registrations, bool]:
    """Run the model twice in eval mode, so that what it notes at its first call alone is noted before it is recorded.

    Returns:
        The watch from before that, which can restore the state without the notes; the hooks that stay with them; and
        whether there are notes.
    """
    watch, registrations = StateWatch(model), Registrations()
    with keep_parameters(model), keep_gradients(model):
        after_one = watch
        with keep_modes(model), torch.no_grad(), watch_hooks(registrations), suppress(Exception):
            for _ in range(2):
                model.eval()(**map_tensors(torch.clone, example.first(2).bind(model.forward)))
                after_one = after_one if after_one is not watch else StateWatch(model)
        if not (notes := watch.settle(after_one)):
            registrations.remove()
    return watch, registrations, notes


class _Runs:
    """Runs of a model from the same seed, each of which leaves its state as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def of(
        self, inputs: Mapping[str, Any], before: Sequence[Left] = (), *, trained: bool = False
    ) -> tuple[Any, list[Left]]:
        """Return the output, and what the run left in attributes: all that differs from the state of the model.

        Args:
            inputs: name -> value.
            before: what an earlier run left.
            trained: whether the model was trained since then: in eval mode it is switched to train mode and back.
        """
        watch = StateWatch(self.model)
        with keep_state(self.model), torch.no_grad():
            for left in before:
                refill(left.container, content_of(left.content, left.names))
            if trained and not self.model.training:
                self.model.train().eval()
            seed_all(0)
            output = map_tensors(Tensor.detach, self.model(**map_tensors(torch.clone, inputs)))
            return map_tensors(torch.clone, output), watch.left()


def _succeeds(test: Any) -> bool:
    """Whether a test is passed, an exception being none."""
    try:
        return bool(test())
    except Exception:
        return False


def _same_content(first: Sequence[Left], second: Sequence[Left]) -> bool:
    """Whether two runs left the same values in the same places: no counter, no list that grows, no average."""
    if [(id(left.container), left.names) for left in first] != [(id(left.container), left.names) for left in second]:
        return False
    return all(_alike(a.content, b.content) for a, b in zip(first, second, strict=True))


def _alike(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(_alike(first[key], second[key]) for key in first)
    if isinstance(first, (Tensor, list, tuple)):
        one, other = (first, second) if isinstance(first, Tensor) else (list(first), list(second))
        return bool(same_bits(one, other))
    plain = isinstance(first, (bool, int, float, complex, str, bytes, torch.dtype, torch.device))
    return bool(first == second) if plain else True  # an object of another class: what is in it is not known


def _poisoned(left: Sequence[Left]) -> list[Left]:
    """Return what a run left with an object that no code can use in the place of everything that it changed."""
    poisoned = []
    for one in left:
        content = one.content.copy()
        if isinstance(content, set):
            raise TypeError("the items of a set have no place")
        for name in one.names:
            content[name] = object()
        poisoned.append(one._replace(content=content))
    return poisoned


def _other_numbers(inputs: Mapping[str, Any]) -> Any:
    """Return inputs of the same shapes with other numbers that are as valid as these."""

    def other(tensor: Tensor) -> Tensor:
        turned = tensor.flip(tuple(range(tensor.dim()))) if tensor.dim() else tensor
        return turned * 0.75 if tensor.is_floating_point() or tensor.is_complex() else turned

    return map_tensors(other, inputs)

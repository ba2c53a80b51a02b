"""The proofs behind a trace: no random draw, no changed state, and the same numbers as the model in both modes."""

from __future__ import annotations

import linecache
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.args import Args
from sedona_fx.errors import DataError, TraceError
from sedona_fx.graph import info

_OURS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its ``training`` flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Give every buffer its values back at the end."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


class StateWatch:
    """Remembers random states, plain attributes and tensors of a model, says what changed, and puts it back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.random = _random_states()
        self.plain = {path: dict(vars(module)) for path, module in model.named_modules()}
        self.tensors = [(name, t, t._version) for name, t in _named_tensors(model)]
        self.registered = {path: _registered(module) for path, module in model.named_modules()}

    def changed(self) -> str:
        """Return what changed since the start, in words, or an empty string."""
        if not _same_states(self.random, _random_states()):
            return "draws random numbers outside of PyTorch's modules"
        for path, module in self.model.named_modules():
            for name in vars(module).keys() | self.plain.get(path, {}).keys():
                before, after = self.plain.get(path, {}).get(name), vars(module).get(name)
                if not name.startswith("_") and before is not after and not _plainly_equal(before, after):
                    return f"changes the attribute {'.'.join(filter(None, (path, name)))!r}"
            for name, before in self.registered.get(path, {}).items():
                if _registered(module).get(name) is not before:
                    return f"replaces the buffer or parameter {'.'.join(filter(None, (path, name)))!r}"
        for name, tensor, version in self.tensors:
            if tensor._version != version:
                return f"overwrites {name!r}"
        return ""

    def restore(self) -> str:
        """Return what changed, after putting random states and attributes back."""
        changed = self.changed()
        if changed:
            for path, module in self.model.named_modules():
                if path in self.plain:
                    for name in vars(module).keys() - self.plain[path].keys():
                        vars(module).pop(name)
                    vars(module).update(self.plain[path])
                    module._buffers.update({k: v for k, v in self.registered[path].items() if k in module._buffers})
            torch.set_rng_state(self.random[0])
            random.setstate(self.random[1])
            np.random.set_state(self.random[2])
        return changed


def _random_states() -> tuple[torch.Tensor, Any, Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _same_states(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    numpy_same = all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    return torch.equal(before[0], after[0]) and before[1] == after[1] and numpy_same


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _registered(module: nn.Module) -> dict[str, Any]:
    return {**module._parameters, **module._buffers}


def _plainly_equal(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) or isinstance(after, torch.Tensor):
        return False
    try:
        return bool(before == after)
    except Exception:
        return False


def user_frame(error: BaseException) -> str:
    """Return ``", file.py line 12: `if x.sum() > 0:`"`` for the user's own last line in a traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    frames = [f for f in frames if f.line and not f.filename.startswith("<")]
    return f", {frames[-1].filename} line {frames[-1].lineno}: `{frames[-1].line}`" if frames else ""


def locate_side_effect(model: nn.Module, retrace: Callable[[], Any]) -> str:
    """Trace once more, looking at the state after every line of the user's code; return the guilty line in words."""
    found: list[str] = []
    watch = StateWatch(model)
    last: dict[FrameType, int] = {}

    def watch_lines(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename.startswith(_OURS):
            return None
        # A line is guilty if the state changed while it ran and no deeper line of the user's was blamed before.
        if not found and frame in last and event in ("line", "return") and watch.changed():
            line = linecache.getline(frame.f_code.co_filename, last[frame]).strip()
            found.append(f", {frame.f_code.co_filename} line {last[frame]}: `{line}`")
        last[frame] = frame.f_lineno
        return watch_lines

    previous = sys.gettrace()
    sys.settrace(watch_lines)
    try:
        retrace()
    finally:
        sys.settrace(previous)
        watch.restore()
    return found[0] if found else ""


def check_equal_forward(model: nn.Module, gm: fx.GraphModule, example: Args, *, training: bool) -> Any:
    """Run the model and its graph once from the same seed: outputs and buffers must be equal bit for bit.

    Returns:
        What the model returned.

    Raises:
        TraceError: they are not; with the first module whose output differs.
        DataError: the model itself cannot run the example.
    """
    mode = "train" if training else "eval"
    given = example.bind(model.forward)
    order = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    clone = Args(**given).map(torch.clone)

    def run(call: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
        with keep_buffers(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            result = call()
            return result, [buffer.detach().clone() for buffer in model.buffers()]

    with keep_modes(model):
        model.train(training)
        try:
            expected, buffers = run(lambda: model(**Args(**given).map(torch.clone).kwargs))
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} in {mode} mode cannot run the first batch {example!r}: "
                f"{type(error).__name__}: {error}. Check the shapes and dtypes of the data."
            ) from error
        inputs = [clone.kwargs[name] for name in order]
        try:
            actual, graph_buffers = run(lambda: gm(*inputs))
        except Exception as error:
            raise TraceError(f"the {mode} graph of {type(model).__name__} does not run: {error}. {_ADVICE}") from error
        if same_bits(expected, actual) and same_bits(buffers, graph_buffers):
            return pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, expected)
        place = _first_difference(model, gm, Args(**given), inputs, run)
    raise TraceError(
        f"the {mode} graph of {type(model).__name__} does not compute what the model computes{place}: its forward "
        f"does something that tracing cannot see (a branch on Python state, a value kept between calls). {_ADVICE}"
    )


_ADVICE = "Name the module in leaf_modules=[...] to keep it whole, or take the hidden state out of its forward."


def same_bits(first: Any, second: Any) -> bool:
    """Return whether two nested values hold the same numbers, NaN equal to NaN."""
    a, a_spec = pytree.tree_flatten(first)
    b, b_spec = pytree.tree_flatten(second)
    if len(a) != len(b) or (a_spec != b_spec and type(first) is not type(second)):
        return False
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.shape != y.shape or x.dtype != y.dtype:
                return False
            if not torch.equal(x, y) and not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
                return False
        elif isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or not _plainly_equal(x, y):
            return x is y
    return True


def _first_difference(model: nn.Module, gm: fx.GraphModule, example: Args, inputs: list[Any], run: Any) -> str:
    """Return ``" (first in layer1.0)"`` for the first module whose output differs between model and graph."""
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _a, out, path=path: seen.setdefault(path, pytree.tree_map_only(torch.Tensor, torch.clone, out))
        )
        for path, module in model.named_modules()
        if path
    ]
    differing: list[str] = []

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            for path in (str(n.target), *info(n).returned_by) if n.op == "call_module" else info(n).returned_by:
                if "#" not in path and path in expected and not same_bits(expected.pop(path), result):
                    differing.append(path)
            return result

    try:
        run(lambda: model(**example.map(torch.clone).kwargs))
        for handle in handles:
            handle.remove()
        expected = dict(seen)
        run(lambda: Compare(gm).run(*inputs))
    except Exception:
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f" (first in {differing[0]!r})" if differing else ""

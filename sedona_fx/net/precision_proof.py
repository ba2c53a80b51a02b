"""Prove captured graphs again in each precision in which they run.

A program that ``torch.export`` captured holds the dtypes that Python code read while it was captured: ``h.to(x.dtype)``
became ``h.to(torch.float32)``, ``finfo(h.dtype).min`` a number. After ``net.bfloat16()``, or under autocast, the model
would read other ones. Symbolic graphs read them when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.capture.sites import match_sites
from sedona_fx.errors import ScheduleError, first_line
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import device_of
from sedona_fx.ir.outputs import fields, map_tensors, without_objects
from sedona_fx.ir.same_numbers import near, same_bits
from sedona_fx.net.trial import Trial
from sedona_fx.runtime.precision import casting

_ROUNDINGS = 4
"""By how many units of the lowest dtype in play a graph with the model's own constants may differ from the model."""
_BASE = "sedona_constants"
"""Key in ``node.meta`` of the constants that a node was captured with."""
Precision = tuple[torch.dtype | None, tuple[torch.dtype, ...]]
"""To what autocast casts (None: it does not), and the dtypes of the model's tensors."""
Table = dict[tuple[str, str], list[Any]]
"""Site of a node and its constants as captured -> its constants in another precision."""


class PrecisionProof:
    """Keeps captured graphs right in every precision in which they run.

    In a precision that is new, a graph is compared with the model. If the bits differ the model is captured anew in
    that precision. If it is the same program but for floats and dtypes, all graphs take these over, whenever the
    precision is that one; if it is another program, that is refused.

    Args:
        trial: runs the model.
        plain: mode (True: train) -> the graph without heads.
        graphs: returns all graphs of the net.
        like: the proof of a net of which this one is a copy. None: the compiler has just proven the graphs.
    """

    def __init__(
        self,
        trial: Trial,
        plain: Mapping[bool, fx.GraphModule],
        graphs: Callable[[], list[fx.GraphModule]],
        like: PrecisionProof | None = None,
    ) -> None:
        self._trial, self._plain, self._graphs = trial, plain, graphs
        self._needed = trial.capture.front_end == "export"
        self._followers: WeakSet[fx.GraphModule] = WeakSet()
        self._version = -1
        self.converted()
        if like is None:
            self._now = self._precision(None)
            self._tables: dict[Precision, Table] = {self._now: {}}
            self._proven = {(mode, self._now) for mode in (True, False)}
        else:
            self._now, self._tables, self._proven = like._now, dict(like._tables), set(like._proven)

    def converted(self) -> None:
        """Note that tensors of the model were moved or converted."""
        model = self._trial.model
        self._device, self._tensors = device_of(model), (*model.parameters(), *model.buffers())

    def at(self, version: int) -> None:
        """Note how often tensors of the model were replaced so far."""
        if version != self._version:
            self._version = version
            self.converted()

    def follow(self, module: nn.Module) -> None:
        """Let graphs inside of another module have the constants of the present precision as well, while it lives."""
        self._followers.update(m for m in module.modules() if isinstance(m, fx.GraphModule))

    def check(self, training: bool, autocast: torch.dtype | None = None) -> None:
        """Give the graphs the constants of a precision; the first time, prove them there.

        Args:
            training: the mode.
            autocast: the dtype that a schedule casts to; None: as the caller's autocast state has it.

        Raises:
            ScheduleError: the model is another program in this precision.
        """
        if not self._needed or torch.compiler.is_compiling():
            return
        precision = self._precision(autocast)
        if precision != self._now and precision in self._tables:
            self._apply(precision)
        if (training, precision) not in self._proven:
            self._prove(training, precision)
            self._proven.add((training, precision))

    def _precision(self, autocast: torch.dtype | None) -> Precision:
        device = self._device.type
        if autocast is None and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            autocast = torch.get_autocast_dtype(device)
        # Read each time: ``net.model.bfloat16()`` changes the tensors themselves, and nobody is told.
        return autocast, tuple(tensor.dtype for tensor in self._tensors)

    def _prove(self, training: bool, precision: Precision) -> None:
        """Compare the graph of a mode with the model; if they differ, take the constants of a new capture."""
        if self._trial.spread:
            if precision not in self._tables:
                raise ScheduleError(
                    self._message(precision, "with blocks on several devices it cannot be compared with the model")
                )
            return
        fault = self._fault(training, precision[0], exact=precision not in self._tables)
        if fault and precision not in self._tables:
            table = self._captured(precision[0])
            if table is not None:
                self._tables[precision] = table
                self._apply(precision)
                fault = self._fault(training, precision[0], exact=False)
            if fault:
                self._tables.pop(precision, None)
                raise ScheduleError(self._message(precision, fault))
        elif fault:
            raise ScheduleError(self._message(precision, fault))
        elif precision not in self._tables:
            self._tables[precision], self._now = self._tables[self._now], precision

    def _fault(self, training: bool, autocast: torch.dtype | None, *, exact: bool) -> str:
        """Return how the graph differs from the model; empty if it does not, or if the model itself cannot run."""
        trial, graph = self._trial, self._plain[training]
        arguments = trial.arguments().kwargs
        inputs = [arguments[str(n.target)] for n in graph.graph.nodes if n.op == "placeholder"]
        try:
            with trial.same_start(training=training), casting(self._device, autocast):
                expected, _ = without_objects(trial.run())
        except Exception:  # nobody runs the net so either
            return ""
        try:
            with trial.same_start(training=training), casting(self._device, autocast):
                actual, _ = without_objects(graph(*map_tensors(torch.clone, inputs)))
        except Exception as error:
            return f"it does not run ({first_line(error)})"
        finally:
            torch.clear_autocast_cache()
        _, dtypes = self._precision(autocast)
        low = {dtype for dtype in (autocast, *dtypes) if dtype is not None and dtype.is_floating_point}
        eps = 0.0 if exact else _ROUNDINGS * max((torch.finfo(dtype).eps for dtype in low), default=0.0)
        return _difference(expected, actual, eps)

    def _captured(self, autocast: torch.dtype | None) -> Table | None:
        """Capture the model anew; return its constants, or None if it is another program otherwise."""
        torch.clear_autocast_cache()
        with casting(self._device, autocast):
            recorded = self._trial.recorded()
        torch.clear_autocast_cache()
        if not recorded:
            return None
        train, evaluation = recorded
        for node in evaluation.graph.nodes:
            info(node).site = ""
        match_sites(train.graph, evaluation.graph)
        table: Table = {}
        for mode, gm in ((True, train), (False, evaluation)):
            new = {info(node).site: node for node in gm.graph.nodes if node.op == "call_function"}
            old = [n for n in self._plain[mode].graph.nodes if n.op == "call_function" and not info(n).boundary]
            if len(new) != len(old):
                return None
            for node in old:
                twin = new.get(info(node).site)
                if twin is None or twin.target != node.target or not _same_form(node, twin):
                    return None
                constants = table.setdefault(_key(node), _constants(twin))
                if repr(constants) != repr(_constants(twin)):
                    return None
        return table

    def _apply(self, precision: Precision) -> None:
        """Give all graphs the constants of a precision."""
        table, self._now = self._tables[precision], precision
        for gm in (*self._graphs(), *self._followers):
            changed = False
            for node in gm.graph.nodes:
                if node.op != "call_function" or not (present := _constants(node)):
                    continue
                base = node.meta.setdefault(_BASE, present)
                wanted = table.get((info(node).site, repr(base)), base)
                if repr(wanted) != repr(present):
                    node.args, node.kwargs = _with_constants(node, wanted)
                    changed = True
            if changed:
                gm.recompile()

    def _message(self, precision: Precision, fault: str) -> str:
        autocast, dtypes = precision
        if autocast is not None:
            where = f"under autocast to {autocast}"
            way = f"inside of `with torch.autocast({self._device.type!r}, {autocast}):`"
        else:
            floats = [dtype for dtype in dtypes if dtype.is_floating_point]
            where, way = f"with parameters of {floats[0]}", f"as model.to({floats[0]})"
        return (
            f"the captured program of {type(self._trial.model).__name__} does not compute what the model computes "
            f"{where}: {fault}. Its forward reads dtypes in Python and does something else there, and the program was "
            f"captured in another precision. Decouple the model {way}, with plan=net.plan for the same cuts."
        )


def _leaves(node: fx.Node) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten((node.args, node.kwargs))


def _is_constant(leaf: Any) -> bool:
    return isinstance(leaf, (float, torch.dtype))


def _constants(node: fx.Node) -> list[Any]:
    """Return the floats and dtypes among the arguments of a call; such are what a dtype can change."""
    return [leaf for leaf in _leaves(node)[0] if _is_constant(leaf)] if node.op == "call_function" else []


def _key(node: fx.Node) -> tuple[str, str]:
    return info(node).site, repr(node.meta.get(_BASE, _constants(node)))


def _same_form(node: fx.Node, other: fx.Node) -> bool:
    """Whether two calls have the same arguments but for the values of constants."""
    (first, spec), (second, other_spec) = _leaves(node), _leaves(other)
    return spec == other_spec and all(
        type(a) is type(b) and (_is_constant(a) or isinstance(a, fx.Node) or a == b)
        for a, b in zip(first, second, strict=True)
    )


def _with_constants(node: fx.Node, constants: Sequence[Any]) -> tuple[Any, Any]:
    (leaves, spec), new = _leaves(node), iter(constants)
    args, kwargs = pytree.tree_unflatten([next(new) if _is_constant(leaf) else leaf for leaf in leaves], spec)
    return args, kwargs


def _difference(expected: Any, actual: Any, tolerance: float) -> str:
    """Return how two outputs differ by more than a part of their norm; empty if they do not."""
    if same_bits(expected, actual):
        return ""
    first, second = (dict(_named_tensors(output)) for output in (expected, actual))
    for name, tensor in first.items():
        place = f"the output {name!r}" if name else "the output"
        other = second.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            found = "nothing" if other is None else f"{tuple(other.shape)} in {other.dtype}"
            return f"{place} is {found}, and the model's {tuple(tensor.shape)} in {tensor.dtype}"
        if tensor.is_floating_point() and not near(tensor.double(), other.double(), tolerance):
            if bool(tensor.isfinite().all()) and not bool(other.isfinite().all()):
                return f"{place} is not finite"
            distance = ((other - tensor).double().norm() / tensor.double().norm()).item()
            return f"{place} differs by {distance:.2g} of its norm"
    return ""


def _named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
        return
    for key, value in fields(output):
        if key is not None:
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))

"""Run a net's model on the example batch, for questions that the graphs cannot answer themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.exporting.exported import record_by_export
from sedona_fx.capture.keep import keep_state
from sedona_fx.capture.regions import keep_process_state
from sedona_fx.capture.sites import name_sites, same_graphs
from sedona_fx.capture.symbolic import find_leaves, record_symbolically
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.modules import device_of, first_float_parameter, keep_modes
from sedona_fx.ir.outputs import map_tensors, without_objects
from sedona_fx.ir.same_numbers import same_bits
from sedona_fx.net.parts import NetParts
from sedona_fx.plan_values import Capture, ExportOptions
from sedona_fx.rng import seed_all


class Trial:
    """Runs the model of a net on a few examples; nothing of it is changed by that.

    Args:
        model: the model that the net owns.
        example: the batch that the net was traced with, every input under its argument name.
        capture: how the graphs were made.
        export: with which options, if by ``torch.export``.
        whole: paths of the modules that the graphs call whole.
        spread: whether the blocks are on several devices; the model cannot run as it is then.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Args,
        capture: Capture,
        *,
        export: ExportOptions,
        whole: Collection[str],
        spread: bool,
    ) -> None:
        self.model, self.example, self.capture, self.export = model, example, capture, export
        self.whole, self.spread = tuple(whole), spread
        self._recorded_in = self._dtype()

    @classmethod
    def of(cls, parts: NetParts) -> Trial:
        """Return a trial of the model of a net."""
        analysed, nodes = parts.analysed, (*parts.analysed.train.graph.nodes, *parts.analysed.eval.graph.nodes)
        whole = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
        spread = len(set(parts.plan.devices or ())) > 1
        return cls(parts.model, analysed.example, analysed.capture, export=analysed.export, whole=whole, spread=spread)

    def arguments(self, *, whole_batch: bool = False) -> Args:
        """Return the examples, on the device that the model has now, and in its precision if that has changed.

        Args:
            whole_batch: return all of them, and not only a few.
        """
        dtype, device = self._dtype(), device_of(self.model)

        def moved(tensor: Tensor) -> Tensor:
            converted = tensor.is_floating_point() and dtype != self._recorded_in
            return tensor.to(device, dtype if converted else tensor.dtype)

        few = self.example.first(2) if self.capture.free_batch and not whole_batch else self.example
        return Args(**map_tensors(moved, few.kwargs))

    def _dtype(self) -> torch.dtype | None:
        parameter = first_float_parameter(self.model)
        return parameter.dtype if parameter is not None else None

    @contextmanager
    def same_start(self, *, training: bool) -> Iterator[None]:
        """Set mode and seed for a run; modes, buffers, attributes and random states are as before afterwards."""
        with (
            keep_modes(self.model),
            keep_state(self.model),
            _keep_hooks(self.model),
            keep_process_state(),
            torch.enable_grad(),
        ):
            self.model.train(training)
            seed_all(0)
            yield

    def run(self, changes: Mapping[str, Any] | None = None) -> Any:
        """Return what the model returns for the examples, with other values for some arguments.

        Args:
            changes: argument name -> value.
        """
        return self.model(**{**map_tensors(torch.clone, self.arguments().kwargs), **(changes or {})})

    def same_output(self, changes: Mapping[str, Any]) -> bool:
        """Whether the model returns the same bits with other arguments, in both modes; False if it cannot run."""
        if self.spread:
            return False
        for training in (True, False):
            outputs = []
            for arguments in ({}, changes):
                with self.same_start(training=training):
                    try:
                        outputs.append(without_objects(self.run(arguments))[0])
                    except Exception:  # the model does not take such a value
                        return False
            if type(outputs[0]) is not type(outputs[1]) or not same_bits(*outputs):
                return False
        return True

    def recorded(self, changes: Mapping[str, Any] | None = None) -> list[fx.GraphModule]:
        """Return the model recorded anew in both modes, as it was when its graphs were made; empty if it cannot be.

        Args:
            changes: as for :meth:`run`.
        """
        if self.spread or self.capture.hosted:
            return []
        graphs, values = [], {**self.arguments(whole_batch=True).kwargs, **(changes or {})}
        for training in (True, False):
            with self.same_start(training=training):
                try:
                    if self.capture.front_end == "symbolic":
                        gm, _ = record_symbolically(self.model, values, find_leaves(self.model, self.whole))
                    else:
                        leaves = find_leaves(self.model, self.whole)
                        told: list[str] | None = [] if self.export.tell_autocast else None
                        sizes = self.export.free_sizes
                        gm = record_by_export(self.model, values, leaves, free_sizes=sizes, told=told).graph
                except TraceError:
                    return []
            name_sites(gm.graph)
            graphs.append(gm)
        return graphs

    def same_program(self, first: Sequence[fx.GraphModule], second: Sequence[fx.GraphModule]) -> bool:
        """Whether two recordings are the same programs, and are recordings at all."""
        return bool(first) and len(first) == len(second) and all(map(same_graphs, first, second))


@contextmanager
def _keep_hooks(model: nn.Module) -> Iterator[None]:
    """Take off the hooks that a model puts on itself when it runs: Hugging Face's do, to see their modules' outputs."""
    before = [(hooks, hooks.copy()) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    try:
        yield
    finally:
        for hooks, content in before:
            if len(hooks) != len(content):
                hooks.clear()
                hooks.update(content)

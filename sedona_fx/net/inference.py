"""What a net gives away for inference: one graph, an ONNX file, early exits, an ensemble of its heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from sedona_fx.data.args import Args
from sedona_fx.errors import ExportError
from sedona_fx.export.onnx import to_onnx
from sedona_fx.ir.modules import direct_children, share_copy
from sedona_fx.ir.region import Cast, Region
from sedona_fx.net.exits import EarlyExit, ensemble
from sedona_fx.net.placing import copy_on_cpu
from sedona_fx.net.precision_proof import PrecisionProof
from sedona_fx.net.saved import Saved
from sedona_fx.net.signature import Signature
from sedona_fx.passes import strip
from sedona_fx.plan_values import Capture
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.engine import Engine


class Inference(Saved):
    """The part of a net that makes other modules of it, which share its tensors."""

    blocks: Sequence[Block]
    engine: Engine
    capture: Capture
    _graphs: Mapping[bool, fx.GraphModule]
    _precision: PrecisionProof
    _signature: Signature

    def check(self) -> int:
        """Take over into the graphs what was replaced; see :class:`~sedona_fx.Net`."""
        raise NotImplementedError

    def bind(self, args: Args) -> dict[str, Any]:
        """Return the net's inputs by argument name; see :class:`~sedona_fx.Net`."""
        raise NotImplementedError

    def to_onnx(self, path: str | Path) -> Path:
        """Write the inference graph with a dynamic batch, and check the file against PyTorch in ONNX Runtime.

        Sizes of inputs that a captured net leaves free (``net.plan.capture.free_sizes``) are dynamic in the file too; a
        log line says which are fixed, where the exporter cannot leave them so.

        Raises:
            MissingExtraError: the packages of the extra ``onnx`` are not installed.
            ExportError: the graph cannot be exported, or the file computes something else.
        """
        if self.capture.hosted:
            raise ExportError(
                f"the code around root={self.plan.root!r} runs as Python and cannot be exported: export the "
                f"sub-module, net.model.get_submodule({self.plan.root!r}), by itself."
            )
        off = Region(casts=(Cast(self.blocks[0].device.type, False),))
        with off.entered():  # a file has the casts of the model, and not those of the caller
            module = self.inference_module()
        graph = copy_on_cpu(module, [block.device for block in self.blocks])
        return to_onnx(graph, self._example(), path, name=self.plan.model, capture=self.capture)

    def inference_module(self) -> fx.GraphModule:
        """Return the eval graph without heads and boundaries, in eval mode; it shares the net's tensors.

        Of a captured program it is right in the precision of this call: the net's dtypes, the caller's autocast.

        Raises:
            ScheduleError: the graph does not compute what the model computes, in the precision of this call.
        """
        self._check_for_inference()
        return direct_children(share_copy(strip(self._graphs[False]))).eval()

    def early_exit(self, threshold: float) -> EarlyExit:
        """Return a module in which each example leaves at the first head whose confidence reaches `threshold`."""
        self._check_for_inference()
        key, example = self.engine.output.key, self._example()
        module = EarlyExit(
            self.blocks, threshold, key=key, bind=self._bind_for_exit, capture=self.capture, example=example
        )
        self._precision.follow(module)
        return module

    def ensemble(self, n: int) -> fx.GraphModule:
        """Return a graph of the summed log-softmax of the last `n` heads, the model's own output being one of them."""
        self._check_for_inference()
        return ensemble(self._graphs[False], self.blocks, self.engine.output.key, n)

    def _example(self) -> Args:
        """Return the batch that the model was traced with, in the precision of now."""
        return self._signature.trial.arguments(whole_batch=True)

    def _check_for_inference(self) -> None:
        self.check()
        self._precision.check(training=False)

    def _bind_for_exit(self, args: Args) -> dict[str, Any]:
        self._precision.check(training=False)
        return self.bind(args)

"""TRACED -> TRACED, annotated: what every node makes, keeps for backward, overwrites and costs, without computing it.

A traced graph only says which operations follow each other. Where a block can end, which values cross there, and what a
block costs depends on shapes, aliasing, and the tensors that autograd keeps. So the graph is run once on fake tensors
(:mod:`sedona_fx.passes.fake_run`), which have shapes but no numbers, and what each node did is written into its record
(:class:`~sedona_fx.ir.graph.NodeInfo`). All later passes read these records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from sedona_fx.capture.keep import keep_state
from sedona_fx.capture.whole.derivatives import let_modules_derive
from sedona_fx.capture.whole.grad_calls import argument, grad_calls
from sedona_fx.errors import TraceError
from sedona_fx.fake.key import PLAIN_TYPES
from sedona_fx.fake.memo import Memo
from sedona_fx.fake.meter import Work
from sedona_fx.fake.tensors import CannotMake
from sedona_fx.ir.channels import channel_dim
from sedona_fx.ir.graph import info, operation
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.spec import Phase
from sedona_fx.passes.fake_run import FakeRun

_GRADIENT_STOPS = ("detach", "detach_")


@graph_pass(Phase.TRACED)
def annotate(
    gm: fx.GraphModule, inputs: Mapping[str, Any], *, training: bool, memo: Memo | None = None
) -> fx.GraphModule:
    """Fill in every node's value, parameters, FLOPs, bytes kept for backward, storages, writes and channel dimension.

    Before: TRACED. After: the same graph; the fields of the records that belong to ``annotate`` are filled. Modules
    that take derivatives read what is differentiable in any block
    (:func:`~sedona_fx.capture.whole.derivatives.let_modules_derive`).

    Args:
        gm: only the records of its nodes change, where no module takes derivatives.
        inputs: placeholder name -> example value. Shapes, dtypes and devices are used. Numbers are used only where a
            module kept whole asks for integers (the lengths of padded sequences).
        training: the mode the graph belongs to.
        memo: effects of operations seen before; new ones are added. An operation in it is not run again. None: every
            operation is run.

    Raises:
        TraceError: a node cannot run on these shapes.
    """
    if grad_calls(gm.graph):
        memo = None  # they differentiate what ran before, so that all of it has to run
    try:
        _run(gm, inputs, training=training, memo=memo)
    except (CannotMake, TraceError):
        if memo is None:
            raise
        _run(gm, inputs, training=training, memo=None)  # what holds in case of doubt, errors included
    _follow_data_flow(gm)
    let_modules_derive(gm)
    _estimate_flops(gm)
    return gm


def _run(gm: fx.GraphModule, inputs: Mapping[str, Any], *, training: bool, memo: Memo | None) -> None:
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {
        name: pytree.tree_map_only(Tensor, lambda t: fake_mode.from_tensor(t.detach()), value)
        for name, value in inputs.items()
    }
    torch.clear_autocast_cache()  # in the user's autocast region: weights that were cast by a real run, ...
    try:
        with keep_state(gm), keep_modes(gm), _numbers_for_momentum(gm), fake_mode, torch.enable_grad():
            gm.train(training)
            run = FakeRun(gm, fake_mode, memo, inputs)
            run.run(*(fakes[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
    finally:
        torch.clear_autocast_cache()  # ... and fake ones, which the next real run would take


def _is_plain(value: Any) -> bool:
    """Whether a value is made of sizes, dtypes and the like; objects of classes that are not known may hold tensors."""
    return all(isinstance(leaf, (*PLAIN_TYPES, torch.Size)) for leaf in pytree.tree_leaves(value))


def _estimate_flops(gm: fx.GraphModule) -> None:
    """Give operators without a formula the FLOPs that the others of the graph have for as many bytes."""
    total = Work()
    for node in gm.graph.nodes:
        total.add(info(node).work)
    for node in gm.graph.nodes if total.uncounted else ():
        info(node).flops = info(node).work.estimated(total.flops_a_byte)


@contextmanager
def _numbers_for_momentum(gm: fx.GraphModule) -> Iterator[None]:
    """Let norms with a cumulative average (``momentum=None``) have a momentum in the body.

    Their factor is one over a number in a buffer, and there are no numbers in a run on fake tensors. Nothing that is
    recorded depends on it.
    """
    norms = [m for m in gm.modules() if isinstance(m, _NormBase) and m.momentum is None]
    for norm in norms:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None


def _follow_data_flow(gm: fx.GraphModule) -> None:
    """Fill in what follows from a node's inputs: `depends`, `from_input` and the channel dimension."""
    for node in gm.graph.nodes:
        record, sources = info(node), [info(source) for source in node.all_input_nodes]
        is_call = node.op in ("call_function", "call_method")
        stops_gradient = is_call and operation(node) in _GRADIENT_STOPS
        stops_gradient |= node.target is torch.autograd.grad and not argument(node, "create_graph")
        if record.region is not None and record.region.grad is False:
            # What it overwrites, or returns as it is (x.float() of float32), keeps its gradient.
            stops_gradient |= not (record.mutates or record.hands_on)
            record.weighty = False
        depends = bool(record.parameters) or any(source.depends for source in sources)
        # A size or a dtype of an activation takes no gradient to it, nor does what is made of it.
        record.depends = depends and not stops_gradient and not _is_plain(record.value)
        record.from_input = node.op == "placeholder" or any(source.from_input for source in sources)
        if record.is_tensor and len(record.value.shape) > 1:
            record.channel_dim = channel_dim(gm, node)

"""Rows of a recurrent layer: steps in time, and the weights that have no part in some of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from sedona_fx.ir.rows.need import ALL, Item, Needs, Part, Rows, rows, shape_of


def recurrence(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """A step reads the steps before it, or from both sides all of them; final states read all."""
    module = gm.get_submodule(str(node.target))
    assert isinstance(module, nn.RNNBase)
    source, steps, own = node.args[0], _steps(node, module, part), shape_of(node.args[0])
    if steps is None or own is None or not isinstance(source, fx.Node):
        return None
    if module.bidirectional or max(steps) == own[_time(module)] - 1:
        return {}
    return {source: rows(_time(module), range(max(steps) + 1))}


def missed_by_recurrence(
    node: fx.Node, module: nn.RNNBase, part: Part, parameters: Collection[str]
) -> Collection[str] | None:
    """Return the parameters of a recurrent layer that have no part in the steps needed; None: it cannot tell.

    In its first step a direction multiplies its recurrent weights by an initial state of zeros.
    """
    steps, own = _steps(node, module, part), shape_of(node.args[0])
    if steps is None or own is None:
        return None
    if len(node.args) > 1 or node.kwargs:
        return ()  # it is given a state to start from
    final, end = module.num_layers - 1, own[_time(module)] - 1
    missed = set()
    if steps == {0}:  # below the last layer, both directions have been through all steps
        missed = {f"weight_hh_l{layer}" for layer in ((final,) if module.bidirectional else range(module.num_layers))}
    if module.bidirectional and steps == {end}:
        missed.add(f"weight_hh_l{final}_reverse")
    return [name for name in parameters if name.rpartition(".")[2] in missed]


def _steps(node: fx.Node, module: nn.RNNBase, part: Part) -> frozenset[int] | None:
    """Return the steps of the sequence that are needed; of a final state, all."""
    own = shape_of(node.args[0])
    if own is None or len(own) != 3 or not isinstance(part, Item):
        return None
    if part.place % 2 == 0 and isinstance(part.need, Rows) and part.need.dim == _time(module):
        return part.need.places
    return frozenset(range(own[_time(module)])) if part.need is ALL or isinstance(part.need, Rows) else None


def _time(module: nn.RNNBase) -> int:
    return 1 if module.batch_first else 0

"""From a problem to SEDONA's relaxed blocks, and from what it learned to a decision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from sedona_fx.heads.registry import build_head
from sedona_fx.ir.graph import SPLIT_POINTS, copy_info, info, output_node
from sedona_fx.passes import BlockGraph, partition, relax
from sedona_fx.search.problem.problem import Problem, local_loss_of
from sedona_fx.search.relaxed.state import BlockLossFunction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RelaxedGraphBlock:
    """A base layer of the relaxed net, as :class:`~sedona_fx.search.relaxed.state.RelaxedBlock` describes it."""

    module: nn.Module
    eval_module: nn.Module
    inputs: tuple[str, ...]
    exports: tuple[str, ...]
    boundary: str | None
    beta: str | None
    trunk: nn.Module | None = None


def relaxed_blocks(problem: Problem, places: Sequence[str]) -> list[RelaxedGraphBlock]:
    """Relax the train graph with every candidate head at every place, and pair its blocks with the eval graph's."""
    problem.require_heads("search='sedona'")
    heads = {
        name: [build_head(spec, problem.contexts[name]).to(_like(problem)) for spec in problem.candidates[name]]
        for name in places
    }
    train = partition(relax(problem.train, heads))
    bare: dict[str, list[nn.Module]] = {name: [] for name in places}
    evaluation, trunk = partition(relax(problem.eval, bare)), partition(relax(problem.train, bare))
    return [_pair(*graphs) for graphs in zip(train, evaluation, trunk, strict=True)]


def _like(problem: Problem) -> Tensor:
    return next(p for p in problem.train.parameters() if p.dtype.is_floating_point)


def _pair(train: BlockGraph, evaluation: BlockGraph, trunk: BlockGraph) -> RelaxedGraphBlock:
    """Give the graphs of a block one signature: what only some of them read or give is unused or None."""
    inputs = tuple(dict.fromkeys((*train.inputs, *evaluation.inputs)))
    exports = tuple(dict.fromkeys((*train.exports, *evaluation.exports)))
    beta = f"{SPLIT_POINTS}.{train.index}.mixture.beta" if train.boundary is not None else None
    return RelaxedGraphBlock(
        _with_signature(train, inputs, exports),
        _with_signature(evaluation, inputs, exports),
        inputs,
        exports,
        train.boundary,
        beta,
        _with_signature(trunk, inputs, exports) if beta is not None else None,
    )


def _with_signature(block: BlockGraph, inputs: Sequence[str], exports: Sequence[str]) -> fx.GraphModule:
    if (block.inputs, block.exports) == (tuple(inputs), tuple(exports)):
        return block.module
    graph, env = fx.Graph(), {}
    old = block.module.graph
    given = {info(n).site: n for n in old.nodes if n.op == "placeholder"}
    for k, name in enumerate(inputs):
        made = graph.placeholder(f"input_{k}")
        if name in given:
            env[given[name]] = made
            copy_info(given[name], made)
    for node in old.nodes:
        if node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, env.__getitem__)
            copy_info(node, env[node])
    (result,) = output_node(old).args
    assert isinstance(result, tuple)
    exported, local = result
    assert isinstance(exported, tuple)
    values = dict(zip(block.exports, exported, strict=True))
    given_or_none = tuple(env[values[n]] if n in values else None for n in exports)
    graph.output((given_or_none, fx.map_arg(local, env.__getitem__)))
    return fx.GraphModule(block.module, graph, class_name=type(block.module).__name__)


def block_loss(problem: Problem, count: int) -> BlockLossFunction:
    """Return the loss on the output of one of `count` base layers: of its heads, or of the net for the last one."""
    loss = local_loss_of(problem)
    return lambda index, local, target: loss(index == count - 1, local, target)

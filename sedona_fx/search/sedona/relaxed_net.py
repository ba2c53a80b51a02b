"""From a problem to the blocks of SEDONA's relaxed net, and to the losses that train them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from sedona_fx.heads.dtypes import make_head
from sedona_fx.ir.graph import SPLIT_POINTS, copy_info, info, output_node
from sedona_fx.ir.modules import like_of
from sedona_fx.ir.program import Program
from sedona_fx.ir.region import new_graph
from sedona_fx.passes import BlockGraph, partition, relax
from sedona_fx.search.problem.problem import Problem, local_loss_of
from sedona_fx.search.relaxed.state import BlockLossFunction


@dataclass(frozen=True)
class RelaxedGraphBlock:
    """A base layer of the relaxed net, with the fields of :class:`~sedona_fx.search.relaxed.state.RelaxedBlock`."""

    module: nn.Module
    eval_module: nn.Module
    inputs: tuple[str, ...]
    exports: tuple[str, ...]
    boundary: str | None
    beta: str | None
    trunk: nn.Module | None = None


def relaxed_blocks(problem: Problem, places: Sequence[str]) -> list[RelaxedGraphBlock]:
    """Relax the train graph with every candidate head at every place, and cut it into its base layers.

    Args:
        problem: the net and its candidate heads.
        places: the B-1 cut points.

    Returns:
        The B base layers, each in its train form, its eval form and its form without heads.

    Raises:
        CutError: there are no heads to choose from.
        HeadError: a head uses a weight of the base layer before it.
    """
    problem.require_heads("search='sedona'")
    like, contexts = like_of(problem.train), problem.contexts
    heads = {name: [make_head(spec, contexts[name], like) for spec in problem.candidates[name]] for name in places}
    no_heads: dict[str, list[nn.Module]] = {name: [] for name in places}
    train = partition(relax(problem.train, heads))
    evaluation, trunk = partition(relax(problem.eval, no_heads)), partition(relax(problem.train, no_heads))
    return [_combined(*graphs) for graphs in zip(train, evaluation, trunk, strict=True)]


def block_loss(problem: Problem, count: int) -> BlockLossFunction:
    """Return the loss of each of `count` base layers: on its heads' output, or on the net's for the last one."""
    loss = local_loss_of(problem)
    return lambda index, local, target: loss(index == count - 1, local, target)


def _combined(train: BlockGraph, evaluation: BlockGraph, trunk: BlockGraph) -> RelaxedGraphBlock:
    """Combine the graphs of a block, all with the same inputs and exports.

    A graph ignores an input that only the others read, and returns None for an export that only the others make.
    """
    inputs = tuple(dict.fromkeys((*train.inputs, *evaluation.inputs)))
    exports = tuple(dict.fromkeys((*train.exports, *evaluation.exports)))
    beta = f"{SPLIT_POINTS}.{train.index}.mixture.beta" if train.boundary is not None else None
    return RelaxedGraphBlock(
        module=_with_signature(train, inputs, exports),
        eval_module=_with_signature(evaluation, inputs, exports),
        inputs=inputs,
        exports=exports,
        boundary=train.boundary,
        beta=beta,
        trunk=_with_signature(trunk, inputs, exports) if beta is not None else None,
    )


def _with_signature(block: BlockGraph, inputs: Sequence[str], exports: Sequence[str]) -> fx.GraphModule:
    """Return the block's graph with these inputs and exports; None stands for an export that it does not make."""
    if (block.inputs, block.exports) == (tuple(inputs), tuple(exports)):
        return block.module
    graph, copies = new_graph(), dict[fx.Node, fx.Node]()
    old = block.module.graph
    placeholders = {info(node).site: node for node in old.nodes if node.op == "placeholder"}
    for k, name in enumerate(inputs):
        placeholder = graph.placeholder(f"input_{k}")
        if name in placeholders:
            copies[placeholders[name]] = placeholder
            copy_info(placeholders[name], placeholder)
    for node in old.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copy_info(node, copies[node])
    (result,) = output_node(old).args
    assert isinstance(result, tuple)
    exported, local = result
    assert isinstance(exported, tuple)
    nodes = dict(zip(block.exports, exported, strict=True))
    all_exports = tuple(copies[nodes[name]] if name in nodes else None for name in exports)
    graph.output((all_exports, fx.map_arg(local, copies.__getitem__)))
    return Program(block.module, graph, class_name=type(block.module).__name__)

"""The specification of each phase, checked on the result of every pass."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from torch import fx

from sedona_fx.errors import GraphSpecError
from sedona_fx.ir.graph import HEADS, SPLIT_POINTS, describe, info, is_split_point, split_point_nodes
from sedona_fx.ir.region import RegionCode, region_of

Require = Callable[[bool, fx.Node | None, str], None]
"""``require(rule, node, text)`` raises, with `text` and the place of `node`, if `rule` is not fulfilled."""


class Phase(StrEnum):
    """The phases of a graph, in order. A block is one part of a partitioned LOWERED or RELAXED graph."""

    TRACED = "traced"
    ANALYSED = "analysed"
    RELAXED = "relaxed"
    PRUNED = "pruned"
    LOWERED = "lowered"
    BLOCK = "block"


def verify(gm: fx.GraphModule, phase: Phase) -> fx.GraphModule:
    """Check a graph against the specification of its phase and return it.

    ======== ==============================================================================================
    TRACED   placeholders first, one output, every target exists, every node has a unique site; nothing of sedona_fx
    ANALYSED as TRACED; every cut point is one live tensor, on the path to the primary output, with a unique name
    RELAXED  each split point reads a cut point and other live values; no later node reads the cut point itself
    PRUNED   as RELAXED; each split point holds at most one head
    LOWERED  every node has a block; no node reads a later block; every live value crosses through a detach; a block
             between ends of base layers has a weight
    BLOCK    no split point and no detached export; the output is ``(exports, local output)``
    ======== ==============================================================================================

    Raises:
        GraphSpecError: the graph breaks a rule, which is a bug in a pass. The message has the phase, the node and the
            rule.
    """
    nodes = list(gm.graph.nodes)

    def require(rule: bool, node: fx.Node | None, text: str) -> None:
        if not rule:
            where = "" if node is None else f" at node {node.name!r} ({describe(node)})"
            raise GraphSpecError(f"{phase} graph{where}: {text}. This is a bug in a pass of sedona_fx.")

    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        raise GraphSpecError(f"{phase} graph: {error}. This is a bug in a pass of sedona_fx.") from error
    require(sum(n.op == "output" for n in nodes) == 1 and nodes[-1].op == "output", None, "one output, at the end")
    has_regions = any(region_of(node) is not None for node in nodes)
    made_here = isinstance(gm.graph._codegen, RegionCode)
    require(made_here or not has_regions, None, "the code of a graph with regions has them: copy it with copy_graph")
    started = False
    for node in nodes:
        started = started or node.op != "placeholder"
        require(not (started and node.op == "placeholder"), node, "placeholders come first")
    checks: dict[Phase, Callable[[list[fx.Node], Require], None]] = {
        Phase.TRACED: _verify_traced,
        Phase.ANALYSED: _verify_analysed,
        Phase.RELAXED: _verify_relaxed,
        Phase.PRUNED: _verify_relaxed,
        Phase.LOWERED: _verify_lowered,
        Phase.BLOCK: _verify_block,
    }
    checks[phase](nodes, require)
    if phase is Phase.PRUNED:
        for node in split_point_nodes(gm.graph):
            heads = getattr(gm.get_submodule(str(node.target)), "heads", ())
            require(len(heads) <= 1, node, "a pruned split point has one head, or none")
    return gm


def _verify_traced(nodes: list[fx.Node], require: Require) -> None:
    sites: set[str] = set()
    for node in nodes:
        target, site = str(node.target), info(node).site
        require(bool(site) and site not in sites, node, "every node has a site of its own")
        sites.add(site)
        require(not target.startswith((SPLIT_POINTS, HEADS)), node, f"the names {SPLIT_POINTS}, {HEADS} are reserved")


def _verify_analysed(nodes: list[fx.Node], require: Require) -> None:
    _verify_traced(nodes, require)
    names: set[str] = set()
    for node in nodes:
        record = info(node)
        if record.cut is not None:
            require(record.cut not in names, node, "every cut point has a name of its own")
            names.add(record.cut)
            require(record.is_tensor and record.is_live, node, "a cut point is one float tensor with parameters in it")
            require(not record.training_only, node, "a cut point lies on the way to the primary output")
        require(not record.base_layer or record.cut is not None, node, "a base layer ends at a cut point")


def _verify_relaxed(nodes: list[fx.Node], require: Require) -> None:
    positions = {node: k for k, node in enumerate(nodes)}
    for node in nodes:
        if not is_split_point(node):
            continue
        sources = node.all_input_nodes
        require(bool(sources) and info(sources[0]).cut is not None, node, "a split point reads a cut point first")
        require(all(info(s).is_live for s in sources), node, "what a split point lets through carries gradients")
        for user in sources[0].users:
            allowed = user is node or positions[user] < positions[node] or info(user).training_only
            require(allowed, user, "nothing reads around a split point")


def _verify_lowered(nodes: list[fx.Node], require: Require) -> None:
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        block = info(node).block
        require(block is not None, node, "every node belongs to a block")
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                continue
            source_block = info(source).block
            require(source_block is not None and source_block <= (block or 0), node, "no node reads a later block")
            isolated = info(node).boundary or info(source).boundary or not info(source).is_live
            isolated = isolated or source.op == "get_attr"  # every block reads the model's tensors itself
            require(
                source_block == block or isolated, node, f"reads {source.name!r} of block {source_block} undetached"
            )
    _verify_weights(nodes, require)


def _verify_weights(nodes: list[fx.Node], require: Require) -> None:
    """Check that no block between ends of base layers is without a weight; one that ends elsewhere is the user's."""
    ends: dict[int, fx.Node] = {}  # of blocks: what a block ends at comes after all other cut points in it
    with_weights: set[int | None] = set()
    for node in nodes:
        record = info(node)
        if record.cut is not None and record.block is not None and not record.boundary:
            ends[record.block] = node
        with_weights.update([record.block] if record.weighty else [])
        with_weights.update(record.block for source in node.all_input_nodes if info(source).weighty)
    last = max((info(node).block or 0 for node in nodes), default=0)
    for block in range(last + 1) if last else ():
        edges = [ends.get(k) for k in (block - 1, block) if 0 <= k < last]
        if all(edge is not None and info(edge).base_layer for edge in edges):
            require(block in with_weights, edges[-1], f"block {block}, between ends of base layers, has a weight")


def _verify_block(nodes: list[fx.Node], require: Require) -> None:
    for node in nodes:
        require(not str(node.target).startswith(SPLIT_POINTS + ".") or ".mixture" in str(node.target), node, "no gate")
    (result,) = nodes[-1].args
    require(isinstance(result, tuple) and len(result) == 2, nodes[-1], "the output is (exports, local output)")

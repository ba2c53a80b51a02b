"""The graph dialect: phases, what a node knows about itself, and the specification of each phase.

Every pass takes a ``torch.fx.GraphModule`` and returns one; :func:`verify` checks the result against the specification
of its phase, always, in production too. What passes learn about a node is kept in one typed record, :class:`NodeInfo`,
under ``node.meta["sedona"]``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.errors import GraphSpecError

INFO = "sedona"
"""Key of :class:`NodeInfo` in ``node.meta``."""
SPLIT_POINTS = "sedona_split_points"
"""Module path below which a relaxed or pruned graph keeps its split points."""
HEADS = "sedona_heads"
"""Module path below which a lowered graph keeps its auxiliary heads."""


class Phase(StrEnum):
    """The stages of the pipeline, in order; a block is one part of a partitioned LOWERED graph."""

    TRACED = "traced"
    ANALYSED = "analysed"
    RELAXED = "relaxed"
    PRUNED = "pruned"
    LOWERED = "lowered"
    BLOCK = "block"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of a tensor that was never computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Size of a contiguous tensor of this shape, in bytes."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass
class NodeInfo:
    """What the passes know about a node. Fields are filled by the pass named in the comment."""

    path: str = ""  # trace: module path of the code that made the node ("" is the model itself)
    site: str = ""  # trace: a name that is the same in the train graph and in the eval graph
    returned_by: tuple[str, ...] = ()  # trace: modules whose output this node is, innermost first
    order: int = 0  # trace: position in the program
    without_grad: str = ""  # trace: the line, if it ran under torch.no_grad(), which a graph forgets
    value: Any = None  # annotate: the value with every tensor replaced by a TensorSpec
    parameters: tuple[str, ...] = ()  # annotate: parameters read by this very node
    weighty: bool = False  # annotate: reads a parameter of two or more dimensions
    depends: bool = False  # annotate: the value depends on parameters
    from_input: bool = False  # annotate: the value depends on the inputs
    flops: int = 0  # annotate: of the forward pass
    saved: dict[int, int] = dataclasses.field(default_factory=dict)  # annotate: storages kept for backward -> bytes
    storages: frozenset[int] = frozenset()  # annotate: storages behind the value
    mutates: frozenset[int] = frozenset()  # annotate: storages that this node overwrites
    channel_dim: int | None = None  # annotate: which dimension holds channels; None where nothing says so
    training_only: bool = False  # crossings: feeds only outputs that exist in training
    crossing: int = 0  # crossings: how many activations cross if a block ends here; 0 where none can end
    cut: str | None = None  # cuts: name of the legal cut point behind this node
    base_layer: bool = False  # cuts: this cut point ends a base layer
    block: int | None = None  # lower: the block that runs this node
    boundary: bool = False  # lower: belongs to a block boundary (detach, clone, device move, head)

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor."""
        return isinstance(self.value, TensorSpec)

    @property
    def is_live(self) -> bool:
        """Whether the value must be isolated when it crosses a boundary: a float that depends on parameters."""
        return self.depends and any(
            isinstance(leaf, TensorSpec) and (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
            for leaf in pytree.tree_leaves(self.value, is_leaf=lambda v: isinstance(v, TensorSpec))
        )


def info(node: fx.Node) -> NodeInfo:
    """Return the record of a node, making an empty one if it has none."""
    record = node.meta.get(INFO)
    if record is None:
        record = node.meta[INFO] = NodeInfo()
    return record


def copy_info(source: fx.Node, target: fx.Node, **changes: Any) -> None:
    """Give ``target`` a copy of the record of ``source``, with some fields changed."""
    record = copy.copy(info(source))
    for name, value in changes.items():
        setattr(record, name, value)
    target.meta[INFO] = record


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy a graph, records included, and say which node became which."""
    copied = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copied.node_copy(node, env.__getitem__)
        copy_info(node, env[node])
    return copied, env


def output_node(graph: fx.Graph) -> fx.Node:
    """Return the one output node of a graph."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def operation(node: fx.Node) -> str:
    """Return what a node calls, by the name that people know: ``add``, also where it is ``aten.add.Tensor``."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket.__name__
    return str(getattr(node.target, "__name__", node.target))


def describe(node: fx.Node) -> str:
    """Return the place of a node in the user's own words: ``layer1.0 (add)``."""
    record = info(node)
    if node.op == "call_module":
        return str(node.target)
    return f"{record.path or 'the model itself'} ({operation(node)})"


def direct_children(gm: fx.GraphModule) -> fx.GraphModule:
    """Let the generated code find submodules as plain attributes.

    ``self.layer1.block.conv`` costs a Python-level ``__getattr__`` a dot, which small nets feel (4 % of a MobileNet's
    forward); children that stand in ``__dict__`` too cost nothing. They are registered as before.
    """
    for module in gm.modules():
        if type(module) is torch.nn.Module or module is gm:  # the containers that fx made, and no module of the user's
            vars(module).update(module._modules)
    return gm


def share_copy(module: nn.Module) -> Any:
    """Copy the structure of a module; parameters and buffers are the same objects."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def cut_points(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes behind which a block may end, in the order of the program."""
    return (node for node in graph.nodes if info(node).cut is not None)


def split_point_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the ``split_point`` nodes of a RELAXED or PRUNED graph, in order."""
    return [n for n in graph.nodes if n.op == "call_module" and str(n.target).startswith(SPLIT_POINTS + ".")]


def head_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the auxiliary head calls of a LOWERED graph or of a block, in order."""
    return [node for node in graph.nodes if is_head(node)]


def is_head(node: fx.Node) -> bool:
    """Whether a node is a call of an auxiliary head."""
    return node.op == "call_module" and str(node.target).startswith(HEADS + ".")


def verify(gm: fx.GraphModule, phase: Phase) -> fx.GraphModule:
    """Check a graph against the specification of its phase and return it.

    ======== ==============================================================================================
    TRACED   placeholders first, one output, every target exists, every node has a site of its own; nothing of ours
    ANALYSED as TRACED; every cut point is one live tensor, on the way to the primary output, with a name of its own
    RELAXED  each split point reads a cut point, and other live values; nothing reads around it behind the cut
    PRUNED   as RELAXED; each split point holds one head
    LOWERED  every node has a block; nothing reads a later block; every live value crosses through a detach
    BLOCK    no split point, no detach of ours; the output is ``(exports, local output)``
    ======== ==============================================================================================

    Raises:
        GraphSpecError: naming the phase, the node and the rule. It means a bug in a pass.
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
    started = False
    for node in nodes:
        started = started or node.op != "placeholder"
        require(not (started and node.op == "placeholder"), node, "placeholders come first")
    checks: dict[Phase, Callable[[list[fx.Node], Callable[..., None]], None]] = {
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


def _verify_traced(nodes: list[fx.Node], require: Callable[..., None]) -> None:
    sites: set[str] = set()
    for node in nodes:
        target, site = str(node.target), info(node).site
        require(bool(site) and site not in sites, node, "every node has a site of its own")
        sites.add(site)
        require(not target.startswith((SPLIT_POINTS, HEADS)), node, f"the names {SPLIT_POINTS}, {HEADS} are reserved")


def _verify_analysed(nodes: list[fx.Node], require: Callable[..., None]) -> None:
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


def _verify_relaxed(nodes: list[fx.Node], require: Callable[..., None]) -> None:
    positions = {node: k for k, node in enumerate(nodes)}
    for node in nodes:
        if node.op != "call_module" or not str(node.target).startswith(SPLIT_POINTS + "."):
            continue
        sources = node.all_input_nodes
        require(bool(sources) and info(sources[0]).cut is not None, node, "a split point reads a cut point first")
        require(all(info(s).is_live for s in sources), node, "what a split point lets through carries gradients")
        source = sources[0]
        for user in source.users:
            training_only = info(user).training_only
            require(
                user is node or positions[user] < positions[node] or training_only,
                user,
                "nothing reads around a split point",
            )


def _verify_lowered(nodes: list[fx.Node], require: Callable[..., None]) -> None:
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


def _verify_block(nodes: list[fx.Node], require: Callable[..., None]) -> None:
    for node in nodes:
        require(not str(node.target).startswith(SPLIT_POINTS + ".") or ".mixture" in str(node.target), node, "no gate")
    (result,) = nodes[-1].args
    require(isinstance(result, tuple) and len(result) == 2, nodes[-1], "the output is (exports, local output)")

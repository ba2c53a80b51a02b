"""The rule of every operation that is known: which rows of its inputs it needs for some rows of its result."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx, nn

from sedona_fx.ir.graph import info, operation
from sedona_fx.ir.rows.arithmetic import (
    attention,
    elementwise,
    extremum,
    is_elementwise,
    last,
    mixing,
    named_dim,
    normalized,
    product,
    reduction,
)
from sedona_fx.ir.rows.moves import concatenation, expansion, parts, permuted, picked, reshape, stack
from sedona_fx.ir.rows.need import ALL, NOTHING, Item, Need, Needs, Part, Rule, joined, parts_of
from sedona_fx.ir.rows.recurrence import missed_by_recurrence, recurrence

_PICKING = ("getitem", "select", "slice")


def own_missed(gm: fx.GraphModule, node: fx.Node, need: Need, unknown: Need) -> Collection[str]:
    """Return the parameters that a node reads itself and that get no gradient, or may get none.

    Args:
        gm: the graph.
        node: annotated.
        need: of its value.
        unknown: ALL if a layer without a rule gives all of its parameters a gradient, else NOTHING.
    """
    parameters = info(node).parameters
    need = parts_of(node, need)
    if not parameters or need is ALL:
        return ()
    if not isinstance(need, frozenset):
        return parameters
    if node.op != "call_module":
        return ()
    module = gm.get_submodule(str(node.target))
    if isinstance(module, nn.RNNBase):
        missed = set(parameters)
        for part in need:
            found = missed_by_recurrence(node, module, part, parameters)
            missed &= set(found if found is not None else () if unknown is ALL else parameters)
        return missed
    return () if _rule_of(gm, node) is not None or unknown is ALL else parameters


def sources_of(gm: fx.GraphModule, node: fx.Node, need: Need, unknown: Need) -> Needs:
    """Return what is needed of each input of a node for what is needed of its value.

    Args:
        gm: the graph.
        node: annotated.
        need: of its value.
        unknown: what is needed of inputs where no rule tells.
    """
    sources = node.all_input_nodes
    need = parts_of(node, need)
    if not isinstance(need, frozenset):
        found = picked(node, None) if need is ALL and _picks(node) else None
        return found if found is not None else dict.fromkeys(sources, need)
    needs: Needs = dict.fromkeys(sources, NOTHING)
    rule = _rule_of(gm, node)
    for part in need:
        found = rule(gm, node, part) if rule is not None else None
        if found is None:  # all of one result of an operation counts as all that it does
            whole = isinstance(part, Item) and part.need is ALL
            found = dict.fromkeys(sources, ALL if whole else unknown)
        for source in sources:
            needs[source] = joined(needs[source], found.get(source, ALL))
    return needs


def _picks(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and operation(node) in _PICKING


def _rule_of(gm: fx.GraphModule, node: fx.Node) -> Rule | None:
    if node.op == "call_module":
        kinds = type(gm.get_submodule(str(node.target))).__mro__
        return next((rule for kind in kinds if (rule := _MODULES.get(kind)) is not None), None)
    if node.op not in ("call_function", "call_method"):
        return None
    name = _PLAIN_NAMES.get(operation(node), operation(node))
    rule = _RULES.get(name)
    return elementwise if rule is None and is_elementwise(name) else rule


def _reads_all(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    """A layer of a transformer: every token reads all others, of all inputs."""
    return {}


def _multi_head(gm: fx.GraphModule, node: fx.Node, part: Part) -> Needs | None:
    return {} if isinstance(part, Item) else None


_SAME = (
    *("dropout", "alpha_dropout", "feature_dropout", "stochastic_depth", "drop_path", "to", "_to_copy", "type"),
    *("type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "to_nested", "to_padded"),
)
_PLAIN_NAMES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "__matmul__": "matmul",
}
_LAYERS_BY_ELEMENT = (
    *(nn.modules.dropout._DropoutNd, nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.ELU, nn.SELU),
    *(nn.CELU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Softplus, nn.Softsign),
)
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME, elementwise),
    "linear": mixing(last),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "rms_norm"), mixing(normalized)),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "glu"), mixing(named_dim)),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "logsumexp", "var", "std"), reduction),
    **dict.fromkeys(("max", "min"), extremum),
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), product),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenation),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expansion),
    **dict.fromkeys(("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), reshape),
    **dict.fromkeys(("reshape_as", "view_as"), reshape),
    **dict.fromkeys(("permute", "transpose"), permuted),
    **dict.fromkeys(("unbind", "chunk", "split", "split_with_sizes", "tensor_split"), parts),
    **dict.fromkeys(_PICKING, lambda gm, node, part: picked(node, part)),
    "scaled_dot_product_attention": attention,
    "stack": stack,
    "embedding": _reads_all,
}
_MODULES: Mapping[type, Rule] = {
    **dict.fromkeys(_LAYERS_BY_ELEMENT, elementwise),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), mixing(normalized)),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.GLU), mixing(named_dim)),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), reshape),
    **dict.fromkeys((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.Embedding), _reads_all),
    nn.Linear: mixing(last),
    nn.MultiheadAttention: _multi_head,
    nn.RNNBase: recurrence,
}

"""Find the dimension of an activation that holds the channels, from the layers that computed it."""

from __future__ import annotations

from torch import fx, nn
from torch.utils import _pytree as pytree

from sedona_fx.ir.graph import info, operation

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm)
_CHANNELS_SECOND_OPERATIONS = ("conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm")
_CHANNELS_LAST_OPERATIONS = ("layer_norm", "linear", "rms_norm", "embedding", "addmm")


def channel_dim(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Return the dimension that holds the channels of a node's value, or None if nothing determines it.

    The last layer whose type fixes the dimension decides (a convolution: 1; a linear layer: the last); permutations and
    operations that drop or join dimensions are followed from there.

    Args:
        gm: the graph.
        node: a node whose value is a tensor, with annotated inputs.
    """
    record = info(node)
    rank = len(record.value.shape)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _CHANNELS_SECOND):
            return 1
        if isinstance(module, _CHANNELS_LAST):
            return rank - 1
    name = operation(node)
    if name in _CHANNELS_SECOND_OPERATIONS:
        return 1
    if name in _CHANNELS_LAST_OPERATIONS:
        return rank - 1
    sources = [info(input_node) for input_node in node.all_input_nodes if info(input_node).channel_dim is not None]
    if not sources:
        return None
    source = next((candidate for candidate in sources if len(candidate.value.shape) == rank), sources[0])
    assert source.channel_dim is not None
    order = permutation(gm, node, rank)
    if order is not None:
        return order.index(source.channel_dim)
    return _followed(source.value.shape, source.channel_dim, record.value.shape)


def permutation(gm: fx.GraphModule, node: fx.Node, rank: int) -> list[int] | None:
    """Return the source dimension of each dimension of the result if the node permutes dimensions, else None."""
    name = operation(node)
    if node.op == "call_module":
        dims = getattr(gm.get_submodule(str(node.target)), "dims", None)
        return [d % rank for d in dims] if isinstance(dims, (list, tuple)) and len(dims) == rank else None
    numbers = [a for a in pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(a, int)]
    if name == "permute" and len(numbers) == rank:
        return [d % rank for d in numbers]
    if name == "transpose" and len(numbers) == 2:
        order = list(range(rank))
        first, second = numbers[0] % rank, numbers[1] % rank
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _followed(source: tuple[int, ...], channel_dim: int, result: tuple[int, ...]) -> int | None:
    """Return the dimension of the channels after an operation that keeps, pools, flattens or joins dimensions."""
    if len(source) == len(result):
        return channel_dim
    if len(result) == 2:  # flattened or pooled: everything but the batch is features
        return 1
    channels = source[channel_dim]
    if channel_dim == len(source) - 1:
        return len(result) - 1 if result[-1] == channels else None
    return 1 if len(result) > 1 and result[1] == channels else None

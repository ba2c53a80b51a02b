"""Which dimension of an activation holds the channels, as the layers say that made it."""

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
_CHANNELS_SECOND_WORDS = ("conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm")
_CHANNELS_LAST_WORDS = ("layer_norm", "linear", "rms_norm", "embedding", "addmm")


def channel_dim(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Say which dimension holds the channels: as the last layer that has an opinion left it, permutations followed."""
    record = info(node)
    rank = len(record.value.shape)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _CHANNELS_SECOND):
            return 1
        if isinstance(module, _CHANNELS_LAST):
            return rank - 1
    name = operation(node)
    if name in _CHANNELS_SECOND_WORDS:
        return 1
    if name in _CHANNELS_LAST_WORDS:
        return rank - 1
    sources = [info(a) for a in node.all_input_nodes if info(a).channel_dim is not None]
    if not sources:
        return None
    source = next((s for s in sources if len(s.value.shape) == rank), sources[0])
    assert source.channel_dim is not None
    moved = _permutation(gm, node, rank)
    if moved is not None:
        return moved.index(source.channel_dim)
    return _same_place(source.value.shape, source.channel_dim, record.value.shape)


def _permutation(gm: fx.GraphModule, node: fx.Node, rank: int) -> list[int] | None:
    """Return which source dimension each dimension of the result is, if the node permutes dimensions."""
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


def _same_place(source: tuple[int, ...], channel_dim: int, result: tuple[int, ...]) -> int | None:
    """Find the channels again after an operation that keeps, pools, flattens or joins dimensions."""
    if len(source) == len(result):
        return channel_dim
    if len(result) == 2:  # flattened or pooled: what is not the batch is features
        return 1
    channels = source[channel_dim]
    if channel_dim == len(source) - 1:
        return len(result) - 1 if result[-1] == channels else None
    return 1 if len(result) > 1 and result[1] == channels else None

"""Chunks of the batch as slices, because a chunk along a free size is one that ``torch.export`` fixes.

Two images that are concatenated, go through one encoder and are chunked again (RAFT, siamese networks) have a batch of
twice the size. ``torch.chunk`` asks how many pieces that gives, and the solver of PyTorch 2.14 cannot prove that
``(3 * s - 1) // s`` is 2 for every s, so that it fixes s. Slices ask nothing.
"""

from __future__ import annotations

from torch import Tensor, fx

from sedona_fx.ir.graph import info, operation

_CHUNKS = ("chunk", "unsafe_chunk")


def slice_batch_chunks(gm: fx.GraphModule) -> None:
    """Replace the calls of ``torch.chunk`` along dimension 0 in a graph by :func:`slices`, in place."""
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or operation(node) not in _CHUNKS:
            continue
        given = dict(zip(("input", "chunks", "dim"), node.args, strict=False)) | node.kwargs
        pieces = info(node).value
        counted = isinstance(pieces, (tuple, list)) and len(pieces) == given["chunks"]
        if counted and given.get("dim", 0) == 0:
            node.op, node.target = "call_function", slices
            node.args, node.kwargs = (given["input"], given["chunks"]), {}
    gm.recompile()


def slices(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return what ``torch.chunk(x, count)`` returns where that gives `count` pieces."""
    length = (x.shape[0] + count - 1) // count
    return tuple(x[k * length : (k + 1) * length] for k in range(count))

"""From learned logits to a decision: where to cut, and which head to keep."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def decode(alpha: Tensor, beta: Sequence[Tensor], blocks: int) -> tuple[list[int], list[int]]:
    """Cut behind the `blocks` - 1 base layers with the largest p_isolate, and keep the likeliest head of each.

    Any number of blocks can be decoded from one search (SEDONA, Pyeon et al., ICLR 2021, section 3). The order is that
    of alpha[:, 0] - alpha[:, 1], which is that of p_isolate but does not saturate at 1. Of equal base layers the
    earlier one is cut, of equal heads the first one kept.

    Args:
        alpha: logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of head logits, (M_i,).
        blocks: K, from 1 to B.

    Returns:
        The 0-based base layers to cut behind, ascending, and for each of them the index of its head.
    """
    if not 1 <= blocks <= len(beta) + 1:
        raise ValueError(f"{len(beta) + 1} base layers make 1 to {len(beta) + 1} blocks, not {blocks}")
    preference = (alpha[:, 0].double() - alpha[:, 1].double()).tolist()
    ranked = sorted(range(len(preference)), key=lambda i: (-preference[i], i))
    cuts = sorted(ranked[: blocks - 1])
    heads = []
    for i in cuts:
        logits = beta[i].tolist()
        heads.append(logits.index(max(logits)))
    return cuts, heads

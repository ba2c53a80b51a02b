"""How well a plan's local gradients agree with the gradient of backpropagation: a score of plans without training them.

At one state of the weights, let T be the gradient of the final loss, and g_im the gradient of the loss of head m at
place i, over the stretches j <= i that lead to the place. Two scores are computed from them:

    cos(i, m)  =  <g_im, T> / (|g_im| |T|)        over the stretches j <= i
    cos(plan)  =  <G, T> / (|G| |T|)              G: each block's weights follow the block's own loss, cut *hard*

The first scores each (cut, head) by itself, the second a plan. All inner products and norms are sums over stretches, of
<g_im(j), T(j)> and |g_im(j)|^2, so one backward pass per head scores all plans at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedona_fx.search.problem.problem import Positions
from sedona_fx.search.session.batches import Batch
from sedona_fx.search.trials.supernet import Supernet


@dataclass(frozen=True)
class Alignment:
    """Inner products of gradients at one state of the weights, float64, by stretch.

    Attributes:
        products: (B - 1, most heads of a place, B): <g_im(j), T(j)>; 0 for stretches after place i.
        squares: (B - 1, most heads of a place, B): |g_im(j)|^2.
        truth: (B,): |T(j)|^2.
    """

    products: np.ndarray
    squares: np.ndarray
    truth: np.ndarray

    def cosines(self, plans: Sequence[Positions]) -> np.ndarray:
        """Return cos(plan) of every plan, (plans,). All plans have the same number of cuts."""
        if not plans or not plans[0]:
            return np.ones(len(plans))
        chosen = np.asarray(plans)  # (plans, K - 1, 2)
        places, heads = chosen[..., 0], chosen[..., 1]
        first_stretches = np.concatenate([np.zeros_like(places[:, :1]), places[:, :-1] + 1], axis=1)

        def over_blocks(table: np.ndarray) -> np.ndarray:
            """Sum a table over the stretches of every block; the last block follows the final loss, so T is its G."""
            sums = np.concatenate([np.zeros((*table.shape[:2], 1)), table.cumsum(2)], axis=2)
            blocks = sums[places, heads, places + 1] - sums[places, heads, first_stretches]
            last_block = self.truth[::-1].cumsum()[::-1][places[:, -1] + 1]
            total: np.ndarray = blocks.sum(1) + last_block
            return total

        return _cosine(over_blocks(self.products), over_blocks(self.squares), self.truth.sum())

    def by_cut(self) -> np.ndarray:
        """Return cos(i, m) of every place and head, (B - 1, most heads of a place)."""
        truth = self.truth.cumsum()[: len(self.products), None]
        return _cosine(self.products.sum(2), self.squares.sum(2), truth)


def measure(net: Supernet, batch: Batch) -> Alignment:
    """Compare the gradients of all local losses with that of the final loss, on one batch.

    The autograd graph of one forward pass is walked once for the final loss, and once per head from its place down.
    """
    stretches = net.stretches()
    run = net.forward(batch)
    parameters = [p for stretch in stretches for p in stretch]
    ends = np.cumsum([len(stretch) for stretch in stretches])
    truth = _gradients(run.loss, parameters)
    most = max(len(heads) for heads in net.heads)
    shape = (len(net.places), most, len(stretches))
    products, squares = np.zeros(shape), np.zeros(shape)
    for place, heads in enumerate(net.heads):
        before = parameters[: ends[place]]
        for head in range(len(heads)):
            local = _gradients(net.local(run, place, head, batch[1]), before)
            products[place, head, : place + 1] = _by_stretch(local, truth[: len(before)], ends[: place + 1])
            squares[place, head, : place + 1] = _by_stretch(local, local, ends[: place + 1])
    return Alignment(products, squares, _by_stretch(truth, truth, ends))


def _cosine(products: np.ndarray, squares: np.ndarray, truth: np.ndarray | np.floating[Any]) -> np.ndarray:
    """Return the cosine of inner products and squared norms; 0 where a gradient is 0."""
    cosine: np.ndarray = products / np.sqrt(np.maximum(squares * truth, np.finfo(np.float64).tiny))
    return cosine


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if not weights:
        return []
    return list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


def _by_stretch(a: Sequence[Tensor | None], b: Sequence[Tensor | None], ends: np.ndarray) -> np.ndarray:
    """Return <a, b> of every stretch; `ends` has the index in the lists at which each stretch ends."""
    terms = [
        torch.zeros(()) if x is None or y is None else (x * y).sum().double().cpu() for x, y in zip(a, b, strict=True)
    ]
    values = torch.stack([term.double() for term in terms]).numpy() if terms else np.zeros(0)
    begins = [0, *ends[:-1].tolist()]
    return np.array([values[begin:end].sum() for begin, end in zip(begins, ends.tolist(), strict=True)])

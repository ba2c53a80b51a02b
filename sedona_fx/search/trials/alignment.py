"""How well a plan's local gradients agree with the gradient of backpropagation: a score of plans, without training any.

At one state of the weights, let T be the gradient of the final loss, and g_im that of the loss of head m behind place
i, over the stretches j <= i in front of it. Two scores are made of them:

    cos(i, m)  =  <g_im, T> / (|g_im| |T|)        over the stretches j <= i
    cos(plan)  =  <G, T> / (|G| |T|)              G: each block's weights follow the block's own loss, cut *hard*

The first judges each (cut, head) by itself; the second a plan. Both products and norms of the second are sums over
stretches, of <g_im(j), T(j)> and |g_im(j)|^2: so one backward a head scores all plans at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedona_fx.search.problem.problem import Positions
from sedona_fx.search.session.batches import Batch
from sedona_fx.search.trials.supernet import Supernet


@dataclass(frozen=True)
class Alignment:
    """Inner products of gradients at one state, float64.

    Attributes:
        products: (B - 1, most heads, B): <g_im(j), T(j)>; 0 where stretch j does not feed place i.
        squares: (B - 1, most heads, B): |g_im(j)|^2.
        truth: (B,): |T(j)|^2.
    """

    products: np.ndarray
    squares: np.ndarray
    truth: np.ndarray

    def cosines(self, plans: Sequence[Positions]) -> np.ndarray:
        """Return the cosine of every plan's gradient with that of backpropagation, (plans,); all of one length."""
        if not plans or not plans[0]:
            return np.ones(len(plans))
        chosen = np.asarray(plans)  # (plans, K - 1, 2)
        places, heads = chosen[..., 0], chosen[..., 1]
        begins = np.concatenate([np.zeros_like(places[:, :1]), places[:, :-1] + 1], axis=1)

        def along(table: np.ndarray) -> np.ndarray:
            sums = np.concatenate([np.zeros((*table.shape[:2], 1)), table.cumsum(2)], axis=2)
            blocks = sums[places, heads, places + 1] - sums[places, heads, begins]
            last = self.truth[::-1].cumsum()[::-1][places[:, -1] + 1]
            found: np.ndarray = blocks.sum(1) + last
            return found

        tiny = np.finfo(np.float64).tiny
        scores: np.ndarray = along(self.products) / np.sqrt(np.maximum(along(self.squares) * self.truth.sum(), tiny))
        return scores

    def by_cut(self) -> np.ndarray:
        """Return the cosine of each (place, head) by itself over the stretches in front of it, (B - 1, most heads)."""
        tiny = np.finfo(np.float64).tiny
        truth = self.truth.cumsum()[: len(self.products), None]
        found: np.ndarray = self.products.sum(2) / np.sqrt(np.maximum(self.squares.sum(2) * truth, tiny))
        return found


def measure(net: Supernet, batch: Batch) -> Alignment:
    """Compare the gradients of all local losses with that of the final loss, on one batch.

    The graph of one forward is walked once for the final loss and once for every head, from its place down.
    """
    stretches = net.stretches()
    run = net.forward(batch)
    flat = [p for stretch in stretches for p in stretch]
    ends = np.cumsum([len(stretch) for stretch in stretches])
    truth = _gradients(run.loss, flat)
    most = max(len(heads) for heads in net.heads)
    shape = (len(net.places), most, len(stretches))
    products, squares = np.zeros(shape), np.zeros(shape)
    for place, heads in enumerate(net.heads):
        own = flat[: ends[place]]
        for head in range(len(heads)):
            found = _gradients(net.local(run, place, head, batch[1]), own)
            products[place, head, : place + 1] = _by_stretch(found, truth[: len(own)], ends[: place + 1])
            squares[place, head, : place + 1] = _by_stretch(found, found, ends[: place + 1])
    return Alignment(products, squares, _by_stretch(truth, truth, ends))


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if not weights:
        return []
    return list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


def _by_stretch(a: Sequence[Tensor | None], b: Sequence[Tensor | None], ends: np.ndarray) -> np.ndarray:
    """Return <a, b> of every stretch; `ends` says where in the lists each one ends."""
    terms = [
        torch.zeros(()) if x is None or y is None else (x * y).sum().double().cpu() for x, y in zip(a, b, strict=True)
    ]
    values = torch.stack([term.double() for term in terms]).numpy() if terms else np.zeros(0)
    begins = [0, *ends[:-1].tolist()]
    return np.array([values[begin:end].sum() for begin, end in zip(begins, ends.tolist(), strict=True)])

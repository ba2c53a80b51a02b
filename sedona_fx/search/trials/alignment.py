"""How well local gradients agree with the gradient of backpropagation: a score of cuts and heads, without training any.

At one state of the weights, let T be the gradient of the final loss, and g_im the gradient of the loss of head m at
place i, over the stretches j <= i that lead to the place. The score is their cosine:

    cos(i, m)  =  <g_im, T> / (|g_im| |T|)        over the stretches j <= i

Inner products and norms are sums over stretches, of <g_im(j), T(j)> and |g_im(j)|^2. One backward pass per head gives
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedona_fx.search.relaxed.vjp import inner
from sedona_fx.search.session.batches import NamedBatch
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

    def by_cut(self) -> np.ndarray:
        """Return cos(i, m) of every place and head, (B - 1, most heads of a place); 0 where a gradient is 0."""
        truth = self.truth.cumsum()[: len(self.products), None]
        squares = np.maximum(self.squares.sum(2) * truth, np.finfo(np.float64).tiny)
        cosines: np.ndarray = self.products.sum(2) / np.sqrt(squares)
        return cosines


def measure(net: Supernet, batch: NamedBatch) -> Alignment:
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


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if not weights:
        return []
    return list(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))


def _by_stretch(a: Sequence[Tensor | None], b: Sequence[Tensor | None], ends: np.ndarray) -> np.ndarray:
    """Return <a, b> of every stretch; `ends` has the index in the lists at which each stretch ends."""
    terms = [
        torch.zeros(()) if x is None or y is None else inner(x, y).double().cpu() for x, y in zip(a, b, strict=True)
    ]
    values = torch.stack([term.double() for term in terms]).numpy() if terms else np.zeros(0)
    begins = [0, *ends[:-1].tolist()]
    return np.array([values[begin:end].sum() for begin, end in zip(begins, ends.tolist(), strict=True)])

"""The two steps that SEDONA's search is made of; both refuse what is not finite before it can do harm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedona_fx.search.relaxed.hypergradient import HyperGradient, hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import (
    BlockLossFunction,
    Logits,
    RelaxedBlock,
    RelaxedNet,
    State,
    sgd_momentum_step,
)
from sedona_fx.search.relaxed.training_step import relaxed_gradients, sample_cuts
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.session.batches import Batch


class NotFinite(Exception):
    """A loss or a gradient of one step is infinite or NaN; the message says which."""


@dataclass(frozen=True)
class InnerSteps:
    """Steps of one relaxed net, by the settings of one search."""

    settings: SedonaSettings
    blocks: Sequence[RelaxedBlock]
    local_loss: BlockLossFunction
    draws: torch.Generator

    def train(self, state: State, alpha: Tensor, beta: Sequence[Tensor], lr: float, batch: Batch) -> None:
        """One ordinary relaxed training step, in place.

        Raises:
            NotFinite: a local loss or a gradient is not; of `state` the buffers alone have changed then.
        """
        s = self.settings
        cuts = len(self.blocks) - 1
        sampled = sample_cuts(cuts, min(s.sampled_cuts, cuts), self.draws) if s.sampled_cuts is not None else None
        found = relaxed_gradients(
            RelaxedNet(self.blocks, self.local_loss),
            state,
            Logits(alpha, beta),
            batch,
            create_graph=False,
            sampled=sampled,
        )
        # From the top, since a gradient that is not finite makes those below it so.
        grads = [(i, g) for i, g in reversed(list(enumerate(found.grads))) if g]
        largest = {i: torch._foreach_norm(list(g.values()), math.inf) for i, g in grads}
        sums = {i: torch.stack([t.double() for t in norms]).sum() for i, norms in largest.items()}
        finite = torch.stack([t.isfinite() for t in (*found.losses, *sums.values())]).tolist()  # waits for the device
        if not all(finite):
            places = [f"base layer {i}" for i in (*(range(cuts) if sampled is None else sampled), cuts)]
            raise NotFinite([*places, *(f"base layer {i}, in a gradient" for i in sums)][finite.index(False)])
        sgd_momentum_step(state, found.grads, lr=lr, momentum=s.momentum, weight_decay=s.weight_decay, in_place=True)

    def hypergradient(
        self,
        state: State,
        alpha: Tensor,
        beta: Sequence[Tensor],
        lr: float,
        batches: Sequence[Batch],
        val_batch: Batch,
    ) -> HyperGradient:
        """Return the gradient of the validation loss for alpha and beta, `len(batches)` steps on from a state.

        Raises:
            NotFinite: it, or the loss, is not.
        """
        s = self.settings
        at = (RelaxedNet(self.blocks, self.local_loss), state, Logits(alpha, beta))
        if len(batches) == 1:
            found = one_step_hypergradient(
                *at, batches[0], val_batch, lr=lr, momentum=s.momentum, weight_decay=s.weight_decay
            )
        else:
            found = hypergradient(*at, batches, val_batch, lr=lr, momentum=s.momentum, weight_decay=s.weight_decay)
        if not all(bool(t.isfinite().all()) for t in (found.val_loss, found.alpha_grad, *found.beta_grads)):
            raise NotFinite("in the validation loss or its gradient")
        return found

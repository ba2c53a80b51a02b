"""One relaxed step to be differentiated through: its second-order graph is kept, or made again when it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sedona_fx.search.relaxed.block_forward import Ascent
from sedona_fx.search.relaxed.state import LocalLoss, RelaxedBlock, Slot, State, Tensors, clones
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.relaxed.vjp import named
from sedona_fx.search.session.batches import Batch


class UnrolledStep:
    """The relaxed gradient at one state and batch as a function of alpha, beta and the weights.

    Made where the step is to be taken: the random states of that moment are noted, and the buffers copied. Tensors of
    the state's other parts are held, not copied; nobody may write to them.
    """

    def __init__(
        self,
        blocks: Sequence[RelaxedBlock],
        state: State,
        alpha: Tensor,
        beta: Sequence[Tensor],
        batch: Batch,
        local_loss: LocalLoss,
    ) -> None:
        self._blocks, self._batch, self._local_loss = blocks, batch, local_loss
        self._state = replace(state, buffers=clones(state.buffers))
        self._logits = [t.detach().requires_grad_() for t in (alpha, *beta)]
        self._random = Ascent.begin(alpha.device)
        self._graph: tuple[dict[Slot, Tensor], dict[Slot, Tensor]] | None = (
            None  # gradients, and the weights they are of
        )
        self.graded: list[Slot] = []  # the weights that get a gradient

    def gradients(self, buffers: list[Tensors], *, keep_graph: bool) -> list[Tensors]:
        """Return the gradients, without graph, and update `buffers`, which are those of the state now."""
        state = replace(self._state, buffers=buffers)
        found = self._differentiable(state) if keep_graph else self._plain(state)
        self.graded = [(i, n) for i, d in enumerate(found) for n in d]
        return found

    def pull_back(
        self, along: Mapping[Slot, Tensor], *, weights: bool
    ) -> tuple[list[Tensor | None], dict[Slot, Tensor]]:
        """Return ``(dg/d(alpha, beta))^T along`` and, where wanted, ``(dg/dw)^T along``; the graph is gone then.

        `along` has cotangents of some of the gradients g.
        """
        if self._graph is None:
            with torch.random.fork_rng(devices=self._random.devices):
                self._random.replay_draws()
                self._differentiable(self._state)
        assert self._graph is not None
        (grads, held), self._graph = self._graph, None
        roots = {slot: grads[slot] for slot in along if grads[slot].requires_grad}
        wanted = [*self._logits, *(held.values() if weights else ())]
        if not roots:
            return [None] * len(self._logits), {}
        got = torch.autograd.grad(list(roots.values()), wanted, [along[s] for s in roots], allow_unused=True)
        return list(got[: len(self._logits)]), named(held, got[len(self._logits) :])

    def _plain(self, state: State) -> list[Tensors]:
        alpha, *beta = self._logits
        return relaxed_gradients(
            self._blocks, state, alpha, beta, *self._batch, self._local_loss, create_graph=False
        ).grads

    def _differentiable(self, state: State) -> list[Tensors]:
        alpha, *beta = self._logits
        params = [{n: t.detach().requires_grad_() for n, t in d.items()} for d in state.params]
        found = relaxed_gradients(
            *(self._blocks, replace(state, params=params), alpha, beta, *self._batch, self._local_loss),
            create_graph=True,
        ).grads
        held = {(i, n): t for i, d in enumerate(params) for n, t in d.items()}
        self._graph = {(i, n): t for i, d in enumerate(found) for n, t in d.items()}, held
        return [{n: t.detach() for n, t in d.items()} for d in found]

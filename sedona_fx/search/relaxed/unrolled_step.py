"""One relaxed training step to differentiate through: its second-order graph is kept, or built again when needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sedona_fx.search.relaxed.cut_record import GeneratorStates
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, Slot, State, Tensors, by_slot, clones, leaves
from sedona_fx.search.relaxed.training_step import relaxed_gradients
from sedona_fx.search.relaxed.vjp import present
from sedona_fx.search.session.batches import NamedBatch


class UnrolledStep:
    """The relaxed gradient g at one state and batch, as a function of alpha, beta and the weights w.

    To be constructed right before the step is taken: it notes the random states of that moment and copies the buffers.
    Other tensors of the state are held, not copied; nobody may write to them.

    Attributes:
        weights_with_gradient: slots of the weights that get a gradient; known after :meth:`gradients`.
    """

    def __init__(self, net: RelaxedNet, state: State, logits: Logits, batch: NamedBatch) -> None:
        self._net, self._batch = net, batch
        self._state = replace(state, buffers=clones(state.buffers))
        self._logits = logits.detached(requires_grad=True)
        self._generators = GeneratorStates.now(logits.alpha.device)
        self._graph: tuple[dict[Slot, Tensor], dict[Slot, Tensor]] | None = None  # g, and the weights it depends on
        self.weights_with_gradient: list[Slot] = []

    def gradients(self, buffers: list[Tensors], *, keep_graph: bool) -> list[Tensors]:
        """Take the gradients g.

        Args:
            buffers: the state's buffers at this step, updated in place.
            keep_graph: keep the second-order graph for :meth:`pull_back`, which builds it anew otherwise.

        Returns:
            g by block and name, without graph.
        """
        state = replace(self._state, buffers=buffers)
        if keep_graph:
            grads = self._differentiable(state)
        else:
            grads = relaxed_gradients(self._net, state, self._logits, self._batch, create_graph=False).grads
        self.weights_with_gradient = list(by_slot(grads))
        return grads

    def pull_back(
        self, cotangents: Mapping[Slot, Tensor], *, weights: bool
    ) -> tuple[list[Tensor | None], dict[Slot, Tensor]]:
        """Take the vector-Jacobian product of g; the graph is freed.

        Args:
            cotangents: c, of some of the gradients g.
            weights: whether the second part of the result is wanted; if not, it is empty.

        Returns:
            ``(dg/d(alpha, beta))^T c``, alpha's first, and ``(dg/dw)^T c`` by slot.
        """
        if self._graph is None:
            with self._generators.replayed():
                self._differentiable(self._state)
        assert self._graph is not None
        (grads, params), self._graph = self._graph, None
        roots = {slot: grads[slot] for slot in cotangents if grads[slot].requires_grad}
        logits = self._logits.tensors()
        if not roots:
            return [None] * len(logits), {}
        products = torch.autograd.grad(
            list(roots.values()),
            [*logits, *(params.values() if weights else ())],
            [cotangents[slot] for slot in roots],
            allow_unused=True,
        )
        return list(products[: len(logits)]), present(params, products[len(logits) :])

    def _differentiable(self, state: State) -> list[Tensors]:
        """Take the gradients and keep their graph; return them without it."""
        params = leaves(state.params)
        grads = relaxed_gradients(
            self._net, replace(state, params=params), self._logits, self._batch, create_graph=True
        ).grads
        self._graph = by_slot(grads), by_slot(params)
        return [{n: t.detach() for n, t in d.items()} for d in grads]

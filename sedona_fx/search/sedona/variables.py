"""alpha and beta, the variables that SEDONA learns, with the optimizer that updates them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sedona_fx.search.relaxed.hypergradient import HyperGradient
from sedona_fx.search.relaxed.state import Logits, RelaxedBlock
from sedona_fx.search.sedona.decode import log_odds
from sedona_fx.search.sedona.settings import SedonaSettings


class Variables:
    """alpha and beta with Adam. They start at zero: every softmax is uniform.

    Args:
        blocks: the base layers of the relaxed net.
        settings: of the search; read are those of Adam, `meta_lr`, `meta_betas` and `meta_weight_decay`.

    Attributes:
        logits: alpha and beta, leaves of autograd on the net's device.
        kept: their values after the last :meth:`keep`, on the CPU. Ctrl-C in the middle of a step of Adam cannot reach
            them.
        farthest: (B-1,), the largest |log-odds of isolating| of each place at any :meth:`keep`.
        adam: the optimizer.
    """

    def __init__(self, blocks: Sequence[RelaxedBlock], settings: SedonaSettings) -> None:
        own = [dict(block.module.named_parameters())[block.beta] for block in blocks if block.beta is not None]
        alpha = torch.zeros(len(own), 2, dtype=own[0].dtype, device=own[0].device, requires_grad=True)
        self.logits = Logits(alpha, [torch.zeros_like(t, requires_grad=True) for t in own])
        self.adam = torch.optim.Adam(
            self.logits.tensors(),
            lr=settings.meta_lr,
            betas=settings.meta_betas,
            weight_decay=settings.meta_weight_decay,
        )
        self.farthest = torch.zeros(len(own), dtype=torch.float64)
        self.kept = self._on_cpu()

    @property
    def device(self) -> torch.device:
        """The net's device."""
        return self.logits.alpha.device

    def step(self, gradient: HyperGradient) -> None:
        """Take one step of Adam."""
        for tensor, grad in zip(self.logits.tensors(), [gradient.alpha_grad, *gradient.beta_grads], strict=True):
            tensor.grad = grad
        self.adam.step()

    def keep(self) -> None:
        """Note the values of a finished update in `kept` and `farthest`."""
        self.kept = self._on_cpu()
        self.farthest = torch.maximum(self.farthest, log_odds(self.kept.alpha).abs())

    def state_dict(self) -> dict[str, Any]:
        """Return the state; the tensors are not copied."""
        return {
            "variables": [t.detach() for t in self.logits.tensors()],
            "adam": self.adam.state_dict(),
            "farthest": self.farthest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        with torch.no_grad():
            for tensor, value in zip(self.logits.tensors(), state["variables"], strict=True):
                tensor.copy_(value)
        self.adam.load_state_dict(state["adam"])
        self.farthest = state["farthest"]
        self.kept = self._on_cpu()

    def copied_state(self) -> dict[str, Any]:
        """Return a copy of the state, to go back to."""
        return copy.deepcopy(self.state_dict())

    def _on_cpu(self) -> Logits:
        alpha, *beta = (t.detach().cpu().clone() for t in self.logits.tensors())
        return Logits(alpha, beta)

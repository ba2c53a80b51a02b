"""The two kinds of step that SEDONA's search is made of. Neither lets an infinite or NaN gradient into the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sedona_fx.errors import SettingsError
from sedona_fx.search.relaxed.hypergradient import HyperGradient, hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients, sample_cuts
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.session.batches import NamedBatch

_NO_DERIVATIVE = re.compile(r"derivative|differentia|double backward|backward.*not implemented", re.IGNORECASE)
"""What PyTorch says of an operator without second derivatives."""


class NotFinite(Exception):
    """A loss or a gradient of one step is infinite or NaN; the message says which."""


@dataclass(frozen=True)
class SedonaSteps:
    """Steps of a relaxed net with the settings of a search.

    Attributes:
        settings: of the search; read are `sampled_cuts`, `momentum` and `weight_decay`.
        net: the relaxed net.
        draws: generator that cuts are sampled from.
    """

    settings: SedonaSettings
    net: RelaxedNet
    draws: torch.Generator

    def train(self, state: State, logits: Logits, lr: float, batch: NamedBatch) -> None:
        """Take one ordinary relaxed training step, in place.

        Raises:
            NotFinite: a local loss or a gradient is not. Of `state`, only buffers have changed then.
        """
        cuts = len(self.net.blocks) - 1
        sampled = None
        if self.settings.sampled_cuts is not None:
            sampled = sample_cuts(cuts, min(self.settings.sampled_cuts, cuts), self.draws)
        step = relaxed_gradients(self.net, state, logits, batch, create_graph=False, sampled=sampled)
        # Last base layer first: a gradient that is not finite makes those of earlier base layers so, too.
        grads = [(i, g) for i, g in reversed(list(enumerate(step.grads))) if g]
        largest = {i: torch._foreach_norm(list(g.values()), math.inf) for i, g in grads}
        sums = {i: torch.stack([t.double() for t in norms]).sum() for i, norms in largest.items()}
        finite = torch.stack([t.isfinite() for t in (*step.losses, *sums.values())]).tolist()  # waits for the device
        if not all(finite):
            losses = [f"base layer {i}" for i in (*(range(cuts) if sampled is None else sampled), cuts)]
            raise NotFinite([*losses, *(f"base layer {i}, in a gradient" for i in sums)][finite.index(False)])
        sgd_momentum_step(state, step.grads, **self._sgd(lr), in_place=True)

    def hypergradient(
        self, state: State, logits: Logits, lr: float, batches: Sequence[NamedBatch], val_batch: NamedBatch
    ) -> HyperGradient:
        """Return the gradient of the validation loss after `len(batches)` training steps with respect to the logits.

        Raises:
            NotFinite: the gradient or the validation loss is not.
            SettingsError: an operator of the net cannot be differentiated as often as that takes.
        """
        try:
            if len(batches) == 1:
                gradient = one_step_hypergradient(self.net, state, logits, batches[0], val_batch, **self._sgd(lr))
            else:
                gradient = hypergradient(self.net, state, logits, batches, val_batch, **self._sgd(lr))
        except (RuntimeError, NotImplementedError) as error:
            if not _NO_DERIVATIVE.search(str(error)):
                raise
            often = "three times, as the model takes derivatives itself," if self.net.derives else "twice,"
            raise SettingsError(
                f"search='sedona' differentiates training steps, so every operator has to be differentiated {often} "
                f"and one cannot be: {str(error).splitlines()[0].rstrip('.')}. search='guided' and 'rollout' "
                "need first derivatives alone."
            ) from error
        if not all(bool(t.isfinite().all()) for t in (gradient.val_loss, gradient.alpha_grad, *gradient.beta_grads)):
            raise NotFinite("in the validation loss or its gradient")
        return gradient

    def _sgd(self, lr: float) -> dict[str, float]:
        return {"lr": lr, "momentum": self.settings.momentum, "weight_decay": self.settings.weight_decay}

"""Saving a net: the folder with plan and weights, its state dict, and why it cannot be pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sedona_fx.errors import ExportError
from sedona_fx.net.weights import check_blocks, load_weights, note_blocks, save_weights
from sedona_fx.plan import Plan
from sedona_fx.runtime.finite import finite_constants, refuse_not_finite, tensors_to_check


class Saved(nn.Module):
    """The part of a net that writes and reads files.

    Attributes:
        model: the net's copy of the user's model.
        heads: index of the block, as text -> its auxiliary head.
        plan: everything that was decided.
        steps: training steps taken.
    """

    model: nn.Module
    heads: nn.ModuleDict
    plan: Plan
    steps: int
    _finite: frozenset[str]  # names of buffers and frozen parameters that have to stay finite

    def note_finite(self) -> None:
        """Note which buffers and frozen parameters are finite, before anything is trained."""
        self._finite = finite_constants(self)

    def save(self, folder: str | Path) -> None:
        """Write ``plan.json`` and ``weights.pt`` (model and heads) to a folder; each file is replaced as a whole.

        Raises:
            CheckpointError: a weight has turned infinite or NaN, or a module's extra state could not be read again; the
                files of an earlier call are kept then.
        """
        refuse_not_finite(
            tensors_to_check(self, self._finite),
            refusal=f"the net is not saved, and what is in {str(folder)!r} is kept as it is",
            advice="Go on from the last good weights (net.load_weights, or a checkpoint of fit) with a lower learning "
            "rate. To look at what there is now, torch.save(net.state_dict(), path) writes it all the same.",
        )
        self.plan.save(Path(folder) / "plan.json")
        save_weights(Path(folder) / "weights.pt", self._parts(), self.steps, self.plan)

    def load_weights(self, path: str | Path) -> None:
        """Load a ``weights.pt`` that :meth:`save` wrote.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another net; nothing is loaded then.
        """
        self.steps = load_weights(path, self._parts(), self.plan)

    def original_state_dict(self) -> dict[str, Any]:
        """Return the state dict of the user's model; it loads with ``strict=True`` into the user's class."""
        return self.model.state_dict()

    def _parts(self) -> dict[str, nn.Module]:
        return {"model": self.model, "heads": self.heads}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_blocks(self.plan, destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        check_blocks(self.plan, self.heads, state_dict, prefix, local_metadata)  # before any child loads
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ExportError(
            "a net cannot be pickled, nor written by torch.save(net): its graphs run the functions of your model. "
            "net.save(folder) writes its plan and weights, and sedona_fx.load(folder, model) makes it again; "
            "torch.save(net.state_dict(), path) writes the weights alone."
        )

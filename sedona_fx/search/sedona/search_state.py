"""Everything that SEDONA's search changes from step to step: saved to a journal, and restored from it.

A search is saved between two steps. Restored, it takes the same steps as if it had never stopped, bit for bit: weights,
alpha and beta, Adam's moments, random states and the positions in the data are all part of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from sedona_fx.rng import are_random_states, random_states, restore_random
from sedona_fx.search.relaxed.state import RelaxedNet, State
from sedona_fx.search.sedona.result import History, SedonaResult
from sedona_fx.search.sedona.search_cost import SearchCost
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.sedona.variables import Variables
from sedona_fx.search.session.journal import Journal
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import StepSeconds


class SearchState:
    """The state of one search.

    Args:
        settings: of the search.
        net: the relaxed net; its blocks' own tensors are copied and left as they are.
        train: training batches.
        val: validation batches.
        store: for the snapshots.
        journal: where the state is saved.
        seed: of the draws of snapshots and of sampled cuts.

    Attributes:
        variables: alpha and beta.
        history: what was done so far.
        warmup: weights, buffers and momentum of the warm-up; None: it is over.
        draws: generator of snapshots and sampled cuts.
        search_cost: the numbers of steps; None: they are not planned yet.
        step_seconds: what steps take, where that was measured before the start.
    """

    def __init__(
        self,
        settings: SedonaSettings,
        net: RelaxedNet,
        *,
        train: Stream,
        val: Stream,
        store: SnapshotStore,
        journal: Journal,
        seed: int,
    ) -> None:
        self.train, self.val, self.store, self.journal, self.seed = train, val, store, journal, seed
        self.variables = Variables(net.blocks, settings)
        self.history = History()
        self.warmup: State | None = State.of(net.blocks)
        self.draws = torch.Generator().manual_seed(seed)
        self.search_cost: SearchCost | None = None
        self.step_seconds: StepSeconds | None = None

    @property
    def devices(self) -> list[torch.device]:
        """The device of the search if it has random states of its own: an accelerator."""
        device = self.variables.device
        return [] if device.type in ("cpu", "meta") else [device]

    def save_if_due(self) -> None:
        """Save the state if the last save is long enough ago."""
        if self.journal.due():
            self.save()

    def save(self) -> None:
        """Save the state between two steps. Without a folder, nothing happens."""
        if self.journal.folder is None:
            return
        state = {
            **self._plan(),
            "counts": dataclasses.asdict(self.history),
            "train": self.train.position,
            "val": self.val.position,
            "random": random_states(self.devices),
            "draws": self.draws.get_state(),
            **self.variables.state_dict(),
            "state": self.warmup.fields() if self.warmup is not None else None,
            "snapshots": self.store.flush(),
        }
        self.journal.write(state)
        self.store.commit()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what :meth:`save` wrote."""
        with self.journal.restoring():
            self._restore_plan(saved)
            self.history.restore(saved["counts"])
            self.variables.load_state_dict(saved)
            like, self.warmup = self.warmup, None
            if saved["state"] is not None:
                self.warmup = State(**saved["state"])
                self.warmup.require_like(like)
            self.store.restore(saved["snapshots"], like)
            self.draws.set_state(saved["draws"])
            train, val, random = saved["train"], saved["val"], saved["random"]
            if not are_random_states(random):
                raise ValueError("its random states cannot be set")
        self.train.go_to(train)
        self.val.go_to(val)
        restore_random(random)  # last: going through data may draw

    def save_result(self, result: SedonaResult) -> None:
        """Save the result in place of the state that led to it, with the snapshots that are left."""
        if self.journal.folder is not None:
            fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
            self.journal.write({"result": fields, **self._plan(), "snapshots": self.store.flush()})
        self.store.commit()

    def restore_result(self, saved: Mapping[str, Any]) -> SedonaResult:
        """Restore what :meth:`save_result` wrote."""
        with self.journal.restoring():
            self._restore_plan(saved)
            # This also removes the files that a kill right after the last write left.
            self.store.restore(saved["snapshots"], self.warmup)
            return SedonaResult(**saved["result"])

    def _plan(self) -> dict[str, Any]:
        plans = {"budget": self.search_cost, "pace": self.step_seconds}
        return {name: dataclasses.asdict(plan) if plan is not None else None for name, plan in plans.items()}

    def _restore_plan(self, saved: Mapping[str, Any]) -> None:
        self.search_cost = SearchCost(**saved["budget"])
        self.step_seconds = StepSeconds(**saved["pace"]) if saved["pace"] is not None else None

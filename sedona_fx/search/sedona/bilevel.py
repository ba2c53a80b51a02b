"""SEDONA's bilevel search, step by step: a warm-up that leaves snapshots, then meta-iterations on them."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from sedona_fx.rng import random_states, restore_random
from sedona_fx.search.relaxed.hypergradient import HyperGradient
from sedona_fx.search.relaxed.state import RelaxedNet, State, clones
from sedona_fx.search.sedona.result import NonFiniteSearch, SedonaResult, trajectory_point
from sedona_fx.search.sedona.search_cost import SearchCost
from sedona_fx.search.sedona.search_state import SearchState
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.sedona.snapshots import Snapshot
from sedona_fx.search.sedona.steps import NotFinite, SedonaSteps
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import StepSeconds, measure

log = logging.getLogger(__name__)

_FINAL_LR_FRACTION = 0.01  # the paper's 0.1 -> 0.001
_TRAJECTORY_POINTS = 200
_LOGGED_POINTS = 10


class BilevelSearch:
    """One search while it runs.

    Args:
        settings: of the search.
        net: the relaxed net.
        state: what the search changes.
    """

    def __init__(self, settings: SedonaSettings, net: RelaxedNet, state: SearchState) -> None:
        self.settings, self.net, self.state = settings, net, state
        self.variables, self.history, self.store = state.variables, state.history, state.store
        self._steps = SedonaSteps(settings, net, state.draws)

    def run(self, plan: Callable[[], tuple[SearchCost, StepSeconds | None]], progress: bool) -> SedonaResult:
        """Search to the end: from where the journal stands, or from the start.

        Args:
            plan: returns the numbers of steps, and what steps take where that was measured. It is called at the start
                alone: a search that resumes keeps its numbers.
            progress: whether to show a bar.

        Raises:
            CheckpointError: the journal is of another search, or cannot be read.
            NonFiniteSearch: no snapshot is left to go on from.
        """
        state, history = self.state, self.history
        saved = state.journal.read()
        if saved is not None and "result" in saved:
            log.info("the search in %s is finished", state.journal.folder)
            return state.restore_result(saved)
        if saved is not None:
            state.restore(saved)
            log.info("going on with the search in %s, at %s", state.journal.folder, history.where)
        else:
            state.search_cost, state.step_seconds = plan()
            state.save()
        search_cost = state.search_cost
        assert search_cost is not None
        text = str(search_cost) + self._duration(search_cost)
        log.info("%s (%d snapshots)", text, search_cost.snapshots)
        total, done = math.ceil(search_cost.equivalent_steps), round(history.spent_steps)
        with tqdm(total=total, initial=done, desc=text, unit="step", disable=not progress) as self._bar:
            while history.warmup_steps < search_cost.warmup_steps:
                self._warmup_step(search_cost)
                state.save_if_due()
            while history.meta_steps < search_cost.meta_steps:
                self._meta_step(search_cost)
                state.save_if_due()
        return self._finish()

    def measure(self) -> StepSeconds:
        """Time a few steps on copies. Random states, positions in the data and all else stay as they are.

        Raises:
            NonFiniteSearch: a loss or a gradient was not finite.
        """
        state = self.state
        self.history.where = "the measurement before the start"
        states, draws = random_states(state.devices), state.draws.get_state()
        train, val = state.train.fresh(), state.val.fresh()
        copied = Snapshot(State.of(self.net.blocks), self.settings.lr)

        def meta_iteration() -> None:
            self._hypergradient(copied, train, val)
            self._train(copied, train)

        try:
            return measure(lambda: self._train(copied, train), meta_iteration, self.variables.device)
        except NotFinite as error:
            raise NonFiniteSearch(f"at {self.history.where}, {error}", self.result()) from error
        finally:
            restore_random(states)
            state.draws.set_state(draws)

    def result(self, interrupted: bool = False) -> SedonaResult:
        """Return what was learned so far."""
        search_cost, step_seconds = self.state.search_cost, self.state.step_seconds
        cost: dict[str, float] = {"spent_steps": self.history.spent_steps}
        if search_cost is not None:
            cost |= search_cost.counts() | {"snapshot_bytes": self.store.state_bytes}
        if step_seconds is not None and self.settings.seconds is not None:
            cost |= dataclasses.asdict(step_seconds)
        return SedonaResult(
            alpha=self.variables.kept.alpha,
            beta=list(self.variables.kept.beta),
            trajectory=list(self.history.trajectory),
            cost=cost,
            interrupted=interrupted,
            farthest=self.variables.farthest,
            failures=list(self.history.failures),
        )

    def _warmup_step(self, search_cost: SearchCost) -> None:
        """Train the relaxed net for a step at alpha = beta = 0, and take a snapshot if one is due.

        Snapshots are spread evenly, the last one at the end of the warm-up.
        """
        step, steps, weights = self.history.warmup_steps, search_cost.warmup_steps, self.state.warmup
        assert weights is not None
        self.history.where = f"warm-up step {step}"
        try:
            self._train(Snapshot(weights, self._warmup_lr(step, steps)), self.state.train)
        except NotFinite as error:
            self._end_warmup_early(error, steps)
            return
        self._spend(search_cost.relaxed_cost)
        if step + 1 in {round(steps * (k + 1) / search_cost.snapshots) for k in range(search_cost.snapshots)}:
            kept = weights.clone() if step + 1 < steps else weights
            self.store.put(len(self.store), kept, self._warmup_lr(step + 1, steps))
        self.history.warmup_steps += 1
        if self.history.warmup_steps == steps:
            self.state.warmup = None

    def _warmup_lr(self, step: int, steps: int) -> float:
        low = _FINAL_LR_FRACTION * self.settings.lr
        return low + (self.settings.lr - low) * (1 + math.cos(math.pi * step / steps)) / 2

    def _end_warmup_early(self, error: NotFinite, steps: int) -> None:
        """Go on with the snapshots taken so far."""
        where = f"at {self.history.where}, {error}"
        if not len(self.store):
            raise NonFiniteSearch(f"{where}, before the first snapshot", self.result())
        log.warning("the loss is not finite %s; going on with the %d snapshots so far", where, len(self.store))
        self.history.failures.append({"where": where, "snapshot": None})
        self.history.warmup_steps, self.state.warmup = steps, None

    def _meta_step(self, search_cost: SearchCost) -> None:
        """Run a meta-iteration on a snapshot drawn at random; while a loss is not finite, again on another one."""
        step = self.history.meta_steps
        self.history.where = f"meta-iteration {step}"
        drawn = int(torch.randint(len(self.store), (), generator=self.state.draws))
        val_loss = None
        while val_loss is None:
            val_loss = self._meta_iteration(self._good_snapshot(drawn))
            self._spend(search_cost.meta_cost)
        self.variables.keep()
        points = min(search_cost.meta_steps, _TRAJECTORY_POINTS)
        if step in {round(k * (search_cost.meta_steps - 1) / max(1, points - 1)) for k in range(points)}:
            self._add_point(val_loss.item(), search_cost)
        self.history.meta_steps += 1

    def _meta_iteration(self, index: int) -> Tensor | None:
        """Update alpha and beta, then train a snapshot for one step under the new ones.

        Returns:
            The validation loss. None: a loss or a gradient was not finite. Then the snapshot is marked as bad, and
            nothing else has changed.

        Raises:
            NonFiniteSearch: it was the last good snapshot.
        """
        snapshot, variables = self.store.take(index), self.variables.copied_state()
        # A training step that fails has changed no more than buffers, so these alone are copied.
        trained = snapshot._replace(state=replace(snapshot.state, buffers=clones(snapshot.state.buffers)))
        try:
            gradient = self._hypergradient(snapshot, self.state.train, self.state.val)
            self.variables.step(gradient)
            self._train(trained, self.state.train)
        except NotFinite as error:
            self.variables.load_state_dict(variables)
            self.store.put(index, *snapshot)
            self._mark_as_bad(index, error)
            return None
        self.store.put(index, *trained)
        return gradient.val_loss

    def _mark_as_bad(self, index: int, error: NotFinite) -> None:
        """Leave a snapshot out of the rest of the search."""
        self.history.bad_snapshots.append(index)
        where = f"at {self.history.where} (snapshot {index}), {error}"
        self.history.failures.append({"where": where, "snapshot": index})
        if len(self.history.bad_snapshots) == len(self.store):
            where += f", the last of {len(self.store)} snapshots"
            raise NonFiniteSearch(where, self.result()) from None
        log.warning(
            "the loss is not finite %s; its changes are dropped, and the search goes on from snapshot %d",
            where,
            self._good_snapshot(index),
        )

    def _good_snapshot(self, index: int) -> int:
        """Return the index; if that snapshot is bad, the nearest good one before it, or else after it."""
        good = [k for k in range(len(self.store)) if k not in self.history.bad_snapshots]
        return max((k for k in good if k <= index), default=good[0])

    def _hypergradient(self, snapshot: Snapshot, train: Stream, val: Stream) -> HyperGradient:
        batches = [next(train) for _ in range(self.settings.unroll)]
        return self._steps.hypergradient(snapshot.state, self.variables.logits, snapshot.lr, batches, next(val))

    def _train(self, snapshot: Snapshot, train: Stream) -> None:
        self._steps.train(snapshot.state, self.variables.logits, snapshot.lr, next(train))

    def _finish(self) -> SedonaResult:
        result = self.result()
        if self.settings.decode == "perturbation":  # it starts from this snapshot
            self.store.keep(self._good_snapshot(len(self.store) - 1))
        else:
            self.store.clear()
        self.state.save_result(result)
        return result

    def _duration(self, search_cost: SearchCost) -> str:
        """Say how long the rest of the search takes; an empty text if steps were not measured."""
        step_seconds, history = self.state.step_seconds, self.history
        if step_seconds is None:
            return ""
        seconds = (search_cost.warmup_steps - history.warmup_steps) * step_seconds.relaxed_seconds
        seconds += (search_cost.meta_steps - history.meta_steps) * step_seconds.meta_seconds
        return f", about {tqdm.format_interval(math.ceil(seconds))}" + (" left" if history.warmup_steps else "")

    def _spend(self, cost: float) -> None:
        self.history.spent_steps += cost
        self._bar.update(round(self.history.spent_steps) - self._bar.n)

    def _add_point(self, val_loss: float, search_cost: SearchCost) -> None:
        """Add a point to the trajectory and to the bar; about ten points of a search are logged."""
        step, trajectory = self.history.meta_steps, self.history.trajectory
        point = trajectory_point(step, val_loss, self.variables.kept)
        trajectory.append(point)
        scores = {name: f"{point[name]:.4f}" for name in ("val_loss", "entropy_alpha", "entropy_beta")}
        self._bar.set_postfix(scores, refresh=False)
        every = math.ceil(min(search_cost.meta_steps, _TRAJECTORY_POINTS) / _LOGGED_POINTS)
        if (len(trajectory) - 1) % every == 0 or step + 1 == search_cost.meta_steps:
            text = ", ".join(f"{name} {score}" for name, score in scores.items())
            log.info("%s: %s", self.history.where, text)

"""SEDONA's search as it runs: warm-up, meta-iterations, and what has to be written down to go on from any step."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sedona_fx.rng import random_states, restore_random
from sedona_fx.search.relaxed.hypergradient import HyperGradient
from sedona_fx.search.relaxed.state import BlockLossFunction, RelaxedBlock, State, clones
from sedona_fx.search.sedona.budget import Budget
from sedona_fx.search.sedona.certainty import log_odds
from sedona_fx.search.sedona.result import NonFiniteSearch, SedonaResult, trajectory_point
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.sedona.steps import InnerSteps, NotFinite
from sedona_fx.search.session.journal import Journal
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import StepSeconds, measure

log = logging.getLogger(__name__)

_FINAL_LR_FRACTION = 0.01  # the paper's 0.1 -> 0.001
_TRAJECTORY_POINTS = 200
_LOGGED_POINTS = 10


@dataclass
class Learning:
    """What changes from step to step. `train` and `val` are streams, so that their places can be written down."""

    settings: SedonaSettings
    blocks: Sequence[RelaxedBlock]
    local_loss: BlockLossFunction
    train: Stream
    val: Stream
    store: SnapshotStore
    journal: Journal
    seed: int
    where: str = "the start"
    spent: float = 0.0
    warmed: int = 0  # warm-up steps done
    met: int = 0  # meta-iterations done
    budget: Budget | None = None
    pace: StepSeconds | None = None
    bad: list[int] = field(default_factory=list)  # snapshots whose loss was not finite
    failures: list[dict[str, Any]] = field(default_factory=list)
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = [dict(b.module.named_parameters())[b.beta] for b in self.blocks if b.beta is not None]
        self.beta = [torch.zeros_like(t, requires_grad=True) for t in named]
        self.alpha = torch.zeros(len(named), 2, dtype=named[0].dtype, device=named[0].device, requires_grad=True)
        self.farthest = torch.zeros(len(named), dtype=torch.float64)
        self.state: State | None = State.of(self.blocks)  # the warm-up's
        self.draws = torch.Generator().manual_seed(self.seed)
        s = self.settings
        self.adam = torch.optim.Adam(
            [self.alpha, *self.beta], lr=s.meta_lr, betas=s.meta_betas, weight_decay=s.meta_weight_decay
        )
        self.steps = InnerSteps(s, self.blocks, self.local_loss, self.draws)
        self._keep()

    def run(self, budget: Callable[[Learning], Budget], progress: bool) -> SedonaResult:
        """Search from where the journal stands, or from the start, with what `budget` then plans.

        Raises:
            NonFiniteSearch: no snapshot is left to go on from.
        """
        saved = self.journal.read()
        if saved is not None and "result" in saved:
            log.info("the search in %s is finished", self.journal.folder)
            self._restore_plan(saved)
            self.store.restore(saved["snapshots"])  # a kill right behind the last write leaves others
            return SedonaResult(**saved["result"])
        if saved is not None:
            self._restore(saved)
            log.info("going on with the search in %s, at %s", self.journal.folder, self.where)
        else:
            self.budget = budget(self)
            self._save()
        assert self.budget is not None
        text = str(self.budget) + self._duration(self.budget)
        log.info("%s (%d snapshots)", text, self.budget.snapshots)
        total, done = math.ceil(self.budget.equivalent_steps), round(self.spent)
        with tqdm(total=total, initial=done, desc=text, unit="step", disable=not progress) as self.bar:
            self._warm_up(self.budget)
            self._search(self.budget)
        return self._finish()

    def measure(self) -> StepSeconds:
        """Measure how long steps take, on copies; random states, data and everything else stay as they are."""
        self.where = "the measurement before the start"
        states, draws = random_states(self.devices), self.draws.get_state()
        train, val = self.train.fresh(), self.val.fresh()
        state, lr = State.of(self.blocks), self.settings.lr

        def meta_iteration() -> None:
            self._hypergradient(state, lr, train, val)
            self._train(state, lr, train)

        try:
            return measure(lambda: self._train(state, lr, train), meta_iteration, self.alpha.device)
        except NotFinite as error:
            raise NonFiniteSearch(f"at {self.where}, {error}", self.result(False)) from error
        finally:
            restore_random(states)
            self.draws.set_state(draws)

    @property
    def devices(self) -> list[torch.device]:
        """The device of the search, where it has random states of its own."""
        return [] if self.alpha.device.type in ("cpu", "meta") else [self.alpha.device]

    def _duration(self, budget: Budget) -> str:
        if self.pace is None:
            return ""
        left = (budget.warmup_steps - self.warmed) * self.pace.relaxed_seconds
        left += (budget.meta_steps - self.met) * self.pace.meta_seconds
        return f", about {tqdm.format_interval(math.ceil(left))}" + (" left" if self.warmed else "")

    def _warm_up(self, budget: Budget) -> None:
        """Train the relaxed net at alpha = beta = 0, keeping snapshots evenly spread up to its end."""
        steps = budget.warmup_steps
        taken = {round(steps * (j + 1) / budget.snapshots) for j in range(budget.snapshots)}
        while self.warmed < steps:
            step, state = self.warmed, self.state
            assert state is not None
            self.where = f"warm-up step {step}"
            try:
                self._train(state, self._lr(step, steps), self.train)
            except NotFinite as error:
                self._end_warm_up(f"at {self.where}, {error}", steps)
                break
            self._spend(budget.relaxed_cost)
            if step + 1 in taken:
                kept = state.clone() if step + 1 < steps else state
                self.store.put(len(self.store), kept, self._lr(step + 1, steps))
            self.warmed += 1
            if self.warmed == steps:
                self.state = None
            if self.journal.due():
                self._save()

    def _end_warm_up(self, where: str, steps: int) -> None:
        """Go on with the snapshots there are."""
        if not len(self.store):
            raise NonFiniteSearch(f"{where}, before the first snapshot", self.result(False))
        log.warning("the loss is not finite %s; going on with the %d snapshots so far", where, len(self.store))
        self.failures.append({"where": where, "snapshot": None})
        self.warmed, self.state = steps, None

    def _search(self, budget: Budget) -> None:
        points = min(budget.meta_steps, _TRAJECTORY_POINTS)
        shown = {round(j * (budget.meta_steps - 1) / max(1, points - 1)) for j in range(points)}
        while self.met < budget.meta_steps:
            self.where = f"meta-iteration {self.met}"
            drawn = int(torch.randint(len(self.store), (), generator=self.draws))
            val_loss = None
            while val_loss is None:
                val_loss = self._meta_iteration(self._standing_in(drawn))
                self._spend(budget.meta_cost)
            self._keep()
            self.farthest = torch.maximum(self.farthest, log_odds(self.kept[0]).abs())
            if self.met in shown:
                self._show(val_loss.item())
            self.met += 1
            if self.journal.due():
                self._save()

    def _meta_iteration(self, index: int) -> Tensor | None:
        """Step alpha and beta, then a snapshot; return the validation loss. None: not finite, nothing has changed."""
        state, lr = self.store.take(index)
        working = replace(state, buffers=clones(state.buffers))
        variables, optimizer = [t.detach().clone() for t in self._variables()], copy.deepcopy(self.adam.state_dict())
        try:
            found = self._hypergradient(state, lr, self.train, self.val)
            for t, g in zip(self._variables(), [found.alpha_grad, *found.beta_grads], strict=True):
                t.grad = g
            self.adam.step()
            self._train(working, lr, self.train)
        except NotFinite as error:
            with torch.no_grad():
                for t, before in zip(self._variables(), variables, strict=True):
                    t.copy_(before)
            self.adam.load_state_dict(optimizer)
            self.store.put(index, state, lr)
            self.bad.append(index)
            where = f"at {self.where} (snapshot {index}), {error}"
            self.failures.append({"where": where, "snapshot": index})
            if len(self.bad) == len(self.store):
                where += f", the last of {len(self.store)} snapshots"
                raise NonFiniteSearch(where, self.result(False)) from None
            log.warning(
                "the loss is not finite %s; its changes are dropped, and the search goes on from snapshot %d",
                where,
                self._standing_in(index),
            )
            return None
        self.store.put(index, working, lr)
        return found.val_loss

    def _standing_in(self, index: int) -> int:
        """Return the snapshot itself; if its loss was not finite, the nearest good one before it, else behind it."""
        good = [k for k in range(len(self.store)) if k not in self.bad]
        return max((k for k in good if k <= index), default=good[0])

    def _hypergradient(self, state: State, lr: float, train: Stream, val: Stream) -> HyperGradient:
        batches = [next(train) for _ in range(self.settings.unroll)]
        return self.steps.hypergradient(state, self.alpha, self.beta, lr, batches, next(val))

    def _train(self, state: State, lr: float, train: Stream) -> None:
        self.steps.train(state, self.alpha, self.beta, lr, next(train))

    def _lr(self, step: int, steps: int) -> float:
        low = _FINAL_LR_FRACTION * self.settings.lr
        return low + (self.settings.lr - low) * (1 + math.cos(math.pi * step / steps)) / 2

    def _spend(self, cost: float) -> None:
        self.spent += cost
        self.bar.update(round(self.spent) - self.bar.n)

    def _variables(self) -> list[Tensor]:
        return [self.alpha, *self.beta]

    def _keep(self) -> None:
        """Copy alpha and beta where an interrupt in the middle of an Adam step cannot reach them."""
        self.kept = (self.alpha.detach().cpu().clone(), [b.detach().cpu().clone() for b in self.beta])

    def _show(self, val_loss: float) -> None:
        point = trajectory_point(self.met, val_loss, *self.kept)
        self.trajectory.append(point)
        scores = {name: point[name] for name in ("val_loss", "entropy_alpha", "entropy_beta")}
        self.bar.set_postfix({name: f"{score:.4f}" for name, score in scores.items()}, refresh=False)
        assert self.budget is not None
        every = math.ceil(min(self.budget.meta_steps, _TRAJECTORY_POINTS) / _LOGGED_POINTS)
        if (len(self.trajectory) - 1) % every == 0 or self.met + 1 == self.budget.meta_steps:
            log.info("%s: %s", self.where, ", ".join(f"{name} {score:.4f}" for name, score in scores.items()))

    def result(self, interrupted: bool) -> SedonaResult:
        """Return what was learned so far."""
        cost: dict[str, float] = {"spent_steps": self.spent}
        if self.budget is not None:
            cost |= self.budget.counts() | {"snapshot_bytes": self.store.state_bytes}
        if self.pace is not None and self.settings.seconds is not None:
            cost |= dataclasses.asdict(self.pace)
        return SedonaResult(*self.kept, list(self.trajectory), cost, interrupted, self.farthest, list(self.failures))

    def _finish(self) -> SedonaResult:
        """Write the result in the place of all that led to it."""
        result = self.result(interrupted=False)
        if self.settings.decode == "perturbation":  # which goes on from here
            self.store.keep(self._standing_in(len(self.store) - 1))
        else:
            self.store.clear()
        if self.journal.folder is not None:
            fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
            self.journal.write({"result": fields, **self._plan(), "snapshots": self.store.flush()})
        self.store.commit()
        return result

    def _save(self) -> None:
        """Write down where the search stands, between two steps."""
        if self.journal.folder is None:
            return
        state = {
            **self._plan(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
            "train": self.train.position,
            "val": self.val.position,
            "random": random_states(self.devices),
            "draws": self.draws.get_state(),
            "variables": [t.detach() for t in self._variables()],
            "adam": self.adam.state_dict(),
            "farthest": self.farthest,
            "state": self.state.fields() if self.state is not None else None,
            "snapshots": self.store.flush(),
        }
        self.journal.write(state)
        self.store.commit()

    def _plan(self) -> dict[str, Any]:
        return {name: dataclasses.asdict(t) if (t := getattr(self, name)) else None for name in ("budget", "pace")}

    def _restore_plan(self, saved: dict[str, Any]) -> None:
        self.budget = Budget(**saved["budget"])
        self.pace = StepSeconds(**saved["pace"]) if saved["pace"] is not None else None

    def _restore(self, saved: dict[str, Any]) -> None:
        self._restore_plan(saved)
        for name, value in saved["counts"].items():
            setattr(self, name, value)
        with torch.no_grad():
            for t, value in zip(self._variables(), saved["variables"], strict=True):
                t.copy_(value)
        self.adam.load_state_dict(saved["adam"])
        self.farthest = saved["farthest"]
        self.state = State(**saved["state"]) if saved["state"] is not None else None
        self.store.restore(saved["snapshots"])
        self.draws.set_state(saved["draws"])
        self._keep()
        self.train.go_to(saved["train"])
        self.val.go_to(saved["val"])
        restore_random(saved["random"])  # last: going through data may draw


_COUNTS = ("where", "spent", "warmed", "met", "bad", "failures", "trajectory")

"""SEDONA's search: learn, by gradient, behind which base layers to cut and with which heads.

The bilevel problem of Pyeon, Moon, Hahn, Kim (ICLR 2021): minimise over (alpha, beta) the validation loss of the final
output, at weights obtained by relaxed training. It is solved as in the paper: pretrain the relaxed net and keep
snapshots; then, again and again, take one at random, differentiate the validation loss through a few training steps
from there, step alpha and beta by Adam, train the snapshot one step under the new ones, and put it back. The snapshots
are spread over the pretraining, so that the decision holds for a net at any stage of its training and not for its end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from sedona_fx.search.budget import Budget, RelaxedWork, share
from sedona_fx.search.hypergradient import hypergradient
from sedona_fx.search.one_step import one_step_hypergradient
from sedona_fx.search.problem import Decision, Problem
from sedona_fx.search.relaxation import search_sedona
from sedona_fx.search.relaxed import relaxed_gradients
from sedona_fx.search.state import Batch, Batches, LocalLoss, RelaxedBlock, State, endless, sgd_momentum_step

log = logging.getLogger(__name__)

_FINAL_LR_FRACTION = 0.01  # the paper's 0.1 -> 0.001
_TRAJECTORY_POINTS = 200


@dataclass(frozen=True)
class SedonaResult:
    """What was learned: `alpha` (B-1, 2) logits (isolate, let through) and B-1 tensors `beta` (M_i,), on the CPU.

    `trajectory` has at most 200 evenly spaced points, dictionaries of `step`, `val_loss`, `p_isolate` (B-1) and
    `head_weights` (B-1 lists of M_i). `cost` counts what was planned, and as `spent_steps` what was done.
    """

    alpha: Tensor
    beta: list[Tensor]
    trajectory: list[dict[str, Any]]
    cost: dict[str, float]
    interrupted: bool


class NonFiniteSearch(Exception):
    """A loss of the search, or its hypergradient, is not finite. `where` says at which step; `result` is so far."""

    def __init__(self, where: str, result: SedonaResult) -> None:
        self.where, self.result = where, result
        super().__init__(f"the search's loss is not finite {where}")


@dataclass(frozen=True, kw_only=True)
class Sedona:
    """Settings of the search. What is `None` is derived, so that the cost stays within `training_steps`.

    Args:
        training_steps: SGD steps of the training run this search serves. None: 100 epochs of the weights' data.
        warmup_steps: relaxed training steps before the search proper. None: half of the cost.
        meta_steps: updates of alpha and beta. None: what the rest of the cost allows.
        snapshots: states of the relaxed net to search at, spread over the warm-up. None: at most 10.
        unroll: training steps T that the validation loss is differentiated through; one takes no second-order graph.
        lr: learning rate of relaxed training; cosine to a hundredth of it over the warm-up.
        momentum: of relaxed training.
        weight_decay: of relaxed training.
        meta_lr: Adam's learning rate for alpha and beta.
        meta_betas: Adam's decay rates.
        meta_weight_decay: Adam's weight decay.
        val_batch_size: samples in a validation batch, for whoever makes the batches. None: as in training.
    """

    training_steps: int | None = None
    warmup_steps: int | None = None
    meta_steps: int | None = None
    snapshots: int | None = None
    unroll: int = 3
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    meta_lr: float = 1e-2
    meta_betas: tuple[float, float] = (0.5, 0.999)
    meta_weight_decay: float = 1e-6
    val_batch_size: int | None = None

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("training_steps", "warmup_steps", "meta_steps", "snapshots", "unroll", "val_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Sedona({name}={value}): has to be at least 1")

    @classmethod
    def paper(cls) -> Sedona:
        """The paper's settings for CIFAR-10. They are not scaled to anything: 40,000 steps come before the search."""
        return cls(warmup_steps=40_000, meta_steps=2_000, snapshots=50, unroll=5, lr=0.1, val_batch_size=1024)

    def decide(self, problem: Problem) -> Decision:
        """Relax the problem's net, search, and decode."""
        return search_sedona(self, problem)

    def run(
        self,
        blocks: Sequence[RelaxedBlock],
        local_loss: LocalLoss,
        train_batches: Batches,
        val_batches: Batches,
        work: RelaxedWork,
        seed: int,
        progress: bool,
    ) -> SedonaResult:
        """Search. Ctrl-C ends it and returns what was learned until then; the same seed gives the same result.

        Args:
            blocks: the B base layers, B at least 2. Their own tensors are left as they are.
            local_loss: `local_loss(block, local, target)`, a scalar.
            train_batches: one epoch of the weights' data at a call: (inputs by name, target).
            val_batches: the same for the validation data.
            work: for the cost; no clock is read, so the search does not depend on the machine's load.
            seed: of snapshots, dropout, and whatever the data draws from the global stream (which is given back).
            progress: show a bar.

        Raises:
            NonFiniteSearch: a loss or the hypergradient is infinite or NaN.
            ValueError: the data is empty, there is nothing to cut, or the budget too small.
        """
        if len(blocks) < 2:
            raise ValueError("there is nothing to search: the net has a single base layer")
        search = _Search(self, blocks, local_loss)
        interrupted = False
        with _seeded(search.alpha.device, seed):
            try:
                steps = self.training_steps
                if steps is None and None in (self.warmup_steps, self.meta_steps):
                    steps = 100 * sum(1 for _ in train_batches())
                budget = share(steps, work, self.unroll, self.warmup_steps, self.meta_steps, self.snapshots)
                search.run(budget, train_batches, val_batches, seed, progress)
            except KeyboardInterrupt:
                interrupted = True
                log.warning("the search was interrupted at %s; going on with what it has learned", search.where)
        return search.result(interrupted)


@dataclass
class _Snapshot:
    state: State
    lr: float  # the warm-up's, at the step it was taken


@dataclass
class _Search:
    """The search as it runs: what changes from step to step."""

    settings: Sedona
    blocks: Sequence[RelaxedBlock]
    local_loss: LocalLoss
    where: str = "the start"
    spent: float = 0.0
    budget: Budget | None = None
    snapshots: list[_Snapshot] = field(default_factory=list)
    trajectory: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = [dict(b.module.named_parameters())[b.beta] for b in self.blocks if b.beta is not None]
        self.beta = [torch.zeros_like(t, requires_grad=True) for t in named]
        self.alpha = torch.zeros(len(named), 2, dtype=named[0].dtype, device=named[0].device, requires_grad=True)
        self._keep()

    def run(self, budget: Budget, train: Batches, val: Batches, seed: int, progress: bool) -> None:
        self.budget = budget
        log.info("%s (%d snapshots)", budget, budget.snapshots)
        total = math.ceil(budget.equivalent_steps)
        with tqdm(total=total, desc=str(budget), unit="step", disable=not progress) as self.bar:
            train_stream, val_stream = endless(train, "training"), endless(val, "validation")
            self._warm_up(budget, train_stream)
            self._search(budget, train_stream, val_stream, torch.Generator().manual_seed(seed))

    def _warm_up(self, budget: Budget, train: Iterator[Batch]) -> None:
        """Train the relaxed net at alpha = beta = 0, keeping snapshots evenly spread up to its end."""
        steps = budget.warmup_steps
        taken = {round(steps * (j + 1) / budget.snapshots) for j in range(budget.snapshots)}
        state = State.of(self.blocks)
        for step in range(steps):
            self.where = f"warm-up step {step}"
            self._train(state, self._lr(step, steps), next(train))
            self._spend(budget.relaxed_cost)
            if step + 1 in taken:
                self.snapshots.append(
                    _Snapshot(state.clone() if step + 1 < steps else state, self._lr(step + 1, steps))
                )

    def _search(self, budget: Budget, train: Iterator[Batch], val: Iterator[Batch], draws: torch.Generator) -> None:
        s = self.settings
        adam = torch.optim.Adam(
            [self.alpha, *self.beta], lr=s.meta_lr, betas=s.meta_betas, weight_decay=s.meta_weight_decay
        )
        points = min(budget.meta_steps, _TRAJECTORY_POINTS)
        shown = {round(j * (budget.meta_steps - 1) / max(1, points - 1)) for j in range(points)}
        for step in range(budget.meta_steps):
            self.where = f"meta-iteration {step}"
            snapshot = self.snapshots[int(torch.randint(len(self.snapshots), (), generator=draws))]
            batches = [next(train) for _ in range(s.unroll)]
            at = (self.blocks, snapshot.state, self.alpha, self.beta)
            sgd: dict[str, Any] = {"lr": snapshot.lr, "momentum": s.momentum, "weight_decay": s.weight_decay}
            if s.unroll == 1:
                found = one_step_hypergradient(*at, batches[0], next(val), self.local_loss, **sgd)
            else:
                found = hypergradient(*at, batches, next(val), self.local_loss, **sgd)
            gradients = [found.alpha_grad, *found.beta_grads]
            if not all(bool(t.isfinite().all()) for t in (found.val_loss, *gradients)):
                raise NonFiniteSearch(f"at {self.where}, in the validation loss or its gradient", self.result(False))
            for t, g in zip([self.alpha, *self.beta], gradients, strict=True):
                t.grad = g
            adam.step()
            self._train(snapshot.state, snapshot.lr, next(train))
            self._spend(budget.meta_cost)
            self._keep()
            if step in shown:
                self.trajectory.append(
                    {
                        "step": step,
                        "val_loss": found.val_loss.item(),
                        "p_isolate": self.kept[0].softmax(1)[:, 0].tolist(),
                        "head_weights": [b.softmax(0).tolist() for b in self.kept[1]],
                    }
                )

    def _train(self, state: State, lr: float, batch: Batch) -> None:
        """One ordinary relaxed training step, in place."""
        s = self.settings
        found = relaxed_gradients(
            self.blocks, state, self.alpha, self.beta, *batch, self.local_loss, create_graph=False
        )
        finite = torch.stack(found.losses).isfinite()
        if not finite.all():
            layer = finite.tolist().index(False)
            raise NonFiniteSearch(f"at {self.where}, base layer {layer}", self.result(False))
        sgd_momentum_step(state, found.grads, lr, s.momentum, s.weight_decay, differentiable=False)

    def _lr(self, step: int, steps: int) -> float:
        low = _FINAL_LR_FRACTION * self.settings.lr
        return low + (self.settings.lr - low) * (1 + math.cos(math.pi * step / steps)) / 2

    def _spend(self, cost: float) -> None:
        self.spent += cost
        self.bar.update(round(self.spent) - self.bar.n)

    def _keep(self) -> None:
        """Copy alpha and beta where an interrupt in the middle of an Adam step cannot reach them."""
        self.kept = (self.alpha.detach().cpu().clone(), [b.detach().cpu().clone() for b in self.beta])

    def result(self, interrupted: bool) -> SedonaResult:
        cost: dict[str, float] = {"spent_steps": self.spent}
        if self.budget is not None:
            b = self.budget
            cost |= {
                "relaxed_steps": b.warmup_steps + b.meta_steps,
                "meta_iterations": b.meta_steps,
                "equivalent_steps": b.equivalent_steps,
                "snapshots": b.snapshots,
                "snapshot_bytes": sum(s.state.state_bytes for s in self.snapshots),
            }
        return SedonaResult(*self.kept, list(self.trajectory), cost, interrupted)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global streams of the CPU and of `device`'s kind, and give them back as they were."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        count = torch.get_device_module(device).device_count()
        with torch.random.fork_rng(devices=list(range(count)), device_type=device.type):
            torch.manual_seed(seed)
            yield

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from sedona_fx.errors import shape_text
from sedona_fx.rng import seeded
from sedona_fx.search.problem.problem import Decision, Problem
from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.relaxed.state import BlockLossFunction, RelaxedBlock, State
from sedona_fx.search.sedona.bilevel import Learning
from sedona_fx.search.sedona.budget import DECODING_SHARE, Budget, Trials, share, share_seconds, share_trials
from sedona_fx.search.sedona.perturbation import PlanSpace, perturb
from sedona_fx.search.sedona.relaxed_net import search_sedona
from sedona_fx.search.sedona.result import SedonaResult
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.sedona.steps import InnerSteps
from sedona_fx.search.session.batches import Batches
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import MEASURED_SHARE, TIMED_STEPS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sedona:
    """Settings of the search. What is `None` is derived, so that the cost stays within `training_steps`.

    Args:
        training_steps: SGD steps of the training run this search serves. None: 100 epochs of the weights' data.
        warmup_steps: relaxed training steps before the search proper. None: half of the cost.
        meta_steps: updates of alpha and beta. None: what the rest of the cost allows.
        snapshots: states of the relaxed net to search at, spread over the warm-up. None: at most 10.
        unroll: training steps T that the validation loss is differentiated through; one takes no second-order graph.
        sampled_cuts: how many cuts, drawn anew in each ordinary relaxed step, have their heads run. The gradient of
            base layers is unbiased, heads train when they are drawn
            (:func:`~sedona_fx.search.relaxed.training_step.sample_cuts`). Unrolled steps always have all heads. None: all.
        lr: learning rate of relaxed training; cosine to a hundredth of it over the warm-up.
        momentum: of relaxed training.
        weight_decay: of relaxed training.
        meta_lr: Adam's learning rate for alpha and beta.
        meta_betas: Adam's decay rates.
        meta_weight_decay: Adam's weight decay.
        decode: how the decision follows from what was learned. ``"argmax"``: the paper's, the K-1 places with the
            largest p_isolate, the likeliest head of each. ``"perturbation"``: cuts and heads jointly, by what making
            each of them hard does to the validation loss (:mod:`~sedona_fx.search.sedona.perturbation`). That is a quarter of
            the cost (of `training_steps`, of `seconds`, or of the whole, if the steps are given); what it does not pay
            for, the learned weights prune.
        perturbation_steps: relaxed training steps of each of its trials. None: 5 to 50, what the cost pays for. With
            `warmup_steps` and `meta_steps` given too, nothing is pruned.
        val_batch_size: samples in a validation batch, for whoever makes the batches. None: as in training.
        seconds: how long the search may take, instead of the three numbers of steps above. A few steps are measured
            before the start, on copies; the counts that follow are kept in the plan and, with `folder`, there.
        snapshot_bytes: of the snapshots, how much to keep in memory; the others go to disk. None: all in memory.
        folder: where the search writes down where it stands. A search that was killed goes on from there when it is
            called again with the same settings, and ends as if it had never stopped; one that is finished is there at
            once (decoding by perturbation starts anew then, from the end of the search, and ends with the same plan).
            Not covered: data that carries a state of its own from epoch to epoch.
        save_seconds: how long to wait from one save to the next.
    """

    training_steps: int | None = None
    warmup_steps: int | None = None
    meta_steps: int | None = None
    snapshots: int | None = None
    unroll: int = 3
    sampled_cuts: int | None = None
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    meta_lr: float = 1e-2
    meta_betas: tuple[float, float] = (0.5, 0.999)
    meta_weight_decay: float = 1e-6
    decode: Literal["argmax", "perturbation"] = "argmax"
    perturbation_steps: int | None = None
    val_batch_size: int | None = None
    seconds: float | None = None
    snapshot_bytes: int | None = 2**30
    folder: str | Path | None = None
    save_seconds: float = 60.0

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in (
            "training_steps",
            "warmup_steps",
            "meta_steps",
            "snapshots",
            "unroll",
            "sampled_cuts",
            "perturbation_steps",
            "val_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Sedona({name}={value}): has to be at least 1")
        if self.decode not in ("argmax", "perturbation"):
            raise ValueError(f"Sedona(decode={self.decode!r}): 'argmax' or 'perturbation'")
        if self.perturbation_steps is not None and self.decode == "argmax":
            raise ValueError(f"Sedona(perturbation_steps={self.perturbation_steps}): needs decode='perturbation'")
        steps = [n for n in ("training_steps", "warmup_steps", "meta_steps") if getattr(self, n) is not None]
        if self.seconds is not None and (self.seconds <= 0 or steps):
            why = f"it would find {steps[0]} itself: give one of them" if steps else "has to be above 0"
            raise ValueError(f"Sedona(seconds={self.seconds}): {why}")

    @classmethod
    def paper(cls) -> Sedona:
        """The paper's procedure for CIFAR-10, with all of its settings. They are not scaled to anything.

        40,000 steps of relaxed training (SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1 to 0.001 by cosine),
        50 snapshots on the way; 2,000 meta-iterations of 5 unrolled steps, a validation batch of 1,024, and a step of
        Adam (0.01, (0.5, 0.999), weight decay 1e-6). The rest of it lies in what the user hands over:

        - batches of 128: the loader's;
        - label smoothing 0.1, which the authors spread over the *other* 9 classes: for PyTorch's loss that is
          ``functools.partial(F.cross_entropy, label_smoothing=0.111)``;
        - 60 % of the training set for the weights and 40 % for validation: what ``decouple`` does of itself to a
          map-style loader without ``val_data=``.

        In the paper the snapshots' spacing is left open; the authors' code keeps the last 50. Here they are spread over
        the whole warm-up.
        """
        return cls(
            warmup_steps=40_000,
            meta_steps=2_000,
            snapshots=50,
            unroll=5,
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            meta_lr=1e-2,
            meta_betas=(0.5, 0.999),
            meta_weight_decay=1e-6,
            val_batch_size=1024,
        )

    def decide(self, problem: Problem) -> Decision:
        """Relax the problem's net, search, and decode."""
        return search_sedona(self, problem)

    def run(
        self,
        blocks: Sequence[RelaxedBlock],
        local_loss: BlockLossFunction,
        train_batches: Batches,
        val_batches: Batches,
        work: RelaxedWork,
        seed: int,
        progress: bool,
        names: Mapping[str, Any] | None = None,
        space: PlanSpace | None = None,
    ) -> SedonaResult:
        """Search. Ctrl-C ends it and returns what was learned until then; the same seed gives the same result.

        A loss that is not finite costs the snapshot it came from: what that meta-iteration changed is dropped, and the
        one before stands in for it from there on.

        Args:
            blocks: the B base layers, B at least 2. Their own tensors are left as they are.
            local_loss: `local_loss(block, local, target)`, a scalar.
            train_batches: one epoch of the weights' data at a call: (inputs by name, target).
            val_batches: the same for the validation data.
            work: for the cost. No clock is read but for `seconds`, so the search does not depend on the machine's load.
            seed: of snapshots, dropout, and of what the data draws from the global streams (which are given back).
            progress: show a bar.
            names: what else tells this search from another one in the same `folder`, as JSON.
            space: the plans to choose from, for ``decode="perturbation"``. None: nothing is decoded here. Ctrl-C while
                it decodes leaves the result without.

        Raises:
            CheckpointError: `folder` holds another search, or cannot be read.
            NonFiniteSearch: losses are infinite or NaN, and no snapshot is left to go on from.
            ValueError: the data is empty, there is nothing to cut, or the budget too small.
        """
        space = space if self.decode == "perturbation" else None
        if len(blocks) < 2:
            raise ValueError("there is nothing to search: the net has a single base layer")
        if self.sampled_cuts is not None:
            work = replace(work, sampled=min(1.0, self.sampled_cuts / (len(blocks) - 1)))
        journal = Journal(self.folder, self._identity(blocks, seed, names or {}), self.save_seconds)
        train, val = Stream(train_batches, "training", seed), Stream(val_batches, "validation", seed)
        with SnapshotStore(self.snapshot_bytes, journal.folder) as store:
            learning = Learning(self, blocks, local_loss, train, val, store, journal, seed)
            with seeded(learning.alpha.device, seed):
                try:
                    result = learning.run(lambda search: self._plan(search, train_batches, work, space), progress)
                except KeyboardInterrupt:
                    log.warning("the search was interrupted at %s; going on with what it has learned", learning.where)
                    return learning.result(interrupted=True)
                return result if space is None else self._perturb(result, learning, work, space, progress)

    def _plan(self, learning: Learning, train: Batches, work: RelaxedWork, space: PlanSpace | None) -> Budget:
        """Fix how many steps of each kind there will be, and say what decoding will cost."""
        learning.budget = self._budget(learning, train, work)
        if space is not None:
            self._trials(learning, work, space)
        return learning.budget

    def _budget(self, learning: Learning, train: Batches, work: RelaxedWork) -> Budget:
        """Count the steps of each kind; measure how long they take, where that hardly costs."""
        decoding = DECODING_SHARE if self.decode == "perturbation" else 0.0
        if self.seconds is not None:
            start = time.perf_counter()
            learning.pace = learning.measure()
            left = max(0.0, self.seconds - (time.perf_counter() - start))
            return share_seconds(left, learning.pace, work, self.unroll, self.snapshots, decoding)
        steps = self.training_steps
        if steps is None and None in (self.warmup_steps, self.meta_steps):
            steps = 100 * sum(1 for _ in train())
        budget = share(steps, work, self.unroll, self.warmup_steps, self.meta_steps, self.snapshots, decoding)
        if None not in (self.warmup_steps, self.meta_steps, self.perturbation_steps):
            budget = replace(budget, decoding_cost=math.inf)
        cost = TIMED_STEPS * budget.relaxed_cost + budget.meta_cost
        if cost <= MEASURED_SHARE * budget.equivalent_steps:
            learning.pace = learning.measure()
        return budget

    def _trials(self, learning: Learning, work: RelaxedWork, space: PlanSpace) -> Trials:
        """Count the trials of decoding, and say what they cost."""
        budget, pace, choices = learning.budget, learning.pace, sum(len(b) for b in learning.beta)
        assert budget is not None
        trials = share_trials(budget.decoding_cost, work, space.blocks - 1, choices, self.perturbation_steps)
        text = str(trials)
        if pace is not None:
            seconds = trials.equivalent_steps * pace.relaxed_seconds / budget.relaxed_cost
            text += f", about {tqdm.format_interval(math.ceil(seconds))}"
        log.info("%s", text)
        return trials

    def _perturb(
        self, result: SedonaResult, learning: Learning, work: RelaxedWork, space: PlanSpace, progress: bool
    ) -> SedonaResult:
        """Decode from the last good snapshot, on the streams' first batches: the same whenever it is done."""
        (index,) = learning.store.indices
        start, lr = learning.store.take(index)
        steps = InnerSteps(replace(self, sampled_cuts=None), learning.blocks, learning.local_loss, learning.draws)
        device, seed = learning.alpha.device, learning.seed
        logits = result.alpha.to(device), [b.to(device) for b in result.beta]
        trials, train, val = self._trials(learning, work, space), learning.train.fresh(), learning.val.fresh()
        try:
            found = perturb(steps, start, lr, *logits, space, trials, train, val, seed, progress)
        except KeyboardInterrupt:
            log.warning("decoding was interrupted; the learned weights decide")
            return replace(result, interrupted=True)
        return replace(result, decoding=found, cost=result.cost | {"decoding_steps": found.equivalent_steps})

    def _identity(self, blocks: Sequence[RelaxedBlock], seed: int, names: Mapping[str, Any]) -> dict[str, Any]:
        """Return what makes a search in a folder this one: whatever its result depends on, but for weights and data."""
        state = State.of(blocks)
        shapes = {
            f"{i}.{name}": f"{shape_text(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for i, tensors in enumerate(zip(state.params, state.buffers, strict=True))
            for name, t in (tensors[0] | tensors[1]).items()
        }
        return {"seed": seed, "settings": settings_of(self), **names, "shapes": shapes}

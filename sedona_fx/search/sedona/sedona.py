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
from typing import Any, ClassVar

from tqdm import tqdm

from sedona_fx.errors import CutError, SearchDivergedError, shape_text
from sedona_fx.rng import seeded, seeded_init
from sedona_fx.search.problem.problem import Decision, Problem, Search
from sedona_fx.search.problem.work import RelaxedWork, work
from sedona_fx.search.relaxed.state import BlockLossFunction, RelaxedBlock, State
from sedona_fx.search.sedona.bilevel import Learning
from sedona_fx.search.sedona.budget import DECODING_SHARE, Budget, Trials, share, share_seconds, share_trials
from sedona_fx.search.sedona.decision import candidate_names, decision_of, plan_so_far
from sedona_fx.search.sedona.perturbation import PlanSpace, perturb
from sedona_fx.search.sedona.relaxed_net import block_loss, relaxed_blocks
from sedona_fx.search.sedona.result import NonFiniteSearch, SedonaResult
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.sedona.steps import InnerSteps
from sedona_fx.search.session.batches import Batches, NamedBatches
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import MEASURED_SHARE, TIMED_STEPS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sedona(SedonaSettings, Search):
    """SEDONA's search (Pyeon, Moon, Hahn, Kim; ICLR 2021), with the settings of its base class.

    ``Sedona()`` spends what 100 epochs of plain training would; ``Sedona.paper()`` is the paper's procedure as it is.
    """

    needs_data: ClassVar[bool] = True

    def decide(self, problem: Problem) -> Decision:
        """Relax the problem's net, search, and decode.

        Raises:
            BudgetError: no plan keeps within the problem's limits.
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: there are not enough places to cut, or no heads to choose from.
            DataError: there is no data, or an epoch of it is empty.
            HeadError: a head uses a weight of the base layer before it.
            SearchDivergedError: a loss was not finite; with the plan decoded from what was learned until then.
            SettingsError: the steps or seconds given do not pay for a search.
        """
        places = problem.places()
        if problem.blocks == 1:
            return Decision([], [], {"search": "sedona"})
        data = problem.require_data("search='sedona'")
        with seeded_init(problem.seed):
            blocks = relaxed_blocks(problem, places)
        device = next(blocks[0].module.parameters()).device
        try:
            result = self.run(
                blocks,
                block_loss(problem, len(blocks)),
                train_batches=NamedBatches(data.train, problem.train, device),
                val_batches=NamedBatches(data.val, problem.train, device),
                work=work(problem, places),
                seed=problem.seed,
                progress=problem.progress,
                names={"places": list(places), "candidates": candidate_names(problem, places)},
                space=PlanSpace.of(problem) if self.decode == "perturbation" else None,
            )
        except NonFiniteSearch as error:
            raise SearchDivergedError(error.where, plan_so_far(self, problem, places, error.result)) from error
        return decision_of(self, problem, places, result)

    def run(
        self,
        blocks: Sequence[RelaxedBlock],
        local_loss: BlockLossFunction,
        *,
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
            DataError: the data is empty.
            SettingsError: the steps or seconds do not pay for a search.
            CutError: there is nothing to cut.
        """
        space = space if self.decode == "perturbation" else None
        if len(blocks) < 2:
            raise CutError("there is nothing to search: the net has a single base layer")
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

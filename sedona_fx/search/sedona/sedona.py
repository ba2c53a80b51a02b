"""SEDONA's search: learn by gradient after which base layers to cut, and with which heads.

The bilevel problem of Pyeon, Moon, Hahn, Kim (ICLR 2021): minimise over (alpha, beta) the validation loss of the final
output, at weights obtained by relaxed training. It is solved as in the paper. First the relaxed net is trained, and
snapshots of it are kept. Then, again and again, a snapshot is taken at random, the validation loss is differentiated
through a few training steps from there, alpha and beta take a step of Adam, and the snapshot is trained for one step
under the new ones and put back. The snapshots are spread over the training of the relaxed net, so that the decision
suits the net at all stages of its training and not at its end alone.
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
from sedona_fx.search.relaxed.state import BlockLossFunction, Logits, RelaxedBlock, RelaxedNet, State
from sedona_fx.search.sedona.bilevel import BilevelSearch
from sedona_fx.search.sedona.decision import candidate_names, decision_of, plan_so_far
from sedona_fx.search.sedona.perturbation import perturb
from sedona_fx.search.sedona.plan_space import PlanSpace
from sedona_fx.search.sedona.relaxed_net import block_loss, relaxed_blocks
from sedona_fx.search.sedona.result import NonFiniteSearch, SedonaResult
from sedona_fx.search.sedona.search_cost import SearchCost, Trials, share, share_seconds, share_trials
from sedona_fx.search.sedona.search_state import SearchState
from sedona_fx.search.sedona.settings import SedonaSettings
from sedona_fx.search.sedona.snapshots import SnapshotStore
from sedona_fx.search.sedona.steps import SedonaSteps
from sedona_fx.search.session.batches import Batches, NamedBatches
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.stream import Stream
from sedona_fx.search.session.timing import MEASURED_SHARE, TIMED_STEPS, StepSeconds

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sedona(SedonaSettings, Search):
    """SEDONA's search (Pyeon, Moon, Hahn, Kim; ICLR 2021), with the settings of its base class.

    ``Sedona()`` costs as much as 100 epochs of plain training; ``Sedona.paper()`` is the paper's procedure.
    """

    needs_data: ClassVar[bool] = True

    def decide(self, problem: Problem) -> Decision:
        """Relax the net, search, and decode.

        Raises:
            BudgetError: no plan keeps within the problem's limits.
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: there are not enough places to cut, or no heads to choose from.
            DataError: there is no data, or an epoch of it is empty.
            HeadError: a head uses a weight of the base layer before it.
            SearchDivergedError: losses were not finite; it has the plan decoded from what was learned until then.
            SettingsError: the steps or seconds do not pay for a search.
        """
        places = problem.places()
        if problem.blocks == 1:
            return Decision([], [], {"search": "sedona"})
        data = problem.require_data("search='sedona'")
        with seeded_init(problem.seed):
            blocks = relaxed_blocks(problem, places)
        try:
            result = self.run(
                blocks,
                block_loss(problem, len(blocks)),
                train_batches=NamedBatches(data.train, problem.train, problem.device),
                val_batches=NamedBatches(data.val, problem.train, problem.device),
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
        """Search. The same seed gives the same result. Ctrl-C ends the search; what was learned so far is returned.

        If a loss is not finite, the changes of that meta-iteration are dropped. Its snapshot is not used again: the one
        before it stands in from then on.

        Args:
            blocks: the B base layers, B at least 2. Their own tensors are left as they are.
            local_loss: ``local_loss(block, local output, target)``, a scalar.
            train_batches: starts an epoch of training batches at every call: (inputs by name, target).
            val_batches: the same for validation batches.
            work: what heads cost beside the net. The clock is read for `seconds` alone, so that the search does not
                depend on the machine's load.
            seed: of snapshots, of dropout, and of what the data draws from the global random states, which are restored
                afterwards.
            progress: whether to show a bar.
            names: what else tells this search from another one in the same `folder`, as JSON.
            space: the plans to choose from, for ``decode="perturbation"``. None: the result is not decoded here. If
                Ctrl-C is pressed while it is decoded, the result has no `decoding`.

        Raises:
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: there is nothing to cut.
            DataError: the data is empty.
            NonFiniteSearch: losses are infinite or NaN, and no snapshot is left to go on from.
            SettingsError: the steps or seconds do not pay for a search.
        """
        space = space if self.decode == "perturbation" else None
        if len(blocks) < 2:
            raise CutError("there is nothing to search: the net has a single base layer")
        if self.sampled_cuts is not None:
            work = replace(work, sampled=min(1.0, self.sampled_cuts / (len(blocks) - 1)))
        net = RelaxedNet(blocks, local_loss)
        journal = Journal(self.folder, self._identity(blocks, seed, names or {}), self.save_seconds)
        with journal, SnapshotStore(self.snapshot_bytes, journal.folder) as store:
            state = SearchState(
                self,
                net,
                train=Stream(train_batches, "training", seed),
                val=Stream(val_batches, "validation", seed),
                store=store,
                journal=journal,
                seed=seed,
            )
            search = BilevelSearch(self, net, state)
            with seeded(state.variables.device, seed):
                try:
                    result = search.run(lambda: self._plan(search, train_batches, work, space), progress)
                except KeyboardInterrupt:
                    log.warning(
                        "the search was interrupted at %s; going on with what it has learned", state.history.where
                    )
                    return search.result(interrupted=True)
                return result if space is None else self._perturb(result, search, work, space, progress)

    def _plan(
        self, search: BilevelSearch, train: Batches, work: RelaxedWork, space: PlanSpace | None
    ) -> tuple[SearchCost, StepSeconds | None]:
        """Fix the numbers of steps, and log what decoding will cost."""
        search_cost, step_seconds = self._search_cost(search, train, work)
        if space is not None:
            self._trials(search, search_cost, step_seconds, work, space)
        return search_cost, step_seconds

    def _search_cost(
        self, search: BilevelSearch, train: Batches, work: RelaxedWork
    ) -> tuple[SearchCost, StepSeconds | None]:
        """Fix the numbers of steps; also measure what steps take, if `seconds` asks for it or it hardly costs."""
        if self.seconds is not None:
            start = time.perf_counter()
            step_seconds = search.measure()
            left = max(0.0, self.seconds - (time.perf_counter() - start))
            return share_seconds(self, work, step_seconds, left), step_seconds
        settings = self
        if self.training_steps is None and None in (self.warmup_steps, self.meta_steps):
            settings = replace(self, training_steps=100 * sum(1 for _ in train()))
        search_cost = share(settings, work)
        cost = TIMED_STEPS * search_cost.relaxed_cost + search_cost.meta_cost
        return search_cost, search.measure() if cost <= MEASURED_SHARE * search_cost.equivalent_steps else None

    def _trials(
        self,
        search: BilevelSearch,
        search_cost: SearchCost,
        step_seconds: StepSeconds | None,
        work: RelaxedWork,
        space: PlanSpace,
    ) -> Trials:
        """Fix the number of trials of decoding, and log what they cost."""
        choices = sum(len(b) for b in search.variables.logits.beta)
        trials = share_trials(search_cost.decoding_cost, work, space.blocks - 1, choices, self.perturbation_steps)
        text = str(trials)
        if step_seconds is not None:
            seconds = trials.equivalent_steps * step_seconds.relaxed_seconds / search_cost.relaxed_cost
            text += f", about {tqdm.format_interval(math.ceil(seconds))}"
        log.info("%s", text)
        return trials

    def _perturb(
        self, result: SedonaResult, search: BilevelSearch, work: RelaxedWork, space: PlanSpace, progress: bool
    ) -> SedonaResult:
        """Decode by perturbation: from the last good snapshot, on the first batches of the streams.

        So it is the same whenever it is done, right after the search or by a call that finds it finished.
        """
        state, device = search.state, search.variables.device
        search_cost = state.search_cost
        assert search_cost is not None
        trials = self._trials(search, search_cost, state.step_seconds, work, space)
        (index,) = search.store.indices
        try:
            decoding = perturb(
                SedonaSteps(replace(self, sampled_cuts=None), search.net, state.draws),
                search.store.take(index),
                Logits(result.alpha.to(device), [b.to(device) for b in result.beta]),
                space,
                trials,
                train=state.train.fresh(),
                val=state.val.fresh(),
                seed=state.seed,
                progress=progress,
            )
        except KeyboardInterrupt:
            log.warning("decoding was interrupted; the learned weights decide")
            return replace(result, interrupted=True)
        return replace(result, decoding=decoding, cost=result.cost | {"decoding_steps": decoding.equivalent_steps})

    def _identity(self, blocks: Sequence[RelaxedBlock], seed: int, names: Mapping[str, Any]) -> dict[str, Any]:
        """Return what tells this search from another: all that its result depends on, except weights and data."""
        state = State.of(blocks)
        shapes = {
            f"{i}.{name}": f"{shape_text(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for i, tensors in enumerate(zip(state.params, state.buffers, strict=True))
            for name, t in (tensors[0] | tensors[1]).items()
        }
        return {"seed": seed, "settings": settings_of(self), **names, "shapes": shapes}

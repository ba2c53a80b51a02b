"""One guided search: its parts in their order, saved between any two batches (:mod:`~sedona_fx.search.guided`)."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from tqdm import tqdm

from sedona_fx.errors import SearchDivergedError
from sedona_fx.heads.registry import head_name
from sedona_fx.search.guided_settings import GuidedSettings
from sedona_fx.search.problem.plan_costs import best_plans
from sedona_fx.search.problem.problem import Choice, Decision, Problem, SearchData
from sedona_fx.search.session.batches import NamedBatch, split
from sedona_fx.search.session.data import training_stream, validation_stream
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.progress import Progress
from sedona_fx.search.session.timing import MEASURED_SHARE
from sedona_fx.search.trial_settings import DEFAULT_EPOCHS
from sedona_fx.search.trials.alignment import Alignment
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort, Shares, overhead
from sedona_fx.search.trials.gradient_comparison import Comparison
from sedona_fx.search.trials.successive_halving import Halving
from sedona_fx.search.trials.supernet import Supernet

log = logging.getLogger(__name__)

_PLANS_LISTED = 200


class GuidedRun:
    """One search.

    Args:
        settings: of the search.
        problem: the net; its weights are left as they are.
        data: of the problem.
    """

    def __init__(self, settings: GuidedSettings, problem: Problem, data: SearchData) -> None:
        self.settings, self.problem, self.data = settings, problem, data
        self.places, self.device = problem.places(), problem.device
        self.train, self.val = training_stream(problem, data), validation_stream(problem, data)
        self.descent = Descent(settings.lr, settings.momentum, settings.weight_decay)
        identity = {"search": "guided", "settings": settings_of(settings), **problem.identity()}
        self.journal = Journal(settings.folder, identity, settings.save_seconds)
        self.net = Supernet(problem, self.places, self.device)

    def decide(self) -> Decision:
        """Search to the end, from where the journal stands or from the start."""
        with self.journal:
            return self._decide()

    def _decide(self) -> Decision:
        saved = self.journal.read() or {}
        if "decision" in saved:
            with self.journal.restoring():
                return self.problem.decision(*saved["decision"])
        shares, effort, batch_size = self._plan_steps(saved.get("shares"))
        comparison = Comparison(
            net=self.net,
            steps=shares.warmup_steps,
            states=shares.states,
            batch_size=batch_size,
            descent=self.descent,
            cuts=self.problem.blocks - 1,
            seed=self.problem.seed,
        )
        if "comparison" in saved:
            with self.journal.restoring():
                comparison.load_state_dict(saved["comparison"])
                position = saved["train"]
            self.train.go_to(position)
        rounds: list[dict[str, Any]] = []
        with Progress(
            self.journal,
            self.train,
            fixed={"shares": [list(astuple(shares)), list(astuple(effort))]},
            total=shares.cost,
            description="guided search",
            shown=self.problem.progress,
        ) as progress:
            self._compare_gradients(comparison, effort, progress)
            ranked, provenance = self._rank(comparison.met, max(1, shares.finalists))
            if shares.rollout_steps and not progress.interrupted:
                halving = Halving(self.problem, ranked, self.descent, self.device, shares.rollout_steps)
                halving.begin(self.net.start())
                if "rollout" in saved:
                    with self.journal.restoring():
                        halving.load_state_dict(saved["rollout"])
                    progress.show(comparison=comparison, rollout=halving)
                if self._roll_out(halving, comparison, progress):
                    ranked = halving.ranked or ranked
                else:
                    provenance["without_rollouts"] = "their losses or gradients turned infinite or NaN"
                rounds = halving.rounds
        provenance |= {
            "search": "guided",
            "score": "cut",
            "interrupted": progress.interrupted,
            "cost": {"equivalent_steps": progress.spent, **shares.counts(), **self._seconds()},
            "states": len(comparison.met),
            "rounds": rounds,
            "decided_by": "rollouts" if rounds and "without_rollouts" not in provenance else "gradients",
            **comparison.skipped(),
        }
        if self.net.shares_parameters and self.settings.finalists > 1:
            provenance["without_rollouts"] = "blocks would share a parameter"
        if not progress.interrupted:
            self.journal.write({"decision": [[list(pair) for pair in ranked[0]], provenance]})
        return self.problem.decision(ranked[0], provenance)

    def _plan_steps(self, saved: Sequence[Any] | None) -> tuple[Shares, Effort, int | None]:
        """Fix the numbers of steps.

        Args:
            saved: as a search that resumes has saved them; its numbers stay.

        Returns:
            The numbers of steps, what each costs, and the samples per micro-batch; None: batches are not split.
        """
        settings = self.settings
        first_batch = next(self.train.fresh())
        batch_size, micro_batches = self._micro_batches(first_batch)
        if saved is not None:
            with self.journal.restoring():
                return Shares(*saved[0]), Effort(*saved[1]), batch_size
        effort = Effort.of(self.problem, self.places, micro_batches)
        epoch = self.data.epoch_batches or self.train.length()
        allowed_steps = DEFAULT_EPOCHS * epoch if settings.training_steps is None else settings.training_steps
        step_seconds = None
        if settings.seconds is not None or effort.of_measuring <= MEASURED_SHARE * allowed_steps:
            step_seconds = effort.seconds(
                lambda: Supernet(self.problem, self.places, self.device),
                first_batch,
                batch_size,
                self.problem.blocks - 1,
            )
        if settings.seconds is not None and step_seconds is not None:
            allowed_steps = math.floor(settings.seconds / step_seconds)
            if allowed_steps < effort.least:
                enough = math.ceil(effort.least * step_seconds)
                raise effort.too_little(f"seconds={settings.seconds:g}", f"seconds to {enough}")
        finalists = 0 if self.net.shares_parameters else settings.finalists
        shares = effort.share(allowed_steps, settings.states, finalists, epoch, self.problem)
        duration = "" if step_seconds is None else tqdm.format_interval(math.ceil(step_seconds * shares.cost))
        log.info("%s%s", shares, duration and f", about {duration}")
        if shares.states == 1 < settings.states:
            log.warning(
                "gradients are compared in a single state: the scores will be mostly noise. training_steps=%d or more "
                "pays for another one; 'latest' cuts with head='largest' need no search",
                math.ceil(4 * effort.comparison),
            )
        return shares, effort, batch_size

    def _micro_batches(self, batch: NamedBatch) -> tuple[int | None, int]:
        """Return the samples per micro-batch (None: batches are not split), and the number of micro-batches per batch.

        They are not so small that the fixed time of operators, which does not depend on the size of their tensors,
        makes more than half of a step.
        """
        if not self.problem.analysed.capture.free_batch:
            return None, 1
        batch_size, most = self.settings.batch_size, max(1, math.floor(1 / overhead(self.problem)))
        while (count := len(split(batch, batch_size))) > most:
            batch_size *= 2
        return (batch_size if count > 1 else None), count

    def _compare_gradients(self, comparison: Comparison, effort: Effort, progress: Progress) -> None:
        """Run the first part.

        Raises:
            KeyboardInterrupt: Ctrl-C before any gradients were compared.
            SearchDivergedError: no training step, or no state, had finite gradients.
        """
        progress.show(comparison=comparison)
        try:
            comparison.run(self.train, effort, lambda: progress.at(comparison=comparison))
        except KeyboardInterrupt:
            if not comparison.met:
                raise
            progress.interrupt(f"step {comparison.step} of {comparison.steps}")

    def _rank(self, alignments: Sequence[Alignment], count: int) -> tuple[list[Choice], dict[str, Any]]:
        """Return the best plans within the limits; and as JSON their scores, and what each (place, head) adds to them.

        Args:
            alignments: gradients at several states of the weights.
            count: of plans.
        """
        problem = self.problem
        head_counts = [len(problem.candidates[place]) for place in self.places]
        means = np.mean([alignment.by_cut() for alignment in alignments], axis=0).tolist()
        terms = [row[:heads] for row, heads in zip(means, head_counts, strict=True)]
        best = best_plans(problem, [[-term for term in row] for row in terms], max(_PLANS_LISTED, 4 * count))
        positions = [tuple((problem.position(place), head) for place, head in plan) for plan in best]
        scores = np.array([sum(terms[place][head] for place, head in plan) for plan in positions])
        order = sorted(range(len(best)), key=lambda k: (-scores[k], k))
        names = {place: [head_name(spec) for spec in problem.candidates[place]] for place in self.places}
        listed = [[[[place, names[place][head]] for place, head in best[k]], float(scores[k])] for k in order]
        provenance = {"places": self.places, "candidates": names, "scores": terms, "plans": listed}
        return [best[k] for k in order[:count]], provenance

    def _roll_out(self, halving: Halving, comparison: Comparison, progress: Progress) -> bool:
        """Train the best plans; return whether the losses of some of them stayed finite."""
        try:
            halving.run(self.train, self._validation, lambda: progress.at(comparison=comparison, rollout=halving))
        except KeyboardInterrupt:
            progress.interrupt(f"step {halving.step} of {halving.steps} of the rollouts")
        except SearchDivergedError as error:
            log.warning("%s; gradients decide alone", error)
            return False
        return True

    def _validation(self) -> Iterable[NamedBatch]:
        return itertools.islice(self.val.fresh().epoch(), self.settings.val_batches)

    def _seconds(self) -> dict[str, float]:
        return {} if self.settings.seconds is None else {"seconds": self.settings.seconds}

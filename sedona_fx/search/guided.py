"""The default search: gradients prune the candidate cuts and heads, rollouts decide among what they leave.

1. Train one set of weights for a while, along plans drawn at random (:mod:`~sedona_fx.search.trials.gradient_comparison`).
2. On the way, compare the gradient of every (cut, head) with the true one, and average over the states met: the cosine
   over all weights in front of the cut (:mod:`~sedona_fx.search.trials.alignment`).
3. Let the dynamic programme name the plans with the largest sums within the budget of memory and time.
4. Train these from the weights of step 1, as ``Greedy`` would, halving their number on the way; the least validation
   loss decides. Where the cost allowed does not pay for an epoch of that, the gradients decide alone: shorter rollouts
   rank plans by noise. So they do where stretches share a parameter (tied embeddings): a block would then depend on
   what follows, and plans could not share their first blocks.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from sedona_fx.errors import SearchDivergedError, SettingsError
from sedona_fx.heads.registry import head_name
from sedona_fx.rng import seeded_init
from sedona_fx.search.problem.plan_costs import best_plans
from sedona_fx.search.problem.problem import Choice, Decision, Problem, Search, SearchData
from sedona_fx.search.session.batches import Batch, split
from sedona_fx.search.session.data import training_stream, validation_stream
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.progress import Progress
from sedona_fx.search.session.timing import MEASURED_SHARE
from sedona_fx.search.trials.alignment import Alignment
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort, Shares, overhead
from sedona_fx.search.trials.gradient_comparison import Comparison
from sedona_fx.search.trials.successive_halving import Halving
from sedona_fx.search.trials.supernet import Supernet

log = logging.getLogger(__name__)

_PLANS_LISTED = 200


@dataclass(frozen=True, kw_only=True)
class Guided(Search):
    """Gradients prune, rollouts decide.

    Args:
        training_steps: plain training steps that the search may cost. None: 25 epochs of the weights' data, a quarter
            of a run of 100.
        seconds: the same in seconds on this machine, in the place of `training_steps`: a few steps are timed before the
            start, the numbers of steps follow and are kept in the plan (and in `folder`).
        states: how often on the way gradients are compared, at most.
        finalists: plans that are rolled out, at most; with 0 or 1, and where a parameter is used on both sides of a
            place to cut, gradients decide alone.
        batch_size: samples in a step of the first part; larger batches are split. More and noisier steps for the same
            cost bring the net and its heads further.
        lr: learning rate of SGD: constant in the first part, falling by a cosine in each round of the rollouts.
        momentum: of SGD.
        weight_decay: of SGD.
        val_batches: validation batches to score by, at most.
        val_batch_size: samples in a validation batch. None: as in training.
        folder: where the search writes down how far it is; killed at any moment, the same call goes on from there and
            ends with the same plan. None: nowhere.
        save_seconds: between two writes.
    """

    training_steps: int | None = None
    seconds: float | None = None
    states: int = 8
    finalists: int = 6
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    val_batches: int = 50
    val_batch_size: int | None = None
    folder: str | Path | None = None
    save_seconds: float = 60.0

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least = {"training_steps": 1, "states": 1, "finalists": 0, "batch_size": 1, "val_batches": 1}
        for name, least in (at_least | {"val_batch_size": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"Guided({name}={value}): has to be at least {least}")
        if self.seconds is not None and (self.seconds <= 0 or self.training_steps is not None):
            why = "has to be above 0" if self.seconds <= 0 else "it is another way to say training_steps: give one"
            raise SettingsError(f"Guided(seconds={self.seconds}): {why}")

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads. Ctrl-C ends the search; it decides by what it has seen until then.

        Raises:
            BudgetError: no plan keeps within the problem's limits.
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: there are not enough places to cut, or no heads to compare.
            DataError: no data, or too small a budget.
            SearchDivergedError: no state had finite gradients.
        """
        if problem.blocks == 1:
            return Decision([], [], {"search": "guided"})
        data = problem.require_data("search='guided'")
        problem.require_heads("search='guided'")
        with seeded_init(problem.seed):
            return _Run(self, problem, data).decide()


class _Run:
    """One search: its parts, and what is written down between them."""

    def __init__(self, settings: Guided, problem: Problem, data: SearchData) -> None:
        self.settings, self.problem, self.data = settings, problem, data
        self.places, self.device = problem.places(), problem.device
        self.train, self._val = training_stream(problem, data), validation_stream(problem, data)
        self.descent = Descent(settings.lr, settings.momentum, settings.weight_decay)
        self.journal = Journal(settings.folder, self._identity(), settings.save_seconds)
        self.net = Supernet(problem, self.places, self.device)

    def decide(self) -> Decision:
        saved = self.journal.read() or {}
        if "decision" in saved:
            return self.problem.decision(*saved["decision"])
        shares, effort, batch_size = self._shares(saved.get("shares"))
        comparison = Comparison(
            self.net,
            shares.warmup_steps,
            shares.states,
            batch_size,
            self.descent,
            self.problem.blocks - 1,
            self.problem.seed,
        )
        if "comparison" in saved:
            comparison.load_state_dict(saved["comparison"])
            self.train.go_to(saved["train"])
        fixed = {"shares": [list(astuple(shares)), list(astuple(effort))]}
        with Progress(
            self.journal,
            self.train,
            fixed=fixed,
            total=shares.cost,
            description="guided search",
            shown=self.problem.progress,
        ) as watch:
            watch.show(comparison=comparison)
            try:
                comparison.run(self.train, effort, lambda: watch.at(comparison=comparison))
            except KeyboardInterrupt:
                if not comparison.met:
                    raise
                watch.interrupt(f"step {comparison.step} of {comparison.steps}")
            if not comparison.met:
                raise SearchDivergedError("in the gradients of every state", None)
            ranked, found = self._rank(comparison.met, max(1, shares.finalists))
            rounds: list[dict[str, Any]] = []
            if shares.rollout_steps and not watch.interrupted:
                halving = Halving(self.problem, ranked, self.descent, self.device, shares.rollout_steps)
                halving.begin(self.net.start())
                if "rollout" in saved:
                    halving.load_state_dict(saved["rollout"])
                    watch.show(comparison=comparison, rollout=halving)
                try:
                    halving.run(self.train, self._validation, lambda: watch.at(comparison=comparison, rollout=halving))
                except KeyboardInterrupt:
                    watch.interrupt(f"step {halving.step} of {halving.steps} of the rollouts")
                except SearchDivergedError as error:
                    log.warning("%s; gradients decide alone", error)
                    found["without_rollouts"] = "their losses turned infinite"
                    halving.ranked.clear()
                ranked, rounds = halving.ranked or ranked, halving.rounds
        found |= {
            "search": "guided",
            "score": "cut",
            "interrupted": watch.interrupted,
            "cost": {"equivalent_steps": watch.spent, **shares.counts(), **self._seconds()},
            "states": len(comparison.met),
            "rounds": rounds,
            "decided_by": "rollouts" if rounds and "without_rollouts" not in found else "gradients",
        }
        if self.net.shares_parameters and self.settings.finalists > 1:
            found["without_rollouts"] = "blocks would share a parameter"
        if not watch.interrupted:
            self.journal.write({"decision": [[list(pair) for pair in ranked[0]], found]})
        return self.problem.decision(ranked[0], found)

    def _shares(self, saved: Sequence[Any] | None) -> tuple[Shares, Effort, int | None]:
        """Fix how many steps of each kind there will be, as before where that is written down."""
        s = self.settings
        first = next(self.train.fresh())
        batch_size, parts = None, 1
        if self.problem.analysed.capture.free_batch:
            # Not so small that operators, which take their time whatever the size, make more than half of a step.
            batch_size, most = s.batch_size, max(1, math.floor(1 / overhead(self.problem)))
            while (parts := len(split(first, batch_size))) > most:
                batch_size *= 2
        batch_size = batch_size if parts > 1 else None
        if saved is not None:
            return Shares(*saved[0]), Effort(*saved[1]), batch_size
        effort = Effort.of(self.problem, self.places, parts)
        epoch = self.data.epoch_batches or self.train.length()
        budget = 25 * epoch if s.training_steps is None else s.training_steps
        pace = None
        if s.seconds is not None or effort.of_measuring <= MEASURED_SHARE * budget:
            pace = effort.seconds(
                lambda: Supernet(self.problem, self.places, self.device), first, batch_size, self.problem.blocks - 1
            )
        if s.seconds is not None and pace is not None:
            budget = math.floor(s.seconds / pace)
            if budget < effort.least:
                raise effort.too_little(f"seconds={s.seconds:g}", f"seconds to {math.ceil(effort.least * pace)}")
        finalists = 0 if self.net.shares_parameters else s.finalists
        shares = effort.share(budget, s.states, finalists, epoch, self.problem)
        about = "" if pace is None else f", about {tqdm.format_interval(math.ceil(pace * shares.cost))}"
        log.info("%s%s", shares, about)
        if shares.states == 1 < s.states:
            log.warning(
                "gradients are compared in a single state: the scores will be mostly noise. training_steps=%d or more "
                "pays for another one; 'latest' cuts with head='largest' need no search",
                math.ceil(4 * effort.comparison),
            )
        return shares, effort, batch_size

    def _rank(self, met: Sequence[Alignment], count: int) -> tuple[list[Choice], dict[str, Any]]:
        """Return the best plans within the limits; and, as JSON, their scores and what each (place, head) adds."""
        problem = self.problem
        heads = [len(problem.candidates[place]) for place in self.places]
        means = np.mean([state.by_cut() for state in met], axis=0).tolist()
        terms = [row[:kinds] for row, kinds in zip(means, heads, strict=True)]
        best = best_plans(problem, [[-term for term in row] for row in terms], max(_PLANS_LISTED, 4 * count))
        positions = [tuple((problem.position(place), head) for place, head in plan) for plan in best]
        scores = np.array([sum(terms[place][head] for place, head in plan) for plan in positions])
        order = sorted(range(len(best)), key=lambda k: (-scores[k], k))
        names = {place: [head_name(spec) for spec in problem.candidates[place]] for place in self.places}
        listed = [[[[p, names[p][k]] for p, k in best[n]], float(scores[n])] for n in order]
        found = {"places": self.places, "candidates": names, "scores": terms, "plans": listed}
        return [best[n] for n in order[:count]], found

    def _validation(self) -> Iterable[Batch]:
        return itertools.islice(self._val.fresh().epoch(), self.settings.val_batches)

    def _seconds(self) -> dict[str, float]:
        return {} if self.settings.seconds is None else {"seconds": self.settings.seconds}

    def _identity(self) -> dict[str, Any]:
        return {"search": "guided", "settings": settings_of(self.settings), **self.problem.identity()}

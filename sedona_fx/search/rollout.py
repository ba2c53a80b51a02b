"""Rollout: train candidate plans for a short while, and keep the one that does best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from sedona_fx.errors import SettingsError
from sedona_fx.rng import seeded_init
from sedona_fx.search.problem.problem import Decision, Problem, Search, SearchData
from sedona_fx.search.session.batches import NamedBatch
from sedona_fx.search.session.data import training_stream, validation_stream
from sedona_fx.search.session.journal import Journal, settings_of
from sedona_fx.search.session.progress import Progress
from sedona_fx.search.trial_settings import DEFAULT_EPOCHS, TrialSettings
from sedona_fx.search.trials.descent import Descent
from sedona_fx.search.trials.effort import Effort
from sedona_fx.search.trials.gradient_comparison import Comparison
from sedona_fx.search.trials.plan_tree import PlanTree
from sedona_fx.search.trials.proposals import proposals
from sedona_fx.search.trials.successive_halving import Halving, affordable
from sedona_fx.search.trials.supernet import Supernet
from sedona_fx.search.trials.tree_cost import tree_cost, tree_cost_of_one


@dataclass(frozen=True, kw_only=True)
class Rollout(TrialSettings, Search):
    """Short greedy runs of candidate plans from the same weights, on the same batches; successive halving.

    Cuts and heads are judged together. Blocks that plans have in common are trained once
    (:class:`~sedona_fx.search.trials.plan_tree.PlanTree`). After a quarter and after a half of the steps, the half of
    the plans with the larger validation losses of the final output is dropped
    (:class:`~sedona_fx.search.trials.successive_halving.Halving`). The best plan at the end is the decision. Further
    settings are those of its base class.

    Args:
        steps: training steps of the plans that stay to the end. None: as many as `training_steps` pays for.
        warmup_steps: training steps before the rollouts, along random plans and on one set of weights, from which all
            plans then begin. 0: plans begin from the net's own weights and fresh heads.
        plans: candidates at most. Where there are more ways to cut and to choose heads, uniform cuts, balanced cuts and
            the latest cuts are among them, and the rest is drawn at random, each plan with the same probability.
    """

    steps: int | None = None
    warmup_steps: int = 0
    plans: int = 48

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(steps=1, plans=1, warmup_steps=0)

    def decide(self, problem: Problem) -> Decision:
        """Choose cuts and heads. Ctrl-C after the first round ends the search; it takes the best plan so far.

        Raises:
            BudgetError: no plan keeps within the problem's limits.
            CheckpointError: `folder` holds another search, or cannot be read.
            CutError: blocks share a parameter, or there are not enough places to cut, or no heads to compare.
            DataError: there is no data, or an epoch of it is empty.
            SearchDivergedError: a loss or gradient of every plan, or of every step of the warm-up, was not finite.
            SettingsError: `training_steps` does not pay for one step of all plans.
        """
        if problem.blocks == 1:
            return Decision([], [], {"search": "rollout"})
        data = problem.require_data("search='rollout'")
        identity = {"search": "rollout", "settings": settings_of(self), **problem.identity()}
        with Journal(self.folder, identity, self.save_seconds) as journal, seeded_init(problem.seed):
            return self._decide(problem, data, journal)

    def _decide(self, problem: Problem, data: SearchData, journal: Journal) -> Decision:
        plans, places = proposals(problem, self.plans), problem.places()
        saved = journal.read() or {}
        if "decision" in saved:
            with journal.restoring():
                return problem.decision(*saved["decision"])
        device = problem.device
        train, val = training_stream(problem, data), validation_stream(problem, data)
        descent, effort = Descent(self.lr, self.momentum, self.weight_decay), Effort.of(problem, places, 1)

        def validation() -> Iterable[NamedBatch]:
            return itertools.islice(val.fresh().epoch(), self.val_batches)

        warm_up = Comparison(
            net=Supernet(problem, places, device),
            steps=self.warmup_steps,
            states=0,
            batch_size=None,
            descent=descent,
            cuts=problem.blocks - 1,
            seed=problem.seed,
        )
        halving = Halving(problem, plans, descent, device)
        halving.steps = self._steps(problem, halving.tree, lambda: data.epoch_batches or train.length())
        if saved:
            with journal.restoring():
                warm_up.load_state_dict(saved["warm_up"])
                position = saved["train"]
            train.go_to(position)
        with Progress(
            journal,
            train,
            fixed={},
            total=self.warmup_steps * effort.warmup_step + halving.steps * tree_cost(problem, halving.tree),
            description=f"rollout of {len(plans)} plans",
            shown=problem.progress,
        ) as progress:
            warm_up.run(train, effort, lambda: progress.at(warm_up=warm_up))
            if "rollout" in saved:
                with journal.restoring():
                    halving.load_state_dict(saved["rollout"])
                progress.show(warm_up=warm_up, rollout=halving)
            elif self.warmup_steps:
                halving.begin(warm_up.net.start())
            try:
                halving.run(train, validation, lambda: progress.at(warm_up=warm_up, rollout=halving))
            except KeyboardInterrupt:
                if not halving.ranked:
                    raise
                progress.interrupt(f"step {halving.step} of {halving.steps}")
        provenance = {
            "search": "rollout",
            "interrupted": progress.interrupted,
            "cost": {"equivalent_steps": progress.spent, "steps": halving.step, "warmup_steps": self.warmup_steps},
            "rounds": halving.rounds,
            **warm_up.skipped(),
        }
        if not progress.interrupted:
            journal.write({"decision": [[list(pair) for pair in halving.ranked[0]], provenance]})
        return problem.decision(halving.ranked[0], provenance)

    def _steps(self, problem: Problem, tree: PlanTree, epoch_batches: Callable[[], int]) -> int:
        """Return the steps of the plans that stay to the end: those given, or as many as the allowed steps pay for.

        Args:
            problem: the net.
            tree: all plans.
            epoch_batches: returns the number of training batches per epoch; it may go through the data.

        Raises:
            SettingsError: the allowed steps do not pay for one step.
        """
        if self.steps is not None:
            return self.steps
        allowed_steps = DEFAULT_EPOCHS * epoch_batches() if self.training_steps is None else self.training_steps
        all_plans, one_plan, count = tree_cost(problem, tree), tree_cost_of_one(problem, tree), len(tree.plans())
        steps, _ = affordable(allowed_steps, count, one_plan, all_plans)
        if steps < 1:
            raise SettingsError(
                f"training_steps={allowed_steps} does not pay for a rollout: one step of all {count} plans costs "
                f"as much as {all_plans:.0f} training steps. Raise training_steps, or try fewer plans."
            )
        return steps

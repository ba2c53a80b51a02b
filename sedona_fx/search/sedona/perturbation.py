"""Decoding by perturbation: make one (cut, head) hard at a time, and keep the one with the least validation loss.

The size of a learned weight need not be what its choice is worth to the net (DARTS-PT: Wang, Cheng, Chen, Tang, Hsieh;
ICLR 2021). So cuts and heads are decided together, by what becomes of the net. There are K - 1 rounds. In each, every
choice of a place that is still open and one of its heads is tried: with

    p_isolate = 1, p_through = 0 at the place        softmax(beta) there one-hot

the relaxed net trains a few steps from where the round begins, and its final output's mean validation loss is the
choice's score. All trials of a round have the same batches and the same random draws, so that nothing but the choice
differs. The least loss wins; the choice stays hard, and the next round begins with the weights that its trial led to.

What is still open stays as soft as the search left it: alpha and beta are constants here, weights alone are trained,
and the heads of open places go on following their own losses. The learning rate is the snapshot's own.

Where trying everything would cost too much, the learned weights prune: a round tries the choices with the largest
log-odds of p_isolate plus log of the head's weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sedona_fx.rng import block_seed, seeded
from sedona_fx.search.problem.plan_costs import no_plan, plan_costs
from sedona_fx.search.problem.problem import Positions, Problem
from sedona_fx.search.relaxed.hypergradient import validation_loss
from sedona_fx.search.relaxed.state import RelaxedNet, State, clones
from sedona_fx.search.sedona.budget import Trials
from sedona_fx.search.sedona.decode import preferences
from sedona_fx.search.sedona.steps import InnerSteps, NotFinite
from sedona_fx.search.session.batches import Batch
from sedona_fx.search.session.stream import Stream

_HARD = 1e4  # as `prune` rounds: the softmax of 1e4 beside -1e4 is exactly 1 beside 0
_Choice = tuple[int, int]


@dataclass(frozen=True)
class PlanSpace:
    """The plans to decode to: K, the number of blocks, and whether some allowed plan contains given choices.

    `completes` gets (place, head) pairs by number, places ascending, K - 1 of them at most.
    """

    blocks: int
    completes: Callable[[Positions], bool]

    @classmethod
    def of(cls, problem: Problem) -> PlanSpace:
        """Return the plans of a problem that keep within its limits.

        Raises:
            BudgetError: there are none.
        """
        if problem.limits is None:
            return cls(problem.blocks, lambda plan: True)
        costs = plan_costs(problem)
        fits, lightest = costs.fits(problem.limits), costs.heads["head_flops"]

        def completes(plan: Positions) -> bool:
            return bool(costs.best(lightest, 1, containing(fits, plan)))

        if not completes(()):
            raise no_plan(costs)
        return cls(problem.blocks, completes)


def containing(fits: np.ndarray, plan: Positions) -> np.ndarray:
    """Return which blocks may be in a plan that contains these choices; `fits` says which may be in any.

    Args:
        fits: (n + 1, n + 1, heads), as :meth:`~sedona_fx.search.problem.plan_costs.PlanCosts.fits` has it.
        plan: (place, head) pairs.
    """
    allowed = fits.copy()
    for place, head in plan:
        allowed[: place + 1, place + 1 :] = False  # blocks that pass over the place
        allowed[:, place, np.arange(fits.shape[2]) != head] = False
    return allowed


@dataclass(frozen=True)
class Round:
    """One decision: `tried` has (place, head, mean validation loss), infinite where a trial was not finite."""

    tried: list[tuple[int, int, float]]
    kept: _Choice
    open: int  # choices that there were


@dataclass(frozen=True)
class Perturbed:
    """What was decided, round by round, and its cost in plain training steps. `steps` is that of one trial."""

    rounds: list[Round]
    steps: int
    equivalent_steps: float

    @property
    def cuts(self) -> list[int]:
        """The 0-based base layers to cut behind, ascending."""
        return [place for place, _ in self._plan]

    @property
    def heads(self) -> list[int]:
        """For each cut the index of its head."""
        return [head for _, head in self._plan]

    @property
    def _plan(self) -> Positions:
        return tuple(sorted(r.kept for r in self.rounds))

    def record(self, places: Sequence[str], candidates: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
        """Return it as JSON, by the names of places and heads; a loss that was not finite is None."""

        def named(place: int, head: int) -> dict[str, Any]:
            return {"cut": places[place], "head": candidates[places[place]][head], "candidate": head}

        rounds = [
            {
                "kept": named(*r.kept),
                "open": r.open,
                "tried": [named(k, m) | {"val_loss": t if math.isfinite(t) else None} for k, m, t in r.tried],
            }
            for r in self.rounds
        ]
        return {"by": "perturbation", "steps": self.steps, "rounds": rounds}


def perturb(
    steps: InnerSteps,
    start: State,
    lr: float,
    alpha: Tensor,
    beta: Sequence[Tensor],
    space: PlanSpace,
    trials: Trials,
    train: Stream,
    val: Stream,
    seed: int,
    progress: bool = False,
) -> Perturbed:
    """Decide K - 1 cuts and their heads, one after the other.

    A loss or a gradient that is not finite makes a choice infinitely bad. Of choices that are equally good, the one
    with the larger learned weight is kept; where none is finite, that decides, and the weights stay as they were.

    Args:
        steps: of the relaxed net.
        start: weights, buffers and momentum to begin with; left as they are. Up to three copies live at once.
        lr: learning rate of the trials.
        alpha: learned logits (B-1, 2): isolate, let through.
        beta: B-1 tensors of learned head logits, (M_i,).
        space: the plans to choose from.
        trials: how many choices a round tries, and how long.
        train: batches; a round takes `trials.steps`.
        val: validation batches; a round takes as many.
        seed: of what a round draws (dropout).
        progress: show a bar.

    Returns:
        The rounds. The result depends on the arguments alone, and on where the streams stand.
    """
    scores = preferences(alpha, beta)
    ranked = sorted(
        ((k, m) for k, row in enumerate(scores) for m in range(len(row))), key=lambda c: (-scores[c[0]][c[1]], c)
    )
    state, hard, rounds = start, dict[int, int](), list[Round]()
    total = trials.rounds * trials.choices
    with tqdm(total=total, desc="decoding by perturbation", unit="trial", disable=not progress) as bar:
        for number in range(space.blocks - 1):
            left = [(k, m) for k, m in ranked if k not in hard]
            possible = (c for c in left if space.completes(tuple(sorted([*hard.items(), c]))))
            batches = [next(train) for _ in range(trials.steps)], [next(val) for _ in range(trials.steps)]
            tried, best, kept, led_to = list[tuple[int, int, float]](), math.inf, None, state
            for place, head in itertools.islice(possible, trials.choices):
                logits = hardened(alpha, beta, {**hard, place: head})
                with seeded(alpha.device, block_seed(seed, "perturbation", number)):
                    trained, loss = _trial(steps, state, lr, *logits, *batches)
                tried.append((place, head, loss))
                if kept is None or loss < best:
                    best, kept, led_to = loss, (place, head), trained if math.isfinite(loss) else state
                bar.update()
            assert kept is not None  # of what can be completed so far, some choice is part
            hard[kept[0]], state = kept[1], led_to
            rounds.append(Round(tried, kept, len(left)))
    done = sum(len(r.tried) for r in rounds)
    return Perturbed(rounds, trials.steps, done * trials.steps * trials.step_cost)


def hardened(alpha: Tensor, beta: Sequence[Tensor], hard: Mapping[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Return copies of the logits whose softmax is exactly (isolate 1, through 0), and one-hot, at the places given."""
    alpha, beta = alpha.detach().clone(), [b.detach().clone() for b in beta]
    for place, head in hard.items():
        alpha[place] = alpha.new_tensor([_HARD, -_HARD])
        beta[place].fill_(-_HARD)[head] = _HARD
    return alpha, beta


def _trial(
    steps: InnerSteps,
    start: State,
    lr: float,
    alpha: Tensor,
    beta: Sequence[Tensor],
    train: Sequence[Batch],
    val: Sequence[Batch],
) -> tuple[State, float]:
    """Train a copy of a state; return it, and its mean validation loss: batch statistics, dropout off."""
    state = start.clone()
    try:
        for batch in train:
            steps.train(state, alpha, beta, lr, batch)
    except NotFinite:
        return state, math.inf
    frozen = replace(state, buffers=clones(state.buffers))  # validation counts into running statistics
    losses = [validation_loss(RelaxedNet(steps.blocks, steps.local_loss), frozen, batch) for batch in val]
    mean = torch.stack(losses).double().mean().item()
    return state, mean if math.isfinite(mean) else math.inf

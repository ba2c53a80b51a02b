"""Decoding by perturbation: make one choice of a cut and its head hard at a time, by the least validation loss.

The size of a learned weight need not be what its choice is worth to the net (DARTS-PT: Wang, Cheng, Chen, Tang, Hsieh;
ICLR 2021). So cuts and heads are decided together, by what becomes of the net. There are K - 1 rounds. Each of them
tries the choices that are left: of a place that is not cut yet, and of one of its heads. In a trial, with

    p_isolate = 1, p_through = 0 at the place        softmax(beta) there one-hot

the relaxed net trains a few steps from where the round begins; the mean validation loss of its final output is the
score of the choice. All trials of a round get the same batches and the same random draws, so that they differ by the
choice alone. The choice with the least loss stays hard, and the next round begins with the weights that its trial led
to.

Places that are not cut yet stay as soft as the search left them: alpha and beta are constants here, only weights are
trained, and the heads of these places go on following their own losses. The learning rate is that of the snapshot.

Where trying everything would cost too much, the learned weights prune: a round tries the choices with the largest
log-odds of p_isolate plus log of the head's weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from sedona_fx.rng import block_seed, seeded
from sedona_fx.search.problem.problem import Positions
from sedona_fx.search.relaxed.hypergradient import validation_loss
from sedona_fx.search.relaxed.state import Logits, State, clones
from sedona_fx.search.sedona.decode import preferences
from sedona_fx.search.sedona.plan_space import PlanSpace
from sedona_fx.search.sedona.search_cost import Trials
from sedona_fx.search.sedona.snapshots import Snapshot
from sedona_fx.search.sedona.steps import NotFinite, SedonaSteps
from sedona_fx.search.session.batches import NamedBatch
from sedona_fx.search.session.stream import Stream

_HARD = 1e4  # the softmax of 1e4 beside -1e4 is exactly 1 beside 0; `prune` rounds by the same number


@dataclass(frozen=True)
class Round:
    """One decision.

    Attributes:
        tried: (place, head, mean validation loss) of every trial; the loss is infinite where a trial was not finite.
        kept: the (place, head) that was decided on.
        open: number of choices that there were.
    """

    tried: list[tuple[int, int, float]]
    kept: tuple[int, int]
    open: int


@dataclass(frozen=True)
class Perturbed:
    """What was decided.

    Attributes:
        rounds: the decisions in their order.
        steps: relaxed training steps of one trial.
        equivalent_steps: cost of all trials, in plain training steps.
    """

    rounds: list[Round]
    steps: int
    equivalent_steps: float

    @property
    def cuts(self) -> list[int]:
        """The 0-based base layers to cut after, ascending."""
        return [place for place, _ in self._plan]

    @property
    def heads(self) -> list[int]:
        """The index of the head of each cut."""
        return [head for _, head in self._plan]

    @property
    def _plan(self) -> Positions:
        return tuple(sorted(r.kept for r in self.rounds))

    def record(self, places: Sequence[str], candidates: Mapping[str, Sequence[str | None]]) -> dict[str, Any]:
        """Return the rounds as JSON; a loss that was not finite is None.

        Args:
            places: names of the base layers.
            candidates: names of the heads by place.
        """

        def named(place: int, head: int) -> dict[str, Any]:
            return {"cut": places[place], "head": candidates[places[place]][head], "candidate": head}

        rounds = [
            {
                "kept": named(*r.kept),
                "open": r.open,
                "tried": [
                    named(place, head) | {"val_loss": loss if math.isfinite(loss) else None}
                    for place, head, loss in r.tried
                ],
            }
            for r in self.rounds
        ]
        return {"by": "perturbation", "steps": self.steps, "rounds": rounds}


def perturb(
    steps: SedonaSteps,
    start: Snapshot,
    logits: Logits,
    space: PlanSpace,
    trials: Trials,
    *,
    train: Stream,
    val: Stream,
    seed: int,
    progress: bool = False,
) -> Perturbed:
    """Decide on K - 1 cuts and their heads, one after the other.

    A loss or a gradient that is not finite makes a choice infinitely bad. Of equally good choices, the one with the
    larger learned weight is kept; this also decides where no choice is finite, and the weights then stay as they were.

    Args:
        steps: of the relaxed net.
        start: weights, buffers and momentum to begin with, left as they are, and the learning rate of all trials. Up to
            three copies of the state are alive at once.
        logits: that were learned.
        space: the plans to choose from.
        trials: how many choices a round tries, and for how many steps.
        train: training batches; a round takes `trials.steps`.
        val: validation batches; a round takes as many.
        seed: of the random draws of a round (dropout).
        progress: whether to show a bar.

    Returns:
        The decisions. They depend on the arguments and on the streams' positions alone.
    """
    scores = preferences(logits.alpha, logits.beta)
    ranked = sorted(
        ((place, head) for place, row in enumerate(scores) for head in range(len(row))),
        key=lambda choice: (-scores[choice[0]][choice[1]], choice),
    )
    state, hard, rounds = start.state, dict[int, int](), list[Round]()
    total = trials.rounds * trials.choices
    with tqdm(total=total, desc="decoding by perturbation", unit="trial", disable=not progress) as bar:
        for number in range(space.blocks - 1):
            remaining = [(place, head) for place, head in ranked if place not in hard]
            possible = (choice for choice in remaining if space.completes(tuple(sorted([*hard.items(), choice]))))
            batches = [next(train) for _ in range(trials.steps)], [next(val) for _ in range(trials.steps)]
            tried, best, kept, next_state = list[tuple[int, int, float]](), math.inf, None, state
            for place, head in itertools.islice(possible, trials.choices):
                hard_logits = hardened(logits, {**hard, place: head})
                with seeded(logits.alpha.device, block_seed(seed, "perturbation", number)):
                    trained, loss = _trial(steps, Snapshot(state, start.lr), hard_logits, *batches)
                tried.append((place, head, loss))
                if kept is None or loss < best:
                    best, kept, next_state = loss, (place, head), trained if math.isfinite(loss) else state
                bar.update()
            assert kept is not None  # the choices so far can be completed to a plan, so one was possible
            hard[kept[0]], state = kept[1], next_state
            rounds.append(Round(tried, kept, len(remaining)))
    done = sum(len(r.tried) for r in rounds)
    return Perturbed(rounds, trials.steps, done * trials.steps * trials.step_cost)


def hardened(logits: Logits, hard: Mapping[int, int]) -> Logits:
    """Return a copy whose softmax is exactly (isolate 1, through 0) and one-hot at some places.

    Args:
        logits: to copy.
        hard: the index of the head, by place.
    """
    alpha, beta = logits.alpha.detach().clone(), [b.detach().clone() for b in logits.beta]
    for place, head in hard.items():
        alpha[place] = alpha.new_tensor([_HARD, -_HARD])
        beta[place].fill_(-_HARD)[head] = _HARD
    return Logits(alpha, beta)


def _trial(
    steps: SedonaSteps, start: Snapshot, logits: Logits, train: Sequence[NamedBatch], val: Sequence[NamedBatch]
) -> tuple[State, float]:
    """Train a copy of a state; return it and its mean validation loss, with batch statistics and without dropout."""
    state = start.state.clone()
    try:
        for batch in train:
            steps.train(state, logits, start.lr, batch)
    except NotFinite:
        return state, math.inf
    frozen = replace(state, buffers=clones(state.buffers))  # validation changes running statistics
    losses = [validation_loss(steps.net, frozen, batch) for batch in val]
    mean = torch.stack(losses).double().mean().item()
    return state, mean if math.isfinite(mean) else math.inf

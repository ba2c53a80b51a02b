"""The decision about cuts and heads: by the user's plan, by the user's cuts, or by a search."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sedona_fx.compile.check_loss import check_validation
from sedona_fx.compile.choices import by_name, candidates, from_names, from_plan, with_objectives
from sedona_fx.compile.request import Request
from sedona_fx.compile.uneven import too_few
from sedona_fx.data.args import Args
from sedona_fx.data.sources import Mapped, Source, search_sources, to_device
from sedona_fx.errors import CutError, DataError, HeadError, PlanError
from sedona_fx.heads.registry import head_name
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.modules import device_of, keep_modes
from sedona_fx.search.problem.plan_costs import check_possible, within_budget
from sedona_fx.search.problem.problem import Decision, Problem, SearchData


def decide(request: Request, analysed: Analysed) -> Decision:
    """Return the cuts and the head of each, within the budget if there is one.

    Args:
        request: what the user asked for.
        analysed: the model's graphs, with the legal cut points.

    Raises:
        CutError, HeadError, DataError, PlanError: what was asked for cannot be had on this model or with this data.
        BudgetError: no plan keeps within the budget.
    """
    # Without candidates of the user's own, cuts are chosen as if each of them had the head of the first objective.
    heads = request.own_heads[0] if request.own_heads and request.heads is None else request.heads
    chooses = request.plan is None and request.cuts is None
    problem = Problem(
        analysed=analysed,
        blocks=request.blocks,
        candidates=candidates(heads, analysed, searching=request.searches) if chooses else {},
        loss=request.loss,
        data=_search_data(request, analysed) if request.searches else None,
        limits=request.limits,
        seconds=dict(request.limits.measured or {}) if request.limits is not None else {},
        seed=request.seed,
        progress=request.progress,
        remedy=functools.partial(too_few, request, analysed),
    )
    with as_trained(request.model):
        if request.plan is not None:
            own_heads = {head_name(head): head for head in request.own_heads}
            decision = from_plan(request.plan, analysed, by_name(heads) | own_heads)
        elif request.cuts is not None:
            decision = from_names(list(analysed.named), heads, analysed)
        else:
            check_possible(problem)
            decision = request.search.decide(problem)
        if request.own_heads:
            decision = with_objectives(decision, request.objectives, request.heads, analysed)
        return within_budget(problem, decision, PlanError if request.plan is not None else CutError)


def _search_data(request: Request, analysed: Analysed) -> SearchData:
    """Return the data of a search that reads some, checked as far as can be without training.

    Raises:
        HeadError: the request has objectives of the user's own, which such a search cannot compare.
        DataError: there is no loss, the data cannot be split, or its first validation batch does not fit.
    """
    search = f"search={request.search_name}"
    if request.own_heads:
        raise HeadError(
            f"{search} compares heads by the model's own loss and cannot be combined with local_loss=...: "
            "choose cuts by rule (search='balanced'), by name (cuts=[...]), or by a plan."
        )
    if request.loss is None:
        raise DataError(
            f"{search} compares heads by the loss, and loss=None: hand loss=..., or choose cuts by rule "
            "(search='balanced'), by name (cuts=[...]), or by a plan."
        )
    train, val, epoch_batches = search_sources(
        request.data, request.val_data, request.seed, request.search.val_batch_size
    )
    model = request.model
    train, val = _named(train, model), _named(val, model)
    if request.val_data is not None:
        check_validation(model, analysed, to_device(next(val(), None), device_of(model)), request.loss)
    return SearchData(train, val, epoch_batches)


def _named(source: Source, model: nn.Module) -> Source:
    """Return the source with every input of a batch under its argument name."""
    return Mapped(source, lambda pair: (Args(**pair[0].bind(model.forward)), pair[1]))


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Put a model of which every module is in eval mode into train mode for the body: searched as it will be trained.

    If only some modules are in eval mode (a frozen BatchNorm), that is taken as intended and kept.
    """
    with keep_modes(model):
        if not any(module.training for module in model.modules()):
            model.train()
        yield

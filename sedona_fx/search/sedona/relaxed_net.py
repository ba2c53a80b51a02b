"""From a problem to SEDONA's relaxed blocks, and from what it learned to a decision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.errors import DataError, SearchDivergedError
from sedona_fx.heads.registry import build_head, head_name
from sedona_fx.ir.graph import SPLIT_POINTS, copy_info, info, output_node
from sedona_fx.passes import BlockGraph, partition, relax
from sedona_fx.plan import Plan
from sedona_fx.search.problem.problem import Decision, Problem, local_loss_of
from sedona_fx.search.problem.work import work
from sedona_fx.search.relaxed.state import BlockLossFunction
from sedona_fx.search.sedona.certainty import TOLERANCE, certainty
from sedona_fx.search.sedona.decode import decode_within
from sedona_fx.search.sedona.perturbation import PlanSpace
from sedona_fx.search.sedona.result import NonFiniteSearch, SedonaResult
from sedona_fx.search.session.batches import NamedBatches

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sedona_fx.search.sedona.sedona import Sedona


@dataclass(frozen=True)
class RelaxedGraphBlock:
    """A base layer of the relaxed net, as :class:`~sedona_fx.search.relaxed.state.RelaxedBlock` describes it."""

    module: nn.Module
    eval_module: nn.Module
    inputs: tuple[str, ...]
    exports: tuple[str, ...]
    boundary: str | None
    beta: str | None
    trunk: nn.Module | None = None


def search_sedona(settings: Sedona, problem: Problem) -> Decision:
    """Run SEDONA on a problem.

    Raises:
        SearchDivergedError: a loss was not finite; with the plan decoded from what was learned until then.
    """
    places = problem.places()
    if problem.blocks == 1:
        return Decision([], [], {"search": "sedona"})
    if problem.data is None:
        raise DataError("search='sedona' needs data to search on.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(problem.seed)  # not torch.manual_seed, which seeds accelerators too
        blocks = relaxed_blocks(problem, places)
    train, val, _ = problem.data
    device = next(blocks[0].module.parameters()).device
    try:
        result = settings.run(
            blocks,
            _local_loss(problem, len(blocks)),
            NamedBatches(train, problem.train, device),
            NamedBatches(val, problem.train, device),
            work(problem, places),
            problem.seed,
            problem.progress,
            {"places": list(places), "candidates": _candidates(problem, places)},
            PlanSpace.of(problem) if settings.decode == "perturbation" else None,
        )
    except NonFiniteSearch as error:
        raise SearchDivergedError(error.where, _plan(_decision(settings, problem, places, error.result))) from error
    except ValueError as error:
        raise DataError(str(error)) from error
    return _decision(settings, problem, places, result)


def relaxed_blocks(problem: Problem, places: Sequence[str]) -> list[RelaxedGraphBlock]:
    """Relax the train graph with every candidate head at every place, and pair its blocks with the eval graph's."""
    problem.require_heads("search='sedona'")
    heads = {
        name: [build_head(spec, problem.contexts[name]).to(_like(problem)) for spec in problem.candidates[name]]
        for name in places
    }
    train = partition(relax(problem.train, heads))
    bare: dict[str, list[nn.Module]] = {name: [] for name in places}
    evaluation, trunk = partition(relax(problem.eval, bare)), partition(relax(problem.train, bare))
    return [_pair(*graphs) for graphs in zip(train, evaluation, trunk, strict=True)]


def _like(problem: Problem) -> Tensor:
    return next(p for p in problem.train.parameters() if p.dtype.is_floating_point)


def _pair(train: BlockGraph, evaluation: BlockGraph, trunk: BlockGraph) -> RelaxedGraphBlock:
    """Give the graphs of a block one signature: what only some of them read or give is unused or None."""
    inputs = tuple(dict.fromkeys((*train.inputs, *evaluation.inputs)))
    exports = tuple(dict.fromkeys((*train.exports, *evaluation.exports)))
    beta = f"{SPLIT_POINTS}.{train.index}.mixture.beta" if train.boundary is not None else None
    return RelaxedGraphBlock(
        _with_signature(train, inputs, exports),
        _with_signature(evaluation, inputs, exports),
        inputs,
        exports,
        train.boundary,
        beta,
        _with_signature(trunk, inputs, exports) if beta is not None else None,
    )


def _with_signature(block: BlockGraph, inputs: Sequence[str], exports: Sequence[str]) -> fx.GraphModule:
    if (block.inputs, block.exports) == (tuple(inputs), tuple(exports)):
        return block.module
    graph, env = fx.Graph(), {}
    old = block.module.graph
    given = {info(n).site: n for n in old.nodes if n.op == "placeholder"}
    for k, name in enumerate(inputs):
        made = graph.placeholder(f"input_{k}")
        if name in given:
            env[given[name]] = made
            copy_info(given[name], made)
    for node in old.nodes:
        if node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, env.__getitem__)
            copy_info(node, env[node])
    (result,) = output_node(old).args
    assert isinstance(result, tuple)
    exported, local = result
    assert isinstance(exported, tuple)
    values = dict(zip(block.exports, exported, strict=True))
    given_or_none = tuple(env[values[n]] if n in values else None for n in exports)
    graph.output((given_or_none, fx.map_arg(local, env.__getitem__)))
    return fx.GraphModule(block.module, graph, class_name=type(block.module).__name__)


def _local_loss(problem: Problem, count: int) -> BlockLossFunction:
    loss = local_loss_of(problem)
    return lambda index, local, target: loss(index == count - 1, local, target)


def _decision(settings: Sedona, problem: Problem, places: Sequence[str], result: SedonaResult) -> Decision:
    decoding = result.decoding
    if decoding is None:
        cuts, heads = decode_within(problem, result.alpha, result.beta)
    else:
        cuts, heads = decoding.cuts, decoding.heads
    names = [places[k] for k in cuts]
    provenance = {
        "search": "sedona",
        "interrupted": result.interrupted,
        "unroll": settings.unroll,
        "cost": result.cost,
        "places": list(places),
        "candidates": _candidates(problem, places),
        "alpha": result.alpha.tolist(),
        "beta": [logits.tolist() for logits in result.beta],
        "trajectory": result.trajectory,
        "failures": result.failures,
        **_certain(problem, places, result, cuts),
        **({} if decoding is None else {"decoding": decoding.record(places, _candidates(problem, places))}),
    }
    return problem.decision(list(zip(names, heads, strict=True)), provenance)


def _candidates(problem: Problem, places: Sequence[str]) -> dict[str, list[str | None]]:
    return {name: [head_name(spec) for spec in problem.candidates[name]] for name in places}


def _certain(problem: Problem, places: Sequence[str], result: SedonaResult, cuts: Sequence[int]) -> dict[str, Any]:
    """Return, as JSON, which places were learned and where the decision is a tie; and say so."""
    found = certainty(result.alpha, result.beta, result.farthest, cuts)
    candidates = _candidates(problem, places)
    learned = [places[k] for k in found.learned]
    cut_ties = [places[k] for k in found.cut_ties]
    head_ties = {places[k]: [candidates[places[k]][m] for m in heads] for k, heads in found.head_ties.items()}
    log.info(
        "SEDONA learned %d of %d p_isolate; the others stayed at one half. Ties between cuts: %s; between heads: %s.",
        len(learned),
        len(places),
        ", ".join(cut_ties) or "none",
        "; ".join(f"{place}: {', '.join(map(str, heads))}" for place, heads in head_ties.items()) or "none",
    )
    return {"learned": learned, "ties": {"cuts": cut_ties, "heads": head_ties}, "tolerance": TOLERANCE}


def _plan(decision: Decision) -> Plan:
    heads = tuple(head_name(spec) if spec is not None else None for spec in decision.heads)
    return Plan(cuts=tuple(decision.cuts), heads=heads, provenance=decision.provenance)

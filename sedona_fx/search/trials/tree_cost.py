"""Cost of a training step of many plans at once, in plain training steps of the net."""

from __future__ import annotations

from sedona_fx.ir.cost import stretch_costs
from sedona_fx.ir.graph import info
from sedona_fx.search.problem.problem import Choice, Problem, candidate_cost
from sedona_fx.search.problem.work import HEAD_OVERHEAD
from sedona_fx.search.trials.plan_tree import PlanTree


def tree_cost(problem: Problem, tree: PlanTree) -> float:
    """Return the cost of one step of all blocks of a tree, in plain training steps of the net.

    Counted in FLOPs; those of heads are multiplied by ``HEAD_OVERHEAD``.
    """
    return sum(_node_costs(problem, tree).values())


def tree_cost_of_one(problem: Problem, tree: PlanTree) -> float:
    """Return the cost of one step of the most expensive plan alone, in the same unit."""
    costs = _node_costs(problem, tree)
    return max(
        sum(
            cost
            for (choice, last), cost in costs.items()
            if plan[: len(choice)] == choice and (not last or choice == plan)
        )
        for plan in tree.plans()
    )


def _node_costs(problem: Problem, tree: PlanTree) -> dict[tuple[Choice, bool], float]:
    """Return the cost of every block of a tree in plain training steps, by its choice and whether it is a last one."""
    net_flops = max(1, sum(info(node).flops for node in problem.train.graph.nodes))
    stretch_flops: dict[tuple[str, ...], list[int]] = {}  # by cuts: of the stretches between them
    costs = {}
    for node in tree.nodes():
        cuts = tuple(place for place, _ in node.choice)
        if cuts not in stretch_flops:
            stretches, _ = stretch_costs(problem.train, [problem.node(cut) for cut in cuts])
            stretch_flops[cuts] = [cost.flops for cost in stretches]
        flops = stretch_flops[cuts][node.depth]
        if not node.last:
            place, head = node.choice[-1]
            flops += int(HEAD_OVERHEAD * candidate_cost(problem, place, problem.node(place), head).flops)
        costs[node.choice, node.last] = flops / net_flops
    return costs

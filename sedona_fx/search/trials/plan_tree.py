"""Many plans of one net, trained greedily at once; blocks that they have in common are trained once.

With local losses, a block does not depend on what lies behind it: all plans that begin with the same cuts and heads
have the same first blocks. So plans form a tree, a node a block, and one batch goes through the tree from the root.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx import passes
from sedona_fx.errors import CutError
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.rng import block_random
from sedona_fx.runtime.run import detached, run_graph
from sedona_fx.search.problem.problem import Choice, Problem
from sedona_fx.search.session.batches import Batch
from sedona_fx.search.trials.supernet import Start, load


@dataclass
class Node:
    """One block as some plans have it: its own weights, its head, and the blocks that follow.

    ``choice`` are the cuts and heads up to and with the end of this block; of a last block, those of the whole plan.
    """

    choice: Choice
    depth: int
    last: bool
    train: BlockGraph
    evaluation: BlockGraph
    end: str | None
    head: nn.Module | None
    optimizer: torch.optim.Optimizer | None = None
    children: list[Node] = field(default_factory=list)
    failed: bool = False

    def modules(self) -> nn.ModuleList:
        """Return everything this node trains."""
        return nn.ModuleList([m for m in (self.train.module, self.evaluation.module, self.head) if m is not None])

    def load(self, start: Start) -> None:
        """Copy weights into the block and its head."""
        for graph in (self.train, self.evaluation):
            load(graph.module, start.net)
        if self.head is not None:
            load(self.head, start.heads[self.choice[-1]])

    def local_output(self, graph: BlockGraph, values: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Run the block, and its head; return its exports, undetached, and the local output."""
        exports, local = run_graph(graph, values)
        if self.head is not None and self.end is not None:
            local = self.head(exports[self.end])
        return exports, local


class PlanTree:
    """The blocks of several plans, each distinct one once, from the same first weights.

    Args:
        problem: the net.
        plans: all of the same number of blocks.
        optimizer: makes the optimizer of a block.
        local_loss: ``local_loss(is last, local output, target)``.
        device: of the net.

    Raises:
        CutError: blocks share a parameter; then they are not independent of what follows.
    """

    def __init__(
        self,
        problem: Problem,
        plans: Sequence[Choice],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        local_loss: Callable[[bool, Any, Any], Tensor],
        device: torch.device,
    ) -> None:
        self._problem, self._local_loss, self._device = problem, local_loss, device
        self._optimizer = optimizer
        self.roots: list[Node] = []
        self._parts: dict[tuple[str, ...], tuple[list[BlockGraph], list[BlockGraph]]] = {}
        for plan in plans:
            self._add(plan)
        self._parts.clear()

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes, a block before those that follow it."""
        todo = list(reversed(self.roots))
        while todo:
            node = todo.pop()
            yield node
            todo.extend(reversed(node.children))

    def plans(self) -> list[Choice]:
        """Return the plans in the tree."""
        return [node.choice for node in self.nodes() if node.last]

    def keep(self, plans: Iterable[Choice]) -> None:
        """Drop all other plans, and the blocks that only these have."""
        self.roots = _with_plans(self.roots, set(plans))

    def train(self, batch: Batch, step: int) -> None:
        """Train every block on a batch, each on what the block in front of it gave before its own update.

        Draws are those of a net that trains by this plan alone. A block whose loss is not finite stops there, and with
        it the plans that it is a part of.
        """
        inputs, target = batch
        for root in self.roots:
            if not root.failed:
                self._train_from(root, dict(inputs), target, step)

    def outputs(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Choice, Any]]:
        """Yield every plan and its final output in eval mode; those that failed have none."""

        flags = [(m, m.training) for node in self.nodes() for m in node.modules().modules()]
        for module, _ in flags:
            module.training = False
        try:
            for root in self.roots:
                if not root.failed:
                    with torch.no_grad():
                        found = list(_outputs_from(root, dict(inputs)))
                    yield from found
        finally:
            for module, flag in flags:
                module.training = flag

    def evaluate(self, batches: Iterable[Batch]) -> dict[Choice, float]:
        """Return each plan's mean loss of the final output in eval mode; infinite for one that failed."""
        sums, plans, count = dict[Choice, float](), self.plans(), 0
        for count, (inputs, target) in enumerate(batches, start=1):  # noqa: B007
            for plan, output in self.outputs(inputs):
                with torch.no_grad():
                    loss = self._local_loss(True, output, target).item()
                sums[plan] = sums.get(plan, 0.0) + (loss if math.isfinite(loss) else math.inf)
        if not count:
            raise ValueError("the search's validation data is empty")
        return {plan: sums.get(plan, math.inf) / count for plan in plans}

    def _train_from(self, node: Node, values: dict[str, Any], target: Any, step: int) -> None:
        with block_random(self._problem.seed, node.depth, step, self._device):
            exports, local = node.local_output(node.train, values)
        loss = self._local_loss(node.last, local, target)
        if not math.isfinite(loss.item()):
            node.failed = True
            return
        if node.optimizer is not None and loss.requires_grad:
            loss.backward()
            node.optimizer.step()
            node.optimizer.zero_grad(set_to_none=True)
        handed = {**values, **detached(exports)}
        del exports, local, loss
        for child in node.children:
            if not child.failed:
                self._train_from(child, handed, target, step)

    def _add(self, plan: Choice) -> None:
        cuts = tuple(place for place, _ in plan)
        if cuts not in self._parts:
            self._parts[cuts] = self._partition(self._problem.train, cuts), self._partition(self._problem.eval, cuts)
        train, evaluation = self._parts[cuts]
        siblings = self.roots
        for depth in range(len(plan) + 1):
            last = depth == len(plan)
            choice = plan if last else plan[: depth + 1]
            node = next((n for n in siblings if n.choice == choice and n.last == last), None)
            if node is None:
                node = self._node(choice, depth, last, train[depth], evaluation[depth])
                siblings.append(node)
            siblings = node.children

    def _partition(self, gm: Any, cuts: Sequence[str]) -> list[BlockGraph]:
        chosen: dict[str, list[nn.Module]] = {str(info(self._problem.node(cut)).cut): [] for cut in cuts}
        parts = passes.partition(passes.lower_at(gm, chosen))
        seen: set[int] = set()
        for part in parts:
            mine = {id(parameter) for parameter in part.module.parameters()}
            if mine & seen:
                raise CutError(
                    "rollouts train blocks that plans have in common once, and blocks of this model share a parameter: "
                    "choose cuts by search='sedona', by search=Guided(finalists=0), by rule, or by name."
                )
            seen |= mine
        return parts

    def _node(self, choice: Choice, depth: int, last: bool, train: BlockGraph, evaluation: BlockGraph) -> Node:
        copied = copy.deepcopy((train.module, evaluation.module))
        head, end = None, None
        if not last:
            place, index = choice[-1]
            end = info(self._problem.node(place)).site
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self._problem.seed)
                head = build_head(self._problem.candidates[place][index], self._problem.contexts[place])
            like = next(p for p in self._problem.train.parameters() if p.is_floating_point())
            head.to(like.device, like.dtype)
        node = Node(
            choice,
            depth,
            last,
            dataclasses.replace(train, module=copied[0]),
            dataclasses.replace(evaluation, module=copied[1]),
            end,
            head,
        )
        trained = [p for p in node.modules().parameters() if p.requires_grad]
        node.optimizer = self._optimizer(trained) if trained else None
        return node


def _with_plans(nodes: Sequence[Node], wanted: Collection[Choice]) -> list[Node]:
    """Return the nodes that some of these plans have; what follows on them is pruned in place."""
    for node in nodes:
        node.children = _with_plans(node.children, wanted)
    return [node for node in nodes if node.children or (node.last and node.choice in wanted)]


def _outputs_from(node: Node, values: dict[str, Any]) -> Iterator[tuple[Choice, Any]]:
    exports, output = run_graph(node.evaluation, values)
    if node.last:
        yield node.choice, output
    for child in node.children:
        if not child.failed:
            yield from _outputs_from(child, {**values, **exports})

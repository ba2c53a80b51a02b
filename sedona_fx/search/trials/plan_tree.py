"""Many plans of one net, trained greedily at the same time; blocks that plans have in common are trained once.

With local losses a block does not depend on later blocks, so all plans that begin with the same cuts and heads have the
same first blocks. Plans therefore form a tree with one node per block, and a batch runs through it from the roots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.errors import CutError, DataError
from sedona_fx.heads.dtypes import make_head
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.graph import BlockGraph, info
from sedona_fx.ir.modules import keep_modes, like_of, runs_python
from sedona_fx.rng import block_random, seeded_init
from sedona_fx.runtime.run import detached, run_graph
from sedona_fx.search.problem.problem import Choice, Problem
from sedona_fx.search.problem.stretches import cut_into_stretches
from sedona_fx.search.session.batches import NamedBatch
from sedona_fx.search.trials.step_fault import step_fault
from sedona_fx.search.trials.supernet import Start, load


@dataclass
class Node:
    """One block as some plans have it: its own weights, its head, and the blocks that follow.

    Attributes:
        choice: the cuts and heads up to the end of this block, its own included; of a last block, the whole plan.
        depth: number of blocks before this one.
        last: whether the plan ends here.
        train: the block in train mode.
        evaluation: the block in eval mode.
        end: name of the activation that the head reads; None for a last block.
        head: None for a last block.
        optimizer: of the block and its head; None: nothing is trainable.
        children: the blocks that follow in some plan.
        failed: whether its loss or a gradient was not finite once.
        fault: which, and when, in words.
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
    fault: str = ""

    def modules(self) -> nn.ModuleList:
        """Return all modules of this node."""
        return nn.ModuleList([m for m in (self.train.module, self.evaluation.module, self.head) if m is not None])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the block by the user's names, then those of its head."""
        yield from self.train.module.named_parameters()
        for name, parameter in self.head.named_parameters() if self.head is not None else ():
            yield f"{name} of the head behind {self.choice[-1][0]}", parameter

    def load(self, start: Start) -> None:
        """Copy weights into the block and its head."""
        for graph in (self.train, self.evaluation):
            load(graph.module, start.net)
        if self.head is not None:
            load(self.head, start.heads[self.choice[-1]])

    def local_output(self, graph: BlockGraph, values: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Run the block in one of its modes, and its head; return its exports, undetached, and the local output."""
        exports, local = run_graph(graph, values)
        if self.head is not None and self.end is not None:
            local = self.head(exports[self.end])
        return exports, local


class PlanTree:
    """The distinct blocks of several plans, all with the same initial weights.

    Args:
        problem: the net.
        plans: all of the same number of blocks.
        optimizer: makes the optimizer of a block from its parameters.
        local_loss: ``local_loss(is last, local output, target)``.
        device: of the net.

    Attributes:
        roots: the first blocks.

    Raises:
        CutError: blocks share a parameter, so that a block depends on later ones.
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
        self._optimizer, self._runs_python = optimizer, runs_python(problem.train)
        self.roots: list[Node] = []
        graphs_by_cuts: dict[tuple[str, ...], tuple[list[BlockGraph], list[BlockGraph]]] = {}  # train and eval
        for plan in plans:
            cuts = tuple(place for place, _ in plan)
            if cuts not in graphs_by_cuts:
                graphs_by_cuts[cuts] = self._blocks(problem.train, cuts), self._blocks(problem.eval, cuts)
            self._add(plan, *graphs_by_cuts[cuts])

    def nodes(self) -> Iterator[Node]:
        """Yield all nodes, every block before those that follow it."""
        todo = list(reversed(self.roots))
        while todo:
            node = todo.pop()
            yield node
            todo.extend(reversed(node.children))

    def fault(self) -> str:
        """Return why the first of the blocks that failed did so, in words; empty if none did."""
        return next((node.fault for node in self.nodes() if node.fault), "")

    def plans(self) -> list[Choice]:
        """Return the plans in the tree."""
        return [node.choice for node in self.nodes() if node.last]

    def keep(self, plans: Iterable[Choice]) -> None:
        """Drop all other plans, and the blocks that no plan has any more."""
        self.roots = _with_plans(self.roots, set(plans))

    def train(self, batch: NamedBatch, step: int) -> None:
        """Train every block on a batch; each reads what the block before it exported before that block's own update.

        Random draws are those of a net that is trained by the plan alone. A block fails if its loss or a gradient is
        not finite: it and all blocks after it are trained no further.
        """
        inputs, target = batch
        for root in self.roots:
            if not root.failed:
                self._train_from(root, dict(inputs), target, step)

    def outputs(self, inputs: Mapping[str, Any]) -> Iterator[tuple[Choice, Any]]:
        """Yield every plan that has not failed, with its final output in eval mode."""
        trees = [node.modules() for node in self.nodes()]
        with keep_modes(*trees):
            for module in (m for tree in trees for m in tree.modules()):
                module.training = False  # not eval(), which user's modules may override
            for root in self.roots:
                if not root.failed:
                    with torch.no_grad():
                        outputs = list(_outputs_from(root, dict(inputs)))
                    yield from outputs

    def evaluate(self, batches: Iterable[NamedBatch]) -> dict[Choice, float]:
        """Return each plan's mean loss of the final output in eval mode; infinite for a plan that failed.

        Raises:
            DataError: there are no batches.
        """
        sums, plans, count = dict[Choice, float](), self.plans(), 0
        for count, (inputs, target) in enumerate(batches, start=1):  # noqa: B007
            for plan, output in self.outputs(inputs):
                with torch.no_grad():
                    loss = self._local_loss(True, output, target).item()
                sums[plan] = sums.get(plan, 0.0) + (loss if math.isfinite(loss) else math.inf)
        if not count:
            raise DataError("the search's validation data is empty")
        return {plan: sums.get(plan, math.inf) / count for plan in plans}

    def _train_from(self, node: Node, values: dict[str, Any], target: Any, step: int) -> None:
        with block_random(self._problem.seed, node.depth, step, self._device, python=self._runs_python):
            exports, local = node.local_output(node.train, values)
        loss = self._local_loss(node.last, local, target)
        trains = node.optimizer is not None and loss.requires_grad
        if trains:
            loss.backward()
        if fault := step_fault({f"block {node.depth}": loss}, node.optimizer, node.named_parameters):
            node.failed, node.fault = True, f"{fault} (block {node.depth}, step {step})"
        elif node.optimizer is not None and trains:
            node.optimizer.step()
        if node.optimizer is not None:
            node.optimizer.zero_grad(set_to_none=True)
        if node.failed:
            return
        handed_on = {**values, **detached(exports)}
        del exports, local, loss
        for child in node.children:
            if not child.failed:
                self._train_from(child, handed_on, target, step)

    def _add(self, plan: Choice, train: Sequence[BlockGraph], evaluation: Sequence[BlockGraph]) -> None:
        """Add the blocks of a plan that the tree does not have yet."""
        siblings = self.roots
        for depth in range(len(plan) + 1):
            last = depth == len(plan)
            choice = plan if last else plan[: depth + 1]
            node = next((n for n in siblings if n.choice == choice and n.last == last), None)
            if node is None:
                node = self._node(choice, depth, last, train[depth], evaluation[depth])
                siblings.append(node)
            siblings = node.children

    def _blocks(self, gm: fx.GraphModule, cuts: Sequence[str]) -> list[BlockGraph]:
        """Cut a graph; refuse blocks that share a parameter."""
        blocks = cut_into_stretches(gm, [self._problem.node(cut) for cut in cuts])
        seen: set[int] = set()
        for block in blocks:
            parameters = {id(parameter) for parameter in block.module.parameters()}
            if parameters & seen:
                raise CutError(
                    "rollouts train blocks that plans have in common once, and blocks of this model share a parameter: "
                    "choose cuts by search='sedona', by search=Guided(finalists=0), by rule, or by name."
                )
            seen |= parameters
        return blocks

    def _node(self, choice: Choice, depth: int, last: bool, train: BlockGraph, evaluation: BlockGraph) -> Node:
        train_module, eval_module = deep_copy((train.module, evaluation.module))
        head, end = None, None
        if not last:
            place, index = choice[-1]
            end = info(self._problem.node(place)).site
            with seeded_init(self._problem.seed):
                spec = self._problem.candidates[place][index]
                head = make_head(spec, self._problem.contexts[place], like_of(self._problem.train))
        node = Node(
            choice=choice,
            depth=depth,
            last=last,
            train=dataclasses.replace(train, module=train_module),
            evaluation=dataclasses.replace(evaluation, module=eval_module),
            end=end,
            head=head,
        )
        trainable = [p for p in node.modules().parameters() if p.requires_grad]
        node.optimizer = self._optimizer(trainable) if trainable else None
        return node


def _with_plans(nodes: Sequence[Node], wanted: Collection[Choice]) -> list[Node]:
    """Return the nodes that some of these plans have; their children are pruned in place."""
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

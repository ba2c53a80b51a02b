"""One set of weights for all plans: the net with every candidate head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.late_buffers import overwrite
from sedona_fx.heads.dtypes import make_head
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import like_of, runs_python
from sedona_fx.rng import block_random, seeded_init
from sedona_fx.runtime.guard import Snapshot
from sedona_fx.runtime.run import detached, run_graph
from sedona_fx.search.problem.problem import Positions, Problem, local_loss_of
from sedona_fx.search.problem.stretches import cut_into_stretches
from sedona_fx.search.session.batches import NamedBatch
from sedona_fx.search.trials.step_fault import step_fault


@dataclass(frozen=True)
class Start:
    """Initial weights for plans.

    Attributes:
        net: parameters and buffers of the net, by the user's names.
        heads: parameters and buffers of candidate heads, by place and index among the place's candidates.
    """

    net: dict[str, Tensor]
    heads: dict[tuple[str, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Forward:
    """A forward pass with its autograd graph.

    Attributes:
        ends: the activation at every place, B - 1 of them.
        loss: of the final output, 0-d.
    """

    ends: list[Tensor]
    loss: Tensor


class Supernet:
    """Copies of the net's stretches between places, and all candidate heads.

    Args:
        problem: the net; its own weights stay unchanged.
        places: the cut points between the stretches, B - 1 of them.
        device: of the net.

    Attributes:
        places: as above.
        heads: for every place its candidate heads.
        local_loss: ``local_loss(is last, local output, target)``.
    """

    def __init__(self, problem: Problem, places: Sequence[str], device: torch.device) -> None:
        self.places = list(places)
        self._problem, self._device, self._runs_python = problem, device, runs_python(problem.train)
        self.local_loss = local_loss_of(problem)
        nodes = [problem.node(place) for place in places]
        graphs = cut_into_stretches(problem.train, nodes)
        modules = deep_copy([graph.module for graph in graphs])  # in one call: shared tensors stay shared
        self._graphs = [replace(graph, module=module) for graph, module in zip(graphs, modules, strict=True)]
        self._ends = [info(node).site for node in nodes]
        self.heads: list[list[nn.Module]] = []
        with seeded_init(problem.seed):
            for place in places:
                context, candidates = problem.contexts[place], problem.candidates[place]
                self.heads.append([make_head(spec, context, like_of(problem.train)) for spec in candidates])
        self._modules = nn.ModuleList([nn.ModuleList(modules), *(nn.ModuleList(built) for built in self.heads)])
        self._buffers = list(self._modules[0].buffers())
        self._step = 0

    @property
    def shares_parameters(self) -> bool:
        """Whether two stretches use the same parameter."""
        used = [id(p) for graph in self._graphs for p in graph.module.parameters()]
        return len(set(used)) < len(used)

    def stretches(self) -> list[list[nn.Parameter]]:
        """Return the trainable parameters of every stretch, B lists; a shared one is in the list of its last user."""
        seen: set[int] = set()
        from_the_last: list[list[nn.Parameter]] = []
        for graph in reversed(self._graphs):
            from_the_last.append([p for p in graph.module.parameters() if p.requires_grad and id(p) not in seen])
            seen |= {id(p) for p in from_the_last[-1]}
        return from_the_last[::-1]

    def parameters(self) -> list[nn.Parameter]:
        """Return all trainable parameters, those of the heads included, each once."""
        heads = [p for heads in self.heads for head in heads for p in head.parameters() if p.requires_grad]
        return [*(p for stretch in self.stretches() for p in stretch), *heads]

    def forward(self, batch: NamedBatch) -> Forward:
        """Run the net in train mode, with nothing detached."""
        inputs, target = batch
        values: dict[str, Any] = dict(inputs)
        ends: list[Tensor] = []
        output: Any = None
        with block_random(self._problem.seed, 0, self._step, self._device, python=self._runs_python):
            for graph, end in zip(self._graphs, [*self._ends, None], strict=True):
                exports, output = run_graph(graph, values)
                values |= exports
                if end is not None:
                    ends.append(values[end])
        self._step += 1
        return Forward(ends, self.local_loss(True, output, target))

    def train(self, batch: NamedBatch, optimizer: torch.optim.Optimizer, plan: Positions) -> str:
        """Take one training step along a plan, as ``Greedy`` does: each block and its head by their own local loss.

        Args:
            batch: inputs by name, and the target.
            optimizer: of :meth:`parameters`.
            plan: for every cut the indices of its place and its head.

        Returns:
            An empty text; or which loss or gradient was not finite: then no weight and no buffer has changed.
        """
        inputs, target = batch
        values: dict[str, Any] = dict(inputs)
        heads, losses = dict(plan), dict[str, Tensor]()
        buffers = Snapshot([*self._buffers, *(b for place, head in plan for b in self.heads[place][head].buffers())])
        for place, (graph, end) in enumerate(zip(self._graphs, [*self._ends, None], strict=True)):
            with block_random(self._problem.seed, 1 + place, self._step, self._device, python=self._runs_python):
                exports, output = run_graph(graph, values)
                values |= exports
                if end is not None and place in heads:
                    output = self.heads[place][heads[place]](values[end])
            if end is None or place in heads:
                loss = self.local_loss(end is None, output, target)
                if loss.requires_grad:
                    loss.backward()
                losses["the final output" if end is None else f"the block up to {self.places[place]!r}"] = loss.detach()
                values = detached(values)
        fault = step_fault(losses, optimizer, self._named_parameters)
        if fault:
            buffers.restore()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return fault

    def buffers(self) -> list[Tensor]:
        """Return the buffers of the net and of all heads."""
        return list(self._modules.buffers())

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the net by the user's names, and those of the heads, from the input on."""
        for place, graph in enumerate(self._graphs):
            yield from graph.module.named_parameters()
            for k, head in enumerate(self.heads[place] if place < len(self.heads) else ()):
                for name, parameter in head.named_parameters():
                    yield f"{name} of head {k} behind {self.places[place]}", parameter

    def local(self, run: Forward, place: int, head: int, target: Any) -> Tensor:
        """Return the local loss of a head on the activation at its place, in the graph of that forward pass."""
        with block_random(self._problem.seed, 1 + place, self._step, self._device, python=self._runs_python):
            return self.local_loss(False, self.heads[place][head](run.ends[place]), target)

    def start(self) -> Start:
        """Return the present weights; the tensors are this net's own."""
        net: dict[str, Tensor] = {}
        for graph in self._graphs:
            net |= graph.module.state_dict()
        heads = {
            (place, k): head.state_dict()
            for place, built in zip(self.places, self.heads, strict=True)
            for k, head in enumerate(built)
        }
        return Start(net, heads)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, and the number of forward passes so far; the tensors are this net's own."""
        return {"modules": self._modules.state_dict(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._modules.load_state_dict(state["modules"])
        self._step = state["step"]


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, by name; tensors that are not among them keep their values."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in weights:
            overwrite(tensor, weights[name])

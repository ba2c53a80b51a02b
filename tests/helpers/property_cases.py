"""A random program cut at random places: its net, what the program itself says of the blocks, and a loop over many."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from detached_reference import SHARED, WRITE_BEHIND, Cut, Reference, blocks_of, flow_of, kinds, reference_of
from graphs import analysed
from property_examples import EXPLICIT
from random_instructions import FULL, ON_PARAMETERS, Program
from random_models import RandomModel, batch, build, objective
from random_operations import CLASSES, TENSOR_HOOKS, cast_of, records
from random_programs import Cutting, cuttings, programs
from torch import Tensor, fx, nn

import sedona_fx
from sedona_fx.errors import CutError, NonFiniteLossError, TraceError
from sedona_fx.heads.context import HeadContext
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.graph import info
from sedona_fx.passes.cuts import aliases, follow_one_another, possible
from sedona_fx.train import block_seed

EXAMPLES = int(os.environ.get("SEDONA_FX_PROPERTY_EXAMPLES", "0"))
SEED = 3
SEVERAL_LIVE = "several activations at a cut"
DIFFICULT = (
    *(SHARED, SEVERAL_LIVE, WRITE_BEHIND),
    *("a tensor hook", "a hook on a module", "a hook on a parameter"),
    *("autocast", "no gradient", "frozen", "several dtypes", "a shortcut"),
)
"""Kinds of programs of which every run must have some."""
FEWER, NO_HOOK, NOT_FINITE = "fewer blocks", "refused: a tensor hook outside of leaf_modules", "not finite"
_ENOUGH = re.compile(r"enough for (\d+) block")
_STEP, _STEP_OF_SITE = re.compile(r"^steps\.(\d+)$"), re.compile(r"^steps\.(\d+)[:.]")


class Head(nn.Module):
    """A head whose backward needs what it read: a write behind the cut, if it got through, would spoil its gradient."""

    def __init__(self, context: HeadContext) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(context.shape[1:]), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        return self.fc(x.sin().flatten(1))


class Untrainable(Exception):
    """The model's own loss has no gradient."""


class Case:
    """A program's model, a net made of it, and what the program itself says about the blocks.

    Attributes:
        cut: the instructions that end the blocks, and the block of every instruction.
        needed: the instructions that the output needs.
        kinds: what is special about it.
    """

    def __init__(self, program: Program, cutting: Cutting) -> None:
        self.program, self.model = program, build(program)
        self.inputs, self.target = batch(program)
        if not objective(build(program)(*self.x), self.target).requires_grad:
            raise Untrainable
        how: dict[str, Any] = {"blocks": cutting.blocks, "search": cutting.search, "max_live": cutting.max_live}
        if cutting.places is not None:
            how = {"cuts": _places(self.analysed(), cutting.places)}
        self.net = self.decouple(heads=Head, seed=SEED, **how)
        self._heads = copy.deepcopy(self.net.heads.state_dict())
        nodes = {
            name: n for n in self.net.graph_module.graph.nodes if not info(n).boundary for name in aliases(info(n))
        }
        found = [instruction_of(nodes[cut]) for cut in self.net.plan.cuts]
        ends = [k for k in found if k is not None]
        assert len(ends) == len(found)
        flow = flow_of(self.model, self.inputs)
        self.cut = Cut(flow, ends, blocks_of(program, flow, ends))
        self.needed = flow.ancestors(set().union(*flow.outputs))
        self.kinds = kinds(program, self.cut, self.reference.uses) | features(program)
        self.kinds.add(f"{len(self.net.blocks)} blocks")
        if any(info(nodes[cut]).crossing > 1 for cut in self.net.plan.cuts):
            self.kinds.add(SEVERAL_LIVE)

    def decouple(self, **how: Any) -> sedona_fx.Net:
        """Return a net of the model."""
        data = (self.inputs, self.target)
        return sedona_fx.decouple(self.model, data, loss=objective, leaf_modules=self.program.whole, **how)

    def analysed(self) -> Analysed:
        """Return the graphs of the model."""
        return analysed(self.model, *self.inputs, leaf_modules=self.program.whole)

    @property
    def x(self) -> tuple[Tensor, ...]:
        """The inputs, in memory of their own every time."""
        return tuple(x.clone() for x in self.inputs)

    def plain(self) -> RandomModel:
        """Return the model in plain PyTorch, hooks included: copies of parameters have none."""
        return build(self.program)

    def reset(self) -> sedona_fx.Net:
        """Return the net as it was made, and the global random stream where block 0 would start its own."""
        self.net.model.load_state_dict(self.model.state_dict())
        self.net.heads.load_state_dict(self._heads)
        self.net.zero_grad()
        self.net.steps = 0
        torch.manual_seed(block_seed(SEED, 0, 0))  # a net of one block draws from the global stream
        return self.net.train()

    @functools.cached_property
    def reference(self) -> Reference:
        """What the blocks' gradients must be."""
        return reference_of(self.model, self.net, self.inputs, self.target, self.cut)

    @property
    def tolerance(self) -> float:
        """How far a gradient may be from the reference, as a part of its norm: the order of sums may be another one.

        In float64 1e-12. In other dtypes a number that another order gives goes on through the rest of the backward.
        """
        return 1e-12 if self.program.dtypes == {FULL} else 4 * max(torch.finfo(d).eps for d in self.program.dtypes)

    @property
    def sums_are_hooked(self) -> bool:
        """Whether it matters how often a gradient is added to: hooks on sums, of a parameter of several blocks."""
        hooked = [name for name, p in self.model.named_parameters() if p._post_accumulate_grad_hooks]
        return any(len(self.reference.uses.get(name, ())) > 1 for name in hooked)


make = functools.lru_cache(maxsize=256)(Case)  # the ordinary run has the same ones in every test


def features(program: Program) -> set[str]:
    """Name what a program has."""
    found, body = set[str](), program.body
    found |= {"a tensor hook"} if any(step.op in TENSOR_HOOKS for step in body) else set()
    hooks = {hook.kind in ON_PARAMETERS for step in body for hook in step.hooks}
    found |= {"a hook on a parameter"} if True in hooks else set()
    found |= {"a hook on a module"} if False in hooks else set()
    found |= {"autocast"} if any(cast_of(step.region) is not None for step in body) else set()
    found |= {"no gradient"} if not all(records(step.region) for step in body) else set()
    found |= {"frozen"} if any(step.frozen for step in body) else set()
    found |= {"several dtypes"} if len(program.dtypes) > 1 else set()
    return found | ({"a shortcut"} if any(step.op in ("identity", "empty") for step in body) else set())


def loses_a_hook(program: Program) -> bool:
    """Whether a hook may be put on a tensor by code that is recorded, which a graph cannot keep."""
    return any(step.op in TENSOR_HOOKS and not step.whole for step in program.body)


def _places(graphs: Analysed, fractions: Sequence[int]) -> list[str]:
    """Choose places where blocks can end in both modes, and that follow one another."""
    train, other = possible(graphs.train.graph), possible(graphs.eval.graph)
    names = [name for name in train if name in other]
    chosen = list[str]()
    for name in dict.fromkeys(names[len(names) * f // 100] for f in fractions if names):
        ways = ((graphs.train, train), (graphs.eval, other))
        if all(follow_one_another(gm.graph, [places[n] for n in (*chosen, name)]) for gm, places in ways):
            chosen.append(name)
    return chosen


def instruction_of(node: fx.Node) -> int | None:
    """Say which instruction made a node; each is a module, ``steps.<k>``, and later ones may return the value."""
    if node.op == "call_module" and (whole := _STEP.match(str(node.target))):
        return int(whole[1])
    returned = [int(found[1]) for found in map(_STEP.match, info(node).returned_by) if found]
    written = _STEP_OF_SITE.match(f"{info(node).site}:")  # of a layer that several use, the first
    return min(returned, default=int(written[1]) if written else None)


def _made(program: Program, cutting: Cutting, seen: Counter[str]) -> Case:
    """Cut a model; into fewer blocks where it has places for no more, which the error says."""
    try:
        return _settled(program, cutting)
    except CutError as error:
        enough = _ENOUGH.search(str(error))
        if cutting.places is not None or enough is None:
            raise  # such places are legal
        seen[FEWER] += 1
        return _settled(program, dataclasses.replace(cutting, blocks=int(enough[1])))


def _settled(program: Program, cutting: Cutting) -> Case:
    """Make a case; modules that the compiler keeps whole by itself, for the hooks that they register, count as such."""
    case = make(program, cutting)
    if loses_a_hook(program):
        nodes = case.net.graph_module.graph.nodes
        whole = {int(found[1]) for n in nodes if n.op == "call_module" and (found := _STEP.match(str(n.target)))}
        body = [dataclasses.replace(step, whole=step.whole or k in whole) for k, step in enumerate(program.body)]
        case = make(dataclasses.replace(program, body=tuple(body)), cutting)
    return case


def for_every_program(check: Callable[[Case], None]) -> None:
    """Check a property on many programs, print what kinds there were, and demand enough of the difficult ones.

    What must be refused is refused by its own error and counted: a tensor's hook in recorded code that no module can be
    kept whole for, numbers that are not finite. Where there are places for fewer blocks than were drawn, the model is
    cut into as many as the error says.
    """
    seen = Counter[str]()

    @hypothesis.settings(
        max_examples=EXAMPLES or 180,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs(), cuttings)
    def run(program: Program, cutting: Cutting) -> None:
        hypothesis.note(f"{program}\n{cutting}")
        try:
            case = _made(program, cutting, seen)
        except Untrainable:
            hypothesis.reject()
        except TraceError as error:
            if not (loses_a_hook(program) and ("registers a hook on a tensor" in str(error) or program.whole)):
                raise
            seen[NO_HOOK] += 1
            return
        for kind in ("models", *sorted(case.kinds)):
            hypothesis.event(kind)
            seen[kind] += 1
        if case.reference.finite:
            check(case)
            return
        seen[NOT_FINITE] += 1
        with pytest.raises(NonFiniteLossError):
            case.reset().backward(case.x, case.target)

    for program, cutting in EXPLICIT:
        run = hypothesis.example(program, cutting)(run)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "hooks hang on .*torch.export has recorded")
            run()
    finally:
        print(dict(sorted(seen.items())))  # noqa: T201  (pytest shows it with -s, or when a program fails)
    assert seen[NO_HOOK] < seen["models"] // 20
    assert seen[NOT_FINITE] < seen["models"] // 20
    for kind in DIFFICULT:
        assert seen[kind] >= 5, kind

"""Promises 1, 2, 3, 4 and 7 of docs/architecture.md, over random models cut at random places.

``SEDONA_FX_PROPERTY_EXAMPLES=2000`` draws that many models a test, other ones every time; the ordinary run draws the
same 150 always. Both count that the difficult kinds are among them.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import torch
from detached_reference import SHARED, WRITE_BEHIND, Reference, blocks_of, flow_of, kinds, reference_of
from graphs import analysed
from random_models import CLASSES, Instruction, Kind, Program, RandomModel, batch, build, objective
from random_programs import Cutting, cuttings, programs
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from zoo import same_state

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.heads.context import HeadContext
from sedona_fx.ir.graph import info
from sedona_fx.passes import strip
from sedona_fx.passes.cuts import aliases, follow_one_another, possible
from sedona_fx.train import Greedy, block_seed

EXAMPLES = int(os.environ.get("SEDONA_FX_PROPERTY_EXAMPLES", "0"))
TOLERANCE, RATE, SEED = 1e-12, 0.1, 3
SEVERAL_LIVE = "several activations at a cut"
_STEP, _STEP_OF_SITE = re.compile(r"^steps\.(\d+)$"), re.compile(r"^steps\.(\d+):")


_RAW, _IMAGE, _VECTOR = Kind("raw", 3), Kind("image"), Kind("vector")
DEAD_DRAWS = Program(
    (_RAW,),
    (
        Instruction("stem", (0,), _IMAGE, _RAW),
        Instruction("detach", (1,), _IMAGE, _IMAGE),
        Instruction("dropout", (2,), _IMAGE, _IMAGE),
        Instruction("dropout", (2,), _IMAGE, _IMAGE),
        Instruction("pool", (4,), _VECTOR, _IMAGE),
        Instruction("logits", (5,), _VECTOR, _VECTOR),
    ),
)
"""The first dropout is for nothing, but it draws: in the block that has what it reads, a value without a gradient."""


PROBE = Program(
    (_RAW,),
    (
        Instruction("stem", (0,), _IMAGE, _RAW),
        Instruction("detach", (1,), _IMAGE, _IMAGE),
        Instruction("conv", (2,), _IMAGE, _IMAGE),
        Instruction("conv", (3,), _IMAGE, _IMAGE),
        Instruction("pool", (4,), _VECTOR, _IMAGE),
        Instruction("logits", (5,), _VECTOR, _VECTOR),
    ),
    extra=1,
    returns="tuple",
)
"""The second output trains the stem. No block may end behind the detach: the first would have it, and not train it."""


class Head(nn.Module):
    """A head whose backward needs what it read: a write behind the cut, if it got through, would spoil its gradient."""

    def __init__(self, context: HeadContext) -> None:
        super().__init__()
        self.fc = nn.Linear(math.prod(context.shape[1:]), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores."""
        return self.fc(x.sin().flatten(1))


class Case:
    """A program's model, a net made of it, and what the program itself says about the blocks.

    Attributes:
        ends: the instructions that end the blocks but the last.
        blocks: the block of every instruction.
        needed: the instructions that the output needs.
        kinds: what is special about it.
    """

    def __init__(self, program: Program, cutting: Cutting) -> None:
        self.program, self.model = program, build(program)
        self.inputs, self.target = batch(program)
        how: dict[str, Any] = {"blocks": cutting.blocks, "search": cutting.search, "max_live": cutting.max_live}
        if cutting.places is not None:
            how = {"cuts": _places(self.model, self.inputs, cutting.places)}
        data = (self.inputs, self.target)
        self.net = sedona_fx.decouple(self.model, data, loss=objective, heads=Head, seed=SEED, **how)
        self._heads = copy.deepcopy(self.net.heads.state_dict())
        nodes = {
            name: n for n in self.net.graph_module.graph.nodes if not info(n).boundary for name in aliases(info(n))
        }
        found = [_instruction(nodes[cut]) for cut in self.net.plan.cuts]
        self.ends = [k for k in found if k is not None]
        assert len(self.ends) == len(found)
        flow = flow_of(self.model, self.inputs)
        self.blocks = blocks_of(program, flow, self.ends)
        self.needed = flow.ancestors(set().union(*flow.outputs))
        self.kinds = kinds(program, flow, self.blocks, self.reference.uses) | {f"{len(self.net.blocks)} blocks"}
        if any(info(nodes[cut]).crossing > 1 for cut in self.net.plan.cuts):
            self.kinds.add(SEVERAL_LIVE)

    @property
    def x(self) -> tuple[Tensor, ...]:
        """The inputs, in memory of their own every time."""
        return tuple(x.clone() for x in self.inputs)

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
        return reference_of(self.model, self.net, self.inputs, self.target, self.ends, self.blocks)


make = functools.lru_cache(maxsize=192)(Case)  # the ordinary run has the same ones in every test


def _places(model: RandomModel, inputs: Sequence[Tensor], fractions: Sequence[int]) -> list[str]:
    """Choose places where blocks can end in both modes, and that follow one another."""
    graphs = analysed(model, *inputs)
    train, other = possible(graphs.train.graph), possible(graphs.eval.graph)
    names = [name for name in train if name in other]
    chosen = list[str]()
    for name in dict.fromkeys(names[len(names) * f // 100] for f in fractions if names):
        ways = ((graphs.train, train), (graphs.eval, other))
        if all(follow_one_another(gm.graph, [places[n] for n in (*chosen, name)]) for gm, places in ways):
            chosen.append(name)
    return chosen


def _instruction(node: fx.Node) -> int | None:
    """Say which instruction made a node: each is a module, ``steps.<k>``, called once."""
    returned = [int(found[1]) for found in map(_STEP.match, info(node).returned_by) if found]
    written = _STEP_OF_SITE.match(info(node).site)
    return min(returned, default=int(written[1]) if written else None)


def for_every_program(check: Callable[[Case], None]) -> None:
    """Check a property on many programs, print what kinds there were, and demand enough of the difficult ones."""
    seen = Counter[str]()

    @hypothesis.settings(
        max_examples=EXAMPLES or 150,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs(), cuttings)
    @hypothesis.example(PROBE, Cutting(2, "uniform", None, places=(50,)))
    @hypothesis.example(DEAD_DRAWS, Cutting(2, "uniform", None, places=(0,)))
    def run(program: Program, cutting: Cutting) -> None:
        hypothesis.note(f"{program}\n{cutting}")
        try:
            case = make(program, cutting)
        except CutError:
            if cutting.places is not None:
                raise  # these are legal
            seen["refused"] += 1
            hypothesis.reject()
        for kind in ("models", *sorted(case.kinds)):
            hypothesis.event(kind)
            seen[kind] += 1
        check(case)

    try:
        run()
    finally:
        print(dict(sorted(seen.items())))  # noqa: T201  (pytest shows it with -s, or when a program fails)
    assert seen["refused"] < seen["models"] // 4
    for kind in (SHARED, SEVERAL_LIVE, WRITE_BEHIND):
        assert seen[kind] >= 5, kind


# ---- 1 and 2: the same bits under the same names -------------------------------------------------------------------


def _assert_same_run(ours: nn.Module, model: nn.Module, case: Case) -> None:
    torch.manual_seed(5)
    wanted = model(*case.x)
    torch.manual_seed(5)
    found = ours(*case.x)
    assert isinstance(found, type(wanted))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True))


def test_outputs_buffers_and_names_are_the_models():
    def check(case: Case) -> None:
        net = case.reset()
        for training in (True, False):
            model = copy.deepcopy(case.model).train(training)
            net.model.load_state_dict(case.model.state_dict())
            _assert_same_run(net.train(training), model, case)
            assert same_state(net.model, model)
        _assert_same_run(net.inference_module(), model, case)
        whole = net.model.state_dict(keep_vars=True)
        for block in net.blocks:
            for module in (block.module, block.eval_module):
                heads = {id(t) for t in block.head.state_dict(keep_vars=True).values()} if block.head else set()
                for name, tensor in module.state_dict(keep_vars=True).items():
                    assert id(tensor) in heads or whole[name] is tensor, name
        fresh = build(case.program)
        fresh.load_state_dict(net.original_state_dict(), strict=True)
        assert same_state(fresh, net.model)

    for_every_program(check)


def test_the_lowered_graph_strips_to_what_was_traced():
    def body(gm: fx.GraphModule) -> list[str | None]:
        return [n.format_node() for n in gm.graph.nodes if n.op != "output"] + [str(gm.graph.output_node().args)]

    def check(case: Case) -> None:
        assert body(strip(case.net.graph_module)) == body(analysed(case.model, *case.inputs).train)

    for_every_program(check)


# ---- 3 and 4: each block its own gradient, and the right one --------------------------------------------------------


def test_no_gradient_crosses_a_boundary():
    def check(case: Case) -> None:
        net, uses = case.reset(), case.reference.uses
        inside = {id(p): name for name, p in net.model.named_parameters()}
        for index, loss in enumerate(net.losses(case.x, case.target)):
            found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, retain_graph=True)
            for parameter, gradient in zip(net.parameters(), found, strict=True):
                name = inside.get(id(parameter))
                if name is not None:
                    assert gradient is None or index in uses[name], (index, name)
                else:
                    own = net.blocks[index].head
                    assert (gradient is not None) == (own is not None and any(p is parameter for p in own.parameters()))

    for_every_program(check)


def _assert_right(net: sedona_fx.Net, wanted: Reference) -> None:
    """Compare, block by block, all that its parameters got as one vector: parts of it may be zero but for rounding."""
    parameters = dict(net.named_parameters())
    found = {name.removeprefix("model."): p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == wanted.gradients.keys()
    for index in range(len(net.blocks)):
        names = [n for n in found if index in wanted.uses.get(n, ()) or n.startswith(f"heads.{index}.")]
        reference = torch.cat([wanted.gradients[name].flatten() for name in names])
        difference = torch.cat([found[name].flatten() for name in names]) - reference
        assert difference.norm() <= TOLERANCE * reference.norm() + 1e-300, index


def test_gradients_are_those_of_the_untouched_model():
    def check(case: Case) -> None:
        net, wanted = case.reset(), case.reference
        for way in ("backward", "losses"):
            case.reset()
            if way == "backward":
                losses = net.backward(case.x, case.target).losses
            else:  # all graphs are alive till the end
                losses = net.losses(case.x, case.target)
                torch.stack(losses).sum().backward()
            torch.testing.assert_close(losses, wanted.losses, rtol=TOLERANCE, atol=0)
            _assert_right(net, wanted)
        plain = copy.deepcopy(case.model)
        objective(plain(*case.x), case.target).backward()
        trained = {name for name, p in plain.named_parameters() if p.grad is not None}
        assert not trained - wanted.gradients.keys()

    for_every_program(check)


def test_instructions_are_in_the_blocks_that_the_program_says():
    # The reference finds the blocks by itself.
    def check(case: Case) -> None:
        for node in case.net.graph_module.graph.nodes:
            made_by = _instruction(node)
            if info(node).parameters and made_by in case.needed:
                assert info(node).block == case.blocks[made_by], node

    for_every_program(check)


def test_a_greedy_step_is_a_step_along_the_references_gradient():
    def check(case: Case) -> None:
        net, wanted = case.reset(), case.reference
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=RATE)).step(case.x, case.target)
        scale = sum(g.norm() for g in wanted.gradients.values())
        for name, parameter in net.named_parameters():
            gradient = wanted.gradients.get(name.removeprefix("model."), torch.zeros_like(parameter))
            difference = parameter.detach() - (before[name] - RATE * gradient)
            assert difference.norm() <= TOLERANCE * (before[name].norm() + scale), name

    for_every_program(check)


# ---- 7: one block is backprop ---------------------------------------------------------------------------------------


def test_one_block_is_backprop_bit_for_bit():
    def check(case: Case) -> None:
        net = sedona_fx.decouple(case.model, (case.inputs, case.target), blocks=1, search="uniform", loss=objective)
        torch.manual_seed(5)
        loss = objective((plain := copy.deepcopy(case.model))(*case.x), case.target)
        loss.backward()
        torch.manual_seed(5)
        assert torch.equal(net.backward(case.x, case.target).losses[0], loss)
        for (name, theirs), ours in zip(plain.named_parameters(), net.model.parameters(), strict=True):
            assert (theirs.grad is None) == (ours.grad is None), name
            assert theirs.grad is None or torch.equal(theirs.grad, ours.grad), name

    for_every_program(check)

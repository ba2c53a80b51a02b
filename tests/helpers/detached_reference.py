"""What every block of a random model is and what its gradients must be, found without torch.fx and sedona_fx.

The program runs instruction by instruction; which memory a value lies in is seen, not derived. Nothing is detached:
every instruction gets fresh leaves in the place of its parameters, the value at a cut is cloned as it comes by, a head
gives a local loss on the clone, and the gradient of loss i on the leaves of block i's instructions is what the block
owes to the parameters. So a parameter that several blocks use needs no rule of its own; its hooks are called by hand,
once a block. A tensor's hook is about the value as the block of the hook has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from random_instructions import Program
from random_models import RandomModel, objective
from random_operations import TENSOR_HOOKS, WRITES, entered
from reference import Streams
from torch import Tensor, nn

from sedona_fx import Net

SHARED, WRITE_BEHIND = "a parameter of several blocks", "a write behind a cut"


@dataclass
class Flow:
    """What one run of a program tells of every instruction.

    Attributes:
        needs: the instructions that must have run before, writes to what is read included.
        reads: the memories of the arguments.
        creates: the memories of the result.
        writes: the memories that are overwritten.
        frees: whether it takes from an activation what holds no gradient.
        first: the instructions that made or last overwrote the very tensor that it reads first.
        outputs: what every output of the model needs; this one is by output.
    """

    needs: list[set[int]] = field(default_factory=list)
    reads: list[set[int]] = field(default_factory=list)
    creates: list[set[int]] = field(default_factory=list)
    writes: list[set[int]] = field(default_factory=list)
    frees: list[bool] = field(default_factory=list)
    first: list[set[int]] = field(default_factory=list)
    outputs: list[set[int]] = field(default_factory=list)

    def ancestors(self, roots: Iterable[int]) -> set[int]:
        """Return the instructions that the roots need, the roots included."""
        seen, stack = set[int](), list(roots)
        while stack:
            at = stack.pop()
            if at not in seen:
                seen.add(at)
                stack.extend(self.needs[at])
        return seen


def _memories(values: Iterable[Any]) -> set[int]:
    """Return where tensors lie."""
    found = set[int]()
    for value in values:
        found |= {t.untyped_storage()._cdata for t in (value if isinstance(value, tuple) else (value,))}
    return found


def _live(value: Any) -> bool:
    """Whether a value holds a gradient."""
    return any(t.requires_grad for t in (value if isinstance(value, tuple) else (value,)))


def _execute(model: RandomModel, inputs: Sequence[Tensor], step: Callable[[int, list[Any]], Any]) -> list[Any]:
    """Run a program, every instruction by `step(number, arguments)`; return all values."""
    values: list[Any] = list(inputs)
    for k, instruction in enumerate(model.program.body):
        values.append(step(k, [values[a] for a in instruction.args]))
    return values


def flow_of(model: RandomModel, inputs: Sequence[Tensor]) -> Flow:
    """Run a copy of a model once, nothing of it frozen, and note what goes where."""
    model, seen, writers = copy.deepcopy(model).requires_grad_(True), Flow(), dict[int, int]()
    body, offset = model.program.body, len(inputs)
    makers: dict[int, int] = {}  # of values: what hands on its argument makes nothing, unless it is a node
    objects: dict[int, int] = {}  # of tensors

    def step(k: int, arguments: list[Any]) -> Any:
        instruction = body[k]
        tensors = [*arguments, *model.attributes(k)]
        counts = instruction.op.startswith("tick") and not instruction.is_node  # reads the counter alone
        numbers, given = ((), []) if counts else (instruction.args, arguments)
        reads = _memories([*given, *model.attributes(k)])
        before = [t._version for t in tensors if isinstance(t, Tensor)]
        with entered(instruction):
            value = model.steps[k](*tensors)
        changed = [
            t for t, v in zip((t for t in tensors if isinstance(t, Tensor)), before, strict=True) if t._version != v
        ]
        seen.needs.append({makers[a] for a in numbers if a in makers} | {writers[m] for m in reads if m in writers})
        seen.reads.append(reads)
        seen.creates.append(_memories([value]))
        seen.writes.append(_memories(changed))
        seen.frees.append(any(map(_live, [*given, *model.attributes(k)])) and not _live(value))
        seen.first.append(
            {objects[id(t)] for t in given[:1] if id(t) in objects}
            | {writers[m] for m in _memories(given[:1]) if m in writers}
        )
        writers.update(dict.fromkeys(seen.writes[-1], k))
        handed_on = next((a for a, t in zip(instruction.args, arguments, strict=True) if t is value), None)
        hooked = instruction.op == "empty" and any(hook.on_layer for hook in instruction.hooks)
        is_node = instruction.is_node or instruction.op == "identity" or hooked
        makers[offset + k] = makers[handed_on] if handed_on in makers and not is_node else k
        objects.setdefault(id(value), k)
        return value

    kept = _execute(model, [x.clone() for x in inputs], step)  # all alive: no memory is used twice
    for number in model.program.outputs:
        seen.outputs.append({makers[number]} | {writers[m] for m in _memories([kept[number]]) if m in writers})
    return seen


def blocks_of(program: Program, seen: Flow, ends: Sequence[int]) -> list[int]:
    """Return the block of every instruction: the first whose end needs it, else the last.

    What holds no gradient is taken from an activation where that is made, and a tuple apart. Nobody reads what was
    overwritten later than the block that overwrote it; but for what serves the second output alone, a copy of it is
    kept. What nothing needs stays with what it reads.
    """
    offset, last = len(program.inputs), len(ends)
    needed, serving = seen.ancestors(set().union(*seen.outputs)), seen.ancestors(seen.outputs[0])
    blocks = dict[int, int]()

    def claim(roots: Iterable[int], block: int) -> None:
        for k in seen.ancestors(roots):
            blocks[k] = min(block, blocks.get(k, block))

    for block, end in enumerate(ends):
        claim([end], block)
    overwritten = list[tuple[int, int]]()
    for k, step in enumerate(program.body):
        readers = [
            r
            for r in range(k)
            if seen.reads[r] & seen.writes[k] and (r in serving or r not in needed or seen.creates[r] & seen.writes[k])
        ]
        overwritten += [(r, k) for r in readers]
        if k not in blocks and k in needed:
            blocks[k] = last
        if k in blocks and seen.frees[k] and k in serving:
            blocks[k] = min(blocks[k], max((blocks[s] for s in seen.needs[k]), default=0))
        elif step.op in ("first", "second") and not step.is_node:
            blocks[k] = blocks[step.args[0] - offset]
        elif k not in blocks:
            blocks[k] = max((blocks[s] for s in {*seen.needs[k], *readers}), default=0)
    while late := [(r, w) for r, w in overwritten if blocks[r] > blocks[w]]:
        for reader, write in late:
            claim([reader], blocks[write])
    return [blocks[k] for k in range(len(program.body))]


@dataclass
class Reference:
    """The local losses, and what the parameters of the model and of the heads get, by name, if anything.

    ``uses`` says for every parameter of the model that trains in which blocks it is used.
    """

    losses: list[Tensor]
    gradients: dict[str, Tensor]
    uses: dict[str, set[int]]

    @property
    def finite(self) -> bool:
        """Whether there is no infinite number and no NaN in it."""
        return all(bool(t.isfinite().all()) for t in (*self.losses, *self.gradients.values()))


@dataclass(frozen=True)
class Cut:
    """A program cut into blocks.

    Attributes:
        flow: what the program does.
        ends: the instructions that end the blocks but the last.
        blocks: the block of every instruction.
    """

    flow: Flow
    ends: Sequence[int]
    blocks: Sequence[int]


def reference_of(model: RandomModel, net: Net, inputs: Sequence[Tensor], target: Tensor, cut: Cut) -> Reference:
    """Return what ``net.backward`` must give.

    Args:
        model: equal to the one that the net was made of, with its hooks; a copy of it runs.
        net: says what the heads and the seeds are.
        inputs: of the model.
        target: of the losses.
        cut: where it is cut.
    """
    originals = dict(model.named_parameters())
    model, heads, ends = copy.deepcopy(model), copy.deepcopy(net.heads), cut.ends
    names = {id(p): name for name, p in model.named_parameters()}
    leaves: list[list[tuple[str, Tensor]]] = [[] for _ in range(len(ends) + 1)]
    streams, losses = Streams(net, net.steps), dict[int, Tensor]()

    def leaf(parameter: Tensor, block: int) -> Tensor:
        if id(parameter) not in names or not parameter.requires_grad:
            return parameter  # a buffer, or frozen
        copied = parameter.detach().clone().requires_grad_()
        leaves[block].append((names[id(parameter)], copied))
        return copied

    def step(k: int, arguments: list[Any]) -> Any:
        instruction, block = model.program.body[k], cut.blocks[k]
        streams.enter(block)
        own = {name: leaf(p, block) for name, p in model.steps[k].named_parameters()}
        own_block = block in {cut.blocks[s] for s in cut.flow.first[k]}
        if instruction.op in TENSOR_HOOKS and not own_block:  # of a value that has no gradient to go to
            value = arguments[0]
        else:
            with entered(instruction):
                value = torch.func.functional_call(
                    model.steps[k], own, (*arguments, *(leaf(t, block) for t in model.attributes(k)))
                )
        if k in ends:
            at = ends.index(k)
            losses[at] = objective(_in_place_of(model.program, heads[str(at)](value.clone())), target)
        return value

    torch.manual_seed(streams.seeds[0])
    values = _execute(model, [x.clone() for x in inputs], step)
    losses[len(ends)] = objective(model.result(values), target)
    gradients, uses = dict[str, Tensor](), dict[str, set[int]]()
    for block, own in enumerate(leaves):
        for name, _ in own:
            uses.setdefault(name, set()).add(block)
        if block < len(ends):
            own = [*own, *((f"heads.{block}.{name}", p) for name, p in heads[str(block)].named_parameters())]
        if not own or not losses[block].requires_grad:
            continue
        found = torch.autograd.grad(losses[block], [p for _, p in own], retain_graph=True, allow_unused=True)
        sums = dict[str, Tensor]()
        for (name, _), gradient in zip(own, found, strict=True):
            if gradient is not None:
                sums[name] = sums[name] + gradient if name in sums else gradient
        for name, gradient in sums.items():
            gradients[name] = _accumulated(gradients.get(name), gradient, originals.get(name))
    return Reference([losses[k].detach() for k in range(len(losses))], gradients, uses)


def _accumulated(before: Tensor | None, gradient: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """Return what is in ``.grad`` when a gradient has come to it, hooks of the parameter called as autograd does."""
    for hook in ((parameter._backward_hooks or {}) if parameter is not None else {}).values():
        gradient = hook(gradient)
    total = gradient if before is None else before + gradient
    if parameter is None:
        return total
    twin = nn.Parameter(parameter.detach().clone())
    twin.grad = total.clone()
    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
        hook(twin)
    return twin.grad


def _in_place_of(program: Program, logits: Tensor) -> Any:
    """Return a head's output in the form of the model's own, without the second output."""
    if program.returns == "dict":
        return {"logits": logits, "extra": None}
    return (logits, None) if program.returns == "tuple" else logits


def kinds(program: Program, cut: Cut, uses: dict[str, set[int]]) -> set[str]:
    """Name what is special about a program cut this way."""
    found, seen, blocks = set[str](), cut.flow, cut.blocks
    if any(len(where) > 1 for where in uses.values()):
        found.add(SHARED)
    for k, step in enumerate(program.body):
        if step.op in WRITES:
            made = [j for j in range(k) if seen.creates[j] & seen.writes[k]]
            found |= {"a write"} | ({WRITE_BEHIND} if any(blocks[j] < blocks[k] for j in made) else set())
    return found

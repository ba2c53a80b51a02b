"""What each block's gradient must be, from the user's own model: nothing detached, no code of sedona_fx in its forward.

The values at the boundaries are cloned as they come by (so that in-place operations behind them spoil nothing), a head
gives a local loss on each clone, and ``autograd.grad`` of local loss i is taken on the parameters of block i alone.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from zoo import total_loss

from sedona_fx import Net
from sedona_fx.train import block_seed


class Streams:
    """The random numbers of blocks: one stream each, seeded from (seed, block, step)."""

    def __init__(self, net: Net, step: int) -> None:
        self.blocks = len(net.blocks)
        self.seeds = [block_seed(net.plan.seed, block, step) for block in range(self.blocks)]
        self.states: dict[int, Tensor] = {}
        self.block = 0

    def enter(self, block: int) -> None:
        """Draw from the stream of a block from here on; the others wait where they are."""
        self.states[self.block] = torch.get_rng_state()
        self.block = block
        if block in self.states:
            torch.set_rng_state(self.states[block])
        else:
            torch.manual_seed(self.seeds[block])


def reference_gradients(
    model: nn.Module, net: Net, x: Tensor, y: Tensor, *, auxiliary: Sequence[str] = (), step: int = 0
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return the K local losses, and block by block the gradient of every parameter, by name (heads: ``"head."``).

    Args:
        model: equal to the model the net was made of; only this one runs.
        net: says where the cuts are, which parameters are in which block, and what the heads are (they are copied).
        x: images.
        y: classes.
        auxiliary: modules that feed training outputs only: they belong to the last block wherever they stand.
        step: number of the training step.
    """
    streams, losses, heads = Streams(net, step), list[Tensor](), copy.deepcopy(net.heads)

    def reach(value: Tensor) -> None:
        block = len(losses)
        losses.append(F.cross_entropy(heads[str(block)](value.clone()), y))
        streams.enter(block + 1)

    torch.manual_seed(streams.seeds[0])
    if all(cut in dict(model.named_modules()) for cut in net.plan.cuts):
        output = _run_with_hooks(model, x, net.plan.cuts, reach, auxiliary, streams)
    else:
        output = _run_node_by_node(model, x, net.plan.cuts, reach, auxiliary, streams)
    assert len(losses) == len(net.plan.cuts)
    losses.append(total_loss(output, y))

    gradients = []
    for block, loss in zip(net.blocks, losses, strict=True):
        owned = {name: model.get_parameter(name) for name in _names_of_the_model(net, block)}
        if block.head is not None:
            owned |= {f"head.{name}": p for name, p in heads[str(block.index)].named_parameters()}
        found = torch.autograd.grad(loss, list(owned.values()), retain_graph=True, allow_unused=True)
        gradients.append({name: grad for name, grad in zip(owned, found, strict=True) if grad is not None})
    return [loss.detach() for loss in losses], gradients


def net_gradients(net: Net) -> list[dict[str, Tensor]]:
    """Return what ``net.backward`` left in ``.grad``, in the form of :func:`reference_gradients`."""
    gradients = []
    for block in net.blocks:
        found = {name: net.model.get_parameter(name).grad for name in _names_of_the_model(net, block)}
        if block.head is not None:
            found |= {f"head.{name}": p.grad for name, p in block.head.named_parameters()}
        gradients.append({name: grad for name, grad in found.items() if grad is not None})
    return gradients


def _names_of_the_model(net: Net, block) -> list[str]:
    inside = {id(p) for p in block.parameters()}
    return [name for name, p in net.model.named_parameters() if id(p) in inside]


def _run_with_hooks(
    model: nn.Module,
    x: Tensor,
    cuts: Sequence[str],
    reach: Callable[[Tensor], None],
    auxiliary: Sequence[str],
    streams: Streams,
) -> object:
    """Run the model itself; hooks on its modules see the boundaries go by."""
    last, inside = streams.blocks - 1, list[int]()

    def enter_branch(*_: object) -> None:
        inside.append(streams.block)
        streams.enter(last)

    with ExitStack() as hooks:
        for path in cuts:
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_hook(lambda _m, _i, out: reach(out)).remove)
        for path in auxiliary if model.training else ():
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(enter_branch).remove)
            hooks.callback(module.register_forward_hook(lambda *_: streams.enter(inside.pop())).remove)
        return model(x)


def _run_node_by_node(
    model: nn.Module,
    x: Tensor,
    cuts: Sequence[str],
    reach: Callable[[Tensor], None],
    auxiliary: Sequence[str],
    streams: Streams,
) -> object:
    """Interpret a plain symbolic trace of the model: for cuts behind an operation, where no hook can stand."""
    plain = fx.symbolic_trace(model)
    ends = {_node_at(plain.graph, cut) for cut in cuts}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            inside, branch = streams.block, set(_stack(n)) & set(auxiliary)
            if branch:
                streams.enter(streams.blocks - 1)
            value = super().run_node(n)
            if branch:
                streams.enter(inside)
            if n in ends:
                reach(value)
            return value

    return Run(plain).run(x)


def _stack(node: fx.Node) -> list[str]:
    """Return the calls of modules that a node was made in, outermost first; ``path@1`` is the second call of one."""
    return list(node.meta.get("nn_module_stack") or {})


def _node_at(graph: fx.Graph, cut: str) -> fx.Node:
    """Find the node of a cut: the last one made in the call ``path#n`` of a module, or ``path:operation#n``."""
    place, _, count = cut.partition("#")
    path, _, operation = place.partition(":")
    operation = {"iadd": "add", "imul": "mul"}.get(operation, operation)  # fx records `x += y` as `x + y`
    call = path if operation or not count else f"{path}@{int(count) - 1}"
    seen: Counter[str] = Counter()
    found = None
    for node in graph.nodes:
        stack = _stack(node)
        if not operation and call in stack:
            found = node
        elif operation and (stack or [""])[-1] == path and operation == getattr(node.target, "__name__", node.target):
            seen[operation] += 1
            if seen[operation] == int(count or 1):
                found = node
    assert found is not None, cut
    return found

"""TRACED -> what every node costs and touches, found without computing: a forward on fake tensors.

Fake tensors run the real operators' shape and aliasing rules, so shapes, in-place writes, views, the tensors that
autograd keeps for backward, and FLOPs come from PyTorch itself and not from tables of ours. They cost a millisecond an
operator, so what an operation did is remembered where it can be (:mod:`sedona_fx.fake.memo`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.immutable_collections import immutable_dict
from torch.utils import _pytree as pytree

from sedona_fx.capture.host_calls import HostCall, as_recorded
from sedona_fx.capture.state_watch import keep_state
from sedona_fx.errors import TraceError
from sedona_fx.fake.memo import Call, Memo, Run, call_of, does_only_its_own, effect_of, replay
from sedona_fx.fake.meter import Meter
from sedona_fx.fake.tensors import Abstract, CannotMake, Storage, Storages, geometry
from sedona_fx.ir.channels import channel_dim
from sedona_fx.ir.flow import ancestors
from sedona_fx.ir.graph import NodeInfo, TensorSpec, describe, info, operation
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.spec import Phase

_STOPS = ("detach", "detach_")


@graph_pass(Phase.TRACED)
def annotate(
    gm: fx.GraphModule, inputs: Mapping[str, Any], *, training: bool, memo: Memo | None = None
) -> fx.GraphModule:
    """Fill in every node's value, parameters, FLOPs, bytes kept for backward, storages, writes and channel dimension.

    Args:
        gm: a TRACED graph. Only the records of its nodes change.
        inputs: placeholder name -> example value; shapes, dtypes and devices are used, and numbers only where a module
            kept whole asks for integers (the lengths of padded sequences).
        training: the mode the graph belongs to.
        memo: what operations did before, to be added to: an operation in it is not run again. None: all are run.

    Raises:
        TraceError: a node cannot run on these shapes.
    """
    try:
        _run(gm, inputs, training, memo)
    except (CannotMake, TraceError):
        if memo is None:
            raise
        _run(gm, inputs, training, None)  # the last word, on errors as well
    _spread(gm)
    _refuse_forgotten_no_grad(gm)
    return gm


def _run(gm: fx.GraphModule, inputs: Mapping[str, Any], training: bool, memo: Memo | None) -> None:
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {
        name: pytree.tree_map_only(Tensor, lambda t: fake_mode.from_tensor(t.detach()), value)
        for name, value in inputs.items()
    }
    with keep_state(gm), keep_modes(gm), fake_mode, torch.enable_grad():
        gm.train(training)
        runner = _Annotator(gm, fake_mode, memo, inputs)
        runner.run(*(fakes[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))


class _Annotator(fx.Interpreter):
    """Runs the graph on fake tensors, but for what a memo says the result of, and writes down what each node did."""

    def __init__(
        self, gm: fx.GraphModule, fake_mode: FakeTensorMode, memo: Memo | None, inputs: Mapping[str, Any]
    ) -> None:
        self.fake_mode, self.memo, self.inputs = fake_mode, memo, inputs
        super().__init__(gm, garbage_collect_values=False)
        self.names = {p: name for name, p in gm.named_parameters()}  # tied parameters have one name
        self.own = [*gm.parameters(), *gm.buffers()]
        self.storages = Storages(fake_mode, self.own)
        self.meter = Meter()
        if memo is None:
            self._know(self.own)

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        with self.meter.measuring():
            return super().run(*args, enable_io_processing=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Hand out lists and dictionaries of Python's own: a function kept whole may write to what it is given."""
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: self._made(self.env[a]))
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}

    def _made(self, value: Any) -> Any:
        """Return a value with every abstract tensor made."""
        if isinstance(value, Abstract):
            return self.storages.make(value)
        if not isinstance(value, Tensor) and any(isinstance(leaf, Abstract) for leaf in pytree.tree_leaves(value)):
            return pytree.tree_map_only(Abstract, self.storages.make, value)
        return value

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return None
        record = info(n)
        call = None
        if self.memo is not None and n.op in ("call_module", "call_function", "call_method"):
            module = self.submodules[str(n.target)] if n.op == "call_module" else None
            call = call_of(n, module, self.env, self.storages)
        effect = self.memo.get(call.key) if self.memo is not None and call is not None else None
        if effect is not None and call is not None:
            result, saved, mutates = replay(effect, call, self.storages)
            record.value, record.flops = effect.value, effect.flops
        else:
            result, saved, mutates = self._really(n, record, call)
        record.saved = {storage.number: size for storage, size in saved.items()}
        record.storages = frozenset(self.storages.of(t).number for t in _tensors(result))
        record.mutates = frozenset(storage.number for storage in mutates)
        read = list(self._parameters(n))
        record.parameters = tuple(self.names[parameter] for parameter in read)
        record.weighty = any(parameter.dim() >= 2 for parameter in read)
        return result

    def _really(self, n: fx.Node, record: NodeInfo, call: Call | None) -> tuple[Any, dict[Storage, int], list[Storage]]:
        """Run a node and see what it did; remember it as what the call does."""
        given = [t for a in n.all_input_nodes for t in _tensors(self._made(self.env[a]))]
        before = [(t, t._version, _looks(t), self.storages.of(t)) for t in given]
        # Code of the user's may read any of the model's tensors.
        self._know(self.own if call is None and not does_only_its_own(n) else (*given, *(call.tensors if call else ())))
        known = self.storages.count
        self.meter.saved, flops = {}, self.meter.flops
        try:
            result = as_recorded(n.target) if isinstance(n.target, HostCall) else super().run_node(n)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.meter.saved, self.meter.flops, call = {}, flops, None
            try:
                result = self._run_on_noise(n)
            except Exception as error:
                raise TraceError(
                    f"{describe(n)} computes sizes from numbers, and does not run on made-up ones ({error}): hand it "
                    "lengths and indices as the model's inputs give them, or take the part behind it for root='...'."
                ) from error
        except Exception as error:
            shapes = [_spec_tree(self._made(self.env[a])) for a in n.all_input_nodes]
            raise TraceError(
                f"{describe(n)} cannot run on the shapes {[getattr(s, 'shape', s) for s in shapes]}: {error}"
            ) from error
        record.value, record.flops = _spec_tree(result), self.meter.flops - flops
        kept = {self.storages.at(address, size): size for address, size in self.meter.saved.items()}
        saved = {storage: size for storage, size in kept.items() if not storage.own}
        mutates = list(dict.fromkeys(storage for t, version, _, storage in before if t._version != version))
        for tensor, _, seen, storage in before:
            if _looks(tensor) != seen or self.storages.of(tensor) is not storage:
                call = None
                if not storage.is_known_to_autograd:
                    raise CannotMake
        if self.memo is not None and call is not None:
            run = Run(result, record.value, saved, mutates, record.flops, known)
            effect = effect_of(call, run, self.storages)
            if effect is not None:
                self.memo[call.key] = effect
        return result, saved, mutates

    def _know(self, tensors: Iterable[Any]) -> None:
        """Learn where the fakes of real tensors lie.

        Operators made of others (linear) keep a view of the parameter's fake, which is the same one every time.
        """
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor | Abstract):
                self.storages.convert(tensor)

    def _parameters(self, n: fx.Node) -> Iterator[nn.Parameter]:
        if n.op == "call_module":
            yield from self.module.get_submodule(str(n.target)).parameters()
        elif n.op == "get_attr":
            value = self.fetch_attr(str(n.target))
            if isinstance(value, nn.Parameter):
                yield value

    def _run_on_noise(self, n: fx.Node) -> Any:
        """Run one module whose result depends on numbers for real, a copy of it, and for its shape.

        Only a module kept whole can be such a one: tracing refuses all others. Floats are made up; integers, which may
        not be anything, are the example's, or zeros where they depend on more than the inputs.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with unset_fake_temporarily():
            noise = torch.Generator().manual_seed(0)
            given = {a: self._made(self.env[a]) for a in n.all_input_nodes}
            integers = {a: t for a, t in given.items() if isinstance(t, Tensor) and not t.dtype.is_floating_point}
            known = {id(fake): self._numbers(a) for a, fake in integers.items()}

            def numbers(fake: Tensor) -> Tensor:
                found = known.get(id(fake))
                return found if found is not None else _made_up(fake, noise)

            args, kwargs = pytree.tree_map_only(FakeTensor, numbers, (args, kwargs))
            if n.op == "call_module":
                module = copy.deepcopy(self.module.get_submodule(str(n.target)))
                self.meter.ignore([*module.parameters(), *module.buffers()])
                result = module(*args, **kwargs)
            else:
                result = getattr(self, n.op)(n.target, args, kwargs)
            leaves, spec = pytree.tree_flatten(result)
            detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        fakes = [
            self.fake_mode.from_tensor(bare).requires_grad_(leaf.requires_grad) if isinstance(bare, Tensor) else bare
            for bare, leaf in zip(detached, leaves, strict=True)
        ]
        return pytree.tree_unflatten(fakes, spec)

    def _numbers(self, wanted: fx.Node) -> Tensor | None:
        """Return a value that the example's inputs alone decide, in numbers; None if it depends on more."""
        behind = ancestors([wanted], {node: node.all_input_nodes for node in self.graph.nodes})
        if any(node.op not in ("placeholder", "call_function", "call_method") for node in behind):
            return None
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node in behind and node.op == "placeholder":
                env[node] = pytree.tree_map_only(Tensor, torch.clone, self.inputs[str(node.target)])
            elif node in behind:
                env[node] = getattr(self, node.op)(node.target, *fx.map_arg((node.args, node.kwargs), env.__getitem__))
        return env[wanted]


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def _made_up(fake: Tensor, noise: torch.Generator) -> Tensor:
    if fake.dtype.is_floating_point:
        made = torch.randn(fake.shape, generator=noise).to(fake.dtype).to(fake.device)
        return made.requires_grad_(fake.requires_grad).clone()  # no leaf: the module may write to it
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


def _tensors(value: Any) -> list[Any]:
    """Return the tensors of a nested value, abstract ones, too."""
    if isinstance(value, Tensor | Abstract):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor | Abstract)]


def _looks(tensor: Tensor) -> tuple[Any, ...]:
    return geometry(tensor), tensor.requires_grad


def _spec_tree(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: TensorSpec(tuple(t.shape), t.dtype, t.device), value)


def _refuse_forgotten_no_grad(gm: fx.GraphModule) -> None:
    """Raise where the model would have stopped a gradient by ``torch.no_grad()``, which no graph remembers."""
    for node in gm.graph.nodes:
        record = info(node)
        leaves = any(not info(user).without_grad for user in node.users)
        if record.without_grad and record.depends and (record.mutates or (record.is_live and leaves)):
            raise TraceError(
                f"{describe(node)} runs under torch.no_grad(){record.without_grad.rstrip()}: a graph does not remember "
                "that, and gradients would flow. Use .detach() on what should pass none, or name the module in "
                "leaf_modules=[...] to keep it whole."
            )


def _spread(gm: fx.GraphModule) -> None:
    """Let `depends`, `from_input` and the channel dimension follow the data flow."""
    for node in gm.graph.nodes:
        record, sources = info(node), [info(a) for a in node.all_input_nodes]
        stops = node.op in ("call_function", "call_method") and (operation(node) in _STOPS or _without_grad(node))
        record.depends = not stops and (bool(record.parameters) or any(s.depends for s in sources))
        record.from_input = node.op == "placeholder" or any(s.from_input for s in sources)
        if record.is_tensor and len(record.value.shape) > 1:
            record.channel_dim = channel_dim(gm, node)


def _without_grad(node: fx.Node) -> bool:
    """Whether a node is a region under ``torch.no_grad()``, as ``torch.export`` keeps them."""
    return operation(node) == "wrap_with_set_grad_enabled" and node.args[0] is False

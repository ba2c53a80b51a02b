"""Run a graph on fake tensors and write down what each node did: the work of :mod:`sedona_fx.passes.annotate`.

Fake tensors follow the real operators' shape and aliasing rules, so shapes, in-place writes, views, the tensors that
autograd keeps for backward, and FLOPs come from PyTorch itself and not from tables of ours. They cost a millisecond per
operator, so what an operator did is remembered where that is possible (:mod:`sedona_fx.fake.memo`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
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
from torch.utils import _pytree as pytree

from sedona_fx.capture.graph_module import spec_of
from sedona_fx.capture.hooks import Registrations, hooks_of, watch_hooks
from sedona_fx.capture.host_calls import HostCall, as_recorded
from sedona_fx.capture.whole.derivatives import DerivativeWatch
from sedona_fx.capture.whole.scripted import Scripted, scripted_modules
from sedona_fx.errors import TraceError
from sedona_fx.fake.memo import Call, Memo, Run, call_of, does_only_its_own, effect_of, replay
from sedona_fx.fake.meter import Meter, Work
from sedona_fx.fake.tensors import Abstract, CannotMake, Storage, Storages, geometry
from sedona_fx.fake.values import hands_on, is_float, made_up, mutable, tensors_in
from sedona_fx.ir.copies import deep_copy
from sedona_fx.ir.flow import ancestors, input_graph
from sedona_fx.ir.graph import NodeInfo, describe, info
from sedona_fx.ir.program import attribute
from sedona_fx.ir.region import region_of


class FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors, or from memory where a memo has a node's effect, and fills in the records.

    Args:
        gm: the graph. Only the records of its nodes change.
        fake_mode: the mode that the fake inputs of :meth:`run` belong to; active during the run.
        memo: effects of operations seen before; new ones are added. None: every node is run.
        inputs: placeholder name -> example value, with numbers.
    """

    def __init__(
        self, gm: fx.GraphModule, fake_mode: FakeTensorMode, memo: Memo | None, inputs: Mapping[str, Any]
    ) -> None:
        self.fake_mode, self.memo, self.inputs = fake_mode, memo, inputs
        super().__init__(gm, garbage_collect_values=False)
        self.parameter_names = {p: name for name, p in gm.named_parameters()}  # tied parameters have one name
        self.model_tensors = [*gm.parameters(), *gm.buffers()]
        self.storages = Storages(fake_mode, self.model_tensors)
        self.meter = Meter()
        self.made_of_weights = self._made_of_weights(gm.graph)
        if memo is None:
            self._locate_fakes(self.model_tensors)

    def run(self, *args: Any) -> None:  # type: ignore[override]
        """Run the graph on fake inputs, in the order of its placeholders. Nothing is returned."""
        with self.meter.measuring():
            super().run(*args, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """Return a node's value, and fill in its record."""
        if n.op == "output":
            return None
        region = region_of(n)
        with nullcontext() if region is None else region.entered():
            return self._run_call(n)

    def _run_call(self, n: fx.Node) -> Any:
        record = info(n)
        call = None
        if self.memo is not None and n.op in ("call_module", "call_function", "call_method"):
            module = self.submodules[str(n.target)] if n.op == "call_module" else None
            call = call_of(n, module, self.env, self.storages)
            if call is not None:  # the same operation on weights in the place of activations is another one
                weights = tuple(source in self.made_of_weights for source in n.all_input_nodes)
                call = dataclasses.replace(call, key=(call.key, record.region, any(weights) and weights))
        effect = self.memo.get(call.key) if self.memo is not None and call is not None else None
        if effect is not None and call is not None:
            result, saved, mutates = replay(effect, call, self.storages)
            record.value, record.work = effect.value, effect.work
        else:
            result, saved, mutates = self._execute(n, record, call)
        record.flops = record.work.flops
        record.saved = {storage.number: size for storage, size in saved.items()}
        record.storages = frozenset(self.storages.of(t).number for t in tensors_in(result))
        record.mutates = frozenset(storage.number for storage in mutates)
        record.hands_on = hands_on((t for s in n.all_input_nodes for t in tensors_in(self.env[s])), result)
        parameters = list(self._parameters(n))
        record.parameters = tuple(self.parameter_names[parameter] for parameter in parameters)
        record.trained = tuple(self.parameter_names[p] for p in parameters if p.requires_grad)
        record.weighty = any(parameter.dim() >= 2 for parameter in parameters)
        return result

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return arguments with Python's own lists and dictionaries: a function kept whole may write to them."""
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: self._without_abstract(self.env[a]))
        return tuple(map(mutable, args)), {name: mutable(value) for name, value in kwargs.items()}

    def fetch_attr(self, target: str) -> Any:
        """Return the module or tensor at a path."""
        return attribute(self.module, target)

    def _without_abstract(self, value: Any) -> Any:
        """Return a nested value with a fake tensor in place of every abstract one."""
        if isinstance(value, Abstract):
            return self.storages.make(value)
        if not isinstance(value, Tensor) and any(isinstance(leaf, Abstract) for leaf in pytree.tree_leaves(value)):
            return pytree.tree_map_only(Abstract, self.storages.make, value)
        return value

    def _execute(
        self, n: fx.Node, record: NodeInfo, call: Call | None
    ) -> tuple[Any, dict[Storage, int], list[Storage]]:
        """Run a node and observe what it does; if `call` is given, remember that as its effect.

        Returns:
            The node's value, the storages that it keeps for backward with their bytes, and those that it writes to.
        """
        inputs = [t for source in n.all_input_nodes for t in tensors_in(self._without_abstract(self.env[source]))]
        before = [_Seen(t, t._version, _visible(t), self.storages.of(t)) for t in inputs]
        # The user's own code may read any of the model's tensors.
        reads_anything = call is None and not does_only_its_own(n)
        self._locate_fakes(self.model_tensors if reads_anything else (*inputs, *(call.tensors if call else ())))
        last_storage = self.storages.count
        self.meter.saved, self.meter.work = {}, Work()
        self.meter.watch_weights(self._weights_of(n))
        try:
            if self._is_scripted(n):  # compiled code learns the tensors that it is run on
                raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
            result = as_recorded(n.target) if isinstance(n.target, HostCall) else self._observed(n, super().run_node, n)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.meter.saved, self.meter.work, call = {}, Work(), None
            try:
                result = self._run_on_numbers(n)
            except Exception as error:
                raise TraceError(
                    f"{describe(n)} computes sizes from numbers, and does not run on made-up ones ({error}): hand it "
                    "lengths and indices as the model's inputs give them, or take the part behind it for root='...'."
                ) from error
        except Exception as error:
            specs = [_specs(self._without_abstract(self.env[source])) for source in n.all_input_nodes]
            raise TraceError(
                f"{describe(n)} cannot run on the shapes {[getattr(s, 'shape', s) for s in specs]}: {error}"
            ) from error
        # A module that a call of the dialect looks at is no value.
        record.value = None if isinstance(result, nn.Module) else _specs(result)
        record.work = self.meter.work
        kept = {self.storages.at(address, size): size for address, size in self.meter.saved.items()}
        saved = {storage: size for storage, size in kept.items() if not storage.own}
        mutates = list(dict.fromkeys(seen.storage for seen in before if seen.tensor._version != seen.version))
        for seen in before:
            if _visible(seen.tensor) != seen.visible or self.storages.of(seen.tensor) is not seen.storage:
                call = None  # an effect does not hold such changes of an input
                if not seen.storage.is_known_to_autograd:
                    raise CannotMake
        if self.memo is not None and call is not None:
            run = Run(result, record.value, saved, mutates, work=record.work, known=last_storage)
            effect = effect_of(call, run, self.storages)
            if effect is not None:
                self.memo[call.key] = effect
        return result, saved, mutates

    def _is_scripted(self, n: fx.Node) -> bool:
        """Whether a node runs TorchScript."""
        if n.op == "call_module":
            return bool(scripted_modules(self.module.get_submodule(str(n.target))))
        return isinstance(n.target, Scripted)

    def _observed(self, n: fx.Node, run: Callable[..., Any], *args: Any) -> Any:
        """Run a node while it is observed what autograd keeps, and which derivatives and hooks a module has.

        Functions of ``torch.func`` refuse that. Then all floats that leave are taken to be kept.
        """
        if n.op != "call_module":
            return run(*args)
        module, hooks = self.submodules[str(n.target)], Registrations()
        info(n).hooked = any("backward" in hooks_of(inner) for inner in module.modules())
        try:
            if not _is_users(module):
                return run(*args)
            with DerivativeWatch() as watch, watch_hooks(hooks):
                result = run(*args)
            info(n).derives = "autograd" if watch.seen else ""
            info(n).hooked |= hooks.on_values
            return result
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
        finally:
            hooks.remove()
        info(n).derives, self.meter.saved, self.meter.work = "transform", {}, Work()
        try:
            with self.meter.not_observing(), watch_hooks(hooks):
                result = run(*args)
        finally:
            hooks.remove()
        for tensor in tensors_in(result):
            if tensor.requires_grad:
                self.meter.keep(tensor)
        return result

    def _locate_fakes(self, tensors: Iterable[Any]) -> None:
        """Find out which storages the fakes of real tensors have.

        Operators made of others (linear) keep a view of the parameter's fake, which is the same one every time.
        """
        for tensor in tensors:
            if not isinstance(tensor, FakeTensor | Abstract):
                self.storages.convert(tensor)

    def _parameters(self, n: fx.Node) -> Iterator[nn.Parameter]:
        """Yield the parameters that a node itself reads."""
        if n.op == "call_module":
            yield from self.module.get_submodule(str(n.target)).parameters()
        elif n.op == "get_attr":
            value = self.fetch_attr(str(n.target))
            if isinstance(value, nn.Parameter):
                yield value

    def _made_of_weights(self, graph: fx.Graph) -> set[fx.Node]:
        """Return the nodes whose values are parameters, or are computed from nothing else."""
        made: set[fx.Node] = set()
        for node in graph.nodes:
            sources = node.all_input_nodes
            if list(self._parameters(node)) if node.op == "get_attr" else sources and made.issuperset(sources):
                made.add(node)
        return made

    def _weights_of(self, n: fx.Node) -> list[Tensor]:
        """Return the tensors of two or more dimensions that a node multiplies activations by."""
        own = list(self._parameters(n)) if n.op == "call_module" else []
        read = [self.env[source] for source in n.all_input_nodes if source in self.made_of_weights]
        return [t for t in (*own, *map(self._without_abstract, read)) if isinstance(t, Tensor) and t.dim() >= 2]

    def _run_on_numbers(self, n: fx.Node) -> Any:
        """Run a node on real tensors, because the shape of its result depends on numbers; return fakes of the result.

        Only a module kept whole, or a call of the dialect's own, can be such a node: tracing refuses all others. A copy
        of the module is run. Integers and masks, which may not be arbitrary, are the example's. What depends on more
        than inputs and buffers is made up: noise for floats, else zeros.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with unset_fake_temporarily():
            generator = torch.Generator().manual_seed(0)
            sources = {source: self._without_abstract(self.env[source]) for source in n.all_input_nodes}
            tensors = {source: t for source, t in sources.items() if isinstance(t, Tensor)}
            known = {s: t for s, t in tensors.items() if not (is_float(t) and t.requires_grad)}
            numbers_of = {id(fake): self._numbers(source) for source, fake in known.items()}

            def real(fake: Tensor) -> Tensor:
                numbers = numbers_of.get(id(fake))
                return numbers if numbers is not None else made_up(fake, generator)

            args, kwargs = pytree.tree_map_only(FakeTensor, real, (args, kwargs))
            if n.op == "call_module":
                module = deep_copy(self.module.get_submodule(str(n.target)))
                self.meter.ignore([*module.parameters(), *module.buffers()])
                result = self._observed(n, lambda: module(*args, **kwargs))
            else:
                result = self._observed(n, getattr(self, n.op), n.target, args, kwargs)
            leaves, spec = pytree.tree_flatten(result)
            detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        fakes = [
            self.fake_mode.from_tensor(bare).requires_grad_(leaf.requires_grad) if isinstance(bare, Tensor) else bare
            for bare, leaf in zip(detached, leaves, strict=True)
        ]
        return pytree.tree_unflatten(fakes, spec)

    def _numbers(self, wanted: fx.Node) -> Tensor | None:
        """Return a node's value for the example, in numbers; None if it depends on more than inputs and buffers."""
        needed = ancestors(wanted, input_graph(self.graph))
        if any(node.op == "call_module" or node in self.made_of_weights for node in needed):
            return None
        env: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node in needed and node.op == "placeholder":
                env[node] = pytree.tree_map_only(Tensor, torch.clone, self.inputs[str(node.target)])
            elif node in needed and node.op == "get_attr":
                env[node] = self.fetch_attr(str(node.target)).clone()
            elif node in needed:
                env[node] = getattr(self, node.op)(node.target, *fx.map_arg((node.args, node.kwargs), env.__getitem__))
        return env[wanted]


@dataclass(frozen=True)
class _Seen:
    """An input of a node before the node ran."""

    tensor: Tensor
    version: int
    visible: tuple[Any, ...]
    storage: Storage


def _visible(tensor: Tensor) -> tuple[Any, ...]:
    """Return what a node may change about an input besides its numbers: shape, strides, requires_grad."""
    return geometry(tensor), tensor.requires_grad


def _is_users(module: nn.Module) -> bool:
    """Whether the code of a module is not PyTorch's own."""
    return not type(module).__module__.startswith("torch.nn.")


def _specs(value: Any) -> Any:
    """Return a nested value with a TensorSpec in place of every tensor."""
    return pytree.tree_map_only(Tensor, spec_of, value)

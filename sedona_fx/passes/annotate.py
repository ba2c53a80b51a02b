"""TRACED -> what every node costs and touches, found without computing: a forward on fake tensors.

Fake tensors run the real operators' shape and aliasing rules, so shapes, in-place writes, views, the tensors that
autograd keeps for backward, and FLOPs come from PyTorch itself and not from tables of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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

from sedona_fx.cost import Meter
from sedona_fx.errors import TraceError
from sedona_fx.graph import Phase, TensorSpec, describe, info, operation
from sedona_fx.passes.base import graph_pass
from sedona_fx.passes.host import HostCall, Recorded
from sedona_fx.passes.watch import keep_modes, keep_state

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention, nn.RMSNorm)
_CHANNELS_SECOND_WORDS = ("conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "instance_norm")
_CHANNELS_LAST_WORDS = ("layer_norm", "linear", "rms_norm", "embedding", "addmm")
_STOPS = ("detach", "detach_")


@graph_pass(Phase.TRACED)
def annotate(gm: fx.GraphModule, inputs: Mapping[str, Any], *, training: bool) -> fx.GraphModule:
    """Fill in every node's value, parameters, FLOPs, bytes kept for backward, storages, writes and channel dimension.

    Args:
        gm: a TRACED graph. Only the records of its nodes change.
        inputs: placeholder name -> example value; shapes, dtypes and devices are used, numbers never.
        training: the mode the graph belongs to.

    Raises:
        TraceError: a node cannot run on these shapes.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {
        name: pytree.tree_map_only(Tensor, lambda t: fake_mode.from_tensor(t.detach()), value)
        for name, value in inputs.items()
    }
    with keep_state(gm), keep_modes(gm), fake_mode, torch.enable_grad():
        gm.train(training)
        runner = _Annotator(gm, fake_mode)
        runner.run(*(fakes[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"))
    _spread(gm)
    _refuse_forgotten_no_grad(gm)
    return gm


class _Annotator(fx.Interpreter):
    """Runs the graph on fake tensors and writes down what each node did."""

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        super().__init__(gm, garbage_collect_values=False)
        self.names = {p: name for name, p in gm.named_parameters()}  # tied parameters have one name
        own = [*gm.parameters(), *gm.buffers()]
        # Operators made of others (linear) keep a view of the parameter's fake, which is the same one every time.
        self.meter = Meter([*own, *map(fake_mode.from_tensor, own)])

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        with self.meter.measuring():
            return super().run(*args, enable_io_processing=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Hand out lists and dictionaries of Python's own: a function kept whole may write to what it is given."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        record = info(n)
        if n.op == "output":
            return super().run_node(n)
        before = [(t, t._version) for t in _tensors([self.env[a] for a in n.all_input_nodes])]
        self.meter.saved, flops = {}, self.meter.flops
        try:
            result = _as_recorded(n.target) if isinstance(n.target, HostCall) else super().run_node(n)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.meter.saved, self.meter.flops = {}, flops
            result = self._run_on_noise(n)
        except Exception as error:
            shapes = [_spec_tree(self.env[a]) for a in n.all_input_nodes]
            raise TraceError(
                f"{describe(n)} cannot run on the shapes {[getattr(s, 'shape', s) for s in shapes]}: {error}"
            ) from error
        record.value = _spec_tree(result)
        record.flops = self.meter.flops - flops
        record.saved = self.meter.saved
        record.storages = frozenset(t.untyped_storage()._cdata for t in _tensors(result))
        record.mutates = frozenset(t.untyped_storage()._cdata for t, version in before if t._version != version)
        read = list(self._parameters(n))
        record.parameters = tuple(self.names[parameter] for parameter in read)
        record.weighty = any(parameter.dim() >= 2 for parameter in read)
        return result

    def _parameters(self, n: fx.Node) -> Iterator[nn.Parameter]:
        if n.op == "call_module":
            yield from self.module.get_submodule(str(n.target)).parameters()
        elif n.op == "get_attr":
            value = self.fetch_attr(str(n.target))
            if isinstance(value, nn.Parameter):
                yield value

    def _run_on_noise(self, n: fx.Node) -> Any:
        """Run one module whose result depends on numbers for real, on made-up numbers, a copy of it, and for its shape.

        Only a module kept whole can be such a one: tracing refuses all others.
        """
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        with unset_fake_temporarily():
            noise = torch.Generator().manual_seed(0)
            args, kwargs = pytree.tree_map_only(FakeTensor, lambda t: _made_up(t, noise), (args, kwargs))
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


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if type(value) is tuple:
        return tuple(map(_mutable, value))
    if isinstance(value, immutable_dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def _as_recorded(call: HostCall) -> Any:
    """Return what a call into an untraced host gave for the example batch, on fake tensors."""

    def make(value: Any) -> Any:
        if not isinstance(value, Recorded):
            return value
        spec = value.spec
        return torch.empty(spec.shape, dtype=spec.dtype, device=spec.device).requires_grad_(value.requires_grad)

    return pytree.tree_map(make, call.recorded)


def _made_up(fake: Tensor, noise: torch.Generator) -> Tensor:
    if fake.dtype.is_floating_point:
        made = torch.randn(fake.shape, generator=noise).to(fake.dtype).to(fake.device)
        return made.requires_grad_(fake.requires_grad).clone()  # no leaf: the module may write to it
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


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
            record.channel_dim = _channel_dim(gm, node)


def _without_grad(node: fx.Node) -> bool:
    """Whether a node is a region under ``torch.no_grad()``, as ``torch.export`` keeps them."""
    return operation(node) == "wrap_with_set_grad_enabled" and node.args[0] is False


def _channel_dim(gm: fx.GraphModule, node: fx.Node) -> int | None:
    """Say which dimension holds the channels: as the last layer that has an opinion left it, permutations followed."""
    record = info(node)
    rank = len(record.value.shape)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, _CHANNELS_SECOND):
            return 1
        if isinstance(module, _CHANNELS_LAST):
            return rank - 1
    name = operation(node)
    if name in _CHANNELS_SECOND_WORDS:
        return 1
    if name in _CHANNELS_LAST_WORDS:
        return rank - 1
    sources = [info(a) for a in node.all_input_nodes if info(a).channel_dim is not None]
    if not sources:
        return None
    source = next((s for s in sources if len(s.value.shape) == rank), sources[0])
    assert source.channel_dim is not None
    moved = _permutation(gm, node, rank)
    if moved is not None:
        return moved.index(source.channel_dim)
    return _same_place(source.value.shape, source.channel_dim, record.value.shape)


def _permutation(gm: fx.GraphModule, node: fx.Node, rank: int) -> list[int] | None:
    """Return which source dimension each dimension of the result is, if the node permutes dimensions."""
    name = operation(node)
    if node.op == "call_module":
        dims = getattr(gm.get_submodule(str(node.target)), "dims", None)
        return [d % rank for d in dims] if isinstance(dims, (list, tuple)) and len(dims) == rank else None
    numbers = [a for a in pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(a, int)]
    if name == "permute" and len(numbers) == rank:
        return [d % rank for d in numbers]
    if name == "transpose" and len(numbers) == 2:
        order = list(range(rank))
        first, second = numbers[0] % rank, numbers[1] % rank
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _same_place(source: tuple[int, ...], channel_dim: int, result: tuple[int, ...]) -> int | None:
    """Find the channels again after an operation that keeps, pools, flattens or joins dimensions."""
    if len(source) == len(result):
        return channel_dim
    if len(result) == 2:  # flattened or pooled: what is not the batch is features
        return 1
    channels = source[channel_dim]
    if channel_dim == len(source) - 1:
        return len(result) - 1 if result[-1] == channels else None
    return 1 if len(result) > 1 and result[1] == channels else None

"""The last check of a trace: model and graph compute the same numbers from the same seed, buffers included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.blame import user_line
from sedona_fx.capture.state_watch import keep_state
from sedona_fx.data.args import Args, same_plain
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import device_of, keep_modes
from sedona_fx.ir.outputs import fields, map_tensors, without_objects
from sedona_fx.ir.region import region_of
from sedona_fx.rng import seed_all

_ADVICE = "Name the module in leaf_modules=[...] to keep it whole, or take the hidden state out of its forward."


def check_equal_forward(model: nn.Module, gm: fx.GraphModule, example: Args, *, training: bool) -> Any:
    """Run the model and its graph once from the same seed: outputs and buffers must be equal bit for bit.

    Objects in the output, which a graph cannot give (:func:`~sedona_fx.ir.outputs.without_objects`), are not compared.
    If the model has a ``torch.autograd.Function`` of the user's, whose backward a graph may have lost, or turns
    gradients off in places, the gradients of all parameters are compared as well. If it has autocast regions, the
    forward is compared under autocast as well.

    Args:
        model: its state and its modes are the same afterwards.
        gm: its graph for one mode; reads the same parameters and buffers.
        example: the inputs.
        training: the mode of the graph.

    Returns:
        What the model returned, tensors detached.

    Raises:
        TraceError: they differ; names the first module whose output does.
        DataError: the model itself cannot run the example.
    """
    mode = "train" if training else "eval"
    regions = [region for node in gm.graph.nodes if (region := region_of(node)) is not None]
    runs = _Runs(model, gm, example.bind(model.forward))
    with keep_modes(model):
        model.train(training)
        try:
            expected, buffers = runs.outcome(runs.run_model)
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} in {mode} mode cannot run the first batch {example!r}: "
                f"{type(error).__name__}: {error}{user_line(error)}. Check the shapes and dtypes of the data."
            ) from error
        try:
            actual, graph_buffers = runs.outcome(runs.run_graph)
        except Exception as error:
            raise TraceError(f"the {mode} graph of {type(model).__name__} does not run: {error}. {_ADVICE}") from error
        same_output = same_bits(without_objects(expected)[0], without_objects(actual)[0])
        if same_output and same_bits(buffers, graph_buffers):
            if runs.custom_functions or any(region.grad is not None for region in regions):
                _check_equal_gradients(runs)
            if any(region.casts for region in regions):
                _check_under_autocast(runs, mode)
            return expected
        place = _first_difference(runs)
    raise TraceError(
        f"the {mode} graph of {type(model).__name__} does not compute what the model computes{place}: its forward "
        f"does something that tracing cannot see (a branch on Python state, a value kept between calls). {_ADVICE}"
    )


class _Runs:
    """Runs of a model and of its graph, each on a copy of the same arguments.

    Attributes:
        custom_functions: names of the user's own ``torch.autograd.Function`` classes seen in runs so far.
    """

    def __init__(self, model: nn.Module, gm: fx.GraphModule, arguments: Mapping[str, Any]) -> None:
        self.model, self.gm, self.arguments = model, gm, arguments
        self.custom_functions: set[str] = set()

    def run_model(self) -> Any:
        return self.model(**map_tensors(torch.clone, self.arguments))

    def run_graph(self, call: Callable[..., Any] | None = None) -> Any:
        """Run the graph, or `call` on the values of its placeholders."""
        values = map_tensors(torch.clone, self.arguments)
        inputs = [values[str(node.target)] for node in self.gm.graph.nodes if node.op == "placeholder"]
        return (call if call is not None else self.gm)(*inputs)

    @contextmanager
    def same_start(self) -> Iterator[None]:
        """Seed the global generators, and undo what the body does to them and to the model's state."""
        with keep_state(self.model), torch.enable_grad():
            seed_all(0)
            yield

    def outcome(self, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """Return the detached output of a run, and copies of the buffers after it."""
        with self.same_start():
            result = run()
            self.custom_functions |= _custom_functions(result)
            return map_tensors(Tensor.detach, result), [buffer.detach().clone() for buffer in self.model.buffers()]

    def gradients(self, run: Callable[[], Any]) -> list[Tensor]:
        """Return a vector-Jacobian product of a run for every trainable parameter; the cotangents are noise.

        The noise is the same for runs that leave the generators in the same states.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with self.same_start():
            outputs: list[Tensor] = []
            map_tensors(outputs.append, run())
            roots = [output for output in outputs if output.requires_grad]
            cotangents = [torch.randn_like(root) for root in roots]
            if not roots:
                return []
            gradients = torch.autograd.grad(roots, parameters, cotangents, allow_unused=True)
            return [torch.zeros(()) if gradient is None else gradient for gradient in gradients]


def _custom_functions(output: Any) -> set[str]:
    """Return the names of the user's own autograd functions that the tensors of a nested value were computed with."""
    custom = torch.autograd.function.BackwardCFunction
    return {type(node).__name__.removesuffix("Backward") for node in autograd_nodes(output) if isinstance(node, custom)}


def autograd_nodes(value: Any) -> Iterator[Any]:
    """Yield the nodes of the autograd graphs of all tensors in a nested value, each once."""
    seen, stack = set[Any](), list[Any]()
    map_tensors(lambda t: stack.append(t.grad_fn), value)
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(source for source, _ in node.next_functions)


def _check_equal_gradients(runs: _Runs) -> None:
    """Raise TraceError unless graph and model have equal gradients, to rounding: a custom backward rounds otherwise."""
    wanted, found = runs.gradients(runs.run_model), runs.gradients(runs.run_graph)
    close = ((actual - expected).norm() <= 1e-3 * expected.norm() for expected, actual in zip(wanted, found))  # noqa: B905
    if len(wanted) != len(found) or not all(close):
        what, it = "places without gradients", "Put that code"
        if runs.custom_functions:
            names = ", ".join(sorted(runs.custom_functions))
            what, it = f"a backward of its own ({names}, a torch.autograd.Function)", "Put the function"
        raise TraceError(
            f"{type(runs.model).__name__} has {what} that the graph has lost: its gradients differ. {it} into a "
            "module and name that in leaf_modules=[...]."
        )


def _check_under_autocast(runs: _Runs, mode: str) -> None:
    """Raise TraceError if the graph computes something else than the model under autocast, where the model runs."""
    device = device_of(runs.model).type
    for dtype in (torch.bfloat16, torch.float16) if torch.amp.is_autocast_available(device) else ():
        with torch.autocast(device, dtype):
            try:
                expected, _ = runs.outcome(runs.run_model)
            except Exception:  # the model cannot run so, and nobody will run the net so
                continue
            try:
                actual, _ = runs.outcome(runs.run_graph)
                same = same_bits(without_objects(expected)[0], without_objects(actual)[0])
                place = "" if same else _first_difference(runs)
            except Exception as error:
                same, place = False, f": {error}"
        if not same:
            raise TraceError(
                f"under autocast to {dtype}, the {mode} graph of {type(runs.model).__name__} does not compute what "
                f"the model computes{place}: a part of its forward asks for dtypes or for autocast. {_ADVICE}"
            )


def same_bits(first: Any, second: Any) -> bool:
    """Return whether two nested values hold the same numbers, NaN equal to NaN.

    Types are not compared: a graph returns fx's own lists and dictionaries.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.shape == second.shape
            and first.dtype == second.dtype
            and (torch.equal(first, second) or torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)))
        )
    first_items, second_items = fields(first), fields(second)
    if first_items and first_items[0][0] is None:  # not nested
        return first is second or same_plain(first, second)
    return [key for key, _ in first_items] == [key for key, _ in second_items] and all(
        same_bits(a, b) for (_, a), (_, b) in zip(first_items, second_items, strict=True)
    )


def _first_difference(runs: _Runs) -> str:
    """Return ``" (first in 'layer1.0')"`` for the first module whose output differs between model and graph."""
    expected: dict[str, Any] = {}
    differing: list[str] = []

    def remember(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            expected.setdefault(path, map_tensors(lambda t: t.detach().clone(), output))

        return hook

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            region = region_of(n)
            with nullcontext() if region is None else region.entered():
                result = super().run_node(n)
            called = (str(n.target),) if n.op == "call_module" else ()
            for path in (*called, *info(n).returned_by):
                if "#" not in path and path in expected and not same_bits(expected.pop(path), result):
                    differing.append(path)
            return result

    handles = [m.register_forward_hook(remember(path)) for path, m in runs.model.named_modules() if path]
    try:
        runs.outcome(runs.run_model)
        for handle in handles:
            handle.remove()
        runs.outcome(lambda: runs.run_graph(Compare(runs.gm).run))
    except Exception:  # the name of the module only helps; the error itself is raised anyway
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f" (first in {differing[0]!r})" if differing else ""

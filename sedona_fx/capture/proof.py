"""The last check of a trace: model and graph compute the same numbers from the same seed, buffers included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.blame import user_line
from sedona_fx.capture.checkpoints import plain_checkpoints
from sedona_fx.capture.hooks import Registrations, hooked_modules, watch_hooks
from sedona_fx.capture.keep import keep_state
from sedona_fx.capture.whole.own_backward import raise_for_whole, watch_own_backwards
from sedona_fx.data.args import Args
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import device_of, keep_modes
from sedona_fx.ir.outputs import map_tensors, without_objects
from sedona_fx.ir.program import attribute
from sedona_fx.ir.region import region_of
from sedona_fx.ir.same_numbers import near, same_bits
from sedona_fx.rng import seed_all

_ADVICE = "Name the module in leaf_modules=[...] to keep it whole, or take the hidden state out of its forward."


def check_equal_forward(
    model: nn.Module, gm: fx.GraphModule, example: Args, *, training: bool, gradients: bool = False
) -> Any:
    """Run the model and its graph once from the same seed: outputs and buffers must be equal bit for bit.

    Objects in the output, which a graph cannot give (:func:`~sedona_fx.ir.outputs.without_objects`), are not compared.
    The gradients of all parameters are compared as well, to rounding, if a graph may have lost what changes them: if
    the model has a ``torch.autograd.Function`` of the user's, if backward hooks hang on its modules, if its forward
    registers hooks or turns gradients off in places, or if the caller says so. If it has autocast regions, the
    forward is compared under autocast as well.

    Args:
        model: its state and its modes are the same afterwards.
        gm: its graph for one mode; reads the same parameters and buffers.
        example: the inputs.
        training: the mode of the graph.
        gradients: whether gradients are compared in any case.

    Returns:
        What the model returned, tensors detached.

    Raises:
        TraceError: they differ; names the first module whose output does.
        DataError: the model itself cannot run the example.
    """
    mode = "train" if training else "eval"
    regions = [region for node in gm.graph.nodes if (region := region_of(node)) is not None]
    runs = _Runs(model, gm, example.bind(model.forward))
    gradients = gradients or bool(hooked_modules(model, "backward"))
    with keep_modes(model):
        model.train(training)
        try:
            expected = runs.outcome(runs.run_model, gradients=gradients)
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} in {mode} mode cannot run the first batch {example!r}: "
                f"{type(error).__name__}: {error}{user_line(error)}. Check the shapes and dtypes of the data."
            ) from error
        if training and runs.frozen_checkpoints:
            raise TraceError(
                f"a reentrant checkpoint of {type(model).__name__}{runs.frozen_checkpoints[0]} has no input that needs "
                "a gradient, so that PyTorch would give none to the layers inside. Write use_reentrant=False."
            )
        try:
            actual = runs.outcome(runs.run_graph, gradients=gradients)
        except Exception as error:
            raise TraceError(f"the {mode} graph of {type(model).__name__} does not run: {error}. {_ADVICE}") from error
        same_output = same_bits(without_objects(expected.output)[0], without_objects(actual.output)[0])
        if same_output and same_bits(expected.buffers, actual.buffers):
            without_grad = any(region.grad is not None for region in regions)
            if not gradients and (runs.custom_functions or runs.hooks or without_grad):
                again = (runs.outcome(run, gradients=True) for run in (runs.run_model, runs.run_graph))
                _check_equal_gradients(runs, mode, *again)
            elif gradients:
                _check_equal_gradients(runs, mode, expected, actual)
            if any(region.casts for region in regions):
                _check_under_autocast(runs, mode)
            return expected.output
        place = _first_difference(runs)
    raise TraceError(
        f"the {mode} graph of {type(model).__name__} does not compute what the model computes{place}: its forward "
        f"does something that tracing cannot see (a branch on Python state, a value kept between calls). {_ADVICE}"
    )


@dataclass(frozen=True)
class _Outcome:
    """What one run gives.

    Attributes:
        output: of the run, tensors detached.
        buffers: copies of the model's buffers after it.
        gradients: name of a parameter -> its gradient, or the error of the backward.
    """

    output: Any
    buffers: list[Tensor]
    gradients: dict[str, Tensor] | Exception


class _Runs:
    """Runs of a model and of its graph, each on a copy of the same arguments.

    Attributes:
        custom_functions: names of the user's own ``torch.autograd.Function`` classes seen in runs so far.
        hooks: what runs did so far that may change gradients, in words that follow on "its forward".
        frozen_checkpoints: lines of the last run with a reentrant checkpoint none of whose inputs needs a gradient.
    """

    def __init__(self, model: nn.Module, gm: fx.GraphModule, arguments: Mapping[str, Any]) -> None:
        self.model, self.gm, self.arguments = model, gm, arguments
        self.custom_functions: set[str] = set()
        self.hooks: list[str] = []
        self.frozen_checkpoints: list[str] = []

    def run_model(self) -> Any:
        return self.model(**map_tensors(torch.clone, self.arguments))

    def run_graph(self, call: Callable[..., Any] | None = None) -> Any:
        """Run the graph, or `call` on the values of its placeholders."""
        values = map_tensors(torch.clone, self.arguments)
        inputs = [values[str(node.target)] for node in self.gm.graph.nodes if node.op == "placeholder"]
        return (call if call is not None else self.gm)(*inputs)

    @contextmanager
    def same_start(self) -> Iterator[None]:
        """Seed the global generators, and undo what the body does to them and to the model's state, hooks included."""
        registrations = Registrations()
        try:
            with (
                keep_state(self.model),
                torch.enable_grad(),
                watch_hooks(registrations),
                plain_checkpoints() as self.frozen_checkpoints,
            ):
                seed_all(0)
                yield
        finally:
            registrations.remove()
            self.hooks += [*registrations.gradient_hooks, *registrations.saved_tensors]

    def outcome(self, run: Callable[[], Any], *, gradients: bool = False, rounded: bool = False) -> _Outcome:
        """Return what a run gives; the cotangents of its gradients are noise.

        The noise is the same for runs that leave the generators in the same states.

        Args:
            run: a run of the model or of its graph.
            gradients: whether gradients are computed.
            rounded: change every cotangent by a few units in the last place.
        """
        with self.same_start():
            result = run()
            self.custom_functions |= _custom_functions(result)
            buffers = [buffer.detach().clone() for buffer in self.model.buffers()]
            found: dict[str, Tensor] | Exception = {}
            if gradients:
                try:
                    found = self._gradients(without_objects(result)[0], rounded=rounded)
                except Exception as error:
                    found = error
            return _Outcome(map_tensors(Tensor.detach, result), buffers, found)

    def _gradients(self, result: Any, *, rounded: bool) -> dict[str, Tensor]:
        """Return name -> a vector-Jacobian product of an output for every trainable parameter."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        outputs: list[Tensor] = []
        map_tensors(outputs.append, result)
        roots = [output for output in outputs if output.requires_grad]
        if not roots or not parameters:
            return {}
        cotangents = [torch.randn_like(root) for root in roots]
        if rounded:
            cotangents = [c * (1 + 4 * torch.finfo(c.dtype).eps * torch.randn_like(c)) for c in cotangents]
        gradients = torch.autograd.grad(roots, list(parameters.values()), cotangents, allow_unused=True)
        return {
            name: torch.zeros(()) if gradient is None else gradient.to_dense() if gradient.is_sparse else gradient
            for name, gradient in zip(parameters, gradients, strict=True)
        }


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


def _check_equal_gradients(runs: _Runs, mode: str, of_model: _Outcome, of_graph: _Outcome) -> None:
    """Raise TraceError unless graph and model have equal gradients, to rounding: a captured backward rounds otherwise.

    A gradient that is zero but for rounding (of a bias before BatchNorm) is known by what a change of the last place in
    the cotangents does to it. A model that has no backward itself is not compared.
    """
    expected, actual = of_model.gradients, of_graph.gradients
    if isinstance(expected, Exception):
        return
    if isinstance(actual, Exception):
        raise TraceError(
            f"the backward of the {mode} graph of {type(runs.model).__name__} does not run: {actual}. {_ADVICE}"
        ) from actual
    if runs.custom_functions and not same_bits(expected, actual):
        _keep_own_backwards(runs)
    suspects = [name for name, gradient in expected.items() if not near(gradient, actual.get(name), 1e-3)]
    again = runs.outcome(runs.run_model, gradients=True, rounded=True).gradients if suspects else {}
    assert not isinstance(again, Exception)
    for name in suspects:
        noise = (again[name] - expected[name]).norm()
        if name in actual and (actual[name] - expected[name]).norm() <= 25 * noise:
            continue
        if runs.custom_functions:
            raise TraceError(
                f"{type(runs.model).__name__} has a backward of its own ({', '.join(sorted(runs.custom_functions))}, a "
                "torch.autograd.Function) that the graph has lost: its gradients differ. Put the function into a "
                "module and name that in leaf_modules=[...]."
            )
        hooks = f" Its forward {runs.hooks[0]}." if runs.hooks else ""
        raise TraceError(
            f"the gradients of the {mode} graph of {type(runs.model).__name__} are not the model's (first that of "
            f"{name!r}): something changes them that tracing cannot see, such as a hook.{hooks} {_ADVICE}"
        )


def _keep_own_backwards(runs: _Runs) -> None:
    """Raise NeedsTensors if a module that is not kept whole has a backward of its own, not derived from its forward.

    The graph's may be the same but for rounding. It costs nothing to have the same bits.
    """
    with watch_own_backwards(runs.model) as found:
        runs.outcome(runs.run_model)
    raise_for_whole(found, [str(node.target) for node in runs.gm.graph.nodes if node.op == "call_module"])


def _check_under_autocast(runs: _Runs, mode: str) -> None:
    """Raise TraceError if the graph computes something else than the model under autocast, where the model runs."""
    device = device_of(runs.model).type
    for dtype in (torch.bfloat16, torch.float16) if torch.amp.is_autocast_available(device) else ():
        with torch.autocast(device, dtype):
            try:
                expected = runs.outcome(runs.run_model).output
            except Exception:  # the model cannot run so, and nobody will run the net so
                continue
            try:
                actual = runs.outcome(runs.run_graph).output
                same = same_bits(without_objects(expected)[0], without_objects(actual)[0])
                place = "" if same else _first_difference(runs)
            except Exception as error:
                same, place = False, f": {error}"
        if not same:
            raise TraceError(
                f"under autocast to {dtype}, the {mode} graph of {type(runs.model).__name__} does not compute what "
                f"the model computes{place}: a part of its forward asks for dtypes or for autocast. {_ADVICE}"
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
        def fetch_attr(self, target: str) -> Any:
            return attribute(self.module, target)

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

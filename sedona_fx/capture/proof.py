"""The last proof behind a trace: one forward gives the same numbers as the model's, buffers included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.blame import user_line
from sedona_fx.capture.state_watch import keep_state
from sedona_fx.data.args import Args, same_plain
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.graph import info
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import fields, map_tensors, without_objects
from sedona_fx.rng import seed_all

_ADVICE = "Name the module in leaf_modules=[...] to keep it whole, or take the hidden state out of its forward."


def check_equal_forward(model: nn.Module, gm: fx.GraphModule, example: Args, *, training: bool) -> Any:
    """Run the model and its graph once from the same seed: outputs and buffers must be equal bit for bit.

    Objects in the output, which a graph cannot give (:func:`~sedona_fx.ir.outputs.without_objects`), are not compared.
    Where the model has a backward of its own (``torch.autograd.Function``), which a graph may have lost, the gradients
    of all parameters are compared as well.

    Returns:
        What the model returned.

    Raises:
        TraceError: they are not; with the first module whose output differs.
        DataError: the model itself cannot run the example.
    """
    mode = "train" if training else "eval"
    given = example.bind(model.forward)

    def run_model() -> Any:
        return model(**map_tensors(torch.clone, given))

    def run_graph(call: Callable[..., Any] = gm) -> Any:
        inputs = map_tensors(torch.clone, given)
        return call(*[inputs[str(node.target)] for node in gm.graph.nodes if node.op == "placeholder"])

    custom: set[str] = set()

    def run(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        with keep_state(model), torch.enable_grad():
            seed_all(0)
            result = call()
            custom.update(_custom_functions(result))
            return map_tensors(Tensor.detach, result), [buffer.detach().clone() for buffer in model.buffers()]

    with keep_modes(model):
        model.train(training)
        try:
            expected, buffers = run(run_model)
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} in {mode} mode cannot run the first batch {example!r}: "
                f"{type(error).__name__}: {error}{user_line(error)}. Check the shapes and dtypes of the data."
            ) from error
        try:
            actual, graph_buffers = run(run_graph)
        except Exception as error:
            raise TraceError(f"the {mode} graph of {type(model).__name__} does not run: {error}. {_ADVICE}") from error
        (wanted, _), (found, _) = without_objects(expected), without_objects(actual)
        if same_bits(wanted, found) and same_bits(buffers, graph_buffers):
            if custom:
                _check_equal_gradients(model, run_model, run_graph, custom)
            return expected
        place = _first_difference(model, gm, lambda: run(run_model), lambda call: run(lambda: run_graph(call)))
    raise TraceError(
        f"the {mode} graph of {type(model).__name__} does not compute what the model computes{place}: its forward "
        f"does something that tracing cannot see (a branch on Python state, a value kept between calls). {_ADVICE}"
    )


def _custom_functions(result: Any) -> set[str]:
    """Return the names of the user's own autograd functions behind the tensors of a nested value."""
    own = torch.autograd.function.BackwardCFunction
    return {type(node).__name__.removesuffix("Backward") for node in nodes_behind(result) if isinstance(node, own)}


def nodes_behind(value: Any) -> Iterator[Any]:
    """Yield the nodes of autograd's graph behind the tensors of a nested value, each once."""
    seen, todo = set[Any](), list[Any]()
    map_tensors(lambda t: todo.append(t.grad_fn), value)
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo.extend(below for below, _ in node.next_functions)


def _check_equal_gradients(
    model: nn.Module, run_model: Callable[[], Any], run_graph: Callable[[], Any], custom: set[str]
) -> None:
    """Raise unless the graph has the model's gradients, to rounding: a backward of one's own may round differently."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(call: Callable[[], Any]) -> list[Tensor]:
        with keep_state(model), torch.enable_grad():
            seed_all(0)
            outputs: list[Tensor] = []
            map_tensors(outputs.append, call())
            roots = [output for output in outputs if output.requires_grad]
            noise = [torch.randn_like(root) for root in roots]
            found = torch.autograd.grad(roots, parameters, noise, allow_unused=True)
            return [torch.zeros(()) if g is None else g for g in found]

    for expected, actual in zip(gradients(run_model), gradients(run_graph), strict=True):
        if not (actual - expected).norm() <= 1e-3 * expected.norm():
            raise TraceError(
                f"{type(model).__name__} has a backward of its own ({', '.join(sorted(custom))}, a "
                "torch.autograd.Function) that the graph has lost: its gradients differ. Put the function into a "
                "module and name that in leaf_modules=[...]."
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
    a, b = fields(first), fields(second)
    if a and a[0][0] is None:  # not nested
        return first is second or same_plain(first, second)
    return [key for key, _ in a] == [key for key, _ in b] and all(
        same_bits(x, y) for (_, x), (_, y) in zip(a, b, strict=True)
    )


def _first_difference(
    model: nn.Module,
    gm: fx.GraphModule,
    run_model: Callable[[], Any],
    run_graph: Callable[[Callable[..., Any]], Any],
) -> str:
    """Return ``" (first in layer1.0)"`` for the first module whose output differs between model and graph."""
    expected: dict[str, Any] = {}

    def remember(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            expected.setdefault(path, map_tensors(lambda t: t.detach().clone(), output))

        return hook

    handles = [m.register_forward_hook(remember(path)) for path, m in model.named_modules() if path]
    differing: list[str] = []

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            own = (str(n.target),) if n.op == "call_module" else ()
            for path in (*own, *info(n).returned_by):
                if "#" not in path and path in expected and not same_bits(expected.pop(path), result):
                    differing.append(path)
            return result

    try:
        run_model()
        for handle in handles:
            handle.remove()
        run_graph(Compare(gm).run)
    except Exception:  # which module comes first is a help, not the error itself
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return f" (first in {differing[0]!r})" if differing else ""

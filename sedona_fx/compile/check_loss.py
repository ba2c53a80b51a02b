"""Try the losses of a net before anything is searched: on the model's own output, and on what a head gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.keep import keep_state
from sedona_fx.data.args import Args
from sedona_fx.data.sources import Pair, first_examples
from sedona_fx.errors import DataError, shape_text
from sedona_fx.ir.analysed import Analysed
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.outputs import Loss, Step, fields, named, pick


def check_target(
    model: nn.Module,
    traced: Analysed,
    target: Any,
    loss: Loss | None,
    *,
    heads: bool = False,
    searching: bool = False,
) -> None:
    """Try the loss on the model's own output, and on a head's, before anything is searched.

    The output of a few examples is at hand; repeated to the size of the batch, it tells most often. What fails so is
    tried on what the graph gives for the first batch.

    Args:
        model: the model whose modules the graphs run; its modes and state are as before afterwards.
        traced: what analysis found out about it.
        target: target of the example batch.
        loss: ``loss(output, target)``; None: nothing is checked.
        heads: whether heads are to be trained by this loss.
        searching: whether a search compares them, which gives them no field of the output.

    Raises:
        DataError: the loss does not take the target (with both shapes), does not return a scalar tensor, or reads
            fields of the output that a head does not give (with their names).
    """
    if loss is None:
        return
    output, wanted = traced.whole, target
    if output is None:
        output = traced.few
        wanted = first_examples(target, traced.example.batch_size(), 2) if traced.capture.free_batch else target
    try:
        _try_loss(traced, output, wanted, loss, heads=heads, searching=searching)
    except DataError:
        whole = _output(model, traced.train, traced.example, training=True)
        _try_loss(traced, whole, target, loss, heads=heads, searching=searching)


def check_validation(model: nn.Module, traced: Analysed, pair: Pair | None, loss: Loss) -> None:
    """Try the eval graph and the loss on the first batch of ``val_data``, before a search trains for long.

    Args:
        model: as for :func:`check_target`.
        traced: what analysis found out about it.
        pair: the first batch on the model's device, or None if there is none.
        loss: ``loss(output, target)``.

    Raises:
        DataError: there is no batch, or the model or the loss cannot take it.
    """
    if pair is None:
        raise DataError(
            "val_data is empty: hand at least one (inputs, target) batch, or leave it out, then data is split 60/40."
        )
    inputs, target = pair
    try:
        with torch.no_grad():
            traced.output.final_loss(loss, _output(model, traced.eval, inputs, training=False), target)
    except Exception as error:
        shape = shape_text(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise DataError(
            f"the model or the loss cannot take the first batch of val_data, {inputs!r} with the target {shape}: "
            f"{type(error).__name__}: {error}. It has to be like data's, examples and all."
        ) from error


def _output(model: nn.Module, graph: fx.GraphModule, inputs: Args, *, training: bool) -> Any:
    """Return what the graph of a mode gives for a batch; modes, buffers and random states are as before afterwards."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    with keep_modes(model), keep_state(model), torch.no_grad():
        model.train(training)
        return graph(*(inputs.kwargs[name] for name in names))


def _try_loss(traced: Analysed, output: Any, target: Any, loss: Loss, *, heads: bool, searching: bool) -> None:
    primary = pick(output, traced.output.key)
    try:
        with torch.no_grad():
            value = traced.output.final_loss(loss, output, target)
    except Exception as error:
        shape = f"{tuple(target.shape)} {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        left_out = ", ".join(traced.capture.left_out)
        missing = f" Of the output, {left_out} is None, as no graph gives it." if left_out else ""
        raise DataError(
            f"the loss cannot take the model's output, {tuple(primary.shape)} {primary.dtype}, with the target, "
            f"{shape} (of the first batch): {type(error).__name__}: {error}. It is called as loss(output, target); "
            f"hand another with loss=..., or mend the targets.{missing}"
        ) from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise DataError(
            f"loss(output, target) must return a scalar tensor, not {getattr(value, 'shape', value)!r}. Return the "
            "mean over the batch, as a tensor."
        )
    if heads and not traced.output.bare and primary.dim():  # no head imitates a single number, as will be said
        _try_head_output(traced.output, output, target, loss, searching=searching)


def _try_head_output(form: OutputFormat, output: Any, target: Any, loss: Loss, *, searching: bool) -> None:
    """Try the loss on what a head gives: the primary output in the model's output type, what it is given, else None.

    Raises:
        DataError: the loss cannot take that; names the fields that it reads.
    """
    given = dict(fields(output))

    def reason(values: Mapping[Step, Any]) -> str:
        """Return why the loss cannot take an output with these fields, or ``""`` if it can."""
        try:
            with torch.no_grad():
                value = loss(form.wrap(pick(output, form.key), values), target)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if isinstance(value, Tensor) and value.dim() == 0:
            return ""
        return f"it returns {type(value).__name__ if not isinstance(value, Tensor) else tuple(value.shape)}"

    at_hand = {key: given[key] for key in form.given}
    why = reason({} if searching else at_hand)
    if not why:
        return
    if searching and at_hand and not reason(at_hand):
        raise DataError(
            f"the loss reads {', '.join(map(repr, at_hand))} of the output, which a search that compares heads does "
            "not hand to them. Choose cuts by rule (search='balanced'), by name (cuts=[...]), or by a plan."
        )
    others = {key: value for key, value in given.items() if key != form.first and value is not None}
    unknown = [key for key in others if key not in form.given]
    read = [key for key in unknown if reason({k: v for k, v in others.items() if k != key})]
    names = ", ".join(map(repr, read or unknown or others)) or "other fields"
    raise DataError(
        f"the loss reads {names} of the output, which no head gives: a head imitates the primary output "
        f"({named(form.key)!r}), and every other field is None then ({why.rstrip('.')}). Write the loss on that field "
        "alone, or leave out fields that are None; if it is a target, compute it before the step and hand it over as "
        "one, or if weights compute it (a momentum encoder), in forward under torch.no_grad() from the inputs alone; "
        "name another primary output with output=...; give blocks with heads an objective of their own, "
        "local_loss=sedona_fx.LocalLoss(loss, head); or take heads=False, for Backprop and Delayed."
    )

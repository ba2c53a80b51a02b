"""``evaluate``: the mean loss, the accuracy and metrics of a net's final output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sedona_fx.data.sources import batches, to_device
from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import Loss, pick
from sedona_fx.net.net import Net
from sedona_fx.net.wrapped import require_net

Metric = Callable[[Any, Any], Any]
"""A number on the output of the model and the target: ``metric(output, target)``, a scalar tensor or a number."""


def evaluate(
    net: Net, loader: Any, *, val_loss: Loss | None = None, metrics: Mapping[str, Metric] | None = None
) -> dict[str, float]:
    """Return the mean loss of the final output in eval mode, the accuracy where the targets are classes, and metrics.

    The mean is over examples, for a loss or metric that is itself a mean over the examples of a batch. Afterwards every
    module is in the mode in which it was before.

    Args:
        net: the net.
        loader: an iterable of (inputs, target).
        val_loss: called as the training's loss is, ``val_loss(output, target)``; None: the training's own. Give one
            where that smooths labels, or takes soft targets (mixup) that the evaluation data does not have.
        metrics: name -> a function of what the model returns and the target. ``"accuracy"`` takes the place of the
            built-in one.

    Returns:
        ``"loss"``; ``"accuracy"`` in [0, 1] if all targets are integers of shape (N,) and outputs are (N, classes); and
        the metrics by name.

    Raises:
        DataError: the loader is empty, or the training's loss does not take its targets.
        OutputError: `val_loss` or a metric returns something other than a number.
        ScheduleError: a metric has no name of its own, or is not to be called.
    """
    require_net(net, "evaluate")
    check_evaluation(val_loss, metrics)
    device, last = net.blocks[0].device, net.blocks[-1]
    total = correct = 0.0
    sums = dict.fromkeys(["loss", *(metrics or {})], 0.0)
    classes = "accuracy" not in sums
    with keep_modes(net), torch.no_grad():
        net.eval()
        for args, target in batches(loader, "the evaluation data"):
            target = to_device(target, last.device)
            output = net.call(args.map(lambda t: t.to(device)))
            count = args.batch_size() or 1
            if val_loss is not None:
                loss = _number("val_loss", net.engine.output.final_loss(val_loss, output, target))
            else:
                loss = _training_loss(net, output, target)
            sums["loss"] += loss * count
            for name, metric in (metrics or {}).items():
                sums[name] += _number(f"the metric {name!r}", metric(output, target)) * count
            total += count
            primary = output if isinstance(output, Tensor) else pick(output, net.engine.output.key)
            classes = classes and _is_class_target(primary, target)
            if classes:
                correct += (primary.argmax(1) == target).sum().item()
    if not total:
        raise DataError("the evaluation data is empty, or an iterator that is exhausted: hand a DataLoader or a list.")
    means = {name: value / total for name, value in sums.items()}
    return {"loss": means.pop("loss"), **({"accuracy": correct / total} if classes else {}), **means}


def check_evaluation(val_loss: Any, metrics: Any) -> None:
    """Check ``val_loss=`` and ``metrics=``.

    Raises:
        ScheduleError: they are not what :func:`evaluate` takes.
    """
    if val_loss is not None and not callable(val_loss):
        raise ScheduleError(f"val_loss= takes a function of output and target, not {type(val_loss).__name__}.")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ScheduleError(f"metrics= takes a mapping from name to function, not {type(metrics).__name__}.")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or name == "loss" or not callable(metric):
            raise ScheduleError(
                f"metrics= holds {name!r}: {type(metric).__name__}. It takes texts other than 'loss', which val_loss= "
                "is for, and functions of output and target."
            )


def _training_loss(net: Net, output: Any, target: Any) -> float:
    try:
        return net.engine.local_loss(net.blocks[-1], output, target).item()
    except (DataError, ScheduleError) as error:
        raise type(error)(
            f"{error} The evaluation takes the training's loss; val_loss=... gives it one of its own."
        ) from error.__cause__


def _number(who: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item())
    if isinstance(value, (int, float)):
        return float(value)
    shape = f"{tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise OutputError(f"{who} must return a number or a scalar tensor, not {type(value).__name__}{shape}.")


def _is_class_target(primary: Tensor, target: Any) -> bool:
    if not isinstance(target, Tensor) or target.is_floating_point():
        return False
    return primary.dim() == 2 and primary.shape[1] > 1 and target.dim() == 1

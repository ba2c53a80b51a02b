"""``evaluate``: the mean loss and the accuracy of a net's final output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedona_fx.data.sources import batches, to_device
from sedona_fx.errors import DataError
from sedona_fx.ir.modules import keep_modes
from sedona_fx.ir.outputs import pick
from sedona_fx.net.net import Net
from sedona_fx.net.wrapped import require_net


def evaluate(net: Net, loader: Any) -> dict[str, float]:
    """Return the mean loss of the final output in eval mode, and the accuracy where the targets are classes.

    The mean is over examples, for a loss that is itself a mean over the examples of a batch. Afterwards every module is
    in the mode in which it was before.

    Args:
        net: the net.
        loader: an iterable of (inputs, target).

    Returns:
        ``"loss"``, and ``"accuracy"`` in [0, 1] if all targets are integers of shape (N,) and outputs are (N, classes).

    Raises:
        DataError: the loader is empty.
    """
    require_net(net, "evaluate")
    device = net.blocks[0].device
    total = correct = loss = 0.0
    classes = True
    with keep_modes(net), torch.no_grad():
        net.eval()
        for args, target in batches(loader, "the evaluation data"):
            target = to_device(target, net.blocks[-1].device)
            output = net.call(args.map(lambda t: t.to(device)))
            count = args.batch_size() or 1
            loss += net.engine.local_loss(net.blocks[-1], output, target).item() * count
            total += count
            primary = output if isinstance(output, Tensor) else pick(output, net.engine.output.key)
            classes = classes and _is_class_target(primary, target)
            if classes:
                correct += (primary.argmax(1) == target).sum().item()
    if not total:
        raise DataError("the evaluation data is empty, or an iterator that is exhausted: hand a DataLoader or a list.")
    return {"loss": loss / total, **({"accuracy": correct / total} if classes else {})}


def _is_class_target(primary: Tensor, target: Any) -> bool:
    if not isinstance(target, Tensor) or target.is_floating_point():
        return False
    return primary.dim() == 2 and primary.shape[1] > 1 and target.dim() == 1

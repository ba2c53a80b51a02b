"""Reports as text: numbers with units, tables, and what ``print(net)`` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sedona_fx.ir.cost import Cost
from sedona_fx.plan import Plan

UNEVEN = 1.5
"""A largest block with more than this many times an even share is told of."""


def human(count: float, unit: str = "") -> str:
    """Return a number with three significant digits and a metric prefix: ``1.7 M``, ``33.6 MB``."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}{unit}".strip()
        count /= 1000
    return f"{count:.3g} T{unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a plain text table, the first column left-aligned, the others right-aligned.

    Args:
        head: the titles of the columns.
        rows: the cells of each row, as many as there are columns.
    """
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def largest_block(costs: Sequence[Cost]) -> tuple[int, float, str]:
    """Return the largest of some blocks, its share of them all, and of what: FLOPs, or where none are counted, bytes.

    Args:
        costs: of the blocks.
    """
    what, values = "FLOPs", [cost.flops for cost in costs]
    if not any(values):
        what, values = "activation bytes", [cost.activation_bytes for cost in costs]
    largest = max(values)
    return values.index(largest), largest / max(1, sum(values)), what


def net_report(
    plan: Plan,
    costs: Sequence[Cost],
    devices: Sequence[torch.device],
    shared: Mapping[str, Sequence[int]],
    uneven: str = "",
) -> str:
    """Return a description of a net: a line per block with its cut, head, parameters, FLOPs, activations and device.

    Args:
        plan: of the net.
        costs: of its K blocks. FLOPs are of one forward pass of the example batch; activation bytes are what autograd
            saves of it for the backward pass, the head included.
        devices: of its K blocks.
        shared: names of the parameters that several blocks use -> the indices of these blocks.
        uneven: why the largest block is large, and what would help.
    """
    batch = next(iter(plan.inputs.values()), None)
    shape = tuple(batch["shape"]) if isinstance(batch, dict) and "shape" in batch else "?"
    source = plan.provenance.get("search", "plan")
    ends = [*(f"behind {cut}" for cut in plan.cuts), "the model's output"]
    heads = [*(head or "none" for head in plan.heads), "-"]
    rows = [
        [
            str(index),
            ends[index],
            heads[index],
            human(cost.parameters),
            human(cost.flops),
            human(cost.activation_bytes, "B"),
            str(device),
        ]
        for index, (cost, device) in enumerate(zip(costs, devices, strict=True))
    ]
    titles = ["block", "ends", "head", "parameters", "FLOPs", "activations", "device"]
    index, share, what = largest_block(costs)
    even = f"; an even share is {1 / len(costs):.0%}" if len(costs) > 1 else ""
    largest = f"largest block: {index}, with {share:.0%} of the {what}{even}" + (uneven and f"\n{uneven}")
    notes = "".join(f"\n{name} in blocks {', '.join(map(str, blocks))}" for name, blocks in shared.items())
    if shared:
        notes = f"\nshared parameters, stepped once, with the sum of their gradients, by their last block:{notes}"
    if plan.capture is not None and plan.capture.left_out:
        notes += f"\nNone in the output, as no graph gives it: {', '.join(plan.capture.left_out)}"
    if plan.capture is not None and plan.capture.fixed_sizes:
        notes += f"\nsizes: {_sizes(plan)}"
    operators = dict.fromkeys(name for cost in costs for name in cost.uncounted)
    for name in operators:
        where = ", ".join(str(index) for index, cost in enumerate(costs) if name in cost.uncounted)
        notes += (
            f"\nFLOPs of {name} (block {where}) are estimated from its bytes, as there is no formula for it; "
            "torch.utils.flop_counter.register_flop_formula takes one"
        )
    loss = f", loss {plan.loss}" if plan.loss is not None else ""
    own = [f"\n  block {k}: {name}" for k, name in enumerate(plan.local_losses or ()) if name is not None]
    if own:
        notes += f"\nlocal losses in place of the net's:{''.join(own)}"
    title = f"{plan.model}: {plan.blocks} blocks, cut by {source}, inputs {shape}{loss}"
    return f"{title}\n{table(titles, rows)}\n{largest}{notes}"


def _sizes(plan: Plan) -> str:
    """Return which sizes of the inputs of a captured model are free: ``"ids (any, 2 or more), image (any, 3, 8)"``."""
    assert plan.capture is not None
    free = {(size.name, size.dim): size for size in plan.capture.free_sizes}
    texts = []
    for name, spec in plan.inputs.items():
        if isinstance(spec, dict) and spec.keys() == {"shape", "dtype"}:
            sizes = ["any" if dim == 0 and plan.capture.free_batch else str(n) for dim, n in enumerate(spec["shape"])]
            for dim in range(len(sizes)):
                if (name, dim) in free:
                    sizes[dim] = free[name, dim].text
            texts.append(f"{name} ({', '.join(sizes)})")
    return ", ".join(texts) + "; all others are fixed"


def in_units(measure: str, values: Sequence[float]) -> tuple[list[float], str]:
    """Return values in the unit that suits the largest of them (MiB, MFLOPs, ms, ...), and the name of the unit.

    Args:
        measure: what the values are, one of the names of the limits; its last word is their unit (bytes, FLOPs or
            seconds).
        values: at least 0.
    """
    largest = max(values, default=0.0)
    units = {"bytes": (2**10, ["B", "KiB", "MiB", "GiB"]), "flops": (1e3, ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs"])}
    base, names = units.get(measure.rpartition("_")[2], (1e-3, ["s", "ms"]))
    scale, unit = 1.0, names[0]
    for name in names[1:]:
        if (largest / scale >= base) if base > 1 else largest / scale < 1:
            scale, unit = scale * base, name
    return [value / scale for value in values], unit

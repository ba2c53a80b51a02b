"""What a head has to fit behind a cut: shapes with the batch first, dtypes, and how the model itself has both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from sedona_fx.heads import fit
from sedona_fx.heads.context import HeadContext, HeadDtypes, NoOutput
from sedona_fx.heads.rows import Arrangement, Rows, shape_after
from sedona_fx.ir.graph import NodeInfo, TensorSpec, info
from sedona_fx.ir.outputs import Key
from sedona_fx.ir.rows.reach import reaches_all
from sedona_fx.passes.crossings import primary_node, read_token
from sedona_fx.passes.cuts import cut_name

_WITHOUT_HEADS = "heads=False and a schedule that needs none (Backprop, Delayed)"
_SIMILARITIES = (
    "Give the blocks an embedding of each example, and your own loss on the similarities of these: "
    'local_loss=sedona_fx.LocalLoss(lambda e, inputs, target: loss(e @ e.t(), target), head="embedding"); or take '
    f"{_WITHOUT_HEADS}"
)
_OBJECTIVE = (
    f"Give the blocks an objective of their own: local_loss=sedona_fx.LocalLoss(loss, head); or take {_WITHOUT_HEADS}"
)


def context_of(train: fx.GraphModule, output: Key, primary: TensorSpec) -> Callable[[fx.Node], HeadContext]:
    """Return the function that says what a head has to fit behind a node where a block can end.

    Args:
        train: the annotated train graph, in which is known where activations hold the batch.
        output: the user's key of the primary output.
        primary: the shape of the primary output.
    """
    token, tokens = read_token(train.graph, output)
    no_output, rows = _no_output(train, output)
    dtypes = list(dict.fromkeys(p.dtype for p in train.parameters() if p.is_floating_point()))

    @functools.cache
    def context(node: fx.Node) -> HeadContext:
        record = info(node)
        place = HeadContext(
            shape=record.value.shape,
            output_shape=primary.shape,
            place=cut_name(record),
            dtypes=_head_dtypes(dtypes, record.value, primary),
            no_output=no_output,
        )
        moved = record.rows or Rows()
        plain = Arrangement(moved, rows if record.rows is not None else Rows())
        found = _arranged(place, record, plain)
        if not plain.by_row and moved.each > 1 and no_output is None and not fit.ladder(found):
            averaged = _arranged(place, record, replace(plain, mean=True))
            found = averaged if fit.ladder(averaged) else found
        in_order = moved in (Rows(), Rows(1)) and plain.output.each == 1
        if in_order and len(found.shape) == 3 and found.shape[1] == tokens:
            found = replace(found, token=token if reaches_all(train, node, 1 - moved.dim, token) else None)
        return found

    return context


def _arranged(place: HeadContext, record: NodeInfo, how: Arrangement) -> HeadContext:
    """Return the context of a place with the batch first.

    Args:
        place: the context with the shapes of the model.
        record: of the node at the place.
        how: where the batch is, and whether the rows of an example are averaged.
    """
    moved = shape_after(replace(how.activation, each=1).unfolded, record.value.shape)
    channels, dim = record.channel_dim, how.activation.dim
    if channels is None or channels == dim:
        # If no layer says otherwise, the last of three dimensions holds the channels, as in tokens.
        channels = 2 if len(moved) == 3 else 1
    elif channels < dim:
        channels += 1
    unfolds = not how.by_row and how.activation.each > 1 and not how.mean
    frames = unfolds and channels == 1 and len(moved) > 2
    output_frames = not how.by_row and how.output.each > 1 and len(place.output_shape) > 3
    how = replace(how, frames=frames, output_frames=output_frames)
    return replace(
        place,
        shape=shape_after(how.enter, place.shape),
        output_shape=shape_after(how.wanted, place.output_shape),
        channel_dim=channels + 1 if unfolds and not frames else channels,
        arrangement=how if not how.is_plain else None,
    )


def _no_output(train: fx.GraphModule, output: Key) -> tuple[NoOutput | None, Rows]:
    """Return why no head can give the model's output, if so, and where the output holds the examples."""
    record = info(primary_node(train.graph, output))
    before, after = record.value, record.grown
    if after is None or record.rows is not None:
        return None, record.rows or Rows()
    shapes = f"{tuple(before.shape)} for a batch, and {tuple(after.shape)} for one three times as large"
    pairs = enumerate(zip(before.shape, after.shape, strict=False))
    growing = [dim for dim, (a, b) in pairs if a != b]
    if len(growing) > 1:
        which = " and ".join(map(str, growing))
        reason = (
            f"the output is {shapes}: dimensions {which} grow with the batch, as similarities do, so none is classes"
        )
        return NoOutput(reason, _SIMILARITIES), Rows(growing[0])
    if not growing:
        return NoOutput(f"the output is {shapes}: it has no rows of examples", _OBJECTIVE), Rows()
    reason = f"the output is {shapes}, and it cannot know which of its rows belong to which example"
    return NoOutput(reason, _OBJECTIVE), Rows(growing[0])


def _head_dtypes(dtypes: Sequence[torch.dtype], activation: TensorSpec, primary: TensorSpec) -> HeadDtypes | None:
    """Return the dtypes of a head: its weights have the activation's if the model has such weights, too.

    Otherwise autocast has made the activation, which no weights of that dtype could follow to another autocast.
    """
    if activation.dtype.is_complex:
        real = dtypes[0] if dtypes else activation.dtype.to_real()
        return HeadDtypes(activation.dtype, weights=real, output=primary.dtype)
    one = len({*dtypes, activation.dtype, primary.dtype}) <= 1
    if one or not activation.dtype.is_floating_point or torch.is_autocast_enabled(primary.device.type):
        return None
    weights = activation.dtype if activation.dtype in dtypes or not dtypes else dtypes[0]
    return HeadDtypes(activation=activation.dtype, weights=weights, output=primary.dtype)

"""Inference with heads: early exit at the first head that is confident, and ensembles of the last heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sedona_fx.data.args import Args
from sedona_fx.errors import HeadError, shape_text
from sedona_fx.ir.graph import copy_graph, copy_info, info, is_head, output_node
from sedona_fx.ir.modules import direct_children, share_copy
from sedona_fx.ir.outputs import Key, pick, split_local
from sedona_fx.ir.program import Program
from sedona_fx.plan_values import Capture
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.run import hand_on, last_readers


class Exit(NamedTuple):
    """What an :class:`EarlyExit` returns.

    Attributes:
        output: the primary output, (N, ...), each example's from the block at which it left; of dtypes that differ
            between blocks, the more precise.
        blocks: index of that block, (N,) int64.
    """

    output: Tensor
    blocks: Tensor


class EarlyExit(nn.Module):
    """Runs the blocks in order and lets each example leave at the first head that is confident about it.

    A head is confident about an example if the largest probability of its softmax over classes is at least `threshold`
    (for dense maps and tokens: the mean over positions of the largest probability). Examples that have left are not
    computed any further if every value that crosses a boundary has a dimension of one row an example; otherwise the
    whole batch is computed until every example has left. At the last block all of them do. Of a primary output with
    several rows an example (one a token, say), each row leaves by itself.

    Made by ``net.early_exit(threshold)``. It is in eval mode, computes no gradients, and shares the net's tensors.

    Args:
        blocks: of the net; all but the last need heads for the model's task.
        threshold: probability in (0, 1].
        key: key of the primary output in what the model returns.
        bind: returns the net's inputs by name for the arguments of a call.
        capture: how the graphs were made, which says whether they take batches of any size.
        example: a batch, used to find out which values hold one row per example.

    Raises:
        HeadError: `threshold` is not in (0, 1], or a block but the last has no head for the model's task.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        threshold: float,
        *,
        key: Key,
        bind: Callable[[Args], dict[str, Any]],
        capture: Capture,
        example: Args,
    ) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise HeadError(f"threshold={threshold!r} is no probability: give one in (0, 1].")
        _require_task_heads(blocks[:-1], "early_exit")
        self.threshold = threshold
        self._graphs = [block.eval_graph for block in blocks]
        self.blocks = share_copy(nn.ModuleList([graph.module for graph in self._graphs])).eval()
        self._key, self._bind = key, bind
        self._last_reader = last_readers([graph] for graph in self._graphs)
        free_rows = capture.free_batch and not capture.hosted
        self._batch_dim, self._batched = self._find_batched(example) if free_rows else (0, None)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Exit:
        """Return the primary output of each example and the block at which it left.

        Args:
            args: as for the model.
            kwargs: as for the model.

        Raises:
            DataError: the net was traced with other arguments.
            HeadError: the primary output has fewer than two dimensions.
        """
        values: dict[str, Any] = self._bind(Args(*args, **kwargs))
        rows: Tensor | None = None  # indices of the examples that have not left; None: of all
        output = blocks = None
        for index in range(len(self.blocks)):
            primary = self._run(index, values)
            primary = primary.movedim(self._batch_dim, 0) if self._batch_dim else primary
            if output is None or blocks is None:
                output = torch.empty_like(primary)
                blocks = torch.full((len(primary),), -1, device=primary.device)
            confident = _confidence(primary) >= self.threshold
            if index == len(self.blocks) - 1:
                confident = torch.ones_like(confident)
            primary, confident = primary.to(output.device), confident.to(output.device)
            if primary.dtype != output.dtype:  # under autocast a head and the model may give different ones
                dtype = torch.promote_types(output.dtype, primary.dtype)
                output, primary = output.to(dtype), primary.to(dtype)
            if self._batched is None:
                leaving = (blocks < 0) & confident
                output[leaving], blocks[leaving] = primary[leaving], index
                done = not (blocks < 0).any()
            else:
                rows = torch.arange(len(primary), device=output.device) if rows is None else rows
                leaving = confident.nonzero().flatten()  # the host waits here for a number of rows, and once below
                kept = confident.logical_not().nonzero().flatten() if len(leaving) < len(rows) else rows[:0]
                output[rows[leaving]], blocks[rows[leaving]] = primary[leaving], index
                rows = rows[kept]
                done = not len(rows)
                for name in self._batched.keys() & values.keys() if not done else ():
                    there = kept.to(values[name].device)
                    values[name] = values[name].index_select(self._batched[name], there)
            if done:
                break
        assert output is not None
        assert blocks is not None
        return Exit(output.movedim(0, self._batch_dim) if self._batch_dim else output, blocks)

    def _run(self, index: int, values: dict[str, Any]) -> Tensor:
        """Run a block, add its exports to `values`, and return the primary output of its head or of the model."""
        graph = self._graphs[index]
        exports, local = self.blocks[index](*[values[name] for name in graph.inputs])
        local, _ = split_local(local) if index < len(self.blocks) - 1 else (local, {})
        hand_on(values, dict(zip(graph.exports, exports, strict=True)), index, self._last_reader)
        return local if isinstance(local, Tensor) else pick(local, self._key)

    def _find_batched(self, example: Args) -> tuple[int, dict[str, int] | None]:
        """Return the dimension of the primary output that holds the batch, and where values hold one row per example.

        They are found by running batches of two and of three examples. None if the shape of another value, or of the
        output, depends on the number of examples otherwise: then no rows can be left out.
        """
        if (example.batch_size() or 0) < 3:
            example = example.map(lambda t: t[:1].expand(3, *t.shape[1:]) if t.dim() else t)
        two, three = (self._shapes(example.first(count)) for count in (2, 3))
        growing = {name: _growing(two[name], three[name]) for name in two}
        dims = {dim for name in self._outputs for dim, _ in growing[name]}
        batch_dim = dims.pop() if len(dims) == 1 else 0
        batched = {name: grown[0][0] for name, grown in growing.items() if grown and name not in self._outputs}
        nested = [name for name, value in self._bind(example).items() if not isinstance(value, Tensor)]
        one_row = not any(growing[name] for name in nested)
        one_row = one_row and all(grown == [(grown[0][0], (2, 3))] for grown in growing.values() if grown)
        one_row = one_row and all(growing[name] == [(batch_dim, (2, 3))] for name in self._outputs)
        return batch_dim, batched if one_row else None

    @torch.no_grad()
    def _shapes(self, example: Args) -> dict[str, list[tuple[int, ...]]]:
        """Return the shapes of the tensors in every value that a block reads, and those of the outputs."""
        values: dict[str, Any] = self._bind(example)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for index in range(len(self.blocks)):
            for name, value in values.items():
                leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
                shapes[name] = [tuple(leaf.shape) for leaf in leaves]
            shapes[self._outputs[index]] = [tuple(self._run(index, values).shape)]
        return shapes

    @property
    def _outputs(self) -> list[str]:
        return [f"output of block {index}" for index in range(len(self.blocks))]  # no value has a blank in its name


def _growing(two: Sequence[tuple[int, ...]], three: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, int]]]:
    """Return the dimensions that differ between the shapes for two and for three examples, with both sizes."""
    pairs = zip(two, three, strict=True)
    sizes = [pair for first, second in pairs for pair in enumerate(zip(first, second, strict=True))]
    return [(dim, pair) for dim, pair in sizes if pair[0] != pair[1]]


def ensemble(lowered: fx.GraphModule, blocks: Sequence[Block], key: Key, count: int) -> fx.GraphModule:
    """Return a graph of the sum of the log-softmax of the last `count` heads, the model's own output being one of them.

    It is SEDONA's ensemble (Pyeon et al., ICLR 2021, section 4.4: the last two heads). The softmax is over dimension 1,
    or over the last of three. Heads before these are not run. The graph is in eval mode and shares the net's tensors.

    Args:
        lowered: the LOWERED eval graph of the net; it is not changed.
        blocks: of the net.
        key: key of the primary output in what the model returns.
        count: number of heads, from 1 (the model's own output alone) to the number of blocks.

    Raises:
        HeadError: `count` is out of range, or one of these blocks has no head for the model's task.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(blocks):
        raise HeadError(
            f"ensemble({count!r}): give a number of heads from 1 to {len(blocks)}, the model's own output included."
        )
    chosen = range(len(blocks) - count, len(blocks) - 1)
    _require_task_heads([blocks[index] for index in chosen], f"ensemble({count})")
    graph, _ = copy_graph(lowered.graph)
    result = output_node(graph)
    outputs: Any = result.args[0]
    with graph.inserting_before(result):
        primary = outputs[-1]
        if key is not None and not (isinstance(primary, fx.Node) and info(primary).is_tensor):
            is_node = isinstance(primary, fx.Node)
            primary = graph.call_function(pick, (primary, key)) if is_node else pick(primary, key)
        total = None
        for node in [*(outputs[index] for index in chosen), primary]:
            logs = graph.call_function(log_probabilities, (node,))
            total = logs if total is None else graph.call_function(torch.add, (total, logs))
            for new_node in (logs, total):
                copy_info(result, new_node, block=len(blocks) - 1)
    result.args = (total,)
    for node in list(graph.nodes):
        if info(node).boundary and node.target is torch.detach:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif is_head(node) and not node.users:
            graph.erase_node(node)
    return direct_children(share_copy(Program(lowered, graph, class_name="Ensemble"))).eval()


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax over classes, in the shape of `logits`."""
    return torch.log_softmax(logits, class_dim(logits))


def class_dim(logits: Tensor) -> int:
    """Return the dimension of a primary output that holds the classes: (N, C), (N, T, C), or (N, C, ...)."""
    return 2 if logits.dim() == 3 else 1


def _confidence(logits: Tensor) -> Tensor:
    """Return the probability of the likeliest class for each example, (N,): the mean over positions if it has any."""
    if logits.dim() < 2:
        raise HeadError(
            f"early_exit asks heads for probabilities of classes, and they give {shape_text(logits.shape)}. It is for "
            "models that classify, with an output (N, classes) or more dimensions; call net(...) for this one."
        )
    largest = torch.softmax(logits.float(), class_dim(logits)).amax(class_dim(logits))
    return largest.flatten(1).mean(1) if largest.dim() > 1 else largest


def _require_task_heads(blocks: Sequence[Block], who: str) -> None:
    """Raise :class:`HeadError` if a block has no head, or one that does not imitate the model's output."""
    for block in blocks:
        if block.head is None or block.objective is not None:
            what = "no head" if block.head is None else "an objective of its own (local_loss=)"
            advice = "with heads (leave out heads=False)" if block.head is None else "without local_loss= for it"
            raise HeadError(
                f"{who} asks the heads for the model's output, and block {block.index} has {what}. Decouple the model "
                f"{advice}."
            )

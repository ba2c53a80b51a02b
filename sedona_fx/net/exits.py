"""Inference with heads: stop at the first one that is sure, or ask several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sedona_fx.data.args import Args
from sedona_fx.errors import HeadError, shape_text
from sedona_fx.ir.graph import copy_graph, copy_info, info, is_head, output_node
from sedona_fx.ir.modules import direct_children, share_copy
from sedona_fx.ir.outputs import Key, pick
from sedona_fx.plan import Capture
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.run import hand_on, last_readers


class Exit(NamedTuple):
    """What an :class:`EarlyExit` gives: the primary output, and for each example (N,) the block it left at."""

    output: Tensor
    blocks: Tensor


class EarlyExit(nn.Module):
    """Runs the blocks in order and lets each example leave at the first head that is sure of it.

    A head is sure of an example if the largest probability of its softmax over classes reaches `threshold` (for dense
    maps and tokens: the mean of it over positions). Examples that left are not computed further, where every value that
    crosses a boundary has the batch as its first dimension; else the whole batch goes on until all are sure.

    Made by ``net.early_exit(threshold)``; in eval mode, without gradients, sharing the net's tensors.

    Args:
        blocks: of the net; all but the last have heads for the model's task.
        threshold: in (0, 1].
        key: of the primary output in what the model returns.
        bind: from the arguments of a call to the net's inputs by name.
        capture: how the graphs were made: whether they take batches of any size.
        example: a batch, to find out which values hold one row per example.
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
        self._batched = self._find_batched(example) if free_rows else None

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Exit:
        """Return the primary output, each example's from where it left, and these blocks."""
        given = Args(*args, **kwargs)
        values: dict[str, Any] = self._bind(given)
        rows: Tensor | None = None  # of the examples still inside; None: all
        output = blocks = None
        for index in range(len(self.blocks)):
            primary = self._run(index, values)
            if output is None or blocks is None:
                output = torch.empty_like(primary)
                blocks = torch.full((len(primary),), -1, device=primary.device)
            inside = blocks < 0 if rows is None else rows
            sure = _confidence(primary) >= self.threshold
            if index == len(self.blocks) - 1:
                sure = torch.ones_like(sure)
            primary, sure = primary.to(output.device), sure.to(output.device)
            if self._batched is None:
                leaving = inside & sure
                output[leaving], blocks[leaving] = primary[leaving], index
                done = not (blocks < 0).any()
            else:
                places = inside.nonzero().flatten() if rows is None else rows
                output[places[sure]], blocks[places[sure]] = primary[sure], index
                rows = places[~sure]
                done = not len(rows)
                for name in self._batched & values.keys():
                    values[name] = values[name][(~sure).to(values[name].device)]
            if done:
                break
        assert output is not None
        assert blocks is not None
        return Exit(output, blocks)

    def _run(self, index: int, values: dict[str, Any]) -> Tensor:
        """Run a block; its exports go to `values`, its head's or the model's primary output is returned."""
        graph = self._graphs[index]
        exports, local = self.blocks[index](*[values[name] for name in graph.inputs])
        hand_on(values, dict(zip(graph.exports, exports, strict=True)), index, self._last_reader)
        return local if isinstance(local, Tensor) else pick(local, self._key)

    def _find_batched(self, example: Args) -> set[str] | None:
        """Return the values that hold one row per example, or None if others depend on the number of examples too."""
        if (example.batch_size() or 0) < 3:
            example = example.map(lambda t: t[:1].expand(3, *t.shape[1:]) if t.dim() else t)
        two, three = (self._shapes(example.first(count)) for count in (2, 3))
        changing = {name for name in two if two[name] != three[name]}
        rows = {n for n in changing if len(two[n]) == 1 and two[n][0][:1] == (2,) and three[n][0][:1] == (3,)}
        rest = all(two[name][0][1:] == three[name][0][1:] for name in rows)
        return rows if rows == changing and rest else None

    @torch.no_grad()
    def _shapes(self, example: Args) -> dict[str, list[tuple[int, ...]]]:
        values: dict[str, Any] = self._bind(example)
        found: dict[str, list[tuple[int, ...]]] = {}
        for index in range(len(self.blocks)):
            for name, value in values.items():
                leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
                found[name] = [tuple(leaf.shape) for leaf in leaves]
            self._run(index, values)
        return found


def ensemble(lowered: fx.GraphModule, blocks: Sequence[Block], key: Key, count: int) -> fx.GraphModule:
    """Return a graph of the summed log-softmax of the last `count` heads, the model's own output one of them.

    SEDONA's ensemble (Pyeon et al. 2021, section 4.4: the last two heads). Logits over dimension 1, or over the last of
    three; heads before these do not run. In eval mode, sharing the net's tensors.
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
            known = not isinstance(primary, fx.Node)
            primary = pick(primary, key) if known else graph.call_function(pick, (primary, key))
        total = None
        for node in [*(outputs[index] for index in chosen), primary]:
            logs = graph.call_function(log_probabilities, (node,))
            total = logs if total is None else graph.call_function(torch.add, (total, logs))
            for made in (logs, total):
                copy_info(result, made, block=len(blocks) - 1)
    result.args = (total,)
    for node in list(graph.nodes):
        if info(node).boundary and node.target is torch.detach:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif is_head(node) and not node.users:
            graph.erase_node(node)
    return direct_children(share_copy(fx.GraphModule(lowered, graph, class_name="Ensemble"))).eval()


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax over classes."""
    return torch.log_softmax(logits, class_dim(logits))


def class_dim(logits: Tensor) -> int:
    """Return which dimension of a primary output holds the classes: (N, C), (N, T, C), or (N, C, ...)."""
    return 2 if logits.dim() == 3 else 1


def _confidence(logits: Tensor) -> Tensor:
    """Return how sure a head is of each example, (N,)."""
    if logits.dim() < 2:
        raise HeadError(
            f"early_exit asks heads for probabilities of classes, and they give {shape_text(logits.shape)}."
        )
    largest = torch.softmax(logits.float(), class_dim(logits)).amax(class_dim(logits))
    return largest.flatten(1).mean(1) if largest.dim() > 1 else largest


def _require_task_heads(blocks: Sequence[Block], who: str) -> None:
    for block in blocks:
        if block.head is None or block.objective is not None:
            what = "no head" if block.head is None else "an objective of its own (local_loss=)"
            raise HeadError(f"{who} asks the heads for the model's output, and block {block.index} has {what}.")

"""Replay: blocks that do not wait for each other train from buffers of past activations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args
from sedona_fx.data.sources import to_device
from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.rng import block_seed
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import Batch, How, require_grad_mode
from sedona_fx.runtime.run import Values
from sedona_fx.train.buffers.codec import Codec, make_codec
from sedona_fx.train.buffers.replay_buffer import Buffer, Entry, Stored
from sedona_fx.train.buffers.vector_quantizer import VectorQuantizer
from sedona_fx.train.schedules.base import OptimizerFactory, described
from sedona_fx.train.schedules.headed import Headed

if TYPE_CHECKING:
    from sedona_fx.net.net import Net


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)


@dataclass
class Counts:
    """What a run has done so far: batches that worker 0 left unused, batches of another size that were not stored, and
    for each worker the turns taken and skipped."""

    unused: int
    not_stored: int
    turns: list[int]
    skipped: list[int]


class Replay(Headed):
    """Decoupled Greedy Learning, asynchronous (Belilovsky, Eickenberg, Oyallon 2020, Algorithm 2), in one process.

    Between block j and j+1 a buffer holds the last `capacity` batches: what later blocks read, detached, and the
    target. A step is one turn of every worker, nearest the input first. Worker 0 trains on the batch that is handed in;
    any other takes from its buffer, among the batches with the smallest use count, the most recently written one (the
    count is 1 on writing and grows by 1 per use), does one local step, and writes its output from before that step into
    the next buffer, over the oldest batch.

    Only full batches (as many examples as the first one) are stored; of another batch block 0 alone learns. Until
    `capacity` batches have been stored every worker takes every turn: that is how the buffers are filled. Without noise
    the newest batch is always the one to take, and this is :class:`~sedona_fx.train.Greedy`, bit for bit.

    Args:
        net: a net with heads.
        optimizer: called once a block.
        capacity: batches in each buffer, M in the paper.
        max_uses: how often a batch may be used; a worker for which none is left skips its turn. None: any number.
        noise: probability that a worker skips its turn, in [0, 1): its slowdown is 1/(1 - noise). One number for all
            workers or one a block; drawn from (seed, block, step). A batch that worker 0 skips is not used.
        buffer_device: where buffers live, for example ``"cpu"``; None: where the activations are.
        codec: how activations are compressed: ``"fp16"``, ``"bf16"``, ``"int8"``, or a
            :class:`~sedona_fx.train.VectorQuantizer`. None: not at all.
        options: see :class:`~sedona_fx.train.schedules.headed.Headed`. With ``check="sync"`` a step whose losses are not all
            finite leaves the buffers as they were, too. A batch on which a loss was not finite is taken out.

    Attributes:
        buffers: one between each pair of neighbours.
        counts: what the workers did so far; :meth:`report` says it in words.

    Raises:
        ScheduleError: a parameter that blocks share: it would have no one version to step.
    """

    parts: ClassVar[tuple[str, ...]] = ("extras", "replay")

    def __init__(
        self,
        net: Net,
        optimizer: OptimizerFactory,
        *,
        capacity: int,
        max_uses: int | None = None,
        noise: float | Sequence[float] = 0.0,
        buffer_device: str | torch.device | None = None,
        codec: str | Codec | None = None,
        **options: Any,
    ) -> None:
        super().__init__(net, optimizer, **options)
        self._refuse_shared("Replay", "blocks are not at the same step of training")
        count = len(net.blocks)
        given = [float(noise)] * count if isinstance(noise, (int, float)) else [float(p) for p in noise]
        if len(given) != count or not all(0 <= p < 1 for p in given):
            raise ScheduleError(f"noise={noise!r}: give one probability in [0, 1), or one for each of {count} blocks.")
        self.noise, self.codec = given, make_codec(codec)
        if isinstance(self.codec, VectorQuantizer) and capacity > self.codec.patience:
            raise ScheduleError(
                f"capacity={capacity} is more than the {self.codec.patience} batches whose codes the codec keeps: give "
                f"VectorQuantizer(patience={capacity}) or fewer batches."
            )
        device = torch.device(buffer_device) if buffer_device is not None else None
        self.buffers = [
            Buffer(capacity, max_uses, device, self.codec, self._compressible(block)) for block in net.blocks[:-1]
        ]
        self.counts = Counts(0, 0, [0] * count, [0] * count)
        self._full: int | None = None  # examples of a full batch
        self._stored = 0  # full batches so far, to `capacity`
        self._latest: list[Tensor | None] = [None] * count
        self._taken: list[Entry | None] = [None] * count  # in the last step
        self._made: list[Entry | None] = [None] * count

    def _compressible(self, block: Block) -> set[str]:
        """Return the names of the activations that may lie in the buffer behind a block."""
        return {name for b in self.net.blocks[: block.index + 1] for name in b.graph(True).live_exports}

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Give every worker a turn.

        Returns:
            The local losses (of a worker that skipped its turn, its latest), and the output of the last block for the
            batch that it took, which need not be this one; None if it skipped.
        """
        net, engine, sync = self.net, self.net.engine, self.check == "sync"
        with self._window() as ends:
            require_grad_mode("Replay")
            self.raise_pending()
            batch, how = net.batch(inputs, target), self.how()
            store, filling = self._look_at(batch)
            if store and self.buffers:  # a loader may fill the same tensors again
                batch = replace(batch, inputs=_copied(batch.inputs), target=_copied(batch.target))
            before = [buffer.snapshot() for buffer in self.buffers] if sync else []
            output = None
            try:
                with engine.guard.protecting(self.buffers_of(*net.blocks)) if sync else nullcontext():
                    for block in net.blocks:
                        local = self._turn(block, batch, how, store=store, filling=filling)
                        if block is net.blocks[-1]:
                            output = local
                        if ends and not sync:
                            self._step_block(block.index)
                    if sync:
                        engine.guard.raise_pending()
            except NonFiniteLossError as error:
                for buffer, state in zip(self.buffers, before, strict=False):
                    buffer.restore(state)
                self._drop(error.blocks)
                raise
            for block in net.blocks if ends and sync else ():
                self._step_block(block.index)
            self._stored += store and self._stored < self.buffers[0].capacity if self.buffers else 0
            net.steps += 1
        return StepResult([loss if loss is not None else torch.tensor(float("nan")) for loss in self._latest], output)

    def _look_at(self, batch: Batch) -> tuple[bool, bool]:
        """Return whether a new batch is a full one, to be stored, and whether buffers are still being filled."""
        size = Args(**batch.inputs).batch_size()
        self._full = size if self._full is None else self._full
        store = size == self._full
        self.counts.not_stored += not store
        return store, bool(self.buffers) and self._stored < self.buffers[0].capacity

    def _turn(self, block: Block, batch: Batch, how: How, *, store: bool, filling: bool) -> Any:
        """Give one worker its turn; return its local output, or None if it skips."""
        self._taken[block.index] = self._made[block.index] = stored = None
        skips = not filling and self._draws_a_skip(block.index, batch.step)
        if not skips and block.index:
            stored = self.buffers[block.index - 1].take(block.device)
            self._taken[block.index] = stored.entry if stored is not None else None
            skips = stored is None
        if skips:
            self.counts.skipped[block.index] += 1
            self.counts.unused += not block.index
            return None
        values: Values = dict(batch.inputs)
        if stored is not None:
            values = dict(stored.values)
            batch = Batch(stored.inputs, stored.target, batch.step, batch.training)
        loss, exports, local = self.net.engine.local_step(block, batch, values, how, alone=self.check == "async")
        self.net.engine.hand_on(block, values, exports, batch.training)
        self._latest[block.index] = loss
        self.counts.turns[block.index] += 1
        if block is not self.net.blocks[-1] and (store or block.index):
            kept = Stored(values, batch.inputs if self._inputs_wanted else {}, batch.target)
            self._made[block.index] = self.buffers[block.index].write(kept)
        return local

    def _draws_a_skip(self, worker: int, step: int) -> bool:
        """Return whether noise makes a worker skip a step; drawn from (seed, worker, step): no state to save."""
        if not self.noise[worker]:
            return False
        generator = torch.Generator().manual_seed(block_seed(self.net.engine.seed, -2 - worker, step))
        return bool(torch.rand((), generator=generator, dtype=torch.float64) < self.noise[worker])

    @property
    def _inputs_wanted(self) -> bool:
        """Whether a loss of a later block looks at the net's inputs."""
        return bool(self.extra) or any(block.objective is not None for block in self.net.blocks)

    def raise_pending(self) -> None:
        """Raise for a loss of the last step that was not finite; its batch is taken out of the buffers."""
        try:
            super().raise_pending()
        except NonFiniteLossError as error:
            self._drop(error.blocks)
            raise

    def _drop(self, blocks: Sequence[int]) -> None:
        """Take what blocks failed on out of their buffers, or they would fail again; and what they made of it."""
        for block in blocks:
            taken, made = self._taken[block], self._made[block]
            if taken is not None:
                self.buffers[block - 1].drop(taken)
            if made is not None:
                self.buffers[block].drop(made)

    # ---- what it did, and state -------------------------------------------------------------------------------------

    def bytes(self) -> tuple[int, int]:
        """Return the bytes that the buffers hold, and those that they would hold uncompressed."""
        sizes = [buffer.bytes() for buffer in self.buffers]
        return sum(held for held, _ in sizes), sum(plain for _, plain in sizes)

    def report(self) -> str:
        """Say in a few lines what the workers did, what was not used, and how large the buffers are."""
        held, plain = self.bytes()
        lines = [
            f"block {k}: {turns} turns, {skipped} skipped" + (f", noise {p:g}" if p else "")
            for k, (turns, skipped, p) in enumerate(
                zip(self.counts.turns, self.counts.skipped, self.noise, strict=True)
            )
        ]
        saved = (
            f", {plain / 2**20:.1f} MiB uncompressed ({100 * (1 - held / plain):.0f} % saved)" if held < plain else ""
        )
        lines.append(f"buffers: {held / 2**20:.1f} MiB{saved}")
        if self.counts.not_stored:
            lines.append(
                f"{self.counts.not_stored} batches were not stored: buffers hold batches of {self._full}, and of "
                "others block 0 alone learns (drop_last=True in the loader leaves them out)"
            )
        if self.counts.unused:
            lines.append(f"{self.counts.unused} batches were not used: block 0 skipped its turn")
        return "\n".join(lines)

    def options(self) -> dict[str, Any]:
        """Return the options that a state depends on."""
        first = self.buffers[0] if self.buffers else None
        limits = {"capacity": first.capacity, "max_uses": first.max_uses} if first is not None else {}
        return {**super().options(), **limits, "noise": self.noise, "codec": described(self.codec)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped, buffers included."""
        state = super().state_dict()
        state["replay"] = {
            "buffers": [buffer.state_dict() for buffer in self.buffers],
            "counts": vars(self.counts) | {"turns": list(self.counts.turns), "skipped": list(self.counts.skipped)},
            "full": self._full,
            "stored": self._stored,
            "latest": list(self._latest),
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        super().load_state_dict(state)
        mine = state["replay"]
        for buffer, saved, block in zip(self.buffers, mine["buffers"], self.net.blocks[:-1], strict=True):
            buffer.load_state_dict(saved, block.device)
        self.counts = Counts(**mine["counts"])
        self._full, self._stored = mine["full"], int(mine["stored"])
        self._latest = [
            to_device(loss, block.device) for loss, block in zip(mine["latest"], self.net.blocks, strict=True)
        ]

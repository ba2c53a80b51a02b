"""Replay: blocks train from buffers of past activations, so that they need not wait for each other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sedona_fx.data.args import Args
from sedona_fx.data.sources import to_device
from sedona_fx.errors import NonFiniteLossError, ScheduleError
from sedona_fx.net.net import Net
from sedona_fx.rng import block_seed
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.runtime.engine import require_grad_mode
from sedona_fx.runtime.options import Batch, StepOptions
from sedona_fx.runtime.run import Values
from sedona_fx.train.buffers.codec import Codec, make_codec
from sedona_fx.train.buffers.replay_buffer import Buffer, Entry, Stored
from sedona_fx.train.buffers.vector_quantizer import VectorQuantizer
from sedona_fx.train.schedules.headed import Headed
from sedona_fx.train.schedules.optimizers import OptimizerFactory
from sedona_fx.train.schedules.state import check_replay, described


@dataclass
class Counts:
    """What a run has done so far.

    Attributes:
        unused: batches that no block trained on, since worker 0 skipped its turn.
        not_stored: batches of another size, which were not stored.
        turns: for each worker, the turns that it took.
        skipped: for each worker, the turns that it skipped.
    """

    unused: int
    not_stored: int
    turns: list[int]
    skipped: list[int]


class Replay(Headed):
    """Decoupled Greedy Learning, asynchronous (Belilovsky, Eickenberg, Oyallon 2020, Algorithm 2), in one process.

    Each block is trained by a worker. Between block j and j+1, a buffer holds the last `capacity` batches: what later
    blocks read, detached, and the target. In a step every worker takes one turn, in the order of the blocks. Worker 0
    trains on the batch given to :meth:`step`. Any other worker takes a batch from its buffer: among those with the
    smallest use count, the most recently written one (the count is 1 on writing and grows by 1 per use). It does one
    local step, and writes its output, from before the update, to the next buffer, over the oldest batch.

    Only full batches (with as many examples as the first one) are stored; other batches train block 0 alone. Until
    `capacity` batches have been stored, every worker takes every turn, to fill the buffers. Without noise, a worker
    always takes the newest batch, and this is :class:`~sedona_fx.train.Greedy`, bit for bit.

    Args:
        net: a net with heads.
        optimizer: called once per block.
        capacity: number of batches in each buffer, M in the paper.
        max_uses: how often a batch may be used; a worker whose batches are all used up skips its turn. None: no limit.
        noise: probability in [0, 1) that a worker skips its turn: it is 1/(1 - noise) times slower. One number for all
            workers or one per block; drawn from (seed, block, step). A batch that worker 0 skips is not used.
        buffer_device: where buffers are kept, for example ``"cpu"``; None: on the activations' device.
        codec: how activations are compressed: ``"fp16"``, ``"bf16"``, ``"int8"``, ``"vq"``, or a
            :class:`~sedona_fx.train.VectorQuantizer`. None: not at all.
        options: see :class:`~sedona_fx.train.schedules.headed.Headed`. With ``check="sync"``, a step whose losses are
            not all finite leaves the buffers of batches as they were, too. In any case a batch on which a loss or a
            gradient was not finite is removed.

    Attributes:
        buffers: one between each pair of neighbouring blocks.
        counts: what the workers have done so far; :meth:`report` says it in words.

    Raises:
        ScheduleError: blocks share a parameter (at no time all of them would be at the same step of training), or a
            setting has a value that it cannot have.
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
        self.refuse_shared("Replay", "blocks are not at the same step of training")
        count = len(net.blocks)
        noises = [float(noise)] * count if isinstance(noise, (int, float)) else [float(p) for p in noise]
        if len(noises) != count or not all(0 <= p < 1 for p in noises):
            raise ScheduleError(f"noise={noise!r}: give one probability in [0, 1), or one for each of {count} blocks.")
        self.noise, self.codec = noises, make_codec(codec)
        if isinstance(self.codec, VectorQuantizer) and capacity > self.codec.patience:
            raise ScheduleError(
                f"capacity={capacity} is more than the {self.codec.patience} batches whose codes the codec keeps: give "
                f"VectorQuantizer(patience={capacity}) or fewer batches."
            )
        device = torch.device(buffer_device) if buffer_device is not None else None
        self.buffers = [
            Buffer(capacity, max_uses, device=device, codec=self.codec, compressible=self._live_exports(block))
            for block in net.blocks[:-1]
        ]
        self.counts = Counts(unused=0, not_stored=0, turns=[0] * count, skipped=[0] * count)
        self._full_size: int | None = None  # examples in a full batch
        self._stored = 0  # full batches stored so far, at most `capacity`
        self._latest: list[Tensor | None] = [None] * count  # each block's latest loss
        self._taken: list[Entry | None] = [None] * count  # what each block took from its buffer in the last step
        self._written: list[Entry | None] = [None] * count  # what each block wrote in the last step

    def step(self, inputs: Any, target: Any) -> StepResult:
        """Give every worker a turn.

        Returns:
            The local losses (for a worker that skipped its turn, its latest one; NaN if there is none), and the last
            block's output for the batch that it took, which need not be this one; None if it skipped.
        """
        net, engine, sync = self.net, self.net.engine, self.check == "sync"
        with self.accumulation_window() as updates:
            require_grad_mode("Replay")
            self.raise_pending()
            batch, options = net.batch(inputs, target), self.step_options()
            filling = bool(self.buffers) and self._stored < self.buffers[0].capacity
            store = self._is_full(batch)
            if store and self.buffers:  # a data loader may reuse the tensors of this batch for the next one
                batch = replace(batch, inputs=_cloned(batch.inputs), target=_cloned(batch.target))
            before = [buffer.snapshot() for buffer in self.buffers] if sync else []
            output = None
            try:
                with engine.guard.protecting(self.buffers_of(*net.blocks)) if sync else nullcontext() as snapshot:
                    for block in net.blocks:
                        output = self._turn(block, batch, options, store=store, filling=filling)
                        if updates and not sync:
                            self.step_block(block.index)
                    if snapshot is not None:
                        engine.guard.raise_pending()
                        engine.guard.keep(snapshot, range(len(net.blocks)))
                if updates and sync:
                    self.update_all(wait=True)
                    self.zero_grad()
            except NonFiniteLossError as error:
                for buffer, state in zip(self.buffers, before, strict=False):
                    buffer.restore(state)
                self._drop_entries(error.blocks)
                raise
            self._stored += filling and store
            net.steps += 1
        return StepResult([loss if loss is not None else torch.tensor(float("nan")) for loss in self._latest], output)

    def _live_exports(self, block: Block) -> set[str]:
        """Return the names of the activations that the buffer after a block may hold: those to compress."""
        return {name for b in self.net.blocks[: block.index + 1] for name in b.graph(True).live_exports}

    def _is_full(self, batch: Batch) -> bool:
        """Return whether a batch has as many examples as the first one, and count it if not."""
        size = Args(**batch.inputs).batch_size()
        self._full_size = size if self._full_size is None else self._full_size
        self.counts.not_stored += size != self._full_size
        return size == self._full_size

    def _turn(self, block: Block, batch: Batch, options: StepOptions, *, store: bool, filling: bool) -> Any:
        """Give one worker its turn; return its local output, or None if it skips.

        Args:
            block: the worker's block.
            batch: the batch given to :meth:`step`; block 0 trains on it.
            options: how the local step is done.
            store: whether that batch is full, so that block 0 writes its output to the next buffer.
            filling: whether the buffers are not full yet, so that noise skips no turn.
        """
        self._taken[block.index] = self._written[block.index] = stored = None
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
        engine, independent = self.net.engine, self.check == "async"
        loss, exports, local = engine.local_step(block, batch, values, options, independent=independent)
        engine.hand_on(block, values, exports, batch.training)
        self._latest[block.index] = loss
        self.counts.turns[block.index] += 1
        if block is not self.net.blocks[-1] and (store or block.index):
            output = Stored(values, batch.inputs if self._losses_read_inputs else {}, batch.target)
            self._written[block.index] = self.buffers[block.index].write(output)
        return local

    def _draws_a_skip(self, worker: int, step: int) -> bool:
        """Return whether noise makes a worker skip a step.

        Drawn from (seed, worker, step), so that there is no generator state to save.
        """
        if not self.noise[worker]:
            return False
        generator = torch.Generator().manual_seed(block_seed(self.net.engine.seed, -2 - worker, step))
        return bool(torch.rand((), generator=generator, dtype=torch.float64) < self.noise[worker])

    @property
    def _losses_read_inputs(self) -> bool:
        """Whether a local loss may look at the net's inputs, which are stored then."""
        return bool(self.extra) or any(block.objective is not None for block in self.net.blocks)

    def raise_pending(self) -> None:
        """Check what was deferred in the last step; remove a bad batch from the buffers.

        Raises:
            NonFiniteLossError: a loss or gradient was not finite.
        """
        try:
            super().raise_pending()
        except NonFiniteLossError as error:
            self._drop_entries(error.blocks)
            raise

    def _drop_entries(self, blocks: Sequence[int]) -> None:
        """Remove what these blocks took in the last step, on which they would fail again, and what they wrote."""
        for block in blocks:
            taken, written = self._taken[block], self._written[block]
            if taken is not None:
                self.buffers[block - 1].drop(taken)
            if written is not None:
                self.buffers[block].drop(written)

    # ---- report and state -------------------------------------------------------------------------------------------

    def bytes(self) -> tuple[int, int]:
        """Return the bytes that the buffers hold, and the bytes that they would hold uncompressed."""
        sizes = [buffer.bytes() for buffer in self.buffers]
        return sum(held for held, _ in sizes), sum(uncompressed for _, uncompressed in sizes)

    def report(self) -> str:
        """Return a few lines on the turns of the workers, the batches not used, and the size of the buffers."""
        held, uncompressed = self.bytes()
        workers = zip(self.counts.turns, self.counts.skipped, self.noise, strict=True)
        lines = [
            f"block {k}: {turns} turns, {skipped} skipped" + (f", noise {p:g}" if p else "")
            for k, (turns, skipped, p) in enumerate(workers)
        ]
        saved = ""
        if held < uncompressed:
            percent = 100 * (1 - held / uncompressed)
            saved = f", {uncompressed / 2**20:.1f} MiB uncompressed ({percent:.0f} % saved)"
        lines.append(f"buffers: {held / 2**20:.1f} MiB{saved}")
        if self.counts.not_stored:
            lines.append(
                f"{self.counts.not_stored} batches were not stored: buffers hold batches of {self._full_size}, and of "
                "others block 0 alone learns (drop_last=True in the loader leaves them out)"
            )
        if self.counts.unused:
            lines.append(f"{self.counts.unused} batches were not used: block 0 skipped its turn")
        return "\n".join(lines)

    def options(self) -> dict[str, Any]:
        """Return the settings that a saved state depends on."""
        first = self.buffers[0] if self.buffers else None
        limits = {"capacity": first.capacity, "max_uses": first.max_uses} if first is not None else {}
        return {**super().options(), **limits, "noise": self.noise, "codec": described(self.codec)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if never stopped, the buffers of batches included."""
        state = super().state_dict()
        state["replay"] = {
            "buffers": [buffer.state_dict() for buffer in self.buffers],
            "counts": vars(self.counts) | {"turns": list(self.counts.turns), "skipped": list(self.counts.skipped)},
            "full": self._full_size,
            "stored": self._stored,
            "latest": list(self._latest),
        }
        return state

    def check_state(self, state: Any) -> None:
        """Check that a state belongs to this schedule; see :meth:`Schedule.check_state`."""
        super().check_state(state)
        check_replay(state["replay"], len(self.net.blocks), self.buffers[0].capacity if self.buffers else 0)
        for buffer, saved in zip(self.buffers, state["replay"]["buffers"], strict=True):
            buffer.check_state(saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; see :meth:`Schedule.load_state_dict`."""
        super().load_state_dict(state)
        replay = copy.deepcopy(state["replay"])
        for buffer, saved, block in zip(self.buffers, replay["buffers"], self.net.blocks[:-1], strict=True):
            buffer.load_state_dict(saved, block.device)
        self.counts = Counts(**replay["counts"])
        self._full_size, self._stored = replay["full"], int(replay["stored"])
        latest = zip(replay["latest"], self.net.blocks, strict=True)
        self._latest = [to_device(loss, block.device) for loss, block in latest]


def _cloned(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, value)

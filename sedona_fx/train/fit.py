"""``fit``: epochs, progress, learning rates, evaluation, checkpoints, and exact resume."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from sedona_fx.data import Pair, batches, to_device
from sedona_fx.errors import CheckpointError, DataError
from sedona_fx.files import replacing
from sedona_fx.outputs import pick
from sedona_fx.train.random import block_seed
from sedona_fx.train.schedule import Schedule

if TYPE_CHECKING:
    from sedona_fx.net import Net

LRFactory = Callable[[torch.optim.Optimizer], LRScheduler]


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean local losses (one a block, or the final loss alone), evaluation, and seconds of training."""

    epoch: int
    losses: list[float]
    seconds: float
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass
class History:
    """What ``fit`` did, an entry an epoch."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on training, evaluation left out."""
        return sum(epoch.seconds for epoch in self.epochs)


def fit(
    net: Net,
    loader: Any,
    *,
    epochs: int,
    schedule: Schedule,
    val_loader: Any = None,
    lr_scheduler: LRFactory | None = None,
    lr_interval: Literal["epoch", "step"] = "epoch",
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a net.

    With `checkpoint`, training goes on from that file if it exists, exactly as if it had never stopped: at epoch
    boundaries with any loader; within an epoch with a loader that has a ``state_dict`` of its own, or one whose order
    depends on nothing but the random state (what was consumed is skipped).

    Args:
        net: the net; batches are moved to its first block's device.
        loader: an iterable of (inputs, target), gone through once an epoch.
        epochs: in total, those before a resume included.
        schedule: how to train, for example ``Greedy(net, optimizer=...)``.
        val_loader: evaluated after each epoch.
        lr_scheduler: called once with each block's optimizer.
        lr_interval: what a step of the LR schedulers is.
        checkpoint: file to write after each epoch, and to go on from.
        checkpoint_every: write it every so many training steps too.
        seed: the global generators (torch, random, numpy) are seeded from (seed, epoch) at the start of each epoch.
        progress: show a bar.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another net, plan or schedule.
        DataError: the loader is empty.
        NonFiniteLossError: a loss is not finite; the last checkpoint stands.
    """
    if schedule.net is not net:
        raise DataError("the schedule was made for another net: make it with Greedy(net, ...) of this one.")
    rates = [lr_scheduler(o) for o in schedule.optimizers if o is not None] if lr_scheduler is not None else []
    run = _Run(net, schedule, rates, loader, seed, Path(checkpoint) if checkpoint is not None else None)
    run.resume()
    length = _length(loader)
    total = length * epochs if length is not None else None
    done = length * run.epoch + run.batch if length is not None else 0
    with tqdm(total=total, initial=done, unit="batch", disable=not progress) as bar:
        while run.epoch < epochs:
            run.train_epoch(bar, f"epoch {run.epoch + 1}/{epochs}", lr_interval, checkpoint_every)
            result = evaluate(net, val_loader) if val_loader is not None else {}
            run.end_epoch(result)
            shown = {"train_loss": run.history.epochs[-1].losses[-1], **{f"val_{k}": v for k, v in result.items()}}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
    return run.history


def evaluate(net: Net, loader: Any) -> dict[str, float]:
    """Return the mean ``loss`` of the final output in eval mode, and the ``accuracy`` where the targets are classes.

    The mean is over examples; the net's mode is as before afterwards.
    """
    was, device = net.training, net.blocks[0].device
    net.eval()
    total = correct = loss = 0.0
    classes = True
    try:
        with torch.no_grad():
            for args, target in batches(loader, "the evaluation data"):
                moved = to_device(target, net.blocks[-1].device)
                output = net.call(args.map(lambda t: t.to(device)))
                count = args.batch_size() or 1
                loss += net.engine.local_loss(net.blocks[-1], output, moved).item() * count
                total += count
                primary = output if isinstance(output, Tensor) else pick(output, net.engine.output.key)
                classes = classes and _is_class_target(primary, moved)
                if classes:
                    correct += (primary.argmax(1) == moved).sum().item()
    finally:
        net.train(was)
    if not total:
        raise DataError("the evaluation data is empty.")
    return {"loss": loss / total, **({"accuracy": correct / total} if classes else {})}


def _is_class_target(primary: Tensor, target: Any) -> bool:
    return isinstance(target, Tensor) and primary.dim() == 2 and target.dim() == 1 and not target.is_floating_point()


@dataclass
class _Run:
    """A training run as it stands: what a checkpoint holds."""

    net: Net
    schedule: Schedule
    rates: Sequence[LRScheduler]
    loader: Any
    seed: int
    path: Path | None
    epoch: int = 0
    batch: int = 0
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: History = field(default_factory=History)
    _pending: Any = None  # (random states, loader state) of a checkpoint inside an epoch

    def train_epoch(self, bar: Any, label: str, lr_interval: str, every: int | None) -> None:
        bar.set_description(label)
        self.net.train()
        device = self.net.blocks[0].device
        source = self._batches()
        sums = [torch.tensor(s, dtype=torch.float64) for s in self.sums]
        start = time.perf_counter()
        for args, target in source:
            result = self.schedule.step(args.map(lambda t: t.to(device)), target)
            if lr_interval == "step":
                for rate in self.rates:
                    rate.step()
            losses = [loss.double() for loss in result.losses]
            sums = [a.to(b.device) + b for a, b in zip(sums, losses, strict=True)] if sums else losses
            self.batch += 1
            bar.update()
            if every is not None and self.batch % every == 0:
                self.sums = [s.item() for s in sums]
                self.seconds += time.perf_counter() - start
                self.save(inside=True)
                start = time.perf_counter()
        if not self.batch:
            raise DataError("the training data is empty: the loader gave no batch.")
        self.sums = [s.item() for s in sums]
        self.seconds += time.perf_counter() - start
        if lr_interval == "epoch":
            for rate in self.rates:
                rate.step()

    def end_epoch(self, result: dict[str, float]) -> None:
        means = [s / self.batch for s in self.sums]
        entry = Epoch(self.epoch, means, self.seconds, result.get("loss"), result.get("accuracy"))
        self.history.epochs.append(entry)
        self.epoch, self.batch, self.sums, self.seconds = self.epoch + 1, 0, [], 0.0
        self.save(inside=False)

    def _batches(self) -> Iterator[Pair]:
        """Yield the rest of the epoch: from the start, or from where a checkpoint was written."""
        _seed_all(block_seed(self.seed, -1, self.epoch))
        pending, self._pending = self._pending, None
        if pending is None:
            return batches(self.loader, "the training data")
        states, loader_state = pending
        if loader_state is not None:
            self.loader.load_state_dict(loader_state)
            rest = batches(self.loader, "the training data")
        else:
            rest = islice(batches(self.loader, "the training data"), self.batch, None)
        return _restored(rest, states)

    def save(self, *, inside: bool) -> None:
        if self.path is None:
            return
        own = getattr(self.loader, "state_dict", None)
        state = {
            "format": 1,
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums,
            "seconds": self.seconds,
            "seed": self.seed,
            "net": self.net.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rates": [rate.state_dict() for rate in self.rates],
            "history": [asdict(epoch) for epoch in self.history.epochs],
            "random": _random_states() if inside else None,
            "loader": own() if inside and callable(own) else None,
        }
        with replacing(self.path) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path is None or not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"cannot read the checkpoint {str(self.path)!r}: {type(error).__name__}: {error}. Delete it to start "
                "anew."
            ) from error
        if not isinstance(state, dict) or state.get("format") != 1:
            raise CheckpointError(f"{str(self.path)!r} is no checkpoint of sedona_fx.fit. Delete it to start anew.")
        if state["seed"] != self.seed:
            raise CheckpointError(f"{str(self.path)!r} was written with seed={state['seed']}, not {self.seed}.")
        if len(state["rates"]) != len(self.rates):
            raise CheckpointError(
                f"{str(self.path)!r} holds {len(state['rates'])} LR schedulers, this run has {len(self.rates)}."
            )
        self.schedule.load_state_dict(state["schedule"])
        try:
            self.net.load_state_dict(state["net"])
        except RuntimeError as error:
            raise CheckpointError(f"{str(self.path)!r} belongs to another net: {error}") from error
        for rate, saved in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        self.epoch, self.batch, self.sums = state["epoch"], state["batch"], list(state["sums"])
        self.seconds = state["seconds"]
        self.history = History([Epoch(**entry) for entry in state["history"]])
        if state["random"] is not None:
            self._pending = (state["random"], state["loader"])


def _restored(rest: Iterator[Pair], states: Sequence[Any]) -> Iterator[Pair]:
    """Yield the rest of an epoch, with the random states of the checkpoint put in place once the loader has started."""
    first = True
    for pair in rest:
        if first:
            first = False
            _restore_random(states)
        yield pair


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _random_states() -> list[Any]:
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    numpy_state = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *[float(r) for r in rest]]
    return [torch.get_rng_state(), [version, list(internal), gauss], numpy_state]


def _restore_random(states: Sequence[Any]) -> None:
    torch.set_rng_state(states[0])
    version, internal, gauss = states[1]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states[2]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None

"""``fit``: epochs, progress, learning rates, evaluation, checkpoints, and exact resume."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from sedona_fx.data.sources import Pair, batches, one_shot
from sedona_fx.errors import CheckpointError, DataError, ScheduleError
from sedona_fx.rng import (
    block_seed,
    loader_streams,
    random_states,
    restore_random,
    seed_all,
    stream_states,
)
from sedona_fx.train import checkpoint as files
from sedona_fx.train.evaluate import evaluate
from sedona_fx.train.schedules.base import Schedule

if TYPE_CHECKING:
    from sedona_fx.net.net import Net

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
    lr_scheduler: LRFactory | Sequence[LRFactory | None] | None = None,
    lr_interval: Literal["epoch", "step"] = "epoch",
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a net.

    With `checkpoint`, training goes on from that file if it exists, exactly as if it had never stopped: at epoch
    boundaries with any loader; within an epoch with a loader that has a ``state_dict`` of its own, or one whose order
    depends on nothing but the random state (what was consumed is skipped). One exception: the workers of a DataLoader
    with ``persistent_workers`` carry their random state from epoch to epoch, which no checkpoint can hold.

    Args:
        net: the net; batches are moved to its first block's device. Modules that were put into eval mode one by one
            stay there if the net itself is in train mode.
        loader: an iterable of (inputs, target), gone through once an epoch; ``set_epoch`` of its sampler is called.
        epochs: in total, those before a resume included.
        schedule: how to train, for example ``Greedy(net, optimizer=...)``.
        val_loader: evaluated after each epoch.
        lr_scheduler: called once with each block's optimizer; or a list with one a block, or None for none.
        lr_interval: what a step of the LR schedulers is.
        checkpoint: file to write after each epoch, and to go on from.
        checkpoint_every: write it every so many training steps of an epoch too.
        seed: the global generators (torch, random, numpy) are seeded from (seed, epoch) at the start of each epoch.
        progress: show a bar.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another net, plan or schedule; nothing has been
            loaded then.
        DataError: the loader is empty, or exhausted after an epoch.
        NonFiniteLossError: a loss is not finite; the last checkpoint stands.
        ScheduleError: the arguments do not go together.
    """
    if schedule.net is not net:
        raise ScheduleError("the schedule was made for another net: make it with Greedy(net, ...) of this one.")
    if lr_interval not in ("epoch", "step"):
        raise ScheduleError(f"lr_interval={lr_interval!r} is neither 'epoch' nor 'step'.")
    if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
        raise ScheduleError(f"checkpoint_every={checkpoint_every} needs checkpoint=FILE, and to be 1 or more.")
    rates = _make_rates(lr_scheduler, schedule)
    if any(isinstance(rate, ReduceLROnPlateau) for rate in rates):
        raise ScheduleError("ReduceLROnPlateau needs a metric at each step: step it yourself, around fit(epochs=1).")
    run = _Run(net, schedule, rates, loader, seed, Path(checkpoint) if checkpoint is not None else None)
    run.resume()
    if epochs - run.epoch > 1 and one_shot(loader):
        what = f"the training data is a one-shot iterator ({type(loader).__name__}), exhausted after one epoch"
        raise DataError(f"{what}. {_ADVICE}")
    length = _length(loader)
    total = run.done - run.batch + length * max(0, epochs - run.epoch) if length is not None else None
    with tqdm(total=total, initial=run.done, unit="batch", disable=not progress) as bar:
        while run.epoch < epochs:
            run.train_epoch(bar, f"epoch {run.epoch + 1}/{epochs}", lr_interval, checkpoint_every)
            result = evaluate(net, val_loader) if val_loader is not None else {}
            run.end_epoch(result)
            shown = {"train_loss": run.history.epochs[-1].losses[-1], **{f"val_{k}": v for k, v in result.items()}}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
    return run.history


def _make_rates(given: LRFactory | Sequence[LRFactory | None] | None, schedule: Schedule) -> list[LRScheduler]:
    """Make the LR schedulers, one for each optimizer that is to have one."""
    count = len(schedule.optimizers)
    factories = list(given) if isinstance(given, Sequence) else [given] * count
    if len(factories) != count:
        raise ScheduleError(f"lr_scheduler lists {len(factories)} factories; the net has {count} blocks.")
    pairs = zip(factories, schedule.optimizers, strict=True)
    return [factory(optimizer) for factory, optimizer in pairs if factory is not None and optimizer is not None]


_ADVICE = "Hand a DataLoader or a list of batches."


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
    batch: int = 0  # batches of this epoch that were trained on
    done: int = 0  # batches of all epochs that were trained on
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: History = field(default_factory=History)
    _streams: list[torch.Tensor] = field(default_factory=list)  # the loader's own generators as this epoch began
    _resumed: dict[str, Any] | None = None
    _proved: bool = False

    def train_epoch(self, bar: Any, label: str, lr_interval: str, every: int | None) -> None:
        bar.set_description(label)
        if not self.net.training:
            self.net.train()
        device = self.net.blocks[0].device
        sums = [torch.tensor(s, dtype=torch.float64) for s in self.sums]
        start = time.perf_counter()
        for args, target in self._batches():
            result = self.schedule.step(args.map(lambda t: t.to(device)), target)
            if lr_interval == "step":
                self._step_rates()
            losses = [loss.double() for loss in result.losses]
            sums = [a.to(b.device) + b for a, b in zip(sums, losses, strict=True)] if sums else losses
            self.batch, self.done = self.batch + 1, self.done + 1
            bar.update()
            if every is not None and self.batch % every == 0:
                self.sums = [s.item() for s in sums]
                self.seconds += time.perf_counter() - start
                self._save(inside=True)
                start = time.perf_counter()
        if not self.batch:
            what = "exhausted: an iterator gives its batches once" if self.epoch else "empty: the loader gave no batch"
            raise DataError(f"the training data is {what} (epoch {self.epoch}). {_ADVICE}")
        self.schedule.raise_pending()
        self.sums = [s.item() for s in sums]
        self.seconds += time.perf_counter() - start
        if lr_interval == "epoch":
            self._step_rates()

    def end_epoch(self, result: dict[str, float]) -> None:
        means = [s / self.batch for s in self.sums]
        entry = Epoch(self.epoch, means, self.seconds, result.get("loss"), result.get("accuracy"))
        self.history.epochs.append(entry)
        self.epoch, self.batch, self.sums, self.seconds = self.epoch + 1, 0, [], 0.0
        self._save(inside=False)

    def _step_rates(self) -> None:
        with warnings.catch_warnings():
            # An optimizer may have stepped in another process, before a resume, or not yet: blocks may be late.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for rate in self.rates:
                rate.step()

    def _batches(self) -> Iterator[Pair]:
        """Yield the rest of the epoch: from the start, or from where a checkpoint was written."""
        seed_all(block_seed(self.seed, -1, self.epoch))
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        for owner in (self.loader, getattr(self.loader, "sampler", None), batch_sampler):
            set_epoch = getattr(owner, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)
        self._streams = stream_states(self.loader)
        resumed, self._resumed = self._resumed, None
        own = resumed["loader"] if resumed is not None else None
        if own is not None:
            self.loader.load_state_dict(own)
        source = batches(self.loader, "the training data")
        if resumed is None or resumed["random"] is None:  # at the start of an epoch
            first = next(source, None)
            if first is None and own is not None:  # its state was that of a finished epoch
                source = batches(self.loader, "the training data")
            elif first is not None:
                yield first
        else:
            for done in range(self.batch if own is None else 0):
                if next(source, None) is None:
                    raise CheckpointError(
                        f"the checkpoint was written behind batch {self.batch} of an epoch, and the loader now gives "
                        f"{done} batches. Go on with the data it was written with."
                    )
            # Only now: skipping has drawn numbers too, and starting a loader draws the seed of its workers.
            restore_random(resumed["random"])
        yield from source

    def _save(self, *, inside: bool) -> None:
        if self.path is None:
            return
        own = getattr(self.loader, "state_dict", None)
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "done": self.done,
            "sums": self.sums,
            "seconds": self.seconds,
            "seed": self.seed,
            "schedule": self.schedule.state_dict(),  # first: raises if a loss of the last step was not finite
            "net": self.net.state_dict(),
            "rates": [[type(rate).__name__, rate.state_dict()] for rate in self.rates],
            "history": [asdict(epoch) for epoch in self.history.epochs],
            "random": random_states({block.device for block in self.net.blocks}) if inside else None,
            "streams": self._streams if inside else stream_states(self.loader),
            "loader": own() if callable(own) else None,
        }
        files.write(self.path, state, prove=not self._proved)
        self._proved = True

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path is None or not self.path.exists():
            return
        state = files.read(self.path)
        files.check(state, self.path, self.net, self.schedule, self.rates, self.seed)
        streams = loader_streams(self.loader)
        if len(streams) != len(state["streams"]):
            raise CheckpointError(f"{str(self.path)!r} was written with a loader of another kind.")
        try:
            history = History([Epoch(**entry) for entry in state["history"]])
        except TypeError as error:
            raise CheckpointError(f"{str(self.path)!r} is damaged: its history is no list of epochs.") from error
        self.net.load_state_dict(state["net"])  # first: the schedule may run stashed batches again
        self.schedule.load_state_dict(state["schedule"])
        for rate, (_, saved) in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        for generator, saved in zip(streams, state["streams"], strict=True):
            generator.set_state(saved)
        self.epoch, self.batch, self.done = state["epoch"], state["batch"], state["done"]
        self.sums, self.seconds, self.history = list(state["sums"]), state["seconds"], history
        self._resumed = state


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None

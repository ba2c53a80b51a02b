"""``fit``: train for some epochs, with learning rates, evaluation, progress, checkpoints and exact resume."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from sedona_fx.data.sources import Pair, batches, one_shot
from sedona_fx.errors import CheckpointError, DataError, ScheduleError
from sedona_fx.files import remove_leftovers
from sedona_fx.net.net import Net
from sedona_fx.rng import block_seed, loader_streams, random_states, restore_random, seed_all, stream_states
from sedona_fx.train import checkpoint as checkpoints
from sedona_fx.train.evaluate import evaluate
from sedona_fx.train.schedules.base import Schedule

LRFactory = Callable[[torch.optim.Optimizer], LRScheduler]
"""Called with the optimizer of a block."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave.

    Attributes:
        epoch: its number, from 0.
        losses: mean losses over the batches: one per block, or only the final loss for schedules without local losses.
        seconds: time spent on training, evaluation not included.
        val_loss: mean loss of the final output on the evaluation data; None without such data.
        val_accuracy: accuracy on the evaluation data, where the targets are classes.
    """

    epoch: int
    losses: list[float]
    seconds: float
    val_loss: float | None = None
    val_accuracy: float | None = None


@dataclass
class History:
    """What ``fit`` did: one entry per epoch."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds spent on training, evaluation not included."""
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
    """Train a net for some epochs.

    If the file `checkpoint` exists, training goes on from it, exactly as if it had never stopped: at epoch boundaries
    with any loader; within an epoch with a loader that has a ``state_dict`` of its own, or one whose order depends on
    nothing but the random state (the batches already trained on are skipped). One exception: the workers of a
    DataLoader with ``persistent_workers`` carry their random state from epoch to epoch, which no checkpoint can hold.

    Args:
        net: the net; batches are moved to its first block's device. Single modules that were put into eval mode stay in
            it if the net itself is in train mode.
        loader: an iterable of (inputs, target), iterated once per epoch; ``set_epoch`` of its sampler is called.
        epochs: in total, those before a resume included.
        schedule: how to train, for example ``Greedy(net, optimizer=...)``.
        val_loader: evaluated after each epoch.
        lr_scheduler: called once with each block's optimizer; or a list of such factories, one per block, None for a
            block without one.
        lr_interval: whether the LR schedulers step after every ``"epoch"`` or every training ``"step"``.
        checkpoint: file to write after each epoch, and to go on from.
        checkpoint_every: write it also every so many training steps of an epoch.
        seed: the global generators (torch, random, numpy) are seeded from (seed, epoch) at the start of each epoch.
        progress: show a progress bar.

    Returns:
        Losses, evaluation and seconds of every epoch, those before a resume included.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another net, plan or schedule; nothing has been
            loaded then.
        DataError: the loader is empty, or exhausted after an epoch.
        NonFiniteLossError: a loss is not finite; the last checkpoint is kept.
        ScheduleError: the arguments do not fit together.
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
    path = Path(checkpoint) if checkpoint is not None else None
    run = _Run(net=net, schedule=schedule, rates=rates, loader=loader, seed=seed, path=path)
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
            metrics = {"train_loss": run.history.epochs[-1].losses[-1], **{f"val_{k}": v for k, v in result.items()}}
            bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
    return run.history


def _make_rates(lr_scheduler: LRFactory | Sequence[LRFactory | None] | None, schedule: Schedule) -> list[LRScheduler]:
    """Make the LR schedulers of those optimizers that have one."""
    count = len(schedule.optimizers)
    factories = list(lr_scheduler) if isinstance(lr_scheduler, Sequence) else [lr_scheduler] * count
    if len(factories) != count:
        raise ScheduleError(f"lr_scheduler lists {len(factories)} factories; the net has {count} blocks.")
    pairs = zip(factories, schedule.optimizers, strict=True)
    return [factory(optimizer) for factory, optimizer in pairs if factory is not None and optimizer is not None]


_ADVICE = "Hand a DataLoader or a list of batches."


@dataclass
class _Run:
    """The state of a training run: what a checkpoint holds.

    Attributes:
        epoch: the epoch to train, from 0.
        batch: batches of this epoch that were trained on.
        done: batches of all epochs that were trained on.
        sums: for each loss, its sum over the batches of this epoch.
        seconds: spent on training in this epoch.
    """

    net: Net
    schedule: Schedule
    rates: Sequence[LRScheduler]
    loader: Any
    seed: int
    path: Path | None
    epoch: int = 0
    batch: int = 0
    done: int = 0
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: History = field(default_factory=History)
    _streams: list[torch.Tensor] = field(default_factory=list)  # states of the loader's generators as the epoch began
    _resumed: dict[str, Any] | None = None  # the checkpoint, until its epoch goes on
    _proved: bool = False  # whether a checkpoint of this run was read back

    def train_epoch(self, bar: Any, label: str, lr_interval: str, every: int | None) -> None:
        """Train until the end of the epoch; write a checkpoint `every` so many steps."""
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
        """Add the epoch to the history with what :func:`evaluate` returned, and write a checkpoint."""
        means = [s / self.batch for s in self.sums]
        entry = Epoch(self.epoch, means, self.seconds, result.get("loss"), result.get("accuracy"))
        self.history.epochs.append(entry)
        self.epoch, self.batch, self.sums, self.seconds = self.epoch + 1, 0, [], 0.0
        self._save(inside=False)

    def _step_rates(self) -> None:
        with warnings.catch_warnings():
            # The optimizer may have stepped in another process before a resume; a late block's has not stepped yet.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for rate in self.rates:
                rate.step()

    def _batches(self) -> Iterator[Pair]:
        """Yield the rest of the epoch: from its start, or from where a checkpoint was written."""
        seed_all(block_seed(self.seed, -1, self.epoch))
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        for owner in (self.loader, getattr(self.loader, "sampler", None), batch_sampler):
            set_epoch = getattr(owner, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)
        self._streams = stream_states(self.loader)
        resumed, self._resumed = self._resumed, None
        loader_state = resumed["loader"] if resumed is not None else None
        if loader_state is not None:
            self.loader.load_state_dict(loader_state)
        source = batches(self.loader, "the training data")
        if resumed is None or resumed["random"] is None:  # at the start of an epoch
            first = next(source, None)
            if first is None and loader_state is not None:  # the state was that of a finished epoch
                source = batches(self.loader, "the training data")
            elif first is not None:
                yield first
        else:
            for count in range(self.batch if loader_state is None else 0):
                if next(source, None) is None:
                    raise CheckpointError(
                        f"the checkpoint was written behind batch {self.batch} of an epoch, and the loader now gives "
                        f"{count} batches. Go on with the data it was written with."
                    )
            # Only now: skipping batches draws random numbers, and starting a loader draws the seed of its workers.
            restore_random(resumed["random"])
        yield from source

    def _save(self, *, inside: bool) -> None:
        if self.path is None:
            return
        loader_state = getattr(self.loader, "state_dict", None)
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "done": self.done,
            "sums": self.sums,
            "seconds": self.seconds,
            "seed": self.seed,
            "schedule": self.schedule.state_dict(),  # first: raises if a loss of the last step was not finite
            "net": self.net.state_dict(),
            "loss": self.net.plan.loss,
            "rates": [[type(rate).__name__, rate.state_dict()] for rate in self.rates],
            "history": [asdict(epoch) for epoch in self.history.epochs],
            "random": random_states({block.device for block in self.net.blocks}) if inside else None,
            "streams": self._streams if inside else stream_states(self.loader),
            "loader": loader_state() if callable(loader_state) else None,
        }
        checkpoints.write(self.path, state, prove=not self._proved)
        self._proved = True

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path is None:
            return
        remove_leftovers(self.path)
        if not self.path.exists():
            return
        state = checkpoints.read(self.path)
        checkpoints.check(state, self.path, net=self.net, schedule=self.schedule, rates=self.rates, seed=self.seed)
        streams = loader_streams(self.loader)
        if len(streams) != len(state["streams"]):
            raise CheckpointError(f"{str(self.path)!r} was written with a loader of another kind.")
        for stream, saved in zip(streams, state["streams"], strict=True):
            try:
                torch.Generator(stream.device).set_state(saved)
            except (TypeError, RuntimeError) as error:
                raise CheckpointError(f"{str(self.path)!r} is damaged: a random state of its loader.") from error
        try:
            history = History([Epoch(**entry) for entry in state["history"]])
        except TypeError as error:
            raise CheckpointError(f"{str(self.path)!r} is damaged: its history is no list of epochs.") from error
        self.net.load_state_dict(state["net"])  # first: Delayed runs blocks on stashed batches again
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

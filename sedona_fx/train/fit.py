"""``fit``: train for some epochs, with learning rates, evaluation, progress, checkpoints and exact resume."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from sedona_fx.data.sources import Pair, batch_count, batches, one_shot
from sedona_fx.errors import CheckpointError, DataError, ScheduleError
from sedona_fx.files import remove_leftovers
from sedona_fx.ir.outputs import Loss
from sedona_fx.net.net import Net
from sedona_fx.rng import block_seed, loader_streams, random_states, restore_random, seed_all, stream_states, turn
from sedona_fx.train import checkpoint as checkpoints
from sedona_fx.train.evaluate import Metric, check_evaluation, evaluate
from sedona_fx.train.history import Epoch, History
from sedona_fx.train.schedules.base import Schedule
from sedona_fx.train.schedules.fitted import LRFactory


def fit(
    net: Net,
    loader: Any,
    *,
    epochs: int,
    schedule: Schedule,
    val_loader: Any = None,
    val_loss: Loss | None = None,
    metrics: Mapping[str, Metric] | None = None,
    lr_scheduler: LRFactory | Sequence[LRFactory | None] | None = None,
    lr_interval: Literal["epoch", "step"] = "epoch",
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a net for some epochs.

    Another call with the same schedule goes on behind the epochs that were trained: with their numbers, which decide
    the order of the examples, and with its LR schedulers. Calls of one epoch in a loop do what one call does.

    If the file `checkpoint` exists, training goes on from it, exactly as if it had never stopped: at epoch boundaries
    with any loader; within an epoch with a loader that has a ``state_dict`` of its own, or one whose order depends on
    nothing but the random state (the batches already trained on are skipped). One exception: the workers of a
    DataLoader with ``persistent_workers`` carry their random state from epoch to epoch, which no checkpoint can hold.

    Args:
        net: the net; batches are moved to its first block's device. Single modules that were put into eval mode stay in
            it if the net itself is in train mode.
        loader: an iterable of (inputs, target), iterated once per epoch; ``set_epoch`` of its sampler is called.
        epochs: to train, on top of those that earlier calls with this schedule trained. Epochs of an earlier process,
            in the checkpoint, count: a script that is started again asks for the same ones.
        schedule: how to train, for example ``Greedy(net, optimizer=...)``.
        val_loader: evaluated after each epoch; see :func:`evaluate`.
        val_loss: the loss of the evaluation, ``val_loss(output, target)``; None: that of the training, which smooths
            labels, or takes the targets of mixup, there as well.
        metrics: further numbers of the evaluation: name -> ``metric(output, target)``.
        lr_scheduler: called once with each block's optimizer; or a list of such factories, one per block, None for a
            block without one. Later calls with the same factories go on with the LR schedulers that they made.
        lr_interval: whether the LR schedulers step after every ``"epoch"`` or every training ``"step"``.
        checkpoint: file to write after each epoch, and to go on from.
        checkpoint_every: write it also every so many training steps of an epoch.
        seed: the global generators (torch, random, numpy) are seeded from (seed, epoch) at the start of each epoch.
        progress: show a progress bar.

    Returns:
        Losses, evaluation and seconds of every epoch of this call, and of those in the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another net, plan or schedule; nothing has been
            loaded then. Or weights that are not finite would be written; the last checkpoint is kept.
        DataError: the loader is empty, or exhausted after an epoch.
        NonFiniteLossError: a loss or a gradient is not finite; the last checkpoint is kept.
        ScheduleError: the arguments do not fit together.
    """
    if schedule.net is not net:
        raise ScheduleError("the schedule was made for another net: make it with Greedy(net, ...) of this one.")
    if lr_interval not in ("epoch", "step"):
        raise ScheduleError(f"lr_interval={lr_interval!r} is neither 'epoch' nor 'step'.")
    if checkpoint_every is not None and (checkpoint is None or checkpoint_every < 1):
        raise ScheduleError(f"checkpoint_every={checkpoint_every} needs checkpoint=FILE, and to be 1 or more.")
    check_evaluation(val_loss, metrics)
    if val_loader is None and (val_loss is not None or metrics):
        raise ScheduleError("val_loss= and metrics= need val_loader=, the data that they are computed on.")
    rates = _make_rates(lr_scheduler, schedule)
    if any(isinstance(rate, ReduceLROnPlateau) for rate in rates):
        raise ScheduleError(
            "ReduceLROnPlateau needs a metric at each step: step it yourself, in a loop around fit(epochs=1), whose "
            "calls go on from one another."
        )
    path = Path(checkpoint) if checkpoint is not None else None
    fitted = schedule.fitted
    epochs += fitted.asked if path is not None else fitted.epochs
    run = _Run(net=net, schedule=schedule, rates=rates, loader=loader, seed=seed, path=path)
    run.resume()
    if epochs - run.epoch > 1 and one_shot(loader):
        what = f"the training data is a one-shot iterator ({type(loader).__name__}), exhausted after one epoch"
        raise DataError(f"{what}. {_ADVICE}")
    length = batch_count(loader)
    total = run.done - run.batch + length * max(0, epochs - run.epoch) if length is not None else None
    with tqdm(total=total, initial=run.done, unit="batch", disable=not progress) as bar:
        while run.epoch < epochs:
            run.train_epoch(bar, f"epoch {run.epoch + 1}/{epochs}", lr_interval, checkpoint_every)
            result = {}
            if val_loader is not None:
                result = evaluate(net, val_loader, val_loss=val_loss, metrics=metrics)
            run.end_epoch(result)
            shown = {"train_loss": run.history.epochs[-1].losses[-1], **{f"val_{k}": v for k, v in result.items()}}
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
    fitted.asked = epochs
    if path is not None and path.exists():
        fitted.wrote(path)
    return run.history


def _make_rates(lr_scheduler: LRFactory | Sequence[LRFactory | None] | None, schedule: Schedule) -> list[LRScheduler]:
    """Make the LR schedulers of those optimizers that have one."""
    count = len(schedule.optimizers)
    factories = list(lr_scheduler) if isinstance(lr_scheduler, Sequence) else [lr_scheduler] * count
    if len(factories) != count:
        raise ScheduleError(f"lr_scheduler lists {len(factories)} factories; the net has {count} blocks.")
    return schedule.fitted.rates_of(factories, schedule.optimizers)


_ADVICE = "Hand a DataLoader or a list of batches."


@dataclass
class _Run:
    """The state of a training run: what a checkpoint holds.

    Attributes:
        epoch: the epoch to train, from 0; `first`, that of this call.
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
    first: int = 0
    epoch: int = 0
    batch: int = 0
    done: int = 0
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0
    history: History = field(default_factory=History)
    _streams: list[torch.Tensor] = field(default_factory=list)  # states of the loader's generators as the epoch began
    _resumed: dict[str, Any] | None = None  # the checkpoint, until its epoch goes on
    _proved: bool = False  # whether a checkpoint of this run was read back
    _infinite: set[str] = field(default_factory=set)  # weights that are not finite on purpose, such as a mask

    def __post_init__(self) -> None:
        self.first = self.epoch = self.schedule.epochs

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
            first = self.epoch == self.first
            what = "empty: the loader gave no batch" if first else "exhausted: an iterator gives its batches once"
            raise DataError(f"the training data is {what} (epoch {self.epoch}). {_ADVICE}")
        self.schedule.raise_pending()
        self.sums = [s.item() for s in sums]
        self.seconds += time.perf_counter() - start
        if lr_interval == "epoch":
            self._step_rates()

    def end_epoch(self, result: dict[str, float]) -> None:
        """Add the epoch to the history with what :func:`evaluate` returned, and write a checkpoint."""
        means = [s / self.batch for s in self.sums]
        named = dict(result)
        val = {"val_loss": named.pop("loss", None), "val_accuracy": named.pop("accuracy", None)}
        entry = Epoch(self.epoch, means, self.seconds, **val, val_metrics=named)
        self.history.epochs.append(entry)
        self.epoch, self.batch, self.sums, self.seconds = self.epoch + 1, 0, [], 0.0
        self.schedule.fitted.epochs = self.epoch
        self._save(inside=False)

    def _step_rates(self) -> None:
        with warnings.catch_warnings():
            # The optimizer may have stepped in another process before a resume; a late block's has not stepped yet.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for rate in self.rates:
                rate.step()

    def _batches(self) -> Iterator[Pair]:
        """Yield the rest of the epoch: from its start, or from where a checkpoint was written."""
        with turn():  # nothing else may draw between the seed and the draw of the order
            source, first = self._start()
        if first is not None:
            yield first
        yield from source

    def _start(self) -> tuple[Iterator[Pair], Pair | None]:
        """Seed the epoch and start the loader; return the rest of the epoch, and the batch before it."""
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
            return source, first
        for count in range(self.batch if loader_state is None else 0):
            if next(source, None) is None:
                raise CheckpointError(
                    f"the checkpoint was written behind batch {self.batch} of an epoch, and the loader now gives "
                    f"{count} batches. Go on with the data it was written with."
                )
        # Only now: skipping batches draws random numbers, and starting a loader draws the seed of its workers.
        restore_random(resumed["random"])
        return source, None

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
        checkpoints.refuse_not_finite(self.path, net=self.net, schedule=self.schedule, allowed=self._infinite)
        checkpoints.write(self.path, state, prove=not self._proved)
        self._proved = True

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if self.path is None:
            return
        remove_leftovers(self.path)
        self._infinite = checkpoints.not_finite_in(self.net, self.schedule)
        in_memory = self.schedule.fitted.take_written(self.path)
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
        self.done, self.history = state["done"], history
        if in_memory:  # written by the call before this one: what has been changed since then stays
            return
        fitted = self.schedule.fitted
        self.net.load_state_dict(state["net"])  # first: Delayed runs blocks on stashed batches again
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.fitted, fitted.epochs = fitted, state["epoch"]  # it keeps what this process asked for
        for rate, (_, saved) in zip(self.rates, state["rates"], strict=True):
            rate.load_state_dict(saved)
        for generator, saved in zip(streams, state["streams"], strict=True):
            generator.set_state(saved)
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums, self.seconds = list(state["sums"]), state["seconds"]
        self._resumed = state

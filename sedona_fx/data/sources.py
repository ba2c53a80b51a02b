"""Read the data given to ``decouple`` and ``fit``: an iterable of (inputs, target) pairs, or one such pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, Subset

from sedona_fx.data.args import Args
from sedona_fx.data.overlap import refuse_overlap
from sedona_fx.errors import DataError
from sedona_fx.rng import seeded_init

Pair = tuple[Args, Any]
"""One batch: the inputs as arguments of the model, and the target."""

Source = Callable[[], Iterator[Pair]]
"""Starts an epoch of the data at each call."""


def is_pair(data: Any) -> bool:
    """Whether the data is one (inputs, target) pair: a plain tuple of two. Anything else is an iterable of pairs."""
    return isinstance(data, tuple) and len(data) == 2 and not hasattr(data, "_fields")


def as_pair(batch: Any, where: str = "the data") -> Pair:
    """Return one batch as a pair.

    Args:
        batch: a tuple or list of inputs and target.
        where: name of the data in the message.

    Raises:
        DataError: the batch is not a pair of inputs and target.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return Args.of(batch[0]), batch[1]
    what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise DataError(
        f"{where} gives {what} where (inputs, target) is expected. Wrap data without targets as [(x, x) for x in "
        "data]; several inputs are one tuple, ((x1, x2), target)."
    )


def first_pair(data: Any) -> Pair:
    """Return the first batch.

    Raises:
        DataError: the data is empty, or its first batch is not a pair.
    """
    if is_pair(data):
        return as_pair(data)
    for batch in batches(data, "the data"):
        return batch
    raise DataError("the data is empty: decouple needs at least one (inputs, target) batch.")


def batches(data: Any, where: str) -> Iterator[Pair]:
    """Return an iterator over the batches of the data; a single pair is its own only batch.

    Args:
        data: what the user passed.
        where: name of the data in messages.

    Raises:
        DataError: the data is not iterable; while iterating, a batch is not a pair.
    """
    if is_pair(data):
        return iter([as_pair(data, where)])
    try:
        iterator = iter(data)
    except TypeError:
        raise DataError(
            f"{where} is {type(data).__name__}, neither an (inputs, target) tuple nor an iterable of such pairs."
        ) from None
    return (as_pair(batch, where) for batch in iterator)


def one_shot(data: Any) -> bool:
    """Whether the data is known to give its batches only once, as a generator, ``zip(...)`` or ``iter(list)`` does.

    That an object is its own ``iter`` is not enough: a loader may start a new epoch there.
    """
    return isinstance(data, Iterator) and type(data).__module__ in ("builtins", "itertools")


def to_device(value: Any, device: torch.device) -> Any:
    """Return a nested value with every tensor on `device`.

    The host does not wait for a copy to an accelerator from pinned memory, nor for one between accelerators.
    """
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=device.type != "cpu")
    return pytree.tree_map_only(Tensor, lambda tensor: to_device(tensor, device), value)


def batch_count(data: Any) -> int | None:
    """Return the number of batches in an epoch, or None if the data has no length."""
    try:
        return len(data)
    except TypeError:
        return None


def first_examples(target: Any, size: int | None, count: int) -> Any:
    """Return the part of a target that belongs to the first `count` examples.

    Args:
        target: any nested value. Tensors whose first dimension is `size` are shortened.
        size: number of examples in the batch; None leaves the target unchanged.
        count: number of examples to keep.
    """
    if size is None or size <= count:
        return target

    def shortened(tensor: Tensor) -> Tensor:
        return tensor[:count] if tensor.dim() > 0 and tensor.shape[0] == size else tensor

    return pytree.tree_map_only(Tensor, shortened, target)


@dataclass(frozen=True)
class Epochs:
    """A source that iterates over the data of the user.

    Attributes:
        data: what the user passed.
        where: name of the data in messages.
    """

    data: Any
    where: str

    def __call__(self) -> Iterator[Pair]:
        """Start an epoch."""
        return batches(self.data, self.where)


@dataclass(frozen=True)
class Mapped:
    """A source that applies a function to every pair of another source.

    Attributes:
        source: the other source.
        change: the function.
    """

    source: Source
    change: Callable[[Pair], Pair]

    def __call__(self) -> Iterator[Pair]:
        """Start an epoch."""
        return map(self.change, self.source())


def users_data(source: Source) -> Any:
    """Return the data of the user that a source iterates over, or None if the source iterates over something else."""
    while isinstance(source, Mapped):
        source = source.source
    return source.data if isinstance(source, Epochs) else None


def search_sources(
    data: Any, val_data: Any, seed: int, val_batch_size: int | None
) -> tuple[Source, Source, int | None]:
    """Return the search's training and validation epochs, and the number of training batches if it is known.

    Without `val_data`, `data` is split 60/40. For a loader of a map-style dataset, the indices that its sampler gives
    are split at random, or its batches if it has a batch sampler of its own. Of any other data the last 40 % of the
    batches are for validation, so data that is shuffled anew in each epoch should be passed with `val_data`.

    Args:
        data: a loader or another iterable of pairs that can be iterated over several times.
        val_data: the same for validation, or None to split `data`.
        seed: of the random split.
        val_batch_size: of the validation part of a split loader; None for that of the loader.

    Raises:
        DataError: the data can be iterated over only once, is too small to split, or has examples in common with
            `val_data`.
    """
    _require_epochs(data, "data")
    if val_data is not None:
        _require_epochs(val_data, "val_data")
        refuse_overlap(data, val_data)
        return Epochs(data, "data"), Epochs(val_data, "val_data"), batch_count(data)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _split_loader(data, seed, val_batch_size)
    count = sum(1 for _ in batches(data, "data"))
    if count < 2:
        raise DataError(f"the search needs at least 2 batches, one of them for validation; the data has {count}.")
    if next(batches(data, "data"), None) is None:
        raise _exhausted(data, "data")
    cut = _cut(count)
    return (lambda: islice(batches(data, "data"), cut)), (lambda: islice(batches(data, "data"), cut, None)), cut


def _split_loader(loader: DataLoader[Any], seed: int, val_batch_size: int | None) -> tuple[Source, Source, int]:
    settings = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    keeps_batches = loader.batch_size is None  # the loader has its own batch sampler, or does not form batches
    drawn = _one_epoch(loader, seed)
    if len(drawn) < 2:
        raise DataError(
            f"the search splits the data 60/40 for training and validation; {len(drawn)} "
            f"{'batches' if keeps_batches else 'examples'} are too few."
        )
    permutation = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled, cut = [drawn[k] for k in permutation], _cut(len(drawn))

    def part_loader(part: list[Any], batch_size: int) -> DataLoader[Any]:
        if loader.batch_sampler is None:
            return DataLoader(Subset(loader.dataset, part), batch_size=None, shuffle=True, **settings)
        if keeps_batches:
            return DataLoader(loader.dataset, batch_sampler=_ShuffledBatches(part), **settings)
        size = min(batch_size, len(part))
        return DataLoader(Subset(loader.dataset, part), batch_size=size, shuffle=True, drop_last=True, **settings)

    batch_size = loader.batch_size or 1
    train, val = part_loader(shuffled[:cut], batch_size), part_loader(shuffled[cut:], val_batch_size or batch_size)
    return (lambda: batches(train, "data")), (lambda: batches(val, "data")), len(train)


class _ShuffledBatches(Sampler[list[int]]):
    """Fixed batches of indices, in a new random order in each epoch."""

    def __init__(self, groups: list[list[int]]) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return (self.groups[k] for k in torch.randperm(len(self.groups)).tolist())

    def __len__(self) -> int:
        return len(self.groups)


def _one_epoch(loader: DataLoader[Any], seed: int) -> list[Any]:
    """Return what a loader draws in an epoch: indices, each once, or batches of indices."""
    if type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None:
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    # A sampler may give only a part of the dataset. Examples that it leaves out must not be used.
    with seeded_init(seed):
        if loader.batch_size is None and loader.batch_sampler is not None:
            return [list(batch) for batch in loader.batch_sampler]
        return sorted(set(loader.sampler))


def _cut(count: int) -> int:
    """Return how many of `count` items are for training: 60 %, with at least one item in either part."""
    return min(count - 1, max(1, round(0.6 * count)))


def _require_epochs(data: Any, name: str) -> None:
    if is_pair(data):
        raise DataError(
            f"{name} is a single (inputs, target) pair, which is not enough to search on. Hand a loader, or use "
            "search='balanced', search='uniform', cuts=[...] or plan=..., which need one batch only."
        )
    batches(data, name)  # raises if the data is not iterable
    if one_shot(data):
        raise _exhausted(data, name)


def _exhausted(data: Any, name: str) -> DataError:
    return DataError(
        f"{name} is a one-shot iterator ({type(data).__name__}): it is exhausted after one pass, and the search "
        "goes through the data several times. Hand a DataLoader or a list of batches."
    )

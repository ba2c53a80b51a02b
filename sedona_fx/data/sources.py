"""The data that ``decouple`` and ``fit`` take: an iterable of (inputs, target), or one such pair."""

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

Pair = tuple[Args, Any]


def is_pair(data: Any) -> bool:
    """Whether the data is one (inputs, target) pair: a tuple of two. Anything else is an iterable of pairs."""
    return isinstance(data, tuple) and len(data) == 2 and not hasattr(data, "_fields")


def as_pair(batch: Any, where: str = "the data") -> Pair:
    """Read one batch.

    Raises:
        DataError: it is not a pair of inputs and target.
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
        DataError: there is none.
    """
    if is_pair(data):
        return as_pair(data)
    for batch in batches(data, "the data"):
        return batch
    raise DataError("the data is empty: decouple needs at least one (inputs, target) batch.")


def batches(data: Any, where: str) -> Iterator[Pair]:
    """Start to iterate over data, pair by pair; one single pair is its only batch."""
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
    """Whether the data is known to give its batches once only: a generator, ``zip(...)``, ``iter(list)`` and the like.

    Not every iterator that is its own ``iter``: loaders may start anew there.
    """
    return isinstance(data, Iterator) and type(data).__module__ in ("builtins", "itertools")


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor of a nested value."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), value)


def first_examples(target: Any, size: int | None, count: int) -> Any:
    """Return the target of the first `count` of `size` examples."""
    if size is None or size <= count:
        return target
    return pytree.tree_map_only(Tensor, lambda t: t[:count] if t.dim() > 0 and t.shape[0] == size else t, target)


Source = Callable[[], Iterator[Pair]]
"""One epoch of data at a call."""


@dataclass(frozen=True)
class Epochs:
    """A source that goes through the user's own data; `where` is its name in messages."""

    data: Any
    where: str

    def __call__(self) -> Iterator[Pair]:
        """Start an epoch."""
        return batches(self.data, self.where)


@dataclass(frozen=True)
class Mapped:
    """A source whose pairs are changed one by one."""

    source: Source
    change: Callable[[Pair], Pair]

    def __call__(self) -> Iterator[Pair]:
        """Start an epoch."""
        return map(self.change, self.source())


def users_data(source: Source) -> Any:
    """Return what the user handed over, where a source goes through that itself; else None."""
    while isinstance(source, Mapped):
        source = source.source
    return source.data if isinstance(source, Epochs) else None


def search_sources(
    data: Any, val_data: Any, seed: int, val_batch_size: int | None
) -> tuple[Source, Source, int | None]:
    """Return the search's training and validation epochs, and the number of training batches if it is known.

    Without `val_data`, a map-style loader's indices (those its sampler gives) are split 60/40 by `seed`, or its batches
    where it has a batch sampler of its own. Of another re-iterable the last 40 % of its batches are for validation: one
    that shuffles anew each time should come with `val_data`.

    Raises:
        DataError: the data cannot be gone through twice, is too small to split, or is the validation data in part.
    """
    _require_epochs(data, "data")
    if val_data is not None:
        _require_epochs(val_data, "val_data")
        refuse_overlap(data, val_data)
        return Epochs(data, "data"), Epochs(val_data, "val_data"), _length(data)
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
    keep = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    whole = loader.batch_size is None  # the loader's own batch sampler, or no batching at all
    drawn = _drawn(loader, seed)
    if len(drawn) < 2:
        raise DataError(
            f"the search splits the data 60/40 for training and validation; {len(drawn)} "
            f"{'batches' if whole else 'examples'} are too few."
        )
    shuffled = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).tolist()
    order, cut = [drawn[k] for k in shuffled], _cut(len(drawn))

    def make(part: list[Any], batch_size: int) -> DataLoader[Any]:
        if loader.batch_sampler is None:
            return DataLoader(Subset(loader.dataset, part), batch_size=None, shuffle=True, **keep)
        if whole:
            return DataLoader(loader.dataset, batch_sampler=_Shuffled(part), **keep)
        size = min(batch_size, len(part))
        return DataLoader(Subset(loader.dataset, part), batch_size=size, shuffle=True, drop_last=True, **keep)

    batch = loader.batch_size or 1
    train, val = make(order[:cut], batch), make(order[cut:], val_batch_size or batch)
    return (lambda: batches(train, "data")), (lambda: batches(val, "data")), len(train)


class _Shuffled(Sampler[list[int]]):
    """Given batches of indices, in a new order each time."""

    def __init__(self, groups: list[list[int]]) -> None:
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        return (self.groups[k] for k in torch.randperm(len(self.groups)).tolist())

    def __len__(self) -> int:
        return len(self.groups)


def _drawn(loader: DataLoader[Any], seed: int) -> list[Any]:
    """Return what a loader goes through in an epoch: indices, each once, or batches of them."""
    if type(loader.sampler) in (RandomSampler, SequentialSampler) and loader.batch_size is not None:
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    # A sampler may stand for a part of the dataset: what it leaves out is not ours to train on.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if loader.batch_size is None and loader.batch_sampler is not None:
            return [list(batch) for batch in loader.batch_sampler]
        return sorted(set(loader.sampler))


def _cut(count: int) -> int:
    return min(count - 1, max(1, round(0.6 * count)))


def _require_epochs(data: Any, name: str) -> None:
    if is_pair(data):
        raise DataError(
            f"{name} is a single (inputs, target) pair, which is not enough to search on. Hand a loader, or use "
            "search='balanced', search='uniform', cuts=[...] or plan=..., which need one batch only."
        )
    batches(data, name)  # raises if it is no iterable
    if one_shot(data):
        raise _exhausted(data, name)


def _exhausted(data: Any, name: str) -> DataError:
    return DataError(
        f"{name} is a one-shot iterator ({type(data).__name__}): it is exhausted after one pass, and the search "
        "goes through the data several times. Hand a DataLoader or a list of batches."
    )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None

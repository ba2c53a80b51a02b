"""The data that ``decouple`` and ``fit`` take: an iterable of (inputs, target), or one such pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, Subset

from sedona_fx.args import Args
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
    """Iterate over data once, pair by pair."""
    try:
        iterator = iter(data)
    except TypeError:
        raise DataError(
            f"{where} is {type(data).__name__}, neither an (inputs, target) tuple nor an iterable of such pairs."
        ) from None
    for batch in iterator:
        yield as_pair(batch, where)


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


def search_sources(
    data: Any, val_data: Any, seed: int, val_batch_size: int | None
) -> tuple[Source, Source, int | None]:
    """Return the search's training and validation epochs, and the number of training batches if it is known.

    Without `val_data`, a map-style loader's indices are split 60/40 by `seed`; of another re-iterable the last 40 % of
    its batches are for validation.

    Raises:
        DataError: the data cannot be gone through twice, or is too small to split.
    """
    _require_epochs(data, "data")
    if val_data is not None:
        _require_epochs(val_data, "val_data")
        return (lambda: batches(data, "data")), (lambda: batches(val_data, "val_data")), _length(data)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset) and data.batch_size is not None:
        return _split_loader(data, seed, val_batch_size)
    count = sum(1 for _ in batches(data, "data"))
    if count < 2:
        raise DataError(f"the search needs at least 2 batches, one of them for validation; the data has {count}.")
    cut = min(count - 1, max(1, round(0.6 * count)))
    return (lambda: islice(batches(data, "data"), cut)), (lambda: islice(batches(data, "data"), cut, None)), cut


def _split_loader(loader: DataLoader[Any], seed: int, val_batch_size: int | None) -> tuple[Source, Source, int]:
    size = len(loader.dataset)  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(0.6 * size)
    batch = loader.batch_size or 1
    if min(cut, size - cut) < 1:
        raise DataError(f"the search splits the data 60/40 for training and validation; {size} examples are too few.")

    def make(indices: list[int], batch_size: int) -> DataLoader[Any]:
        return DataLoader(
            Subset(loader.dataset, indices),
            batch_size=min(batch_size, len(indices)),
            shuffle=True,
            drop_last=True,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )

    train, val = make(order[:cut], batch), make(order[cut:], val_batch_size or batch)
    return (lambda: batches(train, "data")), (lambda: batches(val, "data")), len(train)


def _require_epochs(data: Any, name: str) -> None:
    if is_pair(data):
        raise DataError(
            f"{name} is a single (inputs, target) pair, which is not enough to search on. Hand a loader, or use "
            "search='balanced', search='uniform', cuts=[...] or plan=..., which need one batch only."
        )
    if iter(data) is data:
        raise DataError(
            f"{name} is a one-shot iterator ({type(data).__name__}): it is exhausted after one pass, and the search "
            "goes through the data several times. Hand a DataLoader or a list of batches."
        )


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None

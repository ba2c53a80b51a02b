"""Which examples two sets of data have in common, as far as data tells without being read.

Map-style datasets are the same where they are one object, and their examples where the indices are: behind subsets of
subsets, concatenations and samplers. Whatever does not say which examples it gives (a generator, a stream, a sampler
of the user's own) has none in common with anything but itself: nothing is refused on suspicion.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sedona_fx.data.args import Args
from sedona_fx.errors import DataError

Indices = NDArray[np.int64]


def refuse_overlap(data: Any, val_data: Any) -> None:
    """See that the search does not validate on what it trains on.

    Raises:
        DataError: the two are one object, or known to have examples in common; with how many.
    """
    count = common_examples(data, val_data)
    if not count and data is not val_data:
        return
    known = f"{count or 'all'} {'example' if count == 1 else 'examples'} in common"
    why = ", being one object" if data is val_data else ""
    raise DataError(
        f"data and val_data have {known}{why}. A search that validates on what it trains on chooses the plan that "
        "learns by heart. Leave val_data out, then data is split 60/40; or split it with torch.utils.data.random_split."
    )


def common_examples(data: Any, val_data: Any) -> int:
    """Return how many examples are known to be in both: those of shared batches in lists, or of shared indices."""
    if isinstance(data, (list, tuple)) and isinstance(val_data, (list, tuple)):
        held = {id(batch) for batch in data}
        return sum(_size(batch) for batch in {id(b): b for b in val_data if id(b) in held}.values())
    first, second = examples(data), examples(val_data)
    return sum(len(np.intersect1d(first[base], second[base])) for base in first.keys() & second.keys())


def examples(data: Any) -> dict[Hashable, Indices]:
    """Return the sorted indices that a loader or a map-style dataset gives over its epochs, by dataset.

    Empty where that is unknown.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return {}
    drawn: Any = range(len(dataset))
    if isinstance(data, DataLoader):
        drawn = _drawn(data.sampler if data.batch_sampler is None else data.batch_sampler)
    indices = _indices(drawn)
    found: dict[Hashable, Indices] = {}
    for base, part in _bases(dataset, indices) if indices is not None else ():
        found[base] = np.union1d(found[base], part) if base in found else np.unique(part)
    return found


def _drawn(sampler: Any) -> Any:
    """Return the indices that a sampler can draw, without drawing; None where it does not say."""
    if type(sampler) is BatchSampler:
        return _drawn(sampler.sampler)
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    if type(sampler) is DistributedSampler:  # all ranks together
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    if type(sampler) is WeightedRandomSampler:
        return sampler.weights.nonzero().flatten()
    if isinstance(sampler, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in sampler):
        return [index for group in sampler for index in group]
    return sampler if isinstance(sampler, (list, tuple, range, Tensor)) else None


def _indices(drawn: Any) -> Indices | None:
    """Return indices as an array, or None where they are no whole numbers."""
    if drawn is None:
        return None
    try:
        array = np.asarray(drawn)
    except (TypeError, ValueError):  # of different lengths, say
        return None
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    return array.astype(np.int64) if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else None


def _bases(dataset: Any, indices: Indices) -> Iterator[tuple[Hashable, Indices]]:
    """Yield the datasets behind a dataset, each with the indices there."""
    indices = np.where(indices < 0, indices + len(dataset), indices)
    if isinstance(dataset, Subset):
        inner = _indices(dataset.indices)
        if inner is not None:
            yield from _bases(dataset.dataset, inner[indices])
    elif isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        part = np.searchsorted(ends, indices, side="right")
        for k, inner_dataset in enumerate(dataset.datasets):
            yield from _bases(inner_dataset, indices[part == k] - (ends[k - 1] if k else 0))
    else:
        yield _identity(dataset), indices


def _identity(dataset: Any) -> Hashable:
    """Return what makes a dataset the same: itself, or the very tensors it is a view of."""
    return tuple(id(t) for t in dataset.tensors) if type(dataset) is TensorDataset else id(dataset)


def _size(batch: Any) -> int:
    """Return the number of examples in an (inputs, target) batch; 1 where it cannot be told."""
    return Args.of(batch[0]).batch_size() or 1 if isinstance(batch, (list, tuple)) and batch else 1

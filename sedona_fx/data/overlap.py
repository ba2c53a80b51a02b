"""Which examples two sets of data have in common, as far as that is known without reading them.

Two map-style datasets are the same if they are one object, and two of their examples are the same if their indices are,
after nested subsets, concatenations and samplers are resolved. Data that does not say which examples it gives (a
generator, a stream, a sampler of the user) is taken to have none in common with anything but itself: nothing is refused
on suspicion.
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
    """Raise if the search would validate on examples that it trains on.

    Raises:
        DataError: the two are one object, or are known to have examples in common. The message has the number.
    """
    count = common_examples(data, val_data)
    if not count and data is not val_data:
        return
    overlap = f"{count or 'all'} {'example' if count == 1 else 'examples'} in common"
    why = ", being one object" if data is val_data else ""
    raise DataError(
        f"data and val_data have {overlap}{why}. A search that validates on what it trains on chooses the plan that "
        "learns by heart. Leave val_data out, then data is split 60/40; or split it with torch.utils.data.random_split."
    )


def common_examples(data: Any, val_data: Any) -> int:
    """Return how many examples are known to be in both.

    Lists of batches have the examples of those batches in common that are one object; loaders and datasets have those
    in common that are at the same index of the same dataset.
    """
    if isinstance(data, (list, tuple)) and isinstance(val_data, (list, tuple)):
        ids = {id(batch) for batch in data}
        shared = {id(batch): batch for batch in val_data if id(batch) in ids}
        return sum(_batch_size(batch) for batch in shared.values())
    first, second = examples(data), examples(val_data)
    return sum(len(np.intersect1d(first[base], second[base])) for base in first.keys() & second.keys())


def examples(data: Any) -> dict[Hashable, Indices]:
    """Return the sorted indices that a loader or a map-style dataset gives over all its epochs, by base dataset.

    Empty if they are unknown.
    """
    dataset: Any = data.dataset if isinstance(data, DataLoader) else data
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        return {}
    drawn: Any = range(len(dataset))
    if isinstance(data, DataLoader):
        drawn = _drawable(data.sampler if data.batch_sampler is None else data.batch_sampler)
    indices = _as_indices(drawn)
    by_base: dict[Hashable, Indices] = {}
    for base, part in _bases(dataset, indices) if indices is not None else ():
        by_base[base] = np.union1d(by_base[base], part) if base in by_base else np.unique(part)
    return by_base


def _drawable(sampler: Any) -> Any:
    """Return the indices that a sampler can draw, without drawing any; None if they are unknown."""
    if type(sampler) is BatchSampler:
        return _drawable(sampler.sampler)
    if type(sampler) in (RandomSampler, SequentialSampler):
        return range(len(sampler.data_source))
    if type(sampler) is DistributedSampler:  # those of all ranks
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if type(sampler) is SubsetRandomSampler:
        return sampler.indices
    if type(sampler) is WeightedRandomSampler:
        return sampler.weights.nonzero().flatten()
    if isinstance(sampler, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in sampler):
        return [index for group in sampler for index in group]
    return sampler if isinstance(sampler, (list, tuple, range, Tensor)) else None


def _as_indices(drawn: Any) -> Indices | None:
    """Return indices as an array, or None if they are not integers."""
    if drawn is None:
        return None
    try:
        array = np.asarray(drawn)
    except (TypeError, ValueError):  # sequences of different lengths, for example
        return None
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    return array.astype(np.int64) if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) else None


def _bases(dataset: Any, indices: Indices) -> Iterator[tuple[Hashable, Indices]]:
    """Yield the datasets that a dataset is composed of, each with the indices into it."""
    indices = np.where(indices < 0, indices + len(dataset), indices)
    if isinstance(dataset, Subset):
        subset_indices = _as_indices(dataset.indices)
        if subset_indices is not None:
            yield from _bases(dataset.dataset, subset_indices[indices])
    elif isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        part = np.searchsorted(ends, indices, side="right")
        for k, part_dataset in enumerate(dataset.datasets):
            yield from _bases(part_dataset, indices[part == k] - (ends[k - 1] if k else 0))
    else:
        yield _identity(dataset), indices


def _identity(dataset: Any) -> Hashable:
    """Return the identity of a dataset: that of the object, or of the tensors that it is a view of."""
    return tuple(id(tensor) for tensor in dataset.tensors) if type(dataset) is TensorDataset else id(dataset)


def _batch_size(batch: Any) -> int:
    """Return the number of examples in an (inputs, target) batch; 1 if it is unknown."""
    return Args.of(batch[0]).batch_size() or 1 if isinstance(batch, (list, tuple)) and batch else 1

"""Validation data that overlaps the training data: counted where data says which examples it gives, else let pass."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

import sedona_fx
from sedona_fx.data.overlap import common_examples
from sedona_fx.data.sources import search_sources
from sedona_fx.errors import DataError
from sedona_fx.search import Rollout


class Numbers(Dataset):
    """Example k is (k, k)."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, k):
        number = range(self.size)[int(k)]
        return torch.tensor([float(number)]), torch.tensor(number)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Numbers(8)[k] for k in range(8))


class Own(Sampler):
    """A sampler of the user's own: nobody knows what it draws before it does."""

    def __init__(self, indices):
        self.drawn, self.indices = 0, indices

    def __iter__(self):
        self.drawn += 1
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


BASE, OTHER = Numbers(20), Numbers(20)


def loader(dataset=BASE, **options):
    return DataLoader(dataset, batch_size=options.pop("batch_size", 4), **options)


def seen(data):
    """Return the numbers that a loader gives in many epochs."""
    return {int(y) for _ in range(60) for _, targets in data for y in targets}


def sub(*indices, of=BASE):
    return Subset(of, list(indices))


LOADERS = {
    "whole": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "part": lambda: loader(sub(0, 3, 5, 19), shuffle=True),
    "negative": lambda: loader(sub(-1, -20)),
    "nested": lambda: loader(Subset(Subset(Subset(BASE, range(4, 16)), [1, 2, 11]), [0, 2])),
    "tensor indices": lambda: loader(Subset(BASE, torch.tensor([7, 8]))),
    "doubled": lambda: loader(sub(2, 2, 2, 9)),
    "sampler": lambda: loader(sampler=SubsetRandomSampler([1, 2, 3, 18])),
    "sampler on a part": lambda: loader(sub(6, 7, 8, 9), sampler=SubsetRandomSampler([1, 3])),
    "sequential": lambda: loader(sub(6, 7, 8), sampler=SequentialSampler(sub(6, 7, 8))),
    "with replacement": lambda: loader(sampler=RandomSampler(BASE, replacement=True, num_samples=40)),
    "few of all": lambda: loader(sampler=RandomSampler(BASE, num_samples=5)),
    "weighted": lambda: loader(sampler=WeightedRandomSampler([0.0, 1.0, 0.0, 2.0, *[0.0] * 16], 12)),
    "batches": lambda: DataLoader(BASE, batch_sampler=BatchSampler(SubsetRandomSampler([4, 5, 6]), 2, drop_last=False)),
    "given batches": lambda: DataLoader(BASE, batch_sampler=[[0, 1, 2], [8]]),
    "given indices": lambda: loader(sampler=[11, 12]),
    "concatenated": lambda: loader(ConcatDataset([sub(3, 4), OTHER, sub(5, of=BASE)])),
    "none": lambda: loader(sub()),
}


def test_the_count_is_that_of_what_loaders_give():
    given = {name: seen(make()) for name, make in LOADERS.items()}
    given["concatenated"] = {3, 4, 5}  # and the numbers of another dataset between them
    for first, second in itertools.product(LOADERS, repeat=2):
        count = common_examples(LOADERS[first](), LOADERS[second]())
        others = 20 if first == second == "concatenated" else 0
        assert count == others + len(given[first] & given[second]), (first, second)
    assert [len(numbers) for numbers in given.values()] == [20, 20, 4, 2, 2, 2, 2, 4, 2, 3, 20, 20, 2, 3, 4, 2, 3, 0]


def test_all_ranks_count_together():
    first = DistributedSampler(BASE, num_replicas=2, rank=0)
    assert common_examples(loader(sampler=first), loader(sub(0, 1, 2, 3))) == 4


def test_datasets_without_a_loader_and_views_of_the_same_tensors():
    x, y = torch.randn(6, 3), torch.arange(6)
    assert common_examples(sub(1, 2, 3), sub(3, 4)) == 1
    assert common_examples(loader(TensorDataset(x, y)), loader(Subset(TensorDataset(x, y), [0, 4]))) == 2
    assert common_examples(loader(TensorDataset(x, y)), loader(TensorDataset(x.clone(), y))) == 0


def test_nothing_is_refused_on_suspicion():
    disjoint = random_split(BASE, [0.6, 0.4], generator=torch.Generator().manual_seed(0))
    own = Own([0, 1, 2, 3])
    stream = Stream()
    pairs = [
        (loader(disjoint[0], shuffle=True), loader(disjoint[1])),
        (loader(), loader(OTHER)),  # equal examples, but who knows?
        (loader(sampler=own), loader()),
        (loader(stream), loader(stream)),
        (DataLoader(BASE, batch_sampler=Own([[0, 1]])), loader()),
        ([next(iter(loader()))], [next(iter(loader()))]),
        ([next(iter(loader()))], loader()),
        ((batch for batch in loader()), loader()),
    ]
    for data, val_data in pairs:
        assert common_examples(data, val_data) == 0
    assert own.drawn == 0
    train, val, count = search_sources(*pairs[0], 0, None)
    assert count == 3
    assert not {int(k) for _, y in train() for k in y} & {int(k) for _, y in val() for k in y}


def test_lists_of_batches():
    batches = [(torch.randn(4, 2), torch.arange(4)), (torch.randn(3, 2), torch.arange(3)), (torch.randn(2, 2), None)]
    assert common_examples(batches, batches[1:]) == 5
    assert common_examples(batches[:1], batches[1:]) == 0
    with pytest.raises(DataError, match=r"have 9 examples in common, being one object\. .* Leave val_data out"):
        search_sources(batches, batches, 0, None)


def test_what_is_one_object_is_refused_whatever_it_is():
    class Batches:
        def __iter__(self):
            return iter(loader())

    own, one = Batches(), loader(shuffle=True)
    with pytest.raises(DataError, match="have all examples in common, being one object"):
        search_sources(own, own, 0, None)
    with pytest.raises(DataError, match="have 20 examples in common, being one object"):
        search_sources(one, one, 0, None)
    search_sources(own, Batches(), 0, None)


class Images(Numbers):
    def __getitem__(self, k):
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(k)), torch.tensor(k % 3)


def test_decouple_refuses_it_where_it_searches():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    images = Images(20)
    data, val_data = loader(sub(*range(12), of=images)), loader(sub(11, *range(12, 20), of=images))
    search = Rollout(steps=2, plans=2)
    with pytest.raises(DataError, match=r"data and val_data have 1 example in common\. .* learns by heart"):
        sedona_fx.decouple(model, data, val_data=val_data, blocks=2, search=search, progress=False)
    net = sedona_fx.decouple(model, data, val_data=val_data, blocks=2, search="uniform", progress=False)
    assert len(net.blocks) == 2
    apart = loader(sub(*range(12, 20), of=images))
    assert len(sedona_fx.decouple(model, data, val_data=apart, blocks=2, search=search, progress=False).blocks) == 2

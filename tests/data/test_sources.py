"""The data that decouple and fit take: pairs, iterables, and how a search splits them."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sedona_fx.data.args import Args
from sedona_fx.data.sources import (
    as_pair,
    batches,
    first_examples,
    first_pair,
    is_pair,
    one_shot,
    search_sources,
    to_device,
)
from sedona_fx.errors import DataError

X, Y = torch.arange(12.0).reshape(4, 3), torch.arange(4)


class Numbers(Dataset):
    """Example k is (k, k)."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, k):
        return torch.tensor([float(k)]), torch.tensor(k)


class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([float(k)]), torch.tensor(k)) for k in range(10))


class Restarts:
    """Its own iterator, but it starts anew at each iter."""

    def __init__(self, count=5):
        self.count = count

    def __iter__(self):
        self.k = -1
        return self

    def __next__(self):
        self.k += 1
        if self.k >= self.count:
            raise StopIteration
        return torch.full((2, 1), float(self.k)), torch.full((2,), self.k)


def targets(source):
    return [target.flatten().tolist() for _, target in source()]


def examples(source):
    return sorted(k for batch in targets(source) for k in batch)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_a_tuple_of_two_is_a_pair_and_nothing_else_is():
    assert is_pair((X, Y))
    assert is_pair(({"image": X}, Y))
    assert not is_pair([X, Y])
    assert not is_pair([(X, Y)])
    assert not is_pair((X, Y, Y))
    assert not is_pair(namedtuple("Batch", "x y")(X, Y))


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], namedtuple("Batch", "x y")(X, Y)])
def test_batches_of_all_forms(batch):
    args, target = as_pair(batch)
    assert args.args == (X,)
    assert target is Y
    assert as_pair(({"image": X, "mask": None}, Y))[0].kwargs == {"image": X, "mask": None}
    assert as_pair(((X, X), Y))[0].args == (X, X)
    assert as_pair((Args(X, flag=1), Y))[0].kwargs == {"flag": 1}


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (X, "a Tensor"),
        ((X, Y, Y), "a tuple of 3"),
        ([X], "a list of 1"),
        ({"x": X, "labels": Y}, "a dict"),
        (3, "a int"),
    ],
)
def test_what_is_no_pair(batch, what):
    with pytest.raises(DataError, match=rf"mine gives {what} where \(inputs, target\) is expected\. Wrap"):
        next(batches([batch], "mine"))


def test_first_pair():
    assert first_pair((X, Y))[1] is Y
    assert first_pair([(X, Y), (X, X)])[1] is Y
    assert first_pair(iter([(X, Y)]))[1] is Y
    assert first_pair(DataLoader(Numbers(4), batch_size=2))[1].tolist() == [0, 1]
    with pytest.raises(DataError, match="empty: decouple needs at least one"):
        first_pair([])
    with pytest.raises(DataError, match="the data is int, neither"):
        first_pair(3)
    with pytest.raises(DataError, match="the data is NoneType, neither"):
        first_pair(None)


def test_batches_start_at_once_and_a_pair_is_its_only_batch():
    with pytest.raises(DataError, match="mine is int, neither"):
        batches(3, "mine")
    assert [target is Y for _, target in batches((X, Y), "mine")] == [True]
    assert [len(args.args) for args, _ in batches((((X, X), Y)), "mine")] == [2]


def test_one_shot():
    assert one_shot(iter([1]))
    assert one_shot(k for k in [1])
    assert one_shot(zip([1], strict=True))
    assert not one_shot([1])
    assert not one_shot(Restarts())
    assert not one_shot(3)
    assert not one_shot(DataLoader(Numbers(2)))


def test_helpers():
    moved = to_device({"a": [X, 3]}, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == 3
    few = first_examples({"class": Y, "weights": torch.ones(3), "n": 4}, 4, 2)
    assert few["class"].tolist() == [0, 1]
    assert few["weights"].shape == (3,)
    assert first_examples(Y, None, 2) is Y
    assert first_examples(Y, 2, 2) is Y


# ---- the split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_is_split_60_40_by_seed(shuffle):
    loader = DataLoader(Numbers(20), batch_size=4, shuffle=shuffle)
    train, val, count = search_sources(loader, None, 0, None)
    assert count == 3
    assert (len(examples(train)), len(examples(val))) == (12, 8)
    assert sorted(examples(train) + examples(val)) == list(range(20))
    assert examples(train) == examples(train)  # the same examples in every epoch ...
    assert targets(train) != targets(train)  # ... in another order
    assert examples(search_sources(loader, None, 0, None)[0]) == examples(train)
    assert examples(search_sources(loader, None, 1, None)[0]) != examples(train)


def test_batch_sizes():
    loader = DataLoader(Numbers(20), batch_size=4)
    assert [len(batch) for batch in targets(search_sources(loader, None, 0, 2)[1])] == [2] * 4
    assert [len(batch) for batch in targets(search_sources(loader, None, 0, 100)[1])] == [8]
    train, val, count = search_sources(DataLoader(Numbers(2), batch_size=8), None, 0, None)
    assert (examples(train) + examples(val), count) != ([], 0)
    with pytest.raises(DataError, match="1 examples are too few"):
        search_sources(DataLoader(Numbers(1)), None, 0, None)
    with pytest.raises(DataError, match="0 examples are too few"):
        search_sources(DataLoader(Numbers(0)), None, 0, None)


def test_a_sampler_that_leaves_examples_out_keeps_them_out():
    loader = DataLoader(Numbers(20), batch_size=2, sampler=SubsetRandomSampler(range(5, 15)))
    train, val, _ = search_sources(loader, None, 0, None)
    assert sorted(examples(train) + examples(val)) == list(range(5, 15))
    state = torch.get_rng_state()
    weights = [1.0] * 10 + [0.0] * 10
    sampler = WeightedRandomSampler(weights, 10, replacement=False)
    train, val, _ = search_sources(DataLoader(Numbers(20), batch_size=2, sampler=sampler), None, 0, None)
    assert sorted(examples(train) + examples(val)) == list(range(10))
    search_sources(loader, None, 0, None)
    torch.set_rng_state(state)


def test_a_batch_sampler_is_split_by_its_batches_without_overlap():
    sampler = BatchSampler(SubsetRandomSampler(range(20)), 4, drop_last=False)  # other batches at each pass
    train, val, count = search_sources(DataLoader(Numbers(20), batch_sampler=sampler), None, 0, None)
    assert count == 3
    for _ in range(3):
        assert sorted(examples(train) + examples(val)) == list(range(20))
    groups = {tuple(batch) for batch in targets(train)}
    assert {tuple(batch) for batch in targets(train)} == groups


def test_a_dataset_of_whole_batches():
    data = TensorDataset(torch.randn(10, 3, 1), torch.arange(30).reshape(10, 3))
    train, val, count = search_sources(DataLoader(data, batch_size=None), None, 0, None)
    assert count == 6
    assert sorted(examples(train) + examples(val)) == list(range(30))
    assert all(len(batch) == 3 for batch in targets(train) + targets(val))


def doubled(items):
    return torch.stack([x for x, _ in items]), 2 * torch.stack([y for _, y in items])


def test_a_loaders_own_settings_are_kept(monkeypatch):
    made = []
    original = DataLoader.__init__

    def init(self, *args, **kwargs):
        made.append(kwargs)
        original(self, *args, **kwargs)

    options = {
        "num_workers": 1,
        "collate_fn": doubled,
        "timeout": 30,
        "worker_init_fn": len,
        "multiprocessing_context": "spawn",
        "prefetch_factor": 3,
        "persistent_workers": True,
    }
    loader = DataLoader(Numbers(20), batch_size=4, **options)
    monkeypatch.setattr(DataLoader, "__init__", init)
    search_sources(loader, None, 0, None)
    for kwargs in made:
        assert {name: kwargs[name] for name in options if name != "multiprocessing_context"} == {
            name: value for name, value in options.items() if name != "multiprocessing_context"
        }
        assert kwargs["multiprocessing_context"].get_start_method() == "spawn"
    plain = DataLoader(Numbers(20), batch_size=4, collate_fn=doubled)
    assert all(k % 2 == 0 for k in examples(search_sources(plain, None, 0, None)[0]))


@pytest.mark.parametrize("data", [[(X, Y + 10 * k) for k in range(5)], Restarts(), DataLoader(Stream(), batch_size=2)])
def test_other_iterables_are_split_by_whole_batches(data):
    train, val, count = search_sources(data, None, 0, None)
    assert count == len(targets(train)) == 3
    assert len(targets(val)) == 2
    assert [target.tolist() for _, target in batches(data, "data")] == targets(train) + targets(val)
    assert targets(train) == targets(train)


def test_too_few_batches():
    assert [len(targets(s)) for s in search_sources([(X, Y)] * 2, None, 0, None)[:2]] == [1, 1]
    for data in ([], [(X, Y)]):
        with pytest.raises(DataError, match=f"at least 2 batches.*the data has {len(data)}"):
            search_sources(data, None, 0, None)


def test_given_validation_data_is_used_as_it_is():
    train, val, count = search_sources([(X, Y)] * 3, [(X, Y + 5)], 0, None)
    assert (len(targets(train)), targets(val), count) == (3, [[5, 6, 7, 8]], 3)
    assert search_sources(Restarts(), [(X, Y)], 0, None)[2] is None


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((X, Y), r"data is a single \(inputs, target\) pair.*search='balanced'"),
        (iter([(X, Y)] * 4), r"data is a one-shot iterator \(list_iterator\).*several times"),
        (((X, Y) for _ in range(4)), r"one-shot iterator \(generator\)"),
        (iter(DataLoader(Numbers(8), batch_size=2)), r"one-shot iterator \(_SingleProcessDataLoaderIter\)"),
        (7, r"data is int, neither"),
    ],
)
def test_data_that_a_search_cannot_use(data, match):
    with pytest.raises(DataError, match=match):
        search_sources(data, None, 0, None)


def test_validation_data_that_a_search_cannot_use():
    with pytest.raises(DataError, match="val_data is a single"):
        search_sources([(X, Y)] * 3, (X, Y), 0, None)
    with pytest.raises(DataError, match="val_data is a one-shot"):
        search_sources([(X, Y)] * 3, iter([(X, Y)]), 0, None)

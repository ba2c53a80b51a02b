"""A stream's place is (epoch, batches consumed): going there gives what one that never stopped gives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sedona_fx.errors import CheckpointError, DataError
from sedona_fx.rng import loader_streams, random_states
from sedona_fx.search.session.stream import Stream


class Noisy(Dataset[Any]):
    """Examples with noise from all three global streams, as augmentation has it."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, k: int) -> Any:
        return torch.tensor([float(k), random.random(), np.random.rand(), torch.rand(()).item()])


class Epochs:
    def __init__(self, generator: torch.Generator | None, workers: int = 0) -> None:
        self.loader = DataLoader(Noisy(), batch_size=4, shuffle=True, generator=generator, num_workers=workers)
        self.generators = loader_streams(self.loader)

    def __call__(self) -> Iterator[Any]:
        return (({"x": x}, x[:, 0]) for x in self.loader)


def take(stream: Stream, count: int) -> list[torch.Tensor]:
    found = []
    for _ in range(count):
        found.append(next(stream)[0]["x"])
        torch.rand(3)  # what else draws in between does not matter
        random.random()
        np.random.rand()
    return found


@pytest.mark.parametrize("own", [False, True], ids=["global", "own generator"])
def test_any_place_can_be_gone_to(own: bool) -> None:
    def epochs(seed: int) -> Epochs:
        return Epochs(torch.Generator().manual_seed(seed) if own else None)

    whole = take(Stream(epochs(1), "training", 5), 8)
    assert len({tuple(t[:, 0].tolist()) for t in whole}) == 8  # 3 batches an epoch, each epoch in another order
    for count in range(8):
        first = Stream(epochs(2), "training", 5)
        take(first, count)
        assert first.position == [max(0, count - 1) // 3, count - 3 * (max(0, count - 1) // 3)]
        torch.manual_seed(count)
        second = Stream(epochs(3), "training", 5)
        second.go_to(first.position)
        rest = take(second, 8 - count)
        assert all(torch.equal(a, b) for a, b in zip(whole[count:], rest, strict=True))
        assert second.position == [2, 2]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_with_workers() -> None:
    whole = take(Stream(Epochs(None, workers=2), "training", 5), 6)
    again = Stream(Epochs(None, workers=2), "training", 5)
    again.go_to([1, 1])
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], take(again, 2), strict=True))


def test_global_and_own_random_states_are_given_back() -> None:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    before, own = random_states([]), generator.get_state()
    stream = Stream(Epochs(generator), "training", 5)
    for _ in range(4):
        next(stream)
        after = random_states([])
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        assert torch.equal(own, generator.get_state())


def test_streams_of_other_names_and_seeds_are_others_and_do_not_meet() -> None:
    train, val = Stream(Epochs(None), "training", 5), Stream(Epochs(None), "validation", 5)
    mixed = [(next(train)[0]["x"], next(val)[0]["x"]) for _ in range(5)]
    alone = take(Stream(Epochs(None), "training", 5), 5)
    assert all(torch.equal(a, b) for (a, _), b in zip(mixed, alone, strict=True))
    assert not torch.equal(mixed[0][0], mixed[0][1])
    assert not torch.equal(alone[0], take(Stream(Epochs(None), "training", 6), 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(alone, take(train.fresh(), 5), strict=True))


def test_an_epoch_ends_and_its_length_is_counted_beside_it() -> None:
    whole = take(Stream(Epochs(None), "training", 5), 6)
    stream = Stream(Epochs(None), "training", 5)
    first = next(stream)
    assert stream.length() == 3
    rest = list(stream.epoch())
    found = [x["x"] for x, _ in (first, *rest, next(stream))]
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=False))
    assert stream.position == [1, 1]


def test_data_that_is_empty_or_has_shrunk_is_refused() -> None:
    with pytest.raises(DataError, match="the search's training data is empty"):
        next(Stream(lambda: iter(()), "training", 0))
    with pytest.raises(CheckpointError, match=r"behind batch 4 .* now ends after 3 batches"):
        Stream(Epochs(None), "training", 0).go_to([0, 4])

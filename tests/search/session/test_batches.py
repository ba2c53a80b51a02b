"""Batches in smaller parts: of nearly equal size, in order, and only where every tensor has a row a sample."""

from __future__ import annotations

import pytest
import torch

from sedona_fx.search.session.batches import split


@pytest.mark.parametrize(("count", "size"), [(7, 2), (12, 4), (128, 32), (100, 32), (1057, 32), (9, 1)])
def test_parts_are_of_about_the_size_and_none_is_left_over(count: int, size: int) -> None:
    x, y = torch.arange(count * 2).reshape(count, 2), torch.arange(count)
    parts = split(({"x": x, "flag": True, "more": [y + 1]}, y), size)
    assert torch.equal(torch.cat([inputs["x"] for inputs, _ in parts]), x)
    assert torch.equal(torch.cat([target for _, target in parts]), y)
    assert torch.equal(torch.cat([inputs["more"][0] for inputs, _ in parts]), y + 1)
    assert all(inputs["flag"] is True for inputs, _ in parts)
    lengths = [len(target) for _, target in parts]
    assert size <= min(lengths)
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) < 2 * size


def test_batches_that_cannot_be_split_stay_whole() -> None:
    x = torch.zeros(8, 3)
    for batch in [
        ({"x": x}, torch.zeros(16)),
        ({"x": x, "scale": torch.tensor(2.0)}, torch.zeros(8)),
        ({"x": x}, torch.tensor(1.0)),
        ({"x": x[:3]}, torch.zeros(3)),
        ({"n": 3}, None),
    ]:
        (part,) = split(batch, 2)
        assert part is batch

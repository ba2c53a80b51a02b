"""Same numbers, bit for bit: NaN is equal to NaN alone, and infinity to infinity."""

import math

import pytest
import torch

from sedona_fx.ir.same_numbers import same_bits

MOST = torch.finfo(torch.float32).max


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.nan, 1.0], [0.0, 1.0], False),
        ([math.nan, 1.0], [math.nan, 2.0], False),
        ([math.inf], [MOST], False),
        ([-math.inf], [-MOST], False),
        ([math.inf], [math.inf], True),
        ([math.nan], [math.inf], False),
        ([complex(math.nan, 1.0)], [complex(0.0, 1.0)], False),
        ([1, 2], [1, 2], True),
        ([1, 2], [1, 3], False),
    ],
)
def test_numbers_that_are_not_finite(first, second, same):
    assert same_bits(torch.tensor(first), torch.tensor(second)) is same
    assert same_bits({"a": [torch.tensor(second)]}, {"a": [torch.tensor(first)]}) is same

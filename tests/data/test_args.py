"""Args: data of any form becomes the arguments of forward."""

from collections import UserDict, namedtuple

import pytest
import torch

from sedona_fx import Args
from sedona_fx.errors import DataError

X, Y = torch.zeros(4, 3), torch.ones(4)


def forward(image, mask=None, *, scale=1.0):
    return image


def test_of_reads_tuples_mappings_and_single_arguments():
    pair = namedtuple("pair", "a b")(X, Y)
    assert Args.of((X, Y)).args == (X, Y)
    assert Args.of({"image": X}).kwargs == {"image": X}
    assert Args.of(UserDict(image=X)).kwargs == {"image": X}
    assert Args.of(X).args == (X,)
    assert Args.of([X, Y]).args == ([X, Y],)  # a list is one argument
    assert Args.of(pair).args == (pair,)
    assert Args.of({}).bind(lambda: None) == {}
    explicit = Args({"image": X}, mask=Y)
    assert Args.of(explicit) is explicit


def test_a_mapping_without_names_is_refused():
    with pytest.raises(DataError, match=r"\[0\] are no names.*Args\(mapping\)"):
        Args.of({0: X})


def test_bind_names_what_was_given_and_no_defaults():
    assert Args(X).bind(forward) == {"image": X}
    assert list(Args(X, scale=2.0).bind(forward)) == ["image", "scale"]
    assert list(Args(mask=Y, image=X).bind(forward)) == ["image", "mask"]
    with pytest.raises(DataError, match=r"do not fit the model's forward.*multiple values"):
        Args(X, image=X).bind(forward)
    with pytest.raises(DataError, match="missing a required argument"):
        Args(mask=Y).bind(forward)
    with pytest.raises(DataError, match="unexpected keyword"):
        Args(X, other=Y).bind(forward)


def test_map_tensors_and_batch_size_reach_nested_values():
    args = Args({"a": X, "n": 3}, [Y, (Y,)], k=torch.tensor(2.0))
    doubled = args.map(lambda t: t * 2)
    assert torch.equal(doubled.args[1][1][0], Y * 2)
    assert doubled.args[0]["n"] == 3
    assert doubled.kwargs["k"].item() == 4
    assert len(args.tensors()) == 4
    assert args.batch_size() == 4
    assert Args(X, torch.zeros(3)).batch_size() is None
    assert Args(3).batch_size() is None


def test_first_takes_examples_only_where_there_is_one_batch_dimension():
    assert Args(X, k=torch.tensor(1.0)).first(2).args[0].shape == (2, 3)
    assert Args(X, k=torch.tensor(1.0)).first(2).kwargs["k"].dim() == 0
    same = Args(X)
    assert same.first(4) is same
    ragged = Args(X, torch.zeros(3))
    assert ragged.first(2) is ragged


def test_repr_shows_shapes_and_no_numbers():
    assert repr(Args(X, flag=True)) == "Args((4, 3) torch.float32, flag=bool)"

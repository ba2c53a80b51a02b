"""Tensors that were never made, and how they are made."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from sedona_fx.fake.tensors import CannotMake, Storages, geometry


@pytest.fixture
def mode():
    with FakeTensorMode(allow_non_fake_inputs=True) as made:
        yield made


def test_a_made_tensor_looks_as_it_was_told(mode):
    storages = Storages(mode, [])
    for model in (torch.empty(2, 3), torch.empty(4, 5, dtype=torch.half)[1:, ::2], torch.ones(3, dtype=torch.bool)):
        looks = geometry(model)
        abstract = storages.fresh(model.untyped_storage().nbytes()).hold(looks)
        made = storages.make(abstract)
        assert geometry(made) == geometry(abstract) == looks
        assert made.untyped_storage().nbytes() == model.untyped_storage().nbytes()
        assert storages.make(abstract) is made
        assert storages.of(made) is abstract.storage


def test_what_has_a_gradient_may_be_written_to_and_its_views_see_it(mode):
    storages = Storages(mode, [])
    storage = storages.fresh(24)
    model = torch.empty(6, requires_grad=True)
    whole, view, still = storage.hold(geometry(model)), storage.hold(geometry(model[2:])), model.detach()
    still = storage.hold(geometry(still))
    made = [storages.make(abstract) for abstract in (view, whole, still)]
    assert [t.requires_grad for t in made] == [True, True, False]
    made[1].mul_(2)
    assert [t._version for t in made] == [1, 1, 1]
    assert not storage.is_known_to_autograd


def test_other_types_and_gradients_from_nowhere_cannot_be_made(mode):
    storages = Storages(mode, [])
    plain = torch.empty(4)
    storage = storages.of(plain)
    for model in (torch.empty(4, dtype=torch.int32), torch.empty(4, requires_grad=True)):
        with pytest.raises(CannotMake):
            storages.make(storage.hold(geometry(model)))
    with pytest.raises(CannotMake):
        storages.make(storages.fresh(7).hold(geometry(plain)))


def test_a_real_tensor_has_one_fake_memory_and_both_are_the_models_own(mode):
    with unset_fake_temporarily():
        weight = nn.Parameter(torch.empty(3))
    storages = Storages(mode, [weight])
    fake = storages.fake_of(weight)
    assert fake.own
    assert storages.of(weight).own
    assert fake is not storages.of(weight)
    assert storages.of(storages.convert(weight)) is fake
    assert storages.of(storages.convert(weight).detach()) is fake


def test_numbers_are_never_used_twice(mode):
    storages = Storages(mode, [])
    numbers = [storages.of(torch.empty(3)).number for _ in range(20)] + [storages.fresh(4).number]
    assert len(set(numbers)) == 21


def test_what_shapes_do_not_say_has_no_geometry(mode):
    with unset_fake_temporarily():
        number = torch.tensor(3.0)
    for tensor in (torch.empty(2, dtype=torch.cfloat).conj(), torch.tensor(3.0)):
        assert geometry(tensor) is None
    assert geometry(number) is not None

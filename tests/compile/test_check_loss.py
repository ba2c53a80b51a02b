"""The loss is tried before anything is searched: on a few examples, and where that fails on the whole first batch."""

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import DataError
from sedona_fx.train import Greedy


class Chain(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*[layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())], nn.Linear(6, 3))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def decoupled(loss, target, **options):
    return sedona_fx.decouple(Chain(), (X, target), blocks=2, search="balanced", loss=loss, progress=False, **options)


def by_group(output, target):
    """One target for four examples each."""
    return nn.functional.cross_entropy(output.unflatten(0, (-1, 4)).mean(1), target)


def test_a_loss_that_needs_groups_of_examples():
    target = torch.tensor([0, 2])
    net = decoupled(by_group, target)
    expected = by_group(Chain()(X), target)
    torch.testing.assert_close(net.losses(X, target)[-1], expected)
    Greedy(net, sgd).step(X, target)


def test_a_loss_about_as_many_examples_as_there_are():
    def triplet(output, target):
        if len(output) % 4:
            raise ValueError("groups of four, please")
        return output.unflatten(0, (-1, 4)).std(1).mean()

    net = decoupled(triplet, torch.zeros(8))
    torch.testing.assert_close(net.losses(X, torch.zeros(8))[-1], triplet(Chain()(X), None))


def test_what_the_whole_batch_cannot_do_either_is_refused_with_its_shapes():
    with pytest.raises(DataError, match=r"model's output, \(8, 3\) .* with the target, \(5,\) .*of the first batch"):
        decoupled(nn.functional.cross_entropy, torch.tensor([0, 1, 2, 0, 1]))


def test_the_second_try_leaves_state_and_random_numbers_alone():
    class Normed(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.insert(1, nn.BatchNorm1d(6))
            self.insert(2, nn.Dropout(0.5))

    model, fresh = Normed(), Normed().state_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    net = sedona_fx.decouple(
        model, (X, torch.tensor([0, 2])), blocks=2, search="balanced", loss=by_group, progress=False
    )
    assert all(torch.equal(net.original_state_dict()[name], value) for name, value in fresh.items())
    assert net.model.training
    assert torch.equal(torch.get_rng_state(), before)

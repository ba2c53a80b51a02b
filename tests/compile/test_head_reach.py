"""Heads of the user's own that read too little of an activation: told of, with the parameters that learn nothing."""

import copy
import dataclasses
import random
import warnings

import pytest
import torch
from torch import Tensor, nn

import sedona_fx
from sedona_fx import HeadContext


class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.token, self.pre = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.patch(x)], 1)
        return self.out(self.layer(self.pre(x))[:, 0])


class Pick(nn.Module):
    """Reads some rows, or all."""

    def __init__(self, index: object, width: int) -> None:
        super().__init__()
        self.index, self.out, self.norm = index, nn.Linear(width, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(x[self.index].flatten(1)))


def first(context: HeadContext) -> nn.Module:
    return Pick((slice(None), 0), context.channels)


def corner(context: HeadContext) -> nn.Module:
    return Pick((slice(None), slice(None), slice(2)), 2 * context.shape[1])


def everything(context: HeadContext) -> nn.Module:
    return Pick((slice(None),), context.shape[1] * context.channels)


X, Y = torch.randn(4, 5, 6), torch.tensor([0, 1, 2, 0])


def decoupled(head: object, cut: str) -> sedona_fx.Net:
    return sedona_fx.decouple(ClassToken(), (X, Y), cuts=[cut], heads=[head])


def test_a_head_that_sees_a_constant_is_told_of():
    with pytest.warns(
        UserWarning, match=r"behind 'pre' reads 1 of 6 rows .* 'patch.weight', 'patch.bias': these get no"
    ):
        net = decoupled(first, "pre")
    net.backward(X, Y)
    assert not net.model.patch.weight.grad.any()  # it is true
    assert net.model.token.grad.any()


@pytest.mark.parametrize(
    ("head", "cut"),
    [(first, "layer"), (corner, "pre"), (everything, "pre"), ("tokens-2", "pre"), ("linear", "pre")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_others_are_not(head, cut):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = decoupled(head, cut)
    net.backward(X, Y)
    assert all(p.grad is None or p.grad.any() for p in net.model.parameters())


def test_frozen_parameters_and_random_numbers_are_left_alone():
    model = ClassToken()
    model.patch.requires_grad_(requires_grad=False)
    heads: list[nn.Module] = []

    def kept(context: HeadContext) -> nn.Module:
        heads.append(first(context))
        return heads[-1]

    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = sedona_fx.decouple(model, (X, Y), cuts=["pre"], heads=[kept])
    assert torch.equal(torch.rand(1), expected)
    state = net.heads["0"].state_dict()
    assert state["norm.num_batches_tracked"] == 0
    assert copy.deepcopy(heads)


def test_a_factory_need_not_be_hashable():
    @dataclasses.dataclass
    class Factory:
        width: int

        def __call__(self, context):
            return nn.Sequential(nn.Linear(8, self.width), nn.Tanh(), nn.Linear(self.width, 3))

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 8), torch.arange(6) % 3
    net = sedona_fx.decouple(model, (x, y), blocks=2, search="balanced", heads=[Factory(5)])
    assert net.blocks[0].head[0].out_features == 5


def test_a_head_that_draws_from_pythons_generator_leaves_it_as_it_was():
    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x * (1 + random.random()))

    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    state = random.getstate()
    sedona_fx.decouple(model, (torch.randn(6, 8), torch.arange(6) % 3), cuts=["0"], heads=[lambda context: Draws(8, 3)])
    assert random.getstate() == state

"""When a second size of the batch is tried: wherever the batch may be elsewhere, and nowhere else in plain nets."""

from __future__ import annotations

import pytest
import torch
from graphs import analysed, cut_names
from layouts import KINDS, Between
from torch import Tensor, nn

from sedona_fx.ir.graph import info

X = torch.randn(4, 5, 6)


def tried(model: nn.Module, *inputs: Tensor) -> bool:
    """Whether the model was traced for a second size."""
    return any(info(node).grown is not None for node in analysed(model, *inputs).train.graph.nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_size_is_tried_for_all_other_layouts(kind):
    assert tried(kind().double(), *kind.inputs)


def mean_1(h):
    return h.mean(1)


PLAIN = {
    "vectors": (lambda x: x.mean(1), lambda h: h, X),
    "tokens": (lambda x: x, mean_1, X),
    "as many tokens": (lambda x: x, mean_1, torch.randn(5, 5, 6)),
    "as many features": (lambda x: x, mean_1, torch.randn(6, 5, 6)),
    "as many classes": (lambda x: x, mean_1, torch.randn(3, 5, 6)),
    "channels moved": (lambda x: x.permute(0, 2, 1).transpose(1, 2), lambda h: h[:, 0], torch.randn(5, 5, 6)),
    "scores": (lambda x: torch.einsum("ntd,nsd->nts", x, x) @ x, mean_1, X),
    "there and back": (lambda x: x.transpose(0, 1).cumsum(0).transpose(0, 1), mean_1, X),
}


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_is_tried_where_the_batch_is_first(name):
    before, behind, x = PLAIN[name]
    model = Between(before, behind)
    assert not tried(model, x)
    assert cut_names(analysed(model, x))[:1] == ["a"]


def test_convolutional_nets_with_as_many_channels_as_examples_do_not_pay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not tried(model.append(nn.Linear(8, 8)), torch.randn(8, 3, 8, 8))


MOVES = {
    "t": (lambda x: x.t(), (6, 6)),
    "T": (lambda x: x.T, (6, 6)),
    "mT": (lambda x: x.mT, (6, 6)),
    "permute": (lambda x: x.permute(2, 1, 0), (6, 5, 6)),
    "transpose, kwargs": (lambda x: x.transpose(dim0=0, dim1=2), (6, 5, 6)),
    "select": (lambda x: x.select(0, 0), (6, 6, 6)),
    "mean": (lambda x: x.mean(0), (6, 6, 6)),
    "mean, kwargs": (lambda x: x.mean(dim=(0,)), (6, 6, 6)),
    "negative": (lambda x: x.mean(-3), (6, 6, 6)),
}


@pytest.mark.parametrize("name", MOVES)
def test_operators_that_put_something_of_the_same_size_in_its_place(name):
    move, shape = MOVES[name]

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(shape[-1], 6), nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(h) + move(h).sum()

    assert tried(Moves(), torch.randn(shape))

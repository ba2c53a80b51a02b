"""Modules kept whole, run on fake tensors, and on numbers where the shape of their result depends on numbers."""

import copy

import pytest
import torch
from graphs import node_of
from torch import nn

import sedona_fx
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import info
from sedona_fx.passes import annotate, trace


def test_leaf_modules_keep_their_attributes_free_of_fake_tensors():
    class Remember(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last, self.count = nn.Linear(4, 4), None, 0

        def forward(self, x):
            self.last, self.count = self.layer(x), self.count + 1
            return self.last

    model = nn.Sequential(Remember(), nn.Linear(4, 2))
    gm = trace(model, Args(torch.randn(2, 4)), leaf_modules=["0"]).train
    annotate(gm, {"input": torch.randn(2, 4)}, training=True)
    assert (model[0].last, model[0].count) == (None, 0)


def test_a_leaf_module_may_decide_by_value():
    class Decide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.calls = nn.Linear(4, 6), nn.BatchNorm1d(6), 0

        def forward(self, x):
            self.calls += 1
            x = self.norm(self.layer(x))
            return x[:, : 3 + int(x.sum() > 1e9)].relu_()

    model = nn.Sequential(nn.Linear(4, 4), Decide(), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4)
    gm = annotate(trace(model, Args(x), leaf_modules=["1"]).train, {"input": x}, training=True)
    record = info(node_of(gm, "1"))
    assert record.value.shape == (2, 3)
    assert record.flops == 2 * 2 * 4 * 6
    assert record.saved
    assert info(node_of(gm, "2")).saved
    assert model[1].calls == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Packed(nn.Module):
    """Reads sequences of different lengths to their ends."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, h, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][-1]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.packed, self.fc = nn.Embedding(9, 4), Packed(), nn.Linear(3, 5)

    def forward(self, ids, mask):
        return self.fc(self.packed(self.embed(ids), mask.sum(1)))


def test_a_module_kept_whole_gets_the_lengths_of_the_example():
    """Packing refuses made-up lengths: the ones that the inputs decide are computed."""
    model = Reader().double()
    lengths, target = torch.tensor([6, 2, 4, 1]), torch.tensor([0, 1, 2, 3])
    ids = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"ids": ids, "mask": (torch.arange(6) < lengths[:, None]).long()}
    net = sedona_fx.decouple(model, (inputs, target), cuts=["packed"], heads="linear", leaf_modules=["packed"])
    assert torch.equal(net(**inputs), model(**inputs))
    shorter = {"ids": ids, "mask": (torch.arange(6) < lengths.flip(0)[:, None]).long()}
    assert torch.equal(net(**shorter), model(**shorter))
    net.backward(inputs, target)
    states = [model.packed.lstm(model.embed(row[None, :n]))[1][0][-1] for row, n in zip(ids, lengths, strict=True)]
    h = torch.cat(states)
    own = nn.functional.cross_entropy(net.blocks[0].head(h), target)
    (own + nn.functional.cross_entropy(model.fc(h.detach()), target)).backward()
    for name, parameter in model.named_parameters():
        found = net.model.get_parameter(name).grad
        assert (found - parameter.grad).norm() <= 1e-12 * parameter.grad.norm(), name


def test_a_module_that_cannot_run_on_made_up_numbers_is_named():
    class Late(Reader):
        def forward(self, ids, mask):
            h = self.embed(ids)
            return self.fc(self.packed(h, (h.sum(2) > 0).sum(1)))

    model, ids = Late(), torch.zeros(2, 6, dtype=torch.long)
    inputs = {"ids": ids, "mask": ids}
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
    with pytest.raises(TraceError, match=r"packed computes sizes from numbers.*as the model's inputs give them.*root="):
        annotate(trace(model, Args(**inputs), leaf_modules=["packed"]).train, inputs, training=True)

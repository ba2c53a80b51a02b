"""The proof of a trace: the same numbers as the model, bit for bit."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import sedona_fx
from sedona_fx.capture.proof import check_equal_forward
from sedona_fx.data.args import Args
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.same_numbers import same_bits
from sedona_fx.passes import trace

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Out:
    a: Tensor
    b: object = None


def t(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (t(1.0, 2.0), t(1.0, 2.0), True),
        (t(1.0, float("nan")), t(1.0, float("nan")), True),
        (t(1.0, float("nan")), t(1.0, 0.5), False),
        (t(1.0), t(1.0, dtype=torch.float64), False),
        (t(1.0), t(1.0, 1.0), False),
        (t(1.0), torch.nextafter(t(1.0), t(2.0)), False),
        (t(1.0), 1.0, False),
        ([t(1.0), None], (t(1.0), None), True),
        ([t(1.0)], [t(1.0), t(1.0)], False),
        ({"a": t(1.0), "b": 2}, {"a": t(1.0), "b": 2}, True),
        ({"a": t(1.0)}, {"b": t(1.0)}, False),
        (Pair(t(1.0), 3), Pair(t(1.0), 3), True),
        (Out(t(1.0), [t(2.0)]), Out(t(1.0), [t(2.0)]), True),
        (Out(t(1.0), [t(2.0)]), Out(t(1.0), [t(3.0)]), False),
        ((), (), True),
        ("text", "text", True),
        (None, None, True),
        (True, 1, False),
    ],
)
def test_same_bits(first, second, same):
    assert same_bits(first, second) is same


def broken(training=True):
    """Return a model and a graph of it whose second layer has been doctored."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()), nn.Linear(4, 2))
    gm = trace(model, Args(torch.randn(3, 4))).train
    return model.train(training), gm


def test_buffers_are_compared_and_restored():
    model, gm = broken()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = Args(torch.randn(3, 4))
    check_equal_forward(model, gm, x, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    norm = next(n for n in gm.graph.nodes if n.target == "1.0")
    norm.replace_all_uses_with(norm.args[0])
    with gm.graph.inserting_after(norm.args[0]):
        again = gm.graph.call_module("1.0", (norm.args[0],))
    again.meta = dict(norm.meta)
    gm.graph.erase_node(norm)
    gm.recompile()  # the norm runs, for its buffers, and nobody reads it
    with pytest.raises(TraceError, match=r"the train graph of Sequential does not compute what .* \(first in '1.1'\)"):
        check_equal_forward(model, gm, x, training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_graph_that_does_not_run():
    model, gm = broken()
    next(n for n in gm.graph.nodes if n.target == "2").args = (1,)
    gm.recompile()
    with pytest.raises(TraceError, match="the eval graph of Sequential does not run: "):
        check_equal_forward(model, gm, Args(torch.randn(3, 4)), training=False)


def test_a_model_that_does_not_run():
    model, gm = broken()
    with pytest.raises(DataError, match=r"Sequential in train mode cannot run .*\(1, 4\).*Expected more than 1 value"):
        check_equal_forward(model, gm, Args(torch.randn(1, 4)), training=True)


def test_what_the_model_returned_has_no_graph():
    model, gm = broken()
    assert not check_equal_forward(model, gm, Args(torch.randn(3, 4)), training=True).requires_grad


class Reversal(torch.autograd.Function):
    """The gradient of its own that autograd would never derive."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class SameByHand(torch.autograd.Function):
    """The gradient that autograd would derive, written by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x.cos()


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


class OwnBackward(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.middle, self.b = nn.Linear(4, 4), Applies(function), nn.Linear(4, 3)

    def forward(self, x):
        if x.shape[1] != 4:  # for torch.export, which forgets backwards
            raise ValueError("four features")
        return self.b(self.middle(self.a(x)))


def test_a_lost_backward_is_seen():
    x = torch.randn(2, 4)
    assert trace(OwnBackward(SameByHand), Args(x=x)).capture.front_end == "export"
    calls = [str(node.target) for node in trace(OwnBackward(Reversal), Args(x=x)).train.graph.nodes]
    assert "middle" in calls


def test_a_module_kept_whole_keeps_its_backward():
    model = nn.Sequential(nn.Linear(4, 4), Applies(Reversal), nn.Linear(4, 3))
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    net = sedona_fx.decouple(model, (x, y), blocks=1, search="uniform", leaf_modules=["1"])
    net.backward(x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.model.parameters(), model.parameters(), strict=True))

"""The arguments of a net: its signature is the model's; what makes no difference passes, the rest is named."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import same_bits

import sedona_fx
from sedona_fx.errors import DataError

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 0])


class Arguments(nn.Module):
    """Takes flags, numbers, an optional mask, optional labels, and whatever trainers hand over."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, double=True, *, scale=1.0, as_dict=None, mask=None, labels=None, **extra):
        h = torch.tanh(self.a(x))
        if mask is not None:
            h = h * mask
        h = torch.tanh(self.b(h)) * scale
        out = self.c(h) * (2 if double else 1)
        if labels is not None:
            return F.cross_entropy(out, labels) / extra.get("num_items_in_batch", 1), out
        return {"out": out} if as_dict else out


class Exported(Arguments):
    """The same, captured by torch.export."""

    def forward(self, x, double=True, *, scale=1.0, as_dict=None, mask=None, labels=None, **extra):
        if x.shape[1] != 6:
            raise ValueError
        return super().forward(x, double, scale=scale, as_dict=as_dict, mask=mask, labels=labels, **extra)


@pytest.fixture(params=[Arguments, Exported], ids=["symbolic", "exported"], scope="module")
def net(request):
    torch.manual_seed(0)
    net = sedona_fx.decouple(request.param().double(), (X, Y), cuts=["a"], heads="linear")
    assert net.capture.front_end == ("symbolic" if request.param is Arguments else "export")
    return net


def test_the_signature_is_the_models(net):
    wanted = inspect.signature(net.model.forward)
    assert inspect.signature(net.forward) == wanted
    assert inspect.signature(net) == wanted
    twin = copy.deepcopy(net)
    assert inspect.signature(twin.forward) == wanted
    with torch.no_grad():
        twin.model.c.bias.add_(1)
    assert same_bits(twin.forward(X), twin.model(X))
    assert not same_bits(twin.forward(X), net.forward(X))


@pytest.mark.parametrize(
    ("args", "how"),
    [
        ((True,), {}),
        ((), {"double": True, "scale": 1.0, "mask": None, "labels": None}),
        ((1,), {"scale": 1}),
        ((), {"as_dict": False}),
        ((), {"num_items_in_batch": 8}),
        ((), {"num_items_in_batch": torch.tensor(8)}),
        ((), {"something": object()}),
    ],
    ids=["positional", "defaults", "equal numbers", "default by name", "a number", "a tensor", "an object"],
)
def test_what_makes_no_difference_passes(net, args, how):
    assert same_bits(net(X, *args, **how), net.model(X, *args, **how))
    inputs = sedona_fx.Args(X, *args, **how)
    assert [v.item() for v in net.backward(inputs, Y).losses] == [v.item() for v in net.backward(X, Y).losses]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"double": False}, r"without the argument 'double', which the model takes.*its default, True.*first batch"),
        ({"scale": 2.0}, r"without the argument 'scale'.*its default, 1.0"),
        ({"as_dict": True}, r"without the argument 'as_dict'.*its default, None"),
        ({"mask": torch.ones(6).double()}, r"without the argument 'mask'.*its default, None"),
        ({"labels": Y}, r"without the argument 'labels'.*a target goes to the loss, net.backward\(inputs, target\)"),
    ],
)
def test_what_makes_a_difference_is_named(net, how, message):
    for _ in range(2):  # what was tried is remembered
        with pytest.raises(DataError, match=message):
            net(X, **how)
        with pytest.raises(DataError, match=message):
            net.backward(sedona_fx.Args(X, **how), Y)


def test_a_number_is_not_tried_on_examples():
    """Clamping at 1000 changes nothing for the example, and is part of what another call would compute."""

    class Clamping(Arguments):
        def forward(self, x, most=None):
            out = super().forward(x)
            return out if most is None else out.clamp(max=most)

    net = sedona_fx.decouple(Clamping().double(), (X, Y), cuts=["a"])
    with pytest.raises(DataError, match="without the argument 'most'"):
        net(X, most=1000.0)


def test_given_values_and_defaults():
    net = sedona_fx.decouple(Arguments().double(), ((X, False), Y), cuts=["a"])
    assert same_bits(net(X, False), net.model(X, False))
    assert same_bits(net(X, 0), net.model(X, False))
    for call in (lambda: net(X), lambda: net(X, True)):
        with pytest.raises(DataError, match=r"'double' is missing \(its default is True\)"):
            call()


def test_a_copy_in_another_precision_takes_the_same_arguments():
    net = sedona_fx.decouple(Arguments().double(), (X, Y), cuts=["a"])
    twin = copy.deepcopy(net).float()
    assert same_bits(twin(X.float(), num_items_in_batch=3), twin.model(X.float()))
    with pytest.raises(DataError, match="'labels'"):
        twin(X.float(), labels=Y)


def test_a_compiled_net_is_the_net(net):
    compiled = torch.compile(net, backend="eager")
    assert same_bits(compiled(X), net.model(X))
    torch._dynamo.reset()

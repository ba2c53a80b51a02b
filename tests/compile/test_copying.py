"""The copy that a net owns: hooks of parameters come along, and functions that would use the original are refused."""

import copyreg
import functools
import threading
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.compile.copying import owned_copy
from sedona_fx.errors import DataError, TraceError

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def make():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(4, 3)).double()


def decoupled(model, **options):
    return sedona_fx.decouple(model, (X, Y), blocks=1, search="uniform", **options)


def with_closure():
    model = make()
    forward = model[1].forward
    model[1].forward = lambda h: 2 * forward(h)
    return model


def with_default():
    model = make()
    model[1].forward = lambda h, forward=model[1].forward: 2 * forward(h)
    return model


def with_wrapper():
    model = make()

    def doubled(forward):
        @functools.wraps(forward)
        def wrapped(*args):
            return 2 * forward(*args)

        return wrapped

    model[1].forward = doubled(model[1].forward)
    return model


def with_weight():
    model = make()
    weight = model[3].weight
    model[3].forward = lambda h: F.linear(h, weight)
    return model


def with_other_attribute():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.steps = {"first": [lambda h: self.layer(h)][0]}

        def forward(self, h):
            return self.steps["first"](h)

    model = make()
    model[1] = Calls().double()
    return model


def with_compiled_forward():
    model = make()
    model[1].forward = torch.compile(model[1].forward)
    return model


GLOBAL = make()
_forward = GLOBAL[1].forward
GLOBAL[1].forward = lambda h: 2 * _forward(h)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize(
    ("build", "name"),
    [
        (with_closure, "1.forward"),
        (with_default, "1.forward"),
        (with_wrapper, "1.forward"),
        (with_other_attribute, "1.steps"),
        (with_compiled_forward, "1.forward"),
        (lambda: GLOBAL, "1.forward"),
    ],
    ids=["closure", "default", "wrapper", "attribute", "compiled", "global"],
)
def test_functions_that_use_layers_of_the_original_are_refused_by_name(build, name, inplace):
    with pytest.raises(TraceError, match=rf"'{name}' is a function, .* line \d+, that uses layers of the model.*bind"):
        decoupled(build(), inplace=inplace)


def test_functions_that_use_a_weight_of_the_original_are_refused_unless_it_is_shared():
    with pytest.raises(TraceError, match=r"'3.forward' is a function"):
        decoupled(with_weight())
    net = decoupled(with_weight(), inplace=True)
    net.backward(X, Y)
    assert net.model[3].weight.grad is not None


def free(layer):
    layer.forward = lambda h: 2 * h.tanh()


def method(layer):
    layer.forward = types.MethodType(lambda self, h: 2 * nn.Sequential.forward(self, h), layer)


def partial(layer):
    layer.forward = functools.partial(lambda self, h: 2 * nn.Sequential.forward(self, h), layer)


@pytest.mark.parametrize("change", [free, method, partial])
def test_functions_that_are_right_in_the_copy_are_no_obstacle(change):
    model = make()
    change(model[1] if change is not free else model[1][1])
    net = decoupled(model)
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    for p, q in zip(net.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def clamp(parameter):
    parameter.grad.clamp_(-1e-3, 1e-3)


@pytest.mark.parametrize("blocks", [1, 2])
def test_hooks_on_parameters_come_along(blocks):
    model = make()
    for p in model.parameters():
        p.register_hook(lambda g: 0.5 * g)
        p.register_post_accumulate_grad_hook(clamp)
    plain = make()
    nets = [
        sedona_fx.decouple(m, (X, Y), cuts=["0"] if blocks == 2 else [], heads="linear" if blocks == 2 else None)
        for m in (model, plain)
    ]
    for net in nets:
        net.backward(X, Y)
    for p, q in zip(nets[0].model.parameters(), nets[1].model.parameters(), strict=True):
        assert torch.equal(p.grad, (0.5 * q.grad).clamp(-1e-3, 1e-3))


class PositionalOnly(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, x, scale=1.0, /, shift=None):
        h = self.b(self.a(x).tanh()) * scale
        return h if shift is None else h + shift


class CapturedPositionalOnly(PositionalOnly):
    def forward(self, x, scale=1.0, /, shift=None):
        if x.shape[1] != 4:
            raise ValueError("four features")
        return super().forward(x, scale, shift)


@pytest.mark.parametrize("kind", [PositionalOnly, CapturedPositionalOnly])
def test_positional_only_arguments(kind):
    model, shift = kind(), torch.ones(6, 3, dtype=torch.float64)
    for args, given in (((X,), {}), ((X, 0.5), {}), ((X,), {"shift": shift}), ((X, 0.5), {"shift": shift})):
        net = sedona_fx.decouple(model, (sedona_fx.Args(*args, **given), Y), cuts=["a"], heads="linear")
        assert torch.equal(net(*args, **given), model(*args, **given))
        assert torch.equal(net.model(*args, **given), model(*args, **given))
        net.backward(sedona_fx.Args(*args, **given), Y)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyBatchNorm1d(affine=False), nn.LazyConv1d(4, 1)])
def test_lazy_modules_are_to_be_run_once(lazy):
    name = r"'1\.(weight|running_mean)' of Sequential is lazy.*Run the model once on a batch"
    with pytest.raises(DataError, match=name):
        owned_copy(nn.Sequential(nn.Linear(4, 4), lazy), inplace=False)
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model(x)
    net = sedona_fx.decouple(model, (x, y), cuts=["1"], heads="linear")
    assert torch.equal(net(x), model(x))


def test_a_function_behind_much_else_is_refused_too():
    model = make()
    layer, table = model[1][0], [{"key": object()} for _ in range(20_000)]
    model[1][0].forward = lambda h: F.linear(h, layer.weight) * len(table) / len(table)
    with pytest.raises(TraceError, match="by its closure"):
        owned_copy(model, inplace=False)


def test_copies_in_two_threads_leave_pytorch_as_it_was():
    def copies():
        for _ in range(30):
            owned_copy(make(), inplace=False)

    before = torch.Tensor.__deepcopy__, dict(copyreg.dispatch_table)
    threads = [threading.Thread(target=copies) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (torch.Tensor.__deepcopy__, copyreg.dispatch_table) == before

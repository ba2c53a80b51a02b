"""Whatever happens while a forward is recorded, or while a graph runs: gradients and autocast of the process stay."""

import contextlib

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.capture.regions import keep_process_state
from sedona_fx.errors import CutError, SedonaError, TraceError

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_cache_enabled(),
    )


AROUND = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
}


class Base(nn.Module):
    def __init__(self, exported=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.fc, self.exported = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), exported

    def fail(self, h):
        raise RuntimeError("on purpose")

    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError("six features")
        return self.fc(self.mid(self.a(x).tanh()))


class Context(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            return self.fail(self.b(h))


class InferenceContext(Base):
    def mid(self, h):
        with torch.inference_mode():
            return self.fail(self.b(h))


class GradFunction(Base):
    def mid(self, h):
        torch.set_grad_enabled(False)
        h = self.fail(self.b(h))
        torch.set_grad_enabled(True)
        return h


class CastFunction(Base):
    def mid(self, h):
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        h = self.fail(self.b(h))
        torch.set_autocast_enabled("cpu", False)
        return h


class GradWithoutEnd(Base):
    """No error: it forgets to switch gradients on again."""

    def mid(self, h):
        h = self.b(h)
        torch.set_grad_enabled(False)
        return h


class CastWithoutEnd(Base):
    def mid(self, h):
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_cache_enabled(False)
        return self.b(h)


FAILING = (Context, InferenceContext, GradFunction, CastFunction)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("kind", [*FAILING, GradWithoutEnd, CastWithoutEnd])
@pytest.mark.parametrize("options", [{}, {"leaf_modules": ["b"]}, {"root": "b"}], ids=["", "leaf", "root"])
def test_recording_leaves_the_process_as_it_was(kind, exported, around, options):
    with AROUND[around]():
        before = state()
        with contextlib.suppress(SedonaError, RuntimeError):
            sedona_fx.decouple(kind(exported), (X, Y), blocks=1, **options)
            assert kind not in FAILING
        assert state() == before
    assert state() == (True, False, False, torch.bfloat16, False, True)


class Late(Base):
    """Fails in a region of any kind, for inputs with large numbers only."""

    def __init__(self, region, exported):
        super().__init__(exported)
        self.region, self.table = region, nn.Embedding(2, 8)

    def mid(self, h):
        index = (h[:, 0] > 1e3).long() * 9
        if self.region == "function":
            torch.set_grad_enabled(False)
            level = self.table(index)
            torch.set_grad_enabled(True)
        elif self.region == "inference":
            with torch.inference_mode():
                level = self.table(index)
        else:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                level = self.b(h) + self.table(index)
        return self.b(h.tanh()) + level.float()

    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError("six features")
        return self.fc(self.mid(self.a(x)))


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("region", ["context", "function", "inference"])
def test_an_error_while_a_graph_runs(region, exported):
    model = Late(region, exported)
    net = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
    before, large = state(), 1e9 * net.model.a.weight.detach()[0].sign().expand(6, 6)
    assert torch.equal(net(X), model(X))
    calls = (
        lambda: net._plain[True](large),
        lambda: net.backward(large, Y),
        lambda: net.losses(large, Y),
        lambda: net.inference_module()(large),
        lambda: sedona_fx.train.Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1), autocast=torch.bfloat16).step(
            large, Y
        ),
    )
    for call in calls:
        with pytest.raises(IndexError):
            call()
        assert state() == before


class Host(nn.Module):
    """Code that cannot be traced, which switches gradients or autocast around a part."""

    def __init__(self, region):
        super().__init__()
        torch.manual_seed(0)
        self.region, self.pre, self.part = region, nn.Linear(6, 6), Part()
        self.post = nn.Linear(3, 3)

    def forward(self, x):
        offset = 1.0 if float(x.detach().sum()) > 1e9 else 0.0
        h = self.pre(x)
        if self.region == "off":
            with torch.autocast("cpu", enabled=False):
                h = self.part(h.float() * 1e3) / 1e3
        elif self.region == "low":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = self.part(h).float()
        elif self.region == "function":
            torch.set_autocast_enabled("cpu", True)
            torch.set_autocast_dtype("cpu", torch.bfloat16)
            h = self.part(h).float()
            torch.set_autocast_enabled("cpu", False)
        else:
            torch.set_grad_enabled(False)
            h = self.part(h)
            torch.set_grad_enabled(True)
        return self.post(h) + offset


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("region", ["off", "low"])
def test_a_part_runs_in_the_region_of_the_code_around_it(region, low):
    model = Host(region)
    net = sedona_fx.decouple(model, (X, Y), cuts=["part.a"], root="part", heads="linear")
    assert net.plan.capture.hosted
    before = state()
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        expected = model(X)
        exports, _ = net.blocks[0].module(X)
        values = dict(zip(net.blocks[0].graph(True).exports, exports, strict=True))
        _, found = net.blocks[1].module(*[values.get(name, X) for name in net.blocks[1].graph(True).inputs])
        assert torch.equal(found, expected)
        result = net.backward(X, Y)
    assert torch.equal(result.output, expected)
    assert expected.isfinite().all()
    assert state() == before


@pytest.mark.parametrize(("region", "error"), [("function", TraceError), ("grad", CutError)])
def test_functions_around_a_part_are_refused(region, error):
    """Autocast that is switched by functions is lost, which the proof finds; without gradients nothing trains."""
    before = state()
    with pytest.raises(error):
        sedona_fx.decouple(Host(region), (X, Y), cuts=["part.a"], root="part", heads="linear")
    assert state() == before


def switch_everything():
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_cache_enabled(False)
    raise KeyError


def test_the_state_comes_back_after_any_error():
    before = state()
    with pytest.raises(KeyError), keep_process_state():
        switch_everything()
    assert state() == before

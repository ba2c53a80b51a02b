"""Autocast and no-grad regions inside forward: in the graph, in the blocks, right whatever autocast the caller has."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.capture.regions import watch_regions
from sedona_fx.capture.symbolic import record_symbolically
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import info
from sedona_fx.ir.region import Cast, Region

LOW = (None, torch.bfloat16, torch.float16)


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


class Base(nn.Module):
    """Three layers and a classifier; `exported` makes symbolic tracing fail."""

    def __init__(self, exported: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.fc, self.exported = nn.Tanh(), nn.Linear(8, 3), exported

    def mid(self, h: Tensor) -> Tensor:
        return self.b(h)

    def forward(self, x: Tensor) -> Tensor:
        if self.exported and x.shape[1] != 6:
            raise ValueError
        h = self.mid(self.a(x).tanh())
        return self.fc(self.c(self.act(h)).tanh())


class Island(Base):
    """Finite only in float32."""

    def mid(self, h):
        with torch.autocast("cpu", enabled=False):
            return self.b(h.float() * 1e6) / 1e6


class LowIsland(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(h)
        return h.float()


class Nested(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(h)
            with torch.autocast("cpu", enabled=False):
                h = self.b(h.float()).tanh()
                with torch.no_grad():
                    h = h + self.b(h)
            h = self.b(h)
        return h.float()


class CallersDtype(Base):
    """Autocast in the dtype that it has around the model."""

    def mid(self, h):
        with torch.autocast("cpu"):
            return self.b(h).float()


class OldName(Base):
    def mid(self, h):
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16, cache_enabled=False):
            return self.b(h).float()


class Decorated(Base):
    @torch.autocast("cpu", enabled=False)
    def mid(self, h):
        return self.b(h.float() * 1e6) / 1e6


class Table(Base):
    def mid(self, h):
        with torch.no_grad():
            table = torch.arange(h.shape[-1], device=h.device) / 8
        return self.b(h + table)


class Statistic(Base):
    """A value without gradient that depends on weights."""

    def mid(self, h):
        with torch.no_grad():
            scale = self.b(h).abs().mean()
        return self.b(h) / scale


class Inference(Base):
    def mid(self, h):
        with torch.inference_mode():
            level = self.b(h).mean()
        return self.b(h) + level


class NoGradMethod(Base):
    @torch.no_grad()
    def level(self, h):
        return self.b(h).sigmoid()

    def mid(self, h):
        return self.b(h) * self.level(h)


class InferenceMethod(NoGradMethod):
    @torch.inference_mode()
    def level(self, h):
        return self.b(h).sigmoid()

    def mid(self, h):
        return self.b(h) + self.level(h)


class Switched(Base):
    """The function, not the context manager."""

    def mid(self, h):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        level = self.b(h).sigmoid()
        torch.set_grad_enabled(before)
        return self.b(h) * level


class GradAgain(Base):
    def mid(self, h):
        with torch.no_grad():
            level = self.b(h)
            with torch.enable_grad():
                kept = self.b(h)
            level = level + self.b(level)
        return kept * level


class NoGradInAutocast(Base):
    """torch.export loses the inner one."""

    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            level = F.linear(h, self.b.weight.detach())
        return self.b(h) * level.float()


class WriteWithoutGrad(Base):
    """The gradient passes an overwritten value as if nothing had been written."""

    def mid(self, h):
        h = self.b(h)
        with torch.no_grad():
            h.mul_(0.5)
        return h * h


class FrozenStem(Base):
    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError
        with torch.no_grad():
            h = self.a(x).tanh()
        return self.fc(self.c(self.b(h).tanh()).tanh())


class RunningMean(Base):
    def __init__(self, exported=False):
        super().__init__(exported)
        self.register_buffer("mean", torch.zeros(8))

    def mid(self, h):
        h = self.b(h)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return h - self.mean


GRAD = (Table, Statistic, Inference, NoGradMethod, InferenceMethod, Switched, GradAgain, FrozenStem, WriteWithoutGrad)
CASTS = (Island, LowIsland, Nested, CallersDtype, OldName, Decorated, NoGradInAutocast)
ALL = (*CASTS, *GRAD, RunningMean)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 6, generator=generator, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])


def made(kind, exported, dtype=torch.float32):
    torch.manual_seed(0)
    return kind(exported).to(dtype)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cases(kinds):
    """All but one, which is refused: torch.export does not say that a dtype was left to the caller."""
    every = itertools.product(kinds, LOW, (False, True))
    return [case for case in every if case != (CallersDtype, torch.float16, True)]


@pytest.mark.parametrize(("kind", "low", "exported"), cases(ALL))
def test_the_net_computes_what_the_model_computes_under_any_autocast(kind, low, exported):
    model, (x, y) = made(kind, exported), data()
    net = sedona_fx.decouple(model, (x, y), blocks=1)
    assert net.plan.capture.front_end == ("export" if exported else "symbolic")
    for training in (False, True):
        with autocast(low):
            expected, found = model.train(training)(x), net.train(training)(x)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.isfinite().all()
    model.load_state_dict(net.original_state_dict())
    with autocast(low):
        loss = F.cross_entropy(model(x), y)
        net.backward(x, y)
    loss.backward()
    wanted, found = gradients(model), gradients(net.model)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
    for name, buffer in model.named_buffers():
        assert torch.equal(net.model.get_buffer(name), buffer)


def blocks_by_hand(model, heads, x, y, low):
    """Run the model's own forward in float64 or under autocast, cut after `a` and after `mid`, heads on the cuts."""
    losses = []

    def cut(h, head):
        with autocast(low):
            losses.append(F.cross_entropy(head(h), y))
        return h.detach()

    with autocast(low):
        h = model.a(x)
    h = cut(h, heads[0])
    with autocast(low):
        h = model.act(model.mid(h.tanh()))
    h = cut(h, heads[1])
    with autocast(low):
        losses.append(F.cross_entropy(model.fc(model.c(h).tanh()), y))
    for loss in losses:
        loss.backward()
    return [loss.detach() for loss in losses]


class Kept(sedona_fx.train.Greedy):
    def on_gradients(self, block):
        self.kept = getattr(self, "kept", {})
        self.kept.update({name: gradient.clone() for name, gradient in gradients(self.net.model).items()})


@pytest.mark.parametrize(("kind", "low", "exported"), cases([k for k in ALL if k not in (FrozenStem, RunningMean)]))
def test_blocks_have_the_gradients_of_blocks_made_by_hand(kind, low, exported):
    """In float64 to 1e-12 where nothing is cast, else bit for bit up to the order of sums."""
    dtype = torch.float64 if low is None and kind in GRAD else torch.float32
    model, (x, y) = made(kind, exported, dtype), data(dtype)
    net = sedona_fx.decouple(model, (x, y), cuts=["a", "act"], heads="linear")
    twin, heads = copy.deepcopy(model), [copy.deepcopy(net.heads[k]) for k in ("0", "1")]
    schedule = Kept(net, lambda p: torch.optim.SGD(p, lr=0.0), autocast=low)
    found = schedule.step(x, y).losses
    wanted = blocks_by_hand(twin, heads, x, y, low)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    wanted_gradients = gradients(twin)
    assert schedule.kept.keys() == wanted_gradients.keys()
    for name, gradient in schedule.kept.items():
        assert (gradient - wanted_gradients[name]).norm() <= 10 * tolerance * wanted_gradients[name].norm(), name


def test_a_stem_without_gradients_belongs_to_the_first_block_that_trains():
    (x, y) = data(torch.float64)
    net = sedona_fx.decouple(made(FrozenStem, False, torch.float64), (x, y), cuts=["b"], heads="linear")
    net.backward(x, y)
    assert {name.split(".")[0] for name in gradients(net.model)} == {"b", "c", "fc"}
    assert "a" not in net.plan.cuts
    with pytest.raises(sedona_fx.errors.CutError):
        sedona_fx.decouple(made(FrozenStem, False, torch.float64), (x, y), cuts=["a"], heads="linear")


@pytest.mark.parametrize("kind", [Nested, NoGradMethod])
def test_an_error_in_a_region_leaves_the_process_as_it_was(kind):
    for exported in (False, True):
        net = sedona_fx.decouple(made(kind, exported), data(), blocks=1)
        with pytest.raises(RuntimeError):
            net._plain[True](torch.randn(5, 7))
        net.model.b.weight.data = torch.randn(8, 8, 1)
        with pytest.raises(RuntimeError):
            net(data()[0])
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


class Asks(Base):
    """A branch on the state of autocast: each graph has one side of it."""

    def mid(self, h):
        if torch.is_autocast_enabled("cpu"):
            h = h * 2
        return self.b(h)


class Sets(Base):
    def mid(self, h):
        torch.set_autocast_enabled("cpu", False)
        return self.b(h)


@pytest.mark.parametrize("kind", [Asks, Sets])
def test_code_that_asks_for_autocast_or_sets_it_is_not_traced_symbolically(kind):
    with pytest.raises(TraceError, match=r"torch.(is|set)_autocast_enabled is called"):
        record_symbolically(made(kind, False), {"x": data()[0]}, frozenset())


def test_the_records_say_what_the_code_does():
    net = sedona_fx.decouple(made(Nested, False), data(), blocks=1)
    regions = [info(node).region for node in net._plain[True].graph.nodes if node.op == "call_module"]
    low, off = Cast("cpu", True, torch.bfloat16), Cast("cpu", False)
    expected = [None, Region(casts=(low,)), Region(casts=(off,)), Region(False, (off,)), Region(casts=(low,))]
    assert regions[:5] == expected
    assert "with torch.autocast('cpu', enabled=False), torch.no_grad():" in net._plain[True].code


def test_a_function_of_autograd_is_no_region():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.no_grad():
                regions.append(watch.current())
            return x * 2

    regions = []
    with watch_regions(strict=True) as watch:
        Doubled.apply(torch.ones(1, requires_grad=True))
        with torch.no_grad():
            regions.append(watch.current())
        regions.append(watch.current())
    assert regions == [None, Region(False), None]


class Force(Base):
    """The derivative of an energy, in evaluation as well."""

    def mid(self, h):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            return torch.autograd.grad(self.b(h).pow(2).sum(), h, create_graph=True)[0]


def test_gradients_that_are_turned_on_are_on_under_the_callers_no_grad():
    model, (x, y) = made(Force, False, torch.float64), data(torch.float64)
    net = sedona_fx.decouple(model, (x, y), cuts=["a"], heads="linear")
    with torch.no_grad():
        assert torch.equal(net.eval()(x), model.eval()(x))
        assert torch.equal(net.inference_module()(x), model(x))
        assert torch.equal(net.early_exit(1.0)(x).output, model(x))
    twin, head = copy.deepcopy(model).train(), copy.deepcopy(net.heads["0"])
    h = twin.a(x)
    losses = [F.cross_entropy(head(h), y)]
    losses.append(F.cross_entropy(twin.fc(twin.c(twin.act(twin.mid(h.detach().tanh()))).tanh()), y))
    sum(losses).backward()
    net.train().backward(x, y)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net.model)[name], gradient, rtol=1e-12, atol=0)

"""Hooks in a forward and on modules: they work, or they are refused or told of by name; never dropped in silence."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import graph as autograd_graph
from torch.nn import functional as F
from torch.nn.utils import prune

import sedona_fx
from sedona_fx.capture.hooks import hooks_of
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.passes import trace

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Model(nn.Module):
    """Three layers; `middle` does what is tested. With `captured` the forward needs torch.export."""

    def __init__(self, middle=None, captured=False):
        super().__init__()
        torch.manual_seed(0)
        self.captured, self.middle = captured, middle if middle is not None else nn.Identity()
        self.a = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.c = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        return self.c(self.b(self.middle(self.a(x))))


def decoupled(model, **options):
    return sedona_fx.decouple(model, (X, Y), **{"blocks": 1, "search": "uniform", **options})


def assert_same_gradients(net, model):
    """K = 1: the gradients are those of the model, exactly."""
    net.backward(X, Y)
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    for (name, p), q in zip(net.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


class Scale(nn.Module):
    def forward(self, gradient):
        return 0.1 * gradient


@dataclasses.dataclass
class ScaleBy:
    factor: float

    def __call__(self, gradient):
        return self.factor * gradient


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = Scale(), nn.Linear(8, 8)


class OnTensor(Hooked):
    def forward(self, h):
        h.register_hook(lambda g: 0.1 * g)
        return self.layer(h)


class ByModule(Hooked):
    def forward(self, h):
        h.register_hook(self.scale)
        return self.layer(h)


class ByRecord(Hooked):
    def forward(self, h):
        h.register_hook(ScaleBy(0.1))
        return self.layer(h)


class Unbound(Hooked):
    def forward(self, h):
        torch.Tensor.register_hook(h, self.scale)
        return self.layer(h)


class Clamps(Hooked):
    """Equal gradients, as long as they are small."""

    def forward(self, h):
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-1e6, 1e6))
        return self.layer(h)


class InTraining(Hooked):
    def forward(self, h):
        if self.training:
            h.register_hook(lambda g: 0.1 * g)
        return self.layer(h)


class OnSeveral(Hooked):
    def forward(self, h):
        autograd_graph.register_multi_grad_hook([h], lambda gradients: None)
        return self.layer(h)


class OnWeight(Hooked):
    def forward(self, h):
        self.layer.weight.register_hook(lambda g: 0.1 * g)
        return self.layer(h)


class OnParameters(Hooked):
    def forward(self, h):
        for p in self.layer.parameters():
            p.register_hook(lambda g: 0.1 * g)
        return self.layer(h)


class Accumulated(Hooked):
    def forward(self, h):
        self.layer.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.1))
        return self.layer(h)


class OnModule(Hooked):
    def forward(self, h):
        self.layer.register_full_backward_hook(lambda m, inputs, outputs: (0.1 * inputs[0],))
        return self.layer(h)


class LeavesForwardHooks(Hooked):
    def forward(self, h):
        self.layer.register_forward_hook(lambda m, inputs, output: 2 * output)
        return self.layer(h)


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (OnTensor, "register_hook(lambda"),
        (ByModule, "register_hook(self.scale)"),
        (ByRecord, "register_hook(ScaleBy(0.1))"),
        (Unbound, "register_hook(h, self.scale)"),
        (InTraining, "register_hook(lambda"),
        (OnWeight, "weight.register_hook"),
        (OnParameters, "p.register_hook"),
        (Accumulated, "bias.register_post_accumulate_grad_hook"),
        (OnModule, "register_full_backward_hook"),
        (LeavesForwardHooks, "register_forward_hook"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_a_hook_of_the_forward_is_refused_with_its_line(kind, method, captured):
    model = Model(kind(), captured)
    with pytest.raises(TraceError) as caught:
        trace(model, Args(X))
    text = str(caught.value)
    assert "registers a hook on a" in text
    assert __file__ in text
    assert method in text
    assert "leaf_modules" in text
    for module in model.modules():  # nothing of it stays
        assert not module._backward_hooks
        assert not module._forward_hooks
    for p in model.parameters():
        assert not p._backward_hooks
        assert not p._post_accumulate_grad_hooks


@pytest.mark.parametrize("kind", [Clamps, OnSeveral])
def test_in_a_module_that_other_code_of_it_keeps_whole_it_works(kind, caplog):
    """Neither a question that only a tensor answers nor a list of proxies can be recorded symbolically."""
    model = Model(kind())
    assert_same_gradients(decoupled(model), model)
    assert "'middle' stays whole, with no cut inside of it" in caplog.text
    with pytest.raises(TraceError, match="registers a hook on a"):
        trace(Model(kind(), captured=True), Args(X))


@pytest.mark.parametrize("kind", [OnTensor, ByModule, Clamps, InTraining, OnSeveral])
def test_in_a_module_kept_whole_it_works(kind):
    model = Model(kind())
    assert_same_gradients(decoupled(model, leaf_modules=["middle"]), model)


def test_in_a_module_kept_whole_it_works_with_blocks():
    model = Model(OnTensor())
    net = decoupled(model, cuts=["middle"], heads="linear", leaf_modules=["middle"])
    net.backward(X, Y)
    head, m = copy.deepcopy(net.heads["0"]), copy.deepcopy(model)
    head.zero_grad()
    h = m.a(X)
    scaled = 0.1 * h + (0.9 * h).detach()
    F.cross_entropy(head(m.middle.layer(scaled)), Y).backward()
    for name in ("a.0.weight", "a.0.bias", "middle.layer.weight"):
        torch.testing.assert_close(net.model.get_parameter(name).grad, m.get_parameter(name).grad, rtol=1e-12, atol=0)


class Halves(nn.Module):
    """Scales the gradient of what it reads, in one of the ways that want there to be one."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer, self.gradients = way, nn.Linear(8, 8), []
        if way == "module":
            self.register_full_backward_hook(self.halve)
        elif way == "inner module":
            self.layer.register_full_backward_hook(self.halve)

    def halve(self, module, inputs, outputs):
        GRADIENTS.append(inputs[0])
        return (0.5 * inputs[0],)

    def forward(self, h):
        if self.way == "tensor":
            h.register_hook(lambda g: GRADIENTS.append(g) or 0.5 * g)
        elif self.way == "written tensor":
            h.register_hook(lambda g: GRADIENTS.append(g) or 0.5 * g)
            h.mul_(2)
        return self.layer(h)


GRADIENTS = []


@pytest.mark.parametrize(
    ("way", "cut"),
    [
        *itertools.product(["tensor", "module", "inner module"], ["a.0", "a", "middle"]),
        *itertools.product(["written tensor"], ["a.0", "a.1", "middle"]),
    ],
)
def test_at_the_beginning_of_a_block_hooks_find_a_gradient(way, cut):
    """What enters a block is detached: there hooks could not be registered, or were called without a gradient."""
    model = Model(Halves(way))
    if way == "written tensor":  # tanh keeps its result
        model.a.append(nn.Linear(8, 8).double())
    net = decoupled(model, cuts=[cut], heads="linear", leaf_modules=["middle"])
    GRADIENTS.clear()
    net.backward(X, Y)
    found = list(GRADIENTS)
    twin, head, h = copy.deepcopy(net.model), copy.deepcopy(net.heads["0"]), X
    twin.zero_grad()
    head.zero_grad()
    GRADIENTS.clear()
    parts = {"a.0": twin.a[0], "a.1": twin.a[1], "a": twin.a[2:], "middle": twin.middle, "b": twin.b, "c": twin.c}
    for name, part in parts.items():
        h = part(h)
        if name == cut:
            F.cross_entropy(head(h.clone()), Y).backward()
            h = h.detach().requires_grad_().clone()
    F.cross_entropy(h, Y).backward()
    assert len(found) == len(GRADIENTS) == 1
    assert torch.equal(found[0], GRADIENTS[0])
    for (name, p), q in zip(net.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


class OnNode(Hooked):
    """A hook that nobody can see being registered."""

    def forward(self, h):
        if h.grad_fn is not None:
            h.grad_fn.register_prehook(lambda gradients: (0.1 * gradients[0],))
        return self.layer(h)


class Coarse(Hooked):
    """Saves less for backward than autograd would."""

    def forward(self, h):
        with autograd_graph.saved_tensors_hooks(lambda t: t.round(), lambda t: t):
            return self.layer(h.tanh())


class Offloads(Hooked):
    def forward(self, h):
        with autograd_graph.save_on_cpu():
            return self.layer(h.tanh())


def test_gradients_of_captured_programs_are_proven():
    with pytest.raises(TraceError, match=r"gradients of the train graph of Model are not the model's .*'a.0.weight'"):
        trace(Model(OnNode()), Args(X))


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
def test_hooks_on_saved_tensors_are_proven(captured):
    with pytest.raises(TraceError, match=r"has hooks on the tensors saved for backward.*t.round\(\)"):
        trace(Model(Coarse(), captured), Args(X))
    model = Model(Offloads(), captured)
    assert_same_gradients(decoupled(model), model)


class Once(Hooked):
    """Registers a hook at the first call, and notes that it did."""

    def __init__(self):
        super().__init__()
        self.done = False

    def forward(self, h):
        if not self.done:
            self.layer.weight.register_hook(lambda g: 0.1 * g)
            self.done = True
        return self.layer(h)


def test_a_hook_that_is_registered_once_is_no_obstacle():
    model = Model(Once())
    net = decoupled(model)
    assert len(net.model.middle.layer.weight._backward_hooks) == 1
    assert not model.middle.layer.weight._backward_hooks
    assert_same_gradients(net, model)


class Peeks(Hooked):
    """Looks at a value inside of a layer by a hook that is gone when the forward is."""

    def forward(self, h):
        seen = []
        handle = self.layer.register_forward_hook(lambda m, inputs, output: seen.append(output))
        h = self.layer(h)
        handle.remove()
        return h + seen[0].mean()


def test_a_forward_hook_that_is_removed_again_is_recorded():
    model = Model(Peeks())
    net = decoupled(model)
    assert torch.equal(net(X), model(X))
    assert_same_gradients(net, model)


def test_containers_with_hooks_stay_whole(caplog):
    model, calls = Model(), []
    model.b.register_forward_hook(lambda *_: calls.append("forward"))
    model.b.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.b.register_full_backward_hook(lambda *_: calls.append("backward"))
    net = decoupled(model, cuts=["b"], heads="linear")
    assert "'b'" in caplog.text
    assert "stay whole" in caplog.text
    calls.clear()
    net(X)
    assert calls == ["pre", "forward"]
    calls.clear()
    net.backward(X, Y)
    assert calls == ["pre", "forward", "backward"]


def test_hooks_on_containers_that_change_values_and_gradients():
    model = Model()
    model.b.register_forward_hook(lambda module, inputs, output: 2 * output)
    model.b.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.b.register_full_backward_hook(lambda module, inputs, outputs: (0.1 * inputs[0],))
    net = decoupled(model)
    assert torch.equal(net(X), model(X))
    assert_same_gradients(net, model)


def test_hooks_that_never_run_are_told_of():
    for model, who in ((Model(captured=True), "'b', which torch.export"), (Model(), "the model itself")):
        hooked = model.b if model.captured else model
        hooked.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=f"hooks hang on {who}.*never run"):
            net = decoupled(model)
        assert torch.equal(net(X), model(X))


def test_backward_hooks_that_would_never_run_are_refused():
    model = Model(captured=True)
    model.b[0].register_full_backward_hook(lambda module, inputs, outputs: (0.1 * inputs[0],))
    with pytest.raises(TraceError, match=r"backward hooks hang on 'b.0', and an exported program has no modules"):
        decoupled(model)
    model = Model()
    model.register_full_backward_pre_hook(lambda module, outputs: (0.1 * outputs[0],))
    with pytest.raises(TraceError, match="a backward hook hangs on Model itself"):
        decoupled(model)


def test_hooks_of_pytorch_are_no_news():
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert layer._forward_pre_hooks
    assert hooks_of(layer) == ()
    layer.register_forward_pre_hook(lambda *_: None)
    assert hooks_of(layer) == ("forward",)


class RunsAround(nn.Module):
    """Reads a number in its own forward, so that with root= it runs as Python."""

    def __init__(self, hooked):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.last = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        self.hooked = hooked
        self.double()

    def forward(self, x):
        h = self.first(x) * (1 if x.sum().item() > 1e9 else 2)
        if self.hooked == "tensor":
            h.register_hook(lambda g: 0.1 * g)
        elif self.hooked == "parameter":
            self.last.weight.register_hook(lambda g: 0.1 * g)
        return self.last(self.body(h))


def test_around_a_root_hooks_are_refused_too():
    for hooked in ("tensor", "parameter"):
        with pytest.raises(TraceError, match=f"cannot run the code around 'body'.*on a {hooked}.*register_hook"):
            decoupled(RunsAround(hooked), root="body")
    assert_same_gradients(decoupled(RunsAround("none"), root="body"), RunsAround("none"))


class OnceOnModule(Once):
    def forward(self, h):
        if not self.done:
            self.layer.register_full_backward_hook(lambda module, inputs, outputs: (0.1 * inputs[0],))
            self.done = True
        return self.layer(h)


def test_a_backward_hook_registered_once_has_no_module_to_hang_on():
    with pytest.raises(TraceError, match=r"registers a hook on a module \(register_full_backward_hook"):
        decoupled(Model(OnceOnModule()))

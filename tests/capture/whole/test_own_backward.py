"""The user's own ``torch.autograd.Function`` in forward: its backward is kept, or refused by name."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import TraceError

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double(), torch.arange(6) % 3


class Reversal(torch.autograd.Function):
    """Gradient reversal (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.scale * gradient, None


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1, 1)


class Gelu(torch.autograd.Function):
    """The derivative that autograd would give, in other operations, as Bloom's."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 0.5 * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return gradient * (0.5 * x * (1 - t * t) * (0.79788456 + 0.1070322243 * x * x) + 0.5 * (1 + t))


class Layer(nn.Module):
    def forward(self, h):
        return Gelu.apply(Reversal.apply(h, 0.5))


class Model(nn.Module):
    """Functions in the model's own forward and in a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.layer = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), Layer()

    def check(self, x):
        """Nothing that hinders symbolic tracing."""

    def first(self, x):
        self.check(x)
        return self.b(self.layer(self.a(x)))

    def forward(self, x):
        return self.c(Sign.apply(self.first(x)))


class InModules(Model):
    def forward(self, x):
        return self.c(self.first(x).tanh())


class Captured(InModules):
    def check(self, x):
        if x.shape[1] != 4:
            raise ValueError


class CapturedOwn(Model):
    check = Captured.check


@pytest.mark.parametrize("kind", [Model, InModules, Captured])
def test_one_block_is_backprop_bit_for_bit(kind):
    model = kind().double()
    net = copy.deepcopy(sedona_fx.decouple(model, (X, Y), blocks=1))
    assert net.capture.front_end == ("export" if kind is Captured else "symbolic")
    net.backward(X, Y)
    F.cross_entropy(model(X), Y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.model.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [Model, InModules, Captured])
def test_blocks_have_the_gradients_of_a_hand_written_loop(kind, tmp_path):
    model = kind().double()
    net = sedona_fx.decouple(model, (X, Y), cuts=["b"], heads="linear")
    head = copy.deepcopy(net.heads["0"])
    net.backward(X, Y)
    h = model.first(X)
    F.cross_entropy(head(h), Y).backward()
    h = h.detach()
    F.cross_entropy(model.c(Sign.apply(h) if kind is Model else h.tanh()), Y).backward()
    for ours, theirs in zip(net.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)
    net.save(tmp_path / "net.pt")
    loaded = sedona_fx.load(tmp_path / "net.pt", kind().double())
    assert torch.equal(loaded(X), net(X))


def test_a_module_that_torch_export_would_rob_of_its_backward_stays_whole(caplog):
    with caplog.at_level(logging.WARNING):
        sedona_fx.decouple(Captured().double(), (X, Y), blocks=2, search="uniform")
    assert "'layer' stays whole, with no cut inside of it" in caplog.text
    assert "it has a backward of its own (Reversal, a torch.autograd.Function)" in caplog.text


def test_in_the_models_own_forward_torch_export_would_lose_it():
    with pytest.raises(TraceError, match=r"backward of its own \(Gelu, Reversal, Sign.*leaf_modules"):
        sedona_fx.decouple(CapturedOwn().double(), (X, Y), blocks=1)


def test_the_function_is_as_before():
    before = vars(torch.autograd.Function)["apply"]
    sedona_fx.decouple(Model().double(), (X, Y), blocks=1)
    assert vars(torch.autograd.Function)["apply"] is before


def test_an_onnx_file_has_the_forward(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = sedona_fx.decouple(Model(), (X.float(), Y), blocks=1).eval()
    session = onnxruntime.InferenceSession(str(net.to_onnx(tmp_path / "n.onnx")), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(X.float()), rtol=1e-5, atol=1e-6)


def test_a_module_for_inference_can_be_pickled():
    net = sedona_fx.decouple(Model().double(), (X, Y), blocks=2, search="uniform")
    module = net.inference_module()
    loaded = pickle.loads(pickle.dumps(module))
    assert torch.equal(loaded(X), module(X))
    x = X.clone().requires_grad_()
    loaded(x).sum().backward()
    wanted = X.clone().requires_grad_()
    net.model(wanted).sum().backward()
    assert torch.equal(x.grad, wanted.grad)

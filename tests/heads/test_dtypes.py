"""Heads of models that compute in several dtypes: weights like the activation's, the output like the model's."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx


class Front(nn.Module):
    """bfloat16 (or another dtype) up to `b`, float32 from there on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8).to(dtype), nn.Linear(8, 8).to(dtype)
        self.c, self.fc, self.dtype = nn.Linear(8, 8), nn.Linear(8, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x.to(self.dtype)).tanh())
        return self.fc(self.c(h.float().tanh()).tanh())


class Island(Front):
    """Weights in float32; autocast makes the values at the end of `b` bfloat16."""

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def forward(self, x):
        h = self.a(x).tanh()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(h)
        return self.fc(self.c(h.float().tanh()).tanh())


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)


def decoupled(model, **how):
    return sedona_fx.decouple(model, data(), loss=F.mse_loss, progress=False, **how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("heads", ["linear", "mlp", lambda c: nn.Linear(8, 3)], ids=["linear", "mlp", "own"])
def test_heads_have_the_dtype_of_their_activation_and_blocks_train_as_by_hand(dtype, heads):
    torch.manual_seed(0)
    net, (x, y) = decoupled(Front(dtype), cuts=["a", "b", "c"], heads=heads), data()
    assert [next(net.heads[k].parameters()).dtype for k in "012"] == [dtype, dtype, torch.float32]
    model, own = copy.deepcopy(net.model), copy.deepcopy(net.heads)
    losses = net.backward(x, y).losses
    a = model.a(x.to(dtype))
    b = model.b(a.detach().tanh())
    c = model.c(b.detach().float().tanh())
    parts = [own["0"](a), own["1"](b), own["2"](c), model.fc(c.detach().tanh())]
    assert all(part.dtype is torch.float32 for part in parts)
    expected = [F.mse_loss(part, y) for part in parts]
    sum(expected).backward()
    torch.testing.assert_close(losses, [loss.detach() for loss in expected], rtol=0, atol=0)
    for (name, p), q in zip(net.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", ["linear", "mlp"])
def test_where_autocast_makes_the_activation_the_weights_stay_as_the_models(low, heads):
    torch.manual_seed(0)
    net, (x, y) = decoupled(Island(), cuts=["a", "b", "c"], heads=heads), data()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    losses = sedona_fx.train.Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1), autocast=low).step(x, y).losses
    assert all(loss.isfinite() and loss.dtype is torch.float32 for loss in losses)


SEDONA = sedona_fx.search.Sedona(warmup_steps=3, meta_steps=2, snapshots=1, unroll=1)


@pytest.mark.parametrize("search", ["balanced", "guided", "rollout", SEDONA], ids=str)
def test_searches_train_such_heads(search):
    torch.manual_seed(0)
    x, y = data()
    how = {"search": search, "heads": ["mlp", "linear"], "progress": False}
    net = sedona_fx.decouple(Front(torch.bfloat16), [(x, y)] * 6, blocks=3, loss=F.mse_loss, **how)
    assert all(loss.isfinite() for loss in net.backward(x, y).losses)


def test_such_heads_follow_a_conversion_and_are_saved(tmp_path):
    torch.manual_seed(0)
    net, (x, y) = decoupled(Front(torch.bfloat16), cuts=["b"], heads="linear"), data()
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Front(torch.bfloat16), loss=F.mse_loss)
    assert torch.equal(torch.stack(again.backward(x, y).losses), torch.stack(net.backward(x, y).losses))
    assert not any("output" in name or "weights" in name for name in net.heads.state_dict())
    net.double()
    assert net.heads["0"](torch.randn(5, 8, dtype=torch.float64)).dtype is torch.float64


def test_a_model_of_one_dtype_has_heads_as_they_are():
    for dtype in (torch.float32, torch.float64):
        x, y = (t.to(dtype) for t in data())
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        net = sedona_fx.decouple(model, (x, y), cuts=["1"], loss=F.mse_loss, heads="linear")
        assert type(net.heads["0"]) is nn.Sequential
        assert {p.dtype for p in net.parameters()} == {dtype}


def test_heads_take_no_dtype_from_a_parameter_that_is_not_used():
    class WithSpare(Front):
        def __init__(self):
            super().__init__(torch.float32)
            spare = {"spare": nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))}
            self._parameters = spare | self._parameters

    model = WithSpare()
    assert next(model.parameters()).dtype is torch.bfloat16
    net, (x, y) = decoupled(model, cuts=["b"], heads="linear"), data()
    assert {p.dtype for p in net.heads.parameters()} == {torch.float32}
    assert all(loss.isfinite() for loss in net.backward(x, y).losses)

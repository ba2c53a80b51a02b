"""ONNX files of models with autocast and no-grad regions: the casts are in the file, and ONNX Runtime runs them."""

import contextlib
from unittest import mock

import onnxruntime
import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import ExportError

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Base(nn.Module):
    """Three layers and a classifier; `exported` makes symbolic tracing fail."""

    def __init__(self, exported):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.fc, self.exported = nn.LayerNorm(8), nn.Linear(8, 3), exported

    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError("six features")
        return self.fc(self.c(self.mid(self.a(x).tanh()).tanh()).tanh())


class Off(Base):
    def mid(self, h):
        with torch.autocast("cpu", enabled=False):
            return self.b(h.float())


class Rotary(Base):
    """As Hugging Face's rotary embeddings write it."""

    def mid(self, h):
        with torch.no_grad(), torch.autocast(device_type="cpu", enabled=False):
            angle = torch.arange(8, device=h.device).float() / 8
        return self.b(h) * angle.cos()


class NoGrad(Base):
    def mid(self, h):
        with torch.no_grad():
            scale = self.b(h).abs().mean(1, keepdim=True)
        return self.b(h) / (1 + scale)


class Inference(Base):
    def mid(self, h):
        with torch.inference_mode():
            level = self.b(h).sigmoid()
        return self.b(h) + level


class Switched(Base):
    def mid(self, h):
        torch.set_grad_enabled(False)
        level = self.b(h).sigmoid()
        torch.set_grad_enabled(True)
        return self.b(h) * level


class Low(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.norm(self.b(h).relu() * 0.5)
        return h.float()


class Half(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.float16):
            h = self.b(h).relu()
        return h.float()


class Nested(Base):
    def mid(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.b(h)
            with torch.autocast("cpu", enabled=False), torch.no_grad():
                level = self.b(h.float()).sigmoid()
            h = self.c(h).softmax(1)
        return h.float() * level


EXACT = (Off, Rotary, NoGrad, Inference, Switched)
CAST = (Low, Half, Nested)


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("kind", [*EXACT, *CAST])
def test_onnx_runtime_computes_what_the_regions_say(kind, exported, tmp_path):
    model = kind(exported).eval()
    net = sedona_fx.decouple(model, (X, Y), cuts=["a"], heads="linear")
    assert net.plan.capture.front_end == ("export" if exported else "symbolic")
    path = net.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = model(x)
        with mock.patch("torch.autocast", return_value=contextlib.nullcontext()):
            exact = model(x)
    found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    if kind in EXACT:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        return
    # A sum rounded to bfloat16 may be its neighbour in another order of summation, and no more.
    assert (found - expected).abs().max() <= 2 * (expected - exact).abs().max()
    assert (expected - exact).abs().max() > 1e-5  # else the region does nothing


class LowOutput(Base):
    """Its output is bfloat16, which NumPy does not have."""

    def mid(self, h):
        return self.b(h)

    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError("six features")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(self.c(self.mid(self.a(x).tanh()).tanh()).tanh())


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
def test_what_cannot_be_checked_is_refused_by_name(exported, tmp_path):
    net = sedona_fx.decouple(LowOutput(exported), (X, Y), cuts=["a"], heads="linear")
    with pytest.raises(ExportError, match="bfloat16"):
        net.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())

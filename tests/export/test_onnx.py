"""Promise 8 of docs/architecture.md: ONNX Runtime gives what PyTorch gives, for any size of batch."""

import onnxruntime
import pytest
import torch
from torch import nn
from zoo import ZOO, Entry, spread

import sedona_fx
from sedona_fx.errors import ExportError

TOLERANCE = 1e-5


def net_of(model: nn.Module, entry: Entry) -> sedona_fx.Net:
    return sedona_fx.decouple(model, entry.pair(), blocks=2, search="uniform")


def run(path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) == len(session.get_outputs()) == 1
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.mark.parametrize("name", ZOO)
def test_onnx_runtime_gives_what_the_model_gives(name, tmp_path):
    entry = ZOO[name]
    model = entry.make()
    path = net_of(model, entry).to_onnx(tmp_path / "model.onnx")
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, entry.size, entry.size)
        with torch.no_grad():
            expected = model.eval()(images)
        actual = run(path, images)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert spread(expected) > 100 * TOLERANCE  # else a file that ignores its input would pass, too


class Chaotic(nn.Module):
    """Makes of a difference in the last bit one of a thousandth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3), nn.Linear(64, 10)

    def forward(self, x):
        h = self.first(x).relu().mean((2, 3))
        return self.second(torch.sin(1e4 * h))


def test_a_net_that_magnifies_its_own_rounding_is_exported(tmp_path):
    """No file can be nearer to PyTorch than PyTorch's float32 itself is to the exact result."""
    entry = Entry(Chaotic)
    model = entry.make()
    path = net_of(model, entry).to_onnx(tmp_path / "model.onnx")
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected, exact = model(images), model.double()(images.double())
    own = (expected - exact).abs().max()
    assert own > 10 * TOLERANCE * exact.abs().max()  # else this tests nothing
    assert (run(path, images) - exact).abs().max() <= 10 * own


@pytest.mark.parametrize("name", ["alexnet", "chaotic"])
def test_a_wrong_file_is_refused(name, tmp_path, monkeypatch):
    entry = ZOO.get(name, Entry(Chaotic))
    net = net_of(entry.make(), entry)

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args):
            return [1.05 * value for value in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ExportError, match="differs from the net"):
        net.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_export_leaves_the_net_on_its_device(tmp_path):
    entry = ZOO["paper_vgg11"]
    x, y = entry.pair()
    net = sedona_fx.decouple(entry.make().cuda(), (x.cuda(), y.cuda()), blocks=2, search="uniform")
    net.to_onnx(tmp_path / "model.onnx")
    assert all(t.is_cuda for t in net.state_dict().values())
    assert net(x.cuda()).is_cuda

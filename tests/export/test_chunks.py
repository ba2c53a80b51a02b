"""Networks that chunk the batch, in ONNX files with a free batch."""

import onnxruntime
import pytest
import torch
from torch import nn

import sedona_fx

X, Z = (torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))


class Twins(nn.Module):
    """Two inputs through one encoder at once."""

    pieces = staticmethod(lambda h: h.chunk(2))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.out = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2)

    def forward(self, a, b):
        a, b = self.pieces(self.encoder(torch.cat([a, b])))
        return self.out((a - b).tanh() * a.chunk(2, 1)[0].sum(1, keepdim=True))


class Named(Twins):
    pieces = staticmethod(lambda h: torch.chunk(h, chunks=2, dim=0))


class Captured(Twins):
    def forward(self, a, b):
        if a.shape[1] != 3:
            raise ValueError
        return super().forward(a, b)


@pytest.mark.parametrize("kind", [Twins, Named, Captured])
def test_the_batch_stays_free(kind, tmp_path):
    model = kind().eval()
    net = sedona_fx.decouple(model, ((X, Z), torch.tensor([0, 1, 1, 0])), blocks=1)
    session = onnxruntime.InferenceSession(str(net.to_onnx(tmp_path / "net.onnx")), providers=["CPUExecutionProvider"])
    for count in (1, 2, 4):
        a, b = X[:count], Z[-count:]
        (found,) = session.run(None, {"a": a.numpy(), "b": b.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(a, b), rtol=1e-5, atol=1e-6)

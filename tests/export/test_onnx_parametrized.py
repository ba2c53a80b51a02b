"""ONNX files of models with parametrized weights: the weights that the parametrizations give are in the file."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sedona_fx

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Scaled(nn.Module):
    """With a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, weight):
        return weight * self.scale


KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "stacked": lambda layer: parametrizations.spectral_norm(
        parametrize.register_parametrization(layer, "weight", Scaled())
    ),
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", Scaled()),
}


class Net(nn.Module):
    def __init__(self, kind, exported):
        super().__init__()
        torch.manual_seed(0)
        self.exported = exported
        self.conv = KINDS[kind](nn.Conv2d(3, 3, 3)) if kind != "symmetric" else nn.Conv2d(3, 3, 3)
        self.a, self.tied, self.fc = KINDS[kind](nn.Linear(12, 12)), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        if self.exported and x.shape[1] != 3:
            raise ValueError("three channels")
        h = self.conv(x).relu()[:, :, :2, :2].flatten(1)
        return self.fc(self.a(self.tied(self.a(h)).tanh()).tanh())


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_the_weights_that_parametrizations_give(kind, exported, tmp_path):
    model = Net(kind, exported)
    net = sedona_fx.decouple(model, (X, Y), cuts=["conv"], heads="linear")
    assert net.plan.capture.front_end == ("export" if exported else "symbolic")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net.train().backward(X, Y)
        optimizer.step()
    names = list(net.state_dict())
    path = net.to_onnx(tmp_path / "model.onnx")
    assert list(net.state_dict()) == names
    assert parametrize.is_parametrized(net.model.a)
    model.load_state_dict(net.original_state_dict())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model.eval()(X[:5])
    (found,) = session.run(None, {"x": X[:5].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)
    net.train().backward(X, Y)  # and the net trains on
    assert net.model.fc.weight.grad.abs().sum() > 0

"""Modules that are kept whole without being asked to: fake quantizers, observers and TorchScript train as ever."""

import copy
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.nn import functional as F

import sedona_fx

QConfig, Fake = quantization.QConfig, quantization.FakeQuantize
PLAIN = QConfig(
    activation=Fake.with_args(observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255),
    weight=quantization.default_per_channel_weight_fake_quant,
)
"""The fake quantizers that branch on their buffers in Python, and resize them there."""
QCONFIGS = {"plain": PLAIN, **{name: quantization.get_default_qat_qconfig(name) for name in ("fbgemm", "qnnpack")}}


def batches(count=3, size=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def images(count=3, size=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 2, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def prepared(model, qconfig, prepare=quantization.prepare_qat):
    model.qconfig = qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch moves its quantization to another package
        prepare(model, inplace=True)
    return model


class Layers(nn.Sequential):
    """Three stages; with `captured` the forward needs torch.export."""

    def __init__(self, *stages, captured=False):
        super().__init__(*stages)
        self.captured = captured

    def forward(self, x):
        if self.captured and x.shape[1] > 4:
            raise ValueError("four features")
        return super().forward(x)


def stack(captured=False):
    torch.manual_seed(0)
    return Layers(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, 3),
        captured=captured,
    ).train()


def train_by_hand(stages, heads, data, losses=F.cross_entropy):
    """Train stages by local losses; return the losses of every step."""
    parts = [*zip(stages, heads, strict=False), (stages[-1], nn.Identity())]
    optimizers = [sgd([*stage.parameters(), *head.parameters()]) for stage, head in parts]
    found = []
    for x, y in data:
        found.append([])
        for (stage, head), optimizer in zip(parts, optimizers, strict=True):
            optimizer.zero_grad()
            x = stage(x)
            loss = losses(head(x), y)
            loss.backward()
            optimizer.step()
            x = x.detach()
            found[-1].append(loss.detach())
    return found


def assert_trains_as_by_hand(model, data, stages, **options):
    """Cut after each of `stages` (functions of the model that return it) but the last, and train three steps."""
    before = copy.deepcopy(model.state_dict())
    net = sedona_fx.decouple(model, data[0], heads="linear", **options)
    for name, value in net.original_state_dict().items():  # nothing has been counted or observed yet
        assert value.shape == before[name].shape
        assert torch.equal(value, before[name]), name
    twin, heads = copy.deepcopy(model), [copy.deepcopy(net.heads[str(k)]) for k in range(len(net.heads))]
    expected = train_by_hand([stage(twin) for stage in stages], heads, data)
    schedule = sedona_fx.train.Greedy(net, sgd)
    for batch, losses in zip(data, expected, strict=True):
        torch.testing.assert_close(schedule.step(*batch).losses, losses, rtol=1e-6, atol=0)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.original_state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)
    x, _ = data[0]
    torch.testing.assert_close(net.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
    return net, twin


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_a_model_fresh_from_prepare_qat(qconfig, captured):
    model = prepared(stack(captured), QCONFIGS[qconfig])
    stages = [lambda m: m[0], lambda m: m[1], lambda m: m[2]]
    assert_trains_as_by_hand(model, batches(), stages, cuts=["0", "1"])

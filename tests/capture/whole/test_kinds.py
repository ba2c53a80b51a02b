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


STAGES = [lambda m: m[0], lambda m: m[1], lambda m: m[2]]


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_a_model_fresh_from_prepare_qat(qconfig, captured):
    model = prepared(stack(captured), QCONFIGS[qconfig])
    net, _ = assert_trains_as_by_hand(model, batches(), STAGES, cuts=["0", "1"])
    assert net.plan.capture.front_end == ("export" if captured else "symbolic")


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
def test_one_block_is_the_model(captured):
    model = prepared(stack(captured), PLAIN)
    net = sedona_fx.decouple(model, batches()[0], blocks=1)
    schedule, optimizer = sedona_fx.train.Backprop(net, sgd), sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(schedule.step(x, y).losses[0], loss.detach())
    for name, value in model.state_dict().items():
        assert torch.equal(net.original_state_dict()[name], value), name


class Residual(nn.Module):
    """Stubs, fused layers, an embedding and a sum that is observed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.skip = torch.ao.nn.quantized.FloatFunctional()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        h = self.stem(self.quant(x))
        h = self.skip.add(h, self.block(h))
        return self.dequant(self.fc(h.mean((2, 3))))


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_fused_layers_and_observed_sums(qconfig):
    model = Residual().train()
    quantization.fuse_modules_qat(model, [["stem.0", "stem.1", "stem.2"]], inplace=True)
    prepared(model, QCONFIGS[qconfig])
    data = images()
    net = sedona_fx.decouple(model, data[0], cuts=["stem.0"], heads="linear")
    twin, head = copy.deepcopy(model), copy.deepcopy(net.heads["0"])
    first = [*twin.quant.parameters(), *twin.stem.parameters(), *head.parameters()]
    rest = [*twin.block.parameters(), *twin.skip.parameters(), *twin.fc.parameters()]
    schedule, optimizers = sedona_fx.train.Greedy(net, sgd), (sgd(first), sgd(rest))
    for x, y in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        h = twin.stem(twin.quant(x))
        F.cross_entropy(head(h), y).backward()
        h = h.detach()
        h = twin.skip.add(h, twin.block(h))
        F.cross_entropy(twin.dequant(twin.fc(h.mean((2, 3)))), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        schedule.step(x, y)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.original_state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)
    for tree in (net.model, twin):  # what a user does later in training, and for deployment
        tree.apply(quantization.disable_observer)
    torch.testing.assert_close(net.train()(10 * x), twin.train()(10 * x), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (quantization.convert(tree.eval()) for tree in (net.model, twin))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("observer", ["HistogramObserver", "PerChannelMinMaxObserver", "MinMaxObserver"])
def test_observers_alone(observer):
    """Prepared for calibration: the model runs in both modes, and each batch is counted once."""
    kind = getattr(quantization, observer).with_args(dtype=torch.qint8)
    activation = quantization.MinMaxObserver if observer.startswith("PerChannel") else kind
    model = prepared(stack().eval(), QConfig(activation=activation, weight=kind), quantization.prepare)
    data = batches()
    net = sedona_fx.decouple(model, data[0], cuts=["0", "1"], heads="linear")
    for x, _ in data:
        assert torch.equal(net.eval()(x), model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(net.original_state_dict()[name], value), name


def test_a_bad_first_batch_leaves_buffers_as_they_were():
    """The first forward pass gives buffers their size: if its loss is not finite, it has not been."""
    model = prepared(stack(), QCONFIGS["fbgemm"])
    x, y = batches()[0]
    net = sedona_fx.decouple(model, (x, y), cuts=["0", "1"], heads="linear")
    before = {name: value.clone() for name, value in net.original_state_dict().items()}
    schedule = sedona_fx.train.Greedy(net, sgd)
    for deferred in (False, True):
        net.engine.guard.deferred = deferred
        bad = torch.full_like(x, float("nan"))
        if deferred:
            schedule.step(bad, y)
        with pytest.raises(sedona_fx.errors.NonFiniteLossError):
            schedule.raise_pending() if deferred else schedule.step(bad, y)
        weights = net.original_state_dict()
        for name, value in before.items():
            if name.startswith("0."):
                assert value.shape == weights[name].shape, name
                assert torch.equal(value, weights[name]), name
    net.engine.guard.deferred = None
    assert all(loss.isfinite() for loss in schedule.step(x, y).losses)


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_files_of_a_trained_model_load_into_a_fresh_one(qconfig, tmp_path):
    def fresh():
        return prepared(stack(), QCONFIGS[qconfig])

    data = batches()
    net = sedona_fx.decouple(fresh(), data[0], cuts=["0", "1"], heads="linear")
    sedona_fx.fit(net, data, epochs=1, schedule=sedona_fx.train.Greedy(net, sgd))
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, fresh(), data=data[0])
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    other = stack()
    other[2] = nn.Linear(8, 4)
    with pytest.raises(sedona_fx.errors.CheckpointError):
        sedona_fx.load(tmp_path, prepared(other, QCONFIGS[qconfig]), data=data[0])


@pytest.mark.parametrize("kind", ["Greedy", "Delayed", "Current", "Replay", "BackLink"])
def test_resuming_in_a_fresh_process(kind, tmp_path):
    """With every schedule the run that was stopped after one batch goes on as the one that was not."""
    options = {"Replay": {"capacity": 2}, "BackLink": {"reach": 1}, "Current": {"weights": "current"}}.get(kind, {})
    data = batches(5)

    def started():
        net = sedona_fx.decouple(prepared(stack(), QCONFIGS["fbgemm"]), data[0], cuts=["0", "1"], heads="linear")
        return net, getattr(sedona_fx.train, kind.replace("Current", "Delayed"))(net, sgd, **options)

    net, schedule = started()
    for x, y in data:
        schedule.step(x, y)
    stopped, first = started()
    first.step(*data[0])
    stopped.save(tmp_path)
    torch.save(first.state_dict(), tmp_path / "schedule.pt")
    again, second = started()
    again.load_weights(tmp_path / "weights.pt")
    second.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    for x, y in data[1:]:
        second.step(x, y)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    "search",
    [
        "guided",
        sedona_fx.search.Sedona(warmup_steps=4, meta_steps=2, snapshots=2, unroll=2),
        sedona_fx.search.Rollout(steps=4),
    ],
    ids=["guided", "sedona", "rollout"],
)
def test_searches(search):
    data = batches(4)
    model = prepared(stack(), QCONFIGS["fbgemm"])
    before = copy.deepcopy(model.state_dict())
    net = sedona_fx.decouple(model, data, blocks=2, search=search, heads=["linear"], progress=False)
    for name, value in before.items():
        assert value.shape == net.original_state_dict()[name].shape, name
        assert torch.equal(value, net.original_state_dict()[name]), name

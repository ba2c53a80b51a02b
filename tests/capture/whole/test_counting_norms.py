"""BatchNorm with a cumulative average (``momentum=None``), whose factor is one over a number in a buffer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.ir.graph import info

DIMS = {
    1: (nn.Linear, nn.BatchNorm1d, ()),
    2: (nn.Conv2d, nn.BatchNorm2d, (5, 5)),
    3: (nn.Conv3d, nn.BatchNorm3d, (4,) * 3),
}


class Pooled(nn.Module):
    """Mean over positions."""

    def forward(self, h):
        return h.flatten(2).mean(2)


class Norms(nn.Module):
    """Three stages with a norm each; with `captured` the forward needs torch.export."""

    def __init__(self, dim, captured=False, momentum=None, norm=None, **options):
        super().__init__()
        torch.manual_seed(0)
        layer, kind, _ = DIMS[dim]
        kind, sizes = norm or kind, () if dim == 1 else (1,)
        options = {"momentum": momentum, **options}
        self.a = nn.Sequential(layer(4, 6, *sizes), kind(6, **options), nn.Tanh())
        self.b = nn.Sequential(layer(6, 6, *sizes), kind(6, **options), nn.Tanh())
        self.c = nn.Sequential(layer(6, 6, *sizes), kind(6, **options), nn.Tanh())
        self.pool = nn.Identity() if dim == 1 else Pooled()
        self.fc, self.captured = nn.Linear(6, 3), captured
        self.double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        return self.fc(self.pool(self.c(self.b(self.a(x)))))


def batches(dim, count=4):
    generator = torch.Generator().manual_seed(1)
    sizes = DIMS[dim][2]
    return [
        (
            torch.randn(6 + k, 4, *sizes, generator=generator, dtype=torch.float64),
            torch.randint(3, (6 + k,), generator=generator),
        )
        for k in range(count)
    ]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("dim", DIMS)
def test_blocks_train_as_by_hand(dim, captured):
    model, data = Norms(dim, captured), batches(dim)
    before = copy.deepcopy(model.state_dict())
    net = sedona_fx.decouple(model, data[0], cuts=["a", "b"], heads="linear")
    assert net.plan.capture.front_end == ("export" if captured else "symbolic")
    for name, value in before.items():
        assert torch.equal(net.original_state_dict()[name], value), name
    twin, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    parts = [(twin.a, heads["0"]), (twin.b, heads["1"]), (nn.Sequential(twin.c, twin.pool, twin.fc), nn.Identity())]
    optimizers = [sgd([*part.parameters(), *head.parameters()]) for part, head in parts]
    schedule = sedona_fx.train.Greedy(net, sgd)
    for x, y in data:
        losses = []
        h = x
        for (part, head), optimizer in zip(parts, optimizers, strict=True):
            optimizer.zero_grad()
            h = part(h)
            losses.append(F.cross_entropy(head(h), y))
            losses[-1].backward()
            optimizer.step()
            h = h.detach()
        torch.testing.assert_close(schedule.step(x, y).losses, [loss.detach() for loss in losses], rtol=1e-12, atol=0)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(net.original_state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)
    assert net.model.a[1].num_batches_tracked == len(data)
    torch.testing.assert_close(net.eval()(x), twin.eval()(x), rtol=1e-12, atol=0)
    model.load_state_dict(net.original_state_dict())


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
def test_one_block_is_the_model(captured):
    model, data = Norms(2, captured), batches(2)
    net = sedona_fx.decouple(model, data[0], blocks=1)
    schedule, optimizer = sedona_fx.train.Backprop(net, sgd), sgd(model.parameters())
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(schedule.step(x, y).losses[0], loss.detach())
        for name, value in model.state_dict().items():
            assert torch.equal(net.original_state_dict()[name], value), name


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": nn.SyncBatchNorm},
        {"track_running_stats": False},
        {"affine": False},
        {"norm": nn.InstanceNorm2d, "track_running_stats": True},
    ],
    ids=["synchronised", "untracked", "plain", "instance"],
)
def test_other_norms(options, captured):
    """A cumulative average or none: the model's own numbers, buffers included."""
    model, data = Norms(2, captured, **options), batches(2)
    net = sedona_fx.decouple(model, data[0], cuts=["a"], heads="linear")
    for x, _ in data:
        assert torch.equal(net.train()(x), model.train()(x))
    for (name, ours), theirs in zip(net.model.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(net.eval()(x), model.eval()(x))


def test_a_frozen_norm_does_not_count():
    model, data = Norms(1), batches(1)
    model.a[1].eval()
    net = sedona_fx.decouple(model, data[0], cuts=["a", "b"], heads="linear")
    net.backward(*data[0])
    assert net.model.a[1].num_batches_tracked == 0
    assert net.model.b[1].num_batches_tracked == 1


def test_what_is_counted_of_it_is_what_is_counted_of_a_constant_momentum():
    found = []
    for momentum in (None, 0.1):
        net = sedona_fx.decouple(Norms(2, momentum=momentum), batches(2)[0], blocks=2, search="balanced")
        nodes = net.graph_module.graph.nodes
        found.append([(info(n).flops, sum(info(n).saved.values()), info(n).value) for n in nodes])
        norms = [m for m in net.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [m.momentum for m in norms] == [momentum] * 3
    assert found[0] == found[1]


@pytest.mark.parametrize("schedule", ["Delayed", "Current", "Replay", "BackLink"])
def test_every_way_to_train_counts_each_batch_once(schedule):
    train, data = sedona_fx.train, batches(1, 1) * 6
    options = {"Replay": {"capacity": 1}, "BackLink": {"reach": 1}, "Current": {"weights": "current"}}.get(schedule, {})
    net = sedona_fx.decouple(Norms(1), data[0], cuts=["a", "b"], heads="linear")
    trained = getattr(train, schedule.replace("Current", "Delayed"))(net, sgd, **options)
    for x, y in data:
        trained.step(x, y)
    assert [stage[1].num_batches_tracked.item() for stage in (net.model.a, net.model.b, net.model.c)] == [6, 6, 6]


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
    data = batches(2)
    net = sedona_fx.decouple(Norms(2), data, blocks=2, search=search, heads=["linear", "mlp-sr"], progress=False)
    assert net.model.a[1].num_batches_tracked == 0
    assert len(net.plan.cuts) == 1

"""Other forms of a net's blocks: bodies and tails, layers to look at; and nets that are moved or copied under them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import SHORT, ZOO

import sedona_fx
from sedona_fx.errors import ScheduleError
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, KineticEnergy, PredSim, Replay


class Wide(nn.Module):
    """Eight stages with an activation that overwrites, and a mask that is read at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3)) for _ in range(8)
        )
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.sum(1, keepdim=True) > -1.0
        for stage in self.stages:
            x = stage(x)
        return self.out(x * keep)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


CUTS = ["stages.2", "stages.5"]


@pytest.fixture(scope="module")
def lowered() -> sedona_fx.Net:
    return sedona_fx.decouple(Wide().double(), batch(), cuts=CUTS, heads="linear")


@pytest.fixture
def net(lowered) -> sedona_fx.Net:
    return copy.deepcopy(lowered)


def sgd(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def run(parts, values, seed=3):
    """Run graphs one after the other on named values; return everything there is, and the last local output."""
    torch.manual_seed(seed)
    for part in parts:
        exports, local = part.module(*[values[name] for name in part.inputs])
        values = {**values, **dict(zip(part.exports, exports, strict=True))}
    return values, local


# ---- base layers, bodies and tails ----------------------------------------------------------------------------------


def test_the_base_layers_of_each_block(net):
    names = [f"stages.{k}" for k in range(7)]  # behind the last one, one weight alone is left
    assert list(net.plan.base_layers) == names
    assert net.variants.base_layers() == [names[:3], names[3:6], [*names[6:], ""]]
    coarse = sedona_fx.decouple(Wide().double(), batch(), cuts=["stages.2.0", "stages.5"], heads="linear")
    # A cut inside a base layer makes two of it.
    assert coarse.variants.base_layers() == [[*names[:2], "stages.2.0"], names[2:6], [*names[6:], ""]]


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reach", [1, 2, 3])
def test_body_and_tail_are_the_block_bit_for_bit(net, reach, training, shown):
    net.train(training)
    values = {"x": batch()[0]}
    segments = net.variants.segments(reach, shown=shown)[training]
    assert [len(parts) for parts in segments] == ([2, 2, 1] if reach < 3 else [1, 1, 1])
    state = copy.deepcopy(net.state_dict())
    for block, parts in zip(net.blocks, segments, strict=True):
        plain, local = run([block.graph(training)], values)
        after = copy.deepcopy(net.state_dict())
        net.load_state_dict(state)
        found, other = run(parts, values)
        assert torch.equal(local, other)
        assert all(torch.equal(plain[name], found[name]) for name in plain)
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in after.items())
        assert set(block.graph(training).exports) <= {name for part in parts for name in part.exports}
        assert {id(p) for part in parts for p in part.module.parameters()} == {id(p) for p in block.parameters()}
        state, values = after, plain


def test_tails_hold_the_last_base_layers(net):
    segments = net.variants.segments(1)[True]
    names = [[[n for n, _ in part.module.named_parameters()] for part in parts] for parts in segments]
    stages = [[{n.split(".")[1] for n in part if n.startswith("stages")} for part in parts] for parts in names]
    assert stages == [[{"0", "1"}, {"2"}], [{"3", "4"}, {"5"}], [{"6", "7"}]]
    assert [[any("heads" in n for n in part) for part in parts] for parts in names[:2]] == [[False, True]] * 2


def test_a_link_longer_than_a_block(net):
    with pytest.raises(
        ScheduleError, match=r"reach=4 is longer than block 0, which has 3 base layers.*reach=3 or less"
    ):
        net.variants.segments(4)
    assert net.variants.segments(3) is net.variants.segments(3)


@pytest.mark.parametrize("training", [True, False])
def test_layers_show_what_stages_return(net, training):
    net.train(training)
    returned: list[Tensor] = []
    for stage in net.model.stages:
        stage[3].register_forward_hook(lambda _m, _args, out: returned.append(out))
    values = {"x": batch()[0]}
    for index, graph in enumerate(net.variants.with_layers()[training]):
        returned.clear()
        values, _ = run([graph], values)
        shown = [values[name] for name in net.variants.layer_names(index, training)]
        if index == 2:
            returned.pop()  # the last stage ends no base layer
        assert len(shown) == len(returned)
        assert all(torch.equal(a, b) for a, b in zip(shown, returned, strict=True))


# ---- nets that are moved or copied ----------------------------------------------------------------------------------

SCHEDULES = {
    "greedy": Greedy,
    "layers": lambda net, optimizer: Greedy(net, optimizer, extra=[KineticEnergy(0.1)]),
    "backlink": lambda net, optimizer: BackLink(net, optimizer, reach=1),
    "replay": lambda net, optimizer: Replay(net, optimizer, capacity=2),
    "stashed": lambda net, optimizer: Delayed(net, optimizer, weights="stashed"),
    "current": lambda net, optimizer: Delayed(net, optimizer, weights="current"),
    "backprop": Backprop,
}


def train(schedule, dtype=torch.float64, steps=4):
    torch.manual_seed(1)
    x, y = batch()
    return [schedule.step(x.to(dtype), y).losses for _ in range(steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_net_converted_after_its_schedule_was_made(kind, net):
    """As if it had been converted before."""
    single = copy.deepcopy(net).float()
    schedule = SCHEDULES[kind](single, sgd)
    single.double()
    reference = copy.deepcopy(net).float().double()
    expected = train(SCHEDULES[kind](reference, sgd))
    found = train(schedule)
    assert all(
        torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in single.state_dict().items())
    assert single.model.out.weight.dtype == torch.float64


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_copy_that_is_trained_leaves_the_original_alone(kind, net):
    schedule = SCHEDULES[kind](net, sgd)
    train(schedule)
    twin = copy.deepcopy(net)
    before = copy.deepcopy(net.state_dict())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    train(SCHEDULES[kind](twin, sgd))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(twin.model.out.weight, net.model.out.weight)
    assert net.steps == 4
    after = copy.deepcopy(twin.state_dict())
    train(schedule)
    assert all(torch.equal(value, after[name]) for name, value in twin.state_dict().items())


class Hosted(nn.Module):
    """Code around a backbone that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = x * 0
        return self.fc(torch.tanh(self.backbone(x)))


@pytest.mark.parametrize("kind", ["stashed", "current", "backprop"])
def test_a_copy_of_a_net_with_a_host_has_a_host_of_its_own(kind):
    net = sedona_fx.decouple(
        Hosted().double(), batch(), root="backbone", heads=False, cuts=["backbone.0", "backbone.2"]
    )
    twin, reference = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    train(SCHEDULES[kind](twin, sgd))
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, reference[name]) for name, value in net.state_dict().items())
    train(SCHEDULES[kind](net, sgd))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in net.state_dict().items())
    assert not any(torch.equal(value, reference[name]) for name, value in net.state_dict().items())


def test_losses_with_weights_of_their_own_are_the_schedules(net):
    schedule = Greedy(net.float(), sgd, extra=[PredSim(0.5)])
    net.double()
    schedule.extras.double()
    assert all(loss.isfinite() for losses in train(schedule) for loss in losses)


# ---- models of the zoo ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet"])
def test_bodies_and_tails_of_known_models(name):
    entry = SHORT.get(name, ZOO[name])
    model = entry.make() if hasattr(entry, "make") else entry
    x, y = entry.pair()
    net = sedona_fx.decouple(model, (x, y), blocks=2, search="uniform").train()
    sizes = [len(layers) for layers in net.variants.base_layers()]
    assert min(sizes) > 1
    values = {next(iter(net.bind(sedona_fx.Args(x)))): x}
    state = copy.deepcopy(net.state_dict())
    for block, parts in zip(net.blocks, net.variants.segments(sizes[0] // 2)[True], strict=True):
        plain, local = run([block.train_graph], values)
        net.load_state_dict(state)
        found, other = run(parts, values)
        assert all(torch.equal(plain[n], found[n]) for n in plain)
        if isinstance(local, Tensor):
            assert torch.equal(local, other)
            assert F.cross_entropy(other, y).isfinite()
        state, values = copy.deepcopy(net.state_dict()), plain

"""The second front end: models that symbolic tracing cannot record."""

import copy
import dataclasses
import random
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.data.args import Args
from sedona_fx.errors import DataError, TraceError
from sedona_fx.ir.graph import info
from sedona_fx.ir.same_numbers import same_bits
from sedona_fx.passes.trace import trace


class Looks(nn.Module):
    """Asks for sizes in Python, which symbolic tracing cannot follow; everything else a forward does in real models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.mid = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(4, 5)
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def body(self, x: Tensor) -> Tensor:
        if x.shape[2] < 4:
            raise ValueError("too small")
        h = self.norm(self.conv(x))
        h += 1
        h = self.norm(h)  # once more
        with torch.no_grad():
            level = h.abs().mean()
        h = self.mid(h) * self.scale / (1 + level)
        a, b = h.chunk(2, 1)
        h = self.drop(torch.cat([b.sin(), a * torch.tensor([[3.0]])[..., None, None]], 1))
        return self.fc(h.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def in_both_modes(net: sedona_fx.Net, model: nn.Module, x: Tensor) -> Iterator[tuple[Any, Any]]:
    """Yield what the net returns and what the model does, on the same draws and buffers; training first."""
    for training in (True, False):
        torch.manual_seed(0)
        expected = copy.deepcopy(model).train(training)(x)
        torch.manual_seed(0)
        net.model.load_state_dict(model.state_dict())
        yield net.train(training)(x), expected


def test_both_modes_are_captured_and_share_the_models_tensors():
    model = Looks()
    state = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    traced = trace(model, Args(x=images()))
    assert traced.capture.front_end == "export"
    assert traced.capture.free_batch
    assert traced.train is not traced.eval
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    for gm in (traced.train, traced.eval):
        assert {id(p) for p in gm.parameters()} == {id(p) for p in model.parameters()}
        names = dict(model.named_parameters()) | dict(model.named_buffers())
        own = {name: t for name, t in gm.named_buffers() if not name.startswith("_tensor_constant")}
        assert all(names[name] is tensor for name, tensor in own.items())
    paths = {info(node).path for node in traced.train.graph.nodes}
    assert {"conv", "norm", "mid.0", "mid.1", "drop", "fc"} <= paths
    assert {"mid.1", "mid"} == set(next(info(n).returned_by for n in traced.train.graph.nodes if n.name == "relu_"))


@pytest.mark.parametrize("cuts", [["norm#2", "mid"], ["conv", "drop"], ["conv", "norm", "norm#2", "mid.0", "mid"]])
def test_a_net_of_it_is_the_model_and_its_gradients_those_by_hand(cuts):
    x, y = images(), torch.tensor([0, 1, 2, 3])
    model = Looks()
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, heads="linear")
    assert net.plan.capture.front_end == "export"
    for training in (True, False):
        for count in (4, 2, 7, 1):
            fresh = copy.deepcopy(model).train(training)
            net.model.load_state_dict(model.state_dict())
            torch.manual_seed(3)
            expected = fresh(images(count))
            torch.manual_seed(3)
            assert torch.equal(net.train(training)(images(count)), expected)
            assert all(map(torch.equal, net.model.state_dict().values(), fresh.state_dict().values()))
    net.model.load_state_dict(model.state_dict())
    net.train().backward(x, y)
    assert all(p.grad is not None for p in net.parameters())
    if cuts == ["norm#2", "mid"]:
        seeds = [sedona_fx.train.block_seed(0, block, 0) for block in range(3)]
        m, heads = copy.deepcopy(model).train(), copy.deepcopy(net.heads)
        heads.zero_grad()
        h = m.norm(m.norm(m.conv(x)) + 1)
        losses = [F.cross_entropy(heads["0"](h), y)]
        h = h.detach()
        h = m.mid(h) * m.scale / (1 + h.abs().mean())
        cut = m.mid(m.norm(m.norm(m.conv(x)) + 1).detach())
        losses.append(F.cross_entropy(heads["1"](cut), y))
        a, b = h.detach().chunk(2, 1)
        torch.manual_seed(seeds[2])
        h = m.drop(torch.cat([b.sin(), a * 3.0], 1))
        losses.append(F.cross_entropy(m.fc(h.mean((2, 3))), y))
        sum(losses).backward()
        for name, parameter in m.named_parameters():
            found = net.model.get_parameter(name).grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-7)


def test_counters_stay_in_the_block_of_their_layer():
    net = sedona_fx.decouple(Looks(), (images(), torch.arange(4)), cuts=["conv", "mid"], heads="linear")
    homes = [set(dict(block.module.named_buffers())) & {"norm.num_batches_tracked"} for block in net.blocks]
    assert homes == [set(), {"norm.num_batches_tracked"}, set()]


Pair = namedtuple("Pair", ["logits", "extra"])


@dataclasses.dataclass
class Out:
    logits: Tensor
    extra: Tensor | None = None


class Cache:
    """An object that holds tensors, of a class that nobody has heard of."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: o,
        lambda o: (o, None, {"twice": [2 * o]}),
        lambda o: {"logits": o, "none": None, "flag": 3},
        lambda o: OrderedDict(extra=o.sum(1), logits=o),
        lambda o: Pair(o, o.sum(1)),
        lambda o: Out(o),
    ],
    ids=["tensor", "tuple", "dict", "ordered", "namedtuple", "dataclass"],
)
def test_outputs_of_every_kind(wrap):
    class Wrapped(Looks):
        def forward(self, x):
            return wrap(self.body(x))

    model, x, y = Wrapped(), images(), torch.arange(4)

    def loss(output, target):
        if isinstance(output, Tensor):
            return F.cross_entropy(output, target)
        values = output if isinstance(output, dict) else vars(output) if isinstance(output, Out) else None
        return F.cross_entropy(values["logits"] if values is not None else output[0], target)

    net = sedona_fx.decouple(model, (x, y), cuts=["mid"], heads="linear", loss=loss)
    for actual, expected in in_both_modes(net, model, x):
        assert same_bits(actual, expected)
        assert isinstance(actual, type(expected))
    net.train().backward(x, y)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda o: {"cache": Cache(o), "logits": o}, "cache"),
        (lambda o: {"more": [{"cache": Cache(o)}], "logits": o}, "more.0.cache"),
        (lambda o: Pair(o, Cache(o)), "extra"),
        (lambda o: Out(o, Cache(o)), "extra"),
    ],
    ids=["dict", "deep", "namedtuple", "dataclass"],
)
def test_objects_in_the_output_are_left_out(wrap, where):
    class Wrapped(Looks):
        def forward(self, x):
            return wrap(self.body(x))

    model, x, y = Wrapped(), images(), torch.arange(4)

    def logits(output):
        return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output.logits

    net = sedona_fx.decouple(
        model, (x, y), cuts=["mid"], heads="linear", loss=lambda output, y: F.cross_entropy(logits(output), y)
    )
    assert net.plan.capture.left_out == (f"{where} (Cache)",)
    for actual, expected in in_both_modes(net, model, x):
        assert type(actual) is type(expected)
        assert torch.equal(logits(actual), logits(expected))
        for key in where.split("."):
            actual = actual[int(key)] if key.isdigit() else actual[key] if isinstance(actual, dict) else actual.extra
        assert actual is None
    net.train().backward(x, y)


def test_a_loss_about_an_object_is_told_that_there_is_none():
    class Wrapped(Looks):
        def forward(self, x):
            return Out(self.body(x), Cache(x))

    with pytest.raises(DataError, match=r"no attribute 'keys'.*Of the output, extra \(Cache\) is None"):
        sedona_fx.decouple(
            Wrapped(), (images(), torch.arange(4)), cuts=["mid"], loss=lambda output, y: output.extra.keys.sum()
        )


def test_an_object_that_is_the_whole_output_is_refused():
    class Wrapped(Looks):
        def forward(self, x):
            return Cache(self.body(x))

    with pytest.raises(TraceError, match="returns a Cache, which is no known container of tensors"):
        trace(Wrapped(), Args(x=images()))


def test_nested_and_keyword_inputs():
    class Many(Looks):
        def forward(self, x, *, pair, flags=None, factor=1.0):
            return self.body(x) * factor + pair["first"][0] - (0 if flags is None else flags.float()[:, None])

    model, x = Many(), images()
    inputs = {"x": x, "pair": {"first": (torch.ones(4, 5),)}, "flags": torch.tensor([True] * 4), "factor": 2.0}
    net = sedona_fx.decouple(model, (inputs, torch.arange(4)), cuts=["mid"], heads="linear")
    torch.manual_seed(0)
    expected = model(**inputs)
    torch.manual_seed(0)
    assert torch.equal(net(**inputs), expected)
    net.backward(inputs, torch.arange(4))


class Counting(Looks):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.body(x)


class LayerDrop(Looks):
    def forward(self, x):
        h = self.norm(self.conv(x))
        if not self.training or torch.rand([]) > 0.3:
            h = self.mid(h)
        return self.fc(h.mean((2, 3)))


class PythonDrop(LayerDrop):
    def forward(self, x):
        h = self.norm(self.conv(x))
        if x.shape[2] > 4 and random.random() > 0.3:
            h = self.mid(h)
        return self.fc(h.mean((2, 3)))


class OnNumbers(Looks):
    def forward(self, x):
        return self.body(x) if x.mean() > 0 else self.body(-x)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Counting, r"changes the attribute 'calls'"),
        (LayerDrop, r"draws random numbers.*torch.rand\(\[\]\) > 0.3.*torch.export cannot record it either"),
        (PythonDrop, r"torch.export cannot record it either: its forward draws random numbers"),
        (OnNumbers, r"if x.mean\(\) > 0.*torch.export cannot record it either: GuardOnDataDep.*if x.mean\(\) > 0"),
    ],
)
def test_what_neither_front_end_can_record_is_refused_by_name(kind, what):
    model = kind()
    attributes = set(vars(model))
    with pytest.raises(TraceError, match=what) as caught:
        trace(model, Args(x=images()))
    for way_out in ("leaf_modules", "root=", "torch.where"):
        assert way_out in str(caught.value)
    assert set(vars(model)) == attributes
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_a_module_with_a_mode_of_its_own_cannot_be_switched_afterwards():
    net = sedona_fx.decouple(Looks(), (images(), torch.arange(4)), cuts=["mid"], heads="linear")
    net.model.drop.eval()
    with pytest.raises(sedona_fx.errors.ScheduleError, match="drop computes differently in train and in eval mode"):
        net(images())


def test_sizes_other_than_the_batch_are_free_or_fixed():
    model, data, other = Looks(), (images(), torch.arange(4)), torch.randn(2, 3, 9, 8)
    net = sedona_fx.decouple(model, data, cuts=["mid"], heads="linear")
    assert torch.equal(net.eval()(other), model.eval()(other))
    net = sedona_fx.decouple(model, data, cuts=["mid"], heads="linear", dynamic=False)
    with pytest.raises(
        DataError, match=r"'x' has the shape \(2, 3, 9, 8\).*with \(any, 3, 8, 8\): its dimension 2 has to be 8"
    ):
        net(other)


def test_a_batch_of_one_and_a_batch_like_another_size_stay_free():
    for count in (1, 3, 8):
        model = Looks()
        net = sedona_fx.decouple(model, (images(count), torch.arange(count) % 5), cuts=["mid"], heads="linear")
        assert torch.equal(net.eval()(images(6)), model.eval()(images(6)))


def test_saved_and_loaded(tmp_path):
    net = sedona_fx.decouple(Looks(), (images(), torch.arange(4)), cuts=["norm#2", "mid"], heads="linear")
    net.backward(images(), torch.arange(4))
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Looks())
    assert torch.equal(again.eval()(images()), net.eval()(images()))


class Notes(Looks):
    """Notes at its first call what stays the same from then on."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = x.shape[2]
        return self.body(x)


class Initialises(Notes):
    """Sets a weight from the first batch, and notes that it did."""

    def forward(self, x):
        if self.seen is None:
            with torch.no_grad():
                self.fc.bias.fill_(1.0)
        self.seen = x.shape[2]
        return self.body(x)


def test_what_is_noted_once_is_no_obstacle_unless_weights_change_with_it():
    assert trace(Notes(), Args(x=images())).capture.front_end == "export"
    model = Initialises()
    bias = model.fc.bias.detach().clone()
    with pytest.raises(TraceError, match="changes the attribute 'seen'"):
        trace(model, Args(x=images()))
    assert model.seen is None
    assert torch.equal(model.fc.bias, bias)


class Scratch(Looks):
    """Keeps a value of the forward where another method finds it (RAFT's correlation volumes)."""

    def __init__(self):
        super().__init__()
        self.pyramid = []

    def forward(self, x):
        self.pyramid = [x, 2 * x]
        return self.body(self.pyramid[1])


class Remembers(Scratch):
    """Reads what the forward before it left."""

    def forward(self, x):
        before = self.pyramid
        self.pyramid = [x]
        return self.body(x + len(before))


def test_attributes_that_are_written_before_they_are_read_are_no_obstacle():
    model = Scratch()
    traced = trace(model, Args(x=images()))
    assert traced.capture.front_end == "export"
    assert model.pyramid == []
    with pytest.raises(TraceError, match="changes the attribute 'pyramid'"):
        trace(Remembers(), Args(x=images()))


class Keeps(Looks):
    """Leaves a value of the forward in an attribute that was not there before."""

    def __init__(self, inner="feat"):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        setattr(self.mid, self.inner, 2 * x)
        return self.body(getattr(self.mid, self.inner))


class KeepsAll(Looks):
    def __init__(self):
        super().__init__()
        self.all = []

    def forward(self, x):
        self.all.append(x)
        return self.body(x)


def test_a_value_left_in_a_new_attribute_is_no_obstacle():
    model, x = Keeps(), images()
    net = sedona_fx.decouple(model, (x, torch.arange(4)), cuts=["mid"], heads="linear")
    assert not hasattr(net.model.mid, "feat")
    for actual, expected in in_both_modes(net, model, x):
        assert torch.equal(actual, expected)
    with pytest.raises(TraceError, match=r"changes the attribute 'all.0'"):
        trace(KeepsAll(), Args(x=images()))


class AsksForTheBatch(Looks):
    def __init__(self, asks):
        super().__init__()
        self.asks = asks

    def forward(self, x):
        return self.body(x) * (2 if self.asks(x.shape[0]) else 1)


@pytest.mark.parametrize("asks", [lambda n: n > 100, lambda n: n % 2 == 0, lambda n: n == 4])
def test_a_forward_that_branches_on_the_batch_is_held_to_the_example(asks):
    model, x = AsksForTheBatch(asks), images(4)
    net = sedona_fx.decouple(model, (x, torch.arange(4)), cuts=["mid"], heads="linear")
    assert net.plan.capture.free_batch is False
    assert torch.equal(net.eval()(x), model.eval()(x))
    with pytest.raises(DataError, match=r"torch.export with \(4, 3, 8, 8\)"):
        net(images(6))

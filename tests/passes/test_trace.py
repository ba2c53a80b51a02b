"""What a trace must not get wrong in silence, and what it says when it refuses."""

import copy
import pickle
import random
import sys
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
import torchvision
from torch import fx, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.capture.symbolic import record_symbolically
from sedona_fx.data.args import Args
from sedona_fx.errors import DataError, ScheduleError, TraceError
from sedona_fx.ir.graph import info
from sedona_fx.passes import trace

COUNTER = {"calls": 0}


class Around(nn.Module):
    """A module under test between two layers, so that it has a path of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


class TensorCoin(nn.Module):
    def forward(self, x):
        if torch.rand([]) < 0.5:
            return x * 2
        return x


class PythonCoin(nn.Module):
    def forward(self, x):
        scale = random.uniform(0.0, 1.0)
        return x * scale


class NumpyCoin(nn.Module):
    def forward(self, x):
        scale = float(np.random.rand())
        return x * scale


class Counter(nn.Module):
    def __init__(self, name: str = "n") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, 0)

    def forward(self, x):
        setattr(self, self.name, getattr(self, self.name) + 1)
        return x


class Diary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = {"sizes": []}

    def forward(self, x):
        self.seen["sizes"].append(4)
        return x


class KeptTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(4)

    def forward(self, x):
        self.kept.add_(1)
        return x + self.kept


class ReplacedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buf", torch.zeros(4))

    def forward(self, x):
        self.buf = self.buf + 1
        return x + self.buf


class AddedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("buf", torch.zeros(4))

    def forward(self, x):
        self.buf.add_(1)
        return x + self.buf


class ValueBranch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Loop(nn.Module):
    def forward(self, x):
        total = 0
        for row in x:
            total = total + row
        return total


class KeptActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x.tanh())
        return x


class GlobalState(nn.Module):
    def forward(self, x):
        COUNTER["calls"] += 1
        return x * COUNTER["calls"]


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            y = self.frozen(x)
        return y + x


class NoGradChoice(nn.Module):
    """Nothing that could carry a gradient leaves the region."""

    def forward(self, x):
        with torch.no_grad():
            order = x.argsort(1)
        return x.gather(1, order)


def example(rows: int = 3) -> Args:
    return Args(x=torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("inner", "what", "line"),
    [
        (Counter(), "changes the attribute 'inner.n'", "setattr(self, self.name, getattr(self, self.name) + 1)"),
        (Counter("_n"), "changes the attribute 'inner._n'", "setattr(self, self.name"),
        (Diary(), "changes the attribute 'inner.seen.sizes.0'", 'self.seen["sizes"].append(4)'),
        (KeptActivation(), "changes the attribute 'inner.seen.0'", "self.seen.append(x.tanh())"),
        (ReplacedBuffer(), "replaces the buffer 'inner.buf'", "self.buf = self.buf + 1"),
        (KeptTensor(), "overwrites 'inner.kept'", "self.kept.add_(1)"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_happens_once_while_tracing_is_refused_with_its_line(inner, what, line):
    model = Around(inner)
    before, attributes = copy.deepcopy(model.state_dict()), copy.deepcopy(vars(inner))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    previous = sys.gettrace()
    with pytest.raises(TraceError) as caught:
        trace(model, example())
    text = str(caught.value)
    assert what in text
    assert line in text
    assert __file__ in text
    assert "leaf_modules" in text
    assert sys.gettrace() is previous
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    for name in ("n", "_n", "seen"):
        assert attributes.get(name) == vars(inner).get(name)
    if "kept" in attributes:
        assert torch.equal(inner.kept, torch.zeros(4))


@pytest.mark.parametrize(
    ("model", "line", "more"),
    [
        (ValueBranch(), "if x.sum() > 0:", ["'gt'", "the model itself (gt)", "leaf_modules", "torch.where"]),
        (TensorCoin(), "if torch.rand([]) < 0.5:", ["draws random numbers", "leaf_modules"]),
        (PythonCoin(), "scale = random.uniform(0.0, 1.0)", ["draws random numbers", "leaf_modules"]),
        (NumpyCoin(), "scale = float(np.random.rand())", ["draws random numbers", "leaf_modules"]),
    ],
    ids=["branch", "tensor", "python", "numpy"],
)
def test_what_the_models_own_forward_decides_is_refused_with_file_line_and_value(model, line, more):
    with pytest.raises(TraceError) as caught:
        trace(model, example())
    text = str(caught.value)
    number = 1 + [source.strip() for source in Path(__file__).read_text().splitlines()].index(line)
    assert f"{__file__} line {number}: `{line}`" in text
    for part in more:
        assert part in text


def test_a_loop_over_the_examples_is_left_to_the_second_front_end():
    with pytest.raises(TraceError, match=rf"the forward of inner, {__file__} line \d+: `for row in x:`.*'first'"):
        record_symbolically(Around(Loop()), {"x": example().kwargs["x"]}, frozenset())


def test_a_loop_over_the_examples_holds_for_their_number():
    traced = trace(Around(Loop()), example())
    assert (traced.capture.front_end, traced.capture.free_batch) == ("export", False)


@pytest.mark.parametrize("inner", [TensorCoin(), PythonCoin(), NumpyCoin(), Counter(), Diary(), KeptTensor()])
def test_a_leaf_module_may_do_all_this(inner):
    model = Around(inner)
    states = random.getstate(), np.random.get_state()[1].copy()
    before = copy.deepcopy(vars(inner))
    traced = trace(model, example(), leaf_modules=["inner"])
    assert [n.target for n in traced.train.graph.nodes if n.op == "call_module"] == ["first", "inner", "last"]
    assert states[0] == random.getstate()
    assert np.array_equal(states[1], np.random.get_state()[1])
    for name in ("n", "seen"):
        assert before.get(name) == vars(inner).get(name)


@pytest.mark.parametrize("inner", [ValueBranch(), NoGrad(), ReplacedBuffer()])
def test_a_leaf_module_goes_through_the_whole_line(inner):
    torch.manual_seed(0)
    model = Around(inner)
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    net = sedona_fx.decouple(model, (x, y), cuts=["inner"], leaf_modules=["inner"])
    expected = copy.deepcopy(model)(x)
    assert torch.equal(net(x), expected)
    net.backward(x, y)
    assert all(p.grad is not None for n, p in net.model.named_parameters() if "frozen" not in n)
    assert all(p.grad is None for n, p in net.model.named_parameters() if "frozen" in n)


def test_a_wrong_leaf_module_gives_the_nearest_names():
    with pytest.raises(TraceError, match=r"leaf_modules names 'iner'.*nearest names are 'inner'"):
        trace(Around(nn.ReLU()), example(), leaf_modules=["iner"])


def test_a_module_with_two_names_is_a_leaf_by_either():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Around(nn.ReLU())
            self.b = self.a

        def forward(self, x):
            return self.b(x)

    traced = trace(Twice(), example(), leaf_modules=["b"])
    assert [n.op for n in traced.train.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_buffer_written_in_forward_is_written_by_the_graph():
    model = Around(AddedBuffer())
    traced = trace(model, example())
    assert torch.equal(model.inner.buf, torch.zeros(4))
    x = example().kwargs["x"]
    expected = copy.deepcopy(model)
    for count in (1, 2):
        assert torch.equal(traced.train(x), expected(x))
        assert torch.equal(model.inner.buf, torch.full((4,), float(count)))


def test_buffers_read_in_forward_keep_their_names():
    model = torchvision.models.swin_t(num_classes=3)
    traced = trace(model, Args(torch.randn(2, 3, 32, 32)))
    names = dict(model.named_buffers())
    read = [str(n.target) for n in traced.train.graph.nodes if n.op == "get_attr"]
    assert any(name in names for name in read)
    assert all(name in names or name in dict(model.named_parameters()) for name in read)


def test_state_behind_the_models_back_is_caught_by_comparing_forwards():
    COUNTER["calls"] = 0
    with pytest.raises(TraceError, match=r"does not compute what the model computes \(first in 'inner'\)"):
        trace(Around(GlobalState()), example())


def test_no_grad_is_not_forgotten():
    torch.manual_seed(0)
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    net = sedona_fx.decouple(Around(NoGrad()), (x, y), blocks=1)
    net.backward(x, y)
    assert {name for name, p in net.model.named_parameters() if p.grad is None} == {
        "inner.frozen.weight",
        "inner.frozen.bias",
    }
    sedona_fx.decouple(Around(NoGradChoice()), (x, y), blocks=2, search="uniform")
    with torch.no_grad():  # the caller's own no_grad is not the model's
        net = sedona_fx.decouple(Around(nn.ReLU()), (x, y), blocks=2, search="uniform")
    net.backward(x, y)
    assert all(p.grad is not None for p in net.parameters())


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, mask=None, scale=1.0, *, twice=False, steps=2):
        if mask is not None:
            x = x * mask
        for _ in range(steps):
            x = x + 1
        if twice:
            x = x + x
        return self.layer(x) * scale


@pytest.mark.parametrize(
    ("given", "placeholders"),
    [
        ({}, ["x"]),
        ({"mask": None, "twice": False}, ["x"]),
        ({"mask": torch.ones(3, 4)}, ["x", "mask"]),
        ({"twice": True}, ["x"]),
        ({"steps": 3, "scale": 0.5}, ["x"]),
        ({"mask": torch.zeros(3, 4), "steps": 0, "twice": True}, ["x", "mask"]),
    ],
    ids=["defaults", "defaults-said", "tensor", "flag", "numbers", "all"],
)
def test_arguments_without_tensors_are_part_of_the_graph(given, placeholders):
    model = Options()
    args = Args(**example().kwargs, **given)
    traced = trace(model, args)
    assert [n.target for n in traced.train.graph.nodes if n.op == "placeholder"] == placeholders
    assert not any(n.target is torch._assert for n in traced.train.graph.nodes)
    tensors = [args.kwargs[name] for name in placeholders]
    assert torch.equal(traced.train(*tensors), model(**args.kwargs))


def test_the_net_holds_on_to_arguments_without_tensors():
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    model = Options()
    net = sedona_fx.decouple(model, (Args(x, twice=True, scale=0.5), y), blocks=1)
    assert torch.equal(net(x, None, 0.5, twice=True), model(x, None, 0.5, twice=True))
    assert torch.equal(net(x, twice=True, scale=0.5, steps=2), model(x, twice=True, scale=0.5))
    with pytest.raises(DataError, match=r"'twice' is missing"):
        net(x, scale=0.5)
    with pytest.raises(DataError, match=r"'scale' is 0.25, the net was traced with 0.5"):
        net(x, twice=True, scale=0.25)
    with pytest.raises(DataError, match="traced without the argument 'steps'"):
        net(x, twice=True, scale=0.5, steps=3)


def test_arguments_without_tensors_survive_save_and_load(tmp_path):
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    net = sedona_fx.decouple(Options(), (Args(x, twice=True, scale=0.5), y), blocks=1)
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Options())
    assert torch.equal(again(x, twice=True, scale=0.5), net(x, twice=True, scale=0.5))


def test_keyword_inputs_of_any_name():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, **extra):
            return self.layer(x) + extra["bias"]

    model = Keywords()
    inputs = {"bias": torch.randn(3), "x": torch.randn(2, 4)}
    net = sedona_fx.decouple(model, (inputs, torch.tensor([0, 1])), blocks=1)
    assert torch.equal(net(**inputs), model(**inputs))


def test_inputs_without_names_are_refused():
    class Star(nn.Module):
        def forward(self, *xs):
            return xs[0]

    with pytest.raises(DataError, match=r"takes '\*xs' without a name"):
        trace(Star(), Args(torch.randn(2)))


def test_a_forward_of_the_instance_is_the_one_traced():
    model = Around(nn.Identity())
    model.forward = MethodType(lambda self, x: self.last(x), model)
    traced = trace(model, example())
    assert [n.target for n in traced.train.graph.nodes if n.op == "call_module"] == ["last"]


def test_nothing_of_the_model_changes():
    model = torchvision.models.googlenet(num_classes=3, init_weights=False)
    model.inception3a.eval()
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    trace(model, Args(torch.randn(2, 3, 64, 64, generator=torch.Generator())))
    assert torch.equal(random_state, torch.get_rng_state())
    assert vars(model).keys() == vars(before).keys()
    for (name, module), other in zip(model.named_modules(), before.modules(), strict=True):
        assert module.training == other.training, name
    for (name, value), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert "training" not in vars(nn.Module)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) * torch.arange(4.0)


def test_a_constant_made_in_forward_does_not_make_two_graphs():
    model = Constant()
    traced = trace(model, example())
    assert traced.train is traced.eval
    assert not any("_tensor_constant" in name for name in vars(model))
    assert torch.equal(traced.train(example().kwargs["x"]), model(example().kwargs["x"]))


class Modes(nn.Module):
    """An add that stands in the train graph only, ahead of one that stands in both; and functional dropout below."""

    def __init__(self):
        super().__init__()
        self.inner = Dropping()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.frozen = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.frozen(self.a(x))
        if self.training:
            x = x + 0.25
        x = x + 1.0
        return self.b(self.inner(x))


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


def test_graphs_that_differ_between_modes_match_by_site():
    traced = trace(Modes(), example())
    assert traced.train is not traced.eval
    sites = [{info(n).site: n for n in gm.graph.nodes} for gm in (traced.train, traced.eval)]
    assert sites[0].keys() - sites[1].keys() in ({":add"}, {":add#2"})
    assert not sites[1].keys() - sites[0].keys()
    (common,) = {":add", ":add#2"} & sites[1].keys()
    assert sites[1][common].args[1] == 1.0
    assert sites[0][common].args[1] == 1.0
    assert traced.mode_paths == {"": (True, False), "inner": (True, False)}


def test_a_net_refuses_a_mode_that_its_graphs_do_not_have():
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    net = sedona_fx.decouple(Modes(), (x, y), blocks=2, search="uniform")
    net.model.frozen.eval()  # PyTorch's own modules may have modes of their own
    net.losses(x, y)
    net.model.inner.eval()
    for call in (lambda: net(x), lambda: net.losses(x, y), lambda: net.backward(x, y)):
        with pytest.raises(ScheduleError, match=r"inner computes differently .* is in eval mode .* in train mode"):
            call()
    net.eval()
    net(x)
    net.model.inner.train()
    with pytest.raises(ScheduleError, match=r"inner .* is in train mode while the net is in eval mode"):
        net(x)


def test_modules_that_keep_their_mode_whatever_train_says():
    class Stubborn(Dropping):
        def train(self, mode=True):
            return super().train(False)

    model = Modes()
    model.inner = Stubborn()
    model.train()
    x, y = example(4).kwargs["x"], torch.tensor([0, 1, 2, 0])
    net = sedona_fx.decouple(model, (x, y), blocks=2, search="uniform")
    assert torch.equal(net(x), model(x))
    net.model.inner.training = True
    with pytest.raises(ScheduleError, match="inner"):
        net(x)


def test_frozen_batch_norm_inside_a_training_branch_is_free():
    model = torchvision.models.googlenet(num_classes=3, init_weights=False)
    traced = trace(model, Args(torch.randn(2, 3, 64, 64)))
    assert traced.mode_paths == {"": (True, False)}


def test_a_model_that_cannot_run_its_data_is_a_data_error():
    with pytest.raises(DataError, match=r"cannot run the first batch Args\(x=\(2, 5\).*mat1 and mat2"):
        trace(Around(nn.ReLU()), Args(x=torch.randn(2, 5)))


@pytest.mark.parametrize("kind", ["setitem", "iadd", "alias", "count"])
def test_in_place_operators_are_recorded_as_such(kind):
    class InPlace(nn.Module):
        def forward(self, x):
            x = x * 1
            if kind == "setitem":
                x[:, 0] = 5.0
                return x
            if kind == "iadd":
                x += 1
                x *= 3
                x -= 2
                x /= 2
                return x
            if kind == "alias":
                y = x
                x += 1
                return y * x
            count = x.shape[0]
            more = count
            more += 1
            return x * count + more

    traced = trace(InPlace(), example())
    x = example().kwargs["x"]
    assert torch.equal(traced.train(x), InPlace()(x))
    targets = [n.target for n in traced.train.graph.nodes]
    for again in (
        copy.deepcopy(traced.train),
        pickle.loads(pickle.dumps(traced.train)),
        fx.symbolic_trace(traced.train),
    ):
        assert [n.target for n in again.graph.nodes] == targets
        assert torch.equal(again(x), InPlace()(x))


def test_dead_code_goes_and_dead_modules_stay():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x):
            x.sum().exp()
            self.norm(x)  # its running statistics live on
            return self.layer(x)

    model = Dead()
    traced = trace(model, example())
    assert [n.target for n in traced.train.graph.nodes][1:-1] == ["norm", "layer"]


def test_iterating_by_unpacking_is_no_obstacle_and_blames_nobody_later():
    class Unpack(nn.Module):
        def forward(self, x):
            a, b = x.chunk(2)
            return float("nan") if int(a.shape[1]) else a + b

    with pytest.raises(TraceError) as caught:
        trace(Unpack(), example(4))
    assert "asks for the value" not in str(caught.value)


def add_in_place(target, value):
    target[:, 1:] += value[:, 1:]


torch.fx.wrap("add_in_place")


class CallsForEffect(nn.Module):
    """Calls a function that stays whole for what it writes alone (torchvision's MViT does)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        add_in_place(h, x)
        return self.b(h.tanh())


def test_a_function_kept_whole_that_only_writes_is_no_dead_code():
    traced = trace(CallsForEffect(), example())
    assert traced.capture.front_end == "symbolic"
    assert any(node.target is add_in_place for node in traced.train.graph.nodes)

"""What is replaced in a net after it was made: taken over, with the values of plain PyTorch, or refused by name."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from zoo import same_bits

import sedona_fx
from sedona_fx.errors import ScheduleError
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 3


class Config:
    def __init__(self):
        self.power, self.unused, self.inner = 1.0, 3, {"shift": 0.5}


class Drop(nn.Module):
    """Stochastic depth, the number in an attribute."""

    def __init__(self, p=0.0):
        super().__init__()
        self.drop_prob = p

    def forward(self, x):
        return F.dropout(x, self.drop_prob, self.training) if self.drop_prob else x


class Many(nn.Module):
    """Reads numbers from attributes, lists, dictionaries and objects; tensors by name; modules inside of modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6))
        self.drop, self.rest = Drop(), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0))
        self.fc, self.extra = nn.Linear(6, 3), nn.Linear(6, 6, bias=False)
        self.gate = nn.Parameter(torch.ones(6))
        self.register_buffer("shift", torch.zeros(6))
        self.mask = torch.ones(6, dtype=torch.float64)
        self.scale, self.act, self.note = 1.0, torch.tanh, "unread"
        self.scales, self.table, self.config = [1.0, 1.0], {"x": 1.0}, Config()

    def forward(self, x):
        h = self.act(self.a(x)) * self.gate + self.shift
        h = self.b(h * self.scale) * self.scales[0] * self.table["x"] * self.config.power
        h = self.rest(self.drop(h) * self.mask + self.config.inner["shift"])
        return self.fc(torch.sin(F.linear(h, self.extra.weight)))


class Exported(Many):
    """The same, captured by torch.export."""

    def forward(self, x):
        if x.shape[1] != 6:
            raise ValueError
        return super().forward(x)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def make(kind):
    torch.manual_seed(0)
    net = sedona_fx.decouple(kind().double(), (X, Y), cuts=["a", "b"], heads="linear")
    assert net.capture.front_end == ("export" if kind is Exported else "symbolic")
    return net


MADE = {kind: make(kind) for kind in (Many, Exported)}


@pytest.fixture(params=list(MADE), ids=["symbolic", "exported"])
def net(request):
    return copy.deepcopy(MADE[request.param])


@pytest.fixture
def symbolic():
    return copy.deepcopy(MADE[Many])


@pytest.fixture
def exported():
    return copy.deepcopy(MADE[Exported])


def gradients(net):
    """Return the gradients of one step of the net by name."""
    net.zero_grad()
    net.backward(X, Y)
    return {name: p.grad for name, p in net.named_parameters()}


def check(net):
    """The net computes what its model computes now, in both modes, and trains all of it: Backprop as plain PyTorch."""
    for training in (False, True):
        net.train(training)
        twin = copy.deepcopy(net.model)
        torch.manual_seed(3)
        expected = twin(X)
        torch.manual_seed(3)
        assert same_bits(net(X), expected)
    assert same_bits(net.inference_module()(X), copy.deepcopy(net.model).eval()(X))
    net.train()
    twin = copy.deepcopy(net.model)
    optimizer = sgd(p for p in twin.parameters() if p.requires_grad)
    schedule = Backprop(net, sgd)
    F.cross_entropy(twin(X), Y).backward()
    optimizer.step()
    schedule.step(X, Y)
    theirs = dict(twin.named_parameters())
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-12, atol=1e-12, msg=name)
    before = {name: p.clone() for name, p in net.named_parameters()}
    expected = gradients(net)
    Greedy(net, sgd).step(X, Y)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] - 0.1 * expected[name], rtol=1e-12, atol=1e-12, msg=name)
        assert expected[name].norm() > 0, name


def refused(net, match, everywhere=False):
    """The net is not used; everywhere: in none of the ways, and still not when it is tried again."""
    ways = (lambda: net(X), lambda: net.backward(X, Y), net.inference_module, lambda: Greedy(net, sgd))
    for call in ways * 2 if everywhere else ways[:1]:
        with pytest.raises(ScheduleError, match=match):
            call()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def changed_state(net):
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.1 * torch.rand(value.shape, generator=generator).double()
        if value.is_floating_point()
        else value
        for name, value in net.state_dict().items()
    }


def test_assigned_state_dicts(net):
    net.load_state_dict(changed_state(net), assign=True)
    check(net)


def test_assigned_state_dicts_of_the_model_and_of_the_heads(net):
    state = changed_state(net)
    for part in ("model", "heads"):
        own = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
        net.get_submodule(part).load_state_dict(own, assign=True)
    check(net)


@pytest.mark.parametrize("name", ["gate", "a.weight", "b.0.weight", "b.2.bias", "extra.weight", "fc.bias"])
def test_single_parameters(net, name):
    path, _, leaf = name.rpartition(".")
    module = net.model.get_submodule(path)
    setattr(module, leaf, nn.Parameter(torch.full_like(getattr(module, leaf), 0.3)))
    check(net)


@pytest.mark.parametrize("name", ["shift", "b.2.running_var"])
def test_single_buffers(net, name):
    path, _, leaf = name.rpartition(".")
    setattr(net.model.get_submodule(path), leaf, torch.full((6,), 2.0).double())
    check(net)


def test_tensors_that_are_plain_attributes(net):
    net.model.mask = torch.arange(6).double()
    check(net)
    net.model.mask.fill_(0.5)
    check(net)


def test_parameters_of_another_dtype_are_proven(net):
    net.model.mask = net.model.mask.float()
    net.model.float()  # not net.float(): the plain attribute stays, as it does in the model
    x = X.float()
    assert same_bits(net.eval()(x), copy.deepcopy(net.model)(x))
    with pytest.raises(ScheduleError, match=r"the heads cannot run .*since .* was replaced"):
        net.backward(x, Y)
    net.float()
    assert net.backward(x, Y).output.dtype is torch.float32


def test_variants_follow(net):
    schedules = [Backprop(net, sgd), Delayed(net, sgd), BackLink(net, sgd, reach=1), Greedy(net, sgd)]
    net.load_state_dict(changed_state(net), assign=True)
    for schedule in schedules:
        with pytest.raises(ScheduleError, match=rf"make a new {type(schedule).__name__}"):
            schedule.step(X, Y)
    for kind, how in ((Backprop, {}), (Delayed, {"weights": "current"}), (BackLink, {"reach": 1})):
        twin = copy.deepcopy(net)
        before = {name: p.clone() for name, p in twin.model.named_parameters()}
        schedule = kind(twin, sgd, **how)
        for _ in range(4):
            schedule.step(X, Y)
        assert [name for name, p in twin.model.named_parameters() if torch.equal(p, before[name])] == []


def test_a_schedule_of_a_net_that_was_not_changed_goes_on(net):
    schedule = Greedy(net, sgd)
    net.model.fc.bias.data = net.model.fc.bias.data + 1
    net.model.note = "other"
    schedule.step(X, Y)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_leaf_modules_are_called_from_then_on(symbolic):
    symbolic.model.b[0] = nn.Linear(6, 6).double()
    symbolic.model.b[1] = nn.Sigmoid()
    symbolic.model.fc = nn.Linear(6, 3).double()
    check(symbolic)


def test_containers_of_the_same_form_are_taken_over(symbolic):
    symbolic.model.b = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Sigmoid(), nn.LayerNorm(6)).double()
    check(symbolic)


class Adapter(nn.Module):
    """LoRA: the layer, frozen, and a product of low rank that is zero at first."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).double())
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2).double())

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def test_adapters_in_leaf_modules(symbolic):
    symbolic.model.b[0], symbolic.model.fc = Adapter(symbolic.model.b[0]), Adapter(symbolic.model.fc)
    symbolic.backward(X, Y)
    assert symbolic.model.fc.up.grad.norm() > 0
    assert symbolic.model.b[0].up.grad.norm() > 0
    twin, heads = copy.deepcopy((symbolic.model, symbolic.heads))
    h = torch.tanh(twin.a(X)) * twin.gate + twin.shift
    twin.zero_grad()
    F.cross_entropy(heads["1"](twin.b(h.detach())), Y).backward()
    torch.testing.assert_close(symbolic.model.b[0].up.grad, twin.b[0].up.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["fc", "b.0", "rest.0"])
def test_adapters_in_exported_nets_are_refused(exported, path):
    """The output is the same at first, as the adapter is zero: it is the parameters that tell."""
    exported.model.set_submodule(path, Adapter(exported.model.get_submodule(path)))
    refused(exported, rf"'{path}' was replaced.*decouple the model again")


@pytest.mark.parametrize("path", ["fc", "b.0", "b.1", "rest"])
def test_modules_in_exported_nets(exported, path):
    new = {"fc": nn.Linear(6, 3), "b.0": nn.Linear(6, 6), "b.1": nn.Tanh()}
    new["rest"] = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0))
    exported.model.set_submodule(path, new[path].double())
    check(exported)  # of the same form: only tensors are new


def test_other_modules_in_exported_nets_are_refused(exported):
    exported.model.b[1] = nn.ReLU()
    refused(
        exported,
        r"'b.1' was replaced.*does not compute what the model computes.*decouple the model again",
        everywhere=True,
    )


def test_another_class_of_a_module_is_refused_where_its_forward_is_another_one(exported):
    layer, kind = exported.model.b[1], nn.Tanh
    layer.__class__ = type("Same", (kind,), {})
    check(exported)
    layer.__class__ = type("Triple", (kind,), {"forward": lambda self, x: 3 * kind.forward(self, x)})
    refused(exported, r"'b.1' was replaced since the model was decoupled.*does not compute what the model computes")


def test_other_programs_are_refused(net):
    net.model.b.append(nn.ReLU())
    refused(net, r"'b.3' is new.*decouple the model again", everywhere=True)
    del net.model.b[3]
    check(net)


def test_a_zero_adapter_appended_to_a_container_is_refused(net):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(6, 6).double())

        def forward(self, x):
            return x + x @ self.up

    net.model.b.append(Residual())
    refused(net, r"'b.3' is new.*the parameter 'b.3.up'")


def test_a_layer_that_is_gone_is_refused(net):
    del net.model.b[2]
    refused(net, r"'b.2' is gone.*decouple the model again")


def test_unused_modules_do_not_matter(net):
    net.model.teacher = nn.Linear(6, 3).double()
    for training in (True, False):
        assert same_bits(net.train(training)(X), copy.deepcopy(net.model)(X))
    net.backward(X, Y)


def test_another_model_is_refused(net):
    net.model = copy.deepcopy(net.model)
    refused(net, r"'model' was replaced.*decouple the model again", everywhere=True)


def test_more_classes(symbolic):
    symbolic.model.fc = nn.Linear(6, 5).double()
    assert same_bits(symbolic.eval()(X), symbolic.model(X))
    symbolic.train()
    Backprop(symbolic, sgd).step(X, Y)  # asks no head
    for call in (lambda: symbolic.backward(X, Y), lambda: Greedy(symbolic, sgd).step(X, Y)):
        with pytest.raises(ScheduleError, match=r"the head of block 0 gives \(2, 3\) where the model gives \(2, 5\)"):
            call()
    for index in ("0", "1"):
        symbolic.heads[index] = nn.Linear(6, 5).double()
    check(symbolic)


def test_more_classes_in_exported_nets(exported):
    exported.model.fc = nn.Linear(6, 5).double()
    assert same_bits(exported.eval()(X), exported.model(X))
    with pytest.raises(ScheduleError, match=r"the head of block 0 gives"):
        exported.train().backward(X, Y)


def test_heads_can_be_replaced(net):
    net.heads["1"] = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    check(net)
    assert all(p.grad is not None for name, p in net.heads.named_parameters() if gradients(net))
    net.heads["0"] = nn.Linear(6, 4).double()
    with pytest.raises(ScheduleError, match=r"the head of block 0 gives \(2, 4\) where the model gives \(2, 3\)"):
        net.backward(X, Y)
    del net.heads["0"]
    with pytest.raises(ScheduleError, match=r"'heads.0' is gone"):
        net(X)


# ---- parametrizations ------------------------------------------------------------------------------------------------

PARAMETRIZE = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.parametrize("how", list(PARAMETRIZE))
def test_parametrizations_in_leaf_modules(symbolic, how):
    torch.manual_seed(1)
    PARAMETRIZE[how](symbolic.model.fc)
    for training in (False, True):
        symbolic.train(training)
        twin = symbolic.model if how == "prune" else copy.deepcopy(symbolic.model)  # prune keeps a tensor with a graph
        expected = twin(X)
        assert same_bits(symbolic(X), expected)
    symbolic.backward(X, Y)
    assert all(p.grad is not None for p in symbolic.model.fc.parameters())


@pytest.mark.parametrize("how", list(PARAMETRIZE))
def test_parametrizations_in_exported_nets_are_refused(exported, how):
    PARAMETRIZE[how](exported.model.fc)
    refused(exported, r"reads the tensor 'fc.weight'.*decouple the model again")


@pytest.mark.parametrize("how", list(PARAMETRIZE))
def test_parametrizations_of_tensors_read_by_name_are_refused(net, how):
    PARAMETRIZE[how](net.model.extra)
    refused(net, r"reads the tensor 'extra.weight'")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("scale", lambda m: setattr(m, "scale", 0)),
        ("act", lambda m: setattr(m, "act", torch.sigmoid)),
        ("drop.drop_prob", lambda m: setattr(m.drop, "drop_prob", 0.5)),
        ("scales.0", lambda m: operator.setitem(m.scales, 0, 2.0)),
        ("scales", lambda m: setattr(m, "scales", [2.0, 1.0])),
        ("table.x", lambda m: m.table.update(x=3.0)),
        ("config.power", lambda m: setattr(m.config, "power", 3.0)),
        ("config.inner.shift", lambda m: m.config.inner.update(shift=1.5)),
        ("b.forward", lambda m: setattr(m.b, "forward", lambda x: x)),
        ("forward", lambda m: setattr(m, "forward", lambda x: x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attributes_that_the_forward_reads_are_refused(net, path, change):
    change(net.model)
    refused(net, rf"'{path}' was .* when the model was decoupled.*decouple the model again", everywhere=path == "scale")


@pytest.mark.parametrize("path", ["rest.1.p", "b.2.eps", "b.2.momentum"])
def test_numbers_of_pytorchs_layers(path):
    """Live in modules that the graph calls whole; frozen in exported graphs, and refused there."""
    owner, _, name = path.rpartition(".")
    for kind, net in copy.deepcopy(MADE).items():
        setattr(net.model.get_submodule(owner), name, 0.25)
        if kind is Exported:
            refused(net, rf"'{path}' was .* and is 0.25 now")
        else:
            for training in (True, False):
                net.train(training)
                twin = copy.deepcopy(net.model)
                torch.manual_seed(3)
                expected = twin(X)
                torch.manual_seed(3)
                assert same_bits(net(X), expected)
                assert same_bits(list(net.model.buffers()), list(twin.buffers()))


def test_numbers_set_back_and_numbers_of_no_effect(net):
    model, before = net.model, net(X)
    model.scale = 2.0
    with pytest.raises(ScheduleError, match=r"'scale' was 1\.0"):
        net(X)
    model.scale = 1.0
    model.note, model.config.unused, model.added = "something else", 7, 8
    model.scales, model.table, model.config = list(model.scales), dict(model.table), copy.deepcopy(model.config)
    model.drop.drop_prob = 0 * 1.0
    assert net(X).shape == before.shape
    model.scales[0] = 5.0  # the new list is watched as the old one was
    with pytest.raises(ScheduleError, match=r"'scales.0'"):
        net(X)


def test_modes_and_compiled_modules_are_no_changes(net):
    version = net.check()
    net.eval().train()
    assert net.check() == version
    net.model.b.compile(backend="eager")
    net(X)
    torch._dynamo.reset()


def test_moves_are_no_changes(net):
    net.float()
    version = net.check()
    net.double()
    assert net.check() == version + 1
    check(net)


def test_copies_are_watched_on_their_own(net):
    twin = copy.deepcopy(net)
    twin.model.scale = 3.0
    net(X)
    with pytest.raises(ScheduleError, match="'scale'"):
        twin(X)


def test_hooks_on_code_of_the_graph(net):
    handle = net.model.b.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="'b' after the model was decoupled. It is not called"):
        net(X)
    net(X)  # told once
    handle.remove()
    net(X)
    net.model.b.register_forward_hook(lambda module, inputs, output: output * 2)
    refused(net, r"'b' is new.*does not compute what the model computes")


class Host(nn.Module):
    """Its own forward cannot be traced; its backbone can."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc, self.scale = Many(), nn.Linear(3, 3), 1.0

    def forward(self, x):
        if x.sum().item() > 1e9:
            return x
        return self.fc(self.backbone(x)) * self.scale


def test_hosts_run_as_they_are():
    torch.manual_seed(0)
    net = sedona_fx.decouple(Host().double(), (X, Y), cuts=["backbone.a"], heads="linear", root="backbone")
    assert net.capture.hosted
    net.model.scale = 3.0
    for training in (True, False):
        assert same_bits(net.train(training)(X), copy.deepcopy(net.model)(X))
    assert same_bits(net.backward(X, Y).output, net.model(X))
    net.model.load_state_dict(
        {k: v + 1 if v.is_floating_point() else v for k, v in net.model.state_dict().items()}, assign=True
    )
    assert same_bits(net.backward(X, Y).output, net.model(X))
    assert net.model.fc.weight.grad is not None
    net.model.backbone.scale = 2.0
    with pytest.raises(ScheduleError, match=r"'backbone\.scale' was 1\.0"):
        net.backward(X, Y)


def test_examples_keep_their_dtypes_in_a_model_of_several():
    """The model's first parameter is not in the dtype of the inputs."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 8).double(), nn.Linear(8, 3).double()

        def forward(self, x):
            return self.last(self.late(self.first(x).float().tanh()).double())

    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    net = sedona_fx.decouple(Mixed(), (x, y), cuts=["first"], heads="linear")
    net.model.first = nn.Linear(4, 8).double()
    assert torch.equal(net(x), net.model(x))
    net.float()
    net.model.first = nn.Linear(4, 8)
    with pytest.raises(ScheduleError, match="'first' was replaced"):  # float32 reaches the last layer as float64
        net(x.float())

"""Layers and tensors called as attributes of every ``fx.GraphModule``: any name works, and nothing is renamed."""

import copy
import pickle
from collections import OrderedDict

import onnxruntime
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.ir.program import OWN, Program

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
NAMES = ["graph", "code", "meta", "to_folder", "print_readable", "recompile", "delete_submodule", "_graph", "_code"]
FRONT_ENDS = pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])


class Layered(nn.Module):
    """The layer in the middle is called `name`."""

    def __init__(self, name, captured):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.captured = name, captured
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
        self.double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        return self.c(getattr(self, self.name)(self.a(x).tanh()).tanh())

    def losses_by_hand(self, heads):
        """Return the local losses of blocks that end behind `a` and behind the layer."""
        h = self.a(X)
        losses = [F.cross_entropy(heads["0"](h), Y)]
        h = getattr(self, self.name)(h.detach().tanh())
        losses.append(F.cross_entropy(heads["1"](h), Y))
        return [*losses, F.cross_entropy(self.c(h.detach().tanh()), Y)]


class Tensors(Layered):
    """A parameter, a buffer and a plain tensor at the top have such names."""

    def __init__(self, captured):
        super().__init__("b", captured)
        self.graph = nn.Parameter(torch.randn(8).double())
        self.register_buffer("code", torch.rand(8).double())
        self.register_buffer("_graph", torch.rand(8).double(), persistent=False)
        self.meta = torch.rand(8).double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        h = self.a(x).tanh() * self.graph + self.code * self._graph
        return self.c(self.b(h * self.meta).tanh())


def net_of(model, **options):
    return sedona_fx.decouple(model, (X, Y), cuts=["a", model.name], heads="linear", **options)


def assert_same(module, model, x=X):
    assert torch.equal(module.eval()(x), model.eval()(x))


@FRONT_ENDS
@pytest.mark.parametrize("name", NAMES)
def test_blocks_have_the_gradients_of_blocks_made_by_hand(name, captured):
    model = Layered(name, captured)
    net = net_of(model)
    assert net.plan.capture.front_end == ("export" if captured else "symbolic")
    assert net.plan.cuts == ("a", f"{name}.1" if captured else name)
    assert name in str(net)
    assert_same(net, model)
    twin, heads = copy.deepcopy(model).train(), copy.deepcopy(net.heads).train()
    found, wanted = net.train().backward(X, Y).losses, twin.losses_by_hand(heads)
    torch.testing.assert_close(found, [loss.detach() for loss in wanted], rtol=1e-12, atol=0)
    for loss in wanted:
        loss.backward()
    for path, parameter in twin.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(path).grad, parameter.grad, rtol=1e-12, atol=1e-15)
    for path, buffer in twin.named_buffers():
        torch.testing.assert_close(net.model.get_buffer(path), buffer, rtol=1e-12, atol=0)


@FRONT_ENDS
@pytest.mark.parametrize("name", NAMES)
def test_no_name_changes_outside(name, captured, tmp_path):
    model = Layered(name, captured)
    net = net_of(model)
    assert list(net.original_state_dict()) == list(model.state_dict())
    Layered(name, captured).load_state_dict(net.original_state_dict(), strict=True)
    assert f"{name}.0.weight" in dict(net.blocks[1].module.named_parameters())
    assert isinstance(getattr(net.model, name), nn.Sequential)
    assert isinstance(net.graph_module.graph, fx.Graph)
    assert isinstance(net.graph_module.code, str)
    net.save(tmp_path)
    loaded = sedona_fx.load(tmp_path, Layered(name, captured))
    assert loaded.plan.cuts == net.plan.cuts
    assert_same(loaded, model)
    with pytest.raises(CutError, match=f"{name}.7"):
        sedona_fx.decouple(model, (X, Y), cuts=[f"{name}.7"], heads="linear")


@FRONT_ENDS
@pytest.mark.parametrize("name", ["graph", "meta", "recompile"])
def test_everything_that_is_made_of_a_net(name, captured, tmp_path):
    model = Layered(name, captured)
    net = net_of(model)
    step = sedona_fx.train.Delayed(net, lambda p: torch.optim.SGD(p, lr=0.1)).step
    for _ in range(4):
        step(X, Y)
    model.load_state_dict(net.original_state_dict())
    twin = copy.deepcopy(net)
    for module in (net, twin, net.inference_module(), copy.deepcopy(net.inference_module())):
        assert_same(module, model)
    with torch.no_grad():
        expected = model.eval()(X)
        assert torch.equal(net.early_exit(1.0)(X).output, expected)
        head = net.heads["1"].eval()(getattr(model, name)(model.a(X).tanh()))
        both = head.log_softmax(1) + expected.log_softmax(1)
        torch.testing.assert_close(net.ensemble(2)(X), both, rtol=1e-12, atol=0)
    assert_same(pickle.loads(pickle.dumps(net.inference_module())), model)
    path = net.float().to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected.float(), rtol=1e-4, atol=1e-5)
    getattr(net.model, name)[0] = nn.Linear(8, 8)  # a layer replaced afterwards is called
    if not captured:
        assert_same(net, net.model, X.float())
    assert twin.to("meta")(X.to("meta")).device.type == "meta"


@FRONT_ENDS
def test_tensors_of_such_names(captured, tmp_path):
    model = Tensors(captured)
    net = net_of(model)
    assert net.plan.capture.front_end == ("export" if captured else "symbolic")
    assert_same(net, model)
    assert set(net.original_state_dict()) == set(model.state_dict())
    net.train().backward(X, Y)
    F.cross_entropy(model.train()(X), Y).backward()
    assert net.model.graph.grad.abs().min() > 0
    assert_same(net, model)
    for change in (lambda m: m.graph.data.mul_(2), lambda m: m.code.add_(1), lambda m: setattr(m, "meta", 3 * m.meta)):
        change(net.model), change(model)
        assert_same(net, model)
    assert_same(copy.deepcopy(net), model)
    net.save(tmp_path)
    fresh = Tensors(captured)
    fresh.meta, fresh._graph = model.meta, model._graph
    assert_same(sedona_fx.load(tmp_path, fresh), model)
    net.float()
    assert net(X.float()).dtype == torch.float32


@pytest.mark.parametrize("search", ["sedona", "guided", "rollout", "balanced"])
def test_searches(search):
    torch.manual_seed(0)
    layers = {name: nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for name in ("a", "graph", "code", "meta")}
    model = nn.Sequential(OrderedDict(layers | {"fc": nn.Linear(8, 3)}))
    data = [(torch.randn(8, 8), torch.randint(3, (8,))) for _ in range(4)]
    if search == "sedona":
        search = sedona_fx.search.Sedona(warmup_steps=4, meta_steps=3, snapshots=2, unroll=2)
    net = sedona_fx.decouple(model, data, blocks=3, search=search, heads=["linear"], progress=False)
    assert set(net.plan.cuts) < {"a.1", "graph.1", "code.1", "meta.1"} or set(net.plan.cuts) < set(layers)
    assert_same(net, model, data[0][0])


class Host(nn.Module):
    """Python code that cannot be traced around a part with such a layer."""

    def __init__(self):
        super().__init__()
        self.graph = Layered("code", captured=False)
        self.meta = nn.Linear(4, 4).double()

    def forward(self, x):
        scale = 2.0 if float(x.detach().sum()) > 1e9 else 1.0
        return self.graph(self.meta(x)) * scale


def test_below_root():
    model = Host()
    net = sedona_fx.decouple(model, (X, Y), cuts=["graph.code"], root="graph", heads="linear")
    assert net.plan.capture.hosted
    assert_same(net, model)
    assert "graph.code.0.weight" in dict(net.blocks[0].module.named_parameters())
    head, h = copy.deepcopy(net.heads["0"]).train(), model.train().graph
    loss = F.cross_entropy(head(h.code(h.a(model.meta(X)).tanh())), Y)
    loss.backward()
    net.train().backward(X, Y)
    torch.testing.assert_close(net.model.meta.weight.grad, model.meta.weight.grad, rtol=1e-12, atol=1e-15)


def test_a_program_has_all_names_of_fx_for_its_layers():
    for name in OWN:
        root = nn.Module()
        root._modules[name] = nn.Linear(2, 2)
        graph = fx.Graph()
        graph.output(graph.call_module(name, (graph.placeholder("x"),)))
        program = Program(root, graph)
        assert program.get_submodule(name) is root._modules[name]
        assert list(program.state_dict()) == [f"{name}.weight", f"{name}.bias"]
        assert program.graph is graph
        program.recompile()
        assert copy.deepcopy(program).get_submodule(name).weight.equal(root._modules[name].weight)


class Steps(nn.Module):
    """Sequence first, with as many steps as examples: which dimension is which shows at a second size of the batch."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.a, self.c = name, nn.Linear(4, 8), nn.Linear(8, 3)
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        h = self.a(x).transpose(0, 1).tanh()
        return self.c(getattr(self, self.name)(h).tanh().mean(0))


@pytest.mark.parametrize("name", ["graph", "code"])
def test_where_the_batch_is_in_doubt(name):
    x = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(2))
    nets = [sedona_fx.decouple(Steps(called), (x, Y), blocks=2, search="balanced") for called in (name, "plain")]
    assert len(nets[0].plan.cuts) == 1
    assert [cut.replace("plain", name) for cut in nets[1].plan.cuts] == list(nets[0].plan.cuts)
    assert torch.equal(nets[0](x), nets[0].model(x))

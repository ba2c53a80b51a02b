"""Regions of a forward on the devices of blocks, of which ``meta`` stands for another one; and in all made of a net."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx import passes
from sedona_fx.ir.graph import cut_points, info
from sedona_fx.ir.region import Cast, Region, region_of

X = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
FRONT_ENDS = pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])


class Net(nn.Module):
    """A region in each of three blocks; `exported` makes symbolic tracing fail."""

    def __init__(self, exported):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.exported = nn.Tanh(), exported

    def first(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
        return h.float()

    def second(self, h):
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.tanh().float())
            with torch.no_grad():
                scale = h.abs().mean()
        return self.act(h / (1 + scale))

    def third(self, h):
        with torch.autocast("cuda", dtype=torch.float16), torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.fc(self.c(h).tanh())
        return h.float()

    def forward(self, x):
        if self.exported and x.shape[1] != 6:
            raise ValueError("six features")
        return self.third(self.second(self.first(x)))


def net_of(exported, **options):
    options = {"heads": "linear", **options}
    return sedona_fx.decouple(Net(exported), (X, Y), cuts=["a", "act"], **options)


def regions(graph):
    """Return site -> region of the nodes that a model's own code made."""
    calls = [node for node in graph.nodes if node.op.startswith("call") and not info(node).boundary]
    return {info(node).site: region_of(node) for node in calls}


def types(gm):
    return {cast.device_type for node in gm.graph.nodes if region_of(node) for cast in region_of(node).casts}


pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


@FRONT_ENDS
def test_blocks_have_the_regions_of_their_devices(exported):
    net = net_of(exported, devices=["cpu", "meta", "cpu"])
    assert [types(block.module) for block in net.blocks] == [{"cpu"}, {"meta"}, {"cpu", "cuda"}]
    assert [types(block.eval_module) for block in net.blocks] == [{"cpu"}, {"meta"}, {"cpu", "cuda"}]
    assert "autocast" not in net.blocks[1].module.code  # there is none for that device
    assert "torch.no_grad()" in net.blocks[1].module.code
    for gm in (net.graph_module, net._plain[True], net._plain[False]):
        assert types(gm) == {"cpu", "meta", "cuda"}
        of_block = {info(node).block: region_of(node) for node in gm.graph.nodes if region_of(node)}
        assert {cast.device_type for cast in of_block[1].casts} == {"meta"}
    h = X.clone()
    with torch.autocast("cpu", dtype=torch.float16):
        (h,), _ = net.blocks[0].module(h)
    weight, bias = net.model.a.weight.bfloat16(), net.model.a.bias.bfloat16()
    assert torch.equal(h.float(), F.linear(X.bfloat16(), weight, bias).float())


@FRONT_ENDS
def test_a_net_that_is_moved_and_comes_back(exported):
    net, model = net_of(exported), Net(exported)
    before = {id(gm): regions(gm.graph) for gm in net._all_graphs()}
    twin = copy.deepcopy(net)
    kept = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    net.variants.headless()
    net.to("meta")
    assert all(types(gm) <= {"meta", "cuda"} for gm in net._all_graphs())
    assert net(X.to("meta")).device.type == "meta"
    assert net.losses(X.to("meta"), Y.to("meta"))[0].device.type == "meta"
    assert all(types(gm) <= {"cpu", "cuda"} for gm in twin._all_graphs())  # a copy stays where it is
    assert torch.equal(twin(X), model(X))
    net.to_empty(device="cpu")
    net.load_state_dict(kept)
    assert all(regions(gm.graph) == before[id(gm)] for gm in net._all_graphs() if id(gm) in before)
    assert torch.equal(net(X), model(X))


@FRONT_ENDS
def test_link_blocks_have_the_regions_of_their_devices(exported):
    """BackLink's parts are made later, of graphs that are still where the model was traced."""
    net = net_of(exported, devices=["cpu", "meta", "meta"])
    sedona_fx.train.BackLink(net, lambda p: torch.optim.SGD(p, lr=0.1), reach=1)
    parts = net.variants.segments(1)[True]
    assert [types(part.module) for part in parts[0]] == [types(part.module) & {"cpu"} for part in parts[0]]
    assert {kind for part in parts[1] for kind in types(part.module)} == {"meta"}
    assert {kind for part in parts[2] for kind in types(part.module)} <= {"meta", "cuda"}


def test_a_region_that_speaks_of_both_types_stays():
    both = Region(casts=(Cast("cpu", False), Cast("cuda", True, torch.float16)))
    assert both.moved("cpu", "cuda") == both
    assert both.moved("cpu", "cpu") == both
    assert both.moved("cpu", "xpu") == Region(casts=(Cast("xpu", False), Cast("cuda", True, torch.float16)))
    assert Region(False).moved("cpu", "cuda") == Region(False)


@FRONT_ENDS
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
def test_what_is_made_of_a_net_computes_in_the_regions(exported, low):
    net, model = net_of(exported), Net(exported).eval()

    def autocast():
        return torch.autocast("cpu", dtype=low, enabled=low is not None)

    with autocast(), torch.no_grad():
        expected = model(X)
        assert torch.equal(net.eval()(X), expected)
        assert torch.equal(net.early_exit(1.0)(X).output, expected)
        for module in (net.inference_module(), copy.deepcopy(net.inference_module())):
            assert torch.equal(module(X), expected)
        assert torch.equal(pickle.loads(pickle.dumps(net.inference_module()))(X), expected)
        assert torch.equal(net.ensemble(1)(X), expected.log_softmax(1))
        h = model.second(model.first(X))
        both = net.heads["1"](h).log_softmax(1) + expected.log_softmax(1)
        torch.testing.assert_close(net.ensemble(2)(X), both, rtol=0, atol=0)
    assert torch.is_grad_enabled()


@FRONT_ENDS
def test_every_graph_of_a_net_has_the_regions_that_were_recorded(exported):
    net = net_of(exported)
    wanted = regions(net.variants.analysed[True].graph)
    assert len(set(wanted.values())) == 5
    net.variants.headless(), net.variants.with_layers(), net.variants.segments(1, shown=True)
    graphs = [*net._all_graphs(), net.graph_module, net.inference_module(), net.ensemble(2)]
    graphs += [*net.early_exit(0.5).blocks]
    for gm in graphs:
        for site, region in regions(gm.graph).items():
            assert region == wanted.get(site), (site, gm.code)


@FRONT_ENDS
def test_every_pass_of_a_search_keeps_the_regions(exported):
    analysed = net_of(exported).variants.analysed[True]
    wanted = regions(analysed.graph)
    cuts = [str(info(node).cut) for node in cut_points(analysed.graph)]
    relaxed = passes.relax(analysed, {cut: [nn.Linear(8, 3)] for cut in cuts})
    pruned = passes.prune(relaxed, {cuts[0]: 0})
    lowered = passes.lower(pruned)
    blocks = [block.module for gm in (relaxed, lowered) for block in passes.partition(gm)]
    assert len(blocks) == len(cuts) + 1 + 2
    for gm in (relaxed, pruned, lowered, passes.strip(lowered), passes.strip(lowered, keep_moves=True), *blocks):
        found = regions(gm.graph)
        assert all(region == wanted[site] for site, region in found.items() if site in wanted)
        assert all(region is None for site, region in found.items() if site not in wanted)
    found = [site for gm in blocks[len(cuts) + 1 :] for site in regions(gm.graph)]
    assert set(wanted) <= set(found)

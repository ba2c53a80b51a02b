"""Frozen parameters: no head and no cut for what does not train, and unfreezing is noticed."""

import itertools

import pytest
import torch
from graphs import assert_blocks_right
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError, ScheduleError
from sedona_fx.search import Balanced
from sedona_fx.search.problem.stretch_tables import run_bytes, run_flops_without_graph
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

WIDTH, DEPTH = 8, 8


def chain(*frozen, norms=False):
    """Return layers 0 to 7 of a linear map and a tanh, and a classifier, "last", some of them frozen."""
    torch.manual_seed(0)
    norm = (lambda: nn.LayerNorm(WIDTH)) if norms else nn.Identity
    layers = {str(k): nn.Sequential(nn.Linear(WIDTH, WIDTH), norm(), nn.Tanh()) for k in range(DEPTH)}
    model = nn.Sequential()
    for name, layer in [*layers.items(), ("last", nn.Linear(WIDTH, 3))]:
        model.add_module(name, layer)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


def batch(rows=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, WIDTH, generator=generator), torch.arange(rows) % 3


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def decouple(model, blocks, search="uniform", **how):
    return sedona_fx.decouple(model, batch(), blocks=blocks, search=search, heads="linear", progress=False, **how)


@pytest.mark.parametrize(
    ("frozen", "ends"),
    [
        ("", "0123456"),
        ("012", "3456"),  # a beginning: with the first layer that trains
        ("34", "012567"[:3] + "56"),  # a middle: with the next one
        ("67", "012345"),  # an end, and the classifier trains behind it
        (["6", "7", "last"], "01234"),  # an end: what trains last stays in the last block
        (["last"], "0123456"),
        ("01234567", ""),
        ("0246", "135"),
    ],
)
def test_base_layers_have_something_to_train(frozen, ends):
    model = chain(*frozen)
    net = decouple(model, 1)
    assert net.plan.base_layers == tuple(ends)
    for blocks in sorted({2, len(ends) + 1} - {1} if ends else {}):
        for search in ("uniform", "balanced", "latest", Balanced(by="activation_bytes")):
            net = decouple(model, blocks, search)
            assert all(any(p.requires_grad for p in b.base_parameters()) for b in net.blocks)
            assert_blocks_right_frozen(model, list(net.plan.cuts), frozen)
    with pytest.raises(CutError, match=r"parameters are frozen \(requires_grad=False\)" if frozen else "legal cut"):
        decouple(model, 30)


def assert_blocks_right_frozen(model, cuts, frozen):
    """Check the gradients of a cut net against detached blocks by hand, frozen layers without any."""
    torch.manual_seed(0)
    x, y = batch()
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, heads="linear", inplace=False)
    net.backward(x, y)
    h, at = x, 0
    twin = chain(*frozen)
    twin.load_state_dict(model.state_dict())
    for name, layer in twin.named_children():
        h = layer(h)
        if name in cuts:
            F.cross_entropy(net.blocks[at].head(h), y).backward()
            h, at = h.detach(), at + 1
    F.cross_entropy(h, y).backward()
    for name, parameter in twin.named_parameters():
        found = net.model.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            torch.testing.assert_close(found, parameter.grad)


def test_what_nobody_reads_trains_nothing():
    class Dead(nn.Module):
        """A weight that is used in front of an overwrite, by nothing that is returned."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.bias = nn.Parameter(torch.zeros(WIDTH))
            self.last, self.probe = nn.Linear(WIDTH, 3).requires_grad_(False), nn.Identity()
            self.probe.register_forward_hook(lambda module, inputs, output: None)

        def forward(self, x):
            h = self.b(self.a(x).tanh()).tanh()
            self.probe(h + self.bias)
            h[:, 0] = 0.5
            return self.last(h)

    net = sedona_fx.decouple(Dead(), batch(), blocks=2, search="uniform", heads="linear")
    assert net.plan.cuts == (":tanh",)
    with pytest.raises(CutError, match="3 blocks need 2 cuts"):
        sedona_fx.decouple(Dead(), batch(), blocks=3, search="uniform", heads="linear")


def test_small_parameters_train_too():
    """Of frozen weights only the norms train (LayerNorm tuning): every layer has something to train."""
    model = chain(norms=True)
    for layer in itertools.islice(model, DEPTH):
        layer[0].requires_grad_(False)
    assert decouple(model, 3).plan.base_layers == tuple("0123456")
    model[2][1].requires_grad_(False)
    assert decouple(model, 3).plan.base_layers == tuple("013456")


def test_no_cut_is_legal_in_a_frozen_beginning_but_the_users_own():
    net = decouple(chain(*"0123"), 4)  # more would need cuts behind parts of layers
    assert net.plan.base_layers == tuple("456")
    with pytest.raises(CutError, match=r"enough for 5 blocks .*8 of its 18 parameters are frozen"):
        decouple(chain(*"0123"), 6)
    own = sedona_fx.decouple(chain(*"0123"), batch(), cuts=["1", "5"], heads="linear")  # a probe on frozen features
    assert own.plan.cuts == ("1", "5")
    own.backward(*batch())
    assert all(p.grad is not None for p in own.blocks[0].head.parameters())
    assert_blocks_right(chain(), *batch(), cuts=["1", "5"])


def test_a_frozen_beginning_runs_without_a_graph():
    """Bytes that are kept for backward, by PyTorch's own hooks, are what the report says."""
    for frozen, cuts in (("012", ["4"]), ("34", ["2", "5"]), ("34", ["5"]), ("0167", ["3"])):
        model = chain(*frozen)
        net = sedona_fx.decouple(model, batch(), cuts=cuts, heads=False)
        values = {"input": batch()[0]}
        for block, cost in zip(net.blocks, net.costs, strict=True):
            kept, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

            def pack(tensor, kept=kept, own=own):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = (storage.nbytes(), tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                exports, _ = block(values, True)
            assert sum(size for size, _ in kept.values()) == cost.activation_bytes, (frozen, cuts, block.index)
            values |= {name: value.detach() for name, value in exports.items()}


FLOPS = 2 * 6 * WIDTH * WIDTH  # of a layer, forward; the classifier and a head have 3/8 of it


def thirds(cuts, frozen):
    """Return a third of the FLOPs of a step of every block; frozen layers that it begins with run forward only."""
    found, units, begun = [], 0, False
    for k in range(DEPTH):
        begun = begun or str(k) not in frozen
        units += FLOPS if begun else FLOPS / 3
        if k in cuts:
            found.append(units + FLOPS * 3 / 8)
            units, begun = 0, False
    return [*found, units + FLOPS * 3 / 8]


@pytest.mark.parametrize("frozen", ["01", "0123", "34", "0356", "67"])
def test_balance_counts_what_runs_without_a_graph_once(frozen):
    for blocks in (2, 3):
        model = chain(*frozen)
        net = decouple(model, blocks, "balanced")
        ends = [int(name) for name in net.plan.base_layers]
        largest = {cuts: max(thirds(cuts, frozen)) for cuts in itertools.combinations(ends, blocks - 1)}
        assert largest[tuple(int(cut) for cut in net.plan.cuts)] == pytest.approx(min(largest.values()))
        assert net.plan.provenance["largest_block"] == int(min(largest.values()) + 1e-6)
        by_bytes = decouple(model, blocks, Balanced(by="activation_bytes"))
        kept = {
            cuts: max(c.activation_bytes for c in decouple_at(model, cuts).costs)
            for cuts in itertools.combinations(by_bytes.plan.base_layers, blocks - 1)
        }
        assert kept[by_bytes.plan.cuts] == min(kept.values()) == by_bytes.plan.provenance["largest_block"]
    assert decouple(chain("0", "1"), 2, "balanced").plan.cuts == ("4",)  # 2 + 9 units; all trained, it is behind "3"
    assert decouple(chain(), 2, "balanced").plan.cuts == ("3",)


def decouple_at(model, cuts):
    return sedona_fx.decouple(model, batch(), cuts=list(cuts), heads="linear", progress=False)


def test_a_budget_of_bytes_and_of_seconds():
    model = chain(*"0134")
    least = decouple(model, 3, Balanced(by="activation_bytes")).plan.provenance["largest_block"]
    net = decouple(model, 3, "latest", budget={"activation_bytes": least})
    assert max(cost.activation_bytes for cost in net.costs) == least
    timed = decouple(model, 3, "uniform", budget={"block_seconds": 100.0})
    assert len(timed.plan.block_seconds["stretches"]) == len(timed.plan.base_layers) + 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_tables_of_runs_with_frozen_parts(data):
    n = data.draw(st.integers(1, 6))
    saved = [data.draw(st.dictionaries(st.integers(0, 4), st.just(8), max_size=3)) for _ in range(n)]
    nodes = st.integers(0, n - 1).flatmap(lambda s: st.tuples(st.just(s), st.integers(-1, s - 1), st.integers(0, 4)))
    frozen = data.draw(st.lists(nodes, max_size=8))
    in_bytes = run_bytes(saved, [(s, reach, storage, 8) for s, reach, storage in frozen])
    in_flops = run_flops_without_graph(n, [(s, reach, 5) for s, reach, _ in frozen])
    for a in range(n):
        for b in range(a, n):
            inside = [(reach, storage) for s, reach, storage in frozen if a <= s <= b]
            kept = {storage for stretch in saved[a : b + 1] for storage in stretch}
            assert in_bytes.item(a, b) == 8 * len(kept | {storage for reach, storage in inside if a <= reach})
            assert in_flops.item(a, b) == 5 * sum(reach < a for reach, _ in inside)


KINDS = {
    "greedy": Greedy,
    "backprop": Backprop,
    "backlink": BackLink,
    "stashed": lambda net, optimizer: Delayed(net, optimizer, weights="stashed"),
    "replay": lambda net, optimizer: Replay(net, optimizer, capacity=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unfreezing_is_noticed(kind):
    net = decouple(chain("0", "1", "5"), 3)
    schedule = KINDS[kind](net, sgd)
    for _ in range(4):
        schedule.step(*batch())
    net.model.get_submodule("5").requires_grad_(True)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    with pytest.raises(
        ScheduleError, match=r"'model.5.0.weight' was frozen when this \w+ was made .*\(2 parameters do\)"
    ):
        schedule.step(*batch())
    assert all(torch.equal(before[name], p) for name, p in net.model.named_parameters())
    renewed = KINDS[kind](net, sgd)
    for _ in range(4):
        renewed.step(*batch())
    moved = {name for name, p in net.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name, _ in net.model.named_parameters() if name[0] not in "01"}


def test_unfreezing_is_right_by_itself_in_a_loop_of_ones_own():
    model, cuts = chain("0", "1", "5"), ["2", "5"]
    net = sedona_fx.decouple(model, batch(), cuts=cuts, heads="linear")
    for part in (net.model, model):
        part.requires_grad_(True)
    assert_blocks_right_frozen(model, cuts, "")
    x, y = batch()
    net.backward(x, y)
    assert all(p.grad is not None for p in net.model.parameters())


def test_freezing_later_is_right_by_itself():
    net = decouple(chain(), 3)
    schedule = Greedy(net, sgd)
    schedule.step(*batch())
    net.model.get_submodule("0").requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    schedule.step(*batch())
    moved = {name for name, p in net.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if name[0] != "0"}

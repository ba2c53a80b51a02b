"""One block's graph in other forms: without its head, and showing the values behind its base layers."""

import chain
import pytest
import torch
from torch.nn import functional as F

from sedona_fx.ir.graph import HEADS, is_head
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes import partition
from sedona_fx.passes.block_variants import show_layers, without_head

ALL = ("a", "act", "b", ":mul", "act#2", "c", "act#3", ":mul#2")


@pytest.fixture
def blocks():
    return partition(chain.lowered(chain.graphs().train))


def run(graphs, x):
    """Run blocks one after the other; return all values by name, and the local outputs."""
    values, locals_ = {"x": x}, []
    for graph in graphs:
        exports, local = graph.module(*[values[name] for name in graph.inputs])
        values.update(zip(graph.exports, exports, strict=True))
        locals_.append(local)
    return values, locals_


def by_hand():
    """Return the values of the chain at every cut, in the order of the program, each from before it is overwritten."""
    model, (x, _) = chain.model(), chain.batch()
    a = model.a(x)
    act = F.relu(a)
    b = model.b(act)
    mul = b * model.scale
    act2 = F.relu(mul)
    c = model.c(act2)
    act3 = F.relu(c)
    return dict(zip(ALL, (a, act, b, mul, act2, c, act3, act3 * (x.sum(1, keepdim=True) > -1.0)), strict=True))


# ---- without heads --------------------------------------------------------------------------------------------------


def test_without_heads_only_exports_are_computed(blocks):
    x, _ = chain.batch()
    values, locals_ = run(blocks, x)
    bare = [without_head(block) for block in blocks]
    found, left = run(bare, x)
    assert left[:-1] == [None, None]
    assert torch.equal(left[-1], locals_[-1])
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    for block, one in zip(blocks[:-1], bare, strict=False):
        verify(one.module, Phase.BLOCK)
        assert not any(is_head(node) for node in one.module.graph.nodes)
        assert not any(name.startswith(HEADS) for name, _ in one.module.named_parameters())
        assert (one.inputs, one.exports, one.live_exports) == (block.inputs, block.exports, block.live_exports)
        assert one.boundary is None


def test_modules_are_shared_and_the_block_is_left_alone(blocks):
    before = [str(block.module.graph) for block in blocks]
    for block in blocks:
        known = {id(p) for p in block.module.parameters()}
        for made in (without_head(block), show_layers(block, ALL)[0]):
            assert {id(p) for p in made.module.parameters()} <= known
    assert [str(block.module.graph) for block in blocks] == before
    assert blocks[0].boundary == "a"


def test_the_last_block_has_no_head_to_lose(blocks):
    assert without_head(blocks[-1]) is blocks[-1]
    again = without_head(blocks[0])
    assert without_head(again) is again


def test_exports_without_heads_are_not_detached(blocks):
    x, y = chain.batch()
    _, locals_ = run([without_head(block) for block in blocks], x)
    F.cross_entropy(locals_[-1], y).backward()
    plain = chain.model()
    F.cross_entropy(plain(x), y).backward()
    assert torch.equal(blocks[0].module.get_submodule("a").weight.grad, plain.a.weight.grad)


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (("act", "b"), [[], ["act", "b"], []]),
        (ALL, [["a"], ["act", "b", ":mul", "act#2", "c"], ["act#3", ":mul#2"]]),
        ((":mul",), [[], [":mul"], []]),
        ((), [[], [], []]),
    ],
)
def test_values_behind_layers_are_shown_from_before_they_are_overwritten(blocks, layers, wanted):
    x, _ = chain.batch()
    plain, locals_ = run(blocks, x)
    made = [show_layers(block, layers) for block in blocks]
    values, found = run([graph for graph, _ in made], x)
    assert all(torch.equal(a, b) for a, b in zip(found, locals_, strict=True))
    assert all(torch.equal(values[name], plain[name]) for name in plain)
    expected = by_hand()
    for (graph, names), block, cuts in zip(made, blocks, wanted, strict=True):
        assert graph.exports == (*block.exports, *names)
        assert (graph.boundary, graph.live_exports) == (block.boundary, block.live_exports)
        assert [name.partition("@")[0] for name in names] == cuts
        for name, cut in zip(names, cuts, strict=True):
            assert torch.equal(values[name], expected[cut]), cut


def test_gradients_flow_through_what_is_shown(blocks):
    x, _ = chain.batch()
    graph, names = show_layers(blocks[0], ["a"])
    values, _ = run([graph], x)
    values[names[0]].square().sum().backward()
    model = chain.model()
    model.a(x).square().sum().backward()
    torch.testing.assert_close(blocks[0].module.get_submodule("a").weight.grad, model.a.weight.grad, rtol=1e-12, atol=0)

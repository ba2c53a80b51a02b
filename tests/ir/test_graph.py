"""The dialect: what each phase forbids, by graphs broken by hand; and which block runs a node."""

import copy

import chain
import pytest
import torch
from torch import fx, nn

from sedona_fx.errors import GraphSpecError
from sedona_fx.ir.flow import ancestors, block_of, dependency_graph
from sedona_fx.ir.graph import HEADS, SPLIT_POINTS, NodeInfo, TensorSpec, copy_graph, describe, info, split_point_nodes
from sedona_fx.ir.spec import Phase, verify
from sedona_fx.passes import partition, prune


@pytest.fixture(scope="module")
def phases():
    gm = chain.graphs().train
    relaxed = chain.relaxed(gm)
    pruned = prune(relaxed, {"a": 0, "c": 1})
    lowered = chain.lowered(gm)
    return {
        Phase.TRACED: gm,
        Phase.ANALYSED: gm,
        Phase.RELAXED: relaxed,
        Phase.PRUNED: pruned,
        Phase.LOWERED: lowered,
        Phase.BLOCK: partition(lowered)[0].module,
    }


def node(gm, name):
    return next(n for n in gm.graph.nodes if n.name == name)


def two_outputs(gm):
    gm.graph.create_node("output", "output", (node(gm, "d"),))


def late_placeholder(gm):
    with gm.graph.inserting_before(node(gm, "d")):
        info(gm.graph.placeholder("late")).site = "late"


def missing_module(gm):
    node(gm, "b").target = "nowhere"


def no_record(gm):
    del node(gm, "b").meta["sedona"]


def same_site(gm):
    info(node(gm, "b")).site = "a"


def reserved(gm):
    gm.add_submodule(f"{HEADS}.0", nn.Identity())
    node(gm, "d").target = f"{HEADS}.0"


def cut_without_parameters(gm):
    info(node(gm, "x")).cut = "x"


def cut_in_training_branch(gm):
    info(node(gm, "b")).training_only = True


def same_cut(gm):
    info(node(gm, "b")).cut = "a"


def base_layer_nowhere(gm):
    info(node(gm, "x")).base_layer = True


def cut_of_two(gm):
    info(node(gm, "a")).value = (TensorSpec((2, 2), torch.float32, torch.device("cpu")),)


def read_around(gm):
    node(gm, "act").args = (node(gm, "a"),)


def split_reads_no_cut(gm):
    info(node(gm, "a")).cut = None


def split_of_two(gm):
    split = split_point_nodes(gm.graph)[0]
    split.args = (*split.args, node(gm, "x"))


def two_heads(gm):
    gm.get_submodule(str(split_point_nodes(gm.graph)[0].target)).mixture.heads.append(nn.Linear(5, 3))


def no_block(gm):
    info(node(gm, "b")).block = None


def later_block(gm):
    info(node(gm, "scale")).block = 2


def undetached(gm):
    info(node(gm, "c")).block = 2


def gate_in_block(gm):
    gm.add_submodule(f"{SPLIT_POINTS}.0", nn.Identity())
    node(gm, "a").target = f"{SPLIT_POINTS}.0"


def bare_output(gm):
    gm.graph.output_node().args = (node(gm, "a"),)


@pytest.mark.parametrize(
    ("phase", "spoil", "message"),
    [
        (Phase.TRACED, two_outputs, "one output, at the end"),
        (Phase.TRACED, late_placeholder, r"at node 'late' .*placeholders come first"),
        (Phase.TRACED, missing_module, r"nowhere"),
        (Phase.TRACED, no_record, r"at node 'b' .*a site of its own"),
        (Phase.TRACED, same_site, r"at node 'b' .*a site of its own"),
        (Phase.TRACED, reserved, r"at node 'd' .*reserved"),
        (Phase.ANALYSED, cut_without_parameters, r"at node 'x' .*one float tensor with parameters"),
        (Phase.ANALYSED, cut_in_training_branch, r"at node 'b' \(b\): a cut point lies on the way to the primary"),
        (Phase.ANALYSED, same_cut, r"at node 'b' .*a name of its own"),
        (Phase.ANALYSED, base_layer_nowhere, r"at node 'x' .*a base layer ends at a cut point"),
        (Phase.ANALYSED, cut_of_two, r"at node 'a' .*one float tensor"),
        (Phase.RELAXED, read_around, r"at node 'act' .*nothing reads around a split point"),
        (Phase.RELAXED, split_reads_no_cut, r"at node 'sedona_split_points_0' .*reads a cut point first"),
        (Phase.RELAXED, split_of_two, r"at node 'sedona_split_points_0' .*lets through carries gradients"),
        (Phase.PRUNED, read_around, r"at node 'act' .*nothing reads around"),
        (Phase.PRUNED, two_heads, r"at node 'sedona_split_points_0' .*has one head, or none"),
        (Phase.LOWERED, no_block, r"at node 'b' .*every node belongs to a block"),
        (Phase.LOWERED, later_block, r"at node 'mul' .*no node reads a later block"),
        (Phase.LOWERED, undetached, r"at node 'c' \(c\): reads 'act_1' of block 1 undetached"),
        (Phase.BLOCK, gate_in_block, r"at node 'a' .*no gate"),
        (Phase.BLOCK, bare_output, r"the output is \(exports, local output\)"),
    ],
    ids=lambda v: v.__name__ if callable(v) else str(v) if isinstance(v, Phase) else "",
)
def test_broken_graphs_are_rejected_with_the_node(phases, phase, spoil, message):
    gm = chain.copied(phases[phase])
    verify(gm, phase)
    spoil(gm)
    with pytest.raises(GraphSpecError, match=rf"^{phase} graph.*{message}(.|\n)*This is a bug in a pass of sedona_fx"):
        verify(gm, phase)


@pytest.mark.parametrize("phase", Phase)
def test_graphs_may_be_copied_whole(phases, phase):
    gm = copy.deepcopy(phases[phase])
    assert [info(n) for n in gm.graph.nodes] == [info(n) for n in phases[phase].graph.nodes]
    x, _ = chain.batch()
    first, second = gm(x), phases[phase](x)
    if phase in (Phase.TRACED, Phase.ANALYSED):
        assert torch.equal(first, second)


def test_copies_of_records_are_their_own(phases):
    copied, env = copy_graph(phases[Phase.ANALYSED].graph)
    original = node(phases[Phase.ANALYSED], "a")
    info(env[original]).block = 7
    assert info(original).block is None
    assert len(copied.nodes) == len(phases[Phase.ANALYSED].graph.nodes)


def test_specs_and_descriptions():
    spec = TensorSpec((2, 3, 0), torch.float64, torch.device("cpu"))
    assert spec.bytes == 0
    assert TensorSpec((2, 3), torch.bfloat16, torch.device("cpu")).bytes == 12
    live = NodeInfo(depends=True, value=(1, [TensorSpec((2,), torch.complex64, torch.device("cpu"))]))
    assert live.is_live
    assert not live.is_tensor
    assert not NodeInfo(depends=True, value=TensorSpec((2,), torch.int64, torch.device("cpu"))).is_live
    gm = chain.graphs().train
    assert describe(node(gm, "a")) == "a"
    assert describe(node(gm, "gt")) == "the model itself (gt)"


def build(lines):
    """Build a graph from ``name: inputs [w storage] [live]``; every node holds the storages it is told."""
    graph, nodes = fx.Graph(), {}
    for name, inputs, facts in lines:
        if inputs is None:
            nodes[name] = graph.placeholder(name)
        else:
            nodes[name] = graph.call_function(torch.add, tuple(nodes[i] for i in inputs), name=name)
        nodes[name].meta["sedona"] = NodeInfo(site=name, **facts)
    graph.output(nodes[lines[-1][0]])
    return graph, nodes


LIVE = {"depends": True, "from_input": True, "value": TensorSpec((1,), torch.float32, torch.device("cpu"))}
MASK = {**LIVE, "value": TensorSpec((1,), torch.bool, torch.device("cpu"))}


def holds(*storages, writes=(), **facts):
    return {**LIVE, "storages": frozenset(storages), "mutates": frozenset(writes), **facts}


def test_values_sink_to_the_block_that_reads_them():
    graph, n = build([("x", None, {}), ("a", "x", LIVE), ("s", "x", LIVE), ("b", "a", LIVE), ("o", "bs", LIVE)])
    blocks = block_of(graph, [n["a"], n["b"]])
    assert [blocks[n[k]] for k in "asbo"] == [0, 2, 1, 2]


def test_masks_do_not_sink():
    graph, n = build([("x", None, {}), ("a", "x", LIVE), ("m", "a", MASK), ("b", "a", LIVE), ("o", "bm", LIVE)])
    assert block_of(graph, [n["a"], n["b"]])[n["m"]] == 0


def test_writes_come_along_with_who_reads_after_them():
    graph, n = build(
        [
            ("x", None, {}),
            ("a", "x", holds(1)),
            ("v", "x", holds(2)),
            ("w", "av", holds(3, writes=[1])),
            ("b", "a", holds(4)),
            ("o", "b", holds(5)),
        ]
    )
    needs = dependency_graph(graph)
    assert list(needs.pred[n["b"]]) == [n["w"], n["a"]]  # the latest first
    assert n["v"] in ancestors(n["o"], needs)
    blocks = block_of(graph, [n["b"]])
    assert [blocks[n[k]] for k in "avwbo"] == [0, 0, 0, 0, 1]


def test_readers_before_a_write_do_not_sink_behind_it():
    graph, n = build(
        [
            ("x", None, {}),
            ("a", "x", holds(1)),
            ("r", "a", holds(2)),
            ("w", "a", holds(1, writes=[1])),
            ("b", "w", holds(3)),
            ("o", "br", holds(4)),
        ]
    )
    assert block_of(graph, [n["b"]])[n["r"]] == 0
    info(n["r"]).training_only = True  # lower keeps a copy for such a one
    assert block_of(graph, [n["b"]])[n["r"]] == 1


def test_writes_that_nobody_reads_wait_for_earlier_readers():
    graph, n = build(
        [
            ("x", None, {}),
            ("s", "x", holds(9, depends=False)),
            ("a", "xs", holds(1)),
            ("b", "as", holds(2)),
            ("w", "s", holds(9, writes=[9], depends=False)),
            ("o", "b", holds(3)),
        ]
    )
    blocks = block_of(graph, [n["a"], n["b"]])
    assert [blocks[n[k]] for k in "sabwo"] == [0, 0, 1, 1, 2]

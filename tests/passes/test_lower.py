"""LOWERED: every node has its block, every crossing is explicit."""

import chain
import torch
from graphs import analysed
from torch import nn

from sedona_fx.ir.graph import HEADS, head_nodes, info
from sedona_fx.passes import lower, partition, prune, relax


def test_blocks_boundaries_and_heads():
    gm = chain.lowered(chain.graphs().train)
    blocks = {str(n.target): info(n).block for n in gm.graph.nodes if n.op == "call_module"}
    assert blocks == {"a": 0, f"{HEADS}.0": 0, "act": 2, "b": 1, "c": 1, f"{HEADS}.1": 1, "d": 2}
    assert [info(n).block for n in gm.graph.nodes if n.op not in ("placeholder", "output")] == sorted(
        info(n).block for n in gm.graph.nodes if n.op not in ("placeholder", "output")
    )
    detached = [n for n in gm.graph.nodes if n.target is torch.detach]
    assert [str(n.all_input_nodes[0]) for n in detached] == ["a", "c"]
    assert [str(n.all_input_nodes[0]) for n in head_nodes(gm.graph)] == ["a", "c"]
    clones = [n for n in gm.graph.nodes if n.target is torch.clone]
    assert [info(n).block for n in clones] == [1, 2]  # the activation behind each cut works in place


def test_isolation():
    gm = chain.lowered(chain.graphs().train)
    x, y = chain.batch()
    losses = chain.cross_entropies(gm(x), y)
    groups = {0: ["a", f"{HEADS}.0"], 1: ["b", "c", f"{HEADS}.1"], 2: ["d"]}
    for k, loss in enumerate(losses):
        for block, paths in groups.items():
            for path in paths:
                parameters = list(gm.get_submodule(path).parameters())
                found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                assert all((g is None) == (block != k) for g in found), (k, path)


def test_devices_move_every_tensor_that_crosses():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.a(x)
            keep, rows = h > 0, h.shape[0]
            return self.b(h.sin() * keep).reshape(rows, 3)

    gm = analysed(Masked(), torch.randn(2, 4)).train
    gm = lower(prune(relax(gm, {"a": [nn.Linear(4, 3)]}), {"a": 0}), [torch.device("cpu"), torch.device("meta")])
    moves = [n for n in gm.graph.nodes if n.target == "to"]
    assert sorted(str(n.all_input_nodes[0]) for n in moves) == ["detach", "gt", "x"]
    assert [(info(n).block, n.args[1].type) for n in moves] == [(0, "cpu"), (1, "meta"), (1, "meta")]
    for block, device in zip(partition(gm), ("cpu", "meta"), strict=True):
        block.module.to(device)
    assert gm(torch.randn(2, 4))[-1].device.type == "meta"


def test_its_input_is_left_alone():
    gm = prune(chain.relaxed(chain.graphs().train), {"b": 1})
    before = chain.text(gm)
    lower(gm)
    assert chain.text(gm) == before


def test_training_only_branches_read_old_numbers_in_the_last_block():
    class Auxiliary(chain.Chain):
        def forward(self, x):
            h = self.a(x)
            extra = self.d(torch.cat([h, h[:, :2]], 1)) if self.training else None
            h = self.act(h)
            return self.d(self.act(self.c(self.act(self.b(h))))), extra

    torch.manual_seed(0)
    model = Auxiliary().double()
    x, _ = chain.batch()
    expected, extra = model(x)
    graphs = analysed(model, x)
    made = relax(graphs.train, {"b": [nn.Linear(6, 3).double()]})
    lowered = lower(prune(made, {"b": 0}))
    assert torch.equal(lowered(x)[-1][0], expected)
    assert torch.equal(lowered(x)[-1][1], extra)
    for gm in (lowered, made):
        values = {"x": x}
        for block in partition(gm):
            exports, local = block.module(*[values[name] for name in block.inputs])
            values.update(zip(block.exports, exports, strict=True))
            assert len(set(block.exports)) == len(block.exports)
        assert torch.equal(local[0], expected)
        assert torch.equal(local[1], extra)

"""The way back: node for node the graph that was traced."""

import chain
import pytest
import torch
import torchvision
from graphs import analysed
from torch import nn

from sedona_fx.passes import lower, prune, relax, strip


def body(gm):
    return [n.format_node() for n in gm.graph.nodes if n.op != "output"] + [str(gm.graph.output_node().args)]


@pytest.mark.parametrize("devices", [None, [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]])
def test_strip_of_lower_is_what_was_traced(devices):
    traced = chain.graphs().train
    lowered = lower(prune(chain.relaxed(traced), {"a": 0, "c": 1}), devices)
    before = chain.text(lowered)
    stripped = strip(lowered)
    assert body(stripped) == body(traced)
    assert stripped.state_dict().keys() == chain.model().state_dict().keys()
    assert chain.text(lowered) == before
    x, _ = chain.batch()
    assert torch.equal(stripped(x), chain.model()(x))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_with_branches_of_training_outputs(mode):
    graphs = analysed(torchvision.models.googlenet(num_classes=3, init_weights=False), torch.randn(2, 3, 64, 64))
    gm = getattr(graphs, mode)
    heads = {cut: [nn.Flatten()] for cut in ("maxpool2", "inception4b", "inception5a")}
    lowered = lower(prune(relax(gm, heads), dict.fromkeys(heads, 0)))
    assert body(strip(lowered)) == body(gm)


def test_moves_may_stay():
    lowered = lower(prune(chain.relaxed(chain.graphs().train), {"b": 0}), [torch.device("cpu"), torch.device("meta")])
    assert "to(device" not in strip(lowered).code.replace(" ", "")
    assert [n.target for n in strip(lowered, keep_moves=True).graph.nodes].count("to") >= 1

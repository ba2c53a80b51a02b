"""Short ways from a model to its graphs, for the tests of passes."""

import copy
from collections.abc import Collection

import torch
from reference import net_gradients, reference_gradients
from torch import Tensor, fx, nn

import sedona_fx
from sedona_fx.compile.analyse import Analysed, analyse
from sedona_fx.data.args import Args
from sedona_fx.ir.graph import cut_points, info


def analysed(
    model: nn.Module,
    *inputs: object,
    output: str | int | None = None,
    leaf_modules: Collection[str] = (),
    **named: object,
) -> Analysed:
    """Return the ANALYSED graphs of a copy of a model."""
    model = copy.deepcopy(model)
    return analyse(model, Args(**Args(*inputs, **named).bind(model.forward)), output, leaf_modules)


def cut_names(graphs: Analysed) -> list[str]:
    """Return the names of the legal cuts, in order."""
    return [str(info(node).cut) for node in cut_points(graphs.train.graph)]


def node_of(gm: fx.GraphModule, site: str) -> fx.Node:
    """Return the node with a site name."""
    return next(node for node in gm.graph.nodes if info(node).site == site)


def assert_blocks_right(model: nn.Module, x: Tensor, y: Tensor, cuts: list[str], **how: object) -> sedona_fx.Net:
    """Cut a model in float64: its outputs stay the same bits, and every block's gradient is the hand-made reference.

    Every parameter that has a gradient under backpropagation has one in the net.
    """
    model, x = model.double(), x.double() if x.is_floating_point() else x
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, **how)
    assert list(net.plan.cuts) == cuts
    for mode in (False, True):
        net.model.load_state_dict(model.state_dict())
        torch.manual_seed(5)
        expected = copy.deepcopy(model).train(mode)(x.clone())
        torch.manual_seed(5)
        assert torch.equal(net.train(mode)(x.clone()), expected)
    net.model.load_state_dict(model.state_dict())
    losses, wanted = reference_gradients(copy.deepcopy(model), net, x.clone(), y)
    result = net.backward(x.clone(), y)
    torch.testing.assert_close(result.losses, losses, rtol=1e-12, atol=0)
    for found, reference in zip(net_gradients(net), wanted, strict=True):
        assert found.keys() == reference.keys()
        assert any(g.norm() > 1e-9 for g in reference.values())
        for name, gradient in reference.items():
            assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm() + 1e-300, name
    plain = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(plain(x.clone()), y).backward()
    missing = [n for n, p in plain.named_parameters() if p.grad is not None and net.model.get_parameter(n).grad is None]
    assert not missing
    return net

"""RELAXED: the sum of all losses gives every base layer the gradient of the relaxation, in one backward."""

import chain
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sedona_fx.ir.graph import split_point_nodes
from sedona_fx.ir.split_point import SplitPoint
from sedona_fx.passes import relax


def test_one_backward_gives_the_relaxed_gradients_by_hand():
    x, y = chain.batch()
    gm = chain.relaxed(chain.graphs().train)
    generator = torch.Generator().manual_seed(2)
    points = [gm.get_submodule(str(node.target)) for node in split_point_nodes(gm.graph)]
    assert len(points) == 3
    with torch.no_grad():
        for point in points:
            point.alpha.copy_(torch.randn(2, generator=generator))
            point.mixture.beta.copy_(torch.randn(2, generator=generator))
    *local, output = gm(x)
    losses = chain.cross_entropies((*local, output), y)
    sum(losses).backward()

    model = chain.model()
    keep = x.sum(1, keepdim=True) > -1.0
    stages = [
        (lambda h: model.a(h), [model.a]),
        (lambda h: model.b(F.relu(h)), [model.b]),
        (lambda h: model.c(F.relu(h * 1.5)), [model.c]),  # the cut stands behind b: not scaled yet
        (lambda h: model.d(F.relu(h) * keep), [model.d]),
    ]
    ins, outs, value = [], [], x
    for stage, _ in stages:
        ins.append(value.detach().requires_grad_())
        outs.append(stage(ins[-1]))
        value = outs[-1]
    own = [F.cross_entropy(outs[-1], y)]
    gradient = torch.autograd.grad(own[0], outs[-1], retain_graph=True)[0]
    for k in range(3, -1, -1):
        layer = stages[k][1][0]
        wanted = torch.autograd.grad(outs[k], [layer.weight, layer.bias, ins[k]], gradient)
        for name, expected in zip(("weight", "bias"), wanted, strict=False):
            found = getattr(gm.get_submodule("abcd"[k]), name).grad
            assert (found - expected).norm() <= 1e-12 * expected.norm(), (k, name)
        if k:
            point, through = points[k - 1], wanted[2]
            isolate = torch.softmax(point.alpha.detach(), 0)
            h = outs[k - 1].detach().requires_grad_()
            fresh = [nn.Linear(h.shape[1], 3).double() for _ in point.heads]
            for head, theirs in zip(fresh, point.heads, strict=True):
                head.load_state_dict(theirs.state_dict())
            weights = torch.softmax(point.mixture.beta.detach().requires_grad_(), 0)
            local_loss = F.cross_entropy(weights[0] * fresh[0](h) + weights[1] * fresh[1](h), y)
            found = torch.autograd.grad(local_loss, [h, *fresh[0].parameters(), *fresh[1].parameters()])
            theirs = [p.grad for head in point.heads for p in head.parameters()]
            for one, other in zip(theirs, found[1:], strict=True):  # heads learn at full rate
                assert (one - other).norm() <= 1e-12 * other.norm()
            gradient = isolate[0] * found[0] + isolate[1] * through


def test_the_numbers_are_those_of_the_model():
    x, _ = chain.batch()
    gm = chain.relaxed(chain.graphs().train)
    *local, output = gm(x)
    assert torch.equal(output, chain.model()(x))
    assert [tuple(t.shape) for t in local] == [(6, 3)] * 3


def test_heads_read_what_in_place_operations_overwrite():
    gm = chain.relaxed(chain.graphs().train)
    assert "clone" in gm.code
    x, _ = chain.batch()
    *local, _ = gm(x)
    first = gm.get_submodule("sedona_split_points.0")
    assert torch.equal(local[0], first.mixture(gm.get_submodule("a")(x)))


def test_its_input_is_left_alone():
    gm = chain.graphs().train
    before = chain.text(gm)
    chain.relaxed(gm)
    assert chain.text(gm) == before


def test_split_points_without_heads():
    gm = relax(chain.graphs().train, {"b": []})
    (output,) = gm(chain.batch()[0])
    assert torch.equal(output, chain.model()(chain.batch()[0]))


def test_the_gradient_of_the_split_point_is_first_order_only():
    point = SplitPoint([nn.Linear(2, 2)])
    h = torch.randn(1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(point(h)[0].sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), h)

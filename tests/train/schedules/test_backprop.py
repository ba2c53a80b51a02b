"""Backprop is plain PyTorch, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import CUTS, Chain, batches, make_net, make_tied, same, sgd

from sedona_fx.train import Backprop


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cuts", [[], CUTS], ids=["K=1", "K=4"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_plain_pytorch_bit_for_bit(tied, cuts, dtype):
    if tied and cuts:
        net = make_tied(dtype=dtype)
    else:
        net = make_net(Chain(drop=0.3), cuts=cuts, dtype=dtype, heads="linear" if cuts else False)
    model, heads = copy.deepcopy((net.model, net.heads))
    data = batches(8, dtype=dtype)
    schedule, optimizer = Backprop(net, sgd), sgd(model.parameters())
    torch.manual_seed(5)
    results = [schedule.step(x, y) for x, y in data]
    torch.manual_seed(5)
    for (x, y), result in zip(data, results, strict=True):
        optimizer.zero_grad()
        output = model(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        assert torch.equal(result.output, output)
        assert [loss.item()] == [v.item() for v in result.losses]
        assert not result.output.requires_grad
        assert not result.losses[0].requires_grad
    same(net.model, model)
    same(net.heads, heads)
    assert all(p.grad is None for p in net.heads.parameters())
    assert {id(p) for o in schedule.optimizers for g in o.param_groups for p in g["params"]} == {
        id(p) for p in net.model.parameters()
    }
    assert net.steps == 8


def test_clip_of_one_block_is_plain_clipping():
    net = make_net(cuts=[], heads=False)
    model = copy.deepcopy(net.model)
    schedule, optimizer = Backprop(net, sgd, clip=0.1), sgd(model.parameters())
    for x, y in batches(3):
        schedule.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    same(net.model, model)

"""net.backward as a drop-in: the user's own optimizer, accumulation, GradScaler, autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import batch, batches, by_hand, make_net, same, sgd

import sedona_fx
from sedona_fx.train import Greedy


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_users_own_optimizer_and_scheduler_over_all_parameters():
    net = make_net()
    greedy_net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    schedule = Greedy(greedy_net, sgd)
    rates = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in schedule.optimizers]
    for x, y in batches(6):
        optimizer.zero_grad()
        result = net.backward(x, y)
        optimizer.step()
        rate.step()
        other = schedule.step(x, y)
        for each in rates:
            each.step()
        assert [a.item() for a in result.losses] == [b.item() for b in other.losses]
    same(net, greedy_net)
    assert net.steps == 6


def test_accumulation_equals_one_big_batch():
    net = make_net(norm=False)
    x, y = batch(24)
    net.backward(x, y)
    whole = gradients(net)
    net.zero_grad()
    for k in range(3):
        result = net.backward(x[8 * k : 8 * k + 8], y[8 * k : 8 * k + 8], weight=1 / 3)
    assert whole.keys() == gradients(net).keys() == dict(net.named_parameters()).keys()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-12, atol=1e-12)
    assert torch.isclose(result.losses[-1], F.cross_entropy(net(x[16:]), y[16:]))  # without the weight


def test_grad_scaler():
    net, plain = make_net(dtype=torch.float32), make_net(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, other = sgd(net.parameters()), sgd(plain.parameters())
    for x, y in batches(4, dtype=torch.float32):
        optimizer.zero_grad()
        net.backward(x, y, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        plain.backward(x, y)
        other.step()
    same(net, plain, 1e-6)
    before = copy.deepcopy(net.state_dict())
    net.backward(x, y, scaler=scaler)
    next(net.heads["1"].parameters()).grad.fill_(float("inf"))  # an overflow: the scaler skips, and halves its scale
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_forward_under_it_backward_outside():
    net = make_net(dtype=torch.float32)
    _, _, parts = by_hand(net)
    x, y = batch(dtype=torch.float32)
    dtypes = []
    net.model.stages[1][0].register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    net.model.stages[1][0].bias.register_post_accumulate_grad_hook(
        lambda _: dtypes.append(torch.is_autocast_enabled("cpu"))
    )
    with autocast():
        result = net.backward(x, y)
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == [torch.bfloat16, False]
    h = x
    for k, (stage, head) in enumerate(parts):
        with autocast():
            h = stage(h.detach())
            loss = F.cross_entropy(head(h), y)
        loss.backward()
        assert torch.equal(loss, result.losses[k])
        for ours, theirs in zip(net.model.stages[k].parameters(), stage.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
            assert ours.grad.dtype is torch.float32


@pytest.mark.parametrize("kind", ["Greedy", "Backprop"])
def test_an_autocast_region_around_many_steps_equals_one_around_each(kind):
    inside, around = make_net(dtype=torch.float32), make_net(dtype=torch.float32)
    one = getattr(sedona_fx.train, kind)(inside, sgd)
    two = getattr(sedona_fx.train, kind)(around, sgd)
    data = batches(4, dtype=torch.float32)
    for x, y in data:
        with autocast():
            one.step(x, y)
    with autocast():  # autocast keeps the cast weights until the region ends
        for x, y in data:
            two.step(x, y)
    same(inside, around)


def test_evaluation_inside_autocast_leaves_no_weights_without_a_graph():
    net = make_net(dtype=torch.float32)
    x, y = batch(dtype=torch.float32)
    with autocast():
        sedona_fx.train.evaluate(net, [(x, y)])
        net.backward(x, y)
    assert all(p.grad is not None for p in net.parameters())

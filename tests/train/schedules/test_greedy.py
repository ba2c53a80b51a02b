"""Greedy against a loop written by hand; and what all schedules share: optimizers, clipping, frozen blocks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import Chain, batch, batches, by_hand, make_net, make_tied, same, sgd
from torch import nn

import sedona_fx
from sedona_fx.errors import CheckpointError, ScheduleError
from sedona_fx.train import Backprop, Greedy, KineticEnergy, block_seed


def greedy_by_hand(net, data, clip=None):
    """Train copies of a net's parts as Algorithm 1 of the paper says; return them and all losses."""
    model, heads, parts = by_hand(net)
    optimizers = [sgd([*stage.parameters(), *head.parameters()]) for stage, head in parts]
    history = []
    for step, (x, y) in enumerate(data):
        h = x
        for k, (stage, head) in enumerate(parts):
            torch.manual_seed(block_seed(0, k, step))
            h = stage(h.detach())
            loss = F.cross_entropy(head(h), y)
            optimizers[k].zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_([*stage.parameters(), *head.parameters()], clip)
            optimizers[k].step()
            history.append(loss.item())
    return model, heads, history


@pytest.mark.parametrize("check", ["async", "sync"])
@pytest.mark.parametrize(("norm", "drop"), [(True, 0.0), (False, 0.3), (True, 0.3)])
def test_twelve_steps_equal_a_loop_by_hand(norm, drop, check):
    net = make_net(norm=norm, drop=drop)
    data = batches(12)
    model, heads, expected = greedy_by_hand(net, data)
    schedule = Greedy(net, sgd, check=check)
    losses = [loss.item() for x, y in data for loss in schedule.step(x, y).losses]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert losses[0] != losses[4]
    same(net.model, model, 1e-12)
    same(net.heads, heads, 1e-12)
    assert net.steps == 12
    assert all(p.grad is None for p in net.parameters())


def test_the_activation_handed_on_is_the_one_from_before_the_update():
    net = make_net()
    x, y = batch()
    stage, _ = by_hand(net)[2][0]
    before = stage(x)
    seen = []
    net.model.stages[1][0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    order = []
    net.model.stages[1][0].register_forward_pre_hook(lambda *_: order.append("block 1 runs"))
    schedule = Greedy(net, sgd)
    schedule.optimizers[0].register_step_post_hook(lambda *_: order.append("block 0 stepped"))
    schedule.step(x, y)
    assert order == ["block 0 stepped", "block 1 runs"]
    assert torch.equal(seen[0], before)
    assert not torch.equal(net.model.stages[0].eval()(x), stage.eval()(x))


def test_one_block_is_backprop():
    one, plain = make_net(cuts=[], heads=False, drop=0.3), make_net(cuts=[], heads=False, drop=0.3)
    schedule, optimizer = Greedy(one, sgd), sgd(plain.model.parameters())
    torch.manual_seed(1)
    for x, y in batches(5):
        schedule.step(x, y)
    torch.manual_seed(1)
    for x, y in batches(5):
        optimizer.zero_grad()
        F.cross_entropy(plain.model(x), y).backward()
        optimizer.step()
    same(one.model, plain.model)


def test_clip_is_of_each_block():
    net = make_net()
    data = batches(5)
    model, heads, _ = greedy_by_hand(net, data, clip=0.05)
    schedule = Greedy(net, sgd, clip=0.05)
    for x, y in data:
        schedule.step(x, y)
    same(net.model, model, 1e-12)
    same(net.heads, heads, 1e-12)


def test_a_learning_rate_scheduler_of_each_block():
    net = make_net()
    schedule = Greedy(net, lambda params: torch.optim.SGD(params, lr=0.1 * len(params)))
    rates = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in schedule.optimizers]
    schedule.step(*batch())
    rates[2].step()
    counts = [len(list(block.parameters())) for block in net.blocks]
    found = [o.param_groups[0]["lr"] for o in schedule.optimizers]
    assert found == pytest.approx([0.1 * counts[0], 0.1 * counts[1], 0.05 * counts[2], 0.1 * counts[3]])


def test_parameter_groups_are_the_factories_business():
    def groups(params):
        flat = [p for p in params if p.dim() < 2]
        return torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1]}, {"params": flat, "weight_decay": 0}])

    net = make_net()
    schedule = Greedy(net, groups)
    before = [p.clone() for p in net.parameters()]
    schedule.step(*batch())
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_wrong_optimizers_are_refused():
    net = make_net()
    everything = list(net.parameters())
    with pytest.raises(ScheduleError, match=r"takes a factory.*and not SGD itself"):
        Greedy(net, sgd(everything))
    with pytest.raises(ScheduleError, match=r"returned NoneType, not a torch.optim.Optimizer"):
        Greedy(net, lambda params: None)
    with pytest.raises(ScheduleError, match=r"10 parameters of block 0 .* 36 parameters, 26 of them not"):
        Greedy(net, lambda params: sgd(everything))
    with pytest.raises(ScheduleError, match=r"optimizer of 9 parameters, 0 of them not .* 1 of the block's left out"):
        Greedy(net, lambda params: sgd(params[1:]))
    with pytest.raises(ScheduleError, match="neither 'async' nor 'sync'"):
        Greedy(net, sgd, check="never")


@pytest.mark.parametrize("kind", [Greedy, Backprop])
def test_frozen_blocks_stay_and_the_others_train(kind):
    net = make_net()
    for p in net.blocks[1].parameters():
        p.requires_grad_(False)
    for p in net.model.stages[0].parameters():
        p.requires_grad_(False)  # block 0 keeps its head
    schedule = kind(net, sgd)
    assert schedule.optimizers[1] is None
    assert (schedule.optimizers[0] is None) == (kind is Backprop)
    before = {name: p.clone() for name, p in net.named_parameters()}
    for x, y in batches(3):
        losses = schedule.step(x, y).losses
    assert len(losses) == (4 if kind is Greedy else 1)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert changed == (trained if kind is Greedy else {name for name in trained if name.startswith("model.")})
    again = kind(net, sgd)
    again.load_state_dict(schedule.state_dict())
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ScheduleError, match="nothing to train"):
        kind(net, sgd)


def test_nets_without_heads():
    net = make_net(heads=False)
    x, y = batch()
    advice = r"blocks \[0, 1, 2\] have no head.*leave out heads=False.*Backprop"
    with pytest.raises(ScheduleError, match=f"Greedy .*{advice}"):
        Greedy(net, sgd)
    with pytest.raises(ScheduleError, match=f"net.losses .*{advice}"):
        net.losses(x, y)
    with pytest.raises(ScheduleError, match=f"net.backward .*{advice}"):
        net.backward(x, y)
    assert len(Backprop(net, sgd).step(x, y).losses) == 1
    mixed = make_net(heads=["linear", "linear", "linear"])
    assert len(Greedy(mixed, sgd).step(x, y).losses) == 4


# ---- shared parameters ----------------------------------------------------------------------------------------------


def test_shared_parameters_get_the_sum_once_in_the_last_block():
    net = make_tied()
    model, heads, _ = by_hand(net)
    data = batches(5)
    shared = model.stages[0].weight
    owned = [
        [model.stages[0].bias, *heads["0"].parameters()],
        [model.stages[1].bias, *heads["1"].parameters()],
        [*model.stages[2].parameters(), *heads["2"].parameters()],
        [shared, model.stages[3].bias, *model.out.parameters()],
    ]
    optimizers = [sgd(params) for params in owned]
    for x, y in data:
        shared.grad = None
        h = x
        for k in range(4):
            for p in owned[k]:
                if p is not shared:
                    p.grad = None
            h = model.stages[k](torch.tanh(h.detach()) if k else h)  # a cut stands before the tanh
            F.cross_entropy(heads[str(k)](h) if k < 3 else model.out(torch.tanh(h)), y).backward()
            nn.utils.clip_grad_norm_(owned[k], 0.5)
            optimizers[k].step()
    schedule = Greedy(net, sgd, clip=0.5)
    assert schedule.contributors == [{0}, {1}, {2}, {0, 1, 3}]
    for x, y in data:
        schedule.step(x, y)
    same(net.model, model, 1e-12)
    same(net.heads, heads, 1e-12)


# ---- state ----------------------------------------------------------------------------------------------------------


def test_state_goes_on_as_if_never_stopped():
    data = batches(6)
    straight, first, second = make_net(drop=0.2), make_net(drop=0.2), make_net(drop=0.2)
    schedule = Greedy(straight, sgd)
    for x, y in data:
        schedule.step(x, y)
    schedule = Greedy(first, sgd)
    for x, y in data[:3]:
        schedule.step(x, y)
    again = Greedy(second, lambda params: torch.optim.SGD(params, lr=9.0, momentum=0.1))
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    for x, y in data[3:]:
        again.step(x, y)
    same(straight, second)


def test_foreign_states_are_refused_before_anything_is_loaded():
    net = make_net()
    schedule = Greedy(net, sgd)
    schedule.step(*batch())
    state = schedule.state_dict()
    fresh = Greedy(make_net(), sgd)

    def refused(target, state, match):
        with pytest.raises(CheckpointError, match=match):
            target.load_state_dict(state)
        assert not any(o.state for o in target.optimizers)
        assert target.net.steps == 0

    refused(Backprop(make_net(), sgd), state, r"its schedule is 'Greedy', here it is 'Backprop'")
    refused(Greedy(make_net(cuts=["stages.0"]), sgd), state, r"its cuts is .*same plan")
    refused(Greedy(make_net(), torch.optim.Adam), state, r"optimizer types is \['SGD'.*'Adam'")
    refused(Greedy(make_net(Chain(norm=False), norm=False), sgd), state, "optimizer shapes")
    refused(fresh, {**state, "optimizers": state["optimizers"][:2]}, "not complete")
    refused(fresh, {k: v for k, v in state.items() if k != "steps"}, "not complete")
    refused(fresh, [], "is a dict, not list")

    def two_groups(params):
        return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)

    refused(Greedy(make_net(), two_groups), state, r"groups of \[1, 9\] here and \[10\] in the state")


def test_a_schedule_must_say_how_to_step():
    with pytest.raises(NotImplementedError, match="Schedule does not say"):
        sedona_fx.train.Schedule(make_net(), sgd).step(*batch())


def test_a_last_block_without_layers_has_nothing_to_move():
    net = make_net(nn.Linear(6, 3), cuts=[])
    twin = copy.deepcopy(net)
    x, y = batch()
    Greedy(net, sgd, extra=[KineticEnergy(1.0)]).step(x, y)
    Greedy(twin, sgd).step(x, y)
    same(net.model, twin.model)

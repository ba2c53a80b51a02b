"""Schedules of a user's own: a few lines on top of the public names of the base classes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from kinds import ALL
from small import batches, by_hand, make_net, same, sgd
from torch import nn

from sedona_fx.train import Greedy, Headed, Schedule, StepResult, fit

every_kind = pytest.mark.parametrize("kind", ALL)


class SignGreedy(Greedy):
    """Sign-SGD on greedy gradients."""

    def on_gradients(self, block):
        for parameter in self.parameters[block.index]:
            if parameter.grad is not None:
                parameter.grad.sign_()


class FromBlock(Headed):
    """Greedy training of the blocks from `first` on."""

    def __init__(self, net, optimizer, first, **options):
        self.first = first
        super().__init__(net, optimizer, **options)

    def block_parameters(self, block):
        return super().block_parameters(block) if block.index >= self.first else []

    def options(self):
        return {**super().options(), "first": self.first}

    def step(self, inputs, target):
        engine, options = self.net.engine, self.step_options()
        with self.accumulation_window() as updates:
            self.raise_pending()
            batch = self.net.batch(inputs, target)
            values, losses, local = dict(batch.inputs), [], None
            for block in self.net.blocks:
                loss, exports, local = engine.local_step(block, batch, values, options, independent=True)
                engine.hand_on(block, values, exports, batch.training)
                losses.append(loss)
                if updates:
                    self.step_block(block.index)
            self.net.steps += 1
        return StepResult(losses, local)


class Evolution(Schedule):
    """Gradients from two forward passes and a random direction; needs no engine and no heads."""

    @property
    def draws_globally(self):
        return True

    def step(self, inputs, target):
        parameters = [p for owned in self.parameters for p in owned]
        with self.accumulation_window() as updates, torch.no_grad():
            directions = [torch.randn_like(p) for p in parameters]
            losses = []
            for sign in (1, -2):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += sign * 1e-3 * direction
                output = self.net.call(inputs)
                losses.append(self.net.engine.local_loss(self.net.blocks[-1], output, target))
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += 1e-3 * direction
                slope = self.loss_weight * (losses[0] - losses[1]) / 2e-3 * direction
                parameter.grad = slope if parameter.grad is None else parameter.grad + slope
            for block in self.net.blocks if updates else ():
                self.step_block(block.index)
            self.net.steps += 1
        return StepResult(losses[:1], output)


@pytest.mark.parametrize("options", [{}, {"check": "sync"}, {"accumulate": 2}], ids=str)
def test_sign_sgd_equals_blocks_by_hand(options):
    net = make_net()
    model, heads, parts = by_hand(net)
    schedule = SignGreedy(net, sgd, **options)
    optimizers = [
        sgd([*stage.parameters(), *head.parameters()]) if head is not None else sgd(stage.parameters())
        for stage, head in parts
    ]
    window = options.get("accumulate", 1)
    for step, (x, y) in enumerate(batches(6)):
        schedule.step(x, y)
        h = x
        for (stage, head), optimizer in zip(parts, optimizers, strict=True):
            h = stage(h.detach())
            (F.cross_entropy(head(h), y) / window).backward()
            if (step + 1) % window == 0:
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = parameter.grad.sign()
                optimizer.step()
                optimizer.zero_grad()
    same(net.model, model, 1e-12)
    same(net.heads, heads, 1e-12)


@every_kind
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_shown_once_per_update_before_clipping_and_stepping(kind, accumulate, monkeypatch):
    net = make_net()
    schedule = ALL[kind](net, sgd, clip=1e-3, accumulate=accumulate)
    events = []

    def on_gradients(block):
        norm = nn.utils.get_total_norm([p.grad for p in schedule.parameters[block.index]])
        events.append(("gradients", block.index, norm > 1e-3))

    def clip(parameters, norm):
        events.append(("clip", next(k for k, owned in enumerate(schedule.parameters) if owned is parameters)))

    monkeypatch.setattr(schedule, "on_gradients", on_gradients)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    for index, optimizer in enumerate(schedule.optimizers):
        optimizer.register_step_pre_hook(lambda *_, index=index: events.append(("step", index)))
    for x, y in batches(8):
        schedule.step(x, y)
    assert {index for _, index, *_ in events} == {0, 1, 2, 3}
    for gradients, clipped, stepped in zip(events[::3], events[1::3], events[2::3], strict=True):
        index = gradients[1]
        assert (gradients, clipped, stepped) == (("gradients", index, True), ("clip", index), ("step", index))


def test_gradients_are_unscaled_when_they_are_shown(monkeypatch):
    shown = []
    for autocast in (torch.float16, None):
        net = make_net(dtype=torch.float32, norm=False)
        schedule = Greedy(net, sgd, autocast=autocast)
        gradients = {}

        def keep(block, schedule=schedule, gradients=gradients):
            gradients[block.index] = [p.grad.clone() for p in schedule.parameters[block.index]]

        monkeypatch.setattr(schedule, "on_gradients", keep)
        schedule.step(*batches(1, dtype=torch.float32)[0])
        shown.append(gradients)
    torch.testing.assert_close(*shown, rtol=0.05, atol=2e-3)


def test_a_schedule_on_the_engine_trains_some_of_the_blocks_and_resumes():
    net, other = make_net(), make_net()
    before = [p.detach().clone() for p in net.blocks[0].parameters()]
    schedule = FromBlock(net, sgd, first=0)
    greedy = Greedy(other, sgd)
    for x, y in batches(4):
        schedule.step(x, y)
        greedy.step(x, y)
    same(net, other)
    net, other = make_net(), make_net()
    schedule, again = (FromBlock(n, sgd, first=1, accumulate=2) for n in (net, other))
    for x, y in batches(5):
        schedule.step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(net.blocks[0].parameters(), before, strict=True))
    assert schedule.optimizers[0] is None
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(schedule.state_dict()))
    for x, y in batches(8)[5:]:
        schedule.step(x, y)
        again.step(x, y)
    same(net, other)


def test_a_schedule_without_the_engine_trains_under_fit():
    net = make_net(norm=False, heads=False)
    x, y = batches(1)[0]
    schedule = Evolution(net, lambda params: torch.optim.SGD(params, lr=0.1), accumulate=4)
    history = fit(net, [(x, y)] * 8, epochs=30, schedule=schedule, progress=False)
    assert history.epochs[-1].losses[0] < 0.9 * history.epochs[0].losses[0]

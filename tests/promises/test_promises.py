"""Promises 1, 2, 3, 5, 6 and 7 of docs/architecture.md, over every model of the zoo."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Entry, same_bits, same_state, tensors, total_loss

import sedona_fx
from sedona_fx.train import Backprop, Greedy

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@dataclass
class Case:
    """A user's model, what it was before anything happened to it, a net of four blocks made of it, and a batch."""

    entry: Entry
    model: nn.Module
    original: nn.Module
    net: sedona_fx.Net
    heads: nn.Module
    x: Tensor
    y: Tensor

    def fresh(self) -> nn.Module:
        """Return a copy of the model as it was."""
        return copy.deepcopy(self.original)


@pytest.fixture(scope="module", params=ZOO)
def entry(request):
    return ZOO[request.param]


@pytest.fixture(scope="module")
def made(entry):
    model = entry.make()
    original = copy.deepcopy(model)
    x, y = entry.pair()
    state = torch.get_rng_state()
    net = sedona_fx.decouple(model, (x, y), blocks=4, search="balanced")
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(net.model, original)  # analysis left no trace in the buffers
    return Case(entry, model, original, net, copy.deepcopy(net.heads), x, y)


@pytest.fixture
def case(made):
    made.net.model.load_state_dict(made.original.state_dict())
    made.net.heads.load_state_dict(made.heads.state_dict())
    made.net.zero_grad()
    made.net.train()
    made.net.steps = 0
    return made


@pytest.fixture(scope="module")
def made_whole(made):
    """A net of one block that shares the parameters of a user's model."""
    model = made.fresh()
    net = sedona_fx.decouple(model, (made.x, made.y), blocks=1, search="balanced", inplace=True)
    assert same_state(model, made.original)
    return model, net


@pytest.fixture
def whole(made_whole, made):
    model, net = made_whole
    model.load_state_dict(made.original.state_dict())
    net.zero_grad()
    net.steps = 0
    return model, net.train()


# ---- 1: net(x) is model(x) -----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
def test_forward_is_the_models_bit_for_bit(case, training, gradients):
    model, net = case.fresh().train(training), case.net.train(training)
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(3)
        expected = model(case.x)
        torch.manual_seed(3)
        actual = net(case.x)
    assert type(actual) is type(expected)
    assert same_bits(actual, expected)
    assert [t.requires_grad for t in tensors(actual)] == [t.requires_grad for t in tensors(expected)]
    assert same_state(net.model, model)  # the buffers moved alike


@MODES
def test_gradients_through_the_net_are_the_models_bit_for_bit(case, training):
    model, net = case.fresh().train(training), case.net.train(training)
    for module in (model, net):
        torch.manual_seed(3)
        output = module(case.x) if module is model else net.call(case.x, backprop=True)  # meant: no warning
        total_loss(output, case.y).backward()
    for (name, theirs), ours in zip(model.named_parameters(), net.model.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        assert theirs.grad is None or torch.equal(theirs.grad, ours.grad), name
    assert all(p.grad is None for p in net.heads.parameters())  # no head ran


# ---- 2: names ------------------------------------------------------------------------------------------------------


def test_blocks_keep_the_models_names(case):
    whole = case.net.model.state_dict(keep_vars=True)
    assert list(whole) == list(case.original.state_dict())
    for block in case.net.blocks:
        for module in (block.module, block.eval_module):
            heads = {id(t) for t in block.head.state_dict(keep_vars=True).values()} if block.head is not None else ()
            for name, tensor in module.state_dict(keep_vars=True).items():
                assert id(tensor) in heads or whole[name] is tensor, name
    inference = case.net.inference_module().state_dict(keep_vars=True)
    assert all(whole[name] is tensor for name, tensor in inference.items())


def test_trained_state_loads_into_a_fresh_model(case):
    optimizer = torch.optim.SGD(case.net.parameters(), lr=1e-5)
    case.net.backward(case.x, case.y)
    optimizer.step()
    model = case.entry.build().eval()
    model.load_state_dict(case.net.original_state_dict(), strict=True)
    assert same_bits(model(case.x), case.net.eval()(case.x))
    assert same_bits(model(case.x), case.net.inference_module()(case.x))
    assert not same_state(model, case.original)


# ---- 3: isolation --------------------------------------------------------------------------------------------------


@MODES
def test_no_gradient_crosses_a_boundary(case, training):
    blocks = [list(block.parameters()) for block in case.net.blocks]
    everything = [p for block in blocks for p in block]
    assert len({id(p) for p in everything}) == len(everything)
    losses = case.net.train(training).losses(case.x, case.y)
    assert len(losses) == len(blocks) > 1
    for loss, own in zip(losses, blocks, strict=True):
        inside = {id(p) for p in own}
        grads = torch.autograd.grad(loss, everything, allow_unused=True)
        reached = {id(p) for p, grad in zip(everything, grads, strict=True) if grad is not None}
        assert reached
        assert reached <= inside


@MODES
def test_no_parameter_loses_its_gradient(case, training):
    model, net = case.fresh().train(training), case.net.train(training)
    total_loss(model(case.x), case.y).backward()
    net.backward(case.x, case.y)
    wanted = {name for name, p in model.named_parameters() if p.grad is not None}
    assert wanted == {name for name, p in net.model.named_parameters() if p.grad is not None}
    assert all(p.grad is not None for p in net.heads.parameters())


# ---- 5: modes ------------------------------------------------------------------------------------------------------


def test_modes_reach_every_module(case):
    for training in (False, True):
        assert case.net.train(training) is case.net
        flags = {path: m.training for path, m in case.fresh().train(training).named_modules()}
        assert flags == {path: m.training for path, m in case.net.model.named_modules()}
        assert all(m.training == training for m in (case.net, *case.net.heads.modules()))


def test_eval_changes_no_buffer_and_draws_nothing(case):
    net = case.net.eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first, losses = net(case.x), net.losses(case.x, case.y)
    torch.manual_seed(7)
    assert same_bits(first, net(case.x))
    net.steps += 1  # other draws, if there were any
    assert same_bits(losses, net.losses(case.x, case.y))
    assert same_bits(list(before.values()), list(net.state_dict().values()))
    torch.set_rng_state(state)


def test_training_moves_the_buffers_once_a_step_and_as_the_model_does(case):
    """Boundaries stop gradients, not activations. Where a model draws, the draws differ; counters never do."""
    model, state = case.fresh().train(), torch.get_rng_state()
    model(case.x)
    draws = not torch.equal(state, torch.get_rng_state())
    case.net.backward(case.x, case.y)
    for (name, theirs), ours in zip(model.named_buffers(), case.net.model.buffers(), strict=True):
        if not draws or not theirs.is_floating_point():
            assert torch.equal(theirs, ours), name


# ---- 6: the user's model -------------------------------------------------------------------------------------------


def test_the_users_model_is_untouched(case):
    case.net.backward(case.x, case.y)
    torch.optim.SGD(case.net.parameters(), lr=0.1).step()
    model, original = case.model, case.original
    assert same_state(model, original)
    assert not same_state(model, case.net.model)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in original.parameters()]
    for (path, ours), (other, theirs) in zip(model.named_modules(), original.named_modules(), strict=True):
        assert path == other
        assert type(ours) is type(theirs)
        assert ours.training == theirs.training, path
        assert vars(ours).keys() == vars(theirs).keys(), path
        hooks = [name for name, value in vars(ours).items() if "hook" in name and value]
        assert not hooks, path
    results = []
    for module in (case.model, case.original):
        torch.manual_seed(3)
        results.append(copy.deepcopy(module)(case.x))  # train mode: a copy, as BatchNorm counts
    assert same_bits(*results)


def test_the_net_owns_one_copy(case):
    net = case.net
    theirs = {p.untyped_storage().data_ptr() for p in case.model.parameters()}
    ours = {p.untyped_storage().data_ptr() for p in net.model.parameters()}
    assert len(ours) == len(theirs)
    assert not ours & theirs
    owned = [id(p) for p in (*net.model.parameters(), *net.heads.parameters())]
    assert [id(p) for p in net.parameters()] == owned
    assert sorted(id(p) for block in net.blocks for p in block.parameters()) == sorted(owned)
    buffers = {id(b) for b in (*net.model.buffers(), *net.heads.buffers())}
    for block in net.blocks:
        assert {id(b) for b in block.buffers()} <= buffers
        assert {id(p) for p in block.eval_module.parameters()} <= set(owned)


def test_inplace_shares_the_users_parameters(whole):
    model, net = whole
    for (name, theirs), (other, ours) in zip(model.named_parameters(), net.model.named_parameters(), strict=True):
        assert name == other
        assert ours is theirs
    assert all(a is b for a, b in zip(model.buffers(), net.model.buffers(), strict=True))
    assert net.model is not model


# ---- 7: one block is backprop --------------------------------------------------------------------------------------


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def _by_hand(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Train three steps in plain PyTorch; return the losses."""
    torch.manual_seed(5)
    optimizer, losses = _sgd(model.train().parameters()), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = total_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_one_block_is_backprop_bit_for_bit(case, whole):
    model = case.fresh()
    losses = _by_hand(model, case.x, case.y)
    assert not same_state(model, case.original)
    user, net = whole
    for way in ("schedule", "drop-in"):
        user.load_state_dict(case.original.state_dict())
        torch.manual_seed(5)
        optimizer = _sgd(net.parameters())
        schedule = Greedy(net, optimizer=_sgd)
        for loss in losses:
            if way == "schedule":
                result = schedule.step(case.x, case.y)
            else:
                optimizer.zero_grad()
                result = net.backward(case.x, case.y)
                optimizer.step()
            assert same_bits(result.losses, [loss]), way
        assert same_state(user, model), way


def test_backprop_through_four_blocks_is_backprop_bit_for_bit(case):
    model = case.fresh()
    losses = _by_hand(model, case.x, case.y)
    torch.manual_seed(5)
    schedule = Backprop(case.net, optimizer=_sgd)
    for loss in losses:
        assert same_bits(schedule.step(case.x, case.y).losses, [loss])
    assert same_state(case.net.model, model)
    assert same_state(case.net.heads, case.heads)

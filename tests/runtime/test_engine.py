"""The block engine: what is alive when, what the numbers are, and what reaches the loss."""

import collections
import copy
import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from small import Chain, batch, by_hand, make_net, same, sgd
from torch import nn

import sedona_fx
from sedona_fx.errors import DataError, OutputError, ScheduleError
from sedona_fx.measure import peak_bytes
from sedona_fx.rng import block_random
from sedona_fx.runtime.options import Batch, StepOptions
from sedona_fx.train import Greedy, block_seed

# ---- memory --------------------------------------------------------------------------------------------------------


class Saved:
    """Counts the tensors that autograd keeps, as long as it keeps them."""

    def __init__(self):
        self.alive = 0

    def pack(self, tensor):
        kept = [tensor.detach()]  # an output that holds its own graph would never die
        box = type("Box", (), {"tensor": kept})()
        self.alive += 1
        weakref.finalize(box, self.forget)
        return box

    def forget(self):
        self.alive -= 1

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("use", ["backward", "greedy"])
def test_one_graph_is_alive_at_a_time(use):
    net = make_net()
    run = net.backward if use == "backward" else Greedy(net, sgd).step
    seen = []
    with Saved() as saved:
        for stage in net.model.stages:
            stage[0].register_forward_pre_hook(lambda *_: seen.append(saved.alive))
        result = run(*batch())
        assert saved.alive == 0
    assert seen == [0, 0, 0, 0]
    assert not any(loss.requires_grad for loss in result.losses)
    assert not result.output.requires_grad
    with Saved() as saved:
        losses = net.losses(*batch())
        assert saved.alive > 0
        del losses
        assert saved.alive == 0


def test_an_activation_lives_until_its_last_reader():
    net = make_net()
    handed: list[weakref.ref] = []
    for stage in net.model.stages:
        stage[3].register_forward_hook(lambda _m, _a, out: handed.append(weakref.ref(out.untyped_storage())))
    alive = []
    net.backward(*batch(), on_block=lambda k: alive.append([ref() is not None for ref in handed]))
    assert alive == [[True], [False, True], [False, False, True], [False, False, False, False]]


def test_peak_is_far_below_backprop_on_a_deep_chain():
    depth, width, size = 32, 16, 1024
    torch.manual_seed(0)
    model = Chain(width, depth)
    x, y = batch(size, width, dtype=torch.float32)
    cuts = [f"stages.{k}" for k in range(3, depth - 1, 4)]
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, heads="linear")
    assert len(net.blocks) == 8
    net.backward(x, y)  # gradients exist from here on, and are not counted
    whole = peak_bytes(lambda: F.cross_entropy(net.call(x, backprop=True), y).backward())
    blocks = peak_bytes(lambda: net.backward(x, y))
    assert blocks < 0.25 * whole
    # Four stages keep three maps each (BatchNorm's input, tanh's output, dropout of 0 keeps no more than one more).
    assert blocks < 20 * size * width * 4


# ---- what the numbers are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_backward_equal_blocks_by_hand(training):
    net = make_net(drop=0.3).train(training)
    net.steps = 5
    model, heads, parts = by_hand(net)
    twin = copy.deepcopy(net)
    x, y = batch()
    result = net.backward(x, y)
    losses = twin.losses(x, y)
    h, expected = x, []
    for k, (stage, head) in enumerate(parts):
        torch.manual_seed(block_seed(0, k, 5))
        h = stage(h.detach())
        expected.append(F.cross_entropy(head(h), y))
        expected[-1].backward()
    assert torch.equal(result.output, parts[-1][1](h.detach()))
    assert [loss.item() for loss in result.losses] == [loss.item() for loss in expected]
    assert [loss.item() for loss in losses] == [loss.item() for loss in expected]
    sum(losses).backward()
    by_name = dict([*model.named_parameters(prefix="model"), *heads.named_parameters(prefix="heads")])
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, by_name[name].grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dict(twin.named_parameters())[name].grad, by_name[name].grad, rtol=1e-12, atol=1e-12)
    same(net.model, model)
    same(twin.model, model)


def test_blocks_draw_from_seed_block_and_step_and_leave_the_global_stream_alone():
    net = make_net(drop=0.5)
    x, y = batch()
    torch.manual_seed(1)
    first = [loss.item() for loss in net.losses(x, y)]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert [loss.item() for loss in net.losses(x, y)] == first
    torch.set_rng_state(state)
    net.backward(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert [loss.item() for loss in net.losses(x, y)] != first
    assert len({block_seed(s, b, t) for s in range(3) for b in range(-1, 5) for t in range(20)}) == 3 * 6 * 20
    assert all(0 <= block_seed(s, 0, 0) < 2**63 for s in range(100))


def test_the_stream_comes_back_after_an_error():
    state = torch.get_rng_state()

    def fail():
        with block_random(0, 0, 0, torch.device("cpu")):
            torch.rand(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_one_block_draws_from_the_global_stream():
    net = make_net(cuts=[], heads=False, drop=0.5)
    x, y = batch()
    plain = copy.deepcopy(net.model)
    torch.manual_seed(3)
    net.backward(x, y)
    torch.manual_seed(3)
    F.cross_entropy(plain(x), y).backward()
    for ours, theirs in zip(net.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


# ---- losses and outputs --------------------------------------------------------------------------------------------


def test_any_loss_label_smoothing_and_soft_targets():
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    net = make_net(loss=smooth)
    x, y = batch()
    assert torch.equal(net.backward(x, y).losses[-1], smooth(copy.deepcopy(net)(x), y).detach())
    soft = torch.softmax(torch.randn(8, 3, dtype=torch.float64), 1)
    net = make_net(pair=(x, soft))
    assert len(net.backward(x, soft).losses) == 4
    net = make_net(pair=(x, {"class": y, "weight": torch.rand(8)}), loss=weighted)
    result = net.backward(x, {"class": y, "weight": torch.ones(8, dtype=torch.float64)})
    assert torch.isclose(result.losses[-1], F.cross_entropy(result.output, y))


def weighted(output, target):
    return (F.cross_entropy(output, target["class"], reduction="none") * target["weight"]).mean()


Named = collections.namedtuple("Named", "hidden logits")


class Returns(Chain):
    """A chain that returns its last activation, too."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        if self.kind == "dict":
            return {"hidden": x, "logits": self.out(x)}
        if self.kind == "list":
            return [x, self.out(x)]
        if self.kind == "named":
            return Named(x, self.out(x))
        return x, self.out(x)


@pytest.mark.parametrize(
    ("kind", "key", "pick"),
    [
        ("dict", None, lambda o: o["logits"]),
        ("tuple", 1, lambda o: o[1]),
        ("list", 1, lambda o: o[1]),
        ("named", None, lambda o: o),
    ],
)
def test_the_loss_gets_the_models_own_type_with_the_other_fields_none(kind, key, pick):
    seen = []

    def loss(output, target):
        seen.append(output)
        return F.cross_entropy(pick(output), target)

    net = make_net(Returns(kind), output=key, loss=loss)
    x, y = batch()
    seen.clear()
    result = net.backward(x, y)
    wanted = {"dict": dict, "tuple": tuple, "list": list, "named": torch.Tensor}[kind]
    assert [type(output) for output in seen] == [wanted] * 4
    if kind != "named":
        for output in seen[:3]:
            others = [v for v in (output.values() if kind == "dict" else output) if v is not None]
            assert len(others) == 1
        assert others[0] is pick(seen[2])
    assert type(result.output) is type(net(x))
    assert not any(t.requires_grad for t in torch.utils._pytree.tree_leaves(result.output))


def test_the_loss_explains_itself():
    net = make_net()
    x, y = batch()
    with pytest.raises(DataError, match=r"the output of block 0, \(8, 3\) float64, with the target, \(5,\) int64"):
        net.backward(x, y[:5])
    net.engine.loss = lambda output, target: F.cross_entropy(output, target, reduction="none")
    with pytest.raises(OutputError, match=r"must return a scalar tensor, not \(8,\) float64"):
        net.backward(x, y)
    net.engine.loss = lambda output, target: output.detach().sum()
    with pytest.raises(DataError, match=r"the loss of block 0 has no gradient"):
        net.backward(x, y)
    net.engine.loss = None
    with pytest.raises(ScheduleError, match=r"no loss: hand one"):
        net.losses(x, y)

    def full(output, target):
        raise torch.OutOfMemoryError("too big")

    net.engine.loss = full
    with pytest.raises(torch.OutOfMemoryError):
        net.backward(x, y)


def test_no_grad_is_refused():
    net = make_net()
    with pytest.raises(ScheduleError, match=r"inside torch.no_grad"), torch.no_grad():
        net.backward(*batch())


class NoGradBehind(nn.Module):
    """Weights that require a gradient and never get one, by backprop neither."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3).requires_grad_(False)

    def forward(self, x):
        h = self.a(x).tanh()
        with torch.no_grad():
            g = self.b(h)
        return self.c(g), h


def test_a_block_whose_weights_work_under_no_grad_trains_nothing():
    model, x, y = NoGradBehind().double(), torch.randn(6, 4).double(), torch.arange(6) % 3

    def objective(output, target):
        return F.cross_entropy(output[0], target) + (0 if output[1] is None else output[1].square().mean())

    net = sedona_fx.decouple(model, (x, y), loss=objective, cuts=["a"], heads="linear", output=0)
    head = copy.deepcopy(net.heads["0"])
    net.backward(x, y)
    F.cross_entropy(head(model.a(x)), y).backward()
    torch.testing.assert_close(net.model.a.weight.grad, model.a.weight.grad, rtol=1e-12, atol=1e-15)
    assert net.model.b.weight.grad is None


def test_exports_can_be_handed_on_before_the_backward_pass():
    x, y = batch()
    net, twin = make_net(), make_net()
    twin.backward(x, y)
    values = dict(net.batch(x, y).inputs)
    pendings = []
    for block in net.blocks:  # all forward passes first: no backward pass needs what a later one changes
        pendings.append(net.engine.forward(block, net.batch(x, y), values, StepOptions(), independent=True))
        assert not any(t.requires_grad for t in pendings[-1].exports.values())
        net.engine.hand_on(block, values, pendings[-1].exports, True)
    for pending in reversed(pendings):
        net.engine.walk_back(pending, StepOptions())
    net.engine.guard.release()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ScheduleError, match="was done already"):
        net.engine.walk_back(pendings[0], StepOptions())


def test_a_target_is_moved_once_to_each_device():
    moves = []

    class Counted(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                moves.append(args[1])
            return super().__torch_function__(function, types, args, kwargs or {})

    meta, cpu = torch.device("meta"), torch.device("cpu")
    batch = Batch({}, {"labels": torch.ones(2).as_subclass(Counted), "count": 2}, 0)
    first = batch.target_on(meta)
    assert (first["labels"].device, first["count"]) == (meta, 2)
    assert batch.target_on(meta) is first
    assert batch.target_on(cpu)["labels"] is batch.target["labels"]
    assert moves == [meta]
    assert dataclasses.replace(batch, target=torch.zeros(1)).target_on(meta).shape == (1,)

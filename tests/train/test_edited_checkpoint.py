"""Checkpoints that somebody edited: a typed error, nothing loaded. Those of before load as they did."""

import copy

import pytest
import torch
from resuming import LOADERS, Run, assert_equal
from small import make_net, sgd
from test_checkpoint import refused

from sedona_fx.errors import CheckpointError
from sedona_fx.runtime.optimizer_state import counted_state, load_counted, optimizer_fault
from sedona_fx.train import Delayed, Greedy, Replay


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "c.pt"
    Run(LOADERS["list"]).go(path, every=1, kill=6)
    return path


def put(state, where, value):
    """Put a value at a place given by keys and indices, or remove it."""
    *parents, last = where
    for key in parents:
        state = state[key]
    if value is KeyError:
        del state[last]
    else:
        state[last] = value(state[last]) if callable(value) else value


OPTIMIZER = ("schedule", "optimizers", 1)
BUFFER = (*OPTIMIZER, "state", 0, "momentum_buffer")
ABSURD = [-1, 2**60, 1.5, True, None, "3"]


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        *[(("epoch",), value, r"damaged") for value in ABSURD],
        *[(("batch",), value, r"damaged") for value in ABSURD],
        *[(("done",), value, r"damaged") for value in [*ABSURD, 2]],
        *[(("schedule", "steps"), value, r"damaged: its number of steps is") for value in ABSURD],
        *[(("schedule", "calls"), value, r"damaged: it is at step") for value in [*ABSURD, 1]],
        (("epoch",), 2, "its history has 1 epochs, and it is behind epoch 2"),
        (("batch",), 0, "its sums and random states are not those of batch 0"),
        (("sums",), ["a"], "its sums or seconds are no numbers"),
        (("sums",), [0.5, 0.5], "its sums and random states"),
        (("seconds",), float("nan"), "its sums or seconds are no numbers"),
        (("history", 0, "losses"), [None], "its history is no list of epochs"),
        (("history", 0, "epoch"), 3, "its history"),
        (("random", 0), torch.zeros(3), "its random states cannot be set"),
        (("random",), [], "its random states cannot be set"),
        ((*OPTIMIZER, "state"), {}, r"optimizer of block 1 does not fit: .*of 0 parameters, and had state of \d+"),
        ((*OPTIMIZER, "state", 0), KeyError, r"optimizer of block 1 .* state of \d+ parameters, and had state of \d+"),
        (BUFFER, KeyError, r"optimizer of block 1 .* parameter 0, of shape \(6, 6\), has no 'momentum_buffer'"),
        (BUFFER, lambda t: t[:3], r"'momentum_buffer' as \(3, 6\) float64, which should be \(6, 6\) float64"),
        (BUFFER, lambda t: t.float(), r"'momentum_buffer' as \(6, 6\) float32"),
        (BUFFER, 3.0, r"'momentum_buffer' as a number"),
        ((*OPTIMIZER, "state", 99), {}, "a parameter 99 that is not there"),
        ((*OPTIMIZER, "state"), KeyError, "no state of an optimizer"),
        ((*OPTIMIZER, "param_groups"), KeyError, "no parameter groups"),
        ((*OPTIMIZER, "param_groups", 0, "lr"), KeyError, "its setting 'lr' is missing"),
        ((*OPTIMIZER, "param_groups", 0, "lr"), -0.1, "its learning rate is -0.1"),
        ((*OPTIMIZER, "param_groups", 0, "momentum"), float("inf"), "its setting 'momentum' is inf there"),
        ((*OPTIMIZER, "param_groups", 0, "params"), lambda p: [*p[:-1], 0], "numbered otherwise"),
        ((*OPTIMIZER,), None, "it trains nothing"),
        (("schedule", "gradients"), [], "gradients belong to"),
        (("schedule", "extras"), {"a": torch.ones(1)}, "of its extra losses"),
        (("rates", 0, 1, "last_epoch"), -5, "the state of its OneCycleLR has last_epoch = -5"),
        (("rates", 0, 1, "_step_count"), 10**30, "the state of its OneCycleLR has _step_count"),
        (("rates", 0, 1, "total_steps"), "3", "the state of its OneCycleLR has total_steps"),
        (("rates", 0, 1, "base_lrs"), [0.1, 0.2, 0.3], "the state of its OneCycleLR has base_lrs"),
        (("rates", 0, 1), 3, "the state of its OneCycleLR is int"),
        (("loss",), "torch.nn.functional.mse_loss", "trained by the loss torch.nn.functional.mse_loss, this one is by"),
    ],
)
def test_edited(path, where, value, match):
    state = torch.load(path)
    put(state, where, value)
    torch.save(state, path)
    refused(path, match)


def test_damaged_bytes(path):
    raw = path.read_bytes()
    place = raw.find(torch.load(path)["net"]["model.stages.0.0.weight"].numpy().tobytes())
    path.write_bytes(raw[: place + 7] + bytes([raw[place + 7] ^ 0x40]) + raw[place + 8 :])
    refused(path, r"cannot read the checkpoint .*it is damaged: its part 'data/.*Delete it to start anew")


def test_checkpoints_from_before_go_on_as_they_did(path):
    """Without the fields that newer files have, and without the checksum of the whole."""
    state = torch.load(path)
    del state["loss"]
    for saved in state["schedule"]["optimizers"]:
        del saved["held"]
    state["net"] = dict(state["net"])
    torch.save(state, path)
    again, straight = Run(LOADERS["list"]), Run(LOADERS["list"])
    again.go(path)
    straight.go()
    assert_equal(again.state(), straight.state())


def test_a_checkpoint_of_other_heads_of_the_same_shapes(path):
    state = torch.load(path)
    state["net"]._metadata[""]["plan"]["heads"][0] = "other"
    torch.save(state, path)
    refused(path, r"belongs to another net: its heads are \['other', ")


def test_leftovers_of_a_killed_fit_go(path):
    left = path.parent / f".{path.name}.12345678.pt"
    left.write_bytes(b"half")
    run = Run(LOADERS["list"])
    run.go(path, epochs=1)  # nothing is left to train, so that nothing is written
    assert [p.name for p in path.parent.iterdir()] == [path.name]


ALL = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    *[
        lambda p, kind=kind: kind(p, lr=0.01)
        for kind in (
            torch.optim.AdamW,
            torch.optim.NAdam,
            torch.optim.RAdam,
            torch.optim.Adamax,
            torch.optim.Adagrad,
            torch.optim.Adadelta,
            torch.optim.RMSprop,
            torch.optim.Rprop,
            torch.optim.ASGD,
            torch.optim.Adafactor,
        )
    ],
]


@pytest.mark.parametrize("make", ALL, ids=range(len(ALL)))
def test_the_states_of_pytorchs_optimizers_fit_and_edited_ones_do_not(make):
    def stepped(dtype):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 3), (3,), ())]
        optimizer = make(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return optimizer

    for dtype in (torch.float32, torch.float64):
        optimizer = stepped(dtype)
        state, fresh = copy.deepcopy(counted_state(optimizer)), stepped(dtype)
        assert not optimizer_fault(fresh, state)
        assert not optimizer_fault(fresh, optimizer.state_dict())
        load_counted(fresh, state)
        assert_equal(fresh.state_dict()["state"], optimizer.state_dict()["state"])
        for name, value in state["state"].get(0, {}).items():
            for edit in ("missing", torch.ones(7, 7), "text"):
                edited = copy.deepcopy(state)
                put(edited, ("state", 0, name), KeyError if edit == "missing" else edit)
                assert optimizer_fault(fresh, edited), (name, edit)
            if name == "step":
                for step in (-1.0, 1.5, float("nan"), 1e30):
                    edited = copy.deepcopy(state)
                    put(edited, ("state", 0, name), torch.tensor(step) if isinstance(value, torch.Tensor) else step)
                    assert "which is no number of steps" in optimizer_fault(fresh, edited)


def test_optimizers_of_the_users_own_are_taken_as_they_are():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "anything": object})

        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["strange"] = torch.ones(17)

    own = Own([torch.nn.Parameter(torch.ones(3))])
    own.step()
    assert not optimizer_fault(own, counted_state(own))


# ---- schedules that keep batches ------------------------------------------------------------------------------------


def kept(kind, **options):
    torch.manual_seed(0)
    schedule = kind(make_net(), sgd, **options)
    x, y = torch.randn(6, 6).double(), torch.randint(3, (6,))
    for _ in range(6):
        schedule.step(x, y)
    return schedule


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        (("flights", 0, "step"), 99, "a step that was not taken"),
        (("flights", 0, "step"), -1, "a step that was not taken"),
        (("flights", 0, "training"), 1, "of no mode"),
        (("flights", -1, "gradients"), {"a": 3}, "gradients that are no tensors"),
        (("flights", -1, "held"), [], "another number of blocks"),
        (("flights", -1, "held", 0, "weights"), KeyError, "not complete"),
        (("flights", -1, "held", 0, "weights", 0), lambda t: t[:2], "weights or buffers of other shapes"),
        (("flights", -1, "held", 0, "buffers"), [], "weights or buffers of other shapes"),
        (("flights", -1, "held", 0, "inputs"), {}, "other inputs"),
        (("flights",), 3, "no list of batches"),
    ],
)
def test_edited_batches_in_flight(where, value, match):
    state = copy.deepcopy(kept(Delayed).state_dict())
    put(state, where, value)
    with pytest.raises(CheckpointError, match=match):
        kept(Delayed).load_state_dict(state)


@pytest.mark.parametrize(
    ("where", "value", "match"),
    [
        (("replay", "counts", "turns", 0), -3, "its turns are not one number a block"),
        (("replay", "counts", "unused"), 1.5, "its counts are no numbers"),
        (("replay", "counts"), {}, "its counts are no numbers"),
        (("replay", "stored"), 10**9, "stored more batches"),
        (("replay", "full"), 0, "size of a full batch"),
        (("replay", "latest"), [1.0], "latest losses"),
        (("replay", "buffers"), [], "other buffers"),
        (("replay", "buffers", 0, "ring", "counts", 0), 0, "counts of their uses"),
        (("replay", "buffers", 0, "ring", "items", 0), {}, "a buffer is damaged"),
        (("replay", "buffers", 0, "codecs"), {"a": {"b": 1}}, "of a buffer is damaged|of a codec"),
        (("replay", "buffers", 0), 3, "a buffer is damaged"),
    ],
)
def test_edited_buffers(where, value, match):
    state = copy.deepcopy(kept(Replay, capacity=3, codec="int8").state_dict())
    put(state, where, value)
    fresh = kept(Replay, capacity=3, codec="int8")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match=match):
        fresh.load_state_dict(state)
    assert_equal(fresh.state_dict(), before)


def test_edited_gradients_of_a_window():
    schedule = kept(Greedy, accumulate=4)
    state = copy.deepcopy(schedule.state_dict())
    state["gradients"][0][0] = state["gradients"][0][0][:2]
    with pytest.raises(CheckpointError, match="other shapes or dtypes than the parameters"):
        kept(Greedy, accumulate=4).load_state_dict(state)

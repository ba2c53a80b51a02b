"""Early exit and ensembles of heads, against the same computed by hand from the parts."""

import copy
import dataclasses
import warnings
from typing import NamedTuple

import onnxruntime
import pytest
import torch
from exits_by_hand import Stages, batch, count_rows, exits_by_hand, logits_by_hand, make, telling
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import sedona_fx
from sedona_fx import LocalLoss
from sedona_fx.errors import HeadError


@pytest.fixture(scope="module")
def lowered() -> sedona_fx.Net:
    return make(heads="linear")


@pytest.fixture
def net(lowered) -> sedona_fx.Net:
    return copy.deepcopy(lowered)


# ---- early exit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 7, 1])
@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6, 0.7, 0.9])
def test_each_example_leaves_at_the_first_head_that_is_sure(net, threshold, count):
    x, _ = batch(count)
    output, blocks = exits_by_hand(logits_by_hand(net, x), threshold)
    seen = count_rows(net)
    exit_early = net.early_exit(threshold)
    seen.clear()
    found = exit_early(x)
    assert found._fields == ("output", "blocks")
    assert torch.equal(found.blocks, blocks)
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    inside = [(k, int((blocks >= k).sum())) for k in range(4)]
    assert seen == [(k, rows) for k, rows in inside if rows]


def test_the_thresholds_above_do_tell_examples_apart(net):
    blocks = [net.early_exit(threshold)(batch()[0]).blocks for threshold in (0.5, 0.6, 0.7)]
    assert any(set(found.tolist()) == {0, 1, 2, 3} for found in blocks)


def test_nobody_but_the_last_is_sure_enough(net):
    x, _ = batch()
    found = net.early_exit(1.0)(x)
    assert torch.equal(found.output, copy.deepcopy(net.model).eval()(x))
    assert found.blocks.tolist() == [3] * 40
    assert not found.output.requires_grad


def test_one_block_is_the_model():
    net = make(cuts=[], heads=False)
    found = net.early_exit(0.5)(batch()[0])
    assert torch.equal(found.output, net.eval()(batch()[0]))
    assert found.blocks.tolist() == [0] * 40


def test_the_net_is_left_alone_and_its_tensors_are_shared(net):
    x, _ = batch()
    net.train()
    net.model.stages[1][1].eval()
    flags = [module.training for module in net.modules()]
    state, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    exit_early, both = net.early_exit(0.6), net.ensemble(2)
    first = exit_early(x), both(x)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    ours = {id(p) for p in net.parameters()}
    assert {id(p) for p in exit_early.parameters()} == ours
    assert {id(p) for p in both.parameters()} < ours
    schedule = sedona_fx.train.Greedy(net, lambda params: torch.optim.SGD(params, lr=0.5))
    schedule.step(*batch())
    assert not torch.equal(exit_early(x).output, first[0].output)
    assert not torch.equal(both(x), first[1])
    assert exit_early.train(False)(x).output.shape == (40, 3)


class Masked(Stages):
    """A gate is made in block 1 and read again in the last, as a tensor with the batch elsewhere; or it is given."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.states(x, mask)[-1]

    def states(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        a = self.stages[0](x)
        if self.how == "turned":
            kept = torch.sigmoid(a.t())
        elif self.how == "repeated":
            kept = torch.sigmoid(a).repeat_interleave(2, 0)
        gates = {"turned": lambda: kept.t(), "repeated": lambda: kept[::2], "mask": lambda: mask}
        b = self.stages[1](a * gates[self.how]())
        c = self.stages[2](b)
        return [a, b, c, self.out(self.stages[3](c * gates[self.how]()))]


@pytest.mark.parametrize("how", ["turned", "repeated", "mask"])
def test_the_whole_batch_goes_on_where_values_have_several_rows_an_example(how):
    x, y = batch()
    inputs = (x, (x > -0.5).double()) if how == "mask" else (x,)
    net = make(Masked(how), (inputs, y), heads="linear")
    model, heads = copy.deepcopy((net.model, net.heads))
    model.eval()
    heads.eval()
    with torch.no_grad():
        *states, last = model.states(*inputs)
        logits = [*(heads[str(k)](h) for k, h in enumerate(states)), last]
    threshold = telling(logits)
    output, blocks = exits_by_hand(logits, threshold)
    assert len(set(blocks.tolist())) > 2
    seen = count_rows(net)
    exit_early = net.early_exit(threshold)
    seen.clear()
    found = exit_early(*inputs)
    assert torch.equal(found.blocks, blocks)
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    whole = [40] * 4
    assert [n for _, n in seen] == (whole if how == "repeated" else [int((blocks >= k).sum()) for k in range(4)])


class Pair(NamedTuple):
    features: Tensor
    scores: Tensor


@dataclasses.dataclass
class Record:
    logits: Tensor | None = None
    features: Tensor | None = None


torch.utils._pytree.register_dataclass(Record)


class Wrapped(Stages):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor):
        for stage in self.stages:
            x = stage(x)
        scores = self.out(x)
        if self.kind == "dict":
            return {"features": x, "logits": scores}
        if self.kind == "tuple":
            return x, scores
        return Pair(x, scores) if self.kind == "namedtuple" else Record(scores, x)


@pytest.mark.parametrize(("kind", "key"), [("dict", None), ("tuple", 1), ("namedtuple", "scores"), ("dataclass", None)])
def test_outputs_with_a_primary_field(kind, key):
    def loss(output, target):
        if isinstance(output, Tensor):
            return F.cross_entropy(output, target)
        return F.cross_entropy(sedona_fx.ir.outputs.pick(output, key or "logits"), target)

    net = make(Wrapped(kind), heads="linear", output=key, loss=loss)
    x, _ = batch()
    logits = logits_by_hand(net, x)
    output, blocks = exits_by_hand(logits, 0.6)
    found = net.early_exit(0.6)(x)
    assert torch.equal(found.blocks, blocks)
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    expected = torch.log_softmax(logits[2], 1) + torch.log_softmax(logits[3], 1)
    assert torch.equal(net.ensemble(2)(x), expected)


def test_a_model_that_returns_more_in_training_only():
    entry = ZOO["googlenet"]
    x, y = entry.pair()
    net = sedona_fx.decouple(entry.make(), (x, y), blocks=3, search="uniform")
    with torch.no_grad():
        expected = copy.deepcopy(net.model).eval()(x)
    assert torch.equal(net.early_exit(1.0)(x).output, expected)
    assert torch.equal(net.ensemble(1)(x), torch.log_softmax(expected, 1))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(4))
        self.out = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


class Tokens(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(4))
        self.out = nn.Linear(6, 7)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


SHAPED = {
    "dense": (Dense, (3, 4, 4), lambda x: torch.randint(0, 5, (len(x), 4, 4)), F.cross_entropy, 1),
    "tokens": (Tokens, (4, 6), lambda x: torch.randint(0, 7, (len(x), 4)), token_loss, 2),
}


@pytest.mark.parametrize("kind", SHAPED)
def test_dense_maps_and_tokens_ask_for_the_mean_over_positions(kind):
    model, shape, targets, loss, dim = SHAPED[kind]
    x, _ = batch(20, *shape)
    net = make(model(), (x, targets(x)), loss=loss)
    logits = logits_by_hand(net, x)
    threshold = telling(logits, dim)
    output, blocks = exits_by_hand(logits, threshold, dim)
    assert len(set(blocks.tolist())) > 1
    found = net.early_exit(threshold)(x)
    assert torch.equal(found.blocks, blocks)
    torch.testing.assert_close(found.output, output, rtol=1e-12, atol=1e-12)
    expected = sum(torch.log_softmax(one, dim) for one in logits[1:])
    torch.testing.assert_close(net.ensemble(3)(x), expected, rtol=1e-12, atol=0)


def test_what_early_exit_cannot_do():
    x, _ = batch()
    bare, net = make(heads=False), make(heads="linear", cuts=["stages.0"])
    rebuild = LocalLoss(lambda output, inputs, _: F.mse_loss(output, inputs["x"]), head=lambda c: nn.Linear(6, 6))
    own = make(local_loss=[None, rebuild, None])
    for ask in (lambda n: n.early_exit(0.5), lambda n: n.ensemble(3)):
        with pytest.raises(HeadError, match=r"asks the heads for the model's output, and block \d has no head"):
            ask(bare)
        with pytest.raises(HeadError, match=r"block 1 has an objective of its own \(local_loss=\)"):
            ask(own)
    assert torch.equal(bare.ensemble(1)(x), torch.log_softmax(bare.eval()(x), 1))
    assert own.ensemble(2)(x).shape == (40, 3)  # asks block 2, which has the model's task
    for threshold in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(HeadError, match=r"is no probability: give one in \(0, 1\]"):
            net.early_exit(threshold)
    for count in (0, 3, -1, True, 1.0):
        with pytest.raises(HeadError, match=r"give a number of heads from 1 to 2, the model's own output included"):
            net.ensemble(count)


# ---- ensembles ------------------------------------------------------------------------------------------------------


def test_ensembles_are_sums_of_log_softmax(net):
    x, _ = batch()
    logits = logits_by_hand(net, x)
    for count in (1, 2, 3, 4):
        expected = torch.log_softmax(logits[4 - count], 1)
        for one in logits[5 - count :]:
            expected = expected + torch.log_softmax(one, 1)
        assert torch.equal(net.ensemble(count)(x), expected)


def test_heads_that_are_not_asked_do_not_run(net):
    ran = []
    for k, head in net.heads.items():
        head.register_forward_hook(lambda *_, k=k: ran.append(k))
    gm = net.ensemble(2)
    gm(batch()[0])
    assert ran == ["2"]
    known = {id(p): name for name, p in net.named_parameters()}
    assert {known[id(p)].split(".")[1] for p in gm.parameters() if known[id(p)].startswith("heads")} == {"2"}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ensembles_can_be_exported(net, count, tmp_path):
    gm, (x, _) = net.float().ensemble(count), batch(5)
    x = x.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(gm, (x,), str(tmp_path / "e.onnx"), dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    for rows in (5, 2):
        (found,) = session.run(None, {session.get_inputs()[0].name: x[:rows].numpy()})
        expected = gm(x[:rows])
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()

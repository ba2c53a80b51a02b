"""Sizes of inputs besides the batch: free in captured models where program and heads allow it, else refused."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import DataError, HeadError, PlanError, TraceError
from sedona_fx.plan_values import FreeSize
from sedona_fx.train import Greedy

WORDS = 11


class Words(nn.Module):
    """Three layers over words; a branch on a sum of sizes, never taken, makes symbolic tracing fail."""

    def __init__(self, positions: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, WORDS)
        self.positions = nn.Parameter(torch.randn(positions, 8)) if positions else None

    def look(self, h: Tensor) -> Tensor:
        return h

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if ids.dim() + mask.dim() != 4:
            raise ValueError
        h = self.embed(ids)
        if self.positions is not None:
            h = h + self.positions[: ids.shape[1]]
        for layer in self.layers:
            h = self.look(h + torch.tanh(layer(h)) * mask[..., None])
        return self.out(h)


class Captured(Words):
    def look(self, h):
        if h.shape[1] > 10_000:
            raise ValueError("too long")
        return h


class Even(Words):
    def look(self, h):
        return h * 2 if h.shape[1] % 2 else h


class Fixed(Words):
    def look(self, h):
        length = int(h.shape[1])
        if length == 6:
            return h * 2
        return h


class Summary(Captured):
    """One score a word class, whatever the length."""

    def forward(self, ids, mask):
        return super().forward(ids, mask).mean(1)


def per_word(scores: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


def batch(length: int = 6, count: int = 4, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "mask": torch.ones(count, length)}, ids


def decoupled(model: nn.Module, **options) -> sedona_fx.Net:
    options = {"blocks": 3, "search": "balanced", "loss": per_word, **options}
    net = sedona_fx.decouple(model, batch(), progress=False, **options)
    assert net.capture.front_end == "export"
    return net


def test_any_length_gives_what_the_model_gives():
    model = Captured()
    net = decoupled(model)
    assert [(size.name, size.dim, size.least) for size in net.capture.free_sizes] == [
        ("ids", 1, 2),
        ("mask", 1, 2),
    ]
    assert len({size.symbol for size in net.capture.free_sizes}) == 1
    for length, count in ((2, 3), (5, 1), (6, 4), (17, 2)):
        inputs, _ = batch(length, count)
        for training in (True, False):
            assert torch.equal(net.train(training)(**inputs), model.train(training)(**inputs))


def test_any_length_trains_as_blocks_written_by_hand():
    net = decoupled(Captured().double())
    assert len(net.blocks) == 3
    schedule = Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for length in (6, 3, 9):
        inputs, ids = batch(length, seed=length)
        inputs["mask"] = inputs["mask"].double()
        losses = schedule.step(inputs, ids).losses
        assert all(loss.isfinite() for loss in losses)
    inputs, ids = batch(8)
    inputs["mask"] = inputs["mask"].double()
    expected = per_word(net.model(**inputs), ids)
    torch.testing.assert_close(net.losses(inputs, ids)[-1], expected)


def test_gradients_at_another_length():
    model = Captured().double()
    net = decoupled(model, blocks=1)
    inputs, ids = batch(9)
    inputs["mask"] = inputs["mask"].double()
    net.backward(inputs, ids)
    per_word(model(**inputs), ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-12)


def test_what_is_free_is_shown_and_saved(tmp_path):
    net = decoupled(Captured())
    assert "sizes: ids (any, 2 to 10000), mask (any, 2 to 10000); all others are fixed" in str(net)
    net.save(tmp_path)
    assert sedona_fx.Plan.load(tmp_path / "plan.json").capture.free_sizes == net.capture.free_sizes
    loaded = sedona_fx.load(tmp_path, Captured(), loss=per_word)
    inputs, _ = batch(11)
    assert torch.equal(loaded(**inputs), net(**inputs))


def test_sizes_that_the_model_takes_for_equal_have_to_be_equal():
    net = decoupled(Captured())
    inputs = {**batch(7)[0], "mask": torch.ones(4, 6)}
    with pytest.raises(
        DataError, match=r"dimension 1 of the input 'mask' has 6 entries, and dimension 1 of 'ids' has 7"
    ):
        net(**inputs)


@pytest.mark.parametrize("length", [1, 10_001])
def test_sizes_outside_of_what_the_program_is_right_for(length):
    net = decoupled(Captured())
    with pytest.raises(DataError, match=r"its dimension 1 has to be 2 to 10000"):
        net(**batch(length)[0])


def test_a_table_of_positions_is_a_bound():
    net = decoupled(Captured(positions=16))
    inputs, _ = batch(16)
    assert torch.equal(net(**inputs), net.model(**inputs))
    with pytest.raises((DataError, RuntimeError)):
        net(**batch(17)[0])


@pytest.mark.parametrize("kind", [Even, Fixed])
def test_a_branch_on_a_size_fixes_it(kind):
    model = kind()
    net = decoupled(model)
    assert net.capture.free_sizes == ()
    assert torch.equal(net(**batch(6)[0]), model(**batch(6)[0]))
    with pytest.raises(DataError, match=r"'ids' has the shape \(4, 5\), .* its dimension 1 has to be 6.*dynamic="):
        net(**batch(5)[0])
    assert "ids (any, 6), mask (any, 6)" in str(net)


def test_the_line_that_fixes_a_size_is_named():
    with pytest.raises(TraceError, match=r"1 of the input 'ids' cannot be free in Fixed: .*int\(h.shape") as e:
        decoupled(Fixed(), dynamic={"ids": [1]})
    assert "test_free_sizes.py" in str(e.value)
    decoupled(Captured(), dynamic={"ids": [1], "mask": [0, 1]})


@pytest.mark.parametrize(
    ("dynamic", "text"),
    [
        ({"idss": [1]}, r"names 'idss', which is no tensor among the inputs.*'ids'"),
        ({"ids": [2]}, r"ids has the dimensions 0 to 1"),
        ({"ids": [True]}, r"ids has the dimensions 0 to 1"),
        (True, r"dynamic=True: give a mapping"),
    ],
)
def test_bad_requests(dynamic, text):
    with pytest.raises(DataError, match=text):
        decoupled(Captured(), dynamic=dynamic)


def test_sizes_are_fixed_on_demand():
    net = decoupled(Captured(), dynamic=False)
    assert net.capture.free_sizes == ()
    with pytest.raises(DataError, match="has to be 6"):
        net(**batch(5)[0])


def test_symbolic_nets_fix_no_size():
    model = Words()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers, self.out = model.embed, nn.Sequential(*model.layers), model.out

        def forward(self, ids):
            return self.out(self.layers(self.embed(ids)))

    net = sedona_fx.decouple(
        Plain(), (batch()[1], batch()[1]), blocks=2, search="balanced", loss=per_word, progress=False
    )
    assert net.capture.front_end == "symbolic"
    assert "sizes:" not in str(net)
    net.backward(batch(9)[1], batch(9)[1])


def test_a_head_that_cannot_follow_fixes_the_sizes():
    class Stiff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6 * 8, 6 * WORDS)

        def forward(self, h):
            return self.out(h.flatten(1)).unflatten(1, (6, WORDS))

    def stiff(context):
        return Stiff()

    net = decoupled(Captured(), heads=[stiff])
    assert net.capture.free_sizes == net.plan.capture.free_sizes == ()
    with pytest.raises(DataError, match="has to be 6"):
        net(**batch(5)[0])
    with pytest.raises(HeadError, match="sizes cannot be free: a head does not run"):
        decoupled(Captured(), heads=[stiff], dynamic={"ids": [1]})


def test_scores_of_any_length_are_trained_and_left_early():
    net = sedona_fx.decouple(Summary(), (batch()[0], batch()[1][:, 0]), blocks=3, search="balanced", progress=False)
    inputs, ids = batch(13)
    net.backward(inputs, ids[:, 0])
    left = net.eval().early_exit(1.0)(**inputs)
    torch.testing.assert_close(left.output, net(**inputs))


def test_an_edited_plan_is_refused():
    plan = json.loads(decoupled(Captured()).plan.to_json())
    for change in ({"dim": -1}, {"least": "two"}, {"symbol": 3}, {"more": 1}):
        damaged = copy.deepcopy(plan)
        damaged["capture"]["free_sizes"][0].update(change)
        with pytest.raises(PlanError, match="a free size in the field 'capture'"):
            sedona_fx.Plan.from_json(json.dumps(damaged))
    assert FreeSize("ids", 1, "s0", 2).text == "2 or more"

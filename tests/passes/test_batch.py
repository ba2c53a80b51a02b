"""Where activations hold the batch: when a second size is tried, what it tells, and whose rows are whose."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from graphs import analysed, cut_names, node_of
from torch import Tensor, nn

import sedona_fx
from sedona_fx.data.args import Args
from sedona_fx.errors import HeadError
from sedona_fx.heads.rows import Rows
from sedona_fx.ir.graph import info
from sedona_fx.passes.row_order import Folded, row_orders


class Of(nn.Module):
    """Two linear layers of 6 with code of a test before, between and behind them."""

    def __init__(self, before, behind, between=None) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.before, self.between, self.behind = before, between or torch.tanh, behind

    def forward(self, x):
        return self.fc(self.behind(self.b(self.between(self.a(self.before(x))))))


def rows_behind(model: nn.Module, x: Tensor, site: str = "a") -> Rows | None:
    record = info(node_of(analysed(model, x).train, site))
    return record.rows if record.crossing else None


def tried(model: nn.Module, x: Tensor) -> bool:
    """Whether the model was traced for a second size."""
    return any(info(node).grown is not None for node in analysed(model, x).train.graph.nodes)


def mean_1(h):
    return h.mean(1)


X = torch.randn(4, 5, 6)

LAYOUTS = {
    "steps first": (lambda x: x.transpose(0, 1), lambda h: h.mean(0), X, Rows(1)),
    "by permute": (lambda x: x.permute(1, 0, 2), lambda h: h.mean(0), X, Rows(1)),
    "by movedim": (lambda x: x.movedim(0, 1), lambda h: h.sum(0), X, Rows(1)),
    "by swapaxes": (lambda x: x.swapaxes(0, 1), lambda h: h[-1], X, Rows(1)),
    "by einsum": (lambda x: torch.einsum("ntd->tnd", x), lambda h: h[0], X, Rows(1)),
    "by T": (lambda x: x.mT.mT.transpose(1, 0), lambda h: h.amax(0), X, Rows(1)),
    "as many steps": (lambda x: x.transpose(0, 1), lambda h: h.mean(0), torch.randn(5, 5, 6), Rows(1)),
    "as many steps, read": (lambda x: x.permute(1, 0, 2), lambda h: h[-1], torch.randn(5, 5, 6), Rows(1)),
    "batch of one": (lambda x: x.transpose(0, 1), lambda h: h.mean(0), torch.randn(1, 5, 6), Rows(1)),
    "flattened": (lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1), X, Rows(0, 5)),
    "reshaped": (lambda x: x.reshape(-1, 6), lambda h: h.view(-1, 5, 6).amax(1), X, Rows(0, 5)),
    "flattened, steps first": (
        lambda x: x.transpose(0, 1).reshape(-1, 6),
        lambda h: h.view(5, -1, 6).mean(0),
        X,
        Rows(0, 5, together=False),
    ),
    "of one example": (lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1), X[:1], Rows(0, 5)),
    "two views": (
        lambda x: torch.cat([x.mean(1), x.amax(1)]),
        lambda h: h.chunk(2)[0] - h.chunk(2)[1],
        X,
        Rows(0, 2, together=False),
    ),
    "stacked views": (
        lambda x: torch.stack([x.mean(1), x.amax(1), x.amin(1)]),
        lambda h: h.prod(0),
        X,
        Rows(1),
    ),
    "views in turn": (
        lambda x: torch.stack([x.mean(1), x.amax(1)], 1).flatten(0, 1),
        lambda h: h[::2] * h[1::2],
        X,
        Rows(0, 2),
    ),
    "pairs in the batch": (
        lambda x: x.mean(1),
        lambda h: h.split(h.shape[0] // 2)[0] - h.chunk(2)[1],
        X,
        Rows(0, 2, False),
    ),
    "pairs in turn": (lambda x: x.mean(1), lambda h: h.view(-1, 2, 6).sum(1), X, Rows(0, 2)),
    "steps of two views": (
        lambda x: torch.cat([x, x + 1]).transpose(0, 1),
        lambda h: h.mean(0).view(2, -1, 6).amax(0),
        X,
        Rows(1, 2, together=False),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rows_of_an_example_are_found(name):
    before, behind, x, wanted = LAYOUTS[name]
    assert rows_behind(Of(before, behind), x) == wanted
    assert rows_behind(Of(before, behind), x, "b") == wanted


PLAIN = {
    "vectors": (lambda x: x.mean(1), lambda h: h, X),
    "tokens": (lambda x: x, mean_1, X),
    "as many tokens": (lambda x: x, mean_1, torch.randn(5, 5, 6)),
    "as many features": (lambda x: x, mean_1, torch.randn(6, 5, 6)),
    "as many classes": (lambda x: x, mean_1, torch.randn(3, 5, 6)),
    "channels moved": (lambda x: x.permute(0, 2, 1).transpose(1, 2), lambda h: h[:, 0], torch.randn(5, 5, 6)),
    "scores": (lambda x: torch.einsum("ntd,nsd->nts", x, x) @ x, mean_1, X),
    "there and back": (lambda x: x.transpose(0, 1).cumsum(0).transpose(0, 1), mean_1, X),
}


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_is_tried_where_the_batch_is_first(name):
    before, behind, x = PLAIN[name]
    model = Of(before, behind)
    assert not tried(model, x)
    assert cut_names(analysed(model, x))[:1] == ["a"]


def test_convolutional_nets_with_as_many_channels_as_examples_do_not_pay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not tried(model.append(nn.Linear(8, 8)), torch.randn(8, 3, 8, 8))


def test_no_block_ends_where_rows_are_no_examples():
    """Features that cross all examples, and a graph that runs for one size only."""
    x = torch.randn(4, 6)
    mixed = Of(lambda x: x.repeat(1, 2).view(-1, 6), lambda h: h.view(-1, 2, 6).sum(1), lambda h: h @ h.t() @ h)
    assert cut_names(analysed(mixed, x))[:1] == ["a"]
    assert rows_behind(mixed, x, "b") is None  # every row depends on all examples
    total = Of(lambda x: x, lambda h: h, lambda h: h + h.mean(0, keepdim=True).relu())
    assert "a" in cut_names(analysed(total, x))


def test_orders_are_not_guessed():
    """An example without an effect, rows in an order of their own, examples that are all alike."""
    for order in (lambda h: h.flip(0), lambda h: h.roll(1, 0)):
        model = Of(lambda x: torch.cat([x, x]), lambda h: h.view(2, -1, 6).sum(0), order)
        assert rows_behind(model, torch.randn(3, 6), "a") is None  # the output's rows are other examples'
        assert rows_behind(model, torch.randn(3, 6), "b") is None
    folded = Of(lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1))
    graphs = analysed(folded, torch.zeros(4, 5, 6))
    assert info(node_of(graphs.train, "a")).rows == Rows(0, 5)  # floats are changed, not only exchanged
    values = {"a": Folded(0, 5), info(graphs.train.graph.output_node().all_input_nodes[0]).site: Folded(0, 1)}
    output = list(values)[1]
    found = row_orders(graphs.eval, Args(x=torch.zeros(4, 5, 6)), values, output=output, per_example=Fraction(1))
    assert found == {"a": True}
    nowhere = Of(lambda x: torch.cat([x, x]) * 0, lambda h: h.view(2, -1, 6).sum(0))
    assert rows_behind(nowhere, torch.randn(3, 6)) is None


def test_analysis_leaves_the_model_and_the_generators_as_they_were():
    class Noisy(Of):
        def __init__(self) -> None:
            super().__init__(lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1))
            self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

        def forward(self, x):
            return super().forward(self.drop(self.norm(x.flatten(0, 1))).view(-1, 5, 6))

    model = Noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y, state = torch.randint(0, 3, (4,)), torch.get_rng_state()
    net = sedona_fx.decouple(model, (X, y), cuts=["a"], heads="linear")
    assert all(torch.equal(value, before[name]) for name, value in net.original_state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.model.training
    assert repr(net.heads["0"].arrangement.activation) == repr(Rows(0, 5))


def test_frames_of_dense_outputs_are_averaged():
    """Heads give maps of as many sides as the activation has: five frames become one."""

    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

        def forward(self, x):
            return self.b(self.a(x.flatten(0, 1)).tanh()).unflatten(0, (-1, 5)).mean(1)

    x, y = torch.randn(2, 5, 2, 8, 8), torch.randn(2, 1, 8, 8)
    net = sedona_fx.decouple(Depth(), (x, y), cuts=["a"], loss=nn.functional.mse_loss)
    assert net.plan.heads == ("dense-2",)
    h, head = net.model.a(x.flatten(0, 1)), net.heads["0"]
    by_hand = head.head(h.unflatten(0, (2, 5)).mean(1))
    torch.testing.assert_close(net.losses(x, y)[0], nn.functional.mse_loss(by_hand, y))


def test_heads_of_the_user_get_the_batch_first():
    seen = []

    class Own(nn.Module):
        def __init__(self, context: sedona_fx.HeadContext) -> None:
            super().__init__()
            seen.append((context.shape, context.output_shape, context.channels, context.positions))
            self.fc = nn.Linear(context.channels, context.output_shape[1])

        def forward(self, h):
            return self.fc(h[:, 0])

    model = Of(lambda x: x.transpose(0, 1), lambda h: h.mean(0))
    pair = (X, torch.randint(0, 3, (4,)))
    net = sedona_fx.decouple(model, pair, cuts=["a"], heads=[Own])
    assert seen[-1] == ((4, 5, 6), (4, 3), 6, (5,))
    h = net.model.a(X.transpose(0, 1))
    own = net.heads["0"].head
    torch.testing.assert_close(net.losses(*pair)[0], nn.functional.cross_entropy(own.fc(h[0]), pair[1]))

    class Wrong(Own):
        def forward(self, h):
            return self.fc(h[0])

    with pytest.raises(HeadError, match=r"Wrong.*turns \(4, 5, 6\) into \(5, 3\), but .*\(4, 3\)"):
        sedona_fx.decouple(model, pair, cuts=["a"], heads=[Wrong])


def test_objectives_of_the_user_get_the_batch_first():
    model = Of(lambda x: x.transpose(0, 1), lambda h: h.mean(0))
    pair = (X, torch.randint(0, 3, (4,)))
    shapes = []

    def loss(h, inputs, target):
        shapes.append(tuple(h.shape))
        return (h - inputs["x"]).square().mean()

    net = sedona_fx.decouple(model, pair, cuts=["a"], local_loss=sedona_fx.LocalLoss(loss))
    h = net.model.a(X.transpose(0, 1))
    torch.testing.assert_close(net.losses(*pair)[0], (h.transpose(0, 1) - X).square().mean())
    assert shapes[-1] == (4, 5, 6)

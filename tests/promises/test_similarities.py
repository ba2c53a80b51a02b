"""Outputs that hold every example against every other: no head can give them, and what can be done is said."""

import copy

import pytest
import torch
from layouts import Layers, Siamese, noise
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import HeadError


class Towers(nn.Module):
    """Two encoders of two inputs, and the similarities of all pairs, (N, N)."""

    def __init__(self, similarities=None) -> None:
        super().__init__()
        layers = (nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]) for _ in range(2))
        self.a, self.b = layers
        self.similarities = similarities or (lambda a, b: a @ b.t())

    def forward(self, x, y):
        return self.similarities(self.a(x), self.b(y))


class Views(Layers):
    """Two views of every example in one batch, and the similarities of all of them, (2N, 2N)."""

    def forward(self, a, b):
        h = self.through(torch.cat([a, b]))
        h = F.normalize(h, dim=1)
        return h @ h.t() / 0.2


def of_views(logits: Tensor, target: object) -> Tensor:
    """SimCLR's loss: the other view of an example is its class, an example itself is none."""
    n = len(logits) // 2
    return F.cross_entropy(logits.masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e9), torch.arange(2 * n).roll(n))


PAIR = ((noise(4, 6), noise(4, 6, seed=5)), torch.arange(4))
GROWS = (
    r"behind 'a.0'.*the output \(4, 4\) \(the output is \(4, 4\) for a batch, and \(12, 12\) for one three times as "
    r"large: dimensions 0 and 1 grow with the batch.*"
    r'local_loss=sedona_fx.LocalLoss\(lambda e, inputs, target: loss\(e @ e.t\(\), target\), head="embedding"\)'
)


@pytest.mark.parametrize(
    "similarities",
    [
        lambda a, b: a @ b.t(),
        lambda a, b: a.mm(b.T),
        lambda a, b: torch.matmul(a, b.transpose(0, 1)) * 10,
        lambda a, b: torch.einsum("nd,md->nm", a, b),
        lambda a, b: F.linear(a, b),
        lambda a, b: -torch.cdist(a, b),
        lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=2),
        lambda a, b: (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1),
    ],
)
def test_similarities_are_no_classes(similarities):
    with pytest.raises(HeadError, match=GROWS):
        sedona_fx.decouple(Towers(similarities).double(), PAIR, cuts=["a.0"])
    for heads in ("linear", "tokens-2"):
        with pytest.raises(HeadError, match=f"head '{heads}' cannot stand behind 'a.0': the output is .* None fits"):
            sedona_fx.decouple(Towers(similarities).double(), PAIR, cuts=["a.0"], heads=heads)
    for search in ("balanced", "guided"):
        with pytest.raises(HeadError, match=r"no built-in head fits.*dimensions 0 and 1 grow with the batch"):
            sedona_fx.decouple(Towers(similarities).double(), [PAIR] * 3, blocks=2, search=search, progress=False)


def test_as_many_features_as_examples():
    pair = (noise(6, 6), noise(6, 6, seed=5)), torch.arange(6)
    with pytest.raises(HeadError, match=r"\(6, 6\) for a batch, and \(18, 18\).*grow with the batch"):
        sedona_fx.decouple(Towers().double(), pair, cuts=["a.0"])


def test_the_line_of_the_message_trains():
    """Blocks learn by their own similarities: the gradient is the one of the same code on the model itself."""
    loss, torch_model = F.cross_entropy, Towers().double()
    net = sedona_fx.decouple(
        torch_model,
        PAIR,
        cuts=["a.0", "a.1"],
        loss=loss,
        local_loss=sedona_fx.LocalLoss(lambda e, inputs, target: loss(e @ e.t(), target), head="embedding"),
    )
    assert net.plan.heads == ("embedding", "embedding")
    model, heads = copy.deepcopy((torch_model, net.heads))
    h = model.a[0](PAIR[0][0])
    e = heads["0"](h)
    assert e.shape == (4, 128)
    wanted = [loss(e @ e.t(), PAIR[1])]
    e = heads["1"](model.a[1](h.detach()))
    wanted.append(loss(e @ e.t(), PAIR[1]))
    wanted.append(loss(model.a[2](model.a[1](h).detach()) @ model.b(PAIR[0][1]).t(), PAIR[1]))
    torch.testing.assert_close(net.losses(*PAIR), [w.detach() for w in wanted])
    net.backward(*PAIR)
    sum(wanted).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name).grad, p.grad)
    greedy = sedona_fx.train.Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for size in (4, 9):
        batch = (noise(size, 6), noise(size, 6, seed=5))
        first = greedy.step(batch, torch.arange(size)).losses
        for _ in range(20):
            last = greedy.step(batch, torch.arange(size)).losses
        assert all(after < before for before, after in zip(first, last, strict=True))


def test_two_views_in_one_batch_learn_by_the_same_loss():
    inputs = Siamese.inputs
    with pytest.raises(HeadError, match=r"\(8, 8\) for a batch, and \(24, 24\) for one three times as large"):
        sedona_fx.decouple(Views().double(), (inputs, None), cuts=["l.0"], loss=of_views)
    objective = sedona_fx.LocalLoss(lambda e, inputs, target: of_views(e @ e.t(), target), head="embedding")
    model = Views().double()
    net = sedona_fx.decouple(model, (inputs, None), cuts=["l.0"], loss=of_views, local_loss=objective)
    e = copy.deepcopy(net.heads["0"])(model.l[0](torch.cat(inputs)))
    assert e.shape == (8, 128)  # both views of an example have a row, in the order that the loss knows
    torch.testing.assert_close(net.losses(inputs, None)[0], of_views(e @ e.t(), None))


def test_without_heads_similarities_are_trained_as_ever():
    model = Towers().double()
    net = sedona_fx.decouple(model, PAIR, blocks=3, search="balanced", heads=False)
    assert len(net.plan.cuts) == 2
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(*PAIR[0]), PAIR[1]).backward()
    sedona_fx.train.Backprop(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(*PAIR)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(net.model.get_parameter(name), p.detach() - 0.1 * p.grad)


def test_a_head_of_the_user_may_give_similarities():
    class Own(nn.Module):
        def __init__(self, context: sedona_fx.HeadContext) -> None:
            super().__init__()
            self.fc = nn.Linear(context.channels, 5)

        def forward(self, h):
            e = self.fc(h)
            return e @ e.t()

    net = sedona_fx.decouple(Towers().double(), PAIR, cuts=["a.0"], heads=[Own])
    assert all(loss.isfinite() for loss in net.backward(*PAIR).losses)
    more = (noise(7, 6), noise(7, 6, seed=5))
    assert net.backward(more, torch.arange(7)).losses[0].isfinite()


def test_an_output_without_rows_of_examples():
    """Correlations of features (Barlow Twins), and as many features as examples."""

    def decorrelate(output, target):
        return (output - torch.eye(len(output))).square().sum()

    for size in (4, 6):
        model = Towers(lambda a, b: a.t() @ b / 4).double()
        pair = (noise(size, 6), noise(size, 6, seed=5)), None
        with pytest.raises(HeadError, match=r"\(6, 6\) for a batch, and \(6, 6\) .* no rows of examples.*LocalLoss"):
            sedona_fx.decouple(model, pair, cuts=["a.0"], loss=decorrelate)
        own = sedona_fx.LocalLoss(lambda e, inputs, target: decorrelate(e.t() @ e / 4, target), head="embedding")
        net = sedona_fx.decouple(model, pair, cuts=["a.0"], loss=decorrelate, local_loss=own)
        e = copy.deepcopy(net.heads["0"])(model.a[0](pair[0][0]))
        torch.testing.assert_close(net.losses(*pair)[0], decorrelate(e.t() @ e / 4, None))

"""Models that do not have the batch in dimension 0 from end to end, against PyTorch with detach written by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import HeadError


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, count: int = 3) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(2))


def encoder_layer(batch_first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)


class Layers(nn.Module):
    """Four linear layers of 6 features and an output of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.fc = nn.Linear(6, 3)

    cuts: tuple[str, ...] = ("l.0", "l.2")

    @classmethod
    def body(cls, m, h):
        """Yield the activation behind every cut, and let it enter the next block detached."""
        h = m.l[0](h)
        yield h
        h = m.l[2](m.l[1](h.detach().tanh()).tanh())
        yield h
        yield m.l[3](h.detach().tanh())

    def forward(self, x):
        return self.out(self.through(self.into(x)))

    def through(self, h):
        for k, layer in enumerate(self.l):
            h = layer(h)
            h = h.tanh() if k < 3 else h
        return h

    @classmethod
    def by_hand(cls, m, heads, inputs, y):
        first, second, last = cls.body(m, m.into(*inputs))
        outputs = [cls.head(heads["0"], first, inputs), cls.head(heads["1"], second, inputs), m.out(last)]
        return [cls.loss(output, y) for output in outputs]

    loss = staticmethod(F.cross_entropy)


class StepsFirst(nn.Module):
    """Transformer layers that have the steps first, between a batch-first embedding and a batch-first output."""

    cuts = ("l.0", "l.1", "l.2", "l.3", "l.4")
    loss = staticmethod(F.cross_entropy)
    inputs = (torch.randint(0, 16, (4, 7), generator=torch.Generator().manual_seed(3)),)
    target = classes(4)

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(16, 8)
        self.l = nn.ModuleList(encoder_layer() for _ in range(6))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        h = self.e(x).transpose(0, 1)
        for layer in self.l:
            h = layer(h)
        return self.fc(h.mean(0))

    @classmethod
    def by_hand(cls, m, heads, inputs, y):
        h, losses = m.e(inputs[0]).transpose(0, 1), []
        for k in range(5):
            h = m.l[k](h)
            losses.append(F.cross_entropy(heads[str(k)].head(h.transpose(0, 1)), y))
            h = h.detach()
        return [*losses, F.cross_entropy(m.fc(m.l[5](h).mean(0)), y)]


class AsManySteps(StepsFirst):
    """As many steps as examples: the shapes alone do not tell one from the other."""

    inputs = (torch.randint(0, 16, (5, 5), generator=torch.Generator().manual_seed(3)),)
    target = classes(5)


class Recurrent(nn.Module):
    """LSTMs as they are by default, and the last step's features."""

    cuts = (":getitem", ":getitem#2")
    loss = staticmethod(F.cross_entropy)
    inputs, target = (noise(4, 6, 5),), classes(4)

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.ModuleList([nn.LSTM(5, 6), nn.LSTM(6, 6), nn.LSTM(6, 6)])
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        h = x.permute(1, 0, 2)
        for layer in self.r:
            h, _ = layer(h)
        return self.fc(h[-1])

    @classmethod
    def by_hand(cls, m, heads, inputs, y):
        h = m.r[0](inputs[0].permute(1, 0, 2))[0]
        first = F.cross_entropy(heads["0"].head(h.transpose(0, 1)), y)
        h = m.r[1](h.detach())[0]
        second = F.cross_entropy(heads["1"].head(h.transpose(0, 1)), y)
        return [first, second, F.cross_entropy(m.fc(m.r[2](h.detach())[0][-1]), y)]


class InputsStepsFirst(Layers):
    """The inputs themselves have the steps first."""

    inputs, target = (noise(7, 4, 6),), classes(4)

    def into(self, x):
        return x

    def out(self, h):
        return self.fc(h.mean(0))

    @staticmethod
    def head(head, h, inputs):
        return head.head(h.transpose(0, 1))


class Siamese(Layers):
    """Two inputs in one batch: rows of a pair are N apart."""

    inputs, target = (noise(4, 6), noise(4, 6, seed=5)), classes(4)

    def forward(self, a, b):
        return self.out(self.through(self.into(a, b)))

    def into(self, a, b):
        return torch.cat([a, b])

    def out(self, h):
        a, b = h.chunk(2)
        return self.fc((a - b).abs())

    @staticmethod
    def head(head, h, inputs):
        return head.head(torch.stack(h.chunk(2), 1))


class Triplets(Siamese):
    """Rows of a triplet lie next to each other."""

    inputs = (noise(4, 6), noise(4, 6, seed=5), noise(4, 6, seed=6))

    def forward(self, a, b, c):
        return self.out(self.through(self.into(a, b, c)))

    def into(self, a, b, c):
        return torch.stack([a, b, c], 1).flatten(0, 1)

    def out(self, h):
        return self.fc(h.unflatten(0, (-1, 3)).prod(1))

    @staticmethod
    def head(head, h, inputs):
        return head.head(h.unflatten(0, (4, 3)))


class DeepSet(Layers):
    """Sets of seven, whose members are embedded one by one."""

    inputs, target = (noise(4, 7, 6),), classes(4)

    def into(self, x):
        return x.reshape(-1, 6)

    def out(self, h):
        return self.fc(h.view(-1, 7, 6).sum(1))

    @staticmethod
    def head(head, h, inputs):
        return head.head(h.unflatten(0, (4, 7)))


class EachMember(DeepSet):
    """A class for every member of every set, in one long output: nothing needs to be unfolded."""

    target = classes(28)

    def out(self, h):
        return self.fc(h)

    @staticmethod
    def head(head, h, inputs):
        return head(h)


class EachStep(Layers):
    """A class for every step, in one long output, of activations that have the batch first."""

    inputs, target = (noise(4, 7, 6),), classes(28)

    def into(self, x):
        return x

    def out(self, h):
        return self.fc(h).view(-1, 3)

    @staticmethod
    def head(head, h, inputs):
        return head.head(h).flatten(0, 1)


class EachStepFirst(EachStep):
    """A class for every step, with the steps first."""

    def into(self, x):
        return x.transpose(0, 1)

    def out(self, h):
        return self.fc(h)

    @staticmethod
    def head(head, h, inputs):
        return head.head(h.transpose(0, 1)).transpose(0, 1)

    @staticmethod
    def loss(output, y):
        return F.cross_entropy(output.flatten(0, 1), y)


class PairsInTheBatch(Layers):
    """The batch itself holds pairs, first all left ones: half as many rows come out."""

    inputs, target = (noise(8, 6),), classes(4)

    def into(self, x):
        return x

    def out(self, h):
        a, b = h.chunk(2)
        return self.fc(a * b)

    @staticmethod
    def head(head, h, inputs):
        return head.head(torch.stack(h.chunk(2), 1))


class Frames(nn.Module):
    """Five frames an example, folded into the batch of a convolutional net."""

    cuts, loss = (":relu", ":relu#2"), staticmethod(F.cross_entropy)
    inputs, target = (noise(4, 5, 2, 8, 8),), classes(4)

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.ModuleList([nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        h = x.flatten(0, 1)
        for layer in self.c:
            h = layer(h).relu()
        return self.out(h.mean((2, 3)).unflatten(0, (x.shape[0], x.shape[1])))

    def out(self, h):
        return self.fc(h.mean(1))

    @staticmethod
    def head(head, h):
        return head.head(h.unflatten(0, (4, 5)).movedim(1, 2))

    @classmethod
    def by_hand(cls, m, heads, inputs, y):
        h = m.c[0](inputs[0].flatten(0, 1)).relu()
        first = cls.loss(cls.head(heads["0"], h), y)
        h = m.c[1](h.detach()).relu()
        second = cls.loss(cls.head(heads["1"], h), y)
        h = m.c[2](h.detach()).relu().mean((2, 3)).unflatten(0, (4, 5))
        return [first, second, cls.loss(m.out(h), y)]


class EveryFrame(Frames):
    """A class for every frame, of a net that has them in the batch: (N * F, 3)."""

    target = classes(20)

    def out(self, h):
        return self.fc(h).flatten(0, 1)

    @staticmethod
    def head(head, h):
        return head(h)


KINDS = (
    *(StepsFirst, AsManySteps, Recurrent, InputsStepsFirst, Siamese, Triplets, DeepSet, EachMember, EachStep),
    *(EachStepFirst, PairsInTheBatch, Frames, EveryFrame),
)


def made(kind: type, **how: object) -> tuple[nn.Module, sedona_fx.Net]:
    torch.manual_seed(0)
    model = kind().double()
    pair = (kind.inputs if len(kind.inputs) > 1 else kind.inputs[0], kind.target)
    return model, sedona_fx.decouple(model, pair, loss=kind.loss, cuts=list(kind.cuts), **how)


def assert_gradients_by_hand(kind: type, model: nn.Module, net: sedona_fx.Net, inputs=None, target=None) -> None:
    inputs, target = inputs or kind.inputs, kind.target if target is None else target
    model, heads = copy.deepcopy(model), copy.deepcopy(net.heads)
    wanted = kind.by_hand(model, heads, inputs, target)
    sum(wanted).backward()
    net.zero_grad()
    result = net.backward(inputs if len(inputs) > 1 else inputs[0], target)
    torch.testing.assert_close(result.losses, [loss.detach() for loss in wanted], rtol=1e-12, atol=0)
    pairs = [(p, net.model.get_parameter(name)) for name, p in model.named_parameters()]
    pairs += list(zip(heads.parameters(), net.heads.parameters(), strict=True))
    for ours, parameter in pairs:
        assert (ours.grad is None) == (parameter.grad is None)
        if ours.grad is not None:
            assert (parameter.grad - ours.grad).norm() <= 1e-11 * ours.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_heads_that_see_examples(kind):
    model, net = made(kind)
    assert torch.equal(net(*kind.inputs), model(*kind.inputs))
    assert_gradients_by_hand(kind, model, net)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_net_comes_back(kind, tmp_path):
    model, net = made(kind)
    net.save(tmp_path)
    torch.manual_seed(1)
    again = sedona_fx.load(tmp_path, kind().double(), loss=kind.loss)
    assert [repr(head) for head in again.heads.values()] == [repr(head) for head in net.heads.values()]
    assert_gradients_by_hand(kind, model, again)


def twice(kind: type) -> tuple[object, Tensor]:
    """Return the inputs and the target with every example twice, the second time next to the first."""
    inputs = [x.repeat_interleave(2, 1 if kind is InputsStepsFirst else 0) for x in kind.inputs]
    rows, steps_first = len(kind.target) // 4, kind is EachStepFirst
    target = kind.target.view(-1, 4) if steps_first else kind.target.view(-1, max(rows, 1))
    return tuple(inputs) if len(inputs) > 1 else inputs[0], target.repeat_interleave(2, int(steps_first)).flatten()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_another_size(kind):
    """Every example twice: the mean of the losses is what it was."""
    _, net = made(kind)
    inputs = kind.inputs if len(kind.inputs) > 1 else kind.inputs[0]
    torch.testing.assert_close(net.losses(*twice(kind)), net.losses(inputs, kind.target), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", [StepsFirst, Siamese, EachStep, Frames])
def test_a_greedy_step_is_that_of_the_gradients(kind):
    _, net = made(kind)
    inputs = kind.inputs if len(kind.inputs) > 1 else kind.inputs[0]
    net.backward(inputs, kind.target)
    wanted = {name: p.detach() - 0.1 * p.grad for name, p in net.model.named_parameters() if p.grad is not None}
    net.zero_grad()
    sedona_fx.train.Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(inputs, kind.target)
    for name, value in wanted.items():
        torch.testing.assert_close(net.model.get_parameter(name).detach(), value, rtol=1e-10, atol=1e-13)


def test_a_search_cuts_between_the_layers_that_have_the_steps_first():
    _, net = made(StepsFirst)
    searched = sedona_fx.decouple(StepsFirst(), (StepsFirst.inputs[0], StepsFirst.target), blocks=4, search="balanced")
    assert list(searched.plan.cuts) == ["l.0", "l.1", "l.3"]
    assert set(searched.plan.base_layers) >= {f"l.{k}" for k in range(5)}
    assert len(net.blocks) == 6


@pytest.mark.parametrize("search", ["guided", "rollout"])
def test_searches_that_train(search):
    pair = (StepsFirst.inputs[0], StepsFirst.target)
    settings = {"guided": sedona_fx.search.Guided(training_steps=8), "rollout": sedona_fx.search.Rollout(steps=4)}
    net = sedona_fx.decouple(StepsFirst(), [pair, pair, pair], blocks=3, search=settings[search], progress=False)
    assert len(net.plan.cuts) == 2
    assert net.backward(*pair).losses[0].isfinite()


# ---- outputs that hold every example against every other ------------------------------------------------------------


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

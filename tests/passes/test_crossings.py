"""Several activations at a cut, and parameters of several blocks, against code with detach written by hand."""

import pytest
import torch
from graphs import analysed
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import CutError
from sedona_fx.ir.graph import info
from sedona_fx.passes import partition, relax
from sedona_fx.passes.cuts import possible


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.fc = nn.Linear(6, 3)
        self.table = nn.Parameter(torch.randn(6))


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


class LongSkip(Layers):
    """A value of the first block is read by the third and by the last."""

    def forward(self, x):
        s = self.a(x).tanh()
        h = self.b(s).sin()
        t = self.c(h).tanh() * s
        return self.fc(self.d(t).tanh() + s + h)

    @staticmethod
    def by_hand(m, heads, x, y):
        s = m.a(x).tanh()
        first = F.cross_entropy(heads["0"](s), y)
        s = s.detach()
        h = m.b(s).sin()
        second = F.cross_entropy(heads["1"](h), y)
        h = h.detach()
        t = m.c(h).tanh() * s
        third = F.cross_entropy(heads["2"](t), y)
        return [first, second, third, F.cross_entropy(m.fc(m.d(t.detach()).tanh() + s + h), y)]

    cuts = (":tanh", ":sin", ":mul")
    crossing = (1, 2, 3)


class ViewOfTheBoundary(Layers):
    """What crosses is read as it is, through a view, and overwritten behind the cut."""

    def forward(self, x):
        h = self.a(x).tanh()
        v = h.view(-1, 2, 3)
        k = self.b(h).tanh()
        w = v.sum(2).repeat(1, 3)
        k += w
        k[:, 0] = 2.0
        return self.fc(k.relu_() + self.c(k))

    @staticmethod
    def by_hand(m, heads, x, y):
        h = m.a(x).tanh()
        first = F.cross_entropy(heads["0"](h), y)
        h = h.detach()
        b = m.b(h)
        second = F.cross_entropy(heads["1"](b), y)
        k = b.detach().tanh() + h.view(-1, 2, 3).sum(2).repeat(1, 3)
        k = torch.cat([torch.full_like(k[:, :1], 2.0), k[:, 1:]], 1).relu()
        third = F.cross_entropy(heads["2"](k), y)
        k = k.detach()
        return [first, second, third, F.cross_entropy(m.fc(k + m.c(k)), y)]

    cuts = (":tanh", "b", ":relu_")
    crossing = (1, 2, 1)


class TakenApart(Layers):
    """Only a part of a tuple goes through the next block."""

    def forward(self, x):
        p, q, r = (self.a(x).tanh() * 2).chunk(3, 1)
        h = self.b(torch.cat([p, p, p], 1)).tanh()
        g = self.c(h) * torch.cat([r, r, r], 1)
        return self.fc(self.d(g).tanh() + torch.cat([q, r, q], 1))

    @staticmethod
    def by_hand(m, heads, x, y):
        p, q, r = (m.a(x).tanh() * 2).chunk(3, 1)
        h = m.b(torch.cat([p, p, p], 1)).tanh()
        first = F.cross_entropy(heads["0"](h), y)
        h, q, r = h.detach(), q.detach(), r.detach()
        g = m.c(h) * torch.cat([r, r, r], 1)
        second = F.cross_entropy(heads["1"](g), y)
        return [first, second, F.cross_entropy(m.fc(m.d(g.detach()).tanh() + torch.cat([q, r, q], 1)), y)]

    cuts = (":tanh#2", ":mul#2")
    crossing = (2, 2)  # the parts of the tuple are one piece of memory


class PositionBias(Layers):
    """What is made of parameters alone in the first block is carried on, detached."""

    def forward(self, x):
        bias = self.table.exp()
        h = self.a(x + bias).tanh()
        h = self.b(h).tanh() + bias
        return self.fc(self.c(h) + bias)

    @staticmethod
    def by_hand(m, heads, x, y):
        bias = m.table.exp()
        h = m.a(x + bias).tanh()
        first = F.cross_entropy(heads["0"](h), y)
        bias = bias.detach()
        h = m.b(h.detach()).tanh() + bias
        second = F.cross_entropy(heads["1"](h), y)
        return [first, second, F.cross_entropy(m.fc(m.c(h.detach()) + bias), y)]

    cuts = (":tanh", ":add#2")
    crossing = (1, 1)


class Tied(Layers):
    """One weight in three blocks, once as a module's and once read by itself; one module in two blocks."""

    def __init__(self):
        super().__init__()
        self.c.weight = self.a.weight

    def forward(self, x):
        h = self.b(self.a(x).tanh()).sin()
        h = self.b(self.c(h)).tanh()
        return self.fc(h @ self.a.weight)

    @staticmethod
    def by_hand(m, heads, x, y):
        h = m.b(m.a(x).tanh()).sin()
        first = F.cross_entropy(heads["0"](h), y)
        h = m.b(m.c(h.detach())).tanh()
        second = F.cross_entropy(heads["1"](h), y)
        return [first, second, F.cross_entropy(m.fc(h.detach() @ m.a.weight), y)]

    cuts = (":sin", ":tanh#2")
    crossing = (1, 1)


KINDS = (LongSkip, ViewOfTheBoundary, TakenApart, PositionBias, Tied)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_with_detach_written_by_hand(kind):
    (x, y), model = pair(), kind().double()
    graph = analysed(model, x).train.graph
    assert tuple(info(possible(graph)[cut]).crossing for cut in kind.cuts) == kind.crossing
    net = sedona_fx.decouple(model, (x, y), cuts=list(kind.cuts), heads="tokens-1")
    assert torch.equal(net(x.clone()), model(x.clone()))
    losses = net.losses(x, y)
    result = net.backward(x, y)
    heads = net.heads
    wanted = kind.by_hand(model, heads, x, y)
    theirs = list(heads.parameters())
    reference = torch.autograd.grad(sum(wanted), [*model.parameters(), *theirs], allow_unused=True)
    for found in (losses, result.losses):
        torch.testing.assert_close(found, [w.detach() for w in wanted], rtol=1e-13, atol=0)
    ours = [*(net.model.get_parameter(name) for name, _ in model.named_parameters()), *theirs]
    for parameter, gradient in zip(ours, reference, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert (parameter.grad - gradient).norm() <= 1e-12 * gradient.norm()
    net.zero_grad()
    lowered = net.graph_module(x)  # the same as one graph
    total = sum(F.cross_entropy(output, y) for output in lowered)
    found = torch.autograd.grad(total, ours, allow_unused=True)
    for gradient, expected in zip(found, reference, strict=True):
        assert (gradient is None) == (expected is None)
        assert gradient is None or (gradient - expected).norm() <= 1e-12 * expected.norm()
    assert net.inference_module()(x).equal(model.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_weight_is_stepped_once_with_the_sum(kind):
    (x, y), model = pair(), kind().double()
    net = sedona_fx.decouple(model, (x, y), cuts=list(kind.cuts), heads="tokens-1")
    net.backward(x, y)
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    wanted = {name: before[name] - 0.5 * p.grad for name, p in net.model.named_parameters() if p.grad is not None}
    net.zero_grad()
    schedule = sedona_fx.train.Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    schedule.step(x, y)
    if kind is Tied:  # a later block reads the weight as it was: all of them run before the owner steps it
        assert len(schedule.parameters[0]) == 1 + 4  # a.bias and the head's
    for name, value in wanted.items():
        torch.testing.assert_close(net.model.get_parameter(name).detach(), value, rtol=1e-12, atol=1e-14)


def test_the_report_names_shared_parameters():
    net = sedona_fx.decouple(Tied().double(), pair(), cuts=list(Tied.cuts), heads="tokens-1")
    assert "a.weight in blocks 0, 1, 2" in str(net)
    assert "b.weight in blocks 0, 1" in str(net)


def test_relaxed_graph_lets_all_that_crosses_through_its_split_points():
    x, _ = pair()
    graphs = analysed(LongSkip().double(), x)
    for name in LongSkip.cuts:
        info(possible(graphs.train.graph)[name]).cut = name
    relaxed = relax(graphs.train, {name: [nn.Linear(6, 3).double()] for name in LongSkip.cuts})
    splits = [n for n in relaxed.graph.nodes if str(n.target).startswith("sedona_split_points")]
    assert [len(n.args) for n in splits] == [1, 2, 3]
    *_, output = relaxed(x)
    assert torch.equal(output, LongSkip().double()(x))
    blocks = partition(relaxed)
    assert [len(b.live_exports) for b in blocks] == [1, 1, 1, 0]
    values = {"x": x}
    for block in blocks:
        exports, local = block.module(*[values[name] for name in block.inputs])
        values |= dict(zip(block.exports, exports, strict=True))
    assert torch.equal(local, output)


def test_as_few_activations_cross_as_give_the_blocks_asked_for():
    x, y = pair()

    class Dense(Layers):
        def forward(self, x):
            h = self.a(x).tanh()
            h2 = self.b(h).tanh()
            h3 = self.c(torch.cat([h[:, :3], h2[:, 3:]], 1)).tanh()
            return self.fc(self.d(h3 + h2 + h).tanh() + h + h2 + h3)

    model = Dense().double()
    assert sedona_fx.decouple(model, (x, y), blocks=2, search="uniform").plan.cuts == (":tanh",)
    net = sedona_fx.decouple(model, (x, y), blocks=4, search="uniform")
    assert [info(possible(net.graph_module.graph)[cut]).crossing for cut in net.plan.cuts] == [1, 2, 3]
    with pytest.raises(sedona_fx.errors.CutError, match="6 blocks need 5 cuts"):
        sedona_fx.decouple(model, (x, y), blocks=6, search="uniform", max_live=1)


def test_no_cut_and_cuts_at_the_beginning():
    (x, y), inner = pair(), nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    legal = list(possible(analysed(model, x).train.graph))
    assert legal == ["0", "1.0", "1.1", "1.2", "1", "2", "3"]
    net = sedona_fx.decouple(model, (x, y), blocks=4, search="uniform", no_cut=["1"])
    assert net.plan.cuts == ("0", "1", "3")  # behind the tanh, which belongs to the layer before it
    net = sedona_fx.decouple(model, (x, y), cuts={"1": "beginning", "1.2": "beginning", "2": "end"})
    assert net.plan.cuts == ("0", "1.1", "2")
    net.backward(x, y)


class Ticks(nn.Module):
    """Counts in a tensor of its host's."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        level.add_(0.25)
        return x


class ReadsByName(Layers):
    """A counter of the root ticked in a module without a weight, and a buffer read in two blocks."""

    def __init__(self):
        super().__init__()
        self.tick = Ticks()
        self.register_buffer("level", torch.zeros(1))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        h = self.a(x)
        h = self.tick(h, self.level) * self.scale
        h = self.b(h).tanh() * self.scale
        return {"logits": self.fc(h), "extra": h.detach() + h}


@pytest.mark.parametrize("cuts", [["a"], ["b"], [":mul"], ["a", "b"]])
def test_blocks_read_and_write_the_models_own_buffers(cuts):
    (x, y), model = pair(), ReadsByName().double()
    net = sedona_fx.decouple(
        model, (x, y), cuts=cuts, heads="tokens-1", loss=lambda o, y: F.cross_entropy(o["logits"], y)
    )
    for expected in (0.25, 0.5):
        net.backward(x, y)
        assert net.model.level.item() == expected
    assert net.losses(x, y)[-1].item() == F.cross_entropy(model(x)["logits"], y).item()


def second_output(o: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(o[0], y)


class HalfUsed(Layers):
    """One part of a tuple leads to the output, another part only to a second output, a third nowhere."""

    def forward(self, x):
        p, q, r = self.a(x).chunk(3, 1)
        r.relu()
        return self.fc(self.b(torch.cat([p, p, p], 1)).tanh()), q.sin()


class ReadTwiceLate(Layers):
    """Two activations, each read by two nodes of a second output."""

    def forward(self, x):
        h, k = self.a(x), self.b(x)
        e = h + k
        e = e + k * h
        return self.fc(self.c(h * k).tanh()), e


@pytest.mark.parametrize(("kind", "cuts"), [(HalfUsed, ["b"]), (ReadTwiceLate, ["c"]), (ReadTwiceLate, [":mul#2"])])
def test_second_outputs_hide_nothing(kind, cuts):
    (x, y), model = pair(), kind().double()
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, heads="tokens-1", loss=second_output)
    for found, expected in zip(net.backward(x, y).output, model(x), strict=True):
        assert torch.equal(found, expected)


class Probe(Layers):
    """A classifier on detached features, which the second output trains."""

    legal = ("a", ":tanh", "b", ":sin")

    def forward(self, x):
        features = self.b(self.a(x).tanh()).sin()
        return self.fc(self.d(self.c(features.detach()).tanh()).tanh()), features


class Gate(Layers):
    """A mask, which has no gradient, is made of features, which the second output trains."""

    legal = ("a", ":tanh", "b", ":sin", "c", ":tanh#2")

    def forward(self, x):
        features = self.b(self.a(x).tanh()).sin()
        gated = self.c(x).tanh() * (features > 0)
        return self.fc(self.d(gated).tanh()), features


class Refined(Layers):
    """A guess, and a better one by the same weights, which hears of the first without a gradient, as RAFT iterates."""

    legal = ("a", ":tanh", "b", ":add")

    def forward(self, x):
        features = self.a(x).tanh()
        guess = self.b(features)
        better = self.b(features + self.c(guess.detach()))
        return self.fc(self.d(better).tanh()), guess


@pytest.mark.parametrize("kind", [Probe, Gate, Refined])
def test_no_block_ends_where_weights_in_front_would_get_no_gradient(kind):
    model, (x, y) = kind().double(), pair()

    def loss(output, target):
        scores, features = output  # heads have no features
        return F.cross_entropy(scores, target) + (0 if features is None else features.square().sum())

    places = possible(analysed(model, x).train.graph)
    assert tuple(places) == kind.legal
    for name in places:
        net = sedona_fx.decouple(model, (x, y), loss=loss, heads="tokens-1", cuts=[name], output=0)
        net.backward(x, y)
        assert {n for n, p in net.model.named_parameters() if p.grad is None} == {"table"}, name
    with pytest.raises(CutError, match=r"'d'.* weights in front of it would get no gradient"):
        sedona_fx.decouple(model, (x, y), loss=loss, heads="tokens-1", cuts=["d"], output=0)


class Overwritten(nn.Module):
    """A weight reads an activation right before it is overwritten, and what trains it goes by another way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(16, 3)
        self.shift = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        h = self.b(self.a(x).tanh())
        shifted = h + self.shift[0]
        h = h.relu_()
        return self.out(torch.cat([h.detach(), shifted.sin()], 1))


def test_what_reads_before_a_write_belongs_to_the_block_that_writes():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    places = possible(analysed(Overwritten(), x).train.graph)
    assert "relu_" not in " ".join(places)
    for name in places:
        net = sedona_fx.decouple(Overwritten(), (x, y), cuts=[name], heads="linear")
        net.backward(x, y)
        assert all(parameter.grad is not None for parameter in net.model.parameters()), name

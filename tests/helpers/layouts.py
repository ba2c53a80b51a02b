"""Models that do not have the batch in dimension 0 from end to end, and what their blocks give, written by hand.

Each has ``inputs``, a ``target``, a ``loss``, the names of its ``cuts``, and ``outputs_by_hand(heads)``: the outputs of
the heads and of the model, in the form of the model's own, with `detach` where a block begins.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole_numbers(*shape: int, below: int = 3) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(2))


class Layers(nn.Module):
    """Four linear layers of 6 features and an output of 3; `into` and `out` say how the batch lies between them."""

    inputs: tuple[Tensor, ...] = (noise(4, 7, 6),)
    target = whole_numbers(4)
    cuts: tuple[str, ...] = ("l.0", "l.2")
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.through(self.into(x)))

    def into(self, x):
        return x

    def through(self, h):
        for k, layer in enumerate(self.l):
            h = layer(h)
            h = h.tanh() if k < 3 else h
        return h

    def outputs_by_hand(self, heads, *inputs):
        first = self.l[0](self.into(*inputs))
        second = self.l[2](self.l[1](first.detach().tanh()).tanh())
        last = self.l[3](second.detach().tanh())
        return [self.head(heads["0"], first), self.head(heads["1"], second), self.out(last)]


class StepsFirst(nn.Module):
    """Transformer layers that have the steps first, between a batch-first embedding and a batch-first output."""

    inputs = (whole_numbers(4, 7, below=16),)
    target = whole_numbers(4)
    cuts = ("l.0", "l.1", "l.2", "l.3", "l.4")
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(16, 8)
        self.l = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(6))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        h = self.e(x).transpose(0, 1)
        for layer in self.l:
            h = layer(h)
        return self.fc(h.mean(0))

    def outputs_by_hand(self, heads, x):
        h, outputs = self.e(x).transpose(0, 1), []
        for k in range(5):
            h = self.l[k](h)
            outputs.append(heads[str(k)].head(h.transpose(0, 1)))
            h = h.detach()
        return [*outputs, self.fc(self.l[5](h).mean(0))]


class AsManySteps(StepsFirst):
    """As many steps as examples: the shapes alone do not tell one from the other."""

    inputs, target = (whole_numbers(5, 5, below=16),), whole_numbers(5)


class Recurrent(nn.Module):
    """LSTMs as they are by default, and the last step's features."""

    inputs, target, cuts = (noise(4, 6, 5),), whole_numbers(4), (":getitem", ":getitem#2")
    loss = staticmethod(F.cross_entropy)

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.ModuleList([nn.LSTM(5, 6), nn.LSTM(6, 6), nn.LSTM(6, 6)])
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        h = x.permute(1, 0, 2)
        for layer in self.r:
            h, _ = layer(h)
        return self.fc(h[-1])

    def outputs_by_hand(self, heads, x):
        first, _ = self.r[0](x.permute(1, 0, 2))
        second, _ = self.r[1](first.detach())
        last, _ = self.r[2](second.detach())
        local = [heads[str(k)].head(h.transpose(0, 1)) for k, h in enumerate((first, second))]
        return [*local, self.fc(last[-1])]


class InputsStepsFirst(Layers):
    """The inputs themselves have the steps first."""

    inputs = (noise(7, 4, 6),)

    def out(self, h):
        return self.fc(h.mean(0))

    def head(self, head, h):
        return head.head(h.transpose(0, 1))


class Siamese(Layers):
    """Two inputs in one batch: rows of a pair are N apart."""

    inputs = (noise(4, 6), noise(4, 6, seed=5))

    def forward(self, a, b):
        return self.out(self.through(self.into(a, b)))

    def into(self, a, b):
        return torch.cat([a, b])

    def out(self, h):
        a, b = h.chunk(2)
        return self.fc((a - b).abs())

    def head(self, head, h):
        return head.head(torch.stack(h.chunk(2), 1))


class Triplets(Layers):
    """Rows of a triplet lie next to each other."""

    inputs = (noise(4, 6), noise(4, 6, seed=5), noise(4, 6, seed=6))

    def forward(self, a, b, c):
        return self.out(self.through(self.into(a, b, c)))

    def into(self, a, b, c):
        return torch.stack([a, b, c], 1).flatten(0, 1)

    def out(self, h):
        return self.fc(h.unflatten(0, (-1, 3)).prod(1))

    def head(self, head, h):
        return head.head(h.unflatten(0, (-1, 3)))


class DeepSet(Layers):
    """Sets of seven, whose members are embedded one by one."""

    def into(self, x):
        return x.reshape(-1, 6)

    def out(self, h):
        return self.fc(h.view(-1, 7, 6).sum(1))

    def head(self, head, h):
        return head.head(h.unflatten(0, (-1, 7)))


class EachMember(DeepSet):
    """A class for every member of every set, in one long output: nothing needs to be unfolded."""

    target = whole_numbers(28)

    def out(self, h):
        return self.fc(h)

    def head(self, head, h):
        return head(h)


class EachStep(Layers):
    """A class for every step, in one long output, of activations that have the batch first."""

    target = whole_numbers(28)

    def out(self, h):
        return self.fc(h).view(-1, 3)

    def head(self, head, h):
        return head.head(h).flatten(0, 1)


class EachStepFirst(Layers):
    """A class for every step, with the steps first."""

    target = whole_numbers(28)

    def into(self, x):
        return x.transpose(0, 1)

    def out(self, h):
        return self.fc(h)

    def head(self, head, h):
        return head.head(h.transpose(0, 1)).transpose(0, 1)

    @staticmethod
    def loss(output, y):
        return F.cross_entropy(output.flatten(0, 1), y)


class PairsInTheBatch(Layers):
    """The batch itself holds pairs, first all left ones: half as many rows come out."""

    inputs = (noise(8, 6),)

    def out(self, h):
        a, b = h.chunk(2)
        return self.fc(a * b)

    def head(self, head, h):
        return head.head(torch.stack(h.chunk(2), 1))


class Frames(nn.Module):
    """Five frames an example, folded into the batch of a convolutional net."""

    inputs, target, cuts = (noise(4, 5, 2, 8, 8),), whole_numbers(4), (":relu", ":relu#2")
    loss = staticmethod(F.cross_entropy)

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

    def head(self, head, h):
        return head.head(h.unflatten(0, (-1, 5)).movedim(1, 2))

    def outputs_by_hand(self, heads, x):
        first = self.c[0](x.flatten(0, 1)).relu()
        second = self.c[1](first.detach()).relu()
        last = self.c[2](second.detach()).relu().mean((2, 3))
        return [self.head(heads["0"], first), self.head(heads["1"], second), self.out(last.unflatten(0, x.shape[:2]))]


class EveryFrame(Frames):
    """A class for every frame, of a net that has them in the batch: (N * F, 3)."""

    target = whole_numbers(20)

    def out(self, h):
        return self.fc(h).flatten(0, 1)

    def head(self, head, h):
        return head(h)


KINDS = (
    *(StepsFirst, AsManySteps, Recurrent, InputsStepsFirst, Siamese, Triplets, DeepSet, EachMember, EachStep),
    *(EachStepFirst, PairsInTheBatch, Frames, EveryFrame),
)


def pair_of(kind: type) -> tuple[object, Tensor]:
    """Return a batch as `decouple` takes it."""
    return (kind.inputs if len(kind.inputs) > 1 else kind.inputs[0]), kind.target


def made(kind: type, **how: object) -> tuple[nn.Module, sedona_fx.Net]:
    """Return a model in float64 and a net of it with all of its cuts."""
    torch.manual_seed(0)
    model = kind().double()
    return model, sedona_fx.decouple(model, pair_of(kind), loss=kind.loss, **{"cuts": list(kind.cuts), **how})


def outputs_in_eval(kind: type, net: sedona_fx.Net) -> list[Tensor]:
    """Return what the heads and the model say in eval mode, in the form of the model's output."""
    model, heads = copy.deepcopy((net.model, net.heads))
    with torch.no_grad():
        return kind.outputs_by_hand(model.eval(), heads.eval(), *kind.inputs)

"""Models whose output has another length than the activations in front: an encoder in front of a decoder."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.train import Greedy

WORDS, LONG, SHORT = 13, 9, 5


class Translator(nn.Module):
    """An encoder of four layers over LONG words, and a decoder layer over SHORT ones that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(WORDS, 8), nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, WORDS)

    def decode(self, memory: Tensor, target: Tensor) -> Tensor:
        queries = self.target(target)
        return self.out(queries + self.attention(queries, memory, memory)[0])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        h = self.source(source)
        for layer in self.layers:
            h = h + layer(h)
        return self.decode(h, target)


def per_word(scores: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), words.flatten())


def translations(seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    noise = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (4, SHORT + 1), generator=noise)
    return (torch.randint(0, WORDS, (4, LONG), generator=noise), words[:, :-1]), words[:, 1:]


@pytest.fixture
def net() -> sedona_fx.Net:
    return sedona_fx.decouple(
        Translator().double(), translations(1), blocks=4, search="balanced", loss=per_word, progress=False
    )


def test_an_encoder_is_cut_and_its_blocks_have_heads(net):
    assert net.plan.cuts == (":add", ":add#2", ":add#3")  # behind the first three layers
    assert all(name.startswith("resample") for name in net.plan.heads)


def test_gradients_are_those_of_blocks_written_by_hand(net):
    (source, target), words = translations(2)
    model, heads = copy.deepcopy(net.model), copy.deepcopy(net.heads)
    net.backward((source, target), words)
    h, losses = model.source(source), []
    for k, layer in enumerate(model.layers):
        h = h + layer(h)
        if k < 3:
            losses.append(per_word(heads[str(k)](h), words))
            h = h.detach()
    losses.append(per_word(model.decode(h, target), words))
    sum(losses).backward()
    for name, parameter in (*model.named_parameters(), *((f"heads.{n}", p) for n, p in heads.named_parameters())):
        path = name if name.startswith("heads.") else f"model.{name}"
        torch.testing.assert_close(net.get_parameter(path).grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_it_learns(net):
    schedule = Greedy(net, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    inputs, words = translations(3)
    losses = [schedule.step(inputs, words).losses for _ in range(60)]
    assert all(last < 0.6 * first for first, last in zip(losses[0], losses[-1], strict=True))


def test_images_to_captions():
    class Captions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())])
            self.words = nn.Linear(16, SHORT)
            self.out = nn.Linear(3, WORDS)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(self.net(x).flatten(2)).transpose(1, 2))

    data = torch.randn(4, 3, 4, 4), torch.randint(0, WORDS, (4, SHORT))
    net = sedona_fx.decouple(Captions(), data, blocks=3, search="balanced", loss=per_word, progress=False)
    assert set(net.plan.heads) == {"resample-2"}
    Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step(*data)

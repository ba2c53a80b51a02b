"""Kinds of models that the zoo lacks: U-Nets, language models, parametrizations, objectives of one's own."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import sedona_fx
from sedona_fx import LocalLoss
from sedona_fx.errors import CutError, DataError, HeadError
from sedona_fx.search import Sedona
from sedona_fx.train import Greedy


def stage(incoming: int, outgoing: int) -> nn.Sequential:
    conv = nn.Conv2d(incoming, outgoing, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outgoing), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two skips past the bottom."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.d1, self.d2, self.d3 = stage(3, 4), stage(4, 8), stage(8, 16)
        self.u2, self.u1, self.out = stage(24, 8), stage(12, 4), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        h = self.d3(F.max_pool2d(b, 2))
        h = self.u2(torch.cat([F.interpolate(h, scale_factor=2), b], 1))
        return self.out(self.u1(torch.cat([F.interpolate(h, scale_factor=2), a], 1)))


def maps(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(5, (count, 8, 8), generator=generator)


def test_unet_with_skips_past_blocks_against_detach_by_hand():
    model, (x, y) = UNet().double(), maps()
    net = sedona_fx.decouple(model, (x, y), cuts=["d2", "d3", "u2"])
    assert net.plan.heads == ("dense-2",) * 3
    losses = net.backward(x, y).losses
    heads, m = copy.deepcopy(net.heads), model
    heads.zero_grad()
    a = m.d1(x)
    b = m.d2(F.max_pool2d(a, 2))
    wanted = [F.cross_entropy(heads["0"](b), y)]
    a, b = a.detach(), b.detach()
    h = m.d3(F.max_pool2d(b, 2))
    wanted.append(F.cross_entropy(heads["1"](h), y))
    h = m.u2(torch.cat([F.interpolate(h.detach(), scale_factor=2), b], 1))
    wanted.append(F.cross_entropy(heads["2"](h), y))
    h = m.out(m.u1(torch.cat([F.interpolate(h.detach(), scale_factor=2), a], 1)))
    wanted.append(F.cross_entropy(h, y))
    sum(wanted).backward()
    torch.testing.assert_close(losses, [loss.detach() for loss in wanted], rtol=1e-12, atol=0)
    for name, parameter in [*m.named_parameters(), *heads.named_parameters(prefix="h")]:
        found = net.heads.get_parameter(name[2:]) if name.startswith("h.") else net.model.get_parameter(name)
        # A bias before BatchNorm has no gradient but rounding.
        assert (found.grad - parameter.grad).norm() <= 1e-12 * parameter.grad.norm() + 1e-15, name


def test_unet_trains_on_every_number_of_crossing_activations():
    x, y = maps(dtype=torch.float32)
    for limit, cuts in ((1, None), (2, None), (3, {"d3", "u2"})):
        net = sedona_fx.decouple(UNet(), (x, y), blocks=3, search="balanced", max_live=limit)
        assert cuts is None or cuts & set(net.plan.cuts)
        schedule = Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.05))
        first, last = schedule.step(x, y).losses, None
        for _ in range(30):
            last = schedule.step(x, y).losses
        assert all(after < before for before, after in zip(first, last, strict=True))


def test_the_search_goes_over_cuts_that_several_activations_cross():
    x, y = maps(16, torch.float32)
    data = [(x[k : k + 4], y[k : k + 4]) for k in range(0, 16, 4)]
    search = Sedona(training_steps=400)
    net = sedona_fx.decouple(UNet(), data, blocks=3, search=search, max_live=3, progress=False)
    assert len(net.plan.cuts) == 2
    net.backward(x, y)


@dataclasses.dataclass
class Scores:
    logits: Tensor | None = None
    hidden: Tensor | None = None


class TinyLM(nn.Module):
    """A decoder with tied embeddings and a mask, which looks at sizes as Hugging Face's do and returns a dataclass."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checks = checks
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(3))
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Scores:
        if self.checks and ids.shape[1] > 6:
            raise ValueError("too long")
        h = self.embed(ids) + self.position
        future = torch.ones(6, 6, dtype=torch.bool).triu(1)
        for layer in self.layers:
            h = layer(h, src_mask=future, src_key_padding_mask=None if mask is None else mask == 0)
        return Scores(logits=self.out(h), hidden=None)


def next_token(scores: Scores, ids: Tensor) -> Tensor:
    return F.cross_entropy(scores.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


torch.utils._pytree.register_dataclass(Scores)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")  # PyTorch's, about its own layers
@pytest.mark.parametrize("checks", [False, True], ids=["symbolic", "export"])
def test_language_model_with_tied_embeddings(checks):
    model = TinyLM(checks)
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"ids": ids, "mask": torch.ones_like(ids)}
    net = sedona_fx.decouple(model, (inputs, ids), cuts=["layers.0", "layers.1"], loss=next_token)
    assert net.plan.capture.front_end == ("export" if checks else "symbolic")
    assert all(name.startswith("logits") for name in net.plan.heads)
    assert isinstance(net(**inputs), Scores)
    assert torch.equal(net(**inputs).logits, model(**inputs).logits)
    assert "embed.weight in blocks 0, 2" in str(net)
    schedule = Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    before = net.model.embed.weight.detach().clone()
    losses = [schedule.step(inputs, ids).losses for _ in range(20)]
    assert all(after < first for first, after in zip(losses[0], losses[-1], strict=True))
    assert not torch.equal(before, net.model.embed.weight)
    assert net.model.out.weight is net.model.embed.weight


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("checks", [False, True], ids=["symbolic", "export"])
def test_parametrizations(kind, checks):
    class Parametrised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b = getattr(parametrizations, kind)(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            if checks and x.shape[1] != 6:
                raise ValueError("six features")
            return self.fc(self.c(self.b(self.a(x).tanh()).tanh()).tanh())

    model, x, y = Parametrised(), torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    net = sedona_fx.decouple(model, (x, y), cuts=["a", "b"], heads="linear")
    for training in (True, False):
        plain = copy.deepcopy(model).train(training)
        net.model.load_state_dict(model.state_dict())
        assert torch.equal(net.train(training)(x), plain(x))
        assert all(map(torch.equal, net.model.state_dict().values(), plain.state_dict().values()))
    net.train().backward(x, y)
    assert all(p.grad is not None for p in net.model.parameters())
    copy.deepcopy(model).load_state_dict(net.original_state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_norms_of_weights_by_hooks(kind):
    model = nn.Sequential(nn.Linear(6, 6), getattr(nn.utils, kind)(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    net = sedona_fx.decouple(model, (x, y), cuts=["0", "1"], heads="linear")
    for training in (True, False):
        net.model.load_state_dict(model.state_dict())
        plain = nn.Sequential(nn.Linear(6, 6), getattr(nn.utils, kind)(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3))
        plain.load_state_dict(model.state_dict())
        assert torch.equal(net.train(training)(x), plain.train(training)(x))
        assert all(map(torch.equal, net.model.state_dict().values(), plain.state_dict().values()))
    net.train().backward(x, y)
    assert all(p.grad is not None for p in net.model.parameters())


def test_objectives_of_ones_own():
    model = nn.Sequential(stage(3, 4), stage(4, 4), nn.Flatten(), nn.Linear(256, 5)).double()
    (x, _), y = maps(), torch.arange(4)
    rebuild = LocalLoss(
        lambda output, inputs, _: F.mse_loss(output, inputs["input"]), head=lambda c: nn.Conv2d(c.channels, 3, 1)
    )
    small = LocalLoss(lambda h, inputs, target: h.square().mean() + 0 * target.sum())
    net = sedona_fx.decouple(model, (x, y), cuts=["0", "1"], local_loss=[rebuild, small])
    losses = net.backward(x, y).losses
    h = model[0](x)
    assert losses[0] == F.mse_loss(net.heads["0"](h), x)
    k = model[1](h.detach())
    assert losses[1] == k.square().mean()
    assert losses[2].sub(F.cross_entropy(model[3](k.flatten(1)), y)).abs().item() < 1e-12
    gradient = torch.autograd.grad(k.square().mean(), model[1][0].weight)[0]
    torch.testing.assert_close(net.model[1][0].weight.grad, gradient, rtol=1e-12, atol=1e-18)
    mixed = sedona_fx.decouple(model, (x, y), cuts=["0", "1"], local_loss=[None, small])
    assert mixed.plan.heads == ("mlp-sr", "sedona_fx.heads.objective:activation_itself")
    for wrong, what in (
        ([rebuild], "local_loss names 1 objectives; 3 blocks take 2"),
        (F.mse_loss, "give a sedona_fx.LocalLoss"),
    ):
        with pytest.raises(HeadError, match=what):
            sedona_fx.decouple(model, (x, y), cuts=["0", "1"], local_loss=wrong)
    with pytest.raises(HeadError, match="cannot be combined with local_loss"):
        sedona_fx.decouple(model, [(x, y)] * 4, blocks=2, local_loss=small)
    broken = LocalLoss(lambda output, inputs, target: F.mse_loss(output, inputs["image"]))
    with pytest.raises(DataError, match=r"KeyError: 'image'.*local_loss.loss\(output, inputs, target\)"):
        sedona_fx.decouple(model, (x, y), cuts=["0"], local_loss=broken).backward(x, y)


def test_two_towers_and_dead_ends_are_explained():
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.fc(self.a(x).tanh() + self.b(z).tanh())

    pair = (torch.randn(2, 4), torch.randn(2, 4)), torch.tensor([0, 1])
    with pytest.raises(CutError, match="side by side"):
        sedona_fx.decouple(Towers(), pair, cuts=["a", "b"])

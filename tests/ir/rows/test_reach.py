"""Which parameters the gradient of one token reaches, against autograd: never more, no less where rules are known."""

import pytest
import torch
import torch.nn.functional as F
from graphs import analysed
from torch import Tensor, nn

import sedona_fx
from sedona_fx.ir.graph import cut_points, info
from sedona_fx.ir.rows.reach import missed_parameters, reaches_all


class ClassToken(nn.Module):
    """As timm's ViT of CLIP: a norm stands between the concatenation and the first attention."""

    def __init__(self, attention: str = "layer", depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.place, self.pre = nn.Parameter(torch.randn(1, 5, 8)), nn.LayerNorm(8)
        self.layers = nn.ModuleList(ATTENTIONS[attention]() for _ in range(depth))
        self.post, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        x = self.pre(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.post(x)[:, 0])


class Packed(nn.Module):
    """Queries, keys and values of one linear layer, attention by hand, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * 0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Fused(Packed):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.attend(h, h, h, need_weights=False)[0]


class Rowwise(nn.Module):
    """Root mean square by hand, a gated unit: nothing goes from token to token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.up, self.down = nn.Parameter(torch.ones(8)), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        gate, value = self.up(h).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


ATTENTIONS = {
    "layer": lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True),
    "packed": Packed,
    "fused": Fused,
    "module": Module,
    "rowwise": Rowwise,
}
IMAGES, TARGET = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0])


class Values(torch.fx.Interpreter):
    """Runs a graph, keeps the value of every node, and asks autograd which gradients of one row are exactly zero."""

    def __init__(self, gm: torch.fx.GraphModule, *inputs: Tensor) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.run(*inputs)
        self.named = dict(gm.named_parameters())

    def exactly_zero(self, node: torch.fx.Node, place: int) -> set[str]:
        """Return the parameters that no gradient reaches from one row, and some gradient from all rows."""
        value = self.env[node]
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))

        def gradients(loss: Tensor) -> list[Tensor | None]:
            return torch.autograd.grad(loss.sum(), list(self.named.values()), retain_graph=True, allow_unused=True)

        both = zip(self.named, gradients(weights * value), gradients((weights * value)[:, place]), strict=True)
        return {name for name, whole, part in both if whole is not None and whole.any() and not _any(part)}


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_class_tokens_are_what_autograd_says(attention):
    graphs = analysed(ClassToken(attention), IMAGES)
    gm, zero = graphs.train, {}
    values = Values(gm, IMAGES)
    for node in cut_points(gm.graph):
        cut, shape = str(info(node).cut), info(node).value.shape
        if len(shape) == 3 and shape[1] == 5:
            zero[cut] = values.exactly_zero(node, 0)
            assert set(missed_parameters(gm, node, 1, {0})) == zero[cut]
            assert set(missed_parameters(gm, node, 1, {0}, unknown_reads_all=True)) == zero[cut]
            assert reaches_all(gm, node, 1, 0) == (not zero[cut])
            assert graphs.contexts[cut].token == (None if zero[cut] else 0)
    assert zero["pre"] == {"patch.weight", "patch.bias"}
    assert bool(zero["layers.1"]) == (attention == "rowwise")


class Recurrences(nn.Module):
    def __init__(self, kind: str, place: int, final: bool = False, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place, both = place, 2 if options.get("bidirectional") else 1
        self.a = getattr(nn, kind)(4, 4, batch_first=True, **options)
        self.b = getattr(nn, kind)(4 * both, 4, batch_first=True, **options)
        self.out = nn.Linear(4 * both, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.a(x)
        x, _ = self.b(x)
        return self.out(x[:, self.place])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
def test_steps_of_a_recurrence(kind, layers, both):
    x = torch.randn(3, 6, 4)
    graphs = analysed(Recurrences(kind, -1, num_layers=layers, bidirectional=both), x)
    gm, values = graphs.train, Values(graphs.train, x)
    ends = [node for node in cut_points(gm.graph) if len(info(node).value.shape) == 3]
    assert len(ends) == 2
    for node in ends:
        for place in range(6):
            zero = values.exactly_zero(node, place)
            found = set(missed_parameters(gm, node, 1, {place}))
            certain = set(missed_parameters(gm, node, 1, {place}, unknown_reads_all=True))
            assert certain == zero == found
        assert graphs.contexts[info(node).cut].token == (None if both else -1)
    assert any("hh" in name and "reverse" in name for name in values.exactly_zero(ends[1], 5)) == both


class Pieces(nn.Module):
    """One way to move rows, between a layer for the first half of the tokens and one for the second half."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.a, self.b = way, nn.Linear(6, 6), nn.Linear(6, 6)
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = WAYS[self.way](self, self.a(x[:, :2]), self.b(x[:, 2:]))
        return self.out(h.tanh()[:, 0])


WAYS = {
    "cat": lambda m, a, b: torch.cat([a, b], dim=1),
    "stack": lambda m, a, b: torch.stack([a[:, 0], a[:, 1], b[:, 0], b[:, 1]], 1),
    "flip": lambda m, a, b: torch.cat([b, a], 1).flip(1),
    "roll": lambda m, a, b: torch.cat([a, b], 1).roll(1, 1),
    "transposed": lambda m, a, b: torch.cat([a.transpose(1, 2), b.transpose(1, 2)], 2).permute(0, 2, 1),
    "mixed": lambda m, a, b: m.mix(torch.cat([a, b], 1).transpose(1, 2)).transpose(1, 2),
    "softmax over tokens": lambda m, a, b: torch.cat([a, b], 1).softmax(1),
    "softmax over features": lambda m, a, b: torch.cat([a, b], 1).softmax(-1),
    "mean": lambda m, a, b: torch.cat([a, b], 1) - torch.cat([a, b], 1).mean(1, keepdim=True),
    "mean of features": lambda m, a, b: torch.cat([a, b], 1) - torch.cat([a, b], 1).mean(-1, keepdim=True),
    "heads": lambda m, a, b: torch.cat([a, b], 1).unflatten(2, (2, 3)).transpose(1, 2).transpose(1, 2).flatten(2),
    "rows of the batch": lambda m, a, b: torch.cat([a, b], 1).flatten(0, 1).tanh().unflatten(0, (-1, 4)),
    "split": lambda m, a, b: torch.cat(torch.cat([a, b], 1).split([1, 3], 1), 1),
    "chunk of features": lambda m, a, b: torch.cat(torch.cat([a, b], 1).chunk(2, -1), -1),
    "unbind": lambda m, a, b: torch.stack(torch.cat([a, b], 1).unbind(1), 1),
    "swapped": lambda m, a, b: torch.stack(torch.cat([a, b], 1).unbind(1)[::-1], 1),
    "einsum": lambda m, a, b: torch.einsum("btd,st->bsd", torch.cat([a, b], 1), m.mix.weight),
    "product": lambda m, a, b: m.mix.weight @ torch.cat([a, b], 1),
    "convolution": lambda m, a, b: F.conv1d(
        torch.cat([a, b], 1).transpose(1, 2), torch.ones(6, 6, 3), padding=1
    ).transpose(1, 2),
    "cumsum": lambda m, a, b: torch.cat([a, b], 1).cumsum(1),
    "where": lambda m, a, b: torch.where(torch.cat([a, b], 1) > 0, torch.cat([a, b], 1), torch.zeros(())),
    "maximum": lambda m, a, b: torch.max(torch.cat([a, b], 1), torch.cat([a, b], 1) / 2),
    "distance to the maximum": lambda m, a, b: torch.cat([a, b], 1) - torch.cat([a, b], 1).max(1, keepdim=True)[0],
    "slices": lambda m, a, b: torch.cat([torch.cat([a, b], 1)[:, ::2], torch.cat([a, b], 1)[:, 1::2]], 1),
    "ellipsis": lambda m, a, b: torch.cat([torch.cat([a, b], 1)[..., :3], torch.cat([a, b], 1)[..., 3:]], -1),
    "repeat": lambda m, a, b: torch.cat([a[:, :1].repeat(1, 2, 1), b], 1),
    "written": lambda m, a, b: torch.cat([a, b], 1).mul_(2).add_(1),
}
CERTAIN = set(WAYS) - {
    "flip",
    "roll",
    "rows of the batch",
    "einsum",
    "convolution",
    "cumsum",
    "repeat",
    "distance to the maximum",
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_move_rows(way):
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2))
    gm = analysed(Pieces(way), x).train
    values = Values(gm, x)
    node = [n for n in cut_points(gm.graph) if info(n).value.shape == (3, 4, 6)][-1]
    for place in range(4):
        zero = values.exactly_zero(node, place)
        claimed = set(missed_parameters(gm, node, 1, {place}))
        certain = set(missed_parameters(gm, node, 1, {place}, unknown_reads_all=True))
        assert certain <= zero <= claimed
        if way in CERTAIN:
            assert certain == claimed


@pytest.mark.parametrize("cuts", [["pre"], ["pre", "layers.0"]])
def test_no_block_trains_on_a_constant(cuts):
    model = ClassToken()
    net = sedona_fx.decouple(model, (IMAGES, TARGET), cuts=cuts)
    net.backward(IMAGES, TARGET)
    plain = ClassToken()
    F.cross_entropy(plain(IMAGES), TARGET).backward()
    for name, parameter in plain.named_parameters():
        assert not parameter.grad.any() or net.model.get_parameter(name).grad.any(), name


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_no_block_ends_at_the_last_step_of_both_ways(kind):
    model, x = Recurrences(kind, -1, bidirectional=True), torch.randn(3, 6, 4)
    net = sedona_fx.decouple(model, (x, torch.tensor([0, 1, 2])), blocks=2, search="balanced")
    net.backward(x, torch.tensor([0, 1, 2]))
    assert all(p.grad.any() for name, p in net.model.named_parameters() if name.startswith("a."))
    one_way = sedona_fx.decouple(Recurrences(kind, -1), (x, torch.tensor([0, 1, 2])), blocks=2, search="balanced")
    one_way.backward(x, torch.tensor([0, 1, 2]))
    assert all(p.grad.any() for p in one_way.model.parameters())

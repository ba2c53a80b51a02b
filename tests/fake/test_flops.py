"""FLOPs of operators for which PyTorch has no formula, against sums by hand; what has none is named and estimated."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import analysed, node_of
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

import sedona_fx
from sedona_fx.fake.flops import formula_of
from sedona_fx.fake.meter import Meter
from sedona_fx.ir.cost import block_costs
from sedona_fx.ir.graph import info
from sedona_fx.passes.cuts import resolve

N, T, IN, H, P = 3, 5, 4, 6, 2
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


class Recurrent(nn.Module):
    def __init__(self, kind: str = "LSTM", packed: bool = False, **options: object) -> None:
        super().__init__()
        self.r = getattr(nn, kind)(IN, H, **options)
        self.packed, self.out = packed, nn.LazyLinear(3)
        self.out(self.r(torch.randn(N, T, IN) if options.get("batch_first") else torch.randn(T, N, IN))[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.r(x)[0])


def of_recurrence(kind: str, *, layers: int = 1, directions: int = 1, projected: int = 0, steps: int = N * T) -> int:
    """Two a multiply-add: each step multiplies its input and its state by the matrices of all gates."""
    total, state = 0, projected or H
    for layer in range(layers):
        incoming = IN if layer == 0 else state * directions
        of_gates = 2 * GATES[kind] * H * (incoming + state)
        total += directions * steps * (of_gates + (2 * H * projected))
    return total


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, {}),
        ({"bias": False}, {}),
        ({"num_layers": 3, "dropout": 0.2}, {"layers": 3}),
        ({"bidirectional": True}, {"directions": 2}),
        ({"num_layers": 2, "bidirectional": True}, {"layers": 2, "directions": 2}),
    ],
    ids=["one", "no bias", "layers", "both ways", "layers both ways"],
)
def test_recurrent_layers(kind, batch_first, options, counted):
    model = Recurrent(kind, batch_first=batch_first, **options)
    x = torch.randn(N, T, IN) if batch_first else torch.randn(T, N, IN)
    record = info(node_of(analysed(model, x).train, "r"))
    assert record.flops == of_recurrence(kind, **counted)
    assert not record.work.uncounted


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("directions", [1, 2])
def test_projected_lstm(directions):
    model = Recurrent(proj_size=P, num_layers=2, batch_first=True, bidirectional=directions == 2)
    record = info(node_of(analysed(model, torch.randn(N, T, IN)).train, "r"))
    assert record.flops == of_recurrence("LSTM", layers=2, directions=directions, projected=P)


@pytest.mark.parametrize("kind", GATES)
def test_a_packed_sequence_has_no_padded_steps(kind):
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r = getattr(nn, kind)(IN, H, 2, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Packed(), nn.Linear(H, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.out(self.inner(x, lengths)).mean(1)

    data = ({"x": torch.randn(N, T, IN), "lengths": torch.tensor([5, 2, 4])}, torch.zeros(N, dtype=torch.long))
    net = sedona_fx.decouple(Whole(), data, cuts=["inner"], leaf_modules=["inner"])
    inner = next(n for n in net.graph_module.graph.nodes if n.target == "inner")
    assert info(inner).flops == of_recurrence(kind, layers=2, steps=5 + 2 + 4)


@pytest.mark.parametrize("kind", GATES)
def test_cells(kind):
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = getattr(nn, f"{kind}Cell")(IN, H), nn.Linear(H, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = None
            for step in x.unbind(1)[0], x.unbind(1)[1]:
                h = self.cell(step, h)
            return self.out(h[0] if kind == "LSTM" else h)

    gm = analysed(Steps(), torch.randn(N, T, IN)).train
    assert info(node_of(gm, "cell")).flops == of_recurrence(kind, steps=N)
    assert info(node_of(gm, "cell#2")).flops == of_recurrence(kind, steps=N)


def test_bilinear():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Bilinear(4, 5, 6)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.mix(x, z)

    record = info(node_of(analysed(Pair(), x=torch.randn(3, 4), z=torch.randn(3, 5)).train, "mix"))
    # x W_o takes 4 * 5 multiply-adds for each of the 6 outputs, its product with z 5 more.
    assert record.flops == 2 * 3 * 6 * (4 * 5 + 5)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode):
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(10, 8, mode=mode), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.bag(ids))

    record = info(node_of(analysed(Bag(), ids=torch.zeros(3, 5, dtype=torch.long)).train, "bag"))
    assert record.flops == 3 * 5 * 8
    assert not record.work.uncounted


class Attending(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "function":
            q = self.q(x).unflatten(2, (2, 4)).transpose(1, 2)
            x = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        else:
            x = self.attend(x, x, x, need_weights=self.way == "weights")[0]
        return self.out(x.mean(1))


@pytest.mark.parametrize("way", ["weights", "no weights"])
def test_multi_head_attention(way):
    record = info(node_of(analysed(Attending(way), torch.randn(N, T, 8)).train, "attend"))
    projections, attention = 4 * 2 * N * T * 8 * 8, 2 * 2 * N * T * T * 8
    assert record.flops == projections + attention


def test_attention_by_function():
    gm = analysed(Attending("function"), torch.randn(N, T, 8)).train
    assert info(node_of(gm, ":scaled_dot_product_attention")).flops == 2 * 2 * N * T * T * 8


def test_attentions_fast_path():
    """A transformer layer that runs as one operator, in evaluation, counts what its parts count in training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    x, counts = torch.randn(N, T, 8), []
    for module in (layer, nn.MultiheadAttention(8, 2, batch_first=True)):
        for training in (True, False):
            meter = Meter()
            with torch.no_grad(), meter:
                module.train(training)(
                    *([x] if module is layer else [x, x, x]), **({} if module is layer else {"need_weights": False})
                )
            counts.append(meter.flops)
    of_attention = 4 * 2 * N * T * 8 * 8 + 2 * 2 * N * T * T * 8
    assert counts == [of_attention + 2 * 2 * N * T * 8 * 12] * 2 + [of_attention] * 2


def test_flex_attention_has_a_formula():
    q, v = torch.empty(2, 3, 5, 4), torch.empty(2, 3, 7, 6)
    formula = formula_of(torch.ops.higher_order.flex_attention)
    assert formula is not None
    assert formula(q, torch.empty(2, 3, 7, 4), v, out_val=None) == 2 * 2 * 3 * 5 * 7 * (4 + 6)


def test_fourier_transforms():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(
                torch.fft.fft(x.to(torch.complex64), dim=1).real + torch.fft.irfft(torch.fft.rfft(x), n=8)
            ).mean(1)

    gm = analysed(Mixing(), torch.randn(N, 16, 8)).train
    assert info(node_of(gm, ":fft_fft")).flops == 5 * N * 16 * 8 * 4
    assert info(node_of(gm, ":fft_rfft")).flops == 2.5 * N * 16 * 8 * 3
    assert info(node_of(gm, ":fft_irfft")).flops == 2.5 * N * 16 * 8 * 3


# ---- operators without a formula -------------------------------------------------------------------------------------


@torch.library.custom_op("sedona_test::affine", mutates_args=())
def affine(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@affine.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


affine.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1].t(), ctx.saved_tensors[0].t() @ grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Affine(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.sedona_test.affine(x, self.weight).tanh()


class Scaled(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.sedona_test.affine(x, self.weight.t().contiguous() * 2).tanh()


X, Y = torch.randn(8, 16), torch.randint(3, (8,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Affine, Scaled])
@pytest.mark.parametrize("leaves", [(), ("0", "1", "2", "3")], ids=["traced", "whole"])
def test_what_has_no_formula_is_named_and_balanced_by_bytes(kind, leaves):
    model = nn.Sequential(
        *(kind() for _ in range(4)),
        *(z for _ in range(4) for z in (nn.Linear(16, 16, bias=False), nn.Tanh())),
        nn.Linear(16, 3),
    )
    net = sedona_fx.decouple(model, (X, Y), blocks=4, search="balanced", leaf_modules=leaves, heads=False)
    # As many bytes as a linear layer of the same size: as many FLOPs.
    assert max(cost.flops for cost in net.costs) <= 1.1 * 2 * (2 * 8 * 16 * 16)
    assert net.costs[0].uncounted == ("sedona_test::affine",)
    assert net.costs[-1].uncounted == ()
    assert "FLOPs of sedona_test::affine (block 0, 1) are estimated" in str(net)


def test_nothing_but_such_operators():
    model = nn.Sequential(*(Affine() for _ in range(8)))
    net = sedona_fx.decouple(model, (X, torch.randn(8, 16)), blocks=4, search="balanced", heads=False, loss=F.mse_loss)
    assert len({cost.flops for cost in net.costs}) == 1
    assert net.costs[0].flops > 0


def test_a_formula_of_the_users_own_counts():
    operator = torch.ops.sedona_test.affine
    register_flop_formula(operator)(lambda x, w, *_, out_shape=None, **__: 2 * x[0] * w[0] * w[1])
    try:
        gm = analysed(nn.Sequential(Affine(), nn.Linear(16, 3)), X).train
    finally:
        del flop_registry[operator]
    record = info(node_of(gm, "0:affine"))
    assert (record.flops, record.work.uncounted) == (2 * 8 * 16 * 16, {})


def test_heads_without_a_formula_are_named():
    def head(context: sedona_fx.HeadContext) -> nn.Module:
        return nn.Sequential(Affine(context.channels), nn.Linear(context.channels, 3))

    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    net = sedona_fx.decouple(model, (X, Y), cuts=["1"], heads=[head])
    assert [cost.uncounted for cost in net.costs] == [("sedona_test::affine",), ()]
    assert net.costs[0].flops > 2 * 8 * 16 * 16 + 2 * 8 * 16 * 3  # of the layer, and of the head's


class LookUps(nn.Module):
    """Reads weights, and computes nothing that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.first, self.norm = nn.Parameter(torch.randn(1, 1, 8)), nn.LayerNorm((6, 8))
        self.table, self.scale = nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.ones(1, 1, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.cat([self.first.expand(ids.shape[0], -1, -1), self.tokens(ids) + self.places], 1)
        return self.out((self.norm(x) * self.scale + self.table[:6]).mean(1))


def test_look_ups_are_no_operators_without_a_formula():
    net = sedona_fx.decouple(LookUps(), (torch.randint(50, (3, 5)), torch.tensor([0, 1, 2])), blocks=1)
    assert net.costs[0].uncounted == ()
    assert net.costs[0].flops == 2 * 3 * 8 * 3
    assert "formula" not in str(net)


def test_quantising_weights_is_no_product():
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))
            self.register_buffer("scale", torch.full((16,), 0.1))
            self.register_buffer("zero", torch.zeros(16, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.fake_quantize_per_channel_affine(self.weight, self.scale, self.zero, 0, -128, 127)
            return F.linear(x, weight).tanh()

    for leaves in ((), ("0",)):
        model = nn.Sequential(Quantised(), nn.Linear(16, 3))
        net = sedona_fx.decouple(model, (X, Y), blocks=1, leaf_modules=leaves)
        assert (net.costs[0].flops, net.costs[0].uncounted) == (2 * 8 * 16 * 16 + 2 * 8 * 16 * 3, ())


class SixRecurrences(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.e = nn.Embedding(64, 16)
        self.r = nn.ModuleList(getattr(nn, kind)(16, 16, batch_first=True) for _ in range(6))
        self.o = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        for r in self.r:
            x, _ = r(x)
        return self.o(x[:, -1])


@pytest.mark.parametrize("kind", GATES)
def test_six_recurrences_are_balanced(kind):
    data = (torch.randint(64, (4, 12)), torch.tensor([0, 1, 2, 0]))
    net = sedona_fx.decouple(SixRecurrences(kind), data, blocks=3, search="balanced", heads="linear", progress=False)
    flops = [cost.flops for cost in net.costs]
    one = 2 * 4 * 12 * GATES[kind] * 16 * 32
    head = 2 * 4 * 16 * 3
    assert flops == [2 * one + head] * 3
    four = sedona_fx.decouple(SixRecurrences(kind), data, blocks=4, search="balanced", heads="linear", progress=False)
    assert max(cost.flops for cost in four.costs) == 2 * one + head


def test_costs_of_stretches_name_operators():
    gm = analysed(nn.Sequential(Affine(), Affine(), nn.Linear(16, 3)), X).train
    ends = [resolve(gm.graph)["0"]]
    assert [cost.uncounted for cost in block_costs(gm, ends, [None])] == [("sedona_test::affine",)] * 2
    copy.deepcopy(gm)

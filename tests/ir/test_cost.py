"""Costs: of stretches, blocks and heads, by hand and against real measurements."""

import copy
import gc
import time
import weakref
from contextlib import nullcontext

import chain
import pytest
import torch
from graphs import analysed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sedona_fx.fake.meter import Meter
from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.registry import build_head
from sedona_fx.ir.cost import Cost, block_costs, head_cost, stretch_costs
from sedona_fx.ir.graph import TensorSpec, info
from sedona_fx.measure import step_seconds
from sedona_fx.passes.cuts import resolve


def ends(gm, *names):
    return [resolve(gm.graph)[name] for name in names]


def test_stretches_by_hand():
    gm = chain.graphs().train
    costs, shared = stretch_costs(gm, ends(gm, "a", "b", "c"))
    assert [c.parameters for c in costs] == [4 * 5 + 5, 5 * 6 + 6, 6 * 7 + 7, 7 * 3 + 3]
    assert [c.flops for c in costs] == [2 * 6 * 4 * 5, 2 * 6 * 5 * 6, 2 * 6 * 6 * 7, 2 * 6 * 7 * 3]
    assert len(shared) == 3
    whole = sum(costs, Cost())
    assert (whole.flops, whole.parameters) == (sum(c.flops for c in costs), sum(c.parameters for c in costs))


def test_neighbours_count_a_shared_activation_twice():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))
    x = torch.randn(16, 4)
    gm = analysed(model, x).train
    costs, shared = stretch_costs(gm, ends(gm, "1", "3"))
    assert shared == [16 * 8 * 4, 16 * 8 * 4]  # a sigmoid keeps its output, and the layer behind it its input
    everything = {}
    for node in gm.graph.nodes:
        everything.update(info(node).saved)
    assert sum(c.activation_bytes for c in costs) - sum(shared) == sum(everything.values())
    (one,), none = stretch_costs(gm, [])
    assert one.activation_bytes == sum(everything.values())
    assert none == []


def test_tied_parameters_count_once_a_block():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    gm = analysed(Tied(), torch.randn(2, 4)).train
    (cost,) = block_costs(gm, [], [])
    assert cost.parameters == sum(p.numel() for p in Tied().parameters())


@pytest.mark.parametrize("name", ["mlp-sr", "cnn", "sedona-2", "linear"])
def test_heads_cost_what_they_cost(name):
    context = HeadContext(shape=(4, 8, 10, 10), output_shape=(4, 3), channel_dim=1, place="x")
    value = TensorSpec((4, 8, 10, 10), torch.float32, torch.device("cpu"))
    state = torch.get_rng_state()
    cost = head_cost(lambda: build_head(name, context), value)
    assert torch.equal(state, torch.get_rng_state())
    head, x = build_head(name, context), torch.randn(4, 8, 10, 10, requires_grad=True)
    kept: dict[int, tuple[int, object]] = {}
    own = {t.untyped_storage().data_ptr() for t in (*head.parameters(), *head.buffers(), x)}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    meter = Meter()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t), meter:
        head(x)
    assert cost == Cost(meter.flops, sum(p.numel() for p in head.parameters()), sum(size for size, _ in kept.values()))
    assert cost.flops > 0


def test_blocks_include_their_heads():
    gm = chain.graphs().train
    head = Cost(10, 20, 30)
    plain = stretch_costs(gm, ends(gm, "a", "c"))[0]
    assert block_costs(gm, ends(gm, "a", "c"), [head, None]) == [plain[0] + head, plain[1], plain[2]]


def test_seconds_are_medians_of_interleaved_runs():
    order = []
    slow = lambda: (order.append("b"), time.sleep(0.002))  # noqa: E731
    made = step_seconds({"a": lambda: order.append("a"), "b": slow}, repeats=3)
    assert order == ["a", "b", "b", "a"] * 2  # every other turn goes backwards
    assert 0 <= made["a"] < made["b"]
    assert made["b"] >= 0.002


CALLS = {
    "batch norm": lambda x, c: F.batch_norm(x, c, c, c, c, training=True),
    "batch norm, no weights": lambda x, c: F.batch_norm(x, None, None, training=True),
    "batch norm, evaluating": lambda x, c: F.batch_norm(x, c, c, c, c),
    "relu": lambda x, c: F.relu(x),
    "linear": lambda x, c: F.linear(x.flatten(1), torch.empty(5, 48, dtype=x.dtype, device=x.device), c[:1].repeat(5)),
    "normal": lambda x, c: x.normal_(),
    "uniform": lambda x, c: x.uniform_(),
}
LAYOUTS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: torch.cat([x, x])[::2],
    "half": torch.Tensor.bfloat16,
    "double": torch.Tensor.double,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("call", CALLS)
def test_short_cuts_for_tensors_without_numbers_are_what_pytorch_says(call, device, layout):
    def run(meter):
        kept = []
        with FakeTensorMode() if device == "cpu" else nullcontext(), meter:
            x = LAYOUTS[layout](torch.empty(2, 3, 4, 4, device=device))
            c = torch.empty(3, device=device, dtype=x.dtype)
            x = x if call in ("normal", "uniform") else x.requires_grad_().clone()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                result = CALLS[call](x, c)
        return [
            (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.untyped_storage().nbytes())
            for t in (result, *kept)
        ]

    assert run(Meter()) == run(nullcontext())


def test_short_cuts_leave_numbers_alone():
    x = torch.randn(2, 3)
    with Meter():
        torch.manual_seed(0)
        drawn = x.clone().normal_()
        positive = F.relu(x)
    torch.manual_seed(0)
    assert torch.equal(drawn, x.clone().normal_())
    assert torch.equal(positive, x.clamp_min(0))


def test_the_meter_counts_real_tensors_and_leaves_parameters_out():
    layer = nn.Linear(4, 6)
    meter = Meter([*layer.parameters()])
    x = torch.randn(3, 4)
    with meter.measuring():
        copy.copy(layer)(x)
    assert meter.flops == 2 * 3 * 4 * 6
    assert list(meter.saved.values()) == [x.untyped_storage().nbytes()]


def test_measuring_leaves_nothing_behind():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid())  # ReLU keeps its own output
    with Meter().measuring():
        output = net(torch.randn(2, 4))
    weights = [weakref.ref(parameter) for parameter in net.parameters()]
    del net, output
    gc.collect()
    assert [reference() for reference in weights] == [None] * 4

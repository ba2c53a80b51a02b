"""What is remembered of operations is what running them again would show."""

import copy
import dataclasses
from collections import Counter, defaultdict

import hypothesis
import pytest
import torch
from graphs import node_of
from property_cases import loses_a_hook
from random_models import batch, build
from random_programs import programs
from torch import nn
from torch.nn import functional as F
from zoo import SHORT, ZOO

from sedona_fx.capture.exporting.exported import record_by_export
from sedona_fx.capture.sites import name_sites
from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import NodeInfo, info
from sedona_fx.passes import annotate, trace

STORAGES = ("saved", "storages", "mutates")


def records(gm):
    """Return all that annotate wrote, storages apart: of each where it occurs, since their names may differ."""
    plain, found = [], defaultdict(list)
    for position, node in enumerate(gm.graph.nodes):
        record = vars(info(node))
        plain.append({name: value for name, value in record.items() if name not in STORAGES})
        for name in STORAGES:
            for storage in record[name]:
                size = record[name][storage] if name == "saved" else 0
                found[storage].append((position, name, size))
    return plain, Counter(map(tuple, found.values()))


def annotated(gm, inputs, *, training=True, memo=None):
    """Annotate a graph whose nodes know nothing but what tracing told them."""
    fresh = NodeInfo()
    traced = ("path", "site", "returned_by", "order", "region")
    for node in gm.graph.nodes:
        for field in dataclasses.fields(NodeInfo):
            if field.name not in traced:
                setattr(info(node), field.name, copy.copy(getattr(fresh, field.name)))
    return records(annotate(gm, inputs, training=training, memo=memo))


def assert_remembered(model, inputs, memo, **options):
    """Annotate both graphs of a model with a memo and without."""
    graphs = trace(model, Args(**inputs), **options)
    for gm, training in ((graphs.train, True), (graphs.eval, False)):
        expected = annotated(gm, inputs, training=training)
        assert annotated(gm, inputs, training=training, memo=memo) == expected
        assert annotated(gm, inputs, training=training, memo=memo) == expected  # all of it from the memo
    return graphs.train


NAMES = ("resnet18", "googlenet", "efficientnet_b0", "mobilenet_v3_small", "convnext_tiny", "vit", "paper_resnet110")


@pytest.mark.parametrize("name", [*SHORT, *NAMES])
def test_of_known_models(name):
    entry = SHORT.get(name) or ZOO[name]
    model, (x, _) = entry.make(), entry.pair()
    memo = {}
    gm = assert_remembered(model, Args(x).bind(model.forward), memo)
    assert len(memo) < len(gm.graph.nodes)


def test_a_deep_net_repeats_few_operations():
    entry, memo = ZOO["paper_resnet110"], {}
    model, (x, _) = entry.make(), entry.pair()
    gm = trace(model, Args(x)).train
    annotate(gm, Args(x).bind(model.forward), training=True, memo=memo)
    assert len(memo) < 30
    assert len(gm.graph.nodes) > 400


def test_of_random_models_with_one_memo_for_all():
    memo = {}

    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(programs())
    def check(program):
        hypothesis.assume(not loses_a_hook(program))
        model, (inputs, _) = build(program), batch(program)
        assert_remembered(model, Args(*inputs).bind(model.forward), memo, leaf_modules=program.whole)

    check()
    assert memo


@pytest.mark.parametrize("training", [True, False])
def test_of_programs_captured_by_export(training):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), "input"
    model.train(training)
    inputs = {x: torch.randn(2, 3, 6, 6)}
    gm = record_by_export(model, inputs).graph
    name_sites(gm.graph)
    assert annotated(gm, inputs, training=training, memo={}) == annotated(gm, inputs, training=training)


class Layers(nn.Module):
    """Three equal layers and whatever a test does with them."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("level", torch.zeros(4))
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.code = forward

    def forward(self, x):
        return self.code(self, x)


def _views(m, x):
    for layer in (m.a, m.b, m.c):
        x = layer(x)
        view = x.view(2, 2, 2)
        x += 1
        view[0].mul_(2)
        x = m.act(x)
        x = x * 1 + view.flatten(1)
    return x


def _same_twice(m, x):
    x, y = m.a(x), m.b(x)
    return (x * x) + (x * y) + (y * y) + (y * y.detach())


def _filled(m, x):
    x = m.c(x)
    for layer in (m.a, m.b):
        y = x.new_zeros(2, 4)
        other = y.view(4, 2)
        y[:, 0] = layer(x)[:, 0]  # from here on its views have gradients
        x = x + torch.sigmoid(other).view(2, 4) + torch.sigmoid(y)
    return x


def _reshaped_in_place(m, x):
    for layer in (m.a, m.b):
        y = layer(x) * 2
        y.unsqueeze_(1)
        x = (y * 3).squeeze(1)
    return x


def _complex(m, x):
    for layer in (m.a, m.b):
        y = torch.fft.fft(layer(x))
        x = (y * y.conj()).real + torch.view_as_real(y).sum(-1)
    return x


def _detached(m, x):
    for layer in (m.a, m.b):
        y = layer(x)
        still = y.detach()
        x = torch.sigmoid(y) + still.exp() + y.data
    return x


def _level(m, x):
    m.level.add_(1)
    for layer in (m.a, m.b):
        x = m.drop(layer(x) * m.level + m.level.view(2, 2).flatten() + layer.weight.t().sum(0))
    return x


def _parts(m, x):
    for layer in (m.a, m.b):
        left, right = layer(x).chunk(2, 1)
        x = torch.cat([right.exp(), left, right], 1)[..., : x.shape[1]]
        x = x + torch.stack(layer(x).max(1, keepdim=True)).sum(0)
    return x


WAYS = (_views, _same_twice, _filled, _reshaped_in_place, _complex, _detached, _level, _parts)


@pytest.mark.parametrize("forward", WAYS, ids=lambda f: f.__name__.strip("_"))
def test_of_whatever_shares_memory(forward):
    assert_remembered(Layers(forward), {"x": torch.randn(2, 4)}, {})


def test_tied_parameters_and_modules_called_twice():
    def forward(m, x):
        return m.c(m.b(m.a(m.a(x)))) + F.linear(x, m.a.weight)

    model = Layers(forward)
    model.c.weight = model.b.weight
    assert_remembered(model, {"x": torch.randn(2, 4)}, {})


def test_frozen_parameters_and_modes_of_single_modules_count():
    model = Layers(lambda m, x: m.drop(m.c(m.b(m.a(x)))))
    model.b.requires_grad_(False)
    memo = {}
    assert_remembered(model, {"x": torch.randn(2, 4)}, memo)
    assert len(memo) == 5  # a has gradients and b has none, c stands behind those; dropout in both modes


class Alternating(nn.Module):
    """A module of the user's that does another thing at every second call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.exp() if self.calls % 2 else x.sum(1)


def test_code_of_the_users_is_run_every_time():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.fc = Alternating(), nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.fc(x)).sum() + self.inner(self.fc(x)).sum()

    memo = {}
    gm = assert_remembered(Model(), {"x": torch.randn(2, 4)}, memo, leaf_modules=["inner"])
    values = [info(n).value.shape for n in gm.graph.nodes if n.target == "inner"]
    assert values == [(2, 4), (2,)]


def test_hooks_are_code_of_the_users():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].register_forward_hook(lambda module, inputs, output: output.exp())
    gm = assert_remembered(model, {"input": torch.randn(2, 4)}, {})
    assert len(info(node_of(gm, "1")).saved) == 2


def test_an_error_is_the_same_and_is_not_remembered():
    gm, memo = trace(nn.Linear(4, 4), Args(torch.randn(2, 4))).train, {}
    for _ in range(2):
        with pytest.raises(TraceError, match=r"cannot run on the shapes \[\(2, 5\)") as error:
            annotate(gm, {"input": torch.randn(2, 5)}, training=True, memo=memo)
    assert not memo
    with pytest.raises(TraceError) as plain:
        annotate(gm, {"input": torch.randn(2, 5)}, training=True)
    assert str(plain.value) == str(error.value)

"""What annotate finds out without computing: shapes, FLOPs, bytes kept, storages, writes, channels."""

import copy
import functools
import random

import pytest
import torch
import torchvision
from graphs import node_of
from torch import nn

from sedona_fx.data.args import Args
from sedona_fx.errors import TraceError
from sedona_fx.ir.graph import TensorSpec, info, output_node
from sedona_fx.passes import annotate, trace


def annotated(model, *, training=True, **inputs):
    return annotate(trace(model, Args(**inputs)).train, inputs, training=training)


def kept_bytes(model, *inputs):
    """Measure on real tensors what autograd keeps besides parameters and buffers, each storage once."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        output = model(*inputs)
    del output
    return sum(size for size, _ in kept.values())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def test_shapes_flops_and_parameters_by_hand():
    gm = annotated(Small(), x=torch.randn(2, 3, 6, 6))
    conv, fc = node_of(gm, "conv"), node_of(gm, "fc")
    assert info(conv).value == TensorSpec((2, 8, 6, 6), torch.float32, torch.device("cpu"))
    assert info(conv).value.bytes == 4 * 2 * 8 * 6 * 6
    assert info(conv).flops == 2 * (2 * 6 * 6) * 8 * (3 * 3 * 3)
    assert info(fc).flops == 2 * 2 * 8 * 5
    assert info(node_of(gm, "norm")).flops == 0
    assert info(conv).parameters == ("conv.weight", "conv.bias")
    assert (info(conv).weighty, info(node_of(gm, "norm")).weighty, info(fc).weighty) == (True, False, True)
    assert info(output_node(gm.graph)).value is None
    assert not info(node_of(gm, "x")).depends
    assert all(info(n).from_input for n in gm.graph.nodes)


@functools.cache
def vision_model(name):
    if name == "vit":
        return torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3)
    options = {"init_weights": False} if name == "googlenet" else {}
    return Small() if name == "small" else getattr(torchvision.models, name)(num_classes=3, **options)


@functools.cache
def vision(name):
    return annotated(copy.deepcopy(vision_model(name)), x=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", ["small", "resnet18", "swin_t", "vit", "googlenet"])
def test_saved_bytes_are_what_autograd_keeps(name):
    model, gm, x = vision_model(name), vision(name), torch.randn(2, 3, 32, 32)
    kept = {}
    for node in gm.graph.nodes:
        kept.update(info(node).saved)
    assert sum(kept.values()) == kept_bytes(copy.deepcopy(model).train(), x)


def test_eval_mode_keeps_less():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)), torch.randn(2, 4)
    train, evaluation = (annotated(model, training=mode, input=x) for mode in (True, False))
    assert info(node_of(train, "1")).saved
    evaluation = annotated(copy.deepcopy(model), training=False, input=x)
    assert not info(node_of(evaluation, "1")).saved


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.layer(x)
        view = x.view(2, 2, -1)
        x += 1
        x[:, 0] = 2.0
        x = self.act(x)
        view[0].mul_(2)
        y = x * 1
        return torch.sub(y, view.flatten(), out=None) if False else y


def test_storages_and_writes():
    gm = annotated(Writes(), x=torch.randn(2, 4))
    (storage,) = info(node_of(gm, "layer")).storages
    for site in (":view", ":iadd", ":setitem", "act", ":getitem", ":mul_"):
        assert info(node_of(gm, site)).storages == {storage}, site
    for site in (":iadd", ":setitem", "act", ":mul_"):
        assert info(node_of(gm, site)).mutates == {storage}, site
    for site in (":view", ":getitem", ":mul", "layer"):
        assert not info(node_of(gm, site)).mutates, site
    assert info(node_of(gm, ":mul")).storages != {storage}


def test_nothing_real_is_computed():
    model = Small()
    random.seed(0)
    before = copy.deepcopy(model.state_dict())
    x = torch.full((2, 3, 6, 6), float("nan"))
    gm = trace(model, Args(x=torch.randn(2, 3, 6, 6))).train
    states = torch.get_rng_state(), random.getstate()
    annotate(gm, {"x": x}, training=True)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_what_cannot_run_names_the_place_and_the_shapes():
    gm = trace(Small(), Args(x=torch.randn(2, 3, 6, 6))).train
    with pytest.raises(TraceError, match=r"conv cannot run on the shapes \[\(2, 4, 6, 6\)\]"):
        annotate(gm, {"x": torch.randn(2, 4, 6, 6)}, training=True)


def test_tied_parameters_have_one_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x).mean(1))

    gm = annotated(Tied(), x=torch.zeros(2, 3, dtype=torch.long))
    assert info(node_of(gm, "embed")).parameters == info(node_of(gm, "out")).parameters == ("embed.weight",)


def test_a_detached_value_depends_on_nothing():
    class Stop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y + y.detach()

    gm = annotated(Stop(), x=torch.randn(2, 4))
    assert [info(node_of(gm, site)).is_live for site in ("layer", ":detach", ":add")] == [True, False, True]


def test_what_is_made_of_a_size_or_a_dtype_takes_no_gradient():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y + x.to(y.dtype) * y.shape[0] + y.new_zeros(4)

    gm = annotated(Sized(), x=torch.randn(2, 4))
    live = {info(node).site: info(node).is_live for node in gm.graph.nodes}
    assert [live[site] for site in ("layer", ":to", ":mul", ":new_zeros")] == [True, False, False, True]
    assert not info(node_of(gm, ":getitem")).depends

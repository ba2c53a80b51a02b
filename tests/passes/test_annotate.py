"""What annotate finds out without computing: shapes, FLOPs, bytes kept, storages, writes, channels."""

import copy
import functools
import random

import pytest
import torch
import torchvision
from graphs import node_of
from torch import nn

import sedona_fx
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


def test_leaf_modules_keep_their_attributes_free_of_fake_tensors():
    class Remember(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last, self.count = nn.Linear(4, 4), None, 0

        def forward(self, x):
            self.last, self.count = self.layer(x), self.count + 1
            return self.last

    model = nn.Sequential(Remember(), nn.Linear(4, 2))
    gm = trace(model, Args(torch.randn(2, 4)), leaf_modules=["0"]).train
    annotate(gm, {"input": torch.randn(2, 4)}, training=True)
    assert (model[0].last, model[0].count) == (None, 0)


def test_a_leaf_module_may_decide_by_value():
    class Decide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.calls = nn.Linear(4, 6), nn.BatchNorm1d(6), 0

        def forward(self, x):
            self.calls += 1
            x = self.norm(self.layer(x))
            return x[:, : 3 + int(x.sum() > 1e9)].relu_()

    model = nn.Sequential(nn.Linear(4, 4), Decide(), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 4)
    gm = annotate(trace(model, Args(x), leaf_modules=["1"]).train, {"input": x}, training=True)
    record = info(node_of(gm, "1"))
    assert record.value.shape == (2, 3)
    assert record.flops == 2 * 2 * 4 * 6
    assert record.saved
    assert info(node_of(gm, "2")).saved
    assert model[1].calls == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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


class Packed(nn.Module):
    """Reads sequences of different lengths to their ends."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, h, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][-1]


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.packed, self.fc = nn.Embedding(9, 4), Packed(), nn.Linear(3, 5)

    def forward(self, ids, mask):
        return self.fc(self.packed(self.embed(ids), mask.sum(1)))


def test_a_module_kept_whole_gets_the_lengths_of_the_example():
    """Packing refuses made-up lengths: the ones that the inputs decide are computed."""
    model = Reader().double()
    lengths, target = torch.tensor([6, 2, 4, 1]), torch.tensor([0, 1, 2, 3])
    ids = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"ids": ids, "mask": (torch.arange(6) < lengths[:, None]).long()}
    net = sedona_fx.decouple(model, (inputs, target), cuts=["packed"], heads="linear", leaf_modules=["packed"])
    assert torch.equal(net(**inputs), model(**inputs))
    shorter = {"ids": ids, "mask": (torch.arange(6) < lengths.flip(0)[:, None]).long()}
    assert torch.equal(net(**shorter), model(**shorter))
    net.backward(inputs, target)
    states = [model.packed.lstm(model.embed(row[None, :n]))[1][0][-1] for row, n in zip(ids, lengths, strict=True)]
    h = torch.cat(states)
    own = nn.functional.cross_entropy(net.blocks[0].head(h), target)
    (own + nn.functional.cross_entropy(model.fc(h.detach()), target)).backward()
    for name, parameter in model.named_parameters():
        found = net.model.get_parameter(name).grad
        assert (found - parameter.grad).norm() <= 1e-12 * parameter.grad.norm(), name


def test_a_module_that_cannot_run_on_made_up_numbers_is_named():
    class Late(Reader):
        def forward(self, ids, mask):
            h = self.embed(ids)
            return self.fc(self.packed(h, (h.sum(2) > 0).sum(1)))

    model, ids = Late(), torch.zeros(2, 6, dtype=torch.long)
    inputs = {"ids": ids, "mask": ids}
    with torch.no_grad():
        model.embed.weight.fill_(1.0)
    with pytest.raises(TraceError, match=r"packed computes sizes from numbers.*as the model's inputs give them.*root="):
        annotate(trace(model, Args(**inputs), leaf_modules=["packed"]).train, inputs, training=True)

"""Every schedule on a model of each kind: losses stay finite, and everything that is to be trained is."""

import copy

import pytest
import torch
from catalogue import catalogue
from kinds import ALL, HEADED, HEADLESS, changed, copies
from promises import decoupled, ready
from torch import nn
from torch.nn import functional as F
from zoo import SHORT, ZOO, total_loss

import sedona_fx
from sedona_fx.errors import ScheduleError

STEPS = 4
ENTRIES = catalogue()


class UNet(nn.Module):
    """Two skips past the bottom: up to three activations are alive at a cut."""

    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.d3 = (self.stage(*widths) for widths in ((3, 4), (4, 8), (8, 16)))
        self.u2, self.u1, self.out = self.stage(24, 8), self.stage(12, 4), nn.Conv2d(4, 5, 1)

    def stage(self, incoming, outgoing):
        return nn.Sequential(nn.Conv2d(incoming, outgoing, 3, padding=1), nn.BatchNorm2d(outgoing), nn.ReLU(True))

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        h = self.d3(F.max_pool2d(b, 2))
        h = self.u2(torch.cat([F.interpolate(h, scale_factor=2), b], 1))
        return self.out(self.u1(torch.cat([F.interpolate(h, scale_factor=2), a], 1)))


def from_zoo(name):
    model, (x, y) = (replace_model(name) if name in SHORT else ZOO[name].make()), ZOO[name].pair()
    net = sedona_fx.decouple(model.train(), (x, y), blocks=3, search="balanced", progress=False)
    return net, x, y, total_loss


def replace_model(name):
    torch.manual_seed(0)
    return SHORT[name].make()


def unet():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(5, (4, 8, 8))
    net = sedona_fx.decouple(UNet(), (x, y), cuts=["d2", "u2"])
    assert max(len(block.train_graph.live_exports) for block in net.blocks) == 2
    return net, x, y, F.cross_entropy


def from_catalogue(key):
    entry = ENTRIES[key]
    model, inputs, target = ready(entry)
    return decoupled(entry, model, inputs, target, blocks=3), inputs, target, entry.criterion


MODELS = {name: (from_zoo, name) for name in ("resnet18", "densenet121", "googlenet", "mobilenet_v3_small", "vit")}
MODELS["unet"] = (unet,)
for key in (
    "torchvision segmentation/lraspp_mobilenet_v3_large",
    "transformers/bert",
    "transformers/gpt2",
    "torchvision detection/fasterrcnn_mobilenet_v3_large_320_fpn",
):
    MODELS[key.rpartition("/")[2]] = (from_catalogue, key)
EXPORTED, HOSTED, TIED = ("bert", "gpt2"), ("fasterrcnn_mobilenet_v3_large_320_fpn",), ("gpt2",)
cached = {}


def make(name):
    """Return a net, its batch, and the names of the parameters that have a gradient under plain PyTorch."""
    if name not in cached:
        cached.clear()  # tests come model by model
        build, *args = MODELS[name]
        net, x, y, loss = build(*args)
        assert (net.plan.capture.front_end == "export") == (name in EXPORTED)
        plain = copy.deepcopy(net.model)
        torch.manual_seed(1)
        given = sedona_fx.Args.of(copy.deepcopy(x))
        loss(plain(*given.args, **given.kwargs), y).backward()
        named = {f"model.{n}" for n, p in plain.named_parameters() if p.grad is not None}
        cached[name] = net, x, y, named, copy.deepcopy(net.state_dict())
    net, x, y, named, state = cached[name]
    net.load_state_dict(state)
    net.zero_grad()
    net.steps = 0
    return net, x, y, named


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.01)


CASES = [(name, kind) for name in MODELS for kind in (HEADLESS if name in HOSTED else ALL)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_four_steps(name, kind):
    net, x, y, named = make(name)
    if name in TIED and kind in ("stashed", "replay"):
        with pytest.raises(ScheduleError, match=r"'transformer.wte.weight', which blocks \[0, 2\] share"):
            ALL[kind](net, sgd)
        return
    schedule, before = ALL[kind](net, sgd, clip=1.0), copies(net)
    torch.manual_seed(1)
    for _ in range(STEPS):
        result = schedule.step(x, y)
        assert all(loss.isfinite() for loss in result.losses)
        assert len(result.losses) == (3 if kind in HEADED else 1)
    heads = {n for n, _ in net.named_parameters() if n.startswith("heads.")}
    assert changed(net, before) == (named | heads if kind in HEADED else named)
    assert all(t.isfinite().all() for t in (*net.parameters(), *net.buffers()) if t.is_floating_point())

"""The net around the engine: modes, copies, moves, and saving."""

import copy

import pytest
import torch
import torchvision
from small import Chain, batch, make_net, same, sgd
from torch import nn

import sedona_fx
from sedona_fx.train import Greedy


def test_flags_of_single_modules_survive():
    model = Chain().double()
    model.stages[1][1].eval()
    net = make_net(model)
    assert net.training
    assert [stage[1].training for stage in net.model.stages] == [True, False, True, True]
    x, y = batch()
    sedona_fx.train.evaluate(net, [(x, y)])
    assert [stage[1].training for stage in net.model.stages] == [True, False, True, True]
    before = copy.deepcopy(net.model.stages[1][1].state_dict())
    net.backward(x, y)
    assert all(torch.equal(before[k], v) for k, v in net.model.stages[1][1].state_dict().items())


def test_deepcopy_is_independent():
    net = make_net(drop=0.2)
    x, y = batch()
    Greedy(net, sgd).step(x, y)
    twin = copy.deepcopy(net)
    same(twin, net)
    assert twin.steps == 1
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not {b.data_ptr() for b in net.buffers()} & {b.data_ptr() for b in twin.buffers()}
    before = copy.deepcopy(net.state_dict())
    schedules = Greedy(twin, sgd), Greedy(net, sgd)
    results = [schedules[0].step(x, y)]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not torch.equal(twin.eval()(x), net.eval()(x))
    net.train()
    results.append(schedules[1].step(x, y))
    assert [a.item() for a in results[0].losses] == [b.item() for b in results[1].losses]
    same(net, twin)


def test_to_moves_blocks_and_heads():
    net = make_net(dtype=torch.float32).to(torch.float64)
    x, y = batch()
    assert net.backward(x, y).output.dtype is torch.float64
    assert {p.grad.dtype for p in net.parameters()} == {torch.float64}
    moved = net.to("meta")
    assert [block.device.type for block in moved.blocks] == ["meta"] * 4


def trained_in_float64(model, size, cuts):
    model.eval()
    x, y = torch.randn(2, 3, size, size), torch.tensor([0, 1])
    net = sedona_fx.decouple(model, (x, y), cuts=cuts, heads="tokens-1")
    before = net(x)
    net.to(torch.float64)
    plain = copy.deepcopy(model).double()
    assert torch.equal(net(x.double()), plain(x.double()))
    torch.testing.assert_close(net(x.double()).float(), before)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.backward(x.double(), y)
    assert {p.grad.dtype for p in net.parameters()} == {torch.float64}
    optimizer.step()
    net.eval()
    after = net(x.double())
    assert not torch.equal(after, plain(x.double()))
    plain.load_state_dict(net.original_state_dict())
    assert torch.equal(after, plain(x.double()))
    return net


def test_to_float64_with_parameters_read_at_the_root():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    trained_in_float64(model, 32, ["encoder.layers.encoder_layer_0"])


def test_to_float64_with_buffers_read_inside():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [4, 4], num_classes=3)
    net = trained_in_float64(model, 32, ["features.1"])
    index = net.model.features[1][0].attn.relative_position_index
    assert index.dtype is torch.int64


class Root(nn.Module):
    """Reads a parameter and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("shift", torch.full((6,), 0.5))
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x * self.scale)) + self.shift)


def test_buffers_of_the_root_follow_the_net():
    net = make_net(Root(), cuts=["a"], dtype=torch.float32).to(torch.float64)
    with torch.no_grad():
        net.model.shift.fill_(2.0)
        net.model.scale.fill_(3.0)
    x, y = batch()
    plain = copy.deepcopy(net.model)
    assert torch.equal(net(x), plain(x))
    assert torch.equal(net.backward(x, y).output, plain(x))
    assert torch.equal(net.inference_module()(x), plain(x))


# ---- saving --------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path):
    net = make_net(heads="linear", drop=0.2)
    x, y = batch()
    Greedy(net, sgd).step(x, y)
    net.save(tmp_path / "net")
    torch.manual_seed(99)
    again = sedona_fx.load(tmp_path / "net", Chain(drop=0.2).double())
    same(again, net)
    assert again.plan == net.plan
    assert again.steps == 1
    assert [a.item() for a in again.backward(x, y).losses] == [b.item() for b in net.backward(x, y).losses]
    same(again, net)


def test_load_with_another_model_or_a_damaged_file(tmp_path):
    net = make_net(heads="linear")
    net.save(tmp_path)
    with pytest.raises(sedona_fx.SedonaError, match=r"the plan, made for Chain, names the cut 'stages.2', which"):
        sedona_fx.load(tmp_path, Chain(depth=2).double())
    wide = Chain(width=6).double()
    wide.out = nn.Linear(6, 5).double()
    with pytest.raises(sedona_fx.SedonaError, match=r"belongs to another net: model 'out.bias' is \(3,\).*\(5,\) here"):
        sedona_fx.load(tmp_path, wide)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:200])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(sedona_fx.SedonaError, match=r"cannot read the weights"):
        net.load_weights(weights)
    for foreign in ({"a": 1}, [1], {"model": 3, "heads": {}, "steps": 0}, {"model": net.model.state_dict()}):
        torch.save(foreign, weights)
        with pytest.raises(sedona_fx.SedonaError, match=r"not written by net.save"):
            net.load_weights(weights)
    state = {"model": net.model.state_dict(), "heads": {}, "steps": 3}
    torch.save(state, weights)
    with pytest.raises(sedona_fx.SedonaError, match=r"heads '0.*missing in the file"):
        net.load_weights(weights)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.steps == 0

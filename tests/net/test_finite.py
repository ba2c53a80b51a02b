"""Weights that have turned infinite or NaN are not saved; what was infinite from the start is."""

import copy
import math

import pytest
import torch
from small import Chain, batch, make_net
from torch import nn

import sedona_fx
from sedona_fx.errors import CheckpointError


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.stages.1.0.weight", math.nan),
        ("model.out.bias", math.inf),
        ("heads.2.4.weight", -math.inf),
        ("model.stages.2.1.running_var", math.nan),
        ("heads.0.1.running_mean", math.inf),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["a new folder", "over a good one"])
def test_the_first_such_tensor_is_named_and_the_files_are_kept(tmp_path, name, value, again):
    net, folder = make_net(), tmp_path / "net"
    if again:
        net.save(folder)
    before, good = content(folder), {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with torch.no_grad():
        net.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"'{name}' holds {value}. .*torch.save\(net.state_dict\(\), path\)"):
        net.save(folder)
    assert content(folder) == before
    if again:
        net.load_weights(folder / "weights.pt")
        assert all(torch.equal(tensor, good[key]) for key, tensor in net.state_dict().items())
        net.save(folder)


def test_the_way_out_that_is_named_works(tmp_path):
    net = make_net()
    with torch.no_grad():
        net.model.out.weight.fill_(math.nan)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert torch.load(tmp_path / "w.pt")["model.out.weight"].isnan().all()


class Masked(Chain):
    """Infinite on purpose: a buffer, a frozen parameter; and a buffer that no file has."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((6,), -math.inf))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)
        self.table = nn.Parameter(torch.tensor([0.0, math.inf]), requires_grad=False)
        self.limit = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        return super().forward(torch.maximum(x, self.mask) + self.table[0])


def test_what_was_infinite_from_the_start_is_saved(tmp_path):
    net = make_net(Masked(), heads="linear")
    net.model.scratch.fill_(math.nan)
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Masked().double())
    x, _ = batch()
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert torch.equal(again.model.mask, torch.full((6,), -math.inf, dtype=torch.float64))
    again.save(tmp_path)  # a net that was loaded knows it as well
    net.model.register_buffer("later", torch.full((2,), math.inf))
    net.save(tmp_path)
    net.model.limit[0] = math.nan
    with pytest.raises(CheckpointError, match=r"'model.limit' holds nan"):
        net.save(tmp_path)


def test_a_copy_of_a_net_knows_it_too(tmp_path):
    net = copy.deepcopy(make_net(Masked()))
    net.save(tmp_path)
    with torch.no_grad():
        net.model.out.weight[0] = math.nan
    with pytest.raises(CheckpointError, match=r"'model.out.weight' holds nan"):
        net.save(tmp_path)

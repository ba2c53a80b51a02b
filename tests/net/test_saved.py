"""What a net saves is what loads: damage, other nets, extra state, and pickling."""

import copy
import pickle
import random

import pytest
import torch
from small import Chain, batch, make_net, same
from torch import nn

import sedona_fx
from sedona_fx.errors import CheckpointError, ExportError


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def unchanged(net, before):
    return all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_damaged_weights_load_as_they_were_or_not_at_all(tmp_path):
    net, draw = make_net(heads="linear"), random.Random(1)
    net.save(tmp_path)
    path = tmp_path / "weights.pt"
    raw, before, refused = path.read_bytes(), state_of(net), 0
    for place in draw.sample(range(len(raw)), 200):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            net.load_weights(path)
        except CheckpointError:
            refused += 1
        assert unchanged(net, before), place
        assert net.steps == 0
    assert refused > 60


def edited(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


@pytest.mark.parametrize("steps", [-1, 2**53, 10**30, 1.5, True, "3", None, float("nan")])
def test_absurd_counts_of_steps(tmp_path, steps):
    net = make_net(heads="linear")
    net.save(tmp_path)
    edited(tmp_path / "weights.pt", steps=steps)
    with pytest.raises(CheckpointError, match=r"is damaged: its number of steps is"):
        net.load_weights(tmp_path / "weights.pt")


def test_weights_of_another_dtype_are_refused_and_nothing_is_loaded(tmp_path):
    net = make_net(heads="linear")
    net.save(tmp_path)
    single = make_net(heads="linear", dtype=torch.float32)
    before = state_of(single)
    with pytest.raises(CheckpointError, match=r"float64 in the file and .* float32 here.*model.to\(dtype\)"):
        single.load_weights(tmp_path / "weights.pt")
    assert unchanged(single, before)
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    state["model"]["stages.0.0.weight"] = state["model"]["stages.0.0.weight"].to_sparse()
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"sparse_coo in the file|cannot read the weights.*sparse"):
        net.load_weights(tmp_path / "weights.pt")
    state["model"]["stages.0.0.weight"] = state["model"]["stages.0.0.weight"].to_dense()
    torch.save({**state, "model": {**state["model"], 3: torch.ones(())}}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"'3' is \(\) in the file and missing here"):
        net.load_weights(tmp_path / "weights.pt")


def test_weights_from_before_cuts_were_written_beside_them(tmp_path):
    net = make_net(heads="linear")
    state = {"model": net.model.state_dict(), "heads": net.heads.state_dict(), "steps": 3}
    torch.save(state, tmp_path / "weights.pt")
    other = make_net(Chain(), heads="linear")
    with torch.no_grad():
        next(other.parameters()).zero_()
    other.load_weights(tmp_path / "weights.pt")
    same(other, net)
    assert other.steps == 3


# ---- other cuts and heads -------------------------------------------------------------------------------------------


def plain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3)).double()


def cut_at(cuts, heads="linear"):
    return sedona_fx.decouple(plain(), batch(), cuts=cuts, heads=heads, progress=False)


def test_a_net_with_other_cuts_or_heads_is_refused_with_the_difference(tmp_path):
    net, other = cut_at(["0", "2"]), cut_at(["1", "2"])
    before = state_of(other)
    assert before.keys() == net.state_dict().keys()
    match = r"its cuts are \['0', '2'\] there and \['1', '2'\] here"
    for state in (net.state_dict(), copy.deepcopy(net.state_dict())):
        for strict in (True, False):
            with pytest.raises(CheckpointError, match=match):
                other.load_state_dict(state, strict=strict)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=match):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    wrapped, outer = nn.Sequential(other), nn.Sequential(net)
    with pytest.raises(CheckpointError, match=match):
        wrapped.load_state_dict(outer.state_dict())
    net.save(tmp_path)
    with pytest.raises(CheckpointError, match=match):
        other.load_weights(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"other cuts or heads: its heads are \['linear', 'linear'\] there and"):
        cut_at(["0", "2"], ["linear", "mlp-sr"]).load_state_dict(net.state_dict())
    assert unchanged(other, before)
    other.load_state_dict({name: v for name, v in net.state_dict().items() if name.startswith("model.")}, strict=False)
    assert torch.equal(other.model[0][0].weight, net.model[0][0].weight)


def test_without_metadata_names_and_shapes_of_heads_are_compared():
    net, other = cut_at(["0", "2"]), cut_at(["1", "2"], "mlp-sr")
    before = state_of(other)
    with pytest.raises(CheckpointError, match=r"other cuts or heads: '0\..* there and .* here"):
        other.load_state_dict(dict(net.state_dict()))
    assert unchanged(other, before)
    net.load_state_dict(dict(net.state_dict()))
    net.load_state_dict(net.state_dict())
    assert list(net.state_dict()) == [*(f"model.{n}" for n in net.model.state_dict()), *_heads(net)]


def _heads(net):
    return [f"heads.{name}" for name in net.heads.state_dict()]


# ---- extra state ----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A layer with extra state, nothing at first."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(6, 6), None

    def forward(self, x):
        return torch.tanh(self.fc(x))

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def counting():
    torch.manual_seed(0)
    return nn.Sequential(Counting(), Counting(), nn.Linear(6, 3)).double()


STATES = [3, {"seen": [1, 2], "mean": torch.ones(2)}, torch.arange(3), (1.5, None, "x"), {1, 2}, b"bytes"]


@pytest.mark.parametrize("seen", STATES, ids=lambda s: type(s).__name__)
def test_extra_state_comes_back(tmp_path, seen):
    net = sedona_fx.decouple(counting(), batch(), cuts=["0"], progress=False)
    net.model[0].seen = seen
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, counting())
    assert str(again.model[0].seen) == str(seen)
    assert again.model[1].seen is None


def test_extra_state_that_could_not_be_read_is_refused_when_it_is_saved(tmp_path):
    net = sedona_fx.decouple(counting(), batch(), cuts=["0"], progress=False)
    net.save(tmp_path)
    before = (tmp_path / "weights.pt").read_bytes()
    for seen in (random.Random(0), {"deep": [Counting]}, lambda: 3):
        net.model[1].seen = seen
        with pytest.raises(CheckpointError, match=r"the state '1._extra_state' of 1 \(Counting\) could be written but"):
            net.save(tmp_path)
    assert (tmp_path / "weights.pt").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "weights.pt"}


# ---- pickling -------------------------------------------------------------------------------------------------------


def test_pickling_points_to_save(tmp_path):
    net = make_net(heads="linear")
    for write in (pickle.dumps, copy.copy(pickle.dumps), lambda n: torch.save(n, tmp_path / "n.pt")):
        with pytest.raises(ExportError, match=r"net\.save\(folder\).*sedona_fx\.load"):
            write(net)
    with pytest.raises(ExportError, match=r"net\.save"):
        pickle.dumps({"epoch": 3, "net": net})
    x, y = batch()
    twin = copy.copy(net)
    assert twin.model is net.model
    assert torch.equal(twin(x), net(x))
    assert [a.item() for a in copy.deepcopy(net).backward(x, y).losses] == [a.item() for a in net.losses(x, y)]

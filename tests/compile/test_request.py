"""What is handed to decouple: wrapped models, outputs named from the end, losses that read what no head gives."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from zoo import same_bits

import sedona_fx
from sedona_fx.errors import DataError, OutputError

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.c(self.b(self.a(x))))


def decouple(model, **how):
    return sedona_fx.decouple(model, (X, Y), **{"cuts": ["a", "b"], "heads": "linear", **how})


# ---- wrapped models --------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_unwrapped(model, wrapped, tmp_path):
    net = decouple(wrapped)
    assert type(net.model) is Small
    assert net.plan.model == "Small"
    assert net.original_state_dict().keys() == model.state_dict().keys()
    assert same_bits(net(X), model(X))
    net.save(tmp_path / "net")
    assert same_bits(sedona_fx.load(tmp_path / "net", wrapped)(X), model(X))
    shared = decouple(wrapped, inplace=True)
    assert {id(p) for p in shared.model.parameters()} == {id(p) for p in model.parameters()}
    assert sedona_fx.transfer_plan(net.plan, wrapped, data=(X, Y)).cuts == net.plan.cuts


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))],
    ids=["DataParallel", "compile", "both"],
)
def test_wrapped_models_are_unwrapped(wrap, tmp_path):
    model = Small()
    check_unwrapped(model, wrap(model), tmp_path)


@pytest.mark.usefixtures("one_process")
def test_a_model_in_distributed_data_parallel_is_unwrapped(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    model = Small()
    check_unwrapped(model, DistributedDataParallel(model), tmp_path)


def test_a_class_of_that_name_is_the_users_own():
    class DataParallel(Small):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(self.module(x))

    model = DataParallel()
    assert same_bits(decouple(model)(X), model(X))


def test_a_net_is_no_model():
    with pytest.raises(DataError, match=r"is a net already.*decouple\(net\.model, \.\.\.\)"):
        decouple(decouple(Small()))


# ---- output= ---------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    hidden: torch.Tensor
    scores: torch.Tensor
    count: int = 3


class Returning(Small):
    """Returns its scores in some container."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        h = self.c(self.b(self.a(x)))
        return self.form(h, self.out(h))


@pytest.mark.parametrize(
    ("form", "index", "key"),
    [
        (lambda h, z: (h, z), -1, 1),
        (lambda h, z: [z, h], -2, 0),
        (lambda h, z: {"hidden": h, "scores": z}, -1, "scores"),
        (lambda h, z: {"hidden": h, "scores": z}, 1, "scores"),
        (Output, -2, "scores"),
    ],
    ids=["tuple", "list", "dict", "dict from the front", "dataclass"],
)
def test_outputs_from_the_end(form, index, key, tmp_path):
    def loss(out, y):
        return F.cross_entropy(out[key] if isinstance(key, int) or isinstance(out, dict) else out.scores, y)

    net, named = (decouple(Returning(form), output=which, loss=loss) for which in (index, key))
    named.load_state_dict(net.state_dict())
    assert [v.item() for v in net.backward(X, Y).losses] == [v.item() for v in named.backward(X, Y).losses]
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Returning(form), loss=loss)
    assert again.engine.output.key == key


def test_an_index_that_is_too_low_is_refused():
    with pytest.raises(OutputError, match=r"output=-3 names no float tensor"):
        decouple(Returning(lambda h, z: (h, z)), output=-3)


# ---- losses ----------------------------------------------------------------------------------------------------------


class Auxiliary(Small):
    def forward(self, x):
        h = self.b(self.a(x))
        return {"out": self.out(self.c(h)), "aux": self.out(h), "half": self.out(h) / 2}


class OwnLoss(Small):
    def forward(self, x):
        z = super().forward(x)
        return z, z.square().mean()


def summed(out, y):
    return sum(F.cross_entropy(value, y) for name, value in out.items() if name != "half")


@pytest.mark.parametrize(
    ("model", "loss", "names"),
    [
        (Auxiliary, summed, r"'aux' of the output, which no head gives: a head imitates the primary output \('out'\)"),
        (Auxiliary, lambda out, y: F.cross_entropy(out["aux"] + out["half"], y), "'aux', 'half' of the output"),
        (OwnLoss, lambda out, y: out[1], r"1 of the output.*it returns NoneType"),
    ],
    ids=["one field", "two fields", "the model's own loss"],
)
def test_losses_that_read_what_no_head_gives(model, loss, names):
    with pytest.raises(DataError, match=f"the loss reads {names}.*LocalLoss.*heads=False"):
        decouple(model(), loss=loss)


def test_such_losses_are_right_without_heads():
    for how in ({"cuts": None, "blocks": 1}, {"heads": False}, {"local_loss": LOCAL, "heads": None}):
        net = decouple(Auxiliary(), loss=summed, **how)
        sedona_fx.train.Backprop(net, lambda params: torch.optim.SGD(params, lr=0.1)).step(X, Y)


def test_losses_that_leave_out_what_is_missing_are_taken():
    def loss(out, y):
        return sum(F.cross_entropy(value, y) for value in out.values() if value is not None)

    assert len(decouple(Auxiliary(), loss=loss).backward(X, Y).losses) == 3


LOCAL = sedona_fx.LocalLoss(lambda out, inputs, target: F.cross_entropy(out, target), head="linear")

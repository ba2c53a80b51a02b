"""What bad input gets: a typed error that names the place and says what to do."""

import functools
import json

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx.errors import (
    CheckpointError,
    CutError,
    DataError,
    HeadError,
    NonFiniteLossError,
    OutputError,
    PlanError,
    SearchDivergedError,
    SedonaError,
    TraceError,
    did_you_mean,
    shape_text,
)
from sedona_fx.heads import registry as heads
from sedona_fx.search import Search


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.stem, self.body, self.neck = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(torch.relu(self.neck(x)))


X, Y = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


def decouple(model=None, data=(X, Y), **how):
    how = {"search": "uniform", "blocks": 2, **how}
    return sedona_fx.decouple(Net() if model is None else model, data, **how)


class Branching(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x
        return -x


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        # blocks
        ({"blocks": 0}, CutError, r"blocks=0: give a whole number, at least 1"),
        ({"blocks": -3}, CutError, r"blocks=-3"),
        ({"blocks": 2.0}, CutError, r"blocks=2.0: give a whole number"),
        ({"blocks": "4"}, CutError, r"blocks='4'"),
        ({"blocks": True}, CutError, r"blocks=True"),
        ({"blocks": 40}, CutError, r"40 blocks need 39 cuts; this model has \d legal cut points, enough for \d blocks"),
        ({"blocks": 40, "search": "balanced"}, CutError, r"40 blocks need 39 cuts"),
        # searches and heads
        ({"search": "unifrom"}, CutError, r"search='unifrom' is not known; the nearest names are 'uniform'; one of"),
        (
            {"search": 3},
            CutError,
            r"search=3 is no search: one of \['balanced', 'guided', 'latest', 'rollout', 'sedona', 'uniform'\]",
        ),
        ({"search": sedona_fx.search.Uniform}, CutError, r"is no search: .*object with decide"),
        ({"heads": "mlp-rs"}, HeadError, r"no head named 'mlp-rs'; the nearest names are 'mlp-sr'.*All names: "),
        ({"heads": ["tokens-2", "lineer"], "cuts": ["stem"]}, HeadError, r"1 cuts take one head for all or 1 heads"),
        # data
        ({"data": []}, DataError, r"the data is empty: .*at least one \(inputs, target\) batch"),
        ({"data": 3}, DataError, r"the data is int, neither an \(inputs, target\) tuple nor an iterable"),
        ({"data": [X]}, DataError, r"the data gives a Tensor where \(inputs, target\) is expected. Wrap data without"),
        ({"data": [(X, Y, Y)]}, DataError, r"gives a tuple of 3 where \(inputs, target\)"),
        ({"data": ((X, X), Y)}, DataError, r"the inputs do not fit the model's forward\(x\): too many positional"),
        ({"data": ({"y": X}, Y)}, DataError, r"the inputs do not fit the model's forward\(x\): missing .*'x'"),
        ({"data": (torch.randn(4, 5), Y)}, DataError, r"Net in train mode cannot run the first batch .*\(2, 5\).*mat1"),
        # loss
        ({"loss": "mse"}, DataError, r"loss='mse' cannot be called: give a function loss\(output, target\)"),
        (
            {"data": (X, torch.randn(4, 5))},
            DataError,
            r"the loss cannot take the model's output, \(4, 3\) torch.float32, with the target, \(4, 5\) torch.float32",
        ),
        (
            {"loss": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")},
            DataError,
            r"must return a scalar tensor, not torch.Size\(\[4\]\)",
        ),
        ({"loss": lambda o, t: 1.0}, DataError, r"must return a scalar tensor, not 1.0"),
        # cuts
        ({"cuts": ["stm"]}, CutError, r"cuts names the cut 'stm', which this model does not have; .* 'stem'"),
        ({"cuts": "stm"}, CutError, r"cuts names the cut 'stm'"),
        ({"cuts": ["head"]}, CutError, r"cuts names 'head', which is in the model \(head\) but no legal cut: it is no"),
        ({"cuts": {"stem": "middle"}}, CutError, r"cuts=\{'stem': 'middle'\}: a cut stands at the 'beginning' or at"),
        ({"cuts": {"stm": "beginning"}}, CutError, r"cuts names the module 'stm', which the model does not .*'stem'"),
        ({"cuts": {"stem": "beginning"}}, CutError, r"no activation that depends on parameters enters 'stem'"),
        ({"no_cut": ["stm"]}, CutError, r"no_cut names 'stm', which the model does not have; .* 'stem'"),
        ({"cuts": ["neck", "stem"]}, CutError, r"cuts must name cuts in the order of the forward pass, each once"),
        ({"cuts": ["stem", "stem"]}, CutError, r"in the order of the forward pass, each once"),
        ({"cuts": [3]}, CutError, r"cuts names 3, which is no name: a cut is a module path such as 'layer1.0'"),
        # devices
        ({"devices": ["cpu"]}, PlanError, r"devices=\['cpu'\] names 1 devices for 2 blocks: give a list with one a"),
        ({"devices": "cpu"}, PlanError, r"devices='cpu' names one device for 2 blocks"),
        ({"devices": ["cpu"] * 3, "cuts": ["stem"]}, PlanError, r"3 devices for 2 blocks"),
        ({"devices": ["cpu", "cpx:1"]}, PlanError, r"devices names 'cpx:1', which cannot be used here"),
        # plans
        ({"plan": 3}, PlanError, r"plan=3 is neither a Plan nor the path of one"),
        ({"plan": "nowhere.json"}, PlanError, r"cannot read the plan 'nowhere.json'"),
        # outputs and leaves
        ({"output": "logits"}, OutputError, r"output='logits' names no float tensor in what the model returns"),
        ({"leaf_modules": "bdy"}, TraceError, r"leaf_modules names 'bdy', .*nearest names are 'body'"),
        ({"leaf_modules": [3]}, TraceError, r"leaf_modules names 3"),
        # models
        ({"model": "resnet"}, DataError, r"decouple takes an nn.Module, not str"),
        (
            {"model": Branching()},
            TraceError,
            r"the forward of the model's own forward, .*test_decouple_errors.py line \d+: `if x.mean\(\) > 0:`.*leaf_",
        ),
        (
            {"model": nn.Linear(4, 3)},
            CutError,
            r"2 blocks need 1 cuts; this model has 0 legal cut points, enough for 1",
        ),
        ({"model": nn.ReLU()}, CutError, r"the output of ReLU does not depend on any of its parameters"),
        ({"model": nn.Flatten(), "loss": None, "blocks": 1}, CutError, r"does not depend on any of its parameters"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else "",
)
def test_bad_input(how, kind, message):
    with pytest.raises(kind, match=message) as caught:
        decouple(**how)
    assert isinstance(caught.value, SedonaError)


def test_no_float_output():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return {"ids": self.layer(x).argmax(1)}

    with pytest.raises(OutputError, match=r"the model returns \w*dict with no float tensor .* name one with output="):
        decouple(Ids())


def test_the_sedona_search_wants_data_that_it_can_go_through_again():
    batches = [(X, Y)] * 3
    with pytest.raises(DataError, match=r"data is a one-shot iterator \(generator\).*Hand a DataLoader or a list"):
        decouple(data=(b for b in batches), search="sedona")
    with pytest.raises(DataError, match=r"single \(inputs, target\) pair, which is not enough.*search='balanced'"):
        decouple(search="sedona")
    with pytest.raises(DataError, match=r"val_data is a one-shot iterator"):
        decouple(data=batches, val_data=iter(batches), search="sedona")
    decouple(data=(b for b in batches))  # one batch is all that a rule needs
    decouple(search="sedona", blocks=1)


def test_devices_are_looked_at_before_the_search():
    class Never(Search):
        needs_data = False

        def decide(self, problem):
            raise AssertionError("searched")

    with pytest.raises(PlanError, match="devices"):
        decouple(search=Never(), devices=["cpu"])


def test_a_plan_for_another_model():
    plan = decouple(cuts=["stem", "neck"]).plan
    other = nn.Sequential()
    for name in ("stem", "body", "nek", "head"):
        other.add_module(name, nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"the plan, made for Net, names the cut 'neck', which .* are 'nek'"):
        decouple(other, plan=plan)


def test_a_plan_with_an_unknown_head(tmp_path):
    data = {**json.loads(decouple(cuts=["stem"]).plan.to_json()), "heads": ["tokens-7"]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"the head 'tokens-7' behind 'stem', .*nearest names are 'tokens-\d'"):
        decouple(plan=path)
    made = decouple(plan=sedona_fx.Plan.from_json(json.dumps({**data, "heads": ["linear"]})))
    assert made.plan.heads == ("linear",)


def test_a_plan_brings_its_devices():
    plan = decouple(cuts=["stem"], devices=["cpu", "cpu"]).plan
    assert plan.devices == ("cpu", "cpu")
    assert decouple(plan=plan).plan.devices == ("cpu", "cpu")


def test_applying_a_plan_gives_the_plan():
    net = decouple(search="balanced", blocks=3)
    again = decouple(plan=net.plan)
    assert (again.plan.cuts, again.plan.heads) == (net.plan.cuts, net.plan.heads)
    assert torch.equal(again.losses(X, Y)[0], decouple(plan=net.plan, model=again.model).losses(X, Y)[0])


def test_a_failing_save_leaves_the_old_files(tmp_path, monkeypatch):
    net = decouple()
    net.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(state, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        net.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_of_another_net(tmp_path):
    decouple().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"another net: model 'body.bias' is \(6,\) in the file and \(5,\) here"):
        sedona_fx.load(tmp_path, Net(width=5))
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        sedona_fx.load(tmp_path, Net())
    (tmp_path / "plan.json").unlink()
    with pytest.raises(PlanError, match="cannot read the plan"):
        sedona_fx.load(tmp_path, Net())


def test_wrong_arguments_of_the_net():
    net = decouple()
    with pytest.raises(DataError, match=r"too many positional"):
        net(X, X)
    with pytest.raises(DataError, match=r"cannot take the output of block 0, \(4, 3\) float32, with .*\(4, 5\)"):
        net.losses(X, torch.randn(4, 5))


def of_width(width):
    return lambda context: nn.Sequential(nn.Linear(context.channels, width), nn.Linear(width, 3))


def other_linear(context):
    return nn.Linear(context.channels, 3)


@pytest.mark.parametrize("how", [{}, {"search": "latest", "blocks": 3}, {"cuts": ["stem", "neck"]}], ids=str)
def test_heads_that_a_plan_could_not_tell_apart(how):
    narrow, wide = of_width(2), of_width(5)
    given = [narrow, wide] if "cuts" in how else [narrow, other_linear, wide]
    name = r"'test_decouple_errors:of_width.*lambda>'"
    which = rf"heads\[0\] and heads\[{len(given) - 1}\] are different factories of one name, {name}, .*register_head"
    with pytest.raises(CutError, match=which):
        decouple(heads=given, **how)
    plan = decouple(heads=[narrow], cuts=["stem"]).plan
    with pytest.raises(CutError, match=r"different factories of one name"):
        decouple(plan=plan, heads=[wide, narrow])
    decouple(heads=[*given[:-1], narrow], **how)  # the same object is the same head
    partial = functools.partial(of_width, 2)
    with pytest.raises(CutError, match=r"heads\[0\] and heads\[1\] are different .* 'test_decouple_errors:of_width', "):
        decouple(heads=[partial, functools.partial(of_width, 5)])


def test_registered_names_tell_heads_apart(monkeypatch):
    monkeypatch.setattr("sedona_fx.heads.registry._REGISTRY", dict(heads._REGISTRY))
    narrow, wide = of_width(2), of_width(5)
    sedona_fx.register_head("narrow", narrow)
    sedona_fx.register_head("wide", wide)
    net = decouple(heads=[narrow, wide, "narrow"], cuts=["stem", "body", "neck"])
    assert net.plan.heads == ("narrow", "wide", "narrow")
    assert [net.blocks[k].head[0].out_features for k in range(3)] == [2, 5, 2]


def test_objectives_may_have_heads_of_one_name(tmp_path):
    def loss(output, inputs, target):
        return output.square().mean()

    own = [sedona_fx.LocalLoss(loss, head=of_width(width)) for width in (2, 5)]
    net = decouple(cuts=["stem", "neck"], local_loss=own)
    net.save(tmp_path)
    for again in (sedona_fx.load(tmp_path, Net(), local_loss=own), decouple(plan=net.plan, local_loss=own)):
        assert [again.blocks[k].head[0].out_features for k in range(2)] == [2, 5]


def test_messages_of_errors_with_facts():
    error = NonFiniteLossError(2, 7, float("nan"))
    assert (error.block, error.step) == (2, 7)
    assert "the loss of block 2 is nan at step 7" in str(error)
    assert "no plan had been found yet" in str(SearchDivergedError("at iteration 3", None))
    assert did_you_mean("layr1", ["layer1", "layer2", "fc"]) == "; the nearest names are 'layer1', 'layer2'"
    assert did_you_mean("zzz", ["a"]) == ""
    assert (shape_text((2, 3)), shape_text([4]), shape_text(())) == ("(2, 3)", "(4,)", "()")


@pytest.mark.parametrize("search", ["guided", "sedona", "rollout"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"loss": None}, r"compares heads by the loss, and loss=None: hand loss=.*'balanced'"),
        ({"val_data": []}, r"val_data is empty: hand at least one \(inputs, target\) batch, or leave it out"),
        ({"val_data": [(torch.randn(4, 5), Y)]}, r"first batch of val_data, Args\(x=\(4, 5\) .*: mat1"),
        ({"val_data": [(X, Y + 5)]}, r"first batch of val_data, .*IndexError: Target \d is out of bounds"),
    ],
)
def test_what_a_search_cannot_use_is_refused_before_it_trains(search, how, message):
    trained = []
    net = Net()
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: trained.append(m))
    data = [(X, Y)] * 400
    try:
        with pytest.raises(DataError, match=message):
            decouple(net, data, search=search, progress=False, **how)
    finally:
        hook.remove()
    assert len(trained) < 100

"""Plans: what they hold, how they are read and written, and what bad files get."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch

import sedona_fx
from sedona_fx import Plan
from sedona_fx.errors import PlanError
from sedona_fx.net.signature import example_like
from sedona_fx.plan_values import Capture

PLAN = Plan(
    cuts=("layer1", "layer2.0"),
    heads=("mlp-sr", None),
    devices=("cpu", "cpu", "cuda:1"),
    output="logits",
    model="Net",
    base_layers=("layer1", "layer2.0", "layer3"),
    inputs={"x": {"shape": [2, 3], "dtype": "float32"}, "flag": True, "pair": [1, {"shape": [], "dtype": "int64"}]},
    seed=3,
    capture=Capture("export", free_batch=False, left_out=("cache (Cache)",)),
    block_seconds={"places": ["layer1"], "stretches": [0.5, 0.25], "heads": {"layer1": {"mlp-sr": 0.125}}},
    provenance={"search": "uniform", "loss": float("inf")},
)


def test_json_round_trip():
    assert Plan.from_json(PLAN.to_json()) == PLAN
    assert PLAN.blocks == 3
    assert Plan.from_json(Plan().to_json()) == Plan()
    assert Plan().blocks == 1


def test_plans_of_format_1_are_read():
    """They kept in the provenance what has fields of its own now; the provenance keeps none of it."""
    measured = {"places": ["a"], "stretches": [1.0, 2.0], "heads": {"a": {"linear": 0.5}}}
    record = {
        "search": "balanced",
        "budget": {"block_seconds": 3.0, "measured": measured},
        "seed": 7,
        "front_end": "export",
        "free_batch": False,
        "host": "runs as it is",
        "left_out": ["cache (Cache)"],
        "torch": "2.11",
    }
    text = json.dumps({"format": 1, "cuts": ["a"], "heads": ["linear"], "provenance": record})
    plan = Plan.from_json(text)
    assert (plan.seed, plan.block_seconds) == (7, measured)
    assert plan.capture == Capture("export", free_batch=False, hosted=True, left_out=("cache (Cache)",))
    assert plan.provenance == {"search": "balanced", "budget": {"block_seconds": 3.0}, "torch": "2.11"}
    assert Plan.from_json(plan.to_json()) == plan
    bare = Plan.from_json('{"format": 1, "cuts": [], "heads": [], "provenance": {"front_end": "symbolic"}}')
    assert (bare.seed, bare.capture, bare.block_seconds) == (0, Capture(), None)


def strictly(text):
    """Read JSON as a reader does that knows the standard alone."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_none_in_the_provenance():
    rounds = [{"step": 2, "scores": [["a", 1.5], ["b", math.inf], ["c", -math.inf]]}, {"step": 4, "scores": ()}]
    found = {"rounds": rounds, "own": (1, math.nan, {"x": np.float64("inf")}), "kept": [1.0, "inf", True]}
    plan = Plan(provenance=found)
    assert rounds[0]["scores"][1][1] == math.inf  # what was handed over stays as it is
    assert plan.provenance["rounds"][0] == {"step": 2, "scores": [["a", 1.5], ["b", None], ["c", None]]}
    assert plan.provenance["own"] == [1, None, {"x": None}]
    assert plan.provenance["kept"] == [1.0, "inf", True]
    data = strictly(plan.to_json())
    assert data["provenance"]["own"] == [1, None, {"x": None}]
    assert Plan.from_json(plan.to_json()).provenance["rounds"][0] == plan.provenance["rounds"][0]


def test_files_of_before_that_hold_infinity_are_read():
    held = '"provenance": {"loss": Infinity, "other": [NaN, -Infinity, 2]}'
    plan = Plan.from_json(Plan().to_json().replace('"provenance": {}', held))
    assert plan.provenance == {"loss": None, "other": [None, None, 2]}
    strictly(plan.to_json())


def test_inputs_that_are_infinite_come_back():
    inputs = {"x": {"shape": [2], "dtype": "float32"}, "low": -math.inf, "nested": [1.5, {"high": math.inf}], "n": 3}
    plan = Plan(inputs=inputs)
    assert strictly(plan.to_json())["inputs"]["low"] == {"float": "-inf"}
    assert Plan.from_json(plan.to_json()) == plan
    unknown = Plan.from_json(Plan(inputs={"nan": math.nan}).to_json()).inputs["nan"]
    assert math.isnan(unknown)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == Plan.load(str(path)) == PLAN
    before = path.read_text()
    unsavable = Plan(provenance={"what": object()})
    with pytest.raises(TypeError):
        unsavable.save(path)
    assert path.read_text() == before
    monkeypatch.setattr(Plan, "to_json", lambda self: "half" + 1)
    with pytest.raises(TypeError):
        PLAN.save(path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def without(name):
    data = json.loads(PLAN.to_json())
    del data[name]
    return json.dumps(data)


def but(**changes):
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.to_json()[:100], r"the plan '.*plan.json' is not JSON: .*truncated; make the plan again"),
        ("", "is not JSON"),
        ("[1, 2]", "holds list, not an object"),
        (without("format"), r'has no "format": 2; it was not written by this version'),
        (but(format=3), r'has no "format": 2'),
        (but(cutz=[]), r"unknown field 'cutz'; the nearest names are 'cuts'"),
        (without("cuts"), "lacks the field 'cuts'"),
        (without("heads"), "lacks the field 'heads'"),
        (but(cuts="layer1"), "the field 'cuts' should be a list of names, not str"),
        (but(cuts=[1, 2]), "the field 'cuts' should be a list of names"),
        (but(heads=[None, 3]), "the field 'heads' should be a list of names"),
        (but(devices=[0, 1, 2]), "the field 'devices' should be a list of names"),
        (but(base_layers=[None]), "the field 'base_layers' should be a list of names"),
        (but(output=1.5), "the field 'output' should be a name, an index or null, not float"),
        (but(output=True), "the field 'output' should be a name, an index or null, not bool"),
        (but(model=None), "the field 'model' should be a name, not NoneType"),
        (but(inputs=[]), "the field 'inputs' should be an object, not list"),
        (but(provenance=None), "the field 'provenance' should be an object"),
        (
            but(format=1, provenance={"seed": "x"}),
            "in its provenance: the field 'seed' should be a whole number, not str",
        ),
        (but(seed=1.5), "the field 'seed' should be a whole number, not float"),
        (but(seed=True), "the field 'seed' should be a whole number, not bool"),
        (but(capture=[]), "the field 'capture' should be an object, not list"),
        (but(capture={"frontend": "export"}), "unknown entry 'frontend'; the nearest names are 'front_end'"),
        (but(capture={"front_end": "magic"}), "the front end 'magic' is neither 'symbolic' nor 'export'"),
        (but(capture={"free_batch": 1}), "the field 'capture' should have two flags and a list of names"),
        (but(capture={"left_out": [3]}), "the field 'capture' should have two flags and a list of names"),
        (but(capture={"free_sizes": None}), "the entry 'free_sizes' of the field 'capture' should be a list"),
        (but(capture={"left_out": 3}), "the field 'capture' should have two flags and a list of names"),
        (but(block_seconds=[]), "the field 'block_seconds' should be an object, not list"),
        (but(block_seconds={"places": []}), "the field 'block_seconds' should have places, stretches and heads"),
        (but(inputs={"x": {"shape": "23", "dtype": "int64"}}), r"the input 'x' has the shape '23'"),
        (but(inputs={"x": [{"shape": [2.5], "dtype": "int64"}]}), r"the input 'x' has the shape \[2.5\]"),
        (but(inputs={"x": {"shape": [2], "dtype": "float99"}}), r"the dtype 'float99', which torch does not know"),
        (but(cuts=["a"]), "one head .* a cut: 1 cuts, 2 heads"),
        (but(cuts=["a", "a"]), r"names a cut twice: \['a', 'a'\]"),
        (but(devices=["cpu"]), "one device a block: 3 blocks, 1 devices"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read the plan '.*none.json'"):
        Plan.load(tmp_path / "none.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "bytes")


def test_damaged_files_are_what_was_written_or_refused(tmp_path):
    path, draw, refused = tmp_path / "plan.json", random.Random(0), 0
    PLAN.save(path)
    raw = path.read_bytes()
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert Plan.load(path) == PLAN, place
        except PlanError:
            refused += 1
    assert refused > len(raw) // 2
    data = json.loads(raw)
    path.write_text(json.dumps({**data, "seed": 4}))
    with pytest.raises(PlanError, match=r'plan.json\' is damaged: .*edited it by hand, remove its line "checksum"'):
        Plan.load(path)
    del data["checksum"]
    path.write_text(json.dumps({**data, "seed": 4}, indent=3))
    assert Plan.load(path) == dataclasses.replace(PLAN, seed=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.to_json().replace('"search": "uniform"', '"a": ' + "[" * 200 + "]" * 200), "nested deeper than 100"),
        (PLAN.to_json().replace('"search": "uniform"', '"a": ' + "[" * 10**6), "is not JSON"),
        (PLAN.to_json().replace('"seed": 3', '"seed": ' + "9" * 5000), "is not JSON: Exceeds the limit"),
        (PLAN.to_json().replace('"seed": 3', '"seed": 3, "seed": 4'), "the key 'seed' stands twice"),
        (but(seed=2**64), "the field 'seed' has 65 bits"),
        (but(seed=-(10**400)), "the field 'seed' has 1329 bits"),
        (but(output=10**400), "the field 'output' has 1329 bits"),
        (but(inputs={"x": {"shape": [10**12], "dtype": "int64"}}), "the input 'x' has a shape .* no tensor has"),
        (but(inputs={"x": {"shape": [2**20, 2**20], "dtype": "int64"}}), "the input 'x' has a shape .* no tensor has"),
        (but(inputs={"x": {"shape": [0, 10**30], "dtype": "int64"}}), "the input 'x' has a shape .* no tensor has"),
        (but(inputs={"x": {"shape": [-1], "dtype": "int64"}}), r"the input 'x' has the shape \[-1\]"),
        (but(loss=3), "the field 'loss' should be a name or null, not int"),
        (but(local_losses=["a"]), "one local loss .* a cut: 2 cuts, 1 losses"),
        (but(local_losses=[1, 2]), "the field 'local_losses' should be a list of names"),
        (but(block_seconds={"places": [], "stretches": ["a"], "heads": {}}), "has 'a' where seconds should be"),
        (but(block_seconds={"places": [], "stretches": [-1.0], "heads": {}}), "has '-1.0' where seconds should be"),
        (but(block_seconds={"places": [3], "stretches": [], "heads": {}}), "the names of places as a list"),
        (but(block_seconds={"places": [], "stretches": [], "heads": {"a": []}}), "an object of heads"),
        (but(block_seconds={"places": [], "stretches": 3, "heads": {}}), "the seconds of stretches as a list"),
    ],
)
def test_absurd_values(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        Plan.load(path)


@pytest.mark.parametrize("change", [{"devices": ["cuda:77"] * 2}, {"devices": ["nowhere"] * 2}, {"heads": ["lineer"]}])
def test_what_a_plan_names_and_is_not_there(tmp_path, change):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    net = sedona_fx.decouple(model, (torch.randn(4, 4), torch.randint(3, (4,))), cuts=["1"], heads="linear")
    net.save(tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    del data["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(sedona_fx.SedonaError, match=r"cuda:77|nowhere|lineer"):
        sedona_fx.load(tmp_path, model)


@pytest.mark.filterwarnings("ignore:.*support is experimental")
def test_inputs_of_any_dtype_are_made_or_refused():
    """Each dtype that torch names."""
    for name in sorted(n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype)):
        inputs = {"x": {"shape": [2, 3], "dtype": name}}
        plan = Plan.from_json(Plan(inputs=inputs).to_json())
        try:
            (value,) = example_like(plan.inputs, torch.device("cpu")).kwargs.values()
        except PlanError:
            continue
        assert value.dtype == getattr(torch, name)

"""ONNX files of models whose inputs and outputs are containers, against the model's own tensors, leaf by leaf."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import ExportError

transformers = pytest.importorskip("transformers")


@dataclass
class Record:
    logits: Tensor
    hidden: Any = None
    name: str = "record"


@dataclass
class ModelOutput(transformers.utils.ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


class Pair(NamedTuple):
    logits: Tensor
    classes: Tensor


class Batch(NamedTuple):
    x: Tensor
    mask: Tensor


class Net(nn.Module):
    """Two layers; `wrap` makes the output of logits and hidden activation; `exported` makes symbolic tracing fail."""

    def __init__(self, wrap, exported):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.wrap, self.exported = nn.Linear(4, 8), nn.Linear(8, 3), wrap, exported

    def run(self, x):
        if self.exported and x.shape[1] != 4:
            raise ValueError("four features")
        h = self.a(x).tanh()
        return self.wrap(self.b(h), h)

    def forward(self, x):
        return self.run(x)


class Mapped(Net):
    def forward(self, batch):
        return self.run(batch["x"] * batch["more"]["mask"])


class Listed(Net):
    def forward(self, pair, scale):
        return self.run(pair[0] * pair[1][0] + scale)


class Named(Net):
    def forward(self, batch):
        return self.run(batch.x * batch.mask)


OUTPUTS = {
    "tensor": lambda logits, h: logits,
    "tuple": lambda logits, h: (logits, (h, logits.argmax(1))),
    "list": lambda logits, h: [logits, [h]],
    "dict": lambda logits, h: {"logits": logits, "more": {"hidden": h, "none": None}, "flag": True},
    "ordered": lambda logits, h: OrderedDict(hidden=h, logits=logits),
    "named": lambda logits, h: Pair(logits, logits.argmax(1)),
    "dataclass": lambda logits, h: Record(logits, h),
    "nested": lambda logits, h: {"out": logits, "inner": Record(logits * 2, [h, (h > 0)])},
    "model_output": lambda logits, h: ModelOutput(logits=logits, hidden=(h, 2 * h)),
}
NAMES = {
    "tensor": ["output"],
    "tuple": ["output.0", "output.1.0", "output.1.1"],
    "list": ["output.0", "output.1.0"],
    "dict": ["logits", "more.hidden"],
    "ordered": ["hidden", "logits"],
    "named": ["logits", "classes"],
    "dataclass": ["logits", "hidden"],
    "nested": ["out", "inner.logits", "inner.hidden.0", "inner.hidden.1"],
    "model_output": ["logits", "hidden.0", "hidden.1"],
}


def values(count):
    x, mask, scale = torch.randn(count, 4), torch.rand(count, 4), torch.randn(count, 1)
    return {
        Net: ((x,), {"x": x}),
        Mapped: (({"x": x, "more": {"mask": mask}},), {"batch.x": x, "batch.more.mask": mask}),
        Listed: (((x, [mask]), scale), {"pair.0": x, "pair.1.0": mask, "scale": scale}),
        Named: ((Batch(x, mask),), {"batch.x": x, "batch.mask": mask}),
    }


def loss(output, target):
    first = output if isinstance(output, Tensor) else None
    if first is None:
        first = output["out" if "out" in output else "logits"] if isinstance(output, dict) else None
    first = first if first is not None else getattr(output, "logits", None)
    return F.cross_entropy(output[0] if first is None else first, target)


def tensors(value):
    """Return the tensors of an output in the order of its fields."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, Record):
        return tensors([value.logits, value.hidden])
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def check(kind, wrap, exported, tmp_path, *, count=4):
    model = kind(OUTPUTS[wrap], exported).eval()
    inputs, _ = values(count)[kind]
    net = sedona_fx.decouple(
        model, (sedona_fx.Args(*inputs), torch.zeros(count, dtype=torch.long)), blocks=2, search="uniform", loss=loss
    )
    assert net.plan.capture.front_end == ("export" if exported else "symbolic")
    path = net.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == NAMES[wrap]
    for size in (1, 2, 7):
        inputs, named = values(size)[kind]
        assert [value.name for value in session.get_inputs()] == list(named)
        with torch.no_grad():
            expected = tensors(model(*inputs))
        found = session.run(None, {name: t.numpy() for name, t in named.items()})
        for value, wanted in zip(map(torch.from_numpy, found), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("wrap", OUTPUTS)
def test_outputs_of_any_type(wrap, exported, tmp_path):
    check(Net, wrap, exported, tmp_path)


@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("kind", [Mapped, Listed, Named])
def test_inputs_in_containers(kind, exported, tmp_path):
    check(kind, "dataclass", exported, tmp_path)


class Edges(nn.Module):
    """Outputs that are inputs or weights, twice the same, infinite, integers; names that ONNX values have already."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.tanh = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(self, x, mask):
        logits = self.linear(x) * self.tanh
        return {
            "logits": logits,
            "x": x,
            "linear": logits,
            "weight": self.tanh,
            "masked": logits.masked_fill(mask, float("-inf")),
            "order": logits.argsort(1),
            "any": mask.any(1),
            "a.b": logits + 1,
            "a": {"b": logits - 1},
        }


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_edges(low, tmp_path):
    model, mask = Edges().eval(), torch.tensor([[True, False, False]]).expand(4, 3)
    pair = ((torch.randn(4, 4), mask), torch.zeros(4, dtype=torch.long))
    net = sedona_fx.decouple(model, pair, blocks=1, loss=loss)
    with torch.autocast("cpu", dtype=low, enabled=low is not None):  # the caller's casts are not the model's
        path = net.to_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    expected = ["logits", "output.x", "linear", "weight", "masked", "order", "any", "a.b", "output.a.b"]
    assert names == expected
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = tensors(model(x, mask[:3]))
    for value, want in zip(session.run(None, {"x": x.numpy(), "mask": mask[:3].numpy()}), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(value), want, rtol=1e-5, atol=1e-6)


def test_a_wrong_integer_is_refused(tmp_path, monkeypatch):
    class Wrong(onnxruntime.InferenceSession):
        def run(self, *args):
            first, second = super().run(*args)
            return [first, second + 1]

    net = sedona_fx.decouple(
        Net(OUTPUTS["named"], False), (torch.randn(4, 4), torch.zeros(4, dtype=torch.long)), blocks=1
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(ExportError, match="differs from the net"):
        net.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_inputs_that_onnx_runtime_does_not_take_are_refused_by_name(tmp_path, monkeypatch):
    class Picky(onnxruntime.InferenceSession):
        def run(self, *args):
            raise RuntimeError("Got invalid dimensions")

    net = sedona_fx.decouple(
        Net(OUTPUTS["tensor"], False), (torch.randn(4, 4), torch.zeros(4, dtype=torch.long)), blocks=1
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Picky)
    with pytest.raises(ExportError, match=r"cannot run the file on \(2, 4\): Got invalid dimensions"):
        net.to_onnx(tmp_path / "model.onnx")

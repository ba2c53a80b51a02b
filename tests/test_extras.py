"""Packages that only parts need: the rest works without them, and these parts name the extra that brings them."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import sedona_fx
from sedona_fx import Plan
from sedona_fx.errors import MissingExtraError, SedonaError
from sedona_fx.extras import require
from sedona_fx.report import plan_picture


def test_a_plain_install_pulls_four_packages():
    required = importlib.metadata.requires("sedona-fx") or []
    core = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert core == {"torch", "numpy", "networkx", "tqdm"}
    extras = set(importlib.metadata.metadata("sedona-fx").get_all("Provides-Extra") or [])
    assert extras >= {"onnx", "report", "vision", "all"}


def test_the_core_works_without_the_extras(tmp_path):
    """In a process of its own, in which nothing but the four packages and what they need can be imported."""
    code = f"""
import sys
for name in ("torchvision", "matplotlib", "onnx", "onnxruntime", "onnxscript", "sklearn", "timm", "transformers"):
    sys.modules[name] = None
import torch
from torch import nn
import sedona_fx
model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(4)), nn.Flatten())
data = [(torch.randn(4, 3, 4, 4), torch.randint(48, (4,))) for _ in range(4)]
for search in ("balanced", sedona_fx.search.Guided(training_steps=300)):
    net = sedona_fx.decouple(model, data, blocks=2, search=search, heads=["linear"], progress=False)
sedona_fx.fit(net, data, epochs=1, schedule=sedona_fx.train.Greedy(net, lambda ps: torch.optim.SGD(ps, lr=0.1)))
net.save({str(tmp_path)!r})
again = sedona_fx.load({str(tmp_path)!r}, model)
assert torch.equal(again.eval()(data[0][0]), net.eval()(data[0][0]))
print(net)
try:
    net.to_onnx({str(tmp_path / "net.onnx")!r})
except sedona_fx.SedonaError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'MissingExtraError exporting to ONNX needs onnx, which is not installed: pip install "sedona-fx[onnx]"' in (
        done.stdout
    )


def net():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    return sedona_fx.decouple(model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), cuts=["0"], heads="linear")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_an_export_names_its_extra_and_leaves_no_file(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs {package}, .*pip install \"sedona-fx\[onnx\]\"") as caught:
        net().to_onnx(tmp_path / "net.onnx")
    assert isinstance(caught.value, (SedonaError, ImportError))
    assert not list(tmp_path.iterdir())


def test_a_picture_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"drawing a picture needs matplotlib, .*sedona-fx\[report\]"):
        plan_picture(Plan(provenance={"rounds": [{"step": 1, "scores": []}]}), tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_there_but_broken_says_so_itself(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has") as caught:
        require("half_installed", extra="all", purpose="this test")
    assert not isinstance(caught.value, MissingExtraError)

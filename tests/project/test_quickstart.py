"""The demo: it reads CIFAR-10 as people keep it, and runs through."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from sedona_fx.search import SEARCHES

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT / "../shared/data/cifar10-jpeg.tar.xz"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(quickstart):
    train, test = quickstart.digits()
    assert (len(train), len(test)) == (1257, 540)
    image, label = train[0]
    assert image.shape == (3, 8, 8)
    assert image.min() >= -1
    assert image.max() <= 1
    assert label.dtype == torch.int64


def test_images_in_folders(quickstart, tmp_path):
    for part in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (255 * k, 0, 255)).save(tmp_path / part / name / "0.png")
    train, _ = quickstart.cifar10(tmp_path)
    images, labels = train.tensors
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [0, 1]
    assert images[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert images[1, :, 0, 0].tolist() == [1, -1, 1]


@pytest.mark.skipif(not ARCHIVE.exists(), reason="needs CIFAR-10 as ../shared/data/cifar10-jpeg.tar.xz")
def test_cifar10_itself(quickstart, tmp_path):
    wanted = {"train": 12, "test": 12}
    with tarfile.open(ARCHIVE) as archive:
        for entry in archive:
            parts = Path(entry.name).parts
            part = next((p for p in parts if p in wanted), None)
            if entry.isfile() and part is not None and wanted[part] > 0:
                wanted[part] -= 1
                target = tmp_path / Path(*parts[parts.index(part) :])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(entry).read())
            if not any(wanted.values()):
                break
    train, test = quickstart.cifar10(tmp_path)
    assert train.tensors[0].shape == (12, 3, 32, 32)
    assert test.tensors[0].shape == (12, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "search_steps", "run_steps", "training_steps"),
    [
        ("guided", None, 190, 200),
        ("guided", None, 4000, 1000),
        ("guided", 30, 190, 30),
        ("sedona", None, 190, 190),
        ("sedona", 60, 190, 60),
    ],
)
def test_what_the_search_may_cost(quickstart, name, search_steps, run_steps, training_steps):
    search = quickstart.search_of(name, search_steps, run_steps)
    assert isinstance(search, SEARCHES[name])
    assert search.training_steps == training_steps


@pytest.mark.filterwarnings("ignore::tqdm.TqdmWarning")
def test_it_runs_through(quickstart, tmp_path, monkeypatch, capsys):
    settings = ["--epochs", "1", "--seeds", "1", "--search-steps", "30", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *settings])
    quickstart.main()
    printed = capsys.readouterr().out
    for word in ("backprop", "uniform cuts", "found plan", "peak activation memory", "ONNX Runtime and PyTorch agree"):
        assert word in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert len(plan["cuts"]) == 3
    assert plan["provenance"]["search"] == "guided"
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "model.onnx").stat().st_size > 100_000

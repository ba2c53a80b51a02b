"""Sizes that a captured net leaves free are free in its ONNX file, or it is said that they are not."""

import logging

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.export import onnx as exporting

WORDS = 11


class Words(nn.Module):
    """Attention over words; needs torch.export."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(WORDS, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.a, self.out = nn.Linear(8, 8), nn.Linear(8, WORDS)

    def forward(self, ids, mask, scale):
        if ids.shape[1] > 1000:
            raise ValueError("too long")
        h = self.embed(ids) + torch.arange(ids.shape[1]).float()[:, None] / 10
        h = h + self.a(h).tanh() * mask[..., None]
        h = h + self.mix(h, h, h, need_weights=False)[0]
        return self.out(h) * scale.mean(1)[:, None, None]


def batch(length=6, count=4, width=3):
    ids = torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(length))
    return {"ids": ids, "mask": torch.ones(count, length), "scale": torch.rand(count, width) + 1}


def made():
    inputs = batch()
    net = sedona_fx.decouple(
        Words().eval(),
        (inputs, inputs["ids"]),
        blocks=2,
        search="uniform",
        loss=lambda scores, ids: F.cross_entropy(scores.flatten(0, 1), ids.flatten()),
    )
    assert {(s.name, s.dim) for s in net.capture.free_sizes} == {("ids", 1), ("mask", 1), ("scale", 1)}
    return net.eval()


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


def test_free_sizes_are_free_in_the_file(tmp_path):
    net = made()
    path = net.to_onnx(tmp_path / "model.onnx")
    for length, count, width in ((6, 4, 3), (9, 1, 5), (3, 7, 3), (40, 2, 2)):
        inputs = batch(length, count, width)
        with torch.no_grad():
            torch.testing.assert_close(run(path, inputs), net(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fails", ["export", "run"])
def test_what_the_exporter_cannot_leave_free_is_fixed_and_said(fails, tmp_path, monkeypatch, caplog):
    net = made()

    def export(module, inputs, **options):
        (shapes,) = options["dynamic_shapes"]
        if any(set(dims or ()) - {0} for dims in shapes):
            if fails == "export":
                raise RuntimeError("the exporter says no")
            options["dynamic_shapes"] = (tuple({0: dims[0]} for dims in shapes),)
        return original(module, inputs, **options)

    original = torch.onnx.export
    monkeypatch.setattr(exporting.torch.onnx, "export", export)
    with caplog.at_level(logging.WARNING, "sedona_fx"):
        path = net.to_onnx(tmp_path / "model.onnx")
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("sedona_fx")]
    assert "the ONNX file fixes dimension 1 of 'ids' to 6, dimension 1 of 'mask' to 6, dimension 1 of 'scale'" in told
    assert ("the exporter says no" if fails == "export" else "ONNX Runtime cannot run the file on") in told
    inputs = batch(6, 2)
    with torch.no_grad():
        torch.testing.assert_close(run(path, inputs), net(**inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|Got invalid dimensions"):
        run(path, batch(9))

"""Blocks: one graph each, wired by names, with the modules of the net under their own names."""

import chain
import pytest
import torch

from sedona_fx.ir.graph import HEADS
from sedona_fx.passes import partition


@pytest.fixture(params=["lowered", "relaxed"])
def blocks(request):
    gm = chain.graphs().train
    return partition(chain.lowered(gm) if request.param == "lowered" else chain.relaxed(gm))


def test_blocks_in_a_row_give_what_the_model_gives(blocks):
    x, _ = chain.batch()
    values, local = {"x": x}, None
    for block in blocks:
        exports, local = block.module(*[values[name] for name in block.inputs])
        values.update(zip(block.exports, exports, strict=True))
        assert set(block.live_exports) <= set(block.exports)
        assert block.boundary is None or block.boundary in block.live_exports
    assert torch.equal(local, chain.model()(x))


def test_exports_are_not_detached(blocks):
    x, y = chain.batch()
    values = {"x": x}
    for block in blocks:
        exports, local = block.module(*[values[name] for name in block.inputs])
        values.update(zip(block.exports, exports, strict=True))
    chain.cross_entropies((local,), y)[0].backward()
    assert blocks[0].module.get_submodule("a").weight.grad.norm() > 0


def test_names_are_the_models(blocks):
    known = chain.model().state_dict().keys()
    names = [{n for n in block.module.state_dict() if not n.startswith("sedona_")} for block in blocks]
    assert set().union(*names) == known
    assert all(part <= known for part in names)


def test_wiring():
    blocks = partition(chain.lowered(chain.graphs().train))
    assert [block.index for block in blocks] == [0, 1, 2]
    assert [block.inputs for block in blocks] == [("x",), ("a",), ("x", "c")]
    assert [block.exports for block in blocks] == [("a",), ("c",), ()]
    assert [block.boundary for block in blocks] == ["a", "c", None]
    assert [f"{HEADS}.{k}" in dict(b.module.named_modules()) for k, b in enumerate(blocks)] == [True, True, False]


def test_its_input_is_left_alone():
    gm = chain.lowered(chain.graphs().train)
    before = chain.text(gm)
    partition(gm)
    assert chain.text(gm) == before

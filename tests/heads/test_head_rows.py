"""Activations and outputs that have the batch elsewhere, as heads see them: against the same written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sedona_fx.heads.batched import run_together
from sedona_fx.heads.context import HeadContext, HeadDtypes
from sedona_fx.heads.dtypes import make_head
from sedona_fx.heads.registry import build_head
from sedona_fx.heads.rows import ArrangedHead, Arrangement, Rows, entering, shape_after

N, T, D = 3, 5, 4
EXAMPLES = torch.randn(N, T, D)
IN_PLACE = {
    "first": (Rows(), EXAMPLES),
    "second": (Rows(1), EXAMPLES.transpose(0, 1)),
    "last": (Rows(2), EXAMPLES.permute(1, 2, 0)),
    "together": (Rows(0, T), EXAMPLES.reshape(N * T, D)),
    "apart": (Rows(0, T, together=False), EXAMPLES.transpose(0, 1).reshape(T * N, D)),
    "apart, second": (Rows(1, T, together=False), EXAMPLES.transpose(0, 1).reshape(T * N, D).t()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_rows_are_unfolded_and_folded_again(name):
    rows, tensor = IN_PLACE[name]
    wanted = EXAMPLES if name != "last" else EXAMPLES.movedim(0, 2).movedim(2, 0)
    assert torch.equal(rows.unfolded(tensor), wanted)
    assert torch.equal(rows.folded(rows.unfolded(tensor)), tensor)


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("of_output", [Rows(), Rows(0, T), Rows(0, T, together=False), Rows(1, T)])
def test_a_head_sees_examples_and_its_output_is_put_into_place(name, of_output):
    rows, tensor = IN_PLACE[name]
    how, seen = Arrangement(rows, of_output), []

    class Head(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x * 2

    output = ArrangedHead(Head(), how)(tensor)
    if rows.each == of_output.each:  # row by row, in the order of the output
        in_order = of_output.folded(rows.unfolded(tensor)).movedim(of_output.dim, 0)
        assert torch.equal(seen[0], in_order)
        assert torch.equal(output, of_output.folded(rows.unfolded(tensor)) * 2)
    else:
        assert torch.equal(seen[0], EXAMPLES)
        assert torch.equal(output, of_output.folded(EXAMPLES) * 2)
    assert shape_after(how.wanted, tuple(output.shape)) == seen[0].shape
    free = ArrangedHead(Head(), how, free_output=True)
    assert torch.equal(free(tensor), seen[0] * 2)


def test_frames_come_behind_the_channels():
    video = torch.randn(N, T, D, 6, 7)
    how = Arrangement(Rows(0, T), Rows(), frames=True)
    assert torch.equal(how.enter(video.flatten(0, 1)), video.transpose(1, 2))
    both = Arrangement(Rows(), Rows(0, T), output_frames=True)
    assert torch.equal(both.leave(video.transpose(1, 2)), video.flatten(0, 1))
    assert torch.equal(both.wanted(video.flatten(0, 1)), video.transpose(1, 2))
    mean = Arrangement(Rows(0, T), Rows(), mean=True)
    torch.testing.assert_close(mean.enter(video.flatten(0, 1)), video.mean(1))


def test_nothing_is_wrapped_where_the_batch_is_first():
    assert Arrangement().is_plain
    assert Arrangement(Rows(0, T), Rows(0, T)).is_plain
    assert not Arrangement(Rows(0, T), Rows(0, T, together=False)).is_plain
    assert not Arrangement(Rows(1), Rows()).is_plain
    assert not isinstance(build_head("linear", HeadContext((N, T, D), (N, 2), 2)), ArrangedHead)


CONTEXT = HeadContext((N, T, D), (N, 2), 2, arrangement=Arrangement(Rows(1), Rows()))


def test_heads_of_one_place_still_share_operators():
    torch.manual_seed(0)
    heads = [build_head(name, CONTEXT).double() for name in ("tokens-1", "tokens-2", "linear")]
    x = EXAMPLES.double().transpose(0, 1)
    for found, head in zip(run_together(heads, x), heads, strict=True):
        assert torch.equal(found, head.head(EXAMPLES.double()))
    maps = HeadContext((N, 4, 5, 6, 7), (N, 2), arrangement=Arrangement(Rows(0, 5), Rows(), frames=True))
    heads = [build_head(f"sedona-{depth}", maps).double() for depth in (1, 2)]
    x = torch.randn(N * 5, 4, 6, 7, dtype=torch.float64)
    for found, head in zip(run_together(heads, x), heads, strict=True):
        torch.testing.assert_close(found, head(x), rtol=1e-10, atol=1e-12)


def test_the_activation_as_a_head_reads_it():
    head = build_head("linear", CONTEXT)
    assert torch.equal(entering(head, EXAMPLES.transpose(0, 1)), EXAMPLES)
    assert torch.equal(entering(None, EXAMPLES), EXAMPLES)
    assert torch.equal(entering(nn.Identity(), EXAMPLES), EXAMPLES)
    dtypes = HeadDtypes(torch.bfloat16, torch.float32, torch.float32)
    cast = make_head(
        "linear", HeadContext((N, T, D), (N, 2), 2, dtypes=dtypes, arrangement=CONTEXT.arrangement), EXAMPLES
    )
    assert torch.equal(entering(cast, EXAMPLES.transpose(0, 1)), EXAMPLES)
    assert cast(EXAMPLES.transpose(0, 1).bfloat16()).shape == (N, 2)


def test_an_embedding_is_for_objectives_of_the_user():
    context = HeadContext((N, T, D), (N, N), 2, free_output=True)
    head = build_head("embedding", context)
    assert head(EXAMPLES).shape == (N, 128)
    torch.testing.assert_close(head(EXAMPLES), head[-1](EXAMPLES.mean(1)))

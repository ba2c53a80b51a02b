"""Whose the rows of a folded batch are: what changes with an example tells, and nothing is guessed."""

from __future__ import annotations

from fractions import Fraction

import torch
from graphs import analysed, node_of
from layouts import Between
from torch import Tensor, nn

from sedona_fx.data.args import Args
from sedona_fx.heads.rows import Rows
from sedona_fx.ir.graph import info
from sedona_fx.passes.row_order import Folded, row_orders


def rows_behind(model: nn.Module, x: Tensor, site: str = "a") -> Rows | None:
    record = info(node_of(analysed(model, x).train, site))
    return record.rows if record.crossing else None


def test_orders_are_not_guessed():
    """An example without an effect, rows in an order of their own, examples that are all alike."""
    for order in (lambda h: h.flip(0), lambda h: h.roll(1, 0)):
        model = Between(lambda x: torch.cat([x, x]), lambda h: h.view(2, -1, 6).sum(0), order)
        assert rows_behind(model, torch.randn(3, 6), "a") is None  # the output's rows are other examples'
        assert rows_behind(model, torch.randn(3, 6), "b") is None
    folded = Between(lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1))
    graphs = analysed(folded, torch.zeros(4, 5, 6))
    assert info(node_of(graphs.train, "a")).rows == Rows(0, 5)  # floats are changed, not only exchanged
    values = {"a": Folded(0, 5), info(graphs.train.graph.output_node().all_input_nodes[0]).site: Folded(0, 1)}
    output = list(values)[1]
    found = row_orders(graphs.eval, Args(x=torch.zeros(4, 5, 6)), values, output=output, per_example=Fraction(1))
    assert found == {"a": True}
    nowhere = Between(lambda x: torch.cat([x, x]) * 0, lambda h: h.view(2, -1, 6).sum(0))
    assert rows_behind(nowhere, torch.randn(3, 6)) is None


def test_tokens_that_are_all_alike():
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x, mask):
            h = self.a(self.e(x.flatten())).unflatten(0, x.shape)
            return self.b((h * mask[:, :, None]).sum(1))

    x = torch.zeros(4, 7, dtype=torch.long)
    graphs = analysed(Bags(), x, torch.ones(4, 7, dtype=torch.bool))
    assert info(node_of(graphs.train, "a")).rows == Rows(0, 7)


def test_nothing_is_known_where_the_model_fails_on_other_examples():
    x = torch.randn(4, 5, 6)
    graphs = analysed(Between(lambda x: x.flatten(0, 1), lambda h: h.view(-1, 5, 6).mean(1)), x)
    output = info(graphs.eval.graph.output_node().all_input_nodes[0]).site
    values, one = {"a": Folded(0, 5), output: Folded(0, 1)}, Fraction(1)
    assert row_orders(graphs.eval, Args(x=x), values, output=output, per_example=one) == {"a": True}

    def fails(h):
        raise ValueError("out of range")

    graphs.eval.get_submodule("a").forward = fails
    assert row_orders(graphs.eval, Args(x=x), values, output=output, per_example=one) == {}

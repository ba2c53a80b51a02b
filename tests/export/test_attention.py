"""Attention in plain operators, against PyTorch's own."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from sedona_fx.export.attention import attention, unfuse_attention


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril()},
        {"attn_mask": torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)},
        {"enable_gqa": True},
    ],
    ids=lambda how: "-".join(how) or "plain",
)
def test_it_is_pytorchs(how):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in how else 4
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    key, value = (torch.randn(2, heads, 6, 8, dtype=torch.float64) for _ in range(2))
    expected = F.scaled_dot_product_attention(query, key, value, **how)
    torch.testing.assert_close(attention(query, key, value, **how), expected, rtol=1e-12, atol=1e-12)


def test_graphs_are_changed_where_there_is_attention():
    class Attends(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    gm, x = fx.symbolic_trace(Attends()), torch.randn(2, 2, 5, 8)
    expected = gm(x)
    assert unfuse_attention(gm)
    torch.testing.assert_close(gm(x), expected)
    assert not unfuse_attention(gm)

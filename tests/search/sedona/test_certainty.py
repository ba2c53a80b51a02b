"""What counts as learned and as a tie, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sedona_fx.search.sedona.certainty import certainty, mean_entropy
from sedona_fx.search.sedona.decode import decode, log_odds


def logits(*odds: float) -> torch.Tensor:
    return torch.tensor([[o / 2, -o / 2] for o in odds])


def test_what_never_left_one_half_was_not_learned() -> None:
    alpha, beta = logits(0.01, 0.0, -0.5), [torch.zeros(2)] * 3
    farthest = torch.tensor([0.01, 0.3, 0.5])  # the second one came back
    assert certainty(alpha, beta, farthest, [0]).learned == [1, 2]
    assert certainty(alpha, beta, farthest, [0], tolerance=0.4).learned == [2]


@pytest.mark.parametrize(
    ("odds", "blocks", "ties"),
    [
        ((0.9, 0.5, 0.1, -0.3), 3, []),
        ((0.9, 0.50, 0.49, -0.3), 3, [1, 2]),  # the K-1st and the K-th
        ((0.9, 0.50, 0.49, -0.3), 2, []),  # they are both out
        ((0.9, 0.50, 0.49, -0.3), 4, []),  # they are both in
        ((0.50, 0.50, 0.50, 0.50), 2, [0, 1, 2, 3]),
        ((0.52, 0.50, 0.47, 0.44), 3, [1, 2]),  # 0.52 is 0.05 from 0.47; 0.44 is 0.06 from 0.50
        ((9.0, 60.0, 50.0, 50.5), 3, []),  # all p_isolate round to 1, and yet they differ
        ((0.0, 0.0, 0.0, 0.0), 1, []),
        ((0.0, 0.0, 0.0, 0.0), 5, []),
    ],
)
def test_ties_at_the_threshold(odds: tuple[float, ...], blocks: int, ties: list[int]) -> None:
    alpha, beta = logits(*odds), [torch.zeros(1)] * 4
    cuts, _ = decode(alpha, beta, blocks)
    assert certainty(alpha, beta, torch.ones(4), cuts).cut_ties == ties


def test_ties_between_heads_of_chosen_cuts() -> None:
    beta = [torch.tensor([0.5, 0.49, 0.1]), torch.tensor([0.0, 1.0, 0.0]), torch.zeros(2), torch.zeros(1)]
    found = certainty(logits(4.0, 3.0, 0.0, 2.0), beta, torch.ones(4), [0, 1, 3])
    assert found.head_ties == {0: [0, 1]}


def test_entropy_and_log_odds() -> None:
    alpha = logits(0.0, 2.0)
    p = 1 / (1 + math.exp(-2.0))
    by_hand = (math.log(2) - p * math.log(p) - (1 - p) * math.log(1 - p)) / 2
    assert mean_entropy([alpha]) == pytest.approx(by_hand, rel=1e-6)
    assert mean_entropy([torch.zeros(4), torch.tensor([0.0, 1000.0])]) == pytest.approx(math.log(4) / 2)
    assert log_odds(alpha).tolist() == pytest.approx([0.0, 2.0])

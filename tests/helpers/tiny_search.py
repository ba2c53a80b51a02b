"""A search on a net of four tiny base layers, with dropout and BatchNorm, on data that comes in a random order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.search.problem.work import RelaxedWork
from sedona_fx.search.sedona.relaxed_net import RelaxedGraphBlock as Block
from sedona_fx.search.sedona.result import SedonaResult
from sedona_fx.search.sedona.sedona import Sedona

WORK = RelaxedWork(net=4.0, heads=2.0, validation=8.0)
SMALL = Sedona(warmup_steps=6, meta_steps=5, snapshots=3, unroll=2)
Batch = tuple[dict[str, Any], Tensor]


class Layer(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), last
        if last:
            self.out = nn.Linear(6, 3)
        else:
            self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))])
            self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Any:
        h = F.dropout(F.relu(self.norm(self.fc(x))), 0.2, self.training)
        if self.last:
            return (), self.out(h)
        s = self.mix.softmax(0)
        return (h,), s[0] * self.heads[0](h) + s[1] * self.heads[1](h)


def make_blocks() -> list[Block]:
    torch.manual_seed(0)
    blocks = []
    for i in range(4):
        layer, below = Layer(i == 3), f"h{i - 1}" if i else "x"
        blocks.append(
            Block(layer, layer, (below,), (), None, None)
            if i == 3
            else Block(layer, layer, (below,), (f"h{i}",), f"h{i}", "mix")
        )
    return blocks


def batches(count: int = 4, size: int = 8, event: Callable[[int], None] | None = None) -> Callable[[], Iterator[Batch]]:
    """Epochs of `count` batches in an order from the global stream; `event(n)` as the n-th of all is handed out."""
    g = torch.Generator().manual_seed(1)
    data = [({"x": torch.randn(size, 6, generator=g)}, torch.randint(3, (size,), generator=g)) for _ in range(count)]
    handed = 0

    def epoch() -> Iterator[Batch]:
        nonlocal handed
        for i in torch.randperm(count).tolist():
            if event is not None:
                event(handed)
            handed += 1
            yield data[i]

    return epoch


def loss(block: int, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def search(
    settings: Sedona = SMALL,
    seed: int = 0,
    train: Callable[[], Iterator[Batch]] | None = None,
    local_loss: Callable[[int, Any, Any], Tensor] = loss,
    blocks: list[Block] | None = None,
    progress: bool = False,
) -> SedonaResult:
    blocks = blocks or make_blocks()
    return settings.run(
        blocks,
        local_loss,
        train_batches=train or batches(),
        val_batches=batches(size=16),
        work=WORK,
        seed=seed,
        progress=progress,
    )


def same(a: SedonaResult, b: SedonaResult) -> bool:
    tensors = zip([a.alpha, *a.beta], [b.alpha, *b.beta], strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and a.trajectory == b.trajectory

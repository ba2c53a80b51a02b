"""Nets with heads that answer, and what early exits have to give, example by example."""

import copy

import torch
from torch import Tensor, nn

import sedona_fx


class Stages(nn.Module):
    """Four stages with BatchNorm and dropout, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4)
        )
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor):
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


CUTS = ["stages.0", "stages.1", "stages.2"]


def batch(count: int = 40, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *(shape or (6,)), generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def make(model: nn.Module | None = None, pair=None, cuts=CUTS, **how) -> sedona_fx.Net:
    net = sedona_fx.decouple((model or Stages()).double(), pair or batch(), cuts=cuts, **how)
    if how.get("heads") is not False and cuts:
        net.losses(*(pair or batch()))  # running statistics that are not the first ones
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    return net


def logits_by_hand(net: sedona_fx.Net, x: Tensor) -> list[Tensor]:
    """Return what the heads and the model say, in eval mode."""
    model, heads = copy.deepcopy((net.model, net.heads))
    model.eval()
    heads.eval()
    found = []
    with torch.no_grad():
        for k, stage in enumerate(model.stages):
            x = stage(x)
            found.append(heads[str(k)](x) if k < 3 else model.out(x))
    return found


def exits_by_hand(logits: list[Tensor], threshold: float, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return for each example what the first sure head says, and which it is; one example after the other."""
    outputs, blocks = [], []
    for i in range(len(logits[0])):
        for k, one in enumerate(logits):
            confidence = torch.softmax(one[i : i + 1], dim).amax(dim).mean().item()
            if confidence >= threshold or k == len(logits) - 1:
                outputs.append(one[i])
                blocks.append(k)
                break
    return torch.stack(outputs), torch.tensor(blocks)


def telling(logits: list[Tensor], dim: int = 1) -> float:
    """Return a threshold at which half of the examples leave before the last block."""
    sure = torch.stack([torch.softmax(one, dim).amax(dim).reshape(len(one), -1).mean(1) for one in logits[:-1]])
    best = sure.amax(0).sort().values
    return best[len(best) // 2 - 1 : len(best) // 2 + 1].mean().item()


def count_rows(net: sedona_fx.Net) -> list[tuple[int, int]]:
    """Return a list that fills up with (stage, rows) as stages run; the copies that exits make take the hooks along."""
    seen: list[tuple[int, int]] = []
    for k, stage in enumerate(net.model.stages):
        stage[0].register_forward_hook(lambda _m, args, _out, k=k: seen.append((k, len(args[0]))))
    return seen

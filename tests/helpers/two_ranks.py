"""Two processes that train a net each: ``python two_ranks.py FOLDER`` writes what came out into a file a rank.

Both are forked from one that has imported everything.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sedona_fx
from sedona_fx.train import Block, Greedy

RANKS, STEPS = 2, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*stages, nn.Linear(6, 3)).double()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randint(3, (8,), generator=g)) for _ in range(STEPS)
    ]


def net_of(made_of: nn.Module) -> sedona_fx.Net:
    return sedona_fx.decouple(made_of, data()[0], cuts=["0", "1"], heads="linear", progress=False)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


class Averaged(Greedy):
    """The gradients of all processes are averaged before an optimizer steps."""

    def on_gradients(self, block: Block) -> None:
        for p in (p for p in self.parameters[block.index] if p.grad is not None):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def loop(net: sedona_fx.Net, part: slice) -> None:
    """The lines of the error's message."""
    optimizer = sgd(net.parameters())
    for x, y in data():
        optimizer.zero_grad()
        net.backward(x[part], y[part])
        for p in (p for p in net.parameters() if p.grad is not None):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()


def scheduled(net: sedona_fx.Net, part: slice) -> None:
    schedule = Averaged(net, sgd)
    for x, y in data():
        schedule.step(x[part], y[part])


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    part = slice(4 * rank, 4 * rank + 4)
    found: dict[str, Any] = {}
    for name, train in (("loop", loop), ("schedule", scheduled)):
        net = net_of(model())
        train(net, part)
        found[name] = net.state_dict()
    net = net_of(model())
    found["wrapped"] = error_of(lambda: DistributedDataParallel(net))
    wrapper = DistributedDataParallel(net.model)
    (x, y), optimizer = data()[0], sgd(wrapper.parameters())
    nn.functional.cross_entropy(wrapper(x[part]), y[part]).backward()  # backpropagation through the model is right
    optimizer.step()
    found["backprop"] = net.model.state_dict()
    found["model wrapped"] = error_of(lambda: net.backward(x[part], y[part]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net_of(wrapper)
    found["told"] = [str(w.message) for w in told]
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            work(rank, sys.argv[1])
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))

"""A net of four base layers with several live tensors at its cuts and tensors that layers share, and its oracle.

The forward functions are written once, as functions of a layer's tensors. The engine gets them as modules; the oracle
runs them over one connected graph, on copies of its own for every layer that uses a tensor, and knows nothing of
sedona_fx: layer j's gradient is `autograd.grad` of its own Lt_j with respect to its own copies.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.search.sedona.relaxed_net import RelaxedGraphBlock as Block

LAYERS, WORDS, WIDTH = 4, 5, 4
SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-2}
Batch = tuple[dict[str, Any], Tensor]


# --- the net ----------------------------------------------------------------------------------------------------------
#
# value   made in, read in   what it is to the boundary h_i of its layer
# s0      0, 2 and 3         independent of h0: a branch that no head reads; passes by cuts 0, 1 and 2
# pair0   0, 1 and 3         a container: an ancestor of h0, and a view of h0
# s1      1, 3               a descendant of h1
# n0      0, 3               an int
# mask0   0, 3               floats without gradient
# h0      0, 1 and 3         the boundary itself, read far away too
#
# `embed` embeds in layer 0 and is, as `out`, the last layer's weight; `mix` is used by layers 1, 2 and 3; `norm`, its
# running statistics included, by layers 0 and 2. All heads share `head_c`.


def layer0(m: Any, x: Tensor) -> tuple[dict[str, Any], Tensor]:
    a = x @ m.embed
    h = F.softplus(m.norm(a))
    mask = (x[:, :1] > 0).to(x)
    exports = {"h0": h, "s0": torch.tanh(x @ m.side), "pair0": (a, {"half": h[:, :2]}), "n0": len(x), "mask0": mask}
    return exports, h


def layer1(m: Any, h0: Tensor, pair0: Any) -> tuple[dict[str, Any], Tensor]:
    h = torch.tanh(h0 @ m.mix + pair0[0] * m.gain)
    return {"h1": h, "s1": h.square().T @ m.twist}, h


def layer2(m: Any, h1: Tensor, s0: Tensor) -> tuple[dict[str, Any], Tensor]:
    h = F.softplus(m.norm(h1 @ m.mix + s0) @ m.w2)
    return {"h2": h}, h


def layer3(
    m: Any, h2: Tensor, h0: Tensor, s0: Tensor, s1: Tensor, pair0: Any, n0: int, mask0: Tensor
) -> tuple[dict[str, Any], Tensor]:
    half = torch.cat([pair0[1]["half"], s0[:, 2:]], 1)
    z = torch.tanh((h2 + h0 * s0) @ m.mix) + half * mask0 + s1.mean(1) / n0
    return {}, (z * m.last) @ m.out.T


FORWARD: tuple[Callable[..., tuple[dict[str, Any], Tensor]], ...] = (layer0, layer1, layer2, layer3)
INPUTS = (("x",), ("h0", "pair0"), ("h1", "s0"), ("h2", "h0", "s0", "s1", "pair0", "n0", "mask0"))
EXPORTS = (("h0", "s0", "pair0", "n0", "mask0"), ("h1", "s1"), ("h2",), ())
SHAPES = {
    "embed": (WORDS, WIDTH), "side": (WORDS, WIDTH), "mix": (WIDTH, WIDTH), "gain": (WIDTH,),
    "twist": (9, WIDTH), "w2": (WIDTH, WIDTH), "last": (WIDTH,), "head_c": (3, WORDS),
}  # fmt: skip
USED = (("embed", "side"), ("mix", "gain", "twist"), ("mix", "w2"), ("mix", "last", "out"))
NORMS = (0, 2)
OWNERS = {
    "embed": (3, "out"), "mix": (3, "mix"), "head_c": (2, "head_c"),
    "norm.weight": (2, "norm.weight"), "norm.bias": (2, "norm.bias"),
}  # fmt: skip


def head(m: Any, h: Tensor, beta: Tensor) -> Tensor:
    s = beta.softmax(0)
    return s[0] * (h @ m.head_a) + s[1] * (torch.tanh(h @ m.head_b) @ m.head_c)


class Layer(nn.Module):
    """A base layer and its heads. In evaluation it is the same."""

    def __init__(self, i: int, shared: dict[str, nn.Parameter], norm: nn.Module) -> None:
        super().__init__()
        self.i = i
        for name in USED[i]:
            self.register_parameter(name, shared["embed" if name == "out" else name])
        if i in NORMS:
            self.norm = norm
        if i < LAYERS - 1:
            for name, shape in (("head_a", (WIDTH, WORDS)), ("head_b", (WIDTH, 3))):
                self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
            self.head_c = shared["head_c"]
            self.beta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, *args: Any) -> tuple[tuple[Any, ...], Tensor]:
        exports, end = FORWARD[self.i](self, *args)
        last = self.i == LAYERS - 1
        return tuple(exports[n] for n in EXPORTS[self.i]), end if last else head(self, end, self.beta)


def make_blocks(tied: bool = True) -> list[Block]:
    """Return the net as relaxed blocks; if not `tied`, every layer has tensors of its own."""

    def weights() -> tuple[dict[str, nn.Parameter], nn.Module]:
        made = {n: nn.Parameter(0.6 * torch.randn(shape, dtype=torch.float64)) for n, shape in SHAPES.items()}
        norm = nn.BatchNorm1d(WIDTH).double()
        with torch.no_grad():
            norm.weight.add_(0.3 * torch.randn_like(norm.weight))
        return made, norm

    common = weights()
    modules = [Layer(i, *(common if tied else weights())) for i in range(LAYERS)]
    return [
        Block(m, m, INPUTS[i], EXPORTS[i], *((None, None) if i == LAYERS - 1 else (f"h{i}", "beta")))
        for i, m in enumerate(modules)
    ]


def batch(count: int = 9) -> Batch:
    return {"x": torch.randn(count, WORDS, dtype=torch.float64)}, torch.randint(WORDS, (count,))


def logits() -> tuple[Tensor, list[Tensor]]:
    """Return alpha and beta."""
    beta = [torch.randn(2, dtype=torch.float64) for _ in range(LAYERS - 1)]
    return torch.randn(LAYERS - 1, 2, dtype=torch.float64), beta


def loss(block: int, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


# --- the oracle -------------------------------------------------------------------------------------------------------

Weights = dict[tuple[int, str], Tensor]  # (layer, name in this layer): the one copy that counts, see `copy_of`


def copy_of(layer: int, name: str, tied: bool = True) -> tuple[int, str]:
    """Return where the tensor that `layer` calls `name` is held."""
    return OWNERS.get("embed" if name == "out" else name, (layer, name)) if tied else (layer, name)


def names_of(layer: int) -> list[str]:
    """Return the names of what a layer trains, those of its heads last."""
    norm = ["norm.weight", "norm.bias"] if layer in NORMS else []
    return [*USED[layer], *norm, *(["head_a", "head_b", "head_c"] if layer < LAYERS - 1 else [])]


def local_losses(copies: list[dict[str, Tensor]], beta: list[Tensor], given: Batch) -> list[Tensor]:
    """All local losses over one connected graph, layer i on `copies[i]`."""
    env, losses = dict(given[0]), []
    for i, own in enumerate(copies):

        def norm(z: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
            return z * own["norm.weight"] + own["norm.bias"]

        m = SimpleNamespace(**own, norm=norm)
        exports, end = FORWARD[i](m, *(env[n] for n in INPUTS[i]))
        env |= exports
        losses.append(F.cross_entropy(end if i == LAYERS - 1 else head(m, end, beta[i]), given[1]))
    return losses


def oracle_gradients(
    w: Weights, alpha: Tensor, beta: list[Tensor], given: Batch, tied: bool = True
) -> tuple[Weights, list[Tensor]]:
    """Return the gradients of the formula, summed over the layers that share, and the local losses."""
    copies = [{n: w[copy_of(i, n, tied)].detach().clone().requires_grad_() for n in names_of(i)} for i in range(LAYERS)]
    losses = local_losses(copies, beta, given)
    relaxed = [losses[-1]]
    for i in reversed(range(LAYERS - 1)):
        isolate, through = torch.softmax(alpha[i], 0)
        relaxed.insert(0, isolate * losses[i] + through * relaxed[0])
    total: Weights = {}
    for i, own in enumerate(copies):
        for name, t in own.items():
            (g,) = torch.autograd.grad((losses if name.startswith("head") else relaxed)[i], t, retain_graph=True)
            key = copy_of(i, name, tied)
            total[key] = total.get(key, torch.zeros_like(g)) + g
    return total, losses


def oracle_val_loss(
    w: Weights, m: Weights, alpha: Tensor, beta: list[Tensor], train: list[Batch], val: Batch, tied: bool = True
) -> float:
    """Return the validation loss after relaxed training from weights `w` and momentum `m`."""
    for given in train:
        g, _ = oracle_gradients(w, alpha, beta, given, tied)
        m = {k: SGD["momentum"] * m[k] + g[k] + SGD["weight_decay"] * w[k] for k in w}
        w = {k: w[k] - SGD["lr"] * m[k] for k in w}
    copies = [{n: w[copy_of(i, n, tied)] for n in names_of(i)} for i in range(LAYERS)]
    return local_losses(copies, beta, val)[-1].item()


def central_difference(f: Callable[[], float], t: Tensor, eps: float = 1e-3) -> Tensor:
    """Return df/dt, `f` reading `t`, by the five-point rule, of fourth order in eps."""
    found = torch.empty(t.numel(), dtype=torch.float64)
    for k in range(t.numel()):
        keep, total = t.view(-1)[k].item(), 0.0
        for offset, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            t.view(-1)[k] = keep + offset * eps
            total += weight * f()
        t.view(-1)[k] = keep
        found[k] = total / (12 * eps)
    return found.view_as(t)

"""Exports of every kind, one at a time and in nets drawn at random, against the formula over one connected graph."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared_net import SGD, Block, central_difference
from torch import Tensor, nn

from sedona_fx.errors import HeadError
from sedona_fx.search.relaxed.hypergradient import hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State
from sedona_fx.search.relaxed.training_step import relaxed_gradients


class Plain(nn.Module):
    """A block written as a function of its own parameters."""

    def __init__(self, f: Callable[..., Any], **params: Tensor) -> None:
        super().__init__()
        self.f = f
        for n, t in params.items():
            self.register_parameter(n, t if isinstance(t, nn.Parameter) else nn.Parameter(t))

    def forward(self, *args: Any) -> Any:
        return self.f(self, *args)


def plain(f: Callable[..., Any], inputs: str, exports: str = "", **params: Tensor) -> Block:
    """A block by function; its first export is the boundary."""
    names = tuple(exports.split())
    module = Plain(f, **params, **({"mix": torch.zeros(1, dtype=torch.float64)} if names else {}))
    return Block(module, module, tuple(inputs.split()), names, names[0] if names else None, "mix" if names else None)


def square(block: int, output: Tensor, target: Any) -> Tensor:
    return output.square().sum()


def relaxed(blocks: list[Block], alpha: Tensor, x: Tensor) -> list[dict[str, Tensor]]:
    one = torch.zeros(1, dtype=torch.float64)
    args = RelaxedNet(blocks, square), State.of(blocks), Logits(alpha, [one] * (len(blocks) - 1)), ({"x": x}, None)
    first, second = (relaxed_gradients(*args, create_graph=create_graph).grads for create_graph in (True, False))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return first


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_a_boundary_without_gradient_leaves_the_other_exports_theirs() -> None:
    w, u, v, x, alpha = draw(3), draw(3), draw(3), draw(4, 3), draw(1, 2)
    blocks = [
        plain(lambda m, x: ((x.cos(), x * m.w), x.cos() @ m.u), "x", "h s", w=w, u=u),
        plain(lambda m, h, s: ((), (h * s) @ m.v), "h s", v=v),
    ]
    found = relaxed(blocks, alpha, x)
    w.requires_grad_()
    (wanted,) = torch.autograd.grad(alpha.softmax(1)[0, 1] * square(1, (x.cos() * x * w) @ v, None), w)
    torch.testing.assert_close(found[0]["w"], wanted, rtol=1e-13, atol=0)
    assert found[0].keys() == {"w", "u"}


def test_a_value_handed_on_as_it_is() -> None:
    """Block 1 makes nothing: its boundary and its other export are the tensors it read, in a list under a new name."""
    w, u, v, x, alpha = draw(3), draw(3), draw(3), draw(4, 3), draw(2, 2)

    def first(m: Any, x: Tensor) -> Any:
        h = x * m.w
        return (h, x + m.w), h @ m.u

    blocks = [
        plain(first, "x", "h0 s0", w=w, u=u),
        plain(lambda m, h, s: ((h, [s, h]), h @ m.u), "h0 s0", "h1 s1", u=u.clone()),
        plain(lambda m, h, s: ((), (h * s[0] * s[1]) @ m.v), "h1 s1", v=v),
    ]
    found = relaxed(blocks, alpha, x)
    w.requires_grad_()
    h, s, p = x * w, x + w, alpha.softmax(1)
    local = square(0, h @ u, None)
    total = p[0, 0] * local + p[0, 1] * (p[1, 0] * local + p[1, 1] * square(2, (h * s * h) @ v, None))
    torch.testing.assert_close(found[0]["w"], torch.autograd.grad(total, w)[0], rtol=1e-13, atol=0)


def test_parts_of_a_split_are_told_apart() -> None:
    """Two exports are outputs of one node of the graph, and a parameter is exported as it is."""
    w, u, v, x, alpha = draw(3, 6), draw(3), draw(3), draw(4, 3), draw(1, 2)

    def first(m: Any, x: Tensor) -> Any:
        h, s = (x @ m.w).chunk(2, 1)
        return (h, s, m.w), h @ m.u

    blocks = [
        plain(first, "x", "h s w0", w=w, u=u),
        plain(lambda m, h, s, w0: ((), (h.exp() * s) @ m.v * w0.sum()), "h s w0", v=v),
    ]
    found = relaxed(blocks, alpha, x)
    w.requires_grad_()
    h, s = (x @ w).chunk(2, 1)
    p = alpha.softmax(1)[0]
    total = p[0] * square(0, h @ u, None) + p[1] * square(1, (h.exp() * s) @ v * w.sum(), None)
    torch.testing.assert_close(found[0]["w"], torch.autograd.grad(total, w)[0], rtol=1e-13, atol=0)


def test_a_head_that_uses_a_weight_of_its_base_layer_is_refused() -> None:
    blocks = [
        plain(lambda m, x: ((x * m.w,), (x * m.w) @ m.u), "x", "h", w=draw(3), u=draw(3)),
        plain(lambda m, h: ((), h @ m.v), "h", v=draw(3)),
    ]
    with pytest.raises(HeadError, match="block 0: its heads depend on w other than through the boundary 'h'"):
        relaxed(blocks, draw(1, 2), draw(4, 3))


def test_names_tied_inside_a_block_and_weights_used_elsewhere_in_evaluation() -> None:
    """All names of a tensor lead to its one copy, also those that only an evaluation graph has."""
    w, x = nn.Parameter(draw(3)), 0.3 * draw(4, 3)

    def first(m: Any, x: Tensor) -> Any:
        h = x * m.w * m.again
        return (h,), h.sum(1)

    blocks = [
        plain(first, "x", "h", w=w, again=w),
        plain(lambda m, h: ((), (h * m.v).sum(1)), "h", v=draw(3)),
    ]
    elsewhere = Plain(lambda m, h: ((), (h * m.v * m.other).sum(1)), v=blocks[1].module.get_parameter("v"), other=w)
    blocks[1] = replace(blocks[1], eval_module=elsewhere)
    state = State.of(blocks)
    assert [list(d) for d in state.params] == [["w"], ["v"]]
    assert state.borrowed == [{"again": (0, "w")}, {"other": (0, "w")}]
    alpha, given = draw(1, 2), ({"x": x}, None)
    logits = Logits(alpha, [torch.zeros(1).double()])
    got = hypergradient(RelaxedNet(blocks, square), state, logits, [given] * 2, given, **SGD)

    def value() -> float:
        weights = [state.params[0]["w"], state.params[1]["v"]]
        momenta = [torch.zeros_like(t) for t in weights]
        for _ in range(2):
            w, v = (t.detach().requires_grad_() for t in weights)
            local, final = (square(0, (x * w * w * t).sum(1), None) for t in (torch.ones_like(v), v))
            p = alpha.softmax(1)[0]
            (of_w,) = torch.autograd.grad(p[0] * local + p[1] * final, w, retain_graph=True)
            grads = [of_w, *torch.autograd.grad(final, v)]
            momenta = [SGD["momentum"] * m + g + SGD["weight_decay"] * t
                       for m, g, t in zip(momenta, grads, weights, strict=True)]  # fmt: skip
            weights = [t - SGD["lr"] * m for t, m in zip(weights, momenta, strict=True)]
        w, v = weights
        return square(1, (x * w * w * v * w).sum(1), None).item()

    wanted = central_difference(value, alpha)
    assert wanted.abs().max() > 1e-4
    assert got.val_loss.item() == pytest.approx(value(), rel=1e-12)
    assert (got.alpha_grad - wanted).abs().max() < 1e-6 * wanted.abs().max()


# --- nets drawn at random ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A layer: tanh of what it reads times its weights, summed; further exports of several kinds around it."""

    index: int
    reads: tuple[str, ...]
    weights: tuple[str, ...]  # one for each read; names that other layers have too are shared
    others: tuple[str, ...]  # the kinds of its further exports

    @property
    def exports(self) -> tuple[str, ...]:
        return (f"h{self.index}", *(f"{kind}{self.index}" for kind in self.others))

    def forward(self, w: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        before = sum(values[n] @ getattr(w, weight) for n, weight in zip(self.reads, self.weights, strict=True))
        h = torch.tanh(before)
        kinds = {
            "ancestor": lambda: before,
            "descendant": lambda: h.square(),
            "view": lambda: h.flip(1) if self.index % 2 else h[:, :],
            "sibling": lambda: values[self.reads[-1]] * getattr(w, self.weights[0])[0],
            "constant": lambda: torch.full_like(h, 0.7),  # no gradient
        }
        return {f"h{self.index}": h} | {f"{kind}{self.index}": kinds[kind]() for kind in self.others}


def draw_net(rng: random.Random, layers: int) -> list[Drawn]:
    net: list[Drawn] = []
    for i in range(layers):
        earlier = [n for layer in net[:-1] for n in layer.exports] + list(net[-1].exports[1:] if net else ())
        reads = (f"h{i - 1}" if i else "x", *rng.sample(earlier, min(len(earlier), rng.randint(0, 3))))
        weights = tuple(rng.choice([f"own{i}_{k}", "tied", "bound", "common"]) for k in range(len(reads)))
        kinds = rng.sample(["ancestor", "descendant", "view", "sibling", "constant"], rng.randint(0, 3))
        net.append(Drawn(i, reads, weights, tuple(kinds) if i < layers - 1 else ()))
    return net


def as_blocks(net: list[Drawn]) -> list[Block]:
    common = {n: nn.Parameter(0.5 * draw(3, 3)) for n in ("tied", "bound", "common")}
    blocks = []
    for layer in net:

        def run(m: Any, *args: Tensor, layer: Drawn = layer) -> Any:
            made = layer.forward(m, dict(zip(layer.reads, args, strict=True)))
            h = made[f"h{layer.index}"]
            return (tuple(made.values()), h @ m.head) if layer is not net[-1] else ((), h)

        weights: dict[str, Tensor] = {n: common[n] if n in common else 0.5 * draw(3, 3) for n in layer.weights}
        last = layer is net[-1]
        exports = "" if last else " ".join(layer.exports)
        blocks.append(plain(run, " ".join(layer.reads), exports, **weights, **({} if last else {"head": draw(3)})))
    return blocks


def local_losses(net: list[Drawn], copies: list[dict[str, Tensor]], x: Tensor) -> list[Tensor]:
    """All local losses over one connected graph, layer i on `copies[i]`."""
    env, losses = {"x": x}, []
    for layer, own in zip(net, copies, strict=True):
        env |= layer.forward(SimpleNamespace(**own), env)
        h = env[f"h{layer.index}"]
        losses.append(square(0, h if layer is net[-1] else h @ own["head"], None))
    return losses


Slot = tuple[int, str]


def slots(net: list[Drawn]) -> list[dict[str, Slot]]:
    """Return, for every layer, its names and who holds the tensor: the last layer that has it."""
    last = {n: layer.index for layer in net for n in layer.weights}
    return [
        {n: (last[n], n) for n in layer.weights} | ({"head": (layer.index, "head")} if layer is not net[-1] else {})
        for layer in net
    ]


def formula(net: list[Drawn], w: dict[Slot, Tensor], alpha: Tensor, x: Tensor) -> dict[Slot, Tensor]:
    """Gradients of every layer's own objective with respect to its own copies of `w`, summed over the copies."""
    held = slots(net)
    copies = [{n: w[slot].detach().clone().requires_grad_() for n, slot in d.items()} for d in held]
    losses = local_losses(net, copies, x)
    relaxed, total = losses[-1], dict[Slot, Tensor]()
    for i in reversed(range(len(net))):
        if i < len(net) - 1:
            p = alpha[i].softmax(0)
            relaxed = p[0] * losses[i] + p[1] * relaxed
        for n, t in copies[i].items():
            (g,) = torch.autograd.grad(losses[i] if n == "head" else relaxed, t, retain_graph=True)
            total[held[i][n]] = total.get(held[i][n], 0) + g
    return total


def flat(dicts: list[dict[str, Tensor]]) -> dict[Slot, Tensor]:
    return {(k, n): t for k, d in enumerate(dicts) for n, t in d.items()}


@pytest.mark.parametrize("seed", range(25))
def test_any_net(seed: int) -> None:
    torch.manual_seed(seed)
    net = draw_net(random.Random(seed), layers=6)
    blocks, alpha, x = as_blocks(net), draw(5, 2), draw(5, 3)
    wanted, found = formula(net, flat(State.of(blocks).params), alpha, x), flat(relaxed(blocks, alpha, x))
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert (found[key] - t).norm() <= 1e-13 * t.norm(), key


@pytest.mark.parametrize("seed", range(10))
def test_the_hypergradient_of_any_net(seed: int) -> None:
    torch.manual_seed(seed)
    net = draw_net(random.Random(seed), layers=5)
    blocks, alpha, val = as_blocks(net), draw(4, 2), draw(5, 3)
    train, state, sgd = [draw(5, 3) for _ in range(3)], State.of(blocks), SGD | {"lr": 0.02}
    logits, batches = Logits(alpha, [torch.zeros(1, dtype=torch.float64)] * 4), [({"x": x}, None) for x in train]
    at = RelaxedNet(blocks, square), state, logits
    got = hypergradient(*at, batches, ({"x": val}, None), **sgd)
    of_one = [
        function(*at, first, ({"x": val}, None), **sgd).alpha_grad
        for function, first in ((hypergradient, batches[:1]), (one_step_hypergradient, batches[0]))
    ]
    torch.testing.assert_close(of_one[1], of_one[0], rtol=1e-10, atol=1e-15)

    def value() -> float:
        w, m = flat(state.params), flat(state.momentum)
        for x in train:
            g = formula(net, w, alpha, x)
            m = {k: sgd["momentum"] * m[k] + g[k] + sgd["weight_decay"] * w[k] for k in w}
            w = {k: w[k] - sgd["lr"] * m[k] for k in w}
        return local_losses(net, [{n: w[slot] for n, slot in d.items()} for d in slots(net)], val)[-1].item()

    wanted = central_difference(value, alpha)
    assert wanted.abs().max() > 1e-6
    assert (got.alpha_grad - wanted).abs().max() < 1e-7 * wanted.abs().max()

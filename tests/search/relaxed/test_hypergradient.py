"""The hypergradient against central differences of the whole procedure, run by a second, plain implementation.

The oracle shares nothing with sedona_fx: the net is written out in functional calls, the objective Lt as its formula,
and base layer j's gradient is `autograd.grad` of its own Lt_j over one connected graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.measure import peak_bytes
from sedona_fx.search.relaxed import hypergradient as hypergradient_module
from sedona_fx.search.relaxed.hypergradient import HyperGradient, batch_statistics, hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import RelaxedGradients, relaxed_gradients
from sedona_fx.search.relaxed.unrolled_step import UnrolledStep
from sedona_fx.search.sedona.relaxed_net import RelaxedGraphBlock as Block

WIDTHS, CLASSES = (2, 4, 5, 4, 3), 3
LAYERS = len(WIDTHS) - 1
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "softplus": F.softplus, "gelu": F.gelu}
SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-2}


# --- the net as blocks ------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Base layer conv-BN-activation, then two heads (conv-BN-pool-linear, and pool-linear), or the classifier."""

    def __init__(self, i: int, act: str) -> None:
        super().__init__()
        cin, cout, self.act, self.last = WIDTHS[i], WIDTHS[i + 1], act, i == LAYERS - 1
        self.conv, self.norm = nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout)
        if self.last:
            self.fc = nn.Linear(cout, CLASSES)
            return
        self.head_conv, self.head_norm = nn.Conv2d(cout, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.head_fc = nn.Linear(4, CLASSES)
        self.linear = nn.Linear(cout, CLASSES)
        self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        act = ACTIVATIONS[self.act]
        h = act(self.norm(self.conv(x)))
        if self.last:
            return (), self.fc(F.dropout(h.mean((2, 3)), 0.0, self.training))
        one = self.head_fc(act(self.head_norm(self.head_conv(h))).mean((2, 3)))
        s = self.mix.softmax(0)
        return (h, x.shape[0]), s[0] * one + s[1] * self.linear(h.mean((2, 3)))


def make_blocks(act: str) -> list[Block]:
    blocks = []
    for i in range(LAYERS):
        module = nn.ModuleDict({f"layer{i}": Layer(i, act).double()})
        last = i == LAYERS - 1

        class Call(nn.Module):
            def __init__(self, inner: nn.Module, i: int) -> None:
                super().__init__()
                self.add_module(f"layer{i}", inner)
                self.i = i

            def forward(self, x: Tensor) -> Any:
                return self.get_submodule(f"layer{self.i}")(x)

        call = Call(module[f"layer{i}"], i)
        exports = () if last else (f"h{i}", f"n{i}")
        beta = None if last else f"layer{i}.mix"
        blocks.append(Block(call, call, ("x" if i == 0 else f"h{i - 1}",), exports, None if last else f"h{i}", beta))
    return blocks


@dataclass
class Problem:
    blocks: list[Block]
    state: State
    alpha: Tensor
    beta: list[Tensor]
    train: list[tuple[dict[str, Any], Tensor]]
    val: tuple[dict[str, Any], Tensor]
    act: str

    def hypergradient(self, *, one_step: bool = False) -> HyperGradient:
        at = RelaxedNet(self.blocks, loss), self.state, Logits(self.alpha, self.beta)
        if one_step:
            return one_step_hypergradient(*at, *self.train, self.val, **SGD)
        return hypergradient(*at, self.train, self.val, **SGD)

    def relaxed_gradients(self, state: State, create_graph: bool) -> RelaxedGradients:
        net, logits = RelaxedNet(self.blocks, loss), Logits(self.alpha, self.beta)
        return relaxed_gradients(net, state, logits, self.train[0], create_graph=create_graph)


def make_problem(act: str, steps: int) -> Problem:
    torch.manual_seed(steps)
    blocks = make_blocks(act)
    state = State.of(blocks)
    for params, momenta in zip(state.params, state.momentum, strict=True):
        for t in params.values():
            t += 0.3 * torch.randn_like(t)
        for t in momenta.values():
            t += 0.1 * torch.randn_like(t)

    def batch(n: int) -> tuple[dict[str, Any], Tensor]:
        return {"x": torch.randn(n, WIDTHS[0], 6, 6, dtype=torch.float64)}, torch.randint(CLASSES, (n,))

    alpha = torch.randn(LAYERS - 1, 2, dtype=torch.float64)
    beta = [torch.randn(2, dtype=torch.float64) for _ in range(LAYERS - 1)]
    return Problem(blocks, state, alpha, beta, [batch(8) for _ in range(steps)], batch(16), act)


# --- the oracle -------------------------------------------------------------------------------------------------------

Weights = dict[str, Tensor]


def flat(dicts: list[Weights]) -> Weights:
    return {n: t for d in dicts for n, t in d.items()}


def oracle_norm(x: Tensor, w: Weights, name: str, statistics: dict[str, Tensor] | None) -> Tensor:
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    if statistics is not None:
        mean, var = statistics[name + ".running_mean"], statistics[name + ".running_var"]
    z = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    return z * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]


def oracle_losses(
    w: Weights,
    beta: list[Tensor],
    x: Tensor,
    y: Tensor,
    act: str,
    statistics: dict[str, Tensor] | None = None,
    scaled: Tensor | None = None,
) -> list[Tensor]:
    """All local losses, the final one last, over one connected graph; `scaled` (probabilities): the trap's edges."""
    f, losses, h = ACTIVATIONS[act], [], x
    for i in range(LAYERS):
        n = f"layer{i}."
        h = f(oracle_norm(F.conv2d(h, w[n + "conv.weight"], padding=1), w, n + "norm", statistics))
        if i == LAYERS - 1:
            out = F.linear(h.mean((2, 3)), w[n + "fc.weight"], w[n + "fc.bias"])
        else:
            to_head = h
            if scaled is not None:
                isolate, through = scaled[i]
                to_head = isolate * h + (1 - isolate) * h.detach()
                h = through * h + (1 - through) * h.detach()
            z = f(oracle_norm(F.conv2d(to_head, w[n + "head_conv.weight"], stride=2), w, n + "head_norm", statistics))
            one = F.linear(z.mean((2, 3)), w[n + "head_fc.weight"], w[n + "head_fc.bias"])
            two = F.linear(to_head.mean((2, 3)), w[n + "linear.weight"], w[n + "linear.bias"])
            s = torch.softmax(beta[i], 0)
            out = s[0] * one + s[1] * two
        losses.append(F.cross_entropy(out, y))
    return losses


def oracle_gradients(w: Weights, alpha: Tensor, beta: list[Tensor], x: Tensor, y: Tensor, act: str) -> Weights:
    w = {n: t.detach().requires_grad_() for n, t in w.items()}
    losses = oracle_losses(w, beta, x, y, act)
    relaxed = [losses[-1]]
    for i in reversed(range(LAYERS - 1)):
        isolate, through = torch.softmax(alpha[i], 0)
        relaxed.insert(0, isolate * losses[i] + through * relaxed[0])
    grads: Weights = {}
    for i in range(LAYERS):
        mine = [n for n in w if n.startswith(f"layer{i}.")]
        heads = [n for n in mine if ".head" in n or ".linear" in n]
        for loss, names in ((relaxed[i], [n for n in mine if n not in heads]), (losses[i], heads)):
            if names:
                found = torch.autograd.grad(loss, [w[n] for n in names], retain_graph=True)
                grads |= dict(zip(names, found, strict=True))
    return grads


def oracle_val_loss(p: Problem, alpha: Tensor, beta: list[Tensor], running: bool = False) -> float:
    """The validation loss after the whole procedure, as a number."""
    w, m = flat(p.state.params), flat(p.state.momentum)
    for inputs, y in p.train:
        g = oracle_gradients(w, alpha, beta, inputs["x"], y, p.act)
        m = {n: SGD["momentum"] * m[n] + g[n] + SGD["weight_decay"] * w[n] for n in w}
        w = {n: w[n] - SGD["lr"] * m[n] for n in w}
    statistics = flat(p.state.buffers) if running else None
    return oracle_losses(w, beta, p.val[0]["x"], p.val[1], p.act, statistics)[-1].item()


def central_differences(p: Problem, eps: float, running: bool = False) -> tuple[Tensor, Tensor]:
    """d(validation loss)/d(alpha) and d/d(beta), both flat: the five-point rule, of fourth order in eps."""

    def derivative(t: Tensor, k: int) -> float:
        keep, total = t.view(-1)[k].item(), 0.0
        for offset, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            t.view(-1)[k] = keep + offset * eps
            total += weight * oracle_val_loss(p, alpha, beta, running)
        t.view(-1)[k] = keep
        return total / (12 * eps)

    alpha, beta = p.alpha.clone(), [b.clone() for b in p.beta]
    by_alpha = [derivative(alpha, k) for k in range(alpha.numel())]
    by_beta = [derivative(b, k) for b in beta for k in range(b.numel())]
    return torch.tensor(by_alpha, dtype=torch.float64), torch.tensor(by_beta, dtype=torch.float64)


def relative(got: Tensor, wanted: Tensor) -> float:
    assert wanted.norm() > 1e-5
    return ((got - wanted).norm() / wanted.norm()).item()


# --- tests ------------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-6


def loss(block: int, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def square(block: int, output: Tensor, target: Any) -> Tensor:
    return output.square().sum()


@pytest.mark.parametrize(("steps", "one_step"), [(1, False), (3, False), (1, True)])
@pytest.mark.parametrize(("act", "eps"), [("relu", 1e-5), ("softplus", 1e-3)])  # a kink wants a small eps
def test_agrees_with_central_differences(act: str, eps: float, steps: int, one_step: bool) -> None:
    p = make_problem(act, steps)
    got = p.hypergradient(one_step=one_step)
    by_alpha, by_beta = central_differences(p, eps)
    assert relative(got.alpha_grad.flatten(), by_alpha) < TOLERANCE
    assert relative(torch.cat(got.beta_grads), by_beta) < TOLERANCE
    assert got.val_loss.item() == pytest.approx(oracle_val_loss(p, p.alpha, p.beta), rel=1e-12)


@pytest.mark.parametrize("act", ["relu", "softplus", "gelu"])
def test_one_step_equals_reverse_mode(act: str) -> None:
    p = make_problem(act, 1)
    tensors, before = everything(p), [t.clone() for t in everything(p)]
    wanted, got = p.hypergradient(), p.hypergradient(one_step=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(tensors, before, strict=True))
    pairs = [(got.alpha_grad, wanted.alpha_grad), *zip(got.beta_grads, wanted.beta_grads, strict=True)]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
    assert torch.equal(got.val_loss, wanted.val_loss)


def unrolled(p: Problem) -> list[Tensor]:
    """Every step's gradient `autograd.grad` over one connected graph, and one backward through all steps at once."""
    alpha, beta = p.alpha.clone().requires_grad_(), [b.clone().requires_grad_() for b in p.beta]
    w, m = {n: t.clone().requires_grad_() for n, t in flat(p.state.params).items()}, flat(p.state.momentum)
    for inputs, y in p.train:
        losses = oracle_losses(w, beta, inputs["x"], y, p.act)
        share, relaxed, g = alpha.softmax(1), [losses[-1]], {}
        for i in reversed(range(LAYERS - 1)):
            relaxed.insert(0, share[i, 0] * losses[i] + share[i, 1] * relaxed[0])
        for n, t in w.items():
            loss_of = (losses if ".head" in n or ".linear" in n else relaxed)[int(n.removeprefix("layer")[0])]
            (g[n],) = torch.autograd.grad(loss_of, t, create_graph=True)
        m = {n: SGD["momentum"] * m[n] + g[n] + SGD["weight_decay"] * w[n] for n in w}
        w = {n: w[n] - SGD["lr"] * m[n] for n in w}
    final = oracle_losses(w, beta, p.val[0]["x"], p.val[1], p.act)[-1]
    return list(torch.autograd.grad(final, [alpha, *beta]))


class GraphKept(UnrolledStep):
    """A step that is never recomputed: all second-order graphs are alive at once. The reference for recomputing."""

    def gradients(self, buffers: list[Weights], *, keep_graph: bool) -> list[Weights]:
        return super().gradients(buffers, keep_graph=True)


STEPS = {"recomputed": UnrolledStep, "kept": GraphKept}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_step_by_step_equals_one_backward_through_all_steps(
    act: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make_problem(act, 4)
    monkeypatch.setattr(hypergradient_module, "UnrolledStep", STEPS[step])
    got, wanted = p.hypergradient(), unrolled(p)
    for ours, theirs in zip([got.alpha_grad, *got.beta_grads], wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_doing_steps_again_repeats_what_was_drawn_and_what_is_read_of_the_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout in the base layers, and a norm that reads its running statistics, which the steps change."""
    p = make_problem("softplus", 4)

    def forward(m: Any, x: Tensor) -> Any:
        h = F.dropout(F.softplus(F.conv2d(x, m.w)) - m.mean[:, None, None], 0.3)
        m.mean.lerp_(h.detach().mean((0, 2, 3)), 0.5)
        return (h,), h.mean((2, 3)) @ m.u

    block = Plain(forward, w=torch.randn(3, 2, 1, 1), u=torch.randn(3, CLASSES), mix=torch.zeros(1)).double()
    block.register_buffer("mean", torch.randn(3, dtype=torch.float64))
    last = Plain(lambda m, h: ((), h.mean((2, 3)) @ m.v), v=torch.randn(3, CLASSES)).double()
    blocks = [Block(block, block, ("x",), ("h",), "h", "mix"), Block(last, last, ("h",), (), None, None)]
    logits = Logits(torch.randn(1, 2, dtype=torch.float64), [torch.zeros(1, dtype=torch.float64)])
    found, streams = [], []
    for step in STEPS.values():
        monkeypatch.setattr(hypergradient_module, "UnrolledStep", step)
        torch.manual_seed(3)
        found.append(hypergradient(RelaxedNet(blocks, loss), State.of(blocks), logits, p.train, p.val, **SGD))
        streams.append(torch.get_rng_state())
    assert found[0].alpha_grad.abs().max() > 1e-6
    assert torch.equal(found[0].alpha_grad, found[1].alpha_grad)
    assert torch.equal(*streams)


def test_with_recomputation_memory_does_not_grow_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(steps: int) -> int:
        return peak_bytes(make_problem("relu", steps).hypergradient)

    assert peak(6) < 1.2 * peak(2)
    monkeypatch.setattr(hypergradient_module, "UnrolledStep", GraphKept)
    assert peak(6) > 2 * peak(2)


def test_running_statistics_in_validation_would_be_caught() -> None:
    p = make_problem("softplus", 3)
    got = p.hypergradient()
    by_alpha, by_beta = central_differences(p, 1e-3, running=True)
    assert relative(got.alpha_grad.flatten(), by_alpha) > 0.01
    assert relative(torch.cat(got.beta_grads), by_beta) > 0.01


@pytest.mark.parametrize(("steps", "right"), [(1, True), (3, False)])
def test_scaled_edges_would_be_caught(steps: int, right: bool) -> None:
    """An identity with a scaled backward: right for one step, wrong from the second derivative through it on."""
    p = make_problem("softplus", steps)
    alpha, beta = p.alpha.clone().requires_grad_(), [b.clone().requires_grad_() for b in p.beta]
    w, m = {n: t.requires_grad_() for n, t in flat(p.state.clone().params).items()}, flat(p.state.momentum)
    for inputs, y in p.train:
        losses = oracle_losses(w, beta, inputs["x"], y, p.act, scaled=alpha.softmax(1))
        g = dict(zip(w, torch.autograd.grad(sum(losses), list(w.values()), create_graph=True), strict=True))
        m = {n: SGD["momentum"] * m[n] + g[n] + SGD["weight_decay"] * w[n] for n in w}
        w = {n: w[n] - SGD["lr"] * m[n] for n in w}
    final = oracle_losses(w, beta, p.val[0]["x"], p.val[1], p.act)[-1]
    (trap,) = torch.autograd.grad(final, [alpha])
    error = relative(trap, p.hypergradient().alpha_grad)
    assert (error < 1e-10) if right else (error > 1e3 * TOLERANCE)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_relaxed_gradients_equal_those_of_the_formula(act: str) -> None:
    p = make_problem(act, 1)
    (inputs, y) = p.train[0]
    wanted = oracle_gradients(flat(p.state.params), p.alpha, p.beta, inputs["x"], y, act)
    found = {}
    for create_graph in (True, False):
        r = p.relaxed_gradients(p.state.clone(), create_graph)
        found[create_graph] = flat(r.grads)
        assert found[create_graph].keys() == wanted.keys()
        assert all(not t.requires_grad for t in r.losses)
        difference = torch.cat([(found[create_graph][n] - wanted[n]).flatten() for n in wanted])
        assert difference.norm() < 1e-12 * torch.cat([t.flatten() for t in wanted.values()]).norm()
    assert all(torch.equal(found[True][n], found[False][n]) for n in wanted)
    assert not any(t.requires_grad for t in found[False].values())


def everything(p: Problem) -> list[Tensor]:
    own = [t for b in p.blocks for t in b.module.state_dict().values()]
    return [*flat(p.state.params).values(), *flat(p.state.buffers).values(), *flat(p.state.momentum).values(), *own]


def test_hypergradient_changes_nothing() -> None:
    p = make_problem("relu", 2)
    p.blocks[1].module.get_submodule("layer1.head_norm").eval()  # frozen: has to stay so, everywhere
    tensors, before = everything(p), [t.clone() for t in everything(p)]
    flags = [m.training for b in p.blocks for m in b.module.modules()]
    first, again = p.hypergradient(), p.hypergradient()
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(tensors, before, strict=True))
    assert all(x.grad is None for b in p.blocks for x in b.module.parameters())
    assert flags == [m.training for b in p.blocks for m in b.module.modules()]
    assert torch.equal(first.alpha_grad, again.alpha_grad)
    assert not p.alpha.requires_grad
    with batch_statistics(p.blocks):
        live = [m for b in p.blocks for m in b.module.modules() if m.training]
        assert all(isinstance(m, nn.BatchNorm2d) for m in live)
        assert len(live) == LAYERS + (LAYERS - 1) - 1


class Bare(nn.Module):
    """The evaluation graph of a layer: the same convolution and norm, no heads, no dropout."""

    def __init__(self, i: int, layer: nn.Module) -> None:
        super().__init__()
        inner = nn.Module()
        for name in ("conv", "norm", "fc"):
            if hasattr(layer, name):
                inner.add_module(name, getattr(layer, name))
        self.add_module(f"layer{i}", inner)
        self.i = i

    def forward(self, x: Tensor) -> Any:
        m = self.get_submodule(f"layer{self.i}")
        h = F.softplus(m.norm(m.conv(x)))
        return ((), m.fc(h.mean((2, 3)))) if self.i == LAYERS - 1 else ((h, x.shape[0]), None)


def test_an_evaluation_graph_of_its_own_needs_no_heads() -> None:
    p = make_problem("softplus", 2)
    wanted = p.hypergradient()
    p.blocks = [
        replace(b, eval_module=Bare(i, b.module.get_submodule(f"layer{i}")).eval()) for i, b in enumerate(p.blocks)
    ]
    for b in p.blocks:
        b.module.train()  # the norms are shared
    got = p.hypergradient()
    assert not any(b.eval_module.training for b in p.blocks)
    assert torch.equal(got.alpha_grad, wanted.alpha_grad)
    assert all(torch.equal(a, b) for a, b in zip(got.beta_grads, wanted.beta_grads, strict=True))


def test_a_relaxed_step_counts_once_in_batch_norm_and_the_modules_keep_theirs() -> None:
    p = make_problem("relu", 1)
    inputs, _ = p.train[0]
    r = p.relaxed_gradients(p.state, create_graph=False)
    state = sgd_momentum_step(p.state, r.grads, **SGD, in_place=True)
    assert state is p.state
    counts = [t for n, t in flat(state.buffers).items() if "num_batches" in n]
    assert [int(t) for t in counts] == [1] * (2 * LAYERS - 1)
    seen = F.conv2d(inputs["x"], make_problem("relu", 1).state.params[0]["layer0.conv.weight"], padding=1).mean(
        (0, 2, 3)
    )
    torch.testing.assert_close(state.buffers[0]["layer0.norm.running_mean"], 0.1 * seen)
    own = p.blocks[0].module.get_submodule("layer0.norm")
    assert int(own.num_batches_tracked) == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_the_step_is_torch_sgd(in_place: bool) -> None:
    p = make_problem("relu", 1)
    state = State(
        [d.copy() for d in p.state.params],
        p.state.buffers,
        [{n: torch.zeros_like(t) for n, t in d.items()} for d in p.state.params],
    )
    reference = {n: nn.Parameter(t.clone()) for n, t in flat(state.params).items()}
    optimizer = torch.optim.SGD(reference.values(), **SGD)
    for step in range(3):
        grads = [{n: torch.randn_like(t) for n, t in d.items()} for d in state.params]
        if step == 0:
            grads[0].pop("layer0.conv.weight")  # no gradient: no decay either
        for n, t in reference.items():
            t.grad = flat(grads).get(n)
        optimizer.step()
        state = sgd_momentum_step(state, grads, **SGD, in_place=in_place)
    for n, t in flat(state.params).items():
        torch.testing.assert_close(t, reference[n].data, rtol=1e-14, atol=1e-14)


class Plain(nn.Module):
    """A block written as a function of its own parameters."""

    def __init__(self, f: Callable[..., Any], **params: Tensor) -> None:
        super().__init__()
        self.f = f
        for n, t in params.items():
            self.register_parameter(n, nn.Parameter(t))

    def forward(self, *args: Tensor) -> Any:
        return self.f(self, *args)


def test_a_boundary_that_skips_a_block_follows_the_formula() -> None:
    """h0 is read by blocks 1 and 2: both of its ways up pass cut 0, the way to block 2 passes cut 1 too."""
    torch.manual_seed(0)
    w = [torch.randn(3, 3, dtype=torch.float64) for _ in range(3)]
    u = [torch.randn(3, dtype=torch.float64) for _ in range(2)]
    one = torch.zeros(1, dtype=torch.float64)

    def block(i: int, f: Callable[..., Any], inputs: tuple[str, ...]) -> Block:
        last = i == 2
        params = {f"w{i}": w[i]} if last else {f"w{i}": w[i], f"u{i}": u[i], f"mix{i}": one}
        module = Plain(f, **params)
        return Block(
            module, module, inputs, () if last else (f"h{i}",), None if last else f"h{i}", None if last else f"mix{i}"
        )

    def first(m: Any, x: Tensor) -> Any:
        h = torch.tanh(x @ m.w0)
        return (h,), h @ m.u0

    def second(m: Any, h0: Tensor) -> Any:
        h = torch.tanh(h0 @ m.w1)
        return (h,), h @ m.u1

    blocks = [
        block(0, first, ("x",)),
        block(1, second, ("h0",)),
        block(2, lambda m, h1, h0: ((), h1 @ m.w2 + h0), ("h1", "h0")),
    ]
    x, alpha = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    found = []
    for create_graph in (True, False):
        args = RelaxedNet(blocks, square), State.of(blocks), Logits(alpha, [one, one]), ({"x": x}, None)
        found.append(relaxed_gradients(*args, create_graph=create_graph).grads[0]["w0"])
    w = [t.requires_grad_() for t in w]
    h0 = torch.tanh(x @ w[0])
    h1 = torch.tanh(h0 @ w[1])
    losses = [(h0 @ u[0]).square().sum(), (h1 @ u[1]).square().sum(), (h1 @ w[2] + h0).square().sum()]
    p = alpha.softmax(1)
    relaxed = p[1, 0] * losses[1] + p[1, 1] * losses[2]
    relaxed = p[0, 0] * losses[0] + p[0, 1] * relaxed
    (wanted,) = torch.autograd.grad(relaxed, w[0])
    torch.testing.assert_close(found, [wanted, wanted], rtol=1e-13, atol=1e-13)


def test_attention_and_frozen_weights() -> None:
    """Fused attention has no second derivative, and a frozen weight is neither moved nor decayed."""
    torch.manual_seed(0)

    def first(m: Any, x: Tensor) -> Any:
        q = (x @ m.frozen @ m.w).unsqueeze(1)
        h = F.scaled_dot_product_attention(q, q, q).squeeze(1)
        return (h,), h.mean(1) @ m.u

    def second(m: Any, h: Tensor) -> Any:
        return (), h.mean(1) @ m.v

    one = Plain(first, frozen=torch.randn(4, 4), w=torch.randn(4, 4), u=torch.randn(4, 3), mix=torch.zeros(1))
    one.frozen.requires_grad_(False)
    two = Plain(second, v=torch.randn(4, 3))
    blocks = [Block(one, one, ("x",), ("h",), "h", "mix"), Block(two, two, ("h",), (), None, None)]
    state = State.of(blocks)
    assert list(state.params[0]) == ["w", "u"]
    batch = {"x": torch.randn(5, 6, 4)}, torch.tensor([0, 1, 2, 0, 1])
    logits = Logits(torch.zeros(1, 2), [torch.zeros(1)])
    got = hypergradient(RelaxedNet(blocks, loss), state, logits, [batch] * 2, batch, **SGD)
    assert got.alpha_grad.abs().max() > 0
    assert got.beta_grads[0].abs().max() == 0  # one head: nothing to choose


def test_a_gradient_past_the_boundary_is_let_through_as_the_boundary_is() -> None:
    """`past` is the boundary's sibling: its way up has p_through, and no local loss."""
    w, u, v = (torch.randn(3, dtype=torch.float64) for _ in range(3))

    def first(m: Any, x: Tensor) -> Any:
        h = x * m.w
        return (h, x + m.w), h @ m.u

    one = Plain(first, w=w, u=u, mix=torch.zeros(1, dtype=torch.float64))
    two = Plain(lambda m, h, past: ((), (h * past) @ m.v), v=v)
    blocks = [Block(one, one, ("x",), ("h", "past"), "h", "mix"), Block(two, two, ("h", "past"), (), None, None)]
    alpha, x = torch.randn(1, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    args = RelaxedNet(blocks, square), State.of(blocks), Logits(alpha, [one.mix.detach()]), ({"x": x}, None)
    found = relaxed_gradients(*args, create_graph=False).grads
    w, p = w.requires_grad_(), alpha.softmax(1)[0]
    total = p[0] * (x * w @ u).square().sum() + p[1] * ((x * w * (x + w)) @ v).square().sum()
    torch.testing.assert_close(found[0]["w"], torch.autograd.grad(total, w)[0], rtol=1e-13, atol=0)

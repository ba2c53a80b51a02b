"""Cuts that several live tensors cross and tensors that blocks share: the relaxed net and its hypergradient."""

from __future__ import annotations

import pytest
import torch
from shared_net import (
    LAYERS,
    OWNERS,
    SGD,
    Block,
    Weights,
    batch,
    central_difference,
    copy_of,
    local_losses,
    logits,
    loss,
    make_blocks,
    names_of,
    oracle_gradients,
    oracle_val_loss,
)
from torch import Tensor

from sedona_fx.search.relaxed.hypergradient import HyperGradient, hypergradient
from sedona_fx.search.relaxed.one_step import one_step_hypergradient
from sedona_fx.search.relaxed.state import Logits, RelaxedNet, State, sgd_momentum_step
from sedona_fx.search.relaxed.training_step import relaxed_gradients


def flat(dicts: list[dict[str, Tensor]]) -> Weights:
    return {(k, n): t for k, d in enumerate(dicts) for n, t in d.items()}


def started(blocks: list[Block]) -> State:
    """A state whose momentum is not zero."""
    state = State.of(blocks)
    for t in flat(state.momentum).values():
        t += 0.1 * torch.randn_like(t)
    return state


def distance(got: Weights, wanted: Weights) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    assert got.keys() == wanted.keys()
    assert all(t.abs().max() > 1e-6 for t in wanted.values())
    a, b = (torch.cat([d[k].flatten() for k in wanted]) for d in (got, wanted))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_the_formula(tied: bool) -> None:
    blocks, given, (alpha, beta) = make_blocks(tied), batch(), logits()
    net, state = RelaxedNet(blocks, loss), State.of(blocks)
    wanted, losses = oracle_gradients(flat(state.params), alpha, beta, given, tied)
    found = {}
    for create_graph in (True, False):
        r = relaxed_gradients(net, state.clone(), Logits(alpha, beta), given, create_graph=create_graph)
        found[create_graph] = flat(r.grads)
        assert distance(found[create_graph], wanted) < 1e-14
        torch.testing.assert_close(r.losses, [t.detach() for t in losses], rtol=1e-13, atol=0)
    assert all(torch.equal(found[True][k], found[False][k]) for k in wanted)
    assert not any(t.requires_grad for t in found[False].values())


def solve(blocks: list[Block], state: State, steps: int, tied: bool) -> tuple[HyperGradient, Tensor, Tensor, float]:
    """Return what the engine finds, and d/d(alpha), d/d(beta) and the loss of the oracle."""
    (alpha, beta), train, val = logits(), [batch() for _ in range(steps)], batch()
    got = hypergradient(RelaxedNet(blocks, loss), state, Logits(alpha, beta), train, val, **SGD)
    if steps == 1:
        other = one_step_hypergradient(RelaxedNet(blocks, loss), state, Logits(alpha, beta), *train, val, **SGD)
        torch.testing.assert_close(other.alpha_grad, got.alpha_grad, rtol=1e-11, atol=1e-16)
        torch.testing.assert_close(other.beta_grads, got.beta_grads, rtol=1e-11, atol=1e-16)

    def value() -> float:
        return oracle_val_loss(flat(state.params), flat(state.momentum), alpha, beta, train, val, tied)

    return got, central_difference(value, alpha), torch.stack([central_difference(value, b) for b in beta]), value()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_hypergradient_agrees_with_central_differences(tied: bool, steps: int) -> None:
    torch.manual_seed(steps)
    blocks = make_blocks(tied)
    got, by_alpha, by_beta, val_loss = solve(blocks, started(blocks), steps, tied)
    assert (got.alpha_grad - by_alpha).abs().max() < 1e-7 * by_alpha.abs().max()
    assert (torch.stack(got.beta_grads) - by_beta).abs().max() < 1e-7 * by_beta.abs().max()
    assert got.val_loss.item() == pytest.approx(val_loss, rel=1e-12)
    assert by_alpha.abs().max() > 1e-4
    assert by_beta.abs().max() > 1e-5


@pytest.mark.parametrize("steps", [1, 3])
def test_copies_that_diverge_would_be_caught(steps: int) -> None:
    torch.manual_seed(steps)
    blocks = make_blocks()
    shared = started(blocks)
    diverging = State(
        [{n: shared.params[k][m] for n in names_of(i) for k, m in [copy_of(i, n)]} for i in range(LAYERS)],
        shared.buffers,
        [{n: shared.momentum[k][m] for n in names_of(i) for k, m in [copy_of(i, n)]} for i in range(LAYERS)],
        [{n: s for n, s in names.items() if "running" in n or "num" in n} for names in shared.borrowed],
    )
    stream = torch.get_rng_state()
    _, by_alpha, by_beta, _ = solve(blocks, shared, steps, tied=True)
    torch.set_rng_state(stream)
    wrong = solve(blocks, diverging, steps, tied=False)[0]
    assert (wrong.alpha_grad - by_alpha).norm() > 0.01 * by_alpha.norm()
    assert (torch.stack(wrong.beta_grads) - by_beta).norm() > 0.01 * by_beta.norm()


def test_a_shared_tensor_is_held_once() -> None:
    blocks = make_blocks()
    state = State.of(blocks)
    assert state.borrowed[0].keys() == {"embed", "head_c", *(f"norm.{n}" for n in (
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"))}  # fmt: skip
    assert state.borrowed[1] == {"mix": (3, "mix"), "head_c": (2, "head_c")}
    assert state.borrowed[2] == {"mix": (3, "mix")}
    assert state.borrowed[3] == {}
    assert all(state.slots(state.params, 0)[n] == OWNERS[n] for n in ("embed", "norm.weight"))
    assert [state.momentum[k].keys() for k in range(LAYERS)] == [d.keys() for d in state.params]
    own = {id(p): p for b in blocks for n, p in b.module.named_parameters() if n != b.beta}
    assert sum(t.numel() for t in flat(state.params).values()) == sum(p.numel() for p in own.values())
    again = state.clone()
    assert again.borrowed == state.borrowed
    assert again.state_bytes == state.state_bytes
    assert again.used(again.params, 0)["embed"] is again.params[3]["out"]


def test_shared_running_statistics_count_every_use_and_the_modules_keep_theirs() -> None:
    blocks, (alpha, beta) = make_blocks(), logits()
    state = State.of(blocks)
    relaxed_gradients(RelaxedNet(blocks, loss), state, Logits(alpha, beta), batch(), create_graph=False)
    counts = {key: int(t) for key, t in flat(state.buffers).items() if "num_batches" in key[1]}
    assert counts == {(2, "norm.num_batches_tracked"): 2}
    assert int(blocks[0].module.get_buffer("norm.num_batches_tracked")) == 0
    before = {k: t.clone() for k, t in flat(state.buffers).items()}
    hypergradient(RelaxedNet(blocks, loss), state, Logits(alpha, beta), [batch(), batch()], batch(), **SGD)
    assert all(torch.equal(t, before[k]) for k, t in flat(state.buffers).items())


def test_everything_let_through_is_backprop_with_torch_sgd() -> None:
    """Three steps at p_through = 1 move the tied net as ``backward()`` and ``torch.optim.SGD`` do."""
    blocks, beta = make_blocks(), logits()[1]
    alpha = torch.tensor([[-400.0, 400.0]] * (LAYERS - 1), dtype=torch.float64)
    state = State.of(blocks)
    base = {copy_of(i, n): b.module.get_parameter(n) for i, b in enumerate(blocks) for n in names_of(i)
            if "head" not in n}  # fmt: skip
    optimizer = torch.optim.SGD(base.values(), **SGD)
    for given in [batch() for _ in range(3)]:
        optimizer.zero_grad()
        copies = [{n: b.module.get_parameter(n) for n in names_of(i)} for i, b in enumerate(blocks)]
        local_losses(copies, beta, given)[-1].backward()
        optimizer.step()
        found = relaxed_gradients(RelaxedNet(blocks, loss), state, Logits(alpha, beta), given, create_graph=False)
        state = sgd_momentum_step(state, found.grads, **SGD, in_place=True)
    held = flat(state.params)
    assert distance({k: held[k] for k in base}, {k: t.detach() for k, t in base.items()}) < 1e-14


def test_a_cut_that_lets_nothing_through_isolates_every_tensor_that_crosses_it() -> None:
    blocks, (_, beta), given = make_blocks(tied=False), logits(), batch()
    alpha = torch.tensor([[0.0, 0.0], [400.0, -400.0], [0.0, 0.0]], dtype=torch.float64)
    state = State.of(blocks)
    found = relaxed_gradients(RelaxedNet(blocks, loss), state, Logits(alpha, beta), given, create_graph=False).grads
    assert found[0]["side"].abs().max() == 0  # read by layers 2 and 3 alone
    assert found[1]["twist"].abs().max() == 0
    assert found[0]["embed"].abs().max() > 0  # the local losses of layers 0 and 1
    assert found[2]["w2"].abs().max() > 0

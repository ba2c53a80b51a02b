"""Auxiliary heads on every kind of shape, small batches, derivatives, and the registry."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from sedona_fx.errors import HeadError
from sedona_fx.heads import registry as heads
from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.layers import HeadBatchNorm
from sedona_fx.heads.pointwise_pool import PointwisePool
from sedona_fx.heads.registry import build_head, default_candidates, default_head, head_name, head_names, register_head

IMAGE_HEADS = (
    *(f"sedona{form}-{depth}" for form in ("", "-wide", "-basic") for depth in range(1, 5)),
    "mlp",
    "mlp-sr",
    "cnn",
)
TOKEN_HEADS = ("tokens-1", "tokens-2", "tokens-3")
BUILT_IN = (*IMAGE_HEADS, "linear", *TOKEN_HEADS)


def image(channels: int, height: int, width: int | None = None, classes: int = 10) -> HeadContext:
    return HeadContext((8, channels, height, width or height), (8, classes), 1, "layer2.0")


@pytest.fixture
def registry():
    """Undo registrations."""
    saved = dict(heads._REGISTRY)
    yield
    heads._REGISTRY.clear()
    heads._REGISTRY.update(saved)


# Every head on every shape


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "shape", [(3, 8, 8, 8), (3, 8, 5, 7), (3, 8, 2, 2), (3, 8, 1, 1), (3, 8, 1, 6), (3, 2, 4, 4), (3, 8)], ids=str
)
def test_heads_on_images_and_vectors(name, shape):
    torch.manual_seed(0)
    head = build_head(name, HeadContext(shape, (3, 4)))
    x = torch.randn(shape, requires_grad=True)
    output = head(x)
    assert output.shape == (3, 4)
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("name", ["linear", *TOKEN_HEADS])
@pytest.mark.parametrize(("shape", "dim"), [((3, 9, 8), -1), ((3, 5, 6, 8), 3), ((3, 8, 9), 1), ((3, 8, 2, 3, 4), 1)])
def test_heads_elsewhere(name, shape, dim):
    head = build_head(name, HeadContext(shape, (3, 4), dim))
    assert head(torch.randn(shape)).shape == (3, 4)
    assert head(torch.randn(1, *shape[1:])).shape == (1, 4)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("shape", [(8, 1, 1), (8,), (8, 4, 4)], ids=str)
def test_a_batch_of_one_is_finite_and_single_values_leave_the_running_statistics(name, shape):
    head = build_head(name, HeadContext((4, *shape), (4, 3)))
    head(torch.randn(4, *shape))  # running statistics that are not the first ones
    before = copy.deepcopy(head.state_dict())
    single: list[nn.Module] = []
    for module in head.modules():
        if isinstance(module, PointwisePool):  # uses its norm without calling it
            module.register_forward_hook(
                lambda m, args, out: single.append(m.norm) if args[0].numel() == args[0].shape[1] else None
            )
        elif isinstance(module, HeadBatchNorm):
            module.register_forward_hook(lambda m, args, out: single.append(m) if out.numel() == out.shape[1] else None)
    assert head(torch.randn(1, *shape)).isfinite().all()
    for key, module in head.named_modules():
        if isinstance(module, HeadBatchNorm):
            kept = torch.equal(module.running_mean, before[f"{key}.running_mean"])
            assert kept == (module in single), key
            assert torch.equal(module.num_batches_tracked, before[f"{key}.num_batches_tracked"]) == kept


@pytest.mark.parametrize(
    ("name", "context"),
    [
        ("mlp-sr", HeadContext((3, 2, 5, 5), (3, 2))),
        ("sedona-3", HeadContext((3, 4, 4, 4), (3, 2))),
        ("tokens-2", HeadContext((3, 2, 3), (3, 2), -1)),
        ("tokens-attention-2", HeadContext((3, 3, 3), (3, 2), -1)),
        ("sedona-3", HeadContext((3, 4, 2, 3, 3), (3, 2))),
        ("dense-2", HeadContext((3, 4, 2, 2), (3, 2, 4, 4))),
        ("logits-2", HeadContext((3, 2, 3), (3, 2, 2), -1)),
    ],
)
def test_second_derivatives_in_float64(name, context):
    torch.manual_seed(0)
    head = build_head(name, context).double()
    x = torch.randn(context.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(head, (x,), atol=1e-6)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_global_seed_decides_the_parameters(name):
    context = image(8, 4)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_head(name, context).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


# Defaults and refusals


def test_defaults():
    on_image, vector = image(8, 4), HeadContext((2, 8), (2, 3))
    tokens = HeadContext((2, 9, 8), (2, 3), -1)
    channels_last = HeadContext((2, 4, 4, 8), (2, 3), -1)
    assert default_candidates(on_image) == ("sedona-1", "sedona-2", "sedona-3", "sedona-4")
    assert default_head(on_image) == "mlp-sr"
    assert default_head(HeadContext((4, 129, 8, 8), (4, 10))) == "sedona-1"
    for context in (vector, tokens, channels_last):
        assert default_candidates(context) == TOKEN_HEADS
        assert default_head(context) == "tokens-2"
    single = HeadContext((2, 1), (2, 3))
    assert default_candidates(single) == ("linear",) == (default_head(single),)
    assert head_names()[: len(BUILT_IN)] == BUILT_IN


@pytest.mark.parametrize(
    ("name", "context", "text"),
    [
        (
            "mlp-sr",
            HeadContext((2, 9, 8), (2, 3), -1, "blocks.3"),
            r"'blocks.3'.*\(2, 9, 8\).*fit: 'linear', 'tokens-1'",
        ),
        ("sedona-1", HeadContext((2, 4, 4, 8), (2, 3), -1), r"channels in dimension 3"),
        ("tokens-1", HeadContext((2, 1), (2, 3)), r"single one would always"),
        ("dense-1", HeadContext((2, 8), (2, 3, 4, 4)), r"None fits: Give a factory in heads=\[...\], an objective"),
        (
            "linear",
            HeadContext((2, 8, 4, 4), (2, 3, 4, 4), 1, "a"),
            r"gives class scores, \(N, classes\).*\(2, 3, 4, 4\).*fit: 'dense-1', 'dense-2', 'dense-3'",
        ),
        ("linear", HeadContext((2,), (2, 3), 0), r"batch dimension first"),
        ("linear", HeadContext((2, 3), (2, 3), -2), r"dimension -2"),
        ("linear", HeadContext((2, 3), (2, 3), 2), r"dimension 2"),
        ("sedona-5", image(8, 4), r"no head named 'sedona-5'; the nearest names are 'sedona-"),
        ("mine:head", image(8, 4), r"is a factory and not a registered name"),
        (3, image(8, 4), r"by name or as a factory"),
    ],
)
def test_refusals_say_what_and_where(name, context, text):
    with pytest.raises(HeadError, match=text):
        build_head(name, context)


# The user's own heads


class Own(nn.Module):
    """A head of a user: takes the context, gives `wrong` classes too many."""

    def __init__(self, context: HeadContext, wrong: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(context.channels)
        self.linear = nn.Linear(context.channels, context.output_shape[1] + wrong)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.dropout(self.norm(x.mean((2, 3)))))


def test_a_factory_is_tried_without_computing_and_left_as_it_was():
    context = HeadContext((1, 8, 4, 4), (1, 3))  # a batch of one, which BatchNorm1d in training refuses
    torch.manual_seed(0)
    reference, drawn = Own(context), torch.rand(1)
    torch.manual_seed(0)
    head = build_head(Own, context)
    assert torch.equal(torch.rand(1), drawn)
    assert isinstance(head, Own)
    assert head.training
    for a, b in zip(head.state_dict().values(), reference.state_dict().values(), strict=True):
        assert type(a) is torch.Tensor
        assert torch.equal(a, b)


def test_a_factory_may_serve_outputs_the_built_in_heads_do_not():
    context = HeadContext((2, 8, 4, 4), (2, 5, 3))
    factory = lambda context: nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), nn.Conv1d(8, 5, 1))  # noqa: E731
    assert build_head(factory, context)(torch.randn(1, 8, 4, 4)).shape == (1, 5, 3)


def test_a_head_that_looks_at_values_is_taken_on_trust():
    class Looks(Own):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    assert isinstance(build_head(Looks, image(8, 4)), Looks)


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (functools.partial(Own, wrong=2), r"'layer2.0' turns \(8, 8, 4, 4\) into \(8, 12\).*would be \(8, 10\)"),
        (lambda context: nn.Linear(3, 10), r"fails on an input of shape \(8, 8, 4, 4\)"),
        (lambda context: nn.LazyConv2d(10, 1), r"'weight' is lazy"),
        (lambda context: torch.relu, r"must return a torch.nn.Module"),
        (lambda context: nn.MaxPool2d(2, return_indices=True), r"must return one tensor \(8, 10\), not tuple"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_factory_that_does_not_fit(factory, text):
    with pytest.raises(HeadError, match=text):
        build_head(factory, image(8, 4))


@pytest.mark.usefixtures("registry")
def test_registering():
    assert register_head("own", Own) is Own
    assert "own" in head_names()
    assert isinstance(build_head("own", image(8, 4)), Own)
    assert head_name(Own) == head_name("own") == "own"

    @register_head("other")
    def other(context: HeadContext) -> nn.Module:
        return Own(context)

    assert isinstance(build_head("other", image(8, 4)), Own)
    with pytest.raises(HeadError, match="'own' is registered already: take another name, or say override=True"):
        register_head("own", other)
    register_head("own", functools.partial(Own, wrong=1), override=True)
    with pytest.raises(HeadError, match="head 'own' behind"):
        build_head("own", image(8, 4))
    with pytest.raises(HeadError, match="cannot name a head"):
        register_head("a:b", Own)
    with pytest.raises(HeadError, match="needs a factory"):
        register_head("third", 3)


def test_names_of_factories():
    assert head_name("mlp") == "mlp"
    assert head_name(Own) == f"{__name__}:Own"
    assert head_name(functools.partial(Own, wrong=1)) == f"{__name__}:Own"
    with pytest.raises(HeadError, match="no head named"):
        head_name("nothing")

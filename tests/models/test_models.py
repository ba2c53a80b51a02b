"""The reference nets against what the papers say: channels, counts, order of the base layers, shapes."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
import torch.fx
from torch import nn

from sedona_fx.models import MODELS
from sedona_fx.models.resnet import PaddedShortcut, ResNet

BASE_LAYERS = {
    "vgg11": 8,
    "vgg13": 10,
    "vgg16": 13,
    "vgg19": 16,
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnet32": 15,
    "resnet110": 54,
}


def meta(name: str, **options: float) -> nn.Module:
    """The model without memory or computation: for counts and shapes."""
    with torch.device("meta"):
        return MODELS[name](**options)


def shapes_at_base_layers(model: nn.Module, size: int = 32) -> list[tuple[str, int, int]]:
    """(path, channels, height) of what a head would read behind each base layer, in the order they run."""
    seen: list[tuple[str, int, int]] = []

    def record(path: str):
        return lambda module, args, output: seen.append((path, output.shape[1], output.shape[2]))

    for path in model.base_layers:
        model.get_submodule(path).register_forward_hook(record(path))
    model(torch.empty(2, 3, size, size, device="meta"))
    return seen


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_table_holds_every_net_with_the_same_signature():
    assert set(MODELS) == set(BASE_LAYERS)
    for name, constructor in MODELS.items():
        assert constructor.__name__ == name
        defaults = {p.name: p.default for p in inspect.signature(constructor).parameters.values()}
        assert defaults == {"num_classes": 10, "width": 1.0}


@pytest.mark.parametrize("name", MODELS)
def test_base_layers_run_once_each_in_the_order_listed(name):
    model = meta(name, width=0.25)
    assert len(model.base_layers) == BASE_LAYERS[name] == len(set(model.base_layers))
    assert [path for path, _, _ in shapes_at_base_layers(model)] == list(model.base_layers)


@pytest.mark.parametrize("name", MODELS)
def test_everything_outside_the_base_layers_is_stem_or_tail(name):
    model = meta(name, width=0.25)
    inside = {p for path in model.base_layers for p in model.get_submodule(path).parameters()}
    outside = {key.split(".")[0] for key, p in model.named_parameters() if p not in inside}
    assert outside == ({"classifier"} if name.startswith("vgg") else {"stem", "fc"})


def test_vgg19_at_a_quarter_has_the_papers_channels_and_heads_read_before_the_pool():
    expected = [(16, 32)] * 2 + [(32, 16)] * 2 + [(64, 8)] * 4 + [(128, 4)] * 4 + [(128, 2)] * 4
    assert [(c, h) for _, c, h in shapes_at_base_layers(meta("vgg19", width=0.25))] == expected


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg13", [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg16", [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]),
        ("vgg19", [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8),
    ],
)
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_vgg_channels_and_parameters(name, plan, width):
    channels = [int(c * width) for c in plan]
    hidden = int(4096 * width)
    model = meta(name, num_classes=7, width=width)
    assert [c for _, c, _ in shapes_at_base_layers(model)] == channels
    convolutions = sum(9 * a * b + 2 * b for a, b in zip([3, *channels], channels, strict=False))
    linear = (channels[-1] + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * 7
    assert parameters(model) == convolutions + linear


def test_vgg_base_layers_and_tail_member_by_member():
    model = meta("vgg11", width=0.25)
    members = [[type(m) for m in model.get_submodule(path)] for path in model.base_layers]
    plain = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    pooled = [nn.MaxPool2d, *plain]
    assert members == [plain, pooled, pooled, plain, pooled, plain, pooled, plain]
    dense = [nn.Linear, nn.ReLU, nn.Dropout]
    assert [type(m) for m in model.classifier] == [
        nn.MaxPool2d,
        nn.AdaptiveAvgPool2d,
        nn.Flatten,
        *dense,
        *dense,
        nn.Linear,
    ]
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "imagenet", "features"),  # parameters of the ImageNet nets (torchvision), features before the last layer
    [
        ("resnet18", 11_689_512, 512),
        ("resnet34", 21_797_672, 512),
        ("resnet50", 25_557_032, 2048),
        ("resnet101", 44_549_160, 2048),
        ("resnet152", 60_192_808, 2048),
    ],
)
def test_wide_resnets_are_the_imagenet_nets_with_another_stem_and_ten_classes(name, imagenet, features):
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert parameters(meta(name)) == imagenet - stem - (1000 - 10) * (features + 1)


@pytest.mark.parametrize(("name", "count"), [("resnet32", 464_154), ("resnet110", 1_727_962)])
def test_hes_cifar_nets_have_their_published_size(name, count):
    model = meta(name)
    assert parameters(model) == count
    depth = BASE_LAYERS[name] // 3
    expected = [(16, 32)] * depth + [(32, 16)] * depth + [(64, 8)] * depth
    assert [(c, h) for _, c, h in shapes_at_base_layers(model)] == expected


@pytest.mark.parametrize(
    ("name", "depths", "expansion"), [("resnet18", (2, 2, 2, 2), 1), ("resnet50", (3, 4, 6, 3), 4)]
)
def test_quarter_resnets_have_16_base_planes_and_no_pool_behind_the_stem(name, depths, expansion):
    model = meta(name, width=0.25)
    stages = [(16 * expansion, 32), (32 * expansion, 16), (64 * expansion, 8), (128 * expansion, 4)]
    expected = [stage for stage, depth in zip(stages, depths, strict=True) for _ in range(depth)]
    assert [(c, h) for _, c, h in shapes_at_base_layers(model)] == expected
    assert model.base_layers[0] == "layer1.0"
    assert model.base_layers[-1] == "layer4." + str(depths[-1] - 1)


def test_the_padded_shortcut_keeps_every_second_pixel_and_appends_zeros():
    x = torch.randn(2, 3, 5, 4)
    y = PaddedShortcut(2, 4)(x)
    assert y.shape == (2, 7, 3, 2)
    assert torch.equal(y[:, :3], x[:, :, [0, 2, 4]][:, :, :, [0, 2]])
    assert not y[:, 3:].any()
    assert not list(PaddedShortcut(2, 4).parameters())


@pytest.mark.parametrize("name", MODELS)
def test_traced_once_they_run_with_any_batch_bit_for_bit(name):
    torch.manual_seed(0)
    model = MODELS[name](num_classes=5, width=0.125)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for batch in (2, 3):  # batches in training need two values a channel behind VGG's last pool
        x = torch.randn(batch, 3, 32, 32)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(traced(x), expected)
        assert expected.shape == (batch, 5)
    model.eval(), traced.eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "resnet32"])
def test_every_parameter_gets_a_gradient_and_bigger_images_pass(name):
    torch.manual_seed(0)
    model = MODELS[name](width=0.125)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet110"])
def test_the_first_values_are_kaiming_normal_and_repeatable(name):
    torch.manual_seed(0)
    model = MODELS[name](width=0.5)
    torch.manual_seed(0)
    again = MODELS[name](width=0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        fan_in = layer.weight[0].numel()
        gain = 1 if layer is layers[-1] else 2
        if layer.weight.numel() > 2000:
            assert layer.weight.std().item() == pytest.approx(math.sqrt(gain / fan_in), rel=0.1)
        assert layer.bias is None or not layer.bias.any()


def test_a_width_of_nothing_is_refused_and_channels_never_vanish():
    with pytest.raises(ValueError, match="width is a factor"):
        MODELS["vgg11"](width=0)
    model = MODELS["resnet32"](width=0.01)
    assert isinstance(model, ResNet)
    assert model.stem[0].out_channels == 1

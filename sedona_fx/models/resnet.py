"""The ResNets of the SEDONA, DGL, DDG and BackLink papers for small images, with one residual block per base layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.models.vgg import initialise, scaled

ShortcutKind = Literal["projection", "padding"]


class ResNet(nn.Module):
    """ResNet (He et al. 2016) with a 3x3 stem of stride 1 that no pool follows.

    Float images (N, 3, H, W) of any H and W, to class scores (N, num_classes). Every stage but the first halves the map
    in its first block.

    `base_layers` are the paths of the residual blocks: ``layer1.0``, ``layer1.1``, ..., ``layer2.0``, ... The stem
    belongs to the first base layer, the pool and the linear layer belong to the last.

    Our choice: the bottleneck has its stride in the 3x3 convolution, as in torchvision. The parameters are initialised
    by `initialise`.

    Args:
        block: the kind of residual block.
        depths: number of blocks of each stage.
        planes: channels of each stage, before the expansion of the block.
        num_classes: number of scores.
        shortcut: how a shortcut changes the number of channels: ``"projection"`` by a 1x1 convolution with BatchNorm,
            ``"padding"`` by zeros (:class:`PaddedShortcut`).
    """

    base_layers: tuple[str, ...]

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        planes: Sequence[int],
        num_classes: int,
        shortcut: ShortcutKind = "projection",
    ) -> None:
        super().__init__()
        channels = planes[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for name, depth, width in zip(self.stage_names, depths, planes, strict=True):
            blocks: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if position == 0 and name != "layer1" else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        self.base_layers = tuple(
            f"{name}.{i}" for name, depth in zip(self.stage_names, depths, strict=True) for i in range(depth)
        )
        initialise(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to class scores (N, num_classes)."""
        x = self.stem(x)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        scores: Tensor = self.fc(self.flatten(self.pool(x)))
        return scores


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left): (N, C, H, W) to (N, planes, H/s, W/s)."""

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, planes: int, stride: int, shortcut: ShortcutKind) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(channels, planes, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut (He et al. 2016, figure 5 right): (N, C, H, W) to (N, 4 planes, H/s, W/s)."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, planes: int, stride: int, shortcut: ShortcutKind) -> None:
        super().__init__()
        outgoing = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outgoing, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outgoing)
        self.shortcut = _shortcut(channels, outgoing, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        result: Tensor = self.relu(out)
        return result


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every `stride`-th pixel, with `extra` channels of zeros appended. No parameters."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Show the stride and the number of channels appended."""
        return f"stride={self.stride}, extra={self.extra}"


def resnet18(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-18: 8 base layers, 64 base planes at width 1.0. Images (N, 3, H, W) to (N, num_classes)."""
    return _four_stages(BasicBlock, (2, 2, 2, 2), num_classes, width)


def resnet34(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-34: 16 base layers, 64 base planes at width 1.0. Images (N, 3, H, W) to (N, num_classes)."""
    return _four_stages(BasicBlock, (3, 4, 6, 3), num_classes, width)


def resnet50(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-50: 16 base layers, 64 base planes at width 1.0. Images (N, 3, H, W) to (N, num_classes)."""
    return _four_stages(Bottleneck, (3, 4, 6, 3), num_classes, width)


def resnet101(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-101: 33 base layers, 64 base planes at width 1.0. Images (N, 3, H, W) to (N, num_classes)."""
    return _four_stages(Bottleneck, (3, 4, 23, 3), num_classes, width)


def resnet152(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-152: 50 base layers, 64 base planes at width 1.0. Images (N, 3, H, W) to (N, num_classes)."""
    return _four_stages(Bottleneck, (3, 8, 36, 3), num_classes, width)


def resnet32(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-32 for CIFAR by He et al.: 15 base layers. Images (N, 3, H, W) to (N, num_classes).

    Three stages, n = 5, 16 base planes at width 1.0, shortcuts without parameters (He et al. 2016, section 4.2).
    """
    return _three_stages(5, num_classes, width)


def resnet110(num_classes: int = 10, width: float = 1.0) -> ResNet:
    """ResNet-110 for CIFAR by He et al.: 54 base layers. Images (N, 3, H, W) to (N, num_classes).

    Three stages, n = 18, 16 base planes at width 1.0, shortcuts without parameters (He et al. 2016, section 4.2).
    """
    return _three_stages(18, num_classes, width)


def _four_stages(
    block: type[BasicBlock] | type[Bottleneck], depths: Sequence[int], num_classes: int, width: float
) -> ResNet:
    return ResNet(block, depths, [scaled(planes, width) for planes in (64, 128, 256, 512)], num_classes)


def _three_stages(blocks: int, num_classes: int, width: float) -> ResNet:
    planes = [scaled(planes, width) for planes in (16, 32, 64)]
    return ResNet(BasicBlock, (blocks,) * 3, planes, num_classes, shortcut="padding")


def _shortcut(channels: int, outgoing: int, stride: int, kind: ShortcutKind) -> nn.Module:
    if stride == 1 and channels == outgoing:
        return nn.Identity()
    if kind == "padding":
        return PaddedShortcut(stride, outgoing - channels)
    conv = nn.Conv2d(channels, outgoing, 1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict([("conv", conv), ("bn", nn.BatchNorm2d(outgoing))]))

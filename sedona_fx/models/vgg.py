"""The VGG nets of the SEDONA paper for small images, with one submodule per base layer."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from sedona_fx.errors import SettingsError

# Channels at width 1.0, one group per resolution, with a 2x2 max-pool between groups.
_GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(nn.Module):
    """VGG with BatchNorm (Simonyan, Zisserman 2015), as SEDONA trains it on CIFAR (Pyeon et al., ICLR 2021).

    Float images (N, 3, H, W), with H and W of 32 or more, to class scores (N, num_classes).

    `base_layers` are the paths ``layers.0``, ``layers.1``, ...: one conv-BN-ReLU each. A max-pool is the first layer of
    the base layer that *follows* it, so that a head after a base layer reads the map before the pool. The last pool and
    the classifier belong to the last base layer.

    Our choices: convolutions have no bias, since BatchNorm follows. A global average pool follows the last max-pool; it
    changes nothing for 32x32 images, whose map is 1x1 there, and makes the net accept larger images. The parameters are
    initialised by `initialise`.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: number of scores.
        width: factor of the numbers of channels: 0.25 for the paper's CIFAR net, 1.0 for its four times wider one.

    Raises:
        SettingsError: `width` is not positive.
    """

    base_layers: tuple[str, ...]

    def __init__(self, depth: int, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group, members in enumerate(_GROUPS[depth]):
            for position, member in enumerate(members):
                planes = scaled(member, width)
                layers.append(_base_layer(channels, planes, pool=group > 0 and position == 0))
                channels = planes
        self.layers = nn.Sequential(*layers)
        hidden = scaled(4096, width)
        self.classifier = nn.Sequential(
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
        self.base_layers = tuple(f"layers.{i}" for i in range(len(layers)))
        initialise(self, self.classifier[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to class scores (N, num_classes)."""
        scores: Tensor = self.classifier(self.layers(x))
        return scores


def vgg11(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG-11: 8 base layers. Images (N, 3, H, W) to (N, num_classes)."""
    return VGG(11, num_classes, width)


def vgg13(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG-13: 10 base layers. Images (N, 3, H, W) to (N, num_classes)."""
    return VGG(13, num_classes, width)


def vgg16(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG-16: 13 base layers. Images (N, 3, H, W) to (N, num_classes)."""
    return VGG(16, num_classes, width)


def vgg19(num_classes: int = 10, width: float = 1.0) -> VGG:
    """VGG-19: 16 base layers. Images (N, 3, H, W) to (N, num_classes)."""
    return VGG(19, num_classes, width)


def scaled(channels: int, width: float) -> int:
    """Return `channels` times `width`, rounded to the nearest integer, and at least 1.

    Raises:
        SettingsError: `width` is not positive.
    """
    if not width > 0:
        raise SettingsError(f"width is a factor on the number of channels and must be positive, not {width}")
    return max(1, round(channels * width))


def initialise(model: nn.Module, output: nn.Module) -> None:
    """Initialise the parameters of `model` in place.

    Convolutions and linear layers get Kaiming-normal weights, fan-in (He et al. 2015, equation 10), with the gain of
    ReLU, and biases of 0. BatchNorm keeps weight 1 and bias 0, so that no residual branch starts at zero.

    Args:
        model: the net.
        output: its last layer, which no ReLU follows; it gets the gain 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is output else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _base_layer(channels: int, planes: int, pool: bool) -> nn.Sequential:
    members: OrderedDict[str, nn.Module] = OrderedDict()
    if pool:
        members["pool"] = nn.MaxPool2d(2)
    members["conv"] = nn.Conv2d(channels, planes, 3, padding=1, bias=False)
    members["bn"] = nn.BatchNorm2d(planes)
    members["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(members)

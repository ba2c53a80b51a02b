"""Reference nets of the papers, for CIFAR and other small images.

Each is a plain `torch.nn.Module` whose `base_layers` names, in order, the submodules after which the net may be cut.

Files

resnet  The ResNets of the SEDONA, DGL, DDG and BackLink papers for small images, with one residual block per base
        layer
vgg     The VGG nets of the SEDONA paper for small images, with one submodule per base layer
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sedona_fx.models.resnet import resnet18, resnet32, resnet34, resnet50, resnet101, resnet110, resnet152
from sedona_fx.models.vgg import vgg11, vgg13, vgg16, vgg19

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "resnet32": resnet32,
    "resnet110": resnet110,
}
"""Every constructor by name; each takes ``(num_classes=10, width=1.0)``."""

__all__ = [
    "MODELS",
    "resnet18",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet110",
    "resnet152",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]

"""A head of your own: a bottleneck of 1x1 convolutions. Run: python examples/extending/bottleneck_head.py

A head is any module from the activation at a cut to the model's primary output. Its factory gets a `HeadContext` with
both shapes (the batch first) and is registered under a name, so that plans can name it.
"""

import torch
from torch import nn

import sedona_fx
from sedona_fx import HeadContext, register_head
from sedona_fx.errors import HeadError


@register_head("bottleneck")
def bottleneck(context: HeadContext) -> nn.Module:
    """Return a head for images (N, C, H, W) and class scores (N, classes)."""
    if not context.is_image or len(context.output_shape) != 2:
        raise HeadError(f"'bottleneck' is a head for images and class scores, not for {context.shape}.")
    width = max(4, context.channels // 4)
    return nn.Sequential(
        nn.Conv2d(context.channels, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, context.output_shape[1]),
    )


def main() -> None:
    """Cut a small convolutional net in three, every block with this head."""
    stages = [nn.Sequential(nn.Conv2d(16 if k else 3, 16, 3, padding=1), nn.ReLU()) for k in range(3)]
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    data = (torch.randn(8, 3, 16, 16), torch.randint(10, (8,)))
    net = sedona_fx.decouple(model, data, blocks=3, search="balanced", heads="bottleneck")
    print(net)


if __name__ == "__main__":
    main()

"""Nets whose skips run past the middle: a U-Net, a feature pyramid, an encoder and a decoder of tokens."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(incoming: int, outgoing: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(incoming, outgoing, 3, stride, 1, bias=False), nn.BatchNorm2d(outgoing), nn.ReLU(inplace=True)
    )


class Double(nn.Sequential):
    """Two convolutions."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__(conv(incoming, outgoing), conv(outgoing, outgoing))


class UNet(nn.Module):
    """Images (N, 3, H, W) to maps of five classes; `depth` skips run past the bottom."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [width * 2**k for k in range(depth + 1)]
        self.down = nn.ModuleList(Double(i, o) for i, o in zip([3, *widths], widths, strict=False))
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.grow = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.up = nn.ModuleList(Double(2 * o, o) for _, o in pairs)
        self.out = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for k, stage in enumerate(self.down):
            x = stage(x if not k else F.max_pool2d(x, 2))
            skips.append(x)
        for grow, stage, skip in zip(self.grow, self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([grow(x), skip], 1))
        return self.out(x)


class Pyramid(nn.Module):
    """A backbone of four stages, lateral and top-down paths, and scores of what all four levels say: an FPN."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [width * 2**k for k in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(conv(i, o, 1 if i == 3 else 2), conv(o, o))
            for i, o in zip([3, *widths], widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(o, 2 * width, 1) for o in widths)
        self.smooth = nn.ModuleList(conv(2 * width, 2 * width) for _ in widths)
        self.out = nn.Conv2d(2 * width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        top, maps = None, []
        for lateral, smooth, level in [*zip(self.lateral, self.smooth, levels, strict=True)][::-1]:
            side = lateral(level)
            top = side if top is None else side + F.interpolate(top, scale_factor=2)
            maps.append(smooth(top))
        size = maps[-1].shape[2:]
        return self.out(sum(F.interpolate(m, size=size) for m in maps))


class Tokens(nn.Module):
    """An encoder and a decoder of residual token layers; the decoder reads every layer of the encoder again."""

    def __init__(self, depth: int = 4, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, width)
        self.encoder = nn.ModuleList(self.layer(width) for _ in range(depth))
        self.mix = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.decoder = nn.ModuleList(self.layer(width) for _ in range(depth))
        self.out = nn.Linear(width, 5)

    @staticmethod
    def layer(width: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for layer in self.encoder:
            x = x + layer(x)
            skips.append(x)
        for mix, layer, skip in zip(self.mix, self.decoder, skips[::-1], strict=True):
            x = mix(torch.cat([x, skip], -1))
            x = x + layer(x)
        return self.out(x.mean(1))


def images(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator)
    return x, torch.randint(5, (2, size, size), generator=generator)


def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 9, 6, generator=generator), torch.randint(5, (4,), generator=generator)

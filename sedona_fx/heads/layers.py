"""The layers that the built-in auxiliary heads are built of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The convolution for each number of spatial dimensions."""


class HeadBatchNorm(_BatchNorm):
    """BatchNorm over (N, C) or (N, C, ...) that also accepts a single value per channel.

    A last batch of one example, pooled to 1x1, has no variance, and PyTorch raises there. This layer normalises such a
    batch with the running statistics, in training too, and does not update them: one value says nothing about a
    variance.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept every rank; each of PyTorch's own classes accepts its own ranks only."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, of the same shape."""
        # The test reads shapes only, so that it never waits for a device.
        if self.training and input.numel() == self.num_features:
            return F.batch_norm(
                input, self.running_mean, self.running_var, weight=self.weight, bias=self.bias, eps=self.eps
            )
        return super().forward(input)


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, table 1) with ReLU in place of ReLU6, as in SEDONA.

    (N, C, H, W) to (N, outgoing, H/stride, W/stride): 1x1 convolution to expansion * C (left out if that equals C), 3x3
    depthwise convolution, 1x1 convolution without activation; the input is added if the shapes agree.

    Args:
        channels: C.
        outgoing: output channels.
        stride: of the depthwise convolution.
        expansion: ratio of the hidden channels to C.
        dims: number of spatial dimensions, 1 to 3.
    """

    def __init__(self, channels: int, outgoing: int, stride: int, expansion: int, dims: int = 2) -> None:
        super().__init__()
        hidden = channels * expansion
        layers = conv_bn_relu(channels, hidden, dims=dims) if expansion > 1 else []
        layers += conv_bn_relu(hidden, hidden, kernel=3, stride=stride, groups=hidden, dims=dims)
        layers += [CONVS[dims](hidden, outgoing, 1, bias=False), HeadBatchNorm(outgoing)]
        self.branch = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == outgoing

    def forward(self, x: Tensor) -> Tensor:
        """Return branch(x), plus x if the shapes agree."""
        out: Tensor = self.branch(x)
        return x + out if self.residual else out


class ResidualMLP(nn.Module):
    """Pre-norm residual MLP on the last dimension, of unchanged shape: x + linear(gelu(linear(norm(x)))).

    The hidden width equals the number of features instead of four times it, since a head should cost a fraction of a
    transformer block (2 D^2 multiplications per token here, 12 D^2 there).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear1 = nn.Linear(features, features)
        self.linear2 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + MLP(x)."""
        out: Tensor = self.linear2(F.gelu(self.linear1(self.norm(x))))
        return x + out


class Mean(nn.Module):
    """Mean over the dimensions `dims`, which are dropped."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return x.mean(dims)."""
        return x.mean(dim=self.dims)

    def extra_repr(self) -> str:
        """Show the dimensions."""
        return f"dims={self.dims}"


class AttentionPool(nn.Module):
    """Mean over all tokens weighted by ``softmax(query . token / sqrt(D))``: (N, ..., D) to (N, D).

    There is one learned query; the tokens themselves are keys and values. The query starts at 0, where the result is
    the plain mean.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled tokens."""
        tokens = x.flatten(1, -2)
        # Written out, since PyTorch's fused attention has no second derivative, which a search may need.
        weights = (tokens @ self.query * self.query.shape[0] ** -0.5).softmax(1)
        return (weights.unsqueeze(1) @ tokens).squeeze(1)


class Resample(nn.Module):
    """Cross-attention of `length` positions to all tokens, whose number differs: (N, ..., D) to (N, length, D).

    Queries and keys hold sinusoids (Vaswani et al. 2017) of the place as a share of the way, so that at first each
    position reads the tokens about the same share of the way. The queries are learned, and so is what the tokens
    themselves add to the keys, which begins at 0.

    Args:
        features: D.
        length: number of positions. The number of tokens may change from batch to batch.
    """

    def __init__(self, features: int, length: int) -> None:
        super().__init__()
        self.query = nn.Parameter(_sinusoids(length, features))
        self.key = nn.Parameter(torch.zeros(features, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens read by each position."""
        tokens = x.flatten(1, -2)
        keys = tokens @ self.key + _sinusoids(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)
        # Written out, since PyTorch's fused attention has no second derivative, which a search may need.
        weights = (self.query @ keys.transpose(1, 2) * self.query.shape[1] ** -0.5).softmax(-1)
        return weights @ tokens

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"features={self.query.shape[1]}, length={self.query.shape[0]}"


def _sinusoids(length: int, features: int, device: torch.device | None = None) -> Tensor:
    """Return sines and cosines of the middle of each of `length` equal parts of the way, (length, D), in float32.

    The frequencies grow from half a turn over the whole way to 64 turns.
    """
    waves = torch.pi * 128.0 ** torch.linspace(0, 1, (features + 1) // 2, device=device)
    angles = (torch.arange(length, device=device) + 0.5)[:, None] / length * waves
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :features]


class Token(nn.Module):
    """Token `index` of (N, T, D), as (N, D)."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Return x[:, index]."""
        return x.select(1, self.index)


class MoveDim(nn.Module):
    """Move dimension `source` to `destination`."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x with one dimension moved."""
        return x.movedim(self.source, self.destination)


class TokenGrid(nn.Module):
    """Arrange tokens as a map, row by row, without the first `skip`: (N, skip + h * w, D) to (N, D, h, w).

    Args:
        size: (h, w) for the number of tokens that the head is built for. For other numbers of tokens the map keeps its
            proportions.
        skip: number of tokens at the start that have no place on the map (a class token).
    """

    def __init__(self, size: tuple[int, int], skip: int) -> None:
        super().__init__()
        self.proportion, self.skip = size[0] / size[1], skip

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of x as a map."""
        x = x[:, self.skip :]
        # PyTorch's own functions, since they also accept a tracer's symbols. sym_int rounds down: 0.5 is added first.
        height = torch.sym_int(torch.sym_sqrt(x.shape[1] * self.proportion) + 0.5)
        return x.transpose(1, 2).unflatten(2, (height, -1))


class Resize(nn.Module):
    """Interpolate (N, K, *size) to (N, K, *output_size), linearly; other sizes are scaled by the same factors.

    A side h becomes ``h * output / size``, rounded to the nearest where maps grow and up where they shrink, so that no
    side vanishes.
    """

    def __init__(self, size: tuple[int, ...], output_size: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.output_size = size, output_size
        self.mode = {2: "bilinear", 3: "trilinear"}[len(size)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the resized maps."""
        sides: list[int] = []
        for dim, (size, output_size) in enumerate(zip(self.size, self.output_size, strict=True), start=2):
            # Integer arithmetic: it is exact, and a tracer's symbols support it.
            rounding = size // 2 if output_size >= size else size - 1
            sides.append((x.shape[dim] * output_size + rounding) // size)
        return F.interpolate(x, size=sides, mode=self.mode, align_corners=False)

    def extra_repr(self) -> str:
        """Show the factors."""
        return f"size={self.size}, output_size={self.output_size}"


def conv_bn_relu(
    channels: int, outgoing: int, *, kernel: int = 1, stride: int = 1, groups: int = 1, dims: int = 2
) -> list[nn.Module]:
    """Return a convolution without bias that keeps the size up to `stride`, BatchNorm and ReLU, over `dims` dimensions.

    ReLU is not in place: that would save no memory after BatchNorm, which keeps its input and not its output.
    """
    conv = CONVS[dims](channels, outgoing, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, HeadBatchNorm(outgoing), nn.ReLU()]

"""InfoPro's reconstruction loss: a block keeps what is needed to reconstruct the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedona_fx.errors import DataError, ScheduleError, did_you_mean, shape_text
from sedona_fx.train.losses.base import ExtraLoss, Sight, at_least_single, channel_count, check_weights

_WIDTH = 12  # channels of the decoder, as in the released code
_LARGEST = 2**26  # parameters of a linear decoder: 256 MiB in float32


@dataclass(frozen=True)
class InfoPro:
    """The reconstruction part of InfoPro (Wang, Ni, Song, Yang, Huang; ICLR 2021).

    A small decoder reconstructs the net's input from the activation; its error bounds how much of the input a block
    loses. The paper's loss is ``lambda_1 * reconstruction + lambda_2 * classification``: here `weight` and `keep`.

    The decoder of images is that of the authors' released code: bilinear interpolation to the size of the input
    (corners aligned), 3x3 convolution to 12 channels, BatchNorm, ReLU, 3x3 convolution to the input's channels. They
    take the binary cross-entropy between a sigmoid of that and the image in [0, 1], for which they undo the
    normalisation; that is what you get with the `mean` and `std` that your images were normalised with. Without them
    nothing is known of the range, and the loss is the mean squared error of the input as the net gets it.

    For floating-point inputs that are not images, and activations that are not maps, the decoder is a linear layer
    between the two, flattened, with the mean squared error.

    Attributes:
        weight: factor of the loss, lambda_1; the released code interpolates it from one value at the first block to
            another at the last.
        keep: factor of the local loss, lambda_2.
        input: name of the argument to reconstruct; None: the first tensor among the inputs.
        mean: of each channel, as ``torchvision.transforms.Normalize`` takes it; None: use the squared error.
        std: of each channel.
        channel_dim: the dimension of channels of the activation; -1 for (N, H, W, C).

    Raises:
        ScheduleError: a setting is out of range, or only one of `mean` and `std` is given.
    """

    weight: float = 1.0
    keep: float = 1.0
    input: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    channel_dim: int = 1
    needs_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self)
        if (self.mean is None) != (self.std is None):
            raise ScheduleError("InfoPro(mean=..., std=...) needs both, as your images were normalised, or neither.")

    def build(self, activation: Tensor, inputs: Mapping[str, Any], classes: int) -> nn.Module:
        """Return the loss of a block.

        Raises:
            ScheduleError: the input is not a floating-point tensor, has not one row for each of the activation, or its
                decoder would be too large.
        """
        name = self._input_name(inputs)
        if len(activation) != len(inputs[name]):
            raise ScheduleError(
                f"InfoPro reconstructs the input {name!r}, {shape_text(inputs[name].shape)}, example by example, and "
                f"the activation has {len(activation)} rows, {shape_text(activation.shape)}. Leave InfoPro out."
            )
        if activation.dim() == inputs[name].dim() == 4:
            return _Images(self, name, activation, inputs[name])
        if self.mean is not None:
            raise ScheduleError(
                f"InfoPro(mean=..., std=...) is for images behind maps; here the input {name!r} is "
                f"{shape_text(inputs[name].shape)} and the activation {shape_text(activation.shape)}. Leave them out."
            )
        return _Flat(name, activation, inputs[name])

    def _input_name(self, inputs: Mapping[str, Any]) -> str:
        """Return the name of the input to reconstruct."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if self.input is not None and self.input not in tensors:
            raise ScheduleError(
                f"InfoPro(input={self.input!r}) is no tensor among the net's inputs, {list(inputs)}"
                f"{did_you_mean(self.input, tensors)}."
            )
        if not tensors:
            raise ScheduleError(f"InfoPro reconstructs an input, and none of {list(inputs)} is a tensor. Leave it out.")
        name = self.input or next(iter(tensors))
        if not tensors[name].is_floating_point() or tensors[name].dim() == 0:
            others = [n for n, t in tensors.items() if t.is_floating_point() and t.dim() > 0]
            advice = (
                f"Name another with InfoPro(input=...): {others}" if others else "Use PredSim or KineticEnergy here"
            )
            raise ScheduleError(
                f"InfoPro reconstructs an input in floating point, and {name!r} is {shape_text(tensors[name].shape)} "
                f"{tensors[name].dtype}. {advice}."
            )
        return name


class _Images(ExtraLoss):
    """Reconstructs images (N, C, H, W) from maps."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: InfoPro, name: str, activation: Tensor, image: Tensor) -> None:
        super().__init__()
        self.name, self.channel_dim, self.denormalizes = name, settings.channel_dim, settings.mean is not None
        channels = image.shape[1]
        self.decoder = nn.Sequential(
            nn.Conv2d(channel_count(settings, activation), _WIDTH, 3, padding=1),
            nn.BatchNorm2d(_WIDTH),
            nn.ReLU(),
            nn.Conv2d(_WIDTH, channels, 3, padding=1),
        ).to(activation.device, activation.dtype)
        for part, values in (("mean", settings.mean), ("std", settings.std)):
            if values is not None:
                if len(values) not in (1, channels):
                    raise ScheduleError(
                        f"InfoPro({part}={list(values)}) has {len(values)} numbers, and the input {name!r} of "
                        f"{shape_text(image.shape)} has {channels} channels."
                    )
                numbers = torch.tensor(list(values), dtype=image.dtype, device=activation.device)
                self.register_buffer(part, numbers.view(1, -1, 1, 1), persistent=False)

    def forward(self, sight: Sight) -> Tensor:
        """Return the mean error over all pixels and channels, a scalar."""
        maps = sight.activation.movedim(self.channel_dim, 1)
        image = _input(sight, self.name)
        output = self.decoder(F.interpolate(maps, size=image.shape[2:], mode="bilinear", align_corners=True))
        output = at_least_single(output)
        if self.denormalizes:
            # With logits: autocast forbids the cross-entropy of probabilities, which may round to 1.
            pixels = (image * self.std + self.mean).clamp(0, 1)
            return F.binary_cross_entropy_with_logits(output, pixels.to(output.dtype))
        return F.mse_loss(output, image.to(output.dtype))


class _Flat(ExtraLoss):
    """Reconstructs an input of any shape from an activation of any shape, by one linear layer."""

    def __init__(self, name: str, activation: Tensor, original: Tensor) -> None:
        super().__init__()
        self.name = name
        incoming, outgoing = activation[:1].numel(), original[:1].numel()
        if incoming * outgoing > _LARGEST:
            raise ScheduleError(
                f"InfoPro's linear decoder from {shape_text(activation.shape)} to the input {name!r} of "
                f"{shape_text(original.shape)} would have {incoming * outgoing:,} parameters. It has a small decoder "
                "for images behind maps (N, C, H, W) only; use PredSim or KineticEnergy here."
            )
        self.decoder = nn.Linear(incoming, outgoing).to(activation.device, activation.dtype)

    def forward(self, sight: Sight) -> Tensor:
        """Return the mean squared error over all numbers of the input, a scalar."""
        activation, original = (t.reshape(t.shape[0], -1) for t in (sight.activation, _input(sight, self.name)))
        sizes = (activation.shape[1], original.shape[1])
        if sizes != (self.decoder.in_features, self.decoder.out_features):
            raise DataError(
                f"InfoPro's linear decoder was made for {self.decoder.in_features} features and "
                f"{self.decoder.out_features} numbers of the input {self.name!r}, and this batch has {sizes[0]} and "
                f"{sizes[1]} an example. Pad or crop the inputs to one size, or leave InfoPro out."
            )
        output = at_least_single(self.decoder(activation))
        return F.mse_loss(output, original.to(output.dtype))


def _input(sight: Sight, name: str) -> Tensor:
    """Return the input to reconstruct, on the activation's device.

    Raises:
        DataError: the batch does not have it.
    """
    if name not in sight.inputs:
        raise DataError(f"InfoPro reconstructs the input {name!r}, and this batch has only {list(sight.inputs)}.")
    original: Tensor = sight.inputs[name]
    return original.detach().to(sight.activation.device)

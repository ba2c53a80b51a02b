"""Codecs: how buffered activations are compressed.

| codec | bytes per number | error |
|---|---|---|
| ``"fp16"`` | 2 | 2^-11 of the number; beyond 65504 it is clamped |
| ``"bf16"`` | 2 | 2^-8 of the number |
| ``"int8"`` | 1 | 1/510 of the range of the channel in this batch |
| ``"vq"`` | 1/8 | distance to the nearest of 256 codes of 8 channels (:class:`~sedona_fx.train.VectorQuantizer`) |

Only floating-point tensors are encoded (:func:`encodable`). A number that is not finite never becomes finite: the
decoded activation is not finite somewhere either, and the loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sedona_fx.errors import CheckpointError, ScheduleError, did_you_mean
from sedona_fx.train.buffers.vector_quantizer import VectorQuantizer

Encoded = Mapping[str, Any]
"""An encoded activation: tensors and plain values by name."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@runtime_checkable
class Codec(Protocol):
    """How one of the activations in a buffer is stored. To add a codec, write a class with these methods."""

    @property
    def overhead_bytes(self) -> int:
        """Bytes that the codec holds besides encoded tensors, such as a codebook."""

    def encode(self, tensor: Tensor) -> dict[str, Any]:
        """Return an activation as tensors and plain values that ``torch.load(weights_only=True)`` can read."""

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the activation in its shape and dtype, on the device of the encoded tensors."""

    def fresh(self) -> Codec:
        """Return an unused codec with the same settings, for another activation."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the codec has learned; empty for codecs that learn nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


def make_codec(spec: str | Codec | None) -> Codec | None:
    """Return the codec that ``codec=`` of a schedule asks for.

    Args:
        spec: a name (``"fp16"``, ``"bf16"``, ``"int8"``, ``"vq"``), a codec, or None; the last two are returned as they
            are.

    Raises:
        ScheduleError: there is no codec of that name.
    """
    if spec is None or (isinstance(spec, Codec) and not isinstance(spec, type)):
        return spec
    kinds = {"fp16": Half, "bf16": BFloat16, "int8": Int8, "vq": VectorQuantizer}
    if not isinstance(spec, str) or spec not in kinds:
        near = did_you_mean(spec, kinds) if isinstance(spec, str) else ""
        raise ScheduleError(
            f"codec={spec!r} is unknown{near}. Known are {', '.join(map(repr, kinds))}, or hand a codec: "
            "sedona_fx.train.VectorQuantizer(codes=..., group=...), or one of your own."
        )
    codec: Codec = kinds[spec]()
    return codec


def encodable(tensor: Tensor) -> bool:
    """Return whether codecs can encode a tensor: strided, floating point of 16 to 64 bits."""
    return tensor.dtype in _FLOATS and tensor.layout == torch.strided


def encoded_bytes(encoded: Encoded) -> int:
    """Return the size of an encoded activation's tensors, in bytes."""
    return sum(v.numel() * v.element_size() for v in encoded.values() if isinstance(v, Tensor))


class _Stateless:
    """Base of the codecs that learn nothing."""

    @property
    def overhead_bytes(self) -> int:
        """Bytes held besides encoded tensors: none."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a state is empty.

        Raises:
            CheckpointError: it is not.
        """
        if state:
            raise CheckpointError(
                f"the state of a codec with {sorted(state)} is none of {type(self).__name__}, which has none."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Cast(_Stateless):
    """Casts to a smaller dtype; numbers beyond its largest are clamped to it, infinities stay infinite."""

    dtype: torch.dtype

    def encode(self, tensor: Tensor) -> dict[str, Any]:
        """Return the rounded numbers."""
        numbers, largest = tensor.detach(), torch.finfo(self.dtype).max
        if torch.finfo(tensor.dtype).max > largest:
            wide = numbers.to(torch.promote_types(tensor.dtype, torch.float32))  # bfloat16 does not have 65504
            numbers = torch.where(wide.isinf(), wide, wide.clamp(-largest, largest))
        return {"numbers": numbers.to(self.dtype), "dtype": tensor.dtype}

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the rounded numbers in their original dtype."""
        numbers: Tensor = encoded["numbers"]
        return numbers.to(encoded["dtype"])


class Half(_Cast):
    """IEEE half precision: 11 bits of precision, from 6e-8 to 65504."""

    dtype = torch.float16

    def fresh(self) -> Half:
        """Return a new codec."""
        return Half()


class BFloat16(_Cast):
    """bfloat16: 8 bits of precision, the range of single precision."""

    dtype = torch.bfloat16

    def fresh(self) -> BFloat16:
        """Return a new codec."""
        return BFloat16()


class Int8(_Stateless):
    """Integers from 0 to 255 between the least and the largest value of each channel (dimension 1) of a batch.

    ``x = low + scale * q`` with ``scale = (high - low) / 255``: exact for constant channels, otherwise the error is at
    most half of `scale`. If a channel has a number that is not finite, the whole channel is decoded as not finite.
    """

    def encode(self, tensor: Tensor) -> dict[str, Any]:
        """Return the integers, and scale and zero point of each channel."""
        tensor = tensor.detach()
        numbers = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # in float16, the range may be infinite
        others = [dim for dim in range(tensor.dim()) if dim != 1]
        shape = [size if dim == 1 else 1 for dim, size in enumerate(tensor.shape)]
        low = numbers.amin(others, keepdim=True) if tensor.numel() else numbers.new_zeros(shape)
        high = numbers.amax(others, keepdim=True) if tensor.numel() else low
        scale = (high - low) / 255
        steps = (numbers - low) / scale.masked_fill(scale == 0, 1)
        whole = steps.round().nan_to_num(0).clamp(0, 255).to(torch.uint8)
        return {"whole": whole, "scale": scale, "low": low, "dtype": tensor.dtype}

    def decode(self, encoded: Encoded) -> Tensor:
        """Return ``low + scale * whole``."""
        scale: Tensor = encoded["scale"]
        return torch.addcmul(encoded["low"], scale, encoded["whole"].to(scale.dtype)).to(encoded["dtype"])

    def fresh(self) -> Int8:
        """Return a new codec."""
        return Int8()

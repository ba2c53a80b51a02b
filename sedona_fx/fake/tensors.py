"""Tensors that were never made: their geometry and their storage, from which a fake tensor is made where one is needed.

A fake tensor costs a millisecond an operator. Where what an operator does is remembered (:mod:`sedona_fx.fake.memo`),
its results need not be made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class CannotMake(Exception):
    """A remembered tensor cannot be made such that autograd would see it as it saw the one that was not remembered."""


class Geometry(NamedTuple):
    """All that an operation can see of a strided tensor without numbers, but for its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


@dataclass(eq=False)
class Storage:
    """Memory behind tensors. ``number`` is its name, never used twice in a graph; ``own``: a parameter or buffer.

    ``root`` is the first tensor seen on it, ``real`` the tensor that it is the fake memory of. Of how ``abstract``
    tensors on it are views of each other, or detached, autograd was not told.
    """

    number: int
    size: int
    own: bool = False
    root: Tensor | None = None
    real: Tensor | None = None
    abstract: list[Abstract] = field(default_factory=list)
    made: bool = False

    def hold(self, geometry: Geometry) -> Abstract:
        """Return a new abstract tensor on this memory."""
        self.abstract.append(Abstract(geometry, self))
        return self.abstract[-1]

    @property
    def is_known_to_autograd(self) -> bool:
        """Whether autograd knows how all tensors on it are views of each other."""
        return not self.abstract or (self.made and len(self.abstract) == 1)


@dataclass(eq=False)
class Abstract:
    """A tensor of a graph that was not made, or not yet."""

    geometry: Geometry
    storage: Storage
    made: Tensor | None = None


class Storages:
    """The memory of one run of a graph on fake tensors."""

    def __init__(self, fake_mode: FakeTensorMode, own: Iterable[Tensor]) -> None:
        self.fake_mode = fake_mode
        self.count = 0
        self._at: dict[int, Storage] = {}  # by address, which names a storage while it lives
        self._fake: dict[Storage, Storage] = {}
        for tensor in own:
            self.of(tensor).own = True

    def fresh(self, size: int) -> Storage:
        """Return memory that no tensor lies on yet."""
        self.count += 1
        return Storage(self.count, size)

    def of(self, tensor: Tensor | Abstract) -> Storage:
        """Return the memory behind a tensor."""
        if isinstance(tensor, Abstract):
            return tensor.storage
        memory = tensor.untyped_storage()
        found = self.at(memory._cdata, memory.nbytes())
        if found.root is None:
            found.root = tensor
        return found

    def at(self, address: int, size: int) -> Storage:
        """Return the memory at an address, kept alive by the caller."""
        if address not in self._at:
            self._at[address] = self.fresh(size)
        return self._at[address]

    def fake_of(self, real: Tensor) -> Storage:
        """Return the memory of the fake tensor that stands for a real one where operators read it."""
        storage = self.of(real)
        if storage not in self._fake:
            self._fake[storage] = self.fresh(storage.size)
            self._fake[storage].own, self._fake[storage].real = storage.own, real
        return self._fake[storage]

    def convert(self, real: Tensor) -> Tensor:
        """Return the fake tensor that stands for a real one, the same every time."""
        fake = self.fake_mode.from_tensor(real)
        self._at[fake.untyped_storage()._cdata] = self.fake_of(real)
        self.of(fake)
        return fake

    def make(self, abstract: Abstract) -> Tensor:
        """Return an abstract tensor as a fake one, the same every time.

        Raises:
            CannotMake: not of this type or with this gradient on what is there already.
        """
        if abstract.made is None:
            abstract.made = self._make(abstract.geometry, abstract.storage)
        return abstract.made

    def _make(self, wanted: Geometry, storage: Storage) -> Tensor:
        if storage.root is None and storage.real is not None:
            self.convert(storage.real)
        root = storage.root
        if root is None:
            length, rest = divmod(storage.size, wanted.dtype.itemsize)
            if rest:
                raise CannotMake
            root = torch.empty(length, dtype=wanted.dtype, device=wanted.device)
            if any(other.geometry.requires_grad for other in storage.abstract):
                root = root.requires_grad_().clone()  # no leaf: it may be written to
            self._at[root.untyped_storage()._cdata] = storage
            storage.root, storage.made = root, True
        if root.dtype != wanted.dtype or (wanted.requires_grad and not root.requires_grad):
            raise CannotMake
        root = root.detach() if root.requires_grad and not wanted.requires_grad else root
        return root.as_strided(wanted.shape, wanted.stride, wanted.offset)


def geometry(tensor: Tensor | Abstract) -> Geometry | None:
    """Return the geometry of a tensor, None where that does not say it all."""
    if isinstance(tensor, Abstract):
        if tensor.made is None:
            return tensor.geometry
        tensor = tensor.made
    if isinstance(tensor, FakeTensor):
        whole = type(tensor) is FakeTensor and tensor.constant is None
    else:
        whole = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not whole or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return None
    return Geometry(
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )

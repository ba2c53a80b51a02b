"""Abstract tensors: geometry and storage only, from which a fake tensor is made when an operator has to run on it.

An operator on fake tensors takes about a millisecond. If its effect is in the memo (:mod:`sedona_fx.fake.memo`), it
does not run, and its results are made only if a later operator needs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class CannotMake(Exception):
    """No fake tensor can be made that autograd would treat like the tensor that the memo stands in for."""


class Geometry(NamedTuple):
    """Everything that an operation can see of a strided tensor without data, apart from its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


@dataclass(eq=False)
class Storage:
    """The memory of one or more tensors.

    Attributes:
        number: its name, unique in one run of a graph.
        size: in bytes.
        own: whether it belongs to a parameter or buffer of the model.
        root: the first tensor seen on it.
        real: the real tensor for which it is the fake memory.
        abstract: the abstract tensors on it. Autograd does not know which of them are views of each other, or detached.
        made: whether `root` was made from an abstract tensor.
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
        """Whether autograd knows of all tensors on it which are views of each other."""
        return not self.abstract or (self.made and len(self.abstract) == 1)


@dataclass(eq=False)
class Abstract:
    """A tensor of a graph, given by geometry and storage; `made` is its fake tensor once an operator needed one."""

    geometry: Geometry
    storage: Storage
    made: Tensor | None = None


class Storages:
    """All storages of one run of a graph on fake tensors.

    Args:
        fake_mode: the mode in which fake tensors are made.
        own: the parameters and buffers of the model.
    """

    def __init__(self, fake_mode: FakeTensorMode, own: Iterable[Tensor]) -> None:
        self.fake_mode = fake_mode
        self.count = 0
        self._at: dict[int, Storage] = {}  # by address, which identifies a storage while it is alive
        self._fake: dict[Storage, Storage] = {}
        for tensor in own:
            self.of(tensor).own = True

    def fresh(self, size: int) -> Storage:
        """Return a new storage of `size` bytes without tensors."""
        self.count += 1
        return Storage(self.count, size)

    def of(self, tensor: Tensor | Abstract) -> Storage:
        """Return the storage of a tensor."""
        if isinstance(tensor, Abstract):
            return tensor.storage
        untyped = tensor.untyped_storage()
        storage = self.at(untyped._cdata, untyped.nbytes())
        if storage.root is None:
            storage.root = tensor
        return storage

    def at(self, address: int, size: int) -> Storage:
        """Return the storage at an address; the caller keeps PyTorch's storage alive."""
        if address not in self._at:
            self._at[address] = self.fresh(size)
        return self._at[address]

    def fake_of(self, real: Tensor) -> Storage:
        """Return the storage of the fake tensor that operators read in place of a real one."""
        storage = self.of(real)
        if storage not in self._fake:
            self._fake[storage] = self.fresh(storage.size)
            self._fake[storage].own, self._fake[storage].real = storage.own, real
        return self._fake[storage]

    def convert(self, real: Tensor) -> Tensor:
        """Return the fake tensor of a real one, the same one every time."""
        fake = self.fake_mode.from_tensor(real)
        self._at[fake.untyped_storage()._cdata] = self.fake_of(real)
        self.of(fake)
        return fake

    def make(self, abstract: Abstract) -> Tensor:
        """Return the fake tensor of an abstract one, the same one every time.

        Raises:
            CannotMake: the tensors that the storage already has do not allow its dtype or its `requires_grad`.
        """
        if abstract.made is None:
            abstract.made = self._make(abstract.geometry, abstract.storage)
        return abstract.made

    def _make(self, wanted: Geometry, storage: Storage) -> Tensor:
        if storage.root is None and storage.real is not None:
            self.convert(storage.real)
        root = storage.root
        if root is None:
            length, remainder = divmod(storage.size, wanted.dtype.itemsize)
            if remainder:
                raise CannotMake
            root = torch.empty(length, dtype=wanted.dtype, device=wanted.device)
            if any(other.geometry.requires_grad for other in storage.abstract):
                root = root.requires_grad_().clone()  # not a leaf, so that it may be written to
            self._at[root.untyped_storage()._cdata] = storage
            storage.root, storage.made = root, True
        if root.dtype != wanted.dtype or (wanted.requires_grad and not root.requires_grad):
            raise CannotMake
        root = root.detach() if root.requires_grad and not wanted.requires_grad else root
        return root.as_strided(wanted.shape, wanted.stride, wanted.offset)


def geometry(tensor: Tensor | Abstract) -> Geometry | None:
    """Return the geometry of a tensor, or None if it does not describe the tensor completely."""
    if isinstance(tensor, Abstract):
        if tensor.made is None:
            return tensor.geometry
        tensor = tensor.made
    if isinstance(tensor, FakeTensor):
        complete = type(tensor) is FakeTensor and tensor.constant is None
    else:
        complete = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    if not complete or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return None
    return Geometry(
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        offset=int(tensor.storage_offset()),
        dtype=tensor.dtype,
        device=tensor.device,
        requires_grad=tensor.requires_grad,
    )

"""Vector quantisation of buffered activations, with a codebook that is learned while they are encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sedona_fx.errors import CheckpointError, ScheduleError

# Vectors whose distances to all codes are in memory at a time: 64 MiB for 256 codes; on a CPU 4 MiB, to fit a cache.
_CHUNK, _CPU_CHUNK = 2**16, 2**12
_TRIES = 16  # vectors drawn per code of the first codebook, so that enough of them differ


class VectorQuantizer:
    """Stores each group of channels at each position as the index of its nearest code.

    Online vector quantisation of the replay buffers, as in the later DGL paper (Belilovsky, Leconte, Caccia,
    Eickenberg, Oyallon 2021, "Decoupled Greedy Learning of CNNs for Synchronous and Asynchronous Distributed
    Learning"). The channels are split into groups of `group` (the last one padded with zeros), all groups share one
    codebook of `codes` vectors, and the codebook follows the activations by exponential moving averages (van den Oord,
    Vinyals, Kavukcuoglu 2017, appendix A.1): with n_i vectors z of a batch nearest to code e_i,

        N_i <- decay N_i + (1 - decay) n_i      m_i <- decay m_i + (1 - decay) sum z      e_i <- m_i / N_i

    A code without vectors does not move. N and m start at 0, so that the first batch moves the codes to the means of
    their vectors. The first codes are vectors drawn from the first batch, all different if enough of those drawn are.

    A dead code is replaced by a vector of the current batch. A code is dead if no vector was nearest to it for
    `patience` batches, or in the first batch after it was placed. So codes that one of the last `patience` batches uses
    may move, but are never replaced: a buffer of at most `patience` batches can always be decoded.

    A batch with a number that is not finite is decoded as NaN throughout, and does not change the codebook.

    Args:
        codes: size of the codebook; up to 256 codes take one byte per group.
        group: number of channels per code.
        decay: of the moving averages; in [0, 1).
        patience: number of batches after which an unused code is dead.
        channel_dim: the dimension of channels; -1 for tokens (N, T, D).
        seed: of the random draws.

    Raises:
        ScheduleError: an argument is out of range.
    """

    def __init__(
        self,
        codes: int = 256,
        group: int = 8,
        decay: float = 0.99,
        *,
        patience: int = 100,
        channel_dim: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("codes", codes, 2), ("group", group, 1), ("patience", patience, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ScheduleError(f"VectorQuantizer({name}={value!r}) must be a whole number of {least} or more.")
        if not 0 <= decay < 1:
            raise ScheduleError(f"VectorQuantizer(decay={decay}) must be in [0, 1): at 1 the codes would never move.")
        self.codes, self.group, self.decay, self.patience = codes, group, decay, patience
        self.channel_dim, self.seed = channel_dim, seed
        self._generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws for every device
        self._index_type = torch.uint8 if codes <= 2**8 else torch.int16 if codes <= 2**15 else torch.int32
        self._book: Tensor | None = None  # (codes, group)
        self._sums = torch.zeros(codes, group)  # m
        self._counts = torch.zeros(codes)  # N
        # Batches since a code was used; a code just placed starts at patience - 1: it is dead unless used at once.
        self._idle = torch.full((codes,), patience - 1)

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the codebook, its moving averages, and the counts of unused batches."""
        numbers = self._sums.numel() * 2 + self._counts.numel()
        return numbers * self._sums.element_size() + self._idle.numel() * self._idle.element_size()

    def fresh(self) -> VectorQuantizer:
        """Return an unused quantizer with the same settings, for another activation."""
        return VectorQuantizer(
            self.codes,
            self.group,
            self.decay,
            patience=self.patience,
            channel_dim=self.channel_dim,
            seed=self.seed,
        )

    def encode(self, tensor: Tensor) -> dict[str, Any]:
        """Return the index of the nearest code for each group and position, and update the codebook."""
        with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
            grouped = self._grouped(tensor.detach())
            vectors = grouped.reshape(-1, self.group).float()
            finite = vectors.isfinite().all()
            if len(vectors):
                numbers = self._assign(vectors.nan_to_num(0, 0, 0), finite)
            else:
                numbers = torch.zeros(0, dtype=torch.long, device=tensor.device)
        return {
            "numbers": numbers.to(self._index_type).view(grouped.shape[:-1]),
            "finite": finite,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
        }

    def decode(self, encoded: Mapping[str, Any]) -> Tensor:
        """Return the activation with each group replaced by its code, as the codebook is now.

        Raises:
            ScheduleError: nothing was encoded yet, so that there is no codebook.
        """
        numbers, shape = encoded["numbers"], encoded["shape"]
        if self._book is None:
            if numbers.numel():
                raise ScheduleError(
                    "a VectorQuantizer decodes what it has encoded itself, and this one has no codebook."
                )
            return torch.zeros(shape, dtype=encoded["dtype"], device=numbers.device)
        book = self._book.to(numbers.device)
        book = torch.where(encoded["finite"], book, torch.nan).to(encoded["dtype"])
        grouped = F.embedding(numbers.int(), book)
        if len(shape) < 2:
            return grouped.flatten()[: math.prod(shape)].view(shape)
        channels = self._channel_dim(len(shape))
        # (N, groups, ..., group) -> (N, groups, group, ...) -> (N, channels, ...)
        flat = grouped.movedim(-1, 2).flatten(1, 2)[:, : shape[channels]]
        return flat.movedim(1, channels).contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Return the codebook, its moving averages, and the state of the generator."""
        return {
            "book": self._book,
            "sums": self._sums,
            "counts": self._counts,
            "idle": self._idle,
            "random": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it is of another codec, or of a codebook of another size; nothing is loaded then.
        """
        if missing := sorted(self.state_dict().keys() - state.keys()):
            raise CheckpointError(f"the state is none of a VectorQuantizer: {missing} are missing.")
        if tuple(state["sums"].shape) != (self.codes, self.group):
            codes, group = state["sums"].shape
            raise CheckpointError(
                f"the state is of VectorQuantizer(codes={codes}, group={group}), here it is codes={self.codes}, "
                f"group={self.group}. Make the schedule with the same codec to go on from it."
            )
        ours = {"book": self._sums, "sums": self._sums, "counts": self._counts, "idle": self._idle}
        for name, tensor in ours.items():
            fits = isinstance(state[name], Tensor) and state[name].shape == tensor.shape
            if not fits and not (name == "book" and state[name] is None):
                raise CheckpointError(f"the state of a VectorQuantizer is damaged: its {name} has another shape.")
        self._book, self._sums, self._counts = state["book"], state["sums"], state["counts"]
        self._idle = state["idle"]
        self._generator.set_state(state["random"].cpu())

    def __repr__(self) -> str:
        return (
            f"VectorQuantizer(codes={self.codes}, group={self.group}, decay={self.decay}, patience={self.patience}, "
            f"channel_dim={self.channel_dim}, seed={self.seed})"
        )

    def _channel_dim(self, rank: int) -> int:
        """Return the dimension of channels of a tensor with `rank` dimensions, counted from 0."""
        if not -rank < self.channel_dim < rank or self.channel_dim == 0:
            raise ScheduleError(
                f"VectorQuantizer(channel_dim={self.channel_dim}) is no dimension of channels of a tensor with {rank}: "
                "it is 1 in (N, C, ...), -1 in tokens (N, T, D)."
            )
        return self.channel_dim % rank

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Return (N, C, ...) as (N, groups, ..., group); with fewer than two dimensions, all numbers are channels."""
        tensor = tensor.movedim(self._channel_dim(tensor.dim()), 1) if tensor.dim() > 1 else tensor.reshape(1, -1)
        padding = -tensor.shape[1] % self.group
        padded = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, padding]) if padding else tensor
        return padded.unflatten(1, (-1, self.group)).movedim(2, -1)

    def _assign(self, vectors: Tensor, finite: Tensor) -> Tensor:
        """Return the indices of the nearest codes of (n, group) vectors; update the codebook if `finite`.

        Args:
            vectors: float32, with numbers that are not finite replaced.
            finite: a boolean scalar on the device: whether all numbers were finite.
        """
        device = vectors.device
        book = self._first_book(vectors) if self._book is None else self._book.to(device)
        sums, counts, idle = self._sums.to(device), self._counts.to(device), self._idle.to(device)
        nearest, totals = [], torch.zeros(self.codes, self.group + 1, device=device)
        half = book.square().sum(1) / 2
        for chunk in vectors.split(_CPU_CHUNK if device.type == "cpu" else _CHUNK):
            # Half of |z - e|^2 without the |z|^2 that all codes share.
            nearest.append(torch.addmm(half, chunk, book.t(), alpha=-1).argmin(1))
            self._add_up(totals, nearest[-1], F.pad(chunk, [0, 1], value=1.0))  # a last column of ones counts
        used = totals[:, -1] > 0
        new_sums = self.decay * sums + (1 - self.decay) * totals[:, :-1]
        new_counts = self.decay * counts + (1 - self.decay) * totals[:, -1]
        moved = torch.where(used[:, None], new_sums / new_counts[:, None], book)
        new_idle = torch.where(used, 0, idle + 1)
        dead = new_idle >= self.patience
        # Not `if dead.any()`: the host would have to wait for the device.
        moved = torch.where(dead[:, None], self._draw(vectors, self.codes), moved)
        alive = (~dead).to(sums.dtype)
        self._book = torch.where(finite, moved, book)
        self._sums = torch.where(finite, new_sums * alive[:, None], sums)
        self._counts = torch.where(finite, new_counts * alive, counts)
        self._idle = torch.where(finite, torch.where(dead, self.patience - 1, new_idle), idle)
        return torch.cat(nearest)

    def _add_up(self, totals: Tensor, numbers: Tensor, rows: Tensor) -> None:
        """Add each row to ``totals[number]``, in place, in an order that is always the same."""
        if totals.device.type == "cpu":
            totals.index_add_(0, numbers, rows)
        else:  # on an accelerator, index_add_ has no fixed order; a product with one-hot rows has
            totals += F.one_hot(numbers, self.codes).to(rows.dtype).t() @ rows

    def _first_book(self, vectors: Tensor) -> Tensor:
        """Return `codes` vectors drawn from `vectors`, all different if enough different ones were drawn."""
        different = torch.unique(self._draw(vectors, _TRIES * self.codes), dim=0)
        order = torch.randperm(len(different), generator=self._generator)
        return different[order.repeat(-(-self.codes // len(order)))[: self.codes].to(vectors.device)]

    def _draw(self, vectors: Tensor, count: int) -> Tensor:
        """Return `count` of the vectors, drawn with replacement."""
        return vectors[torch.randint(len(vectors), (count,), generator=self._generator).to(vectors.device)]

"""Random numbers of blocks: drawn from (seed, block, step), so that one process and many agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def block_seed(seed: int, block: int, step: int) -> int:
    """Return the seed of a block's draws (dropout, stochastic depth) at a step: 63 bits of a hash of the three."""
    digest = hashlib.blake2b(f"{seed}/{block}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def block_random(seed: int, block: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed the draws of the body, and give the global streams their states back afterwards."""
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(block_seed(seed, block, step))
        yield

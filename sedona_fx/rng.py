"""Random numbers: of blocks, drawn from (seed, block, step); and all global streams, seeded, saved and restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def block_seed(seed: int, block: int | str, step: int) -> int:
    """Return the seed of a block's (or a named stream's) draws at a step: 63 bits of a hash of the three."""
    digest = hashlib.blake2b(f"{seed}/{block}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def block_random(seed: int, block: int, step: int, device: torch.device) -> Iterator[None]:
    """Seed the draws of the body, and give the global streams their states back afterwards."""
    number = block_seed(seed, block, step)
    devices = [device] if _has_stream(device) else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        # Not torch.manual_seed: it would seed every accelerator there is, and only this block's gets its state back.
        torch.default_generator.manual_seed(number)
        for mine in devices:
            state = torch.Generator(mine).manual_seed(number).get_state()
            torch.get_device_module(mine).set_rng_state(state, mine)
        yield


def seed_all(seed: int) -> None:
    """Seed the global streams of torch (all devices), random and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global streams (torch, `device`'s kind, ``random``, numpy), and give them back as they were."""
    devices = []
    if _has_stream(device):
        devices = [torch.device(device.type, k) for k in range(torch.get_device_module(device).device_count())]
    states = random_states(devices)
    try:
        if devices:
            torch.manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        restore_random(states)


def random_states(devices: Iterable[torch.device]) -> list[Any]:
    """Return the states of the global streams, those of `devices` included; loads with ``weights_only=True``."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    numpy_state = [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *[float(r) for r in rest]]
    found = {str(d): torch.get_device_module(d).get_rng_state(d) for d in devices if _has_stream(d)}
    return [torch.get_rng_state(), [version, list(internal), gauss], numpy_state, found]


def restore_random(states: Sequence[Any]) -> None:
    """Put the global streams into the states that :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    version, internal, gauss = states[1]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states[2]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    for device, state in states[3].items():
        torch.get_device_module(torch.device(device)).set_rng_state(state, torch.device(device))


def loader_streams(loader: Any) -> list[torch.Generator]:
    """Return the generators that a loader and its samplers hold themselves, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def stream_states(loader: Any) -> list[Tensor]:
    """Return the states of :func:`loader_streams`."""
    return [generator.get_state() for generator in loader_streams(loader)]


def _has_stream(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")

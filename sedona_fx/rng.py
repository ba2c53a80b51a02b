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
    """Seed every global stream: torch (accelerators in use too), ``random`` and NumPy.

    ``torch.manual_seed`` would also queue a seed for an accelerator that nobody has used yet.
    """
    if _accelerators():
        torch.manual_seed(seed)
    _seed_cpu(seed)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global streams (torch, `device`'s kind, ``random``, NumPy), and give them back as they were."""
    devices = []
    if _has_stream(device):
        devices = [torch.device(device.type, k) for k in range(torch.get_device_module(device).device_count())]
    states = random_states(devices)
    try:
        if devices:
            torch.manual_seed(seed)
        _seed_cpu(seed)
        yield
    finally:
        restore_random(states)


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU stream, from which modules draw their initial weights, and give it back as it was.

    Not ``torch.manual_seed``: that would seed every accelerator too, and their streams would not be given back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def random_states(devices: Iterable[torch.device] | None = None) -> list[Any]:
    """Return the states of the global streams; loads with ``weights_only=True``.

    Args:
        devices: accelerators whose streams belong to it; None: all that are in use.

    Returns:
        The states of torch's CPU stream, of ``random`` and of NumPy, and a dictionary from device name to state.
    """
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    # Plain numbers: a tensor made while torch.export records would be a fake one.
    numpy_state = [name, np.asarray(keys).tolist(), *[float(r) for r in rest]]
    wanted = _accelerators() if devices is None else [d for d in devices if _has_stream(d)]
    accelerators = {str(d): torch.get_device_module(d).get_rng_state(d) for d in wanted}
    return [torch.get_rng_state(), [version, list(internal), gauss], numpy_state, accelerators]


def restore_random(states: Sequence[Any]) -> None:
    """Put the global streams into the states that :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    version, internal, gauss = states[1]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states[2]
    if isinstance(keys, Tensor):  # as files written before plans had format 2 have them
        keys = keys.tolist()
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    for device, state in states[3].items():
        torch.get_device_module(torch.device(device)).set_rng_state(state, torch.device(device))


def same_random_states(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether nothing was drawn in between. An accelerator that was first used in between counts as no draw."""
    accelerators_same = all(
        device in after[3] and torch.equal(state, after[3][device]) for device, state in before[3].items()
    )
    return torch.equal(before[0], after[0]) and before[1:3] == after[1:3] and accelerators_same


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


def _accelerators() -> list[torch.device]:
    """Return the devices with random streams of their own that this process has used."""
    kind = torch.accelerator.current_accelerator(check_available=False)
    if kind is None or not _has_stream(kind):
        return []
    module = torch.get_device_module(kind)
    if not getattr(module, "is_initialized", lambda: True)():
        return []
    return [torch.device(kind.type, k) for k in range(module.device_count())]


def _seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)

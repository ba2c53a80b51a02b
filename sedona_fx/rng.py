"""All random number streams: a seed per block and step, and the global generators seeded, saved and restored.

A block draws from a stream that depends on (seed, block, step) only. So its draws do not depend on the order in which
blocks run, nor on what other code draws, and a resumed run draws the same numbers.

The streams themselves are PyTorch's global ones, since its layers draw from no others. Threads take turns with them:
while one has them seeded, others wait (:func:`turn`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
_locks = [threading.RLock()]
# A worker of a data loader may be forked while another thread holds the lock, and would wait for ever.
os.register_at_fork(after_in_child=lambda: _locks.__setitem__(0, threading.RLock()))


def turn() -> AbstractContextManager[Any]:
    """Return a lock that is held while the global generators are in the hands of one thread; it may be taken twice."""
    return _locks[0]


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that has the global generators in its hands for the whole call (:func:`turn`)."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with turn():
            return function(*args, **kwargs)

    return call


def block_seed(seed: int, block: int | str, step: int) -> int:
    """Return the seed of a block's draws at a step: 63 bits of the BLAKE2b hash of the three arguments.

    Args:
        seed: seed of the run.
        block: index of the block, or the name of another stream.
        step: number of the step.
    """
    digest = hashlib.blake2b(f"{seed}/{block}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def block_random(seed: int, block: int, step: int, device: torch.device, *, python: bool = False) -> Iterator[None]:
    """Seed PyTorch's generators of the CPU and of `device` for the body, and restore their states afterwards.

    Args:
        seed, block, step: as for :func:`block_seed`.
        device: of the block.
        python: seed Python's ``random`` and NumPy's generator as well; modules that run as Python may draw from them.
    """
    derived_seed = block_seed(seed, block, step)
    devices = [device] if _has_generator(device) else []
    forked = torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda")
    with turn(), forked, _python_seeded(derived_seed) if python else nullcontext():
        # torch.manual_seed would seed every accelerator there is, and only the state of this block's one is restored.
        torch.default_generator.manual_seed(derived_seed)
        for accelerator in devices:
            state = torch.Generator(accelerator).manual_seed(derived_seed).get_state()
            torch.get_device_module(accelerator).set_rng_state(state, accelerator)
        yield


def seed_all(seed: int) -> None:
    """Seed every global generator: PyTorch's (those of accelerators in use too), Python's ``random`` and NumPy's.

    ``torch.manual_seed`` alone would also queue a seed for an accelerator that nobody has used yet.
    """
    if _accelerators_in_use():
        torch.manual_seed(seed)
    _seed_cpu(seed)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators for the body, and restore their states afterwards.

    They are PyTorch's for the CPU and for all devices of `device`'s type, Python's ``random`` and NumPy's.
    """
    devices = []
    if _has_generator(device):
        devices = [torch.device(device.type, k) for k in range(torch.get_device_module(device).device_count())]
    with turn():
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
    """Seed PyTorch's CPU generator, which initial weights are drawn from, for the body; restore its state afterwards.

    ``torch.manual_seed`` would seed every accelerator too, whose states would not be restored.
    """
    with turn(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def random_states(devices: Iterable[torch.device] | None = None) -> list[Any]:
    """Return the states of the global generators, in a form that ``torch.load(weights_only=True)`` reads.

    Args:
        devices: the accelerators whose generators are included; None: all that are in use.

    Returns:
        The states of PyTorch's CPU generator, of ``random`` and of NumPy, and a dictionary from device name to state.
    """
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    # Plain numbers, since a tensor that is made while torch.export records would be a fake one.
    numpy_state = [name, np.asarray(keys).tolist(), *[float(r) for r in rest]]
    chosen = _accelerators_in_use() if devices is None else [d for d in devices if _has_generator(d)]
    accelerators = {str(d): torch.get_device_module(d).get_rng_state(d) for d in chosen}
    return [torch.get_rng_state(), [version, list(internal), gauss], numpy_state, accelerators]


def restore_random(states: Sequence[Any]) -> None:
    """Put the global generators into the states that :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    version, internal, gauss = states[1]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states[2]
    if isinstance(keys, Tensor):  # in files written before plans had format 2
        keys = keys.tolist()
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    for device, state in states[3].items():
        torch.get_device_module(torch.device(device)).set_rng_state(state, torch.device(device))


def are_random_states(states: Any) -> bool:
    """Return whether a value from a file can be what :func:`random_states` returned; no generator is touched."""
    try:
        torch.Generator().set_state(states[0])
        version, internal, gauss = states[1]
        random.Random().setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = states[2]
        keys = np.asarray(keys.tolist() if isinstance(keys, Tensor) else keys, dtype=np.uint32)
        np.random.RandomState().set_state((name, keys, int(position), int(has_gauss), cached))
        devices = [torch.device(device) for device in states[3]]
        tensors = all(isinstance(s, Tensor) and s.dtype is torch.uint8 for s in states[3].values())
    except Exception:
        return False
    return len(devices) == len(states[3]) and tensors and len(states) == 4


def same_random_states(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether nothing was drawn between two calls of :func:`random_states`.

    An accelerator that was first used in between does not count as a draw.
    """
    accelerators_same = all(
        device in after[3] and torch.equal(state, after[3][device]) for device, state in before[3].items()
    )
    return torch.equal(before[0], after[0]) and before[1:3] == after[1:3] and accelerators_same


Stream = random.Random | np.random.Generator | np.random.RandomState | torch.Generator
"""A generator that somebody holds."""


def stream_state(stream: Stream) -> Any:
    """Return the state of a generator, for :func:`set_stream_state`; states are equal if their bytes are."""
    if isinstance(stream, torch.Generator):
        state: Any = stream.get_state()
    elif isinstance(stream, random.Random):
        state = stream.getstate()
    else:
        state = stream.bit_generator.state if isinstance(stream, np.random.Generator) else stream.get_state()
    return state if isinstance(stream, torch.Generator) else pickle.dumps(state)


def set_stream_state(stream: Stream, state: Any) -> None:
    """Put a generator into the state that :func:`stream_state` returned."""
    if isinstance(stream, torch.Generator):
        stream.set_state(state)
        return
    value = pickle.loads(state)
    if isinstance(stream, random.Random):
        stream.setstate(value)
    elif isinstance(stream, np.random.Generator):
        stream.bit_generator.state = value
    else:
        stream.set_state(value)


def same_stream_state(before: Any, after: Any) -> bool:
    """Whether two states that :func:`stream_state` returned are equal."""
    return bool(torch.equal(before, after) if isinstance(before, Tensor) else before == after)


def loader_streams(loader: Any) -> list[torch.Generator]:
    """Return the generators that a data loader and its samplers hold themselves, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def stream_states(loader: Any) -> list[Tensor]:
    """Return the states of :func:`loader_streams`."""
    return [generator.get_state() for generator in loader_streams(loader)]


def _has_generator(device: torch.device) -> bool:
    """Whether draws on a device come from a generator other than the CPU's."""
    return device.type not in ("cpu", "meta")


def _accelerators_in_use() -> list[torch.device]:
    """Return the devices with generators of their own, if this process has used any of them."""
    kind = torch.accelerator.current_accelerator(check_available=False)
    if kind is None or not _has_generator(kind):
        return []
    module = torch.get_device_module(kind)
    if not getattr(module, "is_initialized", lambda: True)():
        return []
    return [torch.device(kind.type, k) for k in range(module.device_count())]


@contextmanager
def _python_seeded(seed: int) -> Iterator[None]:
    """Seed Python's ``random`` and NumPy's generator for the body, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _seed_cpu(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)

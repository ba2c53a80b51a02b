"""What every test starts from: one thread (sums are then always added in the same order) and a fixed seed."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SPREAD = ("test_onnx.py", "test_support.py")
"""Files of few long tests: these run wherever there is a process free, so that none is left with all of them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the tests of a file together, since they share what is costly to make, with ``--dist loadgroup``."""
    for item in items:
        file = Path(item.path)
        alone = f"::{item.name}" if file.name in SPREAD else ""
        item.add_marker(pytest.mark.xdist_group(f"{file.parent.name}/{file.name}{alone}"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)

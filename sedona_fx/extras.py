"""Packages that only parts of sedona_fx need, each installed by an extra of that part."""

from __future__ import annotations

import importlib
from types import ModuleType

from sedona_fx.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package when it is needed, so that importing sedona_fx neither needs nor loads it.

    Args:
        module: to import, ``"matplotlib.figure"``.
        extra: of this project that installs it, ``"report"``.
        purpose: what needs it, for the message: ``"drawing a plan"``.

    Raises:
        MissingExtraError: it is not installed; with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, but something that it needs itself is not
        raise MissingExtraError(purpose, package, extra) from error

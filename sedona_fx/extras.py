"""Optional packages, which only parts of sedona_fx need; an extra of the project installs each of them."""

from __future__ import annotations

import importlib
from types import ModuleType

from sedona_fx.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package at the moment of use, so that ``import sedona_fx`` neither needs nor loads it.

    Args:
        module: name of the module to import, such as ``"matplotlib.figure"``.
        extra: the extra of sedona_fx that installs it, such as ``"report"``.
        purpose: what needs it, for the message, such as ``"drawing a plan"``.

    Raises:
        MissingExtraError: the package is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is installed, but something that it needs itself is not
        raise MissingExtraError(purpose, package, extra) from error

"""Optional packages: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

__all__ = ["available", "require"]


def available(name: str) -> bool:
    """Return whether the package ``name`` can be imported, without importing it.

    Example:
        >>> available("torch"), available("no_such_package")
        (True, False)
    """
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def require(name: str, *, extra: str) -> ModuleType:
    """Import and return the module ``name``.

    Args:
        name: Module to import, such as ``"matplotlib"``.
        extra: The extra of ``lightning-cl`` that brings it.

    Raises:
        ImportError: If its package is not installed; the message gives the command that installs it.

    Example:
        >>> require("no_such_package", extra="report")
        Traceback (most recent call last):
            ...
        ImportError: `no_such_package` is not installed. Run: pip install "lightning-cl[report]"
    """
    if not available(name):
        raise ImportError(
            f'`{name.partition(".")[0]}` is not installed. Run: pip install "lightning-cl[{extra}]"', name=name
        )
    return importlib.import_module(name)

"""Changes to a module that must be there when the strategy wraps it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["before_wrapping", "leave_configure_model"]


def before_wrapping(pl_module: LightningModule, change: Callable[[], None], *, built: bool = False) -> None:
    """Change a module after it is built and before the strategy wraps or shards it, and the optimizer takes it over.

    Called from ``setup``, where a network that the module builds in ``configure_model`` is not there yet: then the
    change waits for it. Changes are made in the order of the calls.

    Args:
        pl_module: The user's module.
        change: Adds or freezes parameters; called once.
        built: Whether the network is there already, as the caller sees: its ``configure_model`` may then be what shards
            it, and the change comes first.
    """
    if built or not is_overridden("configure_model", pl_module):
        change()
        return
    configure = pl_module.configure_model
    own = pl_module.__dict__.get("configure_model")

    @functools.wraps(configure)
    def configure_and_change() -> None:
        # a copy of the module must not change another one
        if own is None:
            leave_configure_model(pl_module)
        else:
            pl_module.__dict__["configure_model"] = own
        configure()
        change()

    pl_module.configure_model = configure_and_change  # type: ignore[method-assign]


def leave_configure_model(pl_module: LightningModule) -> None:
    """Give a module back the ``configure_model`` of its class, if a fit ended before it was called."""
    pl_module.__dict__.pop("configure_model", None)

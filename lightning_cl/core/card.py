"""What a method says of itself: the rows of ``lightning-cl methods`` and of the documentation."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MethodCard"]


@dataclass(frozen=True)
class MethodCard:
    """Facts about a method; a callback with a card in its class attribute ``card`` is listed as a method.

    Args:
        name: Name on the command line, such as ``"ewc"``.
        family: ``"regularisation"``, ``"replay"``, ...
        paper: Authors, year and identifier.
        needs: What it needs of the data or the module.
        state: What it keeps, in units of parameters or samples.
        strategies: Strategies it is tested under.
    """

    name: str
    family: str
    paper: str
    needs: str
    state: str
    strategies: str = "one device, ddp, fsdp2"

"""The table of methods."""

from __future__ import annotations

from importlib import import_module

from lightning_cl.core.card import MethodCard
from lightning_cl.core.events import ContinualCallback

__all__ = ["method_classes", "print_methods"]


import_module("lightning_cl.callbacks")  # which defines the methods


def method_classes() -> dict[str, type[ContinualCallback]]:
    """Return all methods by their names on the command line, sorted."""
    found: dict[str, type[ContinualCallback]] = {}
    waiting: list[type[ContinualCallback]] = [ContinualCallback]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        card: MethodCard | None = kind.__dict__.get("card")
        if card is not None:
            found[card.name] = kind
    return dict(sorted(found.items()))


def print_methods() -> None:
    """Print name, family, paper, needs, state and strategies of every method."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "class", "family", "paper", "needs", "state", "strategies", show_lines=True)
    for name, kind in method_classes().items():
        card: MethodCard = kind.__dict__["card"]
        table.add_row(name, kind.__name__, card.family, card.paper, card.needs, card.state, card.strategies)
    Console().print(table)

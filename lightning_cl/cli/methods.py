"""The table of methods."""

from __future__ import annotations

from importlib import import_module

from lightning_cl.adapters import SlicedAdapters
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard, methods_below
from lightning_cl.unlearning import ForgetLoss

__all__ = ["method_classes", "print_methods"]


import_module("lightning_cl.callbacks")  # which defines the methods


def method_classes() -> dict[str, type[ContinualCallback]]:
    """Return all methods by their names on the command line, sorted."""
    return methods_below(ContinualCallback)


def print_methods() -> None:
    """Print name, class, family, paper, needs, state and strategies of every method, one line each.

    The forget losses, which are the ``method`` of ``Unlearn``, come behind the callbacks, and last what is no part of a
    fit and runs from Python only.
    """
    rows = [("name", "class", "family", "paper", "needs", "state", "strategies")]
    losses: dict[str, type] = methods_below(ForgetLoss)  # type: ignore[type-abstract]
    for name, kind in [*method_classes().items(), *losses.items(), (SlicedAdapters.card.name, SlicedAdapters)]:
        card: MethodCard = kind.__dict__["card"]
        rows.append((name, kind.__name__, card.family, card.paper, card.needs, card.state, card.strategies))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

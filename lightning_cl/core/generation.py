"""What makes a module show what it writes."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

__all__ = ["GeneratesSamples"]


@runtime_checkable
class GeneratesSamples(Protocol):
    """A module whose texts after every task belong into the record of a run."""

    def generate_samples(self) -> dict[str, str]:
        """Return a continuation for each prompt, by prompt; called on all ranks at the same time."""

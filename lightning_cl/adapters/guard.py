"""Keeping what trains and what acts as it is, whatever PEFT is asked to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

from lightning_cl.adapters.slot import Slot

__all__ = ["SlotGuard"]

_METHODS = ("set_adapter", "set_requires_grad")


class SlotGuard:
    """Sets the flags of slots anew after every call of PEFT that changes them.

    PEFT makes all active adapters trainable in ``set_adapter`` and at the end of ``disable_adapter``, also in the
    middle of a step, and activates one adapter only where a name is given. The layers of slots get these methods as
    attributes of their own: flags are kept during a fit, and later too the present slot does not act without the past.

    Args:
        slots: The slots.
        trained: For each slot by name, the adapters with the names of their parameters that train, unless frozen.
    """

    def __init__(self, slots: Mapping[str, Slot], trained: Mapping[str, Mapping[str, Set[str]]]) -> None:
        self._slots = dict(slots)
        # what a user has frozen stays so
        self._attach({name: _thawed(slot, trained[name]) for name, slot in self._slots.items()})
        for slot in self._slots.values():
            slot.layer.set_adapter([slot.current, slot.past])

    def _attach(self, flags: Mapping[str, Mapping[str, Set[str]]]) -> None:
        for name, slot in self._slots.items():
            for method in _METHODS:
                setattr(slot.layer, method, partial(_guarded, slot, flags[name], method))

    def start_fit(self) -> None:
        """Keep the flags as they are now, after other callbacks have frozen what they freeze."""
        everything = {"lora_A", "lora_B", "mixing"}
        wanted = {name: {s.current: everything, s.past: everything} for name, s in self._slots.items()}
        self._attach({name: _thawed(slot, wanted[name]) for name, slot in self._slots.items()})

    def detach(self) -> None:
        """Let PEFT set flags again."""
        for slot in self._slots.values():
            slot.layer.__dict__.pop("set_requires_grad", None)
            slot.layer.set_adapter = partial(_guarded, slot, None, "set_adapter")

    def check(self) -> None:
        """Refuse layers that do not compute with their slots.

        Raises:
            ValueError: If other adapters are active, or they are switched off or merged.
        """
        for slot in self._slots.values():
            layer = slot.layer
            active, wanted = list(layer.active_adapters), [slot.current, slot.past]
            if active != wanted or layer.disable_adapters or layer.merged:
                state = "switched off" if layer.disable_adapters else "merged" if layer.merged else f"active: {active}"
                raise ValueError(
                    f"The adapters of {slot.name!r} are {state}, but training needs {wanted} active. Call"
                    f" `set_adapter({slot.current!r})`, `enable_adapter_layers()` or `unmerge_adapter()` on the model"
                    " after what you use other adapters for."
                )


def _thawed(slot: Slot, trained: Mapping[str, Set[str]]) -> dict[str, Set[str]]:
    """Return what trains of what may train."""
    return {
        adapter: {key for key, p in slot.parameters(adapter).items() if key in keys and p.requires_grad}
        for adapter, keys in trained.items()
    }


def _guarded(
    slot: Slot,
    trained: Mapping[str, Set[str]] | None,
    method: str,
    adapter_names: str | Sequence[str],
    *args: Any,
    **settings: Any,
) -> None:
    layer = slot.layer
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    if method == "set_adapter" and slot.current in names and slot.past not in names:
        names.append(slot.past)
    getattr(type(layer), method)(layer, names, *args, **settings)
    if trained is None:
        return
    for adapter in (slot.current, slot.past):
        for key, parameter in slot.parameters(adapter).items():
            parameter.requires_grad_(key in trained.get(adapter, ()))

"""Slots of LoRA as a plain loop."""

from __future__ import annotations

from contract import Row
from lightning_cl.adapters import AdapterSlots
from lora_loops import slots_loop
from toys import LoraToy

ROWS = {"adapter-slots": Row(AdapterSlots, {"capacity": 8}, slots_loop, tolerance=1e-5, toy=LoraToy)}

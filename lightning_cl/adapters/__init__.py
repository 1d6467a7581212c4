"""Adapters of PEFT on (quantized) base models: put in before sharding, learning task after task, exported."""

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.adapters.export import export
from lightning_cl.adapters.inflora import InfLoRA
from lightning_cl.adapters.lorafa import LoRAFA
from lightning_cl.adapters.olora import OLoRA
from lightning_cl.adapters.periodic_lora import PeriodicLoRA
from lightning_cl.adapters.slot import Slot, SlotFactor
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.adapters.starts import AdapterStart
from lightning_cl.core.adapters import adapters_disabled

__all__ = [
    "AdapterSlots",
    "AdapterStart",
    "InfLoRA",
    "LoRAFA",
    "OLoRA",
    "PeriodicLoRA",
    "Slot",
    "SlotFactor",
    "adapters_disabled",
    "add_adapters",
    "export",
]

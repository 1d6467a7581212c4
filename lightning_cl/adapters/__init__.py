"""Adapters of PEFT on (quantized) base models: put in before sharding, learning task after task, exported."""

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.adapters.block_expansion import BlockExpansion
from lightning_cl.adapters.blocks import insert_blocks, inserted_blocks
from lightning_cl.adapters.codyra import CoDyRA
from lightning_cl.adapters.color import CoLoR
from lightning_cl.adapters.curlora import CURLoRA
from lightning_cl.adapters.dynamic_conpet import DynamicConPET
from lightning_cl.adapters.export import export
from lightning_cl.adapters.growing_lora import GrowingLoRA
from lightning_cl.adapters.gs_lora import GSLoRA
from lightning_cl.adapters.inflora import InfLoRA
from lightning_cl.adapters.lorafa import LoRAFA
from lightning_cl.adapters.olora import OLoRA
from lightning_cl.adapters.periodic_lora import PeriodicLoRA
from lightning_cl.adapters.prompt_coda import CODAPrompt
from lightning_cl.adapters.prompt_dual import DualPrompt
from lightning_cl.adapters.prompt_l2p import L2P
from lightning_cl.adapters.prompt_progressive import ProgressivePrompts
from lightning_cl.adapters.prompt_s import SPrompts
from lightning_cl.adapters.sd_lora import SDLoRA
from lightning_cl.adapters.sliced import SlicedAdapters
from lightning_cl.adapters.slot import Slot, SlotFactor
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.adapters.starts import AdapterStart
from lightning_cl.adapters.static_conpet import StaticConPET
from lightning_cl.adapters.uld import LogitDifference, build_assistant
from lightning_cl.core.adapters import adapters_disabled

__all__ = [
    "L2P",
    "AdapterSlots",
    "AdapterStart",
    "BlockExpansion",
    "CODAPrompt",
    "CURLoRA",
    "CoDyRA",
    "CoLoR",
    "DualPrompt",
    "DynamicConPET",
    "GSLoRA",
    "GrowingLoRA",
    "InfLoRA",
    "LoRAFA",
    "LogitDifference",
    "OLoRA",
    "PeriodicLoRA",
    "ProgressivePrompts",
    "SDLoRA",
    "SPrompts",
    "SlicedAdapters",
    "Slot",
    "SlotFactor",
    "StaticConPET",
    "adapters_disabled",
    "add_adapters",
    "build_assistant",
    "export",
    "insert_blocks",
    "inserted_blocks",
]

"""Adapters of PEFT on (quantized) base models: put in before sharding, learning task after task, exported."""

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.adapters.export import export

__all__ = [
    "add_adapters",
    "export",
]

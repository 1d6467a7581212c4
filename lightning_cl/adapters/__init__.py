"""Adapters of PEFT on (quantized) base models: put in before sharding, exported from shards."""

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.adapters.export import export_adapters, export_merged

__all__ = ["add_adapters", "export_adapters", "export_merged"]

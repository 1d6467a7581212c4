"""Strategies: how a module is spread over ranks and nodes, and what a checkpoint of it holds."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_cl.strategies.fsdp2 import FSDP2Strategy

__all__ = ["FSDP2Strategy"]

# `Trainer(strategy="fsdp2")`; a module that is imported again registers its new class
StrategyRegistry.register("fsdp2", FSDP2Strategy, description=FSDP2Strategy.__doc__, override=True)

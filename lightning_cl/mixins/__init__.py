"""Mixins that change the module itself."""

from lightning_cl.mixins.masked_head import MaskedHead

__all__ = ["MaskedHead"]

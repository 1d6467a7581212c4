"""What changes the module itself: mixins, and layers that follow the tasks."""

from lightning_cl.mixins.incremental_head import IncrementalHead
from lightning_cl.mixins.masked_head import MaskedHead

__all__ = ["IncrementalHead", "MaskedHead"]

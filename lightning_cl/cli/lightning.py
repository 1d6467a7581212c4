"""The part of the command line that is Lightning's own."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

# imported so that a config can name these classes without their modules
import lightning_cl.callbacks
import lightning_cl.datamodules
import lightning_cl.modules
from lightning_cl.callbacks import TaskProgressBar

__all__ = ["run"]


def run(arguments: Sequence[str]) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with any module and any datamodule.

    The same config works in a LightningCLI script of the user's own that imports ``lightning_cl``.
    """
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"max_epochs": -1, "callbacks": [TaskProgressBar()]},
        args=list(arguments),
    )

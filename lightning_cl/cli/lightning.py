"""The part of the command line that is Lightning's own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from lightning_cl.callbacks import TaskProgressBar

__all__ = ["COMMANDS", "TaskCLI", "run"]

COMMANDS = ("fit", "validate", "test", "predict")

# a config may name the classes of imported packages without their modules
for _package in ("datamodules", "modules", "optim"):
    import_module(f"lightning_cl.{_package}")


class TaskCLI(LightningCLI):
    """Lightning's CLI with the task in the progress bar, unless the config brings a bar of its own."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--methods",
            type=dict[str, Any] | None,
            default=None,
            help="settings for `lightning-cl compare`; unused here",
        )

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "empty parameter list" not in str(error):
                raise
            raise ValueError(
                f"`optimizer` of the config is made before {type(self.model).__name__} has built its network. Name it"
                " in `model.init_args.optimizer`, or make it in the module's `configure_optimizers`."
            ) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand].trainer
        callbacks = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        callbacks = [callback for callback in callbacks if callback is not None]
        if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs.setdefault("callbacks", [*callbacks, TaskProgressBar()])
        return super().instantiate_trainer(**kwargs)


def run(arguments: Sequence[str], cli: type[TaskCLI] = TaskCLI) -> TaskCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with any module and any datamodule.

    The same config works in a LightningCLI script of the user's own that imports ``lightning_cl``.

    Args:
        arguments: The command and its options.
        cli: What does it.
    """
    # Lightning reads the command line itself, and starts the other ranks by it
    sys.argv = [sys.argv[0], *arguments]
    with warnings.catch_warnings():
        # Lightning 2.6 builds its parser in a way that jsonargparse 4.50 calls old
        warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
        return cli(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={"max_epochs": -1},
            parser_kwargs={"exit_on_error": False, **{name: {"exit_on_error": False} for name in COMMANDS}},
        )

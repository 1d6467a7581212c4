"""What trains must be stepped by an optimizer and reduced over the ranks: neither DDP nor FSDP2 says if it is not."""

from __future__ import annotations

from collections.abc import Set

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["check_still_trainable", "check_trainable"]

_WAY_OUT = (
    "What will ever train must be there, and trainable, when the strategy wraps the module: add and thaw it in the"
    " module's `__init__` or `configure_model`, or in the `setup` of a callback."
)


def check_trainable(trainer: Trainer, pl_module: LightningModule) -> set[str]:
    """Return the names of the trainable parameters after a look at who steps and who reduces them.

    To call from ``on_train_start``.

    Raises:
        ValueError: If a trainable parameter is in no optimizer, or if the strategy does not synchronise its gradient.
    """
    trainable = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
    stepped = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if idle := [name for name, p in trainable.items() if id(p) not in stepped]:
        raise ValueError(
            f"{idle[:3]} of {type(pl_module).__name__} are trainable, but no optimizer steps them. Give all that"
            " `requires_grad` to the optimizers of `configure_optimizers`, or freeze it before the fit."
        )
    wrapped = trainer.strategy.model
    unreduced: list[str] = []
    if isinstance(wrapped, DistributedDataParallel):
        known = {id(parameter) for parameter in wrapped._module_parameters}
        unreduced = [name for name, p in trainable.items() if id(p) not in known]
        # DDP does not say which parameters trained when it was built, only how many
        thawed = len(trainable) - wrapped._get_ddp_logging_data()["num_parameter_tensors"]
        if not unreduced and thawed > 0:
            raise ValueError(f"{thawed} of {sorted(trainable)[:4]}... became trainable after DDP was built. {_WAY_OUT}")
    elif any(isinstance(part, FSDPModule) for part in pl_module.modules()):
        unreduced = [name for name, p in trainable.items() if not isinstance(p, DTensor)]
    if unreduced:
        raise ValueError(f"No rank hears of the gradients of {unreduced[:3]} on the others. {_WAY_OUT}")
    return set(trainable)


def check_still_trainable(pl_module: nn.Module, names: Set[str]) -> None:
    """Refuse parameters that train and did not when the fit began.

    Args:
        pl_module: The user's module.
        names: What :func:`check_trainable` returned.

    Raises:
        ValueError: If there are any.
    """
    late = {name for name, p in pl_module.named_parameters() if p.requires_grad} - names
    if late:
        raise ValueError(
            f"{sorted(late)[:3]} became trainable after the fit began: over several ranks they would train"
            f" unsynchronised. {_WAY_OUT}"
        )

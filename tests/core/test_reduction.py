"""What trains is stepped and reduced, or refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_cl.core.reduction import check_still_trainable, check_trainable
from ranks import exit_codes
from toys import ToyModule, fit_stream, toy_stream, trainer


class Check(Callback):
    """Looks before the first step, after it has changed the module."""

    def __init__(self, change: str = "nothing") -> None:
        self.change = change
        self.names: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.change == "thaw":
            pl_module.model[0].bias.requires_grad_(True)
        if self.change == "add":
            pl_module.model[0].extra = torch.nn.Parameter(torch.zeros(2))
            trainer.optimizers[0].add_param_group({"params": [pl_module.model[0].extra]})
        self.names = check_trainable(trainer, pl_module)


class Frozen(ToyModule):
    """A module with a frozen bias that is in the optimizer all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.model[0].bias.requires_grad_(False)


def test_names_what_trains(tmp_path: Path) -> None:
    """All that has `requires_grad`, and what comes later is refused."""
    check, module = Check(), Frozen()
    fit_stream(tmp_path, [check], module=module)
    assert check.names == {"model.0.weight", "model.3.weight", "model.3.bias"}
    check_still_trainable(module, check.names)
    module.model[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.0.bias.*became trainable after the fit began"):
        check_still_trainable(module, check.names)


def test_what_no_optimizer_steps_is_refused(tmp_path: Path) -> None:
    """It would never learn."""

    class Forgetful(ToyModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model[3].parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"model.0.bias.*no optimizer steps them"):
        fit_stream(tmp_path, [Check()], module=Forgetful())


def fit_on_two(root: Path, change: str, strategy: Any) -> None:
    """Fit on two ranks; leave what was refused."""
    from lightning_cl import FSDP2Strategy

    built = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    try:
        trainer(root, [Check(change)], strategy=built, devices=2).fit(Frozen(), datamodule=toy_stream(batch_size=4))
    except ValueError as error:
        (root / "error.txt").write_text(str(error))
        raise


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "change", "message"),
    [
        ("ddp", "thaw", "became trainable after DDP was built"),
        ("ddp", "add", "No rank hears of the gradients of ['model.0.extra']"),
        ("fsdp2", "add", "No rank hears of the gradients of ['model.0.extra']"),
    ],
)
def test_what_the_strategy_does_not_reduce_is_refused(strategy: str, change: str, message: str, tmp_path: Path) -> None:
    """DDP and FSDP2 say nothing, and the ranks drift apart."""
    assert exit_codes(functools.partial(fit_on_two, tmp_path, change, strategy), world_size=2) == [1, 1]
    assert message in (tmp_path / "error.txt").read_text()

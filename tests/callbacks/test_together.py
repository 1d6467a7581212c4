"""EWC and replay together, with the rest of a real run: schedules, precisions, accumulation, and resumes in task 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from lightning_cl import EWC, ComponentClip, ExperienceReplay, GradientMask
from toys import ToyModule, fit_stream, toy_data, toy_stream
from users import UserModule


def both() -> list[Callback]:
    """The two methods."""
    return [EWC(20.0, mode="separate"), ExperienceReplay(12)]


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


class Scheduled(ToyModule):
    """Adam with a schedule, as `interval` says."""

    interval = "none"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.03)
        if self.interval == "none":
            return optimizer
        if self.interval == "epoch":
            return [optimizer], [StepLR(optimizer, step_size=1, gamma=0.5)]
        # as long as the whole stream, which the Trainer knows
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EachEpoch(Scheduled):
    interval = "epoch"


class EachStep(Scheduled):
    interval = "step"


def fp16() -> dict[str, Any]:
    """What a GPU makes of `precision="16-mixed"`: autocast and a scaler of the loss."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=3))]}


RUNS: dict[str, tuple[type[ToyModule], Any]] = {
    "schedule by epoch": (EachEpoch, dict),
    "schedule by step": (EachStep, dict),
    "accumulation": (EachStep, lambda: {"accumulate_grad_batches": 2}),
    "clipping": (Scheduled, lambda: {"gradient_clip_val": 0.1}),
    "bf16-mixed": (Scheduled, lambda: {"precision": "bf16-mixed"}),
    "bf16-true": (Scheduled, lambda: {"precision": "bf16-true"}),
    "fp16": (Scheduled, fp16),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumes_in_the_second_task_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """Optimizer, schedule, scaler, memory and importances go on where they were; the methods do something."""
    kind, settings = RUNS[name]
    step = 6 if name == "accumulation" else 8
    straight = fit_stream(tmp_path, [*both(), saver(tmp_path)], module=kind(dropout=0.2), **settings())
    torch.manual_seed(77)
    resumed = fit_stream(
        tmp_path,
        [*both(), saver(tmp_path / "on")],
        module=kind(dropout=0.2),
        ckpt_path=tmp_path / f"step={step}.ckpt",
        **settings(),
    )
    assert torch.equal(resumed, straight)
    assert not torch.equal(straight, fit_stream(tmp_path, [], module=kind(dropout=0.2), **settings()))


def test_order_of_the_two_does_not_matter(tmp_path: Path) -> None:
    """Replay changes batches, EWC gradients."""
    first, second = both()
    backwards = both()[::-1]
    assert torch.equal(fit_stream(tmp_path, [first, second]), fit_stream(tmp_path, backwards))


class Together(UserModule):
    """Steps its optimizers itself, accumulates two batches, clips and toggles."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def build(self) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            with optimizer.toggle_model(sync_grad=True):
                self.manual_backward(cross_entropy(self(batch[0]), batch[1]) / 2)
                if batch_idx % 2:
                    self.clip_gradients(optimizer, 0.5, "norm")
                    optimizer.step()
                    optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(layer.parameters(), lr=0.02) for layer in (self.model[0], self.model[2])]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_manual_optimization_resumes_in_the_second_task(tmp_path: Path) -> None:
    """With two optimizers, which count two steps for each pair of batches."""
    straight = fit_stream(tmp_path, [*both(), saver(tmp_path)], module=Together(), stream=None)
    assert (straight - fit_stream(tmp_path, [], module=Together())).abs().max() > 1e-2
    last = max(int(path.stem.partition("=")[2]) for path in tmp_path.glob("step=*.ckpt"))
    for step in range(last // 2 + 1, last):
        path = tmp_path / f"step={step}.ckpt"
        if path.exists():
            resumed = fit_stream(tmp_path, [*both(), saver(tmp_path / "on")], module=Together(), ckpt_path=path)
            assert torch.equal(resumed, straight)
            return
    raise AssertionError("no checkpoint inside the second task")


def test_both_hold_the_first_task(tmp_path: Path) -> None:
    """What they are for: less of the first task is lost than by plain training, by each and least by both."""
    inputs, labels = toy_data().tensors
    old = labels < 2

    def old_loss(callbacks: list[Callback]) -> float:
        module = ToyModule(learning_rate=0.05)
        fit_stream(tmp_path, callbacks, module=module, stream=toy_stream(epochs_per_task=4))
        return cross_entropy(module(inputs[old]), labels[old]).item()

    nothing, together = old_loss([]), old_loss(both())
    for method in both():
        assert together < old_loss([method]) < 0.8 * nothing


def test_a_mask_comes_before_clipping_in_either_order(tmp_path: Path) -> None:
    """What may not move does not count in the norm."""
    found = [
        fit_stream(tmp_path, methods)
        for methods in (
            [GradientMask(0.3), ComponentClip(0.05)],
            [ComponentClip(0.05), GradientMask(0.3)],
        )
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], fit_stream(tmp_path, [GradientMask(0.3)]))

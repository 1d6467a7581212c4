"""Chains of LoRA within a task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl import AdapterSlots, PeriodicLoRA, SpikeMonitor
from lightning_cl.adapters import AdapterStart
from toys import LoraToy, fit_stream, toy_stream, weights

LAYERS = ("model.base_model.model.0", "model.base_model.model.3")


class Watch(Callback):
    """Notes what it finds at the start of each batch.

    Args:
        look: Called with the Trainer and the module.
    """

    def __init__(self, look: Callable[[Any, LightningModule], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.seen.append(self.look(trainer, pl_module))


def looked_at(
    tmp_path: Path, method: AdapterSlots, look: Callable[..., Any], after: Any = (), **settings: Any
) -> tuple[list[Any], ...]:
    """What is there before and after the method's turn, at each batch of a stream of six steps a task."""
    before, last = Watch(look), Watch(look)
    fit_stream(tmp_path, [before, method, last, *after], **({"module": LoraToy(learning_rate=0.02)} | settings))
    return before.seen, last.seen


def restarts(trainer: Any, pl_module: LightningModule) -> int:
    """The count of the task."""
    return next(c.restarts for c in trainer.callbacks if isinstance(c, PeriodicLoRA))


def test_restarts_after_every_few_steps_of_a_task(tmp_path: Path) -> None:
    """Counted anew in each task, before the step that follows; none after a task's last."""
    assert looked_at(tmp_path, PeriodicLoRA(2), restarts)[1] == [0, 0, 1, 1, 2, 2] * 2
    assert looked_at(tmp_path, PeriodicLoRA(4), restarts)[1] == [0, 0, 0, 0, 1, 1] * 2
    micro = {"stream": toy_stream(batch_size=4), "accumulate_grad_batches": 2}
    assert looked_at(tmp_path, PeriodicLoRA(4), restarts, **micro)[1] == [0] * 8 + [1] * 4 + [0] * 8 + [1] * 4


class Manual(LoraToy):
    """Steps its two optimizers itself, that of B twice."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.01)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        downs, ups = self.optimizers()  # type: ignore[misc]
        for stepped in ([downs, ups], [ups]):
            for optimizer in (downs, ups):
                optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            for optimizer in stepped:
                optimizer.step()

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = ([p for name, p in named if part in name] for part in ("lora_A", "lora_B"))
        return [torch.optim.SGD(group, lr=self.learning_rate) for group in groups]


def test_steps_of_the_first_optimizer_count(tmp_path: Path) -> None:
    """Under manual optimization too."""
    assert looked_at(tmp_path, PeriodicLoRA(2), restarts, module=Manual())[1] == [0, 0, 1, 1, 2, 2] * 2


@pytest.mark.parametrize("momentum", [1.0, 0.3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_restart_changes_no_weight(momentum: float, precision: Any, tmp_path: Path) -> None:
    """What moves and what stays add up to what was there."""
    method = PeriodicLoRA(2, momentum=momentum, capacity=12)
    before, after = looked_at(tmp_path, method, lambda _, module: weights(module), precision=precision)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)
    assert (after[-1] - after[0]).abs().max() > 1e-2


def factors(trainer: Any, pl_module: LightningModule) -> tuple[Tensor, ...]:
    """Of the first layer, present and past."""
    slots: AdapterSlots = next(c for c in trainer.callbacks if isinstance(c, AdapterSlots))
    slot = slots.slots[LAYERS[0]]
    return *slot.factors(slot.current), *slot.factors(slot.past)


def test_momentum_is_the_share_that_moves(tmp_path: Path) -> None:
    """A stays, B keeps the rest."""
    before, after = looked_at(tmp_path, PeriodicLoRA(2, momentum=0.3, capacity=12), factors)
    (down, up, *_), (new_down, new_up, past_down, past_up) = before[2], after[2]
    assert torch.equal(new_down, down)
    torch.testing.assert_close(new_up, 0.7 * up)
    torch.testing.assert_close(past_up[:, :2], 0.3 * up)
    assert torch.equal(past_down[:2], down)
    assert not past_up[:, 2:].any()


def test_without_momentum_the_adapter_is_drawn_anew(tmp_path: Path) -> None:
    """Each link of each chain from a seed of its own."""
    _, after = looked_at(tmp_path, PeriodicLoRA(2, capacity=12), factors)
    starts = [after[row] for row in range(0, 12, 2)]
    assert not any(up.any() for _, up, *_ in starts)
    downs = [down for down, *_ in starts]
    assert all((a - b).abs().max() > 0.1 for row, a in enumerate(downs) for b in downs[:row])


def test_the_optimizer_begins_anew(tmp_path: Path) -> None:
    """Moments and their count; fused too."""

    def moments(trainer: Any, pl_module: LightningModule) -> tuple[float, float]:
        states = trainer.optimizers[0].state.values()
        sums = [(float(s["step"]), float(s["exp_avg_sq"].abs().sum())) for s in states]
        return max(sums, default=(0.0, 0.0))

    module = LoraToy(learning_rate=0.01, optimizer=partial(torch.optim.AdamW, fused=True))
    before, after = looked_at(tmp_path, PeriodicLoRA(3), moments, module=module)
    assert [step for step, _ in before] == [0, 1, 2, 3, 1, 2] * 2
    assert [step for step, _ in after] == [0, 1, 2, 0, 1, 2] * 2
    assert [moment > 0 for _, moment in after] == [False, True, True, False, True, True] * 2


def test_a_chain_is_one_segment(tmp_path: Path) -> None:
    """Of as many ranks as it has links; one that does not fit is approximated."""
    method = PeriodicLoRA(2, capacity=12)
    fit_stream(tmp_path, [method], module=LoraToy(learning_rate=0.02))
    assert method.segments == {layer: [0, 6, 12] for layer in LAYERS}
    assert not method.errors
    short = PeriodicLoRA(2, capacity=5)
    fit_stream(tmp_path, [short], module=LoraToy(learning_rate=0.02))
    assert short.segments == {layer: [0, 5] for layer in LAYERS}
    assert set(short.errors) == set(LAYERS)


def test_a_period_of_a_task_is_the_slots_alone(tmp_path: Path) -> None:
    """The boundary restarts, and no empty adapter is folded after it."""
    periodic, plain = PeriodicLoRA(6), AdapterSlots()
    ours = fit_stream(tmp_path, [periodic], module=LoraToy())
    assert torch.equal(ours, fit_stream(tmp_path, [plain], module=LoraToy()))
    assert periodic.segments == plain.segments == {layer: [0, 2, 4] for layer in LAYERS}


@pytest.mark.parametrize("momentum", [1.0, 0.3])
def test_resumes_to_the_same_bits(momentum: float, tmp_path: Path) -> None:
    """Also where the next batch begins with a restart (step 8), and inside a chain (9)."""

    def run(ckpt_path: Path | None = None) -> Tensor:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [PeriodicLoRA(2, momentum=momentum), saver]
        return fit_stream(tmp_path, callbacks, module=LoraToy(dropout=0.3), ckpt_path=ckpt_path)

    straight = run()
    for step in (8, 9):
        assert torch.equal(run(tmp_path / f"step={step}.ckpt"), straight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "`every`"),
        ({"every": 2, "momentum": 0.0}, "`momentum`"),
        ({"every": 2, "momentum": 1.1}, "`momentum`"),
        ({"every": 2, "capacity": 0}, "`capacity`"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """When it is built."""
    with pytest.raises(ValueError, match=message):
        PeriodicLoRA(**settings)


class Spoil(LoraToy):
    """One batch of the task has a loss that is not finite; the step is left out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_step == 4 else loss


@pytest.mark.filterwarnings("ignore:`SpikeMonitor`")
@pytest.mark.parametrize("every", [4, 3])
def test_a_rollback_counts_nothing_twice(every: int, tmp_path: Path) -> None:
    """What a restart has folded stays folded once: an older snapshot is forgotten."""
    monitor = SpikeMonitor(on_loss_spike="rollback", snapshot_every=100)
    before, _ = looked_at(
        tmp_path,
        PeriodicLoRA(every, capacity=12),
        lambda _, m: weights(m),
        module=Spoil(learning_rate=0.02),
        after=[monitor],
    )
    assert [event["step"] for event in monitor.events] == [4]
    # right after a restart there is nothing to return to; one step later it is what the restart left
    assert monitor.events[0]["action"] == ("skip" if every == 4 else "rollback")
    torch.testing.assert_close(before[5], before[4] if every == 4 else before[3], rtol=0, atol=1e-6)


def test_goes_with_a_start_for_each_task(tmp_path: Path) -> None:
    """Rows of a task's start are orthonormal, those of a restart are random."""
    _, after = looked_at(tmp_path, PeriodicLoRA(3, capacity=12), factors, after=[AdapterStart("orthogonal")])
    for step, orthonormal in ((0, True), (3, False), (6, True), (9, False)):
        down = after[step][0]
        assert torch.allclose(down @ down.mT, torch.eye(2), atol=1e-5) == orthonormal

"""LoRA-FA: the factor A is frozen, and the factors B of all tasks add up."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_cl import AdapterSlots, LoRAFA
from lightning_cl.adapters import Slot
from lightning_cl.datamodules import ClassIncremental
from toys import LoraToy, fit_stream, toy_loaders, toy_stream, trainer, weights

LAYERS = ("model.base_model.model.0", "model.base_model.model.3")


class Tasks(Callback):
    """Notes the factors of the first layer at the end of every task, and all weights around what happens there."""

    def __init__(self) -> None:
        self.factors: list[tuple[Tensor, Tensor]] = []
        self.past: list[tuple[Tensor, Tensor]] = []
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        # the task of the next batch has begun when it starts
        self.last = self.slot(trainer).factors("default"), weights(pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.factors.append(self.last[0])
        self.before.append(self.last[1])

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.past.append(self.slot(trainer).factors("past"))
            self.after.append(weights(pl_module))

    @staticmethod
    def slot(trainer: Any) -> Slot:
        slots: AdapterSlots = next(c for c in trainer.callbacks if isinstance(c, AdapterSlots))
        return slots.slots[LAYERS[0]]


def followed(tmp_path: Path, method: AdapterSlots, tasks: int = 4, **settings: Any) -> Tasks:
    """Learn a stream of one class for each task, an epoch each."""
    noted = Tasks()
    stream = toy_stream(scenario=ClassIncremental(n_tasks=tasks), epochs_per_task=1, batch_size=4)
    module = LoraToy(**settings)
    fit_stream(tmp_path, [method, noted], module=module, stream=stream)
    return noted


def test_tasks_share_one_orthonormal_factor(tmp_path: Path) -> None:
    """Frozen to the bit, and drawn by the seed."""
    downs = [down for down, _ in followed(tmp_path, LoRAFA()).factors]
    torch.testing.assert_close(downs[0] @ downs[0].mT, torch.eye(2), rtol=0, atol=1e-6)
    assert all(torch.equal(down, downs[0]) for down in downs)
    other = followed(tmp_path, LoRAFA(seed=1)).factors[0][0]
    assert (other - downs[0]).abs().max() > 0.1


def test_factors_b_add_up(tmp_path: Path) -> None:
    """The sum has the rank of one task, and no boundary changes a weight by more than a rounding error."""
    noted, method = Tasks(), LoRAFA()
    stream = toy_stream(scenario=ClassIncremental(n_tasks=4), epochs_per_task=1, batch_size=4)
    fit_stream(tmp_path, [method, noted], module=LoraToy(learning_rate=0.02), stream=stream)
    total = torch.zeros(8, 2)
    for (down, up), (past_down, past_up) in zip(noted.factors, noted.past, strict=True):
        assert up.any()
        total = total + up
        assert torch.equal(past_up, total)
        assert torch.equal(past_down, down)
    assert method.segments == {layer: [0, 2] for layer in LAYERS}
    for before, after in zip(noted.before, noted.after, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", ["orthogonal", "kaiming"])
def test_apart_every_task_draws_its_own(init: Any, tmp_path: Path) -> None:
    """They lie beside one another."""
    method = LoRAFA(init, shared=False, capacity=8)
    noted = followed(tmp_path, method, learning_rate=0.02)
    downs = [down for down, _ in noted.factors]
    assert all((down - downs[0]).abs().max() > 0.1 for down in downs[1:])
    orthonormal = [torch.allclose(down @ down.mT, torch.eye(2), atol=1e-6) for down in downs]
    assert orthonormal == [init == "orthogonal"] * 4
    assert method.segments[LAYERS[0]] == [0, 2, 4, 6, 8]
    assert torch.equal(noted.past[-1][0], torch.cat(downs))


def test_kaiming_goes_on_with_the_adapter_of_the_module(tmp_path: Path) -> None:
    """Trained or not: its A stays for all tasks, and its B is where the first begins."""
    module = LoraToy(learning_rate=0.0)
    layer = module.get_submodule(LAYERS[0])
    nn.init.ones_(layer.lora_B["default"].weight)
    before, down = weights(module), layer.lora_A["default"].weight.detach().clone()
    noted = Tasks()
    after = fit_stream(tmp_path, [LoRAFA("kaiming"), noted], module=module)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert torch.equal(noted.factors[0][0], down)
    assert torch.equal(noted.factors[-1][0], down)


class Careless(LoraToy):
    """Calls what thaws adapters in PEFT, in every step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad(), self.model.disable_adapter():
            self(batch[0])
        self.model.set_adapter("default")
        return loss


OPTIMIZERS = {
    "sgd": None,
    "decay": partial(torch.optim.AdamW, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stays_frozen_whatever_peft_is_asked(name: str, tmp_path: Path) -> None:
    """Each of its calls makes active adapters trainable again; the run is that without them."""

    class Everything(Careless):
        """Gives all its parameters to the optimizer."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            kind = OPTIMIZERS[name] or partial(torch.optim.SGD, momentum=0.9)
            return kind(self.parameters(), lr=0.05)

    class Trained(Callback):
        """Notes what has a gradient before a step."""

        names: set[str] = set()  # noqa: RUF012

        def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
            self.names = {name for name, p in pl_module.named_parameters() if p.requires_grad or p.grad is not None}

    trained = Trained()
    settings = {"learning_rate": 0.05, "optimizer": OPTIMIZERS[name]}
    careless = fit_stream(tmp_path, [LoRAFA(), trained], module=Everything())
    assert trained.names == {f"{layer}.lora_B.default.weight" for layer in LAYERS}
    assert torch.equal(careless, fit_stream(tmp_path, [LoRAFA()], module=LoraToy(**settings)))


@pytest.mark.parametrize(("method", "keeps"), [(LoRAFA, False), (AdapterSlots, True)])
def test_a_layer_does_not_keep_its_input(method: type[AdapterSlots], keeps: bool, tmp_path: Path) -> None:
    """For the backward pass r numbers for each token are enough."""

    class Kept(Callback):
        """Looks for the input among what a layer saves."""

        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            inputs = torch.randn(5, 6, requires_grad=True)
            saved: list[Tensor] = []
            pack = saved.append
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: pack(tensor) or tensor, lambda tensor: tensor):
                pl_module.get_submodule(LAYERS[0])(inputs)
            self.found = any(tensor.data_ptr() == inputs.data_ptr() for tensor in saved)

    kept, data = Kept(), toy_loaders()[0]
    trainer(tmp_path, [method(), kept], max_epochs=1).fit(LoraToy(), data, data)
    assert kept.found == keeps


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """Before the first step."""
    with pytest.raises(ValueError, match="`init` must be one of"):
        LoRAFA("normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`capacity=8` belongs to `shared=False`"):
        LoRAFA(capacity=8)
    with pytest.raises(ValueError, match="`capacity`"):
        LoRAFA(shared=False, capacity=0)
    module = LoraToy()
    nn.init.ones_(module.get_submodule(LAYERS[1]).lora_B["default"].weight)
    with pytest.raises(ValueError, match="is trained already"):
        fit_stream(tmp_path, [LoRAFA()], module=module)
    with pytest.raises(ValueError, match="has rank 7 on 6 inputs"):
        fit_stream(tmp_path, [LoRAFA()], module=_of_rank(7))
    fit_stream(tmp_path, [LoRAFA("kaiming")], module=_of_rank(7))


def _of_rank(rank: int) -> LoraToy:
    from peft import LoraConfig, get_peft_model

    module = LoraToy(learning_rate=0.001)
    module.model = get_peft_model(module.model.unload(), LoraConfig(r=rank, lora_alpha=4, target_modules=["0", "3"]))
    return module


def test_layers_of_unequal_rank(tmp_path: Path) -> None:
    """The past slots have the largest; the rest of a smaller one stays zero, and no boundary changes a weight."""
    from peft import LoraConfig, get_peft_model

    module, noted, method = LoraToy(learning_rate=0.02), Tasks(), LoRAFA()
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "3"], rank_pattern={"0": 2})
    module.model = get_peft_model(module.model.unload(), config)
    fit_stream(tmp_path, [method, noted], module=module)
    assert method.segments == {LAYERS[0]: [0, 2], LAYERS[1]: [0, 4]}
    # two epochs a task
    past_down, past_up = noted.past[-1]
    assert past_down.shape[0] == 4
    assert torch.equal(past_up[:, :2], noted.factors[1][1] + noted.factors[3][1])
    assert not past_up[:, 2:].any()
    for before, after in zip(noted.before[1::2], noted.after, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)

"""InfLoRA in fits: what may move, what the memory holds, and what is refused."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from forgetting import Serves, forgetting_stream
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.adapters import InfLoRA
from toys import LoraToy, fit_stream, toy_data, toy_loaders, toy_stream, trainer

# the toy network is so narrow that two tasks may fill it
fills = pytest.mark.filterwarnings("ignore:Old inputs span all dimensions")

FIRST, SECOND = "model.base_model.model.0", "model.base_model.model.3"


def inputs_of(task):
    """The samples of a task of the toy stream."""
    inputs, labels = toy_data().tensors
    return inputs[torch.isin(labels, torch.tensor([2 * task, 2 * task + 1]))]


def layer(module):
    """The first layer with its adapters."""
    return module.model.base_model.model[0]


def fit(root, method, module, loader):
    """One fit of one epoch, for one task."""
    trainer(root, [method], max_epochs=1).fit(module, loader, loader)


@fills
def test_outputs_on_old_inputs_stay(tmp_path):
    """With a threshold of 1 on a part of the dimensions; without the memory they move."""
    inputs, labels = toy_data().tensors
    # the first task uses half of the features
    old = torch.cat([inputs[:, :3], torch.zeros(48, 3)], 1)
    loaders = [DataLoader(TensorDataset(x, labels), batch_size=8) for x in (old, inputs)]

    def changes(method):
        module = LoraToy()
        fit(tmp_path, method, module, loaders[0])
        share, before = method.used()[FIRST], [layer(module)(x) for x in (old, inputs)]
        fit(tmp_path, method, module, loaders[1])
        after = [layer(module)(x) for x in (old, inputs)]
        return share, *(float((y - x).detach().abs().max()) for x, y in zip(before, after, strict=True))

    share, on_old, on_new = changes(InfLoRA(threshold=1.0, capacity=8))
    assert share == 0.5
    assert on_old < 1e-5
    assert on_new > 0.1
    assert changes(InfLoRA(threshold=1e-9, final_threshold=1e-9, capacity=8))[1] > 0.1


@fills
def test_only_b_trains_and_a_is_orthonormal(tmp_path):
    """In every step of both tasks, whatever PEFT is asked to do."""
    seen = []

    class Watching(LoraToy):
        def training_step(self, batch, batch_idx):
            lora = layer(self)
            with self.model.disable_adapter():
                pass
            flags = [lora.lora_A["default"].weight.requires_grad, lora.lora_B["default"].weight.requires_grad]
            if self.training:
                seen.append((flags, lora.lora_A["default"].weight.detach().clone()))
            return super().training_step(batch, batch_idx)

    fit_stream(tmp_path, [InfLoRA(capacity=8)], module=Watching())
    assert all(flags == [False, True] for flags, _ in seen)
    for _, down in seen:
        torch.testing.assert_close(down @ down.T, torch.eye(2))
    # one for each of the two tasks
    assert len({tuple(down.flatten().tolist()) for _, down in seen}) == 2


@fills
def test_the_memory_is_kept_as_the_smaller_of_two(tmp_path):
    """All six inputs at a threshold of 1 leave a complement of no columns, and the layer learns nothing more."""
    method, module = InfLoRA(threshold=1.0, capacity=8), LoraToy()
    loaders = toy_loaders()
    fit(tmp_path, method, module, loaders[0])
    assert method.memory[FIRST].complement
    assert method.memory[FIRST].matrix.shape == (1, 6, 0)
    before = layer(module)(inputs_of(1))
    fit(tmp_path, method, module, loaders[1])
    assert torch.equal(layer(module)(inputs_of(1)), before)


def test_a_full_layer_is_told_once(tmp_path):
    """When the memory has all dimensions."""
    method = InfLoRA(threshold=1.0, capacity=8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit_stream(tmp_path, [method], module=LoraToy())
    full = [str(warning.message) for warning in told if "span all dimensions" in str(warning.message)]
    assert len(full) == 1
    assert f"['{FIRST}']" in full[0]
    assert "learn nothing" in full[0]


def test_the_threshold_follows_the_stream(tmp_path):
    """After the first of two tasks the memory holds the first threshold's share, after the second the middle's."""
    memory = {}
    for final in (0.75, 1.0):
        method = InfLoRA(threshold=0.75, final_threshold=final, capacity=8)
        fit_stream(tmp_path, [method], module=LoraToy())
        memory[final] = method.memory[FIRST].bases()[0]
    x = inputs_of(1).double()
    held = {final: float((x @ basis).square().sum() / x.square().sum()) for final, basis in memory.items()}
    assert 0.75 < held[0.75] < 0.875 < held[1.0]
    assert memory[1.0].shape[1] == memory[0.75].shape[1] + 1


def test_a_request_is_no_step_of_the_schedule(tmp_path):
    """Of four tasks to learn the third has half the rise, though a request was served before it and renewed all."""
    seen = []

    class Notes(InfLoRA):
        def _remember(self, trainer, pl_module, threshold, sample_ids=None):
            seen.append(threshold)
            super()._remember(trainer, pl_module, threshold, sample_ids)

    method = Notes(threshold=0.5, final_threshold=0.9, capacity=8)
    fit_stream(tmp_path, [method, Serves()], module=LoraToy(), stream=forgetting_stream())
    assert seen == pytest.approx([0.5, 0.6, 0.6, 0.7, 0.8])


@fills
def test_accumulation_equals_larger_batches(tmp_path):
    """Two batches of four are one of eight."""
    whole = fit_stream(tmp_path, [InfLoRA(capacity=8)], module=LoraToy())
    parts = toy_stream(batch_size=4)
    found = fit_stream(tmp_path, [InfLoRA(capacity=8)], module=LoraToy(), stream=parts, accumulate_grad_batches=2)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"gradient_clip_val": 0.1}, None),
        ({"precision": "bf16-mixed"}, partial(torch.optim.AdamW, fused=True, weight_decay=0.1)),
        ({"accumulate_grad_batches": 2}, torch.optim.AdamW),
    ],
    ids=["clipped", "half precision, fused", "accumulated"],
)
def test_old_directions_stay_out_of_every_update(settings, optimizer, tmp_path):
    """Whatever clips, accumulates, rounds or decays."""
    module, first = LoraToy(optimizer=optimizer), {}

    class Remember(InfLoRA):
        def on_task_start(self, trainer, pl_module, task):
            super().on_task_start(trainer, pl_module, task)
            if task.index == 1:
                first["memory"] = self.memory[FIRST].bases()[0].float()
                first["a"] = layer(pl_module).lora_A["default"].weight.detach().clone()

    method = Remember(threshold=0.9, capacity=8)
    fit_stream(tmp_path, [method], module=module, **settings)
    past = layer(module).lora_A["past"].weight[2:4]
    torch.testing.assert_close(past, first["a"])
    assert first["memory"].shape[1] > 0
    assert (past @ first["memory"]).abs().max() < 1e-6
    assert layer(module).lora_B["past"].weight[:, 2:4].abs().max() > 1e-4


def test_an_adapter_that_was_trained_is_refused(tmp_path):
    """Its A would be replaced, and what it learned lost."""
    module = LoraToy()
    nn.init.ones_(layer(module).lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"`InfLoRA`.*'default' of 'model.base_model.model.0'.*has been trained"):
        fit_stream(tmp_path, [InfLoRA()], module=module)


def test_unknown_numbers_of_tasks_are_refused(tmp_path):
    """With one fit for each task, unless the thresholds are equal."""
    with pytest.raises(ValueError, match=r"from 0.95 to 1.0.*give `n_tasks`"):
        fit(tmp_path, InfLoRA(), LoraToy(), toy_loaders()[0])
    fit(tmp_path, InfLoRA(final_threshold=0.95), LoraToy(), toy_loaders()[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "`threshold` must be above 0"),
        ({"threshold": 1.1}, "`threshold` must be above 0 and at most 1, got 1.1"),
        ({"threshold": 0.9, "final_threshold": 0.8}, "`final_threshold` must be from `threshold=0.9` to 1, got 0.8"),
        ({"final_threshold": 1.1}, "`final_threshold` must be"),
        ({"n_tasks": 0}, "`n_tasks` must be"),
        ({"n_samples": 0}, "`n_samples` must be"),
        ({"capacity": 0}, "`capacity` must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    """When the callback is made."""
    with pytest.raises(ValueError, match=message):
        InfLoRA(**settings)


def test_another_model_is_refused(tmp_path):
    """A memory of other inputs says nothing about this one's."""
    method = InfLoRA(final_threshold=0.95)
    fit(tmp_path, method, LoraToy(), toy_loaders()[0])
    method.memory[FIRST] = method.memory[SECOND]
    with pytest.raises(ValueError, match=r"a memory of 8 features.*model.0', which has 6"):
        fit(tmp_path, method, LoraToy(), toy_loaders()[1])
    del method.memory[FIRST]
    with pytest.raises(ValueError, match=r"no memory for 'model.base_model.model.0'"):
        fit(tmp_path, method, LoraToy(), toy_loaders()[1])

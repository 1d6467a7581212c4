"""PEFT's own merge of slots: what stands between the factors is in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_cl.adapters import AdapterSlots, Slot
from toys import LoraToy, toy_stream

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Gated(AdapterSlots):
    """Slots with shared gates in one and a matrix in the other."""

    def extend(self, slot: Slot) -> None:
        """Put a mixing into both."""
        groups = torch.arange(slot.rank(slot.current)) // 2
        slot.add_mixing(slot.current, torch.linspace(0.5, 1.5, int(groups.max()) + 1), groups)
        matrix = torch.randn(slot.rank(slot.past), slot.rank(slot.past), generator=torch.Generator().manual_seed(0))
        slot.add_mixing(slot.past, matrix)


def learned(kind: type[AdapterSlots]) -> LoraToy:
    """Return a module that has learned two tasks, and starts the third with factors that are not zero."""
    module = LoraToy()
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=[kind(capacity=4)], **QUIET)
    trainer.fit(module, datamodule=toy_stream())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return module.eval()


def outputs(module: LoraToy) -> Tensor:
    """Return what it says about fixed inputs."""
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 18).view(3, 6))


@pytest.mark.parametrize("kind", [AdapterSlots, Gated])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_peft_merges_what_the_slots_compute(kind, way):
    """Into the weights of the module at hand, also of a copy that has other values by then; and back."""
    first = learned(kind)
    module = way(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.25)
    expected = outputs(module)
    base = module.model.base_model.model[0].base_layer.weight.clone()
    module.model.merge_adapter()
    assert (module.model.base_model.model[0].base_layer.weight - base).norm() > 0.1
    torch.testing.assert_close(outputs(module), expected, rtol=1e-5, atol=1e-5)
    module.model.unmerge_adapter()
    torch.testing.assert_close(module.model.base_model.model[0].base_layer.weight, base, rtol=1e-5, atol=1e-5)
    module.model = module.model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(outputs(module), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in module.named_modules())


def test_merges_transposed_weights_and_sixteen_bits():
    """A layer whose weight is [in, out] gets the delta transposed; the delta of bfloat16 factors is summed wider."""
    layer = LoraToy().model.base_model.model[0]
    slot = Slot("", layer, "default")
    layer.fan_in_fan_out = True
    slot.add_mixing("default", torch.tensor([[1.0, 2.0], [0.5, -1.0]]))
    with torch.no_grad():
        slot.up("default").weight.normal_()
    down, up = slot.factors("default")
    assert up.norm() > 0
    torch.testing.assert_close(layer.get_delta_weight("default"), slot.scaling * (up @ down).T)
    layer.to(torch.bfloat16)
    down, up = slot.factors("default")
    narrow = layer.get_delta_weight("default")
    assert narrow.dtype == torch.bfloat16
    assert ((narrow.float() - slot.scaling * (up @ down).T).abs() <= 2**-8 * narrow.float().abs() + 1e-6).all()


def test_routed_slots_are_not_merged():
    """No one weight computes what depends on the sample."""
    module = learned(AdapterSlots)
    slot = Slot("", module.model.base_model.model[0], "default")
    slot.slot_factor("past").routed = True
    with pytest.raises(ValueError, match=r"'past' gives each sample the part of a task.*cannot be merged"):
        module.model.merge_and_unload()

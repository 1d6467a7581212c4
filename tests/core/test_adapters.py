"""The base model under adapters, for a forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cl.adapters import add_adapters
from lightning_cl.core.adapters import adapters_disabled, has_adapters
from lightning_cl.core.teacher import Teacher
from llamas import tiny_llama
from toys import LoraToy, ToyModule


def perturbed() -> LoraToy:
    """A module whose adapters do something, one factor of which is frozen by hand."""
    module = LoraToy()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    module.model.base_model.model[0].lora_A["default"].weight.requires_grad_(False)
    return module


def test_computes_as_the_base_and_touches_no_flag() -> None:
    """Other than PEFT's own context, which thaws what was frozen by hand."""
    module, inputs = perturbed(), torch.randn(3, 6)
    base = module.model.base_model.model
    expected = base[3].base_layer(base[0].base_layer(inputs).relu())
    flags = [p.requires_grad for p in module.parameters()]
    with_adapters = module(inputs)
    with adapters_disabled(module):
        torch.testing.assert_close(module(inputs), expected)
        assert [p.requires_grad for p in module.parameters()] == flags
    torch.testing.assert_close(module(inputs), with_adapters)
    assert [p.requires_grad for p in module.parameters()] == flags
    assert not torch.allclose(with_adapters, expected)
    with module.model.disable_adapter():
        pass
    assert [p.requires_grad for p in module.parameters()] != flags


def test_what_was_off_stays_off_also_after_an_error() -> None:
    """The context restores what it found."""
    module = perturbed()
    module.model.base_model.model[3]._disable_adapters = True
    with pytest.raises(RuntimeError), adapters_disabled(module):
        raise RuntimeError
    assert not module.model.base_model.model[0].disable_adapters
    assert module.model.base_model.model[3].disable_adapters


def test_merged_adapters_are_refused() -> None:
    """There is no base to compute with, and PEFT would unmerge for good."""
    module = perturbed()
    module.model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base"), adapters_disabled(module):
        pass


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"])
def test_prompts_of_peft_are_refused(kind: str) -> None:
    """They are outside of the layers that have a switch, and would go on acting."""
    settings = {"adapter_len": 2, "adapter_layers": 1} if kind == "ADAPTION_PROMPT" else {"num_virtual_tokens": 2}
    model = add_adapters(tiny_llama(), {"peft_type": kind, "task_type": "CAUSAL_LM", **settings})
    assert has_adapters(nn.ModuleList([model]))
    with pytest.raises(ValueError, match=rf"PEFT's {kind} acts outside.*`L2P`"), adapters_disabled(model):
        pass
    # a teacher says so before the first step
    with pytest.raises(ValueError, match=rf"PEFT's {kind} acts outside.*`teacher='pretrained'`"):
        Teacher("base", owner="LwF").start_fit(model, inside_task=False)


def test_finds_adapters() -> None:
    """A module of ours with the flag counts as one."""
    assert has_adapters(LoraToy())
    assert not has_adapters(ToyModule())
    own = nn.Linear(2, 2)
    own._disable_adapters = False  # type: ignore[assignment]
    assert has_adapters(nn.Sequential(own))
    with adapters_disabled(own):
        assert own._disable_adapters

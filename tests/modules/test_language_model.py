"""What the modules around Hugging Face networks share: parameter groups, heads, blocks that are filled one by one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from language import LLAMA, LORA, TokenRows, built, llama, token_stream
from lightning_cl.modules import CausalLM, Quantization
from lightning_cl.modules.optimizers import decay_groups
from lightning_cl.optim import SPAM
from toys import trainer, weights

pytest.importorskip("transformers")


def groups_of(module: Any, tmp_path: Path) -> tuple[set[str], set[str]]:
    """Return the names with and without weight decay in the optimizer that a fit makes."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=token_stream())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[float, set[str]] = {0.1: set(), 0.0: set()}
    for group in run.optimizers[0].param_groups:
        found[group["weight_decay"]] |= {names[id(parameter)] for parameter in group["params"]}
    return found[0.1], found[0.0]


def test_norms_biases_and_embeddings_have_no_weight_decay(tmp_path: Path) -> None:
    """All parameters are in one of the two groups, each once."""
    module = CausalLM({**LLAMA, "attention_bias": True}, weight_decay=0.1)
    decayed, others = groups_of(module, tmp_path)
    assert decayed | others == {name for name, _ in module.named_parameters()}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in decayed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert all("norm" in name or "bias" in name or "embed" in name for name in others)


def test_a_head_tied_to_the_embedding_has_no_weight_decay(tmp_path: Path) -> None:
    """It is the embedding."""
    decayed, others = groups_of(CausalLM({**LLAMA, "tie_word_embeddings": True}, weight_decay=0.1), tmp_path)
    assert any("embed_tokens" in name for name in others)
    assert not any("lm_head" in name for name in decayed)


def test_only_what_trains_is_in_the_optimizer(tmp_path: Path) -> None:
    """The factors of LoRA, and no empty group beside them."""
    decayed, others = groups_of(llama(adapter=LORA, weight_decay=0.1), tmp_path)
    assert len(decayed) == 8
    assert not others


def test_groups_of_a_module_without_matrices() -> None:
    """A group that would be empty is left out."""
    module = nn.LayerNorm(4)
    (group,) = decay_groups(module, dict(module.named_parameters()), 0.1)
    assert group["weight_decay"] == 0


def test_the_optimizer_is_fused(tmp_path: Path) -> None:
    """The fastest implementation, on a CPU too."""
    run = trainer(tmp_path, max_steps=1)
    run.fit(llama(), datamodule=token_stream())
    assert run.optimizers[0].defaults["fused"]


def test_another_optimizer_gets_the_groups_and_the_schedule(tmp_path: Path) -> None:
    """Its own settings stand beside the learning rate and the weight decay of the module."""
    run = trainer(tmp_path, max_steps=1)
    settings = {"learning_rate": 0.02, "weight_decay": 0.1, "warmup": 1, "schedule": "linear", "floor": 0.0}
    module = CausalLM(LLAMA, optimizer=functools.partial(SPAM, lr=1.0, reset_interval=77), **settings)
    run.fit(module, datamodule=token_stream())
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, SPAM)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["initial_lr"], group["reset_interval"]) for group in optimizer.param_groups} == {(0.02, 77)}
    assert run.lr_scheduler_configs[0].scheduler.optimizer is optimizer


def test_gradients_are_clipped_under_autocast(tmp_path: Path) -> None:
    """Which Lightning refuses for fused optimizers."""
    run = trainer(tmp_path, max_steps=1, precision="bf16-mixed", gradient_clip_val=1.0)
    run.fit(llama(), datamodule=token_stream())
    assert run.global_step == 1


def test_float16_trains_adapters_with_a_scaler_or_says_why_not(tmp_path: Path) -> None:
    """Adapters of a float16 base are float32; a whole head in float16 is refused before the first step."""

    def run() -> Any:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
        return trainer(tmp_path, max_steps=1, plugins=[plugin], gradient_clip_val=1.0)

    module = llama(adapter=LORA, dtype="float16")
    run().fit(module, datamodule=token_stream())
    factors = {name: p for name, p in module.named_parameters() if "lora_B" in name}
    assert factors
    assert all(p.dtype == torch.float32 and bool(p.abs().sum() > 0) for p in factors.values())
    whole = llama(adapter={**LORA, "modules_to_save": ["lm_head"]}, dtype="float16")
    with pytest.raises(ValueError, match=r"'16-mixed'` scales gradients.*lm_head.*`dtype='bfloat16'`"):
        run().fit(whole, datamodule=token_stream())


def test_int8_is_not_sharded() -> None:
    """Refused before a weight is read."""
    pytest.importorskip("bitsandbytes")
    module = CausalLM({**LLAMA, "hidden_size": 64}, adapter=LORA, quantization=Quantization(mode="int8"))
    with pytest.raises(ValueError, match="cannot be sharded"):
        module.builder.build(lazy=True, device=torch.device("cpu"))


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
@pytest.mark.parametrize("source", ["folder", "config"])
def test_block_by_block_as_at_once(source: str, quantized: bool, tmp_path: Path) -> None:
    """A strategy that asks for one block after the other gets the weights, and the adapters, that another one gets."""
    wide = {**LLAMA, "hidden_size": 64}
    settings: dict[str, Any] = {"adapter": LORA, "seed": 3}
    if quantized:
        pytest.importorskip("bitsandbytes")
        settings["quantization"] = Quantization()
    if source == "folder":
        built(CausalLM(wide, seed=1)).network.save_pretrained(tmp_path)
    model = str(tmp_path) if source == "folder" else wide
    expected, module = built(CausalLM(model, **settings)), CausalLM(model, **settings)
    device = torch.device("cpu")
    module.network = module.builder.build(lazy=True, device=device)
    assert all(parameter.is_meta for parameter in module.parameters())
    for index in (1, 0):
        name = f"network.base_model.model.model.layers.{index}"
        module.fill_weights(name, module.get_submodule(name), device)
        assert not any(parameter.is_meta for parameter in module.get_submodule(name).parameters())
    filled = weights(module.get_submodule(name))
    module.fill_weights("", module, device)
    assert torch.equal(weights(module.get_submodule(name)).view(torch.uint8), filled.view(torch.uint8))
    batch = TokenRows(1).batch()
    assert torch.equal(module(**batch), expected(**batch))
    for (name, value), other in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value.view(torch.uint8), other.view(torch.uint8)), name
        assert value.requires_grad == other.requires_grad == ("lora_" in name)

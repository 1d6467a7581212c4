"""Slots leave as one LoRA adapter that plain PEFT opens, from one process and from shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaForCausalLM

from language import LabelledRows, TokenRows
from lightning_cl import TaskStreamDataModule
from lightning_cl.adapters import AdapterSlots, CoLoR, Slot, add_adapters, export
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM, SequenceClassifier
from lightning_cl.quantization import load_quantized
from llamas import LORA, TOKENS, save_llama, tiny_llama
from ranks import Ranks
from toys import ToyModule, toy_stream

# PEFT 0.21 asks for it by the name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LAYER = "model.layers.1.self_attn.v_proj"
RANKS = {"r": 2, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"v_proj": 3}}
ADAPTER = {**LORA, **RANKS, "target_modules": ["q_proj", "v_proj"]}


class Gated(AdapterSlots):
    """Slots with gates and a matrix between the factors, and a state of their own."""

    def extend(self, slot: Slot) -> None:
        """Put a mixing into both slots."""
        slot.add_mixing(slot.current, torch.linspace(0.5, 1.5, slot.rank(slot.current)))
        past = torch.eye(slot.rank(slot.past)) + 0.1
        slot.add_mixing(slot.past, past)

    def state_dict(self) -> dict[str, Any]:
        """Add what a method may keep."""
        return {**super().state_dict(), "centres": {0: torch.arange(3.0)}, "pairs": [(1, True), (2, None)]}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests of the file."""
    group = Ranks(2)
    yield group
    group.close()


def stream(*tasks: Any) -> TaskStreamDataModule:
    """Return a stream of these tasks, of four steps each on one process."""
    return TaskStreamDataModule(list(tasks), scenario=Predefined(), batch_size=4)


def texts(tasks: int) -> TaskStreamDataModule:
    """Return a stream of texts."""
    return stream(*[TokenRows(1 + task, rows=16) for task in range(tasks)])


def trained(callback: AdapterSlots, base: Path, *, tasks: int = 2, **settings: Any) -> CausalLM:
    """Return a language model that has learned tasks, and half of one more: its present slot is not empty."""
    options = {"adapter": ADAPTER, "dtype": "float32", "learning_rate": 1e-2}
    module = CausalLM(str(base), **options, **settings)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=4 * tasks + 2, callbacks=[callback], **QUIET)
    trainer.fit(module, datamodule=texts(tasks + 1))
    return module


def outputs(network: Any) -> Tensor:
    """Return logits, in the mode in which bitsandbytes computes as in training."""
    with torch.no_grad():
        return network.train()(input_ids=TOKENS)


def relative(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", [AdapterSlots, Gated])
def test_slots_open_in_plain_peft_as_one_adapter(kind, tmp_path):
    """The outputs are the same to 1e-6; its ranks are those in use, its scaling is 1."""
    save_llama(tmp_path / "base")
    callback = kind(capacity=16)
    module = trained(callback, tmp_path / "base")
    export(module, tmp_path / "adapter", slots=callback)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(outputs(loaded).logits, outputs(module)) < 1e-6
    assert relative(outputs(tiny_llama()).logits, outputs(module)) > 0.01  # it was trained
    layer = loaded.get_submodule(f"base_model.model.{LAYER}")
    if kind is AdapterSlots:
        # two finished tasks and the third: of rank 2, and 3 for v_proj
        assert layer.r == {"default": 9}
        assert loaded.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").r == {"default": 6}
    assert layer.scaling == {"default": 1.0}
    assert list(loaded.peft_config) == ["default"]


def test_a_first_task_exports_what_trains(tmp_path):
    """The slot for finished tasks is empty then; before the first step one rank of zeros is left."""
    save_llama(tmp_path / "base")
    callback = AdapterSlots(capacity=4)
    module = trained(callback, tmp_path / "base", tasks=0)
    export(module, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert relative(outputs(loaded).logits, outputs(module)) < 1e-6
    assert loaded.get_submodule(f"base_model.model.{LAYER}").r == {"default": 3}
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    export(module, tmp_path / "zeros")
    zeros = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "zeros")
    assert torch.equal(outputs(zeros).logits, outputs(tiny_llama()).logits)
    assert zeros.get_submodule(f"base_model.model.{LAYER}").r == {"default": 1}


def test_the_part_of_each_task_can_be_taken_out(tmp_path):
    """The state beside the adapter names its ranks, and what was not trained at the time is outside of them."""
    save_llama(tmp_path / "base")
    callback = Gated(capacity=16)
    module = trained(callback, tmp_path / "base")
    export(module, tmp_path / "adapter", slots=callback)
    record = json.loads((tmp_path / "adapter" / "slots.json").read_text())
    assert (record["version"], record["method"]) == (1, "Gated")
    assert record["state"]["pairs"] == [[1, True], [2, None]]
    assert record["state"]["segments"] == callback.state_dict()["segments"]
    assert record["state"]["centres"] == {"0": {"tensor": "centres.0"}}
    assert torch.equal(load_file(tmp_path / "adapter" / "slots.safetensors")["centres.0"], torch.arange(3.0))
    assert record["offsets"][LAYER] == [0, 3, 6]
    assert record["trained"][LAYER] == {"default": ["lora_A", "lora_B", "mixing"], "past": []}

    plain = AdapterSlots(capacity=16)
    module = trained(plain, tmp_path / "base")
    export(module, tmp_path / "plain", slots=plain)
    assert not (tmp_path / "plain" / "slots.safetensors").exists()
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    first, last = json.loads((tmp_path / "plain" / "slots.json").read_text())["offsets"][LAYER][1:]
    down = tensors[f"base_model.model.{LAYER}.lora_A.weight"][first:last]
    up = tensors[f"base_model.model.{LAYER}.lora_B.weight"][:, first:last]
    layer = module.get_submodule(f"network.base_model.model.{LAYER}")
    slot = Slot("", layer, "default")
    whole_down, whole_up = slot.factors("past")
    expected = slot.scaling * whole_up[:, first:last] @ whole_down[first:last]
    torch.testing.assert_close(up @ down, expected, rtol=1e-6, atol=1e-8)
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("kind", [AdapterSlots, Gated])
def test_slots_merge(kind, tmp_path):
    """Into the unpacked base as trained, to 1e-6; into the base before it was packed with that base's error."""
    save_llama(tmp_path / "base")
    module = trained(kind(capacity=16), tmp_path / "base", quantization={"mode": "nf4"})
    export(module, tmp_path / "merged", "dequantized")
    assert relative(outputs(LlamaForCausalLM.from_pretrained(tmp_path / "merged")).logits, outputs(module)) < 1e-6
    export(module, tmp_path / "adapter")
    packed = load_quantized(tmp_path / "base", compute_dtype=torch.float32)
    on_packed = peft.PeftModel.from_pretrained(packed, tmp_path / "adapter")
    assert relative(outputs(on_packed).logits, outputs(module)) < 1e-6
    export(module, tmp_path / "new", "original16", base=tmp_path / "base")
    new = outputs(LlamaForCausalLM.from_pretrained(tmp_path / "new")).logits
    plain = outputs(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")).logits
    assert relative(new, plain) < 1e-6
    assert 1e-3 < relative(new, outputs(module)) < 0.3


def save_bert(folder: Path) -> Path:
    """Write an encoder without a head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    return folder


def test_the_head_of_a_classifier_goes_along(tmp_path):
    """PEFT puts it in the place of the head that the base starts with."""
    folder = save_bert(tmp_path / "base")
    callback = AdapterSlots(capacity=8)
    adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]}
    module = SequenceClassifier(str(folder), 6, adapter=adapter, learning_rate=1e-2)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=12, callbacks=[callback], **QUIET)
    trainer.fit(module, datamodule=stream(*[LabelledRows(task) for task in range(3)]))
    module.eval()
    export(module, tmp_path / "adapter", slots=callback)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = LabelledRows(1).batch()
    with torch.no_grad():
        expected = module(**batch)
        assert relative(loaded(**batch).logits, expected) < 1e-6
        assert relative(base.eval()(**batch).logits, expected) < 1e-6  # PEFT changes the model that it was given
    export(module, tmp_path / "merged", "dequantized")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative(merged(**batch).logits, expected) < 1e-6


class Pair(ToyModule):
    """Two PEFT models with layers "0" and "1.0"."""

    def __init__(self) -> None:
        super().__init__(learning_rate=1e-3)
        for seed, name in enumerate(("first", "again_first")):
            torch.manual_seed(seed)
            inner = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Sequential(torch.nn.Linear(6, 4)))
            self.add_module(name, add_adapters(inner, {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}))
        del self.model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both."""
        both: Tensor = self.first(inputs) + self.again_first(inputs)
        return both


def test_layers_are_found_by_their_whole_name(tmp_path):
    """Not by its end, which other layers and other models share."""
    module, callback = Pair(), AdapterSlots(capacity=8)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=[callback], **QUIET)
    trainer.fit(module, datamodule=toy_stream())
    names = [f"{model}.base_model.model.{layer}" for model in ("first", "again_first") for layer in ("0", "1.0")]
    assert sorted(callback.segments) == sorted(names)
    callback.segments = {name: [0, number] for number, name in enumerate(names, 1)}
    for model, lengths in (("first", (1, 2)), ("again_first", (3, 4))):
        export(torch.nn.ModuleDict({model: getattr(module, model)}), tmp_path / model, slots=callback)
        record = json.loads((tmp_path / model / "slots.json").read_text())
        assert record["offsets"] == {"0": [0, lengths[0]], "1.0": [0, lengths[1]]}
    # without a name it may be either
    with pytest.raises(ValueError, match=r"learned with \['first\.base_model\.model\.0', 'again_first.*ModuleDict"):
        export(module.first, tmp_path / "unnamed", slots=callback)
    callback.segments = {name: [0] for name in names[:2]}
    export(module.first, tmp_path / "unnamed", slots=callback)


def test_a_callback_of_another_model_is_refused(tmp_path):
    """Its offsets would be wrong."""
    save_llama(tmp_path / "base")
    module = trained(AdapterSlots(capacity=8), tmp_path / "base", tasks=0)
    with pytest.raises(ValueError, match=r"has not learned with the layer 'network.*model.layers.0.self_attn.q_proj'"):
        export(module, tmp_path / "adapter", slots=AdapterSlots(capacity=8))
    assert not (tmp_path / "adapter").exists()


def test_slots_with_routes_are_refused(tmp_path):
    """One adapter cannot compute what depends on the sample."""
    save_llama(tmp_path / "base")
    module = trained(AdapterSlots(capacity=8), tmp_path / "base", tasks=0)
    callback = CoLoR(k=1, capacity=16, mask_classes=False)
    callback.extend(Slot("", module.get_submodule(f"network.base_model.model.{LAYER}"), "default"))
    for into in ("factors", "dequantized"):
        with pytest.raises(ValueError, match=r"give each sample the adapter of a task"):
            export(module, tmp_path / "adapter", into)
    assert not (tmp_path / "adapter").exists()


def export_from_shards(folder: Path, quantized: bool) -> Tensor:
    """Learn tasks on two ranks under FSDP2, export, and return the outputs."""
    module = CausalLM(
        str(folder / "base"),
        adapter=ADAPTER,
        quantization={"mode": "nf4"} if quantized else None,
        dtype="float32",
        learning_rate=1e-2,
    )
    callback = Gated(capacity=16)
    trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", max_steps=10, callbacks=[callback], **QUIET)
    trainer.fit(module, datamodule=texts(5))
    export(module, folder / "adapter", slots=callback)
    export(module, folder / "merged", "dequantized")
    export(module, folder / "new", "original16", base=folder / "base")
    return outputs(module)


@pytest.mark.distributed
@pytest.mark.parametrize("quantized", [True, False])
def test_slots_leave_from_shards(ranks, quantized, tmp_path):
    """Two ranks write one adapter, and merged models, that compute as they do."""
    save_llama(tmp_path / "base")
    expected, other = ranks.run(export_from_shards, tmp_path, quantized)
    assert torch.equal(expected, other)
    make = partial(load_quantized, tmp_path / "base", compute_dtype=torch.float32) if quantized else tiny_llama
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert relative(outputs(loaded).logits, expected) < 1e-6
    assert relative(outputs(make()).logits, expected) > 0.01
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(outputs(merged).logits, expected) < 1e-6
    new = outputs(LlamaForCausalLM.from_pretrained(tmp_path / "new")).logits
    plain = outputs(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")).logits
    assert relative(new, plain) < 1e-6

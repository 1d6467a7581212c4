"""Quantized bases: what is packed, what is computed, what is refused, and what shards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lightning_cl.adapters import add_adapters
from lightning_cl.quantization import (
    build_skeleton,
    check_can_shard,
    dequantize,
    is_quantized,
    quantization_bytes,
    quantize_base,
    quantized_layers,
)
from lightning_cl.quantization.layers import empty_layer, fill_layer
from llamas import LORA, TOKENS, logits, perturb, save_llama, shard, tiny_config, tiny_llama
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests of the file."""
    group = Ranks(2)
    yield group
    group.close()


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(mode, double_quant, dtype, tmp_path):
    """The logits are those of a model that transformers quantizes while it loads, bit by bit."""
    save_llama(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=mode != "int8",
        load_in_8bit=mode == "int8",
        bnb_4bit_quant_type=mode if mode != "int8" else "nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=dtype, device_map="cpu")
    ours = quantize_base(tiny_llama(), mode=mode, double_quant=double_quant, compute_dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("double_quant", [True, False])
def test_portions_equal_the_whole(double_quant):
    """A weight quantized in portions of its rows has the codes and scales of the weight quantized at once."""
    weight = torch.randn(24, 128)
    layers = []
    for portions in ([weight], weight.split(5)):
        linear = nn.Linear(128, 24, bias=False, device="meta")
        settings = {"compute_dtype": torch.float32, "storage_dtype": torch.uint8}
        layers.append(empty_layer(linear, "nf4", double_quant=double_quant, **settings))
        fill_layer(layers[-1], portions, torch.device("cpu"))
    whole, pieces = layers
    assert torch.equal(whole.weight, pieces.weight)
    assert torch.equal(whole.quant_state.absmax, pieces.quant_state.absmax)
    assert torch.equal(dequantize(whole), dequantize(pieces))
    assert (dequantize(whole) - weight).norm() / weight.norm() < 0.1


def test_forward_uses_the_dequantized_weight():
    """`dequantize` returns what the layer multiplies by; it takes a quantized layer only."""
    model = quantize_base(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3)), compute_dtype=torch.float32, skip=["1"])
    x = torch.randn(5, 64)
    assert torch.allclose(model[0](x), nn.functional.linear(x, dequantize(model[0]), model[0].bias), atol=1e-6)
    with pytest.raises(ValueError, match="one quantized layer, got Linear"):
        dequantize(model[1])


def test_all_is_frozen_and_in_the_compute_dtype():
    """Packed weights pass for the compute dtype too; buffers keep theirs, the head stays a linear layer."""
    model = quantize_base(tiny_llama(attention_bias=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(list(quantized_layers(model))) == 14
    assert type(model.lm_head) is nn.Linear
    assert not is_quantized(model.lm_head)
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head"]


def test_evaluation_and_training_compute_the_same():
    """Bitsandbytes would repack weights in evaluation on CPUs with AVX512-BF16, for another result."""
    model = quantize_base(tiny_llama())
    with torch.no_grad():
        trained, evaluated = model.train()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits
    assert torch.equal(trained, evaluated)
    assert all(layer.weight.shape[1] == 1 for _, layer in quantized_layers(model))


def test_skeleton_has_the_shapes_of_the_quantized_model():
    """On the meta device: the same names, shapes and dtypes, and real buffers."""
    real, skeleton = (quantize_base(m) for m in (tiny_llama(), build_skeleton(tiny_config())))
    assert [(n, p.shape, p.dtype) for n, p in real.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in skeleton.named_parameters()
    ]
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, real.model.rotary_emb.inv_freq)
    assert quantization_bytes(skeleton)["packed"] == quantization_bytes(real)["packed"]


def test_bytes_are_counted():
    """Half a byte for each weight, and 0.127 bits of state with double quantization, 0.5 without it."""
    for double_quant, bits in ((True, 0.127), (False, 0.5)):
        model = quantize_base(nn.Sequential(nn.Linear(2048, 1024, bias=False)), double_quant=double_quant)
        sizes = quantization_bytes(model)
        assert sizes["packed"] == 1024 * 2048 // 2
        assert sizes["state"] * 8 / (1024 * 2048) == pytest.approx(bits, rel=0.04)  # and two tables
    int8 = quantize_base(nn.Sequential(nn.Linear(2048, 1024, bias=False)), mode="int8")
    assert quantization_bytes(int8) == {"packed": 1024 * 2048, "state": 4 * 1024}
    assert quantization_bytes(nn.Linear(2, 2)) == {"packed": 0, "state": 0}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (["lm_head", "*.mlp.*"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["self_attn"], {"gate_proj", "up_proj", "down_proj", "lm_head"}),
        (["model.layers.0.*", "q_*"], {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
    ],
)
def test_skip_leaves_layers_alone(skip, left):
    """By patterns over the full name, or over a part of it."""
    model = quantize_base(tiny_llama(), skip=skip)
    assert {name.rpartition(".")[2] for name, _ in quantized_layers(model)} == left


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_lora_trains_on_it(mode):
    """PEFT takes its layer for packed weights, and the adapters get gradients."""
    model = quantize_base(tiny_llama(), mode=mode, compute_dtype=torch.float32)
    adapted = add_adapters(model, LORA)
    kinds = {type(layer.q_proj).__module__ for layer in (block.self_attn for block in model.model.layers)}
    assert kinds == {"peft.tuners.lora.bnb"}
    adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 28
    assert all(g.abs().sum() > 0 for n, g in gradients.items() if "lora_B" in n)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "int4"}, "`mode` must be one of"),
        ({"compute_dtype": torch.int8}, "`compute_dtype` must be"),
        ({"storage_dtype": torch.int32}, "`storage_dtype` must be"),
        ({"skip": ["lm_head", "decoder"]}, "'decoder' matches no linear layer"),
        ({"skip": ["*"]}, "found no linear layer"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    """Before anything is changed."""
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        quantize_base(model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_that_cannot_be_quantized_are_refused():
    """With the way out: too narrow, shared, quantized already, with adapters."""
    with pytest.raises(ValueError, match=r"'0' has 96 input features.*multiple of 64.*`skip`"):
        quantize_base(nn.Sequential(nn.Linear(96, 64)))
    with pytest.raises(ValueError, match=r"'lm_head' is shared.*`skip`"):
        quantize_base(tiny_llama(tie_word_embeddings=True), skip=[])
    with pytest.raises(ValueError, match="already quantized"):
        quantize_base(quantize_base(tiny_llama()))
    with pytest.raises(ValueError, match=r"has adapters already.*`quantize_base`, then `add_adapters`"):
        quantize_base(add_adapters(tiny_llama(), LORA))


def test_int8_cannot_be_sharded():
    """The strategy asks before it shards."""
    check_can_shard(quantize_base(tiny_llama()))
    with pytest.raises(ValueError, match=r"`mode='int8'`.*Quantize with `mode='nf4'`"):
        check_can_shard(quantize_base(tiny_llama(), mode="int8"))


def test_plain_models_do_not_import_bitsandbytes():
    """To ask whether a module is quantized costs nothing."""
    script = (
        "import sys, torch; from lightning_cl.quantization import is_quantized, quantization_bytes\n"
        "quantization_bytes(torch.nn.Linear(2, 2)); print('bitsandbytes' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "False"


# ---------------------------------------------------------------------- shards


def sharded_forwards(mode: str, dtype: torch.dtype, storage: torch.dtype | None) -> tuple[list[bool], list[int]]:
    """Return whether forwards in training and evaluation equal those before sharding, and the packed bytes."""
    model = quantize_base(tiny_llama(attention_bias=True), mode=mode, compute_dtype=dtype, storage_dtype=storage)
    expected, whole = logits(model), quantization_bytes(model)
    shard(model, model)
    equal = []
    for training in (True, False, False, True):
        with torch.no_grad():
            equal.append(torch.equal(model.train(training)(input_ids=TOKENS).logits, expected))
    mine = quantization_bytes(model)
    return equal, [whole["packed"], mine["packed"], whole["state"] - mine["state"]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mode", "dtype", "storage"),
    [
        ("nf4", torch.float32, None),
        ("nf4", torch.bfloat16, None),
        ("fp4", torch.bfloat16, torch.uint8),
    ],
)
def test_sharded_forward_is_bit_equal(ranks, mode, dtype, storage):
    """On two ranks, again and again: the packed weights are halved, the state stays."""
    for equal, (whole, mine, difference) in ranks.run(sharded_forwards, mode, dtype, storage):
        assert equal == [True] * 4
        assert mine * 2 == whole
        assert difference == 0


def losses_of_training(split: bool) -> list[float]:
    """Return the losses of a few steps, over both halves of the tokens, of one process or of two."""
    model = quantize_base(tiny_llama(), compute_dtype=torch.float32)
    torch.manual_seed(3)
    adapted = add_adapters(model, LORA).train()
    perturb(adapted)
    rows = TOKENS
    if split:
        shard(adapted, model)
        rows = TOKENS[torch.distributed.get_rank() :][:1]
        assert all(isinstance(parameter, DTensor) for parameter in adapted.parameters())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.distributed
def test_lora_trains_in_shards_as_in_one_process(ranks):
    """The mean of the two ranks' losses is the loss of one process with all tokens, step by step."""
    first, second = ranks.run(losses_of_training, True)
    alone = losses_of_training(False)
    assert alone[-1] < alone[0] - 0.1
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(alone, abs=1e-5)


def refusals_of_shards() -> list[str]:
    """Return what sharded modules are refused with."""
    messages = []
    model = tiny_llama()
    shard(model, model)
    for call in (lambda: quantize_base(model), lambda: add_adapters(model, LORA)):
        with pytest.raises(ValueError, match="The order is: `quantize_base`, then `add_adapters`, then shard") as error:
            call()
        messages.append(str(error.value))
    return messages


@pytest.mark.distributed
def test_wrong_order_is_refused(ranks):
    """Neither packing nor adapters come after sharding."""
    for quantizing, adapting in ranks.run(refusals_of_shards):
        assert "already sharded" in quantizing
        assert "unsynchronised" in adapting


# ---------------------------------------------------------------------- GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_moves_with_the_module():
    """A model that was quantized on the CPU computes on the GPU, and close to the CPU."""
    model = quantize_base(tiny_llama(), compute_dtype=torch.float32)
    expected = logits(model)
    model.cuda()
    assert all(layer.quant_state.absmax.is_cuda for _, layer in quantized_layers(model))
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert torch.allclose(logits(model, TOKENS.cuda()).cpu(), expected, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantized_on_the_gpu_as_on_the_cpu():
    """Codes are those of the CPU, but for weights that lie between two codes."""
    on_cpu, on_gpu = quantize_base(tiny_llama()), quantize_base(tiny_llama().cuda())
    pairs = zip(quantized_layers(on_cpu), quantized_layers(on_gpu), strict=True)
    for (_, ours), (_, theirs) in pairs:
        difference = (dequantize(ours).float() - dequantize(theirs).float().cpu()).norm()
        assert difference / dequantize(ours).float().norm() < 1e-2

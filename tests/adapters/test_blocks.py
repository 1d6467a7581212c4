"""Blocks that change nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lightning_cl.adapters import add_adapters, insert_blocks, inserted_blocks
from lightning_cl.quantization import is_quantized, quantize_base
from llamas import LORA

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4}
# the settings of a family, and what must be zero in a new block
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, {"self_attn.o_proj.*", "mlp.down_proj.*"}),
    "gpt2": (GPT2, {"attn.c_proj.*", "mlp.c_proj.*"}),
    "gemma2": ({"head_dim": 8, "sliding_window": 4}, {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        {"self_attn.o_proj.weight", "mlp.experts.down_proj", "mlp.shared_expert.down_proj.weight"},
    ),
    "gpt_neox": ({}, {"attention.dense.*", "mlp.dense_4h_to_h.*"}),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, {"self_attn.out_proj.*", "fc2.*"}),
}
TOKENS = torch.arange(3, 21).view(2, 9)


def model(family: str, **changes: Any) -> Any:
    """A causal language model of four blocks, biases and all random."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made.eval()


def logits(network: Any) -> Tensor:
    """What it says to the tokens, in its present mode."""
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


def zeros(network: Any, block: str) -> set[str]:
    """Names in a block of the modules whose parameters are all zero, or of single parameters."""
    named = dict(network.get_submodule(block).named_parameters())
    # norms of Gemma start from zero
    empty = {name for name, p in named.items() if not p.any() and "norm" not in name}
    whole = {name.rpartition(".")[0] for name in named if name.endswith(".bias")}
    return {f"{n.rpartition('.')[0]}.*" if n.rpartition(".")[0] in whole else n for n in empty}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_computes_the_same(family: str, tmp_path: Path) -> None:
    """To the bit: its logits, what it generates with a cache, and all that after saving and loading."""
    settings, expected = FAMILIES[family]
    network = model(family, **settings)
    before, text = logits(network), network.generate(TOKENS, max_new_tokens=5, do_sample=False)
    names = insert_blocks(network, 2)
    assert [name.rpartition(".")[2] for name in names] == ["2", "5"]
    assert names == inserted_blocks(network)
    assert all(zeros(network, name) == expected for name in names)
    assert not network.training
    network.save_pretrained(tmp_path)
    for grown in (network, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        assert grown.config.num_hidden_layers == 6
        assert torch.equal(logits(grown), before)
        assert torch.equal(grown.generate(TOKENS, max_new_tokens=5, do_sample=False), text)
        indices = [m.layer_idx for m in grown.modules() if hasattr(m, "layer_idx")]
        assert sorted(set(indices)) in ([0, 1, 2, 3, 4, 5], [])


def test_what_each_layer_is_goes_along() -> None:
    """A copy behind a layer of one type is of that type in the config too."""
    network = model("gemma2", head_dim=8)
    assert network.config.layer_types == ["sliding_attention", "full_attention"] * 2
    insert_blocks(network, 4)
    assert network.config.layer_types == [kind for kind in ("sliding_attention", "full_attention") * 2 for _ in (0, 1)]


@pytest.mark.parametrize(("count", "places"), [(1, [4]), (2, [2, 5]), (3, [1, 3, 6]), (4, [1, 3, 5, 7])])
def test_blocks_are_spread_evenly(count: int, places: list[int]) -> None:
    """Behind each group a copy of its last block."""
    network = model("llama")
    blocks = list(network.model.layers)
    assert insert_blocks(network, count) == [f"model.layers.{place}" for place in places]
    old = [block for place, block in enumerate(network.model.layers) if place not in places]
    assert all(mine is theirs for mine, theirs in zip(old, blocks, strict=True))
    for place in places:
        copied, source = (network.model.layers[i].mlp.up_proj.weight for i in (place, place - 1))
        assert torch.equal(copied, source)
        assert copied is not source


def test_a_new_block_learns() -> None:
    """Its zero projections in the first step, its other weights from the second on; the old ones are frozen."""
    network = model("llama")
    network.requires_grad_(False)
    (name,) = insert_blocks(network, 1)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    assert all(n.startswith(f"{name}.") for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    moved = []
    for _ in range(2):
        before = {n: p.detach().clone() for n, p in trained.items()}
        network(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append({n.removeprefix(f"{name}.") for n, p in trained.items() if not torch.equal(p, before[n])})
    assert moved[0] == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    assert len(moved[1]) == len(trained)


def test_growing_in_turns() -> None:
    """A grown network grows again; all new blocks are known."""
    network = model("llama")
    before = logits(network)
    insert_blocks(network, 1)
    insert_blocks(network, 5)
    assert torch.equal(logits(network), before)
    assert network.config.num_hidden_layers == 10
    assert len(inserted_blocks(network)) == 6


def test_training_mode_stays() -> None:
    """Dropout included: zeros drop to zeros."""
    network = model("gpt2", **GPT2).train()
    network.transformer.h[1].eval()
    insert_blocks(network, 2)
    assert [block.training for block in network.transformer.h] == [True, False, True, True, True, True]
    for dropouts in (0, 1):
        torch.manual_seed(dropouts)
        hidden = torch.randn(2, 4, 32)
        output = network.transformer.h[2](hidden)
        assert torch.equal(output[0] if isinstance(output, tuple) else output, hidden)


def test_over_a_quantized_network() -> None:
    """New blocks are plain, and start from the weights that the packed ones stand for."""
    network = model("llama", hidden_size=64)
    network.requires_grad_(False)
    quantize_base(network, mode="nf4", compute_dtype=torch.float32)
    before = logits(network)
    (name,) = insert_blocks(network, 1)
    assert torch.equal(logits(network), before)
    block = network.get_submodule(name)
    assert not any(is_quantized(module) for module in block.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in block.parameters())
    assert is_quantized(network.model.layers[3].mlp.up_proj)
    assert block.mlp.up_proj.weight.unique().numel() > 16


# ---------------------------------------------------------------------- networks of one's own


class Residual(nn.Module):
    """A block whose experts are in a list, of which a sample reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[int(x.sum() > 0)](x)


class Network(nn.Module):
    def __init__(self, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_all_experts_of_a_list_are_zero() -> None:
    """Also those that the example does not reach; of an expert the last layer only."""
    network = Network()
    (name,) = insert_blocks(network, 1, example={"x": torch.ones(1, 4)})
    for expert in network.get_submodule(name).experts:
        assert not expert[2].weight.any()
        assert not expert[2].bias.any()
        assert expert[0].weight.any()
    x = -torch.ones(1, 4)
    assert torch.equal(network(x), Network()(x))


class Dead(nn.Module):
    """One matrix, used twice: at zero it has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight @ self.weight


class Counting(Network):
    """A network whose output depends on how many blocks it has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.blocks)


class Idle(Network):
    """A network that leaves its blocks out."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.blocks[0].experts[0][0].weight.sum()


def test_refusals_leave_the_network_as_it_was() -> None:
    """With what is in the way."""
    sharing = {"scale_attn_by_inverse_layer_idx": True}
    adapted = add_adapters(model("llama"), LORA)
    two = nn.ModuleDict({"a": Network(), "b": Network()})
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (model("llama"), {"count": 0}, "`count` must be an integer of at least 1, got 0"),
        (model("llama"), {"count": 5}, "`count=5` inserts more blocks than the 4 that 'model.layers' has"),
        (
            model("llama"),
            {"stack": "model.blocks"},
            "`stack='model.blocks'` names no list of blocks in LlamaForCausalLM",
        ),
        (model("gpt2", **GPT2, **sharing), {}, r"transformer.h.4.attn.scaling would be another with blocks"),
        (model("llama").to("meta"), {}, "stand on the meta device .* `save_pretrained`"),
        (adapted, {}, "has adapters already. Insert the blocks first"),
        (two, {"example": torch.ones(1, 4)}, r"ModuleDict has 2 lists of blocks of one class .* by `stack`"),
        (Network(), {}, "Network has no `dummy_inputs`: give `example`"),
        (Network(Dead), {"example": torch.ones(1, 4)}, r"'blocks.1' \(Dead\) could not learn from the zeros"),
        (
            Counting(),
            {"example": torch.ones(1, 4)},
            "Counting depends on the number or the place of its blocks: its out",
        ),
        (Idle(), {"example": torch.ones(1, 4)}, "does not call the blocks that were to be copied"),
    ]
    bert = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES))
    cases.append(
        (bert, {}, r"'encoder.layer.3' \(BertLayer\) cannot be the identity: .* norms behind the residual sum")
    )
    for network, settings, message in cases:
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        modes = [module.training for module in network.modules()]
        places = [m.layer_idx for m in network.modules() if hasattr(m, "layer_idx")]
        with pytest.raises(ValueError, match=message):
            insert_blocks(network, **({"count": 1} | settings))
        after = dict(network.named_parameters())
        assert after.keys() == before.keys()
        assert all(p.is_meta or torch.equal(p, before[name]) for name, p in after.items())
        assert [module.training for module in network.modules()] == modes
        assert [m.layer_idx for m in network.modules() if hasattr(m, "layer_idx")] == places
        assert getattr(getattr(network, "config", None), "num_hidden_layers", 4) == 4

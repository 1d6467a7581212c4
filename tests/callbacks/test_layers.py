"""What counts as a block and as a normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from language import built, llama
from lightning_cl.callbacks.layers import find_blocks, is_norm
from toys import ToyModule


class CustomRMSNorm(nn.Module):
    """As model code brings its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


class Towers(nn.Module):
    """Blocks in a sequence, a weight of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(3)))
        self.head = nn.Linear(2, 1)


def test_blocks_of_a_language_model() -> None:
    """Those that Hugging Face names, with all their layers."""
    blocks = find_blocks(built(llama()), None)
    assert list(blocks) == ["network.model.layers.0", "network.model.layers.1"]
    assert [path.split(".")[-1] for path in blocks["network.model.layers.1"]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    ]


def test_blocks_of_other_networks() -> None:
    """Members of sequences of one class, else every layer; patterns go before both."""
    towers = Towers()
    assert list(find_blocks(towers, None)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert find_blocks(ToyModule(), None).keys() == {"model.0", "model.3"}
    assert list(find_blocks(towers, ["blocks.[02]", "head"])) == ["blocks.0", "blocks.2", "head"]
    assert list(find_blocks(towers, ["blocks"])["blocks"])[:2] == ["blocks.0.0", "blocks.0.1"]
    towers.blocks = nn.Sequential()
    assert find_blocks(towers, None) == {"": {"": towers}, "head": {"head": towers.head}}


def test_patterns_that_select_nothing_or_twice_are_refused() -> None:
    """With the way out."""
    for patterns, message in (
        (
            ["layers.*"],
            r"`blocks` pattern 'layers.\*' matches no module with parameters in Towers. Its names look like",
        ),
        ("blocks.*", r"`blocks` must be a list of patterns, such as \['blocks.\*'\]"),
        (["blocks", "blocks.0"], "selects 'blocks' and, inside of it, 'blocks.0': select one"),
    ):
        with pytest.raises(ValueError, match=message):
            find_blocks(Towers(), patterns)  # type: ignore[arg-type]


class Named(Towers):
    """As a Hugging Face model that names its blocks, beside a list of others."""

    _no_split_modules = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
        self.blocks = nn.ModuleList(self.blocks)


def test_blocks_that_a_network_names_are_all_of_them() -> None:
    """Also where `fully_shard` gave them a class of its own."""
    network = Named()
    assert list(find_blocks(network, None)) == ["blocks.0", "blocks.1", "blocks.2"]
    for block in network.blocks:
        # as `fully_shard` does it
        block.__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})
    assert list(find_blocks(network, None)) == ["blocks.0", "blocks.1", "blocks.2"]


def test_norms() -> None:
    """Torch's own, those of model code by name, and nothing else."""
    norms = [nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.BatchNorm1d(2), nn.InstanceNorm2d(2)]
    assert all(is_norm(module) for module in [*norms, CustomRMSNorm()])
    assert not any(is_norm(module) for module in [nn.Linear(2, 2), nn.Dropout(), Towers()])

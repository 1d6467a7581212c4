"""InfLoRA and starts from data in language models: on a 4-bit base, in shards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from language import LLAMA, LORA, TokenRows
from lightning_cl import AdapterSlots, InfLoRA, TaskStreamDataModule
from lightning_cl.adapters import AdapterStart
from lightning_cl.core.state import local
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM
from ranks import Ranks
from toys import trainer

pytest.importorskip("bitsandbytes")
METHODS = {
    "inflora": lambda: [InfLoRA(threshold=0.7, capacity=16)],
    "eva": lambda: [AdapterSlots(16), AdapterStart("eva")],
    "corda": lambda: [AdapterSlots(16), AdapterStart("corda")],
}


def fit(root, method, strategy="auto", ranks=1):
    """Learn two domains on a 4-bit base; return what each layer adds, and the callbacks."""
    module = CausalLM({**LLAMA, "hidden_size": 64}, quantization={"mode": "nf4"}, adapter=LORA, learning_rate=1e-3)
    domains = [TokenRows(step) for step in (1, 5)]
    stream = TaskStreamDataModule(domains, scenario=Predefined(["ones", "fives"]), batch_size=4 // ranks)
    callbacks = METHODS[method]()
    trainer(root, callbacks, devices=ranks, strategy=strategy).fit(module, datamodule=stream)
    found = {}
    for name, parameter in module.named_parameters():
        if name.endswith("lora_A.past.weight"):
            up = module.get_parameter(name.replace("lora_A", "lora_B")).detach()
            found[name] = full(up) @ full(parameter.detach())
    return found, vars(callbacks[-1])["memory" if method == "inflora" else "context"] if method != "eva" else {}


def full(tensor):
    """The whole of a tensor that may be sharded."""
    return tensor if local(tensor) is tensor else tensor.full_tensor()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_end_where_one_process_ends(method, two_ranks, tmp_path):
    """In shards of packed weights; queries and values of a block have one input, and one matrix is kept for both."""
    one, kept = fit(tmp_path / "one", method)
    first, second = two_ranks.run(fit, tmp_path / "two", method, "fsdp2", 2)
    for name, product in one.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], product, rtol=0, atol=2e-5)
        assert product.abs().max() > 1e-3
    for block in range(2 if method != "eva" else 0):
        query, value = (f"network.base_model.model.model.layers.{block}.self_attn.{kind}_proj" for kind in "qv")
        assert kept[query] is kept[value]
        assert len({id(matrix) for matrix in kept.values()}) == 2

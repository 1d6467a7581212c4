"""GS-LoRA and ULD on a 4-bit base: in shards as on one process, pruned for real, resumed to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from language import LLAMA, LORA, VOCABULARY, TokenRows
from lightning_cl import TaskStreamDataModule
from lightning_cl.adapters import GSLoRA, LogitDifference, build_assistant
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import DataIncremental, UnlearningDataModule
from lightning_cl.modules import CausalLM
from lightning_cl.quantization import quantize_base
from lightning_cl.quantization.layers import packed_weight, quantized_layers, state_tensors
from lightning_cl.unlearning import ULD, Unlearn
from llamas import TOKENS, tiny_llama
from ranks import Ranks
from toys import trainer

pytest.importorskip("bitsandbytes")
WIDE = {**LLAMA, "hidden_size": 64}
SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.0}
EIGHT = list(range(8))
IDS = TOKENS[:, :8] % VOCABULARY
BLOCKS = "network.base_model.model.model.layers"
# between the norms of the two blocks
PRUNE_BELOW = 1.55
# of 5 steps to learn and 6 to forget, and of 12 of the assistant
INSIDE = 8


class Rows(TokenRows):
    """Eight rows to forget; what is retained is one row many times, so that every draw of it is the same."""

    def __init__(self) -> None:
        super().__init__(1, 20)
        self.input_ids[8:] = self.input_ids[8] * 3 % VOCABULARY


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def whole(parameter: Tensor) -> Tensor:
    """A copy of a whole tensor."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


def packed(module: Any) -> dict[str, list[Tensor]]:
    """The bits of all quantized layers: as floats some bytes are no numbers."""
    return {
        n: [packed_weight(layer).view(torch.uint8).clone(), *state_tensors(layer)]
        for n, layer in quantized_layers(module)
    }


def saver(folder: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


# ---------------------------------------------------------------------- GS-LoRA


def fit_gs_lora(
    root: Path, strategy: str, ranks: int, saved: str, ckpt_path: Path | None = None
) -> tuple[dict[str, Tensor], list[Any], dict[str, list[Tensor]]]:
    """Learn 20 rows, forget eight; return what trains, what the ledger says, and the bits of the base."""
    stream = TaskStreamDataModule(
        Rows(),
        scenario=DataIncremental(n_tasks=1),
        batch_size=4 // ranks,
        requests=[ForgetRequest("eight rows", rows=EIGHT)],
        epochs_per_request=3,
    )
    module = CausalLM(dict(WIDE), adapter=LORA, quantization={"mode": "nf4"}, **SETTINGS)
    method = GSLoRA(group_lasso=0.05, prune_below=PRUNE_BELOW, ledger_file=str(root / f"{saved}.jsonl"))
    trainer(root, [method, saver(root / saved)], devices=ranks, strategy=strategy).fit(
        module, datamodule=stream, ckpt_path=ckpt_path
    )
    parameters = {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}
    record = method.ledger.records[0]
    assert record.after["forget/probability"] < record.before["forget/probability"]
    assert record.settings["pruned"] == method.pruned
    return parameters, [method.norms, method.pruned, record.weights_hash, record.after], packed(module)


@pytest.fixture(scope="module")
def gs_lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[Any], dict[str, list[Tensor]]]:
    """The fit on one process."""
    return fit_gs_lora(tmp_path_factory.mktemp("one"), "auto", 1, "straight")


def check_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check that tensors, or lists of them, are equal to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        for one, other in zip(found[name], value, strict=True):
            assert torch.equal(one, other), name


def test_a_block_on_four_bits_is_pruned(gs_lora: Any) -> None:
    """The one under the threshold adds nothing, to the bit, and can learn again; the base is as it was packed."""
    parameters, (norms, pruned, *_), base = gs_lora
    assert pruned == [f"{BLOCKS}.0"]
    assert norms[f"{BLOCKS}.0"] < PRUNE_BELOW < norms[f"{BLOCKS}.1"]
    assert len(parameters) == 8
    for name, value in parameters.items():
        assert value.any() == (f"{BLOCKS}.0" not in name or ".lora_A." in name)
    fresh = CausalLM(dict(WIDE), adapter=LORA, quantization={"mode": "nf4"})
    fresh.configure_model()
    check_bits(base, packed(fresh))
    assert len(base) == 14


def test_gs_lora_on_four_bits_resumes_to_the_same_bits(gs_lora: Any, tmp_path: Path) -> None:
    """Inside the request, on one process."""
    (tmp_path / "straight").mkdir()
    straight = fit_gs_lora(tmp_path, "auto", 1, "straight")
    check_bits(straight[0], gs_lora[0])
    resumed = fit_gs_lora(tmp_path, "auto", 1, "resumed", tmp_path / "straight" / f"step={INSIDE}.ckpt")
    check_bits(resumed[0], straight[0])
    assert resumed[1] == straight[1]


@pytest.mark.distributed
def test_gs_lora_on_four_bits_in_shards(gs_lora: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks of FSDP2 end where one process ends, with the same block pruned, and resume to the same bits."""
    first, second = two_ranks.run(fit_gs_lora, tmp_path, "fsdp2", 2, "straight")
    check_bits(first[0], second[0])
    assert first[1] == second[1]
    for name, value in gs_lora[0].items():
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-5)
    assert first[1][1] == gs_lora[1][1]
    assert first[1][0] == pytest.approx(gs_lora[1][0], abs=1e-5)
    check_bits(first[2], gs_lora[2])
    resumed = two_ranks.run(fit_gs_lora, tmp_path, "fsdp2", 2, "resumed", tmp_path / "straight" / f"step={INSIDE}.ckpt")
    check_bits(resumed[0][0], first[0])
    assert resumed[0][1] == resumed[1][1] == first[1]


# ---------------------------------------------------------------------- ULD


def four_bits() -> Any:
    """A model with packed weights, that continues TOKENS somehow."""
    return quantize_base(tiny_llama(vocab_size=VOCABULARY), compute_dtype=torch.float32).eval()


def fit_uld(
    root: Path, strategy: str, ranks: int, saved: str, ckpt_path: Path | None = None
) -> tuple[dict[str, Tensor], list[Any], Tensor]:
    """Train an assistant on eight rows; return what trains, what the ledger says, and scores of model and assistant."""
    model = four_bits()
    before, bits = model(IDS).logits, packed(model)
    module = CausalLM(dict(WIDE), **SETTINGS)
    module.network = build_assistant(model, 1, rank=4, dropout=0.0, target_modules=["q_proj", "v_proj"])
    requests = [ForgetRequest("eight rows", rows=EIGHT)]
    data = UnlearningDataModule(Rows(), requests=requests, batch_size=4 // ranks, epochs_per_request=6)
    unlearn = Unlearn(ULD(), retain="own", retain_weight=5.0, ledger_file=str(root / f"{saved}.jsonl"))
    callbacks = [unlearn, saver(root / saved)]
    trainer(root, callbacks, devices=ranks, strategy=strategy).fit(module, datamodule=data, ckpt_path=ckpt_path)
    parameters = {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}
    record = unlearn.ledger.records[0]
    # the assistant shall know them
    assert record.after["forget/probability"] > 1.2 * record.before["forget/probability"]
    assert torch.equal(model(IDS).logits, before)
    check_bits(packed(model), bits)
    if strategy == "fsdp2":
        with pytest.raises(ValueError, match="sharded"):
            LogitDifference(module.network)
    # as one that serves beside the model loads what was learned
    assistant = build_assistant(model, 1, rank=4, dropout=0.0, target_modules=["q_proj", "v_proj"])
    assistant.load_state_dict({n.removeprefix("network."): p for n, p in parameters.items()}, strict=False)
    with torch.no_grad():
        scores = LogitDifference(assistant)(IDS, model(IDS).logits[:, -1])
    assert not torch.allclose(scores, model(IDS).logits[:, -1].log_softmax(-1), atol=1e-2)
    return parameters, [record.weights_hash, record.after], scores


@pytest.fixture(scope="module")
def uld(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[Any], Tensor]:
    """The fit on one process."""
    return fit_uld(tmp_path_factory.mktemp("one"), "auto", 1, "straight")


def test_assistant_shares_packed_weights_and_goes_its_own_way() -> None:
    """Weights and scales are in the same memory; moved to another device, it leaves the model where it is."""
    model = four_bits()
    before = model(IDS).logits
    assistant = build_assistant(model, 1, rank=4)
    kept = {name: layer for name, layer in quantized_layers(model) if ".layers.1." not in name}
    shared = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer
        for name, layer in quantized_layers(assistant)
    }
    assert shared.keys() == kept.keys()
    for name, layer in kept.items():
        for one, other in zip(
            [layer.weight, *state_tensors(layer)], [shared[name].weight, *state_tensors(shared[name])], strict=True
        ):
            assert one.data_ptr() == other.data_ptr()
    for layer in shared.values():
        # which moves its state in place
        layer.weight.to("meta")
        assert state_tensors(layer)[0].is_meta
    assert torch.equal(model(IDS).logits, before)


def test_uld_on_four_bits_resumes_to_the_same_bits(uld: Any, tmp_path: Path) -> None:
    """Inside the request, on one process; what is written is the difference of the scores of both."""
    straight = fit_uld(tmp_path, "auto", 1, "straight")
    check_bits(straight[0], uld[0])
    resumed = fit_uld(tmp_path, "auto", 1, "resumed", tmp_path / "straight" / f"step={INSIDE}.ckpt")
    check_bits(resumed[0], straight[0])
    assert resumed[1] == straight[1]
    assert torch.equal(resumed[2], straight[2])


@pytest.mark.distributed
def test_uld_on_four_bits_in_shards(uld: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks of FSDP2 end where one process ends and resume to the same bits; the model at its side stays whole."""
    first, second = two_ranks.run(fit_uld, tmp_path, "fsdp2", 2, "straight")
    check_bits(first[0], second[0])
    assert first[1] == second[1]
    for name, value in uld[0].items():
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(first[2], uld[2], rtol=0, atol=1e-4)
    resumed = two_ranks.run(fit_uld, tmp_path, "fsdp2", 2, "resumed", tmp_path / "straight" / f"step={INSIDE}.ckpt")
    check_bits(resumed[0][0], first[0])
    assert resumed[0][1] == resumed[1][1] == first[1]

"""Language models under ``fsdp2`` on two ranks: trained, measured and sampled as in one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from language import LLAMA, LORA, built, token_stream
from lightning_cl import EWC, ContinualMetrics, FSDP2Strategy
from lightning_cl.modules import CausalLM
from lightning_cl.report import read_records
from ranks import exit_codes
from toys import trainer

pytest.importorskip("transformers")
WIDE = {**LLAMA, "hidden_size": 64}
SETTINGS: dict[str, Any] = {"tokenizer": "bytes", "prompts": ["\x00\x01"], "max_new_tokens": 4, "learning_rate": 1e-2}


def fit_and_record(root: Path, ranks: int, model: str, quantized: bool, strategy: str = "fsdp2") -> None:
    """Fit the stream with EWC, four rows a step over all ranks, and write the record."""
    settings = SETTINGS | {"adapter": LORA}
    if quantized:
        settings["quantization"] = {"mode": "nf4"}
    module = CausalLM(model, **settings)
    metrics = ContinualMetrics("val_perplexity", mode="min", further=["val_acc"], directory=root)
    run = trainer(root, [EWC(10.0), metrics], devices=ranks, strategy=strategy)
    run.fit(module, datamodule=token_stream(batch_size=4 // ranks))
    if run.strategy.global_rank == 0 and strategy == "fsdp2":
        assert module.network.base_model.model.model.layers[0].mlp.up_proj.weight.placements


@pytest.mark.distributed
@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
def test_sharded_as_in_one_process(quantized: bool, tmp_path: Path) -> None:
    """From a folder, read block by block: the same perplexities, accuracies and texts after every task."""
    if quantized:
        pytest.importorskip("bitsandbytes")
    model = tmp_path / "model"
    built(CausalLM(WIDE)).network.save_pretrained(model)
    fit_and_record(tmp_path / "one", 1, str(model), quantized, strategy="auto")
    two = functools.partial(fit_and_record, tmp_path / "two", 2, str(model), quantized)
    assert exit_codes(two, world_size=2) == [0, 0]
    one, two = (read_records([tmp_path / name])[0] for name in ("one", "two"))
    torch.testing.assert_close(two.R, one.R, rtol=1e-4, atol=0, equal_nan=True)
    assert two.samples == one.samples
    assert two.further == one.further
    assert all(len(texts) == 1 for texts in one.samples)


def at_every_step(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
def test_a_checkpoint_without_the_base_loads_everywhere(quantized: bool, tmp_path: Path) -> None:
    """In one file, from a sharded run: by `load_from_checkpoint`, in a run on one device, and over no other base."""
    settings: dict[str, Any] = {"adapter": LORA, "learning_rate": 1e-2, "warmup": 1}
    if quantized:
        pytest.importorskip("bitsandbytes")
        settings["quantization"] = {"mode": "nf4"}
    sharded = CausalLM(dict(WIDE), **settings)
    strategy = FSDP2Strategy(save_distributed_checkpoint=False)
    trainer(tmp_path, [EWC(10.0), at_every_step(tmp_path)], strategy=strategy).fit(sharded, datamodule=token_stream())
    torch.distributed.destroy_process_group()
    path = tmp_path / "step=10.ckpt"
    assert all("lora" in name for name in torch.load(path, weights_only=True)["state_dict"])

    loaded = CausalLM.load_from_checkpoint(path)
    found = dict(loaded.named_parameters())
    for name, parameter in sharded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(found[name], parameter.full_tensor())

    resumed = CausalLM(dict(WIDE), **settings)
    fit = trainer(tmp_path, [EWC(10.0), at_every_step(tmp_path / "resumed")])
    fit.fit(resumed, datamodule=token_stream(), ckpt_path=tmp_path / "step=7.ckpt")
    for name, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, found[name], rtol=0, atol=1e-5)

    # and what the run on one device writes is as small
    assert all("lora" in name for name in torch.load(tmp_path / "resumed" / "step=10.ckpt")["state_dict"])
    again = CausalLM(dict(WIDE), **settings)
    fit = trainer(tmp_path, [EWC(10.0), at_every_step(tmp_path / "again")])
    fit.fit(again, datamodule=token_stream(), ckpt_path=tmp_path / "resumed" / "step=8.ckpt")
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, dict(resumed.named_parameters())[name])

    other = trainer(tmp_path, [EWC(10.0), at_every_step(tmp_path / "other")])
    with pytest.raises(ValueError, match="trained on another frozen base"):
        other.fit(CausalLM(dict(WIDE), **settings, seed=1), datamodule=token_stream(), ckpt_path=path)

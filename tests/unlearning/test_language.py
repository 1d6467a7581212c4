"""Requests on language models: on a 4-bit base with LoRA, in shards, through checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from language import LLAMA, LORA, TokenRows
from lightning_cl import TaskStreamDataModule, Unlearn
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM
from lightning_cl.unlearning import NPO, UNDIAL
from ranks import Ranks
from toys import trainer

pytest.importorskip("bitsandbytes")
WIDE = {**LLAMA, "hidden_size": 64}
NF4 = {"mode": "nf4"}
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "schedule": "constant"}


def fit(
    root: Path,
    method: str,
    strategy: str,
    ranks: int,
    quantized: bool,
    retain: Any = None,
    saved: str | None = None,
    ckpt_path: Path | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Learn two domains, forget eight rows of the first; return what trains and the ledger."""
    rows = list(range(8))
    stream = TaskStreamDataModule(
        [TokenRows(1, 12), TokenRows(3, 8)],
        [TokenRows(1, 6, seed=1), TokenRows(3, 6, seed=1)],
        scenario=Predefined(["ones", "threes"]),
        batch_size=4 // ranks,
        requests=[ForgetRequest("eight rows", rows=rows)],
        epochs_per_request=3,
    )
    module = CausalLM(dict(WIDE), adapter=LORA, quantization=NF4 if quantized else None, **SETTINGS)
    losses: dict[str, Any] = {
        "npo": (NPO(beta=0.1), {}),
        "npo without a copy": (NPO(beta=0.1), {"reference": "peft_disabled", "anchor": "original"}),
        "undial": (UNDIAL(), {}),
    }
    loss, settings = losses[method]
    unlearn = Unlearn(loss, retain=retain, **settings)
    callbacks: list[Any] = [unlearn]
    if saved:
        callbacks.append(ModelCheckpoint(root / saved, filename="{step}", every_n_train_steps=1, save_top_k=-1))
        unlearn.ledger_file = str(root / f"{saved}.jsonl")
    trainer(root, callbacks, devices=ranks, strategy=strategy).fit(module, datamodule=stream, ckpt_path=ckpt_path)
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in parameters.items()}
    record = unlearn.ledger.records[0]
    assert record.after["forget/probability"] < record.before["forget/probability"]
    return whole, [record.weights_hash, str(record.reference_hash), *map(str, record.after.values())]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize("method", ["npo", "npo without a copy", "undial"])
@pytest.mark.parametrize(
    ("strategy", "quantized"),
    [("ddp", True), ("fsdp2", False), ("fsdp2", True)],
    ids=["ddp 4 bits", "fsdp2", "fsdp2 4 bits"],
)
def test_two_ranks_end_where_one_process_ends(
    method: str, strategy: str, quantized: bool, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Without a retain term, whose samples every rank draws itself: equal bits on both ranks, and one process's."""
    expected, _ = fit(tmp_path / "one", method, "auto", 1, quantized)
    first, second = two_ranks.run(fit, tmp_path / "two", method, strategy, 2, quantized)
    assert first[1] == second[1]
    for name, value in expected.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_retained_samples_in_shards_on_four_bits(two_ranks: Ranks, tmp_path: Path) -> None:
    """With the divergence from the reference on retained samples; resumed inside the request to the same bits."""
    fixed = ("undial", "fsdp2", 2, True, "kl")
    straight = two_ranks.run(fit, tmp_path, *fixed, "straight")
    # 3 and 2 steps to learn, 2 an epoch to forget
    path = tmp_path / "straight" / "step=8.ckpt"
    assert path.is_dir()
    resumed = two_ranks.run(fit, tmp_path, *fixed, "resumed", path)
    for name, value in straight[0][0].items():
        assert torch.equal(resumed[0][0][name], value)
    assert straight[0][1] == resumed[0][1] == resumed[1][1]

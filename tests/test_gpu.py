"""On GPUs, over nccl: the sharded strategy, every method on it, a 4-bit base, resume. Skipped without one."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor

from language import token_stream
from lightning_cl import (
    EWC,
    ExperienceReplay,
    ForgetRequest,
    FSDP2Strategy,
    SelectiveSynapticDampening,
    TaskVectorNegation,
    Unlearn,
)
from lightning_cl.modules import CausalLM
from lightning_cl.unlearning import PDU, RMU
from toys import ToyModule, toy_stream, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# one GPU in this process; several are for `benchmarks/sharded.py` and a launcher
ON_GPU: dict[str, Any] = {"accelerator": "gpu", "devices": 1}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
METHODS: dict[str, Any] = {
    "ewc": lambda: EWC(20.0),
    "ewc-sampled": lambda: EWC(20.0, fisher="sampled"),
    "ewc-exact": lambda: EWC(20.0, fisher="exact"),
    "er": lambda: ExperienceReplay(12),
    "er-separate": lambda: ExperienceReplay(12, mode="separate", weight=0.5),
}


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """A group of one rank, ended before the next test makes its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(port)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def full(module: LightningModule) -> Tensor:
    """All weights that train, gathered, on the CPU; packed bytes of a base are no numbers to compare."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained]
    return torch.cat([value.detach().float().flatten().cpu() for value in values])


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("method", METHODS)
def test_sharded_methods_end_where_the_cpu_ends(method: str, tmp_path: Path) -> None:
    """Foreach kernels, nccl and the GPU's arithmetic change nothing beyond rounding."""
    ends = []
    for settings in ({}, ON_GPU | {"strategy": FSDP2Strategy(wrap=["Linear"])}):
        module = ToyModule()
        trainer(tmp_path, [METHODS[method]()], **settings).fit(module, datamodule=toy_stream())
        ends.append(full(module))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"async_checkpoint": True}, {"save_distributed_checkpoint": False}])
@pytest.mark.parametrize("method", ["ewc", "er"])
def test_sharded_methods_resume(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """In the second task, from a folder, one written in the background, and a file."""
    straight, resumed = ToyModule(dropout=0.3), ToyModule(dropout=0.3)
    strategies = [FSDP2Strategy(**settings) for _ in range(2)]
    fit = trainer(tmp_path, [METHODS[method](), saver(tmp_path)], **ON_GPU, strategy=strategies[0])
    fit.fit(straight, datamodule=toy_stream())
    fit = trainer(tmp_path, [METHODS[method](), saver(tmp_path / "resumed")], **ON_GPU, strategy=strategies[1])
    fit.fit(resumed, datamodule=toy_stream(), ckpt_path=tmp_path / "step=8.ckpt")
    torch.testing.assert_close(full(resumed), full(straight), rtol=0, atol=1e-6)


def language_model(**settings: Any) -> CausalLM:
    """LoRA on a 4-bit base, in bfloat16."""
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    defaults: dict[str, Any] = {"adapter": lora, "quantization": {"mode": "nf4"}, "dtype": "bfloat16"}
    return CausalLM(dict(LLAMA), learning_rate=1e-2, **(defaults | settings))


@pytest.mark.parametrize("offload", [False, True], ids=["gpu", "cpu offload"])
def test_language_model_trains_on_a_quantized_base(offload: bool, tmp_path: Path) -> None:
    """The loss falls, EWC protects the adapters, the base keeps its bytes, and a resume goes on."""
    module = language_model()
    strategy = FSDP2Strategy(cpu_offload=offload, activation_checkpointing=True)
    fit = trainer(tmp_path, [EWC(1.0), saver(tmp_path)], **ON_GPU, strategy=strategy)
    stream = token_stream(epochs_per_task=6)
    before = trainer(tmp_path, **ON_GPU).validate(language_model(), datamodule=token_stream(), verbose=False)
    fit.fit(module, datamodule=stream)
    after = fit.validate(module, datamodule=stream, verbose=False)
    assert after[1]["val_loss/dataloader_idx_1"] < before[1]["val_loss/dataloader_idx_1"]
    resumed = language_model()
    strategy = FSDP2Strategy(cpu_offload=offload, activation_checkpointing=True)
    again = trainer(tmp_path, [EWC(1.0), saver(tmp_path / "resumed")], **ON_GPU, strategy=strategy)
    again.fit(resumed, datamodule=token_stream(epochs_per_task=6), ckpt_path=tmp_path / "step=20.ckpt")
    torch.testing.assert_close(full(resumed), full(module), rtol=0, atol=1e-2)


def test_sharding_gives_the_logits_of_the_unsharded_model(tmp_path: Path) -> None:
    """A 4-bit base, on one GPU with and without the strategy, to the bit."""
    plain, sharded = language_model(), language_model()
    outputs = []
    for module, settings in ((plain, {}), (sharded, {"strategy": FSDP2Strategy()})):
        losses = trainer(tmp_path, **ON_GPU, **settings).validate(module, datamodule=token_stream(), verbose=False)
        outputs.append([value for loader in losses for value in loader.values()])
    assert outputs[0] == outputs[1]


def test_mixed_precision_and_hybrid_sharding(tmp_path: Path) -> None:
    """Options that a CPU serves as well, on nccl."""
    for settings in ({"mixed_precision": "bfloat16"}, {"hybrid": True}, {"reshard_after_forward": False}):
        module = ToyModule()
        fit = trainer(tmp_path, [EWC(5.0)], **ON_GPU, strategy=FSDP2Strategy(**settings))
        fit.fit(module, datamodule=toy_stream())
        assert torch.isfinite(full(module)).all()
        assert next(module.parameters()).is_cuda


LOSSES: dict[str, Any] = {
    "npo": {},
    "simnpo": {},
    "gradient-ascent": {},
    "undial": {"retain": "kl"},
    "max-entropy": {},
    "random-label": {},
    "pdu": {"method": PDU(epsilon=0.1)},
    "rmu": {"method": RMU("model.0", coefficient=2.0), "retain": "own"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_requests_end_where_they_end_on_the_cpu(name: str, tmp_path: Path) -> None:
    """Identities, labels drawn by them, control vectors and cached scores meet scores on the device."""

    def serve(place: str, **settings: Any) -> Tensor:
        unlearn = Unlearn(**{"method": name, **copy.deepcopy(LOSSES[name])})
        stream = toy_stream(requests=[ForgetRequest("class 0", classes=[0], after=1)], epochs_per_request=2)
        module = ToyModule()
        trainer(tmp_path / place, [unlearn], **settings).fit(module, datamodule=stream)
        assert len(unlearn.ledger) == 1
        return full(module)

    torch.testing.assert_close(serve("gpu", **ON_GPU), serve("cpu"), rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", [SelectiveSynapticDampening, TaskVectorNegation])
def test_edits_on_a_gpu(method: Any, tmp_path: Path) -> None:
    """Importances and differences of weights are made where the weights are."""
    stream = toy_stream(requests=[ForgetRequest("class 0", classes=[0], after=1)])
    edit = method(alpha=1.5)
    trainer(tmp_path, [edit], **ON_GPU).fit(ToyModule(), datamodule=stream)
    assert len(edit.ledger) == 1

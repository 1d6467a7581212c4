"""What `sharded.py` trains: language models from a config, by hand and by the library, in turns of a few steps each."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from workloads import Cost, quiet_trainer

from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.core.state import local
from lightning_cl.datamodules import Predefined, TaskStreamDataModule
from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.modules import CausalLM
from lightning_cl.quantization import build_skeleton
from lightning_cl.quantization.loading import give_back_freed_memory
from lightning_cl.quantization.names import checkpoint_name
from lightning_cl.quantization.reader import INDEX
from lightning_cl.strategies import FSDP2Strategy

LORA: dict[str, Any] = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
NF4: dict[str, Any] = {"mode": "nf4", "double_quant": True}
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1

Boundary = Callable[[bool], None]


@dataclass(frozen=True)
class Size:
    """A Llama and its batches.

    Args:
        hidden: Width of the residual stream.
        inner: Width of the feed-forward layers.
        blocks: Number of blocks.
        heads: Attention heads, and those of keys and values.
        vocabulary: Tokens that there are.
        batch: Rows in a step of a rank, and tokens in a row.
        dtype: Dtype of the computation, and of the checkpoint.
        lap: Steps in a turn.
    """

    hidden: int
    inner: int
    blocks: int
    heads: tuple[int, int]
    vocabulary: int
    batch: tuple[int, int]
    dtype: str = "float32"
    lap: int = 1

    @property
    def tokens(self) -> int:
        return self.batch[0] * self.batch[1]

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            vocab_size=self.vocabulary,
            max_position_embeddings=max(2048, self.batch[1]),
        )

    def weights(self) -> int:
        return sum(parameter.numel() for parameter in build_skeleton(self.config()).parameters())


SMALL = Size(128, 256, 2, (4, 2), 512, (2, 32))


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Rows of random tokens."""

    def __init__(self, size: Size, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(size.vocabulary, (rows, size.batch[1]), generator=generator)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index]}


def root_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def write_checkpoint(size: Size, folder: str) -> None:
    """Write random weights as Hugging Face does: one file for each block, one for the rest, and an index."""
    from safetensors.torch import save_file

    path, device = Path(folder), root_device()
    size.config().save_pretrained(path)
    skeleton = build_skeleton(size.config(), dtype=getattr(torch, size.dtype))
    files: dict[str, dict[str, Tensor]] = {}
    for name, parameter in skeleton.named_parameters():
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{block}.safetensors", {})[name] = parameter
    for number, (file, parameters) in enumerate(files.items()):
        generator = torch.Generator(device).manual_seed(number)
        values = {}
        for name, empty in parameters.items():
            value = torch.ones(empty.shape, dtype=empty.dtype, device=device)
            if empty.ndim > 1:
                value.normal_(0.0, 0.02, generator=generator)
            values[name] = value.cpu()
        save_file(values, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, parameters in files.items() for name in parameters}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---------------------------------------------------------------------- turns


class Relay:
    """Lets runs of one process take turns, a few steps each, with all of their states in memory.

    Each is a thread, of which one at a time goes on. So what else happens on the machine meets all of them alike.

    Args:
        runs: Functions that call what they are given at every boundary between turns, with whether the next one counts.
    """

    def __init__(self, *runs: Callable[[Boundary], Any]) -> None:
        self.laps: list[list[Cost]] = [[] for _ in runs]
        self.results: list[Any] = [None for _ in runs]
        self._runs = runs
        self._waiting = [threading.Semaphore(0) for _ in runs]
        self._going = list(range(len(runs)))

    def go(self) -> list[list[Cost]]:
        """Run all to their ends; return for each the costs of its turns: the slowest rank's clock, all processors."""
        threads = [threading.Thread(target=self._run, args=(index,)) for index in range(len(self._runs))]
        for thread in threads:
            thread.start()
        self._waiting[0].release()
        for thread in threads:
            thread.join()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, self.laps)
        return [
            [Cost(max(c.wall for c in ranks), sum(c.cpu for c in ranks)) for ranks in zip(*laps, strict=True)]
            for laps in zip(*everywhere, strict=True)
        ]

    def _run(self, index: int) -> None:
        try:
            if torch.cuda.is_available():
                # of a thread
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            self._waiting[index].acquire()
            counts, start = False, Cost.now()

            def boundary(next_counts: bool) -> None:
                nonlocal counts, start
                synchronize()
                if counts:
                    self.laps[index].append(Cost.now() - start)
                self._pass_on(index)
                self._waiting[index].acquire()
                counts = next_counts
                dist.barrier()
                synchronize()
                start = Cost.now()

            self.results[index] = self._runs[index](boundary)
            self._pass_on(index, ends=True)
        except BaseException:
            # the other ranks wait in a collective: the parent ends them
            traceback.print_exc()
            os._exit(1)

    def _pass_on(self, index: int, ends: bool = False) -> None:
        position = self._going.index(index)
        following = self._going[(position + 1) % len(self._going)]
        if ends:
            self._going.remove(index)
        if following in self._going:
            self._waiting[following].release()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------- by hand


def build_by_hand(folder: str, size: Size, quantized: bool) -> nn.Module:
    """Return a sharded model as one would build it with transformers, bitsandbytes, peft and torch."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, device = getattr(torch, size.dtype), root_device()
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    how: dict[str, Any] = {"quantization_config": settings, "device_map": {"": device}} if quantized else {}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).to(device)
    model.config.use_cache = False
    blocks = model.model.layers
    if quantized:
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                # the parameter loses it when it is sharded
                layer.quant_state = layer.weight.quant_state
        arguments = {name: value for name, value in LORA.items() if name != "peft_type"}
        model = get_peft_model(model, LoraConfig(**arguments), autocast_adapter_dtype=False)
        for name, layer in model.named_modules():
            if hasattr(layer, "reset_lora_parameters"):
                # the same factors on all ranks, and those with which the library starts
                with isolated_rng(derived_seed("adapter", 0, checkpoint_name(name), "default")):
                    layer.reset_lora_parameters("default", True)
                for part in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                    part.data = part.data.to(device, dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    return model  # type: ignore[no-any-return]


def by_hand(boundary: Boundary, folder: str, size: Size, quantized: bool, steps: int, warm: int) -> dict[str, Tensor]:
    """Train by a loop of torch; return this rank's shards of what was trained."""
    model, device = build_by_hand(folder, size, quantized), root_device()
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1 and id(parameter) not in embeddings]
    others = [parameter for parameter in trainable if parameter.ndim == 1 or id(parameter) in embeddings]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LEARNING_RATE, betas=BETAS, fused=True)
    rows, world = size.batch[0], dist.get_world_size()
    data = TokenBlocks(size, steps * rows * world, seed=0)
    # the order of the stream
    order = TaskSampler(
        torch.arange(len(data)).numpy(), task=0, batch_size=rows, seed=0, rank=dist.get_rank(), world_size=world
    )
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=[index.rows.tolist() for index in order])
    gc.collect()
    for step, batch in enumerate(loader):
        if step % size.lap == 0:
            boundary(step >= warm)
        ids = batch["input_ids"].to(device, non_blocking=True)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    return shards(model)


def shards(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's shards of what is trained, by the names of the network."""
    return {
        name.removeprefix("network."): local(parameter.detach()).to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# ---------------------------------------------------------------------- by the library


class Pace(Callback):
    """Hands over to the other runs every few steps, and keeps the weights of the end."""

    def __init__(self, boundary: Boundary, lap: int, first: int) -> None:
        self.boundary, self.lap, self.first = boundary, lap, first
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.lap == 0:
            self.boundary(trainer.global_step >= self.first)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = shards(pl_module)


def language_model(folder: str, size: Size, quantized: bool, kind: type[CausalLM] = CausalLM) -> CausalLM:
    how: dict[str, Any] = {"adapter": LORA, "quantization": NF4} if quantized else {}
    return kind(
        folder,
        dtype=size.dtype,
        learning_rate=LEARNING_RATE,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        schedule="constant",
        warmup=0,
        **how,
    )


def stream(size: Size, tasks: list[int], rows: int) -> TaskStreamDataModule:
    """Return tasks of so many steps, of so many rows for each rank."""
    data = [TokenBlocks(size, steps * rows * dist.get_world_size(), seed) for seed, steps in enumerate(tasks)]
    return TaskStreamDataModule(data, scenario=Predefined([f"task {i}" for i in range(len(tasks))]), batch_size=rows)


def fit(module: LightningModule, data: TaskStreamDataModule, callbacks: list[Callback]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        trainer = quiet_trainer(
            accelerator=root_device().type,
            devices=dist.get_world_size(),
            strategy=FSDP2Strategy(),
            callbacks=callbacks,
            default_root_dir=directory,
        )
        gc.collect()
        trainer.fit(module, datamodule=data)


def by_the_library(
    boundary: Boundary, folder: str, size: Size, quantized: bool, steps: int, warm: int
) -> dict[str, Tensor]:
    """Train what :func:`by_hand` trains."""
    pace = Pace(boundary, size.lap, warm)
    fit(language_model(folder, size, quantized), stream(size, [steps], size.batch[0]), [pace])
    return pace.weights


SIDES: dict[str, Callable[..., Any]] = {"torch loop": by_hand, "CausalLM": by_the_library}


# ---------------------------------------------------------------------- memory


class Peak:
    """The most memory that this process held above what it held at the start: on the GPU, or resident."""

    def __init__(self) -> None:
        gc.collect()
        give_back_freed_memory()
        self._start = self._reset()

    def restart(self) -> int:
        """Return the peak, in bytes, and let the next one start."""
        on_gpu = torch.cuda.is_available()
        peak = (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - self._start
        gc.collect()
        give_back_freed_memory()
        self._reset()
        return peak

    @staticmethod
    def _reset() -> int:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

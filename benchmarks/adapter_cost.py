"""What slots for adapters cost, as ratios within one run: ``python benchmarks/adapter_cost.py [--quick]``.

A step with a full slot for finished tasks is compared with a step of plain LoRA whose rank is that of the slot that
trains. Then a stream of fifty short tasks: its last tasks are compared with its first ones after the slot is full, in
time and in memory; and a boundary (fold and restart) with the time of a task of a hundred steps.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import Ratio, be_quiet, ratio, show, take_turns, write
from methods import MEBIBYTE, WINDOW, Flatness, Probe, show_flatness
from torch import Tensor
from torch.utils.data import Dataset
from workloads import Cost, quiet_trainer

from lightning_cl.adapters import AdapterSlots, OLoRA
from lightning_cl.core.task import Task
from lightning_cl.datamodules import Predefined, TaskStreamDataModule
from lightning_cl.modules import CausalLM, LanguageModel, SequenceClassifier

RESULTS = Path(__file__).parent / "results" / "adapter_cost.json"
RANK, CAPACITY, CLASSES = 8, 64, 10
TASK_STEPS = 100  # of the task that a boundary is held against
BERT = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
LLAMA = {"model_type": "llama", "vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 8}


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens with labels."""

    def __init__(self, rows: int, length: int = 32, *, classes: int = CLASSES) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.input_ids = torch.randint(1000, (rows, length), generator=generator)
        self.labels = torch.arange(rows) % classes

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


class Rows(Texts):
    """Random tokens for a language model."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Model:
    """What is trained.

    Args:
        name: ``"encoder"``, of the size of all-MiniLM-L6-v2 with LoRA on query and value, or ``"llama"``, with LoRA on
            all its linear layers, or ``"narrow llama"``.
        batch: Sequences of 32 tokens in a step.
        width: Of the Llamas. A and B of the slot take 2 * CAPACITY / width of a layer's own work.
    """

    name: str
    batch: int
    width: int = 0

    def module(self, rank: int) -> LanguageModel:
        adapter: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        if self.name == "encoder":
            config = {**BERT, "intermediate_size": 1536}
            return SequenceClassifier(config, CLASSES, adapter={**adapter, "target_modules": ["query", "value"]})
        config = {**LLAMA, "hidden_size": self.width, "intermediate_size": 11 * self.width // 4}
        return CausalLM(config, adapter={**adapter, "target_modules": "all-linear"})

    def data(self, tasks: int, steps: int) -> list[Texts]:
        kind = Texts if self.name == "encoder" else Rows
        return [kind(steps * self.batch) for _ in range(tasks)]

    def stream(self, data: list[Texts]) -> TaskStreamDataModule:
        return TaskStreamDataModule(list(data), scenario=Predefined(), batch_size=self.batch)


class Clock(Callback):
    """Notes when batches start."""

    def __init__(self) -> None:
        self.starts: list[Cost] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(Cost.now())

    def cost(self, first: int, last: int) -> Cost:
        """Return the median cost of the steps from ``first`` up to ``last``, which is not among them."""
        costs = [
            after - before
            for before, after in zip(self.starts[first:last], self.starts[first + 1 : last + 1], strict=True)
        ]
        return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


class FullSlots(AdapterSlots):
    """Starts with a slot for finished tasks that has no free rank."""

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        generator = torch.Generator().manual_seed(0)
        for slot in self.slots.values():
            shapes = [parameter.shape for parameter in slot.parameters(slot.past).values()]
            slot.write(slot.past, *[0.01 * torch.randn(shape, generator=generator) for shape in shapes])


def step(model: Model, turns: int, steps: int) -> list[Ratio]:
    """Compare a step with full slots with steps of plain LoRA of the rank that trains, and of all ranks together."""

    def run(rank: int, *callbacks: Callback) -> Cost:
        clock = Clock()
        trainer = quiet_trainer(callbacks=[clock, *callbacks], max_steps=steps)
        trainer.fit(model.module(rank), datamodule=model.stream(model.data(1, steps)))
        return clock.cost(2, steps - 1)

    found = take_turns(
        turns,
        lambda: run(RANK),
        lambda: run(RANK, FullSlots(CAPACITY)),
        lambda: run(RANK + CAPACITY),
    )
    return [
        ratio(
            model.name,
            f"slots of rank {RANK} and {CAPACITY} / LoRA of rank {RANK}",
            [(plain, slots) for plain, slots, _ in found],
            1.25,
        ),
        ratio(
            model.name,
            f"slots of rank {RANK} and {CAPACITY} / LoRA of rank {RANK + CAPACITY}",
            [(wide, slots) for _, slots, wide in found],
            None,
        ),
    ]


def boundary(model: Model, method: AdapterSlots, tasks: int, steps: int) -> tuple[Flatness, Ratio]:
    """Fit a stream of short tasks; return its flatness, and the share of a boundary in the time of a longer task."""
    clock = Clock()
    data = model.data(tasks, steps)
    # the slot is full after two tasks: from then on each boundary approximates
    first, last = 4, tasks - 1
    probe = Probe(method, steps, (first, last), [tensor for part in data for tensor in (part.input_ids, part.labels)])
    trainer = quiet_trainer(callbacks=[clock, probe, method])
    trainer.fit(model.module(RANK), datamodule=model.stream(data))
    early, late = range(first, first + WINDOW), range(tasks - WINDOW, tasks)

    def step_ms(window: range) -> float:
        return 1000 * median(clock.cost(task * steps, (task + 1) * steps - 1).cpu for task in window)

    def boundary_ms(window: range) -> float:
        return 1000 * median(probe.boundaries[task] for task in window)

    row = Flatness(
        method=f"{model.name}, {type(method).__name__}",
        tasks=tasks,
        step_ms=step_ms(early),
        step=step_ms(late) / step_ms(early),
        task_end_ms=boundary_ms(early),
        task_end=boundary_ms(late) / boundary_ms(early),
        tensors_mib=probe.tensors[first] / MEBIBYTE,
        tensors=probe.tensors[last] / probe.tensors[first],
        process=probe.process[last] / probe.process[first],
        grows="",
    )
    task_ms, end_ms = TASK_STEPS * step_ms(late), boundary_ms(late)
    what = f"{type(method).__name__}: a boundary, and a task of {TASK_STEPS} steps / the task"
    share = 1 + end_ms / task_ms
    return row, Ratio(model.name, what, cpu=share, wall=share, base_ms=task_ms, bar=1.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of slots for adapters, as ratios.")
    parser.add_argument("--quick", action="store_true", help="few and short turns, 12 tasks; prints, writes no file")
    quick = parser.parse_args().quick
    be_quiet()
    ratios: list[Ratio] = []
    rows: list[Flatness] = []
    for model in (Model("encoder", 16), Model("llama", 8, 1024), Model("narrow llama", 16, 256)):
        ratios += step(model, turns=2 if quick else 7, steps=8 if quick else 20)
        if model.name.startswith("narrow"):
            continue
        for method in (AdapterSlots(2 * RANK), OLoRA(form="cosine", capacity=2 * RANK)):
            row, share = boundary(model, method, tasks=12 if quick else 50, steps=4)
            rows.append(row)
            ratios.append(share)
    show(ratios)
    show_flatness(rows)
    if not quick:
        write(RESULTS, "peft", "transformers", ratios=ratios, tasks=rows)


if __name__ == "__main__":
    main()

"""What unlearning costs beside the passes it must make: ``python benchmarks/unlearning_cost.py``.

A step of each method is compared with a plain module that makes the same forwards and backwards: on the batch to
forget, on the retained one, and the forwards without a graph of the reference. Both take turns; the ratio is the median
over turns, with its quartiles. The bytes of all live tensors inside a step show what a reference model takes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import be_quiet
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.unlearning import CEU, DPO, NPO, PDU, RMU, UNDIAL, WGA, GradientAscent, SimNPO, Unlearn

RESULTS = Path(__file__).parent / "results" / "unlearning_cost.json"
ROWS, TOKENS, VOCABULARY, BATCH = 160, 64, 2000, 8
BAR = 1.10


class Tokens(Dataset[dict[str, Tensor]]):
    """Random tokens, the first half of each row a prompt; with an alternate answer for DPO."""

    def __init__(self, *, alternate: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (ROWS, 2, TOKENS), generator=generator)
        self.alternate = alternate

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        first, second = (_row(ids) for ids in self.ids[index])
        return {**first, **{f"alternate_{name}": value for name, value in second.items()}} if self.alternate else first


def _row(ids: Tensor) -> dict[str, Tensor]:
    labels = ids.clone()
    labels[: TOKENS // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Language(LightningModule):
    """A Llama of four blocks, as a user has it."""

    def __init__(self, *, lora: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=4, **sizes))
        if lora:
            self.model = get_peft_model(self.model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5, fused=True)


class Passes(Language):
    """Makes the passes of a method and nothing else."""

    def __init__(self, backwards: list[str], forwards: list[str], **settings: Any) -> None:
        super().__init__(**settings)
        self.backwards = backwards
        self.forwards = forwards

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        parts = {"forget": batch["forget"], "retain": batch["retain"]}
        names = ("input_ids", "attention_mask", "labels")
        plain = {part: {name: rows[name] for name in names} for part, rows in parts.items()}
        if "alternate_labels" in batch["forget"]:
            plain["alternate"] = {name: batch["forget"][f"alternate_{name}"] for name in names}
        with torch.no_grad():
            for part in self.forwards:
                self.model(**plain[part])
        return torch.stack([self.model(**plain[part]).loss for part in self.backwards]).sum()


class Clock(Callback):
    """The processor time of each step, from one batch to the next, and the bytes of all live tensors in the third."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.bytes = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append(time.process_time())
        if len(self.times) == 3:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
            self.bytes = sum(storages.values())
            self.times[-1] = time.process_time()


class Measured(NamedTuple):
    """Of a fit: the median time of a step, in seconds, and the bytes of all live tensors in the third."""

    step: float
    bytes: int


def _tensors() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu"]


@dataclass(frozen=True)
class Case:
    """A method and the passes that it must make.

    Args:
        make: Makes its callback.
        backwards: Batches that it makes a forward and a backward on.
        forwards: Batches that the reference makes a forward on.
        lora: Whether the module has adapters.
    """

    make: Callable[[], Unlearn]
    backwards: tuple[str, ...] = ("forget", "retain")
    forwards: tuple[str, ...] = ()
    lora: bool = False


def _unlearn(loss: Callable[[], Any], retain: Any = "nll", **settings: Any) -> Callable[[], Unlearn]:
    return lambda: Unlearn(loss(), retain=retain, measure_samples=1, **settings)


CASES = {
    "gradient ascent": Case(_unlearn(GradientAscent, None), ("forget",)),
    "GradDiff": Case(_unlearn(GradientAscent)),
    "NPO, cached scores": Case(_unlearn(NPO)),
    "NPO, copy": Case(_unlearn(NPO, reference="copy"), forwards=("forget",)),
    "NPO, adapters off": Case(
        _unlearn(NPO, reference="peft_disabled", anchor="original"), forwards=("forget",), lora=True
    ),
    "NPO, KL": Case(_unlearn(NPO, "kl"), forwards=("forget", "retain")),
    "SimNPO": Case(_unlearn(SimNPO)),
    "DPO, cached scores": Case(_unlearn(DPO), ("forget", "alternate", "retain")),
    "DPO, copy": Case(_unlearn(DPO, reference="copy"), ("forget", "alternate", "retain"), ("forget", "alternate")),
    "UNDIAL": Case(_unlearn(UNDIAL), forwards=("forget",)),
    "WGA": Case(_unlearn(WGA)),
    "CE-U": Case(_unlearn(CEU)),
    "PDU": Case(_unlearn(lambda: PDU(epsilon=0.5))),
    "RMU": Case(_unlearn(lambda: RMU("model.model.layers.1"), "own"), forwards=("forget", "retain")),
}


def measure(module: Language, callbacks: list[Callback], steps: int, *, alternate: bool) -> Measured:
    """Measure a fit of one request."""
    clock = Clock()
    rows = list(range(BATCH * steps))
    data = UnlearningDataModule(Tokens(alternate=alternate), requests=[ForgetRequest("a", rows=rows)], batch_size=BATCH)
    Trainer(
        accelerator="cpu",
        callbacks=[clock, *(callbacks or [_Served()])],
        default_root_dir=tempfile.mkdtemp(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=data)
    # Lightning lets a callback hold the module
    return Measured(
        statistics.median(b - a for a, b in zip(clock.times[2:], clock.times[3:], strict=False)), clock.bytes
    )


class _Served(Callback):
    """Lets the plain module have the batches of a request."""

    acts_on = ("forget",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", help="a method")
    options = parser.parse_args()
    be_quiet()
    rows = []
    print(f"{'method':<20} {'step, ms':>9} {'ratio':>6}  {'quartiles':<13} bytes of tensors beside the plain module's")
    for name, case in CASES.items():
        if options.only not in (None, name):
            continue
        ratios, times, extra = [], [], 0
        settings = {"alternate": name.startswith("DPO")}

        def plain_steps(case: Case = case, settings: dict[str, bool] = settings) -> Measured:
            return measure(Passes([*case.backwards], [*case.forwards], lora=case.lora), [], 14, **settings)

        def own_steps(case: Case = case, settings: dict[str, bool] = settings) -> Measured:
            return measure(Language(lora=case.lora), [case.make()], 14, **settings)

        for turn in range(options.turns + 1):
            # what drifts on the machine favours neither
            if turn % 2:
                found, plain = own_steps(), plain_steps()
            else:
                plain, found = plain_steps(), own_steps()
            extra = found.bytes - plain.bytes
            if turn:  # the first one warms up
                ratios.append(found.step / plain.step)
                times.append(found.step)
        ratio = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        step_ms = statistics.median(times) * 1000
        row = {"method": name, "ratio": ratio, "quartiles": [low, high], "step_ms": step_ms, "extra_bytes": extra}
        rows.append(row)
        verdict = "pass" if ratio <= BAR else "miss"
        spread = f"{low:.3f}-{high:.3f}"
        print(f"{name:<20} {step_ms:>9.1f} {ratio:>6.3f}  {spread:<13} {extra:>12,} {verdict}", flush=True)
    if options.only is None:
        versions = {package: version(package) for package in ("torch", "lightning", "transformers", "peft")}
        RESULTS.write_text(json.dumps({"bar": BAR, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

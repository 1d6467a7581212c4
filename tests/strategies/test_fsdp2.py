"""Any module, sharded: where it ends, what it refuses, how its units are found."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from language import LLAMA, LORA, token_stream
from lightning_cl import EWC, FSDP2Strategy
from lightning_cl.modules import CausalLM
from ranks import Ranks
from toys import NUM_CLASSES, NUM_FEATURES, ToyModule, toy_data, toy_stream, trainer
from traffic import Traffic


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.inner(self.norm(inputs)).relu()


class Residual(LightningModule):
    """Blocks, and parameters of the module itself that its steps use outside of any forward."""

    def __init__(self, seed: int = 7) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Linear(NUM_FEATURES, 5)
            self.blocks = nn.ModuleList([Block(5) for _ in range(3)])
            self.head = nn.Linear(5, NUM_CLASSES)
        self.temperature = nn.Parameter(torch.ones(()).reshape(1))
        self.register_buffer("shift", torch.full((NUM_FEATURES,), 0.1 * seed))
        self.seen_forward = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen_forward += 1
        hidden = self.stem(inputs + self.shift.to(inputs.dtype))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self(inputs) * self.temperature, labels) + 0.01 * self.stem(inputs).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = cross_entropy(self(batch[0]) * self.temperature, batch[1])
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[1]))

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]) * self.temperature

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def full(module: nn.Module) -> Tensor:
    """All parameters, gathered."""
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([value.detach().flatten() for value in values])


def loader(batch_size: int, of_this_rank: bool = False) -> DataLoader[Any]:
    """The toy data in order, or this rank's half of every batch."""
    inputs, labels = toy_data().tensors
    if of_this_rank:
        rows = torch.arange(48).view(-1, 2, batch_size)[:, int(os.environ["RANK"])].flatten()
        inputs, labels = inputs[rows], labels[rows]
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


def fit_on_this_rank(root: Path, seeds: tuple[int, int], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Fit, evaluate and predict; the ranks start from different weights."""
    module = Residual(seeds[int(os.environ["RANK"])])
    fit = trainer(
        root,
        strategy=FSDP2Strategy(**settings),
        devices=2,
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        use_distributed_sampler=False,
        **more,
    )
    data = loader(4, of_this_rank=True)
    fit.fit(module, data, data)
    metrics = fit.validate(module, data, verbose=False)[0]
    predictions = torch.cat(fit.predict(module, data))  # type: ignore[arg-type]
    return {
        "weights": full(module),
        "loss": metrics["val_loss"],
        "predictions": predictions,
        "units": [name for name, part in module.named_modules() if isinstance(part, FSDPModule)],
        "sharded": all(isinstance(p, DTensor) for p in module.parameters()),
        "local": sum(p.to_local().numel() for p in module.parameters()),
        "shift": module.shift,
        "own_forward": "forward" in module.__dict__,
    }


@functools.cache
def one_process() -> tuple[Tensor, float, Tensor]:
    """The same by Lightning on one process, with the joined batch."""
    module = Residual()
    fit = trainer(".", max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5)
    fit.fit(module, loader(8), loader(8))
    loss = fit.validate(module, loader(8), verbose=False)[0]["val_loss"]
    return full(module), loss, torch.cat(fit.predict(module, loader(8)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def is_middle(name: str, part: nn.Module) -> bool:
    """A policy of the user's."""
    return name == "blocks.1"


SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "names": {"wrap": ["Linear"]},
    "function": {"wrap": is_middle},
    "keep gathered": {"reshard_after_forward": False},
    "activation checkpointing": {"activation_checkpointing": True},
    "hybrid": {"hybrid": True},
}
UNITS = {
    "names": ["", "stem", "blocks.0.inner", "blocks.1.inner", "blocks.2.inner", "head"],
    "function": ["", "blocks.1"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_end_where_one_process_ends(name: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """With accumulation and clipping, whatever the units; and evaluate and predict alike."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, (7, 7), SETTINGS[name])
    weights, loss, predictions = one_process()
    torch.testing.assert_close(first["weights"], weights, rtol=0, atol=2e-6)
    assert torch.equal(first["weights"], second["weights"])
    assert first["loss"] == second["loss"] == pytest.approx(loss, abs=1e-6)
    joined = torch.stack(
        [first["predictions"].view(-1, 4, NUM_CLASSES), second["predictions"].view(-1, 4, NUM_CLASSES)]
    )
    torch.testing.assert_close(joined.transpose(0, 1).reshape(-1, NUM_CLASSES), predictions, rtol=0, atol=1e-5)
    assert first["units"] == UNITS.get(name, ["", "blocks.0", "blocks.1", "blocks.2"])
    assert first["sharded"]
    assert second["sharded"]
    if name != "hybrid":
        # uneven: 5 rows are 3 and 2
        assert first["local"] + second["local"] == len(weights)
        assert max(first["local"], second["local"]) < 0.7 * len(weights)
    assert not first["own_forward"]


@pytest.mark.distributed
def test_ranks_start_from_the_weights_of_the_first(two_ranks: Ranks, tmp_path: Path) -> None:
    """Modules that were built without a seed are made alike, buffers too, as DDP does."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, (7, 8), {})
    torch.testing.assert_close(first["weights"], one_process()[0], rtol=0, atol=2e-6)
    assert torch.equal(second["shift"], torch.full((NUM_FEATURES,), 0.7))


@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["bfloat16", MixedPrecisionPolicy(param_dtype=torch.bfloat16)], ids=["name", "own"])
def test_computes_in_bfloat16_on_float32_weights(policy: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """The weights stay near those of float32, and are not equal to them."""
    first, _ = two_ranks.run(fit_on_this_rank, tmp_path, (7, 7), {"mixed_precision": policy})
    weights = one_process()[0]
    assert first["weights"].dtype == torch.float32
    assert 1e-4 < (first["weights"] - weights).abs().max() < 0.2


@pytest.mark.distributed
def test_lightning_precision_works(two_ranks: Ranks, tmp_path: Path) -> None:
    """`precision='bf16-mixed'` is Lightning's own."""
    first = two_ranks.run(functools.partial(fit_on_this_rank, precision="bf16-mixed"), tmp_path, (7, 7), {})[0]
    assert 1e-4 < (first["weights"] - one_process()[0]).abs().max() < 0.2


def test_one_rank_works_by_name(tmp_path: Path) -> None:
    """`strategy='fsdp2'` on one CPU, with a method on top, for two fits of one module."""
    module, plain = ToyModule(), ToyModule()
    for target, settings in ((plain, {}), (module, {"strategy": "fsdp2"})):
        trainer(tmp_path, [EWC(20.0)], **settings).fit(target, datamodule=toy_stream())
        fit = trainer(tmp_path, [EWC(20.0)], **settings)
        fit.fit(target, datamodule=toy_stream())
        assert 0 <= fit.validate(target, datamodule=toy_stream(), verbose=False)[0]["val_acc/dataloader_idx_0"] <= 1
    torch.testing.assert_close(full(module), full(plain), rtol=0, atol=1e-6)
    assert all(isinstance(p, DTensor) for p in module.parameters())


def collectives_of_a_fit(root: Path, calls_itself: bool) -> list[Counter[Any]]:
    """Train two steps; return what the ranks sent each other in each of them."""
    module = Residual()
    if not calls_itself:
        module.training_step = Inside.training_step.__get__(module)  # type: ignore[method-assign]
    seen: list[Counter[Any]] = []

    class Watch(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.traffic = Traffic()
            self.traffic.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.traffic.__exit__(None, None, None)
            seen.append(self.traffic.moved())

    fit = trainer(root, [Watch()], strategy="fsdp2", devices=2, max_steps=2, use_distributed_sampler=False)
    fit.fit(module, loader(4, of_this_rank=True), loader(4))
    return seen


class Inside(Residual):
    """Calls its forward as a function, without the hooks of a module's call."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.forward(inputs) * self.temperature, labels)


@pytest.mark.distributed
def test_a_step_that_calls_the_module_gathers_nothing_twice(two_ranks: Ranks, tmp_path: Path) -> None:
    """`self(inputs)` in a step enters the root's forward a second time: same collectives as without."""
    nested, flat = (two_ranks.run(collectives_of_a_fit, tmp_path, calls)[0] for calls in (True, False))
    assert nested == flat
    # three blocks and the root, gathered and reduced
    assert sum(count for one, count in flat[1].items() if one.kind == "reduce-scatter") == 4
    assert sum(count for one, count in flat[1].items() if one.kind == "all-gather") == 2 * 3 + 1


# ---------------------------------------------------------------------- what is refused


def fit_once(root: Path, module: LightningModule, strategy: FSDP2Strategy | None = None, **settings: Any) -> None:
    """Try to train an epoch."""
    trainer(root, strategy=strategy or FSDP2Strategy(), max_epochs=1, **settings).fit(module, loader(8), loader(8))


class TiedAcrossBlocks(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].inner.weight = self.blocks[0].inner.weight


class TiedInTheRoot(Residual):
    """Embedding and head of a language model, say: both belong to the root."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(NUM_FEATURES, 5)
        self.twin.weight = self.stem.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * self.twin(inputs)[:, :NUM_CLASSES]


class EarlyOptimizer(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.early = [torch.optim.SGD(self.parameters(), lr=0.1)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early[0]


class LateAdapter(Residual):
    """Shards itself, and adds a trainable layer afterwards."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
        self.adapter = nn.Linear(5, 5)


class OnMeta(Residual):
    def __init__(self) -> None:
        with torch.device("meta"):
            super().__init__()


class TwoDtypes(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].inner.to(torch.bfloat16)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (TiedAcrossBlocks, {}, r"'blocks.0.inner.weight' and 'blocks.2.inner.weight' are one shared parameter.*wrap="),
    (EarlyOptimizer, {}, r"SGD holds parameters as they were before sharding.*configure_optimizers"),
    (LateAdapter, {}, r"'adapter.weight' was added after the module was sharded.*quantize, add adapters, shard"),
    (OnMeta, {}, r"on the meta device.*fill_weights"),
    (TwoDtypes, {}, r"'blocks.1'.*several dtypes.*autocast_adapter_dtype=False"),
    (Residual, {"wrap": ["Blok"]}, r"'Blok'.*no submodule of that class.*'Linear'"),
    (Residual, {"wrap": "Block"}, r"list of class names such as \['Block'\]"),
    (Residual, {"wrap": lambda name, part: name == "blocks"}, r"'blocks', a ModuleList, which has no forward"),
    (Residual, {"cpu_offload": True}, r"`cpu_offload=True` moves shards from a GPU"),
    (Residual, {"tensor_parallel_size": 2}, r"`tensor_parallel_size=2` does not divide the 1 ranks"),
]


@pytest.mark.parametrize(("module", "settings", "message"), REFUSED, ids=[row[2][:30] for row in REFUSED])
def test_refused_before_training(module: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """What FSDP2 would fail on in the first step, or train wrongly without a word."""
    with pytest.raises(ValueError, match=message):
        fit_once(tmp_path, module(), FSDP2Strategy(**settings))


@pytest.mark.parametrize(
    ("strategy", "precision", "message"),
    [
        ({}, "16-true", r"precision='16-true'\)` would cast 'network.*weight', whose torch.bfloat16.*'bf16-mixed'"),
        (
            {"mixed_precision": MixedPrecisionPolicy(param_dtype=torch.float16)},
            "32-true",
            r"mixed_precision=.*torch.float16",
        ),
        ({"mixed_precision": "bfloat16"}, "32-true", None),
        ({}, "bf16-true", None),
    ],
    ids=["trainer", "policy", "same dtype", "same dtype by the trainer"],
)
def test_casts_of_packed_bytes_are_refused(
    strategy: dict[str, Any], precision: Any, message: str | None, tmp_path: Path
) -> None:
    """A cast of a 4-bit base would leave noise; to the dtype that it is stored in, nothing is cast."""
    pytest.importorskip("bitsandbytes")
    module = CausalLM({**LLAMA, "hidden_size": 64}, adapter=LORA, quantization={"mode": "nf4"}, dtype="bfloat16")
    fit = trainer(tmp_path, strategy=FSDP2Strategy(**strategy), precision=precision)
    if message is None:
        fit.fit(module, datamodule=token_stream())
        return
    with pytest.raises(ValueError, match=message):
        fit.fit(module, datamodule=token_stream())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_fsdp1_is_refused(tmp_path: Path) -> None:
    """A module that a user wrapped by hand."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Wrapped(Residual):
        def configure_model(self) -> None:
            self.stem = FullyShardedDataParallel(self.stem, device_id=torch.device("cpu"))

    with pytest.raises(ValueError, match=r"'stem' is wrapped by `FullyShardedDataParallel`.*strategy='fsdp2'"):
        fit_once(tmp_path, Wrapped())


def test_a_parameter_shared_inside_a_unit_is_served(tmp_path: Path) -> None:
    """Tied weights of the root train as without sharding."""
    tied = TiedInTheRoot()
    plain = copy.deepcopy(tied)
    trainer(tmp_path, max_epochs=1).fit(plain, loader(8), loader(8))
    fit_once(tmp_path, tied, use_distributed_sampler=False)
    assert tied.twin.weight is tied.stem.weight
    torch.testing.assert_close(full(tied), full(plain), rtol=0, atol=1e-6)


def test_settings_are_checked() -> None:
    """In the constructor, where a config is read."""
    with pytest.raises(ValueError, match=r"`mixed_precision` must be one of 'bfloat16', got 'bf16'"):
        FSDP2Strategy(mixed_precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`hybrid=True`.*`tensor_parallel_size=2`.*only one"):
        FSDP2Strategy(hybrid=True, tensor_parallel_size=2)

"""Every method on FSDP2 shards: the numbers of one process, and no traffic that training would not have anyway."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_cl import EWC, ContinualCallback, ExperienceReplay, FSDP2Strategy, TaskStreamDataModule
from lightning_cl.core.task import Task
from lightning_cl.datamodules import ClassIncremental, DataIncremental
from ranks import Ranks
from rows.ewc import ewc
from toys import NUM_CLASSES, NUM_FEATURES, ToyModule, toy_data, toy_stream, trainer
from traffic import Traffic

VOCABULARY = 48


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Unevaluated(LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: a task stream has a validation loader."""


class Stacked(Unevaluated):
    """Blocks whose sizes two ranks cannot halve; a loss that is a mean over samples."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = nn.Linear(NUM_FEATURES, 7)
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.GELU()) for _ in range(2)])
            self.head = nn.Linear(7, NUM_CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class Weighing(Stacked):
    """Class weights: the loss of a batch is no mean of the losses of its samples."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], weight=torch.linspace(0.5, 2.0, NUM_CLASSES))


class Attentive(Stacked):
    """Attention, whose projections are used by functions, so that no layer is called for them."""

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__(learning_rate)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.attention = nn.MultiheadAttention(7, 1, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        steps = self.stem(inputs).unsqueeze(1) * torch.arange(1.0, 4.0).unsqueeze(1)
        steps = steps + self.blocks[0](steps) + self.blocks[1](steps)
        return self.head(self.attention(steps, steps, steps, need_weights=False)[0].mean(1))


class Llama(Unevaluated):
    """A causal language model from a config, with LoRA adapters if ``rank`` is not 0, on a base in 4 bits if asked."""

    def __init__(self, rank: int = 0, quantized: bool = False, learning_rate: float = 0.2) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.learning_rate = learning_rate
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.model: Any = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    hidden_size=64,
                    intermediate_size=96 + 32,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    tie_word_embeddings=False,
                )
            )
            if quantized:
                from lightning_cl.quantization import quantize_base

                quantize_base(self.model, compute_dtype=torch.float32)
            if rank:
                from peft import LoraConfig, get_peft_model

                # both factors random, so that both have gradients
                adapters = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
                with warnings.catch_warnings():
                    # PEFT 0.21 asks for what transformers 5.23 renames
                    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                    self.model = get_peft_model(self.model, adapters)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()
        count = (labels != -100).sum()
        # in evaluation, a batch without labels has no loss and no gradients but NaN
        return cross_entropy(logits, labels, reduction="sum") / (count.clamp(min=1) if self.training else count)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


class Sequences(Dataset[Any]):
    """Token ids and the labels of all positions; if ``uneven``, some texts lack some labels, and four texts all."""

    def __init__(self, count: int, uneven: bool = False) -> None:
        self.count = count
        self.uneven = uneven

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(VOCABULARY, (6,), generator=torch.Generator().manual_seed(index))
        labels = (ids + 1 + index % 2) % VOCABULARY
        if self.uneven and index % 3 == 0:
            labels[: 2 + index % 4] = -100
        if self.uneven and index in (4, 6, 8, 9):
            labels[:] = -100
        return {"input_ids": ids, "labels": labels}


def sequence_stream(batch_size: int, count: int = 32, tasks: int = 2, uneven: bool = False) -> TaskStreamDataModule:
    """Texts in tasks of equal size."""
    scenario = DataIncremental(n_tasks=tasks)
    return TaskStreamDataModule(Sequences(count, uneven), scenario=scenario, batch_size=batch_size)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fitted(
    root: Path,
    make_module: Callable[[], LightningModule],
    make_stream: Callable[[int], TaskStreamDataModule],
    methods: list[ContinualCallback],
    strategy: Any = "auto",
    ranks: int = 1,
    **settings: Any,
) -> dict[str, dict[str, Tensor]]:
    """Fit a stream with a global batch of 8; return the trained weights, and the Fisher information of EWC."""
    module = make_module()
    # LoRA's `Embedding` and `ModuleDict`s have views as outputs under FSDP2
    fit = trainer(root, methods, strategy=strategy, devices=ranks, limit_val_batches=0, **settings)
    fit.fit(module, datamodule=make_stream(8 // ranks))
    parts = {"weights": {name: whole(p).detach() for name, p in module.named_parameters() if p.requires_grad}}
    for method in methods:
        if isinstance(method, EWC):
            parts["fisher"] = {name: whole(value) for name, value in method.state_dict()["importance"].items()}
            parts["by_sample"] = {"": torch.tensor(bool(method.estimator.by_sample))}
    return parts


def sharded(root: Path, *arguments: Any, **settings: Any) -> dict[str, dict[str, Tensor]]:
    """The same on this rank of two."""
    return fitted(root, *arguments, strategy=FSDP2Strategy(), ranks=2, **settings)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to a fraction of the norm of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


# ---------------------------------------------------------------------- the numbers of one process


def toys(batch_size: int) -> TaskStreamDataModule:
    """Two tasks of two classes each."""
    return TaskStreamDataModule(
        toy_data(), scenario=ClassIncremental(n_tasks=2), batch_size=batch_size, epochs_per_task=2
    )


# module, stream, strength of EWC, whether samples must be measured one by one
RUNS: dict[str, tuple[Callable[..., LightningModule], Any, float, bool]] = {
    "network": (Stacked, toys, 20.0, False),
    "attention": (Attentive, toys, 20.0, True),
    "weighing": (Weighing, toys, 20.0, True),
    "llama": (Llama, sequence_stream, 20.0, False),
    "lora": (functools.partial(Llama, 4), sequence_stream, 5000.0, False),
    "qlora": (functools.partial(Llama, 4, quantized=True), sequence_stream, 5000.0, False),
}
CASES = [
    *[(run, fisher) for run in ("network", "attention") for fisher in ("empirical", "sampled", "exact")],
    *[(run, fisher) for run in ("llama", "lora", "qlora") for fisher in ("empirical", "sampled")],
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "fisher"), [case for case in CASES if case[1] != "sampled" or case[0] in ("network", "qlora")]
)
def test_ewc_ends_where_one_process_ends(run: str, fisher: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Over two tasks, whatever the layers and the base, and not where fine-tuning ends."""
    make_module, make_stream, strength, _ = RUNS[run]
    methods = [EWC(strength, fisher=fisher)]
    found, other = two_ranks.run(sharded, tmp_path, make_module, make_stream, methods)
    expected = fitted(tmp_path, make_module, make_stream, methods)
    free = fitted(tmp_path, make_module, make_stream, [])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5)
        assert torch.equal(found["weights"][name], other["weights"][name])
    assert max(float((free["weights"][name] - value).abs().max()) for name, value in expected["weights"].items()) > 1e-3


@pytest.mark.distributed
@pytest.mark.parametrize(("run", "fisher"), [*CASES, ("weighing", "empirical")])
def test_fisher_information_is_that_of_one_process(run: str, fisher: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Of single samples, at the same weights, to the rounding of float32."""
    make_module, make_stream, _, by_sample = RUNS[run]
    at_rest, methods = functools.partial(make_module, learning_rate=0.0), [EWC(1.0, fisher=fisher)]
    found, _ = two_ranks.run(sharded, tmp_path, at_rest, make_stream, methods)
    expected = fitted(tmp_path, at_rest, make_stream, methods)
    assert_same(found["fisher"], expected["fisher"], 1e-6)
    assert found["by_sample"] == expected["by_sample"] == {"": torch.tensor(by_sample)}


def fit_replicated(root: Path, *arguments: Any, **settings: Any) -> dict[str, dict[str, Tensor]]:
    """The same on two ranks with whole weights."""
    return fitted(root, *arguments, strategy="ddp", ranks=2, **settings)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "method",
    [EWC(1.0, fisher="batched"), ExperienceReplay(12), ExperienceReplay(12, mode="separate")],
    ids=["batched", "joint replay", "separate replay"],
)
@pytest.mark.parametrize("run", ["attention", "qlora"])
def test_what_depends_on_the_ranks_is_that_of_ddp(
    run: str, method: ContinualCallback, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Squares of the gradient of a rank's batch, and draws from a rank's share of the memory."""
    make_module, make_stream, _, _ = RUNS[run]
    found, _ = two_ranks.run(sharded, tmp_path, make_module, make_stream, [method])
    expected, _ = two_ranks.run(fit_replicated, tmp_path, make_module, make_stream, [method])
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5)
    if isinstance(method, EWC):
        assert_same(found["fisher"], expected["fisher"], 1e-4)


def sparse(batch_size: int) -> TaskStreamDataModule:
    """Eleven texts, of which some have fewer labels and some none; one or two for each rank and batch."""
    return sequence_stream(batch_size // 4, count=11, tasks=1, uneven=True)


@pytest.mark.distributed
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "batched"])
@pytest.mark.parametrize("run", ["llama", "qlora"])
def test_uneven_batches(run: str, fisher: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Batches and labels of unlike number on the ranks; one rank, or both, without any label in a batch."""
    at_rest, methods = functools.partial(RUNS[run][0], learning_rate=0.0), [EWC(1.0, fisher=fisher)]
    found, _ = two_ranks.run(sharded, tmp_path, at_rest, sparse, methods)
    if fisher == "batched":
        expected, _ = two_ranks.run(fit_replicated, tmp_path, at_rest, sparse, methods)
    else:
        expected = fitted(tmp_path, at_rest, sparse, methods)
    assert_same(found["fisher"], expected["fisher"], 1e-6)


def fit_in_half_precision(root: Path, mixed: bool) -> dict[str, dict[str, Tensor]]:
    """Weights of bfloat16, or of float32 that are gathered in bfloat16."""
    strategy = FSDP2Strategy(mixed_precision="bfloat16" if mixed else None)
    trains = {} if mixed else {"precision": "bf16-true"}
    at_rest = functools.partial(Llama, 4, learning_rate=0.0)
    return fitted(root, at_rest, sequence_stream, [EWC(1.0)], strategy=strategy, ranks=2, **trains)


@pytest.mark.distributed
@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16 weights", "bfloat16 copies"])
def test_sums_are_kept_in_float32(mixed: bool, two_ranks: Ranks, tmp_path: Path) -> None:
    """Near those of float32 weights; summed in bfloat16 they would lose every sample after the first few."""
    found, _ = two_ranks.run(fit_in_half_precision, tmp_path, mixed)
    expected = fitted(tmp_path, functools.partial(Llama, 4, learning_rate=0.0), sequence_stream, [EWC(1.0)])
    assert {value.dtype for value in found["fisher"].values()} == {torch.float32}
    assert_same(found["fisher"], expected["fisher"], 0.05)
    assert found["by_sample"] == expected["by_sample"]


class ShardsItself(ToyModule):
    """As users of Lightning's own strategy write it; the module holds the last layer itself."""

    def configure_model(self) -> None:
        if not isinstance(self.model[0].weight, DTensor):
            for part in (self.model[0], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fit_with_validation(root: Path) -> Tensor:
    """Validate before training, after which weights of the root stay gathered; return the final weights."""
    module = ShardsItself()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    fit = trainer(root, [EWC(20.0)], strategy=strategy, devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4))
    return torch.cat([whole(p).detach().flatten() for p in module.parameters()])


@pytest.mark.distributed
def test_a_validation_before_training_changes_nothing(two_ranks: Ranks, tmp_path: Path) -> None:
    """The weights to hold are the shards, also of a module that shards itself under Lightning's own strategy."""
    first, _ = two_ranks.run(fit_with_validation, tmp_path)
    torch.testing.assert_close(first, ewc(20.0, batch_size=4, world_size=2), rtol=0, atol=1e-6)


def fit_recomputed(root: Path) -> dict[str, dict[str, Tensor]]:
    """Fit with activations that are computed again in the backward pass."""
    strategy = FSDP2Strategy(activation_checkpointing=True)
    return fitted(root, functools.partial(Llama, 4), sequence_stream, [EWC(5000.0)], strategy=strategy, ranks=2)


@pytest.mark.distributed
def test_activation_checkpointing(two_ranks: Ranks, tmp_path: Path) -> None:
    """Layers are called a second time in the backward pass, where gradients are squared."""
    found, _ = two_ranks.run(fit_recomputed, tmp_path)
    expected = fitted(tmp_path, functools.partial(Llama, 4), sequence_stream, [EWC(5000.0)])
    assert found["by_sample"] == expected["by_sample"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- traffic and memory


class Opens(ContinualCallback):
    """Starts to watch what ranks send, first of all callbacks in every step and at every task's end.

    Attributes:
        steps: What was seen in the steps.
        ends: What was seen at the ends of tasks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Traffic] = []
        self.ends: list[Traffic] = []

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.append(Traffic())
        self.steps[-1].__enter__()

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.ends.append(Traffic())
        self.ends[-1].__enter__()


class Closes(ContinualCallback):
    """Ends what ``opens`` began, last of all callbacks."""

    def __init__(self, opens: Opens) -> None:
        super().__init__()
        self.opens = opens

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.opens.steps[-1].__exit__(None, None, None)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.opens.ends[-1].__exit__(None, None, None)


def watched(root: Path, run: str, methods: list[ContinualCallback]) -> tuple[list[Traffic], list[Traffic]]:
    """Return what this rank sent in the steps of the second task, and at the end of the tasks."""
    make_module, make_stream, _, _ = RUNS[run]
    opens = Opens()
    sharded(root, make_module, make_stream, [opens, *methods, Closes(opens)])
    return opens.steps[len(opens.steps) // 2 :], opens.ends


SCALARS = 16  # bytes


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["network", "llama", "qlora"])
def test_a_step_sends_what_it_sends_without_a_method(run: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """The penalty acts on shards, and a replayed sample travels with the batch: nothing on top but scalars."""
    plain, _ = two_ranks.run(watched, tmp_path, run, [])[0]
    assert plain[0].total("all-gather") > plain[0].total("reduce-scatter") > 0
    for method in (EWC(1.0), EWC(1.0, mode="separate"), ExperienceReplay(8)):
        steps, _ = two_ranks.run(watched, tmp_path, run, [method])[0]
        assert [step.moved(above=SCALARS) for step in steps] == [step.moved(above=SCALARS) for step in plain]
        assert sum(len(step.seen) for step in steps) <= sum(len(step.seen) for step in plain) + len(steps)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("run", "fisher", "passes"),
    [
        ("network", "empirical", 1),
        ("network", "batched", 1),
        ("network", "exact", NUM_CLASSES),
        ("llama", "empirical", 1),
        ("llama", "sampled", 1),
        ("qlora", "empirical", 1),
    ],
)
def test_a_consolidation_sends_what_training_on_the_task_sends(
    run: str, fisher: Any, passes: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    """For each batch and backward pass what a step gathers and reduces: no parameter is gathered for the method.

    The root alone may be gathered for the backward too, where a step keeps it from the forward on.
    """
    steps, ends = two_ranks.run(watched, tmp_path, run, [EWC(1.0, fisher=fisher)])[0]
    # the task in steps of one epoch
    epochs = 2 if run == "network" else 1
    for kind in ("all-gather", "reduce-scatter"):
        bound = sum(step.total(kind) for step in steps) / epochs
        if kind == "all-gather":
            moved = [pair for step in steps for pair in step.moved(SCALARS).items()]
            bound += sum(one.size for one, count in moved if one.kind == kind and count == 1) / epochs
        for end in ends:
            assert 0 < end.total(kind) <= bound * passes
    allowed = {one.size for step in steps for one in step.seen if one.kind == "all-gather"}
    for end in ends:
        assert {one.size for one in end.seen if one.kind == "all-gather"} <= allowed
        assert all(one.size <= SCALARS for one in end.seen if one.kind not in ("all-gather", "reduce-scatter"))


WIDTH = 64


class Wide(Stacked):
    """Looks around for large tensors whenever its weights are measured: what is kept between two batches."""

    # of the class: the measurement brings what an instance holds back
    found: ClassVar[list[list[torch.Size]]] = []

    def __init__(self) -> None:
        super().__init__(learning_rate=0.01)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.stem, self.head = nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)
            self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if not self.training:
            tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
            sizes = {id(tensor): tensor for tensor in tensors if tensor.untyped_storage().nbytes() >= 4 * WIDTH**2}
            self.found.append([tensor.shape for tensor in sizes.values()])
        return super().training_step(batch, batch_idx)


def large_tensors(root: Path, fisher: str) -> list[list[torch.Size]]:
    """Return the shapes of tensors as large as a whole weight, at the start of each batch of the consolidation."""
    Wide.found.clear()
    # what is there already need not be looked through
    gc.freeze()
    fit = trainer(root, [EWC(1.0, fisher=fisher)], strategy=FSDP2Strategy(), devices=2, limit_val_batches=0)
    fit.fit(Wide(), datamodule=toys(4))
    gc.unfreeze()
    return list(Wide.found)


@pytest.mark.distributed
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "batched"])
def test_no_rank_keeps_a_whole_weight(fisher: Any, two_ranks: Ranks, tmp_path: Path) -> None:
    """Between two batches of the measurement, and before the first step, sums and anchors are shards."""
    found, _ = two_ranks.run(large_tensors, tmp_path, fisher)
    assert len(found) > 6
    assert [shapes for shapes in found if shapes] == []

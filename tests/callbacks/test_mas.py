"""MAS on users' modules: importances against plain loops over single samples, sums over tasks, and refusals."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_cl import MAS, ContinualCallback, MaskedHead, Task, TaskStreamDataModule
from lightning_cl.core import BatchAdapter
from lightning_cl.datamodules import DataIncremental
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, trainer, weights
from users import Attention, Images, Manual, Regression, Texts, Tied, Tokens, UserModule, Weighted, loader

Named = dict[str, Tensor]


def measured(root: Path, module: UserModule, data: DataLoader[Any] | None = None, **settings: Any) -> MAS:
    """Train one epoch and return the callback that has measured the importances at its end."""
    trains = settings.pop("trains", {})
    mas, data = MAS(1.0, **settings), data or loader(type(module))
    trainer(root, [mas], **({"max_epochs": 1, "limit_val_batches": 0} | trains)).fit(module, data, data)
    module.eval()
    return mas


def output_of(module: UserModule, batch: Any) -> Tensor:
    """The output, by what each module calls."""
    if isinstance(module, Images):
        return module.head(module.body(batch[0]))
    if isinstance(module, Regression):
        return module.model(batch[0])
    return module(batch["input_ids"] if isinstance(batch, dict) else batch[0])


def by_hand(module: UserModule, samples: list[Any]) -> Named:
    """The definition: the mean over samples of absolute gradients, one backward pass at a time."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0
    for sample in samples:
        output = output_of(module, default_collate([sample]))[0]
        if isinstance(module, Tokens):
            output = output[sample["labels"] != -100]
        if not len(output):
            continue
        count += 1
        gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            total += 0 if gradient is None else gradient.abs()
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def assert_same(actual: Any, expected: Named) -> None:
    """Equal to 1e-4 of the largest value of each parameter, and not all zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4 * float(value.max()), msg=name)
    assert max(float(value.max()) for value in expected.values()) > 1e-3


# ---------------------------------------------------------------------- the measurement


class Unlabelled(UserModule):
    """A linear map that learns from inputs alone; a batch is one tensor."""

    learning_rate = 0.0

    def build(self) -> None:
        self.map = nn.Linear(4, 3, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.map(batch) - batch[:, :3]).square().mean()

    @staticmethod
    def samples(count: int) -> list[Any]:
        return [sample[0] for sample in Regression.samples(count)]


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_linear_map_of_unlabelled_data_has_a_closed_form(batch_size: int, tmp_path: Path) -> None:
    """The mean of |2 (Wx)_i x_j|, whatever the batch size; no label is asked for."""
    module = Unlabelled()
    mas = measured(tmp_path, module, loader(Unlabelled, batch_size=batch_size))
    inputs = torch.stack(Unlabelled.samples(11))
    expected = (2 * (inputs @ module.map.weight.T)[:, :, None] * inputs[:, None, :]).abs().mean(0).detach()
    torch.testing.assert_close(mas.state_dict()["importance"], {"map.weight": expected})


@pytest.mark.parametrize(
    ("kind", "by_sample"),
    [
        (Images, False),
        (Texts, False),
        (Tokens, False),
        (Tied, False),
        (Attention, True),
        (Weighted, False),
        (Regression, False),
        (Manual, True),
    ],
)
@pytest.mark.parametrize("batch_size", [3, 11])
def test_equals_a_loop_over_samples(kind: type[UserModule], by_sample: bool, batch_size: int, tmp_path: Path) -> None:
    """In evaluation mode, whatever the layers and the batch size, under manual optimization too."""
    module = kind()
    mas = measured(tmp_path, module, loader(kind, batch_size=batch_size))
    assert_same(mas.state_dict()["importance"], by_hand(module, kind.samples(11)))
    assert mas.estimator.by_sample is by_sample


class Masked(Tokens):
    """A language model whose batches say by a mask what is padding; prompts have no label."""

    learning_rate = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("width", [6, 9])
def test_padding_changes_nothing(width: int, tmp_path: Path) -> None:
    """Positions of a mask of 0 are left out, whatever is in them; those of a prompt count."""
    lengths, samples, short = [3, 6, 5, 4, 6], [], []
    for number, length in enumerate(lengths):
        ids = torch.randint(1, 11, (width,), generator=torch.Generator().manual_seed(number))
        labels = torch.where((torch.arange(width) < length) & (torch.arange(width) > 0), ids % 5, -100)
        samples.append({"input_ids": ids, "attention_mask": (torch.arange(width) < length).long(), "labels": labels})
        short.append({"input_ids": ids[:length], "labels": labels[:length]})
    module = Masked()
    mas = measured(tmp_path, module, DataLoader(samples, batch_size=2))
    totals = [torch.zeros_like(p) for p in module.parameters()]
    for sample in short:
        norm = module(sample["input_ids"][None]).square().sum()
        for total, gradient in zip(totals, torch.autograd.grad(norm, list(module.parameters())), strict=True):
            total += gradient.abs() / len(short)
    names = [name for name, _ in module.named_parameters()]
    assert_same(mas.state_dict()["importance"], dict(zip(names, totals, strict=True)))


def test_a_sample_without_a_label_counts(tmp_path: Path) -> None:
    """The measure takes unlabelled data: a class label of -100 is not read."""
    samples = [(inputs, -100 if number % 3 else label) for number, (inputs, label) in enumerate(Weighted.samples(11))]

    class Plain(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nan_to_num(cross_entropy(self(batch[0]), batch[1]))

    module = Plain()
    mas = measured(tmp_path, module, DataLoader(samples, batch_size=4))
    assert_same(mas.state_dict()["importance"], by_hand(module, samples))


def test_named_output_and_other_structures(tmp_path: Path) -> None:
    """A submodule by its name, in batches that an adapter reads."""

    class Body(Weighted):
        learning_rate = 0.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch["data"][1]), batch["data"][0])

    samples = [{"data": (label, inputs)} for inputs, label in Weighted.samples(11)]
    module = Body()
    adapter = BatchAdapter(inputs="data.1", labels="data.0")
    data = DataLoader(samples, batch_size=4)
    mas = measured(tmp_path, module, data, outputs="model.0", batch_adapter=adapter)
    inputs = torch.stack([sample["data"][1] for sample in samples])
    expected = (2 * module.model[0](inputs)).abs().mean(0).detach()
    found = mas.state_dict()["importance"]
    torch.testing.assert_close(found["model.0.bias"], expected)
    # what comes after that output has no part in it
    assert not found["model.2.weight"].any()


def test_fewer_samples(tmp_path: Path) -> None:
    """From a plain loader the first ones, cut within a batch."""
    module = Texts()
    mas = measured(tmp_path, module, n_samples=6)
    assert_same(mas.state_dict()["importance"], by_hand(module, Texts.samples(11)[:6]))


def test_a_head_of_zeros_is_no_obstacle(tmp_path: Path) -> None:
    """Its squared norm has no gradient before the first step, where batches or samples are chosen."""

    class Zeros(Weighted):
        def build(self) -> None:
            super().build()
            nn.init.zeros_(self.model[2].weight)
            nn.init.zeros_(self.model[2].bias)

    module = Zeros()
    mas = measured(tmp_path, module)
    assert mas.estimator.by_sample is False
    assert_same(mas.state_dict()["importance"], by_hand(module, Zeros.samples(11)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any, tmp_path: Path) -> None:
    """Importances are kept in float32; under autocast they are measured in it as well."""
    module = Images()
    mas = measured(tmp_path, module, trains={"precision": precision})
    found = mas.state_dict()["importance"]
    assert {value.dtype for value in found.values()} == {torch.float32}
    if precision == "bf16-mixed":
        assert_same(found, by_hand(module, Images.samples(11)))
    else:
        expected = by_hand(module.float(), Images.samples(11))["head.weight"]
        torch.testing.assert_close(found["head.weight"], expected, rtol=0.1, atol=0.05 * float(expected.max()))


# ---------------------------------------------------------------------- tasks and parameters


def test_importances_of_tasks_add_up(tmp_path: Path) -> None:
    """Around the latest weights; the penalty has no half."""
    mas, module, ends = MAS(2.0), ToyModule(), []
    for task in (0, 1, 0):
        data = toy_loaders()[task]
        trainer(tmp_path, [mas], max_epochs=1).fit(module, data, data)
        sums = [torch.zeros_like(p) for p in module.parameters()]
        for inputs in data.dataset.tensors[0]:
            norm = module(inputs[None]).square().sum()
            for total, gradient in zip(sums, torch.autograd.grad(norm, list(module.parameters())), strict=True):
                total += gradient.abs() / 24
        ends.append(sums)
    state = mas.state_dict()
    for number, (name, parameter) in enumerate(module.named_parameters()):
        torch.testing.assert_close(state["importance"][name], sum(sums[number] for sums in ends))
        assert torch.equal(state["anchors"][name], parameter)
    assert mas.penalty() == 0
    with torch.no_grad():
        module.model[0].weight.add_(0.1)
    assert mas.penalty() == pytest.approx(2.0 * 0.1**2 * float(state["importance"]["model.0.weight"].sum()), rel=1e-4)


class MaskedModule(MaskedHead, ToyModule):
    """Logits of the task's own classes."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.mask_logits(super().forward(inputs))


class Recorder(ContinualCallback):
    """Keeps the importances of the head as they are after each task."""

    needs_state = False

    def __init__(self, mas: MAS) -> None:
        self.mas = mas
        self.head: list[Tensor] = []

    def on_task_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
        self.head.append(self.mas.importance["model.3.bias"].clone())


def test_masked_heads_are_measured_by_their_own_classes(tmp_path: Path) -> None:
    """The output of a task is what its part of the head says."""
    mas = MAS(0.02)
    recorder = Recorder(mas)
    fit_stream(tmp_path, [mas, recorder], module=MaskedModule())
    first, second = recorder.head
    assert (first > 0).tolist() == [True, True, False, False]
    assert torch.equal(second[:2], first[:2])
    assert (second > 0).all()


class WithPenalty(ToyModule):
    """The toy module with the penalty written into its loss."""

    state: dict[str, Any] | None = None
    fused: bool = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for name, p in self.named_parameters() if self.state else ():
            loss = loss + 0.05 * (self.state["importance"][name] * (p - self.state["anchors"][name]) ** 2).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2, fused=True) if self.fused else super().configure_optimizers()


RUNS: dict[str, dict[str, Any]] = {
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "fused": {},
}


@pytest.mark.parametrize("name", RUNS)
def test_acts_as_a_penalty_in_the_loss(name: str, tmp_path: Path) -> None:
    """The same weights, and others than without it."""
    data = toy_loaders(batch_size=6)[0]

    def run(callbacks: list[Callback], state: dict[str, Any] | None) -> Tensor:
        module = WithPenalty()
        module.state, module.fused = state, name == "fused"
        trainer(tmp_path, callbacks, max_epochs=2, **RUNS[name]).fit(module, data, data)
        return weights(module)

    generator = torch.Generator().manual_seed(8)
    state = {"constant": 0.0, "by_sample": False, "tasks": 1.0} | {
        part: {n: torch.rand(p.shape, generator=generator) for n, p in ToyModule().named_parameters()}
        for part in ("importance", "anchors")
    }
    mas = MAS(0.05)
    mas.load_state_dict(copy.deepcopy(state))
    held, tolerance = run([mas], None), 2e-3 if name == "bf16-mixed" else 1e-6
    torch.testing.assert_close(held, run([], state), rtol=0, atol=tolerance)
    assert (held - run([], None)).abs().max() > 5 * tolerance


def test_include_exclude_and_frozen(tmp_path: Path) -> None:
    """Only what is selected and trains is measured and held."""
    mas = MAS(0.02, include=["model.0.*", "*.bias"], exclude=["model.0.bias"])
    held = fit_stream(tmp_path, [mas])
    assert mas.state_dict()["importance"].keys() == {"model.0.weight", "model.3.bias"}
    assert not torch.equal(held, fit_stream(tmp_path, [MAS(0.02)]))
    module, adapters = ToyModule(), MAS(0.02)
    module.model[0].requires_grad_(False)
    fit_stream(tmp_path, [adapters], module=module)
    assert adapters.state_dict()["importance"].keys() == {"model.3.weight", "model.3.bias"}


def test_what_freezes_within_the_fit_keeps_its_importance(tmp_path: Path) -> None:
    """A task that did not train a weight adds nothing to it."""

    class Freezing(ToyModule):
        def on_task_start(self, task: Task) -> None:
            self.model[3].requires_grad_(task.index == 0)
            if task.index == 1:
                self.first = {k: v.clone() for k, v in mas.state_dict()["importance"].items()}

    mas, module = MAS(0.02), Freezing()
    fit_stream(tmp_path, [mas], module=module)
    found = mas.state_dict()["importance"]
    assert torch.equal(found["model.3.weight"], module.first["model.3.weight"])
    assert (found["model.0.weight"] > module.first["model.0.weight"]).any()


def test_the_choice_is_made_once_and_saved(tmp_path: Path) -> None:
    """A run that resumes at another batch must measure as the straight run does."""
    mas = measured(tmp_path, Attention())
    assert mas.state_dict()["by_sample"] is True
    resumed = MAS(1.0)
    resumed.load_state_dict(mas.state_dict())
    assert resumed.estimator.by_sample is True
    even = MAS(1.0)
    even.estimator.by_sample = True
    trainer(tmp_path, [even], max_epochs=1, limit_val_batches=0).fit(Texts(), loader(Texts), loader(Texts))
    assert even.estimator.by_sample is True


def test_footprint_rehearses_a_task_end(tmp_path: Path) -> None:
    """Two float32 for each weight, and what a batch makes of it."""
    module = Texts()
    mas = measured(tmp_path, module, n_samples=4)
    footprint = mas.footprint(module.trainer, module, next(iter(loader(Texts))))
    assert footprint.device == 2 * 4 * sum(p.numel() for p in module.parameters())
    assert footprint.task_end is not None
    importance, anchors = footprint.task_end()
    assert anchors.keys() == importance.keys() == mas.importance.keys()
    assert_same({name: value / 4 for name, value in importance.items()}, dict(mas.importance))


# ---------------------------------------------------------------------- refusals


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"strength": 0.0}, "`strength` must be above 0, got 0.0"),
        ({"strength": 1.0, "n_samples": 0}, "`n_samples` must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            MAS(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`include` pattern 'encoder' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [MAS(1.0, include=["encoder"])])


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """With the setting and the way out; the weights have not moved."""

    def refuse(module: UserModule, message: str, **settings: Any) -> None:
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=message):
            measured(tmp_path, module, **settings)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    class NoOutput(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (batch[0] @ self.model[0].weight.T).mean()

    class TwoViews(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(torch.cat([batch[0], batch[0] + 0.1])).square().mean()

    class Detached(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.no_grad():
                self(batch[0])
            return self.model[0].weight.square().sum()

    refuse(NoOutput(), r"No output was seen in a step of NoOutput: .*`outputs='model.head'`")
    refuse(NoOutput(), r"The submodule 'model' gave none in a step of NoOutput", outputs="model")
    refuse(Texts(), r"'heads' names no submodule of Texts", outputs="heads")
    refuse(TwoViews(), r"output of TwoViews has 6 rows for 3 samples.*`outputs`")
    refuse(Detached(), r"output of Detached depends on no trainable parameter.*`outputs`")


# ---------------------------------------------------------------------- several ranks


class SampleList(Dataset[Any]):
    """Samples as a dataset."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class ShardedTokens(Tokens):
    """Shards itself where the strategy is Lightning's for that."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.head.weight, DTensor):
            for layer in (self.embedding, self.head, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class OutsideTokens(ShardedTokens):
    """A parameter that acts outside of layers: samples are measured one by one."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.scale


def importance_on_this_rank(root: Path, kind: type[Tokens], sharded: bool) -> dict[str, list[float]]:
    """Measure without moving the weights."""
    # a linear layer over positions returns a view on the CPU, whoever calls it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    module = kind()
    module.learning_rate = 0.0
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    stream = TaskStreamDataModule(SampleList(Tokens.samples(11)), scenario=DataIncremental(n_tasks=1), batch_size=3)
    mas = MAS(1.0)
    trainer(root, [mas], strategy=strategy, devices=2, limit_val_batches=0).fit(module, datamodule=stream)
    assert mas.estimator.by_sample is (kind is OutsideTokens)
    found = mas.state_dict()["importance"]
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}
    return {name: value.flatten().tolist() for name, value in whole.items()}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for the tests below."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [ShardedTokens, OutsideTokens], ids=["batches", "samples"])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_uneven_batches_on_two_ranks(kind: type[Tokens], sharded: bool, two_ranks: Ranks, tmp_path: Path) -> None:
    """Padded samples in batches of unlike sizes: the importances of one process."""
    results = two_ranks.run(importance_on_this_rank, tmp_path, kind, sharded)
    assert results[0] == results[1]
    expected = by_hand(kind().eval(), Tokens.samples(11))
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(results[0][name]).view_as(value), value, rtol=1e-4, atol=1e-6)

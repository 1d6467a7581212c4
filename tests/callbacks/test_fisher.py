"""The Fisher information of users' modules against plain loops over single samples."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_cl import EWC, TaskStreamDataModule
from lightning_cl.core import BatchAdapter
from lightning_cl.core.rng import derived_seed
from lightning_cl.datamodules import DataIncremental
from ranks import Ranks
from toys import trainer
from users import Attention, Images, Manual, Regression, Texts, Tied, Tokens, UserModule, Weighted, loader

Named = dict[str, Tensor]


def measured(
    root: Path, module: UserModule, data: DataLoader[Any] | None = None, trains: Mapping[str, Any] = {}, **settings: Any
) -> EWC:
    """Train one epoch and return the callback that has measured the Fisher information at its end."""
    ewc, data = EWC(1.0, **settings), data or loader(type(module))
    fit = trainer(root, [ewc], **({"max_epochs": 1} | trains))
    fit.fit(module, data, data)
    # what is compared below is the module at its end
    module.eval()
    object.__setattr__(module, "log", lambda *args, **kwargs: None)
    return ewc


def scores(module: UserModule, batch: Any) -> Tensor:
    """The class scores, by what each module calls."""
    if isinstance(module, Images):
        return module.head(module.body(batch[0]))
    return module(batch["input_ids"] if isinstance(batch, dict) else batch[0])


def labels_of(batch: Any) -> Tensor:
    """The labels, [1] or [1, T]."""
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def by_hand(module: UserModule, samples: list[Any], fisher: str) -> Named:
    """The definition: the mean over samples of squared gradients, one backward pass at a time."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0

    def add(loss: Tensor, weight: float = 1.0) -> None:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += weight * gradient**2

    for number, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(derived_seed(derived_seed("fisher", 0), number))
        batch = default_collate([sample])
        supervised = (labels_of(batch) != -100).flatten()
        if fisher == "empirical" and module.automatic_optimization:
            if supervised.any():
                outputs = module.training_step(copy.copy(batch), 0)
                add(outputs["loss"] if isinstance(outputs, dict) else outputs)
        else:
            log = scores(module, batch).log_softmax(-1).reshape(len(supervised), -1)
            if fisher == "exact":
                for chance, term in zip(log[0].exp().tolist(), log[0], strict=True):
                    add(-term, chance)
            else:
                edges = log.detach().exp().cumsum(1)
                uniform = torch.rand(len(log), 1, generator=generator)
                drawn = (edges > uniform).float().argmax(1)
                target = labels_of(batch).flatten() if fisher == "empirical" else drawn
                if supervised.any():
                    add(-sum(log[t, target[t]] for t in supervised.nonzero().flatten()))
        count += bool(supervised.any())
    return {name: total / count for name, total in zip(names, sums, strict=True)}


def assert_same(actual: Mapping[str, Tensor], expected: Named) -> None:
    """Equal to 1e-4 of the largest value of each parameter, and not all zero."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4 * float(value.max()), msg=name)
    assert max(float(value.max()) for value in expected.values()) > 1e-5


@pytest.mark.parametrize(
    ("kind", "fisher", "by_sample"),
    [
        (Images, "empirical", False),
        (Images, "exact", False),
        (Images, "sampled", False),
        (Texts, "empirical", False),
        (Texts, "exact", False),
        (Texts, "sampled", False),
        (Tokens, "empirical", True),
        (Tokens, "sampled", False),
        (Tied, "empirical", False),
        (Tied, "exact", False),
        (Attention, "empirical", True),
        (Attention, "exact", True),
        (Attention, "sampled", True),
        (Weighted, "empirical", True),
        (Weighted, "exact", False),
        (Regression, "empirical", False),
        (Manual, "empirical", True),
        (Manual, "exact", True),
        (Manual, "sampled", True),
    ],
)
def test_equals_a_loop_over_samples(kind: type[UserModule], fisher: Any, by_sample: bool, tmp_path: Path) -> None:
    """Through a fit, whatever the layers; `by_sample` says which modules are out of reach of whole batches."""
    module = kind()
    ewc = measured(tmp_path, module, fisher=fisher)
    assert_same(ewc.state_dict()["importance"], by_hand(module, kind.samples(11), fisher))
    assert ewc.estimator.by_sample is by_sample


@pytest.mark.parametrize("batch_size", [1, 3, 11])
@pytest.mark.parametrize(
    ("kind", "fisher"),
    [(Texts, "empirical"), (Texts, "exact"), (Texts, "sampled"), (Tokens, "empirical"), (Tokens, "sampled")],
)
def test_does_not_depend_on_the_batch_size(
    kind: type[UserModule], fisher: Any, batch_size: int, tmp_path: Path
) -> None:
    """A squared gradient of a batch's mean would shrink with it."""
    module = kind()
    module.learning_rate = 0.0
    ewc = measured(tmp_path, module, loader(kind, batch_size=batch_size), fisher=fisher)
    assert_same(ewc.state_dict()["importance"], by_hand(kind().eval(), kind.samples(11), fisher))


def test_even_tokens_are_measured_in_batches(tmp_path: Path) -> None:
    """As many labels in each text: the mean over tokens is one over samples; a later batch may still be uneven."""
    samples = [sample for sample in Tokens.samples(40) if (sample["labels"] != -100).sum() == 3]
    uneven = Tokens.samples(8)
    module = Tokens()
    ewc = measured(tmp_path, module, DataLoader(samples[:4] + uneven, batch_size=4))
    assert ewc.estimator.by_sample is False
    assert_same(ewc.state_dict()["importance"], by_hand(module, samples[:4] + uneven, "empirical"))


class Shifted(Tokens):
    """A causal language model: the label at a position belongs to the score before it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def test_labels_that_are_shifted_in_the_loss(tmp_path: Path) -> None:
    """Texts with as many labels, of which the shift leaves one less in some."""
    samples = [
        {"input_ids": torch.arange(1, 5) + number % 6, "labels": torch.tensor([first, 1, 2, last])}
        for number, (first, last) in enumerate([*[(3, 1)] * 4, (-100, 1), *[(3, -100)] * 3])
    ]
    module = Shifted()
    ewc = measured(tmp_path, module, DataLoader(samples, batch_size=4))
    assert ewc.estimator.by_sample is False
    assert_same(ewc.state_dict()["importance"], by_hand(module, samples, "empirical"))


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "batched"])
def test_samples_without_a_label_do_not_count(fisher: Any, tmp_path: Path) -> None:
    """Labels of -100 for whole samples, one batch of them only."""
    samples = [
        (inputs, -100 if number in (1, 4, 5, 6, 7) else label)
        for number, (inputs, label) in enumerate(Weighted.samples(11))
    ]

    class Plain(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            return torch.nan_to_num(loss) if self.training else loss

    module = Plain()
    ewc = measured(tmp_path, module, DataLoader(samples, batch_size=4), fisher=fisher)
    labelled = [sample for sample in samples if sample[1] != -100]
    if fisher == "batched":
        assert_same(ewc.state_dict()["importance"], squares_of_sums(module, [labelled[:3], labelled[3:]]))
    else:
        assert_same(ewc.state_dict()["importance"], by_hand(module, samples, fisher))


def squares_of_sums(module: UserModule, batches: list[list[Any]]) -> Named:
    """The rough stand-in: squared gradients of the sums over batches, divided by the number of samples."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    for samples in batches:
        loss = module.training_step(default_collate(samples), 0) * len(samples)
        for total, gradient in zip(sums.values(), torch.autograd.grad(loss, list(module.parameters())), strict=True):
            total += gradient**2
    count = sum(len(samples) for samples in batches)
    return {name: total / count for name, total in sums.items()}


def test_batched_is_the_square_of_sums(tmp_path: Path) -> None:
    """Named as the approximation it is: it does depend on the batch size."""
    module, samples = Images(), Images.samples(11)
    ewc = measured(tmp_path, module, fisher="batched")
    assert_same(ewc.state_dict()["importance"], squares_of_sums(module, [samples[:4], samples[4:8], samples[8:]]))
    exact = by_hand(module, samples, "empirical")["head.weight"]
    assert not torch.allclose(ewc.state_dict()["importance"]["head.weight"], exact, rtol=0.1)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_fewer_samples(fisher: Any, tmp_path: Path) -> None:
    """From a plain loader the first ones, cut within a batch; more than there are is all."""
    module = Texts()
    ewc = measured(tmp_path, module, fisher=fisher, n_samples=6)
    assert_same(ewc.state_dict()["importance"], by_hand(module, Texts.samples(11)[:6], fisher))
    module = Texts()
    ewc = measured(tmp_path, module, fisher=fisher, n_samples=600)
    assert_same(ewc.state_dict()["importance"], by_hand(module, Texts.samples(11), fisher))


@pytest.mark.parametrize("limits", [{"limit_train_batches": 2}, {"max_steps": 2, "max_epochs": -1}], ids=str)
def test_reads_the_data_of_the_task(limits: dict[str, Any], tmp_path: Path) -> None:
    """A limited epoch is the task; a limit of steps leaves the task what it is."""
    module = Texts()
    ewc = measured(tmp_path, module, trains=limits)
    samples = Texts.samples(11)[: 8 if "limit_train_batches" in limits else 11]
    assert_same(ewc.state_dict()["importance"], by_hand(module, samples, "empirical"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any, tmp_path: Path) -> None:
    """Under autocast the measurement is in full precision; in half-precision weights it is kept in float32."""
    module, trains = Images(), {"precision": precision}
    if precision == "16-mixed":
        # by name, Lightning turns fp16 into bf16 on a CPU
        trains = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    ewc = measured(tmp_path, module, trains=trains)
    fisher = ewc.state_dict()["importance"]
    kept = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in fisher.values()} == {kept}
    if precision == "bf16-true":
        assert next(module.parameters()).dtype == torch.bfloat16
        module.float()
        expected = by_hand(module, Images.samples(11), "empirical")
        for name in ("head.weight", "body.0.weight"):
            torch.testing.assert_close(fisher[name], expected[name], rtol=0.1, atol=0.03 * float(expected[name].max()))
    else:
        samples = [(image.to(kept), label) for image, label in Images.samples(11)]
        assert_same(fisher, by_hand(module, samples, "empirical"))


def test_named_scores(tmp_path: Path) -> None:
    """Where the head is not the last child that is called, its name says what the class scores are."""

    class Auxiliary(Texts):
        def build(self) -> None:
            super().build()
            self.extra = nn.Linear(3, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.head(self.norm(self.embedding(batch["input_ids"]).sum(1)))
            return nn.functional.cross_entropy(logits, batch["labels"]) + self.extra(logits).square().mean()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(input_ids).sum(1)))

    module = Auxiliary()
    ewc = measured(tmp_path, module, fisher="exact", logits="head")
    assert_same(ewc.state_dict()["importance"], by_hand(module, Texts.samples(11), "exact"))


def test_other_structures(tmp_path: Path) -> None:
    """An adapter tells where samples and labels are."""

    class Turned(Weighted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch["data"][1]), batch["data"][0])

    samples = [{"data": (label, inputs)} for inputs, label in Weighted.samples(11)]
    module = Turned()
    adapter = BatchAdapter(inputs="data.1", labels="data.0")
    ewc = measured(tmp_path, module, DataLoader(samples, batch_size=4), fisher="sampled", batch_adapter=adapter)
    pairs = [(sample["data"][1], sample["data"][0]) for sample in samples]
    assert_same(ewc.state_dict()["importance"], by_hand(module, pairs, "sampled"))


# ---------------------------------------------------------------------- decisions and refusals


def test_the_choice_is_made_once_and_saved(tmp_path: Path) -> None:
    """A run that resumes at another batch must measure as the straight run does."""
    ewc = measured(tmp_path, Attention())
    assert ewc.state_dict()["by_sample"] is True
    resumed = EWC(1.0)
    resumed.load_state_dict(ewc.state_dict())
    assert resumed.estimator.by_sample is True
    even = EWC(1.0)
    even.estimator.by_sample = True
    module = Texts()
    fit = trainer(tmp_path, [even], max_epochs=1)
    fit.fit(module, loader(Texts), loader(Texts))
    assert even.estimator.by_sample is True


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """With the setting and the way out; the weights have not moved."""

    def refuse(module: UserModule, message: str, data: DataLoader[Any] | None = None, **settings: Any) -> None:
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=message):
            measured(tmp_path, module, data, **settings)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    class NoLoss(Texts):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"value": 1}

    class NoScores(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (batch[0] @ self.model[0].weight.T).mean()

    unlabelled = DataLoader([sample[0] for sample in Manual.samples(4)], batch_size=2)

    class Unlabelled(Manual):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)

    refuse(NoLoss(), r"`NoLoss.training_step` returned no loss")
    refuse(NoScores(), r"No class scores were seen in a step of NoScores", fisher="exact")
    refuse(Texts(), r"'heads' names no submodule of Texts", fisher="exact", logits="heads")
    refuse(Tokens(), r"exact Fisher needs logits of shape \[B, C\].*`sampled`", fisher="exact")
    refuse(Manual(), r"`fisher='batched'` runs.*manual optimization.*'empirical'", fisher="batched")
    refuse(Unlabelled(), r"`fisher='empirical'` needs labels", unlabelled)
    with pytest.raises(ValueError, match=r"`fisher` must be one of 'empirical'.*got 'diagonal'"):
        EWC(1.0, fisher="diagonal")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- several ranks


class SampleList(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class ShardedTokens(Tokens):
    def configure_model(self) -> None:
        if not isinstance(self.head.weight, DTensor):
            for layer in (self.embedding, self.head, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fisher_on_this_rank(root: Path, count: int, n_samples: int | None, sharded: bool) -> dict[str, list[float]]:
    """Measure without moving the weights."""
    # a linear layer over positions returns a view on the CPU, whoever calls it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    module = ShardedTokens() if sharded else Tokens()
    module.learning_rate = 0.0
    ewc = EWC(1.0, n_samples=n_samples)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    data = SampleList([sample for sample in Tokens.samples(20) if (sample["labels"] != -100).any()][:count])
    stream = TaskStreamDataModule(data, scenario=DataIncremental(n_tasks=1), batch_size=3)
    trainer(root, [ewc], strategy=strategy, devices=2, limit_val_batches=0).fit(module, datamodule=stream)
    return {name: whole(value).flatten().tolist() for name, value in ewc.state_dict()["importance"].items()}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for the tests below."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sharded", "n_samples"),
    [(False, None), (True, None), (False, 1)],
    ids=["ddp", "fsdp2", "ddp, one sample for two ranks"],
)
def test_uneven_tokens_on_two_ranks(sharded: bool, n_samples: int | None, two_ranks: Ranks, tmp_path: Path) -> None:
    """Batches of unlike sizes, and a rank without any sample: the Fisher information of one process."""
    count = 11
    results = two_ranks.run(fisher_on_this_rank, tmp_path, count, n_samples, sharded)
    assert results[0] == results[1]
    samples = [sample for sample in Tokens.samples(20) if (sample["labels"] != -100).any()][:count]
    if n_samples is None:
        expected = by_hand(Tokens().eval(), samples, "empirical")
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(results[0][name]).view_as(value), value, rtol=1e-4, atol=1e-6)
    else:
        found = [by_hand(Tokens().eval(), [sample], "empirical")["head.bias"] for sample in samples]
        mine = torch.tensor(results[0]["head.bias"])
        assert any(torch.allclose(mine, one, rtol=1e-4, atol=1e-6) for one in found)

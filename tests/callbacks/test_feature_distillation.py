"""Feature distillation in runs of every kind: layers, padding, filters, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import DataLoader

from lightning_cl import FeatureDistillation
from lightning_cl.callbacks import feature_distillation
from lightning_cl.callbacks.feature_distillation import _matches
from lightning_cl.core.rng import derived_seed
from lightning_cl.datamodules import ClassIncremental, Online
from lightning_cl.functional.task_filters import initial_filter, train_filter
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights
from users import Images, Manual, Regression, UserModule, loader


class Block(nn.Module):
    """Returns its hidden states and something else, as transformer blocks do."""

    kind: ClassVar[str] = "tuple"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Any:
        hidden = hidden + torch.tanh(self.linear(hidden))
        return {"tuple": (hidden, None), "mapping": {"cache": 1, "hidden": hidden}, "tensor": hidden}[self.kind]


class Blocks(UserModule):
    """Token ids in a mapping with their mask; the mean over real tokens is classified."""

    def build(self) -> None:
        self.embedding = nn.Embedding(11, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def hidden(self, batch: Any) -> list[Tensor]:
        found = [self.embedding(batch["input_ids"])]
        for block in self.layers:
            output = block(found[-1])
            value = output[0] if isinstance(output, tuple) else output
            found.append(value["hidden"] if isinstance(value, dict) else value)
        return found

    def forward(self, batch: Any) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.head((self.hidden(batch)[-1] * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch), batch["labels"])

    @staticmethod
    def samples(count: int, padding: int = 1) -> Any:
        samples = []
        for number in range(count):
            ids = torch.randint(1, 11, (6,), generator=torch.Generator().manual_seed(number))
            mask = (torch.arange(6 + padding) < 3 + number % 4).long()
            ids = torch.cat([ids, torch.full((padding,), 5)])
            samples.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % 3)})
        return samples


def second_task(module: UserModule, method: FeatureDistillation, data: Any, root: Path) -> tuple[Any, Tensor]:
    """Fit the data as two tasks; return the module after the first, and the final weights."""
    trainer(root, [method], max_epochs=1).fit(module, data, data)
    old = copy.deepcopy(module)
    trainer(root, [method], max_epochs=1).fit(module, data, data)
    return old, weights(module)


@pytest.mark.parametrize("kind", ["tuple", "mapping", "tensor"])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_blocks_by_pattern(kind: str, distance: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tensor of what each layer returns, over real tokens; the mean over layers."""
    monkeypatch.setattr(Block, "kind", kind)
    data = loader(Blocks)
    method = FeatureDistillation(3.0, layers=["layers.*"], distance=distance)
    old, found = second_task(Blocks(), method, data, tmp_path)
    assert list(method._watched) == ["layers.0", "layers.1"]
    module = copy.deepcopy(old)
    optimizer = module.configure_optimizers()
    for batch in data:
        real = batch["attention_mask"] == 1
        loss = cross_entropy(module(batch), batch["labels"])
        for student, teacher in zip(module.hidden(batch)[1:], old.hidden(batch)[1:], strict=True):
            student, teacher = student[real], teacher[real].detach()
            squares = (student - teacher).square().mean()
            term = squares if distance == "mse" else 1 - cosine_similarity(student, teacher, dim=-1).mean()
            loss = loss + 3.0 * term / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found, weights(module), rtol=0, atol=1e-6)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Neither the term nor the filters."""
    ends, filters = [], []
    for padding in (0, 3):
        data = DataLoader(Blocks.samples(11, padding), batch_size=4)
        method = FeatureDistillation(3.0, layers=["layers.1"], filters=True, filter_steps=5)
        ends.append(second_task(Blocks(), method, data, tmp_path)[1])
        filters.append(method._weights["layers.1"])
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(filters[0], filters[1])


def test_images_have_channels(tmp_path: Path) -> None:
    """Cosines and filters are over channels, positions are pixels."""
    data = loader(Images)
    method = FeatureDistillation(3.0, layers=["body.0"], distance="cosine", filters=True, filter_steps=5)
    _, found = second_task(Images(), method, data, tmp_path)
    assert method._weights["body.0"].shape == (3, 3)
    _, plain = second_task(Images(), FeatureDistillation(3.0, layers=["body.0"], distance="cosine"), data, tmp_path)
    assert (found - plain).abs().max() > 1e-6


def test_modules_without_classes(tmp_path: Path) -> None:
    """Features need no labels."""
    data = loader(Regression)
    _, found = second_task(Regression(), FeatureDistillation(9.0, layers=["model.1"]), data, tmp_path)
    module = Regression()
    for _ in range(2):
        trainer(tmp_path, max_epochs=1).fit(module, data, data)
    assert (found - weights(module)).abs().max() > 1e-4


def test_in_half_precision_with_accumulation(tmp_path: Path) -> None:
    """Half of the steps, each with two batches."""
    settings: dict[str, Any] = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    method = FeatureDistillation(3.0, layers=["model.*"])
    found = fit_stream(tmp_path, [method], **settings)
    assert (found - fit_stream(tmp_path, **settings)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("encoder.layers.3", "encoder.layers.*", True),
        ("encoder.layers.3.mlp", "encoder.layers.*", False),
        ("encoder.layers", "encoder.layers.*", False),
        ("encoder.layers.3.mlp", "*.layers.[0-3].mlp", True),
        ("encoder.layers.4.mlp", "*.layers.[0-3].mlp", False),
    ],
)
def test_patterns_take_names_part_by_part(name: str, pattern: str, matches: bool) -> None:
    """A star stands for one part."""
    assert _matches(name, pattern) is matches


# ---------------------------------------------------------------------- filters


def test_filters_are_trained_on_all_samples_of_a_task(tmp_path: Path) -> None:
    """With its module in evaluation mode, whatever the batch size; a later task trains them on."""
    inputs, labels = toy_data().tensors
    expected = initial_filter(2, 8, seed=0)

    class Keep(FeatureDistillation):
        kept: ClassVar[list[Tensor]] = []

        def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
            nonlocal expected
            super().on_task_end(trainer, pl_module, task)
            rows = (labels // 2) == task.index
            features = copy.deepcopy(pl_module).eval().model[0](inputs[rows])
            if task.index == 0:
                expected = self.first
            expected = train_filter(features, labels[rows], expected, steps=10)
            torch.testing.assert_close(self._weights["model.0"], expected, rtol=0, atol=1e-3)
            self.kept.append(self._weights["model.0"])

    method = Keep(layers=["model.0"], filters=True, filter_size=2, filter_steps=10)
    method.first = initial_filter(2, 8, derived_seed(0, "filter", "model.0"))
    fit_stream(tmp_path, [method], module=ToyModule(dropout=0.3))
    assert [weight.shape for weight in method.kept] == [(2, 8)] * 2
    by_batches = [method.kept[0]]
    for size in (5, 24):
        other = FeatureDistillation(layers=["model.0"], filters=True, filter_size=2, filter_steps=10)
        module = ToyModule(learning_rate=0.0)
        stream = toy_stream(batch_size=size)
        trainer(tmp_path, [other]).fit(module, datamodule=stream)
        by_batches.append(other._weights["model.0"])
    torch.testing.assert_close(by_batches[1], by_batches[2], rtol=0, atol=1e-3)


def test_filters_change_the_result_and_few_samples_do(tmp_path: Path) -> None:
    """Plain features, filters, and filters of some samples end elsewhere."""
    settings: dict[str, Any] = {"strength": 3.0, "layers": ["model.0"]}
    plain = fit_stream(tmp_path, [FeatureDistillation(**settings)])
    filtered = fit_stream(tmp_path, [FeatureDistillation(**settings, filters=True)])
    few = fit_stream(tmp_path, [FeatureDistillation(**settings, filters=True, filter_samples=5)])
    assert (plain - filtered).abs().max() > 1e-3
    assert (few - filtered).abs().max() > 1e-4


def fit_with_inexact_filters(root: Path) -> Tensor:
    """Fit with filters whose sums come out otherwise on this rank; return the filter."""

    def inexact(*args: Any, **settings: Any) -> Tensor:
        return train_filter(*args, **settings) + 1e-6 * torch.distributed.get_rank()

    feature_distillation.train_filter = inexact  # type: ignore[attr-defined]
    method = FeatureDistillation(layers=["model.0"], filters=True, filter_steps=5)
    try:
        fit_stream(root, [method], strategy="ddp", devices=2)
    finally:
        feature_distillation.train_filter = train_filter  # type: ignore[attr-defined]
    return method._weights["model.0"]


@pytest.mark.distributed
def test_ranks_have_the_same_filters(tmp_path: Path) -> None:
    """To the bit, as devices of one kind need not compute them: weights would part."""
    ranks = Ranks(2)
    try:
        first, second = ranks.run(fit_with_inexact_filters, tmp_path)
    finally:
        ranks.close()
    assert torch.equal(first, second)


# ---------------------------------------------------------------------- refusals and life


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "`strength` must be above 0"),
        ({"layers": "model.0"}, r"`layers` must be a list of names or patterns.*got 'model.0'"),
        ({"layers": []}, r"`layers` must be a list"),
        ({"distance": "l1"}, "`distance` must be one of 'mse', 'cosine'"),
        ({"filter_samples": 0}, "`filter_samples` must be above 0"),
        ({"filter_steps": 0}, "`filter_steps` must be above 0"),
        ({"filters": True, "filter_size": 0}, "`filter_size` must be above 0"),
        ({"filter_size": 3}, "`filter_size=3` goes with `filters=True`"),
        ({"filters": True, "teacher": "pretrained"}, "no other teacher than `teacher='previous'`, got 'pretrained'"),
        ({"decay": 0.5}, "`decay` goes with `teacher='ema'`"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """With the setting's name."""
    with pytest.raises(ValueError, match=message):
        FeatureDistillation(**({"layers": ["model.0"]} | settings))


def test_what_cannot_be_served_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Manual optimization, unknown layers, layers that are not called, filters without labels, hidden boundaries."""

    def fit(module: Any, data: Any = None, **settings: Any) -> None:
        before = weights(module)
        data = data or loader(type(module))
        try:
            trainer(tmp_path, [FeatureDistillation(**settings)], max_epochs=1).fit(module, data, data)
        finally:
            assert torch.equal(weights(module), before)

    toy, (data, _) = ToyModule(), toy_loaders()
    toy.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`FeatureDistillation\(strength=1.0\)` needs automatic optimization"):
        fit(Manual(), layers=["body"])
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no submodule of ToyModule.*\['model', 'model.0'"):
        fit(toy, data, layers=["model.0", "encoder.*"])
    with pytest.raises(ValueError, match="'idle' of ToyModule was not called"):
        fit(toy, data, layers=["idle"])
    with pytest.raises(
        ValueError, match=r"`FeatureDistillation\(filters=True\)` needs one class label for each sample"
    ):
        fit(Regression(), layers=["model.0"], filters=True)
    hidden = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    with pytest.raises(ValueError, match="`FeatureDistillation` needs to know where a task ends"):
        fit_stream(tmp_path, [FeatureDistillation(layers=["model.0"])], stream=hidden)


def test_an_average_needs_no_boundaries(tmp_path: Path) -> None:
    """On a stream that hides them."""
    streams = [toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1) for _ in range(2)]
    method = FeatureDistillation(5.0, layers=["model.0"], teacher="ema", decay=0.9)
    found = fit_stream(tmp_path, [method], stream=streams[0])
    assert (found - fit_stream(tmp_path, stream=streams[1])).abs().max() > 1e-3


def test_filters_of_another_model_are_refused(tmp_path: Path) -> None:
    """A layer of another width."""
    method = FeatureDistillation(layers=["model.0"], filters=True)
    module, (data, _) = ToyModule(), toy_loaders()
    trainer(tmp_path, [method], max_epochs=1).fit(module, data, data)
    module.model[0], module.model[3] = nn.Linear(6, 5), nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"'model.0' has 5 features, and its filter was learned on 8"):
        trainer(tmp_path, [method], max_epochs=1).fit(module, data, data)


def test_instances_for_other_layers_live_side_by_side() -> None:
    """Each has its key in a checkpoint."""
    keys = {FeatureDistillation(layers=[name]).state_key for name in ("model.0", "model.3")}
    assert len(keys) == 2

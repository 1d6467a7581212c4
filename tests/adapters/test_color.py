"""CoLoR: whose adapter, head and classes a sample gets, against the same by hand; and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, get_peft_model
from routed import INPUTS, LABELS, Gentle, Rows, adapted, base_features, chosen_by_hand, learned, predicted
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader

from lightning_cl import (
    AdapterSlots,
    CoLoR,
    ContinualEvaluation,
    ContinualMetrics,
    DynamicConPET,
    ExperienceReplay,
    FeatureDistillation,
    LwF,
)
from lightning_cl.adapters.slot import SlotFactor
from lightning_cl.datamodules import TaskIncremental
from lightning_cl.mixins import IncrementalHead
from lightning_cl.modules import MLP, Classifier
from ranks import Ranks
from toys import ToyModule, toy_data, toy_loaders, toy_stream, trainer


class WithHead(Gentle):
    """With a head that trains beside the adapters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.model = get_peft_model(self.model, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
            self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.model(inputs))


# ---------------------------------------------------------------------- whose adapter


@pytest.mark.parametrize("mask_classes", [True, False])
def test_a_sample_gets_the_adapter_and_the_classes_of_its_task(mask_classes: bool, tmp_path: Path) -> None:
    """All by hand: k-means on the features of the base, the nearest prototype, the two rows of that task."""
    method = CoLoR(k=2, capacity=4, mask_classes=mask_classes)
    module, fit = learned(tmp_path, method)
    inputs, labels = toy_data().tensors
    for task, prototypes in method.router.prototypes.items():
        features = base_features(module, inputs[labels // 2 == task])
        nearest = torch.cdist(features, prototypes).argmin(1)
        assert prototypes.shape == (2, 8)
        for j, prototype in enumerate(prototypes):
            torch.testing.assert_close(features[nearest == j].mean(0), prototype)
    tasks = chosen_by_hand(base_features(module, INPUTS), method.router.prototypes)
    assert 0 < tasks.float().mean() < 1
    scores = torch.stack([adapted(module, INPUTS, slice(2 * t, 2 * t + 2))[1] for t in range(2)])
    expected = scores[tasks, torch.arange(40)]
    got = predicted(fit, module, INPUTS)
    if mask_classes:
        own = torch.stack([2 * tasks, 2 * tasks + 1], 1)
        torch.testing.assert_close(got.gather(1, own), expected.gather(1, own))
        others = torch.stack([2 - 2 * tasks, 3 - 2 * tasks], 1)
        assert (got.gather(1, others).amax(1) <= got.gather(1, own).amax(1) - 50).all()
    else:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("features_from", ["base", "first"])
def test_a_sample_does_not_depend_on_its_batch(features_from: Any, tmp_path: Path) -> None:
    """Alone, in another order, among others."""
    module, fit = learned(tmp_path, CoLoR(capacity=4, features_from=features_from))
    expected, order = predicted(fit, module, INPUTS, 40), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(predicted(fit, module, INPUTS, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(predicted(fit, module, INPUTS[order], 7), expected[order], rtol=0, atol=1e-6)
    others = torch.cat([INPUTS[:5], 3 * INPUTS[20:]])
    torch.testing.assert_close(predicted(fit, module, others, 25)[:5], expected[:5], rtol=0, atol=1e-6)


def test_features_of_the_first_adapter(tmp_path: Path) -> None:
    """CoLoR++: prototypes of both tasks are means of what the base with rows 0 and 1 makes of the samples."""
    method = CoLoR(k=1, capacity=4, features_from="first")
    module, fit = learned(tmp_path, method)
    inputs, labels = toy_data().tensors
    for task in range(2):
        hidden = adapted(module, inputs[labels // 2 == task], slice(0, 2))[0]
        torch.testing.assert_close(method.router.prototypes[task], hidden.mean(0, keepdim=True))
    tasks = chosen_by_hand(adapted(module, INPUTS, slice(0, 2))[0], method.router.prototypes)
    own = predicted(fit, module, INPUTS).argmax(1) // 2
    assert torch.equal(own, tasks)


def test_evaluation_inside_a_task(tmp_path: Path) -> None:
    """The present adapter answers for samples of the present task, the finished one for its own."""
    method = CoLoR(k=2, capacity=4)

    class Look(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.seen = []
            self.cur = [
                (layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone())
                for layer in (pl_module.model.base_model.model[0], pl_module.model.base_model.model[3])
            ]

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.scores = torch.cat(pl_module.seen)

    look, module = Look(), Gentle()
    fit = trainer(tmp_path, [method, look, ContinualEvaluation(2)], max_steps=8)
    fit.fit(module, datamodule=toy_stream())
    assert method.finished == 1
    inputs, labels = toy_data(16, seed=1).tensors
    order = torch.cat([torch.arange(16)[labels < 2], torch.arange(16)[labels >= 2]])[: len(look.scores)]
    tasks = chosen_by_hand(base_features(module, inputs[order]), method.router.prototypes)
    assert 0 < tasks.float().mean() < 1
    past = adapted(module, inputs[order], slice(0, 2))[1]
    hidden = inputs[order]
    for layer, (down, up) in zip(
        (module.model.base_model.model[0], module.model.base_model.model[3]), look.cur, strict=True
    ):
        present = linear(hidden, layer.base_layer.weight + 2.0 * up @ down, layer.base_layer.bias)
        hidden = present.relu()
    expected = torch.where(tasks[:, None] == 0, past, present).detach()
    own = torch.stack([2 * tasks, 2 * tasks + 1], 1)
    torch.testing.assert_close(look.scores.gather(1, own), expected.gather(1, own))


# ---------------------------------------------------------------------- heads, logs, state


@pytest.mark.parametrize("mask_classes", [True, False])
def test_each_task_keeps_the_head_it_ended_with(mask_classes: bool, tmp_path: Path) -> None:
    """The one layer that trains beside the adapters moves on; a sample of the first task does not see it."""
    method, module, ends = CoLoR(k=2, capacity=4, mask_classes=mask_classes), WithHead(), []

    class Note(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            ends.append((pl_module.head.weight.detach().clone(), pl_module.head.bias.detach().clone()))

    fit = trainer(tmp_path, [method, Note()], num_sanity_val_steps=0)
    fit.fit(module, datamodule=toy_stream(epochs_per_task=4))
    assert len(ends) == 2
    assert (ends[0][0] - ends[1][0]).abs().max() > 0.01
    layer = module.model.base_model.model[0]
    features = linear(INPUTS, layer.base_layer.weight, layer.base_layer.bias).relu().detach()
    tasks = chosen_by_hand(features, method.router.prototypes)
    got = predicted(fit, module, INPUTS)
    for task, head in enumerate(ends):
        rows = slice(2 * task, 2 * task + 2)
        down, up = layer.lora_A["past"].weight[rows], layer.lora_B["past"].weight[:, rows]
        hidden = linear(INPUTS[tasks == task], layer.base_layer.weight + 2.0 * up @ down, layer.base_layer.bias).relu()
        kept = rows if mask_classes else slice(None)
        torch.testing.assert_close(got[tasks == task][:, kept], linear(hidden, *head)[:, kept].detach())


def test_routing_accuracy_is_logged(tmp_path: Path) -> None:
    """For each loader of the validation and of the test, and their mean."""
    method = CoLoR(k=1, capacity=4)
    module, fit = learned(tmp_path, method)
    validation = dict(fit.callback_metrics)
    inputs, labels = toy_data(16, seed=1).tensors
    right = chosen_by_hand(base_features(module, inputs), method.router.prototypes) == labels // 2
    for task in range(2):
        logged = validation[f"color/routing_accuracy/dataloader_idx_{task}"]
        torch.testing.assert_close(logged, right[labels // 2 == task].float().mean())
    torch.testing.assert_close(validation["color/routing_accuracy"], right.float().mean())


def test_goes_on_in_another_process(tmp_path: Path) -> None:
    """Validation and prediction from a checkpoint, by a callback and a module that were never fitted."""
    module, fit = learned(tmp_path, CoLoR(k=2, capacity=4), WithHead())
    expected = predicted(fit, module, INPUTS)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    other = trainer(tmp_path, [CoLoR(k=2, capacity=4)])
    loader = DataLoader(Rows(INPUTS), batch_size=8)
    got = other.predict(WithHead(seed=9), loader, ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    torch.testing.assert_close(torch.cat(got), expected)  # type: ignore[arg-type]


def test_one_fit_for_each_task(tmp_path: Path) -> None:
    """From plain loaders, which tell no classes: they are those of the labels."""
    streamed, plain = CoLoR(k=2, capacity=4), CoLoR(k=2, capacity=4)
    learned(tmp_path, streamed)
    module = Gentle()
    for loader in toy_loaders():
        fit = trainer(tmp_path, [plain], max_epochs=4)
        fit.fit(module, loader, loader)
    assert plain._classes.state_dict()["classes"] == streamed._classes.state_dict()["classes"] == [[0, 1], [2, 3]]
    for task, prototypes in streamed.router.prototypes.items():
        torch.testing.assert_close(plain.router.prototypes[task], prototypes)
    assert predicted(fit, module, INPUTS).shape == (40, 4)


def test_nothing_of_it_stays_in_the_module(tmp_path: Path) -> None:
    """After a fit, a prediction and a failure: no route and no hook."""
    method = CoLoR(capacity=4)
    module, fit = learned(tmp_path, method)
    predicted(fit, module, INPUTS)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the step")

    module.predict_step = fail
    with pytest.raises(RuntimeError, match="in the step"):
        predicted(fit, module, INPUTS)
    for part in module.modules():
        assert getattr(part, "route", None) is None
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    assert not method.slots


class Direct(Classifier):
    """Its prediction calls the forward past all hooks of the module, and can leave the head out."""

    embeds = False

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.embeds:
            return self.network.base_model.model[0](batch)
        return self.forward(batch)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_what_a_step_does_not_call(tmp_path: Path) -> None:
    """The classes are restricted at the head, which a `forward` past all hooks calls too; else a warning says so."""
    network = get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), LoraConfig(r=2, target_modules=["0", "2"])
    )
    module, fit = learned(tmp_path, CoLoR(capacity=4, features="network.base_model.model.0"), Direct(network))
    scores = predicted(fit, module, INPUTS)
    assert (scores.sort(1).values.diff(dim=1).amax(1) > 20).all()
    module.embeds = True
    with pytest.warns(UserWarning, match=r"did not call 'network.base_model.model.2', whose class scores"):
        predicted(fit, module, INPUTS)


# ---------------------------------------------------------------------- ranks


def prototypes_on_this_rank(root: Path, strategy: str, features_from: Any) -> tuple[list[Tensor], Tensor]:
    """Fit with half of each batch; return the prototypes and the logged accuracies."""
    from lightning_cl import FSDP2Strategy

    kinds: dict[str, Any] = {"ddp": "ddp", "fsdp2": FSDP2Strategy(wrap=["Linear"])}
    method = CoLoR(k=2, capacity=4, features_from=features_from)
    fit = trainer(root, [method], strategy=kinds[strategy], devices=2)
    fit.fit(WithHead(), datamodule=toy_stream(batch_size=4, epochs_per_task=4))
    logged = [fit.callback_metrics[f"color/routing_accuracy/dataloader_idx_{task}"] for task in range(2)]
    return [method.router.prototypes[task] for task in range(2)], torch.stack(logged)


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "features_from"), [("ddp", "base"), ("fsdp2", "first")])
def test_two_ranks_route_as_one_process(strategy: str, features_from: Any, tmp_path: Path) -> None:
    """The same prototypes, the same accuracy of routing."""
    method = CoLoR(k=2, capacity=4, features_from=features_from)
    _, fit = learned(tmp_path, method, WithHead())
    ranks = Ranks(2)
    try:
        both = ranks.run(prototypes_on_this_rank, tmp_path, strategy, features_from)
    finally:
        ranks.close()
    for prototypes, logged in both:
        for task, found in enumerate(prototypes):
            torch.testing.assert_close(found, method.router.prototypes[task], rtol=0, atol=1e-5)
        expected = [fit.callback_metrics[f"color/routing_accuracy/dataloader_idx_{task}"] for task in range(2)]
        torch.testing.assert_close(logged, torch.stack(expected))


# ---------------------------------------------------------------------- refusals


def refused(root: Path, message: str, method: Any, module: Any = None, *others: Callback, **stream: Any) -> None:
    """The fit fails before its first step."""
    fit = trainer(root, [method, *others])
    with pytest.raises(ValueError, match=message):
        fit.fit(module or Gentle(), datamodule=toy_stream(**stream))
    assert fit.global_step == 0


def test_adapters_are_never_approximated(tmp_path: Path) -> None:
    """Too small a capacity is refused: at the fit's start for a stream, else at the task's start."""
    refused(tmp_path, re.escape("give it `capacity=4` or more"), CoLoR(capacity=3))
    method, module = CoLoR(capacity=2), Gentle()
    first, second = toy_loaders()
    trainer(tmp_path, [method], max_epochs=1).fit(module, first, first)
    fit = trainer(tmp_path, [method], max_epochs=1)
    with pytest.raises(ValueError, match=r"of 'model.base_model.model.0' 2 are used, and there is 1 more"):
        fit.fit(module, second, second)
    assert fit.global_step == 0


class Manual(Gentle):
    """Steps its optimizer itself."""

    automatic_optimization = False


class TwoParts(Gentle):
    """Trains a bias of the base too."""

    def __init__(self) -> None:
        super().__init__()
        self.model.base_model.model[0].base_layer.bias.requires_grad_()
        self.model.base_model.model[3].base_layer.bias.requires_grad_()


class Unlabelled(Gentle):
    """Reads its labels from where no adapter of batches looks."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["x"]), batch["other"].argmax(-1))

    validation_step = training_step


def test_refusals(tmp_path: Path) -> None:
    """What would forget, what cannot be found, what masks by itself."""
    for kind in (CoLoR, DynamicConPET):
        refused(
            tmp_path, "ExperienceReplay.* has an adapter for each task", kind(capacity=4), None, ExperienceReplay(9)
        )
    refused(tmp_path, "`CoLoR` and `AdapterSlots`|`AdapterSlots` and `CoLoR`", CoLoR(capacity=4), None, AdapterSlots(4))
    refused(tmp_path, "train as well: what later tasks", CoLoR(capacity=4), TwoParts())
    refused(tmp_path, r"CoLoR\(features=None\)` needs automatic", CoLoR(capacity=4), Manual())
    refused(tmp_path, "mask_classes=True.* needs automatic", CoLoR(capacity=4, features="model"), Manual())
    refused(tmp_path, "'model.nothing' names no submodule", CoLoR(capacity=4, features="model.nothing"))
    network = get_peft_model(MLP(6, 4, hidden=[8]), LoraConfig(r=2, target_modules="all-linear"))
    masked = Classifier(network, head_mask="task")
    refused(tmp_path, "masks the classes of all tasks but the present one", CoLoR(capacity=4), masked)
    data = [{"x": x, "other": torch.eye(4)[y]} for x, y in zip(INPUTS, LABELS, strict=True)]
    fit, loader = trainer(tmp_path, [CoLoR(capacity=4)], max_epochs=1), DataLoader(data, batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs one class label for each sample"):
        fit.fit(Unlabelled(), loader, loader)
    assert fit.global_step == 0


def test_a_teacher_of_the_task_before_is_refused(tmp_path: Path) -> None:
    """It would teach the bare base; the base itself may teach."""
    for kind in (CoLoR, DynamicConPET):
        for teacher in (LwF(), FeatureDistillation(layers=["model"])):
            refused(tmp_path, r"\(teacher='previous'\)` teaches .* bare base", kind(capacity=4), None, teacher)
    fit = trainer(tmp_path, [CoLoR(capacity=4), LwF(teacher="base")])
    fit.fit(Gentle(), datamodule=toy_stream())


def test_a_second_stream_needs_room_of_its_own(tmp_path: Path) -> None:
    """Tasks of a stream before are not subtracted from those to come."""
    method, module = CoLoR(capacity=6), Gentle()
    learned(tmp_path, method, module)
    refused(tmp_path, "4 are used, and the stream has 2 more to learn, .* `capacity=8` or more", method, module)


class SequenceFirst(Gentle):
    """Its adapted layers get sequences first, as long as its batches."""

    def __init__(self, length: int = 8) -> None:
        super().__init__()
        self.length = length

    def forward(self, inputs: Tensor) -> Tensor:
        sequences = inputs + torch.zeros(self.length, 1, 1)
        return self.model(sequences).mean(0)


def test_layers_whose_first_dimension_is_not_the_batch(tmp_path: Path) -> None:
    """Also where a sequence is as long as the batch, and in a forward that is routed."""
    for length in (8, 3, 7):
        refused(
            tmp_path,
            r"'model.base_model.model.0' gets the shape \[\d, \d, 6\] for [78]",
            CoLoR(capacity=4, features="model.base_model.model.0"),
            SequenceFirst(length),
        )
    factor = SlotFactor(nn.Linear(6, 2, bias=False))
    factor.route = torch.ones(8, 2)
    assert factor(torch.zeros(8, 3, 6)).shape == (8, 3, 2)
    with pytest.raises(ValueError, match=r"got the shape \[3, 8, 6\], and each of 8 samples"):
        factor(torch.zeros(3, 8, 6))
    module, fit = learned(tmp_path, CoLoR(capacity=4))
    # in prediction alone
    module.forward = SequenceFirst.forward.__get__(module)
    module.length = 3
    with pytest.raises(ValueError, match=r"in `predict_step` found the shape \[3, 8, 8\] for 8"):
        predicted(fit, module, INPUTS)


class Growing(WithHead):
    """With a head that takes classes task by task."""

    def __init__(self, rows: int = 4, kind: Any = "linear") -> None:
        super().__init__()
        self.head = IncrementalHead(8, rows, kind=kind)  # type: ignore[assignment]


@pytest.mark.parametrize("rows", [4, 2])
def test_an_incremental_head_is_kept_for_each_task(rows: int, tmp_path: Path) -> None:
    """Whole or grown: a sample of the first task has the rows that it ended with, and none of later classes."""
    method, module, ends = CoLoR(k=2, capacity=4, mask_classes=False), Growing(rows), []

    class Note(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            ends.append((pl_module.head.weight.detach()[:2].clone(), pl_module.head.bias.detach()[:2].clone()))

    fit = trainer(tmp_path, [method, Note()], num_sanity_val_steps=0)
    fit.fit(module, datamodule=toy_stream(epochs_per_task=4))
    assert (ends[0][0] - ends[1][0]).abs().max() > 1e-3
    layer = module.model.base_model.model[0]
    features = linear(INPUTS, layer.base_layer.weight, layer.base_layer.bias).relu().detach()
    tasks = chosen_by_hand(features, method.router.prototypes)
    down, up = layer.lora_A["past"].weight[:2], layer.lora_B["past"].weight[:, :2]
    hidden = linear(INPUTS[tasks == 0], layer.base_layer.weight + 2.0 * up @ down, layer.base_layer.bias).relu()
    got = predicted(fit, module, INPUTS)[tasks == 0]
    torch.testing.assert_close(got[:, :2], linear(hidden, *ends[0]).detach())
    assert (got[:, 2:] < -1e3).all()


def test_a_cosine_head_is_named(tmp_path: Path) -> None:
    """With the head that goes."""
    refused(tmp_path, r"or an `IncrementalHead\(kind='linear'\)`", CoLoR(capacity=4), Growing(kind="cosine"))


def test_every_run_of_an_evaluation_knows_the_task(tmp_path: Path) -> None:
    """The one for the features too, which comes before the events tell the task of a batch."""
    seen: list[tuple[int, int]] = []

    class Told(Gentle):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append((self.current_task.index, dataloader_idx))
            self(batch[0])

    learned(tmp_path, CoLoR(capacity=4), Told(), scenario=TaskIncremental(n_tasks=2))
    assert {task for task, _ in seen} == {0, 1}
    assert all(task == loader for task, loader in seen)


def test_counts_what_it_keeps(tmp_path: Path) -> None:
    """Prototypes, features of the selector, and a head for each task."""
    batch = (torch.zeros(8, 6), torch.zeros(8, dtype=torch.int64))
    for method, rows in ((CoLoR(k=3, capacity=4), 2 * 3), (DynamicConPET(memory=10, capacity=4), 10 + 2)):
        module, fit = learned(tmp_path, method, WithHead())
        method.setup(fit, module, "fit")
        found = method.footprint(fit, module, batch)
        method.teardown(fit, module, "fit")
        # both tasks are over, and without a stream to go on with one more would come
        assert found.device == 4 * (rows * 8 + 2 * (8 * 4 + 4))


class Pieces(Gentle):
    """Its features come in two rows for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        self.cut(inputs.reshape(-1, 3))
        return self.model(inputs)


def test_features_of_a_named_submodule(tmp_path: Path) -> None:
    """Its output; of a fraction of the samples; one row for each is needed."""
    method = CoLoR(k=1, capacity=4, features="model.base_model.model.0")
    module, _ = learned(tmp_path, method)
    inputs, labels = toy_data().tensors
    layer = module.model.base_model.model[0].base_layer
    expected = linear(inputs[labels < 2], layer.weight, layer.bias).mean(0, keepdim=True)
    torch.testing.assert_close(method.router.prototypes[0], expected.detach())
    few = CoLoR(k=24, capacity=4, n_samples=7)
    learned(tmp_path, few)
    assert [len(prototypes) for prototypes in few.router.prototypes.values()] == [7, 7]
    refused(
        tmp_path,
        "one row of features for each sample, and for 8 samples found",
        CoLoR(capacity=4, features="cut"),
        Pieces(),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k` must be"),
        ({"metric": "angle"}, "`metric` must be one of"),
        ({"features_from": "last"}, "`features_from` must be one of"),
        ({"n_samples": 0}, "`n_samples` must be"),
        ({"capacity": 0}, "`capacity` must be"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """Named, with what was given."""
    with pytest.raises(ValueError, match=message):
        CoLoR(**settings)


# ---------------------------------------------------------------------- what it works with


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-true"}],
)
def test_learns_without_forgetting(settings: dict[str, Any], tmp_path: Path) -> None:
    """With half precision, accumulation and clipping: what was right after a task stays right where it is routed so."""
    metrics, method = ContinualMetrics(directory=tmp_path), CoLoR(k=3, capacity=4)
    network = get_peft_model(
        nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)), LoraConfig(r=2, target_modules=["0", "2"])
    )
    fit = trainer(tmp_path, [method, metrics], **settings)
    fit.fit(Classifier(network, learning_rate=0.05, optimizer="adamw"), datamodule=toy_stream(epochs_per_task=10))
    assert metrics.compute()["average_accuracy"] > 0.7
    assert fit.callback_metrics["color/routing_accuracy"] > 0.8


def test_batches_as_mappings(tmp_path: Path) -> None:
    """Sequences of features with padding: their mean over what is no padding."""

    class Sequences(ToyModule):
        def __init__(self) -> None:
            super().__init__(learning_rate=0.01)
            self.model = get_peft_model(nn.Sequential(nn.Linear(6, 8)), LoraConfig(r=2, target_modules=["0"]))
            self.head = nn.Linear(8, 4).requires_grad_(False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = batch["attention_mask"][..., None].float()
            pooled = (self.model(batch["input_values"]) * weights).sum(1) / weights.sum(1)
            return cross_entropy(self.head(pooled), batch["labels"])

        validation_step = training_step

    inputs, labels = toy_data(16).tensors
    sequences = inputs[:, None] + torch.tensor([0.0, 1.0, 50.0])[None, :, None]
    present = torch.tensor([1, 1, 0])
    data = [{"input_values": x, "attention_mask": present, "labels": y} for x, y in zip(sequences, labels, strict=True)]
    method, module = CoLoR(k=1, capacity=2, features="model.base_model.model.0"), Sequences()
    loader = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
    layer = module.model.base_model.model[0].base_layer
    expected = linear(inputs + 0.5, layer.weight, layer.bias).mean(0, keepdim=True)
    torch.testing.assert_close(method.router.prototypes[0], expected.detach())

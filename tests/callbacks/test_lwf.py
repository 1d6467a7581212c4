"""LwF in runs of every kind: the term acts as if it stood in the module's own loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader

from language import LLAMA, LORA, TokenRows, token_stream
from lightning_cl import ContinualCallback, ExperienceReplay, FeatureDistillation, LwF
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.datamodules import ClassIncremental, Online, TaskIncremental
from lightning_cl.functional.distillation import distillation_loss
from lightning_cl.modules import MLP, CausalLM, Classifier, Quantization
from ranks import Ranks
from toys import NUM_CLASSES, ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights
from users import Images, Manual, Regression, Texts, Tokens, UserModule, loader

STRENGTH = 2.0
OLD = torch.tensor([0, 1])


class WithTerm(ToyModule):
    """The toy module with the term written into its loss; its weights start from another task."""

    def __init__(self, teacher: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(dropout=0.3, **settings)
        # no submodule
        self.taught_by = [teacher]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = cross_entropy(logits, batch[1])
        if self.taught_by[0] is None:
            return loss
        with torch.no_grad():
            target = self.taught_by[0].eval().model(batch[0])
        return loss + STRENGTH * distillation_loss(logits, target, classes=OLD)


class FusedAdamW(WithTerm):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Thawing(WithTerm):
    """Its first layer is frozen."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.model[0].requires_grad_(False)


RUNS: dict[str, tuple[type[WithTerm], dict[str, Any]]] = {
    "plain": (WithTerm, {}),
    "accumulation": (WithTerm, {"accumulate_grad_batches": 2}),
    "clipping": (WithTerm, {"gradient_clip_val": 0.05}),
    "bf16-mixed": (WithTerm, {"precision": "bf16-mixed"}),
    "bf16-true": (WithTerm, {"precision": "bf16-true"}),
    "64-true": (WithTerm, {"precision": "64-true"}),
    "fused": (FusedAdamW, {}),
    "frozen": (Thawing, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_acts_as_a_term_in_the_loss(name: str, tmp_path: Path) -> None:
    """Of the second task, and with other weights than without it."""
    kind, settings = RUNS[name]
    first, second = toy_loaders(batch_size=6)
    settings = {"max_epochs": 1, **settings}

    def run(module: ToyModule, callbacks: list[Callback], data: Any) -> Tensor:
        torch.manual_seed(4)
        trainer(tmp_path, callbacks, **settings).fit(module, data, data)
        return weights(module)

    lwf, module = LwF(STRENGTH), kind()
    run(module, [lwf], first)
    old = copy.deepcopy(module)
    found = run(module, [lwf], second)
    expected, plain = kind(old), kind()
    for other in (expected, plain):
        other.load_state_dict(old.state_dict())
    torch.testing.assert_close(found, run(expected, [], second), rtol=0, atol=1e-6)
    assert (found - run(plain, [], second)).abs().max() > 1e-3


class Compared(Callback):
    """Notes which classes are compared in each step."""

    def __init__(self, lwf: LwF) -> None:
        self.lwf, self.classes = lwf, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.classes.append(self.lwf._compared(torch.device("cpu")).tolist())


@pytest.mark.parametrize("classes", ["old", "seen", "present"])
def test_classes_that_are_compared(classes: Any, tmp_path: Path) -> None:
    """Those of the stream, or those of the labels so far."""
    first, second = {"old": ([], [0, 1]), "seen": ([0, 1], [0, 1, 2, 3]), "present": ([0, 1], [2, 3])}[classes]
    lwf, plain, module = LwF(classes=classes), LwF(classes=classes), ToyModule()
    told, seen = Compared(lwf), Compared(plain)
    found = fit_stream(tmp_path, [told, lwf])
    assert told.classes == [first] * 6 + [second] * 6
    assert (found - fit_stream(tmp_path, [LwF()])).abs().max() > 1e-3 or classes == "old"
    for data in toy_loaders():
        trainer(tmp_path, [seen, plain], max_epochs=1).fit(module, data, data)
    assert seen.classes == [first] * 3 + [second] * 3


def test_classes_join_as_labels_show_them(tmp_path: Path) -> None:
    """Batch by batch, where no stream tells them."""
    inputs, labels = toy_data().tensors
    order = labels.argsort(stable=True)
    data = DataLoader(list(zip(inputs[order], labels[order], strict=True)), batch_size=12)
    lwf = LwF(teacher="ema", decay=0.5, classes="seen")
    seen = Compared(lwf)
    trainer(tmp_path, [seen, lwf], max_epochs=1).fit(ToyModule(), data, data)
    assert seen.classes == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_one_old_class_teaches_nothing(tmp_path: Path) -> None:
    """A softmax over one class is constant."""
    streams = [toy_stream(scenario=ClassIncremental(n_tasks=4)) for _ in range(2)]
    lwf = LwF(9.0)
    found = fit_stream(tmp_path, [lwf], stream=streams[0], max_steps=8)
    assert lwf.teaching.runs == 4
    torch.testing.assert_close(found, fit_stream(tmp_path, stream=streams[1], max_steps=8))


def test_without_old_classes_there_is_no_term(tmp_path: Path) -> None:
    """In the first task, whatever the teacher."""
    data = toy_loaders()[0]
    module, plain = ToyModule(), ToyModule()
    trainer(tmp_path, [LwF(9.0, teacher="pretrained")], max_epochs=1).fit(module, data, data)
    trainer(tmp_path, max_epochs=1).fit(plain, data, data)
    assert torch.equal(weights(module), weights(plain))


# ---------------------------------------------------------------------- heads


def classifier(head_mask: Any) -> Classifier:
    """The reference module, with a mask on its scores."""
    torch.manual_seed(2)
    return Classifier(MLP(6, NUM_CLASSES, hidden=[8]), learning_rate=0.1, optimizer="sgd", head_mask=head_mask)


def test_masked_heads(tmp_path: Path) -> None:
    """A mask of unseen classes changes nothing for old ones; one of other tasks is refused, or gone round."""
    seen = fit_stream(tmp_path, [LwF()], module=classifier("seen"))
    assert seen.isfinite().all()
    by_task = toy_stream(scenario=TaskIncremental(n_tasks=2))
    with pytest.raises(ValueError, match=r"`LwF\(classes='old'\)` compares scores that the head masks.*'network'"):
        fit_stream(tmp_path, [LwF()], module=classifier("task"), stream=by_task)
    streams = [toy_stream(scenario=TaskIncremental(n_tasks=2)) for _ in range(2)]
    held = fit_stream(tmp_path, [LwF(logits="network")], module=classifier("task"), stream=streams[0])
    assert (held - fit_stream(tmp_path, module=classifier("task"), stream=streams[1])).abs().max() > 1e-3


class Growing(ToyModule):
    """Its head has the classes seen so far; minus infinity stands for the others in `forward`."""

    infinite = False

    def __init__(self) -> None:
        super().__init__()
        self.grow(2)

    def grow(self, classes: int) -> None:
        head = nn.Linear(8, classes)
        with torch.no_grad():
            nn.init.constant_(head.weight, 0.1)
            nn.init.zeros_(head.bias)
            old = self.model[3]
            if old.out_features < classes:
                head.weight[: old.out_features], head.bias[: old.out_features] = old.weight, old.bias
        self.model[3] = head

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.model(inputs)
        return pad(logits, (0, NUM_CLASSES - logits.shape[1]), value=-torch.inf) if self.infinite else logits

    def on_task_start(self, task: Any) -> None:
        if task.index:
            self.grow(4)
            group = self.optimizers().param_groups[0]
            group["params"][:] = list(self.parameters())


class OneHead(ToyModule):
    """A head for each task, of which a step uses the present one alone, or all."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every, self.model[3] = every, nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(2))
        self.task = 0

    def on_task_start(self, task: Any) -> None:
        self.task = task.index

    def forward(self, inputs: Tensor) -> Tensor:
        scores = [head(self.model(inputs)) for head in self.heads]
        return torch.cat(scores, 1) if self.every else scores[self.task]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1] if self.every else batch[1] % 2)


@pytest.mark.parametrize("settings", [{}, {"teacher": "pretrained", "classes": "seen"}], ids=["previous", "pretrained"])
def test_the_present_head_alone_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its teacher would answer with the new head; all heads in one are fine."""
    module, message = OneHead(), "there is a class 3, but scores of 2 classes only. Return the scores of all heads"
    stream = {"limit_val_batches": 0}
    before: list[Tensor] = []

    class Started(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            before.append(weights(pl_module))

    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, [LwF(**settings), Started()], module=module, **stream)
    assert len(before) == 7
    assert torch.equal(weights(module), before[-1])
    fit_stream(tmp_path, [lwf := LwF(**settings)], module=OneHead(every=True), **stream)
    lwf._check_width(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="there is a class 3, but scores of 3 classes"):
        lwf._check_width(torch.zeros(1, 3))


class GrowingInfinite(Growing):
    infinite = True


def test_a_head_that_grows(tmp_path: Path) -> None:
    """The teacher has the head of its time; padding with minus infinity makes no difference, and no NaN."""
    found = fit_stream(tmp_path, [LwF(5.0)], module=Growing(), limit_val_batches=0)
    assert (found - fit_stream(tmp_path, module=Growing(), limit_val_batches=0)).abs().max() > 1e-2
    torch.testing.assert_close(fit_stream(tmp_path, [LwF(5.0)], module=GrowingInfinite(), limit_val_batches=0), found)
    every = fit_stream(tmp_path, [LwF(5.0, classes="seen")], module=Growing(), limit_val_batches=0)
    torch.testing.assert_close(every, found)


# ---------------------------------------------------------------------- batches of all kinds


def fit_twice(module: UserModule, root: Path, callbacks: list[Any], batch_size: int = 4) -> Tensor:
    """Fit the module's data twice, as two tasks."""
    data = loader(type(module), batch_size=batch_size)
    torch.manual_seed(3)
    for _ in range(2):
        trainer(root, callbacks, max_epochs=2).fit(module, data, data)
    return weights(module)


def test_images_and_mappings(tmp_path: Path) -> None:
    """Batch normalisation and dropout; a step that takes the labels out of its batch."""
    for kind in (Images, Texts):
        lwf = LwF(STRENGTH)
        assert (fit_twice(kind(), tmp_path, [lwf]) - fit_twice(kind(), tmp_path, [])).abs().max() > 1e-3
        assert lwf.teaching.runs == 6


class NextTokens(Tokens):
    """A causal language model: position t predicts the label of t + 1."""

    def build(self) -> None:
        super().build()
        self.head = nn.Linear(4, 11)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])
        targets = pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def samples(count: int) -> Any:
        samples = Texts.samples(count)
        for sample in samples:
            sample["labels"] = torch.where(sample["input_ids"] == 0, -100, sample["input_ids"])
        return samples


@pytest.mark.parametrize("kind", [Tokens, NextTokens])
def test_tokens_are_compared_where_they_are_supervised(kind: type[Tokens], tmp_path: Path) -> None:
    """Over the whole vocabulary, at the positions whose score the loss takes."""
    shifted = kind is NextTokens
    data = loader(kind, batch_size=3)
    module, lwf = kind(), LwF(STRENGTH)
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, data, data)
    old = copy.deepcopy(module)
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, data, data)
    assert lwf._shifted is shifted
    expected = copy.deepcopy(old)
    optimizer = expected.configure_optimizers()
    for batch in data:
        labels = pad(batch["labels"][:, 1:], (0, 1), value=-100) if shifted else batch["labels"]
        logits, target = expected(batch["input_ids"]), old(batch["input_ids"]).detach()
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        rows = labels != -100
        term = cross_entropy(logits[rows] / 2, (target[rows] / 2).softmax(-1))
        optimizer.zero_grad()
        (loss + STRENGTH * term).backward()
        optimizer.step()
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)


def test_a_batch_without_supervision_adds_nothing(tmp_path: Path) -> None:
    """Of tokens that are all ignored; the step's own loss says what it is."""

    class Summed(Tokens):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch["input_ids"])
            return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    unsupervised = [sample | {"labels": torch.full((5,), -100)} for sample in Tokens.samples(6)]
    module, lwf = Summed(), LwF(STRENGTH)
    supervised = loader(Summed)
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, supervised, supervised)
    before, data = weights(module), DataLoader(unsupervised, batch_size=3)
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, data, data)
    assert lwf.teaching.runs == 2
    assert torch.equal(weights(module), before)


class Unlabelled(UserModule):
    """A language model whose batches have no labels."""

    def build(self) -> None:
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.head(self.embedding(batch["input_ids"]))[:, :-1]
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def samples(count: int, padding: int = 0) -> Any:
        ids = [pad(sample["input_ids"], (0, padding)) for sample in Texts.samples(count)]
        return [{"input_ids": row, "attention_mask": (row != 0).long()} for row in ids]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """Where no label tells what is supervised, the attention mask tells what is padding."""
    ends = []
    for padding in (0, 3):
        lwf, module = LwF(9.0), Unlabelled()
        data = DataLoader(Unlabelled.samples(11, padding), batch_size=4)
        for _ in range(2):
            trainer(tmp_path, [lwf], max_epochs=1).fit(module, data, data)
        ends.append(weights(module))
    torch.testing.assert_close(ends[0], ends[1])
    module = Unlabelled()
    for _ in range(2):
        trainer(tmp_path, max_epochs=1).fit(module, data, data)
    assert (ends[1] - weights(module)).abs().max() > 1e-3


class Pixels(UserModule):
    """Scores of images are maps, with the classes second."""

    def build(self) -> None:
        self.head = nn.Conv2d(1, 3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.head(batch[0]), batch[1])

    @staticmethod
    def samples(count: int) -> Any:
        return [(image, (image[0] > 0).long()) for image, _ in Images.samples(count)]


def test_maps_of_scores(tmp_path: Path) -> None:
    """A softmax over the classes, not over the last dimension."""
    lwf, module = LwF(STRENGTH), Pixels()
    fit_twice(module, tmp_path, [lwf])
    scores = torch.randn(2, 3, 4, 4)
    batch = (scores, torch.zeros(2, 4, 4, dtype=torch.long))
    assert torch.equal(lwf._classes_last(scores, batch), scores.movedim(1, -1))
    assert lwf._supervised(scores.movedim(1, -1), batch).all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    """A training step may return nothing."""

    class Skipping(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    found = fit_stream(tmp_path, [LwF(5.0)], module=Skipping())
    assert (found - fit_stream(tmp_path, module=Skipping())).abs().max() > 1e-3


# ---------------------------------------------------------------------- together


@pytest.mark.parametrize("order", [1, -1])
def test_replayed_samples_are_distilled_too(order: int, tmp_path: Path) -> None:
    """Both orders are one: batches are joined before any teacher sees them."""
    lwf, replay = LwF(STRENGTH), ExperienceReplay(12)
    found = fit_stream(tmp_path, [lwf, replay][::order])
    sizes = []

    class Look(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append((self.training, len(batch[0])))
            return super().training_step(batch, batch_idx)

    assert torch.equal(fit_stream(tmp_path, [LwF(STRENGTH), ExperienceReplay(12)], module=Look()), found)
    assert sizes[-2:] == [(False, 16), (True, 16)]


@pytest.mark.parametrize("order", [1, -1])
def test_predictions_and_features_share_a_forward(order: int, tmp_path: Path) -> None:
    """One teacher, with the weights that two alone would end at; and its copy is saved once."""
    lwf, features = LwF(STRENGTH), FeatureDistillation(0.5, layers=["model.0"])
    found = fit_stream(tmp_path, [lwf, features][::order])
    assert lwf.teaching is features.teaching
    assert lwf.teaching.runs == 6
    saved = [callback.state_dict()["teacher"] is None for callback in (lwf, features)]
    assert saved == ([False, True] if order == 1 else [True, False])
    apart = [LwF(STRENGTH), FeatureDistillation(0.5, layers=["model.0"])]
    # teachers of another kind, with the weights of the same
    apart[0].teaching.replaces = lambda other: False  # type: ignore[method-assign]
    torch.testing.assert_close(fit_stream(tmp_path, apart), found)
    assert [callback.teaching.runs for callback in apart] == [6, 6]


def test_resumes_with_a_shared_teacher(tmp_path: Path) -> None:
    """Who keeps the teacher restores it for all; another order of callbacks is refused."""

    def callbacks() -> list[Any]:
        return [LwF(STRENGTH), FeatureDistillation(0.5, layers=["model.0"])]

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit_stream(tmp_path, [*callbacks(), saver])
    path = tmp_path / "step=8.ckpt"
    assert torch.equal(fit_stream(tmp_path, [*callbacks(), saver], ckpt_path=path), straight)
    with pytest.raises(ValueError, match="checkpoint's `FeatureDistillation` shared its teacher"):
        fit_stream(tmp_path, [*callbacks()[::-1], saver], ckpt_path=path)
    test = trainer(tmp_path, [*callbacks(), saver])
    test.validate(ToyModule(), datamodule=toy_stream(), ckpt_path=path)


@pytest.mark.parametrize("kind", ["previous", "pretrained", "ema"])
def test_one_callback_keeps_a_shared_teacher_over_fits(kind: Any, tmp_path: Path) -> None:
    """Setups of the same objects change nothing: one copy, one forward, and a fresh process can go on."""
    settings = {"teacher": kind, "decay": 0.5 if kind == "ema" else None}

    def callbacks() -> list[Any]:
        return [LwF(STRENGTH, **settings), FeatureDistillation(0.5, layers=["model.0"], **settings)]

    def kept(callbacks: list[Any]) -> list[bool]:
        return [callback.state_dict()["teacher"] is not None for callback in callbacks[:2]]

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    pair, module, path = [*callbacks(), saver()], ToyModule(), tmp_path / "step=8.ckpt"
    run = trainer(tmp_path, pair)
    run.fit(module, datamodule=toy_stream())
    for checkpoint in (path, None):
        run.validate(module, datamodule=toy_stream(), ckpt_path=checkpoint, verbose=False)
        assert kept(pair) == [True, False]
    # of the first one alone, before both go on
    trainer(tmp_path, [pair[0]]).validate(module, datamodule=toy_stream(), verbose=False)
    pair, module = [*callbacks(), saver()], ToyModule()
    fit_stream(tmp_path / "first", pair[:2], module=module)
    start = copy.deepcopy(module)
    path.unlink()
    found = fit_stream(tmp_path, pair, module=module)
    assert kept(pair) == [True, False]
    assert pair[0].teaching is pair[1].teaching
    assert pair[0].teaching.runs == {"previous": 6 + 12}.get(kind, 12 + 12)
    assert torch.equal(fit_stream(tmp_path, [*callbacks(), saver()], module=start, ckpt_path=path), found)
    # in another order, the one in front keeps what both had
    fit_stream(tmp_path / "third", pair[1::-1], module=module)
    assert kept(pair) == [False, True]
    assert pair[0].teaching.runs == {"previous": 6 + 12 + 12}.get(kind, 12 + 12 + 12)


def test_a_callback_that_joins_later_has_its_own_teacher(tmp_path: Path) -> None:
    """In front of one that has learned already, it does not take the latter's teacher away."""
    lwf, later, module = LwF(STRENGTH), FeatureDistillation(0.5, layers=["model.0"]), ToyModule()
    first, second = toy_loaders()
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, first, first)
    trainer(tmp_path, [later, lwf], max_epochs=1).fit(module, second, second)
    assert [lwf.teaching.runs, later.teaching.runs] == [3, 0]
    trainer(tmp_path, [later, lwf], max_epochs=1).fit(module, first, first)
    assert lwf.teaching is later.teaching
    assert later.teaching.runs == 3
    # one goes on alone, and they stay together
    trainer(tmp_path, [lwf], max_epochs=1).fit(module, second, second)
    trainer(tmp_path, [later, lwf], max_epochs=1).fit(module, first, first)
    assert [callback.state_dict()["teacher"] is None for callback in (later, lwf)] == [False, True]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_weights_that_become_trainable_inside_a_task_are_told_of(tmp_path: Path) -> None:
    """The teacher has none of its own there; it takes them for the next task. New ones are no such case."""

    class Thawed(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pl_module.model[0].requires_grad_(True)
            pl_module.new = nn.Linear(1, 1)

    def fits(callbacks: list[Any]) -> None:
        module = Thawing()
        first, second = toy_loaders()
        trainer(tmp_path, callbacks, max_epochs=1).fit(module, first, first)
        module.model[0].requires_grad_(False)
        callbacks.append(Thawed())
        trainer(tmp_path, callbacks, max_epochs=1).fit(module, second, second)

    shared = [LwF(STRENGTH), FeatureDistillation(0.5, layers=["model.0"])]
    message = r"teacher of `LwF` has no weights.*\['model.0.bias', 'model.0.weight'\]"
    with pytest.warns(UserWarning, match=message) as seen:
        fits(shared)
    assert sum("has no weights" in str(warning.message) for warning in seen) == 1
    # none is taken yet, and pytest raises what is warned of
    trainer(tmp_path, [LwF(), Thawed()], max_epochs=1).fit(Thawing(), *toy_loaders())


def test_teachers_of_two_kinds(tmp_path: Path) -> None:
    """Side by side, each with its own forward and its own state."""
    callbacks = [LwF(STRENGTH), LwF(STRENGTH, teacher="pretrained", classes="seen")]
    fit_stream(tmp_path, callbacks)
    assert [callback.teaching.runs for callback in callbacks] == [6, 12]
    assert callbacks[0].state_key != callbacks[1].state_key


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
def test_of_adapters_the_teacher_is_the_adapters(quantized: bool, tmp_path: Path) -> None:
    """On a frozen base, packed or not, its weights are those of LoRA alone, and the scores stay near the old ones."""
    pytest.importorskip("peft")
    settings: dict[str, Any] = {"adapter": LORA, "learning_rate": 1e-2}
    if quantized:
        pytest.importorskip("bitsandbytes")
        settings["quantization"] = Quantization()
    batch = TokenRows(3).batch()

    class Old(ContinualCallback):
        needs_state = False

        def on_task_start(self, trainer: Any, pl_module: Any, task: Any) -> None:
            with torch.no_grad():
                self.scores = pl_module(**batch)

    drifts, lwf = [], LwF(20.0)
    for callbacks in ([], [lwf]):
        # as wide as a block of packed weights
        module, old = CausalLM({**LLAMA, "hidden_size": 64}, **settings), Old()
        stream = token_stream(epochs_per_task=[8, 8])
        trainer(tmp_path, [*callbacks, old], limit_val_batches=0).fit(module, datamodule=stream)
        with torch.no_grad():
            drifts.append((module(**batch) - old.scores).square().mean().item())
    assert lwf.teaching.runs == 16
    assert drifts[1] < 0.75 * drifts[0]
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kept = lwf.state_dict()["teacher"]["weights"]
    assert kept.keys() == trainable.keys()
    assert all("lora_" in name for name in kept)
    # of two layers, two projections each, of 64 inputs to 64 and to 32 outputs
    assert lwf.teaching.num_bytes(module) == 4 * 2 * 4 * ((64 + 64) + (64 + 32))


# ---------------------------------------------------------------------- two ranks


def fit_unknown_classes(root: Path) -> tuple[list[int], list[int]]:
    """Fit plain loaders whose classes differ between ranks; return what a rank compares and keeps."""
    rank = torch.distributed.get_rank()
    lwf, module = LwF(classes="seen"), ToyModule()
    inputs, labels = toy_data().tensors
    for task in range(2):
        rows = (labels == 2 * task + rank).nonzero().flatten()
        data = DataLoader([(inputs[row], labels[row]) for row in rows], batch_size=4)
        fit = trainer(root, [lwf], max_epochs=1, strategy="ddp", devices=2, use_distributed_sampler=False)
        fit.fit(module, data, data)
    return lwf._compared(torch.device("cpu")).tolist(), lwf._known.old


@pytest.mark.distributed
def test_ranks_compare_the_same_classes(tmp_path: Path) -> None:
    """Also where a rank sees only some of them."""
    ranks = Ranks(2)
    try:
        assert ranks.run(fit_unknown_classes, tmp_path) == [([0, 1, 2, 3], [0, 1, 2, 3])] * 2
    finally:
        ranks.close()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0}, "`strength` must be above 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"classes": "all"}, "`classes` must be one of 'old', 'seen', 'present'"),
        ({"teacher": "best"}, "`teacher` must be one of"),
        ({"teacher": "ema"}, "`decay` goes with `teacher='ema'`"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """With the setting's name."""
    with pytest.raises(ValueError, match=message):
        LwF(**settings)


def test_what_cannot_be_served_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Manual optimization, one score, none, a name that is none, and hidden boundaries."""

    def fit(callback: LwF, module: Any, data: Any = None) -> None:
        before = weights(module)
        data = data or loader(type(module))
        try:
            trainer(tmp_path, [callback], max_epochs=1).fit(module, data, data)
        finally:
            assert torch.equal(weights(module), before)

    with pytest.raises(ValueError, match=r"`LwF\(strength=1.0\)` needs automatic optimization.*`EWC`"):
        fit(LwF(), Manual())
    with pytest.raises(ValueError, match=r"`LwF` compares class scores.*\[4, 1\].*`FeatureDistillation`"):
        fit(LwF(), Regression())
    with pytest.raises(ValueError, match="'head' names no submodule of ToyModule"):
        fit(LwF(logits="head"), ToyModule(), toy_loaders()[0])
    hidden = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    with pytest.raises(ValueError, match="`LwF` needs to know where a task ends"):
        fit_stream(tmp_path, [LwF()], stream=hidden)


def test_an_average_needs_no_boundaries(tmp_path: Path) -> None:
    """Classes are then those seen in labels."""
    lwf = LwF(5.0, teacher="ema", decay=0.9, classes="seen")
    streams = [toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1) for _ in range(2)]
    found = fit_stream(tmp_path, [lwf], stream=streams[0])
    assert lwf._known.seen == [0, 1, 2, 3]
    assert (found - fit_stream(tmp_path, stream=streams[1])).abs().max() > 1e-3


def test_labels_that_an_adapter_finds(tmp_path: Path) -> None:
    """Class labels by a name of one's own."""

    class Named(UserModule):
        def build(self) -> None:
            self.model = nn.Linear(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch["x"]), batch["kind"])

    lwf, module = LwF(batch_adapter=BatchAdapter(labels="kind")), Named()
    for inputs, labels in (data.dataset.tensors for data in toy_loaders()):
        data = DataLoader([{"x": x, "kind": y} for x, y in zip(inputs, labels, strict=True)], batch_size=8)
        trainer(tmp_path, [lwf], max_epochs=1).fit(module, data, data)
    assert lwf._known.old == [0, 1, 2, 3]

"""The reference classifier of texts: its head, its last token, and the methods that read its class scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from language import LLAMA, LORA, LabelledRows, built
from lightning_cl import EWC, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, Predefined, TaskIncremental
from lightning_cl.modules import Quantization, SequenceClassifier
from toys import fit_stream, trainer, weights

pytest.importorskip("transformers")
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def classifier(model: Any = None, labels: int = 4, **settings: Any) -> SequenceClassifier:
    """A tiny classifier, always with the same weights."""
    return SequenceClassifier(dict(LLAMA) if model is None else model, labels, **settings)


def labelled_stream(**settings: Any) -> TaskStreamDataModule:
    """Two tasks of two classes, 32 rows each."""
    parts = [[LabelledRows(task, 32, seed=10 * split) for task in range(2)] for split in range(2)]
    defaults: dict[str, Any] = {"scenario": Predefined(["first", "second"]), "batch_size": 8, "epochs_per_task": 2}
    return TaskStreamDataModule(*parts, **(defaults | settings))


# ---------------------------------------------------------------------- scores


def test_scores_are_those_of_transformers() -> None:
    """A causal model scores its last token, where transformers knows the padding; an encoder its first."""
    batch = LabelledRows(0).batch()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    for model in ({**LLAMA, "pad_token_id": 0}, BERT):
        module = built(classifier(model)).eval()
        # 0 is also a token here: keep it out of the texts
        texts = {**inputs, "input_ids": inputs["input_ids"].clamp(min=1) * inputs["attention_mask"]}
        expected = module.network(**texts, labels=batch["labels"])
        torch.testing.assert_close(module(**texts), expected.logits)
        torch.testing.assert_close(module._loss({**texts, "labels": batch["labels"]})[0], expected.loss)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side: str) -> None:
    """On either side, whatever its id, in a config without one."""
    module, batch = built(classifier()).eval(), LabelledRows(0, seed=3).batch()
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        filler, mask = torch.full((1, 4), 7), torch.zeros(1, 4, dtype=torch.int64)
        parts = (ids, filler) if side == "right" else (filler, ids)
        masks = (torch.ones_like(ids), mask) if side == "right" else (mask, torch.ones_like(ids))
        padded = module(torch.cat(parts, 1), torch.cat(masks, 1))
        torch.testing.assert_close(padded, module(ids))


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("model", [LLAMA, BERT], ids=["llama", "bert"])
def test_learns_a_toy_text(model: dict[str, Any], tmp_path: Path) -> None:
    """Whether the tokens of a row are even or odd; logged as the other classifier logs it."""
    module, run = classifier(model, 2, learning_rate=3e-3), trainer(tmp_path)
    stream = TaskStreamDataModule(
        [LabelledRows(0, 64)], [LabelledRows(0, 32, seed=1)], scenario=Predefined(), batch_size=16, epochs_per_task=15
    )
    run.fit(module, datamodule=stream)
    assert run.callback_metrics["val_acc"] > 0.9
    assert run.callback_metrics["val_loss"] < 0.4
    assert {"train_loss", "val_acc", "val_loss"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "4 bits"])
def test_the_head_trains_beside_the_adapter(quantized: bool, tmp_path: Path) -> None:
    """It is neither packed nor copied into an adapter, even where PEFT would do so by the type of the task."""
    settings: dict[str, Any] = {"adapter": {**LORA, "task_type": "SEQ_CLS"}, "learning_rate": 1e-2}
    if quantized:
        pytest.importorskip("bitsandbytes")
        settings["quantization"] = Quantization(skip=[])
    module = classifier({**LLAMA, "hidden_size": 64}, **settings)
    head = built(module).network.get_base_model().score
    assert type(head) is torch.nn.Linear
    before = head.weight.clone()
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trainable} == {"score", "default"}
    fit_stream(tmp_path, module=module, stream=labelled_stream())
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_ewc_and_replay_over_a_stream(fisher: str, tmp_path: Path) -> None:
    """On the factors of LoRA and the head, by every estimator of the Fisher; protecting changes the result."""
    ends = []
    for strength in (1e-6, 1e4):
        module = classifier(adapter=LORA, learning_rate=1e-2)
        ewc = EWC(strength, fisher=fisher)
        fit_stream(tmp_path, [ewc, ExperienceReplay(8)], module=module, stream=labelled_stream())
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        state = ewc.state_dict()["importance"]
        assert set(state) == trainable
        ends.append(weights(module))
    assert not torch.allclose(*ends)


def test_masked_heads(tmp_path: Path) -> None:
    """Restricted to the classes seen, the second task's classes get no score in the first."""
    module = classifier(head_mask="seen", learning_rate=1e-3)
    metrics = ContinualMetrics(directory=tmp_path)
    fit_stream(tmp_path, [metrics], module=module, stream=labelled_stream(scenario=ClassIncremental(n_tasks=2)))
    batch = LabelledRows(0).batch()
    module.current_task = labelled_tasks()[0]
    assert module(batch["input_ids"], batch["attention_mask"])[:, 2:].max() < -1e8
    loss = module._loss(batch)[0]
    logits = module(batch["input_ids"], batch["attention_mask"])[:, :2]
    torch.testing.assert_close(loss, cross_entropy(logits, batch["labels"]))


def labelled_tasks() -> list[Any]:
    """The tasks of a class-incremental stream over the rows."""
    stream = labelled_stream(scenario=TaskIncremental(n_tasks=2))
    stream.setup("fit")
    return stream.tasks


# ---------------------------------------------------------------------- where weights come from


def test_from_the_folder_of_a_language_model(tmp_path: Path) -> None:
    """Its body, and a head from the seed, the same at once and block by block."""
    from language import llama

    body = built(llama(seed=5))
    body.network.save_pretrained(tmp_path)
    module = built(classifier(str(tmp_path)))
    assert torch.equal(weights(module.network.model), weights(body.network.model))
    assert torch.equal(weights(built(classifier(str(tmp_path)))), weights(module))
    lazy = classifier(str(tmp_path))
    lazy.network = lazy.builder.build(lazy=True, device=torch.device("cpu"))
    lazy.fill_weights("", lazy, torch.device("cpu"))
    assert torch.equal(weights(lazy.network.model), weights(body.network.model))
    assert torch.equal(lazy.network.score.weight, module.network.score.weight)


def test_load_from_checkpoint(tmp_path: Path) -> None:
    """With its own settings."""
    module, run = classifier(adapter=LORA, head_mask="seen"), trainer(tmp_path)
    run.fit(module, datamodule=labelled_stream())
    run.save_checkpoint(tmp_path / "end.ckpt")
    loaded = SequenceClassifier.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(weights(loaded), weights(module))
    assert loaded.head_mask == "seen"


# ---------------------------------------------------------------------- refused


def test_refusals(tmp_path: Path) -> None:
    """Settings out of range, batches without labels, an adapter that takes the head, labels beyond it."""
    with pytest.raises(ValueError, match="`num_labels` must be at least 2, got 1"):
        classifier(labels=1)
    with pytest.raises(ValueError, match="`head_mask` must be one of"):
        classifier(head_mask="all")
    with pytest.raises(ValueError, match="names the head 'score'"):
        built(classifier(adapter={**LORA, "modules_to_save": ["score"]}))
    batch = LabelledRows(0).batch()
    del batch["labels"]
    with pytest.raises(ValueError, match=r"needs dicts with labels, got \['attention_mask', 'input_ids'\]"):
        built(classifier())._loss(batch)
    with pytest.raises(ValueError, match="the head of `SequenceClassifier` has 3 outputs"):
        fit_stream(tmp_path, module=classifier(labels=3), stream=labelled_stream())

"""A request to an encoder with a classification head: attention masks of tokens beside scores of whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.functional.unlearning import kl_retain, uniform_divergence
from lightning_cl.modules import SequenceClassifier
from lightning_cl.unlearning import RMU, ULD, Outputs, Unlearn
from toys import trainer

BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 20,
}


class Sentences(Dataset[dict[str, Tensor]]):
    """Twelve padded sentences of three classes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        attention = (torch.arange(6) < 2 + index % 4).long()
        return {"input_ids": (index + 1) * attention, "attention_mask": attention, "labels": torch.tensor(index % 3)}


CASES: dict[str, Any] = {
    "kl": lambda: Unlearn("npo", retain="kl"),
    "kl, supervised": lambda: Unlearn("npo", retain="kl", kl_positions="supervised"),
    "undial": lambda: Unlearn("undial"),
    "uld": lambda: Unlearn(ULD(), retain="own"),
    "rmu": lambda: Unlearn(RMU("network.bert.encoder.layer.0"), retain="own"),
}


@pytest.mark.parametrize("name", CASES)
def test_padded_sentences_are_forgotten(name: str, tmp_path: Path) -> None:
    """A batch's attention mask is one of tokens, and the scores have none: the request is served to its end."""
    module = SequenceClassifier(BERT, 3, learning_rate=0.01)
    requests = [ForgetRequest("class 1", classes=[1])]
    data = UnlearningDataModule(Sentences(), requests=requests, batch_size=2, epochs_per_request=2, label="labels")
    callback = CASES[name]()
    trainer(tmp_path, [callback], max_epochs=-1).fit(module, datamodule=data)
    record = callback.ledger.records[0]
    assert record.steps == 4
    assert record.before["forget/probability"] != record.after["forget/probability"]


def test_the_divergence_of_row_scores_counts_every_row_once() -> None:
    """Rows of two and of five tokens weigh the same."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    retained = Outputs(torch.randn(2, 3), torch.tensor([0, 2]), mask)
    reference = Outputs(torch.randn(2, 3), retained.labels, mask)
    own = torch.tensor(0.0)
    found = Unlearn("npo", retain="kl").retain_term(retained, own, reference)
    torch.testing.assert_close(found, kl_retain(retained.logits, reference.logits, positions="all"))
    found = Unlearn(ULD(), retain="own").retain_term(retained, own, None)
    torch.testing.assert_close(found, uniform_divergence(retained.logits, None))


def test_the_mask_of_token_scores_stays() -> None:
    """Scores of tokens keep the attention mask."""
    mask = torch.ones(2, 4, dtype=torch.bool)
    assert Outputs(torch.zeros(2, 4, 3), mask=mask).score_mask is mask


def test_labels_that_are_nowhere_but_in_samples_must_be_named() -> None:
    """The error of a request for a class says how."""
    data = UnlearningDataModule(Sentences(), requests=[ForgetRequest("class 1", classes=[1])])
    with pytest.raises(ValueError, match=r"labels that can be found.*`label`"):
        data.setup("fit")

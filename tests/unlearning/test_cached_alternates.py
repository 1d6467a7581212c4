"""Of the reference of DPO two numbers a row are kept; `test_losses_contract` has them on two ranks and in resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cl.functional.unlearning import token_nll
from lightning_cl.unlearning import DPO, NPO, Unlearn
from lightning_cl.unlearning.reference import Reference
from toys import ToyModule, trainer, weights
from unlearning_contract import FORGOTTEN, TokenRows, TokenToy, request_stream


class Looks(Unlearn):
    """Keeps what the reference holds at the request's start, and the weights of then."""

    def serve_start(self, trainer: Any, pl_module: Any, task: Any) -> None:
        super().serve_start(trainer, pl_module, task)
        assert self._reference is not None
        self.kept, self.state = self._reference.kept, self._reference.state_dict()
        self.num_bytes = self._reference.num_bytes(pl_module)
        self.found = copy.deepcopy(pl_module.model).eval()


def fit(root: Path, unlearn: Unlearn, batch_size: int = 8) -> Tensor:
    """Learn, learn, forget, learn; return the final weights."""
    module = TokenToy()
    trainer(root, [unlearn]).fit(module, datamodule=request_stream(tokens=True, batch_size=batch_size))
    return weights(module)


@pytest.mark.parametrize("batch_size", [8, 5])
def test_two_cached_sums_are_the_same_reference_as_a_copy(batch_size: int, tmp_path: Path) -> None:
    """Up to rounding, with a retain term; and they are the default on a stream."""
    ends = {}
    for policy in ("auto", "cached_scores", "copy"):
        unlearn = Looks(DPO(beta=0.3), reference=policy)  # type: ignore[arg-type]
        ends[policy] = fit(tmp_path / policy, unlearn, batch_size)
        assert unlearn.kept == ("copy" if policy == "copy" else "cached_scores")
    torch.testing.assert_close(ends["cached_scores"], ends["copy"], rtol=0, atol=1e-6)
    assert torch.equal(ends["auto"], ends["cached_scores"])


def test_the_cache_holds_a_sum_for_each_answer(tmp_path: Path) -> None:
    """By identity, of the answer and of its alternate, of the weights at the request's start; no weight is kept."""
    unlearn = Looks(DPO(beta=0.3))
    fit(tmp_path, unlearn)
    assert unlearn.state["copy"] is None
    # an identity and a sum for each
    assert unlearn.num_bytes == 2 * len(FORGOTTEN) * (8 + 4)
    rows = TokenRows()
    for kind, start in (("own", ""), ("alternate", "alternate_")):
        ids, sums = unlearn.state["sums"][kind]
        assert ids.tolist() == FORGOTTEN.tolist()
        batch = [rows[row] for row in FORGOTTEN.tolist()]
        inputs, labels = (torch.stack([r[f"{start}{k}"] for r in batch]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            expected = token_nll(unlearn.found(inputs), labels, reduction="sequence_sum")
        torch.testing.assert_close(sums, expected)
    own, alternate = (unlearn.state["sums"][kind][1] for kind in ("own", "alternate"))
    assert not torch.allclose(own, alternate)


def test_a_batch_that_the_cache_does_not_know_is_refused() -> None:
    """An identity, or an alternate, that was not there when the request began."""
    reference = Reference("cached_scores", "request_start", "Unlearn")
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    reference.load_state_dict(
        {
            "kept": "cached_scores",
            "digest": None,
            "copy": None,
            "sums": {"own": (torch.tensor([2, 5]), torch.tensor([0.5, 1.5])), "alternate": none},
        }
    )
    found = reference.cached(torch.tensor([5, 2]), torch.device("cpu"), alternate=False)
    assert found.nll_sum.tolist() == [1.5, 0.5]
    assert found.alternate is None
    for ids, alternate in (([5, 3], False), ([5, 2], True), ([7], False)):
        with pytest.raises(ValueError, match="no reference scores for samples of this batch"):
            reference.cached(torch.tensor(ids), torch.device("cpu"), alternate=alternate)


def test_data_without_alternates_take_one_sum_a_row(tmp_path: Path) -> None:
    """Of NPO on classes."""
    unlearn = Looks(NPO())
    trainer(tmp_path, [unlearn]).fit(ToyModule(), datamodule=request_stream())
    assert unlearn.num_bytes == len(FORGOTTEN) * (8 + 4)

"""What a request did, in numbers: how likely the model holds forgotten, retained and unseen samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.core.capture import forward_step, move_batch, undisturbed
from lightning_cl.core.distributed import gather_rows
from lightning_cl.metrics.unlearning import exact_memorization, loss_score, membership_auc, probability
from lightning_cl.unlearning.reading import OutputReader

__all__ = ["Scores", "measured", "score_samples"]


class Scores:
    """Scores of samples, gathered from all ranks, float32 [n] each.

    Args:
        rows: Float [n, 4]: probability, exact memorisation, the mean of its tokens' negative log-likelihoods, and their
            sum, of each sample.
        ids: Their identities and their class labels, -1 where there are none, int64 [n, 2].
    """

    def __init__(self, rows: Tensor, ids: Tensor) -> None:
        self.probability, self.accuracy, self.loss, self.nll_sum = rows.unbind(1)
        self.ids, self.labels = ids.unbind(1)

    def __len__(self) -> int:
        return len(self.ids)

    def once(self) -> Scores:
        """Return the scores of each identity once; every rank reads the whole of a set of fewer samples than ranks."""
        return self._at(torch.from_numpy(np.unique(self.ids.numpy(), return_index=True)[1]))

    def like(self, other: Scores) -> Scores:
        """Return the scores of samples in the classes of others; all of them where there are no classes."""
        return self._at(torch.isin(self.labels, other.labels))

    def _at(self, index: Tensor) -> Scores:
        rows = torch.stack([self.probability, self.accuracy, self.loss, self.nll_sum], 1)
        return Scores(rows[index], torch.stack([self.ids, self.labels], 1)[index])


def score_samples(
    trainer: Trainer, pl_module: LightningModule, reader: OutputReader, batches: Iterable[tuple[Any, Tensor]]
) -> Scores:
    """Run the module's own step, in evaluation mode and without a trace, and score every sample.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module.
        reader: Reads scores and labels.
        batches: This rank's batches, as many on all ranks, with identities.
    """
    rows, identities = [torch.empty(0, 4)], [torch.empty(0, 2, dtype=torch.int64)]
    for batch, ids in batches:
        batch = move_batch(trainer, pl_module, batch)
        with undisturbed(pl_module, seed=0, as_in_step=True), reader:
            outputs = reader.take(batch, forward_step(pl_module, batch))
        if outputs.logits is None or outputs.labels is None:
            # as of a module that forgets by its activations
            continue
        found = outputs.supervised
        logits, labels = (tensor[found] for tensor in outputs.predictions)
        if found.any():
            scores = [score(logits, labels) for score in (probability, exact_memorization, loss_score)]
            scores.append(outputs.nll_sum[found])
            rows.append(torch.stack([score.float().cpu() for score in scores], 1))
            classes = labels.cpu() if labels.ndim == 1 else torch.full((len(labels),), -1)
            identities.append(torch.stack([ids[found.cpu()], classes], 1))
    device = pl_module.device
    gathered, of_ids = (gather_rows(torch.cat(parts).to(device))[0].cpu() for parts in (rows, identities))
    return Scores(gathered, of_ids)


def measured(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Return the measurements of sets of samples by name.

    Of each set ``<set>/samples``, their number, ``<set>/probability``, the mean over samples of the geometric mean of
    their tokens' probabilities, and ``<set>/accuracy``, the mean share of tokens on top; of ``"forget"`` beside
    ``"holdout"`` also ``forget/membership_auc``, the chance that a sample never seen has the higher loss: 0.5 where
    they cannot be told apart, 1 where the forgotten are still known. Of ``"holdout"`` only the classes of what is
    forgotten count.
    """
    found: dict[str, float] = {}
    if "forget" in scores and "holdout" in scores:
        scores = {**scores, "holdout": scores["holdout"].like(scores["forget"])}
    for name, score in scores.items():
        if len(score):
            found[f"{name}/samples"] = len(score)
            found[f"{name}/probability"] = float(score.probability.mean())
            found[f"{name}/accuracy"] = float(score.accuracy.mean())
    if "forget" in scores and "holdout" in scores:
        forget, unseen = scores["forget"], scores["holdout"].loss
        # a model that is destroyed has no loss to rank
        if len(forget) and len(unseen) and forget.loss.isfinite().all() and unseen.isfinite().all():
            found["forget/membership_auc"] = membership_auc(forget.loss, unseen).auc
    return found
